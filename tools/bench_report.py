"""What the bench prints: a table for each section, and at the end the bars."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


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


def say(text: str) -> None:
    """Tell how far the run is, beside the tables."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": " ".join(names[:1]),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
    }
