"""The table: what was measured, against what, and which goals were reached."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from measure import run

MIB = 1 << 20
HEAD = (
    "| | ours | user+sys | compared with | that | user+sys | ratio | goal | reached |\n"
    "|---|--:|--:|---|--:|--:|--:|--:|---|"
)
BEGIN, END = "<!-- table -->", "<!-- /table -->"


@dataclass
class Row:
    """One line. Figures are medians: seconds, or bytes where `unit` says so.

    `goal` bounds ours / that, from above; a row without one is there to be known. `absent` says why
    there is no figure of ours.
    """

    label: str
    ours: float | None
    against: str = ""
    that: float | None = None
    goal: float | None = None
    ours_cpu: float | None = None
    that_cpu: float | None = None
    unit: str = "s"
    absent: str = "not there"

    @property
    def ratio(self):
        if self.ours is None or not self.that:
            return None
        return self.ours / self.that

    def line(self):
        shown = bytes_text if self.unit == "bytes" else seconds_text
        cells = [
            self.label,
            self.absent if self.ours is None else shown(self.ours),
            seconds_text(self.ours_cpu),
            self.against,
            shown(self.that),
            seconds_text(self.that_cpu),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.goal is None else f"≤ {self.goal:.2f}",
            self.reached(),
        ]
        return "| " + " | ".join(cells) + " |"

    def reached(self):
        if self.goal is None or self.ratio is None:
            return ""
        return "yes" if self.ratio <= self.goal else "**no**"


def seconds_text(value):
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def bytes_text(value):
    return "" if value is None else f"{value / MIB:.1f} MiB"


def text_of(rows, notes):
    """The machine, the notes and the rows, as Markdown."""
    head = "\n".join(f"- {note}" for note in machine() + notes)
    return "\n".join([head, "", HEAD, *(row.line() for row in rows), ""])


def machine():
    """What the figures were measured on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    sha = "with" if " sha_ni" in Path("/proc/cpuinfo").read_text() else "without"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return [
        f"Machine: {cpu} ({sha} SHA-NI), {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"Linux {platform.release()}"
    ]


def disk_of(place):
    """The disk that `place` is on, in a sentence."""
    source, kind = run(["findmnt", "-n", "-o", "SOURCE,FSTYPE", "-T", place]).split()[:2]
    # A partition has its disk for a parent; a disk has none.
    done = subprocess.run(["lsblk", "-ndo", "PKNAME", source], capture_output=True, text=True)
    block = Path("/sys/block", done.stdout.strip() or os.path.basename(source))
    try:
        turns = (block / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return f"Disk: {kind} on {source}"
    what = "a virtual disk" if block.name.startswith(("vd", "xvd")) else "a disk" if turns else "an SSD"
    return f"Disk: {kind} on {what} ({block.name})"


def write_into(document, text):
    """Puts the table between the two markers of a document."""
    old = document.read_text()
    before, begun, rest = old.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(f"{document} has no {BEGIN} … {END} to put the table in")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
