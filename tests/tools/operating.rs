//! What an operator uses besides the files: manual, completions, status and a systemd service.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::*;
use serde_json::Value;

/// Manual pages and completions as installed.
struct Share(tempfile::TempDir);

impl Share {
    fn made() -> Share {
        let place = tempfile::tempdir().unwrap();
        let manual = Path::new(binary()).with_file_name("manual");
        succeed(&[text(&manual), text(place.path())]);
        Share(place)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn pages(&self) -> [PathBuf; 2] {
        ["man/man1/boxlitefs.1", "man/man8/mount.boxlite.8"].map(|page| self.at(page))
    }
}

/// Returns the commands that the help lists.
fn commands() -> Vec<String> {
    let help = succeed(&[binary(), "--help"]);
    let listed = help.split("Commands:\n").nth(1).expect("commands");
    let listed = listed.split("\n\n").next().expect("a paragraph");
    let names = listed
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names
        .map(|line| line.split_whitespace().next().expect("a name").to_owned())
        .collect()
}

/// Returns the options in a help text; `-f` and `--foreground` count as two.
fn options_in(help: &str) -> BTreeSet<String> {
    let lines = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'));
    let words = lines.flat_map(|line| {
        line.split("  ")
            .next()
            .unwrap_or_default()
            .split([' ', ','])
    });
    let options = words.filter(|word| word.starts_with('-') && word.len() > 1);
    options.map(str::to_owned).collect()
}

#[test]
fn manual_pages_name_every_command_and_option_and_pass_the_checks_of_man_and_mandoc() {
    let share = Share::made();
    for page in share.pages() {
        let page = text(&page);
        // The one-line description that apropos lists.
        let name = succeed(&["lexgrog", page]);
        assert!(name.contains("oxlite") && name.contains(" - "), "{name}");
        let lint = run(&["mandoc", "-T", "lint", "-W", "error", page]);
        assert!(lint.status.success(), "{lint:?}");
        let shown = run(&[
            "man",
            "--warnings=w",
            "-E",
            "UTF-8",
            "-Tutf8",
            "-Z",
            "-l",
            page,
        ]);
        assert!(
            shown.status.success() && shown.stderr.is_empty(),
            "{shown:?}"
        );
    }
    let [boxlitefs, mount] = share.pages().map(|page| plain_text(&page));
    let commands = commands();
    assert!(commands.len() > 4, "{commands:?}");
    for command in commands {
        assert!(
            boxlitefs.contains(&format!("boxlitefs {command}")),
            "{command}"
        );
        let help = succeed(&[binary(), &command, "--help"]);
        for option in options_in(&help) {
            assert!(boxlitefs.contains(&option), "{command} {option}");
        }
        assert!(help.contains("Examples:"), "{command}: {help}");
    }
    let helper = Path::new(binary()).with_file_name("mount-boxlite");
    for option in options_in(&succeed(&[text(&helper), "--help"])) {
        assert!(mount.contains(&option), "mount.boxlite {option}");
    }
    // The mount options are in both pages and in the document.
    let help = succeed(&[binary(), "mount", "--help"]);
    let document =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/install.md"));
    let document = document.unwrap();
    let listed = help
        .lines()
        .filter_map(|line| line.trim_start().split_once(": "));
    let listed: Vec<&str> = listed
        .map(|(form, _)| form)
        .filter(|form| form.starts_with(char::is_lowercase) && !form.contains([' ', '/']))
        .collect();
    assert!(listed.contains(&"compress=LEVEL"), "{listed:?}");
    for form in listed {
        assert!(boxlitefs.contains(form) && mount.contains(form), "{form}");
        assert!(document.contains(form), "{form} in docs/install.md");
    }
}

/// Returns the rendered text of a manual page as one line, because line breaks depend on the
/// terminal.
fn plain_text(page: &Path) -> String {
    let shown = succeed(&["mandoc", "-T", "utf8", text(page)]);
    let mut plain = String::new();
    // Bold and underlined letters are overstruck.
    for letter in shown.chars() {
        match letter {
            '\u{8}' => drop(plain.pop()),
            _ => plain.push(letter),
        }
    }
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn completions_are_scripts_of_their_shells_and_complete_every_command() {
    let share = Share::made();
    let bash = share.at("bash-completion/completions/boxlitefs");
    let zsh = share.at("zsh/site-functions/_boxlitefs");
    let fish = share.at("fish/vendor_completions.d/boxlitefs.fish");
    succeed(&["bash", "-n", text(&bash)]);
    succeed(&["zsh", "-n", text(&zsh)]);
    succeed(&["fish", "--no-execute", text(&fish)]);
    let bash_gives = |line: &[&str]| {
        let script = r#"
            source "$1"; shift
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            _boxlitefs boxlitefs "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#;
        succeed(&[&["bash", "-c", script, "bash", text(&bash)], line].concat())
    };
    let fish_gives = |line: &str| {
        let script = format!("source {}; complete -C '{line}'", text(&fish));
        succeed(&["fish", "--no-config", "-c", &script])
    };
    let (by_bash, by_fish) = (bash_gives(&["boxlitefs", ""]), fish_gives("boxlitefs "));
    let by_zsh = fs::read_to_string(&zsh).unwrap();
    let options = bash_gives(&["boxlitefs", "mount", "-o", ""]);
    for value in ["ro", "compress=", "import=untrusted"] {
        assert!(
            options.split_whitespace().any(|it| it == value),
            "{options}"
        );
        assert!(by_zsh.contains(value), "zsh {value}");
    }
    let options = fish_gives("boxlitefs mount -o ");
    assert!(options.contains("import=untrusted"), "{options}");
    for command in commands() {
        assert!(
            by_bash.lines().any(|word| word == command),
            "bash {command}: {by_bash}"
        );
        assert!(
            by_fish
                .lines()
                .any(|line| line.split('\t').next() == Some(&command)),
            "fish {command}: {by_fish}"
        );
        assert!(by_zsh.contains(&format!("({command})")), "zsh {command}");
        let by_bash = bash_gives(&["boxlitefs", &command, "-"]);
        let by_fish = fish_gives(&format!("boxlitefs {command} -"));
        for option in options_in(&succeed(&[binary(), &command, "--help"])) {
            assert!(
                by_bash.lines().any(|word| word == option),
                "bash {command} {option}: {by_bash}"
            );
            assert!(
                by_fish.contains(&option),
                "fish {command} {option}: {by_fish}"
            );
            assert!(by_zsh.contains(&option), "zsh {command} {option}");
        }
    }
    assert!(
        !by_bash.contains("guard"),
        "what is hidden is not completed: {by_bash}"
    );
}

// ---- status -------------------------------------------------------------------------------------

fn status(mount: &Mounted) -> Value {
    let bytes = fs::read(mount.at(".boxlite/status")).unwrap();
    serde_json::from_slice(&bytes)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&bytes)))
}

/// Returns the activities in the status by description.
fn running(mount: &Mounted) -> Vec<(String, Value)> {
    let status = status(mount);
    let all = status["operations"].as_array().unwrap().clone();
    all.into_iter()
        .map(|it| (it["what"].as_str().unwrap().to_owned(), it))
        .collect()
}

#[test]
fn the_status_says_what_is_mounted_how_and_what_it_takes() {
    let home = TestHome::new();
    let mount = home.mount_with(
        &[
            "-o",
            "ro,compress=7,compact=off,max_import=2G,import=untrusted,links=guest",
        ],
        &[],
    );
    let said = status(&mount);
    assert_eq!(said["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(said["pid"], mount.process());
    assert_eq!(said["home"], text(home.root()));
    assert_eq!(said["mountpoint"], text(mount.root()));
    assert_eq!(said["boxes"], 1);
    let options = &said["options"];
    assert_eq!(
        (&options["ro"], &options["compress"]),
        (&true.into(), &7.into())
    );
    assert_eq!(
        (&options["compact"], &options["cache"]),
        (&Value::Null, &(4_u64 << 30).into())
    );
    assert_eq!(said["operations"], Value::Array(Vec::new()));
    let peak = peak_memory(mount.process());
    let told = said["memory"]["peak_bytes"].as_u64().unwrap();
    assert!(told > 0 && told <= peak * 1024, "{told} of {peak} KiB");
    // The output for people.
    let shown = succeed(&[binary(), "status", text(mount.root())]);
    for words in [
        text(mount.root()),
        text(home.root()),
        "ro,compress=7,cache=4.00GiB,compact=off,max_import=2.00GiB,import=untrusted,undo=off,links=guest",
        "nothing",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    let all = succeed(&[binary(), "status"]);
    assert!(all.contains(text(mount.root())), "{all}");
    let json: Value = serde_json::from_str(&succeed(&[
        binary(),
        "status",
        "--json",
        text(mount.root()),
    ]))
    .unwrap();
    assert_eq!(json["home"], said["home"]);
    for place in [home.root(), &mount.at("web")] {
        let shown = succeed(&[binary(), "status", text(place)]);
        assert!(shown.contains(text(mount.root())), "{shown}");
    }
    let nowhere = fail(&[binary(), "status", text(&home.beside(""))]);
    assert!(nowhere.contains("not mounted"), "{nowhere}");
}

#[test]
fn the_status_tells_how_far_exports_and_imports_are_and_forgets_them_when_they_end() {
    let home = TestHome::new();
    let mount = home.mount();
    let path = mount.at("web/export.boxlite");
    let length = path.metadata().unwrap().len();
    let mut export = File::open(&path).unwrap();
    assert!(running(&mount).is_empty(), "nothing was read yet");
    export.seek(SeekFrom::Start(length / 2)).unwrap();
    export.read_exact(&mut [0; 512]).unwrap();
    eventually("the export is reported", || !running(&mount).is_empty());
    let (what, half) = running(&mount).pop().expect("the export");
    assert_eq!(what, "export of box web");
    assert_eq!(half["total_bytes"], length);
    // The kernel may have read ahead.
    assert!(half["bytes"].as_u64().unwrap() >= length / 2, "{half}");
    assert!(half["percent"].as_f64().unwrap() >= 50.0, "{half}");
    let shown = succeed(&[binary(), "status", text(mount.root())]);
    assert!(shown.contains("export of box web: "), "{shown}");
    drop(export);
    eventually("the export is over", || running(&mount).is_empty());

    let bytes = fs::read(archive()).unwrap();
    let half = bytes.len() / 2;
    let mut import = File::create(mount.at("new.boxlite")).unwrap();
    import.write_all(&bytes[..half]).unwrap();
    eventually("the import is reported", || !running(&mount).is_empty());
    let (what, told) = running(&mount).pop().expect("the import");
    assert_eq!(what, "import of new.boxlite");
    assert_eq!(told["bytes"], half as u64);
    let percent = told["percent"]
        .as_f64()
        .expect("a plain archive says how long its disk is");
    assert!((45.0..=55.0).contains(&percent), "{told}");
    import.write_all(&bytes[half..]).unwrap();
    drop(import);
    eventually("the import is over", || running(&mount).is_empty());
    assert!(mount.at("new").is_dir());
}

#[test]
fn the_status_is_there_at_once_while_an_archive_is_compressed_for_long() {
    let home = TestHome::empty();
    let archive = make_archive("long.boxlite", &["--size", "256M"]);
    home.wheel(&["import", text(&archive), "web"]);
    let mut noise = vec![0; 48 << 20];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut noise)
        .unwrap();
    home.guest_write("web", 128 << 20, &noise);
    let mount = home.mount_with(&["-o", "compress=19"], &[]);
    let mut reader = Command::new("cat")
        .arg(mount.at("web/export.boxlite.zst"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let compression = |mount: &Mounted| {
        let mut all = running(mount).into_iter();
        all.find(|(what, _)| what == "compression of box web")
            .map(|(_, it)| it)
    };
    eventually("compression is reported", || compression(&mount).is_some());
    let first = compression(&mount).expect("compression in progress");
    let percent = first["percent"].as_f64().expect("a percentage");
    assert!(percent < 100.0, "{first}");
    eventually("compression advances", || {
        compression(&mount).is_none_or(|now| now["bytes"].as_u64() > first["bytes"].as_u64())
    });
    assert!(
        reader.try_wait().unwrap().is_none(),
        "the reader waits, the status did not"
    );
    let _ = reader.kill();
    reader.wait().unwrap();
    eventually("it ends with its only reader", || {
        compression(&mount).is_none()
    });
}

#[test]
fn every_tool_gets_a_whole_status_although_it_is_another_at_every_look() {
    let home = TestHome::new();
    let mount = home.mount();
    let path = mount.at(".boxlite/status");
    let out = home.beside("copy");
    let (from, to) = (text(&path), text(&out));
    let tools: [&[&str]; 6] = [
        &["cp", from, to],
        &["busybox", "cp", from, to],
        &["rsync", from, to],
        &[
            "dd",
            "bs=100",
            "status=none",
            &format!("if={from}"),
            &format!("of={to}"),
        ],
        &["gio", "copy", from, to],
        &[
            "python3",
            "-c",
            "import shutil,sys; shutil.copyfile(*sys.argv[1:])",
            from,
            to,
        ],
    ];
    let open = |count: usize| -> Vec<File> {
        let files = std::iter::repeat_with(|| File::open(mount.at("web/box.json")).unwrap());
        files.take(count).collect()
    };
    for round in 0..4 {
        // Longer and shorter ones in turn.
        let _open = open(if round % 2 == 0 { 150 } else { 0 });
        for tool in tools {
            let _ = fs::remove_file(&out);
            succeed(tool);
            let copied = fs::read(&out).unwrap();
            let value: Result<Value, _> = serde_json::from_slice(&copied);
            assert!(
                value.is_ok_and(|value| value["boxes"] == 1),
                "{tool:?}: {}",
                String::from_utf8_lossy(&copied)
            );
        }
    }
    // The kernel reports closed files with a delay.
    eventually("the files are closed", || {
        let said: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        said["open_files"].as_u64().unwrap() < 10
    });
    // A slow reader keeps the version that it opened, and its size.
    let mut slow = File::open(&path).unwrap();
    let size = slow.metadata().unwrap().len();
    let _open = open(150);
    eventually("there is a longer one", || {
        path.metadata().unwrap().len() > size
    });
    assert_eq!(slow.metadata().unwrap().len(), size);
    let mut whole = Vec::new();
    slow.read_to_end(&mut whole).unwrap();
    assert_eq!(whole.len() as u64, size);
    assert!(serde_json::from_slice::<Value>(&whole).is_ok());
    assert_eq!(errno(File::create(&path)), libc::EPERM, "it is read-only");
}

#[test]
fn a_live_view_tells_of_what_begins_and_ends_with_the_mount() {
    let home = TestHome::new();
    let mount = home.mount();
    let out = home.beside("watched");
    let mut watch = Command::new(binary())
        .args(["status", "--watch"])
        .arg(mount.root())
        .stdout(File::create(&out).unwrap())
        .spawn()
        .unwrap();
    let seen = |words: &str| fs::read_to_string(&out).unwrap().contains(words);
    eventually("it shows what is mounted", || seen(text(home.root())));
    let mut export = File::open(mount.at("web/export.boxlite")).unwrap();
    export.read_exact(&mut [0; 512]).unwrap();
    eventually("it shows the export", || seen("export of box web: "));
    drop(export);
    mount.unmount();
    assert!(watch.wait().unwrap().success());
    assert!(seen("no longer mounted"));
}

// ---- a service ----------------------------------------------------------------------------------

/// A stand-in for systemd: a socket that receives notifications.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn at(path: PathBuf) -> Manager {
        let socket = UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Manager { socket, path }
    }

    /// Returns the next notification that starts with `beginning`.
    fn hears(&self, beginning: &str) -> String {
        let mut buffer = [0; 4096];
        loop {
            let length = self
                .socket
                .recv(&mut buffer)
                .unwrap_or_else(|e| panic!("{beginning}: {e}"));
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if said.starts_with(beginning) {
                return said;
            }
        }
    }
}

#[test]
fn a_service_tells_when_it_serves_that_it_is_alive_and_that_it_ends_and_logs_for_the_journal() {
    let home = TestHome::new();
    let manager = Manager::at(home.beside("notify"));
    let journal = home.beside("journal");
    let stderr = File::create(&journal).unwrap();
    let meta = stderr.metadata().unwrap();
    let mnt = home.beside("mnt");
    let mut service = Command::new(binary())
        .args(["mount", "--foreground", "-o", ""])
        .args([home.root(), &mnt])
        .env("NOTIFY_SOCKET", &manager.path)
        .env("WATCHDOG_USEC", "200000")
        .env("JOURNAL_STREAM", format!("{}:{}", meta.dev(), meta.ino()))
        .env_remove("RUST_LOG")
        .stderr(stderr)
        .spawn()
        .unwrap();
    let ready = manager.hears("READY=1");
    assert!(is_mounted(&mnt), "it says so only once it serves");
    assert_eq!(names_in(&mnt), ["web"]);
    assert!(
        ready.contains("STATUS=") && ready.contains(text(&mnt)),
        "{ready}"
    );
    manager.hears("WATCHDOG=1");
    manager.hears("WATCHDOG=1");
    fs::create_dir(mnt.join("web/snapshots/s")).unwrap();
    fs::create_dir(mnt.join("web/snapshots/s")).unwrap_err();
    fs::create_dir(mnt.join(".Trash-0")).unwrap_err();
    let log = fs::read_to_string(mnt.join(".boxlite/log")).unwrap();
    // With a file open, the mount still disappears.
    let _open = File::open(mnt.join("web/box.json")).unwrap();
    drop(_open);
    succeed(&["kill", "-TERM", &service.id().to_string()]);
    manager.hears("STOPPING=1");
    assert!(service.wait().unwrap().success(), "stopping is no failure");
    assert!(!is_mounted(&mnt));
    // The journal gets the log's messages, with priorities and without times.
    let journal = fs::read_to_string(journal).unwrap();
    assert!(log.lines().count() >= 2, "{log}");
    for line in log.lines() {
        let (_, message) = line.split_once(' ').unwrap();
        let of_journal = journal.lines().find(|line| line.ends_with(message));
        let of_journal = of_journal.unwrap_or_else(|| panic!("{message}: {journal}"));
        assert!(
            ["<6>", "<4>"]
                .iter()
                .any(|priority| *of_journal == format!("{priority}{message}")),
            "{of_journal}"
        );
    }
    assert!(
        journal.lines().all(|line| line.starts_with('<')),
        "{journal}"
    );
}

#[test]
fn a_service_that_does_not_answer_any_more_is_not_said_to_be_alive() {
    let home = TestHome::new();
    let manager = Manager::at(home.beside("notify"));
    let socket = text(&manager.path).to_owned();
    let mount = home.mount_with(
        &[],
        &[("NOTIFY_SOCKET", &socket), ("WATCHDOG_USEC", "100000")],
    );
    manager.hears("WATCHDOG=1");
    // A stopped mount answers no request, and `status` of all mounts reports that.
    let other = TestHome::new();
    let answering = other.mount();
    let pid = mount.process().to_string();
    succeed(&["kill", "-STOP", &pid]);
    let all = run(&[binary(), "status"]);
    let (shown, hidden) = (
        String::from_utf8_lossy(&all.stdout),
        String::from_utf8_lossy(&all.stderr),
    );
    assert!(
        all.status.success() && shown.contains(text(answering.root())),
        "{all:?}"
    );
    assert!(
        hidden.contains(&format!("{} does not answer", text(mount.root()))),
        "{hidden}"
    );
    manager
        .socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut buffer = [0; 4096];
    while manager.socket.recv(&mut buffer).is_ok() {}
    succeed(&["kill", "-CONT", &pid]);
    manager
        .socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    manager.hears("WATCHDOG=1");
}

#[test]
fn the_units_pass_systemds_own_check_and_keep_the_mount_where_others_see_it() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helper/systemd");
    let place = tempfile::tempdir().unwrap();
    for (unit, instance, scope) in [
        ("boxlitefs.service", "boxlitefs.service", "--user"),
        (
            "boxlitefs-snapshots.service",
            "boxlitefs-snapshots.service",
            "--user",
        ),
        (
            "boxlitefs-snapshots.timer",
            "boxlitefs-snapshots.timer",
            "--user",
        ),
        ("boxlitefs@.service", "boxlitefs@root.service", "--system"),
    ] {
        let text_of_unit = fs::read_to_string(units.join(unit)).unwrap();
        // Settings that create a mount namespace or disable setuid programs.
        let settings = text_of_unit.lines().filter(|line| !line.starts_with('#'));
        for setting in settings.filter_map(|line| line.split('=').next()) {
            for fatal in [
                "Protect",
                "Private",
                "ReadOnly",
                "ReadWrite",
                "Inaccessible",
                "Bind",
                "Root",
                "Mount",
                "Temporary",
                "NoNew",
                "SystemCall",
                "RestrictN",
                "RestrictA",
                "RestrictR",
                "RestrictS",
                "LockP",
                "MemoryDeny",
                "Dynamic",
            ] {
                assert!(!setting.starts_with(fatal), "{unit}: {setting}");
            }
        }
        let installed = place.path().join(unit);
        fs::write(
            &installed,
            text_of_unit.replace("/usr/bin/boxlitefs", binary()),
        )
        .unwrap();
        let named = place.path().join(instance);
        let verified = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no", scope])
            .arg(&named)
            .env("XDG_RUNTIME_DIR", place.path())
            .output()
            .expect("systemd-analyze");
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(
            verified.status.success() && !said.contains("boxlitefs"),
            "{unit}: {verified:?}"
        );
    }
}

// ---- a desktop ----------------------------------------------------------------------------------

#[test]
fn looking_at_a_box_as_file_managers_and_indexers_do_compresses_nothing_and_reads_no_guest() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "s"]);
    let mount = home.mount();
    let root = text(mount.root());
    for directory in ["", "web", "web/snapshots", "web/snapshots/s"] {
        let directory = mount.at(directory);
        // Reads every attribute, also of link targets: names, icons, types, sizes, previews.
        succeed(&["gio", "list", "-a", "*", text(&directory)]);
        for entry in fs::read_dir(&directory).unwrap() {
            succeed(&["gio", "info", "-a", "*", text(&entry.unwrap().path())]);
        }
    }
    let listed = succeed(&[
        "gio",
        "list",
        "-a",
        "standard::content-type",
        text(&mount.at("web")),
    ]);
    assert!(listed.contains("export.boxlite.zst"), "{listed}");
    // file(1), and an indexer that reads the start of every file, including hidden ones.
    succeed(&["sh", "-c", "file \"$1\"/web/*", "sh", root]);
    succeed(&[
        "sh",
        "-c",
        "find \"$1\" -type f -exec head -c 4096 {} + | wc -c",
        "sh",
        root,
    ]);
    let said = status(&mount);
    assert_eq!(said["cache"]["archives"], 0, "{said}");
    let log = mount.log();
    assert!(!log.contains("failed"), "{log}");
    drop(mount);
    let learnt = rusqlite::Connection::open(home.root().join("db/boxlitefs.db")).unwrap();
    let made: i64 = learnt
        .query_row("SELECT count(*) FROM archive", [], |row| row.get(0))
        .unwrap();
    assert_eq!(made, 0, "no archive was compressed, nor measured");
}

#[test]
fn archives_are_known_by_their_names_alone_where_the_package_is_installed() {
    let place = tempfile::tempdir().unwrap();
    let packages = place.path().join("mime/packages");
    fs::create_dir_all(&packages).unwrap();
    let desktop = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helper/desktop");
    fs::copy(
        desktop.join("boxlitefs.xml"),
        packages.join("boxlitefs.xml"),
    )
    .unwrap();
    succeed(&["update-mime-database", text(&place.path().join("mime"))]);
    for (name, kind) in [
        ("web.boxlite", "application/x-boxlite"),
        ("export.boxlite.zst", "application/x-boxlite-compressed"),
    ] {
        // The contents give no hint.
        let file = place.path().join(name);
        fs::write(&file, "text").unwrap();
        let output = Command::new("gio")
            .args([
                "info",
                "-a",
                "standard::content-type,standard::icon",
                text(&file),
            ])
            .env("XDG_DATA_HOME", place.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(&format!("content-type: {kind}\n")), "{said}");
        assert!(
            said.contains("package-x-generic"),
            "an icon every theme has: {said}"
        );
    }
    succeed(&[
        "desktop-file-validate",
        text(&desktop.join("boxlitefs.desktop")),
    ]);
}
