use super::*;

fn record(options: Value) -> BoxRecord {
    let config = json!({"id": "a", "name": "web", "created_at": "2026-01-01T00:00:00Z",
        "box_home": "/h/boxes/a", "future": {"secrets": [{"value": "kept"}]}, "options": options});
    BoxRecord {
        id: "a".into(),
        name: Some("web".into()),
        created_at: 1,
        config: config.to_string(),
        status: "stopped".into(),
        pid: None,
        state: r#"{"status":"stopped","lock_id":3}"#.into(),
    }
}

fn options() -> Value {
    json!({"cpus": 1, "memory_mib": 512, "rootfs": {"Image": "alpine"}, "auto_remove": false,
        "future_option": [1], "network": {"Enabled": {"allow_net": []}},
        "advanced": {"privileged": false, "later": {"secrets": [{"value": "deep"}]},
            "security": {"resource_limits": {"max_file_size": 7, "max_processes": 8}}},
        "secrets": [{"name": "k", "hosts": [], "placeholder": "P", "value": "tell-nobody"},
            {"name": "l", "hosts": [], "placeholder": "Q", "value": "nor-this"}]})
}

/// Edits what is shown of a box.
fn edit(change: impl FnOnce(&mut Value)) -> Result<OptionEdit> {
    let record = record(options());
    let mut written = record.shown().unwrap();
    change(&mut written);
    record.edited(&written, false)
}

#[test]
fn what_was_not_changed_stays_as_the_row_has_it() {
    let same = edit(|_| {}).unwrap();
    assert_eq!(same.options, options());
    assert!(same.changed.is_empty());
    let more = edit(|written| {
        written["options"]["memory_mib"] = json!(2048);
        written["options"]["env"] = json!([["A", "b"]]);
        written["options"]["advanced"]["privileged"] = json!(true);
        written["space"] = json!({"own_bytes": 7});
    });
    let more = more.unwrap();
    let mut expected = options();
    expected["memory_mib"] = json!(2048);
    expected["env"] = json!([["A", "b"]]);
    expected["advanced"]["privileged"] = json!(true);
    assert_eq!(more.options, expected);
    let places = [
        "options.advanced.privileged",
        "options.env",
        "options.memory_mib",
    ];
    let mut changed = more.changed;
    changed.sort();
    assert_eq!(changed, places);
}

#[test]
fn hidden_secrets_keep_their_values_by_name() {
    let edited = edit(|written| {
        let secrets = written["options"]["secrets"].as_array_mut().unwrap();
        secrets.swap(0, 1);
        secrets[1]["hosts"] = json!(["example.org"]);
        secrets.push(json!({"name": "m", "hosts": [], "placeholder": "R", "value": "new"}));
    });
    let secrets = &edited.unwrap().options["secrets"];
    assert_eq!(secrets[0]["value"], "nor-this");
    assert_eq!(secrets[1]["value"], "tell-nobody");
    assert_eq!(secrets[1]["hosts"][0], "example.org");
    assert_eq!(secrets[2]["value"], "new");
    let renamed = edit(|written| written["options"]["secrets"][0]["name"] = json!("other"));
    let error = renamed.unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().contains("options.secrets[0]"), "{error}");
}

#[test]
fn what_can_not_be_changed_is_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 17] = [
        ("name can't be changed here", |it| it["name"] = json!("api")),
        ("id can't be changed", |it| it["id"] = json!("b")),
        ("state.status", |it| {
            it["state"]["status"] = json!("running");
        }),
        ("box_home", |it| it["box_home"] = json!("/")),
        ("\"future\"", |it| it["future"] = json!(1)),
        ("\"mine\"", |it| it["mine"] = json!(1)),
        ("options.rootfs", |it| {
            it["options"]["rootfs"] = json!({"Image": "debian"});
        }),
        ("options.disk_size_gb", |it| {
            it["options"]["disk_size_gb"] = json!(9);
        }),
        ("options.memory_mb is not known", |it| {
            it["options"]["memory_mb"] = json!(1);
        }),
        ("options.future_option", |it| {
            it["options"]["future_option"] = json!([2]);
        }),
        ("max_file_size", |it| {
            it["options"]["advanced"]["security"]["resource_limits"]["max_file_size"] = json!(8);
        }),
        ("options.memory_mib is not", |it| {
            it["options"]["memory_mib"] = json!("2G");
        }),
        ("options.cpus is not", |it| {
            it["options"]["cpus"] = json!(300);
        }),
        ("options.env[0] is not", |it| {
            it["options"]["env"] = json!(["A=b"]);
        }),
        ("options.auto_remove", |it| {
            it["options"]["auto_remove"] = json!(true);
        }),
        ("options.auto_remove", |it| {
            it["options"]["auto_delete"] = json!(5);
        }),
        ("options is not an object", |it| it["options"] = json!([])),
    ];
    for (message, change) in cases {
        let error = edit(change).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.to_string().contains(message), "{message}: {error}");
    }
}

#[test]
fn an_option_that_is_taken_out_gets_the_default_of_boxlite() {
    let edited = edit(|it| remove(&mut it["options"], "cpus")).unwrap();
    assert_eq!(edited.options.get("cpus"), None);
    assert_eq!(edited.changed, ["options.cpus"]);
}

#[test]
fn an_edit_of_an_untrusted_mount_gives_no_access_to_the_host() {
    let mut options = options();
    options["volumes"] = json!([{"host_path": "/srv", "guest_path": "/x", "read_only": true}]);
    let record = record(options);
    let mut written = record.shown().unwrap();
    written["options"]["memory_mib"] = json!(64);
    record.edited(&written, true).unwrap();
    written["options"]["volumes"][0]["host_path"] = json!("/etc");
    record.edited(&written, false).unwrap();
    let error = record.edited(&written, true).unwrap_err();
    assert_eq!(error.errno(), libc::EPERM);
    assert!(
        error.to_string().contains("options.volumes uses"),
        "{error}"
    );
}

#[test]
fn a_policy_that_was_set_while_the_box_ran_counts_instead_of_the_network() {
    let mut record = record(options());
    record.state =
        json!({"status": "stopped", "outbound_policy": {"mode": "disabled"}}).to_string();
    let mut written = record.shown().unwrap();
    written["options"]["network"] = json!("Disabled");
    let error = record.edited(&written, false).unwrap_err();
    assert!(error.to_string().contains("outbound_policy"), "{error}");
}

/// The options of a new box made of an archive with these options and of a description.
fn described(options: &Value, description: &Value) -> Result<OptionEdit> {
    described_options(options, Some(5), description, false)
}

#[test]
fn an_unedited_description_gives_what_the_archive_gives() {
    let mut original = options();
    original["auto_remove"] = json!(true);
    original["auto_delete"] = json!(9);
    let mut record = record(original.clone());
    let plain = normalize_imported(original.clone(), Some(5));
    let same = described(&original, &record.shown().unwrap()).unwrap();
    assert_eq!((same.options, same.changed.len()), (plain.clone(), 0));
    // An export has the policy in place of the option.
    record.state =
        json!({"status": "stopped", "outbound_policy": {"mode": "disabled"}}).to_string();
    let exported = record.options_for_copy().unwrap();
    let same = described(&exported, &record.shown().unwrap()).unwrap();
    assert_eq!(same.options, normalize_imported(exported, Some(5)));
    assert!(same.changed.is_empty(), "{:?}", same.changed);
    // BoxLite has set its limit between the two copies.
    let mut later = record.shown().unwrap();
    later["options"]["network"] = original["network"].clone();
    later["options"]["advanced"]["security"]["resource_limits"]["max_file_size"] = json!(99);
    let same = described(&original, &later).unwrap();
    assert_eq!(same.options, plain);
}

#[test]
fn ports_of_an_old_archive_keep_their_old_meaning_unless_they_were_edited() {
    let mut original = options();
    original["ports"] = json!([{"host_port": null, "guest_port": 80, "host_ip": "1.2.3.4"}]);
    let mut description = record(original.clone()).shown().unwrap();
    let plain = normalize_imported(original.clone(), Some(3));
    let same = described_options(&original, Some(3), &description, false).unwrap();
    assert_eq!(same.options, plain);
    let port = json!([{"host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_ip": "::1"}]);
    description["options"]["ports"] = port.clone();
    let edited = described_options(&original, Some(3), &description, false).unwrap();
    assert_eq!(edited.options["ports"], port);
}

#[test]
fn an_edited_description_counts() {
    let mut description = record(options()).shown().unwrap();
    description["id"] = json!("of another box");
    description["options"]["memory_mib"] = json!(4096);
    let edited = described(&options(), &description).unwrap();
    assert_eq!(edited.options["memory_mib"], 4096);
    assert_eq!(edited.options["secrets"][0]["value"], "tell-nobody");
    description["options"]["memory_mib"] = json!("4G");
    assert_eq!(
        described(&options(), &description).unwrap_err().errno(),
        libc::EINVAL
    );
}
