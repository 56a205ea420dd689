"""What changes cost in homes of more and more boxes, each with 10 snapshots, as BoxLite makes them;
and in a box with hundreds of snapshots."""

import json
import os
import sqlite3
import struct
import time

from homes import Home, Mount, write_sparse
from measure import Cost, can_drop_caches, cost_of, cost_of_call, run, settle

SIZES = (1, 1_000, 10_000)
SNAPSHOTS = 10
# The snapshots of the box with very many, and how many of them are deleted.
MANY, DELETED = 300, 200
CHANGES = (
    "first snapshot",
    "first deletion of a snapshot",
    "later snapshot",
    "snapshot",
    "clone of a snapshot",
    "clone",
    "restore",
    "rename of a box",
    "deletion of a snapshot",
    "removal of a box",
)


class Growth:
    """A home of so many boxes, of which one without snapshots is changed."""

    def __init__(self, program, work, costs, boxes):
        self.costs, self.boxes = costs, boxes
        self.home = Home(work / f"layers-{boxes}", work / f"layers-{boxes}-pristine")
        self.mount = Mount(program, self.home, work / f"layers-{boxes}-mnt")

    def prepare(self):
        self.home.add_box("web", 64, 1)
        self.home.multiply("web", self.boxes)
        database = sqlite3.connect(self.home.path / "db" / "boxlite.db")
        with database:
            boxes = [box for (box,) in database.execute("SELECT id FROM box_config WHERE name != 'web'")]
            for box in boxes:
                self.stack(database, box)
        database.close()
        self.home.keep()

    def stack(self, database, box):
        """Gives a box its snapshots: each is a layer on the one before, the live disk on the last."""
        live = self.home.disk_of(box)
        first, above = live.read_bytes(), None
        for number in range(SNAPSHOTS):
            name, snapshot = f"s{number}", f"{box[-5:]}{number:03}"
            disk = self.home.path / "boxes" / box / "snapshots" / name / "disk.qcow2"
            write_sparse(disk, above or first)
            record = {
                "id": snapshot, "box_id": box, "name": name, "created_at": number,
                "base_path": str(disk), "container_disk_bytes": 64 << 20, "size_bytes": disk.stat().st_size,
            }
            row = (snapshot, box, name, number, json.dumps(record))
            database.execute("INSERT INTO snapshot (id, box_id, name, created_at, json) VALUES (?, ?, ?, ?, ?)", row)
            above = self.above(disk)
        live.unlink()
        live.write_bytes(above)

    def above(self, disk):
        """The bytes of an empty overlay on a layer, by qemu-img the first time; then its name is changed."""
        if not hasattr(self, "overlay"):
            made = self.home.path / "overlay"
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", made])
            self.overlay = made.read_bytes()
            made.unlink()
        name, overlay = str(disk).encode(), bytearray(self.overlay)
        (offset,) = struct.unpack_from(">Q", overlay, 8)
        struct.pack_into(">I", overlay, 16, len(name))
        overlay[offset : offset + len(name)] = name
        return bytes(overlay)

    def turn(self):
        """A mount of it with nothing in memory, then each change, in the box that is changed."""
        settle(cold=can_drop_caches())
        begin = time.monotonic()
        self.mount.start(fresh=True)
        os.listdir(self.mount.point)
        self.costs[f"mount {self.boxes}"].append(Cost(time.monotonic() - begin))
        point = self.mount.point
        web, copy, clone = point / "web", point / "copy", point / "clone"
        a, b = web / "snapshots" / "a", web / "snapshots" / "b"
        self.change("first snapshot", lambda: os.mkdir(b))
        # This one waits until all headers were read.
        self.time("first deletion of a snapshot", lambda: os.rmdir(b))
        self.change("later snapshot", lambda: os.mkdir(a))
        self.change("snapshot", lambda: os.mkdir(b))
        self.time("clone of a snapshot", lambda: run(["cp", "-r", a, copy]))
        self.time("clone", lambda: run(["cp", "-r", web, clone]))
        self.time("restore", lambda: run(["cp", a / "export.boxlite", web / "export.boxlite"]))
        self.time("rename of a box", lambda: os.rename(copy, point / "other"))
        self.time("deletion of a snapshot", lambda: os.rmdir(b))
        self.time("removal of a box", lambda: run(["rm", "-r", point / "other"]))
        self.mount.stop()
        self.home.reset()

    def change(self, what, work):
        """Times a snapshot of the box after its guest has written."""
        run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 64k", self.home.disk("web")])
        self.time(what, work)

    def time(self, what, work):
        settle()
        self.costs[f"{what} {self.boxes}"].append(cost_of_call(work, self.mount))


class Long:
    """A box with hundreds of snapshots. What is timed is the whole, by the snapshot."""

    def __init__(self, program, work, costs):
        self.costs = costs
        self.home = Home(work / "long", work / "long-pristine")
        self.mount = Mount(program, self.home, work / "long-mnt")

    def prepare(self):
        self.home.add_box("web", 64, 1)
        self.mount.start(fresh=True)
        for number in range(MANY):
            os.mkdir(self.mount.point / "web" / "snapshots" / f"s{number:03}")
            run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {number % 60}M 64k", self.home.disk("web")])

    def turn(self):
        if self.mount.process is None:
            self.mount.start(fresh=True)
        web, copy = self.mount.point / "web", self.mount.point / "copy"
        deleted = [copy / "snapshots" / f"s{number:03}" for number in range(DELETED)]
        self.time("copy of 300", MANY, ["cp", "-r", web, copy])
        self.time("deletion among 300", DELETED, ["rm", "-r", *deleted])
        self.time("removal of 100", MANY - DELETED, ["rm", "-r", copy])

    def time(self, what, number, argv):
        settle()
        cost = cost_of(argv, self.mount)
        self.costs[what].append(Cost(cost.wall / number, cost.cpu / number))
