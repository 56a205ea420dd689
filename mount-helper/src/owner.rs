//! The owner of a home, as whom it is mounted.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use mount_helper::Request;

/// The user who owns a home.
#[derive(Debug, PartialEq, Eq)]
pub struct Owner {
    /// As the user database has it.
    pub name: String,
    uid: u32,
    gid: u32,
    /// The user's home directory.
    home: Option<OsString>,
}

/// Returns the owner of the home, if root mounts the home of another user. The mount is then made
/// as that user, since only the user who mounts may enter. With allow_other or allow_root it is
/// made as root.
pub fn other_owner(request: &Request) -> Option<Owner> {
    let lets_in = |option: &str| matches!(option, "allow_other" | "allow_root");
    if !rustix::process::geteuid().is_root() || request.each_option().any(lets_in) {
        return None;
    }
    let meta = fs::metadata(&request.home).ok()?;
    if meta.uid() == 0 {
        return None;
    }
    Some(Owner::of(meta.uid()).unwrap_or_else(|| Owner {
        name: format!("user {}", meta.uid()),
        uid: meta.uid(),
        gid: meta.gid(),
        home: None,
    }))
}

impl Owner {
    /// Looks a user up in the user database, which getent reads wherever it is kept.
    fn of(uid: u32) -> Option<Owner> {
        let output = Command::new("getent")
            .args(["passwd", &uid.to_string()])
            .output()
            .ok()?;
        Owner::from_line(&String::from_utf8(output.stdout).ok()?, uid)
    }

    /// Parses `name:password:uid:gid:comment:home:shell`.
    fn from_line(line: &str, uid: u32) -> Option<Owner> {
        let mut fields = line.lines().next()?.split(':');
        let name = fields.next()?.to_owned();
        if fields.nth(1)?.parse() != Ok(uid) {
            return None;
        }
        let gid = fields.next()?.parse().ok()?;
        Some(Owner {
            name,
            uid,
            gid,
            home: fields.nth(1).map(OsString::from),
        })
    }

    /// Whether this user owns a directory, and so may mount on it.
    pub fn has(&self, directory: &OsStr) -> bool {
        fs::metadata(directory).is_ok_and(|meta| meta.uid() == self.uid)
    }

    /// Makes a command run as this user, without the groups of root.
    pub fn becomes(&self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
        command.env("USER", &self.name).env("LOGNAME", &self.name);
        match &self.home {
            Some(home) => command.env("HOME", home),
            None => command.env_remove("HOME"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_read_from_the_user_database_and_only_the_right_one() {
        let line = "alice:x:1000:1001:Alice,,,:/home/alice:/bin/bash\n";
        let owner = Owner::from_line(line, 1000).unwrap();
        assert_eq!(
            (owner.name.as_str(), owner.uid, owner.gid),
            ("alice", 1000, 1001)
        );
        assert_eq!(owner.home, Some("/home/alice".into()));
        assert_eq!(Owner::from_line(line, 1001), None);
        assert_eq!(Owner::from_line("", 1000), None);
    }
}
