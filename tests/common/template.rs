//! Template homes, which BoxLite makes once and tests copy. BoxLite takes longer to make a home
//! than most tests run.
//!
//! Templates are kept between runs, in a directory named after a hash of their ingredients.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{DISK_SIZE, python, succeed, text, wheel};

/// A home that BoxLite made.
#[derive(Clone, Copy, Debug)]
pub enum Template {
    /// It has no box.
    Empty,
    /// It has the box `web`, imported from [`archive`].
    Web,
}

impl Template {
    /// Copies the template to `root`. The result equals a home that BoxLite made there.
    pub fn copy_to(self, root: &Path) {
        let original = templates().join(match self {
            Template::Empty => "empty",
            Template::Web => "web",
        });
        succeed(&["cp", "-a", "--reflink=auto", text(&original), text(root)]);
        move_rows(root, &original);
    }
}

/// Returns the archive that homes are made from.
pub fn archive() -> PathBuf {
    templates().join("web.boxlite")
}

/// Replaces the template's path with `root` in BoxLite's rows, which contain absolute paths.
fn move_rows(root: &Path, original: &Path) {
    let database = rusqlite::Connection::open(root.join("db/boxlite.db")).expect("rows");
    let columns: Vec<(String, String)> = database
        .prepare(
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c
             WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%' AND c.type = 'TEXT'",
        )
        .and_then(|mut columns| {
            let rows = columns.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })
        .expect("the columns that may have paths");
    for (table, column) in columns {
        let update = format!(
            "UPDATE {table} SET {column} = replace({column}, ?1, ?2) WHERE instr({column}, ?1)"
        );
        database
            .execute(&update, [text(original), text(root)])
            .expect("paths in rows");
    }
}

/// Returns the directory of the templates, which it makes if needed.
fn templates() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        fs::read(wheel::program())
            .expect("tests/wheel.py")
            .hash(&mut hasher);
        (python(), DISK_SIZE, include_str!("template.rs")).hash(&mut hasher);
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates");
        fs::create_dir_all(&all).expect("the directory of templates");
        // The templates' rows contain this path, and BoxLite's rows have canonical paths.
        let all = all.canonicalize().expect("its canonical path");
        let kept = all.join(format!("{:016x}", hasher.finish()));
        // One test program makes the templates; others wait.
        let lock = File::create(all.join("lock")).expect("its lock");
        lock.lock().expect("the lock of the templates");
        if !kept.join("made").exists() {
            let _ = fs::remove_dir_all(&kept);
            make(&kept);
        }
        kept
    })
}

fn make(kept: &Path) {
    let [empty, web] = ["empty", "web"].map(|name| kept.join(name));
    fs::create_dir_all(&empty).expect("the directory of an empty home");
    let archive = kept.join("web.boxlite");
    let make = ["make-archive", text(&archive), "web", "--size", DISK_SIZE];
    for (home, commands) in [
        (&empty, [&make[..], &["list"]]),
        (&web, [&["list"], &["import", text(&archive), "web"]]),
    ] {
        fs::create_dir_all(home).expect("the directory of a home");
        for answer in wheel::ask(home, &commands) {
            assert!(answer.get("error").is_none(), "BoxLite: {answer}");
        }
    }
    File::create(kept.join("made")).expect("the mark of complete templates");
}
