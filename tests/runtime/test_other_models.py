"""Models of other families than the runtime knows: what it writes is what transformers' and PEFT's `generate` write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.events import Event, Step
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.runtime.labelling import score_words
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import Sampling
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.classify import Classify
from adapterhub_lite.training.train import train_adapter
from tests import tiny
from tests.runtime import build
from tests.runtime.test_decoder import checkpoint
from tests.runtime.test_kinds import our_tokens
from tests.training.build import EXAMPLES

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [40, 41], [90, 91, 92, 100, 101, 120, 60, 61], [200, 201, 7, 7]]
NEW = 10
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
BART: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 256, "decoder_start_token_id": 2}
BART |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in [("layers", 2), ("attention_heads", 4)]}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
# Family -> its classes, sizes, and whether rows of it are decoded in one batch.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "mamba": (hf.MambaConfig, hf.MambaForCausalLM, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, False),
    "mamba2": (
        hf.Mamba2Config,
        hf.Mamba2ForCausalLM,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        False,
    ),
    "recurrent_gemma": (
        hf.RecurrentGemmaConfig,
        hf.RecurrentGemmaForCausalLM,
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "lru_width": 32,
            "attention_window_size": 16,
        },
        False,
    ),
    "rwkv": (
        hf.RwkvConfig,
        hf.RwkvForCausalLM,
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        False,
    ),
    "lfm2": (hf.Lfm2Config, hf.Lfm2ForCausalLM, {**LLAMA, "layer_types": ["conv", "full_attention"]}, False),
    "jamba": (
        hf.JambaConfig,
        hf.JambaForCausalLM,
        {
            **LLAMA,
            "use_mamba_kernels": False,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
        },
        False,
    ),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {**SIZES, "intermediate_size": 64}, True),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {**LLAMA, "num_local_experts": 4}, True),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**LLAMA, "head_dim": 8, "sliding_window": 6}, True),
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration, BART, True),
}


def saved(folder: Path, config_class: Any, model_class: Any, sizes: dict[str, Any], **settings: Any) -> Any:
    """A random model in `folder`, whose generation settings are `settings`; the plain model that is read back."""
    torch.manual_seed(1)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
    model = model_class(config_class(**{"vocab_size": tiny.VOCABULARY, **ids, **sizes}))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data.normal_(0, 0.4)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tiny.tokenizer("seq2seq" if model.config.is_encoder_decoder else "causal").save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def theirs(model: Any, base: Base) -> list[list[int]]:
    """What `generate` writes for each row alone, up to the end token."""
    start = base.config.decoder_start_token_id if base.kind == "seq2seq" else None
    found = []
    for row in ROWS:
        ids = torch.tensor([row])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            arguments = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)[0].tolist()
        written = out[1:] if start is not None else out[len(row) :]
        found.append(written[: written.index(2)] if 2 in written else written)
    return found


@pytest.mark.parametrize("family", MODELS)
def test_any_model_writes_what_generate_writes(tmp_path: Path, family: str) -> None:
    config_class, model_class, sizes, together = MODELS[family]
    model = saved(tmp_path, config_class, model_class, sizes)
    base = load_base(str(tmp_path), device="cpu")
    runtime, before = Runtime(base, Store()), base.live_digest()
    expected = theirs(model, base)
    assert len({token for row in expected for token in row}) > 3, "the reference says too little"
    assert our_tokens(runtime, ROWS, [None] * len(ROWS), NEW) == expected
    assert [our_tokens(runtime, [row], [None], NEW)[0] for row in ROWS] == expected
    assert base.derived["batches"] is together
    assert base.live_digest() == before
    runtime.close()


@pytest.mark.parametrize("family", ["mamba", "rwkv", "lfm2", "gpt_neox", "opt", "mixtral", "bart"])
def test_rows_with_adapters_write_what_peft_writes(tmp_path: Path, family: str) -> None:
    model = saved(tmp_path / "base", *MODELS[family][:3])
    base = load_base(str(tmp_path / "base"), device="cpu")
    runtime = Runtime(base, Store())
    adapter = build.ia3(base, 1)
    (tmp_path / "ia3").mkdir()
    for name, data in adapter.files().items():
        (tmp_path / "ia3" / name).write_bytes(data)
    ref = runtime.attach(adapter)
    plain = theirs(model, base)
    expected = theirs(peft.PeftModel.from_pretrained(model, tmp_path / "ia3").eval(), base)
    assert expected != plain
    assert our_tokens(runtime, ROWS, [ref] * 4, NEW) == expected
    assert base.derived["batches"] is MODELS[family][3]
    assert our_tokens(runtime, ROWS, [ref, None, None, ref], NEW) == [expected[0], plain[1], plain[2], expected[3]]
    runtime.close()


QWEN = (
    hf.Qwen2MoeConfig,
    hf.Qwen2MoeForCausalLM,
    {**LLAMA, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4},
    True,
)


@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "gpt_neox", "mixtral"])
def test_logits_of_rows_of_unlike_adapters_are_those_of_peft(tmp_path: Path, family: str) -> None:
    """Also where layers see the tokens of all rows as one list; so does what is scored by label words."""
    model = saved(tmp_path / "base", *{**MODELS, "qwen2_moe": QWEN}[family][:3])
    base = load_base(str(tmp_path / "base"), device="cpu")
    runtime, before = Runtime(base, Store()), base.live_digest()
    adapters = {"ia3": build.ia3(base, 1), "lora": build.lora(base, 2), "dora": build.lora(base, 3, dora=True)}
    refs: dict[str, Any] = {name: runtime.attach(adapter) for name, adapter in adapters.items()}
    models: dict[str, Any] = {"none": model}
    for name, adapter in adapters.items():
        (tmp_path / name).mkdir()
        for file, data in adapter.files().items():
            (tmp_path / name / file).write_bytes(data)
        plain = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
        models[name] = peft.PeftModel.from_pretrained(plain, tmp_path / name).eval()
    chosen = ["lora", "ia3", "none", "dora", "lora", "none"]
    rows = [*ROWS, ROWS[0][:7], ROWS[2][:3]]
    found = runtime.logits(rows, [refs.get(name) for name in chosen])
    expected = []
    for name, row in zip(chosen, rows, strict=True):
        with torch.no_grad():
            expected.append(models[name](input_ids=torch.tensor([row])).logits[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    assert float((found[0] - runtime.logits([rows[0]], None)[0]).abs().max()) > 1e-2
    task = Classify({"type": "classify", "text": "text", "label": "label", "labels": ["no", "yes"]})
    engine, some = runtime._engine, [refs["lora"], None, refs["ia3"]]
    scores = score_words(engine, ["a", "bc", "d"], some, [task] * 3)
    for text, ref, score in zip(["a", "bc", "d"], some, scores, strict=True):
        (alone,) = score_words(engine, [text], [ref], [task])
        assert alone.scores == pytest.approx(score.scores, abs=1e-5)
    assert base.live_digest() == before
    runtime.close()


def test_rows_read_alone_are_sampled_stopped_and_come_and_go(tmp_path: Path) -> None:
    saved(tmp_path, *MODELS["mamba"][:3])
    runtime = Runtime(load_base(str(tmp_path), device="cpu"), Store(), batch_size=2)
    how = [Sampling(temperature=1.0, seed=seed) for seed in range(4)]
    most = [3, 9, 1, 6]
    mixed = runtime.generate_ids(ROWS, None, most, sampling=how)
    alone = [
        runtime.generate_ids([row], None, n, sampling=[one])[0] for row, n, one in zip(ROWS, most, how, strict=True)
    ]
    assert mixed == alone
    assert mixed != runtime.generate_ids(ROWS, None, most)
    runtime.close()


@pytest.mark.parametrize("make", [build.prefix, build.prompt])
def test_nothing_stands_before_a_text_that_is_seen_through_a_window(tmp_path: Path, make: Any) -> None:
    base = load_base(str(checkpoint(tmp_path / "narrow", "mistral", sliding_window=8)), device="cpu")
    runtime = Runtime(base, Store())
    with pytest.raises(Unsupported, match="attention window of 8 tokens"):
        runtime.attach(make(base, 1))
    runtime.attach(build.lora(base, 1))
    runtime.close()
    for window in (256, 0):  # as long as its positions; 0 is none, in some configurations
        wide = load_base(str(checkpoint(tmp_path / str(window), "mistral", sliding_window=256)), device="cpu")
        wide.config.sliding_window = window
        runtime = Runtime(wide, Store())
        runtime.attach(make(wide, 1))
        runtime.close()


@pytest.mark.parametrize(("family", "what"), [("mistral", "attention window of 8"), ("rwkv", "no keys and values")])
def test_a_prefix_that_could_not_be_served_is_not_trained(tmp_path: Path, family: str, what: str) -> None:
    """Refused before the first step, by what refuses it when it is served."""
    if family == "mistral":
        checkpoint(tmp_path / "base", "mistral", sliding_window=8)
    else:
        saved(tmp_path / "base", *MODELS["rwkv"][:3])
    base = load_base(str(tmp_path / "base"), device="cpu")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n' * 8)
    recipe = {
        "name": "front",
        "base": str(tmp_path / "base"),
        "task": {"type": "instruct", "prompt": "text", "completion": "label"},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "adapter": {"type": "prefix", "tokens": 3},
    }
    (tmp_path / "front.yaml").write_text(json.dumps(recipe))
    heard: list[Event] = []
    with pytest.raises(Unsupported, match=rf"{what}.*could not be served.*adapter.type: lora"):
        train_adapter(load_recipe(tmp_path / "front.yaml"), base, EXAMPLES["causal"], on_event=heard.append)
    assert not any(isinstance(event, Step) for event in heard)


def test_nothing_stands_before_a_text_without_keys(tmp_path: Path) -> None:
    saved(tmp_path / "rwkv", *MODELS["rwkv"][:3])
    base = load_base(str(tmp_path / "rwkv"), device="cpu")
    runtime = Runtime(base, Store())
    with pytest.raises(Unsupported, match="no keys and values"):
        runtime.attach(build.prompt(base, 1))
    runtime.close()
    saved(tmp_path / "jamba", *MODELS["jamba"][:3])
    base = load_base(str(tmp_path / "jamba"), device="cpu")
    runtime = Runtime(base, Store())
    with pytest.raises(Unsupported, match=r"attention kinds|more than keys"):
        runtime.generate_ids([ROWS[0]], runtime.attach(build.prefix(base, 1)), 4)
    runtime.close()


ASKED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.8},
    "ngrams": {"no_repeat_ngram_size": 1},
    "suppressed": {"suppress_tokens": list(range(40, 200)), "begin_suppress_tokens": list(range(200, 240))},
    "forced": {"forced_eos_token_id": 2, "forced_bos_token_id": 77},
    "length": {"min_new_tokens": 8, "bad_words_ids": [[token] for token in range(40, 200)]},
    "encoder": {"encoder_repetition_penalty": 1000.0},
}


OF_ALL = ("repetition", "ngrams", "suppressed", "length")


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        *((family, one) for family in ("llama", "gpt_neox", "mamba") for one in OF_ALL),
        *(("bart", one) for one in ASKED),
    ],
)
def test_generation_settings_of_a_base_are_heeded(tmp_path: Path, family: str, asked: str) -> None:
    known = {**MODELS, "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, LLAMA)}
    model = saved(tmp_path, *known[family][:3], **ASKED[asked])
    base = load_base(str(tmp_path), device="cpu")
    runtime = Runtime(base, Store(), batch_size=3)
    expected = theirs(model, base)
    assert our_tokens(runtime, ROWS, [None] * len(ROWS), NEW) == expected
    for name in ASKED[asked]:
        setattr(base.model.generation_config, name, None)
    changed = our_tokens(runtime, ROWS, [None] * len(ROWS), NEW)
    assert changed != expected, "the settings change nothing here"
    runtime.close()


def test_a_rows_own_penalty_comes_before_that_of_the_base(tmp_path: Path) -> None:
    saved(tmp_path, hf.LlamaConfig, hf.LlamaForCausalLM, LLAMA, repetition_penalty=1.3)
    base = load_base(str(tmp_path), device="cpu")
    runtime, own = Runtime(base, Store()), Sampling(repetition_penalty=3.0)
    most = [2, NEW, NEW, 4]  # the first row leaves before the others
    mixed = runtime.generate_ids([ROWS[3]] * 4, None, most, sampling=[None, own, None, own])
    base.model.generation_config.repetition_penalty = None
    same = Sampling(repetition_penalty=1.3)
    for text, n, one in zip(mixed, most, [same, own, same, own], strict=True):
        assert runtime.generate_ids([ROWS[3]], None, n, sampling=[one])[0] == text
    runtime.close()
