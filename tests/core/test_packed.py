"""What comes compressed is unpacked whole, within bounds, or refused."""

import contextlib
import os

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from router.core import packed
from router.core.packed import MAX_BYTES, TooLarge, Unpackable, unpack

_EMPTY = zstd.compress(b"")


def windowed(data: bytes, window_log: int) -> bytes:
    """A frame that does not tell its size, with a window of 2**window_log bytes."""
    made = zstd.ZstdCompressor(options={int(zstd.CompressionParameter.window_log): window_log})
    return made.compress(data) + made.flush()


@given(st.lists(st.binary(max_size=300), max_size=15), st.integers(10, 23))
def test_frames_one_after_the_other_are_one_body(parts: list[bytes], window_log: int) -> None:
    assert unpack(b"".join(windowed(part, window_log) for part in parts)) == b"".join(parts)


@given(st.binary(max_size=300))
def test_anything_is_unpacked_or_refused(noise: bytes) -> None:
    for body in (noise, zstd.compress(b"{}") + noise, bytearray(noise)):
        with contextlib.suppress(Unpackable):
            unpack(body)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_body_that_is_cut_is_refused(plain: bytes, data: st.DataObject) -> None:
    whole = zstd.compress(plain)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(Unpackable):
        unpack(whole[:cut])


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("make", [zstd.compress, lambda data: windowed(data, 23)])
def test_no_more_is_unpacked_than_the_limit(more: int, make: object) -> None:
    assert callable(make)
    body = make(b"x" * (MAX_BYTES + more))
    assert len(body) < 10_000
    if more:
        with pytest.raises(TooLarge):
            unpack(body)
    else:
        assert len(unpack(body)) == MAX_BYTES


def test_many_frames_share_the_limit() -> None:
    with pytest.raises(TooLarge):
        unpack(zstd.compress(b"x" * 60) * 2, 100)


def test_a_window_above_8_mib_is_refused() -> None:
    with pytest.raises(Unpackable):
        unpack(windowed(os.urandom(100), 24))


def test_no_more_frames_are_read_than_a_client_writes() -> None:
    assert unpack(_EMPTY * (packed._MAX_FRAMES - 1)) == b""
    with pytest.raises(Unpackable):
        unpack(_EMPTY * 100_000)
