#!/usr/bin/env python3
"""Measures boxlitefs beside BoxLite, qemu-img and cp, and prints a table.

    bench.py --boxlitefs PROGRAM --out DIRECTORY [--update-docs]

In the environment: BENCH_SIZE, the MiB of real files in the large box (2150); BENCH_ROUNDS, the
rounds that count (3), after one that does not; BENCH_WORK, an existing directory to work in.

Everything that is compared takes its turn in the same round, and every figure is the median of its
rounds. docs/performance.md says what each row means. No goal is asserted: the exit status is 1 only
if something failed to run or made wrong bytes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

import table
from homes import MIB, Home, Mount
from measure import (
    Cost, Failed, Space, can_drop_caches, cost_of, mean, median, processor_time, run, settle,
)
from table import Row

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = (578, 3)  # MiB of virtual disk and of data: a box that has hardly been used
BOXES = 10_000
# Snapshots of one box in a row: more would make the chain so long that the disk is written out.
IN_A_ROW = 5
SETS = 4
CORES = os.cpu_count()


class Bench:
    """One run: the homes, the mount, and the costs found so far, by what was measured."""

    def __init__(self, options, work):
        self.options, self.work = options, work
        self.size = int(os.environ.get("BENCH_SIZE") or 2150)
        self.rounds = int(os.environ.get("BENCH_ROUNDS") or 3)
        self.costs, self.absent = defaultdict(list), {}
        self.sizes, self.failures, self.proven = {}, [], set()
        self.windows = None  # bytes of the disk, compressed in windows
        self.out, self.kept = work / "out", work / "kept"
        self.out.mkdir(), self.kept.mkdir()
        self.home = Home(work / "home", work / "pristine")
        self.crowd = Home(work / "crowd", work / "crowd-pristine")
        self.mount = Mount(options.boxlitefs, self.home, work / "mnt")
        self.crowd_mount = Mount(options.boxlitefs, self.crowd, work / "crowd-mnt")

    # What every measurement is made of.

    def note(self, key, *costs):
        self.costs[key] += costs

    def cp(self, key, source, cold=False, proof=None):
        """Times `cp` out of the mount. `proof` names the box whose disk must be in the copy."""
        target = self.out / "copy"
        settle(cold)
        # Nothing looks at the source before: a mere stat has the export planned.
        try:
            self.note(key, cost_of(["cp", source, target], self.mount, self.work, [target]))
        except Failed as error:
            if "No such file" not in str(error):
                raise
            self.absent[key] = "not there"
            return
        self.sizes[key] = target.stat().st_size
        kept = self.kept / str(key).split()[0]
        if key.endswith(("warm", "cold")) and kept.exists() and kept.stat().st_size != self.sizes[key]:
            self.failures.append(
                f"{key}: {self.sizes[key]} bytes, but {kept.stat().st_size} when the same state was exported first"
            )
        if proof:
            self.prove(key, target, self.home.disk(proof))
        target.unlink()

    def beside(self, key, argv, cold=False):
        """Times a program that has nothing to do with the mount and makes the file `copy`."""
        target = self.out / "copy"
        settle(cold)
        self.note(key, cost_of(argv, place=self.work, outputs=[target]))
        target.unlink()

    def theirs(self, key, kind, *words, home=None, output=None):
        """BoxLite's turn, in a process of its own; nothing of ours may have the home meanwhile."""
        self.mount.stop()
        home = home or self.home
        argv = [sys.executable, HERE / "theirs.py", home.path, kind, *map(str, words)]
        with Space(self.work, [output] if output else []) as space:
            done = subprocess.run(argv, capture_output=True, text=True)
        # About one of its processes in five aborts when all is done: what it printed counts.
        try:
            costs = json.loads(done.stdout)
        except ValueError:
            raise Failed(f"BoxLite, {kind}: {done.stderr.strip()[-2000:]}") from None
        for cost in costs:
            self.note(f"start {kind}", Cost(cost.pop("start")))
        self.note(key, *(Cost(**cost, disk=space.most if output else None) for cost in costs))

    def their_export(self, key, box, cold=False, keep=None):
        """BoxLite exports a box; the archive is kept as `keep` or goes."""
        place = self.out / "theirs"
        place.mkdir()
        settle(cold)
        self.theirs(key, "export", box, place, output=place)
        (archive,) = place.iterdir()
        if keep:
            archive.rename(keep)
        shutil.rmtree(place)

    def prove(self, kind, archive, disk):
        """Once for each kind: the archive's disk, as foreign programs read it, is the box's."""
        if kind in self.proven:
            return
        self.proven.add(kind)
        copy = self.out / "proof.qcow2"
        with open(archive, "rb") as file:
            compressed = file.read(4) == b"\x28\xb5\x2f\xfd"
        unpack = "zstd -dcq" if compressed else "cat"
        run(["bash", "-c", f'set -o pipefail; {unpack} "$1" | tar -xO disk.qcow2 > "$2"', "-", archive, copy])
        self.compare(kind, copy, disk)
        copy.unlink()

    def compare(self, kind, one, other):
        done = subprocess.run(
            ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", one, other],
            capture_output=True, text=True,
        )
        if done.returncode != 0:
            self.failures.append(f"{kind}: wrong bytes: {done.stdout.strip()} {done.stderr.strip()}")

    # The turns. Each begins with the home as it was first.

    def exports(self, cold):
        """The large box, met for the first time and again: ours, BoxLite's, qemu's, and copies."""
        state = "cold" if cold else "warm"
        web = self.mount.point / "web"
        self.mount.start(fresh=True)
        self.cp(f"plain first {state}", web / "export.boxlite", cold, proof="web")
        self.cp(f"plain again {state}", web / "export.boxlite", cold)
        compressed = web / "export.boxlite.zst"
        self.mount.start(fresh=True)
        self.cp(f"zst first {state}", compressed, cold, proof="web")
        self.cp(f"zst again {state}", compressed, cold)
        self.mount.start()  # what was spooled is gone, the size is known
        self.cp(f"zst known {state}", compressed, cold, proof="web")
        self.mount.stop()
        self.their_export(f"boxlite export {state}", "web", cold)
        self.qemu(f"qemu {state}", cold)
        for kind in ("plain", "zst"):
            if (kept := self.kept / kind).exists():
                copy = ["cp", "--reflink=never", kept, self.out / "copy"]
                self.beside(f"cp {kind} {state}", copy, cold)

    def qemu(self, key, cold):
        """What one would do without either: flatten, tar and compress."""
        script = (
            'set -eo pipefail; qemu-img convert -O qcow2 "$1" "$2/disk.qcow2"; '
            f'tar -C "$2" -cf - disk.qcow2 | zstd -q -3 -T{CORES} -o "$3"; rm "$2/disk.qcow2"'
        )
        argv = ["bash", "-c", script, "-", self.home.disk("web"), self.out, self.out / "copy"]
        self.beside(key, argv, cold)

    def changes(self):
        """The large box after one percent of it changed, which an export has to notice."""
        web = self.mount.point / "web"
        plain, compressed = web / "export.boxlite", web / "export.boxlite.zst"
        percent = self.size * MIB // 100
        self.mount.start(fresh=True)
        run(["cp", plain, self.out / "copy"])
        self.home.change("web", percent)
        self.cp("plain changed", plain, proof="web")
        if os.path.lexists(compressed):
            run(["cp", compressed, self.out / "copy"])
            self.home.change("web", percent)
            self.cp("zst changed", compressed, proof="web")
            self.home.change("web", percent)
            self.exact_size("exact size", compressed)
            self.home.change("web", percent, piece=64 << 10)
            self.exact_size("exact size scattered", compressed)
            self.cp("zst scattered", compressed, proof="web")
        else:
            for key in ("zst changed", "exact size", "exact size scattered"):
                self.absent[key] = "not there"
        (self.out / "copy").unlink(missing_ok=True)
        self.mount.stop()
        self.their_export("boxlite changed", "web")

    def exact_size(self, key, path):
        """How long the size has to be waited for: open and fstat, as every copy tool begins."""
        settle()
        served, begun = processor_time(self.mount.pid), time.perf_counter()
        file = os.open(path, os.O_RDONLY)
        os.fstat(file)
        wall = time.perf_counter() - begun
        os.close(file)
        self.note(key, Cost(wall, processor_time(self.mount.pid) - served))

    def small(self):
        """A box with hardly anything in it: what is not proportional to data."""
        self.mount.start(fresh=True)
        self.cp("plain small", self.mount.point / "small" / "export.boxlite", proof="small")
        self.mount.start(fresh=True)
        self.cp("zst small", self.mount.point / "small" / "export.boxlite.zst", proof="small")
        self.their_export("boxlite small", "small")

    def imports(self, kind):
        """An archive of one kind becomes a box: `theirs`, `zst` or `plain`."""
        archive, copy = self.kept / kind, self.out / "copy"
        if not archive.exists():
            self.absent[f"import {kind}"] = "not there"
            return
        self.mount.start(fresh=True)
        settle()
        target = self.mount.point / "imported.boxlite"
        cost = cost_of(["cp", archive, target], self.mount, self.work)
        box = os.getxattr(self.mount.point / "imported", "user.boxlite.id").decode()
        cost.disk = max(0, cost.disk - self.home.disk_of(box).stat().st_blocks * 512)
        self.note(f"import {kind}", cost)
        if f"import {kind}" not in self.proven:
            self.proven.add(f"import {kind}")
            self.compare(f"import {kind}", self.home.disk_of(box), self.home.disk("web"))
        self.mount.stop()
        settle()
        self.theirs(f"boxlite import {kind}", "import", archive, "theirs")
        self.home.reset()
        unpack = "cp --reflink=never" if kind == "plain" else "zstd -dqf"
        into = '"$2"' if kind == "plain" else '-o "$2"'
        for key, end in (("unpack", ""), ("unpack and flush", ' && sync "$2"')):
            argv = ["bash", "-c", f'{unpack} "$1" {into}{end}', "-", archive, copy]
            self.beside(f"{key} {kind}", argv)

    def snapshots(self, box):
        """`mkdir` beside BoxLite's snapshot.create, each of a box that changed."""
        self.mount.start()
        for number in range(IN_A_ROW):
            self.touch(box)
            name = self.mount.point / box / "snapshots" / str(number)
            settle()
            served, begun = processor_time(self.mount.pid), time.perf_counter()
            os.mkdir(name)
            wall = time.perf_counter() - begun
            self.note(f"mkdir {box}", Cost(wall, processor_time(self.mount.pid) - served))
        settle()
        begun = time.perf_counter()
        os.mkdir(name.with_name("unchanged"))
        self.note(f"mkdir unchanged {box}", Cost(time.perf_counter() - begun))
        self.mount.stop()
        self.home.reset()
        self.theirs(f"boxlite snapshot {box}", "snapshot", box, IN_A_ROW, *self.touching(box))

    def clones(self, box):
        """`cp -r` of a box beside BoxLite's clone_box, each of a box that changed."""
        self.mount.start()
        for number in range(IN_A_ROW):
            self.touch(box)
            settle()
            clone = self.mount.point / f"clone-{number}"
            self.note(f"clone {box}", cost_of(["cp", "-r", self.mount.point / box, clone], self.mount))
        if f"clone {box}" not in self.proven:
            self.proven.add(f"clone {box}")
            made = os.getxattr(clone, "user.boxlite.id").decode()
            self.compare(f"clone {box}", self.home.disk_of(made), self.home.disk(box))
        self.mount.stop()
        self.home.reset()
        self.theirs(f"boxlite clone {box}", "clone", box, IN_A_ROW, *self.touching(box))

    def restores(self):
        """`cp` of a snapshot's export over the box's beside BoxLite's snapshot.restore."""
        self.mount.start()
        web = self.mount.point / "web"
        (web / "snapshots" / "before").mkdir()
        argv = ["cp", web / "snapshots" / "before" / "export.boxlite", web / "export.boxlite"]
        try:
            for _ in range(IN_A_ROW):
                self.touch("web")
                settle()
                self.note("restore", cost_of(argv, self.mount))
        except Failed as error:
            if "Operation not permitted" not in str(error):
                raise
            self.absent["restore"] = "not there yet"
        self.mount.stop()
        self.home.reset()
        self.theirs("boxlite restore", "restore", "web", IN_A_ROW, *self.touching("web"))

    def listing(self):
        """`ls -l` of a home with many boxes, just mounted and again, beside list_info."""
        self.crowd_mount.start(fresh=True)
        settle()
        argv = ["ls", "-l", self.crowd_mount.point]
        self.note("ls first", cost_of(argv, self.crowd_mount))
        self.note("ls again", cost_of(argv, self.crowd_mount))
        shown = len(os.listdir(self.crowd_mount.point))
        if shown != BOXES:
            self.failures.append(f"ls: {shown} boxes instead of {BOXES}")
        self.crowd_mount.stop()
        self.theirs("boxlite list", "list", home=self.crowd)

    def touching(self, box):
        """The command that changes 64 KiB of a box, so that a layer is there to be frozen."""
        return ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 64k", self.home.disk(box)]

    def touch(self, box):
        run(self.touching(box))

    def floor(self):
        """What the processor needs at least, with the same crates on the same bytes."""
        settle()
        said = run(["cargo", "bench", "-q", "--bench", "floor", "--", self.kept / "disk.qcow2"], cwd=ROOT)
        found = json.loads(said.strip().splitlines()[-1])
        bound = max(found["sha_user"], (found["zstd_user"] + found["sha_user"]) / CORES)
        self.note("floor", Cost(bound))
        self.windows = found["compressed"]
        self.note("sha", Cost(found["sha_wall"], found["sha_user"]))
        self.note("zstd", Cost(found["zstd_user"]))

    # The run.

    def prepare(self):
        """Makes the homes and the archives that are copied and imported."""
        say(f"making a box of {self.size} MiB, a small one, and {BOXES} boxes in {self.work}")
        self.home.add_box("web", max(10 << 10, self.size * 5 // 4 + 64), self.size)
        self.home.add_box("small", *SMALL)
        self.home.keep()
        self.crowd.add_box("web", 64, 1)
        self.crowd.multiply("web", BOXES)
        self.mount.start(fresh=True)
        web = self.mount.point / "web"
        run(["cp", web / "export.boxlite", self.kept / "plain"])
        with open(self.kept / "disk.qcow2", "wb") as disk:
            subprocess.run(["tar", "-xOf", self.kept / "plain", "disk.qcow2"], stdout=disk, check=True)
        if os.path.lexists(web / "export.boxlite.zst"):
            run(["cp", web / "export.boxlite.zst", self.kept / "zst"])
        self.mount.stop()
        self.their_export("kept", "web", keep=self.kept / "theirs")
        self.prove("BoxLite's export", self.kept / "theirs", self.home.disk("web"))
        self.costs.clear()

    def turns(self):
        yield self.floor
        yield lambda: self.exports(cold=False)
        if can_drop_caches():
            yield lambda: self.exports(cold=True)
        yield self.changes
        yield self.small
        for kind in ("theirs", "zst", "plain"):
            yield lambda kind=kind: self.imports(kind)
        for box in ("web", "small"):
            for _ in range(SETS):
                yield lambda box=box: self.snapshots(box)
            yield lambda box=box: self.clones(box)
        yield self.restores
        yield self.listing

    def round(self):
        for turn in self.turns():
            try:
                self.home.reset()
                turn()
            except Exception:  # the others still have their turn
                self.failures.append(traceback.format_exc().strip())
            finally:
                self.mount.stop()
                self.crowd_mount.stop()
                shutil.rmtree(self.out)
                self.out.mkdir()

    def run(self):
        self.prepare()
        for number in range(self.rounds + 1):
            say(f"round {number} of {self.rounds}" + ("" if number else ", which does not count"))
            if number == 1:
                self.costs.clear()
            self.round()

    def close(self):
        for mount in (self.mount, self.crowd_mount):
            try:
                mount.stop()
            except Exception as error:
                self.failures.append(f"{mount.point} could not be unmounted: {error}")

    # The table.

    def row(self, label, key, against="", that=None, goal=None):
        """A row of times; `that` is the key of what it is compared with, or a number of seconds."""
        theirs = self.costs.get(that, []) if isinstance(that, str) else []
        return Row(
            label, median(self.costs.get(key, [])), against,
            median(theirs) if isinstance(that, str) else that, goal,
            mean(self.costs.get(key, []), "cpu"), mean(theirs, "cpu"),
            absent=self.absent.get(key, "not measured"),
        )

    def bytes_row(self, label, key, what, against="", that=None, goal=None):
        ours = median(self.costs.get(key, []), what)
        return Row(label, ours, against, that, goal, unit="bytes", absent=self.absent.get(key, "not measured"))

    def seconds(self, key):
        return median(self.costs.get(key, []))

    def rows(self):
        yield from self.export_rows("warm")
        if can_drop_caches():
            yield from self.export_rows("cold")
        yield from self.changed_and_small_rows()
        yield from self.import_rows()
        yield from self.copy_on_write_rows()
        yield from self.space_rows()

    def export_rows(self, state):
        first, boxlite, qemu = f"zst first {state}", f"boxlite export {state}", f"qemu {state}"
        label = f".zst, first contact, {state}"
        bound = plus(self.seconds("floor"), self.seconds(f"cp zst {state}"))
        cold = state == "cold"
        if not cold:
            yield self.row(label, first, "floor + `cp` of the archive", bound, 1.25)
        yield self.row(label, first, "BoxLite export", boxlite, 1 / 3 if cold else 1 / 2.5)
        yield self.row(label, first, "qemu-img, tar, zstd", qemu)
        if not cold:
            yield self.row(".zst, size known", f"zst known {state}", "floor + `cp` of the archive", bound, 1.1)
        again = "`cp` of a plain file of that size"
        yield self.row(f".zst, again unchanged, {state}", f"zst again {state}", again, f"cp zst {state}", 1.3)
        slower = max(filter(None, (self.seconds(f"cp plain {state}"), self.seconds("sha"))), default=None)
        yield self.row(
            f"plain, first contact, {state}", f"plain first {state}", "the slower of `cp` and sha256", slower, 1.5
        )
        yield self.row(f"plain, first contact, {state}", f"plain first {state}", "BoxLite export", boxlite)
        yield self.row(f"plain, again unchanged, {state}", f"plain again {state}", "`cp`", f"cp plain {state}")

    def changed_and_small_rows(self):
        yield self.row("plain, after 1 % changed", "plain changed", "BoxLite export", "boxlite changed")
        yield self.row(".zst, after 1 % changed", "zst changed", "BoxLite export", "boxlite changed")
        yield self.row("exact size of .zst, after 1 % changed", "exact size", "0.3 s", 0.3, 1)
        yield self.row("the same, changed in pieces of 64 KiB", "exact size scattered", "0.3 s", 0.3)
        yield self.row(".zst of the 3 MB box", "zst small", "BoxLite export", "boxlite small", 1 / 5)
        yield self.row("plain of the 3 MB box", "plain small", "BoxLite export", "boxlite small")

    def import_rows(self):
        kinds = {"theirs": "BoxLite's archive", "zst": "our .zst", "plain": "our plain archive"}
        for kind, name in kinds.items():
            program = "`cp`" if kind == "plain" else "`zstd -d`"
            goal = None if kind == "plain" else 1.3
            label, key = f"import of {name}", f"import {kind}"
            yield self.row(label, key, program, f"unpack {kind}", goal)
            yield self.row(label, key, f"{program} and `sync`", f"unpack and flush {kind}")
            yield self.row(label, key, "BoxLite import", f"boxlite import {kind}")

    def copy_on_write_rows(self):
        for box, name in (("web", "large"), ("small", "3 MB")):
            theirs = f"boxlite snapshot {box}"
            yield self.row(f"snapshot (mkdir), {name} box", f"mkdir {box}", "BoxLite snapshot.create", theirs, 1.5)
            yield self.row("the same, unchanged since the last", f"mkdir unchanged {box}", "BoxLite snapshot.create", theirs)
            bound = plus(self.seconds(f"mkdir {box}"), 0.025)
            yield self.row(f"clone (`cp -r`), {name} box", f"clone {box}", "mkdir + 25 ms", bound, 1)
            yield self.row(f"clone (`cp -r`), {name} box", f"clone {box}", "BoxLite clone_box", f"boxlite clone {box}")
        yield self.row("restore of a snapshot", "restore", "BoxLite snapshot.restore", "boxlite restore")
        yield self.row(f"`ls -l`, {BOXES} boxes, just mounted", "ls first", "BoxLite list_info", "boxlite list")
        yield self.row(f"`ls -l`, {BOXES} boxes, again", "ls again", "BoxLite list_info", "boxlite list")
        start = self.seconds("start list")
        yield Row("to be had before listing", None, "BoxLite runtime's start", start, absent="a mount")

    def space_rows(self):
        mount = {
            ".zst, first contact": ("zst first warm", "boxlite export warm", "export"),
            "plain, first contact": ("plain first warm", "boxlite export warm", "export"),
            "import of BoxLite's archive": ("import theirs", "boxlite import theirs", "import"),
        }
        for label, (key, boxlite, what) in mount.items():
            bounded = CORES == 2  # the goal is one of two threads
            yield self.bytes_row(f"peak memory, {label}", key, "memory", "64 MiB", 64 * MIB, bounded or None)
            theirs = median(self.costs.get(boxlite, []), "memory")
            yield self.bytes_row(f"peak memory, {label}", key, "memory", f"BoxLite {what}", theirs)
        for label, (key, boxlite, what) in mount.items():
            archive = self.sizes.get(key)
            if what == "import":
                archive = (self.kept / "theirs").stat().st_size
            yield self.bytes_row(f"temporary disk, {label}", key, "disk", "the archive", archive, 1)
        theirs = median(self.costs.get("boxlite export warm", []), "disk")
        yield self.bytes_row("temporary disk, .zst, first contact", "zst first warm", "disk", "BoxLite export", theirs)

    def notes(self):
        zstd, floor = self.seconds("zstd"), self.seconds("floor")
        sha = median(self.costs.get("sha", []), "cpu")
        zstd, sha, floor = map(table.seconds_text, (zstd, sha, floor))
        cold = [] if can_drop_caches() else ["Nothing cold: only root can drop the page cache"]
        disk = (self.kept / "disk.qcow2").stat().st_size
        archive = (self.kept / "theirs").stat().st_size
        return [
            table.disk_of(self.work),
            f"Box: {self.size} MiB of files, {disk // MIB} MiB flattened; rounds: {self.rounds} and one discarded",
            f"User time on one core: zstd level 3 {zstd}, sha256 {sha}; floor on {CORES} cores {floor}",
            f"Compressed to {table.bytes_text(self.windows)} in windows of 2 MiB, {table.bytes_text(archive)} by BoxLite",
        ] + cold


def plus(*values):
    return None if None in values else sum(values)


def say(sentence):
    print(f"bench: {sentence}", file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxlitefs", required=True, type=Path, help="the program to measure")
    parser.add_argument("--out", required=True, type=Path, help="directory for table.md")
    parser.add_argument("--update-docs", action="store_true", help="put the table into docs/performance.md")
    return parser.parse_args()


def main():
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    # Terminated like interrupted: what is mounted is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # users' lacks what mke2fs is in
    place = os.environ.get("BENCH_WORK") or options.out
    with tempfile.TemporaryDirectory(prefix="work-", dir=place) as work:
        bench = Bench(options, Path(work).resolve())
        try:
            bench.run()
            text = table.text_of(list(bench.rows()), bench.notes())
        finally:
            bench.close()
    (options.out / "table.md").write_text(text)
    print(text)
    if options.update_docs:
        table.write_into(ROOT / "docs" / "performance.md", text)
    for failure in bench.failures:
        say(failure)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
