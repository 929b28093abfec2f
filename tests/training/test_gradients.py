"""Gradients of our training equal those of plain PEFT from the same tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training import losses
from adapterhub_lite.training.modules.computation import ModuleComputation
from tests import peers, tiny
from tests.training.build import EXAMPLES, Twin, assert_gradients_equal, peft_gradients, precision

KINDS = ("lora", "patterns", "rslora", "dora", "prefix", "projection")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_in_single_precision(tiny_base, family: str, kind: str):
    base = tiny_base(family)
    task = peers.task_type(family)
    wrapped = peers.wrap(peers.plain(base.source.folder, task), peers.config(family, kind, task))
    twin = Twin(base, wrapped)
    examples = EXAMPLES[base.kind]
    loss, ours = twin.gradients(examples)
    expected, theirs = peft_gradients(wrapped, twin, examples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_equal(ours, theirs, relative=2e-5)
    if base.kind == "encoder":
        assert [n for n, _ in ours if n.startswith("head")], "the head is trained too"


# Llama and T5 normalise in float32 whatever the model's precision, so that only these two can be compared so closely.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_equal_in_double_precision(tiny_folder, monkeypatch: pytest.MonkeyPatch, family: str, kind: str):
    with precision(monkeypatch):
        base = load_base(str(tiny_folder(family)), device="cpu", dtype="float64")
        task = peers.task_type(family)
        model = peers.plain(base.source.folder, task).double()
        wrapped = peers.wrap(model, peers.config(family, kind, task)).double()
        twin = Twin(base, wrapped)
        examples = EXAMPLES[base.kind]
        loss, ours = twin.gradients(examples)
        expected, theirs = peft_gradients(wrapped, twin, examples)
        assert theirs[0].dtype == torch.float64
        assert loss == pytest.approx(expected, rel=1e-12)
        assert_gradients_equal(ours, theirs, relative=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_equal_where_all_rows_begin_alike(tiny_base, family: str, kind: str):
    """As prompts of one template do; what all rows share may be computed once, and must not be felt."""
    base = tiny_base(family)
    same = [60 + i % 37 for i in range(80)]
    ends = [([5, 6], [7, 8, 2]), ([9], [10, 2]), ([], [11, 12, 13, 2]), ([5, 6, 7], [2])]
    examples = [Example([*same, *q, *a], [IGNORED] * (80 + len(q)) + a) for q, a in ends]
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config(family, kind, "CAUSAL_LM"))
    twin = Twin(base, wrapped)
    for some in (examples, examples[:2], examples[1:], [examples[0]] * 3):
        loss, ours = twin.gradients(some)
        expected, theirs = peft_gradients(wrapped, twin, some)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_gradients_equal(ours, theirs, relative=5e-5)


def test_the_frozen_weights_get_no_gradient(tiny_base):
    base = tiny_base("llama")
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
    Twin(base, wrapped).gradients(EXAMPLES["causal"])
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("tokens", [1, losses.CHUNK - 1, losses.CHUNK, losses.CHUNK + 1, 3 * losses.CHUNK + 17])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_in_chunks_is_the_whole_cross_entropy(tokens: int, biased: bool):
    torch.manual_seed(tokens)
    weight = torch.randn(97, 24, dtype=torch.float64)
    bias = torch.randn(97, dtype=torch.float64) if biased else None
    targets = torch.randint(97, (tokens,))
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    ours = losses.frozen_head_cross_entropy(hidden, weight, bias, targets)
    (3 * ours).backward()
    again = hidden.detach().clone().requires_grad_()
    whole = F.cross_entropy(F.linear(again, weight, bias), targets, reduction="sum")
    (3 * whole).backward()
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda h: losses.frozen_head_cross_entropy(h, weight, bias, targets[:3]), hidden.detach()[:3].requires_grad_()
    )


def test_a_long_row_goes_through_several_chunks(tiny_base):
    base = tiny_base("llama")
    long = [5 + i % 200 for i in range(losses.CHUNK + 60)]
    examples = [Example(long, list(long)), Example(long[:90], list(long[:90]))]
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
    twin = Twin(base, wrapped, ModuleComputation)
    assert twin.computation._pass._plain
    loss, ours = twin.gradients(examples)
    expected, theirs = peft_gradients(wrapped, twin, examples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_equal(ours, theirs, relative=5e-5)


def test_models_that_change_their_logits_take_the_whole_path(tiny_base, tmp_path):
    """T5 with tied embeddings scales its logits, Gemma 2 caps them: the short path would be wrong there."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device="cpu")
    config = peers.config("llama", "lora", "CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    wrapped = peers.wrap(peers.plain(tmp_path, "CAUSAL_LM"), config)
    twin = Twin(base, wrapped)
    assert not twin.computation._pass._plain
    loss, ours = twin.gradients(EXAMPLES["causal"])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["causal"])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_equal(ours, theirs, relative=2e-5)
