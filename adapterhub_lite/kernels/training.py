"""The element-wise parts of a training step and its attention, natively in float32 on a CPU, each with its backward.

Every function writes what its caller allocated. Lines are independent and every sum has one order, so that results vary
neither between runs nor with the number of threads. `available` says whether there is a native library; without one, or
for other dtypes and devices, the caller computes with torch's own operations.

Dropout is a pure function of names, the same as `training.dropout` in torch operations; arithmetic modulo 2**32:

    mix(x):  x = (x ^ x >> 16) * 0x7feb352d;  x = (x ^ x >> 15) * 0x846ca68b;  return x ^ x >> 16
    key32 = low 32 bits of key ^ high 32 bits of key * 0x9e3779b1
    word  = mix(mix(key32 ^ salt * 0x85ebca77) ^ token * 0xc2b2ae3d)
    an element stays, times 1 / (1 - p), where  mix(word ^ column * 0x27d4eb2f) >> 8  >=  round(p * 2**24)

The column of an attention weight is key * heads + head, where keys count from the context's first to the last own one.
"""

from __future__ import annotations

import ctypes

import torch

from .training_attention import attend as attend
from .training_attention import attend_back as attend_back
from .training_checks import Dropout as Dropout
from .training_checks import DropoutEntry, address, dropout_entry, functions, is_plain, looks
from .training_checks import available as available

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "delta", "weight", "bias", "sum", "out", "mean", "inverse")),
        ("tokens", ctypes.c_long),
        ("width", ctypes.c_long),
        ("eps", ctypes.c_float),
        ("drop", DropoutEntry),
    ]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor) -> None:
    """out = x * inverse * weight, inverse [tokens] = 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467)."""
    _norm(x, None, weight, None, eps, None, out, None, inverse, None)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    sum_out: torch.Tensor,
    out: torch.Tensor,
    inverse: torch.Tensor,
) -> None:
    """sum_out = x + delta, and out = its norm; sum_out may be x or delta."""
    _norm(x, delta, weight, None, eps, sum_out, out, None, inverse, None)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> None:
    """out = (x - mean) * inverse * weight + bias; mean, inverse: [tokens] (arXiv 1607.06450)."""
    _norm(x, None, weight, bias, eps, None, out, mean, inverse, None)


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    sum_out: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    dropout: Dropout | None = None,
) -> None:
    """sum_out = x + delta (what dropout leaves of it), and out = its norm; sum_out may be x or delta."""
    _norm(x, delta, weight, bias, eps, sum_out, out, mean, inverse, dropout)


def _norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    sum_out: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    dropout: Dropout | None,
) -> None:
    tokens, width = x.shape
    what = _Norm(
        address("x", x, tokens, width), address("delta", delta, tokens, width), address("weight", weight, width),
        address("bias", bias, width), address("sum_out", sum_out, tokens, width), address("out", out, tokens, width),
        address("mean", mean, tokens), address("inverse", inverse, tokens), tokens, width, eps,
        dropout_entry(dropout, tokens),
    )  # fmt: skip
    functions().ahl_norm(ctypes.addressof(what), torch.get_num_threads())


def rms_norm_back(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    grad_x: torch.Tensor,
    add: bool = False,
) -> None:
    """grad_x = the gradient of the normed x (add: += it); the weight is frozen. grad_x may be grad_out."""
    _norm_back(grad_out, x, weight, None, inverse, grad_x, add)


def layer_norm_back(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    grad_x: torch.Tensor,
    add: bool = False,
) -> None:
    """grad_x = the gradient of the normed x (add: += it); weight and bias are frozen. grad_x may be grad_out."""
    _norm_back(grad_out, x, weight, mean, inverse, grad_x, add)


def _norm_back(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    grad_x: torch.Tensor,
    add: bool,
) -> None:
    tokens, width = x.shape
    functions().ahl_norm_back(
        address("grad_out", grad_out, tokens, width), address("x", x, tokens, width), address("weight", weight, width),
        address("mean", mean, tokens), address("inverse", inverse, tokens), address("grad_x", grad_x, tokens, width),
        tokens, width, add, torch.get_num_threads(),
    )  # fmt: skip


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, activation: str = "silu") -> None:
    """out [tokens, inner] = activation(gate) * up; gate_up [tokens, 2 * inner]: gate and then up (arXiv 2002.05202)."""
    tokens, inner = out.shape
    functions().ahl_gated(
        _kind(activation), address("gate_up", gate_up, tokens, 2 * inner), tokens, inner,
        address("out", out, tokens, inner), torch.get_num_threads(),
    )  # fmt: skip


def swiglu_back(
    gate_up: torch.Tensor,
    grad_act: torch.Tensor,
    act_out: torch.Tensor | None,
    grad_gate_up: torch.Tensor,
    activation: str = "silu",
) -> None:
    """act_out = what `swiglu` gave, and the gradients of gate and up. grad_gate_up may be gate_up, act_out grad_act."""
    tokens, inner = grad_act.shape
    functions().ahl_gated_back(
        _kind(activation), address("gate_up", gate_up, tokens, 2 * inner), address("grad_act", grad_act, tokens, inner),
        tokens, inner, address("act_out", act_out, tokens, inner),
        address("grad_gate_up", grad_gate_up, tokens, 2 * inner), torch.get_num_threads(),
    )  # fmt: skip


def activate(x: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """out = activation(x), one of ACTIVATIONS; any shape; out may be x."""
    functions().ahl_activate(
        _kind(activation),
        address("x", x, *x.shape),
        None,
        x.numel(),
        address("out", out, *x.shape),
        torch.get_num_threads(),
    )


def activate_back(x: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor, activation: str) -> None:
    """grad_x = grad * the activation's slope at x; grad_x may be x or grad."""
    functions().ahl_activate(
        _kind(activation), address("x", x, *x.shape), address("grad", grad, *x.shape), x.numel(),
        address("grad_x", grad_x, *x.shape), torch.get_num_threads(),
    )  # fmt: skip


def gelu(x: torch.Tensor, out: torch.Tensor, tanh: bool = False) -> None:
    """out = x * P(normal < x), or its fit by tanh (arXiv 1606.08415)."""
    activate(x, out, "gelu_tanh" if tanh else "gelu")


def gelu_back(x: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor, tanh: bool = False) -> None:
    """grad_x = grad * the slope of `gelu` at x; grad_x may be x or grad."""
    activate_back(x, grad, grad_x, "gelu_tanh" if tanh else "gelu")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False) -> None:
    """Turn x [tokens, heads, dim] in place by its positions' angles, or back; halves as Llama pairs them.

    x may be part of wider lines, and of wider heads; only its last dimension must be dense. cos, sin:
    [tokens, dim / 2] (arXiv 2104.09864).
    """
    tokens, heads, dim = x.shape
    if not is_plain(x) or dim % 2 or (dim > 1 and x.stride(2) != 1):
        raise ValueError(f"x should be float32 [tokens, heads, even], its last dimension dense; it is {looks(x)}.")
    functions().ahl_rotate(
        x.data_ptr(), x.stride(0), x.stride(1), address("cos", cos, tokens, dim // 2),
        address("sin", sin, tokens, dim // 2), tokens, heads, dim, inverse, torch.get_num_threads(),
    )  # fmt: skip


def drop(x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor) -> None:
    """out [tokens, width] = x where the hash says so, times 1 / (1 - p), else 0; out may be x."""
    lines, width = x.shape
    by = dropout_entry(Dropout(keys, tokens, salt, p), lines)
    functions().ahl_drop(
        ctypes.addressof(by), address("x", x, lines, width), lines, width, address("out", out, lines, width),
        torch.get_num_threads(),
    )  # fmt: skip


def cross_entropy_rows(
    logits: torch.Tensor, targets: torch.Tensor, losses_out: torch.Tensor, gradient: bool = True
) -> None:
    """losses_out [rows] = the cross entropy of each row of logits; with `gradient` these become softmax - onehot.

    Args:
        logits: [rows, vocabulary].
        targets: int64 [rows]; a row with a negative one has no loss and no gradient.

    Raises:
        ValueError: a target is no index of the vocabulary; nothing is written then.
    """
    rows, vocabulary = logits.shape
    done = functions().ahl_cross_entropy(
        address("logits", logits, rows, vocabulary), address("targets", targets, rows, dtype=torch.int64), rows,
        vocabulary, address("losses_out", losses_out, rows), gradient, torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise ValueError(f"A target is no index of {vocabulary} logits.")


def _kind(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation!r} is none of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS.index(activation)
