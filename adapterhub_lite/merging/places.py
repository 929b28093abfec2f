"""Where the tensors of a model's modules lie in its checkpoint, and which of them two modules share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..bases.quantization import linear_layers
from ..bases.views import View, kind_of
from ..errors import AdapterMismatch, Unsupported
from .checkpoint import Checkpoint, same_bytes


class Places:
    """Names of a model's tensors in a checkpoint, which may lack or carry the backbone's prefix."""

    def __init__(self, view: View, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._modules = view.modules
        self._prefix = f"{getattr(view.model, 'base_model_prefix', '')}."

    def tensor(self, name: str) -> str:
        """The checkpoint's name for a tensor of the model.

        Raises:
            AdapterMismatch: it is not there, or has another shape.
        """
        for candidate in (name, name.removeprefix(self._prefix), f"{self._prefix}{name}"):
            if candidate in self._tensors:
                self._check_shape(name, candidate)
                return candidate
        raise AdapterMismatch(
            f"The checkpoint has no tensor {name}.",
            "It is tied to another, or stored in another form (as experts may be); it cannot be changed alone.",
        )

    def there(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of the model."""
        return any(n in self._tensors for n in (name, name.removeprefix(self._prefix), f"{self._prefix}{name}"))

    def _check_shape(self, name: str, stored: str) -> None:
        module, _, leaf = name.rpartition(".")
        own = getattr(self._modules.get(module), leaf, None)
        found = self._tensors[stored].shape
        if own is not None and tuple(own.shape) != tuple(found):
            raise AdapterMismatch(
                f"The checkpoint's {stored} is {list(found)}, the model's {list(own.shape)}.",
                "It is stored in another form (as fused layers may be); merging does not know which part is which.",
            )


def quantised_weights(view: View, checkpoint: Checkpoint) -> dict[str, bool]:
    """The checkpoint's names of the weights that a base quantises, and whether each is stored [in, out].

    Args:
        view: the class that the base is loaded as, not that of an adapter.
    """
    places = Places(view, checkpoint)
    layers = {f"{name}.weight": turned for name, turned in linear_layers(view.model).items()}
    return {places.tensor(name): turned for name, turned in layers.items() if places.there(name)}


class Tie:
    """The output layer and the embeddings of a model, where both are one tensor of the checkpoint.

    transformers goes by the tensors: a checkpoint that stores two different ones has no tie, whatever its configuration
    says (`apart`).
    """

    def __init__(self, view: View, config: dict[str, Any], checkpoint: Checkpoint) -> None:
        self._config = config
        self.output, self.input = _tied_modules(view)
        self.apart = bool(self.input) and _differ(view, checkpoint, f"{self.input}.weight", f"{self.output}.weight")
        if self.apart:
            self.output = self.input = ""

    def broken_by(self, adapted: set[str]) -> bool:
        """Whether adapters that change these modules need the two to be tensors of their own.

        Raises:
            Unsupported: they do, and this kind of model computes otherwise without the tie.
        """
        if not self.output or not self.input or not adapted & {self.output, self.input}:
            return False
        if kind_of(self._config) != "causal" or isinstance(self._config.get("text_config"), dict):
            raise Unsupported(
                f"{self.output} and {self.input} are one tensor of this model (tied), and an adapter changes "
                "one of them: this kind of model has no form in which they are two.",
                "Serve the adapter with its base, or train it on other layers.",
            )
        return True


def with_embeddings(checkpoint: Checkpoint, view: View) -> Checkpoint:
    """The same where it stores the embeddings; a tied pair that has the output layer's name alone gets theirs.

    transformers fills either of the two from the other, and every format but its own wants the embeddings.
    """
    output, source = (f"{name}.weight" if name else "" for name in _tied_modules(view))
    places = Places(view, checkpoint)
    if not source or places.there(source) or not places.there(output):
        return checkpoint
    stored = places.tensor(output)
    shards = {
        file: {source if name == stored else name: info for name, info in tensors.items()}
        for file, tensors in checkpoint.shards.items()
    }
    return replace(checkpoint, shards=shards)


def _tied_modules(view: View) -> tuple[str, str]:
    """Names of the output layer and the embeddings of a model that ties them, else empty."""
    model: Any = view.model
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {id(module): name for name, module in view.modules.items()}
    tied = bool(getattr(view.model.config, "tie_word_embeddings", False))
    output = names.get(id(found), "") if isinstance(found, nn.Linear) and tied else ""
    return output, names.get(id(model.get_input_embeddings()), "") if output else ""


def _differ(view: View, checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether a checkpoint stores both tensors, and not the same values."""
    places = Places(view, checkpoint)
    if not places.there(one) or not places.there(other):
        return False
    return not same_bytes(checkpoint.place(places.tensor(one)), checkpoint.place(places.tensor(other)))
