use super::*;

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
