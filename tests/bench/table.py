"""The table: what was measured, against what, and which goals were reached."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from measure import run

MIB = 1 << 20
HEAD = (
    "| | ours | user+sys | compared with | that | user+sys | ratio | goal | reached |\n"
    "|---|--:|--:|---|--:|--:|--:|--:|---|"
)
# Rows that are in the longer table though they have a goal.
DETAILS = ("temporary disk", "peak memory, import", "peak memory, .zst, first contact")
BEGIN, END = "<!-- table -->", "<!-- /table -->"


@dataclass
class Row:
    """One line. Figures are medians: seconds, or bytes where `unit` says so.

    `goal` bounds ours / that, from above; a row without one is there to be known, and is in a table of
    its own. `absent` says why there is no figure of ours.
    """

    label: str
    ours: float | None
    against: str = ""
    that: float | None = None
    goal: float | None = None
    ours_cpu: float | None = None
    that_cpu: float | None = None
    unit: str = "s"
    absent: str = ""

    def line(self):
        shown = bytes_text if self.unit == "bytes" else seconds_text
        ratio = None if self.ours is None or not self.that else round(self.ours / self.that, 2)
        reached = "" if None in (self.goal, ratio) else "yes" if ratio <= self.goal else "**no**"
        cells = [
            self.label,
            self.absent if self.ours is None else shown(self.ours),
            seconds_text(self.ours_cpu),
            self.against,
            shown(self.that),
            seconds_text(self.that_cpu),
            "" if ratio is None else f"{ratio:.2f}",
            "" if self.goal is None else f"≤ {self.goal:.2f}",
            reached,
        ]
        return "| " + " | ".join(cells) + " |"


def seconds_text(value):
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def bytes_text(value):
    return "" if value is None else f"{value / MIB:.1f} MiB"


def text_of(rows, notes):
    """The machine, the notes and the rows, as Markdown."""
    head = "\n".join(f"- {note}" for note in [machine(), *notes])
    return "\n".join([head, "", HEAD, *(row.line() for row in rows), ""])


def parts_of(rows, notes):
    """The texts of the two documents: the rows with the goals that matter most, and the others."""
    rows, notes = list(rows), list(notes)
    main = [row for row in rows if row.goal is not None and not row.label.startswith(DETAILS)]
    return text_of(main, notes), text_of([row for row in rows if row not in main], notes)


def machine():
    """What the figures were measured on, in a sentence."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    sha = "with" if " sha_ni" in info else "without"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return (
        f"Machine: {(models or [platform.machine()])[0]} ({sha} SHA-NI), {os.cpu_count()} cores, "
        f"{memory:.0f} GiB of memory, Linux {platform.release().partition('-')[0]}"
    )


def place_of(directory):
    """The file system that a directory is on."""
    source, kind = run(["findmnt", "-n", "-o", "SOURCE,FSTYPE", "-T", directory]).split()[:2]
    return f"{kind} on {source}"


def write_into(document, text):
    """Puts the table between the two markers of a document."""
    before, begun, rest = document.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(f"{document} has no {BEGIN} … {END} to put the table in")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
