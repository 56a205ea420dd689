"""The homes that are measured, and the mount on one.

A box is made as BoxLite makes one: a raw, sparse image in `images/disk-images`, and the live disk is
an overlay on it. BoxLite makes its row by importing a small archive; then the overlay takes the place
of that archive's disk.
"""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Failed, Memory, run

MIB = 1 << 20
CLUSTER = 64 << 10
WHEEL = Path(__file__).parent.parent / "wheel.py"


class Home:
    """A home that can be put back to how it was first."""

    def __init__(self, path, pristine):
        self.path, self.pristine = path, pristine
        self.ids, self.places, self.changes = {}, {}, 0
        path.mkdir()

    def disk(self, name):
        """The live disk of a box that was there when the home was made."""
        return self.disk_of(self.ids[name])

    def disk_of(self, box_id):
        return self.path / "boxes" / box_id / "disks" / "disk.qcow2"

    def add_box(self, name, virtual, data):
        """A box of `virtual` MiB with `data` MiB of the machine's files, a tenth of them overwritten."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as place:
            seed = Path(place, "seed.boxlite")
            wheel(self.path, "make-archive", seed, name, "--size", "8M")
            self.ids[name] = wheel(self.path, "import", seed, name)["id"]
            tree = Path(place, "tree")
            real_files(tree, data * MIB)
            base = self.path / "images" / "disk-images" / f"{name}.ext4"
            run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", tree, base, f"{virtual}M"])
        # Now: what of the image is data depends on what was read of it, on ext4.
        self.places[name] = data_clusters(base)
        disk = self.disk(name)
        disk.unlink()
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", disk])
        self.change(name, data * MIB // 10)

    def change(self, name, size, piece=MIB):
        """Overwrites `size` bytes of a box's data as its guest would, in pieces at random places.

        What is written is random, and the same in every run.
        """
        dice = random.Random(self.changes)
        self.changes += 1
        piece = min(piece, size)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as place:
            orders = []
            for number in range(size // piece):
                Path(place, str(number)).write_bytes(dice.randbytes(piece))
                orders.append(f"write -q -s {number} {dice.choice(self.places[name])} {piece}\n")
            # The directory is the working directory, for qemu-io knows no quotes.
            run(["qemu-io", "-f", "qcow2", self.disk(name)], input="".join(orders), cwd=place)

    def keep(self):
        """How the home is now is what `reset` brings back."""
        self.pristine.mkdir()
        for part in ("db", "boxes"):
            run(["cp", "-a", self.path / part, self.pristine])

    def reset(self):
        """The home as it was first; nothing may have it open."""
        for part in ("db", "boxes", ".boxlitefs"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        for base in (self.path / "bases").iterdir():
            base.unlink()
        for part in ("db", "boxes"):
            run(["cp", "-a", self.pristine / part, self.path])

    def forget(self):
        """Leaves boxlitefs nothing it may have remembered about exports."""
        for file in (self.path / "db").glob("boxlitefs.db*"):
            file.unlink()
        shutil.rmtree(self.path / ".boxlitefs", ignore_errors=True)

    def last_words(self):
        """The end of what boxlitefs logged."""
        log = self.path / ".boxlitefs" / "log"
        return "".join(log.read_text().splitlines(keepends=True)[-3:]) if log.exists() else ""

    def multiply(self, name, number):
        """Adds boxes until there are `number`, each a row like that of `name` and an overlay.

        BoxLite itself would need an hour for it.
        """
        database = sqlite3.connect(self.path / "db" / "boxlite.db")
        query = (
            "SELECT created_at, config.json, status, state.json FROM box_config config "
            "JOIN box_state state USING (id) WHERE id = ?"
        )
        created, config, status, state = database.execute(query, (self.ids[name],)).fetchone()
        config, state = json.loads(config), json.loads(state)
        disk = self.disk(name).read_bytes()
        with database:
            for n in range(1, number):
                box_id, config["name"] = f"bench{n:07}", f"box{n:05}"
                config |= {"id": box_id, "box_home": str(self.path / "boxes" / box_id)}
                config["container"] = {"id": f"{n:064x}"}
                state["lock_id"] = 1_000_000 + n
                row = (box_id, config["name"], created, json.dumps(config))
                database.execute("INSERT INTO box_config VALUES (?, ?, ?, ?)", row)
                row = (box_id, status, json.dumps(state))
                database.execute("INSERT INTO box_state VALUES (?, ?, NULL, ?)", row)
                write_sparse(self.disk_of(box_id), disk)
                (self.path / "locks" / str(state["lock_id"])).touch()
        database.close()


class Mount:
    """A home mounted in the foreground of a process of ours, so that it is known which one it is."""

    def __init__(self, program, home, point):
        self.program, self.home, self.point = program, home, point
        self.process = None
        point.mkdir(exist_ok=True)

    @property
    def pid(self):
        return self.process.pid

    def start(self, fresh=False):
        """Mounts anew; `fresh` without anything remembered from before."""
        self.stop()
        if fresh:
            self.home.forget()
        self.process = subprocess.Popen(
            [self.program, "mount", "-f", self.home.path, self.point],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        while not os.path.ismount(self.point):
            if self.process.poll() is not None:
                raise Failed(f"boxlitefs mount ended with status {self.process.returncode}")
            time.sleep(0.002)
        os.stat(self.point / ".boxlite")  # it answers
        self.idle = Memory(self.pid).idle

    def stop(self):
        """Unmounts; harmless when nothing is mounted."""
        if self.process is None:
            return
        done = subprocess.run([self.program, "unmount", self.point], capture_output=True)
        if done.returncode != 0:
            self.process.terminate()  # unmounts also while files are open
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            run(["fusermount3", "-uz", self.point])
            raise
        self.process = None


def wheel(home, *words):
    """A command of tests/wheel.py, BoxLite itself; its answer."""
    return json.loads(run([sys.executable, WHEEL, home, *map(str, words)]))


def real_files(tree, size):
    """Copies files of the machine until they are `size` bytes: what compresses as boxes do."""
    found = 0
    for directory, below, names in os.walk("/usr"):
        below.sort()
        for name in sorted(names):
            source = os.path.join(directory, name)
            if found >= size:
                return
            if not os.path.isfile(source) or os.path.islink(source) or not os.access(source, os.R_OK):
                continue
            length = os.path.getsize(source)
            if found + length > size + MIB:
                continue  # one large file is not to be the box
            target = tree / os.path.relpath(source, "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            found += length
    raise Failed(f"/usr has only {found // MIB} MiB of files: take a smaller BENCH_SIZE")


def data_clusters(image):
    """Offsets of the clusters of a raw image that hold data, but for those in its last MiB."""
    places, at = [], 0
    with open(image, "rb") as file:
        while True:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole follows
                return [place for place in places if place <= os.path.getsize(image) - MIB]
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            places += range(begin // CLUSTER * CLUSTER, at - CLUSTER + 1, CLUSTER)


def write_sparse(path, data, piece=4096):
    """Makes a file of `data` and the directory it is in; pieces of zeros take no space."""
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), piece):
            if (part := data[at : at + piece]).strip(b"\0"):
                os.pwrite(file.fileno(), part, at)
