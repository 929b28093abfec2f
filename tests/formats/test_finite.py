from __future__ import annotations

import math
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.formats.finite import first_non_finite, is_all_zero

WIDTHS = {"F16": ("e", 2), "F32": ("f", 4), "F64": ("d", 8)}


def bf16_values(data: bytes) -> list[float]:
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]


def expected(data: bytes, dtype: str) -> int | None:
    values = (
        bf16_values(data)
        if dtype == "BF16"
        else struct.unpack(f"<{len(data) // WIDTHS[dtype][1]}{WIDTHS[dtype][0]}", data)
    )
    return next((index for index, value in enumerate(values) if not math.isfinite(value)), None)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern(dtype: str) -> None:
    for pattern in range(1 << 16):
        data = struct.pack("<H", pattern)
        assert first_non_finite(data, dtype) == expected(data, dtype)
        assert is_all_zero(data, dtype) == (pattern in (0, 0x8000))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_finite_patterns_together_do_not_carry_into_each_other(dtype: str) -> None:
    patterns = [struct.pack("<H", pattern) for pattern in range(1 << 16)]
    finite = b"".join(data for data in patterns if expected(data, dtype) is None)
    assert first_non_finite(finite * 2, dtype) is None
    assert first_non_finite(finite * 2 + patterns[0x7F80 if dtype == "BF16" else 0x7C00], dtype) == len(finite)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=160), ones=st.booleans())
def test_agrees_with_struct(dtype: str, data: bytes, ones: bool) -> None:
    width = 2 if dtype == "BF16" else WIDTHS[dtype][1]
    data = (data.replace(b"\0", b"\xff") if ones else data)[: len(data) // width * width]
    assert first_non_finite(data, dtype) == expected(data, dtype)


@pytest.mark.parametrize("index", [0, 1, 16_383, 16_384, 40_000, 49_999])
def test_index_across_chunks(index: int) -> None:
    values = [3.0e38] * 50_000
    values[index] = math.nan
    assert first_non_finite(memoryview(struct.pack("<50000f", *values)), "F32") == index


def test_zero_in_a_later_chunk() -> None:
    data = bytearray(300_000)
    assert is_all_zero(data, "F32")
    data[299_999] = 0x80  # -0
    assert is_all_zero(data, "F32")
    data[299_996] = 1
    assert not is_all_zero(data, "F32")
    assert is_all_zero(b"", "F16")
    assert first_non_finite(b"", "F16") is None


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="I8"):
        first_non_finite(b"\0", "I8")
    with pytest.raises(ValueError, match="whole number"):
        first_non_finite(b"\0\0\0", "F16")


def test_megabytes_in_milliseconds() -> None:
    data = struct.pack("<f", 1.5) * (1 << 20)
    before = time.perf_counter()
    assert first_non_finite(data, "F32") is None
    assert time.perf_counter() - before < 0.25  # 5 ms when nothing else runs
