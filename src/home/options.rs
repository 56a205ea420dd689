//! BoxLite's box options: what a new box may keep of them, and what must not be shown.

use serde_json::{Value, json};

/// What replaces a secret in everything that is shown.
const HIDDEN: &str = "(hidden)";

/// Archive version from which port mappings say which host address and protocol they mean
/// (BoxLite's PUBLISHED_PORTS_ARCHIVE_VERSION).
const PUBLISHED_PORTS: u64 = 5;

/// Options as a new box gets them, imported (with the archive's `version`) or cloned (None):
/// `auto_remove` false and `auto_delete` null, or BoxLite would delete the box at its next start;
/// ports of an archive below version 5 rewritten the way BoxLite's import does, because they never
/// meant their host address and protocol.
pub fn normalize_imported(mut options: Value, version: Option<u64>) -> Value {
    if !options.is_object() {
        options = json!({});
    }
    options["auto_remove"] = json!(false);
    options["auto_delete"] = Value::Null;
    if version.is_some_and(|version| version < PUBLISHED_PORTS)
        // Not by index, which would put a null in: BoxLite can't read that, nor then any box.
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
                    // A shape we do not know: better nothing than a secret.
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
