"""Which rows the table has: what is compared with what, and the goals."""

import os

from families import SNAPSHOTS
from growth import CHANGES, MANY, SIZES as HOMES
from guests import STATS
from measure import can_drop_caches, mean, median
from pauses import SIZES
from table import MIB, Row, bytes_text, place_of, seconds_text


class Rows:
    """The rows and notes of one run of the bench; `load` is that of the machine before it."""

    def __init__(self, bench, load):
        self.bench, self.load, self.costs, self.sizes = bench, load, bench.costs, bench.sizes

    def all(self):
        for state in ("warm", "cold") if can_drop_caches() else ("warm",):
            yield from self.exports(state)
        yield from self.changed_and_small()
        yield from self.imports()
        yield from self.copy_on_write()
        yield from self.growth()
        yield from self.pauses()
        yield from self.guests()
        yield from self.space()

    def notes(self):
        """What the figures were taken from."""
        bench = self.bench
        zstd, sha, floor = (seconds_text(self.seconds(key)) for key in ("zstd", "sha", "floor"))
        busy = tuple(seconds_text(self.seconds(f"{key} busy")) for key in ("zstd", "sha", "floor"))
        disk, zst, theirs = (bytes_text(bench.size_of_kept(name)) for name in ("disk.qcow2", "zst", "theirs"))
        yield f"Worked on {place_of(bench.work)}; load before: {self.load:.1f}"
        yield f"Box: {bench.size} MiB of files, {disk} flattened; rounds: {bench.rounds} and one discarded"
        yield f"The archive: {zst} as our .zst, {theirs} as BoxLite's"
        yield (
            f"User time on one core: zstd level 3 {zstd}, sha256 {sha}; floor on {os.cpu_count()} cores {floor}"
        )
        yield "The same while all cores do so: zstd level 3 {}, sha256 {}; floor {}".format(*busy)

    def seconds(self, key):
        return median(self.costs[key])

    def times(self, label, key, against, that, goal=None):
        """A row of times; `that` is the key of what it is compared with, or a number of seconds."""
        named = self.costs[that] if isinstance(that, str) else []
        bound = median(named) if isinstance(that, str) else that
        cpu, that_cpu = mean(self.costs[key], "cpu"), mean(named, "cpu")
        absent = self.bench.absent.get(key, "failed")
        return Row(label, self.seconds(key), against, bound, goal, cpu, that_cpu, absent=absent)

    def bytes(self, label, key, what, against, that, goal=None):
        """A row of memory or disk, as `what` says; `that` is a key or a number of bytes."""
        bound = median(self.costs[that], what) if isinstance(that, str) else that
        return Row(label, median(self.costs[key], what), against, bound, goal, unit="bytes")

    def exports(self, state):
        warm, boxlite = state == "warm", ("BoxLite export", f"boxlite export {state}")
        label, key = f".zst, first contact, {state}", f"zst first {state}"
        # The floor is the processor's: cold, the disk may be slower, so no goal.
        bound = ("floor + `cp` of such a file", plus(self.seconds("floor"), self.seconds(f"cp zst {state}")))
        busy = plus(self.seconds("floor busy"), self.seconds(f"cp zst {state}"))
        busy = ("the same, all cores busy", busy)
        yield self.times(label, key, *bound, 1.25 if warm else None)
        yield self.times(label, key, *busy)
        yield self.times(label, key, *boxlite, 1 / 2.5 if warm else 1 / 3)
        yield self.times(label, key, "qemu-img, tar, zstd", f"qemu {state}")
        label, key = f".zst, size known, {state}", f"zst known {state}"
        yield self.times(label, key, *bound, 1.1 if warm else None)
        yield self.times(label, key, *busy)
        label = f".zst, again unchanged, {state}"
        yield self.times(label, f"zst again {state}", "`cp` of such a file", f"cp zst {state}", 1.3)
        label = f".zst, size known, again, {state}"
        yield self.times(label, f"zst known again {state}", "`cp` of such a file", f"cp zst {state}", 1.3)
        label, key = f"plain, first contact, {state}", f"plain first {state}"
        slower = max(filter(None, (self.seconds(f"cp plain {state}"), self.seconds("sha"))), default=None)
        yield self.times(label, key, "the slower of `cp` and sha256", slower, 1.5)
        yield self.times(label, key, *boxlite)
        label = f"plain, again unchanged, {state}"
        yield self.times(label, f"plain again {state}", "`cp` of such a file", f"cp plain {state}")

    def changed_and_small(self):
        for kind, name in (("plain", "plain"), ("zst", ".zst")):
            yield self.times(f"{name}, after 1 % changed", f"{kind} changed", "BoxLite export", "boxlite changed")
        label = ".zst, after 1 % changed, again"
        yield self.times(label, "zst changed again", "`cp` of such a file", "cp zst changed", 1.3)
        yield self.times("exact size of .zst, after 1 % changed", "exact size", "0.3 s", 0.3, 1)
        yield self.times("the same, in pieces of 64 KiB", "exact size scattered", "0.3 s", 0.3)
        yield self.times(".zst of the 3 MB box", "zst small", "BoxLite export", "boxlite small", 1 / 5)
        yield self.times("plain of the 3 MB box", "plain small", "BoxLite export", "boxlite small")

    def imports(self):
        for kind, name in (("theirs", "BoxLite's"), ("zst", "our .zst"), ("plain", "our plain")):
            program, goal = ("`cp`", 1.3) if kind == "plain" else ("`zstd -d`", 1.1)
            label, key = f"import of {name} archive", f"import {kind}"
            yield self.times(label, key, program, f"unpack {kind}")
            yield self.times(label, key, f"{program} and `sync`", f"unpack and flush {kind}", goal)
            yield self.times(label, key, "BoxLite import", f"boxlite import {kind}")

        label = f"a box with {SNAPSHOTS} snapshots, from a backup of directories"
        yield self.times(f"import of {label}", "family", "`cp -r` and `sync` of the same files", "cp family")
        room = ("room family", "disk", "the original", "room original")
        yield self.bytes(f"room of {label}", *room, 1.2)

    def copy_on_write(self):
        for box, name in (("web", "large"), ("small", "3 MB")):
            theirs = ("BoxLite snapshot.create", f"boxlite snapshot {box}")
            yield self.times(f"snapshot (`mkdir`), {name} box", f"mkdir {box}", *theirs, 1.5)
            yield self.times("the same, unchanged since the last", f"mkdir unchanged {box}", *theirs)
            label, key = f"clone (`cp -r`), {name} box", f"clone {box}"
            yield self.times(label, key, "`mkdir` + 25 ms", plus(self.seconds(f"mkdir {box}"), 0.025), 1)
            yield self.times(label, key, "BoxLite clone_box", f"boxlite clone {box}")
        yield self.times("restore of a snapshot", "restore", "BoxLite snapshot.restore", "boxlite restore")
        commit = "`qemu-img commit` of the same files"
        yield self.times("`compact`, two layers of the large box", "compact 1", commit, "commit 1", 1.5)
        yield self.times("the same, the upper one half as large", "compact 0.5", commit, "commit 0.5")
        label, theirs = "`ls -l` of 10,000 boxes", ("BoxLite list_info", "boxlite list")
        yield self.times(f"{label}, just mounted", "ls first", *theirs)
        yield self.times(f"{label}, again", "ls again", *theirs)
        both = plus(self.seconds("start list"), self.seconds("boxlite list"))
        yield self.times(f"{label}, again", "ls again", "list_info and the runtime's start", both)

        label = "`ls -l` of a box while its archives are made, 99 of 100 times"
        yield self.times(label, "ls meanwhile", "100 ms", 0.1, 1)

    def growth(self):
        """What changes cost in homes of more and more boxes, against a home of one."""
        for boxes in HOMES:
            label = f"mount and `ls` of {boxes:,} box{'es' if boxes > 1 else ''} with 10 snapshots each, cold"
            yield self.times(label, f"mount {boxes}", "0.3 s", 0.3, 1 if boxes == max(HOMES) else None)
        for change in CHANGES:
            for boxes in HOMES[1:]:
                against = ("in a home of one", f"{change} {HOMES[0]}")
                goal = 1.5 if boxes == max(HOMES) and not change.startswith("first") else None
                yield self.times(f"{change} among {boxes:,} boxes", f"{change} {boxes}", *against, goal)
        for label, key in (
            ("`cp -r` of a box", "copy of 300"),
            ("`rm -r` of 200 of its snapshots", "deletion among 300"),
            ("`rm -r` of the box with the rest", "removal of 100"),
        ):
            label = f"{label} with {MANY} snapshots, for each of them"
            yield self.times(label, key, "10 ms", 0.01, 1)

    def pauses(self):
        for kind, place in (("plain", place_of(self.bench.work).split()[0]), ("shared", "xfs, sharing blocks")):
            for size in SIZES:
                for what, meanwhile in (("idle", ""), ("writes", ", which writes all the time")):
                    label = f"pause of a running box for a snapshot, {size} MiB in its top layer{meanwhile}; {place}"
                    goal = 1 if (size, what) == (256, "idle") else None
                    yield self.times(label, f"pause {kind} {size} {what}", "50 ms", 0.05, goal)

    def guests(self):
        for label, what, goal in (
            ("read of a guest's file of 512 MiB", "read", 2),
            ("`find` of 60,000 files of a guest", "find", 2),
            ("`diff -rq` of two states of them", "diff", 3),
        ):
            yield self.times(f"{label}, cold", f"guest {what}", "loop mount", f"loop {what}", goal)
            yield self.times(f"{label}, again", f"guest {what} again", "loop mount", f"loop {what} again")
        label = f"{STATS:,} times `stat` of a guest's file by its full path"
        yield self.times(label, "stat full path", "from inside", "stat inside", 5)
        for what in ("read", "diff"):
            yield self.bytes(f"peak memory, {what} of a guest", f"guest {what}", "memory", "64 MiB", 64 * MIB, 1)

    def space(self):
        for label, key, theirs, archive in (
            (".zst, first contact", "zst first warm", "boxlite export warm", self.sizes.get("zst first warm")),
            (".zst, after 1 % changed", "zst changed", "boxlite changed", self.sizes.get("zst changed")),
            ("plain, first contact", "plain first warm", "boxlite export warm", self.sizes.get("plain first warm")),
            ("import", "import theirs", "boxlite import theirs", self.bench.size_of_kept("theirs")),
        ):
            yield self.bytes(f"peak memory, {label}", key, "memory", "64 MiB", 64 * MIB, 1)
            yield self.bytes(f"peak memory, {label}", key, "memory", "BoxLite", theirs)
            yield self.bytes(f"temporary disk, {label}", key, "disk", "the archive", archive, 1)
        label, theirs = "temporary disk, .zst, first contact", "boxlite export warm"
        yield self.bytes(label, "zst first warm", "disk", "BoxLite", theirs)


def plus(*values):
    return None if None in values else sum(values)
