"""What looking into guests costs, beside the kernel on loop mounts of the flattened disks.

A box with a large file and very many small ones, two snapshots of it, and ten files that differ
between them. The kernel reads the same two states from a raw file each.
"""

import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from homes import CLUSTER, MIB, Home, Mount
from measure import Cost, can_drop_caches, cost_of, run, settle

FILES, IN_A_DIRECTORY, CHANGED = 60_000, 200, 10
LARGE = 512  # MiB of the large file
STATS = 20_000
DISK = LARGE + 1024  # MiB


class Guests:
    """A home with such a box, and the raw disks of its two states."""

    def __init__(self, program, work, costs):
        self.work, self.costs = work, costs
        self.raw = {name: work / f"{name}.raw" for name in ("before", "after")}
        self.home = Home(work / "guests", work / "guests-pristine")
        self.mount = Mount(program, self.home, work / "guests-mnt")

    def rootfs(self, name):
        return self.mount.point / "web" / "snapshots" / name / "rootfs"

    def prepare(self):
        """Makes the box, with both snapshots."""
        before, after = self.raw.values()
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            make_tree(Path(place, "tree"))
            options = ["-q", "-t", "ext4", "-m", "0", "-N", 2 * FILES, "-d", Path(place, "tree")]
            run([*map(str, ["mke2fs", *options, before]), f"{DISK}M"])
        run(["cp", "--sparse=always", before, after])
        orders = []
        for number in range(CHANGED):
            name = f'"d{number}/file {number * IN_A_DIRECTORY + 7}"'
            orders += [f"rm {name}", f"write {__file__} {name}"]
        run(["debugfs", "-w", "-f", "-", after], input="\n".join(orders))
        self.home.add_box("web", 64, 1)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", before, self.home.disk("web")])
        self.snapshot("before")
        self.write_changes()
        self.snapshot("after")

    def snapshot(self, name):
        self.mount.start(fresh=True)
        os.mkdir(self.mount.point / "web" / "snapshots" / name)
        self.mount.stop()

    def write_changes(self):
        """Writes to the live disk where the second state differs, as the guest would have."""
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            orders = []
            with open(self.raw["before"], "rb") as before, open(self.raw["after"], "rb") as after:
                for at in range(0, DISK * MIB, CLUSTER):
                    piece = after.read(CLUSTER)
                    if piece != before.read(CLUSTER):
                        Path(place, str(at)).write_bytes(piece)
                        orders.append(f"write -q -s {at} {at} {len(piece)}\n")
            run(["qemu-io", "-f", "qcow2", self.home.disk("web")], input="".join(orders), cwd=place)

    @contextmanager
    def loops(self):
        """Both states mounted by the kernel."""
        places = {name: self.work / f"loop-{name}" for name in self.raw}
        mounted = []
        try:
            for name, place in places.items():
                place.mkdir(exist_ok=True)
                run(["mount", "-o", "loop,ro,noatime", self.raw[name], place])
                mounted.append(place)
            yield places
        finally:
            for place in mounted:
                run(["umount", place])

    def turn(self):
        """Each thing by us and by the kernel, with nothing of it in memory, and once more at once."""
        ours = {name: self.rootfs(name) for name in self.raw}
        if not can_drop_caches():
            return
        with self.loops() as theirs:
            for what, work in (("read", read), ("find", find), ("diff", differ)):
                for whose, trees in (("guest", ours), ("loop", theirs)):
                    mount = self.mount if whose == "guest" else None
                    if mount:
                        mount.start(fresh=True)
                    settle(cold=True)
                    for again in ("", " again"):
                        self.costs[f"{whose} {what}{again}"].append(work(trees, mount))
        self.stat()

    def stat(self):
        """stat(2) of a file by its full path, and from inside of its directory."""
        self.mount.start(fresh=True)
        file = self.rootfs("before") / "d3" / f"file {3 * IN_A_DIRECTORY}"
        back = os.getcwd()
        for key, place, name in (("full path", "/", str(file)), ("inside", file.parent, file.name)):
            os.chdir(place)
            os.stat(name)
            begun = time.perf_counter()
            for _ in range(STATS):
                os.stat(name)
            self.costs[f"stat {key}"].append(Cost(time.perf_counter() - begun))
        os.chdir(back)


def make_tree(tree):
    for number in range(FILES):
        directory = tree / f"d{number // IN_A_DIRECTORY}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file {number}").write_bytes(b"%d " % number * (number % 500))
    with open(tree / "large", "wb") as file:
        for _ in range(LARGE):
            file.write(os.urandom(MIB))


def read(trees, mount):
    file = trees["before"] / "large"
    return cost_of(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"], mount)


def find(trees, mount):
    count = FILES + FILES // IN_A_DIRECTORY + 3  # and the root, lost+found, the large file
    script = f'[ "$(find "$1/" | wc -l)" = {count} ]'
    return cost_of(["bash", "-c", script, "-", trees["before"]], mount)


def differ(trees, mount):
    script = f'[ "$(diff -rq "$1/" "$2/" | wc -l)" = {CHANGED} ]'
    return cost_of(["bash", "-c", script, "-", trees["before"], trees["after"]], mount)
