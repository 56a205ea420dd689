//! Creates overlays: new, empty layers on top of others.

use super::Format;
use super::header::{EXTENSION_BACKING_FORMAT, MAGIC, MAX_BACKING_NAME, MAX_L1_ENTRIES};
use crate::{Context, Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// log2 of the cluster size of everything written here: 64 KiB, as qemu and BoxLite do.
pub(super) const CLUSTER_BITS: u32 = 16;
/// The cluster size of everything written here, in bytes.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table of one cluster.
pub(super) const L2_ENTRIES: u64 = CLUSTER / 8;
/// Bytes of the guest behind one L2 table: 512 MiB.
pub(super) const L2_COVERS: u64 = CLUSTER * L2_ENTRIES;
/// log2 of the bits of a refcount written here: 16.
pub(super) const REFCOUNT_ORDER: u32 = 4;
/// Where BoxLite puts the backing path.
const BACKING_NAME_AT: u64 = 512;
/// Length of the version 3 header written here.
const HEADER_LENGTH: u32 = 104;

/// The fields of a version 3 header that differ between the images written here.
pub(super) struct NewHeader {
    pub virtual_size: u64,
    pub l1_size: u32,
    pub l1_table_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    /// Length of the backing name at byte 512, if there is one.
    pub backing_name_len: Option<u32>,
}

impl NewHeader {
    /// Returns the header structure: 104 bytes, no extension.
    pub fn bytes(&self) -> [u8; HEADER_LENGTH as usize] {
        let mut bytes = [0u8; HEADER_LENGTH as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        if let Some(len) = self.backing_name_len {
            put(8, &BACKING_NAME_AT.to_be_bytes());
            put(16, &len.to_be_bytes());
        }
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.virtual_size.to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_table_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(96, &REFCOUNT_ORDER.to_be_bytes());
        put(100, &HEADER_LENGTH.to_be_bytes());
        bytes
    }

    /// Returns header, extensions and backing name of an image on top of the layer `name`;
    /// `backing_name_len` is its length.
    pub fn bytes_with_backing(&self, name: &[u8], format: Format) -> Vec<u8> {
        let mut bytes = self.bytes().to_vec();
        bytes.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        bytes.extend((format.name().len() as u32).to_be_bytes());
        bytes.extend(format.name().as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        // The end marker is eight zeros, which the gap up to the name provides.
        bytes.resize(BACKING_NAME_AT as usize, 0);
        bytes.extend(name);
        bytes
    }
}

/// Returns the virtual size and the number of L1 entries of a new image for a disk of `size` bytes.
/// The size is rounded up to sectors of 512 bytes, as qemu does, which truncates an odd one when it
/// opens it. EFBIG beyond 2 PiB, the reach of the largest L1 table.
pub(super) fn dimensions(size: u64) -> Result<(u64, u32)> {
    let entries = size.div_ceil(L2_COVERS).max(1);
    match u32::try_from(entries) {
        Ok(count) if entries <= MAX_L1_ENTRIES => Ok((size.next_multiple_of(512), count)),
        _ => Err(Error::new(
            libc::EFBIG,
            format!(
                "a disk of {size} bytes is too large for a qcow2 image with clusters of 64 KiB"
            ),
        )),
    }
}

/// Writes an empty overlay for the layer at `backing`: qcow2 version 3, 64 KiB clusters, 16-bit
/// refcounts, the backing path at byte 512 and a backing format extension, as BoxLite writes it.
/// `backing` must be absolute; `virtual_size` is in bytes, rounded up to sectors. It flushes the
/// file, but not its directory.
///
/// Errors: EEXIST when `path` exists; EINVAL when `backing` is not absolute or not UTF-8;
/// ENAMETOOLONG when it has over 1023 bytes; EFBIG beyond 2 PiB; those of writing (then no file
/// stays).
pub fn create_overlay(
    path: &Path,
    backing: &Path,
    format: Format,
    virtual_size: u64,
) -> Result<()> {
    let name = backing_name(backing)?;
    let (virtual_size, l1_size) = dimensions(virtual_size)?;
    let header = first_cluster(name, format, virtual_size, l1_size);
    let failed = || format!("cannot write the overlay {}", path.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .context(failed)?;
    write_empty(&file, &header, l1_size).map_err(|e| {
        // Half an overlay is useless; the first error is the one to report.
        let _ = std::fs::remove_file(path);
        Error::io(failed(), e)
    })
}

/// Returns the backing path as it may be in a header.
pub(super) fn backing_name(backing: &Path) -> Result<&[u8]> {
    let name = backing.as_os_str().as_bytes();
    let refused = |errno, why: &str| {
        Err(Error::new(
            errno,
            format!("cannot put an overlay on {}: {why}", backing.display()),
        ))
    };
    if !backing.is_absolute() {
        return refused(libc::EINVAL, "its path is not absolute");
    }
    if std::str::from_utf8(name).is_err() {
        return refused(libc::EINVAL, "its path is not UTF-8");
    }
    if name.len() > MAX_BACKING_NAME {
        return refused(
            libc::ENAMETOOLONG,
            "its path is longer than the 1023 bytes qcow2 has room for",
        );
    }
    Ok(name)
}

/// Header, extensions and backing name. After it: the refcount table in cluster 1, the refcount
/// block in cluster 2, the L1 table from cluster 3.
fn first_cluster(name: &[u8], format: Format, virtual_size: u64, l1_size: u32) -> Vec<u8> {
    let header = NewHeader {
        virtual_size,
        l1_size,
        l1_table_offset: 3 * CLUSTER,
        refcount_table_offset: CLUSTER,
        refcount_table_clusters: 1,
        backing_name_len: Some(name.len() as u32),
    };
    header.bytes_with_backing(name, format)
}

/// Writes everything but zeros, extends the file over the L1 table and flushes it.
fn write_empty(file: &File, header: &[u8], l1_size: u32) -> io::Result<()> {
    let clusters = 3 + (u64::from(l1_size) * 8).div_ceil(CLUSTER);
    file.set_len(clusters * CLUSTER)?;
    file.write_all_at(header, 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    // At most 3 + 512 clusters: one refcount block (of 32768) suffices.
    let refcounts = 1u16.to_be_bytes().repeat(clusters as usize);
    file.write_all_at(&refcounts, 2 * CLUSTER)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::judges::{check_clean, create, guest_bytes, info};
    use crate::disk::{Header, Layer};

    #[test]
    #[ignore = "needs programs"]
    fn a_new_overlay_is_what_qemu_expects_and_reads_as_the_layer_below() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![7u8; 3 << 20]).unwrap();
        let image = dir.path().join("overlay.qcow2");
        create_overlay(&image, &base, Format::Raw, 5 << 20).unwrap();
        check_clean(&image);
        let info = info(&image);
        assert_eq!(info["virtual-size"], 5 << 20);
        assert_eq!(info["cluster-size"], 65536);
        assert_eq!(info["backing-filename"], base.to_str().unwrap());
        assert_eq!(info["backing-filename-format"], "raw");
        assert_eq!(info["format-specific"]["data"]["refcount-bits"], 16);
        let mut expected = vec![7u8; 3 << 20];
        expected.resize(5 << 20, 0);
        assert!(guest_bytes(&image) == expected);
    }

    #[test]
    #[ignore = "needs programs"]
    fn overlays_of_all_sizes_and_formats_are_clean() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.qcow2");
        create(&base, "compat=1.1", None, "1M");
        for (i, size) in [0, 512, 1 << 30, 1000 << 30, 64 << 40]
            .into_iter()
            .enumerate()
        {
            let image = dir.path().join(format!("{i}.qcow2"));
            create_overlay(&image, &base, Format::Qcow2, size).unwrap();
            check_clean(&image);
            assert_eq!(info(&image)["virtual-size"], size);
            let header = Header::open(&image).unwrap().unwrap();
            let backing = header.backing.unwrap();
            assert_eq!(
                (backing.path, backing.format),
                (base.clone(), Some(Format::Qcow2))
            );
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_overlay_without_data_holds_none() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.qcow2");
        create(&base, "compat=1.1", None, "10G");
        let image = dir.path().join("overlay.qcow2");
        create_overlay(&image, &base, Format::Qcow2, 10 << 30).unwrap();
        let holds = || {
            Layer::open(&image, Format::Qcow2)
                .unwrap()
                .holds_data()
                .unwrap()
        };
        assert!(!holds());
        crate::disk::judges::qemu_io(&image, &["write -z 9G 64k"]);
        assert!(holds(), "explicit zeros differ from what lies below");
    }

    #[test]
    fn a_file_in_the_way_and_an_impossible_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("overlay.qcow2");
        let errno = |path: &str| {
            let made = create_overlay(&image, Path::new(path), Format::Raw, 4096);
            made.unwrap_err().errno()
        };
        assert_eq!(errno("relative.raw"), libc::EINVAL);
        assert_eq!(errno(&format!("/{}", "x".repeat(1023))), libc::ENAMETOOLONG);
        assert!(!image.exists());
        std::fs::write(&image, "mine").unwrap();
        assert_eq!(errno("/base.raw"), libc::EEXIST);
        assert_eq!(std::fs::read(&image).unwrap(), b"mine");
    }
}
