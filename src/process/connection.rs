//! A FUSE connection: the kernel's side of an open /dev/fuse.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The prefix of the connection's number in the fdinfo of an open /dev/fuse.
const CONNECTION: &str = "fuse_connection:";

/// Whether the kernel still has the file system whose requests come from this descriptor of
/// /dev/fuse.
pub fn is_connected(requests: &OwnedFd) -> bool {
    let mut request = [PollFd::new(requests, PollFlags::empty())];
    let at_once = Timespec::default();
    match poll(&mut request, Some(&at_once)) {
        Ok(_) => !request[0].revents().contains(PollFlags::ERR),
        Err(_) => true,
    }
}

/// Returns the number of the connection, which is also the minor number of its device. None before
/// Linux 6.16, which does not tell.
pub fn number_of(requests: &OwnedFd) -> Option<u32> {
    let number = requests.as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    numbers(&info).next()
}

/// The numbers of connections in the fdinfo of a descriptor.
pub fn numbers(fdinfo: &str) -> impl Iterator<Item = u32> {
    fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix(CONNECTION)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_of_a_descriptor_is_told_by_its_number_alone() {
        let connection = |text| numbers(text).next();
        assert_eq!(
            connection("pos:\t0\nflags:\t0100002\nfuse_connection:\t51\n"),
            Some(51)
        );
        assert_eq!(connection("pos:\t51\n"), None);
    }
}
