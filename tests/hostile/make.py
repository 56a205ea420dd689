#!/usr/bin/env python3
"""Archives that mean harm, or are broken, each with what has to become of it.

    make.py OUT [--fuzz DIRECTORY]

writes OUT/NAME.boxlite for each, and OUT/list.json: a list of objects with

    name    of the archive
    group   what kind of harm
    errno   what a copy into a mount fails with; null: it must be taken, its disk is that of good.boxlite;
            "any": either, but never with another disk
    says    what the sentence in the log has to have, naming the check: one of these lists of texts, in order
    heavy   true: takes long to take in, or much memory if one is careless

Everything is made from bytes here, by no program that would refuse to make it wrong; only compressing is
left to zstd. The same bytes each time. With --fuzz, small ones are also put into DIRECTORY/archive,
DIRECTORY/manifest and DIRECTORY/chain, as the fuzz targets of these names take them.
"""

import argparse
import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

BLOCK = 512
END = bytes(2 * BLOCK)
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# What a sentence says of what is refused, by the check; `.*` is anything, `|` is or.
NO_DISK = "it has no disk.qcow2"
MISMATCH = "the sha256 of disk.qcow2 is not the one manifest.json says"
CUT = "the archive ends in the middle of"
SUM = "the checksum of the tar header after .* does not match"
NO_ARCHIVE = "begins neither like a tar nor like a zstd file"
ZSTD = "zstd data is damaged or needs a window over 128 MiB"
TAIL = "after its end.*come bytes that are not zeros|after its end.*come bytes that are neither zeros nor a zstd frame"
SIZE = "has no size|is impossible|over 64 TiB"


def alternatives(says):
    """`a.*b|c` as lists of texts that come in this order."""
    return [[text for text in one.split(".*") if text] for one in says.split("|")]


def zstd(data, *options):
    done = subprocess.run(["zstd", "-q", "-c", *options], input=data, stdout=subprocess.PIPE, check=True)
    return done.stdout


# ---- qcow2 -------------------------------------------------------------------------------------

COPIED, COMPRESSED = 1 << 63, 1 << 62
MAGIC, BACKING_FORMAT, DATA_FILE, FEATURES = b"QFI\xfb", 0xE2792ACA, 0x44415441, 0x6803F857


class Disk:
    """A qcow2 with clusters of 4 KiB: header, refcount table and block, L1 and L2 table, then data."""

    bits = 12
    cluster = 1 << bits
    table, block, l1, l2, data = 1 << 12, 2 << 12, 3 << 12, 4 << 12, 5 << 12
    clusters = 6

    def __init__(self, version=3, extensions=b"", size=256 * KIB):
        self.bytes = bytearray((5 + self.clusters) * self.cluster)
        head = struct.pack(">4sIQIIQIIQQIIQ", MAGIC, version, 0, 0, self.bits, size, 0, 1, self.l1,
                           self.table, 1, 0, 0)
        if version > 2:
            head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
        self.bytes[:len(head) + len(extensions) + 8] = head + extensions + bytes(8)
        self.word(self.table, self.block)
        for number in range(len(self.bytes) >> self.bits):
            self.refcount(number << self.bits, 1)
        self.word(self.l1, self.l2 | COPIED)
        noise = random.Random(7)
        for number in range(self.clusters):
            at = self.data + (number << self.bits)
            self.word(self.l2 + 8 * (3 * number + 1), at | COPIED)
            self.bytes[at:at + self.cluster] = noise.randbytes(self.cluster)

    def word(self, at, value):
        struct.pack_into(">Q", self.bytes, at, value)
        return self

    def half(self, at, value):
        struct.pack_into(">I", self.bytes, at, value)
        return self

    def refcount(self, cluster, count):
        struct.pack_into(">H", self.bytes, self.block + (cluster >> self.bits) * 2, count)
        return self

    def entry(self, number, value):
        """The L2 entry of a cluster that has data."""
        return self.word(self.l2 + 8 * (3 * number + 1), value)

    def text(self, at, text):
        self.bytes[at:at + len(text)] = text
        return self


def extension(kind, data):
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def disks():
    """Pairs of a name and a disk, each with what is said of it."""
    outside = "lies outside the file"
    shared = "shares a cluster with something else"
    unaligned = "not cluster-aligned"
    far = 1 << 40

    def backing(kind):
        disk = Disk(extensions=extension(BACKING_FORMAT, kind) if kind else b"")
        name = b"/etc/passwd"
        return disk.text(512, name).word(8, 512).half(16, len(name))

    yield "no-qcow2", bytes(8192), "not a qcow2 image"
    yield "empty", b"", "not a qcow2 image"
    yield "backing-raw", backing(b"raw"), "has a backing file"
    yield "backing-qcow2", backing(b"qcow2"), "has a backing file"
    yield "backing-untold", backing(b""), "has a backing file"
    yield "backing-vmdk", backing(b"vmdk"), "backing file of format"
    yield "backing-hostile-format", backing(b"\x1b[2J\n2030-01-01 forged"), "backing file of format"
    yield "backing-protocol", backing(b"raw").text(512, b"nbd:h:1"), "has a backing file"
    yield "backing-not-utf8", backing(b"raw").text(512, b"\xff\xfe"), "not UTF-8"
    yield "backing-name-empty", backing(b"raw").half(16, 0), "an empty backing name"
    yield "backing-name-long", backing(b"raw").half(16, 1024), "more than 1023 bytes"
    yield "backing-name-huge", backing(b"raw").half(16, 0xFFFFFFFF), "more than 1023 bytes"
    yield "backing-name-in-header", backing(b"raw").word(8, 8), "inside of the header"
    yield "backing-name-outside", backing(b"raw").word(8, far), "outside of the first cluster"
    yield "data-file-bit", Disk().word(72, 4), "external data file"
    yield ("data-file-name", Disk(extensions=extension(DATA_FILE, b"/etc/shadow")), "external data file")
    yield "dirty", Disk().word(72, 1), "marked dirty"
    yield "corrupt", Disk().word(72, 2), "marked corrupt"
    yield "compression-type", Disk().word(72, 8), "compressed with zstd"
    yield "extended-l2", Disk().word(72, 16), "extended L2"
    for bit in (5, 17, 63):
        yield f"unknown-feature-{bit}", Disk().word(72, 1 << bit), "unknown qcow2 features"
    for method, said in ((1, "AES"), (2, "LUKS"), (3, "unknown method"), (0xFFFFFFFF, "unknown method")):
        yield f"encrypted-{method}", Disk().half(32, method), said
    yield "snapshots", Disk().half(60, 1).word(64, Disk.data), "1 internal snapshots"
    yield "snapshots-many", Disk().half(60, 0xFFFFFFFF).word(64, Disk.data), "internal snapshots"
    yield "snapshots-nowhere", Disk().half(60, 1), "snapshot table"
    for version in (0, 1, 4, 0xFFFFFFFF):
        yield f"version-{version}", Disk().half(4, version), "is qcow2 version"
    for bits in (0, 8, 22, 31, 32, 63, 64, 0xFFFFFFFF):
        yield f"cluster-bits-{bits}", Disk().half(20, bits), "has clusters of"
    for order in (7, 31, 64, 0xFFFFFFFF):
        yield f"refcount-order-{order}", Disk().half(96, order), "refcounts of"
    for length in (0, 72, 103, 4097, 0xFFFFFFFF):
        yield f"header-length-{length}", Disk().half(100, length), "header length"
    yield "extension-long", Disk(extensions=struct.pack(">II", 1, 0xFFFFFFF0)), "extension that is too long"
    yield "feature-names", Disk(extensions=extension(FEATURES, bytes(47))), "feature name table"
    yield "size-0", Disk(size=0), "virtual size is 0"
    for size in (3 * MIB, 65 * TIB, 1 << 62, (1 << 64) - 1):
        yield f"size-{size}", Disk(size=size), "too short for its virtual size|over 64 TiB"
    yield "l1-huge", Disk().half(36, 0xFFFFFFFF), "more than 32 MiB"
    yield "l1-long", Disk().half(36, 4 * MIB), "reaches beyond the end"
    yield "l1-none", Disk().half(36, 0), "too short for its virtual size"
    yield "l1-nowhere", Disk().word(40, 0), "not at a cluster of its own"
    yield "l1-unaligned", Disk().word(40, Disk.l1 + 512), "not at a cluster of its own"
    yield "l1-outside", Disk().word(40, far), "reaches beyond the end"
    yield "l1-overflow", Disk().word(40, (1 << 64) - 4096), "reaches beyond the end"
    # Of two entries, for the first of the L2 table is none.
    for what in ("table", "block", "l2"):
        yield f"l1-on-{what}", Disk().half(36, 2).word(40, getattr(Disk, what)), shared + "|reserved bits|" + outside
    yield "l1-on-data", Disk().word(40, Disk.data), "reserved bits"
    yield "l1-reserved", Disk().word(Disk.l1, Disk.l2 | COPIED | 1), "reserved bits"
    yield "refcounts-nowhere", Disk().word(48, 0), "refcount table that is not"
    yield "refcounts-unaligned", Disk().word(48, Disk.table + 512), "refcount table that is not"
    yield "refcounts-outside", Disk().word(48, far), "refcount table beyond the end"
    yield "refcounts-none", Disk().half(56, 0), "refcount table of 0 bytes"
    yield "refcounts-long", Disk().half(56, 100), outside
    yield "refcounts-huge", Disk().half(56, 0xFFFFFFFF), "outside 1 cluster to 8 MiB"
    yield "refcounts-on-l1", Disk().word(48, Disk.l1), shared + "|reserved bits"
    yield "refcounts-on-data", Disk().word(48, Disk.data), shared + "|reserved bits|" + outside
    for what, at in (("header", 0), ("table", Disk.table), ("l1", Disk.l1), ("l2", Disk.l2)):
        if at:
            yield f"block-on-{what}", Disk().word(Disk.table, at), shared
    yield "block-twice", Disk().word(Disk.table + 8, Disk.block), shared
    yield "block-outside", Disk().word(Disk.table, far), outside
    yield "block-unaligned", Disk().word(Disk.table, Disk.block + 512), unaligned
    yield "block-reserved", Disk().word(Disk.table, Disk.block | 1), "reserved bits"
    yield "block-missing", Disk().word(Disk.table, 0), "has refcount 0"
    for what in ("table", "block", "l1"):
        yield f"l2-on-{what}", Disk().word(Disk.l1, getattr(Disk, what) | COPIED), shared
    yield "l2-on-data", Disk().word(Disk.l1, Disk.data | COPIED), "", "any"
    yield "l2-outside", Disk().word(Disk.l1, far | COPIED), outside
    yield "l2-unaligned", Disk().word(Disk.l1, (Disk.l2 + 512) | COPIED), unaligned
    two = Disk(size=3 * MIB).half(36, 2)
    yield "l2-twice", two.word(Disk.l1 + 8, Disk.l2 | COPIED), shared
    for what in ("table", "block", "l1", "l2"):
        yield f"data-on-{what}", Disk().entry(0, getattr(Disk, what) | COPIED), shared
    yield "data-twice", Disk().entry(0, (Disk.data + Disk.cluster) | COPIED), shared
    yield "data-outside", Disk().entry(0, far | COPIED), outside
    yield "data-behind-the-end", Disk().entry(0, len(Disk().bytes) | COPIED), outside
    yield "data-unaligned", Disk().entry(0, (Disk.data + 512) | COPIED), unaligned
    yield "data-reserved", Disk().entry(0, Disk.data | COPIED | 2), "reserved bits"
    yield "data-unaligned-zero", Disk().entry(0, (Disk.data + 512) | 1), unaligned
    yield "data-refcount-0", Disk().refcount(Disk.data, 0), "has refcount 0"
    yield "header-refcount-0", Disk().refcount(0, 0), "has refcount 0"
    yield "l2-refcount-0", Disk().refcount(Disk.l2, 0), "has refcount 0"
    yield "zero-in-version-2", Disk(version=2).entry(0, Disk.data | 1), "which version 2 does not have"

    # A descriptor has the offset in its lower 58 bits, and sectors besides the first above them.
    def squeezed(offset, sectors, flags=COMPRESSED):
        return Disk().entry(0, flags | sectors << 58 | offset)

    end = len(Disk().bytes)
    yield "compressed-outside", squeezed(far, 0), outside
    yield "compressed-at-the-end", squeezed(end - 10, 3), outside
    yield "compressed-at-0", squeezed(0, 0), outside
    yield "compressed-copied", squeezed(Disk.data, 0, COMPRESSED | COPIED), "compressed and marked COPIED"
    for what in ("table", "block", "l1", "l2"):
        yield f"compressed-on-{what}", squeezed(getattr(Disk, what), 0), shared
    yield "compressed-on-header", squeezed(200, 0), shared
    yield "compressed-on-data", squeezed(Disk.data + Disk.cluster, 0), shared
    yield "compressed-into-data", squeezed(Disk.data + 4000, 7), shared
    three = Disk()
    for number in range(3):
        three.entry(number, COMPRESSED | Disk.data + 100 * number)
    yield "compressed-uncounted", three, "is in use 3 times but has refcount 1"
    # Nothing but decompressing it shows that it can't be: it is taken, and reading there is an error.
    yield "compressed-garbage", squeezed(Disk.data, 7), "", "any"
    yield "compressed-bomb", bomb_cluster(), "", "any"
    cut = Disk()
    del cut.bytes[-3 * Disk.cluster:]
    yield "cut", cut, outside


def bomb_cluster():
    """A compressed cluster of far more bytes than a cluster has."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(bytes(2 * MIB)) + packer.flush()
    disk = Disk().entry(0, COMPRESSED | 7 << 58 | Disk.data)
    return disk.text(Disk.data, packed[:Disk.cluster].ljust(Disk.cluster, b"\0"))


# ---- manifests ---------------------------------------------------------------------------------

OPTIONS = {"rootfs": {"Image": "alpine:latest"}, "auto_remove": False}


def manifest(disk, **fields):
    said = {
        "version": 3, "box_name": "web", "image": "alpine:latest", "box_options": OPTIONS,
        "guest_disk_checksum": "", "container_disk_checksum": "sha256:" + hashlib.sha256(disk).hexdigest(),
        "exported_at": "2026-01-02T03:04:05Z",
    }
    return said | fields


def manifests(disk):
    """Triples of a name, the bytes of a manifest, and what is said of it; None: it is a good one."""
    good = manifest(disk)

    def with_field(**fields):
        return json.dumps(good | fields).encode()

    def without(field):
        return json.dumps({name: value for name, value in good.items() if name != field}).encode()

    wrong = {
        "version": [None, True, "3", 3.5, 3.0, [], {}, 0, -1, 6, 255, 1 << 32, (1 << 32) + 3, 1 << 64],
        "box_name": [True, 1, 1.5, [], {}],
        "image": [None, True, 1, 1.5, [], {}],
        "box_options": [True, 1, 1.5, "{}", [], [{}]],
        "guest_disk_checksum": [None, True, 1, 1.5, [], {}],
        "container_disk_checksum": [None, True, 1, 1.5, [], {}, "", "sha256:", "md5:00", "0" * 64,
                                    "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "g" * 64],
        "exported_at": [True, 1, 1.5, [], {}],
    }
    for field, values in wrong.items():
        said = f"manifest.json has a {field}|manifest.json has {field}|manifest.json has no {field}"
        if field == "version":
            said = "has no version number|has version"
        for number, value in enumerate(values):
            yield f"{field}-{number}", with_field(**{field: value}), said
    for field in ("version", "image", "guest_disk_checksum", "container_disk_checksum"):
        yield f"no-{field}", without(field), f"has no {field}"
    for place, value, said in options():
        yield f"options-{place}", with_field(box_options=OPTIONS | value), said
    not_json = "is not JSON"
    text = json.dumps(good)
    yield "nothing", b"", not_json
    yield "null", b"null", "is not a JSON object"
    yield "list", b"[]", "is not a JSON object"
    yield "text", b"version: 3", not_json
    yield "nul", text.replace("web", "\0").encode(), not_json
    yield "nul-after", text.encode() + b"\0", not_json
    yield "bom", b"\xef\xbb\xbf" + text.encode(), not_json
    yield "utf16", text.encode("utf-16"), not_json
    yield "latin1", text.replace("web", "w\xe4b").encode("latin-1"), not_json
    yield "utf8-surrogate", text.encode().replace(b"web", b"\xed\xa0\x80"), not_json
    yield "surrogate", text.replace("web", "\\ud800").encode(), not_json
    yield "nan", text.replace("3,", "NaN,", 1).encode(), not_json
    yield "huge-number", text.replace("3,", "3" + "0" * 1000 + ",", 1).encode(), "is not JSON|no version"
    yield "garbage-after", text.encode() + b"}", not_json
    yield "two", text.encode() * 2, not_json
    yield "cut", text.encode()[:-10], not_json
    yield "comma", text.replace("}", ",}").encode(), not_json
    for name, deep in (("lists", "[" * 100_000), ("objects", '{"a":' * 50_000)):
        yield f"deep-{name}", text.replace('"web"', deep).encode(), "recursion limit"
    deep = "[" * 200 + "]" * 200
    yield "deep-closed", text.replace('"web"', deep).encode(), "recursion limit"
    twice = "occurs twice in it"
    yield "twice-version", text.replace("{", '{"version":5,', 1).encode(), twice
    yield "twice-escaped", text.replace("{", '{"\\u0076ersion":5,', 1).encode(), twice
    yield "twice-options", text.replace('"rootfs"', '"volumes":[],"volumes":[],"rootfs"').encode(), twice
    yield "twice-hostile", text.replace("{", '{"\\u001b[2J\\n":5,"\\u001b[2J\\n":5,', 1).encode(), twice
    yield "over-1-mib", with_field(box_name="x" * MIB), "over 1 MiB"
    yield "huge-string", with_field(box_options=OPTIONS | {"env": [["A", "x" * 900_000]]}), None
    yield "huge-image", with_field(box_options=OPTIONS | {"rootfs": {"Image": "x" * 900_000}}), None
    yield "many-env", with_field(box_options=OPTIONS | {"env": [["A", ""]] * 80_000}), None
    yield "unknown-field", with_field(future={"deep": [1, None]}), None
    yield "no-name", with_field(box_name=None), None
    hostile = "\x1b]0;x\x07\r\n2030-01-01T00:00:00Z forged \u202e\0 é"
    yield "hostile-name", with_field(box_name=hostile, image=hostile, exported_at=hostile), None
    yield "hostile-options", with_field(box_options=OPTIONS | {"rootfs": {"Image": hostile}}), None
    for version in (4, 5):
        yield f"good-version-{version}", with_field(version=version), None


def options():
    """Options that BoxLite could not read: one such row, and it lists no box any more."""
    for place, values in {
        "cpus": ["two", 256, -1, 1.5, []],
        "memory_mib": ["x", -1, 1 << 32],
        "disk_size_gb": ["x", -1, 1 << 64],
        "working_dir": [1], "user": [1], "tty": [None, 1], "detach": [None, "yes"],
        "env": [None, {}, [1], [["a"]], [["a", "b", "c"]], [["a", 1]]],
        "rootfs": [None, "x", {}, {"Image": 1}, {"Other": "x"}, {"Image": "x", "RootfsPath": "/"}],
        "volumes": [None, {}, [1], [{"host_path": 1, "guest_path": "/", "read_only": True}], [{}]],
        "mounts": [None, {}, [1]],
        "network": [None, "Sometimes", {"Enabled": 1}, {"Enabled": {"allow_net": [1]}}],
        "inbound_network": [1], "ports": [None, [1], [{}], [{"guest_port": 65536}], [{"guest_port": 80, "host_ip": 1}],
                                          [{"guest_port": 80, "protocol": "sctp"}]],
        "auto_remove": [None, "no"], "auto_stop": ["x", -1], "auto_delete": ["x"], "auto_resume": ["x"],
        "entrypoint": ["sh", [1]], "cmd": ["sh", [1]],
        "secrets": [None, [1], [{"name": "x"}], [{"name": 1, "hosts": [], "placeholder": "", "value": ""}]],
        "advanced": [None, []],
    }.items():
        for number, value in enumerate(values):
            yield f"{place}-{number}", {place: value}, f"box_options.{place}"
    for place, values in {
        "security": [None, 1], "isolate_mounts": [None], "health_check": [1, {"interval": 5}],
        "kernel": [{"path": "/boot/vmlinuz"}], "nested_virtualization": [None, 1], "privileged": [None],
        "capabilities": [[], {"add": "ALL"}],
    }.items():
        for number, value in enumerate(values):
            yield f"advanced-{place}-{number}", {"advanced": {place: value}}, f"box_options.advanced.{place}"
    for place, values in {
        "jailer_enabled": [None, "no"], "uid": ["root", -1, 1 << 32], "chroot_base": [None], "env_allowlist": [None, [1]],
        "resource_limits": [None, {"max_processes": -1}], "sandbox_profile": [1], "network_enabled": [None],
    }.items():
        for number, value in enumerate(values):
            yield (f"security-{place}-{number}", {"advanced": {"security": {place: value}}},
                   f"box_options.advanced.security.{place}")


# ---- tar ---------------------------------------------------------------------------------------


def octal(number, width=12):
    return f"{number:0{width - 1}o}".encode() + b"\0"


def base256(number, width=12):
    """GNU's way for what octal digits can't say."""
    return bytes([0xFF if number < 0 else 0x80]) + (number % (1 << 8 * (width - 1))).to_bytes(width - 1, "big")


def header(name, size, kind=b"0", magic=b"ustar  \0", link=b"", prefix=b"", sparse=b""):
    """A header with the right sum. `size` is a number, or the field as it is."""
    size = octal(size) if isinstance(size, int) else size
    fields = [(name, 100), (b"0000644\0", 8), (b"0000000\0", 8), (b"0000000\0", 8), (size, 12),
              (b"00000000000\0", 12), (b" " * 8, 8), (kind, 1), (link, 100), (magic, 8), (b"", 32), (b"", 32),
              (b"", 8), (b"", 8)]
    block = bytearray(b"".join(value.ljust(width, b"\0") for value, width in fields))
    block += (prefix or sparse).ljust(BLOCK - len(block), b"\0")
    # GNU's sparse fields begin at 386.
    if sparse:
        block[345:] = (bytes(41) + sparse).ljust(BLOCK - 345, b"\0")
    return summed(block)


def summed(block):
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def member(name, data, **how):
    return header(name, len(data), **how) + padded(data)


def pax(records, **how):
    if not isinstance(records, bytes):
        records = b"".join(record(key, value) for key, value in records)
    return member(b"PaxHeader", records, kind=b"x", magic=b"ustar\x0000", **how)


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def long_name(name, kind=b"L"):
    return member(b"././@LongLink", name, kind=kind)


def sparse(name, pieces, stored, real, extended=False, size=None, **how):
    """The header of a sparse member in GNU's old format; pieces beyond four are in blocks that follow."""
    def listed(some, room):
        return b"".join(number(offset) + number(length) for offset, length in some).ljust(room * 24, b"\0")

    def number(value):
        return octal(value) if 0 <= value < 1 << 33 else base256(value)

    first, rest = pieces[:4], pieces[4:]
    fields = listed(first, 4) + (b"\1" if rest or extended else b"\0") + number(real)
    blocks = b""
    while rest:
        some, rest = rest[:21], rest[21:]
        blocks += (listed(some, 21) + (b"\1" if rest else b"\0")).ljust(BLOCK, b"\0")
    return header(name, stored if size is None else size, kind=b"S", sparse=fields, **how) + blocks


# ---- zstd by hand (RFC 8878) -------------------------------------------------------------------

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def rle(byte, count):
    """A frame of one byte, again and again, without its size: four bytes for each 128 KiB."""
    whole, rest = divmod(count, 128 * KIB)
    sizes = [128 * KIB] * whole + [rest]
    blocks = b"".join(struct.pack("<I", size << 3 | 2)[:3] + bytes([byte]) for size in sizes[:-1])
    return ZSTD_MAGIC + b"\0\x58" + blocks + struct.pack("<I", sizes[-1] << 3 | 3)[:3] + bytes([byte])


def raw_frame(data, head=b"\0\x58"):
    """A frame with the data as it is."""
    parts = [data[at:at + 100_000] for at in range(0, len(data), 100_000)] or [b""]
    blocks = [struct.pack("<I", len(part) << 3 | (part is parts[-1]))[:3] + part for part in parts]
    return ZSTD_MAGIC + head + b"".join(blocks)


def skippable(data, said=None):
    return b"\x5a\x2a\x4d\x18" + struct.pack("<I", len(data) if said is None else said) + data


# ---- the corpus --------------------------------------------------------------------------------


class Corpus:
    def __init__(self, out, fuzz):
        self.out, self.fuzz, self.list = out, fuzz, []
        out.mkdir(parents=True, exist_ok=True)
        self.disk = bytes(Disk().bytes)
        self.manifest = json.dumps(manifest(self.disk)).encode()
        self.m = member(b"manifest.json", self.manifest)
        self.d = member(b"disk.qcow2", self.disk)
        self.good = self.m + self.d + END

    def add(self, group, name, archive, says, errno="EBADMSG", heavy=False):
        name = f"{group}-{name}" if name else group
        assert all(name != other["name"] for other in self.list), name
        (self.out / f"{name}.boxlite").write_bytes(archive)
        errno = None if says is None else errno
        self.list.append({"name": name, "group": group, "errno": errno, "says": alternatives(says or ""), "heavy": heavy})
        if len(archive) < 60_000 and group not in ("cut", "flip", "bomb") and "unpacks" not in name:
            # As it is, in one piece. What unpacks to more than a fuzzer has time for is left out.
            self.seed("archive", name, b"\0" + archive)

    def seed(self, target, name, data):
        if self.fuzz:
            directory = self.fuzz / target
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"hostile-{name}").write_bytes(data)

    def all(self):
        self.add("good", "", self.good, None)
        for part in (self.taken, self.names, self.types, self.members, self.sizes, self.extensions,
                     self.sparse, self.sums, self.packed, self.bombs, self.tails, self.of_manifests,
                     self.of_disks, self.cuts, self.flips):
            part()
        (self.out / "list.json").write_text(json.dumps(self.list, indent=0))

    def taken(self):
        """What is unusual and right."""
        m, d, disk = self.m, self.d, self.disk
        add = lambda name, archive: self.add("taken", name, archive, None)
        add("disk-first", d + m + END)
        add("records", self.good + bytes(10240 - len(self.good) % 10240))
        add("dot-slash", member(b"./manifest.json", self.manifest) + member(b"./disk.qcow2", disk) + END)
        add("continuous", m + member(b"disk.qcow2", disk, kind=b"7") + END)
        add("old-kind", m + member(b"disk.qcow2", disk, kind=b"\0") + END)
        add("ustar", m + member(b"disk.qcow2", disk, magic=b"ustar\x0000") + END)
        add("v7", m + member(b"disk.qcow2", disk, magic=b"") + END)
        add("rootfs", m + member(b"guest-rootfs.qcow2", bytes(3000)) + d + END)
        add("long-name", m + long_name(b"disk.qcow2\0") + member(b"x", disk) + END)
        add("pax-path", m + pax([(b"path", b"disk.qcow2"), (b"comment", b"x")]) + member(b"x", disk) + END)
        add("pax-size", m + pax([(b"size", str(len(disk)).encode())]) + header(b"disk.qcow2", 0) + padded(disk) + END)
        add("base-256", m + header(b"disk.qcow2", base256(len(disk))) + padded(disk) + END)
        assert not any(disk[12800:16384])
        pieces = [(0, 12800), (16384, len(disk) - 16384)]
        stored = disk[:12800] + disk[16384:]
        add("sparse", m + sparse(b"disk.qcow2", pieces, len(stored), len(disk)) + padded(stored) + END)
        many = [(at, 4096) for at in range(0, len(disk), 4096)]
        add("sparse-extended", m + sparse(b"disk.qcow2", many, len(disk), len(disk)) + padded(disk) + END)
        for level in ("-1", "-19"):
            add(f"zstd{level}", zstd(self.good, level))
        add("zstd-stored", raw_frame(self.good))
        add("zstd-frames", b"".join(zstd(self.good[at:at + 5000]) for at in range(0, len(self.good), 5000)))
        add("zstd-skippable", skippable(b"x" * 100) + zstd(self.good) + skippable(b""))
        add("zstd-padded", zstd(self.good) + bytes(1000))
        add("zstd-padding-unpacks", zstd(self.good) + rle(0, 64 * MIB))

    def names(self):
        forged = b"x\n2030-01-01T00:00:00Z import of box forged\x1b[2J\x1b]0;\x07"
        for label, name, says in (
            ("parent", b"../disk.qcow2", NO_DISK), ("parent-deep", b"a/../../disk.qcow2", NO_DISK),
            ("parent-dot", b"./../disk.qcow2", NO_DISK), ("parent-last", b"disk.qcow2/..", NO_DISK),
            ("parent-alone", b"..", NO_DISK), ("absolute", b"/disk.qcow2", None),
            ("absolute-deep", b"/etc/cron.d/x", NO_DISK), ("absolute-dot", b".//disk.qcow2", None),
            ("elsewhere", b"etc/passwd", NO_DISK), ("empty", b"", NO_DISK), ("dot", b"./", NO_DISK),
            ("slash", b"disk.qcow2/", "a directory"), ("upper", b"DISK.QCOW2", NO_DISK),
            ("newline", b"disk.qcow2\n", NO_DISK), ("backslash", b"..\\disk.qcow2", NO_DISK),
            ("not-utf8", b"\xff\xfe\xc0\xaf", NO_DISK), ("forged", forged, NO_DISK),
        ):
            for how, extra in (("", b""), ("-long", long_name(name + b"\0")), ("-pax", pax([(b"path", name)]))):
                plain = b"disk.qcow2" if extra else name
                self.add("name", label + how, self.m + extra + member(plain, self.disk) + END, says)
        for how, extra in (("long", long_name(b"disk.qcow2\0.sh\0")), ("pax", pax([(b"path", b"disk.qcow2\0x")]))):
            self.add("name", f"nul-{how}", self.m + extra + member(b"disk.qcow2", self.disk) + END, "has a NUL in its name")
        self.add("name", "prefix", self.m + member(b"disk.qcow2", self.disk, magic=b"ustar\x0000", prefix=b"/etc") + END,
                 NO_DISK)
        self.add("name", "long-100k", self.m + long_name(b"x" * 100_000 + b"\0") + self.d + END, "too long for a file")
        x, below = member(b"x", b"x"), member(b"x/y", b"y")
        for label, extra in (("file-then-directory", x + below), ("directory-then-file", below + x)):
            self.add("name", label, self.m + extra + self.d + END, "a file and a directory")
        for label, name in (("below-disk", b"disk.qcow2/x"), ("below-manifest", b"manifest.json/x")):
            self.add("name", label, member(name, b"x") + self.m + self.d + END, "makes .* a directory")

    def types(self):
        for kind, says in ((b"1", "a hard link"), (b"2", "a symlink"), (b"3", "a device"), (b"4", "a device"),
                           (b"5", "a directory"), (b"6", "a fifo"), (b"g", "a global pax header"),
                           (b"V", "of an unknown type"), (b"M", "of an unknown type"), (b"D", "of an unknown type"),
                           (b"N", "of an unknown type"), (b"X", "of an unknown type"), (b"\xff", "of an unknown type")):
            label = f"{kind[0]:02x}"
            link = header(b"disk.qcow2", 0, kind=kind, link=b"/etc/passwd")
            self.add("type", f"{label}-disk", self.m + link + self.d + END, says)
            self.add("type", f"{label}-manifest", header(b"manifest.json", 0, kind=kind, link=b"/etc/passwd") + self.good,
                     says)
            self.add("type", f"{label}-other", self.m + self.d + header(b"x", 0, kind=kind, link=b"..") + END, says)
        through = header(b"disk.qcow2", 0, kind=b"2", link=b"../../../.ssh/authorized_keys")
        self.add("type", "through-a-link", through + self.good, "a symlink")

    def members(self):
        m, d = self.m, self.d
        for label, archive, says in (
            ("manifest-twice", m + m + d + END, None),
            ("disk-twice", m + d + d + END, None),
            ("rootfs-twice", m + 2 * member(b"guest-rootfs.qcow2", b"x") + d + END, None),
            ("manifest-twice-by-pax", m + pax([(b"path", b"manifest.json")]) + d + END, "manifest.json"),
            ("no-manifest", d + END, "it has no manifest.json"),
            ("no-disk", m + END, "it has no disk.qcow2"),
            ("none", END, "it has no manifest.json"),
            ("zeros", bytes(MIB), "it has no manifest.json"),
            ("one-zero-block", m + d + bytes(BLOCK) + m, "one zero block instead of two"),
            ("ends-early", m + END + d + END, "it has no disk.qcow2"),
            ("unknown-third", m + d + member(b"README", b"x") + END, None),
            ("of-a-mac", member(b"._manifest.json", b"x") + m + member(b"._disk.qcow2", b"x") + d
             + member(b".DS_Store", b"x") + END, None),
            ("disk-replaced", m + member(b"disk.qcow2", b"x") + d + END, None),
            ("disk-replaced-wrongly", m + d + member(b"disk.qcow2", b"x") + END, MISMATCH),
            ("skipped", m + member(b"../disk.qcow2", b"x") + d + END, None),
        ):
            self.add("member", label, archive, says)

    def sizes(self):
        """Of the disk: those that are too large are told before anything is written."""
        for label, size, errno, says in (
            ("more-than-comes", 64 * MIB, "EBADMSG", CUT),
            ("32-tib", base256(32 * TIB), "ENOSPC", "but only .* are free"),
            ("65-tib", base256(65 * TIB), "EBADMSG", "over 64 TiB"),
            ("2-63", base256(1 << 63), "EBADMSG", SIZE), ("2-64", base256((1 << 64) - 1), "EBADMSG", SIZE),
            ("2-80", base256(1 << 80), "EBADMSG", ""), ("minus-1", base256(-1), "EBADMSG", SIZE),
            ("minus-512", base256(-512), "EBADMSG", SIZE), ("minus-2-63", base256(-1 << 63), "EBADMSG", SIZE),
            ("text", b"many\0", "EBADMSG", SIZE), ("minus-text", b"-1\0", "EBADMSG", SIZE),
            ("nothing", b"\0", "EBADMSG", ""), ("blanks", b" " * 12, "EBADMSG", ""),
            ("decimal", b"00000045989\0", "EBADMSG", SIZE),
        ):
            self.add("size", label, self.m + header(b"disk.qcow2", size) + padded(self.disk) + END, says, errno)
        for label, value, says in (
            ("minus", b"-1", "no number"), ("float", b"1e3", "no number"), ("hex", b"0x10", "no number"),
            ("empty", b"", "no number"), ("blank", b" 5", "no number"), ("2-64", b"18446744073709551616", "no number"),
            ("2-63", b"9223372036854775808", "impossible"), ("65-tib", str(65 * TIB).encode(), "over 64 TiB"),
            ("short", b"512", f"{MISMATCH}|{SUM}|not a qcow2"), ("0", b"0", f"{MISMATCH}|{SUM}|not a qcow2"),
            ("long", str(len(self.disk) + 4096).encode(), f"{CUT}|{MISMATCH}"),
        ):
            self.add("size", f"pax-{label}", self.m + pax([(b"size", value)]) + self.d + END, says)
        self.add("size", "pax-huge", self.m + pax([(b"size", str(32 * TIB).encode())]) + self.d + END,
                 "but only .* are free", "ENOSPC")
        self.add("size", "manifest-0", header(b"manifest.json", 0) + self.d + END, "is not JSON")
        self.add("size", "manifest-2-mib", header(b"manifest.json", 2 * MIB) + padded(self.manifest), "over 1 MiB")
        self.add("size", "rootfs-2-62", self.m + header(b"guest-rootfs.qcow2", base256(1 << 62)) + self.d, "over 256 GiB")

    def extensions(self):
        m, d = self.m, self.d
        malformed = "a pax header is malformed"
        for label, records in (
            ("no-length", b"path=disk.qcow2\n"), ("length-0", b"0 path=x\n"), ("length-short", b"5 path=x\n"),
            ("length-long", b"99 path=x\n"), ("length-huge", b"18446744073709551616 path=x\n"),
            ("length-minus", b"-9 path=x\n"), ("no-newline", b"9 path=xy"), ("no-equals", b"9 path x\n"),
            ("zeros", bytes(512)), ("noise", random.Random(3).randbytes(700)),
        ):
            self.add("pax", label, m + pax(records) + d + END, malformed)
        for label, archive, says in (
            ("path-twice", m + pax([(b"path", b"disk.qcow2"), (b"path", b"../x")]) + d + END, "says .*path.* twice"),
            ("size-twice", m + pax([(b"size", b"1"), (b"size", b"2")]) + d + END, "says .*size.* twice"),
            ("twice", m + pax([(b"a", b"b")]) * 2 + d + END, "two extension headers of one type"),
            ("long-name-twice", m + long_name(b"disk.qcow2\0") * 2 + d + END, "two extension headers of one type"),
            ("at-the-end", m + d + pax([(b"a", b"b")]) + END, "describes no member"),
            ("over-1-mib", m + header(b"x", 2 * MIB, kind=b"x") + bytes(4096), "over 1 MiB"),
            ("long-name-over-1-mib", m + header(b"x", 2 * MIB, kind=b"L") + bytes(4096), "over 1 MiB"),
            ("size-2-63", m + header(b"x", base256(1 << 63), kind=b"x") + bytes(4096), "over 1 MiB|no size|impossible"),
            ("overrides-manifest", pax([(b"path", b"disk.qcow2")]) + m + d + END, "disk.qcow2 twice|no manifest"),
        ):
            self.add("pax", label, archive, says)

    def sparse(self):
        disk, size = self.disk, len(self.disk)
        whole = [(0, size)]
        beyond, order, sums = "reaches beyond its size", "is out of order", "does not add up to its size"

        def gnu(label, pieces, says, stored=None, real=size, errno="EBADMSG", **how):
            head = sparse(b"disk.qcow2", pieces, len(disk) if stored is None else stored, real, **how)
            self.add("sparse", label, self.m + head + padded(disk) + END, says, errno)

        gnu("overlap", [(0, 8192), (4096, size - 8192)], order)
        gnu("backwards", [(8192, size - 8192), (0, 8192)], order)
        gnu("same-again", [(0, 4096)] * 4, order)
        gnu("beyond", [(4096, size)], beyond)
        gnu("far", [(1 << 60, size)], beyond)
        gnu("overflow", [((1 << 64) - 512, size)], beyond + "|no number")
        gnu("minus", [(-512, size)], beyond + "|no number|out of order")
        gnu("length-2-63", [(0, 1 << 63)], beyond + "|no number")
        gnu("short", [(0, 4096)], sums)
        gnu("nothing", [], sums)
        gnu("stored-less", whole, sums, stored=4096)
        gnu("stored-more", whole, sums, stored=size + 4096)
        gnu("stored-0", whole, sums, stored=0)
        gnu("real-0", whole, beyond, real=0)
        gnu("real-less", whole, beyond, real=4096)
        gnu("real-2-63", whole, sums, real=1 << 63)
        gnu("ends-without-mark", whole, sums, real=2 * size)
        gnu("half-blocks", [(0, 100), (4096, size - 100)], "does not begin at a block|out of order|beyond")
        gnu("no-gnu", whole, "is sparse without a GNU header", magic=b"ustar\x0000")
        gnu("extended-cut", whole, f"no number|add up|{MISMATCH}", extended=True)
        gnu("holes-512-gib", [(0, size), (512 * GIB, 0)], "has holes of", real=512 * GIB)
        gnu("holes-60-tib", [(0, size), (60 * TIB, 0)], "has holes of", real=60 * TIB)
        gnu("holes-65-tib", [(0, size), (65 * TIB, 0)], "over 64 TiB", real=65 * TIB)
        gnu("stored-32-tib", [(0, 32 * TIB)], "but only .* are free", stored=0, real=32 * TIB, errno="ENOSPC",
            size=base256(32 * TIB))
        # A map without end: 24 bytes a piece.
        block = (b"00000000000\0" * 42).ljust(504, b"\0") + b"\1" + bytes(7)
        endless = self.m + sparse(b"disk.qcow2", whole, size, size, extended=True) + block * 110_000
        self.add("sparse", "endless-map", zstd(endless), "pieces", heavy=True)
        text = sparse(b"manifest.json", [(0, 512), (2 * GIB, 0)], 512, 2 * GIB)
        self.add("sparse", "manifest-of-2-gib", text + bytes(512) + self.d + END, "over 1 MiB")
        pax_format = "a sparse member in pax format"
        real = str(size).encode()
        for label, records, body in (
            ("0.0", [(b"GNU.sparse.size", real), (b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.offset", b"0"),
                     (b"GNU.sparse.numbytes", real)], disk),
            ("0.1", [(b"GNU.sparse.size", real), (b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.name", b"disk.qcow2"),
                     (b"GNU.sparse.map", b"0," + real)], disk),
            ("0.1-lies", [(b"GNU.sparse.size", b"-1"), (b"GNU.sparse.numblocks", b"99999999999"),
                          (b"GNU.sparse.map", b"0,1,2")], disk),
            ("1.0", [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"disk.qcow2"),
                     (b"GNU.sparse.realsize", real)], padded(b"1\n0\n" + real + b"\n") + disk),
            ("1.0-lies", [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"../../x"),
                          (b"GNU.sparse.realsize", b"18446744073709551615")], padded(b"99999999\n-5\n") + disk),
            ("2.0", [(b"GNU.sparse.major", b"2")], disk),
        ):
            name = b"GNUSparseFile.0/disk.qcow2" if label[0] != "0" else b"disk.qcow2"
            self.add("sparse", f"pax-{label}", self.m + pax(records) + member(name, body) + END, pax_format)

    def sums(self):
        other = bytearray(self.disk)
        other[-1] ^= 1
        self.add("sum", "disk", self.m + member(b"disk.qcow2", bytes(other)) + END, MISMATCH)
        self.add("sum", "disk-first", member(b"disk.qcow2", bytes(other)) + self.m + END, MISMATCH)
        self.add("sum", "longer", self.m + member(b"disk.qcow2", self.disk + bytes(4096)) + END, MISMATCH)
        self.add("sum", "zstd", zstd(self.m + member(b"disk.qcow2", bytes(other)) + END), MISMATCH)
        for label, field in (("header", b"000000\0 "), ("header-text", b"abcdefgh"), ("header-none", bytes(8))):
            head = bytearray(header(b"disk.qcow2", len(self.disk)))
            head[148:156] = field
            self.add("sum", label, self.m + bytes(head) + padded(self.disk) + END, SUM)
        for label, data in (
            ("text", b"Dear reader,\n" * 100), ("json", self.manifest), ("qcow2", self.disk), ("elf", b"\x7fELF" + bytes(2000)),
            ("zip", b"PK\x03\x04" + bytes(2000)), ("gzip", zlib.compress(self.good, wbits=31)), ("noise", random.Random(5).randbytes(5000)),
        ):
            self.add("other", label, data, NO_ARCHIVE if len(data) >= BLOCK else f"{CUT}|{NO_ARCHIVE}")
        self.add("other", "one-byte", b"x", f"{CUT}|{NO_ARCHIVE}")

    def packed(self):
        good = zstd(self.good)
        frame = zstd(self.good, "--check")
        for label, archive, says in (
            ("nothing-inside", zstd(b""), CUT), ("magic", ZSTD_MAGIC, CUT), ("half-magic", ZSTD_MAGIC[:2], CUT),
            ("twice", zstd(good), NO_ARCHIVE), ("text-inside", zstd(b"Dear reader,\n" * 100), NO_ARCHIVE),
            ("wrong-check", frame[:-1] + bytes([frame[-1] ^ 1]), ZSTD),
            ("window-256-mib", raw_frame(self.good, head=b"\0" + bytes([18 << 3])), ZSTD),
            ("window-3-tib", raw_frame(self.good, head=b"\0\xff"), ZSTD),
            ("content-size-less", raw_frame(self.good, head=b"\x80\x58" + struct.pack("<I", 10)), ZSTD),
            ("content-size-more", raw_frame(self.good, head=b"\x80\x58" + struct.pack("<I", 1 << 30)), ZSTD),
            ("content-size-2-64", raw_frame(self.good, head=b"\xe0" + b"\xff" * 8), ZSTD),
            ("dictionary", raw_frame(self.good, head=b"\1\x58\x07"), ZSTD),
            ("reserved-bit", raw_frame(self.good, head=b"\x08\x58"), ZSTD),
            ("reserved-block", ZSTD_MAGIC + b"\0\x58\x0e\0\0", ZSTD),
            ("large-block", ZSTD_MAGIC + b"\0\x58" + struct.pack("<I", 200_000 << 3)[:3] + bytes(200_000), ZSTD),
            ("no-last-block", ZSTD_MAGIC + b"\0\x58" + b"\0\0\0" * 5000, CUT),
            ("old-magic", b"\x27" + good[1:], NO_ARCHIVE),
            ("skippable-alone", skippable(b"x" * 1000), CUT),
            ("skippable-4-gib", skippable(b"x" * 1000, said=0xFFFFFFFF), CUT),
            ("skippable-many", skippable(b"") * 20_000, CUT),
            ("padding-first", b"\0" * 512 + good, "it has no|."),
            ("zeros-between", zstd(self.m) + bytes(8) + zstd(self.d + END), "zeros where a zstd frame must begin"),
            ("plain-between", zstd(self.m) + self.d + END, "a zstd frame is followed by something else"),
        ):
            self.add("zstd", label, archive, says)

    def bombs(self):
        def zeros(count):
            return raw_frame(self.m + header(b"disk.qcow2", base256(count))) + rle(0, count) + raw_frame(END)

        self.add("bomb", "1-gib", zeros(GIB), MISMATCH)
        self.add("bomb", "8-gib", zeros(8 * GIB), MISMATCH, heavy=True)
        self.add("bomb", "1-pib", raw_frame(self.m + header(b"disk.qcow2", base256(1024 * TIB))) + rle(0, GIB),
                 "over 64 TiB")
        self.add("bomb", "before-the-tar", rle(0, GIB), "it has no manifest.json")
        self.add("bomb", "manifest", raw_frame(header(b"manifest.json", GIB)) + rle(0x20, GIB), "over 1 MiB")
        self.add("bomb", "pax", raw_frame(self.m + header(b"x", GIB, kind=b"x")) + rle(0x20, GIB), "over 1 MiB")
        self.add("bomb", "rootfs", raw_frame(self.m + header(b"guest-rootfs.qcow2", base256(1 << 50))) + rle(0, GIB),
                 "over 256 GiB")
        self.add("bomb", "after-the-end", zstd(self.good) + rle(0, 256 * MIB) + rle(1, 10), TAIL)
        self.add("bomb", "nested", zstd(rle(0, GIB)), f"{NO_ARCHIVE}|no manifest")
        size = 300 * MIB
        self.add("bomb", "not-zeros", raw_frame(self.m + header(b"disk.qcow2", size)) + rle(0x55, size) + raw_frame(END),
                 MISMATCH, heavy=True)

    def tails(self):
        good, packed = self.good, zstd(self.good)
        for label, tail in (("byte", b"x"), ("text", b"more"), ("archive", self.good), ("block", bytes(BLOCK) + b"\1" * BLOCK),
                            ("far", bytes(100_000) + b"x")):
            self.add("tail", label, good + tail, TAIL)
            self.add("tail", f"zstd-{label}", packed + tail, f"{TAIL}|{ZSTD}|followed by something else")
            self.add("tail", f"inside-{label}", zstd(good + tail), TAIL)

    def of_manifests(self):
        for label, text, says in manifests(self.disk):
            self.add("json", label, member(b"manifest.json", text) + self.d + END, says)
            if len(text) < 4000:
                self.seed("manifest", label, text)

    def of_disks(self):
        for label, disk, says, *errno in disks():
            disk = bytes(disk if isinstance(disk, bytes) else disk.bytes)
            text = json.dumps(manifest(disk)).encode()
            self.add("disk", label, member(b"manifest.json", text) + member(b"disk.qcow2", disk) + END, says, *errno)
            # Its beginning; some zeros follow.
            self.seed("chain", label, b"\1" + disk[:32_000])

    def cuts(self):
        for label, whole in (("plain", self.good), ("zstd", zstd(self.good))):
            for at in range(KIB, len(whole), KIB):
                self.add("cut", f"{label}-{at // KIB:03}", whole[:at], CUT)
            self.add("cut", f"{label}-last", whole[:-1], CUT)

    def flips(self):
        bits = random.Random(11)
        for label, whole in (("plain", self.good), ("zstd", zstd(self.good, "--check"))):
            count = 500
            for number in range(count):
                # Spread over it, more in what is not the disk's data.
                at = number * len(whole) // count if number % 2 else bits.randrange(min(8 * KIB, len(whole)))
                flipped = bytearray(whole)
                flipped[at] ^= 1 << bits.randrange(8)
                self.add("flip", f"{label}-{number:03}", bytes(flipped), "", "any")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--fuzz", type=Path)
    arguments = parser.parse_args()
    Corpus(arguments.out, arguments.fuzz).all()


if __name__ == "__main__":
    sys.exit(main())
