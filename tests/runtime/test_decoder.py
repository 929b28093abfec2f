"""A forward of our own against the model's: logits and greedy tokens, alone and in batches that come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.kernels.library import library
from adapterhub_lite.runtime import decoder as decoders
from adapterhub_lite.runtime.changes import LaneChanges, NativeChanges, changes_of
from adapterhub_lite.runtime.decoder import decoder_of
from adapterhub_lite.runtime.prefill import prefill
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.window import Window, WindowShape
from adapterhub_lite.store import Store
from tests import tiny
from tests.runtime import build

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [90, 91, 92], [200, 201, 7, 7, 7]]


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """A random model whose heads are 16 wide, so that native steps apply."""
    config_class, model_class = CLASSES[family]
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    model = model_class(config_class(**{**sizes, **ids, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            parameter.data.normal_(0, 0.12)
    model.save_pretrained(folder)
    tiny.tokenizer("causal").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """(family, quantize) -> a base, loaded once."""
    made: dict[tuple[str, str], Base] = {}

    def base(family: str = "llama", quantize: str = "none") -> Base:
        if (family, quantize) not in made:
            folder = checkpoint(tmp_path_factory.mktemp(family), family)
            made[family, quantize] = load_base(str(folder), quantize, device="cpu")
        return made[family, quantize]

    return base


def greedy(base: Base, prompt: list[int], count: int) -> list[int]:
    """What transformers generates, without an end token."""
    ids = torch.tensor([prompt])
    made = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
        eos_token_id=None,
    )
    return made[0, len(prompt) :].tolist()


def decoded(base: Base, prompts: list[list[int]], count: int, changes: Any = None) -> list[list[int]]:
    """Greedy tokens of our forward, in one batch."""
    decoder = decoder_of(base)
    assert decoder is not None
    plan = decoders.BatchPlan((None,) * len(prompts), (), None, base.device)
    with torch.inference_mode():
        logits, window, positions = prefill(decoder, prompts, plan)
        rows = [[int(t)] for t in logits.argmax(-1)]
        for _ in range(count - 1):
            window.extend()
            tokens = torch.tensor([row[-1] for row in rows])
            logits = decoder.step(tokens, positions, window, changes_of(base, plan))
            positions = positions + 1
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
    return rows


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_greedy_tokens_are_the_models_own(wide_base: Callable[..., Base], family: str, quantize: str) -> None:
    base = wide_base(family, quantize)
    expected = [greedy(base, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) > 1
    assert decoded(base, PROMPTS, 12) == expected


@pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")
def test_in_float32_all_families_run_natively(wide_base: Callable[..., Base]) -> None:
    found = {family: decoder_of(wide_base(family)) for family in CLASSES}
    assert {family: decoder.native is not None for family, decoder in found.items() if decoder} == {
        "llama": True, "mistral": True, "qwen2": True, "qwen3": True,
    }  # fmt: skip
    assert all(site.packed is not None for site in (found["llama"].layers[0].qkv, found["llama"].lm_head))


def test_a_native_step_is_the_torch_step(wide_base: Callable[..., Base]) -> None:
    """Also for rows of unlike lengths, whose window has columns that are not theirs."""
    base = wide_base()
    decoder = decoder_of(base)
    assert decoder is not None
    plan = decoders.BatchPlan((None,) * len(PROMPTS), (), None, base.device)
    found = []
    with torch.inference_mode():
        for native in (decoder.native, None):
            _, window, positions = prefill(decoder, PROMPTS, plan)
            window.extend()
            kept, decoder.native = decoder.native, native
            found.append(decoder.step(torch.tensor([3, 4, 5, 6]), positions, window, changes_of(base, plan)))
            decoder.native = kept
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_forward_that_differs_is_not_used(tmp_path: Path) -> None:
    base = load_base(str(checkpoint(tmp_path, "llama")), device="cpu")
    # Something in the model that our forward does not know of.
    base.model.lm_head.register_forward_hook(lambda module, args, out: out * 1.01)
    assert decoder_of(base) is None
    prompt = [5, 6, 7]
    expected = greedy(base, prompt, 6)
    assert 2 not in expected
    found = Runtime(base, Store()).generate_ids([prompt], None, 6)[0]
    assert found == base.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("changes", [{"sliding_window": 8}, {"hidden_act": "gelu"}])
def test_other_shapes_of_model_are_right_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    family = "mistral" if "sliding_window" in changes else "llama"
    base = load_base(str(checkpoint(tmp_path, family, **changes)), device="cpu")
    prompt = list(range(20, 40))
    assert (decoder_of(base) is None) == (family == "mistral")
    text = Runtime(base, Store()).generate_ids([prompt], None, 10)[0]
    expected = greedy(base, prompt, 10)
    expected = expected[: expected.index(2)] if 2 in expected else expected
    assert text == base.tokenizer.decode(expected, skip_special_tokens=True)


def test_angles_that_follow_the_longest_row_are_left_to_the_model(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = load_base(str(checkpoint(tmp_path, "llama", rope_parameters=rope)), device="cpu")
    assert decoder_of(base) is None


def test_the_base_is_what_it_was(wide_base: Callable[..., Base], tmp_path: Path) -> None:
    base = load_base(str(checkpoint(tmp_path, "llama")), device="cpu")
    before = base.live_digest()
    assert decoder_of(base) is not None
    assert base.live_digest() == before
    weights = [module.weight for module in (base.model.model.layers[0].self_attn.q_proj,)]
    assert all(weight.is_contiguous() and not weight.requires_grad for weight in weights)


ROWS = st.lists(st.integers(0, 6), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, seed=st.integers(0, 99))
def test_a_row_of_any_mix_is_its_solo_run(wide_base: Callable[..., Base], rows: list[int], seed: int) -> None:
    """0: no adapter; 1-4: LoRA of rank 1, 3, 16, 40; 5: DoRA; 6: a prefix. Rows that end leave, the others go on."""
    base = wide_base()
    runtime = Runtime(base, Store())
    refs: list[Any] = [None]
    refs += [runtime.attach(build.lora(base, 10 + rank, rank)) for rank in (1, 3, 16, 40)]
    refs += [runtime.attach(build.lora(base, 7, 4, dora=True)), runtime.attach(build.prefix(base, 8))]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (len(rows),), generator=generator).tolist()
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    chosen = [refs[row] for row in rows]
    mixed = runtime.generate_ids(prompts, chosen, 8)
    alone = [runtime.generate_ids([prompt], [ref], 8)[0] for prompt, ref in zip(prompts, chosen, strict=True)]
    runtime.close()
    assert mixed == alone


@pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")
@pytest.mark.parametrize("tokens", [1, 5])
def test_native_changes_are_the_lanes(wide_base: Callable[..., Base], tokens: int) -> None:
    base = wide_base()
    runtime = Runtime(base, Store())
    refs = [runtime.attach(build.lora(base, rank, rank)) for rank in (1, 3, 16, 40)]
    order = [refs[2], None, refs[0], refs[0], refs[0], refs[0], refs[0], refs[3], refs[1], None]
    decoder = decoder_of(base)
    assert decoder is not None
    with runtime._engine.plan(order) as plan:
        assert isinstance(changes_of(base, plan), NativeChanges)
        for site in (decoder.layers[0].qkv, decoder.layers[1].down):
            x = torch.randn((len(order), tokens, site.packed.n_in), generator=torch.Generator().manual_seed(1))
            outs = [torch.zeros((len(order), tokens, site.packed.n_out)) for _ in range(2)]
            for changes, out in zip((NativeChanges(plan), LaneChanges(plan)), outs, strict=True):
                changes.apply(site.modules, x, out, [None] * len(site.modules))
            torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
            assert outs[0][1].abs().sum() == 0
            assert outs[0][0].abs().sum() > 0
    runtime.close()


class Rows:
    """A window beside lists of what each row was given, one number a column."""

    def __init__(self) -> None:
        self.shape = WindowShape(2, 1, 1)
        self.window = Window(self.shape, 0, 1, torch.device("cpu"), torch.float32)
        self.content: list[list[float]] = []
        self.next = 1.0

    def enter(self, lengths: list[int]) -> None:
        longest = max(lengths)
        other = Window(self.shape, len(lengths), longest, torch.device("cpu"), torch.float32)
        other.end = longest
        for row, length in enumerate(lengths):
            values = torch.arange(self.next, self.next + length)
            self.next += length
            for tensor in (other.keys, other.values):
                tensor[:, row, 0, longest - length : longest, 0] = values
            other.filled[row, longest - length : longest] = True
            self.content.append(values.tolist())
        self.window.join(other)

    def step(self) -> None:
        self.window.extend()
        for row in range(len(self.content)):
            self.window.keys[:, row, 0, self.window.end - 1, 0] = self.next
            self.window.values[:, row, 0, self.window.end - 1, 0] = self.next
            self.content[row].append(self.next)
            self.next += 1

    def check(self) -> None:
        mask = self.window.mask()
        assert self.window.rows == len(self.content)
        for row, content in enumerate(self.content):
            own = self.window.filled[row, : self.window.end]
            assert mask is None or torch.equal(mask[row], own)
            assert mask is not None or bool(own.all())
            for tensor in (self.window.keys, self.window.values):
                for layer in range(2):
                    assert tensor[layer, row, 0, : self.window.end, 0][own].tolist() == content
            assert not self.window.filled[row, self.window.end :].any()
        assert torch.isfinite(self.window.keys).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_window_keeps_every_rows_content_in_order(data: st.DataObject) -> None:
    rows = Rows()
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["enter", "step", "many", "leave"]))
        if action == "enter" or not rows.content:
            rows.enter(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
        elif action == "leave":
            keep = data.draw(st.lists(st.integers(0, len(rows.content) - 1), min_size=1, unique=True))
            rows.window.select(keep)
            rows.content = [rows.content[i] for i in keep]
        else:
            for _ in range(1 if action == "step" else 70):
                rows.step()
        rows.check()
