"""What is measured, section by section, and the bar for each figure."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
from bench_compare import Bench, chosen, compare, comparison_table
from bench_report import say
from bench_worker import ADDERS, Worker, WorkerError

from replaystore import ReplayStore
from replaystore.files import drop_from_cache

GAMES = {"Breakout": "Breakout", "MsPacman": "Ms. Pac-Man"}
ATARI_BATCHES, VECTOR_BATCHES = (32, 256), (32, 256, 4096)
NOT_ATARI = {"cpprb (RAM, float32)"}
NOT_VECTORS = {"replaystore, cached", "sb3-extra-buffers (lz4-block/1)", "sb3-extra-buffers (zstd-3)"}
BEST_OF = ("SB3 (RAM)", "cpprb (RAM)", "cpprb (mmap)", "TorchRL (memmap)")
CACHE_BYTES = 8 << 20  # the default of `cache_bytes`
MIB = 1 << 20
LOW_NBYTES = 17 * 8 + 6 * 4 + 8 + 2  # of a low-dimensional row
IN_MEMORY = "low-dimensional, numpy arrays in memory"


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
    path, small = str(bench.long_store(count)), str(bench.long_store(500))
    times: dict[str, list[float]] = {"beyond imports": [], "with what is imported late": []}
    for _ in range(5):
        for what, first in zip(times, (small, None), strict=True):
            with bench.worker() as worker:
                worker.do("imports", path=first)
                times[what].append(worker.do("first_batch", path=path))
    stored = f"{count:,} transitions in {count // 500:,} episodes"
    rows = [[w, f"{statistics.median(t) * 1e3:.1f}", _spread([x * 1e3 for x in t])] for w, t in times.items()]
    title = f"Opening {stored} and the first batch of 256, page cache warm, ms"
    bench.report.table(title, ["", "median", "of 5"], rows)
    median = statistics.median(times["beyond imports"])
    bench.report.at_most(f"open {stored}, first batch (goal 0.03 s)", median, 0.1, " s")
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
            worker.do("imports", path=str(bench.long_store(500)))
            found[title] = worker.do("anonymous_memory", path=str(path), frame_stack=stack, batches=200)
        rows.append([title, f"{found[title] / MIB:.1f} MiB"])
    bench.report.table(
        "Anonymous memory beyond imports, at its highest over 200 batches of 256", ["", ""], rows
    )
    bar = (100e6 + CACHE_BYTES) / 1e6
    bench.report.at_most("anonymous memory while sampling", max(found.values()) / 1e6, bar, " MB")
    bench.report.figures["anonymous memory"] = found


def growth(bench: Bench) -> None:
    """Sampling time as the store grows, and that of numpy gathering the same rows in memory."""
    most = bench_data.available_memory() // 2 // LOW_NBYTES
    series: dict[str, Callable[[], dict[int, Callable[[Worker], Any]]]] = {
        "CartPole's shapes": lambda: _long(bench, small=True),
        "low-dimensional": lambda: _long(bench, small=False),
        "Breakout": lambda: _copied(bench, "Breakout"),
        IN_MEMORY: lambda: {count: _array_maker(count) for count in bench.sizes.growth if count < most},
    }
    for title, prepare in series.items():
        times = _batch_times(bench, title, prepare())
        first = next(iter(times.values()))
        ratios = {
            n: statistics.median(b / a for a, b in zip(first, ts, strict=True)) for n, ts in times.items()
        }
        rows = [
            [f"{n:,}", f"{statistics.median(ts):,.0f} µs", f"{ratios[n]:.2f}×"] for n, ts in times.items()
        ]
        header = ["transitions", "time", "of the smallest"]
        bench.report.table(f"Growth, {title}: time of a batch of 256", header, rows)
        bench.report.figures[f"growth, {title}"] = {str(n): ts for n, ts in times.items()}
        if title != IN_MEMORY:
            what = f"growth of sampling time, {title}, {min(times):,} to {max(times):,}"
            bench.report.bar(what, "< 2×", f"{ratios[max(times)]:.2f}×", ratios[max(times)] < 2)
            bench.forget_stores()


def _long(bench: Bench, *, small: bool) -> dict[int, Callable[[Worker], Any]]:
    return {count: _opener(bench.long_store(count, small=small), 1) for count in bench.sizes.growth}


def _copied(bench: Bench, name: str) -> dict[int, Callable[[Worker], Any]]:
    one = _length(bench.store(name))
    return {one * n: _opener(bench.copied_store(name, n), 4) for n in bench.sizes.copies}


def _opener(path: Path, frame_stack: int) -> Callable[[Worker], Any]:
    return lambda worker: worker.do("open_store", path=str(path), frame_stack=frame_stack, warm=True)


def _array_maker(transitions: int) -> Callable[[Worker], Any]:
    return lambda worker: worker.do("hold_arrays", transitions=transitions)


def _batch_times(
    bench: Bench, title: str, series: dict[int, Callable[[Worker], Any]]
) -> dict[int, list[float]]:
    """Microseconds of a batch of 256, by transitions; each in a process of its own, in turns."""
    workers: dict[int, Worker] = {}
    times: dict[int, list[float]] = {count: [] for count in series}
    try:
        for count, prepare in series.items():
            say(f"growth: reading {count:,} transitions, {title}")
            workers[count] = Worker(bench.log)
            prepare(workers[count])
        for _ in range(bench.sizes.rounds):
            for count, worker in workers.items():
                result = worker.do("rate", batch=256, seconds=bench.sizes.seconds)
                times[count].append(256e6 / result["wall"])
    finally:
        for worker in workers.values():
            worker.close()
    return times


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
        drop_from_cache(path)
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
            worker.do("rate", batch=256, seconds=3.0)  # until memory is full
            before, rates, drawn = worker.do("bytes_read"), [], 0.0
            for _ in range(3):
                start = time.perf_counter()
                rates.append(worker.do("rate", batch=256, seconds=3.0)["wall"])
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


def _length(path: Path) -> int:
    with ReplayStore.open(path) as store:
        return len(store)


def _spread(values: list[float]) -> str:
    return f"{min(values):,.4g} to {max(values):,.4g}"
