//! Concurrent and dying clients. 32 processes that change a home at once lose none of each other's
//! changes. A client that is killed at any system call leaves nothing behind. And nothing is lost
//! when the mount's own process is stopped, unmounted or out of file descriptors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::*;
use serde_json::Value;

/// Number of concurrent processes.
const WORKERS: usize = 32;
/// Number of contested names of each kind. tests/faults/worker.py has the same number.
const CONTESTED: usize = 40;

/// Makes a home with the contents `web` and `base`, two backups with other contents, and the
/// digests of all four.
fn home_for_many() -> (TestHome, Vec<PathBuf>, BTreeMap<String, String>) {
    let home = TestHome::new();
    let mut digests = BTreeMap::new();
    let mount = home.mount();
    mount.snapshot("web", "base").unwrap();
    digests.insert("base".to_owned(), digest(&home.live_disk("web")));
    let mut backups = Vec::new();
    for name in ["a", "b"] {
        home.guest_write("web", FREE_AREA, name.repeat(300_000).as_bytes());
        let backup = home.beside(&format!("{name}.boxlite"));
        succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&backup)]);
        digests.insert(name.to_owned(), digest(&home.live_disk("web")));
        backups.push(backup);
    }
    home.guest_write("web", FREE_AREA, b"the contents that web has");
    digests.insert("web".to_owned(), digest(&home.live_disk("web")));
    for kind in ["remove", "rename"] {
        for number in 0..CONTESTED {
            mount.snapshot("web", &format!("{kind}-{number}")).unwrap();
        }
    }
    (home, backups, digests)
}

#[test]
fn changes_by_32_processes_at_once_are_not_lost() {
    let seconds = how_many(5, 20, 60).to_string();
    let seed = seed("32 processes at once").to_string();
    let (home, backups, digests) = home_for_many();
    // Background merges of unreferenced layers run in between.
    let mut mount = home.mount_with(&["-o", "compact=0.2"], &[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/worker.py");
    let workers: Vec<Child> = (0..WORKERS)
        .map(|number| {
            Command::new("python3")
                .arg(&script)
                .args([text(mount.root()), &number.to_string(), &seed, &seconds])
                .args(&backups)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    // All workers change names in the root, and the kernel locks a directory during such a change.
    // Nothing changes in the other directory.
    let looked = looks(
        &mount,
        &["", "web/snapshots/base"],
        Duration::from_secs(seconds.parse().unwrap()),
    );
    let beliefs: Vec<Value> = workers
        .into_iter()
        .map(|worker| {
            let output = worker.wait_with_output().unwrap();
            serde_json::from_slice(&output.stdout).unwrap()
        })
        .collect();
    println!("{looked}");
    assert!(mount.is_alive());

    let mut tally = Tally::default();
    let mut expected = BTreeMap::new();
    let mut snapshots_of_web = BTreeMap::from([("base".to_owned(), "base".to_owned())]);
    let mut won: BTreeMap<String, usize> = BTreeMap::new();
    for belief in &beliefs {
        tally.operations += belief["operations"].as_u64().unwrap() as usize;
        let failed = belief["failed"].as_array().unwrap();
        tally
            .losses
            .extend(failed.iter().map(|message| message.to_string()));
        for (name, of) in belief["boxes"].as_object().unwrap() {
            let snapshots = texts(&of["snapshots"]);
            expected.insert(
                name.clone(),
                (of["contents"].as_str().unwrap().to_owned(), snapshots),
            );
        }
        snapshots_of_web.extend(texts(&belief["snapshots"]));
        for name in belief["won"].as_array().unwrap() {
            *won.entry(name.as_str().unwrap().to_owned()).or_default() += 1;
        }
    }
    let twice = won.iter().filter(|(_, times)| **times > 1);
    tally
        .losses
        .extend(twice.map(|(name, times)| format!("{times} processes won {name}")));
    for number in 0..CONTESTED {
        let [made, removed, renamed] =
            ["make", "remove", "rename"].map(|kind| format!("{kind}-{number}"));
        if won.contains_key(&made) {
            snapshots_of_web.insert(made, "web".to_owned());
        }
        for kept in [removed, renamed] {
            if !won.contains_key(&kept) {
                snapshots_of_web.insert(kept, "web".to_owned());
            }
        }
    }
    expected.insert("web".to_owned(), ("web".to_owned(), snapshots_of_web));
    mount.unmount();

    let listed: BTreeSet<String> = home
        .wheel(&["list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|listed| listed["name"].as_str().unwrap().to_owned())
        .collect();
    let names: BTreeSet<String> = expected.keys().cloned().collect();
    if listed != names {
        tally
            .losses
            .push(format!("the boxes are {listed:?}, not {names:?}"));
    }
    for (name, (contents, snapshots)) in expected.iter().filter(|(name, _)| listed.contains(*name))
    {
        let mut disks = vec![(String::new(), home.live_disk(name), contents)];
        for (snapshot, contents) in snapshots {
            disks.push((
                snapshot.clone(),
                home.snapshot_disk(name, snapshot),
                contents,
            ));
        }
        let there: BTreeSet<String> = snapshots_in(&home, name);
        let wanted: BTreeSet<String> = snapshots.keys().cloned().collect();
        if there != wanted {
            tally.losses.push(format!(
                "{name} has the snapshots {there:?}, not {wanted:?}"
            ));
            continue;
        }
        for (snapshot, disk, contents) in disks {
            tally.compared += 1;
            if digest(&disk) != digests[contents] {
                tally
                    .losses
                    .push(format!("{name} {snapshot} lacks the contents {contents}"));
            }
        }
    }
    home.assert_whole_once_mounted();
    tally.finish(if binary() == env!("CARGO_BIN_EXE_boxlitefs") {
        "32 processes at once"
    } else {
        "32 processes at once, another build of the program"
    });
}

/// Lists directories repeatedly for the given time; describes how long that took.
fn looks(mount: &Mounted, directories: &[&str], long: Duration) -> String {
    let end = Instant::now() + long;
    let mut took = vec![Vec::new(); directories.len()];
    while Instant::now() < end {
        for (directory, took) in directories.iter().zip(&mut took) {
            let began = Instant::now();
            mount.names(directory);
            took.push(began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = directories.iter().zip(&mut took).map(|(directory, took)| {
        took.sort();
        format!(
            "ls of /{directory}, {} times: median {:.1?}, 99th percentile {:.1?}",
            took.len(),
            took[took.len() / 2],
            took[took.len() * 99 / 100]
        )
    });
    told.collect::<Vec<_>>().join("\n")
}

fn texts(of: &Value) -> BTreeMap<String, String> {
    let of = of.as_object().unwrap().iter();
    of.map(|(name, text)| (name.clone(), text.as_str().unwrap().to_owned()))
        .collect()
}

fn snapshots_in(home: &TestHome, name: &str) -> BTreeSet<String> {
    let id = home.id(name);
    let database = home.database();
    let mut rows = database
        .prepare("SELECT name FROM snapshot WHERE box_id = ?1")
        .unwrap();
    rows.query_map([id], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

// ---- killed clients -----------------------------------------------------------------------------

/// Scripts of clients. The mount has the box `web` with a snapshot `base`; a backup lies outside.
const CLIENTS: [&str; 6] = [
    "cp -r $M/web $M/new",
    "cp $BACKUP $M/new.boxlite",
    "mkdir $M/new && cat $BACKUP > $M/new/export.boxlite",
    "cp $BACKUP $M/web/export.boxlite",
    "cp $M/web/export.boxlite.zst $OUT",
    "cp -rL $M/web/snapshots/base/rootfs/. $OUT.d; rm -r $M/other",
];

#[test]
fn a_client_that_is_killed_at_any_system_call_leaves_nothing_behind() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "base").unwrap();
    home.guest_write("web", FREE_AREA, &[7; 200_000]);
    mount.copy("web", "other");
    let backup = home.beside("backup.boxlite");
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/base/export.boxlite")),
        text(&backup),
    ]);
    let before = digest(&home.live_disk("web"));
    let base = digest(&home.snapshot_disk("web", "base"));
    drop(mount);
    home.put_aside("first");

    let mut tally = Tally::default();
    for client in CLIENTS {
        home.put_back("first");
        let calls = {
            let mount = home.mount();
            calls_of(&home, &mount, client)
        };
        // Try every nth call, so that even the slice covers each client.
        let every = (calls.len() / how_many(4, 12, 400)).max(1);
        home.put_back("first");
        let mut mount = home.mount();
        let handles = open_files(&mount);
        for (call, number) in calls.iter().step_by(every) {
            let inject = format!("inject={call}:signal=SIGKILL:when={number}");
            traced(&home, &mount, client, &["-e", &inject]);
            tally.faults += 1;
            tally.operations += 1;
            let mut names: BTreeSet<String> = mount.names("").into_iter().collect();
            // A directory that the client made is still staged; any process may remove it. With -f,
            // because a partly written file may disappear by itself.
            if names.contains("new") && !home_has(&home, "new") {
                succeed(&["rm", "-rf", text(&mount.at("new"))]);
                names.remove("new");
            }
            // A partly written file disappears when the kernel reports that it is closed.
            eventually("all shown boxes are in the home", || {
                names = mount.names("").into_iter().collect();
                names.iter().all(|name| home_has(&home, name))
            });
            names.remove("other");
            for name in names {
                let live = digest(&home.live_disk(&name));
                tally.compared += 1;
                if live != before && live != base {
                    tally.losses.push(format!(
                        "{client}: killed at {call} {number}: {name} has other contents"
                    ));
                }
            }
            if home_has(&home, "new") {
                succeed(&["rm", "-r", text(&mount.at("new"))]);
            }
            if !home_has(&home, "other") {
                mount.copy("web", "other");
            }
        }
        assert!(mount.is_alive());
        eventually("no file stays open", || open_files(&mount) <= handles + 16);
        mount.unmount();
        home.assert_whole_once_mounted();
        let staging = names_in(&home.root().join(".boxlitefs"));
        assert!(
            staging
                .iter()
                .all(|name| matches!(name.as_str(), "log" | "log.1" | "layers" | "reserve")),
            "{client}: {staging:?}"
        );
    }
    tally.finish("clients killed at a system call");
}

fn home_has(home: &TestHome, name: &str) -> bool {
    let known = home.database().query_row(
        "SELECT COUNT(*) FROM box_config WHERE name = ?1",
        [name],
        |row| row.get::<_, i64>(0),
    );
    known.unwrap() == 1
}

/// Returns the number of open file descriptors of the mount's process.
fn open_files(mount: &Mounted) -> usize {
    fs::read_dir(format!("/proc/{}/fd", mount.process()))
        .unwrap()
        .count()
}

/// Runs the client under strace; returns the trace.
fn traced(home: &TestHome, mount: &Mounted, client: &str, arguments: &[&str]) -> String {
    let (calls, out) = (home.beside("calls"), home.beside("out"));
    let _ = fs::remove_dir_all(home.beside("out.d"));
    let mut command = Command::new("timeout");
    command
        .args(["60", "strace", "-f", "-o", text(&calls)])
        .args(arguments)
        .args(["sh", "-c", client])
        .env("M", mount.root())
        .env("BACKUP", home.beside("backup.boxlite"))
        .env("OUT", out)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = command.status().unwrap();
    assert_ne!(status.code(), Some(124), "{client} hangs: {arguments:?}");
    fs::read_to_string(calls).unwrap()
}

/// Returns the system calls of a client, each with its number among the calls of that name in its
/// process.
fn calls_of(home: &TestHome, mount: &Mounted, client: &str) -> Vec<(String, usize)> {
    let said = traced(home, mount, client, &["-e", "trace=%file,%desc"]);
    let mut counted: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut calls = Vec::new();
    let lines = said.lines().filter_map(|line| line.split_once(' '));
    for (process, line) in lines.filter(|(_, line)| !line.contains("resumed>")) {
        let Some((call, _)) = line.trim_start().split_once('(') else {
            continue;
        };
        let number = counted.entry((process, call)).or_default();
        *number += 1;
        let entry = (call.to_owned(), *number);
        if !calls.contains(&entry) {
            calls.push(entry);
        }
    }
    assert!(calls.len() > 20, "{client}: {said}");
    calls
}

// ---- the mount's own process --------------------------------------------------------------------

#[test]
fn ten_thousand_open_files_need_few_descriptors_in_the_mount() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "base").unwrap();
    let before = open_files(&mount);
    let script = "import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
names = ['export.boxlite', 'box.json', 'snapshots/base/rootfs/etc/hostname', 'snapshots/base/disk.img']
held = [open(os.path.join(sys.argv[1], 'web', names[n % 4]), 'rb') for n in range(10000)]
print(len(held), {file.read(1) for file in held[:4]} != {b''}, flush=True)
sys.stdin.read()";
    let mut child = Command::new("python3")
        .args(["-c", script, text(mount.root())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 11];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"10000 True\n");
    let open = open_files(&mount);
    assert!(open < before + 32, "{before} files were open, now {open}");
    assert!(mount.names("").contains(&"web".to_owned()));
    drop(child.stdin.take());
    child.wait().unwrap();
    mount.unmount();
}

/// Limits the number of files that the mount's process may have open.
fn limit_files(mount: &Mounted, most: usize) {
    let pid = mount.process().to_string();
    succeed(&["prlimit", "--pid", &pid, &format!("--nofile={most}:")]);
}

#[test]
fn a_mount_out_of_file_descriptors_reports_it_and_recovers() {
    let home = TestHome::new();
    let mut mount = home.mount();
    mount.snapshot("web", "base").unwrap();
    let before = digest(&home.live_disk("web"));
    let had = open_files(&mount);
    limit_files(&mount, had);
    let out = home.beside("out");
    let mut said = BTreeSet::new();
    for _ in 0..2 {
        said.insert(fail(&[
            "cp",
            text(&mount.at("web/export.boxlite")),
            text(&out),
        ]));
        said.insert(fail(&["mkdir", text(&mount.at("web/snapshots/more"))]));
        said.insert(fail(&["rm", text(&mount.at("web/box.json"))]));
        said.insert(fail(&[
            "cp",
            text(&archive()),
            text(&mount.at("new.boxlite")),
        ]));
    }
    for message in &said {
        assert!(message.contains("Too many open files"), "{said:?}");
    }
    // With each further descriptor, the call gets a step further before it fails.
    for more in 1..16 {
        limit_files(&mount, had + more);
        let name = format!("web/snapshots/more{more}");
        let made = run(&["mkdir", text(&mount.at(&name))]);
        let message = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(
            made.status.success() || message.contains("Too many open files"),
            "{more} more: {message}{}",
            mount.log()
        );
    }
    assert!(mount.is_alive());
    assert!(mount.log().contains("open files"), "{}", mount.log());
    limit_files(&mount, 4096);
    mount.snapshot("web", "more").unwrap();
    let snapshots = mount.names("web/snapshots");
    assert!(snapshots.contains(&"base".to_owned()) && snapshots.contains(&"more".to_owned()));
    assert_eq!(mount.export_digest("web/export.boxlite"), before);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_mount_that_is_stopped_and_continued_goes_on_where_it_was() {
    let home = TestHome::new();
    let mount = home.mount();
    let before = digest(&home.live_disk("web"));
    let process = mount.process().to_string();
    succeed(&["kill", "-STOP", &process]);
    let copied = home.beside("copied");
    let clients = [
        script(
            "cp $M/web/export.boxlite.zst $OUT",
            &[("M", mount.root()), ("OUT", &copied)],
        ),
        script("mkdir $M/web/snapshots/a", &[("M", mount.root())]),
        script(
            "cp $BACKUP $M/new.boxlite",
            &[("M", mount.root()), ("BACKUP", &archive())],
        ),
    ]
    .map(|mut client| client.spawn().unwrap());
    // Give the clients time to send requests and wait.
    std::thread::sleep(Duration::from_millis(300));
    succeed(&["kill", "-CONT", &process]);
    for mut client in clients {
        assert!(client.wait().unwrap().success());
    }
    assert_eq!(archive_digest(&copied), before);
    assert_eq!(digest(&home.live_disk("new")), before);
    assert_eq!(mount.names("web/snapshots"), ["a"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_unmount_in_the_middle_of_everything_loses_nothing() {
    let mut tally = Tally::default();
    for round in 0..how_many(1, 3, 20) {
        let home = TestHome::in_memory();
        let mount = home.mount();
        mount.snapshot("web", "base").unwrap();
        home.guest_write("web", FREE_AREA, &[3; 100_000]);
        let contents = [
            digest(&home.live_disk("web")),
            digest(&home.snapshot_disk("web", "base")),
        ];
        let environment = [("M", mount.root()), ("BACKUP", &*archive())];
        let loops = [
            "while cat $M/web/export.boxlite.zst >/dev/null; do :; done",
            "for n in $(seq 1000); do mkdir $M/web/snapshots/s$n || exit; done",
            "for n in $(seq 1000); do cp -r $M/web/snapshots/base $M/c$n || exit; done",
            "for n in $(seq 1000); do cp $BACKUP $M/i$n.boxlite || exit; done",
            "for n in $(seq 1000); do cp $M/web/snapshots/base/export.boxlite $M/web/export.boxlite && cp $BACKUP $M/web/export.boxlite || exit; done",
        ];
        let mut clients = loops.map(|client| {
            script(client, &environment)
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        });
        std::thread::sleep(Duration::from_millis(200 + 70 * round as u64));
        // A lazy unmount, because the mount is in use.
        succeed(&["umount", "-l", text(mount.root())]);
        for client in &mut clients {
            client.wait().unwrap();
        }
        tally.faults += 1;
        tally.operations += loops.len();
        drop(mount);
        home.assert_whole_once_mounted();
        let backup = archive_digest(&archive());
        for listed in home.wheel(&["list"]).as_array().unwrap() {
            let name = listed["name"].as_str().unwrap();
            tally.compared += 1;
            let live = digest(&home.live_disk(name));
            if !contents.contains(&live) && live != backup {
                tally.losses.push(format!("{name} has other contents"));
            }
        }
    }
    tally.finish("unmounts under load");
}

#[test]
fn a_foreground_mount_keeps_serving_when_its_terminal_hangs() {
    let home = TestHome::new();
    let mountpoint = home.beside("mnt");
    let (reader, writer) = std::io::pipe().unwrap();
    let mut child = Command::new(binary())
        .args(["mount", "-f", text(home.root()), text(&mountpoint)])
        .env("RUST_LOG", "debug")
        .stdin(Stdio::null())
        .stderr(writer)
        .spawn()
        .unwrap();
    eventually("the mount is ready", || {
        is_mounted(&mountpoint) && mountpoint.join(".boxlite/log").exists()
    });
    // Fill the pipe, which holds 64 KiB: RUST_LOG=debug logs each failed lookup.
    for n in 0..2000 {
        let _ = File::open(mountpoint.join(format!("web/{n:0200}")));
    }
    fs::create_dir(mountpoint.join("web/snapshots/a")).unwrap();
    assert_eq!(names_in(&mountpoint.join("web/snapshots")), ["a"]);
    unmount(&mountpoint);
    assert!(child.wait().unwrap().success());
    drop(reader);
}
