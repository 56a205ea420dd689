"""What a call costs: wall and processor time, memory of a process, space on disk."""

import os
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass

DROP_CACHES = "/proc/sys/vm/drop_caches"


@dataclass
class Cost:
    """One call's cost: seconds, and bytes where they were looked at."""

    wall: float
    cpu: float | None = None
    memory: int | None = None
    disk: int | None = None


class Failed(Exception):
    """A command that did not do what it was for; the text is what it said."""


def median(costs, what="wall", of=statistics.median):
    """The median of one figure over `costs`, or None if it was never looked at."""
    values = [value for cost in costs if (value := getattr(cost, what)) is not None]
    return of(values) if values else None


def mean(costs, what):
    """The mean: what is counted in ticks longer than a call shows only over many calls."""
    return median(costs, what, statistics.mean)


def settle(cold=False):
    """Leaves nothing to write back that is not the next call's own; `cold` also empties the page
    cache, for which one has to be root."""
    os.sync()
    if cold:
        with open(DROP_CACHES, "w") as file:
            file.write("3")


def can_drop_caches():
    return os.access(DROP_CACHES, os.W_OK)


class Memory:
    """The most memory a process has had at once since this was made, above what it had `idle`."""

    def __init__(self, pid, idle=None):
        self.pid = pid
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew
        self.idle = self._field("VmRSS:") if idle is None else idle

    def peak(self):
        return max(0, self._field("VmHWM:") - self.idle)

    def _field(self, name):
        with open(f"/proc/{self.pid}/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def processor_time(pid):
    """User and system time of process `pid` so far. It counts in clock ticks, of 10 ms mostly."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Space:
    """The most space a call took on the file system of `place` beside its `outputs` (files, or
    directories of files).

    Goes by the free space and not by `du`, since files that have no name any more count too. What
    other programs write meanwhile counts as well: the median over the rounds is what to look at.
    """

    def __init__(self, place, outputs):
        self.place, self.outputs = place, outputs
        self.most, self.done = 0, threading.Event()

    def __enter__(self):
        self.before = self._left()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _watch(self):
        while not self.done.wait(0.02):
            self.most = max(self.most, self.before - self._left())

    def _left(self):
        """Bytes that are free or in the outputs."""
        there = os.statvfs(self.place)
        total = there.f_bfree * there.f_frsize
        for path in self.outputs:
            try:
                files = [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else [path]
                total += sum(os.lstat(file).st_blocks * 512 for file in files)
            except FileNotFoundError:
                pass
        return total


def run(argv, **options):
    """Runs a command that has to succeed; what it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def cost_of(argv, mount=None, place=None, outputs=()):
    """Runs a command and says what it cost, with what it cost the process of `mount`."""
    memory = mount and Memory(mount.pid, mount.idle)
    served = mount and processor_time(mount.pid)
    with Space(place or "/", outputs) as space:
        begun = time.perf_counter()
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said = process.stdout.read().decode(errors="replace").strip()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: it may keep the mount busy
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise Failed(said or f"{argv[0]}: status {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    if mount:
        cpu += processor_time(mount.pid) - served
    return Cost(wall, cpu, memory and memory.peak(), space.most if place else None)


def cost_of_call(work, mount):
    """Calls `work()` and says what it cost, in the process of `mount`."""
    served, begun = processor_time(mount.pid), time.perf_counter()
    work()
    wall = time.perf_counter() - begun
    return Cost(wall, processor_time(mount.pid) - served)
