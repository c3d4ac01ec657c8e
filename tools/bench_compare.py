"""Peers side by side: each is given the same transitions, and they take turns."""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import bench_data
from bench_report import Report, say
from bench_worker import Worker, WorkerError


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


class Bench:
    """Where the run keeps its files, and what it shares between sections."""

    def __init__(self, data: Path, sizes: Sizes, peers: list[str]) -> None:
        self.sizes = sizes
        self.data = data.absolute()
        self.data.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="run-", dir=self.data))
        self.log = self.data / "peers.log"
        self.peers = peers
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

    def long_store(self, transitions: int, *, small: bool = False) -> Path:
        """A store of HalfCheetah rows, or of rows of CartPole's shapes, in episodes of 500."""
        path = self.scratch / f"{'cartpole' if small else 'cheetah'}-{transitions}.replay"
        if not path.exists():
            say(f"writing {transitions:,} transitions: {path.stem}")
            recording = bench_data.load(self.recording("cheetah"))
            if small:
                recording = bench_data.like_cartpole(recording)
            bench_data.write_long_store(path, recording, transitions)
        return path

    def forget_stores(self) -> None:
        """Remove the stores made so far: those to come need the memory and the disk."""
        for path in self.scratch.glob("*.replay"):
            shutil.rmtree(path)

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


class Comparison:
    """What the turns of several peers gave: `rates[peer][batch]`, one rate for each round.

    `cpu` is the same by CPU time.
    """

    def __init__(self) -> None:
        self.rates: dict[str, dict[int, list[float]]] = {}
        self.cpu: dict[str, dict[int, list[float]]] = {}
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

    def cpu_ratio(self, peer: str, other: str, batch: int) -> float:
        """The same by the CPU time of the two processes."""
        both = zip(self.cpu[peer][batch], self.cpu[other][batch], strict=True)
        return statistics.median(a / b for a, b in both)

    def as_json(self) -> dict[str, Any]:
        return {"rates": self.rates, "cpu": self.cpu, "made": self.made, "failures": self.failures}


def compare(
    bench: Bench, recording: str, transitions: int, peers: list[str], batches: tuple[int, ...]
) -> Comparison:
    """Give each peer the same transitions, and let them take turns."""
    found, workers = Comparison(), {}
    folder = Path(tempfile.mkdtemp(prefix=f"{recording}-", dir=bench.scratch))
    arguments = {"recording": str(bench.recording(recording)), "transitions": transitions}
    try:
        for number, peer in enumerate(peers):
            say(f"{recording}: preparing {peer}")
            workers[peer] = Worker(bench.log)
            place = folder / str(number)
            place.mkdir()
            made = _attempt(found, workers, peer, "prepare", peer=peer, folder=str(place), **arguments)
            if made is not None:
                found.made[peer] = made
                found.rates[peer] = {batch: [] for batch in batches}
                found.cpu[peer] = {batch: [] for batch in batches}
        for turn in range(bench.sizes.rounds):
            say(f"{recording}: round {turn + 1} of {bench.sizes.rounds}")
            for batch in batches:
                for peer in list(workers):
                    rate = _attempt(found, workers, peer, "rate", batch=batch, seconds=bench.sizes.seconds)
                    if rate is not None:
                        found.rates[peer][batch].append(rate["wall"])
                        found.cpu[peer][batch].append(rate["cpu"])
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _attempt(found: Comparison, workers: dict[str, Worker], name: str, job: str, **arguments: Any) -> Any:
    """Have a peer do a job; one that cannot is left out from then on, with the reason."""
    try:
        return workers[name].do(job, **arguments)
    except WorkerError as error:
        say(f"{name}: {error}")
        found.failures[name] = str(error).splitlines()[0]
        found.rates.pop(name, None)
        workers.pop(name).close()
        return None


def comparison_table(report: Report, title: str, found: Comparison, batches: tuple[int, ...]) -> None:
    """One row a peer: bytes, and for each batch size the rate and what replaystore's is of it."""
    header = ["", "bytes a transition"]
    for batch in batches:
        header += [f"batch {batch}: 1,000/s", "replaystore is", "by CPU"]
    rows = []
    for peer in [*found.made, *[name for name in found.failures if name not in found.made]]:
        if peer in found.failures:
            rows.append([peer, f"not measured: {found.failures[peer]:.150}", *[""] * 3 * len(batches)])
            continue
        cells = [peer, f"{found.made[peer]['bytes']:,.0f}"]
        for batch in batches:
            ratio = found.ratio("replaystore", peer, batch)
            cpu = "" if "workers" in peer else f"{found.cpu_ratio('replaystore', peer, batch):.3g}×"
            cells += [f"{found.rate(peer, batch) / 1e3:,.1f}", f"{ratio:.3g}×" if ratio else "", cpu]
        rows.append(cells)
    report.table(title, header, rows)
    report.figures[title] = found.as_json()


def chosen(bench: Bench, without: set[str]) -> list[str]:
    """The peers asked for; replaystore is always among them, and its store is written first."""
    rest = [name for name in bench.peers if name not in without and name != "replaystore"]
    return ["replaystore", *rest]
