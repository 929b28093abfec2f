"""Embeddings are those of plain transformers and PEFT, pooled; whatever adapters and lengths share a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import NoEffect, Unsupported
from adapterhub_lite.runtime.encoder import Encoder
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build

TEXTS = ["a", "the quick brown fox jumps over it", "cold soup", "warm beer and cold soup, warm beer", "b c"]
KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules="all-linear"),
    "some": peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=7, target_modules=["query", "output.dense"]),
    "prefix": peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4),
    "other prefix": peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
}


def plain_model(folder: Path) -> Any:
    pooler = {} if AutoConfig.from_pretrained(folder).model_type == "bert" else {"add_pooling_layer": False}
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **pooler).eval()


def wrapped(folder: Path, kind: str, out: Path) -> Any:
    """The adapter of one kind with random values, in plain PEFT; its files are in `out`."""
    torch.manual_seed(len(kind))
    made = peft.get_peft_model(plain_model(folder), copy.deepcopy(KINDS[kind]))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    made.save_pretrained(out)
    return made.eval()


def theirs(model: Any, tokenizer: Any, text: str, pooling: str) -> torch.Tensor:
    """One text alone, not normalised."""
    given = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**{k: given[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0]
    return hidden[0] if pooling == "cls" else hidden.mean(0)


@pytest.mark.parametrize("ours", [True, False], ids=["our forward", "the model's own"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_row_is_its_solo_embedding_in_peft(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, ours: bool
) -> None:
    folder = tiny_folder(family)
    base = load_base(str(folder), device="cpu")
    runtime = Runtime(base, Store())
    used: list[int] = []
    run = Encoder.__call__

    def noting(self: Encoder, *given: Any) -> Any:
        used.append(1)
        return run(self, *given)

    if not ours:
        monkeypatch.setitem(base.derived, "encoder", None)
    monkeypatch.setattr(Encoder, "__call__", noting)
    models = {kind: wrapped(folder, kind, tmp_path / kind) for kind in KINDS}
    refs = {kind: runtime.attach(read_adapter(tmp_path / kind, name=kind)) for kind in KINDS}
    before, used[:] = base.live_digest(), []
    kinds = [*KINDS, None]
    plain = plain_model(folder)
    for pooling in ("mean", "cls"):
        for shift in range(len(kinds)):
            chosen = kinds[shift:] + kinds[:shift]
            expected = torch.stack(
                [
                    theirs(models[kind] if kind else plain, base.tokenizer, text, pooling)
                    for kind, text in zip(chosen, TEXTS, strict=True)
                ]
            )
            rows = [refs[kind] if kind else None for kind in chosen]
            found = runtime.embed(TEXTS, rows, pooling=pooling, normalize=False)
            assert (found.dtype, found.shape) == (torch.float32, (5, base.config.hidden_size))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            unit = runtime.embed(TEXTS, rows, pooling=pooling)
            torch.testing.assert_close(unit, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-5)
    assert bool(used) is ours
    assert base.live_digest() == before
    runtime.close()


def test_heads_are_not_asked_and_virtual_tokens_not_counted(
    tiny_base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier's LoRA embeds as it does without its head, and the mean is that of the text's own tokens."""
    base = tiny_base("bert")
    runtime = Runtime(base, Store())
    bare, prompt = runtime.embed(TEXTS, None), runtime.attach(build.prompt(base, 3))
    lora = runtime.attach(build.lora(base, 1))
    alone = [runtime.embed(text, ref)[0] for text, ref in zip(TEXTS, [lora, None, prompt, lora, None], strict=True)]
    mixed = runtime.embed(TEXTS, [lora, None, prompt, lora, None])
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert all(float((mixed[i] - bare[i]).abs().max()) > 1e-3 for i in (0, 2, 3))
    monkeypatch.setitem(base.derived, "encoder", None)
    torch.testing.assert_close(runtime.embed(TEXTS, [lora, None, prompt, lora, None]), mixed, rtol=1e-5, atol=1e-5)
    runtime.use(lora)
    assert torch.equal(runtime.embed([TEXTS[0]]), runtime.embed(TEXTS[0], lora))
    assert runtime.embed([]).shape == (0, base.config.hidden_size)
    long = "a " * 3000
    assert runtime.embed(long, prompt).isfinite().all()
    runtime.close()


def test_what_cannot_be_embedded_is_refused(tiny_base: Callable[..., Base]) -> None:
    encoder, causal = Runtime(tiny_base("bert"), Store()), Runtime(tiny_base("llama"), Store())
    with pytest.raises(Unsupported, match="no pooling 'max'"):
        encoder.embed("a", None, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="no text"):
        encoder.embed([b"a"], None)  # type: ignore[list-item]
    with pytest.raises(Unsupported, match=r"no encoder.*Load an encoder"):
        causal.embed("a", None)
    wild = build.lora(encoder.base, 1)
    huge = {k: t * 1e30 if "lora_" in k else t for k, t in wild.tensors.items()}
    with pytest.raises(NoEffect, match="not finite"):
        encoder.embed("a", encoder.attach(type(wild)(wild.spec, huge, name="huge")))
    for runtime in (encoder, causal):
        runtime.close()


def test_many_texts_are_cut_into_batches(tiny_base: Callable[..., Base]) -> None:
    base = tiny_base("bert")
    store = Store()
    small, whole = Runtime(base, store, slots=1, batch_size=2), Runtime(base, store)
    for seed, name in enumerate("ab", 1):
        build.stored(store, base, name, build.lora(base, seed))
    chosen = ["a", "b", None, "b", "a"]
    expected = whole.embed(TEXTS, chosen)
    torch.testing.assert_close(small.embed(TEXTS, chosen), expected, rtol=1e-5, atol=1e-6)
    whole.close()
    small.close()
