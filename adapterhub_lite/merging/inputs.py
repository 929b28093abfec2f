"""What the layers of a model read on given texts: second moments of inputs, which say what a rounding error costs.

The squared error that a loss E of a weight makes in the layer's output is tr(E H E^T), with H = mean of x x^T.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..adapters.lora import LoraSite
from ..adapters.sites import features

PANEL = 2048
"""Inputs of a layer whose moments are looked at together; a wider one is taken panel by panel."""
_TOKENS = 128  # of one text, of layers of which samples are kept
_SHARE = 100.0  # how much more of an input is the strongest direction of a change than any other is


class Inputs:
    """Second moments of what one layer reads. Layers wider than a panel keep samples, which take less memory."""

    def __init__(self, width: int) -> None:
        self.width, self.tokens = width, 0
        self._sum = torch.zeros((width, width)) if width <= PANEL else None
        self._samples: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Take x [..., in] of one text."""
        x = x.detach().reshape(-1, self.width).cpu().float()
        if self._sum is not None:
            self._sum.addmm_(x.T, x)
        elif self.tokens < PANEL:
            x = x[:_TOKENS]
            self._samples.append(x.bfloat16())
        else:
            return
        self.tokens += len(x)

    def moment(self, begin: int, end: int) -> torch.Tensor:
        """The mean of x x^T over inputs begin..end: [n, n] float32."""
        if self._sum is not None:
            return self._sum[begin:end, begin:end] / max(self.tokens, 1)
        x = torch.cat([s[:, begin:end] for s in self._samples]).float()
        return x.T @ x / max(self.tokens, 1)

    def scales(self) -> torch.Tensor:
        """Root mean square of each input [in]."""
        if self._sum is not None:
            return (self._sum.diagonal() / max(self.tokens, 1)).sqrt()
        return (sum(s.float().square().sum(0) for s in self._samples) / max(self.tokens, 1)).sqrt()  # type: ignore[union-attr]

    def digest(self) -> str:
        """sha256 of all that was taken."""
        found = hashlib.sha256(str(self.tokens).encode())
        for tensor in [self._sum] if self._sum is not None else self._samples:
            found.update(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        return found.hexdigest()


class Directions(Inputs):
    """Stands for what a layer reads where that is not known: all inputs evenly, and more along given directions.

    A trained adapter reads directions that its training data had, and all that it does comes of them: where a rounding
    keeps their outputs, it keeps what the adapter does.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        """vectors [n, in]: directions, each as long as it counts (at most 1)."""
        super().__init__(0)
        self.width, self.tokens, self._vectors = vectors.shape[1], 1, vectors

    def add(self, x: torch.Tensor) -> None:
        """Nothing more is known."""
        raise TypeError("Directions are not added to.")

    def moment(self, begin: int, end: int) -> torch.Tensor:
        """1 + share times the sum of v v^T over inputs begin..end: [n, n] float32."""
        vectors = self._vectors[:, begin:end]
        return torch.eye(end - begin) + _SHARE * vectors.T @ vectors

    def scales(self) -> torch.Tensor:
        """Root mean square of each input [in]."""
        return (1 + _SHARE * self._vectors.square().sum(0)).sqrt()

    def digest(self) -> str:
        """sha256 of the directions."""
        return hashlib.sha256(self._vectors.contiguous().view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]


def damped(moment: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """A second moment [n, n] in float64 with a share of its mean diagonal added, so that it has an inverse."""
    moment = moment.double()
    mean = moment.diagonal().mean()
    return moment + torch.eye(len(moment), dtype=torch.float64) * (share * mean if mean > 0 else 1.0)


def inputs_of(
    modules: Mapping[str, nn.Module], sites: Mapping[nn.Module, LoraSite], run: Callable[[], object]
) -> dict[str, Inputs]:
    """Inputs of the linear layers among `modules` while `run` computes with the model, with an adapter's changes added.

    Layers that are given one tensor share their moments. The model's weights are only read; `run` must call its own
    forward.

    Args:
        modules: name -> module, those to look at.
        sites: what the adapter does at a layer.
    """
    found: dict[str, Inputs] = {}
    seen: list[tuple[torch.Tensor, Inputs]] = []  # the last tensor that was read, and by whose moments

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0]
            if name not in found:
                shared = bool(seen) and seen[-1][0] is x
                found[name] = seen[-1][1] if shared else Inputs(features(module)[0])
            if not (seen and seen[-1][0] is x and seen[-1][1] is found[name]):
                found[name].add(x)
                seen[:] = [(x, found[name])]

        return hook

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(_changed(site)) for module, site in sites.items()]
    scaled = [(module, site.scale) for module, site in sites.items() if site.scale is not None]
    handles += [module.register_forward_pre_hook(_scaled(scale)) for module, scale in scaled]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _changed(site: LoraSite) -> Callable[..., torch.Tensor]:
    """A forward hook that adds what a site does to a layer's output."""

    def hook(module: nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        x, own = given[0], getattr(module, "bias", None)
        if site.gain is not None:
            plain = out if own is None else out - own
            out = out + plain * site.gain.to(out)
        out = out + (x @ site.down.to(x).T) @ site.up.to(x).T
        return out if site.bias is None else out + site.bias.to(out)

    return hook


def _scaled(scale: torch.Tensor) -> Callable[..., tuple[Any, ...]]:
    """A hook that multiplies a layer's input, as IA3 does; what was read is noted before it."""

    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * scale.to(given[0]), *given[1:])

    return hook
