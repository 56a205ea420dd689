//! A mount behind a file server: one process makes the calls for all its clients.

use std::path::{Path, PathBuf};
use std::process::Output;

use super::common::*;

/// Serves $M through sshfs at $S without a network: the `ssh` it calls is the server. Has a backup
/// at $BK/s of the snapshot `s`, which differs from the live disk.
struct Served {
    home: TestHome,
    mount: Mounted,
    at: PathBuf,
    backup: PathBuf,
    then: String,
}

const SERVE: &str = r#"
    set -e
    for server in /usr/lib/openssh/sftp-server /usr/lib/ssh/sftp-server /usr/libexec/openssh/sftp-server; do
        [ ! -x "$server" ] || printf '#!/bin/sh\nexec %s\n' "$server" > "$BK/ssh"
    done
    chmod +x "$BK/ssh"
    sshfs -o ssh_command="$BK/ssh",dcache_timeout=1 "x:$M" "$S"
"#;

impl Served {
    fn start() -> Served {
        let home = TestHome::new();
        let mount = home.mount();
        home.guest_write("web", FREE_AREA, b"then");
        mount.snapshot("web", "s").unwrap();
        home.guest_write("web", FREE_AREA, b"now");
        let (at, backup) = (home.beside("served"), home.beside("backup"));
        std::fs::create_dir(&at).unwrap();
        std::fs::create_dir(&backup).unwrap();
        let of_snapshot = mount.at("web/snapshots/s");
        succeed(&["cp", "-r", text(&of_snapshot), text(&backup)]);
        mount.remove_snapshot("web", "s").unwrap();
        let then = archive_digest(&backup.join("s/export.boxlite"));
        let served = Served {
            home,
            mount,
            at,
            backup,
            then,
        };
        served.done(SERVE);
        served
    }

    fn shell(&self, command: &str) -> Output {
        let places: [(&str, &Path); 3] = [
            ("M", self.mount.root()),
            ("S", &self.at),
            ("BK", &self.backup),
        ];
        script(command, &places).output().expect("a shell")
    }

    fn done(&self, command: &str) {
        let output = self.shell(command);
        let log = self.mount.log();
        assert!(output.status.success(), "{command}: {output:?}\n{log}");
    }

    fn end(self) {
        self.done("fusermount3 -u \"$S\"");
        self.mount.unmount();
        self.home.assert_whole();
    }
}

#[test]
fn a_snapshot_taken_through_a_file_server_is_there_for_all() {
    let served = Served::start();
    let now = digest(&served.home.live_disk("web"));
    served.done("mkdir $S/web/snapshots/x");
    assert_eq!(digest(&served.home.snapshot_disk("web", "x")), now);
    assert_eq!(served.mount.names("web/snapshots/x").len(), 5);
    served.done("ls $S/web/snapshots/x > /dev/null && cmp $S/web/snapshots/x/export.boxlite $M/web/snapshots/x/export.boxlite");
    served.done("rmdir $S/web/snapshots/x");
    assert!(served.mount.names("web/snapshots").is_empty());
    served.end();
}

#[test]
fn a_tool_behind_a_file_server_that_leaves_out_what_is_there_brings_its_snapshot() {
    let served = Served::start();
    for (number, command) in [
        "cp -r --no-preserve=all $BK/s $S/web/snapshots/T",
        "cp -rn $BK/s $S/web/snapshots/T",
        "rsync -r --links --ignore-existing $BK/s/ $S/web/snapshots/T",
        "rsync -r --links -u $BK/s/ $S/web/snapshots/T",
        "cp -r $BK/s $BK/T && mv -n $BK/T $S/web/snapshots/ && ! test -e $BK/T",
        // It complains about the links, which it makes in two steps.
        "cp -r $BK/s $BK/T && (cd $BK && tar c T) | tar x --skip-old-files -C $S/web/snapshots || true",
    ]
    .into_iter()
    .enumerate()
    {
        // sshfs keeps finding names that it has seen, so each command gets a new one.
        let name = format!("t{number}");
        served.done(&command.replace('T', &name));
        // sshfs closes the file after its client has moved on.
        let export = served
            .mount
            .at(format!("web/snapshots/{name}/export.boxlite"));
        // The snapshot is missing for a moment while it replaces another.
        let copied = served.home.beside("copied");
        let made = || {
            std::fs::copy(&export, &copied).is_ok() && archive_digest(&copied) == served.then
        };
        eventually(&format!("{command}: {}", served.mount.log()), made);
    }
    served.end();
}
