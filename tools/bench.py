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
import shutil
import tempfile
from pathlib import Path

from bench_compare import Bench, Sizes
from bench_report import say
from bench_sections import SECTIONS
from bench_stores import PEERS

MIB = 1 << 20
QUICK = Sizes(30_000, 8_000, 200_000, 5, 0.15, 3, 1_000_000, (100_000, 1_000_000), (1, 10), 160 * MIB, 0)
LONG = (100_000, 1_000_000, 10_000_000)
USUAL = Sizes(100_000, 30_000, 1_000_000, 9, 0.3, 15, 10_000_000, LONG, (1, 10), 256 * MIB, 45_000)
FULL = USUAL._replace(rounds=11, seconds=0.6, write=60, growth=(*LONG, 100_000_000), copies=(1, 10, 100))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--quick", action="store_true", help="smaller sizes, about 5 minutes instead of 15")
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
    bench = Bench(Path(options.data), sizes, options.peers or list(PEERS))
    machine = bench.report.figures["machine"]
    print(f"{machine['date']}, {machine['cores']} cores, {machine['cpu']}, {machine['system']},"
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
