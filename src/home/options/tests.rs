use super::*;

#[test]
fn the_options_boxlite_itself_stores_are_accepted() {
    let stored = json!({"cpus":null,"memory_mib":512,"env":[["A","b"]],"rootfs":{"Image":"alpine:latest"},
            "volumes":[{"host_path":"/a","guest_path":"/b","read_only":true}],"mounts":[],
            "network":{"Enabled":{"allow_net":[]}},"inbound_network":"Disabled",
            "ports":[{"host_port":null,"guest_port":80,"protocol":"Tcp","host_ip":null}],
            "auto_remove":false,"auto_delete":null,"detach":false,"secrets":[],
            "advanced":{"security":{"jailer_enabled":true,"uid":65534,"resource_limits":{"max_open_files":1024,"max_memory":null}},
            "health_check":null,"kernel":null},"entrypoint":null,"some_future_field":{"x":1}});
    check_options(&stored).unwrap();
    check_options(&json!({})).unwrap();
}

#[test]
fn options_that_would_break_the_home_are_refused_by_name() {
    for (options, field) in [
        (json!({"cpus": 256}), "cpus"),
        (json!({"cpus": "two"}), "cpus"),
        (json!({"memory_mib": -1}), "memory_mib"),
        (json!({"env": {"A": "b"}}), "env"),
        (json!({"rootfs": "alpine"}), "rootfs"),
        (json!({"network": "Sometimes"}), "network"),
        (json!({"auto_remove": null}), "auto_remove"),
        (json!({"secrets": [{"name": "x"}]}), "secrets[0]"),
        (
            json!({"advanced": {"security": {"uid": "root"}}}),
            "advanced.security.uid",
        ),
        (json!([]), "box_options"),
    ] {
        let error = check_options(&options).unwrap_err();
        assert_eq!(error.errno(), libc::EBADMSG);
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn an_imported_box_is_never_removed_by_boxlites_next_start() {
    let options = json!({"auto_remove": true, "auto_delete": 5, "x": 1});
    let normal = normalize_imported(options, Some(3));
    assert_eq!(
        normal,
        json!({"auto_remove": false, "auto_delete": null, "x": 1})
    );
}

#[test]
fn ports_of_old_archives_mean_the_guests_port_on_every_address() {
    let options = json!({"ports": [{"host_port": null, "guest_port": 80, "protocol": "Udp", "host_ip": "127.0.0.1"}]});
    let old = normalize_imported(options.clone(), Some(4));
    assert_eq!(
        old["ports"][0],
        json!({"host_port": 80, "guest_port": 80, "protocol": "tcp", "host_ip": null})
    );
    let new = normalize_imported(options.clone(), Some(5));
    assert_eq!(new["ports"], options["ports"]);
}

#[test]
fn secret_values_are_hidden_and_nothing_else() {
    let mut config = json!({"options": {"secrets": [{"name": "k", "hosts": ["h"], "placeholder": "<k>", "value": "sk-123"}], "cpus": 1}});
    redact_secrets(&mut config);
    assert!(!config.to_string().contains("sk-123"));
    assert_eq!(config["options"]["secrets"][0]["name"], "k");
    assert_eq!(config["options"]["cpus"], 1);
}
