//! Rows of BoxLite's database as Rust values. JSON columns stay text or value trees, so that
//! fields we do not know survive.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::{Error, Result};

/// `source_box_id` of the bases we make. No box has this id, so BoxLite's collection, which goes
/// by source box and references, never takes them.
pub const OUR_SOURCE_BOX: &str = "__boxlitefs__";

/// A row of `box_config` joined with its `box_state`.
#[derive(Clone, Debug, PartialEq)]
pub struct BoxRecord {
    /// BoxLite's id of the box: the name of its directory.
    pub id: String,
    /// The user's name for it; a box may have no name.
    pub name: Option<String>,
    /// Seconds since 1970.
    pub created_at: i64,
    /// `box_config.json`, as stored.
    pub config: String,
    /// `box_state.status`: unknown, configured, running, stopping, stopped, paused or failed.
    pub status: String,
    /// `box_state.pid`.
    pub pid: Option<i64>,
    /// `box_state.json`, as stored.
    pub state: String,
}

impl BoxRecord {
    /// `box_config.json` as a value tree.
    ///
    /// # Errors
    /// EIO when the column is no JSON object.
    pub fn config(&self) -> Result<Value> {
        parse(&self.config, "configuration", &self.id)
    }

    /// `box_state.json` as a value tree.
    ///
    /// # Errors
    /// EIO when the column is not JSON.
    pub fn state(&self) -> Result<Value> {
        parse(&self.state, "state", &self.id)
    }

    /// Returns the number of BoxLite's lock of the box; None for a box without one.
    ///
    /// # Errors
    /// EIO when `box_state.json` is not JSON.
    pub fn lock_id(&self) -> Result<Option<u32>> {
        let number = self.state()?["lock_id"].as_u64();
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    /// Returns the policy for outgoing connections that replaced the one of the configuration while
    /// the box ran; null if none did. Also null if `box_state.json` can't be read.
    pub fn outbound_policy(&self) -> Value {
        if !self.state.contains("outbound_policy") {
            return Value::Null;
        }
        self.state()
            .map_or(Value::Null, |mut state| state["outbound_policy"].take())
    }

    /// Returns the options of a copy of the box, exported or cloned: those of its configuration,
    /// with its present policy for outgoing connections (litebox/clone_export.rs of BoxLite,
    /// `options_for_copy`).
    ///
    /// # Errors
    /// EIO when the configuration or the policy can't be read.
    pub fn options_for_copy(&self) -> Result<Value> {
        let mut options = self.config()?["options"].take();
        let policy = self.outbound_policy();
        if !policy.is_null() {
            options["network"] = network_of(&policy).ok_or_else(|| {
                Error::damaged(format!(
                    "the outbound_policy of box {} in db/boxlite.db is not one that BoxLite can read: {policy}",
                    self.id
                ))
            })?;
        }
        Ok(options)
    }

    /// Returns the reference of the image the box was made from, or the host path of its root file
    /// system. For people and for the manifest.
    pub fn image(&self) -> String {
        let config = self.config().unwrap_or(Value::Null);
        let rootfs = &config["options"]["rootfs"];
        rootfs["Image"]
            .as_str()
            .or_else(|| rootfs["RootfsPath"].as_str())
            .unwrap_or_default()
            .to_owned()
    }
}

/// Returns a policy for outgoing connections as the option `network` has it; None if BoxLite could
/// not read it. (runtime/options.rs of BoxLite: `OutboundNetworkConfig` becomes a `NetworkSpec`.)
fn network_of(policy: &Value) -> Option<Value> {
    let rules = match &policy["allow_net"] {
        Value::Null => &Vec::new(),
        Value::Array(rules) => rules,
        _ => return None,
    };
    match policy["mode"].as_str()? {
        "enabled" => Some(json!({"Enabled": {"allow_net": rules}})),
        "disabled" if rules.is_empty() => Some(json!("Disabled")),
        _ => None,
    }
}

/// Parses a JSON column, which is an object in everything that BoxLite writes.
fn parse(text: &str, what: &str, id: &str) -> Result<Value> {
    let damaged = || {
        Error::damaged(format!(
            "the {what} of box {id} in db/boxlite.db is not a JSON object; BoxLite cannot read it either"
        ))
    };
    match serde_json::from_str(text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(damaged()),
        Err(e) => Err(damaged().caused_by(e)),
    }
}

/// A row of `snapshot`.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotRecord {
    /// BoxLite's id of the snapshot.
    pub id: String,
    /// The box it belongs to.
    pub box_id: String,
    /// The name the user gave.
    pub name: String,
    /// Seconds since 1970, as stored. BoxLite may give several the same.
    pub created_at: i64,
    /// The time that is shown, in seconds since 1970: later than that of each earlier snapshot of
    /// the box.
    pub shown_at: i64,
    /// `snapshot.json`, as stored.
    pub json: String,
}

impl SnapshotRecord {
    /// `snapshot.json` as a value tree.
    ///
    /// # Errors
    /// EIO when the column is not JSON.
    pub fn value(&self) -> Result<Value> {
        parse(&self.json, "snapshot row", &self.box_id)
    }

    /// `base_path`: where BoxLite looks for the snapshot's layer.
    pub fn base_path(&self) -> Option<String> {
        let value: Value = serde_json::from_str(&self.json).ok()?;
        value["base_path"].as_str().map(str::to_owned)
    }
}

/// Gives snapshots of a box that were made in one second distinct times, in the order of rows.
pub(super) fn show_one_after_the_other(snapshots: &mut [SnapshotRecord]) {
    let mut last: HashMap<&str, i64> = HashMap::new();
    for snapshot in snapshots {
        if let Some(last) = last.get(snapshot.box_id.as_str()) {
            snapshot.shown_at = snapshot.created_at.max(last.saturating_add(1));
        }
        last.insert(&snapshot.box_id, snapshot.shown_at);
    }
}

/// A row of `base_disk`.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseRecord {
    /// BoxLite's id of the base.
    pub id: String,
    /// The box it was made from, or [`OUR_SOURCE_BOX`].
    pub source_box_id: String,
    /// snapshot, clone_base or rootfs.
    pub kind: String,
    /// Absolute path of the file.
    pub base_path: String,
    /// Seconds since 1970.
    pub created_at: i64,
    /// `base_disk.json`, as stored.
    pub json: String,
}

/// The description of a base's file in its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseFile {
    /// When it was recorded, in seconds since 1970.
    pub created_at: i64,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub size_bytes: u64,
}

impl BaseRecord {
    /// Returns the description of the file; None if it is incomplete.
    pub fn file(&self) -> Option<BaseFile> {
        let value: Value = serde_json::from_str(&self.json).ok()?;
        Some(BaseFile {
            created_at: self.created_at,
            virtual_size: value["container_disk_bytes"].as_u64()?,
            size_bytes: value["size_bytes"].as_u64()?,
        })
    }

    /// Returns whether boxlitefs made it.
    pub fn is_ours(&self) -> bool {
        self.source_box_id == OUR_SOURCE_BOX
    }
}

/// A base of ours about to be recorded.
#[derive(Clone, Debug)]
pub struct NewBase {
    /// Its id.
    pub id: String,
    /// Absolute path in `bases/`.
    pub path: String,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Seconds since 1970.
    pub created_at: i64,
}

/// A snapshot about to be recorded.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// Its id.
    pub id: String,
    /// The box it belongs to.
    pub box_id: String,
    /// Its name, already checked.
    pub name: String,
    /// Absolute path of `snapshots/NAME/disk.qcow2`. It is alone in its directory, because
    /// BoxLite's remove deletes the directory.
    pub path: String,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Seconds since 1970.
    pub created_at: i64,
}

/// A removed box about to be recorded again, stopped.
pub struct KeptBoxRows<'r> {
    /// Its rows as they were.
    pub record: &'r BoxRecord,
    /// Its name, which may be another one.
    pub name: &'r str,
    /// Absolute path of its directory.
    pub box_home: String,
    /// Number of its file in `locks/`: 1,000,000 and up.
    pub lock_id: u32,
    /// Its snapshots, with the paths that their layers have.
    pub snapshots: &'r [SnapshotRecord],
}

/// A box about to be recorded, always stopped.
#[derive(Clone, Debug)]
pub struct NewBox {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its container id, 64 hexadecimal digits.
    pub container_id: String,
    /// Absolute path of its directory.
    pub box_home: String,
    /// Seconds since 1970.
    pub created_at: i64,
    /// BoxLite's box options, normalized by [`crate::home::normalize_imported`].
    pub options: Value,
    /// The configuration of the box it is cloned from, whose unknown fields are kept.
    pub config_of_source: Option<Value>,
    /// The state of the box it is cloned from, whose unknown fields are kept.
    pub state_of_source: Option<Value>,
    /// Number of its file in `locks/`: 1,000,000 and up.
    pub lock_id: u32,
}
