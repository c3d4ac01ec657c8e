"""One packed field's compressor and checksum.

    blosc frame | crc32c

An encoded chunk is a blosc frame (zarr's `blosc` codec) and the little-endian crc32c of it
(zarr's `crc32c` codec). The frame begins with 16 bytes: version, lz version, flags, typesize,
then the decoded bytes, the block's and the frame's own bytes, each a little-endian u32. A frame of
one block that is neither split nor shuffled goes on with the block's start (20) and its size, and
is then a plain lz4 block.
"""

import ctypes
import itertools
import struct
from typing import Any, NamedTuple

import google_crc32c
import numcodecs.blosc
import numpy as np

from replaystore.compiled import decoding
from replaystore.errors import CorruptionError
from replaystore.field import Field
from replaystore.files import MEMORY_START, memory

# Only contextual calls are safe beside a forked worker or another thread; zarr sets it as well.
numcodecs.blosc.use_threads = False

MIN_CHUNK_BYTES = 28  # a frame's header, its block's start and size, and the checksum
PLAIN_LZ4 = 0x200000  # in a frame's first word: lz4, one stream, neither shuffled nor stored raw
SHUFFLES = {"": 0, "-shuffle": 1, "-bitshuffle": 2}
RESIDUE = 0x48674BC7  # the crc32c of any bytes followed by their own crc32c

_HEADER = struct.Struct("<4xI4xI")


def crc32c(data: Any, crc: int = 0) -> int:
    """Extend a crc32c by bytes or a contiguous array."""
    return int(google_crc32c.extend(crc, data))


def blosc_settings(codec: str) -> tuple[str, int, int]:
    """Split "blosc-NAME-LEVEL[-shuffle|-bitshuffle]" into blosc's name, level and shuffle."""
    _, name, level, *shuffle = codec.split("-")
    return name, int(level), SHUFFLES["".join(f"-{kind}" for kind in shuffle)]


class DamagedChunk(CorruptionError):
    """The chunk at `place` among those that were given is damaged."""

    def __init__(self, place: int, problem: str) -> None:
        super().__init__(problem)
        self.place = place


class Frames(NamedTuple):
    """Checked chunks: their addresses, the sizes of their lz4 blocks, and which are just that."""

    sources: list[int]
    lz4_sizes: list[int]
    plain: list[bool]


class ChunkCodec:
    """Encodes and decodes the chunks of one packed field."""

    def __init__(self, field: Field) -> None:
        name, self._level, self._shuffle = blosc_settings(field.codec)
        self._name = name.encode()
        self._nbytes = field.chunk_nbytes
        self._row_nbytes = field.row_nbytes
        self._is_plain = name in ("lz4", "lz4hc") and not self._shuffle

    def encode(self, chunk: np.ndarray) -> bytes:
        """Compress one whole chunk, `(chunk_rows, *shape)`; releases the GIL meanwhile."""
        assert chunk.nbytes == self._nbytes, (chunk.nbytes, self._nbytes)
        frame = bytes(numcodecs.blosc.compress(chunk, self._name, self._level, self._shuffle))
        return frame + crc32c(frame).to_bytes(4, "little")

    def decode(self, encoded: bytes, address: int) -> None:
        """Check one chunk and decompress it to `chunk_nbytes` bytes of memory at an address.

        Raises `CorruptionError` before anything is written there if a byte is not as it was.
        """
        source = np.frombuffer(encoded, np.uint8)
        start, sizes = np.array([source.ctypes.data]), np.array([len(encoded)])
        self._decode(self.check(start, sizes), 0, address, self._nbytes)

    def take_rows(
        self,
        sources: np.ndarray,
        sizes: np.ndarray,
        *,
        first: np.ndarray,
        within: np.ndarray,
        to: np.ndarray,
        out: np.ndarray,
        scratch: np.ndarray,
    ) -> None:
        """Check chunks in memory, by address and size, and copy rows of them, all at once.

        The rows `within` are those of chunk i from `first[i]` to `first[i + 1]`, and go to the rows `to`
        of `out`; `scratch` is as long as a chunk. Raises `DamagedChunk` for the first that is not as it
        was; what is in `out` by then does not matter.
        """
        assert scratch.nbytes == self._nbytes, (scratch.nbytes, self._nbytes)
        done = 0
        if COMPILED is not None and self._is_plain:
            done = COMPILED.take_rows(
                sources, sizes, first, within, to, out, scratch, self._row_nbytes, LZ4_ADDRESS, CRC32C_ADDRESS
            )
        if done == len(sources):
            return
        frames = self.check(sources, sizes)  # names damage, which compiled code leaves to Python as well
        wanted = ((np.maximum.reduceat(within, first[:-1]) + 1) * self._row_nbytes).tolist()
        address, each_within, each_to = scratch.ctypes.data, within.tolist(), to.tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(first[done:].tolist()), done):
            self._decode(frames, number, address, wanted[number])
            for row in range(begin, end):  # mostly few, and then faster than numpy for all of them
                out[each_to[row]] = scratch[each_within[row]]

    def check(self, sources: np.ndarray, sizes: np.ndarray) -> Frames:
        """Check the checksums and headers of encoded chunks in memory, by address and size.

        Raises `DamagedChunk` for the first one that is not as it was, or whose frame does not
        decode to a chunk: what blosc is given afterwards stays within the bounds it is told.
        """
        if (short := sizes < MIN_CHUNK_BYTES).any():
            raise DamagedChunk(int(np.argmax(short)), f"expected at least {MIN_CHUNK_BYTES} bytes")
        sums = list(map(checksum_at, sources.tolist(), sizes.tolist()))
        if sums.count(RESIDUE) != len(sums):
            bad = next(i for i, found in enumerate(sums) if found != RESIDUE)
            raise DamagedChunk(bad, "the chunk's checksum does not match its bytes")
        header = memory().take(sources[:, None] - MEMORY_START + np.arange(24)).view("<u4")
        wrong = (header[:, 1] != self._nbytes) | (header[:, 3] != sizes - 4)
        if wrong.any():
            bad = int(np.argmax(wrong))
            wanted = f"expected a frame of {sizes[bad] - 4} bytes for {self._nbytes}"
            raise DamagedChunk(bad, f"{wanted}, found a frame of {header[bad, 3]} for {header[bad, 1]}")
        plain = (header[:, 0] & 0xFF0000 == PLAIN_LZ4) & (header[:, 2] == self._nbytes)
        plain &= (header[:, 4] == 20) & (header[:, 5] == sizes - 28)
        return Frames(sources.tolist(), (sizes - 28).tolist(), (plain & bool(lz4_prefix)).tolist())

    def _decode(self, frames: Frames, number: int, target: int, wanted: int) -> None:
        """Decompress the first `wanted` bytes of a checked chunk, or more, to an address.

        There is room for a whole chunk. Of a plain lz4 block only what is wanted is decoded, which for
        long chunks saves a good part.
        """
        source, lz4_size = frames.sources[number], frames.lz4_sizes[number]
        if frames.plain[number] and lz4_prefix(source + 24, target, lz4_size, wanted, wanted) == wanted:
            return
        if blosc_decompress(source, target, self._nbytes, 1) != self._nbytes:
            raise DamagedChunk(number, "blosc cannot decompress the chunk")


def _exported(module: Any, name: str, *arguments: Any) -> Any:
    """A C function that an extension module exports, or None; it keeps the GIL.

    The call itself takes 0.3 µs, where going through the module's buffers takes 2, and a chunk's
    decoding only a few.
    """
    function = getattr(ctypes.PyDLL(module.__file__), name, None)
    if function is not None:
        function.argtypes, function.restype = list(arguments), ctypes.c_int
    return function


def _checksum_at(address: int, nbytes: int) -> int:
    return int(google_crc32c.value(ctypes.string_at(address, nbytes)))


def _decompress_at(source: int, target: int, nbytes: int, threads: int) -> int:
    frame_nbytes = _HEADER.unpack_from(ctypes.string_at(source, 16))[1]
    memory = (ctypes.c_ubyte * nbytes).from_address(target)
    try:
        numcodecs.blosc.decompress(ctypes.string_at(source, frame_nbytes), memory)
    except RuntimeError:  # what numcodecs raises for a frame that blosc refuses
        return -1
    return nbytes


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_crc32c_value = _exported(google_crc32c._crc32c, "crc32c_value", _POINTER, _SIZE)
if _crc32c_value is not None:
    _crc32c_value.restype = ctypes.c_uint32
checksum_at = _crc32c_value or _checksum_at
blosc_decompress = (
    _exported(numcodecs.blosc, "blosc_decompress_ctx", _POINTER, _POINTER, _SIZE, _INT) or _decompress_at
)
lz4_prefix = _exported(numcodecs.blosc, "LZ4_decompress_safe_partial", _POINTER, _POINTER, _INT, _INT, _INT)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


LZ4_ADDRESS, CRC32C_ADDRESS = _address(lz4_prefix), _address(_crc32c_value)
COMPILED = decoding if LZ4_ADDRESS and CRC32C_ADDRESS else None
