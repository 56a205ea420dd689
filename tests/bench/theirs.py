#!/usr/bin/env python3
"""BoxLite's side of a turn: one process, one kind of call, timed around the call alone.

    theirs.py HOME export BOX DIRECTORY
    theirs.py HOME import ARCHIVE NAME
    theirs.py HOME snapshot|clone|restore BOX TIMES COMMAND...
    theirs.py HOME list

COMMAND runs before each of the TIMES calls, untimed: it changes the disk, so that every call has
something to freeze. Prints a JSON array, an object a call: wall and cpu in seconds, memory in bytes.

A process of its own, because a runtime holds HOME/.lock for as long as its process lives, and the
mount needs that lock in its turn.
"""

import asyncio
import json
import os
import sys
import time

import boxlite

from measure import Memory, run, settle


async def timed(call):
    """What awaiting `call()` costs this process."""
    memory = Memory(os.getpid())
    wall, cpu = time.perf_counter(), time.process_time()
    await call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "memory": memory.peak()}


async def measure(runtime, kind, words):
    if kind == "list":
        return [await timed(runtime.list_info) for _ in range(2)]
    if kind == "import":
        return [await timed(lambda: runtime.import_box(words[0], name=words[1]))]
    box = await runtime.get(words[0])
    if kind == "export":
        return [await timed(lambda: box.export(dest=words[1]))]
    if kind == "restore":
        await box.snapshot.create(name="before")
    call = {
        "snapshot": lambda number: box.snapshot.create(name=f"theirs-{number}"),
        "clone": lambda number: box.clone_box(name=f"theirs-{number}"),
        "restore": lambda _: box.snapshot.restore("before"),
    }[kind]
    costs = []
    for number in range(int(words[1])):
        run(words[2:])
        settle()
        costs.append(await timed(lambda: call(number)))
    return costs


async def main(home, kind, *words):
    begun = time.perf_counter()
    runtime = boxlite.Boxlite(boxlite.Options(home_dir=home))
    start = time.perf_counter() - begun
    costs = await measure(runtime, kind, words)
    print(json.dumps([cost | {"start": start} for cost in costs]), flush=True)
    # BoxLite's threads make one exit in five an abort, after all is done: leave without them.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
