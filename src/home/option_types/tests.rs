use super::*;
use serde_json::json;

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
