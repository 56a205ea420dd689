use super::*;
use crate::disk::judges::{create, qemu_io, succeed, text};

#[test]
#[ignore = "needs programs"]
fn a_file_that_was_cut_short_is_refused_and_not_read_as_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    create(&image, "compat=1.1", None, "2G");
    qemu_io(&image, &["write -P 1 0 64k", "write -P 1 1G 64k"]);
    let file = File::options().write(true).open(&image).unwrap();
    let whole = file.metadata().unwrap().len();
    // The last cluster is data, the one before it an L2 table.
    file.set_len(whole - 2 * 65536).unwrap();
    let error = Layer::open(&image, Format::Qcow2).err().unwrap();
    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("L2 table beyond"), "{error}");
}

#[test]
#[ignore = "needs programs"]
fn a_layer_is_opened_as_it_is_told_and_not_as_it_looks() {
    let dir = tempfile::tempdir().unwrap();
    let (qcow2, raw) = (dir.path().join("a"), dir.path().join("b"));
    create(&qcow2, "compat=1.1", None, "64M");
    std::fs::write(&raw, vec![0u8; 5000]).unwrap();
    let as_raw = Layer::open(&qcow2, Format::Raw).unwrap();
    assert_eq!(
        as_raw.virtual_size(),
        std::fs::metadata(&qcow2).unwrap().len()
    );
    assert!(as_raw.header().is_none());
    assert!(as_raw.holds_data().unwrap());
    let error = Layer::open(&raw, Format::Qcow2).err().unwrap();
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(Layer::open(&raw, Format::Raw).unwrap().virtual_size(), 5000);
}

#[test]
#[ignore = "needs programs"]
fn a_compressed_cluster_that_refers_to_bytes_before_it_is_an_error_as_for_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image.qcow2"));
    std::fs::write(&raw, "the same over and over ".repeat(2850)).unwrap();
    let convert = ["convert", "-c", "-O", "qcow2", text(&raw), text(&image)];
    succeed("qemu-img", &convert);
    // One compressed cluster: its descriptor is the first entry of the only L2 table.
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = be64(&bytes, 40) as usize;
    let l2 = (be64(&bytes, l1) & L1_OFFSET) as usize;
    let descriptor = be64(&bytes, l2);
    assert!(descriptor >> 62 == 1, "{descriptor:x} is compressed");
    let at = (descriptor & ((1 << 54) - 1)) as usize;
    // In place of the stream one of nothing but "258 bytes, one byte back" (RFC 1951, fixed codes).
    let mut stream = Bits::default();
    stream.push(0b1, 1);
    stream.push(0b01, 2);
    for _ in 0..255 {
        // 285 is 11000101, with the highest bit first; distance 0 is five zeros.
        stream.push(0b1010_0011, 8);
        stream.push(0, 5);
    }
    bytes.resize(at, 0);
    bytes.extend_from_slice(&stream.0);
    bytes.resize(bytes.len().next_multiple_of(65536), 0);
    // One further sector after that of the offset.
    let sectors = stream.0.len() as u64 / 512 + 1;
    let entry = (1 << 62) | (sectors << 54) | at as u64;
    bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(&image, &bytes).unwrap();

    let read = std::process::Command::new("qemu-io")
        .args(["-r", "-c", "read 0 64k", text(&image)])
        .output()
        .unwrap();
    assert!(!read.status.success(), "qemu-io takes it");
    let layer = Layer::open(&image, Format::Qcow2).unwrap();
    for len in [65536, 1000] {
        let error = layer.read_compressed(0, &mut vec![7; len]).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert!(
            error.to_string().contains("before its beginning"),
            "{error}"
        );
    }
}

/// Bits as deflate stores them, the lowest of a byte first.
#[derive(Default)]
struct Bits(Vec<u8>, usize);

impl Bits {
    fn push(&mut self, bits: u32, count: usize) {
        for bit in 0..count {
            if self.1.is_multiple_of(8) {
                self.0.push(0);
            }
            if bits >> bit & 1 == 1 {
                *self.0.last_mut().unwrap() |= 1 << (self.1 % 8);
            }
            self.1 += 1;
        }
    }
}

#[test]
fn a_name_below_is_never_followed_by_a_layer_alone() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    super::super::create_overlay(&image, Path::new("/nowhere"), Format::Raw, 1 << 20).unwrap();
    let layer = Layer::open(&image, Format::Qcow2).unwrap();
    assert!(!layer.holds_data().unwrap());
    assert_eq!(layer.id(), FileId::at(&image).unwrap());
}
