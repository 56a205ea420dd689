//! BoxLite's box options: which a new box keeps, and which are not shown.

use serde_json::{Value, json};

/// Replaces secrets in everything that is shown.
pub(super) const HIDDEN: &str = "(hidden)";

/// The first archive version whose port mappings mean their host address and protocol (BoxLite's
/// PUBLISHED_PORTS_ARCHIVE_VERSION).
const PUBLISHED_PORTS: u64 = 5;

/// Returns the options of a new box, imported (with the archive's `version`) or cloned (None).
/// `auto_remove` is false and `auto_delete` null, or BoxLite would delete the box at its next
/// start. Ports of an archive below version 5 are rewritten as BoxLite's import does, because they
/// never meant their host address and protocol.
pub fn normalize_imported(mut options: Value, version: Option<u64>) -> Value {
    if !options.is_object() {
        options = json!({});
    }
    options["auto_remove"] = json!(false);
    options["auto_delete"] = Value::Null;
    if version.is_some_and(|version| version < PUBLISHED_PORTS)
        // Not by index, which would insert a null. BoxLite can't read that, nor any box of the home
        // then.
        && let Some(ports) = options.get_mut("ports").and_then(Value::as_array_mut)
    {
        for port in ports.iter_mut().filter(|port| port.is_object()) {
            if port["host_port"].is_null() {
                port["host_port"] = port["guest_port"].clone();
            }
            port["protocol"] = json!("tcp");
            port["host_ip"] = Value::Null;
        }
    }
    options
}

/// Replaces the value of every secret, wherever a `secrets` list is.
pub fn redact_secrets(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if name == "secrets" {
                    hide_values(field);
                } else {
                    redact_secrets(field);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact_secrets),
        _ => {}
    }
}

fn hide_values(secrets: &mut Value) {
    match secrets {
        Value::Array(list) => {
            for secret in list {
                if !secret.is_object() {
                    // An unknown shape: hide everything rather than show a secret.
                    *secret = json!(HIDDEN);
                } else if let Some(value) = secret.get_mut("value") {
                    *value = json!(HIDDEN);
                }
            }
        }
        Value::Null => {}
        other => *other = json!(HIDDEN),
    }
}

#[cfg(test)]
mod tests;
