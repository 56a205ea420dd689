//! The last refusals of each user, with their reasons: the shell says only EPERM or EBUSY.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::Error;
use crate::home::rfc3339_at;
use crate::process::Caller;

/// The most refusals that are remembered of one user.
const OF_ONE_USER: usize = 100;

/// The most that are remembered at all.
const AT_ALL: usize = 2000;

/// The most bytes of a path and of a sentence.
const LONGEST: usize = 2000;

/// The most bytes of the text for one caller: what an extended attribute can have.
const LONGEST_TEXT: usize = 60 << 10;

/// The most files being made whose names are remembered.
const MOST_MADE: usize = 256;

/// What a program asked of the mount.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The user.
    pub uid: u32,
    /// The thread.
    pub caller: Caller,
    /// The system call.
    pub operation: &'static str,
    /// The file, or the directory of `name`.
    pub ino: u64,
    /// The name in the directory.
    pub name: Option<OsString>,
    /// The new directory and name, of a rename.
    pub target: Option<(u64, OsString)>,
}

/// A refusal as it is remembered.
#[derive(Clone, Debug, PartialEq)]
struct Refusal {
    uid: u32,
    program: Option<String>,
    operation: &'static str,
    path: String,
    target: Option<String>,
    errno: i32,
    message: String,
}

/// The last refusals of each user.
#[derive(Default)]
pub struct Refusals {
    latest: Mutex<Latest>,
    /// The names of files that are being made, by their inode numbers.
    made: Mutex<VecDeque<(u64, String)>>,
}

#[derive(Default)]
struct Latest {
    /// Oldest first, each with when it was made last and how often in a row.
    all: VecDeque<(Refusal, SystemTime, u64)>,
    by_user: HashMap<u32, usize>,
}

impl Refusals {
    /// Remembers the name of a file that is being made.
    pub fn note_made(&self, ino: u64, path: String) {
        let mut made = self.made.lock();
        if made.len() == MOST_MADE {
            made.pop_front();
        }
        made.push_back((ino, path));
    }

    /// Returns the name of a file that is being made.
    pub fn name_of_made(&self, ino: u64) -> Option<String> {
        let made = self.made.lock();
        let mut latest = made.iter().rev();
        latest
            .find(|(other, _)| *other == ino)
            .map(|(_, path)| path.clone())
    }

    /// Remembers a refusal. `path_of` names an inode.
    pub fn note(&self, attempt: &Attempt, error: &Error, path_of: impl Fn(u64) -> String) {
        let path = |ino: u64, name: Option<&OsStr>| {
            let place = path_of(ino);
            shortened(&match name {
                Some(name) => path_in(&place, name),
                None => place,
            })
        };
        let target = attempt.target.as_ref();
        self.add(Refusal {
            uid: attempt.uid,
            program: attempt.caller.thread_name(),
            operation: attempt.operation,
            path: path(attempt.ino, attempt.name.as_deref()),
            target: target.map(|(ino, name)| path(*ino, Some(name))),
            errno: error.errno(),
            message: shortened(&error.to_string()),
        });
    }

    fn add(&self, refusal: Refusal) {
        let mut latest = self.latest.lock();
        let latest = &mut *latest;
        // A program that tries again and again does not push out the others.
        let mut of_user = latest.all.iter_mut().rev();
        if let Some((last, at, times)) = of_user.find(|(it, ..)| it.uid == refusal.uid)
            && *last == refusal
        {
            (*at, *times) = (SystemTime::now(), *times + 1);
            return;
        }
        let count = latest.by_user.entry(refusal.uid).or_default();
        *count += 1;
        let is_full = *count > OF_ONE_USER;
        let uid = refusal.uid;
        latest.all.push_back((refusal, SystemTime::now(), 1));
        let gone = if is_full {
            latest.all.iter().position(|(it, ..)| it.uid == uid)
        } else {
            (latest.all.len() > AT_ALL).then_some(0)
        };
        let gone = gone.and_then(|index| latest.all.remove(index));
        if let Some((gone, ..)) = gone
            && let Some(count) = latest.by_user.get_mut(&gone.uid)
        {
            *count -= 1;
            if *count == 0 {
                latest.by_user.remove(&gone.uid);
            }
        }
    }

    /// Returns the refusals of a user, or of all, an object of JSON on each line, the newest last.
    /// Leaves out the oldest that an extended attribute has no room for.
    pub fn text(&self, of: Option<u32>) -> Vec<u8> {
        let latest = self.latest.lock();
        let all = latest.all.iter().rev();
        let wanted = all.filter(|(refusal, ..)| of.is_none_or(|uid| refusal.uid == uid));
        let mut lines = Vec::new();
        let mut length = 0;
        for (refusal, at, times) in wanted {
            let line = format!("{}\n", refusal.value(*at, *times));
            length += line.len();
            if length > LONGEST_TEXT {
                break;
            }
            lines.push(line);
        }
        lines.reverse();
        lines.concat().into_bytes()
    }
}

impl Refusal {
    fn value(&self, at: SystemTime, times: u64) -> Value {
        json!({
            "time": rfc3339_at(at),
            "uid": self.uid,
            "program": self.program,
            "operation": self.operation,
            "path": self.path,
            "target": self.target,
            "errno": name_of(self.errno),
            "message": self.message,
            "times": times,
        })
    }
}

/// Returns whether an error of a call is a refusal that a user may ask about. What programs find out
/// in the normal course of their work is none: that a name does not exist, that a file has to be
/// copied instead of moved, or that it can't be copied by the kernel.
pub fn is_refusal(operation: &str, errno: i32) -> bool {
    use libc::{
        EACCES, EINTR, EINVAL, ENODATA, ENOENT, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPERM, ERANGE,
        ESTALE, EXDEV,
    };
    match errno {
        ENOENT | ESTALE | EINTR | ENOSYS | ENOTTY | ENXIO | ERANGE | EXDEV => false,
        EPERM | EINVAL | EOPNOTSUPP => operation != "copy_file_range",
        ENODATA | EACCES => operation != "lookup",
        _ => true,
    }
}

/// Returns the path of a name in a directory, whose own path is `.` for the root.
pub fn path_in(directory: &str, name: &OsStr) -> String {
    let name = name.to_string_lossy();
    match directory {
        "." => name.into_owned(),
        _ => format!("{directory}/{name}"),
    }
}

/// Cuts a text that is too long.
fn shortened(text: &str) -> String {
    let mut end = LONGEST.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// Returns the name of an errno value, as errno(3) has it.
fn name_of(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::EMFILE => "EMFILE",
        libc::EFBIG => "EFBIG",
        libc::ENOSPC => "ENOSPC",
        libc::ESPIPE => "ESPIPE",
        libc::EROFS => "EROFS",
        libc::ENAMETOOLONG => "ENAMETOOLONG",
        libc::ENOTEMPTY => "ENOTEMPTY",
        libc::ELOOP => "ELOOP",
        libc::ENODATA => "ENODATA",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EBADMSG => "EBADMSG",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EDQUOT => "EDQUOT",
        libc::ECANCELED => "ECANCELED",
        libc::ETIMEDOUT => "ETIMEDOUT",
        other => return format!("errno {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(uid: u32, path: &str) -> Refusal {
        Refusal {
            uid,
            program: None,
            operation: "mkdir",
            path: path.to_owned(),
            target: None,
            errno: libc::EBUSY,
            message: "in use".to_owned(),
        }
    }

    fn paths(refusals: &Refusals, of: Option<u32>) -> Vec<String> {
        let text = String::from_utf8(refusals.text(of)).unwrap();
        let values = text.lines().map(serde_json::from_str::<Value>);
        values
            .map(|value| value.unwrap()["path"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn each_user_has_the_last_ones_and_all_together_are_bounded() {
        let refusals = Refusals::default();
        for number in 0..OF_ONE_USER + 5 {
            refusals.add(refusal(1, &number.to_string()));
        }
        refusals.add(refusal(2, "another"));
        let of_one = paths(&refusals, Some(1));
        assert_eq!(of_one.len(), OF_ONE_USER);
        assert_eq!(of_one.first().unwrap(), "5");
        assert_eq!(paths(&refusals, Some(2)), ["another"]);
        for uid in 10..10 + AT_ALL as u32 {
            refusals.add(refusal(uid, "x"));
        }
        assert_eq!(refusals.latest.lock().all.len(), AT_ALL);
        assert_eq!(refusals.latest.lock().by_user.len(), AT_ALL);
        assert_eq!(paths(&refusals, Some(1)), [""; 0]);
    }

    #[test]
    fn the_same_refusal_again_is_counted() {
        let refusals = Refusals::default();
        refusals.add(refusal(1, "a"));
        refusals.add(refusal(2, "b"));
        refusals.add(refusal(1, "a"));
        let text = String::from_utf8(refusals.text(Some(1))).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("\"times\":2"), "{text}");
    }

    #[test]
    fn the_text_fits_into_an_extended_attribute() {
        let refusals = Refusals::default();
        for number in 0..OF_ONE_USER {
            let mut long = refusal(1, &number.to_string());
            long.message = "x".repeat(LONGEST);
            refusals.add(long);
        }
        let all = paths(&refusals, None);
        assert!(refusals.text(None).len() <= LONGEST_TEXT);
        assert_eq!(all.last().unwrap(), "99");
    }
}
