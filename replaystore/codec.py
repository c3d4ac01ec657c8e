"""One packed field's compressor and checksum.

    blosc frame | crc32c

An encoded chunk is a blosc frame (zarr's `blosc` codec) and the little-endian crc32c of it
(zarr's `crc32c` codec). The frame begins with 16 bytes: version, lz version, flags, typesize,
then the decoded bytes, the block's and the frame's own bytes, each a little-endian u32.
"""

import ctypes
import struct
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np

from replaystore.errors import CorruptionError
from replaystore.field import Field

# Only contextual calls are safe beside a forked worker or another thread; zarr sets it as well.
numcodecs.blosc.use_threads = False

SHUFFLES = {"": 0, "-shuffle": 1, "-bitshuffle": 2}
RESIDUE = 0x48674BC7  # the crc32c of any bytes followed by their own crc32c

_HEADER = struct.Struct("<4xI4xI")
_checksum = google_crc32c.value


def crc32c(data: Any, crc: int = 0) -> int:
    """Extend a crc32c by bytes or a contiguous array."""
    return int(google_crc32c.extend(crc, data))


def blosc_settings(codec: str) -> tuple[str, int, int]:
    """Split "blosc-NAME-LEVEL[-shuffle|-bitshuffle]" into blosc's name, level and shuffle."""
    _, name, level, *shuffle = codec.split("-")
    return name, int(level), SHUFFLES["".join(f"-{kind}" for kind in shuffle)]


class ChunkCodec:
    """Encodes and decodes the chunks of one packed field."""

    def __init__(self, field: Field) -> None:
        name, self._level, self._shuffle = blosc_settings(field.codec)
        self._name = name.encode()
        self._nbytes = field.chunk_nbytes

    def encode(self, chunk: np.ndarray) -> bytes:
        """Compress one whole chunk, `(chunk_rows, *shape)`; releases the GIL meanwhile."""
        assert chunk.nbytes == self._nbytes, (chunk.nbytes, self._nbytes)
        frame = bytes(numcodecs.blosc.compress(chunk, self._name, self._level, self._shuffle))
        return frame + crc32c(frame).to_bytes(4, "little")

    def decode(self, encoded: bytes, address: int) -> None:
        """Check a chunk and decompress it to `chunk_nbytes` bytes of memory at an address.

        Raises `CorruptionError` before anything is written there if a byte is not as it was.
        """
        if _checksum(encoded) != RESIDUE or len(encoded) < 20:
            raise CorruptionError("the chunk's checksum does not match its bytes")
        expected = (self._nbytes, len(encoded) - 4)
        if _HEADER.unpack_from(encoded) != expected:
            nbytes, frame_nbytes = _HEADER.unpack_from(encoded)
            wanted = f"expected a frame of {expected[1]} bytes for {expected[0]}"
            raise CorruptionError(f"{wanted}, found a frame of {frame_nbytes} for {nbytes}")
        if _decompress(encoded, address, self._nbytes, 1) != self._nbytes:
            raise CorruptionError("blosc cannot decompress the chunk")


def _decompress_by_numcodecs(frame: bytes, address: int, nbytes: int, threads: int) -> int:
    """Like blosc's own function; the frame may have bytes behind it."""
    frame = frame[: _HEADER.unpack_from(frame)[1]]
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    try:
        numcodecs.blosc.decompress(frame, memory)
    except RuntimeError:  # what numcodecs raises for a frame that blosc refuses
        return -1
    return nbytes


def _load_decompress() -> Any:
    """Blosc's own function inside numcodecs, 2 µs a chunk faster than through its buffers.

    The GIL is kept: a chunk takes a few µs, and passing the GIL around costs more.
    """
    function = getattr(ctypes.PyDLL(numcodecs.blosc.__file__), "blosc_decompress_ctx", None)
    if function is None:
        return _decompress_by_numcodecs
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


_decompress = _load_decompress()
