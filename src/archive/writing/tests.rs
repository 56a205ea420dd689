//! The compressed form against the plain one, judged by zstd itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::*;
use crate::archive::{About, KnownSizes, Stream};
use crate::disk::judges::{Numbers, qemu_io, succeed, text};
use crate::disk::{Chain, Format, create_overlay};
use crate::{Error, Result};
use std::sync::Arc;

/// Sizes in memory; counts the sizes that were learnt.
#[derive(Default)]
struct Sizes {
    known: Mutex<HashMap<FrameKey, u32>>,
    learnt: AtomicUsize,
}

impl KnownSizes for Sizes {
    fn size(&self, key: &FrameKey) -> Option<u32> {
        self.known.lock().get(key).copied()
    }

    fn learn(&self, key: FrameKey, size: u32) {
        self.learnt.fetch_add(1, Ordering::Relaxed);
        self.known.lock().insert(key, size);
    }
}

/// A live overlay with some data on a raw base of 40 MiB, of which most is text.
fn disk(dir: &Path) -> PathBuf {
    let base = dir.join("base.raw");
    let mut bytes = Vec::new();
    while bytes.len() < 40 << 20 {
        bytes.extend_from_slice(format!("line {} of the base\n", bytes.len()).as_bytes());
    }
    std::fs::write(&base, bytes).unwrap();
    let top = dir.join("top.qcow2");
    create_overlay(&top, &base, Format::Raw, 1 << 30).unwrap();
    qemu_io(
        &top,
        &["write -P 3 10M 3M", "write -P 4 700M 1M", "write -z 0 1M"],
    );
    top
}

fn compressed(top: &Path, live: bool) -> Arc<Compressed> {
    let chain = Chain::open(top, top.parent().unwrap(), 0).unwrap();
    let about = About {
        box_name: Some("web".into()),
        image: "alpine:latest".into(),
        options: serde_json::json!({"rootfs": {"Image": "alpine:latest"}}),
        changed_at: SystemTime::UNIX_EPOCH,
    };
    let export = Export::plan(Arc::new(chain), about).unwrap();
    Arc::new(Compressed::new(Arc::new(export), 3, live))
}

fn produced(of: &Compressed, sizes: &Sizes) -> (Vec<u8>, FrameSizes) {
    let mut bytes = Vec::new();
    let frames = produce(of, sizes, &|| true, &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })
    .unwrap();
    assert_eq!(frames.total(), bytes.len() as u64);
    (bytes, frames)
}

fn plain(of: &Compressed) -> Vec<u8> {
    let mut bytes = vec![0; of.export().len() as usize];
    of.export().read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
#[ignore = "needs programs"]
fn zstd_itself_makes_the_plain_archive_of_it_and_finds_its_checksums_right() {
    let dir = tempfile::tempdir().unwrap();
    let of = compressed(&disk(dir.path()), true);
    let (bytes, _) = produced(&of, &Sizes::default());
    let (packed, unpacked) = (dir.path().join("a.zst"), dir.path().join("a"));
    std::fs::write(&packed, &bytes).unwrap();
    succeed("zstd", &["-t", "-q", text(&packed)]);
    succeed("zstd", &["-d", "-q", text(&packed), "-o", text(&unpacked)]);
    assert!(std::fs::read(&unpacked).unwrap() == plain(&of));
    let listed = succeed("zstd", &["-l", "-v", text(&packed)]);
    assert!(listed.contains("Frames: 24"), "{listed}");
}

#[test]
#[ignore = "needs programs"]
fn two_of_one_state_are_the_same_and_the_digest_in_them_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let (of, again) = (compressed(&top, true), compressed(&top, true));
    let sizes = Sizes::default();
    assert!(produced(&of, &sizes).0 == produced(&again, &sizes).0);
    let fresh = compressed(&top, true);
    assert_eq!(
        of.export().digest(),
        Some(fresh.export().complete_digest().unwrap())
    );
    assert_eq!(of.state_key(), again.state_key());
}

#[test]
#[ignore = "needs programs"]
fn any_place_of_a_stream_has_the_bytes_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let (bytes, frames) = produced(&compressed(&top, true), &Sizes::default());
    let of = compressed(&top, true);
    let frames = FrameSizes::from_bytes(&of, &frames.bytes()).unwrap();
    let stream = Stream::new(of.clone(), Arc::new(frames));
    assert_eq!(stream.len(), bytes.len() as u64);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (stream, bytes) = (&stream, &bytes);
            scope.spawn(move || {
                let mut numbers = Numbers(seed + 1);
                for _ in 0..40 {
                    let at = numbers.below(bytes.len() as u64 + 5000) as usize;
                    let mut part = vec![1; 1 + numbers.below(300_000) as usize];
                    let read = stream.read_at(at as u64, &mut part).unwrap();
                    let there = bytes.get(at..(at + part.len()).min(bytes.len()));
                    assert!(part[..read] == *there.unwrap_or_default(), "at {at}");
                }
            });
        }
    });
    let mut whole = vec![0; bytes.len() + 1];
    assert_eq!(stream.read_at(0, &mut whole).unwrap(), bytes.len());
    assert!(whole[..bytes.len()] == bytes);
    assert!(!stream.is_wrong().load(Ordering::Relaxed));
}

#[test]
#[ignore = "needs programs"]
fn a_small_change_makes_few_new_frames_and_the_size_is_found_without_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let sizes = Sizes::default();
    let first = compressed(&top, true);
    produced(&first, &sizes);
    // In an early hole: all that lies after it moves.
    qemu_io(&top, &["write -P 9 100M 64k"]);
    let changed = compressed(&top, true);
    assert_ne!(changed.state_key(), first.state_key());
    sizes.learnt.store(0, Ordering::Relaxed);
    let measured = measure(&changed, &sizes, &|| true).unwrap().unwrap();
    // Its own frame, and that of header and tables.
    assert_eq!(sizes.learnt.load(Ordering::Relaxed), 2);
    let (_, frames) = produced(&changed, &Sizes::default());
    assert_eq!(measured, frames);
}

#[test]
#[ignore = "needs programs"]
fn a_layer_that_was_frozen_is_recognised_by_its_bytes_once_and_then_by_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let sizes = Sizes::default();
    let (_, frames) = produced(&compressed(&top, true), &sizes);
    let frozen = compressed(&top, false);
    sizes.learnt.store(0, Ordering::Relaxed);
    assert_eq!(measure(&frozen, &sizes, &|| true).unwrap(), Some(frames));
    assert!(sizes.learnt.swap(0, Ordering::Relaxed) > 0);
    assert!(measure(&frozen, &sizes, &|| true).unwrap().is_some());
    assert_eq!(sizes.learnt.load(Ordering::Relaxed), 0);
}

#[test]
#[ignore = "needs programs"]
fn what_was_never_seen_is_not_worth_measuring() {
    let dir = tempfile::tempdir().unwrap();
    let of = compressed(&disk(dir.path()), true);
    assert_eq!(measure(&of, &Sizes::default(), &|| true).unwrap(), None);
}

#[test]
#[ignore = "needs programs"]
fn an_error_of_the_sink_ends_the_production() {
    let dir = tempfile::tempdir().unwrap();
    let of = compressed(&disk(dir.path()), true);
    let full = |_: &[u8]| Err(Error::new(libc::ENOSPC, "full"));
    let error = produce(&of, &Sizes::default(), &|| true, &mut { full }).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
}

#[test]
#[ignore = "needs programs"]
fn a_reader_that_is_gone_ends_the_production_however_fast_frames_come() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top.qcow2");
    qemu_img_create(&top);
    // Frames that are made in no time.
    let writes: Vec<String> = (0..500)
        .map(|n| format!("write -P 3 {}M 64k", 2 * n))
        .collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    qemu_io(&top, &writes);
    let of = compressed(&top, true);
    // So that nothing waits for hashing.
    of.export().set_digest([0; 32]);
    let taken = AtomicUsize::new(0);
    let mut sink = |bytes: &[u8]| {
        taken.fetch_add(usize::from(!bytes.is_empty()), Ordering::Relaxed);
        Ok(())
    };
    let go_on = || taken.load(Ordering::Relaxed) < 10;
    let error = produce(&of, &Sizes::default(), &go_on, &mut sink).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
    assert!(taken.load(Ordering::Relaxed) < 400);
}

fn qemu_img_create(top: &Path) {
    succeed(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(top), "1G"],
    );
}

#[test]
#[ignore = "needs programs"]
fn a_fault_while_frames_are_handed_over_is_an_error_and_no_hang() {
    let dir = tempfile::tempdir().unwrap();
    let of = compressed(&disk(dir.path()), true);
    let mut sink = |_: &[u8]| -> Result<()> { panic!("a fault of the sink") };
    let error = produce(&of, &Sizes::default(), &|| true, &mut sink).unwrap_err();
    assert!(
        error.to_string().contains("a fault of boxlitefs"),
        "{error}"
    );
}

#[test]
#[ignore = "needs programs"]
fn a_disk_that_changes_meanwhile_is_an_error_and_no_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let sizes = Sizes::default();
    let (_, frames) = produced(&compressed(&top, true), &sizes);
    let of = compressed(&top, true);
    let stream = Stream::new(of, Arc::new(frames));
    let mut part = vec![0; 100_000];
    stream.read_at(0, &mut part).unwrap();
    qemu_io(&top, &["write -P 9 10M 64k"]);
    let end = stream.len() - 1000;
    assert_eq!(
        stream.read_at(end, &mut part).unwrap_err().errno(),
        libc::EIO
    );
    let error = stream.read_at(stream.len() / 2, &mut part).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
}
