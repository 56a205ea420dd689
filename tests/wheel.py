#!/usr/bin/env python3
"""Runs BoxLite commands for the tests and the demo.

    wheel.py HOME COMMAND ARGUMENT...

Each command prints one line of JSON: BoxLite's answer, or {"error": "..."} with exit status 1.
`batch` reads commands from standard input, one JSON array of strings per line, and runs them all in
one runtime. It prints one line per command and continues after an error.

    wheel.py --serve SOCKET

Listens at SOCKET, then goes to the background. A client sends a line with {"home"}, then the lines
of a `batch`. The server forks a process for them, which sends its {"pid"} and then one answer per
line. So BoxLite, which takes longer to load than most commands take, is loaded only once. An idle
server ends after a while.

If the environment variable BOXLITE_SERVER names such a socket, commands go to that server.

A runtime holds HOME/.lock until its process ends.

If the environment variable BOXLITE_CLI names BoxLite's program, its `boxlite serve` is the runtime
and the wheel its client: so the tests judge another version of BoxLite.
"""

import json
import os
import select
import socket
import sys


def ask_server(path, home, words):
    """Has the server run one command and prints its answer. Returns None if there is no server."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
        except OSError:
            return None
        request = json.dumps({"home": os.path.abspath(home)}) + "\n" + json.dumps(words) + "\n"
        server.sendall(request.encode())
        server.shutdown(socket.SHUT_WR)
        said = server.makefile()
        process = None
        try:
            process = os.pidfd_open(json.loads(next(said))["pid"])
        except ProcessLookupError:
            pass  # the process has already ended
        lines = list(said)
        # The process holds the home's lock until it has exited, which is after its last answer.
        if process is not None:
            select.select([process], [], [])
    print(*lines, sep="", end="")
    return bool(lines) and "error" not in json.loads(lines[-1])


# Ask the server before the imports below, which take longer than a request.
if __name__ == "__main__" and "BOXLITE_SERVER" in os.environ and len(sys.argv) > 2 and sys.argv[2] != "hold":
    answered = ask_server(os.environ["BOXLITE_SERVER"], sys.argv[1], sys.argv[2:])
    if answered is not None:
        sys.exit(0 if answered else 1)

import argparse
import asyncio
import gc
import hashlib
import io
import signal
import subprocess
import tarfile
import tempfile
import time


def make_archive(arguments):
    """Makes the archive of a box from a directory tree, without BoxLite."""
    with tempfile.TemporaryDirectory() as place:
        raw, disk = os.path.join(place, "raw"), os.path.join(place, "disk.qcow2")
        tree = arguments.tree
        if tree is None:
            tree = os.path.join(place, "tree")
            os.makedirs(os.path.join(tree, "etc"))
            with open(os.path.join(tree, "etc", "hostname"), "w") as file:
                file.write(arguments.name + "\n")
        run("mke2fs", "-q", "-t", "ext4", "-d", tree, raw, arguments.size)
        run("qemu-img", "convert", "-O", "qcow2", raw, disk)
        manifest = json.dumps(manifest_of(arguments, disk)).encode()
        with tarfile.open(arguments.path, "w") as archive:
            member = tarfile.TarInfo("manifest.json")
            member.size = len(manifest)
            archive.addfile(member, io.BytesIO(manifest))
            archive.add(disk, "disk.qcow2")
    return {"path": arguments.path, "bytes": os.path.getsize(arguments.path)}


def manifest_of(arguments, disk):
    with open(disk, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = {"rootfs": {"Image": "alpine:latest"}, "auto_remove": False}
    options.update(json.loads(arguments.options))
    return {
        "version": 3,
        "box_name": arguments.name,
        "image": "alpine:latest",
        "box_options": options,
        "guest_disk_checksum": "",
        "container_disk_checksum": "sha256:" + digest,
        "exported_at": "2026-01-01T00:00:00Z",
    }


def run(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


# The processes of `boxlite serve` that this process has started.
SERVERS = []


def serve_home(program, home):
    """Starts `boxlite serve` on a home, and returns its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tempfile.TemporaryFile()
    server = subprocess.Popen(
        [program, "--home", home, "serve", "--port", str(port)],
        stdin=subprocess.DEVNULL, stdout=said, stderr=said,
    )
    SERVERS.append(server)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return f"http://127.0.0.1:{port}"
        except ConnectionRefusedError:
            time.sleep(0.01)
    said.seek(0)
    raise RuntimeError(said.read().decode(errors="replace").strip())


class Judge:
    """The commands that need BoxLite. The first of them starts its runtime."""

    def __init__(self, home):
        self.home = os.path.abspath(home)  # BoxLite refuses a relative path
        self.runtime = None

    def start(self):
        if self.runtime is None:
            import boxlite

            if "BOXLITE_CLI" in os.environ:
                url = serve_home(os.environ["BOXLITE_CLI"], self.home)
                self.runtime = boxlite.Boxlite.rest(boxlite.BoxliteRestOptions(url=url))
            else:
                self.runtime = boxlite.Boxlite(boxlite.Options(home_dir=self.home))
        return self.runtime

    async def box(self, name):
        box = await self.start().get(name)
        if box is None:
            raise LookupError(f"no box is named {name}")
        return box

    async def answer(self, arguments):
        if arguments.command == "make-archive":
            return make_archive(arguments)
        return await getattr(self, "do_" + arguments.command.replace("-", "_"))(arguments)

    async def do_import(self, arguments):
        box = await self.start().import_box(arguments.path, name=arguments.name)
        return {"id": box.id, "name": box.name}

    async def do_list(self, _):
        return [box_fields(info) for info in await self.start().list_info()]

    async def do_info(self, arguments):
        info = await self.start().get_info(arguments.box)
        if info is None:
            raise LookupError(f"no box is named {arguments.box}")
        return box_fields(info)

    async def do_remove(self, arguments):
        await self.start().remove(arguments.box, force=arguments.force)
        return {"removed": arguments.box}

    async def do_clone(self, arguments):
        box = await self.box(arguments.box)
        clone = await box.clone_box(name=arguments.new)
        return {"id": clone.id, "name": clone.name}

    async def do_export(self, arguments):
        box = await self.box(arguments.box)
        return {"path": str(await box.export(dest=arguments.directory))}

    async def do_snapshot_create(self, arguments):
        box = await self.box(arguments.box)
        return snapshot_fields(await box.snapshot.create(name=arguments.name))

    async def do_snapshot_list(self, arguments):
        box = await self.box(arguments.box)
        return [snapshot_fields(snapshot) for snapshot in await box.snapshot.list()]

    async def do_snapshot_restore(self, arguments):
        box = await self.box(arguments.box)
        await box.snapshot.restore(arguments.name)
        return {"restored": arguments.name}

    async def do_snapshot_remove(self, arguments):
        box = await self.box(arguments.box)
        await box.snapshot.remove(arguments.name)
        return {"removed": arguments.name}

    async def do_start(self, _):
        self.start()
        return {"started": True}

    async def do_hold(self, arguments):
        """Holds the runtime, and so the lock, until standard input ends or the time is up.

        Prints its one line as soon as it holds the lock.
        """
        self.start()
        say({"held": True})
        reading = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait([reading], timeout=arguments.seconds)
        return None


def box_fields(info):
    fields = ("id", "name", "created_at", "image", "cpus", "memory_mib")
    return {field: getattr(info, field) for field in fields} | {"status": info.state.status}


def snapshot_fields(info):
    fields = ("id", "box_id", "name", "created_at", "container_disk_bytes", "size_bytes")
    return {field: getattr(info, field) for field in fields}


class Refusing(argparse.ArgumentParser):
    """A parser that raises its errors instead of exiting, so that a batch continues."""

    def error(self, message):
        raise ValueError(f"{self.prog}: {message}")


def parser():
    top = Refusing(prog="wheel.py", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, *places, help):
        sub = commands.add_parser(name, help=help)
        for place in places:
            sub.add_argument(place)
        return sub

    make = command("make-archive", "path", "name", help="make a .boxlite archive with an ext4 disk")
    make.add_argument("--size", default="64M", help="size of the disk, as mke2fs takes it")
    make.add_argument("--tree", help="directory to copy to the disk; default: a hostname")
    make.add_argument("--options", default="{}", help="further box options, a JSON object")
    command("import", "path", "name", help="import an archive as a box")
    command("list", help="list the boxes")
    command("info", "box", help="describe one box")
    command("remove", "box", help="remove a box").add_argument("--force", action="store_true")
    command("clone", "box", "new", help="clone a box")
    command("export", "box", "directory", help="export a box into a directory")
    command("snapshot-create", "box", "name", help="take a snapshot")
    command("snapshot-list", "box", help="list a box's snapshots")
    command("snapshot-restore", "box", "name", help="restore a snapshot")
    command("snapshot-remove", "box", "name", help="remove a snapshot")
    command("start", help="start the runtime, which holds the home's lock until this process ends")
    hold = command("hold", help="hold the home's lock until standard input ends")
    hold.add_argument("seconds", type=float, help="longest time to hold it")
    command("batch", help="run the commands on standard input in one runtime")
    return top


PARSER = parser()


def say(answer):
    print(json.dumps(answer), flush=True)


async def one(judge, words):
    """Runs one command and prints its answer. Returns whether it succeeded."""
    try:
        answer = await judge.answer(PARSER.parse_args(words))
        if answer is not None:
            say(answer)
        return True
    except Exception as error:  # any error of BoxLite becomes the answer
        say({"error": str(error) or type(error).__name__})
        return False


async def batch(judge, lines):
    succeeded = True
    for line in lines:
        if line.strip():
            succeeded &= await one(judge, json.loads(line))
    return succeeded


async def main(home, words):
    judge = Judge(home)
    return await (batch(judge, sys.stdin) if words == ["batch"] else one(judge, words))


def leave(succeeded):
    for server in SERVERS:
        server.terminate()
        server.wait()
    # BoxLite's threads abort one exit in five, after all work is done. Exit without joining them.
    sys.stdout.flush()
    os._exit(0 if succeeded else 1)


# Seconds after which an idle server ends.
IDLE_SECONDS = 20


def serve(path):
    import boxlite  # noqa: F401  forked children inherit it

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    if os.fork() != 0:
        os._exit(0)
    # A session of its own, so that Ctrl-C in one test run does not end a server others use.
    os.setsid()
    listening.settimeout(IDLE_SECONDS)
    # There are many children. The kernel reaps them, and none of them collects the shared heap.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.disable()
    gc.freeze()
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            # A client that has just connected sees the connection close, and starts a new server.
            os.unlink(path)
            return
        if os.fork() == 0:
            listening.close()
            answer_request(connection)
        connection.close()


def answer_request(connection):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.setblocking(True)
    lines = connection.makefile()
    request = json.loads(next(lines))
    os.dup2(connection.fileno(), sys.stdout.fileno())
    say({"pid": os.getpid()})
    leave(asyncio.run(batch(Judge(request["home"]), lines)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        sys.exit()
    if len(sys.argv) < 3:
        print(__doc__)
        PARSER.print_help()
        sys.exit(2)
    leave(asyncio.run(main(sys.argv[1], sys.argv[2:])))
