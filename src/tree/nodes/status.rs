//! `.boxlite/status`: what is going on, as JSON.
//!
//! It is another at every look, and what a reader was told of its size has to stay true: so each version
//! of it has an inode of its own, and lasts until the kernel forgets that.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::home::rfc3339_at;
use crate::tree::Tree;
use crate::tree::nodes::attr::Attr;
use crate::tree::nodes::node::Node;
use crate::{Error, Result};

/// How long a version is given to whoever looks: cp looks several times, and takes another inode for
/// another file.
const FRESH: Duration = Duration::from_millis(200);

/// The versions that somebody may still read.
#[derive(Default)]
pub(in crate::tree) struct Versions {
    latest: Option<(u64, Instant)>,
    /// Somebody may just be about to open it.
    previous: Option<u64>,
    last: u64,
    /// By inode number.
    all: HashMap<u64, Arc<Version>>,
}

impl Versions {
    /// The kernel does not know a version any more; the latest ones may be given to others yet.
    pub(in crate::tree) fn forget(&mut self, ino: u64) {
        let latest = self.latest.map(|(number, _)| number);
        let mut given = [latest, self.previous].into_iter().flatten();
        if !given.any(|number| Node::Status(number).ino() == ino) {
            self.all.remove(&ino);
        }
    }
}

struct Version {
    bytes: Vec<u8>,
    made: SystemTime,
}

/// What whoever mounted tells of the mount.
#[derive(Clone, Debug)]
pub struct MountFacts {
    /// Where it is mounted.
    pub mountpoint: std::path::PathBuf,
    /// Its options, by name.
    pub options: Value,
}

impl Tree {
    /// Takes what `.boxlite/status` says of the mount itself. Once, before anybody looks.
    pub fn tell_of_mount(&self, facts: MountFacts) {
        let _ = self.facts.set((facts, SystemTime::now()));
    }

    /// The node of a version that is fresh enough.
    pub(in crate::tree) fn status_node(&self) -> Result<Node> {
        let mut versions = self.status.lock();
        if let Some((number, made)) = versions.latest
            && made.elapsed() < FRESH
        {
            return Ok(Node::Status(number));
        }
        let bytes = pretty(&self.status_value())?;
        let made = SystemTime::now();
        versions.last += 1;
        let number = versions.last;
        let version = Arc::new(Version { bytes, made });
        versions.all.insert(Node::Status(number).ino(), version);
        let replaced = versions.latest.replace((number, Instant::now()));
        let before = versions.previous.take();
        versions.previous = replaced.map(|(number, _)| number);
        drop(versions);
        // One that was only looked at is not known to the kernel, and never forgotten.
        if let Some(before) = before {
            let ino = Node::Status(before).ino();
            let known = self.known.lock();
            if known.node(ino).is_none() {
                self.status.lock().forget(ino);
            }
        }
        Ok(Node::Status(number))
    }

    pub(in crate::tree) fn status_attr(&self, node: &Node, number: u64) -> Result<Attr> {
        let version = self.status_version(number)?;
        Ok(self.file(node, version.bytes.len() as u64, version.made))
    }

    pub(in crate::tree) fn status_bytes(&self, number: u64) -> Result<Vec<u8>> {
        Ok(self.status_version(number)?.bytes.clone())
    }

    /// ESTALE has the kernel look the name up again.
    fn status_version(&self, number: u64) -> Result<Arc<Version>> {
        let ino = Node::Status(number).ino();
        let version = self.status.lock().all.get(&ino).cloned();
        version.ok_or_else(|| Error::new(libc::ESTALE, "there is a newer status"))
    }

    fn status_value(&self) -> Value {
        let store = &self.store;
        let (mountpoint, options, since) = match self.facts.get() {
            Some((facts, since)) => (
                json!(facts.mountpoint.to_string_lossy()),
                facts.options.clone(),
                json!(rfc3339_at(*since)),
            ),
            None => (Value::Null, Value::Null, Value::Null),
        };
        let operations: Vec<Value> = store
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
        let catalog = store.home().catalog().ok();
        let cache = store.cache_usage();
        let memory = Memory::of_this_process();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "home": store.home().root().to_string_lossy(),
            "mountpoint": mountpoint,
            "since": since,
            "options": options,
            "boxes": catalog.as_ref().map(|catalog| catalog.boxes().len()),
            "changes": catalog.and_then(|catalog| catalog.schema().read_only.clone()),
            "open_files": self.handles.lock().len(),
            "operations": operations,
            "cache": {
                "archives": cache.archives,
                "bytes": cache.bytes,
                "limit_bytes": cache.limit,
                "remembered_bytes": cache.remembered,
            },
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

/// What the process takes; None where /proc does not say.
#[derive(Default)]
struct Memory {
    resident: Option<u64>,
    peak: Option<u64>,
}

impl Memory {
    fn of_this_process() -> Memory {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            Some(kib * 1024)
        };
        Memory {
            resident: bytes("VmRSS:"),
            peak: bytes("VmHWM:"),
        }
    }
}
