//! The compressed form against the plain one, judged by zstd itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::*;
use crate::archive::{About, FrameCache, KnownSizes, NoFrames, Stream};
use crate::disk::judges::{Numbers, qemu_io, succeed, text};
use crate::disk::{Chain, Format, create_overlay};
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

/// What was offered, and the frames in it by key.
#[derive(Default)]
struct Offered {
    bytes: Mutex<Vec<u8>>,
    frames: Mutex<HashMap<FrameKey, Vec<u8>>>,
    found: AtomicUsize,
    offers: AtomicUsize,
}

impl FrameCache for Offered {
    fn has_frames(&self) -> bool {
        true
    }

    fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool {
        let frames = self.frames.lock();
        let found = frames.get(key);
        if let Some(frame) = found {
            bytes.clone_from(frame);
            self.found.fetch_add(1, Ordering::Relaxed);
        }
        found.is_some()
    }

    fn offer(&self, start: u64, key: Option<FrameKey>, bytes: &[u8]) {
        self.offers
            .fetch_add(usize::from(!bytes.is_empty()), Ordering::Relaxed);
        let mut all = self.bytes.lock();
        let end = start as usize + bytes.len();
        if all.len() < end {
            all.resize(end, 0);
        }
        all[start as usize..end].copy_from_slice(bytes);
        if let Some(key) = key {
            self.frames.lock().insert(key, bytes.to_vec());
        }
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
    let offered = Offered::default();
    let frames = produce(of, sizes, &offered, &|| true).unwrap();
    let bytes = offered.bytes.into_inner();
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
    let stream = Stream::new(of.clone(), Arc::new(frames), Arc::new(NoFrames));
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
fn frames_of_another_state_are_taken_and_the_bytes_are_those_of_compressing_anew() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let offered = Arc::new(Offered::default());
    let sizes = Sizes::default();
    produce(&compressed(&top, true), &sizes, &*offered, &|| true).unwrap();
    let all = offered.offers.swap(0, Ordering::Relaxed);
    assert_eq!(offered.found.load(Ordering::Relaxed), 0);
    // In an early hole: all that lies after it moves.
    qemu_io(&top, &["write -P 9 100M 64k", "write -P 8 12M 64k"]);

    let changed = compressed(&top, true);
    let (anew, frames) = produced(&changed, &Sizes::default());
    let digest = changed.export().digest().unwrap();
    // All but the two windows, header and tables, and the manifest.
    let taken = all - 3;
    for is_read in [false, true] {
        // Nothing but what was kept of the first state.
        let before: HashMap<_, _> = offered.frames.lock().clone();
        let again = compressed(&top, true);
        if is_read {
            let stream = Stream::new(again.clone(), Arc::new(frames.clone()), offered.clone());
            let mut bytes = vec![0; anew.len()];
            assert_eq!(stream.read_at(0, &mut bytes).unwrap(), bytes.len());
            assert!(bytes == anew);
        } else {
            produce(&again, &Sizes::default(), &*offered, &|| true).unwrap();
            assert!(offered.bytes.lock()[..anew.len()] == anew);
        }
        assert_eq!(offered.found.swap(0, Ordering::Relaxed), taken);
        // Also of what was not compressed.
        assert_eq!(again.export().complete_digest().unwrap(), digest);
        *offered.frames.lock() = before;
    }
}

#[test]
#[ignore = "needs programs"]
fn frames_of_a_live_disk_are_found_for_the_layer_it_became() {
    let dir = tempfile::tempdir().unwrap();
    let top = disk(dir.path());
    let offered = Offered::default();
    produce(
        &compressed(&top, true),
        &Sizes::default(),
        &offered,
        &|| true,
    )
    .unwrap();
    let all = offered.offers.swap(0, Ordering::Relaxed);
    produce(
        &compressed(&top, false),
        &Sizes::default(),
        &offered,
        &|| true,
    )
    .unwrap();
    assert_eq!(offered.found.load(Ordering::Relaxed), all - 1);
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
    let offered = Offered::default();
    let go_on = || offered.offers.load(Ordering::Relaxed) < 10;
    let error = produce(&of, &Sizes::default(), &offered, &go_on).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
    assert!(offered.offers.load(Ordering::Relaxed) < 400);
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
    struct Faulty;
    impl FrameCache for Faulty {
        fn has_frames(&self) -> bool {
            false
        }

        fn find(&self, _: &FrameKey, _: &mut Vec<u8>) -> bool {
            false
        }

        fn offer(&self, _: u64, _: Option<FrameKey>, _: &[u8]) {
            panic!("a fault of the cache")
        }
    }
    let error = produce(&of, &Sizes::default(), &Faulty, &|| true).unwrap_err();
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
    let stream = Stream::new(of, Arc::new(frames), Arc::new(NoFrames));
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
