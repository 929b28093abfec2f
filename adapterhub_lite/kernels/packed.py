"""Frozen weights packed for the native products, without rounding one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .library import library

PANEL = 32
NF4_BLOCK = 64
_FORMATS = {"float32": 0, "bfloat16": 1, "nf4": 2, "int8": 3}


@dataclass(frozen=True)
class PackedWeight:
    """The weights of one or more layers of one input, in panels of 32 outputs (see wide.c).

    Attributes:
        form: float32, bfloat16, nf4 or int8: what is read from memory. All sums are float32.
        panels: [panels, in, ...].
        scales: nf4 [panels, in / 64, 32], int8 [panels, 32].
        codes: the 16 values of nf4.
    """

    form: str
    n_in: int
    n_out: int
    panels: torch.Tensor
    scales: torch.Tensor | None = None
    codes: torch.Tensor | None = None

    @property
    def format(self) -> int:
        """The number of `form` in wide.c."""
        return _FORMATS[self.form]

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        rows = x.reshape(-1, self.n_in).float().contiguous()
        out = torch.empty((rows.shape[0], self.n_out))
        functions = library().functions
        assert functions is not None
        functions.ahl_linear(
            rows.data_ptr(),
            rows.shape[0],
            self.n_in,
            self.panels.data_ptr(),
            self.format,
            None if self.scales is None else self.scales.data_ptr(),
            None if self.codes is None else self.codes.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.n_out,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.n_out)


def pack_dense(weight: torch.Tensor) -> PackedWeight:
    """Pack weight [out, in]; as bfloat16 where every value is one (as in a checkpoint of that dtype), else float32."""
    n_out, n_in = weight.shape
    narrow = weight.bfloat16()
    if torch.equal(narrow.to(weight.dtype), weight):
        return PackedWeight("bfloat16", n_in, n_out, _interleaved(narrow))
    return PackedWeight("float32", n_in, n_out, _panels(weight.float()).contiguous())


def pack_nf4(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor) -> PackedWeight:
    """Pack 4-bit codes [out, in] (uint8, one a byte) with a scale for every 64 inputs, absmax [out, in / 64].

    The scale's block must not reach over rows: `in` is a multiple of 64.
    """
    n_out, n_in = codes.shape
    both = _interleaved(codes)
    pairs = both[..., 0::2] | (both[..., 1::2] << 4)
    scales = _panels(absmax.float()).contiguous()
    return PackedWeight("nf4", n_in, n_out, pairs.contiguous(), scales, table.float().contiguous())


def pack_int8(values: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
    """Pack int8 values [out, in] with one scale a row [out]."""
    n_out, n_in = values.shape
    return PackedWeight(
        "int8", n_in, n_out, _panels(values).contiguous(), _padded(scale.float()[:, None]).view(-1, PANEL)
    )


def _padded(weight: torch.Tensor) -> torch.Tensor:
    missing = -weight.shape[0] % PANEL
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [panels, in, 32]."""
    padded = _padded(weight)
    return padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2)


def _interleaved(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [panels, in, 32], where entries 2i and 2i + 1 belong to outputs i and 16 + i of the panel."""
    whole = _panels(weight)
    halves = whole.reshape(*whole.shape[:2], 2, PANEL // 2)
    return halves.transpose(2, 3).reshape(whole.shape)
