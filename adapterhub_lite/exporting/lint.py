"""What a reader would make of an adapter, and what an export does about each point."""

from __future__ import annotations

from collections.abc import Callable

from ..adapters.lora import PREFIX
from ..formats.specs import LoraSpec
from .findings import Finding, Remedy, one_of
from .pairs import total
from .readers import Reader
from .traits import TRAITS, Facts

Done = tuple[Remedy, str, float | None]


def lint(facts: Facts, reader: Reader) -> list[Finding]:
    """Findings in the order of the rules; what must be known when it is served comes last."""
    found = []
    for rule, trait in TRAITS.items():
        what = trait(facts) if rule in reader.says else None
        if what is not None:
            severity, says = reader.says[rule]
            remedy, done, error = _DONE[rule](facts, reader)
            given = rule == "rank_limit" and facts.asked.max_rank is not None
            why = f"is above your --max-rank {facts.limit}" if given else f"{reader.name} {says}"
            what += " " if given else "; "
            found.append(Finding(rule, severity, f"{what}{why}.", remedy, done, error))
    if facts.cut and not any(one.rule == "rank_limit" for one in found):
        most = max(facts.ranks.values())
        found.append(Finding("rank", "info", f"ranks up to {most}, to be cut", "svd", _cut(facts), svd_error(facts)))
    server = facts.asked.max_rank or reader.limit or facts.rank
    advice = [text.format(server_rank=server) if "{" in text else text for text in reader.advice]
    return [*found, *(Finding("advice", "info", text, "told", "") for text in advice)]


def svd_error(facts: Facts) -> float:
    """The relative error of all modules as one, of what is not exact in the pairs."""
    return total((pair.error * pair.norm, pair.norm) for pair in facts.pairs.modules.values())


def _cut(facts: Facts) -> str:
    ranks = sorted(pair.rank for pair in facts.pairs.modules.values())
    return f"cut to ranks from {ranks[0]} to {ranks[-1]} by SVD"


def _method(facts: Facts, reader: Reader) -> Done:
    return "refused", "Serve it here or with PEFT, or train a LoRA adapter.", None


def _by_svd(facts: Facts, reader: Reader) -> Done:
    if not facts.pairs.modules:
        return "refused", "Its change depends on the base's weights, which are not at hand: name it with --base.", None
    return "svd", f"brought to LoRA of rank {facts.rank} with the base's weights", svd_error(facts)


def _factored(facts: Facts, reader: Reader) -> Done:
    return "rewritten", "multiplied out to the matrices of LoRA", None


def _lora_bias(facts: Facts, reader: Reader) -> Done:
    if not reader.plain:
        return "told", "kept", None
    return "refused", "No product of two matrices adds a bias: train it without lora_bias, or bake it: ahl merge.", None


def _head(facts: Facts, reader: Reader) -> Done:
    if not reader.plain or "*" in reader.heads:
        return "told", "kept", None
    names = [name.removeprefix(PREFIX) for name in facts.pairs.heads]
    if facts.spec.task_type == "SEQ_CLS" and set(names) <= set(reader.heads):
        return "told", "kept, with modules_to_save, for versions that load it", None
    return "refused", "Without its head it gives no labels: serve it here or with PEFT, or bake it: ahl merge.", None


def _folded(facts: Facts, reader: Reader) -> Done:
    return "rewritten", "folded into B: alpha = r", None


def _padded(facts: Facts, reader: Reader) -> Done:
    if not reader.plain:
        return "told", "kept", None
    return "rewritten", f"padded with zeros to rank {facts.rank}", None


def _rank_limit(facts: Facts, reader: Reader) -> Done:
    if facts.limit and facts.rank > facts.limit:
        room = reader.room(facts.rank) if reader.limits or facts.asked.max_rank else None
        ways = [f"start it with room for {room} and say so: --max-rank {room}"] if room else []
        helps = reader.padded(facts.limit) <= facts.limit
        ways += [f"cut it: --rank {facts.limit}, or --error 1%"] if helps else []
        return "refused", one_of(ways or ["serve it here or with PEFT"]), None
    return "svd", _cut(facts), svd_error(facts)


def _architecture(facts: Facts, reader: Reader) -> Done:
    if facts.base is None:
        return "refused", "Name it with --base; of its files only config.json is read.", None
    return "refused", "Bake it into safetensors: ahl merge.", None


def _module(facts: Facts, reader: Reader) -> Done:
    return "refused", "It was made for another base: name its own with --base.", None


def _key_prefix(facts: Facts, reader: Reader) -> Done:
    return "rewritten", "named as the class that serves has them", None


def _filled(facts: Facts, reader: Reader) -> Done:
    if facts.base is not None:
        return "rewritten", f"given matrices of zeros at {len(facts.missing)} layers", None
    if reader.fills == "siblings" or _is_ragged(facts):
        return "refused", "Zeros would do, but their shapes are the base's: name it with --base.", None
    return "told", "Whether every layer is changed could not be seen: name the base with --base.", None


def _is_ragged(facts: Facts) -> bool:
    """Whether layers differ in which of their modules are changed."""
    layers: dict[str, set[str]] = {}
    for name in facts.pairs.modules:
        number = next((part for part in name.split(".") if part.isdecimal()), "")
        layers.setdefault(number, set()).add(name.rpartition(".")[2])
    return len({frozenset(kinds) for number, kinds in layers.items() if number}) > 1


def _embedding(facts: Facts, reader: Reader) -> Done:
    if reader.says["embedding"][0] == "info":
        return "told", "kept", None
    return "refused", "Train it without the embedding, or bake it: ahl merge.", None


def _tied_output(facts: Facts, reader: Reader) -> Done:
    return "refused", "Train it without the output layer, or serve it with PEFT.", None


def _conv1d(facts: Facts, reader: Reader) -> Done:
    return "told", "written all the same", None


def _base_name(facts: Facts, reader: Reader) -> Done:
    name = facts.base_name
    if reader.named and facts.asked.base_name is None:
        return "refused", "Say what it calls the base: --base-name NAME, as listed there, or the path of a GGUF.", None
    if (name is not None and name == facts.asked.base_name) or (name and not name.startswith(("/", "~", ".", "\\"))):
        return "rewritten", f"written as {name}", None
    return "told", "Give the name it is served under: --base-name NAME.", None


_DONE: dict[str, Callable[[Facts, Reader], Done]] = {
    "method": _method,
    "dora": _by_svd,
    "ia3": _by_svd,
    "factored": _factored,
    "lora_bias": _lora_bias,
    "head": _head,
    "rslora": _folded,
    "alpha_pattern": _folded,
    "rank_pattern": _padded,
    "padded_rank": _padded,
    "rank_limit": _rank_limit,
    "architecture": _architecture,
    "module": _module,
    "key_prefix": _key_prefix,
    "siblings": _filled,
    "layers": _filled,
    "embedding": _embedding,
    "tied_output": _tied_output,
    "conv1d": _conv1d,
    "base_name": _base_name,
}


def kept_as_stored(facts: Facts, reader: Reader) -> bool:
    """Whether the reader computes with the very tensors of the version: one rank, one scale, nothing to add."""
    modules = facts.pairs.modules
    if not isinstance(facts.spec, LoraSpec) or facts.spec.use_dora or facts.spec.use_rslora:
        return False
    uniform = {(pair.rank, pair.scale) for pair in modules.values()}
    renamed = facts.base is not None and any(facts.base.served_name(name) != name for name in modules)
    same = len(uniform) == 1 and next(iter(uniform))[0] == facts.rank
    return same and not facts.cut and not facts.missing and not renamed
