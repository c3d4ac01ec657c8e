"""The compiled `decoding.c`, where there is a compiler."""

import numpy as np

def take_rows(
    start: np.ndarray,
    nbytes: np.ndarray,
    first: np.ndarray,
    within: np.ndarray,
    to: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
    row_nbytes: int,
    lz4: int,
    crc32c: int,
) -> int: ...
