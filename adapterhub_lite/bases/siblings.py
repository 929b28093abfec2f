"""Linear layers of a base that read one input: q, k and v of an attention, gate and up of a feed-forward layer."""

from __future__ import annotations

from torch import nn

# Names within one parent module, in the order in which their outputs are laid side by side.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
)


def sibling_groups(model: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """All groups of two and more, in the order of the module tree."""
    groups = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _TOGETHER:
            if all(name in children for name in names):
                groups.append(tuple(children[name] for name in names))
    return tuple(groups)
