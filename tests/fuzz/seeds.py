"""What the fuzz targets begin with.

    seeds.py OUT

makes OUT/images (file systems and partitioned disks, which the target `guest` changes), OUT/chain
(images that `chain` may find below its own) and OUT/seeds/TARGET (inputs). What mke2fs, qemu-img and
tar make of the same arguments is nearly the same each time, so that an input means the same later.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# What files contain: nothing that a reader looks at (patches.rs leaves it out).
CONTENTS = 0xC7
WHEN = 1_700_000_000


def run(*args, cwd=None, given=None):
    # mke2fs and debugfs are often not in users' PATH.
    env = dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin:/sbin",
               E2FSPROGS_FAKE_TIME=str(WHEN))
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, input=given, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # e2fsck says 1 where it has mended something.
    if done.returncode and not (args[0] == "e2fsck" and done.returncode == 1):
        sys.exit(f"seeds: {args}: {done.stdout.decode()}{done.stderr.decode()}")
    return done.stdout


def tree(path):
    """Files of all kinds, with hardly any contents."""
    for directory in ("empty", "a/b/c", "many"):
        (path / directory).mkdir(parents=True)
    (path / "short").write_bytes(bytes([CONTENTS]) * 30)
    for number in range(90):
        os.link(path / "short", path / f"many/a name, number {number}")
    (path / "fast").symlink_to("target")
    (path / "slow").symlink_to("t" * 200)
    for name, target in (("absolute", "/a/b"), ("high", "../../../short"), ("back", "../b/../../../a"),
                         ("through", "absolute/../../../../fast")):
        (path / "a/b" / name).symlink_to(target)
    os.mkfifo(path / "pipe")
    with open(path / "holes", "wb") as file:
        # More extents than one node has room for.
        for number in range(100):
            os.pwrite(file.fileno(), bytes([CONTENTS]) * 1024, 2048 * number)
    with open(path / "far", "wb") as file:
        # A block of numbers of each level, with blocks of 1 KiB.
        for at in (0, 20 << 10, 1 << 20, 80 << 20):
            os.pwrite(file.fileno(), bytes([CONTENTS]) * 1024, at)
    (path / "whole").write_bytes(bytes([CONTENTS]) * 40_000)
    for base, directories, files in os.walk(path):
        for name in directories + files:
            os.utime(Path(base, name), (WHEN, WHEN), follow_symlinks=False)


def many_names(path):
    """So many that an index has two levels where blocks have 1 KiB."""
    (path / "many").mkdir(parents=True)
    (path / "file").write_bytes(bytes([CONTENTS]) * 30)
    for number in range(1200):
        os.link(path / "file", path / f"many/{number:03d}{'n' * 190}")
    (path / "fast").symlink_to("many")
    (path / "holes").write_bytes(b"")
    for base, directories, files in os.walk(path):
        for name in directories + files:
            os.utime(Path(base, name), (WHEN, WHEN), follow_symlinks=False)


def file_system(path, size, options, source, commands=()):
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    run("mke2fs", "-q", "-F", "-U", uuid, "-E", f"hash_seed={uuid},root_owner=0:0", "-N", "64",
        "-m", "0", *options.split(), "-d", source, path, size)
    debugfs(path, ["mknod console c 5 1", "ea_set fast user.name value", "ea_set holes user.x y",
                   *commands])
    # The directory with many names gets an index.
    run("e2fsck", "-fyD", path)


def debugfs(path, commands):
    run("debugfs", "-w", "-f", "-", path, given="\n".join(commands).encode())


def dirty_journal(path, options):
    """Blocks that are written in the journal alone, and some that are given up."""
    writes = ",".join(str(number) for number in (1, *range(1500, 1506)))
    data = path.with_suffix(".journal")
    # The first is the file system's own superblock, as it is.
    with open(path, "rb") as file:
        file.seek(1024)
        own = file.read(1024)
    data.write_bytes(own + bytes([CONTENTS]) * 6144)
    debugfs(path, [f"journal_open {options}", f"journal_write -b {writes} {data}",
                   "journal_write -r 1501,1502", f"journal_write -b 1503 {data}", "journal_close"])
    data.unlink()


def images(out, scratch):
    out.mkdir()
    source = scratch / "tree"
    tree(source)
    large = scratch / "large"
    large.write_bytes(bytes([CONTENTS]) * 3000)
    value = [f"ea_set -f {large} whole user.large"]
    middle = scratch / "middle"
    middle.write_bytes(bytes([CONTENTS]) * 500)
    block = [f"ea_set -f {middle} whole user.middle", "ea_set whole security.note 0123456789"]
    one = "-b 1024 -O ^resize_inode"
    no_journal = "-t ext4 -b 1024 -O ^resize_inode,^has_journal"
    for name, size, options, commands in (
        ("ext2", "600K", f"-t ext2 -I 128 {one}", block),
        ("ext4", "600K", f"{no_journal},^metadata_csum,^64bit", block),
        ("checksums", "600K", f"{no_journal},metadata_csum,64bit", block),
        ("inline", "600K", f"{no_journal},^metadata_csum,inline_data", block),
        ("inodes", "600K", f"{no_journal},^metadata_csum,ea_inode", value),
        ("groups", "900K", f"{no_journal},^metadata_csum,meta_bg,^flex_bg -g 256", block),
        ("clusters", "900K", f"{no_journal},^metadata_csum,bigalloc -C 4096", block),
        ("large", "1200K", "-t ext4 -b 4096 -O ^resize_inode,^has_journal,^metadata_csum", block),
        ("huge", "9M", "-t ext4 -b 65536 -O ^resize_inode,^has_journal,^metadata_csum", block),
        ("journal", "3M", f"-t ext3 {one} -J size=1", block),
        ("journal3", "3M", f"-t ext4 {one},metadata_csum,64bit -J size=1", block),
    ):
        path = out / name
        file_system(path, size, options, source, commands)
        if name.startswith("journal"):
            dirty_journal(path, "-c -v 3" if "metadata_csum" in options else "")
    for name, options in (
        ("no-kinds", f"-t ext2 -I 128 -O ^filetype {one.replace(' -O ', ' -O ^filetype,')}"),
        # The short link has its attribute in a block, which takes a whole cluster.
        ("clusters-short", f"{no_journal},^metadata_csum,bigalloc -C 4096 -I 128"),
    ):
        file_system(out / name, "900K", options, source, block)
    levels = scratch / "levels"
    many_names(levels)
    for name, options in (("levels", "^metadata_csum"), ("levels-checksums", "metadata_csum")):
        file_system(out / name, "900K", f"{no_journal},{options}", levels)
    # A short one for partitions.
    small = scratch / "small"
    (small / "a").mkdir(parents=True)
    (small / "fast").symlink_to("target")
    os.truncate(os.open(small / "holes", os.O_CREAT | os.O_WRONLY), 5000)
    part = scratch / "part"
    file_system(part, "128K", "-t ext2 -b 1024 -O ^resize_inode", small)
    for name, script, places in (
        ("mbr", "label: dos\nlabel-id: 0x1\n1: start=8, size=256, type=83\n"
                "2: start=264, size=600, type=5\n5: start=272, size=256, type=83\n"
                "6: start=530, size=256, type=83\n", (8, 272, 530)),
        ("gpt", "label: gpt\nlabel-id: 01234567-89ab-cdef-0123-456789abcdef\nfirst-lba: 40\n"
                "1: start=40, size=256, uuid=01234567-89ab-cdef-0123-456789abcde0\n"
                "3: start=300, size=256, uuid=01234567-89ab-cdef-0123-456789abcde1\n", (40, 300)),
    ):
        path = out / name
        with open(path, "wb") as file:
            file.truncate(500 << 10)
        run("sfdisk", "-q", path, given=script.encode())
        with open(path, "r+b") as file:
            for sector in places:
                os.pwrite(file.fileno(), part.read_bytes(), sector * 512)
    # A file system that was there before the partitions.
    path = out / "mbr-over"
    file_system(path, "600K", f"{no_journal},^metadata_csum", source)
    script = "label: dos\nlabel-id: 0x1\n1: start=600, size=256, type=83\n"
    run("sfdisk", "-q", "--wipe=never", path, given=script.encode())
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), part.read_bytes(), 600 * 512)
    large_sectors(out / "gpt", out / "gpt-4096")
    with open(out / "gpt-4096", "r+b") as file:
        os.pwrite(file.fileno(), part.read_bytes(), 40 * 4096)


def large_sectors(path, large):
    """The GPT of a disk as it is with sectors of 4096 bytes: each of its own has eight times the room."""
    disk = path.read_bytes()
    last = len(disk) // 512 - 1
    with open(large, "wb") as file:
        file.truncate(len(disk) * 8)
        for sector, count in ((0, 1), (1, 1), (2, 32), (last - 32, 32), (last, 1)):
            os.pwrite(file.fileno(), disk[sector * 512:(sector + count) * 512], sector * 4096)


def guest(out, images):
    """Each image as it is, with and without checksums put right, and a few common changes."""
    changes = {"none": b"", "number": bytes([2, 9, 0, 4, 5]), "copy": bytes([5, 9, 0, 0, 40, 0, 0]),
               "block": bytes([6, 60, 0, 8, 50, 0, 0])}
    out.mkdir(parents=True)
    for number, _ in enumerate(sorted(images.iterdir())):
        for right in (0, 1):
            for name, change in changes.items():
                (out / f"{number}-{right}-{name}").write_bytes(bytes([number, right]) + change)


def chain(out, seeds, scratch):
    out.mkdir()
    seeds.mkdir(parents=True)

    def create(options, what, *commands):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *what, cwd=out)
        return written(*commands)

    def convert(options, name, *more):
        run("qemu-img", "convert", "-O", "qcow2", *more, "-o", options, "base.raw", name, cwd=out)

    def written(*commands):
        for command in commands:
            run("qemu-io", "-f", "qcow2", "-c", command, "top.qcow2", cwd=out)
        return (out / "top.qcow2").read_bytes()

    (out / "base.raw").write_bytes(bytes(range(256)) * 32 + bytes(32 << 10) + bytes([1]) * (8 << 10))
    small = "cluster_size=512"
    convert(small, "base.qcow2")
    alone = ["top.qcow2", "64k"]
    on_raw = ["-b", "base.raw", "-F", "raw", "top.qcow2", "48k"]
    on_qcow2 = ["-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "64k"]
    writes = ["write -P 7 4k 3k", "write -z 20k 2k", "write -P 8 33k 512", "write -c -P 9 40k 512"]
    made = {
        "empty": create(small, alone),
        "alone": create(small, alone, *writes),
        "on-raw": create(small, on_raw, *writes),
        "on-qcow2": create(small, on_qcow2, *writes),
        "two": create(f"compat=0.10,{small}", alone, writes[0]),
        "on-raw-two": create(f"compat=0.10,{small}", on_raw, writes[0]),
        "counts1": create(f"{small},refcount_bits=1", alone, writes[0]),
        "counts64": create(f"{small},refcount_bits=64", alone, *writes),
        "lazy": create(f"{small},lazy_refcounts=on", alone, writes[0]),
        "usual": create("cluster_size=64k", ["top.qcow2", "1G"]),
        "short": create(small, ["top.qcow2", "1000"], "write -P 7 0 512"),
        "extended": create("cluster_size=16k,extended_l2=on", alone),
        "on-qcow2-larger": create("cluster_size=4k", on_qcow2, "write -P 7 4k 4k", "write -z 20k 4k"),
    }
    convert(small, "top.qcow2", "-c")
    made["compressed"] = written()
    create(small, alone, writes[0])
    run("qemu-img", "snapshot", "-c", "one", "top.qcow2", cwd=out)
    made["snapshot"] = written()
    for name, image_bytes in made.items():
        # Of those with large clusters the fuzzer takes the beginning; zeros follow.
        large = name in ("usual", "extended")
        for how in (0, 8) if name.startswith("on") else (3, 7) if large else (0, 4, 6):
            (seeds / f"{name}-{how}").write_bytes(bytes([how]) + image_bytes)
    # An overlay of what the fuzzer makes; larger than most of that.
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "above.qcow2",
        "80k", cwd=out)
    (out / "top.qcow2").unlink()


def manifest(version, digest, **more):
    return {
        "version": version, "box_name": "web", "image": "alpine:latest",
        "box_options": {
            "rootfs": {"Image": "alpine:latest"}, "cpus": 2, "memory_mib": None, "env": [["A", "b"]],
            "volumes": [], "network": {"Enabled": {"allow_net": []}},
            "ports": [{"host_port": 80, "guest_port": 8080, "protocol": "udp", "host_ip": None}],
            "secrets": [], "cmd": ["sh"], **more,
        },
        "guest_disk_checksum": "", "container_disk_checksum": digest,
        "exported_at": "2026-01-02T03:04:05Z",
    }


def manifests(out):
    out.mkdir(parents=True)
    good = "sha256:" + "0f" * 32
    for version in range(1, 6):
        (out / f"{version}").write_text(json.dumps(manifest(version, good)))
    (out / "none").write_text(json.dumps(manifest(1, "")))
    (out / "float").write_text(json.dumps(manifest(5, good, unknown=[1.25, 1e300, -3])))
    secret = [{"name": "KEY", "value": "x", "hosts": ["a.example"], "placeholder": "y"}]
    (out / "secrets").write_text(json.dumps(manifest(5, good, secrets=secret)))
    advanced = {"capabilities": {"add": ["NET_ADMIN"], "drop": []}}
    (out / "advanced").write_text(json.dumps(manifest(4, good, advanced=advanced)))


def archives(out, scratch):
    out.mkdir(parents=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "disk.qcow2", "64k",
        cwd=scratch)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 4k 1k", "disk.qcow2", cwd=scratch)
    disk = (scratch / "disk.qcow2").read_bytes()
    digest = "sha256:" + hashlib.sha256(disk).hexdigest()
    members = {"5": manifest(5, digest), "1": manifest(1, "")}
    for version, said in members.items():
        for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=form, bufsize=512) as tar:
                for member, contents in (("manifest.json", json.dumps(said).encode()),
                                         ("disk.qcow2", disk)):
                    info = tarfile.TarInfo(member)
                    info.size = len(contents)
                    if name == "pax":
                        info.pax_headers = {"path": member, "comment": "x"}
                    tar.addfile(info, io.BytesIO(contents))
            tar = file.getvalue().rstrip(b"\0")
            tar += bytes(-len(tar) % 512 + 1024)
            for how in (0, 1, 1 | 4, 1 | 6, 1 | 8, 1 | 6 | 24):
                (out / f"{name}-{version}-{how}").write_bytes(bytes([how]) + tar)
            packed = run("zstd", "-q", "-c", "--no-check", given=tar)
            (out / f"{name}-{version}-zstd").write_bytes(bytes([0]) + packed)
    (scratch / "manifest.json").write_text(json.dumps(members["1"]))
    with open(scratch / "disk.qcow2", "r+b") as file:
        file.truncate(len(disk) + (60 << 10))
    tar = run("tar", "-c", "-S", "-f", "-", "-b", "2", "manifest.json", "disk.qcow2", cwd=scratch)
    for how in (0, 1, 1 | 6):
        (out / f"sparse-{how}").write_bytes(bytes([how]) + tar)


def main():
    out = Path(sys.argv[1])
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        images(part / "images", scratch)
        guest(part / "seeds/guest", part / "images")
        chain(part / "chain", part / "seeds/chain", scratch)
        archives(part / "seeds/archive", scratch)
        manifests(part / "seeds/manifest")
        # The archives, manifests and disks of tests/mount/hostile.rs.
        make = Path(__file__).resolve().parent.parent / "hostile/make.py"
        run(sys.executable, "-B", make, scratch / "hostile", "--fuzz", part / "seeds")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


main()
