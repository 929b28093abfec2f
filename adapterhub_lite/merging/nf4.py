"""A weight as bitsandbytes stores it in NF4: 4-bit codes, a scale for every 64 numbers, and how to read them.

A scale need not be the block's largest magnitude: any float32 is read as well, so the one of least squared error is
searched. Where it is known what the layer reads, what a number loses is made up for by those after it in the row (GPTQ,
arXiv 2210.17323).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..bases.quantization import NF4_BLOCK_SIZE
from ..kernels.quantise import ZERO, codes_of, feedback, search
from .inputs import PANEL, Inputs, damped

FACTORS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.76, 1.02, 1.04, 1.07, 1.1)
"""Scales that are tried, as shares of a block's largest magnitude; the first is what bitsandbytes takes."""
_ROUNDS = 3  # fits of the scale to the codes it gave, after that
_NESTED = 256  # scales that share a scale, where they are quantised too
_ROOM = 26  # characters that a float64 takes at most in JSON, with what is around it
_Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Nf4:
    """How to quantise; tensors are named below the module, as in a checkpoint.

    Attributes:
        search: try scales; else what bitsandbytes itself would store.
        double_quant: quantise the scales as well, to 8 bits (QLoRA, arXiv 2305.14314).
    """

    search: bool = True
    double_quant: bool = False

    def takes(self, n_in: int) -> bool:
        """Whether layers of so many inputs are quantised: rows are whole blocks.

        On a CPU with AVX-512 bitsandbytes (0.50) begins each row with a new scale, while it rounds regardless of rows.
        """
        return n_in % NF4_BLOCK_SIZE == 0

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Layout:
        """Dtypes and shapes of the tensors that a weight [out, in] becomes."""
        count = shape[0] * shape[1]
        blocks = count // NF4_BLOCK_SIZE
        scales = (torch.uint8 if self.double_quant else torch.float32, (blocks,))
        found: _Layout = {
            "weight": (torch.uint8, (count // 2, 1)),
            "weight.absmax": scales,
            "weight.quant_map": (torch.float32, (16,)),
        }
        if self.double_quant:
            found["weight.nested_absmax"] = (torch.float32, (-(-blocks // _NESTED),))
            found["weight.nested_quant_map"] = (torch.float32, (256,))
        state = self._state(shape, dtype, 0.0)
        return {**found, "weight.quant_state.bitsandbytes__nf4": (torch.uint8, (len(state),))}

    def quantise(
        self, weight: torch.Tensor, dtype: torch.dtype, inputs: Inputs | None = None
    ) -> tuple[dict[str, torch.Tensor], float]:
        """The tensors of weight [out, in] (float32), and the squared error that bitsandbytes' own rounding would make.

        Args:
            dtype: what the weight is dequantised to.
            inputs: what the layer reads.
        """
        import bitsandbytes.functional as bnb

        flat = weight.view(-1, NF4_BLOCK_SIZE)
        found = search(flat, FACTORS if self.search else FACTORS[:1], rounds=_ROUNDS if self.search else 0)
        plain, scales, codes = float(found.errors[:, 0].double().sum()), found.scales, found.codes
        if inputs is not None:
            scales, codes = compensated(weight, inputs, self.search)
        nested: dict[str, torch.Tensor] = {}
        offset = 0.0
        stored = scales
        if self.double_quant:
            mean = scales.mean()
            stored, state = bnb.quantize_blockwise(scales - mean, blocksize=_NESTED)
            scales = bnb.dequantize_blockwise(stored, state) + mean
            codes = compensated(weight, inputs, scales=scales)[1] if inputs else codes_of(flat, scales)
            codes[scales <= 0] = ZERO
            nested = {"weight.nested_absmax": state.absmax, "weight.nested_quant_map": state.code.clone()}
            offset = float(mean)
        text = self._state(tuple(weight.shape), dtype, offset)
        return {
            "weight": packed(codes.flatten()),
            "weight.absmax": stored,
            "weight.quant_map": bnb.get_4bit_type("nf4", device="cpu"),
            **nested,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
        }, plain

    def dense(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """What bitsandbytes makes of the tensors: [out, in] float32."""
        import bitsandbytes.functional as bnb

        stats = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
        dense: torch.Tensor = bnb.dequantize_4bit(parts["weight"], bnb.QuantState.from_dict(stats, torch.device("cpu")))
        return dense.float()

    def _state(self, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> bytes:
        """bitsandbytes' QuantState.as_dict(packed=True), of a length that does not depend on the weight."""
        said = {
            "quant_type": "nf4",
            "blocksize": NF4_BLOCK_SIZE,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        if not self.double_quant:
            return json.dumps(said).encode()
        room = len(json.dumps(said)) + 80 + _ROOM
        nested = {"nested_blocksize": _NESTED, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps({**said, **nested}).ljust(room).encode()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n] -> two a byte [n / 2, 1], the first in the upper half."""
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1])[:, None]


def compensated(
    weight: torch.Tensor, inputs: Inputs, searched: bool = True, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [blocks] and codes [blocks, 64] of weight [out, in], rounded by column against what the layer reads.

    Args:
        searched: look for scales; else each block's largest magnitude.
        scales: [blocks], to keep to instead.
    """
    n_out, n_in = weight.shape
    found = torch.empty((n_out, n_in // NF4_BLOCK_SIZE))
    codes = torch.empty((n_out, n_in), dtype=torch.uint8)
    for begin in range(0, n_in, PANEL):
        end = min(begin + PANEL, n_in)
        upper = _upper(inputs, inputs.tokens, begin, end)
        left = weight[:, begin:end].clone()
        for at in range(0, end - begin, NF4_BLOCK_SIZE):
            here, after = slice(at, at + NF4_BLOCK_SIZE), slice(at + NF4_BLOCK_SIZE, None)
            block, own = left[:, here].contiguous(), upper[here, here].contiguous()
            index = (begin + at) // NF4_BLOCK_SIZE
            if scales is not None:
                found[:, index] = scales.view(n_out, -1)[:, index]
            else:
                tried, rounds = (FACTORS, _ROUNDS) if searched else (FACTORS[:1], 0)
                found[:, index] = search(block, tried, own.diagonal().square().reciprocal()[None], rounds).scales
            codes[:, begin + at : begin + at + NF4_BLOCK_SIZE], lost = feedback(
                block, own, found[:, index].contiguous()
            )
            left[:, after] -= lost @ upper[here, after]
    return found.flatten(), codes.view(-1, NF4_BLOCK_SIZE)


@lru_cache(maxsize=1)
def _upper(inputs: Inputs, tokens: int, begin: int, end: int) -> torch.Tensor:
    """Layers of one input follow each other, and each may be rounded several times."""
    return inverse_factor(damped(inputs.moment(begin, end)))


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with U^T U = the inverse of a positive definite matrix [n, n]; float32.

    Of the matrix turned end for end, whose lower Cholesky factor is that of U's inverse: no inverse is factored.
    """
    lower = torch.linalg.cholesky(moment.flip(0, 1))
    eye = torch.eye(len(lower), dtype=lower.dtype)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1).float().contiguous()
