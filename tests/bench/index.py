"""What it costs to know who reads from whom in a home of very many layers: 1,000 boxes with 10
snapshots each, as BoxLite makes them, and one box with none, which is changed."""

import json
import os
import sqlite3
import struct
import time

from homes import Home, Mount, write_sparse
from measure import Cost, can_drop_caches, cost_of_call, run, settle

BOXES, SNAPSHOTS = 1_000, 10
IN_A_ROW = 5


class Index:
    """Such a home."""

    def __init__(self, program, work, costs):
        self.costs = costs
        self.home = Home(work / "layers", work / "layers-pristine")
        self.mount = Mount(program, self.home, work / "layers-mnt")

    def prepare(self):
        self.home.add_box("web", 64, 1)
        self.home.multiply("web", BOXES)
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
        """A mount of it with nothing in memory, and snapshots of the box that has none."""
        settle(cold=can_drop_caches())
        begin = time.monotonic()
        self.mount.start(fresh=True)
        self.costs["index"].append(Cost(time.monotonic() - begin))
        snapshots = self.mount.point / "web" / "snapshots"
        for number in range(IN_A_ROW):
            run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 64k", self.home.disk("web")])
            settle()
            cost = cost_of_call(lambda: os.mkdir(snapshots / str(number)), self.mount)
            self.costs["mkdir among many" if number else "mkdir among many, first"].append(cost)
        self.mount.stop()
        self.home.reset()
