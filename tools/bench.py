#!/usr/bin/env python3
"""Measure replaystore side by side with its peers, and against the bars it has to meet.

The same transitions are given to each system in a process of its own: real Breakout and Ms. Pac-Man
frames (84x84, stacks of 4) and rows of HalfCheetah's shapes. Runs take turns between the systems and
each figure is the median of at least three; every ratio is the median of those of single turns. So
ratios can be relied on where the machine is noisy, and absolute figures are of this run only.

To set it up (peers that are not installed are named in the tables as such):

    python3 -m venv .bench && .bench/bin/pip install torch==2.13.0
    .bench/bin/pip install -r tools/bench-constraints.txt -e .
    .bench/bin/python tools/bench.py --quick
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import bench_data
from bench_peers import PEERS
from bench_worker import ADDERS, Worker, WorkerError

GAMES = {"Breakout": "Breakout", "MsPacman": "Ms. Pac-Man"}
ATARI_BATCHES, VECTOR_BATCHES = (32, 256), (32, 256, 4096)
NOT_ATARI = {"cpprb (RAM, float32)"}
NOT_VECTORS = {"replaystore, cached", "sb3-extra-buffers (lz4-block/1)", "sb3-extra-buffers (zstd-3)"}
BEST_OF = ("SB3 (RAM)", "cpprb (RAM)", "cpprb (mmap)", "TorchRL (memmap)")
CACHE_BYTES = 8 << 20  # the default of `cache_bytes`


class Sizes(NamedTuple):
    """How much is measured, and for how long."""

    rows: int  # recorded of each game
    atari: int  # transitions given to each peer
    vectors: int
    rounds: int
    seconds: float  # of each turn
    write: float  # seconds of writing
    opened: int  # transitions of the store that is opened
    growth: tuple[int, ...]
    copies: tuple[int, ...]  # of the Breakout store
    limit: int  # bytes of memory; the store is 5 times larger
    torchrl: int  # transitions given to TorchRL under a limit, 0 for not at all


MIB = 1 << 20
QUICK = Sizes(30_000, 8_000, 200_000, 3, 0.25, 3, 1_000_000, (100_000, 1_000_000), (1, 10), 160 * MIB, 0)
LONG = (100_000, 1_000_000, 10_000_000)
USUAL = Sizes(100_000, 30_000, 1_000_000, 5, 0.5, 15, 10_000_000, LONG, (1, 10), 256 * MIB, 45_000)
FULL = USUAL._replace(rounds=7, seconds=1.0, write=60, growth=(*LONG, 100_000_000), copies=(1, 10, 100))


class Bar(NamedTuple):
    """What was asked for and what was measured; `met` is None if it could not be."""

    what: str
    asked: str
    measured: str
    met: bool | None


class Report:
    """Prints tables as they come, and keeps all figures."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.figures: dict[str, Any] = {"machine": _machine()}

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        print(f"\n### {title}\n")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for cells in (header, ["-" * width for width in widths], *rows):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print(f"| {' | '.join(padded)} |", flush=True)

    def bar(self, what: str, asked: str, measured: str, met: bool | None) -> None:
        self.bars.append(Bar(what, asked, measured, met))

    def at_least(self, what: str, values: list[float | None], bars: list[float], unit: str = "×") -> None:
        """Each value has to reach its bar."""
        asked = " / ".join(f"≥ {bar:,g}{unit}" for bar in bars)
        known = [value for value in values if value is not None]
        if len(known) < len(bars):
            return self.bar(what, asked, "not measured", None)
        shown = " / ".join(
            f"{value:,.3g}{unit}" if value < 1000 else f"{value:,.0f}{unit}" for value in known
        )
        return self.bar(what, asked, shown, all(v >= b for v, b in zip(known, bars, strict=True)))

    def at_most(self, what: str, value: float, bar: float, unit: str) -> None:
        """A value must not pass its bar."""
        self.bar(what, f"≤ {bar:,g}{unit}", f"{value:,.3g}{unit}", value <= bar)

    def print_bars(self) -> None:
        verdicts = {True: "met", False: "missed", None: "?"}
        rows = [[bar.what, bar.asked, bar.measured, verdicts[bar.met]] for bar in self.bars]
        if rows:
            self.table("Bars", ["what", "asked", "measured", ""], rows)
        self.figures["bars"] = [bar._asdict() for bar in self.bars]


class Bench:
    """Where the run keeps its files, and what it shares between sections."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self.sizes = sizes
        self.data = Path(options.data).absolute()
        self.data.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="run-", dir=self.data))
        self.log = self.data / "peers.log"
        self.peers = options.peers or list(PEERS)
        self.report = Report()

    def recording(self, name: str) -> Path:
        """A game's or HalfCheetah's rows, recorded once for all runs."""
        folder = self.data / name
        rows = self.sizes.vectors * 101 // 100 if name == "cheetah" else self.sizes.rows
        if bench_data.recorded_rows(folder) < rows:
            say(f"recording {rows:,} rows: {name}")
            if name == "cheetah":
                bench_data.make_cheetah(rows, folder)
            else:
                bench_data.record_atari(name, rows, folder)
        return folder

    def store(self, name: str) -> Path:
        """A store of the first `rows` rows of a recording."""
        path = self.scratch / f"{name}.replay"
        if not path.exists():
            recording = bench_data.load(self.recording(name))
            transitions = int((recording.transitions() < self.sizes.rows - 1).sum())
            bench_data.write_store(path, recording.head(transitions))
        return path

    def long_store(self, transitions: int) -> Path:
        """A store of HalfCheetah rows in episodes of 500."""
        path = self.scratch / f"cheetah-{transitions}.replay"
        if not path.exists():
            say(f"writing {transitions:,} low-dimensional transitions")
            bench_data.write_long_store(path, bench_data.load(self.recording("cheetah")), transitions)
        return path

    def copied_store(self, name: str, copies: int) -> Path:
        """A store of many copies of a game's stream."""
        path = self.scratch / f"{name}-{copies}.replay"
        if not path.exists():
            bench_data.multiply_store(self.store(name), path, copies)
        return path

    @contextmanager
    def worker(self, limit: Any = None) -> Iterator[Worker]:
        worker = Worker(self.log, limit)
        try:
            yield worker
        finally:
            worker.close()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ---- side by side


class Comparison:
    """What the turns of several peers gave: `rates[peer][batch]`, one rate for each round."""

    def __init__(self) -> None:
        self.rates: dict[str, dict[int, list[float]]] = {}
        self.made: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}

    def rate(self, peer: str, batch: int) -> float:
        return statistics.median(self.rates[peer][batch])

    def ratio(self, peers: str | tuple[str, ...], others: str | tuple[str, ...], batch: int) -> float | None:
        """The median of the turns' ratios, of the best of `peers` to the best of `others`."""
        best, other = (self._best(names, batch) for names in (peers, others))
        return statistics.median(a / b for a, b in zip(best, other, strict=True)) if best and other else None

    def _best(self, names: str | tuple[str, ...], batch: int) -> list[float]:
        wanted = (names,) if isinstance(names, str) else names
        return [
            max(turn) for turn in zip(*(self.rates[n][batch] for n in wanted if n in self.rates), strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        return {"rates": self.rates, "made": self.made, "failures": self.failures}


def compare(
    bench: Bench, recording: str, transitions: int, peers: list[str], batches: tuple[int, ...]
) -> Comparison:
    """Give each peer the same transitions, and let them take turns."""
    found, workers = Comparison(), {}
    folder = Path(tempfile.mkdtemp(prefix=f"{recording}-", dir=bench.scratch))
    try:
        for peer in peers:
            say(f"{recording}: preparing {peer}")
            workers[peer] = Worker(bench.log)
            place = folder / "".join(letter if letter.isalnum() else "-" for letter in peer)
            place.mkdir()
            arguments = {"recording": str(bench.recording(recording)), "transitions": transitions}
            _attempt(found, workers, peer, lambda w, p=place, a=arguments, n=peer: found.made.update(
                {n: w.do("prepare", peer=n, folder=str(p), **a)}
            ))  # fmt: skip
        for turn in range(bench.sizes.rounds):
            say(f"{recording}: round {turn + 1} of {bench.sizes.rounds}")
            for batch in batches:
                for peer in list(workers):
                    _attempt(found, workers, peer, lambda w, n=peer, b=batch: found.rates.setdefault(n, {})
                        .setdefault(b, []).append(w.do("rate", batch=b, seconds=bench.sizes.seconds)))  # fmt: skip
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _attempt(found: Comparison, workers: dict[str, Worker], peer: str, job: Callable[[Worker], None]) -> None:
    try:
        job(workers[peer])
    except WorkerError as error:
        say(f"{peer}: {error}")
        found.failures[peer] = str(error).splitlines()[0]
        found.rates.pop(peer, None)
        workers.pop(peer).close()


def comparison_table(report: Report, title: str, found: Comparison, batches: tuple[int, ...]) -> None:
    """One row a peer: bytes, and for each batch size the rate and what replaystore's is of it."""
    header = ["", "bytes a transition"]
    for batch in batches:
        header += [f"batch {batch}: 1,000/s", "replaystore is"]
    rows = []
    for peer in [*found.made, *[name for name in found.failures if name not in found.made]]:
        if peer in found.failures:
            rows.append([peer, f"not measured: {found.failures[peer]:.150}", *[""] * 2 * len(batches)])
            continue
        cells = [peer, f"{found.made[peer]['bytes']:,.0f}"]
        for batch in batches:
            ratio = found.ratio("replaystore", peer, batch)
            cells += [f"{found.rate(peer, batch) / 1e3:,.1f}", f"{ratio:.3g}×" if ratio else ""]
        rows.append(cells)
    report.table(title, header, rows)
    report.figures[title] = found.as_json()


def chosen(bench: Bench, without: set[str]) -> list[str]:
    """The peers asked for; replaystore is always among them, and its store is written first."""
    rest = [name for name in bench.peers if name not in without and name != "replaystore"]
    return ["replaystore", *rest]


# ---- sections


def atari(bench: Bench) -> None:
    """4-stack Atari transitions, warm, uniform."""
    for game, title in GAMES.items():
        found = compare(bench, game, bench.sizes.atari, chosen(bench, NOT_ATARI), ATARI_BATCHES)
        comparison_table(
            bench.report,
            f"{title}: {bench.sizes.atari:,} transitions of 4 frames, warm",
            found,
            ATARI_BATCHES,
        )

        def bar(
            what: str, peers: Any, others: Any, bars: list[float], f: Any = found, t: str = title
        ) -> None:
            values = [f.ratio(peers, others, batch) for batch in ATARI_BATCHES]
            bench.report.at_least(f"{t}, batch 32 / 256: {what}", values, bars)

        extra = "sb3-extra-buffers (lz4-block/1)"
        workers = "replaystore, loader, 2 workers"
        bar("against TorchRL memmap", "replaystore", "TorchRL (memmap)", [2, 1.8])
        bar("goal: against SB3 in RAM", "replaystore", "SB3 (RAM)", [1, 1])
        bar("against sb3-extra-buffers lz4-block (goal 2×)", "replaystore", extra, [1.3, 1.3])
        bar("loader with 2 workers against one process", workers, "replaystore", [1.4, 1.4])
        bar("goal: loader with 2 workers against cpprb in RAM", workers, "cpprb (RAM)", [1, 1])
        bar("against tensorstore", "replaystore", "tensorstore", [5, 5])
        bar("against zarr oindex", "replaystore", "zarr oindex", [100, 100])
        bar("cached, against SB3 in RAM", "replaystore, cached", "SB3 (RAM)", [1.5, 1.5])
        bar("goal: cached, against cpprb in RAM", "replaystore, cached", "cpprb (RAM)", [1, 1])
        bar("loader in one process against store.sample", "replaystore, loader", "replaystore", [0.9, 0.9])


def vectors(bench: Bench) -> None:
    """Low-dimensional transitions: 17 float64, 6 float32."""
    count = bench.sizes.vectors
    found = compare(bench, "cheetah", count, chosen(bench, NOT_VECTORS), VECTOR_BATCHES)
    comparison_table(bench.report, f"HalfCheetah shapes: {count:,} transitions", found, VECTOR_BATCHES)
    values = [found.ratio("replaystore", BEST_OF, batch) for batch in VECTOR_BATCHES]
    what = "low-dimensional, batch 32 / 256 / 4096, against the best of SB3, cpprb, TorchRL (goal 1.3×)"
    bench.report.at_least(what, values, [1, 1, 1])


def size(bench: Bench) -> None:
    """Bytes per transition, every disk block counted."""
    rows = []
    for (game, title), bar, goal in zip(GAMES.items(), (130, 370), (100, 300), strict=True):
        path = bench.store(game)
        length = _length(path)
        total = bench_data.disk_bytes(path) / length
        frames = bench_data.disk_bytes(path / "streams/000000/observation") / length
        rows.append([title, f"{length:,}", f"{total:.1f}", f"{frames:.1f}", f"{28224 / total:.0f}×"])
        bench.report.at_most(f"bytes a transition, {title} (goal {goal})", total, bar, " B")
        bench.report.figures[f"bytes a transition, {title}"] = {"total": total, "observation": frames}
    header = ["", "transitions", "bytes a transition", "of which frames", "smaller than 4 raw frames"]
    bench.report.table("Size on disk", header, rows)


def write(bench: Bench) -> None:
    """Rows written through `store.step`, commits on, until the last flush returned."""
    runs: dict[str, list[float]] = {}
    for turn in range(3):
        say(f"writing: round {turn + 1} of 3")
        for name in ADDERS:
            with bench.worker() as worker:
                arguments = {"peer": name, "recording": str(bench.recording("cheetah")), "seconds": 1.0}
                try:
                    runs.setdefault(f"{name}, low-dimensional, add", []).append(
                        worker.do("add_rate", **arguments)
                    )
                except WorkerError as error:
                    say(f"{name}: {error}")
        for name, title in {"cheetah": "low-dimensional", **GAMES}.items():
            seconds = bench.sizes.write if name == "Breakout" else min(5, bench.sizes.write)
            path = bench.scratch / f"written-{name}.replay"
            with bench.worker() as worker:
                arguments = {"recording": str(bench.recording(name)), "path": str(path), "seconds": seconds}
                result = worker.do("step_rate", **arguments)
            runs.setdefault(f"replaystore, {title}, step", []).append(result["rate"])
            shutil.rmtree(path)
    rows = [[what, f"{statistics.median(rates):,.0f}", _spread(rates)] for what, rates in runs.items()]
    bench.report.table("Writing, one environment, rows a second", ["", "median", "lowest to highest"], rows)
    bench.report.figures["writing"] = runs
    steps = statistics.median(runs["replaystore, low-dimensional, step"])
    bench.report.at_least("step, low-dimensional, commits on (goal 300,000/s)", [steps], [150_000], "/s")
    for title in GAMES.values():
        value = statistics.median(runs[f"replaystore, {title}, step"])
        seconds = bench.sizes.write if title == "Breakout" else min(5, bench.sizes.write)
        bench.report.at_least(f"{title} rows written, {seconds:g} s", [value], [30_000], "/s")


def opening(bench: Bench) -> None:
    """Time to open a large store and draw the first batch, beyond imports."""
    count = bench.sizes.opened
    path, times = bench.long_store(count), []
    for _ in range(5):
        with bench.worker() as worker:
            worker.do("imports")
            times.append(worker.do("first_batch", path=str(path)))
    median = statistics.median(times)
    what = f"{count:,} transitions in {count // 500:,} episodes"
    rows = [[what, f"{median * 1e3:.1f} ms", _spread([t * 1e3 for t in times])]]
    bench.report.table("Opening and the first batch of 256, page cache warm", ["", "median", "of 5"], rows)
    bench.report.at_most(f"open {what}, first batch (goal 0.03 s)", median, 0.1, " s")
    bench.report.figures["opening"] = {"transitions": count, "seconds": times}


def memory(bench: Bench) -> None:
    """Anonymous memory that opening and sampling add to the imports."""
    copies = bench.sizes.copies[-1]
    stores = {
        "Breakout": (bench.store("Breakout"), 4),
        f"Breakout, {copies} streams": (bench.copied_store("Breakout", copies), 4),
        f"low-dimensional, {bench.sizes.opened:,}": (bench.long_store(bench.sizes.opened), 1),
    }
    rows, found = [], {}
    for title, (path, stack) in stores.items():
        with bench.worker() as worker:
            worker.do("imports")
            found[title] = worker.do("anonymous_memory", path=str(path), frame_stack=stack, batches=200)
        rows.append([title, f"{found[title] / MIB:.1f} MiB"])
    bench.report.table(
        "Anonymous memory beyond imports, at its highest over 200 batches of 256", ["", ""], rows
    )
    bar = (100e6 + CACHE_BYTES) / 1e6
    bench.report.at_most("anonymous memory while sampling", max(found.values()) / 1e6, bar, " MB")
    bench.report.figures["anonymous memory"] = found


def growth(bench: Bench) -> None:
    """Sampling time as the store grows."""
    one = _length(bench.store("Breakout"))
    series = {
        "low-dimensional": [(count, bench.long_store(count), 1) for count in bench.sizes.growth],
        "Breakout": [(one * n, bench.copied_store("Breakout", n), 4) for n in bench.sizes.copies],
    }
    for title, stores in series.items():
        workers, times = [], {count: [] for count, _, _ in stores}
        try:
            for count, path, stack in stores:
                say(f"growth: reading {count:,} transitions, {title}")
                workers.append((count, Worker(bench.log)))
                workers[-1][1].do("open_store", path=str(path), frame_stack=stack, warm=True)
            for _ in range(bench.sizes.rounds):
                for count, worker in workers:
                    times[count].append(256e6 / worker.do("rate", batch=256, seconds=bench.sizes.seconds))
        finally:
            for _, worker in workers:
                worker.close()
        first = times[stores[0][0]]
        ratios = {
            n: statistics.median(b / a for a, b in zip(first, ts, strict=True)) for n, ts in times.items()
        }
        rows = [
            [f"{n:,}", f"{statistics.median(ts):,.0f} µs", f"{ratios[n]:.2f}×"] for n, ts in times.items()
        ]
        bench.report.table(
            f"Growth, {title}: time of a batch of 256", ["transitions", "time", "of the smallest"], rows
        )
        grown = ratios[stores[-1][0]]
        what = f"growth of sampling time, {title}, {stores[0][0]:,} to {stores[-1][0]:,}"
        bench.report.bar(what, "< 2×", f"{grown:.2f}×", grown < 2)
        bench.report.figures[f"growth, {title}"] = {str(n): ts for n, ts in times.items()}


def limited(bench: Bench) -> None:
    """A store five times larger than the memory that the process may have."""
    root = bench_data.cgroup_root()
    if root is None:
        reason = "memory control groups cannot be made here (root, and /sys/fs/cgroup writable, are needed)"
        bench.report.bar("store 5× larger than memory", "≥ 20,000/s, ≥ 300× TorchRL", reason, None)
        print(f"\nStore 5× larger than memory: not measured: {reason}.")
        return
    rows, rates = [], {}
    for game, title in reversed(GAMES.items()):
        one = bench_data.disk_bytes(bench.store(game))
        path = bench.copied_store(game, -(-5 * bench.sizes.limit // one))
        bench_data.drop_from_cache(path)
        result = _under_limit(bench, root, bench.sizes.limit, lambda w, p=path: w.do(
            "open_store", path=str(p), frame_stack=4, warm=False))  # fmt: skip
        rates[title] = result["rates"]
        size_of = bench_data.disk_bytes(path)
        rows.append(_limited_row(f"replaystore, {title}", size_of, bench.sizes.limit, result))
        shutil.rmtree(path)
    if bench.sizes.torchrl:
        nbytes = bench.sizes.torchrl * 56_480
        result = _torchrl_under_limit(bench, root, nbytes)
        rows.append(_limited_row("TorchRL (memmap), Ms. Pac-Man", nbytes, nbytes // 5, result))
        rates["TorchRL"] = result["rates"]
    header = ["", "store", "limit", "transitions/s", "read from disk, bytes a transition"]
    bench.report.table("Store 5× larger than the memory limit (page cache included), batch 256", header, rows)
    for title in GAMES.values():
        value = statistics.median(rates[title])
        bench.report.at_least(f"5× larger than memory, {title} (goal 40,000/s)", [value], [20_000], "/s")
    ratio = (
        statistics.median(rates["Ms. Pac-Man"]) / statistics.median(rates["TorchRL"])
        if rates.get("TorchRL")
        else None
    )
    bench.report.at_least("5× larger than memory, against TorchRL memmap", [ratio], [300])
    bench.report.figures["5x larger than memory"] = rates


def _torchrl_under_limit(bench: Bench, root: Path, nbytes: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="torchrl-", dir=bench.scratch))
    arguments = {"recording": str(bench.recording("MsPacman")), "transitions": bench.sizes.torchrl}
    prepare = {"peer": "TorchRL (memmap)", "folder": str(folder), **arguments}
    try:
        return _under_limit(bench, root, nbytes // 5, lambda w: w.do("prepare", **prepare))
    except WorkerError as error:
        return {"rates": [], "read": 0, "failure": str(error)}
    finally:
        shutil.rmtree(folder)


def _under_limit(bench: Bench, root: Path, limit: int, prepare: Callable[[Worker], Any]) -> dict[str, Any]:
    say(f"sampling within {limit / MIB:.0f} MiB")
    group = bench_data.MemoryLimit(root, limit)
    try:
        with bench.worker(group) as worker:
            prepare(worker)
            worker.do("rate", batch=256, seconds=4 * bench.sizes.seconds)  # until memory is full
            before, rates, drawn = worker.do("bytes_read"), [], 0.0
            for _ in range(3):
                start = time.perf_counter()
                rates.append(worker.do("rate", batch=256, seconds=4 * bench.sizes.seconds))
                drawn += rates[-1] * (time.perf_counter() - start)
            return {"rates": rates, "read": (worker.do("bytes_read") - before) / drawn}
    finally:
        time.sleep(0.2)  # a group can be removed when its last process is gone
        group.remove()


def _limited_row(title: str, nbytes: int, limit: int, result: dict[str, Any]) -> list[str]:
    sizes = [f"{nbytes / MIB:,.0f} MiB", f"{limit / MIB:,.0f} MiB"]
    if not result["rates"]:
        return [title, *sizes, f"not measured: {result['failure']:.100}", ""]
    return [title, *sizes, f"{statistics.median(result['rates']):,.0f}", f"{result['read']:,.0f}"]


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "atari": atari,
    "vectors": vectors,
    "size": size,
    "write": write,
    "open": opening,
    "memory": memory,
    "growth": growth,
    "limited": limited,
}


# ---- the command line


def _length(path: Path) -> int:
    from replaystore import ReplayStore

    with ReplayStore.open(path) as store:
        return len(store)


def _spread(values: list[float]) -> str:
    return f"{min(values):,.4g} to {max(values):,.4g}"


def _machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return {"date": time.strftime("%Y-%m-%d"), "cpu": names[:1], "cores": cores, "load": load,
            "system": platform.platform(), "python": platform.python_version()}  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--quick", action="store_true", help="smaller sizes, about 3 minutes instead of 15")
    much.add_argument("--full", action="store_true", help="60 s of writing, stores of up to 10^8 transitions")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="NAME", help=f"of {'; '.join(PEERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    default = os.path.join(tempfile.gettempdir(), "replaystore-bench")
    parser.add_argument("--data", default=default, help=f"recordings, kept for the next run ({default})")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    sizes = QUICK if options.quick else FULL if options.full else USUAL
    bench = Bench(options, sizes)
    machine = bench.report.figures["machine"]
    print(f"{machine['date']}, {machine['cores']} cores, {' '.join(machine['cpu'])}, {machine['system']},"
          f" Python {machine['python']}, load {machine['load']:.1f}")  # fmt: skip
    try:
        for name in options.only or SECTIONS:
            say(f"section {name}")
            SECTIONS[name](bench)
        bench.report.print_bars()
        if options.json:
            options.json.write_text(json.dumps(bench.report.figures, indent=1))
    finally:
        shutil.rmtree(bench.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
