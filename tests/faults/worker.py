#!/usr/bin/env python3
"""One of many that work in a mount at the same time: snapshots, clones, imports, restores, renames and
deletions of its own, and now and then the same as all others want.

    worker.py MOUNT NUMBER SEED SECONDS BACKUP...

BACKUP is an archive, `a.boxlite`; what is imported from it is known by its stem. The boxes there are at
the beginning are `web` (of the contents `web`) and its snapshot `base` (of the contents `base`).

Prints what it believes at the end, a line of JSON:
    boxes       its boxes, each with the contents it must have and its snapshots with theirs
    snapshots   its snapshots of `web`
    won         names that only one of all can have got
    operations  how many it did
    failed      what should not have happened, a sentence each
"""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

# What many want at the same time, by what they do to it.
CONTESTED = 40


class Worker:
    def __init__(self, mount, number, seed, backups):
        self.mount, self.number = mount, number
        self.random = random.Random(seed * 1000 + number)
        self.backups = backups
        self.boxes, self.snapshots, self.won, self.failed = {}, {}, [], []
        self.operations, self.made = 0, 0
        self.web = mount / "web"

    def name(self, kind):
        self.made += 1
        return f"{kind}{self.number}-{self.made}"

    def run(self, *command):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
        if done.returncode != 0 or done.stderr:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")

    def step(self):
        operation = self.random.choice(
            [self.look] * 3 + [self.read] * 3 + [self.peek]
            + [self.snapshot, self.unsnapshot, self.clone, self.take, self.restore, self.rename, self.rename_snapshot,
               self.snapshot_own, self.delete, self.contest_make, self.contest_remove, self.contest_rename]
        )
        self.operations += 1
        try:
            operation()
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            self.failed.append(f"{operation.__name__}: {error}")

    def own(self):
        return self.random.choice(list(self.boxes)) if self.boxes else None

    # What changes nothing. Other workers' boxes may go meanwhile.

    def look(self):
        for box in os.listdir(self.mount):
            try:
                os.stat(self.mount / box / "export.boxlite")
                (self.mount / box / "box.json").read_bytes()
                os.listdir(self.mount / box / "snapshots")
            except OSError as error:
                # An archive that another worker is writing has a name like a box's, and is a file.
                is_archive = error.errno == errno.ENOTDIR and box.endswith(".boxlite")
                if error.errno not in (errno.ENOENT, errno.ESTALE) and not is_archive:
                    raise

    def read(self):
        form = self.random.choice(["export.boxlite", "export.boxlite", "export.boxlite.zst"])
        state = self.random.choice([self.web / "snapshots" / "base", self.web])
        path = state / form
        for attempt in range(3):
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    file.seek(self.random.randrange(size))
                    file.read(1 << 20)
                return
            except OSError as error:
                # Its size became known meanwhile, as for anyone who looks while it is made: the kernel takes
                # the file for another one then, and who had looked up the old one and not opened it yet is
                # told EIO.
                if error.errno not in (errno.ESTALE, errno.EIO) or attempt == 2:
                    raise

    def peek(self):
        guest = self.web / "snapshots" / "base" / "rootfs"
        if (guest / "etc" / "hostname").read_text() != "web\n":
            raise RuntimeError("a guest's file has other contents")
        with open(self.web / "snapshots" / "base" / "disk.img", "rb") as disk:
            disk.seek(1080)
            if disk.read(2) != b"\x53\xef":
                raise RuntimeError("disk.img has no ext4 superblock")

    # What nobody else touches.

    def snapshot(self):
        name = self.name("s")
        os.mkdir(self.web / "snapshots" / name)
        self.snapshots[name] = "web"

    def unsnapshot(self):
        if self.snapshots:
            name = self.random.choice(list(self.snapshots))
            os.rmdir(self.web / "snapshots" / name)
            del self.snapshots[name]

    def rename_snapshot(self):
        if self.snapshots:
            name, new = self.random.choice(list(self.snapshots)), self.name("r")
            os.rename(self.web / "snapshots" / name, self.web / "snapshots" / new)
            self.snapshots[new] = self.snapshots.pop(name)

    def clone(self):
        if len(self.boxes) >= 4:
            return self.delete()
        source, contents = self.random.choice([(self.web / "snapshots" / "base", "base"), (self.web / "export.boxlite", "web")])
        name = self.name("c")
        # A file of web becomes a box by its name; `cp -r web` would take along what others add meanwhile.
        target = self.mount / (name if source.is_dir() else f"{name}.boxlite")
        self.run("cp", "-r", source, target)
        self.boxes[name] = {"contents": contents, "snapshots": {}}

    def take(self):
        if len(self.boxes) >= 4:
            return self.delete()
        backup, name = self.random.choice(self.backups), self.name("i")
        self.run("cp", backup, self.mount / f"{name}.boxlite")
        self.boxes[name] = {"contents": backup.stem, "snapshots": {}}

    def restore(self):
        if box := self.own():
            if self.random.random() < 0.5:
                source, contents = self.web / "snapshots" / "base" / "export.boxlite", "base"
            else:
                source = self.random.choice(self.backups)
                contents = source.stem
            self.run("cp", source, self.mount / box / "export.boxlite")
            self.boxes[box]["contents"] = contents

    def snapshot_own(self):
        if box := self.own():
            name = self.name("t")
            os.mkdir(self.mount / box / "snapshots" / name)
            self.boxes[box]["snapshots"][name] = self.boxes[box]["contents"]

    def rename(self):
        if box := self.own():
            new = self.name("m")
            os.rename(self.mount / box, self.mount / new)
            self.boxes[new] = self.boxes.pop(box)

    def delete(self):
        if box := self.own():
            self.run("rm", "-r", self.mount / box)
            del self.boxes[box]

    # What only one can get.

    def contest_make(self):
        name = f"make-{self.random.randrange(CONTESTED)}"
        self.contest(lambda: os.mkdir(self.web / "snapshots" / name), name, errno.EEXIST)

    def contest_remove(self):
        name = f"remove-{self.random.randrange(CONTESTED)}"
        self.contest(lambda: os.rmdir(self.web / "snapshots" / name), name, errno.ENOENT)

    def contest_rename(self):
        name = f"rename-{self.random.randrange(CONTESTED)}"
        new = self.name("k")
        rename = lambda: os.rename(self.web / "snapshots" / name, self.web / "snapshots" / new)
        if self.contest(rename, name, errno.ENOENT):
            self.snapshots[new] = "web"

    def contest(self, change, name, lost):
        try:
            change()
        except OSError as error:
            if error.errno != lost:
                raise
            return False
        self.won.append(name)
        return True


def main():
    mount, number, seed, seconds, *backups = sys.argv[1:]
    worker = Worker(Path(mount), int(number), int(seed), [Path(backup) for backup in backups])
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and len(worker.failed) < 5:
        worker.step()
    fields = ("boxes", "snapshots", "won", "operations", "failed")
    print(json.dumps({field: getattr(worker, field) for field in fields}))


main()
