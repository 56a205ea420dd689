use std::fs::File;
use std::path::Path;
use std::sync::Weak;

use super::super::disk_writer::PIECE;
use super::*;

/// Stages that write to `path`, which have their threads.
fn stages(path: &Path) -> Stages {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    let mut stages = Stages::new(DiskWriter::new(path, Arc::new(file), None, None));
    stages.zeros(ALONE + PIECE as u64).unwrap();
    stages
}

fn piece() -> Piece {
    let mut piece = Piece::new();
    piece.fill(&vec![7; PIECE]);
    piece
}

/// Upgrades as long as a thread lives.
fn life(stages: &Stages) -> Weak<AtomicBool> {
    match &stages.state {
        StageState::Threads(threads) => Arc::downgrade(&threads.stop),
        _ => panic!("there are no threads"),
    }
}

#[test]
fn a_write_that_fails_behind_is_told_once_and_ends_the_threads() {
    let mut stages = stages(Path::new("/dev/full"));
    let life = life(&stages);
    // As many as are accepted before the first is reported.
    let error = (0..=PIECES).find_map(|_| stages.data(&mut piece()).err());
    let error = error.expect("the failure reaches the sender");
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    assert!(error.to_string().contains("/dev/full"), "{error}");
    assert!(life.upgrade().is_none(), "a thread is left");
    assert!(stages.data(&mut piece()).is_err());
    assert!(stages.end().is_err());
}

#[test]
fn a_write_that_fails_behind_is_told_at_the_end() {
    let mut settled = stages(Path::new("/dev/full"));
    settled.data(&mut piece()).unwrap();
    assert_eq!(settled.drain().unwrap_err().errno(), libc::ENOSPC);
    let mut ended = stages(Path::new("/dev/full"));
    ended.data(&mut piece()).unwrap();
    assert_eq!(ended.end().unwrap_err().errno(), libc::ENOSPC);
}

#[test]
fn a_stage_that_panics_is_an_error_and_no_hang() {
    type Bring = fn(&mut Stages) -> Option<Error>;
    let more: Bring = |stages| (0..100).find_map(|_| stages.data(&mut piece()).err());
    let settle: Bring = |stages| {
        let _ = stages.data(&mut piece());
        stages.drain().err()
    };
    let end: Bring = |stages| stages.end().err();
    let dir = tempfile::tempdir().unwrap();
    for stage in ["hash", "write"] {
        for bring in [more, settle, end] {
            let mut stages = stages(&dir.path().join("disk"));
            let life = life(&stages);
            match &stages.state {
                StageState::Threads(threads) => assert!(threads.send(Part::Fault(stage))),
                _ => panic!("there are no threads"),
            }
            let error = bring(&mut stages).expect("the panic reaches the sender");
            assert!(
                error.to_string().contains("a fault of boxlitefs"),
                "{error}"
            );
            assert!(life.upgrade().is_none(), "a thread is left");
            assert!(stages.end().is_err());
        }
    }
}

#[test]
fn dropped_half_way_no_thread_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut stages = stages(&dir.path().join("disk"));
    let life = life(&stages);
    for _ in 0..3 {
        stages.data(&mut piece()).unwrap();
    }
    // Hours of hashing.
    stages.zeros(64 << 40).unwrap();
    stages.data(&mut piece()).unwrap();
    assert!(life.upgrade().is_some());
    drop(stages);
    assert!(life.upgrade().is_none(), "a thread is left");
}

#[test]
fn however_much_comes_there_are_few_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut stages = stages(&path);
    let mut piece = Piece::new();
    for n in 0..40 {
        piece.fill(&vec![n; PIECE]);
        stages.data(&mut piece).unwrap();
        assert!(piece.is_empty());
    }
    let StageState::Threads(Threads {
        ends: Some(ends), ..
    }) = &stages.state
    else {
        panic!("there are no threads");
    };
    assert!(ends.made <= PIECES, "{}", ends.made);
    stages.drain().unwrap();
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written.len() as u64, stages.came);
    stages.end().unwrap();
}
