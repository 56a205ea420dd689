//! `.boxlite/status`: what the mount does now, as JSON.
//!
//! Its text differs at each look, and the size that a reader was told has to stay true. So each
//! version has an inode of its own. A version lasts as long as its node.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::home::rfc3339_at;
use crate::process::Memory;
use crate::store::{Store, usage_of_kept};
use crate::tree::nodes::node::StatusVersion;
use crate::{Error, Result};

/// How long one version is given to all callers. cp looks several times, and takes another inode
/// for another file.
const FRESH: Duration = Duration::from_millis(200);

/// What the status says of the mount itself.
#[derive(Clone, Debug)]
pub struct MountFacts {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Its options, by name.
    pub options: Value,
}

/// Makes versions of `.boxlite/status`.
pub struct StatusFile {
    store: Arc<Store>,
    /// The facts, and when they were told.
    facts: OnceLock<(MountFacts, SystemTime)>,
    latest: Mutex<Latest>,
}

#[derive(Default)]
struct Latest {
    version: Option<(Arc<StatusVersion>, Instant)>,
    last_number: u64,
}

impl StatusFile {
    /// Returns the status file of a mount of this home.
    pub fn new(store: Arc<Store>) -> StatusFile {
        StatusFile {
            store,
            facts: OnceLock::new(),
            latest: Mutex::default(),
        }
    }

    /// Sets what the status says of the mount itself. Only the first call counts.
    pub fn set_facts(&self, facts: MountFacts) {
        let _ = self.facts.set((facts, SystemTime::now()));
    }

    /// Returns a version that is fresh enough, or makes one. `open_files` is what it says of those.
    ///
    /// # Errors
    /// EIO when the status can't be written as JSON.
    pub fn version(&self, open_files: usize) -> Result<Arc<StatusVersion>> {
        let mut latest = self.latest.lock();
        if let Some((version, made)) = &latest.version
            && made.elapsed() < FRESH
        {
            return Ok(version.clone());
        }
        let bytes = pretty(&self.value(open_files))?;
        latest.last_number += 1;
        let version = Arc::new(StatusVersion {
            number: latest.last_number,
            bytes,
            made: SystemTime::now(),
        });
        latest.version = Some((version.clone(), Instant::now()));
        Ok(version)
    }

    fn value(&self, open_files: usize) -> Value {
        let (mountpoint, options, since) = match self.facts.get() {
            Some((facts, since)) => (
                json!(facts.mountpoint.to_string_lossy()),
                facts.options.clone(),
                json!(rfc3339_at(*since)),
            ),
            None => (Value::Null, Value::Null, Value::Null),
        };
        let operations: Vec<Value> = self
            .store
            .operations()
            .running()
            .iter()
            .map(|operation| {
                json!({
                    "what": operation.what,
                    "since": rfc3339_at(operation.since),
                    "bytes": operation.done(),
                    "total_bytes": operation.total(),
                    "percent": operation.percent(),
                })
            })
            .collect();
        let catalog = self.store.home().catalog().ok();
        let cache = self.store.exports().compressed.usage();
        let memory = Memory::of_this_process();
        let kept = usage_of_kept(&self.store).unwrap_or_default();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "home": self.store.home().root().to_string_lossy(),
            "mountpoint": mountpoint,
            "since": since,
            "options": options,
            "boxes": catalog.as_ref().map(|catalog| catalog.boxes().len()),
            "changes": catalog.and_then(|catalog| catalog.schema().read_only.clone()),
            "runtime": self.store.home().runtime(),
            "open_files": open_files,
            "operations": operations,
            "cache": {
                "archives": cache.archives,
                "bytes": cache.bytes,
                "limit_bytes": cache.limit,
                "remembered_bytes": cache.remembered,
            },
            "undo": {"entries": kept.entries, "bytes": kept.bytes},
            "memory": {"resident_bytes": memory.resident, "peak_bytes": memory.peak},
        })
    }
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::damaged(format!("cannot write the status: {error}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}
