//! Parses the options of `-o`.

use std::fmt::Write as _;
use std::time::Duration;

use super::documented::DOCUMENTED_OPTIONS;
use crate::tree::{Compacting, Compression, ImportLimits, Links, Undo};
use crate::{Error, Result};

/// The options of a mount, as `-o` gives them. `nosuid` and `nodev` are always on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Refuse every change.
    pub read_only: bool,
    /// Other users may enter; the permission bits decide what they may read.
    pub allow_other: bool,
    /// root may enter.
    pub allow_root: bool,
    /// No change while a BoxLite runtime has the home. Without it, those that are safe beside one
    /// are made.
    pub exclusive: bool,
    /// Programs in guests' files can't be run from the mount.
    pub noexec: bool,
    /// Access times are not kept.
    pub noatime: bool,
    /// `compress=LEVEL` and `cache=SIZE`.
    pub compression: Compression,
    /// `compact=SECONDS`.
    pub compacting: Compacting,
    /// `max_import=SIZE` and `import=trusted|untrusted`.
    pub imports: ImportLimits,
    /// `links=inside|guest`.
    pub links: Links,
    /// `undo=TIME`.
    pub undo: Undo,
}

/// The effect of an option.
#[derive(Clone, Copy)]
enum Effect {
    ReadOnly(bool),
    AllowOther,
    AllowRoot,
    Exclusive(bool),
    NoExec(bool),
    NoAtime(bool),
    /// Accepted because mount(8) and fstab pass it; no effect here.
    Nothing,
}

/// Every option without a value, in the order in which an error lists them.
const FLAGS: &[(&str, Effect)] = &[
    ("ro", Effect::ReadOnly(true)),
    ("rw", Effect::ReadOnly(false)),
    ("allow_other", Effect::AllowOther),
    ("allow_root", Effect::AllowRoot),
    ("exclusive", Effect::Exclusive(true)),
    ("shared", Effect::Exclusive(false)),
    ("noexec", Effect::NoExec(true)),
    ("exec", Effect::NoExec(false)),
    ("noatime", Effect::NoAtime(true)),
    ("atime", Effect::NoAtime(false)),
    ("relatime", Effect::NoAtime(false)),
    ("norelatime", Effect::NoAtime(false)),
    ("strictatime", Effect::NoAtime(false)),
    ("diratime", Effect::Nothing),
    ("nodiratime", Effect::Nothing),
    ("lazytime", Effect::Nothing),
    ("nolazytime", Effect::Nothing),
    ("nosuid", Effect::Nothing),
    ("suid", Effect::Nothing),
    ("nodev", Effect::Nothing),
    ("dev", Effect::Nothing),
    ("sync", Effect::Nothing),
    ("async", Effect::Nothing),
    ("dirsync", Effect::Nothing),
    ("auto", Effect::Nothing),
    ("noauto", Effect::Nothing),
    ("user", Effect::Nothing),
    ("users", Effect::Nothing),
    ("nouser", Effect::Nothing),
    ("owner", Effect::Nothing),
    ("group", Effect::Nothing),
    ("_netdev", Effect::Nothing),
    ("_rnetdev", Effect::Nothing),
    ("nofail", Effect::Nothing),
    ("defaults", Effect::Nothing),
    ("default_permissions", Effect::Nothing),
];

/// Prefixes of options with a value, and of name spaces that mount(8) reserves for other programs.
/// Such options are ignored.
const IGNORED_PREFIXES: &[&str] = &["fsname=", "subtype=", "comment=", "user=", "x-", "X-"];

impl Options {
    /// Parses comma-separated lists; a later option wins. With `sloppy`, unknown options are
    /// ignored, as mount(8) asks with `-s`.
    ///
    /// # Errors
    /// EINVAL for an unknown option, a wrong value, and for allow_other together with allow_root.
    pub fn parse<S: AsRef<str>>(lists: &[S], sloppy: bool) -> Result<Options> {
        let mut options = Options::default();
        let all = lists.iter().flat_map(|list| list.as_ref().split(','));
        for option in all.filter(|option| !option.is_empty()) {
            if options.set(option)? {
                continue;
            }
            match effect(option) {
                Some(effect) => options.apply(effect),
                None if sloppy => log::info!("the unknown option {option} is ignored"),
                None => return Err(unknown(option)),
            }
        }
        if options.allow_other && options.allow_root {
            return Err(Error::new(
                libc::EINVAL,
                "the options allow_other and allow_root exclude each other: allow_other lets root in, too",
            ));
        }
        Ok(options)
    }

    /// Sets an option of ours that has a value; returns false for any other.
    fn set(&mut self, option: &str) -> Result<bool> {
        match option.split_once('=') {
            Some(("compress", level)) => {
                let known = level.parse().ok().filter(|level| (1..=19).contains(level));
                self.compression.level = known.ok_or_else(|| {
                    wrong_value(option, "a level of zstd, from 1 (fast) to 19 (small)")
                })?;
            }
            Some(("cache", size)) => {
                self.compression.cache = bytes(size).ok_or_else(|| {
                    wrong_value(option, "a size in bytes, or with K, M, G or T; 0 for none")
                })?;
            }
            Some(("max_import", size)) => {
                self.imports.most =
                    Some(bytes(size).filter(|size| *size > 0).ok_or_else(|| {
                        wrong_value(option, "a size in bytes, or with K, M, G or T, more than 0")
                    })?);
            }
            Some(("import", trust)) => {
                self.imports.untrusted = match trust {
                    "trusted" => false,
                    "untrusted" => true,
                    _ => return Err(wrong_value(option, "trusted or untrusted")),
                };
            }
            Some(("links", lead)) => {
                self.links = match lead {
                    "inside" => Links::Inside,
                    "guest" => Links::Guest,
                    _ => return Err(wrong_value(option, "inside or guest")),
                };
            }
            Some(("undo", time)) => {
                self.undo = time.parse().map_err(|wanted| wrong_value(option, wanted))?;
            }
            Some(("compact", "off")) => self.compacting.after = None,
            Some(("compact", seconds)) => {
                let long = seconds.parse().ok();
                let long = long.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                let long = long.filter(|long| !long.is_zero());
                self.compacting.after = Some(long.ok_or_else(|| {
                    wrong_value(option, "a number of seconds, more than 0, or off")
                })?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Returns the options by name, as `.boxlite/status` has them.
    pub(super) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "ro": self.read_only,
            "exclusive": self.exclusive,
            "allow_other": self.allow_other,
            "allow_root": self.allow_root,
            "noexec": self.noexec,
            "noatime": self.noatime,
            "compress": self.compression.level,
            "cache": self.compression.cache,
            "compact": self.compacting.after.map(seconds),
            "max_import": self.imports.most,
            "import": if self.imports.untrusted { "untrusted" } else { "trusted" },
            "undo": self.undo.keep_for.map(seconds),
            "links": match self.links {
                Links::Inside => "inside",
                Links::Guest => "guest",
            },
        })
    }

    /// Returns the kernel's options that let other users in. With them the kernel must check modes:
    /// otherwise other users could read everything that guests have.
    pub(super) fn access_options(&self) -> &'static [&'static str] {
        // The kernel has no allow_root: fuser lets in only root and the owner.
        if self.allow_other || self.allow_root {
            &["default_permissions", "allow_other"]
        } else {
            &[]
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::ReadOnly(on) => self.read_only = on,
            Effect::AllowOther => self.allow_other = true,
            Effect::AllowRoot => self.allow_root = true,
            Effect::Exclusive(on) => self.exclusive = on,
            Effect::NoExec(on) => self.noexec = on,
            Effect::NoAtime(on) => self.noatime = on,
            Effect::Nothing => {}
        }
    }
}

/// A time in seconds, as the option takes it.
fn seconds(long: Duration) -> serde_json::Value {
    match long.subsec_nanos() {
        0 => long.as_secs().into(),
        _ => long.as_secs_f64().into(),
    }
}

/// Parses a size: bytes, or with K, M, G or T, each 1024 of the unit before.
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

fn wrong_value(option: &str, wanted: &str) -> Error {
    Error::new(
        libc::EINVAL,
        format!("the mount option {option:?} needs {wanted}"),
    )
}

fn effect(option: &str) -> Option<Effect> {
    if IGNORED_PREFIXES
        .iter()
        .any(|prefix| option.starts_with(prefix))
    {
        return Some(Effect::Nothing);
    }
    FLAGS
        .iter()
        .find(|(name, _)| *name == option)
        .map(|(_, effect)| *effect)
}

fn unknown(option: &str) -> Error {
    let mut known = String::new();
    for (name, _) in FLAGS {
        let _ = write!(known, "{name}, ");
    }
    for option in DOCUMENTED_OPTIONS
        .iter()
        .filter(|option| option.form.contains('='))
    {
        let _ = write!(known, "{}, ", option.form);
    }
    Error::new(
        libc::EINVAL,
        format!(
            "the mount option {option:?} is not known; known are {known}fsname=…, subtype=…, comment=… and x-…"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Options> {
        Options::parse(&[list], false)
    }

    #[test]
    fn the_later_of_two_options_that_contradict_wins() {
        assert!(parse("rw,ro").unwrap().read_only);
        assert!(!parse("ro,rw").unwrap().read_only);
        assert!(!Options::parse(&["ro", "rw"], false).unwrap().read_only);
        assert!(parse("exec,noexec,noatime").unwrap().noexec);
        assert!(!parse("noatime,relatime").unwrap().noatime);
    }

    #[test]
    fn what_mount_and_fstab_pass_along_is_accepted_and_changes_nothing() {
        let passed = "defaults,rw,nosuid,suid,nodev,dev,exec,atime,relatime,norelatime,strictatime,\
                      nodiratime,diratime,lazytime,nolazytime,sync,async,dirsync,auto,noauto,user,\
                      users,nouser,owner,group,_netdev,_rnetdev,nofail,default_permissions,\
                      fsname=/x,subtype=boxlite,comment=y,x-systemd.automount,X-mount.mkdir,,";
        assert_eq!(parse(passed).unwrap(), Options::default());
    }

    #[test]
    fn level_and_cache_of_compressed_archives_are_checked() {
        let options = parse("compress=19,cache=512M").unwrap();
        assert_eq!(options.compression.level, 19);
        assert_eq!(options.compression.cache, 512 << 20);
        assert_eq!(parse("cache=0").unwrap().compression.cache, 0);
        assert_eq!(parse("cache=3g").unwrap().compression.cache, 3 << 30);
        for wrong in [
            "compress=0",
            "compress=20",
            "compress=",
            "compress=x",
            "cache=",
            "cache=-1",
            "cache=5X",
            "cache=99999999T",
            "cache=G",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{wrong}");
            assert!(error.message().contains(wrong), "{error}");
        }
    }

    #[test]
    fn the_status_has_every_option_that_is_for_people() {
        let told = Options::default().to_json();
        for option in DOCUMENTED_OPTIONS {
            let name = option.form.split('=').next().unwrap_or_default();
            assert!(told.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn what_archives_may_bring_is_checked() {
        assert_eq!(parse("ro").unwrap().imports, ImportLimits::default());
        let options = parse("max_import=20G,import=untrusted").unwrap();
        assert_eq!(options.imports.most, Some(20 << 30));
        assert!(options.imports.untrusted);
        let later = parse("import=untrusted,import=trusted").unwrap();
        assert!(!later.imports.untrusted);
        for wrong in [
            "max_import=",
            "max_import=0",
            "max_import=-1",
            "max_import=none",
            "import=",
            "import=yes",
            "import=Untrusted",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{wrong}");
            assert!(error.message().contains(wrong), "{error}");
        }
    }

    #[test]
    fn where_links_of_guests_lead_is_checked() {
        assert_eq!(parse("ro").unwrap().links, Links::Inside);
        assert_eq!(parse("links=guest").unwrap().links, Links::Guest);
        let later = parse("links=guest,links=inside").unwrap();
        assert_eq!(later.links, Links::Inside);
        for wrong in ["links=", "links=host", "links=Guest"] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{wrong}");
            assert!(error.message().contains(wrong), "{error}");
        }
    }

    #[test]
    fn how_long_to_keep_what_is_removed_is_checked() {
        let day = Some(Duration::from_secs(86_400));
        assert_eq!(parse("ro").unwrap().undo.keep_for, day);
        assert_eq!(parse("undo=off").unwrap().undo.keep_for, None);
        for (time, seconds) in [
            ("2s", 2),
            ("90", 90),
            ("30m", 1800),
            ("24h", 86_400),
            ("7d", 604_800),
        ] {
            let keep_for = parse(&format!("undo={time}")).unwrap().undo.keep_for;
            assert_eq!(keep_for, Some(Duration::from_secs(seconds)), "{time}");
        }
        for wrong in [
            "undo=",
            "undo=0",
            "undo=on",
            "undo=-1h",
            "undo=1w",
            "undo=99999999999999999d",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{wrong}");
            assert!(error.message().contains(wrong), "{error}");
        }
    }

    #[test]
    fn when_to_merge_layers_is_checked() {
        assert_eq!(parse("compact=off").unwrap().compacting.after, None);
        let after = parse("compact=5").unwrap().compacting.after;
        assert_eq!(after, Some(Duration::from_secs(5)));
        let after = parse("compact=0.5").unwrap().compacting.after;
        assert_eq!(after, Some(Duration::from_millis(500)));
        for wrong in [
            "compact=",
            "compact=0",
            "compact=on",
            "compact=-1",
            "compact=nan",
            "compact=1e30",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{wrong}");
            assert!(error.message().contains(wrong), "{error}");
        }
    }

    #[test]
    fn an_unknown_option_is_named_and_the_known_ones_are_listed() {
        let error = parse("ro,uid=1000").unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.message().contains("\"uid=1000\""));
        assert!(error.message().contains("allow_other"));
        assert!(parse("gid=5").is_err());
        assert!(parse("ro ").is_err());
        assert!(parse("allow_other=1").is_err());
    }

    #[test]
    fn what_is_documented_is_known_and_a_wrong_value_of_it_is_told_from_an_unknown_option() {
        for option in DOCUMENTED_OPTIONS {
            match option.form.split_once('=') {
                None => assert!(parse(option.form).is_ok(), "{}", option.form),
                Some((name, _)) => {
                    let error = parse(&format!("{name}=?")).unwrap_err();
                    assert!(error.message().contains("needs"), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_sloppy_mount_ignores_unknown_options_and_keeps_the_rest() {
        let options = Options::parse(&["uid=1000,ro,bogus"], true).unwrap();
        assert!(options.read_only);
    }

    #[test]
    fn allow_other_and_allow_root_together_are_refused() {
        assert!(parse("allow_other").unwrap().allow_other);
        assert!(parse("allow_root").unwrap().allow_root);
        assert_eq!(
            parse("allow_other,allow_root").unwrap_err().errno(),
            libc::EINVAL
        );
    }
}
