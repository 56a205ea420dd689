//! `box.json` of a stopped box is edited as files are; what can't be edited is refused where the
//! program that writes sees it, and an edited backup counts. The judges are the programs that people
//! write files with, and BoxLite, which reads every box afterwards.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use crate::common::*;

/// Makes a home whose box `web` has a secret, an unknown field and an unknown option.
fn home_with_secret() -> TestHome {
    let home = TestHome::new();
    let known = r#"{"name": "key", "hosts": [], "placeholder": "P", "value": "tell-nobody"}"#;
    let changed = home.database().execute(
        "UPDATE box_config SET json = json_set(json, '$.future', json('{\"a\": [1.50]}'),
             '$.options.future_option', 7, '$.options.secrets', json_array(json(?1)))",
        [known],
    );
    assert_eq!(changed.unwrap(), 1);
    home
}

fn config(home: &TestHome, name: &str) -> Value {
    let select = "SELECT json FROM box_config WHERE name = ?1";
    let database = home.database();
    let json: String = database
        .query_row(select, [name], |row| row.get(0))
        .unwrap();
    serde_json::from_str(&json).unwrap()
}

/// Runs a script with the mountpoint in $M and a directory of its own in $D.
fn shell(mount: &Mounted, place: &Path, command: &str) -> Output {
    script(command, &[("M", mount.root()), ("D", place)])
        .output()
        .expect("a shell")
}

#[test]
fn programs_that_write_files_edit_box_json() {
    let home = home_with_secret();
    let mount = home.mount();
    let place = home.beside("place");
    fs::create_dir(&place).unwrap();
    let before = config(&home, "web");
    let python = |rest: &str| {
        let begin = "import json, os, shutil, sys, tempfile; n = int(sys.argv[1]); \
                     p = os.environ['M'] + '/web/box.json'; new = os.environ['D'] + '/new'\n";
        format!("python3 -c \"{begin}{rest}\" $N")
    };
    let ways = [
        "cat $D/new > $M/web/box.json".to_owned(),
        "sed -i \"s/\\\"memory_mib\\\": [0-9nul]*/\\\"memory_mib\\\": $N/\" $M/web/box.json"
            .to_owned(),
        "perl -i -pe \"s/\\\"memory_mib\\\": \\d+/\\\"memory_mib\\\": $N/\" $M/web/box.json"
            .to_owned(),
        "cp $D/new $M/web/box.json".to_owned(),
        "cp -p $D/box.json $M/web/".to_owned(),
        "cp --remove-destination $D/new $M/web/box.json".to_owned(),
        "mv $D/new $M/web/box.json".to_owned(),
        "install -m 600 $D/new $M/web/box.json".to_owned(),
        "busybox cp $D/new $M/web/box.json".to_owned(),
        "rsync -a $D/box.json $M/web/".to_owned(),
        "rsync --inplace $D/new $M/web/box.json".to_owned(),
        "gio copy $D/new $M/web/box.json".to_owned(),
        "gio save $M/web/box.json < $D/new".to_owned(),
        "dd if=$D/new of=$M/web/box.json bs=100 conv=fsync status=none".to_owned(),
        "tee $M/web/box.json < $D/new > $D/out".to_owned(),
        "tar c -C $D box.json | tar x -C $M/web box.json".to_owned(),
        "exec 3> $M/web/box.json; head -c 500 $D/new >&3; tail -c +501 $D/new >&3; exec 3>&-"
            .to_owned(),
        python("d = json.load(open(new)); json.dump(d, open(p, 'w'), indent=8)"),
        python(
            "f = open(p, 'r+'); d = json.load(f); d['options']['memory_mib'] = n; f.seek(0); json.dump(d, f); f.truncate()",
        ),
        python(
            "f = tempfile.NamedTemporaryFile('w', dir=os.path.dirname(p), delete=False); f.write(open(new).read()); f.close(); os.replace(f.name, p)",
        ),
        python("shutil.copy2(new, p)"),
    ];
    for (way, number) in ways.iter().zip(600..) {
        let command = format!(
            "N={number}; sed \"s/\\\"memory_mib\\\": [0-9nul]*/\\\"memory_mib\\\": $N/\" \
             $M/web/box.json > $D/new && cp $D/new $D/box.json && {way}"
        );
        let output = shell(&mount, &place, &command);
        let log = mount.log();
        assert!(output.status.success(), "{way}: {output:?}\n{log}");
        let mut expected = before.clone();
        expected["options"]["memory_mib"] = json!(number);
        assert_eq!(config(&home, "web"), expected, "{way}\n{log}");
        assert_eq!(mount.names("web"), BOX_FILES, "{way}");
        let shown = fs::read_to_string(mount.at("web/box.json")).unwrap();
        assert!(
            shown.contains(&format!("\"memory_mib\": {number}")),
            "{way}"
        );
        assert!(shown.contains("(hidden)") && !shown.contains("tell-nobody"));
    }
    assert!(mount.log().contains("edit of box web: options.memory_mib"));
    let info = home.wheel(&["info", "web"]);
    assert_eq!(info["memory_mib"], 600 + ways.len() - 1);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_editor_that_looks_at_the_inode_edits_box_json() {
    if !run(&["sh", "-c", "command -v vim"]).status.success() {
        return;
    }
    let home = TestHome::new();
    let mount = home.mount();
    let file = mount.at("web/box.json");
    let substitute = "%s/\"cpus\": null/\"cpus\": 2/";
    succeed(&[
        "vim",
        "-u",
        "NONE",
        "-n",
        "-es",
        "-c",
        substitute,
        "-c",
        "wq",
        text(&file),
    ]);
    assert_eq!(home.wheel(&["info", "web"])["cpus"], 2);
}

#[test]
fn what_can_not_be_recorded_changes_nothing_and_fails() {
    let home = home_with_secret();
    let mount = home.mount();
    let place = home.beside("place");
    fs::create_dir(&place).unwrap();
    let before = (digest(&home.live_disk("web")), config(&home, "web"));
    for (command, said) in [
        ("echo 1 > $M/web/box.json", "is not a JSON object"),
        ("echo '{}' > $M/web/box.json", "id can't be changed"),
        (
            "head -c 300 $D/old > $D/new; cp $D/new $M/web/box.json",
            "it ends in the middle",
        ),
        (
            "cat $D/old $D/old > $D/new; cat $D/new > $M/web/box.json",
            "box.json is not JSON",
        ),
        (
            "sed -i 's/\"web\"/\"api\"/' $M/web/box.json",
            "rename the box with mv",
        ),
        (
            "sed -i 's/\"stopped\"/\"running\"/' $M/web/box.json",
            "state.status can't be changed",
        ),
        (
            "sed -i 's/\"cpus\": null/\"cpus\": \"two\"/' $M/web/box.json",
            "options.cpus is not a whole number",
        ),
        (
            "sed -i 's/\"cpus\"/\"cpu\"/' $M/web/box.json",
            "options.cpu is not known here",
        ),
        (
            "sed -i 's/\"future_option\": 7/\"future_option\": 8/' $M/web/box.json",
            "options.future_option",
        ),
        (
            "sed -i 's/\"name\": \"key\"/\"name\": \"other\"/' $M/web/box.json",
            "options.secrets[0]",
        ),
        (
            "sed -i 's/alpine:latest/debian:latest/' $M/web/box.json",
            "options.rootfs can't be changed",
        ),
        (
            "sed -i 's/\"auto_remove\": false/\"auto_remove\": true/' $M/web/box.json",
            "options.auto_remove can't be turned on",
        ),
        (
            "sed 's/\"cpus\": null/\"cpus\": 1, \"cpus\": 2/' $D/old > $D/new; cp $D/new $M/web/box.json",
            "occurs twice",
        ),
        ("echo x >> $M/web/box.json", "can't be appended to"),
        (
            "truncate -s 0 $M/web/box.json",
            "box web needs its box.json",
        ),
        ("shred $M/web/box.json", "box web needs its box.json"),
        (
            "sed 's/null/1/' $D/old > $D/new; dd if=$D/new of=$M/web/box.json conv=notrunc bs=7 count=9 seek=1 status=none",
            "ends in the middle",
        ),
    ] {
        let command = format!("cp $M/web/box.json $D/old; {command}");
        let output = shell(&mount, &place, &command);
        let log = mount.log();
        assert!(!output.status.success(), "{command}: {output:?}\n{log}");
        let line = log.lines().rev().take(2).any(|line| line.contains(said));
        assert!(line, "{command}: {said:?} is not in\n{log}");
        assert_eq!(config(&home, "web"), before.1, "{command}");
    }
    // Neither says anything: nothing was written, or a part whose close nobody asked about.
    for command in [
        ": > $M/web/box.json",
        "echo '{' > $M/web/box.json",
        "touch $M/web/box.json",
    ] {
        assert!(shell(&mount, &place, command).status.success(), "{command}");
        assert_eq!(config(&home, "web"), before.1, "{command}");
    }
    assert!(
        mount
            .log()
            .contains("box.json of box web stays as it is: it ends in the middle")
    );
    assert_eq!(digest(&home.live_disk("web")), before.0);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_box_that_runs_and_one_that_a_runtime_may_know_are_busy() {
    let home = TestHome::new();
    let mount = home.mount();
    let place = home.beside("place");
    fs::create_dir(&place).unwrap();
    let before = config(&home, "web");
    let edit = "sed -i 's/\"cpus\": null/\"cpus\": 2/' $M/web/box.json";
    {
        let _holder = home.hold();
        let output = shell(&mount, &place, edit);
        assert!(!output.status.success(), "{}", mount.log());
        let log = mount.log();
        let last = log.lines().last().unwrap();
        assert!(
            last.contains("may go on with the options that it has read"),
            "{last}"
        );
        assert!(last.contains("pid "), "{last}");
    }
    assert_eq!(config(&home, "web"), before);
    let mut machine = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", machine.id())).unwrap();
    let began = stat
        .rsplit(") ")
        .next()
        .unwrap()
        .split(' ')
        .nth(19)
        .unwrap();
    let pid_file = home.box_dir("web").join("shim.pid");
    fs::write(&pid_file, format!("{}\n{began}\n", machine.id())).unwrap();
    let output = shell(&mount, &place, edit);
    assert!(!output.status.success(), "{}", mount.log());
    assert!(mount.log().contains("its virtual machine runs as process"));
    machine.kill().unwrap();
    machine.wait().unwrap();
    assert_eq!(config(&home, "web"), before);
    let output = shell(&mount, &place, edit);
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    assert_eq!(home.wheel(&["info", "web"])["cpus"], 2);
}

#[test]
fn a_mount_that_trusts_no_archive_gives_no_edit_access_to_the_host() {
    let home = TestHome::new();
    let mount = home.mount_with(&["-o", "import=untrusted"], &[]);
    let place = home.beside("place");
    fs::create_dir(&place).unwrap();
    let ports = "jq '.options.ports = [{\"host_port\": 80, \"guest_port\": 80, \"host_ip\": \"IP\"}]' \
                 $M/web/box.json > $D/new && cp $D/new $M/web/box.json";
    let output = shell(&mount, &place, &ports.replace("IP", "0.0.0.0"));
    assert!(!output.status.success());
    assert!(
        mount.log().contains("options.ports publishes a port"),
        "{}",
        mount.log()
    );
    let output = shell(&mount, &place, &ports.replace("IP", "127.0.0.1"));
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    assert_eq!(config(&home, "web")["options"]["ports"][0]["host_port"], 80);
    home.wheel(&["info", "web"]);
}

#[test]
fn a_process_that_edited_box_json_does_not_copy_a_whole_box_over_it() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let before = (digest(&home.live_disk("web")), config(&home, "web"));
    for command in [
        "cp -r $D/. $M/web/",
        "cp $D/*.* $M/web/",
        "rsync -a $D/ $M/web/",
        "tar c -C $D . | tar x -C $M/web",
    ] {
        let output = shell(&mount, &backup, command);
        assert!(!output.status.success(), "{command}\n{}", mount.log());
    }
    let mut program = Process::start(&mount);
    program.does("open(m + 'web/box.json', 'r+').write(' ')");
    program.does("open(m + 'web/box.json', 'r+').close()");
    assert_eq!(
        program.fails("open(m + 'web/export.boxlite', 'wb')"),
        libc::EPERM
    );
    program.does("os.mkdir(m + 'web/snapshots/taken')");
    program.does("os.rmdir(m + 'web/snapshots/taken')");
    drop(program);
    assert_eq!(digest(&home.live_disk("web")), before.0);
    assert_eq!(config(&home, "web"), before.1);
    assert_eq!(mount.names("web/snapshots"), ["s"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_edited_backup_makes_a_box_with_what_was_edited() {
    let home = home_with_secret();
    let (mount, backup) = mount_and_backup(&home);
    let place = backup.parent().unwrap();
    succeed(&["cp", "-r", text(&backup), text(&place.join("edited"))]);
    let edited = place.join("edited/box.json");
    let description = fs::read_to_string(&edited).unwrap();
    fs::write(
        &edited,
        description.replacen("\"memory_mib\": null", "\"memory_mib\": 777", 1),
    )
    .unwrap();
    succeed(&[
        "cp",
        text(&backup.join("export.boxlite")),
        text(&mount.at("plain.boxlite")),
    ]);
    let plain = config(&home, "plain")["options"].clone();
    assert_eq!(plain["secrets"][0]["value"], "tell-nobody");
    for (name, way) in [
        ("cp", "cp -r $D/SOURCE $M/NEW"),
        ("rsync", "rsync -a $D/SOURCE/ $M/NEW"),
        (
            "tree",
            "python3 -c \"import os, shutil; shutil.copytree(os.environ['D'] + '/SOURCE', os.environ['M'] + '/NEW', symlinks=True)\"",
        ),
        (
            "late",
            "mkdir $M/NEW; tar c -C $D/SOURCE export.boxlite box.json snapshots | tar x -C $M/NEW",
        ),
    ] {
        for (source, memory) in [("backup", Value::Null), ("edited", json!(777))] {
            let new = format!("{name}-{source}");
            let source = if source == "backup" {
                backup.file_name().unwrap().to_str().unwrap()
            } else {
                source
            };
            let command = way.replace("SOURCE", source).replace("NEW", &new);
            let output = shell(&mount, place, &command);
            assert!(
                output.status.success(),
                "{command}: {output:?}\n{}",
                mount.log()
            );
            let mut expected = plain.clone();
            expected["memory_mib"] = memory;
            assert_eq!(config(&home, &new)["options"], expected, "{command}");
            assert_eq!(mount.names(format!("{new}/snapshots")), ["s"]);
        }
    }
    // Inside the mount, by reading and writing.
    succeed(&[
        "cp",
        "-r",
        "--sparse=always",
        text(&mount.at("web")),
        text(&mount.at("copy")),
    ]);
    assert_eq!(config(&home, "copy")["options"], plain);
    fs::write(
        &edited,
        description.replacen("\"memory_mib\": null", "\"memory_mib\": \"much\"", 1),
    )
    .unwrap();
    let output = shell(
        &mount,
        place,
        "rsync -a edited/ $M/bad; cp -r $D/edited $M/worse",
    );
    assert!(!output.status.success(), "{output:?}");
    assert!(
        mount
            .log()
            .contains("options.memory_mib is not a whole number"),
        "{}",
        mount.log()
    );
    home.wheel(&["list"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_directory_with_nothing_but_a_description_is_named_in_the_log() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let output = shell(
        &mount,
        &backup,
        "mkdir $D/only; cp $D/box.json $D/only/; cp -r $D/only $M/only",
    );
    assert!(output.status.success(), "{output:?}");
    eventually("the log says so", || {
        mount.names("");
        mount.log().contains(
            "no box was made of the directory only: it has box.json and no export.boxlite",
        )
    });
    // Its export makes it a box.
    let output = shell(&mount, &backup, "cp $D/export.boxlite $M/only/");
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    home.wheel(&["info", "only"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn fields_of_a_snapshot_that_are_kept_nowhere_are_named_in_the_log() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let command =
        "sed -i '1a \"description\": \"mine\",' $D/snapshots/s/snapshot.json && cp -r $D $M/new";
    let output = shell(&mount, &backup, command);
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    let log = mount.log();
    assert!(
        log.contains("snapshot.json of snapshot s: description is not kept"),
        "{log}"
    );
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_edit_that_is_recorded_outlives_a_kill() {
    let home = TestHome::new();
    let mut mount = home.mount_crashing_at("edit.recorded");
    let edit = "sed -i 's/\"cpus\": null/\"cpus\": 2/' $M/web/box.json";
    let output = shell(&mount, home.root(), edit);
    assert!(
        !output.status.success() && mount.has_crashed(),
        "{output:?}"
    );
    drop(mount);
    assert_eq!(home.wheel(&["info", "web"])["cpus"], 2);
    let mount = home.mount();
    assert_eq!(mount.names("web"), BOX_FILES);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_copy_that_is_killed_before_its_snapshots_have_come_is_named_in_the_log() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    // cp waits for a writer that never comes.
    let command = "cd $D; rm snapshots/s/export.boxlite; mkfifo snapshots/s/export.boxlite; \
                   (mkdir $M/new && cp export.boxlite $M/new/ && exec cp -r --copy-contents snapshots $M/new) & copy=$!; \
                   until test -d $M/new/snapshots/s; do sleep 0.02; done; kill -KILL $copy";
    let output = shell(&mount, &backup, command);
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    eventually("the log says what is missing", || {
        mount.names("new/snapshots");
        let said = "the copy of box new ended before its snapshots had come: s is missing";
        mount.log().contains(said)
    });
    assert_eq!(mount.names("new"), BOX_FILES);
    mount.unmount();
    home.assert_whole();
}
