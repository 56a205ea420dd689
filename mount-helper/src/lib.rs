//! The command line of mount.boxlite, as mount(8) describes it under "external helpers". It is a
//! library, so that the manual page is made from the same definition.

#![forbid(unsafe_code)]

use std::ffi::OsString;

use clap::{ArgAction, Parser};

/// The end of `mount.boxlite --help` and of its manual page.
pub const EXAMPLES: &str = "\
Examples:
  mount -t boxlite /srv/boxlite-home /mnt/boxlite
  mount -t boxlite -o ro,allow_other /srv/boxlite-home /mnt/boxlite
  mount -o remount,ro /mnt/boxlite
  umount /mnt/boxlite

In /etc/fstab, for everybody, and for a user who mounts it:
  /srv/boxlite-home     /mnt/boxlite     boxlite  nofail,allow_other  0  0
  /home/alice/.boxlite  /home/alice/boxes  boxlite  user,noauto         0  0

Exit status: 0 mounted, 1 the command line is wrong, 2 the system lacks something, 32 the mount failed.";

/// Mounts a BoxLite home, for mount(8) and /etc/fstab
///
/// mount(8) runs mount.boxlite for file systems of the types boxlite and fuse.boxlite. It runs
/// `boxlitefs mount`, which serves in the background, and returns once the mount serves. Root
/// mounts the home of another user as that user, so that only the owner of the boxes sees them;
/// with allow_other or allow_root, as root.
#[derive(Clone, Debug, Parser, PartialEq, Eq)]
#[command(
    name = "mount.boxlite",
    version,
    override_usage = "mount.boxlite HOME DIRECTORY [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTION[,OPTION…]]",
    after_help = EXAMPLES
)]
pub struct Request {
    /// The BoxLite home
    #[arg(value_name = "HOME")]
    pub home: OsString,
    /// The directory to mount it on
    #[arg(value_name = "DIRECTORY")]
    pub directory: OsString,
    /// Mount options, separated by commas: those of `boxlitefs mount`, those that every mount
    /// takes, and remount with ro or rw
    #[arg(short = 'o', value_name = "OPTION[,OPTION…]", allow_hyphen_values = true, action = ArgAction::Append)]
    pub options: Vec<OsString>,
    /// Ignore unknown options
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Do everything except the mount
    #[arg(short = 'f')]
    pub fake: bool,
    /// Print what is run
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Accepted: there is no mtab to keep out of
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Accepted: the type is known
    #[arg(short = 't', value_name = "TYPE")]
    pub kind: Option<OsString>,
    /// Accepted: mount(8) has entered the namespace already
    #[arg(short = 'N', value_name = "NAMESPACE")]
    pub namespace: Option<OsString>,
}

impl Request {
    /// Returns each single option, in the order given.
    pub fn each_option(&self) -> impl Iterator<Item = &str> {
        let lists = self.options.iter().filter_map(|list| list.to_str());
        lists
            .flat_map(|list| list.split(','))
            .filter(|option| !option.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Request, clap::Error> {
        Request::try_parse_from(std::iter::once("mount.boxlite").chain(line.split_whitespace()))
    }

    #[test]
    fn what_mount_passes_is_understood() {
        let request = parsed("/home/u/.boxlite /mnt/b -sfnv -N /proc/1/ns -o rw,user -t boxlite");
        let request = request.unwrap();
        assert_eq!(
            (request.home, request.directory),
            ("/home/u/.boxlite".into(), "/mnt/b".into())
        );
        assert_eq!(request.options, ["rw,user"]);
        assert!(request.sloppy && request.fake && request.verbose);
    }

    #[test]
    fn options_may_come_first_and_have_their_value_attached() {
        let request = parsed("-noro -o noexec -- -odd /mnt/b").unwrap();
        assert_eq!(request.each_option().collect::<Vec<_>>(), ["ro", "noexec"]);
        assert_eq!(
            (request.home, request.directory),
            ("-odd".into(), "/mnt/b".into())
        );
        assert!(request.no_mtab);
    }

    #[test]
    fn an_unknown_option_and_a_missing_value_are_refused() {
        assert!(parsed("a b -x").is_err());
        assert!(parsed("a b --sloppy").is_err());
        assert!(parsed("a b -o").is_err());
        assert!(parsed("a").is_err());
        assert!(parsed("a b c").is_err());
    }
}
