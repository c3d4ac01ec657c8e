#!/usr/bin/env python3
"""How long a processor waits for random places in memory, and how much of that for the pages' addresses.

Gathers 8 bytes from random places of arrays of growing sizes, in huge pages where the system has them; of the
largest also pairs of places: in one line of the caches, in two lines of one page of 4 KiB, and in two such pages
of one huge page. Where the last takes longer than the second to last, addresses are looked up 4 KiB at a time
whatever the system does: a virtual machine whose memory lies in small pages of its host.

    python tools/page_walks.py --mib 4096
"""

import argparse
import mmap
import statistics
import time

import numpy as np

HUGE_PAGE = 1 << 21
ITEMS = 256  # of a gather, as of a batch
GATHERS = 2000
ROUNDS = 7
PAIRS = {
    "one line of the caches": 8,
    "two lines of a page of 4 KiB": 512,
    "two pages of a huge page": 1 << 14,
}


def memory(nbytes: int) -> np.ndarray:
    """Zeros in huge pages, all of them in memory."""
    held = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        held.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(held, np.uint8)
    array = array[-array.ctypes.data % HUGE_PAGE :][:nbytes].view(np.int64)
    array[:: mmap.PAGESIZE // 8] = 1
    return array


def nanoseconds(array: np.ndarray, rng: np.random.Generator, apart: int = 0) -> float:
    """Of a random place, or of a random one and another so many bytes from it; the median of rounds."""
    found = []
    for _ in range(ROUNDS):
        places = rng.integers(len(array), size=(GATHERS, ITEMS))
        if apart:
            places = np.stack([places, places ^ apart // 8], axis=-1).reshape(GATHERS, -1)
        out = np.empty(places.shape[1], np.int64)
        start = time.perf_counter()
        for some in places:
            array.take(some, out=out, mode="clip")
        found.append((time.perf_counter() - start) / GATHERS / ITEMS * 1e9)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048, help="size of the largest array (2048)")
    most, rng = parser.parse_args().mib << 20, np.random.default_rng(0)
    array = memory(most)
    for size in sorted({*(1 << bits for bits in range(20, most.bit_length(), 2)), most}):
        print(f"{size >> 20:6,} MiB: {nanoseconds(array[: size // 8], rng):5.1f} ns")
    for what, apart in PAIRS.items():
        print(f"pairs in {what}: {nanoseconds(array, rng, apart):5.1f} ns")


if __name__ == "__main__":
    main()
