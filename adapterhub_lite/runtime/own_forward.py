"""Decoding through a base's own forward, and which way is right for a base: a batch with its cache, or rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

import torch

from ..bases.inputs import causal_inputs, pad_rows, seq2seq_inputs
from ..bases.load import Base
from ..errors import Unsupported
from .batch import BatchPlan
from .decoder import decoder_of
from .sites import SiteHooks

# Tokens of the rows that a way is tried with, how many of them are prompt, and the part of the vocabulary they are of.
_PROBE, _PROMPTS, _VOCABULARY = (9, 6), (5, 2), 1000
# Largest difference of a logit from that of the row alone, as a share of the largest: rounding, not meaning.
_EXACT, _ROUNDED = 1e-3, 0.05


class Loop(Protocol):
    """The state of a batch that is decoded; `hooked`: its forward is the model's own, changed by hooks."""

    hooked: bool

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        ...

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        ...

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only; `plan` is theirs."""
        ...


class CausalLoop:
    """Decode state of a causal model through its own forward: cache, mask [rows, keys], next position [rows]."""

    hooked = True

    def __init__(self, base: Base, plan: BatchPlan, prompts: list[list[int]]) -> None:
        ids, mask = (t.to(base.device) for t in pad_rows(prompts, base.pad_id, left=True))
        self._model, self._device = plan.model(base.model), base.device
        self._inputs = causal_inputs(ids, mask, plan.prefix, use_cache=True)
        self._inputs["logits_to_keep"] = 1

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        logits: torch.Tensor = self._model(**self._inputs).logits
        return logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        mask = self._inputs["attention_mask"]
        self._inputs["input_ids"] = tokens[:, None]
        self._inputs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], 1)
        self._inputs["position_ids"] = self._inputs["position_ids"][:, -1:] + 1

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(keep, device=self._device)
        self._inputs["past_key_values"].batch_select_indices(rows)
        for name in ("input_ids", "attention_mask", "position_ids"):
            self._inputs[name] = self._inputs[name][rows]


class Seq2SeqLoop:
    """Decode state of an encoder-decoder model; the encoder runs once."""

    hooked = True

    def __init__(self, base: Base, plan: BatchPlan, prompts: list[list[int]]) -> None:
        ids, mask = (t.to(base.device) for t in pad_rows(prompts, base.pad_id, left=False))
        start = torch.full((len(prompts), 1), base.config.decoder_start_token_id, device=base.device)
        self._model: Any = plan.model(base.model)
        self._device = base.device
        self._inputs = seq2seq_inputs(ids, mask, start, plan.prefix, use_cache=True)

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        out = self._model(**self._inputs)
        self._inputs.pop("input_ids", None)
        self._inputs["encoder_outputs"] = (out.encoder_last_hidden_state,)
        logits: torch.Tensor = out.logits
        return logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        self._inputs["decoder_input_ids"] = tokens[:, None]

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(keep, device=self._device)
        self._inputs["past_key_values"].batch_select_indices(rows)
        self._inputs["attention_mask"] = self._inputs["attention_mask"][rows]
        self._inputs["encoder_outputs"] = (self._inputs["encoder_outputs"][0][rows],)


class AloneLoop:
    """Rows one by one, each read anew for every token: no cache and no padding, so right for any model, and slow."""

    hooked = False  # as a whole: each row has hooks of its own

    def __init__(self, base: Base, plans: Sequence[BatchPlan], prompts: list[list[int]], hooks: SiteHooks) -> None:
        """`plans`: one for each row.

        Raises:
            Unsupported: a prefix, where keys and values are not all that a model keeps.
        """
        if any(plan.prefix is not None for plan in plans) and not batches(base):
            raise Unsupported(
                f"{base.name} ({base.config.model_type}) keeps more than keys and values: a prefix is not enough.",
                "Use a LoRA or IA3 adapter.",
            )
        self._base, self._hooks, self._plans = base, hooks, list(plans)
        self._given = prompts
        self._rows = [[base.config.decoder_start_token_id] if base.kind == "seq2seq" else list(p) for p in prompts]

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        found = []
        for plan, given, row in zip(self._plans, self._given, self._rows, strict=True):
            with self._hooks.using(plan.sites):
                found.append(alone_logits(self._base, plan, given, row, last=True)[-1])
        return torch.stack(found)

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only, each with the plan it has."""
        self._plans = [self._plans[i] for i in keep]
        self._given = [self._given[i] for i in keep]
        self._rows = [self._rows[i] for i in keep]


def alone_logits(base: Base, plan: BatchPlan, given: list[int], row: list[int], last: bool = False) -> torch.Tensor:
    """Logits [tokens, vocabulary] after each token of one row, or after its `last` alone, read at once.

    Args:
        given: what the encoder of an encoder-decoder reads.
        row: what a causal model reads, or the decoder.
    """
    ids = torch.tensor([row], device=base.device)
    if base.kind == "seq2seq":
        encoder_ids = torch.tensor([given], device=base.device)
        inputs = seq2seq_inputs(encoder_ids, torch.ones_like(encoder_ids), ids, plan.prefix, use_cache=False)
    else:
        inputs = causal_inputs(ids, torch.ones_like(ids), plan.prefix, use_cache=False)
        if last:
            inputs["logits_to_keep"] = 1
    logits: torch.Tensor = plan.model(base.model)(**inputs).logits[0]
    return logits


def batches(base: Base) -> bool:
    """Whether rows of unlike length can be decoded together through the base's own forward, step by step.

    Not where a model carries more from token to token than a key-value cache (Mamba, RWKV), or where what stands before
    a row changes it. Found out once a base, by trial.

    Raises:
        Unsupported: the model cannot read a row by itself either.
    """
    if "batches" not in base.derived:
        base.derived["batches"] = _tried(base)
    return base.derived["batches"]  # type: ignore[no-any-return]


def flattens(base: Base, plan: BatchPlan) -> bool:
    """Whether a layer that a plan changes sees the tokens of all rows as one list, which tells no rows apart."""
    batches(base)
    return not base.derived["flattened"].isdisjoint(plan.sites)


def flattening(base: Base) -> bool:
    """Whether a base is read by its own forward, and some layer there sees the tokens of all rows as one list."""
    if base.kind == "encoder" or decoder_of(base) is not None:
        return False
    batches(base)
    return bool(base.derived["flattened"])


def _tried(base: Base) -> bool:
    generator = torch.Generator().manual_seed(0)
    size = min(int(base.config.get_text_config().vocab_size), _VOCABULARY)
    rows = [torch.randint(0, size, (n,), generator=generator).tolist() for n in _PROBE]
    prompts = [row[:n] for row, n in zip(rows, _PROMPTS, strict=True)]
    later = [row[n:] for row, n in zip(rows, _PROMPTS, strict=True)]
    plan = BatchPlan((None, None), (), None, base.device)
    begin = [[base.config.decoder_start_token_id]] * 2 if base.kind == "seq2seq" else prompts
    expected = []
    with torch.inference_mode():
        for prompt, first, rest in zip(prompts, begin, later, strict=True):
            try:
                expected.append(alone_logits(base, plan, prompt, first + rest)[len(first) - 1 :].float())
            except Exception as error:
                raise Unsupported(
                    f"{base.name} ({base.config.model_type}) cannot write: {error}.", "Use another base."
                ) from error
        try:
            with _watched(base):
                found = _stepped(base, plan, prompts, later)
        except Exception:
            return False  # of a model whose cache is another; a row alone needs none
    bound = _EXACT if base.dtype == torch.float32 and base.quantization != "int8" else _ROUNDED
    # Rounding can send single tokens to other experts; a state that is lost changes all tokens after it.
    return all(median(_differences(*pair)) <= bound for pair in zip(found, expected, strict=True))


@contextmanager
def _watched(base: Base) -> Iterator[None]:
    """Within the block it is found out which linear layers are given more than one place a row: the tokens of all."""
    flattened: set[torch.nn.Module] = set()
    base.derived["flattened"] = flattened

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > len(_PROBE):
            flattened.add(module)

    linear = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(look) for module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stepped(base: Base, plan: BatchPlan, prompts: list[list[int]], later: list[list[int]]) -> list[torch.Tensor]:
    """Logits [steps, vocabulary] of each of two rows, the first of which leaves before the last step."""
    loop = (Seq2SeqLoop if base.kind == "seq2seq" else CausalLoop)(base, plan, prompts)
    found = [loop.step()]
    for tokens in list(zip(*later, strict=True))[:-1]:
        loop.append(torch.tensor(tokens, device=base.device))
        found.append(loop.step())
    loop.select([1], plan.select([1]))
    loop.append(torch.tensor(later[1][-1:], device=base.device))
    rows = [torch.stack([logits[i].float() for logits in found]) for i in range(2)]
    return [rows[0], torch.cat([rows[1], loop.step().float()])]


def _differences(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    expected = expected[: len(found)]
    worst: list[float] = ((found - expected).abs().amax(-1) / expected.abs().max()).tolist()
    return worst
