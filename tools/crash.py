"""Recorders are killed with SIGKILL at random moments, again and again, on one store.

After each kill every row for which `flush` had returned must be there once, unaltered and in order;
then the next recorder appends. With --strace, where it is installed, a short recording is killed
instead at the N-th of each system call that changes files, for each N, and its store appended to.
strace counts each thread's calls for itself, and kills at the first thread's N-th.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import astuple, replace
from multiprocessing.connection import Connection
from pathlib import Path

from replaystore import ReplayStore

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from killing import Child, Ledger, Plan, Tally, kill_again_and_again, step

CALLS = ("pwrite64", "fsync", "rename", "unlink", "ftruncate", "mkdir")
SHORT = Plan("opened", 0, rows=60, most=25, num_envs=3)
HEADINGS = ("rounds", "rows safe", "rows lost", "stores failed", "leftover files", "reopened in ms")
TRACED = """
import sys
from pathlib import Path
from multiprocessing.connection import Connection
from killing import Plan, record
path, number, rows, most, num_envs, pipe = sys.argv[1], *map(int, sys.argv[2:])
plan = Plan("", 0, rows=rows, most=most, num_envs=num_envs)
record(Path(path), plan, number, Connection(pipe, readable=False))
"""


class TracedChild(Child):
    """A recorder that dies at the N-th of its system calls of one kind."""

    def __init__(self, path: Path, number: int, *, call: str, when: int) -> None:
        self._inject = f"inject={call}:signal=KILL:when={when}"
        super().__init__(path, SHORT, number)

    def _start(self, path: Path, say: Connection) -> None:
        tracer = ["strace", "-f", "-qq", "-o", os.devnull, "-e", self._inject]
        arguments = (path, self.number, SHORT.rows, SHORT.most, SHORT.num_envs, say.fileno())
        command = [*tracer, sys.executable, "-c", TRACED, *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._traced = subprocess.Popen(command, env=env, pass_fds=[say.fileno()])

    def end(self) -> None:
        self.listen()
        status = self._traced.wait()
        assert status in (0, -signal.SIGKILL), f"the recorder ended with status {status}"
        self.was_killed = status != 0


def kill_at_every(call: str, started: Ledger, folder: Path) -> Tally:
    """Each kill is on a fresh copy of a store whose recorder was killed; the last comes too late."""
    total, goes_on = Tally(), True
    while goes_on:
        ledger = Ledger(folder / f"{call}-{total.rounds + 1}", started.rows)
        shutil.copytree(started.path, ledger.path)
        child = TracedChild(ledger.path, 1, call=call, when=total.rounds + 1)
        tally = ledger.settle([child], deep=True)
        with ReplayStore.open(ledger.path, "a", num_envs=SHORT.num_envs) as store:
            for count in range(20):
                step(store, 2, SHORT.num_envs, count)
        ledger.rows[2] = 20 * SHORT.num_envs
        tally.add(replace(ledger.settle([], deep=True), rounds=0))
        total.add(tally)
        goes_on = child.was_killed
        if not tally.lost + tally.failed:
            shutil.rmtree(ledger.path)
    return total


def kill_at_every_call(folder: Path) -> dict[str, Tally]:
    if shutil.which("strace") is None:
        sys.exit("--strace: expected strace to be installed")
    started = Ledger.create(folder / "started")
    child = Child(started.path, SHORT._replace(rows=2000), 0)
    child.kill(after=0.1)
    assert not started.settle([child], deep=True).failed
    return {call: kill_at_every(call, started, folder) for call in CALLS}


def print_table(tallies: Mapping[str, Tally]) -> None:
    print(f"{'':22}" + "".join(f"{name:>16}" for name in HEADINGS))
    for name, tally in tallies.items():
        *counts, slowest = astuple(tally)
        print(f"{name:22}" + "".join(f"{each:16,}" for each in counts) + f"{slowest * 1e3:16.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strace", action="store_true", help="kill at each system call instead")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    if options.strace:
        tallies = kill_at_every_call(folder)
    else:
        tallies = kill_again_and_again(folder, options.rounds, random.Random(options.seed))
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    print_table(tallies | {"total": total})
    if total.lost or total.failed:
        sys.exit(f"the stores that failed are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
