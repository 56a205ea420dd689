//! The options that a remount can't change: mount(8) passes those that the mount has along, so each
//! is compared with what `.boxlite/status` says.

/// Options that a remount changes, or that have no effect on a mount of boxlitefs.
const CHANGEABLE: [&str; 35] = [
    "remount",
    "ro",
    "rw",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "strictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "sync",
    "async",
    "dirsync",
    "auto",
    "noauto",
    "user",
    "users",
    "nouser",
    "owner",
    "group",
    "_netdev",
    "_rnetdev",
    "nofail",
    "defaults",
    "default_permissions",
    "silent",
    "loud",
];

/// What mount(8) and the kernel add, and name spaces that belong to other programs.
const IGNORED_PREFIXES: [&str; 10] = [
    "fsname=",
    "subtype=",
    "comment=",
    "user=",
    "user_id=",
    "group_id=",
    "max_read=",
    "blksize=",
    "x-",
    "X-",
];

/// Returns the first option that a remount can't give a mount with this status.
pub fn first_refused<'o>(
    mut options: impl Iterator<Item = &'o str>,
    status: &str,
) -> Option<&'o str> {
    options.find(|option| !is_accepted(option, status))
}

fn is_accepted(option: &str, status: &str) -> bool {
    let is_ignored = |prefix: &&str| option.starts_with(*prefix);
    if CHANGEABLE.contains(&option) || IGNORED_PREFIXES.iter().any(is_ignored) {
        return true;
    }
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let (field, wanted) = match (name, value) {
        ("shared", "") => ("exclusive", "false".to_owned()),
        ("exclusive" | "allow_other" | "allow_root", "") => (name, "true".to_owned()),
        ("import" | "links", value) => (name, format!("\"{value}\"")),
        ("compact", "off") => (name, "null".to_owned()),
        ("cache" | "max_import", size) => match bytes(size) {
            Some(bytes) => (name, bytes.to_string()),
            None => return false,
        },
        ("compress" | "compact", number) => (name, number.to_owned()),
        _ => return false,
    };
    present(status, field) == Some(wanted.as_str())
}

/// Returns the value of an option as the status has it.
fn present<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    let (_, options) = status.split_once("\"options\": {")?;
    let (options, _) = options.split_once('}')?;
    let (_, value) = options.split_once(&format!("\"{name}\": "))?;
    let value = value.split(['\n', '}']).next()?;
    Some(value.trim().trim_end_matches(','))
}

/// Parses a size as `boxlitefs mount` does: bytes, or with K, M, G or T.
fn bytes(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match size.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "{\n  \"options\": {\n    \"allow_other\": false,\n    \"cache\": 536870912,\n    \
        \"compact\": 30,\n    \"compress\": 3,\n    \"exclusive\": true,\n    \
        \"import\": \"trusted\",\n    \"links\": \"inside\",\n    \"max_import\": null\n  },\n  \
        \"runtime\": null\n}";

    fn refused(options: &str) -> Option<&str> {
        first_refused(options.split(','), STATUS)
    }

    #[test]
    fn what_the_mount_has_may_be_passed_along_and_nothing_else() {
        let has = "rw,nosuid,nodev,relatime,user_id=0,group_id=0,exclusive,cache=512M,compact=30,\
                   compress=3,import=trusted,links=inside,x-systemd.automount,fsname=/h,remount,ro";
        assert_eq!(refused(has), None);
        for option in [
            "shared",
            "bogus=1",
            "bogus",
            "allow_other",
            "cache=1G",
            "cache=x",
            "compact=off",
            "compress=4",
            "import=untrusted",
            "links=guest",
            "max_import=5G",
        ] {
            assert_eq!(refused(&format!("remount,ro,{option}")), Some(option));
        }
    }
}
