"""Tensors of a merged model by name, dense in float32 one at a time: read back from its files, or made by its plan.

What bitsandbytes stores beside a weight `X.weight` (`X.weight.absmax`, `X.weight.quant_state.bitsandbytes__nf4`,
`X.SCB`, ...) is used to make it dense again and is no tensor of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import PREFIX
from ..events import Listener, Progress, ignore
from ..merging.checkpoint import DTYPES, Checkpoint
from ..merging.plan import MergePlan

_NF4 = ".quant_state.bitsandbytes__nf4"


class Tensors(Protocol):
    """What a model is made of."""

    @property
    def names(self) -> Sequence[str]:
        """All tensors, without what only belongs to another one's storage."""
        ...

    def dense(self, name: str) -> torch.Tensor:
        """One tensor, in float32 where it holds floats."""
        ...

    def format(self, name: str) -> str:
        """What it is stored as: a dtype, nf4, int8 or q8_0."""
        ...


class Stored:
    """Tensors as a checkpoint stores them, dequantised when they are asked for."""

    def __init__(
        self, read: Callable[[str], torch.Tensor], dtypes: Mapping[str, torch.dtype], turned: Collection[str] = ()
    ) -> None:
        """`turned`: weights that are [in, out], which quantised layers store the other way round."""
        self._read, self._dtypes, self._turned = read, dtypes, turned
        self._names = [name for name in dtypes if not self._beside(name)]

    @classmethod
    def in_folder(cls, folder: Path, turned: Collection[str] = ()) -> Stored:
        """Those of a folder of safetensors files."""
        checkpoint = Checkpoint.open(folder)
        return cls(checkpoint.read, {name: DTYPES[info.dtype] for name, info in checkpoint.tensors.items()}, turned)

    @classmethod
    def of_plan(cls, plan: MergePlan, turned: Collection[str] = (), on_event: Listener = ignore) -> Stored:
        """Those that a plan would write, rounded as it would round them; nothing is written."""
        planned = {one.name: one for tensors in plan.shards.values() for one in tensors}
        seen: set[str] = set()

        def read(name: str) -> torch.Tensor:
            seen.add(name)
            on_event(Progress("making the merged weights", len(seen), len(planned), "tensors"))
            return planned[name].make().to(planned[name].dtype)

        return cls(read, {name: one.dtype for name, one in planned.items()}, turned)

    @property
    def names(self) -> Sequence[str]:
        """All tensors, without what only belongs to another one's storage."""
        return self._names

    def dense(self, name: str) -> torch.Tensor:
        """One tensor, in float32 where it holds floats."""
        kind, tensor = self.format(name), self._read(name)
        if kind in ("nf4", "int8"):
            dense = self._from_4_bits(name, tensor) if kind == "nf4" else self._from_8_bits(name, tensor)
            return dense.T if name in self._turned else dense
        return tensor.float() if tensor.is_floating_point() else tensor

    def format(self, name: str) -> str:
        """What it is stored as: a dtype, nf4 or int8."""
        if f"{name}{_NF4}" in self._dtypes:
            return "nf4"
        if self._dtypes[name] == torch.int8 and _scales(name) in self._dtypes:
            return "int8"
        return str(self._dtypes[name]).removeprefix("torch.")

    def _from_8_bits(self, name: str, values: torch.Tensor) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        dense: torch.Tensor = bnb.int8_vectorwise_dequant(values, self._read(_scales(name)))
        return dense.float()

    def _from_4_bits(self, name: str, packed: torch.Tensor) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        parts = {other: self._read(other) for other in self._dtypes if other.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        dense: torch.Tensor = bnb.dequantize_4bit(packed, state)
        return dense.float()

    def _beside(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if last in ("SCB", "weight_format"):
            return f"{owner}.weight" in self._dtypes
        return owner in self._dtypes or owner.removesuffix(".quant_state") in self._dtypes


def _scales(name: str) -> str:
    return f"{name.rpartition('.')[0]}.SCB"


class GgufFile:
    """Tensors of a GGUF file by the names and in the orientation that transformers has for them."""

    def __init__(self, path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
        """`config`: of the model; `names`: transformers' names of its tensors, tied ones too."""
        from gguf import GGUFReader

        from ..merging.gguf_names import Layout

        self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        layout = Layout.of(config)
        places = {name: layout.place(name) for name in names}
        self._places = {name: place for name, place in places.items() if place is not None}

    @property
    def names(self) -> Sequence[str]:
        """Tensors that are in the file."""
        return [name for name, place in self._places.items() if place.name in self._tensors]

    @property
    def wanted(self) -> Sequence[str]:
        """Tensors that must be in the file."""
        return list(self._places)

    def dense(self, name: str) -> torch.Tensor:
        """One tensor, in float32."""
        import gguf

        place = self._places[name]
        stored = self._tensors[place.name]
        found = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).astype("float32"))
        found = found.reshape(place.shape)
        if place.order is not None:
            found = torch.empty_like(found).index_copy_(0, place.order, found)
        return found.T if place.transposed else found

    def format(self, name: str) -> str:
        """What it is stored as."""
        kind = str(self._tensors[self._places[name].name].tensor_type.name).lower()
        return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(kind, kind)


class Repaired:
    """Stored tensors with a residual adapter's matrices added."""

    def __init__(self, stored: Tensors, residual: Adapter, turned: Collection[str] = ()) -> None:
        self._stored, self._turned = stored, turned
        names = set(stored.names)
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, down in residual.tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            up = residual.tensors[key.replace(".lora_A.", ".lora_B.")]
            candidates = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
            name = next((one for one in candidates if one in names), candidates[0])
            self._factors[name] = down.float(), up.float()

    @property
    def names(self) -> Sequence[str]:
        """Those of the weights."""
        return self._stored.names

    def dense(self, name: str) -> torch.Tensor:
        """One tensor, repaired."""
        tensor = self._stored.dense(name)
        if name not in self._factors:
            return tensor
        down, up = self._factors[name]
        return tensor + ((up @ down).T if name in self._turned else up @ down)

    def format(self, name: str) -> str:
        """What the weight is stored as."""
        return self._stored.format(name)
