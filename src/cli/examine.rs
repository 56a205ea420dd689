//! `boxlitefs check` and `boxlitefs compact`.

use std::io;
use std::path::PathBuf;

use serde_json::json;

use super::output::{Bar, Findings, print};
use super::place::home_of;
use crate::Result;
use crate::store;

/// Checks a home. Returns whether nothing was found.
///
/// # Errors
/// Those of the check, and of writing.
pub(super) fn check(home: Option<PathBuf>, repair: bool, as_json: bool) -> Result<bool> {
    let home = home_of(home)?;
    if !as_json {
        let mut findings = Findings::begin(&home);
        let checked = store::check::run(&home, repair, &mut findings);
        findings.finish();
        return checked;
    }
    let report = store::check::examine(&home, repair)?;
    let notes: Vec<&String> = report.notes.iter().chain(&report.unread).collect();
    let value = json!({
        "home": report.root.to_string_lossy(),
        "boxes": report.boxes,
        "findings": report.findings,
        "notes": notes,
        "repaired": report.repaired,
    });
    print(&format!("{value:#}\n"))?;
    Ok(report.findings.is_empty())
}

/// Compacts a home.
///
/// # Errors
/// Those of compacting, and of writing.
pub(super) fn compact(home: Option<PathBuf>, purge_undo: bool, as_json: bool) -> Result<()> {
    let home = home_of(home)?;
    if !as_json {
        return store::compact::run(&home, purge_undo, &mut io::stdout(), &Bar::new()).map(drop);
    }
    let mut said = Vec::new();
    let freed = store::compact::run(&home, purge_undo, &mut said, &Bar::new())?;
    let said = String::from_utf8_lossy(&said);
    // The last line sums up, which the number does here.
    let mut messages: Vec<&str> = said.lines().collect();
    messages.pop();
    let value = json!({
        "home": home.to_string_lossy(),
        "freed_bytes": freed,
        "messages": messages,
    });
    print(&format!("{value:#}\n"))
}
