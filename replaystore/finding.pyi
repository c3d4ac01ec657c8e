"""The compiled `finding.c`, where there is a compiler."""

import numpy as np

def locate(
    numbers: np.ndarray,
    rows: np.ndarray,
    count: int,
    buckets: np.ndarray,
    bits: int,
    stride: int,
    out: np.ndarray,
) -> None: ...
def copy_runs(
    source: np.ndarray, row_nbytes: int, length: int, apart: int, numbers: np.ndarray, out: np.ndarray
) -> None: ...
def take_order(start: int, length: int, bits: int, keys: np.ndarray, out: np.ndarray) -> None: ...
