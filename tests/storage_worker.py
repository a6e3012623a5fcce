"""What `test_storage_hostile.py` runs in processes of their own: `storage_worker.py WHAT ...`.

`fuzz FOLDER FIRST LAST CHUNK` loads mutated files with these seeds, `kill FOLDER KILLS` kills
processes that save, `race FOLDER ROUNDS` lets two save to one path at once. Each prints what it
found, as JSON.
"""

import collections
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import storage_mutants

from sparsejax import storage
from sparsejax.storage import _positions, _values

LIMIT = 1 << 20  # bytes by which a tree may exceed its file
SLOW = 5  # seconds that no file may take


# Mutated files


def peak():
    """Of this process's memory so far, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def bits(checkpoint):
    """All that a checkpoint says."""

    def one(leaf):
        leaf = np.asarray(leaf)
        return str(leaf.dtype), leaf.shape, leaf.tobytes()

    leaves, structure = jax.tree.flatten((checkpoint.params, checkpoint.masks))
    return str(structure), tuple(map(one, leaves)), tuple(checkpoint.metadata.items())


def place(error):
    """Which line of the library refused first, and the words of it that are the same each time."""
    while error.__context__ is not None and ours(error.__context__):
        error = error.__context__
    frame = ours(error)[-1]
    return f"{Path(frame.filename).stem}.{frame.name}: {frame.line}"


def ours(error):
    """The frames of the library among those of an error."""
    return [f for f in traceback.extract_tb(error.__traceback__) if "sparsejax" in f.filename]


def loaded(path):
    """What a file holds, bit for bit; or which line refused it."""
    try:
        return "loaded", bits(storage.load(path, limit=LIMIT))
    except storage.InvalidFileError as error:
        if str(path) not in str(error) or not str(error).isprintable():
            raise AssertionError("names no file, or is no line of text") from error
        return place(error), None


def late(number, frame):
    raise TimeoutError(f"takes more than {SLOW} s")


def fuzz(folder, first, last, chunk):
    """Failures, and how many files which line of the library refused.

    The library works on `chunk` entries at a time: few, so that small files have many pieces.
    """
    _positions.CHUNK, _values._SEGMENT = chunk, chunk // 4
    signal.signal(signal.SIGALRM, late)
    path = folder / f"mutant-{first}"
    files = storage_mutants.corpus(folder)
    # Not anew each time: many a file system flushes a file that replaces another.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def outcome(file):
        os.pwrite(descriptor, file, 0)
        os.truncate(descriptor, len(file))
        return loaded(path)

    originals = {outcome(file)[1] for file in files}
    places, failures, before, slowest = collections.Counter(), [], peak(), 0.0
    for seed in range(first, last):
        mutant, guarded = storage_mutants.mutant(random.Random(seed), files)
        signal.setitimer(signal.ITIMER_REAL, SLOW)
        start = time.perf_counter()
        try:
            where, found = outcome(mutant)
            assert not guarded or found is None or found in originals, "something else is loaded"
        except Exception:
            failures.append(f"seed {seed}: {traceback.format_exc()}")
            where = "failed"
        signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.perf_counter() - start)
        places[where] += 1
    grown = peak() - before
    return {"failures": failures, "places": places, "slowest": slowest, "grown": grown}


# Processes that save


def version(number, size=1 << 19):
    """Params and masks that are all of one version."""
    rng = np.random.default_rng(number)
    mask = rng.random((4, size // 4), np.float32) < 0.3
    w = np.where(mask, rng.standard_normal(mask.shape, np.float32), np.float32(0))
    return {"w": w, "b": np.full(7, number)}, {"w": mask, "b": np.array(True)}


class Saver:
    """A forked process that saves a version, once it is told to."""

    def __init__(self, path, trees, number):
        there, go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.read(there, 1)
                storage.save(path, *trees, metadata={"version": str(number)})
                code = 0
            finally:
                os._exit(code)
        self.go = go
        os.close(there)

    def start(self):
        os.write(self.go, b"x")
        os.close(self.go)

    def result(self):
        """Its exit status, negative where it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def whole(path, known):
    """The version in a file, which is there whole; None where there is no file."""
    try:
        found = storage.load(path)
    except FileNotFoundError:
        return None
    number = int(found.metadata["version"])
    params, masks = known[number]
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params)), "other params"
    assert jax.tree.all(jax.tree.map(np.array_equal, found.masks, masks)), "other masks"
    return number


def beside(path):
    """What lies in the folder of a file but the file itself."""
    return sorted(set(os.listdir(path.parent)) - {path.name})


def kill(folder, kills):
    """After each kill: was it the old or the new version, and what was left half written."""
    path, rng = folder / "checkpoint", random.Random(0)
    known = [version(number) for number in range(4)]
    times = []
    for _ in range(5):
        saver, start = Saver(path, known[0], 0), time.perf_counter()
        saver.start()
        assert saver.result() == 0
        times.append(time.perf_counter() - start)
    duration = sorted(times)[2]
    current, counts = 0, collections.Counter()
    for number in range(kills):
        if number % 10 == 0:  # the first save to a path
            path.unlink()
            current = None
        new = (current or 0) % 3 + 1
        saver = Saver(path, known[new], new)
        saver.start()
        time.sleep(rng.uniform(0, 1.1 * duration))
        os.kill(saver.pid, signal.SIGKILL)
        status, found = saver.result(), whole(path, known)
        assert found in ((new,) if status == 0 else (current, new)), f"{found} is neither"
        assert status in (0, -signal.SIGKILL)
        counts["finished" if status == 0 else "new" if found == new else "old"] += 1
        counts["left"] += bool(beside(path))
        current = found
        if number % 10 == 9:
            storage.save(path, *known[0], metadata={"version": "0"})
            assert not beside(path), "leftovers are not swept"
            current = whole(path, known)
    return counts | {"milliseconds": round(1e3 * duration)}


def race(folder, rounds):
    """Which of two versions is there in the end, and how many whole ones are seen meanwhile."""
    path = folder / "checkpoint"
    known = [version(number) for number in range(3)]
    storage.save(path, *known[0], metadata={"version": "0"})
    won, seen = collections.Counter(), collections.Counter()
    for _ in range(rounds):
        savers = [Saver(path, known[number], number) for number in (1, 2)]
        for saver in savers:
            saver.start()
        alive = {saver.pid for saver in savers}
        while alive:
            seen[whole(path, known)] += 1
            for pid in list(alive):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    assert status == 0, "a save failed beside another"
                    alive.remove(pid)
        won[whole(path, known)] += 1
        assert not beside(path), "leftovers"
    return {"won": won, "seen": seen}


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    # Forks of a process that has started a backend of JAX could deadlock; saving starts none.
    found = {"fuzz": fuzz, "kill": kill, "race": race}[what](Path(where), *map(int, numbers))
    json.dump(found, sys.stdout)
