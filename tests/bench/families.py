"""A box with its snapshots that comes back from a backup of directories: how long that takes, and how
much room it needs beside the original."""

import os
import shutil

from homes import MIB, Home, Mount
from measure import Cost, cost_of, run, settle

VIRTUAL, DATA = 256, 60  # MiB
SNAPSHOTS, CHANGED = 12, 2  # MiB that each snapshot differs from the one before


class Families:
    """A home with such a box, and the backup of it."""

    def __init__(self, program, work, costs):
        self.costs, self.backup = costs, work / "family"
        self.home = Home(work / "families", work / "families-pristine")
        self.mount = Mount(program, self.home, work / "families-mnt")
        self.plain = work / "family-copy"

    def prepare(self):
        """Makes the box and the backup, and removes the box."""
        self.home.add_box("seed", 64, 1)
        self.home.add_box("web", VIRTUAL, DATA)
        empty = self.room()
        for number in range(SNAPSHOTS):
            self.home.change("web", CHANGED * MIB)
            self.mount.start(fresh=True)
            os.mkdir(self.mount.point / "web" / "snapshots" / f"s{number:02}")
            self.mount.stop()
        # The data under the live disk is not in BoxLite's boxes, but in its image.
        image = self.home.path / "images" / "disk-images" / "web.ext4"
        original = self.room() - empty + blocks(self.home.disk("web")) + blocks(image)
        self.costs["room original"].append(Cost(0, disk=original))
        self.mount.start(fresh=True)
        run(["cp", "-r", self.mount.point / "web", self.backup])
        run(["rm", "-r", self.mount.point / "web"])
        self.mount.stop()
        self.home.keep()

    def turn(self):
        """The whole box by us, and the same files by cp to a directory, both on disk at the end."""
        script = 'cp -r "$1" "$2" && sync'
        self.mount.start(fresh=True)
        settle()
        empty = self.room()
        into = self.mount.point / "web"
        cost = cost_of(["bash", "-c", script, "-", self.backup, into], self.mount)
        self.costs["family"].append(cost)
        self.costs["room family"].append(Cost(0, disk=self.room() - empty))
        self.mount.stop()
        settle()
        self.costs["cp family"].append(cost_of(["bash", "-c", script, "-", self.backup, self.plain]))
        shutil.rmtree(self.plain)
        self.home.reset()

    def room(self):
        """The bytes that the disks of the home take, each file once."""
        files = {}
        for part in ("boxes", "bases"):
            for path in (self.home.path / part).rglob("*.qcow2"):
                files[path.stat().st_ino] = blocks(path)
        return sum(files.values())


def blocks(path):
    return path.stat().st_blocks * 512
