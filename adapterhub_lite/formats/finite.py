"""NaN, infinity and zero in raw tensor bytes, without numpy: many values at once as lanes of one big integer.

A floating point value is NaN or infinite exactly when all its exponent bits are set. Adding one to the exponent field,
with sign and fraction cleared, then carries into the place of the sign bit, and into no other lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

Buffer = bytes | bytearray | memoryview

_CHUNK = 1 << 16  # bytes; a multiple of every lane width, small enough to stay in the cache of the processor
_FRACTION_BITS = {"F16": (2, 10), "BF16": (2, 7), "F32": (4, 23), "F64": (8, 52)}  # bytes of a lane, fraction bits

FLOAT_DTYPES = frozenset(_FRACTION_BITS)


@dataclass(frozen=True, slots=True)
class _Lanes:
    exponent: int  # every exponent bit of every lane
    one: int  # the lowest exponent bit of every lane
    sign: int  # the sign bit of every lane


def first_non_finite(buffer: Buffer, dtype: str) -> int | None:
    """Index of the first NaN or infinity of a little-endian tensor body, or None.

    Raises:
        ValueError: `dtype` is not F16, BF16, F32 or F64, or the body is not a whole number of values.
    """
    width, lanes = _lanes(dtype)
    view = _bytes_of(buffer, width)
    for start in range(0, len(view), _CHUNK):
        value = int.from_bytes(view[start : start + _CHUNK], "little")
        carried = ((value & lanes.exponent) + lanes.one) & lanes.sign
        if carried:
            lowest = (carried & -carried).bit_length() - 1
            return start // width + lowest // (8 * width)
    return None


def is_all_zero(buffer: Buffer, dtype: str) -> bool:
    """Whether every value is 0 or -0. An empty body is all zero. Raises as `first_non_finite`."""
    width, lanes = _lanes(dtype)
    view = _bytes_of(buffer, width)
    for start in range(0, len(view), _CHUNK):
        value = int.from_bytes(view[start : start + _CHUNK], "little")
        if value & lanes.sign != value:
            return False
    return True


def _bytes_of(buffer: Buffer, width: int) -> memoryview:
    view = memoryview(buffer).cast("B")
    if len(view) % width:
        raise ValueError(f"{len(view)} bytes are not a whole number of {width}-byte values")
    return view


@cache
def _lanes(dtype: str) -> tuple[int, _Lanes]:
    if dtype not in _FRACTION_BITS:
        raise ValueError(f"{dtype} is not one of {', '.join(sorted(FLOAT_DTYPES))}")
    width, fraction = _FRACTION_BITS[dtype]
    sign = 1 << (8 * width - 1)
    one = 1 << fraction
    return width, _Lanes(_repeat(sign - one, width), _repeat(one, width), _repeat(sign, width))


def _repeat(lane: int, width: int) -> int:
    return int.from_bytes(lane.to_bytes(width, "little") * (_CHUNK // width), "little")
