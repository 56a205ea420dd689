#!/usr/bin/env python3
"""Midnight Commander at a terminal of its own: mc.py copy|move|delete FROM [TO].

Presses the keys a person would: finds FROM in the left panel, F5, F6 or F8, types TO, and answers yes.
Exits with 1 and prints what was on the screen when mc complained.
"""

import os
import pty
import re
import select
import sys
import time

KEYS = {"copy": "\x1b[15~", "move": "\x1b[17~", "delete": "\x1b[19~"}
DIALOGS = {"copy": "to:", "move": "to:", "delete": "Delete"}
QUIT = "\x1b[21~"
QUIET = 0.3  # seconds without output after which mc may be waiting for a key
LIMIT = 60


def main(verb, source, target=None):
    directory, name = os.path.split(source.rstrip("/"))
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execvp("mc", ["mc", "--nosubshell", "--nomouse", "--nocolor", directory, "/"])
    screen = Screen(process, terminal)
    screen.wait("Quit")  # the names of its keys, at the bottom
    screen.press("\x13" + name)  # searches the panel
    screen.press(KEYS[verb], DIALOGS[verb])
    if target is not None:
        screen.press(target + "\r")
    else:
        screen.press("\r")
    complaint = answer_questions(screen)
    screen.press("\x1b\x1b")
    screen.press(QUIT)
    os.close(terminal)
    os.waitpid(process, 0)
    if complaint:
        print(complaint, file=sys.stderr)
        sys.exit(1)


def answer_questions(screen):
    """Says yes to overwriting and deleting; returns a complaint if there is one."""
    for _ in range(8):
        said = screen.last
        if re.search(r"Cannot|not permitted|busy|error|Error", said):
            return said
        if re.search(r"exists|recursively|Overwrite|Delete", said):
            screen.press("y")
        else:
            return None
    return "it asks for ever"


class Screen:
    def __init__(self, process, terminal):
        self.process = process
        self.terminal = terminal
        self.last = ""

    def press(self, keys, until=""):
        os.write(self.terminal, keys.encode())
        self.wait(until)

    def wait(self, until=""):
        """Reads what mc draws until it has drawn a word and waits for a key."""
        drawn, deadline = b"", time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if not select.select([self.terminal], [], [], QUIET)[0]:
                if until.encode() in drawn and self.is_waiting():
                    break
                continue
            try:
                drawn += os.read(self.terminal, 65536)
            except OSError:  # it has ended
                break
        text = drawn.decode(errors="replace")
        self.last = re.sub(r"\x1b[\[(][0-9;?]*[A-Za-z]", " ", text)

    def is_waiting(self):
        """Whether it sleeps for a key: in a copy it runs, or sleeps elsewhere."""
        try:
            with open(f"/proc/{self.process}/wchan") as file:
                where = file.read()
            with open(f"/proc/{self.process}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        return state == "S" and (where in ("", "0") or "poll" in where or "select" in where)


if __name__ == "__main__":
    main(*sys.argv[1:])
