//! Malicious and damaged archives (made by `tests/hostile/make.py`): each is refused with a message
//! that names the failed check, leaves nothing behind, and does not disturb the mount. Also: who
//! may see what of a mount.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::common::*;
use serde_json::{Value, json};

/// An archive of the corpus.
#[derive(Clone)]
struct Hostile {
    name: String,
    group: String,
    archive: PathBuf,
    becomes: Becomes,
    /// Lists of alternatives: the message must contain one text of each list, in order.
    says: Vec<Vec<String>>,
    heavy: bool,
}

/// The expected result for an archive.
#[derive(Clone, Copy, PartialEq)]
enum Becomes {
    /// A box with the disk of the archive.
    Taken,
    /// Fails with the message of this errno.
    Refused(&'static str),
    /// Either of the two.
    Either,
}

/// Returns all archives, which are made once per process.
fn corpus() -> &'static [Hostile] {
    static CORPUS: OnceLock<Vec<Hostile>> = OnceLock::new();
    CORPUS.get_or_init(|| {
        let place = crate::common::own_directory().join("hostile");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/make.py");
        let _ = fs::remove_dir_all(&place);
        succeed(&["python3", text(&script), text(&place)]);
        let list = fs::read(place.join("list.json")).expect("the list");
        let list: Vec<Value> = serde_json::from_slice(&list).expect("JSON");
        list.iter()
            .map(|entry| Hostile::of(entry, &place))
            .collect()
    })
}

impl Hostile {
    fn of(entry: &Value, place: &Path) -> Hostile {
        let name = entry["name"].as_str().expect("a name").to_owned();
        let texts = |list: &Value| -> Vec<String> {
            let list = list.as_array().expect("texts").iter();
            list.map(|text| text.as_str().expect("a text").to_owned())
                .collect()
        };
        let becomes = match entry["errno"].as_str() {
            None => Becomes::Taken,
            Some("any") => Becomes::Either,
            Some("EBADMSG") => Becomes::Refused("Bad message"),
            Some("ENOSPC") => Becomes::Refused("No space left on device"),
            Some(other) => panic!("{name}: {other}"),
        };
        Hostile {
            archive: place.join(format!("{name}.boxlite")),
            group: entry["group"].as_str().expect("a group").to_owned(),
            becomes,
            says: entry["says"]
                .as_array()
                .expect("alternatives")
                .iter()
                .map(texts)
                .collect(),
            heavy: entry["heavy"].as_bool().expect("true or false"),
            name,
        }
    }

    fn named(name: &str) -> &'static Hostile {
        let mut all = corpus().iter();
        all.find(|one| one.name == name).expect(name)
    }

    /// Tells whether a message describes the archive as expected.
    fn is_told_by(&self, message: &str) -> bool {
        self.says.iter().any(|texts| {
            let mut rest = Some(message);
            texts.iter().all(|text| {
                rest = rest.and_then(|rest| rest.split_once(text.as_str()).map(|(_, after)| after));
                rest.is_some()
            })
        })
    }

    /// Returns the bytes of the disk in the archive.
    fn disk(&self) -> Vec<u8> {
        let whole = match self.group.as_str() {
            // The tar of the archive may be damaged or have extra entries, so read the disk, which
            // is unchanged, from the good one.
            "flip" | "member" | "name" => &Hostile::named("good").archive,
            _ => &self.archive,
        };
        let output = run(&["tar", "-xOf", text(whole), "--wildcards", "*disk.qcow2"]);
        if output.stdout.is_empty() {
            Hostile::named("good").disk()
        } else {
            output.stdout
        }
    }
}

/// Selects the archives to try: all, except that large groups of similar ones are sampled.
fn chosen(slice: usize, groups_of_many: &[&str]) -> Vec<&'static Hostile> {
    let (many, others): (Vec<_>, Vec<_>) = corpus()
        .iter()
        .filter(|one| !one.heavy || extent() == Extent::Whole)
        .partition(|one| groups_of_many.contains(&one.group.as_str()));
    let step = many
        .len()
        .div_ceil(how_many(slice, slice, many.len()).max(1));
    let some = many.into_iter().step_by(step.max(1));
    others.into_iter().chain(some).collect()
}

/// Shell commands that import an archive: `$B` is the archive, `$N` the name of the box.
const WAYS: [&str; 5] = [
    "cp $B $MNT/$N.boxlite",
    "mkdir $MNT/$N && cp $B $MNT/$N/export.boxlite",
    "cat $B > $MNT/$N.boxlite",
    "cp $B $MNT/web/export.boxlite",
    "rsync $B $MNT/$N.boxlite",
];
/// The command that replaces the disk of an existing box.
const RESTORE: usize = 3;

fn bring(mount: &Mounted, one: &Hostile, way: usize, name: &str) -> Output {
    let environment = [
        ("MNT", mount.root()),
        ("B", one.archive.as_path()),
        ("N", Path::new(name)),
    ];
    script(WAYS[way], &environment)
        .env("LC_ALL", "C")
        .output()
        .expect("bash")
}

/// Returns the last log message that contains `part`.
fn sentence_about(mount: &Mounted, part: &str) -> String {
    let log = mount.log();
    let line = log.lines().rfind(|line| line.contains(part));
    line.unwrap_or_default().to_owned()
}

/// Returns the unlinked files that a process holds open; they still occupy space.
fn unnamed_files(process: u32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else {
        return Vec::new();
    };
    let targets = entries
        .flatten()
        .filter_map(|it| fs::read_link(it.path()).ok());
    targets
        .filter(|target| target.to_string_lossy().ends_with(".qcow2 (deleted)") || is_spool(target))
        .collect()
}

fn is_spool(target: &Path) -> bool {
    let name = target.to_string_lossy();
    name.contains("/.boxlitefs/work-") && name.ends_with("(deleted)")
}

/// Asserts that no archive could forge a log line or put terminal control characters into one.
fn assert_clean_log(log: &str) {
    for line in log.lines() {
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(
            line.len() > 21 && line.as_bytes()[19] == b'Z' && !line.starts_with("2030"),
            "{line:?}"
        );
    }
}

#[test]
fn hostile_archives_are_refused_by_name_and_leave_nothing() {
    let home = TestHome::in_memory();
    let mount = home.mount_with(&["-o", "compact=off"], &[]);
    let web = fs::read(home.live_disk("web")).expect("the disk");
    let mut before = home.kept();
    let mut tally = Tally::default();
    for (number, one) in chosen(60, &["flip", "cut"]).into_iter().enumerate() {
        for way in ways_for(one, number) {
            tally.faults += usize::from(one.becomes != Becomes::Taken);
            tally.operations += 1;
            let name = format!("n{number}-{way}");
            if let Err(loss) = try_one(&home, &mount, one, way, &name) {
                tally
                    .losses
                    .push(format!("{} by {}: {loss}", one.name, WAYS[way]));
            }
            tally.compared += 1;
            // After a writer ends, the kernel takes a moment to release a half-written file.
            let deadline = Instant::now() + PATIENCE;
            let mut after = home.kept();
            while after != before && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
                after = home.kept();
            }
            if after != before || fs::read(home.live_disk("web")).ok().as_ref() != Some(&web) {
                tally.losses.push(format!(
                    "{} by {}: files of the home differ",
                    one.name, WAYS[way]
                ));
                // Report it once.
                before = after;
            }
        }
    }
    // Checked first because it names the archive that causes any failure below.
    assert!(tally.losses.is_empty(), "{}", tally.losses.join("\n"));
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(unnamed_files(mount.process()), Vec::<PathBuf>::new());
    let peak = peak_memory(mount.process());
    println!("at most {peak} KiB of memory");
    assert!(peak < 320 << 10, "{peak} KiB of memory");
    assert_clean_log(&mount.log());
    mount.unmount();
    home.assert_whole();
    tally.finish("hostile archives");
}

/// Returns the ways to import an archive: one that makes a box, and for most archives a second one.
fn ways_for(one: &Hostile, number: usize) -> Vec<usize> {
    let first = match number % 8 {
        0 => 4,
        1 | 2 => 1,
        _ => 0,
    };
    let refused_as_disk = !one.name.starts_with("json-options");
    match one.becomes {
        Becomes::Refused(_) if one.heavy || matches!(one.group.as_str(), "flip" | "cut") => {
            vec![[first, 2, RESTORE][number % 3]]
        }
        Becomes::Refused(_) if refused_as_disk && number.is_multiple_of(2) => vec![first, RESTORE],
        Becomes::Refused(_) => vec![first, 2],
        Becomes::Taken | Becomes::Either => vec![first],
    }
}

fn try_one(
    home: &TestHome,
    mount: &Mounted,
    one: &Hostile,
    way: usize,
    name: &str,
) -> Result<(), String> {
    let output = bring(mount, one, way, name);
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        if matches!(one.becomes, Becomes::Refused(_)) {
            return Err("it was taken".into());
        }
        return as_it_was(home, mount, one, name);
    }
    let about = match way {
        RESTORE => "restore of box web",
        _ => name,
    };
    let mut message = sentence_about(mount, about);
    // A half-written file is reported once the kernel has released it, after its writer's end.
    let deadline = Instant::now() + PATIENCE;
    while one.becomes != Becomes::Taken && message.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
        message = sentence_about(mount, about);
    }
    match one.becomes {
        Becomes::Taken => Err(format!("it was refused: {complaint}{message}")),
        Becomes::Refused(message) if !complaint.contains(message) => {
            Err(format!("{complaint}instead of {message}: {message}"))
        }
        _ if !complaint.contains("Bad message") && one.becomes == Becomes::Either => {
            Err(format!("{complaint}instead of EBADMSG: {message}"))
        }
        _ if !one.is_told_by(&message) => Err(format!("the log says {message:?}")),
        _ => Ok(()),
    }
}

/// Asserts that an accepted box has the disk of its archive, then removes the box.
fn as_it_was(home: &TestHome, mount: &Mounted, one: &Hostile, name: &str) -> Result<(), String> {
    let disk = fs::read(home.live_disk(name)).map_err(|e| e.to_string())?;
    // Reading must be harmless whatever the box contains.
    for look in ["box.json", "export.boxlite", "disk.img", "rootfs/x"] {
        let _ = fs::read(mount.at(name).join(look));
    }
    let listed = run(&["getfattr", "-d", text(&mount.at(name))]);
    let seen = run(&["stat", "-c", "%n", text(&mount.at(name))]);
    let lock = lock_of(home, name);
    let gone = run(&["rm", "-r", text(&mount.at(name))]);
    if !gone.status.success() || !listed.status.success() || !seen.status.success() {
        return Err(format!("it can't be dealt with: {gone:?} {listed:?}"));
    }
    // BoxLite deletes these at its next start.
    let _ = fs::remove_file(lock);
    if disk == one.disk() {
        Ok(())
    } else {
        Err("its disk differs from the archive".into())
    }
}

fn lock_of(home: &TestHome, name: &str) -> PathBuf {
    let state = home.state(name);
    home.root().join("locks").join(state["lock_id"].to_string())
}

#[test]
fn what_boxlite_takes_of_the_corpus_comes_with_the_same_disk() {
    let home = TestHome::empty();
    // BoxLite takes hours to hash holes, and unpacks whatever it gets.
    let all = corpus().iter();
    let all = all.filter(|one| !one.heavy && !matches!(one.group.as_str(), "bomb" | "sparse"));
    let (taken, others): (Vec<_>, Vec<_>) = all.partition(|one| one.becomes == Becomes::Taken);
    let step = others.len().div_ceil(how_many(40, 40, others.len()));
    let all: Vec<_> = taken
        .into_iter()
        .chain(others.into_iter().step_by(step))
        .collect();
    let commands: Vec<Vec<&str>> = all
        .iter()
        .map(|one| vec!["import", text(&one.archive), one.name.as_str()])
        .collect();
    let commands: Vec<&[&str]> = commands.iter().map(Vec::as_slice).collect();
    // Small batches, so that neither side blocks on a full pipe.
    let answers = commands.chunks(200);
    let answers: Vec<Value> = answers
        .flat_map(|some| home.try_wheel_batch(some))
        .collect();
    let mut tally = Tally::default();
    for (one, answer) in all.iter().zip(&answers) {
        tally.operations += 1;
        let takes = answer.get("error").is_none();
        match (takes, one.becomes) {
            (true, Becomes::Refused(_)) => println!("BoxLite takes {}", one.name),
            (false, Becomes::Taken) => println!("BoxLite refuses {}: {answer}", one.name),
            _ => {}
        }
        if takes && one.becomes == Becomes::Taken {
            tally.compared += 1;
            if fs::read(home.live_disk(&one.name)).expect("a disk") != one.disk() {
                tally.losses.push(format!("{}: another disk", one.name));
            }
        }
    }
    let took = |name: &str| {
        let mut all = all.iter().zip(&answers);
        all.any(|(one, answer)| one.name == name && answer.get("error").is_none())
    };
    for name in [
        "good",
        "taken-disk-first",
        "taken-zstd-19",
        "taken-continuous",
    ] {
        assert!(took(name), "BoxLite does not take {name}");
    }
    tally.finish("hostile archives and BoxLite");
}

/// A mount that writes its standard error to a file.
struct Noted {
    child: Child,
    mountpoint: PathBuf,
    errors: PathBuf,
}

impl Noted {
    fn mount(home: &TestHome, options: &str) -> Noted {
        let mountpoint = home.beside("mnt").canonicalize().expect("mnt");
        let errors = home.beside("stderr");
        let child = Command::new(binary())
            .args([
                "mount",
                "-f",
                "-o",
                options,
                text(home.root()),
                text(&mountpoint),
            ])
            .env("RUST_LOG", "trace")
            .stdin(Stdio::null())
            .stderr(File::create(&errors).expect("a file"))
            .spawn()
            .expect("boxlitefs");
        eventually("it serves", || is_mounted(&mountpoint));
        Noted {
            child,
            mountpoint,
            errors,
        }
    }

    /// Unmounts and returns what the mount wrote to standard error.
    fn end(mut self) -> String {
        succeed(&[binary(), "unmount", text(&self.mountpoint)]);
        self.child.wait().expect("its end");
        fs::read_to_string(&self.errors).expect("UTF-8")
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if is_mounted(&self.mountpoint) {
            let _ = run(&["umount", "-l", text(&self.mountpoint)]);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn nothing_an_archive_brings_is_a_line_or_an_order_on_standard_error_or_in_the_log() {
    let home = TestHome::new();
    let mount = Noted::mount(&home, "import=untrusted");
    let all = corpus().iter();
    let hostile: Vec<_> = all
        .filter(|one| one.name.contains("hostile") || one.name.contains("forged"))
        .collect();
    assert!(hostile.len() >= 6);
    for (number, one) in hostile.iter().enumerate() {
        let to = mount.mountpoint.join(format!("n{number}.boxlite"));
        let _ = run(&["cp", text(&one.archive), text(&to)]);
    }
    // The user chooses the name of a box, which may contain anything.
    let odd = mount
        .mountpoint
        .join("a\n2030-01-01T00:00:00Z b\u{1b}[2J.boxlite");
    let good = &Hostile::named("sum-disk").archive;
    assert!(!run(&["cp", text(good), text(&odd)]).status.success());
    let log = fs::read_to_string(mount.mountpoint.join(".boxlite/log")).expect("the log");
    assert!(log.contains("failed"));
    assert_clean_log(&log);
    let errors = mount.end();
    assert!(errors.contains("failed"), "nothing was noted: {errors}");
    for line in errors.lines() {
        let without_colours = line.replace("\u{1b}[0m", "");
        assert!(!line.starts_with("2030"), "{line:?}");
        assert!(!without_colours.contains("\u{1b}[2J"), "{line:?}");
    }
}

/// Makes an archive with these options, next to the home.
fn archive_with(home: &TestHome, name: &str, options: &Value) -> PathBuf {
    let path = home.beside(&format!("{name}.boxlite"));
    home.wheel(&[
        "make-archive",
        text(&path),
        name,
        "--size",
        DISK_SIZE,
        "--options",
        &options.to_string(),
    ]);
    path
}

#[test]
fn secrets_are_shown_by_nothing_but_the_archive() {
    let home = TestHome::new();
    let secret = json!([{"name": "key", "hosts": [], "placeholder": "P", "value": "tell-nobody"}]);
    let good = archive_with(&home, "s", &json!({"secrets": secret}));
    // The invalid field itself contains the secret.
    let wrong =
        json!({"secrets": [{"name": "key", "hosts": "tell-nobody", "value": "tell-nobody"}]});
    let wrong = archive_with(&home, "w", &wrong);
    let kernel = json!({"secrets": secret, "advanced": {"kernel": "tell-nobody"}});
    let kernel = archive_with(&home, "k", &kernel);
    let mount = Noted::mount(&home, "rw");
    let at = |name: &str| mount.mountpoint.join(name);
    assert!(
        run(&["cp", text(&good), text(&at("s.boxlite"))])
            .status
            .success()
    );
    for refused in [&wrong, &kernel] {
        assert!(
            !run(&["cp", text(refused), text(&at("n.boxlite"))])
                .status
                .success()
        );
    }
    let shown = fs::read_to_string(at("s/box.json")).expect("box.json");
    assert!(shown.contains("(hidden)"), "{shown}");
    let log = fs::read_to_string(at(".boxlite/log")).expect("the log");
    let kept = fs::read_to_string(home.root().join(".boxlitefs/log")).expect("the log");
    let attributes = succeed(&["getfattr", "-d", "-m", "-", text(&at("s"))]);
    let manifest = succeed(&[
        "tar",
        "-xOf",
        text(&at("s/export.boxlite")),
        "manifest.json",
    ]);
    assert!(
        manifest.contains("tell-nobody"),
        "the box would not work elsewhere"
    );
    let errors = mount.end();
    for (what, said) in [
        ("box.json", shown),
        ("the log", log),
        ("the log in the home", kept),
        ("attributes", attributes),
        ("standard error", errors),
    ] {
        assert!(!said.is_empty());
        assert!(!said.contains("tell-nobody"), "{what}: {said}");
    }
}

/// Runs a shell command as the user nobody and returns its output.
fn as_nobody(command: &str) -> Output {
    Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-c",
            command,
        ])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .expect("setpriv, of util-linux; these tests are run by root")
}

#[test]
fn a_mount_is_its_users_alone_and_archives_are_his_even_where_others_may_enter() {
    let home = TestHome::new();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(home.beside("."), open.clone()).expect("the place is open");
    fs::set_permissions(home.root(), open).expect("the home is open");
    let mount = home.mount();
    let root = text(mount.root()).to_owned();
    assert!(mount.snapshot("web", "s").is_ok());
    for command in ["ls", "ls -d", "stat", "cat .boxlite/log; ls"] {
        let output = as_nobody(&format!("{command} {root}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("Permission denied"),
            "{command}: {said}"
        );
    }
    mount.unmount();
    let mount = home.mount_with(&["-o", "allow_other"], &[]);
    assert!(
        as_nobody(&format!("ls {root}/web/snapshots/s"))
            .status
            .success()
    );
    for path in [
        "web/box.json",
        "web/export.boxlite",
        "web/export.boxlite.zst",
        "web/disk.img",
        "web/snapshots/s/export.boxlite",
        "web/snapshots/s/snapshot.json",
        ".boxlite/log",
    ] {
        let mode = fs::metadata(mount.at(path)).expect(path).mode() & 0o7777;
        assert_eq!(mode & 0o177, 0, "{path}: {mode:o}");
        let output = as_nobody(&format!("cat {root}/{path}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("Permission denied"),
            "{path}: {said}"
        );
    }
    for command in [
        format!("mkdir {root}/web/snapshots/n"),
        format!("rmdir {root}/web/snapshots/s"),
        format!("mv {root}/web {root}/bew"),
        format!("mkdir {root}/n"),
        format!("echo x > {root}/n.boxlite"),
        format!("echo x > {root}/web/export.boxlite"),
        format!("rm -r {root}/web"),
    ] {
        let output = as_nobody(&command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("Permission denied"),
            "{command}: {said}"
        );
    }
    assert_eq!(mount.names("web/snapshots"), ["s"]);
}

#[test]
fn what_is_being_prepared_in_the_home_is_the_owners_alone() {
    let home = TestHome::new();
    // The directory exists already, made by another user or an earlier version, with too wide a
    // mode.
    let staging = home.root().join(".boxlitefs");
    fs::DirBuilder::new()
        .mode(0o755)
        .create(&staging)
        .expect("a directory");
    let mount = home.mount();
    let mut process = Process::start(&mount);
    let archive = text(&archive()).to_owned();
    process.does(&format!(
        "globals().update(b=open({archive:?}, 'rb').read())"
    ));
    process.does("globals().update(f=open(m + 'n.boxlite', 'wb', 0))");
    process.does("f.write(b[:100000])");
    // Written out of order.
    process.does("os.pwrite(f.fileno(), b[300000:400000], 300000)");
    let mode = |path: &Path| fs::metadata(path).expect("metadata").mode() & 0o7777;
    assert_eq!(mode(&staging), 0o700);
    assert_eq!(mode(&staging.join("log")), 0o600);
    let spools: Vec<PathBuf> = fs::read_dir(format!("/proc/{}/fd", mount.process()))
        .expect("its files")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| fs::read_link(path).is_ok_and(|target| is_spool(&target)))
        .collect();
    assert_eq!(spools.len(), 1, "{spools:?}");
    assert_eq!(mode(&spools[0]), 0o600);
}

// ---- limits for imports -------------------------------------------------------------------------

#[test]
fn an_import_brings_no_more_than_the_mount_allows_and_is_told_so_before_it_is_written() {
    let home = TestHome::new();
    let before = home.kept();
    let mount = home.mount_with(&["-o", "max_import=1M"], &[]);
    let good = Hostile::named("good");
    assert!(bring(&mount, good, 0, "small").status.success());
    let lock = lock_of(&home, "small");
    succeed(&["rm", "-r", text(&mount.at("small"))]);
    let _ = fs::remove_file(lock);
    // The header alone declares 300 MiB.
    let large = Hostile::named("bomb-not-zeros");
    let head = home.beside("head.boxlite");
    fs::write(
        &head,
        &fs::read(&large.archive).expect("an archive")[..3000],
    )
    .expect("its head");
    let (large, head) = (text(&large.archive), text(&head));
    for command in [
        format!("cp {large} $MNT/n.boxlite"),
        format!("mkdir $MNT/n && cp {large} $MNT/n/export.boxlite"),
        format!("cp {large} $MNT/web/export.boxlite"),
        // The write fails, rather than the close that finds the archive cut short.
        format!("dd if={head} of=$MNT/n.boxlite bs=4k status=none"),
    ] {
        let output = script(&command, &[("MNT", mount.root())])
            .env("LC_ALL", "C")
            .output()
            .expect("bash");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("File too large"), "{command}: {said}");
        let log = mount.log();
        let last = log.lines().last().expect("a line");
        assert!(
            last.contains("disk.qcow2 has 314572800 bytes") && last.contains("max_import"),
            "{last}"
        );
        assert_eq!(home.kept(), before, "{command}");
    }
    // Copies of what the mount already has move no bytes and are not imports.
    home.guest_write("web", FREE_AREA, &vec![7; 2 << 20]);
    mount.copy("web", "clone");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_full_disk_ends_an_import_and_gives_the_room_back() {
    let home = TestHome::new();
    let small = home.beside("small");
    fs::create_dir(&small).expect("a directory");
    succeed(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=40m",
        "tmpfs",
        text(&small),
    ]);
    let _unmounted = Unmount(small.clone());
    let root = small.join("home");
    home.wheel(&["list"]);
    succeed(&["cp", "-a", text(home.root()), text(&root)]);
    let room = || succeed(&["stat", "-f", "-c", "%f", text(&small)]);
    let mountpoint = home.beside("mnt").canonicalize().expect("mnt");
    let mut child = Command::new(binary())
        .args(["mount", "-f", text(&root), text(&mountpoint)])
        .stdin(Stdio::null())
        .spawn()
        .expect("boxlitefs");
    eventually("it serves", || is_mounted(&mountpoint));
    let copy = |archive: &Path| {
        let output = Command::new("cp")
            .env("LC_ALL", "C")
            .args([archive, &mountpoint.join("n.boxlite")])
            .output()
            .expect("cp");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let log = || fs::read_to_string(mountpoint.join(".boxlite/log")).expect("the log");
    let first = copy(&Hostile::named("sum-disk").archive);
    let before = room();
    // One archive declares 300 MiB. The other does not, but each of its pieces takes a block.
    let declared = copy(&Hostile::named("bomb-not-zeros").archive);
    let told = log();
    let in_pieces = copy(&many_small_pieces(&home));
    let told_late = log();
    // The written data is freed once the kernel reports the close, after cp has ended. The log has
    // grown.
    let blocks = |text: &str| text.trim().parse::<u64>().expect("a number");
    eventually("the room is back", || {
        blocks(&room()) + 16 >= blocks(&before)
    });
    unmount(&mountpoint);
    child.wait().expect("its end");
    assert!(first.contains("Bad message"), "{first}");
    assert!(declared.contains("No space left on device"), "{declared}");
    assert!(told.contains("has 314572800 bytes, but only"), "{told}");
    assert!(in_pieces.contains("No space left on device"), "{in_pieces}");
    assert!(
        told_late.contains("cannot write the archive's disk"),
        "{told_late}"
    );
}

/// Makes a sparse archive of 10 MiB whose disk takes eight times as much: it has 512 bytes in each
/// block.
fn many_small_pieces(home: &TestHome) -> PathBuf {
    let path = home.beside("pieces.boxlite");
    let program = "import sys; sys.path.insert(0, sys.argv[1]); import make\n\
        pieces = [(at * 4096, 512) for at in range(20000)]\n\
        head = make.sparse(b'disk.qcow2', pieces, 512 * 20000, pieces[-1][0] + 512)\n\
        open(sys.argv[2], 'wb').write(head + b'x' * 512 * 20000 + make.END)\n";
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
    succeed(&["python3", "-B", "-c", program, text(&scripts), text(&path)]);
    path
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = run(&["umount", "-l", text(&self.0)]);
    }
}

// ---- untrusted archives -------------------------------------------------------------------------

#[test]
fn an_untrusted_archive_reaches_nothing_of_the_host_whatever_brings_it() {
    let home = TestHome::new();
    let mount = home.mount_with(&["-o", "import=untrusted"], &[]);
    let port =
        json!([{"host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_ip": "127.0.0.1"}]);
    let volume = json!([{"host_path": "/etc", "guest_path": "/x", "read_only": false}]);
    let before = home.kept();
    for (number, (options, named)) in [
        (json!({"volumes": volume}), "box_options.volumes"),
        (
            json!({"rootfs": {"RootfsPath": "/"}}),
            "box_options.rootfs.RootfsPath",
        ),
        (
            json!({"advanced": {"nested_virtualization": true}}),
            "box_options.advanced.nested_virtualization",
        ),
        (
            json!({"advanced": {"privileged": true}}),
            "box_options.advanced.privileged",
        ),
        (
            json!({"advanced": {"security": {"jailer_enabled": false}}}),
            "security.jailer_enabled",
        ),
        (
            json!({"advanced": {"security": {"sanitize_env": false}}}),
            "security.sanitize_env",
        ),
        (json!({"ports": port}), "box_options.ports"),
        (
            json!({"future": null}),
            "box_options.\"future\" is not known",
        ),
        (
            json!({"advanced": {"future": 1}}),
            "box_options.advanced.\"future\" is not known",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let archive = archive_with(&home, &format!("a{number}"), &options);
        for (way, command) in WAYS.iter().enumerate().filter(|(way, _)| *way != RESTORE) {
            if way > 0 && number > 1 {
                continue;
            }
            let name = format!("n{number}-{way}");
            let output = script(
                command,
                &[
                    ("MNT", mount.root()),
                    ("B", &archive),
                    ("N", Path::new(&name)),
                ],
            )
            .env("LC_ALL", "C")
            .output()
            .expect("bash");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                said.contains("Operation not permitted"),
                "{command} {options}: {said}"
            );
            let message = sentence_about(&mount, &name);
            assert!(message.contains(named), "{message}");
            assert!(
                message.contains("import=trusted if you trust it"),
                "{message}"
            );
            assert_eq!(home.kept(), before, "{command} {options}");
        }
    }
    assert_eq!(mount.names(""), ["web"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_untrusted_directory_with_snapshots_is_refused_as_a_whole() {
    let home = TestHome::new();
    let volume = json!([{"host_path": "/etc", "guest_path": "/x", "read_only": false}]);
    let reaching = archive_with(&home, "reaching", &json!({"volumes": volume}));
    let backup = home.beside("backup");
    {
        let mount = home.mount();
        succeed(&["cp", text(&reaching), text(&mount.at("reaching.boxlite"))]);
        mount.snapshot("reaching", "s").expect("a snapshot");
        succeed(&["cp", "-r", text(&mount.at("reaching")), text(&backup)]);
        succeed(&["rm", "-r", text(&mount.at("reaching"))]);
        mount.unmount();
    }
    let mount = home.mount_with(&["-o", "import=untrusted"], &[]);
    let before = home.kept();
    let said = fail(&[
        "env",
        "LC_ALL=C",
        "cp",
        "-r",
        text(&backup),
        text(&mount.at("again")),
    ]);
    assert!(said.contains("Operation not permitted"), "{said}");
    // The unfinished box disappears with the process that made it, at the next look.
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(home.kept(), before);
    // The disk alone may be imported into a box, which keeps its own configuration.
    succeed(&[
        "cp",
        text(&backup.join("export.boxlite")),
        text(&mount.at("web/export.boxlite")),
    ]);
    let shown = fs::read_to_string(mount.at("web/box.json")).expect("box.json");
    assert!(shown.contains("\"volumes\": []"), "{shown}");
    let log = mount.log();
    assert!(
        log.lines()
            .last()
            .is_some_and(|line| line.contains("restore of box web")),
        "{log}"
    );
    // A snapshot gets the configuration of its box. If the box never arrives, the configuration in
    // the archive is still not used.
    let directory = mount.at("new/snapshots/s");
    succeed(&["mkdir", "-p", text(&directory)]);
    let of_snapshot = backup.join("snapshots/s/export.boxlite");
    succeed(&["mv", text(&of_snapshot), text(&directory)]);
    mount.unmount();
    let mount = home.mount();
    let shown = fs::read_to_string(mount.at("new-s/box.json")).expect("box.json");
    assert!(!shown.contains("/etc"), "{shown}");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn what_boxlite_exports_of_a_plain_box_is_taken_also_untrusted() {
    let home = TestHome::new();
    let out = home.beside("out");
    fs::create_dir(&out).expect("a directory");
    home.wheel(&["export", "web", text(&out)]);
    let exported = fs::read_dir(&out).expect("it").next().expect("an archive");
    let exported = exported.expect("an archive").path();
    let mount = home.mount_with(&["-o", "import=untrusted"], &[]);
    succeed(&["cp", text(&exported), text(&mount.at("by-boxlite.boxlite"))]);
    let ours = home.beside("ours.boxlite");
    succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&ours)]);
    succeed(&["cp", text(&ours), text(&mount.at("by-us.boxlite"))]);
    assert_eq!(mount.names(""), ["by-boxlite", "by-us", "web"]);
}

#[test]
fn an_archive_that_came_for_a_snapshot_is_looked_at_again_when_it_becomes_a_box() {
    let home = TestHome::new();
    let volume = json!([{"host_path": "/etc", "guest_path": "/x", "read_only": false}]);
    let reaching = archive_with(&home, "reaching", &json!({"volumes": volume}));
    let unreadable = archive_with(&home, "unreadable", &json!({"cpus": "two"}));
    let by_way_of_a_snapshot = |mount: &Mounted, archive: &Path, name: &str| {
        let mut process = Process::start(mount);
        let snapshot = format!("m + '{name}/snapshots/s/export.boxlite'");
        process.does(&format!("os.makedirs(m + '{name}/snapshots/s')"));
        process.does(&format!("shutil.copyfile({:?}, {snapshot})", text(archive)));
        let moves = format!("os.rename({snapshot}, m + '{name}/export.boxlite')");
        match name {
            "c" => process.does(&moves).as_i64().map_or(0, |_| 1),
            _ => process.fails(&moves),
        }
    };
    let mount = home.mount_with(&["-o", "import=untrusted"], &[]);
    assert_eq!(by_way_of_a_snapshot(&mount, &reaching, "a"), libc::EPERM);
    let message = sentence_about(&mount, "import of box a");
    assert!(message.contains("box_options.volumes"), "{message}");
    assert_eq!(
        by_way_of_a_snapshot(&mount, &unreadable, "b"),
        libc::EBADMSG
    );
    // The archives wait where they were for a box whose snapshots they can become.
    for name in ["a", "b"] {
        assert_eq!(
            mount.names(format!("{name}/snapshots/s")),
            ["export.boxlite"]
        );
        succeed(&["rm", "-r", text(&mount.at(name))]);
    }
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(by_way_of_a_snapshot(&mount, &archive(), "c"), 0);
    assert_eq!(mount.names(""), ["c", "web"]);
    mount.unmount();
    // BoxLite can still read all rows.
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(2));
    home.assert_whole();
}
