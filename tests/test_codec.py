import ctypes
import shutil
import sysconfig
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest

from replaystore import codec as codec_module
from replaystore.codec import ChunkCodec, DamagedChunk, blosc_settings, crc32c
from replaystore.errors import CorruptionError
from replaystore.field import Field

CODECS = ["blosc-lz4-1", "blosc-lz4hc-5", "blosc-lz4hc-9-shuffle", "blosc-zstd-3-bitshuffle"]


def field_of(codec, dtype="uint8", shape=(20, 20)):
    return Field("x", shape, dtype, codec=codec, chunk_rows=4)


def chunk_of(field, kind="noise"):
    """A chunk that cannot be compressed, one that can, or zeros."""
    shape = (field.chunk_rows, *field.shape)
    if kind == "noise":
        bits = np.random.default_rng(0).integers(0, 256, size=field.chunk_nbytes, dtype=np.uint8)
        return bits.view(field.dtype).reshape(shape)
    return np.full(shape, 7 if kind == "constant" else 0, field.dtype)


def decode(codec, field, encoded):
    out = np.full((field.chunk_rows, *field.shape), 99, field.dtype)
    codec.decode(encoded, out.ctypes.data)
    return out


@pytest.fixture(params=["fast", "numcodecs"])
def way(request, monkeypatch):
    """Both ways to decode: C functions by address, and the modules' own where those are not found."""
    if request.param == "numcodecs":
        monkeypatch.setattr(codec_module, "checksum_at", codec_module._checksum_at)
        monkeypatch.setattr(codec_module, "blosc_decompress", codec_module._decompress_at)
        monkeypatch.setattr(codec_module, "lz4_prefix", None)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["noise", "constant", "zero"])
def test_what_was_encoded_is_decoded_bit_by_bit(codec, dtype, kind):
    field = field_of(codec, dtype)
    chunk = chunk_of(field, kind)
    chunk_codec = ChunkCodec(field)
    assert decode(chunk_codec, field, chunk_codec.encode(chunk)).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["noise", "constant", "zero"])
def test_an_encoded_chunk_is_what_zarrs_codecs_read(codec, kind):
    field = field_of(codec, "int16")
    chunk = chunk_of(field, kind)
    encoded = ChunkCodec(field).encode(chunk)
    frame = numcodecs.CRC32C(location="end").decode(encoded)
    assert bytes(numcodecs.Blosc().decode(frame)) == chunk.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_what_zarrs_codecs_write_is_decoded(codec):
    field = field_of(codec, "int16")
    chunk = chunk_of(field)
    name, level, shuffle = blosc_settings(codec)
    frame = numcodecs.Blosc(name, level, shuffle).encode(chunk)
    encoded = bytes(numcodecs.CRC32C(location="end").encode(frame))
    assert (decode(ChunkCodec(field), field, encoded) == chunk).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_any_flipped_bit_is_noticed_before_anything_is_written(kind):
    field = field_of("blosc-lz4hc-5", shape=(8, 8))
    chunk_codec = ChunkCodec(field)
    encoded = chunk_codec.encode(chunk_of(field, kind))
    out = np.full((4, 8, 8), 99, np.uint8)
    for position in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptionError, match="checksum"):
            chunk_codec.decode(bytes(damaged), out.ctypes.data)
    assert (out == 99).all()


@pytest.mark.usefixtures("way")
def test_any_cut_or_longer_chunk_is_noticed():
    field = field_of("blosc-lz4hc-5", shape=(8, 8))
    chunk_codec = ChunkCodec(field)
    encoded = chunk_codec.encode(chunk_of(field))
    for wrong in [encoded[:n] for n in range(len(encoded))] + [encoded + b"\0", b"\0" * 100, encoded * 2]:
        with pytest.raises(CorruptionError):
            decode(chunk_codec, field, wrong)


def sealed(frame):
    """A frame with a right checksum, as somebody who forges a chunk would make it."""
    return bytes(frame) + google_crc32c.value(bytes(frame)).to_bytes(4, "little")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 3, 5, 4096])
def test_a_chunk_that_would_decode_short_or_long_is_refused(rows):
    field = field_of("blosc-lz4-1", shape=(8, 8))
    frame = numcodecs.Blosc("lz4", 1).encode(np.zeros((rows, 8, 8), np.uint8))
    with pytest.raises(CorruptionError, match=rf"expected .*256.*, found .*{rows * 64}"):
        decode(ChunkCodec(field), field, sealed(frame))


@pytest.mark.usefixtures("way")
def test_a_frame_that_blosc_refuses_is_damage():
    field = field_of("blosc-lz4-1", shape=(8, 8))
    frame = bytearray(numcodecs.Blosc("lz4", 1).encode(np.zeros((4, 8, 8), np.uint8)))
    for position in (0, 2, 16, 17, 18, 19):
        forged = frame.copy()
        forged[position] ^= 0xFF
        out = np.full((4, 8, 8), 99, np.uint8)
        try:
            ChunkCodec(field).decode(sealed(forged), out.ctypes.data)
        except CorruptionError:
            continue
        assert not out.any(), "a header bit that changes nothing"


def test_both_ways_say_the_same_of_a_frame():
    frame = bytes(numcodecs.Blosc("lz4", 1).encode(np.arange(64, dtype=np.uint8)))
    memory, wrong = (ctypes.c_ubyte * 64)(), b"\xff" + frame[1:]
    address = ctypes.addressof(memory)
    for decompress in (codec_module._decompress_at, codec_module.blosc_decompress):
        ctypes.memset(memory, 0, 64)
        assert decompress(address_of(frame), address, 64, 1) == 64
        assert bytes(memory) == bytes(range(64))
        assert decompress(address_of(wrong), address, 64, 1) < 0
    for checksum in (codec_module._checksum_at, codec_module.checksum_at):
        assert checksum(address_of(frame), len(frame)) == crc32c(frame)


def address_of(data):
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


def test_c_functions_are_found_here():
    found = (codec_module.checksum_at, codec_module.blosc_decompress, codec_module.lz4_prefix)
    assert all(isinstance(function, ctypes._CFuncPtr) for function in found)
    assert codec_module._exported(numcodecs.blosc, "no_such_function") is None


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_first_rows_of_a_plain_chunk_are_decoded_alone(rows):
    field = field_of("blosc-lz4hc-5")
    chunk = np.random.default_rng(0).integers(0, 3, (4, 20, 20), np.uint8)
    codec, out = ChunkCodec(field), np.full((4, 20, 20), 99, np.uint8)
    encoded = np.frombuffer(codec.encode(chunk), np.uint8)
    frames = codec.check(np.array([encoded.ctypes.data]), np.array([len(encoded)]))
    assert frames.plain == [True]
    codec._decode(frames, 0, out.ctypes.data, rows * 400)
    assert np.array_equal(out[:rows], chunk[:rows])
    assert (out[rows:] == 99).all()


# ---- rows of many chunks at once


class Chunks:
    """Encoded chunks of 4 rows in memory, and rows that are asked of them."""

    def __init__(self, codec="blosc-lz4hc-5", count=5):
        rng = np.random.default_rng(0)
        self.field = field_of(codec)
        self.codec = ChunkCodec(self.field)
        self.rows = rng.integers(0, 3, (count, 4, 20, 20), np.uint8)
        self.encoded = [np.frombuffer(self.codec.encode(chunk), np.uint8).copy() for chunk in self.rows]
        counts = rng.integers(1, 7, count)
        self.first = np.append(0, counts.cumsum())
        self.within = rng.integers(0, 4, self.first[-1])
        self.to = rng.permutation(self.first[-1])
        self.expected = np.empty((self.first[-1], 20, 20), np.uint8)
        self.expected[self.to] = self.rows[np.repeat(np.arange(count), counts), self.within]
        self.out = np.full_like(self.expected, 99)

    def take(self, **changed):
        given = {
            "sources": np.array([each.ctypes.data for each in self.encoded]),
            "sizes": np.array([len(each) for each in self.encoded]),
            "first": self.first,
            "within": self.within,
            "to": self.to,
            "out": self.out,
            "scratch": np.zeros((4, 20, 20), np.uint8),
        }
        self.codec.take_rows(**(given | changed))

    def damage(self, number, encoded):
        """Put other bytes, and their right checksum, in the place of a chunk's."""
        encoded[-4:] = np.frombuffer(crc32c(encoded[:-4]).to_bytes(4, "little"), np.uint8)
        self.encoded[number] = encoded


HAS_COMPILER = shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()
compiled = pytest.mark.skipif(
    codec_module.COMPILED is None and not HAS_COMPILER, reason="no C compiler, or no Python headers"
)


@pytest.mark.parametrize("codec", [*CODECS, "blosc-lz4-9"])
@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=compiled), False])
def test_rows_of_many_chunks_are_taken_at_once(codec, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(codec_module, "COMPILED", None)
    chunks = Chunks(codec)
    chunks.take()
    assert np.array_equal(chunks.out, chunks.expected)


def test_rows_of_a_chunk_of_noise_are_taken_between_others():
    """Blosc stores it raw, and of any other chunk compiled code says that it is done."""
    chunks = Chunks()
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 20), np.uint8)
    chunks.encoded[2] = np.frombuffer(chunks.codec.encode(noise), np.uint8)
    of_it = slice(chunks.first[2], chunks.first[3])
    chunks.expected[chunks.to[of_it]] = noise[chunks.within[of_it]]
    chunks.take()
    assert np.array_equal(chunks.out, chunks.expected)


@compiled
@pytest.mark.parametrize("shape", [(64, 64), (63, 63)])
@pytest.mark.parametrize("shift", [0, 1, 8, 16])
def test_rows_that_are_too_long_for_the_caches_are_taken(shape, shift):
    """They are copied another way, if they lie right for it."""
    field = field_of("blosc-lz4hc-5", shape=shape)
    codec, rng = ChunkCodec(field), np.random.default_rng(0)
    rows = rng.integers(0, 3, (4, *shape), np.uint8)
    encoded = np.frombuffer(codec.encode(rows), np.uint8)
    within = rng.integers(0, 4, (9 << 19) // field.row_nbytes)
    memory = np.full(len(within) * field.row_nbytes + 32, 99, np.uint8)
    out = memory[shift : len(memory) - 32 + shift].reshape(-1, *shape)
    sources, sizes = np.array([encoded.ctypes.data]), np.array([len(encoded)])
    first, scratch = np.array([0, len(within)]), np.empty_like(rows)
    to = rng.permutation(len(within))
    codec.take_rows(sources, sizes, first=first, within=within, to=to, out=out, scratch=scratch)
    assert np.array_equal(out[to], rows[within])
    assert (memory[:shift] == 99).all()
    assert (memory[len(memory) - 32 + shift :] == 99).all()


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=compiled), False])
def test_a_chunk_of_which_a_bit_is_wrong_is_named(number, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(codec_module, "COMPILED", None)
    for byte in range(40):
        chunks = Chunks()
        chunks.encoded[number][-byte if byte >= 24 else byte] ^= 1
        with pytest.raises(DamagedChunk, match="checksum") as error:
            chunks.take()
        assert error.value.place == number


@pytest.mark.parametrize("word", range(6))
@pytest.mark.parametrize("wrong", [0, 1, -1, 1 << 30])
def test_a_frame_that_says_something_else_gives_what_is_in_it_or_an_error(word, wrong):
    """Also where its checksum is right: somebody may have made it so."""
    chunks = Chunks()
    encoded = chunks.encoded[2].copy()
    words = encoded[:24].view("<u4")
    words[word] = words[word] ^ 0x810000 if word == 0 else np.uint32((int(words[word]) + wrong) % 2**32)
    chunks.damage(2, encoded)
    try:
        chunks.take()
    except DamagedChunk as error:
        assert error.place == 2  # noqa: PT017  # either is right
        assert wrong or not word
        return
    others = np.delete(chunks.to, np.s_[chunks.first[2] : chunks.first[3]])
    assert np.array_equal(chunks.out[others], chunks.expected[others])
    assert word not in (1, 3) or wrong == 0


def test_a_block_that_does_not_decode_to_the_rows_is_damaged():
    chunks = Chunks()
    encoded = chunks.encoded[1].copy()
    encoded[24:-4] = 0
    chunks.damage(1, encoded)
    with pytest.raises(DamagedChunk, match="cannot decompress") as error:
        chunks.take()
    assert error.value.place == 1


@compiled
@pytest.mark.parametrize(
    "changed",
    [
        {"sizes": np.zeros(4, np.int64)},
        {"first": np.arange(5)},
        {"first": np.array([0, 0, 1, 2, 3, 4])},
        {"first": np.array([1, 2, 3, 4, 5, 6])},
        {"first": np.array([0, 9, 3, 4, 5, 6])},
        {"within": np.full(6, 4)},
        {"within": np.full(6, -1)},
        {"to": np.array([0, 1, 2, 3, 4, 6])},
        {"to": np.array([-1, 1, 2, 3, 4, 5])},
        {"to": np.arange(5)},
        {"out": np.zeros(6 * 400 - 1, np.uint8)},
    ],
    ids=str,
)
def test_sizes_that_do_not_match_are_refused_before_any_byte_is_read(changed):
    chunks = Chunks()
    whole = {
        "first": np.array([0, 1, 2, 3, 4, 6]),
        "within": np.zeros(6, np.int64),
        "to": np.arange(6),
        "out": chunks.out[:6],
    }
    chunks.take(**whole)
    with pytest.raises(ValueError, match="matching sizes"):
        chunks.take(**whole | changed)


@compiled
def test_arrays_that_are_not_contiguous_are_refused():
    chunks = Chunks()
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        chunks.take(within=np.zeros(2 * len(chunks.within), np.int64)[::2])


@compiled
def test_compiled_code_is_found_here():
    assert codec_module.COMPILED is not None


def test_the_checksum_is_crc32c_and_can_be_extended():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(b"") == 0


def test_compressing_uses_no_threads_of_blosc():
    assert numcodecs.blosc.use_threads is False
