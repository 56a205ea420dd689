//! Programs that copy trees, as their command lines name them. A command line is a hint that any
//! process can give. So only what a process is shown, and which refusal it meets, depends on it.

use crate::process::Caller;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS};
use crate::tree::nodes::node::Derived;

/// A program that copies whole trees, and reads nothing back from where it has put it.
struct CopyTool {
    name: &'static str,
    copies: CopiesWhen,
    sources: Sources,
}

/// When a program copies.
enum CopiesWhen {
    Always,
    /// It does other things as well, and copies by these commands.
    By(&'static [&'static str]),
}

/// Whether a program leaves what it copies in place. mv removes the source of each file as soon as
/// that is copied, and so does rsync with an option for that.
enum Sources {
    Stay,
    MayGo,
    /// It depends on the words of the command line.
    StayIf(fn(&[String]) -> bool),
    /// They stay in an archive. What comes from a pipe may be gone where it was read (`tar c
    /// --remove-files | tar x`).
    StayInFile,
}

const fn tool(name: &'static str, copies: CopiesWhen, sources: Sources) -> CopyTool {
    CopyTool {
        name,
        copies,
        sources,
    }
}

/// All programs that copy, by the name that they are called by. GNU's have a `g` in front where others
/// are the system's.
const COPY_TOOLS: [CopyTool; 25] = {
    use CopiesWhen::{Always, By};
    use Sources::{MayGo, Stay, StayIf, StayInFile};
    [
        tool("cp", Always, Stay),
        tool("gcp", Always, Stay),
        tool("tar", Always, StayInFile),
        tool("gtar", Always, StayInFile),
        tool("bsdtar", Always, StayInFile),
        tool("cpio", Always, StayInFile),
        tool("bsdcpio", Always, StayInFile),
        tool("pax", Always, StayInFile),
        tool("unzip", Always, Stay),
        tool("mv", Always, MayGo),
        tool("gmv", Always, MayGo),
        tool("lftp", Always, MayGo),
        tool("7z", Always, MayGo),
        tool("7za", Always, MayGo),
        tool("7zr", Always, MayGo),
        tool("7zz", Always, MayGo),
        tool("7zzs", Always, MayGo),
        tool("borg", Always, MayGo),
        tool("restic", Always, MayGo),
        tool("rsync", Always, StayIf(is_rsync_that_keeps)),
        tool("gio", By(&["copy", "move"]), MayGo),
        tool(
            "busybox",
            By(&["cp", "mv", "tar", "cpio", "unzip"]),
            StayIf(is_cp_applet),
        ),
        tool(
            "toybox",
            By(&["cp", "mv", "tar", "cpio"]),
            StayIf(is_cp_applet),
        ),
        tool(
            "coreutils",
            By(&["cp", "mv", "install"]),
            StayIf(is_cp_applet),
        ),
        tool(
            "rclone",
            By(&["copy", "copyto", "move", "moveto", "sync", "bisync"]),
            StayIf(is_rclone_that_keeps),
        ),
    ]
};

fn is_rsync_that_keeps(words: &[String]) -> bool {
    !words
        .iter()
        .any(|word| word.starts_with("--remove-s") || word == "--server" || word == "--daemon")
}

fn is_cp_applet(words: &[String]) -> bool {
    words.get(1).map(|word| base_name(word)) == Some("cp")
}

fn is_rclone_that_keeps(words: &[String]) -> bool {
    // A directory may have the name of a command.
    !words
        .iter()
        .any(|word| matches!(word.as_str(), "move" | "moveto"))
}

/// Programs that make a directory tree available to others and make their calls. Which of their
/// clients a call is for, and why, can't be told.
const FILE_SERVERS: [&str; 16] = [
    "sftp-server",
    "internal-sftp",
    "sshd",
    "sshd-session",
    "smbd",
    "nfsd",
    "ganesha.nfsd",
    "unfsd",
    "bindfs",
    "mergerfs",
    "unionfs",
    "virtiofsd",
    "diod",
    "vsftpd",
    "proftpd",
    "pure-ftpd",
];

/// The parts of a box that are not links.
const PARTS: [&str; 4] = [BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS];

fn copy_tool(name: &str) -> Option<&'static CopyTool> {
    COPY_TOOLS.iter().find(|tool| tool.name == name)
}

fn base_name(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

/// The program that a caller runs: its command line, read once.
pub struct Program {
    caller: Caller,
    words: Vec<String>,
    /// The file name of the executable, where that is not what the first word says.
    executable: Option<String>,
}

impl Program {
    /// Reads the command line of a caller.
    pub fn of(caller: Caller) -> Program {
        let words = caller.command_line();
        let first = words.first().map(|word| base_name(word));
        let is_known = first.is_some_and(|name| copy_tool(name).is_some());
        Program {
            caller,
            executable: (!is_known).then(|| caller.executable()).flatten(),
            words,
        }
    }

    /// Returns the file name of the first word.
    fn name(&self) -> Option<&str> {
        self.words.first().map(|word| base_name(word))
    }

    /// Returns whether it is called by this name.
    pub fn is(&self, name: &str) -> bool {
        self.name() == Some(name)
    }

    /// Returns whether it copies: what it makes a directory for comes into that directory next.
    pub fn copies(&self) -> bool {
        let mut words = self.words.iter().map(|word| base_name(word));
        // Some tools are Python programs, such as borg.
        let is_name = |word: &&str| {
            !(word.starts_with("python") || word.starts_with("ld-linux") || word.starts_with('-'))
        };
        let name = words.find(is_name);
        let tool = name
            .and_then(copy_tool)
            .or_else(|| self.tool_by_executable());
        match tool.map(|tool| &tool.copies) {
            None => false,
            Some(CopiesWhen::Always) => true,
            Some(CopiesWhen::By(commands)) => words
                .find(|word| !word.starts_with('-'))
                .is_some_and(|command| commands.contains(&command)),
        }
    }

    /// Returns the tool that runs under another name: `mv` may be called `zmv`.
    fn tool_by_executable(&self) -> Option<&'static CopyTool> {
        self.executable.as_deref().and_then(copy_tool)
    }

    /// Returns whether it copies, or is a program that, besides other things, copies trees and
    /// looks whether a name is free before it makes it.
    pub fn may_copy(&self) -> bool {
        self.copies() || self.looks_first()
    }

    /// Returns whether it copies trees besides other things, and looks whether a name is free
    /// before it makes it.
    pub fn looks_first(&self) -> bool {
        self.is("mc")
    }

    /// Returns whether it is a file server, whose clients may be programs that copy.
    pub fn serves_others(&self) -> bool {
        let Some(name) = self.name() else {
            let name = self.caller.thread_name();
            return name.is_some_and(|name| FILE_SERVERS.contains(&name.as_str()));
        };
        match name {
            "rclone" => matches!(
                self.words.get(1).map(String::as_str),
                Some("serve" | "mount")
            ),
            // `sshd: user@notty` and the like.
            name => FILE_SERVERS.contains(&name.split([':', ' ']).next().unwrap_or(name)),
        }
    }

    /// Returns whether it copies whole trees, and its command line has no file of this name. A
    /// server of rsync is not told the names.
    pub fn copies_tree_without(&self, name: &str) -> bool {
        let is_server = self.is_rsync() && self.words.iter().any(|word| word == "--server");
        self.copies() && !is_server && !self.words.iter().any(|word| word.ends_with(name))
    }

    /// Returns whether its command line names this file of a box, and no other part of one.
    pub fn copies_only(&self, name: &str) -> bool {
        let is_other_part = |word: &String| {
            let part = base_name(word.trim_end_matches('/'));
            part != name && (PARTS.contains(&part) || Derived::named(part).is_some())
        };
        let names_it = |word: &String| base_name(word) == name;
        self.words.iter().any(names_it) && !self.words.iter().any(is_other_part)
    }

    /// Returns whether it is an rm that removes files of this name, and no directories.
    pub fn removes_only(&self, name: &str) -> bool {
        let has_applets = self.is("busybox") || self.is("toybox") || self.is("coreutils");
        let words = self.words.get(usize::from(has_applets)..);
        let Some((program, arguments)) = words.and_then(<[String]>::split_first) else {
            return false;
        };
        // With -d it removes directories that it has emptied.
        let takes_directories = |word: &String| match word.strip_prefix("--") {
            Some(long) => {
                let options = ["recursive", "dir"];
                !long.is_empty() && options.iter().any(|option| option.starts_with(long))
            }
            None => word.starts_with('-') && word.contains(['r', 'R', 'd']),
        };
        matches!(base_name(program), "rm" | "unlink")
            && !arguments.iter().any(takes_directories)
            && arguments.iter().any(|word| base_name(word) == name)
    }

    /// Returns whether it cuts files or overwrites them with nothing of use.
    pub fn only_destroys(&self) -> bool {
        let applet = self.words.get(1).map(|word| base_name(word));
        let is_one = |name: &str| matches!(name, "truncate" | "shred");
        let has_applets = self.is("busybox") || self.is("toybox") || self.is("coreutils");
        self.name().is_some_and(is_one) || (has_applets && applet.is_some_and(is_one))
    }

    /// Returns whether it is rsync.
    pub fn is_rsync(&self) -> bool {
        self.is("rsync")
    }

    /// Returns whether it leaves its sources in place, so that what it copied can go if it fails.
    pub fn keeps_sources(&self) -> bool {
        match self.name().and_then(copy_tool).map(|tool| &tool.sources) {
            None | Some(Sources::MayGo) => false,
            Some(Sources::Stay) => true,
            Some(Sources::StayIf(stay)) => stay(&self.words),
            Some(Sources::StayInFile) => {
                let words = self.words.iter().skip(1);
                let mut files = words.flat_map(|word| word.split('='));
                !self.caller.reads_a_pipe() && !files.any(|file| self.caller.names_a_pipe(file))
            }
        }
    }

    /// Returns whether it is rsync that puts files aside in a directory whose name has no leading
    /// dot. Where that directory can't be made, rsync drops what it has received and exits with 0.
    pub fn has_unsupported_partial_dir(&self) -> bool {
        const OPTION: &str = "--partial-dir";
        let words = &self.words;
        let is_rsync = words.first().is_some_and(|word| word.ends_with("rsync"));
        let at = words.iter().position(|word| word.starts_with(OPTION));
        let directory = at.and_then(|at| match words[at].split_once('=') {
            Some((_, directory)) => Some(directory),
            None => words.get(at + 1).map(String::as_str),
        });
        let is_kept = directory.is_none_or(|name| name.starts_with('.') && !name.contains('/'));
        is_rsync && !is_kept && words.iter().any(|word| word.starts_with("--delay-updates"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(line: &str) -> Program {
        Program {
            caller: Caller { tid: 0 },
            words: line.split(' ').map(str::to_owned).collect(),
            executable: None,
        }
    }

    #[test]
    fn a_command_line_says_whether_a_program_copies_and_leaves_its_sources() {
        for (line, copies, keeps_sources) in [
            ("/usr/bin/cp -r a b", true, true),
            ("mv a b", true, false),
            ("python3 -u /usr/bin/borg extract", true, false),
            ("rsync -a a b", true, true),
            ("rsync -a --remove-source-files a b", true, false),
            ("rsync --server . b", true, false),
            ("busybox cp a b", true, true),
            ("busybox mv a b", true, false),
            ("busybox sh", false, false),
            ("rclone --progress copy a b", true, true),
            ("rclone move a b", true, false),
            ("rclone move sync b", true, false),
            ("gmv -n a b", true, false),
            ("/lib64/ld-linux-x86-64.so.2 /bin/mv -n a b", true, false),
            ("gio copy a b", true, false),
            ("cat a", false, false),
        ] {
            let program = program(line);
            assert_eq!(program.copies(), copies, "{line}");
            assert_eq!(program.keeps_sources(), keeps_sources, "{line}");
        }
    }

    #[test]
    fn a_command_line_says_what_of_a_box_a_program_is_about() {
        let export = "export.boxlite";
        for (line, removes_only) in [
            ("rm web/export.boxlite", true),
            ("/bin/rm -f -- ./export.boxlite", true),
            ("busybox rm web/export.boxlite", true),
            ("unlink export.boxlite", true),
            ("rm -r web/export.boxlite", false),
            ("rm -fR web", false),
            ("rm --recursive web/export.boxlite", false),
            ("rm -d web/export.boxlite web", false),
            ("rm web/box.json", false),
            ("find web -name export.boxlite -delete", false),
        ] {
            assert_eq!(program(line).removes_only(export), removes_only, "{line}");
        }
        for (line, copies_only) in [
            ("cp new.json web/box.json", true),
            ("cp b/box.json web/", true),
            ("cp -r b/web m", false),
            ("cp b/box.json b/export.boxlite web/", false),
            ("cp -r b/box.json b/rootfs web/", false),
            ("cp -r b/box.json b/snapshots/ web/", false),
        ] {
            assert_eq!(program(line).copies_only("box.json"), copies_only, "{line}");
        }
        assert!(program("busybox truncate -s 0 web/box.json").only_destroys());
        assert!(program("shred web/export.boxlite").only_destroys());
        assert!(!program("cat truncate").only_destroys());
    }

    #[test]
    fn a_command_line_says_whether_a_program_serves_others() {
        assert!(program("sshd: user@notty").serves_others());
        assert!(program("rclone serve sftp a").serves_others());
        assert!(!program("rclone copy a b").serves_others());
        assert!(!program("cp a b").serves_others());
    }
}
