#!/usr/bin/env python3
"""Measures boxlitefs beside BoxLite, qemu-img and cp, and prints a table.

    bench.py --boxlitefs PROGRAM --floor PROGRAM --out DIRECTORY [--update-docs]

In the environment: BENCH_SIZE, the MiB of real files in the large box (2150); BENCH_ROUNDS, the
rounds that count (3), after one that does not; BENCH_WORK, an existing directory to work in;
BENCH_ONLY=pauses measures only how long running boxes stand still, and prints no document.

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
from families import Families
from guests import Guests
from homes import MIB, Home, Mount
from growth import SIZES, Growth, Long
from measure import Cost, Failed, Space, can_drop_caches, cost_of, cost_of_call, run, settle
from pauses import Pauses
from rows import Rows

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = (578, 3)  # MiB of virtual disk and of data: a box that has hardly been used
BOXES = 10_000
# Snapshots of one box in a row: more would make the chain so long that the disk is written out.
IN_A_ROW = 5
SETS = 4
CORES = os.cpu_count()


class Bench:
    """One run: the homes, the mounts, and the costs found so far, by what was measured."""

    def __init__(self, options, work):
        self.work = work
        self.size = int(os.environ.get("BENCH_SIZE") or 2150)
        self.rounds = int(os.environ.get("BENCH_ROUNDS") or 3)
        self.costs, self.absent, self.sizes = defaultdict(list), {}, {}
        self.failures, self.proven = [], set()
        self.out, self.kept = work / "out", work / "kept"
        self.out.mkdir(), self.kept.mkdir()
        self.copy = self.out / "copy"
        # Copies: a build meanwhile must not change what is measured.
        self.floor_program = shutil.copy(options.floor, work / "floor")
        self.program = shutil.copy(options.boxlitefs, work / "boxlitefs")
        self.home = Home(work / "home", work / "pristine")
        self.crowd = Home(work / "crowd", work / "crowd-pristine")
        self.mount = Mount(self.program, self.home, work / "mnt")
        self.crowd_mount = Mount(self.program, self.crowd, work / "crowd-mnt")
        self.guests = Guests(self.program, work, self.costs)
        self.growths = [Growth(self.program, work, self.costs, boxes) for boxes in SIZES]
        self.long = Long(self.program, work, self.costs)
        self.pauses = Pauses(self.program, work, self.costs)
        self.families = Families(self.program, work, self.costs)
        self.only = os.environ.get("BENCH_ONLY")
        self.web = self.mount.point / "web"
        self.plain, self.zst = self.web / "export.boxlite", self.web / "export.boxlite.zst"

    # What every measurement is made of.

    def fail(self, sentence):
        if sentence not in self.failures:
            self.failures.append(sentence)

    def size_of_kept(self, name):
        return (self.kept / name).stat().st_size

    def export(self, key, source, cold=False, box="web", same=False):
        """Times `cp` out of the mount. `same` says that the state was exported before: same length."""
        settle(cold)
        # Nothing looks at the source before: a mere stat has the export planned.
        self.costs[key].append(cost_of(["cp", source, self.copy], self.mount, self.work, [self.copy]))
        length = self.sizes[key] = self.copy.stat().st_size
        if same and length != (first := self.sizes.setdefault(source.name, length)):
            self.fail(f"{key}: {length} bytes, but {first} when the same state was exported first")
        self.prove(key, self.copy, self.home.disk(box))
        self.copy.unlink()

    def beside(self, key, script, *words, cold=False):
        """Times a bash script that has nothing to do with the mount and makes `copy`, its $1."""
        settle(cold)
        argv = ["bash", "-c", f"set -eo pipefail; {script}", "-", self.copy, *words]
        self.costs[key].append(cost_of(argv, place=self.work, outputs=[self.copy]))
        self.copy.unlink()

    def theirs(self, key, kind, *words, home=None, output=None):
        """BoxLite's turn, in a process of its own; nothing of ours may have the home meanwhile."""
        self.mount.stop()
        argv = [sys.executable, HERE / "theirs.py", (home or self.home).path, kind, *map(str, words)]
        with Space(self.work, [output] if output else []) as space:
            done = subprocess.run(argv, capture_output=True, text=True)
        # About one of its processes in five aborts when all is done: what it printed counts.
        try:
            costs = json.loads(done.stdout)
        except ValueError:
            raise Failed(f"BoxLite, {kind}: {done.stderr.strip()[-2000:]}") from None
        for cost in costs:
            self.costs[f"start {kind}"].append(Cost(cost.pop("start")))
            self.costs[key].append(Cost(**cost, disk=space.most if output else None))

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

    def prove(self, key, archive, disk):
        """Once for each kind: foreign programs find the box's disk in the archive, and its checksum."""
        if key in self.proven:
            return
        self.proven.add(key)
        with tempfile.TemporaryDirectory(dir=self.out) as place:
            # With -f, what is not compressed passes through.
            run(["bash", "-c", 'set -o pipefail; zstd -dcqf "$1" | tar -xC "$2"', "-", archive, place])
            self.compare(key, Path(place, "disk.qcow2"), disk)
            said = json.loads(Path(place, "manifest.json").read_text())["container_disk_checksum"]
            if said != "sha256:" + run(["sha256sum", Path(place, "disk.qcow2")]).split()[0]:
                self.fail(f"{key}: the manifest's checksum is not that of disk.qcow2")

    def compare(self, key, one, other):
        argv = ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", one, other]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode != 0:
            self.fail(f"{key}: wrong bytes: {done.stdout.strip()} {done.stderr.strip()}")

    def compare_box(self, key, name):
        """Once for each kind: a box that was made from the large or small one has its disk."""
        made = os.getxattr(self.mount.point / name, "user.boxlite.id").decode()
        if key not in self.proven:
            self.proven.add(key)
            self.compare(key, self.home.disk_of(made), self.home.disk(key.split()[-1]))
        return self.home.disk_of(made)

    # The turns. Each begins with the home as it was first.

    def exports(self, state):
        """The large box, met for the first time and again: ours, BoxLite's, qemu's, and copies."""
        cold = state == "cold"
        self.mount.start(fresh=True)
        self.export(f"plain first {state}", self.plain, cold, same=True)
        self.export(f"plain again {state}", self.plain, cold, same=True)
        self.mount.start(fresh=True)
        self.export(f"zst first {state}", self.zst, cold, same=True)
        self.export(f"zst again {state}", self.zst, cold, same=True)
        self.mount.start()  # what was spooled is gone, the size is known
        self.export(f"zst known {state}", self.zst, cold, same=True)
        self.export(f"zst known again {state}", self.zst, cold, same=True)
        self.their_export(f"boxlite export {state}", "web", cold)
        # What one would do without either: flatten, tar and compress.
        script = (
            'qemu-img convert -O qcow2 "$2" "$3/disk.qcow2"; '
            f'tar -C "$3" -cf - disk.qcow2 | zstd -q -3 -T{CORES} -o "$1"; rm "$3/disk.qcow2"'
        )
        self.beside(f"qemu {state}", script, self.home.disk("web"), self.out, cold=cold)
        for kind in ("plain", "zst"):
            self.beside(f"cp {kind} {state}", 'cp --reflink=never "$2" "$1"', self.kept / kind, cold=cold)

    def changes(self):
        """The large box after one percent of it changed, which an export has to notice."""
        percent = self.size * MIB // 100
        self.mount.start(fresh=True)
        run(["cp", self.plain, self.copy])
        self.home.change("web", percent)
        self.export("plain changed", self.plain)
        run(["cp", self.zst, self.copy])
        self.home.change("web", percent)
        self.export("zst changed", self.zst)
        self.export("zst changed again", self.zst)
        self.beside("cp zst changed", 'cp --reflink=never "$2" "$1"', self.kept / "zst")
        for key, piece in (("exact size", MIB), ("exact size scattered", 64 << 10)):
            self.home.change("web", percent, piece)
            self.call(key, lambda: size_of(self.zst))
            run(["cp", self.zst, self.copy])
            if self.copy.stat().st_size != self.zst.stat().st_size:
                self.fail(f"{key}: what was copied has another length than was said")
            self.prove(key, self.copy, self.home.disk("web"))
        self.copy.unlink()
        self.their_export("boxlite changed", "web")

    def call(self, key, work):
        """Times a system call or two on the mount."""
        settle()
        self.costs[key].append(cost_of_call(work, self.mount))

    def small(self):
        """A box with hardly anything in it: what is not proportional to data."""
        for kind, name in (("plain", "export.boxlite"), ("zst", "export.boxlite.zst")):
            self.mount.start(fresh=True)
            self.export(f"{kind} small", self.mount.point / "small" / name, box="small")
        self.their_export("boxlite small", "small")

    def imports(self, kind):
        """An archive of one kind becomes a box: `theirs`, `zst` or `plain`."""
        archive, target = self.kept / kind, self.mount.point / "imported.boxlite"
        self.mount.start(fresh=True)
        settle()
        cost = cost_of(["cp", archive, target], self.mount, self.work)
        made = self.compare_box(f"import {kind} web", "imported")
        cost.disk = max(0, cost.disk - made.stat().st_blocks * 512)
        self.costs[f"import {kind}"].append(cost)
        self.mount.stop()
        settle()
        self.theirs(f"boxlite import {kind}", "import", archive, "theirs")
        self.home.reset()
        unpack = 'cp --reflink=never "$2" "$1"' if kind == "plain" else 'zstd -dqf "$2" -o "$1"'
        self.beside(f"unpack {kind}", unpack, archive)
        self.beside(f"unpack and flush {kind}", f'{unpack}; sync "$1"', archive)

    def snapshots(self, box):
        """`mkdir` beside BoxLite's snapshot.create, each of a box that changed."""
        self.mount.start()
        snapshots = self.mount.point / box / "snapshots"
        for number in range(IN_A_ROW):
            run(self.touching(box))
            self.call(f"mkdir {box}", lambda: os.mkdir(snapshots / str(number)))
        self.call(f"mkdir unchanged {box}", lambda: os.mkdir(snapshots / "unchanged"))
        self.mount.stop()
        self.home.reset()
        self.theirs(f"boxlite snapshot {box}", "snapshot", box, IN_A_ROW, *self.touching(box))

    def clones(self, box):
        """`cp -r` of a box beside BoxLite's clone_box, each of a box that changed."""
        self.mount.start()
        for number in range(IN_A_ROW):
            run(self.touching(box))
            settle()
            clone = self.mount.point / f"clone-{number}"
            self.costs[f"clone {box}"].append(cost_of(["cp", "-r", self.mount.point / box, clone], self.mount))
        self.compare_box(f"clone {box}", clone.name)
        self.mount.stop()
        self.home.reset()
        self.theirs(f"boxlite clone {box}", "clone", box, IN_A_ROW, *self.touching(box))

    def restores(self):
        """`cp` of a snapshot's export over the box's beside BoxLite's snapshot.restore."""
        self.mount.start()
        snapshot = self.web / "snapshots" / "before"
        snapshot.mkdir()
        try:
            for _ in range(IN_A_ROW):
                run(self.touching("web"))
                settle()
                self.costs["restore"].append(cost_of(["cp", snapshot / "export.boxlite", self.plain], self.mount))
        except Failed as error:
            if "Operation not permitted" not in str(error):
                raise
            self.absent["restore"] = "not there yet"
        self.mount.stop()
        self.home.reset()
        self.theirs("boxlite restore", "restore", "web", IN_A_ROW, *self.touching("web"))

    def compacting(self, share):
        """`compact` of two layers, beside `qemu-img commit` of the very same files. The lower one has as many
        bytes as the large box has, the upper one a `share` of them."""
        self.mount.start()
        disk, size = self.home.disk("web"), self.size
        run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 1 0 {size}M", disk])
        (self.web / "snapshots" / "gone").mkdir()
        run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 2 0 {int(size * share)}M", disk])
        (self.web / "snapshots" / "gone").rmdir()
        self.mount.stop()
        (base,) = (self.home.path / "bases").iterdir()
        below, above = self.out / "below.qcow2", self.out / "above.qcow2"
        run(["cp", base, below])
        run(["cp", disk, above])
        run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", below, above])
        settle()
        # It flushes what it wrote, and so does compact.
        self.costs[f"commit {share}"].append(cost_of(["qemu-img", "commit", "-q", "-d", above], place=self.work))
        settle()
        argv = [self.program, "compact", self.home.path]
        self.costs[f"compact {share}"].append(cost_of(argv, place=self.work))
        if (key := f"compact {share}") not in self.proven:
            self.proven.add(key)
            self.compare(key, disk, below)
            if any((self.home.path / "bases").iterdir()):
                self.fail(f"{key}: the lower layer is still there")

    def listing(self):
        """`ls -l` of a home with many boxes, just mounted and again, beside list_info."""
        self.crowd_mount.start(fresh=True)
        settle()
        for key in ("ls first", "ls again"):
            self.costs[key].append(cost_of(["ls", "-l", self.crowd_mount.point], self.crowd_mount))
        if (shown := len(os.listdir(self.crowd_mount.point))) != BOXES:
            self.fail(f"ls: {shown} boxes instead of {BOXES}")
        self.crowd_mount.stop()
        self.theirs("boxlite list", "list", home=self.crowd)

    def looking(self):
        """`ls -l` of the large box, again and again while both of its archives are made and read."""
        self.mount.start(fresh=True)
        settle()
        copies = [subprocess.Popen(["cp", source, self.out / source.name]) for source in (self.plain, self.zst)]
        took = []
        while any([copy.poll() is None for copy in copies]):
            begin = time.monotonic()
            for entry in os.scandir(self.web):
                os.lstat(entry.path)
            took.append(time.monotonic() - begin)
            time.sleep(0.005)
        if any(copy.wait() for copy in copies):
            raise Failed("cp failed while the box was looked at")
        took.sort()
        self.costs["ls meanwhile"].append(Cost(took[len(took) * 99 // 100]))

    def touching(self, box):
        """The command that changes 64 KiB of a box, so that a layer is there to be frozen."""
        return ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 64k", self.home.disk(box)]

    def floor(self):
        """What the processor needs at least, with the same crates on the same bytes: one core alone, and
        all at once, each with all the bytes, for cores that share a cache slow each other."""
        settle()
        argv = [self.floor_program, self.kept / "disk.qcow2"]
        for key, number in (("", 1), (" busy", CORES)):
            started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(number)]
            found = [json.loads(process.communicate()[0]) for process in started]
            sha, zstd = (sum(each[name] for each in found) / number for name in ("sha_user", "zstd_user"))
            self.costs[f"floor{key}"].append(Cost(max(sha, (zstd + sha) / CORES)))
            self.costs[f"sha{key}"].append(Cost(sha))
            self.costs[f"zstd{key}"].append(Cost(zstd))

    # The run.

    def prepare(self):
        """Makes the homes and the archives that are copied and imported."""
        self.pauses.prepare()
        if self.only:
            return
        say(f"making a box of {self.size} MiB, a small one, and {BOXES} boxes in {self.work}")
        self.home.add_box("web", max(10 << 10, self.size * 5 // 4 + 64), self.size)
        self.home.add_box("small", *SMALL)
        self.home.keep()
        self.crowd.add_box("web", 64, 1)
        self.crowd.multiply("web", BOXES)
        self.guests.prepare()
        for home in (*self.growths, self.long):
            home.prepare()
        self.families.prepare()
        self.their_export("kept", "web", keep=self.kept / "theirs")
        self.prove("BoxLite's export", self.kept / "theirs", self.home.disk("web"))
        self.mount.start(fresh=True)
        run(["cp", self.plain, self.kept / "plain"])
        run(["tar", "-xf", self.kept / "plain", "-C", self.kept, "disk.qcow2"])
        run(["cp", self.zst, self.kept / "zst"])
        self.sizes |= {self.plain.name: self.size_of_kept("plain"), self.zst.name: self.size_of_kept("zst")}

    def turns(self):
        yield self.pauses.turn
        if self.only:
            return
        yield self.floor
        for state in ("warm", "cold") if can_drop_caches() else ("warm",):
            yield lambda: self.exports(state)
        yield self.changes
        yield self.small
        for kind in ("theirs", "zst", "plain"):
            yield lambda: self.imports(kind)
        for box in ("web", "small"):
            for _ in range(SETS):
                yield lambda: self.snapshots(box)
            yield lambda: self.clones(box)
        yield self.restores
        for share in (1, 0.5):
            yield lambda: self.compacting(share)
        yield self.listing
        yield self.looking
        yield self.guests.turn
        for home in (*self.growths, self.long):
            yield home.turn
        yield self.families.turn

    def round(self):
        for turn in self.turns():
            try:
                if not self.only:
                    self.home.reset()
                turn()
            except Exception:  # the others still have their turn
                self.fail(f"{traceback.format_exc().strip()}\n{self.home.last_words()}")
            finally:
                self.mount.stop()
                self.crowd_mount.stop()
                self.guests.mount.stop()
                for home in (*self.growths, self.families):
                    home.mount.stop()
                shutil.rmtree(self.out)
                self.out.mkdir()

    def run(self):
        self.prepare()
        for number in range(self.rounds + 1):
            say(f"round {number} of {self.rounds}" + ("" if number else ", which does not count"))
            self.round()
            if number == 0:
                original = self.costs["room original"]
                self.costs.clear()
                self.costs["room original"] = original

    def close(self):
        self.pauses.close()
        of_homes = (home.mount for home in (self.guests, *self.growths, self.long, self.families))
        for mount in (self.mount, self.crowd_mount, *of_homes):
            try:
                mount.stop()
            except Exception as error:
                self.fail(f"{mount.point} could not be unmounted: {error}")


def size_of(path):
    """Opens a file and asks for its length, as every copy tool begins."""
    with open(path, "rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size


def say(sentence):
    print(f"bench: {sentence}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxlitefs", required=True, type=Path, help="the program to measure")
    parser.add_argument("--floor", required=True, help="the program of tests/bench/floor.rs")
    parser.add_argument("--out", required=True, type=Path, help="directory for table.md")
    parser.add_argument("--update-docs", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Terminated like interrupted: what is mounted is taken down.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # users' lacks what mke2fs is in
    load = os.getloadavg()[0]
    place = os.environ.get("BENCH_WORK") or options.out
    with tempfile.TemporaryDirectory(prefix="work-", dir=place) as work:
        bench = Bench(options, Path(work).resolve())
        try:
            bench.run()
            found = Rows(bench, load)
            if bench.only:
                text = table.text_of(found.pauses(), [])
            else:
                text = table.text_of(found.all(), found.notes())
        finally:
            bench.close()
    (options.out / "table.md").write_text(text)
    print(text, flush=True)
    for failure in bench.failures:
        say(failure)
    if bench.failures:
        return 1  # and the document keeps the figures of right bytes
    if options.update_docs and not bench.only:
        main, more = table.parts_of(found.all(), found.notes())
        table.write_into(ROOT / "docs" / "performance.md", main)
        table.write_into(ROOT / "docs" / "performance-more.md", more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
