"""How long a running box stands still for a snapshot, seen from inside it: on the file system of the
work directory, and on xfs, which shares blocks."""

import os
import subprocess
import sys
from pathlib import Path

from homes import MIB, Home, Mount
from measure import Cost, run

# MiB in the top layer.
SIZES = (16, 256, 2048)

# A stand-in for a virtual machine: it has the disk open for writing, wakes up every millisecond, and
# finds out how long it stood still at most. With `writes`, it overwrites 4 KiB in a cluster of its
# own each time. It says when it is ready, and the longest pause when it is told to end.
MACHINE = """
import os, select, sys, time
disk, writes = sys.argv[1], sys.argv[2] == "writes"
file = os.open(disk, os.O_RDWR)
place = os.lseek(file, 0, os.SEEK_END) // 65536 * 65536 - 65536
print("ready", flush=True)
longest, last, number = 0, time.monotonic(), 0
while not select.select([0], [], [], 0.001)[0]:
    now = time.monotonic()
    longest, last, number = max(longest, now - last), now, number + 1
    if writes:
        os.pwrite(file, number.to_bytes(4, "big") * 1024, place)
print(longest, flush=True)
"""


class Pauses:
    """A box with a top layer of each size, on each of the file systems."""

    def __init__(self, program, work, costs):
        self.program, self.work, self.costs = program, work, costs
        self.image, self.point = work / "pauses.xfs", work / "pauses-xfs"
        self.mount = None

    def prepare(self):
        with open(self.image, "wb") as image:
            image.truncate((4 * sum(SIZES) + 1024) * MIB)
        run(["mkfs.xfs", "-q", self.image])
        self.point.mkdir()
        run(["mount", "-o", "loop", self.image, self.point])
        self.homes = {"plain": self.home(self.work / "pauses"), "shared": self.home(self.point)}

    def home(self, place):
        """A home with a box for each size, which has as much in its top layer."""
        place.mkdir(exist_ok=True)
        home = Home(place / "home", place / "pristine")
        for size in SIZES:
            name = f"box{size}"
            home.add_box(name, 2 * size + 64, 1)
            orders = "".join(f"write -q -P 7 {start}M 64M\n" for start in range(0, size, 64))
            run(["qemu-io", "-f", "qcow2", home.disk(name)], input=orders)
        return home

    def turn(self):
        for kind, home in self.homes.items():
            self.mount = Mount(self.program, home, home.path.parent / "mnt")
            self.mount.start()
            for size in SIZES:
                for what in ("idle", "writes"):
                    self.measure(kind, home, size, what)
            self.mount.stop()

    def measure(self, kind, home, size, what):
        """A snapshot of a running box: the pause that its machine sees, and the time of `mkdir`."""
        name = f"box{size}"
        machine = subprocess.Popen(
            [sys.executable, "-c", MACHINE, home.disk(name), what],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        pid_file = home.path / "boxes" / home.ids[name] / "shim.pid"
        snapshot = self.mount.point / name / "snapshots" / what
        try:
            machine.stdout.readline()
            started = Path(f"/proc/{machine.pid}/stat").read_text().rpartition(") ")[2].split()[19]
            pid_file.write_text(f"{machine.pid}\n{started}\n")
            os.mkdir(snapshot)
            longest, _ = machine.communicate("end\n")
            self.costs[f"pause {kind} {size} {what}"].append(Cost(float(longest)))
        finally:
            machine.kill()
            machine.wait()
            pid_file.unlink(missing_ok=True)
        snapshot.rmdir()

    def close(self):
        if self.mount:
            self.mount.stop()
        subprocess.run(["umount", self.point], capture_output=True)
