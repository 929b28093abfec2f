"""Adapters of methods without a form of ours: PEFT's own layers, put into a copy of a base's module tree.

Copied are only the modules that hold other modules; layers, and with them all weights, stay the base's own. PEFT puts
its layers around those into the copy and computes with it, and the live tree is never touched: nothing has to be taken
out again, whatever fails and whoever else reads the base at that moment.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatch, Unsupported
from ..formats.injected import METHODS, is_index, module_of, unsized
from ..formats.specs import InjectedSpec
from .sites import check_fit, features, is_linear

_ADAPTER = "default"
_QUANTISED = {"Linear4bit", "Linear8bitLt"}


class Tree:
    """The copy of a module tree, made as far as it is asked for; a part that two trees share is copied once."""

    def __init__(self) -> None:
        self._copies: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of `module`; a layer is its own, or what PEFT put around it."""
        if not module._modules and module not in self._copies:
            return module
        if module not in self._copies:
            made = self._copies[module] = copy.copy(module)
            # What is registered with a copy, as hooks are, must not be registered with the live module.
            for name, value in vars(module).items():
                if isinstance(value, dict | set):
                    made.__dict__[name] = copy.copy(value)
            made._modules = {name: child and self.of(child) for name, child in module._modules.items()}
        return self._copies[module]

    def keep(self, root: nn.Module) -> None:
        """Remember what PEFT put around layers in the copy of `root`, for other views that have them elsewhere."""
        copied = self.of(root)
        for name, module in root.named_modules(remove_duplicate=False):
            made = copied.get_submodule(name)
            if not module._modules and made is not module:
                self._copies.setdefault(module, made)


@dataclass(frozen=True, eq=False)
class Injected:
    """An adapter as layers of PEFT in a copy of a base's module tree.

    Attributes:
        tensors: everything that the base has not, each once; also what PEFT makes from a seed.
    """

    method: str
    tree: Tree
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def bare(self) -> Injected:
        """The same without layers of PEFT: the base's own, in a copy of its tree."""
        return Injected(self.method, Tree(), ())

    def model(self, live: nn.Module) -> nn.Module:
        """What computes as `live`, a model over the base's modules, but with the adapter."""
        return self.tree.of(live)


def fit_injected(
    spec: InjectedSpec, tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], name: str
) -> tuple[Injected, dict[str, torch.Tensor]]:
    """Have PEFT put an adapter around the layers of a base; also gives the tensors that are no part of it (a head).

    The layers compute on the base's device, in the precision that PEFT chooses for them.

    Args:
        modules: all modules of the base's class by name; that of the class itself is "".

    Raises:
        AdapterMismatch: a tensor is missing, unexpected or misshapen, or PEFT finds no way to build the layers.
        Unsupported: PEFT has no such layer for a quantised one.
    """
    others = check_places(spec, tensors, modules)
    own = {key: tensor for key, tensor in tensors.items() if key not in others}
    wrong = unsized(spec, (tuple(tensor.shape) for tensor in own.values()))
    if not own or wrong:
        reason = wrong or f"the file holds no tensor of {spec.method}"
        raise AdapterMismatch(f"{name}: {reason}.", "Export it again with PEFT's save_pretrained.")
    owners = _owners(spec, tensors)
    targets = _named(spec, modules, owners)
    if METHODS[spec.method].everywhere and (bare := sorted(set(targets) - owners)):
        # Before PEFT builds anything: some methods decompose every weight that the configuration names.
        raise AdapterMismatch(f"{name}: the file holds no tensor for {bare[0]}.", "It was made for another model.")
    _check_indices(spec, own, modules, name)
    tree, root = Tree(), modules[""]
    with _apart(root):
        wrapped = _wrap(spec.method, spec.options, tree.of(root), targets, modules, name)
        _load(wrapped, own, root, name)
    tree.keep(root)
    live = set(root.modules())
    for module in wrapped.modules():
        if module not in live:
            module.training = False
    base = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    held = [tensor for tensor in (*wrapped.parameters(), *wrapped.buffers()) if id(tensor) not in base]
    for tensor in held:
        tensor.requires_grad_(False)
    return Injected(spec.method, tree, tuple(held)), others


def check_places(
    spec: InjectedSpec, tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Check that a base has the layers that a file has tensors for, and its configuration names; gives other tensors.

    Raises:
        AdapterMismatch: a module that is not there, or none that the method can change.
    """
    found = _owners(spec, tensors)
    named = _named(spec, modules, found)
    problems = [f"{name} does not exist here" for name in sorted(found - set(modules))]
    if not named:
        problems.append("the configuration names none of this base's")
    for name in named:
        module = modules[name]
        if not _IS[METHODS[spec.method].layers](module):
            problems.append(f"{name} is {type(module).__name__}, which {spec.method} does not change here")
        elif isinstance(module, nn.Embedding) and module.num_embeddings <= max(spec.options["token_indices"]):
            problems.append(f"{name} has {module.num_embeddings} tokens")
    check_fit(problems, max(len(found), len(named)))
    return {key: tensor for key, tensor in tensors.items() if module_of(spec.method, key) is None}


def _owners(spec: InjectedSpec, tensors: Iterable[str]) -> set[str]:
    """The modules that a file has tensors for."""
    return {module for key in tensors if (module := module_of(spec.method, key))}


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not module._modules and isinstance(weight, torch.Tensor) and weight.dim() == 1


_IS: Mapping[str, Callable[[nn.Module], bool]] = {
    "linear": is_linear,
    "norm": _is_norm,
    "embedding": lambda module: isinstance(module, nn.Embedding),
}


def _named(spec: InjectedSpec, modules: Mapping[str, nn.Module], found: set[str]) -> list[str]:
    """In the order of the model, which is that in which PEFT deals out what modules share."""
    return [name for name in modules if name and (spec.targets(name) if spec.target_modules else name in found)]


def _check_indices(
    spec: InjectedSpec, own: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], name: str
) -> None:
    """Whole numbers are places in a weight: one that is outside would end a CUDA process, not a call."""
    for key, tensor in own.items():
        if not is_index(spec.method, key):
            continue
        n_in, n_out = features(modules[module_of(spec.method, key) or ""])
        limits = torch.tensor([[n_out], [n_in]] if tensor.dim() == 2 else [n_in * n_out])
        fits = tensor.dim() == 1 or (tensor.dim() == 2 and len(tensor) == 2)
        if tensor.is_floating_point() or not fits or bool(((tensor < 0) | (tensor >= limits)).any()):
            raise AdapterMismatch(f"{name}: {key} names places outside its layer.", "It was made for another model.")


@contextmanager
def _apart(root: nn.Module) -> Iterator[None]:
    """PEFT draws random numbers, warns of what is checked here, and compiles for BOFT if it is let."""
    import peft.tuners.boft.layer as boft

    weight = next(iter(root.parameters()), None)
    devices = [weight.device] if weight is not None and weight.device.type == "cuda" else []
    compiled: Any = boft._FBD_CUDA  # type: ignore[attr-defined]
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        boft._FBD_CUDA = compiled or False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            boft._FBD_CUDA = compiled  # type: ignore[attr-defined]


def inject_fresh(
    method: str, options: Mapping[str, Any], targets: list[str], modules: Mapping[str, nn.Module], name: str
) -> tuple[Any, Tree]:
    """Have PEFT put a new adapter around layers of a base, to be trained: PEFT's model, and the copied tree.

    Args:
        targets: names of modules.
        modules: all modules of the base's class by name; that of the class itself is "".

    Raises:
        AdapterMismatch: PEFT finds no way to build the layers.
        Unsupported: PEFT has no such layer for a quantised one.
    """
    tree, root = Tree(), modules[""]
    with _apart(root):
        wrapped = _wrap(method, options, tree.of(root), targets, modules, name, train=True)
    tree.keep(root)
    return wrapped, tree


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Have PEFT read the options of a method, as far as it does without layers.

    Raises:
        AdapterMismatch: it refuses them.
    """
    named = options.get("feedforward_modules") or ()  # IA3's, which have to be among the targets
    targets = ["layer", *([named] if isinstance(named, str) else named)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _config(method, options, targets, True)
    except Exception as error:  # of a library
        raise AdapterMismatch(f"PEFT refuses them for {method}: {_first_line(error)}", "Choose others.") from error


def saved_tensors(wrapped: Any) -> dict[str, torch.Tensor]:
    """What PEFT would save of its model, by PEFT's keys."""
    import peft

    found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        wrapped, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    return found


def _wrap(
    method: str,
    options: Mapping[str, Any],
    root: Any,
    targets: list[str],
    modules: Mapping[str, nn.Module],
    name: str,
    *,
    train: bool = False,
) -> nn.Module:
    """PEFT's model around the copy `root`, its layers as they begin."""
    import peft

    kinds = {type(modules[target]).__name__ for target in targets}
    # PEFT asks the model whether it was quantised, and our views of one do not know.
    root.is_loaded_in_4bit, root.is_loaded_in_8bit = "Linear4bit" in kinds, "Linear8bitLt" in kinds
    if getattr(root, "config", None) is not None:
        root.config = copy.copy(root.config)
    try:
        config = _config(method, options, targets, train)
        wrapped: nn.Module = peft.PeftModel(root, config, _ADAPTER)
    except Exception as error:  # of a library: a layer it does not know, sizes that do not divide
        message = f"{name}: PEFT cannot build its {method} layers in this base: {_first_line(error)}"
        if kinds & _QUANTISED:
            raise Unsupported(message, "Load the base without quantisation.") from error
        raise AdapterMismatch(message, "Choose others." if train else "It was made for another model.") from error
    for target in targets:
        if type(modules[target]).__name__ in _QUANTISED and not _knows_quantised(root.get_submodule(target)):
            message = f"{name}: PEFT has no {method} for quantised layers."
            raise Unsupported(message, "Load the base without quantisation.")
    return wrapped


def _config(method: str, options: Mapping[str, Any], targets: list[str], train: bool) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    return kind(**copy.deepcopy(dict(options)), target_modules=list(targets), inference_mode=not train)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _knows_quantised(layer: nn.Module) -> bool:
    own_class = type(layer).__module__.rpartition(".")[2] == "bnb"
    return own_class or getattr(layer, "quantization_backend", None) is not None


def _load(wrapped: Any, own: Mapping[str, torch.Tensor], root: nn.Module, name: str) -> None:
    """Give the layers their tensors: exactly those that PEFT would save of them, none of them the base's."""
    import peft

    expected = saved_tensors(wrapped)
    missing, unexpected = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
    problems = [f"{key} is missing" for key in missing] + [f"{key} has no place" for key in unexpected]
    for key in sorted(set(expected) & set(own)):
        ours, theirs = own[key], expected[key]
        if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{key} is {list(ours.shape)} {ours.dtype}, not {list(theirs.shape)} {theirs.dtype}")
    weights = {tensor.data_ptr() for tensor in (*root.parameters(), *root.buffers()) if tensor.numel()}
    problems += [f"{key} is a tensor of the base" for key, one in expected.items() if one.data_ptr() in weights]
    if problems:
        more = f" ({len(problems)} problems in all)" if len(problems) > 3 else ""
        raise AdapterMismatch(f"{name}: {'; '.join(problems[:3])}{more}.", "It was made for another model.")
    try:
        left = peft.set_peft_model_state_dict(wrapped, dict(own), adapter_name=_ADAPTER)
    except RuntimeError as error:
        raise AdapterMismatch(f"{name}: PEFT cannot load its tensors: {error}", "Export it again with PEFT.") from error
    if left.unexpected_keys:
        raise AdapterMismatch(f"{name}: PEFT leaves {', '.join(left.unexpected_keys[:3])} out.", "Export it again.")
