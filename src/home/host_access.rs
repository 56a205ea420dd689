//! Rejects options of an archive that would give its box access to the host.
//!
//! A box is isolated from its host by its virtual machine, and by the jail around that. These are
//! the options that open either (BoxLite's runtime/options.rs and advanced_options.rs; its own
//! import of uploads refuses most of them, too). All others concern the inside of the guest: its
//! image, commands, environment, resources, and its way out to the network.

use std::net::IpAddr;

use serde_json::Value;

use super::option_types::unknown_option;
use crate::{Error, Result};

/// Returns whether a value is as harmless as BoxLite's default.
type Harmless = fn(&Value) -> bool;

/// Options by their place, each with the values it may have. Absent is BoxLite's default, which is
/// harmless.
const HARMLESS: &[(&str, Harmless)] = &[
    ("rootfs.RootfsPath", never),
    ("volumes", is_empty),
    ("mounts", is_empty),
    ("ports", all_on_loopback),
    ("advanced.kernel", Value::is_null),
    ("advanced.nested_virtualization", is_false),
    ("advanced.privileged", is_false),
    ("advanced.capabilities.add", is_empty),
    ("advanced.security.jailer_enabled", is_true),
    ("advanced.security.seccomp_enabled", is_true),
    ("advanced.security.uid", is_nobody),
    ("advanced.security.gid", is_nobody),
    ("advanced.security.new_pid_ns", is_true),
    ("advanced.security.chroot_base", is_chroot_base),
    ("advanced.security.chroot_enabled", is_true),
    ("advanced.security.close_fds", is_true),
    ("advanced.security.sanitize_env", is_true),
    ("advanced.security.env_allowlist", has_log_level_alone),
    (
        "advanced.security.resource_limits.max_open_files",
        |limit| at_most(limit, 1024),
    ),
    ("advanced.security.resource_limits.max_processes", |limit| {
        at_most(limit, 1024)
    }),
    // BoxLite sets this anew from the size of the disk.
    (
        "advanced.security.resource_limits.max_file_size",
        Value::is_u64,
    ),
    ("advanced.security.sandbox_profile", Value::is_null),
];

/// Rejects options that give access to the host, and options that are not known: a newer BoxLite
/// may give them a meaning. BoxLite must be able to read the options, and they must be
/// [normalized](super::normalize_imported).
///
/// # Errors
/// EPERM naming the first such option. The archive may be valid, but it is not accepted here.
pub fn reject_host_access(options: &Value) -> Result<()> {
    match harmful_option(options) {
        Some((place, why)) => Err(refused(&place, why)),
        None => Ok(()),
    }
}

/// Rejects the same options where they were edited in `box.json`.
///
/// # Errors
/// EPERM naming the first such option.
pub(super) fn reject_edited_access(options: &Value) -> Result<()> {
    let Some((place, why)) = harmful_option(options) else {
        return Ok(());
    };
    let place = place.replacen("box_options", "options", 1);
    Err(Error::new(
        libc::EPERM,
        format!(
            "{place} {why}, and this mount does not allow that (import=untrusted); mount with \
             import=trusted to change it"
        ),
    ))
}

/// Returns the place of the first option that gives access to the host, or is not known, and what
/// is wrong with it.
fn harmful_option(options: &Value) -> Option<(String, &'static str)> {
    if let Some(place) = unknown_option(options) {
        return Some((place, "is not known here"));
    }
    HARMLESS.iter().find_map(|(place, harmless)| {
        let mut parts = place.split('.');
        let value = parts.try_fold(options, |value, name| value.get(name))?;
        (!harmless(value)).then(|| (format!("box_options.{place}"), harm_of(place)))
    })
}

fn refused(place: &str, why: &str) -> Error {
    Error::new(
        libc::EPERM,
        format!(
            "the archive's {place} {why}, and this mount takes untrusted archives (import=untrusted); mount with import=trusted if you trust it"
        ),
    )
}

/// Returns the harm of an option, for the message.
fn harm_of(place: &str) -> &'static str {
    match place {
        "ports" => "publishes a port on more than the loopback address",
        "rootfs.RootfsPath" | "volumes" | "mounts" => "uses files of the host",
        "advanced.kernel" => "brings a kernel of its own",
        "advanced.nested_virtualization" => "asks for nested virtualization",
        "advanced.privileged" | "advanced.capabilities.add" => "asks for privileges",
        _ => "weakens the isolation of the box from the host",
    }
}

fn never(_: &Value) -> bool {
    false
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_true(value: &Value) -> bool {
    value.as_bool() == Some(true)
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

/// For null, BoxLite chooses an unprivileged user; 65534 is the user nobody.
fn is_nobody(value: &Value) -> bool {
    value.is_null() || value.as_u64() == Some(65534)
}

fn is_chroot_base(value: &Value) -> bool {
    value.as_str() == Some("/srv/boxlite")
}

/// The variables of the host's environment that the virtual machine's process may see.
fn has_log_level_alone(value: &Value) -> bool {
    let names = value.as_array();
    names.is_some_and(|names| names.iter().all(|name| name == "RUST_LOG"))
}

/// Null is no limit.
fn at_most(value: &Value, most: u64) -> bool {
    value.as_u64().is_some_and(|limit| limit <= most)
}

/// No address is every address.
fn all_on_loopback(ports: &Value) -> bool {
    let is_local = |port: &Value| {
        let address = port.get("host_ip").and_then(Value::as_str);
        let address = address.and_then(|address| address.parse::<IpAddr>().ok());
        address.is_some_and(|address| address.is_loopback())
    };
    ports
        .as_array()
        .is_some_and(|ports| ports.iter().all(is_local))
}

#[cfg(test)]
mod tests {
    use super::super::{check_options, normalize_imported};
    use super::*;
    use serde_json::json;

    /// As BoxLite 0.10.8 exports a box for which nothing was asked.
    fn usual() -> Value {
        json!({"cpus":null,"memory_mib":null,"disk_size_gb":null,"working_dir":null,"env":[],
            "rootfs":{"Image":"alpine:latest"},"volumes":[],"mounts":[],
            "network":{"Enabled":{"allow_net":[]}},"inbound_network":"Disabled","ports":[],
            "auto_remove":false,"auto_stop":null,"auto_delete":null,"auto_resume":null,"detach":false,
            "advanced":{"security":{"jailer_enabled":true,"seccomp_enabled":true,"uid":65534,
            "gid":65534,"new_pid_ns":true,"new_net_ns":false,"chroot_base":"/srv/boxlite",
            "chroot_enabled":true,"close_fds":true,"sanitize_env":true,"env_allowlist":["RUST_LOG"],
            "resource_limits":{"max_open_files":1024,"max_file_size":21474836480u64,
            "max_processes":1024,"max_memory":null,"max_cpu_time":null},"sandbox_profile":null,
            "network_enabled":true},"isolate_mounts":false,"health_check":null,"kernel":null,
            "nested_virtualization":false,"privileged":false},"entrypoint":null,"cmd":null,
            "user":null,"tty":false,"secrets":[]})
    }

    /// The usual options with the value at a place replaced.
    fn with(place: &str, value: Value) -> Value {
        let mut options = usual();
        *options.pointer_mut(place).unwrap() = value;
        options
    }

    #[test]
    fn what_a_guest_is_and_does_inside_is_taken() {
        for options in [
            usual(),
            json!({}),
            with("/env", json!([["TOKEN", "x"]])),
            with("/cpus", json!(64)),
            with("/advanced/security/uid", Value::Null),
            with(
                "/advanced/security/resource_limits/max_open_files",
                json!(10),
            ),
            with("/network", json!("Disabled")),
            with("/cmd", json!(["sh", "-c", "true"])),
            with(
                "/secrets",
                json!([{"name": "n", "hosts": ["h"], "placeholder": "p", "value": "v"}]),
            ),
            with(
                "/ports",
                json!([{"host_port": 80, "guest_port": 80, "protocol": "tcp", "host_ip": "127.0.0.1"}]),
            ),
            with(
                "/ports",
                json!([{"host_port": null, "guest_port": 80, "host_ip": "::1"}]),
            ),
        ] {
            check_options(&options).unwrap();
            let options = normalize_imported(options, Some(5));
            reject_host_access(&options).unwrap_or_else(|e| panic!("{options}: {e}"));
        }
    }

    #[test]
    fn what_reaches_into_the_host_is_refused_by_name() {
        let port = |address: Value| json!([{"host_port": 80, "guest_port": 80, "protocol": "tcp", "host_ip": address}]);
        let volume = json!([{"host_path": "/", "guest_path": "/h", "read_only": true}]);
        let cases = [
            ("/rootfs", json!({"RootfsPath": "/"}), "rootfs.RootfsPath"),
            ("/volumes", volume, "volumes"),
            ("/ports", port(Value::Null), "ports"),
            ("/ports", port(json!("0.0.0.0")), "ports"),
            ("/ports", port(json!("::")), "ports"),
            ("/ports", port(json!("::ffff:0.0.0.0")), "ports"),
            ("/ports", port(json!("192.168.1.5")), "ports"),
            ("/ports", port(json!("0")), "ports"),
            ("/ports", port(json!("localhost")), "ports"),
            (
                "/advanced/nested_virtualization",
                json!(true),
                "nested_virtualization",
            ),
            ("/advanced/privileged", json!(true), "privileged"),
            (
                "/advanced/security/jailer_enabled",
                json!(false),
                "jailer_enabled",
            ),
            (
                "/advanced/security/seccomp_enabled",
                json!(false),
                "seccomp_enabled",
            ),
            ("/advanced/security/uid", json!(0), "uid"),
            ("/advanced/security/gid", json!(1000), "gid"),
            ("/advanced/security/new_pid_ns", json!(false), "new_pid_ns"),
            (
                "/advanced/security/chroot_base",
                json!("/home"),
                "chroot_base",
            ),
            (
                "/advanced/security/chroot_enabled",
                json!(false),
                "chroot_enabled",
            ),
            ("/advanced/security/close_fds", json!(false), "close_fds"),
            (
                "/advanced/security/sanitize_env",
                json!(false),
                "sanitize_env",
            ),
            (
                "/advanced/security/env_allowlist",
                json!(["AWS_SECRET"]),
                "env_allowlist",
            ),
            (
                "/advanced/security/sandbox_profile",
                json!("/x"),
                "sandbox_profile",
            ),
            (
                "/advanced/security/resource_limits/max_processes",
                Value::Null,
                "max_processes",
            ),
            (
                "/advanced/security/resource_limits/max_open_files",
                json!(1 << 20),
                "max_open_files",
            ),
        ];
        for (place, value, named) in cases {
            let options = with(place, value);
            check_options(&options).unwrap();
            let error = reject_host_access(&normalize_imported(options, Some(5))).unwrap_err();
            assert_eq!(error.errno(), libc::EPERM, "{place}");
            assert!(error.to_string().contains(named), "{error}");
        }
        let mut options = usual();
        options["advanced"]["capabilities"] = json!({"add": ["SYS_ADMIN"], "drop": []});
        let error = reject_host_access(&options).unwrap_err();
        assert!(error.to_string().contains("capabilities.add"), "{error}");
        // No archive below version 5 means an address.
        let old = with("/ports", port(json!("127.0.0.1")));
        reject_host_access(&normalize_imported(old, Some(4))).unwrap_err();
    }

    #[test]
    fn what_is_not_known_is_refused_wherever_it_stands() {
        for place in [
            "",
            "/advanced",
            "/advanced/security",
            "/advanced/security/resource_limits",
            "/network/Enabled",
        ] {
            let mut options = usual();
            options.pointer_mut(place).unwrap()["future\u{1b}[2J"] = json!(false);
            check_options(&options).unwrap();
            let error = reject_host_access(&options).unwrap_err();
            assert_eq!(error.errno(), libc::EPERM, "{place}");
            assert!(error.to_string().contains("future\\u{1b}"), "{error}");
        }
        let port = json!([{"guest_port": 80, "host_ip": "::1", "path": "/run/x"}]);
        let error = reject_host_access(&with("/ports", port)).unwrap_err();
        assert!(error.to_string().contains("ports[0].\"path\""), "{error}");
    }
}
