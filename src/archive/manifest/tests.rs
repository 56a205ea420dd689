use super::*;
use crate::disk::judges::succeed;
use std::time::Duration;

fn about(options: Value) -> About {
    About {
        box_name: Some("web".into()),
        image: "alpine:latest".into(),
        options,
        changed_at: UNIX_EPOCH + Duration::new(1_790_000_000, 999),
    }
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let options = json!({"rootfs": {"Image": "alpine:latest"}, "unknown": [1, 2]});
    let bytes = manifest_bytes(&about(options.clone()), &[0xab; 32]);
    let manifest = Manifest::parse(&bytes).unwrap();
    assert_eq!(manifest.version, 3);
    assert_eq!(manifest.box_name.as_deref(), Some("web"));
    assert_eq!(manifest.image, "alpine:latest");
    assert_eq!(manifest.options, Some(options));
    assert_eq!(manifest.disk_digest, Some([0xab; 32]));
    assert_eq!(
        manifest.exported_at.as_deref(),
        Some("2026-09-21T14:13:20Z")
    );
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(value["guest_disk_checksum"], "");
}

#[test]
fn unknown_numbers_stay_as_they_are() {
    let numbers = "[2e-130,1.7976931348623157e+308,18446744073709551615,-0.1]";
    let text = format!(r#"{{"unknown":{numbers}}}"#);
    let options: Value = serde_json::from_str(&text).unwrap();
    let bytes = manifest_bytes(&about(options.clone()), &[0; 32]);
    let again = Manifest::parse(&bytes).unwrap().options;
    assert_eq!(again.unwrap().to_string(), text);
}

#[test]
fn the_length_does_not_depend_on_the_digest() {
    let about = about(json!({}));
    let lengths = [[0u8; 32], [255; 32], [16; 32]].map(|d| manifest_bytes(&about, &d).len());
    assert_eq!(lengths, [lengths[0]; 3]);
}

#[test]
fn the_version_is_the_lowest_that_says_it_all() {
    let version = |options| version_for(&options);
    assert_eq!(version(json!({})), 3);
    assert_eq!(
        version(json!({"ports": [], "advanced": {"capabilities": null}})),
        3
    );
    assert_eq!(version(json!({"ports": null, "advanced": {}})), 3);
    assert_eq!(
        version(json!({"advanced": {"capabilities": {"add": ["NET_ADMIN"]}}})),
        4
    );
    let both = json!({"ports": [{"host": 1}], "advanced": {"capabilities": {}}});
    assert_eq!(version(both), 5);
}

#[test]
fn a_box_without_a_name_stays_without() {
    let mut about = about(json!({}));
    about.box_name = None;
    let bytes = manifest_bytes(&about, &[0; 32]);
    assert_eq!(Manifest::parse(&bytes).unwrap().box_name, None);
}

#[test]
fn version_one_may_leave_the_disk_unchecked_and_others_may_not() {
    let with = |version: u64, checksum: &str| {
        let manifest = json!({
            "version": version, "image": "a", "guest_disk_checksum": "",
            "container_disk_checksum": checksum, "box_options": {"cpus": 1},
        });
        Manifest::parse(manifest.to_string().as_bytes())
    };
    let good = format!("sha256:{}", "0f".repeat(32));
    assert_eq!(with(1, "").unwrap().disk_digest, None);
    assert_eq!(with(1, &good).unwrap().disk_digest, Some([0x0f; 32]));
    assert_eq!(with(2, &good).unwrap().options, None);
    assert!(with(5, &good).unwrap().options.is_some());
    for (version, checksum) in [(2, ""), (3, "sha256:"), (3, &good[..70]), (1, "md5:00")] {
        assert_eq!(with(version, checksum).unwrap_err().errno(), libc::EBADMSG);
    }
    assert!(with(3, &good.replace('f', "g")).is_err());
    assert!(with(3, &good.replace("0f0f", "é0f")).is_err());
}

#[test]
fn what_readers_would_read_differently_is_refused() {
    let good = r#"{"version":3,"image":"a","guest_disk_checksum":"","box_options":{},"container_disk_checksum":"sha256:"#;
    let good = format!("{good}{}\"}}", "00".repeat(32));
    Manifest::parse(good.as_bytes()).unwrap();
    for (once, twice) in [
        ("\"version\":3", "\"version\":3,\"version\":3"),
        ("\"version\":3", "\"version\":3,\"ver\\u0073ion\":1"),
        ("{}", r#"{"volumes":[],"volumes":[]}"#),
        ("{}", r#"{"env":[{"deep":1,"deep":2}]}"#),
    ] {
        let error = Manifest::parse(good.replacen(once, twice, 1).as_bytes()).unwrap_err();
        assert_eq!(error.errno(), libc::EBADMSG);
        assert!(error.to_string().contains("occurs twice in it"), "{error}");
    }
    let deep = good.replacen("{}", &"[".repeat(100_000), 1);
    let error = Manifest::parse(deep.as_bytes()).unwrap_err();
    assert!(error.to_string().contains("recursion limit"), "{error}");
}

#[test]
fn what_is_no_manifest_is_refused() {
    let good = json!({
        "version": 3, "box_name": "n", "image": "a", "box_options": {},
        "guest_disk_checksum": "",
        "container_disk_checksum": format!("sha256:{}", "00".repeat(32)),
        "exported_at": "2026-01-01T00:00:00Z",
    });
    let parse = |value: &Value| Manifest::parse(value.to_string().as_bytes());
    parse(&good).unwrap();
    let bad_fields = [
        ("version", json!(0)),
        ("version", json!(6)),
        ("version", json!("3")),
        ("version", json!(3.5)),
        ("version", Value::Null),
        ("box_name", json!(7)),
        ("image", Value::Null),
        ("image", json!(["a"])),
        ("box_options", json!("{}")),
        ("guest_disk_checksum", Value::Null),
        ("container_disk_checksum", Value::Null),
        ("container_disk_checksum", json!(1)),
        ("exported_at", json!(1_700_000_000)),
    ];
    for (field, value) in bad_fields {
        let mut bad = good.clone();
        bad[field] = value;
        let error = parse(&bad).unwrap_err();
        assert_eq!(error.errno(), libc::EBADMSG, "{bad}");
        assert!(error.to_string().contains(field), "{error}");
    }
    for bytes in [&b""[..], b"[]", b"{", b"null", b"\xff\xff"] {
        assert_eq!(Manifest::parse(bytes).unwrap_err().errno(), libc::EBADMSG);
    }
    let mut large = good.to_string().into_bytes();
    large.resize(LARGEST, b' ');
    Manifest::parse(&large).unwrap();
    large.push(b' ');
    assert_eq!(Manifest::parse(&large).unwrap_err().errno(), libc::EBADMSG);
}

#[test]
#[ignore = "needs programs"]
fn dates_are_what_date_says() {
    let seconds = [
        0,
        951_782_400,
        951_868_799,
        1_709_164_800,
        1_709_251_200,
        1_735_689_599,
        1_735_689_600,
        4_107_542_400,
        13_574_563_200,
        253_402_300_799,
    ];
    for seconds in seconds {
        let at = format!("@{seconds}");
        let said = succeed("date", &["-u", "-d", &at, "+%Y-%m-%dT%H:%M:%SZ"]);
        let time = UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(rfc3339(time), said.trim());
    }
    assert_eq!(
        rfc3339(UNIX_EPOCH - Duration::from_secs(1)),
        "1970-01-01T00:00:00Z"
    );
}
