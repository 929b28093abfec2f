"""Large shapes on a GPU: random weights in NF4, rank 16, rows of 2048 tokens; memory and speed beside QLoRA's peer.

Nothing is fetched: a configuration of the shape of a known model, its layers made one by one on the device. The peer is
Trainer with PEFT and bitsandbytes as its makers describe QLoRA: `prepare_model_for_kbit_training`, bf16, gradient
checkpointing, and without checkpointing where that fits. Speed is that of the setup a recipe gets by itself. Memory is
that of a recipe that asks for the least, beside the checkpointed peer, both on a base whose scales are quantised, too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from adapterhub_lite.bases.devices import DTYPES, Choice
from adapterhub_lite.bases.fetch import BaseSource
from adapterhub_lite.bases.fingerprint import Fingerprint
from adapterhub_lite.bases.load import Base
from adapterhub_lite.bases.memory import measure
from adapterhub_lite.bases.quantization import NF4_BLOCK_SIZE
from adapterhub_lite.recipe.schema import DataConfig, FileData, InstructTask, LoraAdapter, Recipe
from adapterhub_lite.recipe.training import TrainingConfig
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.train import Assignment
from adapterhub_lite.workflows.plan import setup_of

from . import training_together
from .rows import Row, Sample, faster, in_turn, skip
from .training_cases import Case
from .training_sides import Peer, Run, run_ours, run_trainer, wrap
from .training_speed import same_losses

PART = "gpu"
LENGTH = 2048
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8B (Llama 3.1)": ("llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    }),
    "14B (Qwen 2.5)": ("qwen2", {
        "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
        "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    }),
}  # fmt: skip
SMALL = ("135M (SmolLM2)", ("llama", {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}))  # fmt: skip
_ROWS = 2  # of one update
BOUND_BFLOAT16 = 0.02
LEAST: dict[str, Any] = {"pack_tokens": LENGTH, "checkpointing": True, "offload": True, "table_on_host": True}
"""What a recipe can ask for in its training part; with `quantize: nf4-double`."""
_QLORA = Peer("Trainer + bnb", autocast=True, dtype=torch.bfloat16, same_order=True)


@dataclass(frozen=True)
class Figures:
    """A run with the most bytes it took above its base, and its base's."""

    run: Run
    above: int
    base: int


def rows(updates: int, rounds: int, length: int = LENGTH) -> Iterator[Row]:
    """The figures of this part, or that there is no GPU."""
    if not torch.cuda.is_available():
        for name in SHAPES:
            yield skip(PART, f"{name} in NF4, rank 16, rows of {length} tokens: memory, tokens/s", "no GPU here")
        yield skip(PART, f"8 adapters together, {SMALL[0]} and {next(iter(SHAPES))} shapes", "no GPU here")
        return
    for name, shape in SHAPES.items():
        yield from shape_rows(name, shape, "cuda", updates, rounds, length)
    for name, shape in (SMALL, next(iter(SHAPES.items()))):
        base = random_base(name, shape, "cuda")
        yield from together_rows(base, updates, rounds)
        del base
        _clear()


def shape_rows(
    name: str, shape: tuple[str, dict[str, Any]], device: str, updates: int, rounds: int, length: int
) -> Iterator[Row]:
    """Memory and speed of one shape; each run has a base of its own, the same random one."""
    works: dict[str, Callable[[], Figures]] = {
        "ours": lambda: _ours(_case(random_base(name, shape, device), updates, length)),
        "checkpointed": lambda: _peer(_case(random_base(name, shape, device), updates, length), True),
        "Trainer + bnb": lambda: _peer(_case(random_base(name, shape, device), updates, length), False),
    }
    found: dict[str, list[Figures]] = {}
    for round_ in range(rounds):
        for who in list(works)[round_ % 3 :] + list(works)[: round_ % 3]:
            try:
                found.setdefault(who, []).append(works[who]())
            except torch.OutOfMemoryError:  # the peer may not fit without checkpoints; ours has to
                if who == "ours":
                    raise
            _clear()
    what = _what(name, "NF4", length)
    samples = {who: Sample.of([one.run.per_thousand for one in runs]) for who, runs in found.items() if runs}
    fastest = min((who for who in samples if who != "ours"), key=lambda who: samples[who].p50)
    row = faster(PART, f"1,000 tokens, {what}", samples["ours"], fastest, samples[fastest])
    speeds = f"{1000 / samples['ours'].p50:,.0f} / {1000 / samples[fastest].p50:,.0f} tokens/s"
    yield replace(row, told=f"{row.told}, {speeds}")
    for who in (who for who in samples if who != "ours"):
        yield same_losses(found["ours"][0].run, found[who][0].run, f"{who}, {name}", BOUND_BFLOAT16)
    yield from least_rows(name, shape, device, updates, length)


def least_rows(name: str, shape: tuple[str, dict[str, Any]], device: str, updates: int, length: int) -> Iterator[Row]:
    """Memory of one shape, above the base and in all."""

    def case() -> Case:
        return _case(random_base(name, shape, device, quantize="nf4-double"), updates, length)

    ours = _ours(case().trained(**{**LEAST, "pack_tokens": length}))
    _clear()
    peer = _peer(case(), True)
    _clear()
    what = (
        f"{_what(name, 'NF4 with quantised scales', length)}; {', '.join(key for key in LEAST if LEAST[key] is True)}"
    )
    told = f"{_gb(ours.above)} on {_gb(ours.base)} / {_gb(peer.above)} on {_gb(peer.base)}"
    yield Row(PART, f"peak memory above the base, {what}", figure=ours.above / max(peer.above, 1), told=told)
    totals = ours.above + ours.base, peer.above + peer.base
    told = f"{_gb(totals[0])} / {_gb(totals[1])}"
    yield Row(PART, f"peak memory in all, {what}", figure=totals[0] / max(totals[1], 1), told=told)


def _what(name: str, form: str, length: int) -> str:
    return f"{name} in {form}, rank 16, {_ROWS} x {length} tokens an update"


def together_rows(base: Base, updates: int, rounds: int, count: int = 8, tokens: int = 64) -> Iterator[Row]:
    """Several adapters at once beside one by one."""

    def cases(length: int) -> list[Case]:
        return [_case(base, updates, length, seed=i, rows=1) for i in range(count)]

    found = in_turn(
        {
            "together": lambda _: [training_together.seconds(cases(tokens))],
            "one by one": lambda _: [sum(training_together.seconds([case]) for case in cases(tokens))],
        },
        rounds,
    )
    what = f"{updates - 1} updates of {count} adapters, 1 x {tokens} tokens each, {base.name} in NF4"
    yield faster(PART, what, found["together"], "one by one", found["one by one"], 2.0)


def random_base(
    name: str, shape: tuple[str, dict[str, Any]], device: str, dtype: str = "bfloat16", quantize: str = "nf4"
) -> Base:
    """A base of this shape with random weights, its linear layers in nf4 or nf4-double; the same every time."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape[0], **shape[1], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    generator = torch.Generator(device).manual_seed(0)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, last = path.rpartition(".")
            setattr(
                model.get_submodule(parent),
                last,
                _nf4(module, device, DTYPES[dtype], generator, quantize == "nf4-double"),
            )
    for module in model.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                if value.dim() > 1:
                    made = _random(value.shape, device, value.dtype, generator)
                else:  # of a norm
                    made = torch.ones_like(value, device=device)
                setattr(module, key, nn.Parameter(made))
    model.tie_weights()
    model.to(device).requires_grad_(False).eval()
    model.is_loaded_in_4bit = True  # what transformers' loader would have noted; PEFT asks for it
    choices = {"device": Choice(device, "asked for"), "dtype": Choice(dtype, "asked for")}
    source = BaseSource(name, Path(), "folder", None)
    mark = Fingerprint("", "", "", "", quantize)
    return Base(name, "causal", model, _Tokenizer(), quantize, source, mark, choices, measure(model, 0))


class _Tokenizer:
    """All that collators ask of a tokenizer when there are only ids: how to pad."""

    pad_token_id, eos_token_id, padding_side = 0, 2, "right"

    def pad(self, features: list[dict[str, Any]], **given: Any) -> dict[str, torch.Tensor]:
        """Rows of one length: nothing to pad."""
        return {key: torch.tensor([row[key] for row in features]) for key in features[0]}


def _nf4(linear: nn.Linear, device: str, dtype: torch.dtype, generator: torch.Generator, double: bool) -> nn.Module:
    import bitsandbytes as bnb

    with torch.device("meta"):
        made: Any = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype,
            compress_statistics=double, quant_type="nf4",
        )  # fmt: skip
    weight = _random(linear.weight.shape, device, dtype, generator)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=NF4_BLOCK_SIZE, compress_statistics=double, module=made
    ).to(device)
    if linear.bias is not None:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, device=device, dtype=dtype), requires_grad=False)
    return made


def _random(shape: torch.Size, device: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(0.02).to(dtype)


def _case(base: Base, updates: int, length: int, seed: int = 0, rows: int = _ROWS) -> Case:
    """Rows of random tokens, all of one length; the loss is on the second half."""
    generator = torch.Generator().manual_seed(seed)
    high = base.config.vocab_size
    made = []
    for _ in range(updates * rows):
        ids = torch.randint(3, high, (length,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    recipe = Recipe(
        name="benchmark", base=base.name, task=InstructTask(), data=DataConfig(train=FileData("none.jsonl")),
        adapter=LoraAdapter(), quantize=base.quantization,
        training=TrainingConfig(
            epochs=1.0, batch_size=rows, max_length=length, seed=seed, learning_rate=1e-4, checkpoint_every="never"
        ),
    )  # fmt: skip
    return Case(recipe, base, made, "random tokens")


def _ours(case: Case) -> Figures:
    held = _reset()
    settings = setup_of([Assignment(case.recipe, case.examples)], case.base).settings
    run = run_ours(case, settings)
    return Figures(run, _peak() - held, held)


def _peer(case: Case, checkpoint: bool) -> Figures:
    from peft import prepare_model_for_kbit_training

    with TemporaryDirectory() as folder:
        start = case.export(Path(folder))
        held = _reset()
        model = prepare_model_for_kbit_training(case.base.model, use_gradient_checkpointing=checkpoint)
        wrapped = wrap(model, start)
        run = run_trainer(case, wrapped, _QLORA, activation_checkpointing=checkpoint)
    return Figures(run, _peak() - held, held)


def _reset() -> int:
    """Bytes that tensors take on the device now; the peak begins anew."""
    if not torch.cuda.is_available():
        return 0
    _clear()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
