"""The forward of our own for encoders: what the model itself and PEFT give, for any mix of adapters and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.fit import Fitted
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import CapacityError, Unsupported
from adapterhub_lite.runtime.batch import BatchPlan, Composer
from adapterhub_lite.runtime.encoder import Encoder, encoder_of
from adapterhub_lite.runtime.forward import class_logits, model_logits
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.side_by_side import lay_out
from adapterhub_lite.runtime.sites import SiteHooks
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build

CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
CLASSES |= {"electra": "Electra"}
_DISTILBERT = {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = (
    "rank1",
    "rank5",
    "rank64",
    "dora",
    "ia3",
    "scaled",
    "prefix2",
    "prefix5",
    "prompt",
    "none",
    "tags",
    "more tags",
)
SOME = ((2, 2), (16, 3), (7, 5))  # rank and labels
ROW = [5, 6, 7, 8, 2]


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """A random model whose biases are not zero, as those of a new one are."""
    config_class = getattr(transformers, f"{CLASSES[family]}Config")
    model_class = getattr(transformers, f"{CLASSES[family]}ForSequenceClassification")
    sizes: dict[str, Any] = dict(_DISTILBERT if family == "distilbert" else _SIZES)
    sizes |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64}
    sizes |= {"embedding_size": 24} if family == "electra" else {}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    model = model_class(config_class(**{**sizes, **ids, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    tiny.tokenizer("encoder").save_pretrained(folder)
    return folder


def assert_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], relative: float = 1e-5) -> None:
    """Equal to a share of the batch's largest logit; what is summed is of the order of 1, whatever comes of it."""
    scale = max(1.0, *(float(one.abs().max()) for one in expected if one.numel()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative * scale)


def mild(adapter: Adapter, rank: int) -> Adapter:
    """The same with a change of the same size for every rank: a large one makes rounding large, too."""
    tensors = {k: t * rank**-0.5 if "lora_B" in k else t for k, t in adapter.tensors.items()}
    return replace(adapter, tensors=tensors)


class Zoo:
    """A base, and adapters of every kind fitted to it."""

    def __init__(self, folder: Path, family: str, quantize: str = "none", dtype: str = "auto") -> None:
        self.base = load_base(str(checkpoint(folder, family)), quantize, device="cpu", dtype=dtype)
        self.runtime = Runtime(self.base, Store(), slots=16)
        self.hooks = SiteHooks()
        self.hooks.cover(module for module in self.base.model.modules() if isinstance(module, nn.Linear))
        base = self.base
        made = {f"rank{n}": mild(build.lora(base, n, n, labels=1 + n % 7), n) for n in (1, 5, 64)}
        made |= {"dora": build.lora(base, 9, 3, dora=True, labels=6), "prompt": build.prompt(base, 11, 3)}
        made |= {
            "ia3": build.ia3(base, 12, labels=2),
            "scaled": build.ia3(base, 13, ("output.dense", "query", "q_lin")),
        }
        if family != "distilbert":  # which has no place for keys and values that come before a text
            made |= {f"prefix{n}": build.prefix(base, n, n, labels=n) for n in (2, 5)}
        self.fitted: dict[str, Fitted | None] = {"none": None}
        for kind, adapter in made.items():
            self.fitted[kind] = self.runtime.fitted(self.runtime.attach(adapter))
        self.fitted |= {"tags": self.tagger("rank5", 5), "more tags": self.tagger("prompt", 2)}

    def tagger(self, kind: str, labels: int) -> Fitted:
        """The same change of the base with a head that labels tokens."""
        some = self.fitted[kind]
        assert some is not None
        generator = torch.Generator().manual_seed(labels)
        head = nn.Linear(int(self.base.config.hidden_size), labels, dtype=self.base.dtype)
        head.weight.data.normal_(0, 0.3, generator=generator)
        return replace(some, task_type="TOKEN_CLS", head=head, digest=f"{some.digest} tags")

    def plan(self, kinds: list[str]) -> BatchPlan:
        return Composer().compose([self.fitted[kind] for kind in kinds], self.base.device)

    def both(self, kinds: list[str], rows: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What our forward gives, and the model's own."""
        plan, encoder = self.plan(kinds), encoder_of(self.base)
        assert encoder is not None
        assert encoder.knows(plan, rows)
        with torch.inference_mode():
            return encoder(plan, rows), model_logits(self.base, self.hooks, plan, rows)

    def close(self) -> None:
        self.hooks.remove()
        self.runtime.close()


def known(family: str) -> list[str]:
    """The kinds whose rows go through our forward: not an input of q that k and v do not see scaled."""
    return [kind for kind in KINDS if kind != "scaled" and not (family == "distilbert" and "prefix" in kind)]


def drawn(data: st.DataObject, kinds: list[str]) -> tuple[list[str], list[list[int]]]:
    chosen = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=12))
    chosen += [] if any(kind != "none" for kind in chosen) else ["rank5"]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    lengths = [data.draw(st.integers(1, 20)) for _ in chosen]
    return chosen, [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


ANY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@pytest.mark.parametrize("family", CLASSES)
@ANY
@given(data=st.data())
def test_any_mix_gives_what_the_models_own_forward_gives(zoo: Any, family: str, data: st.DataObject) -> None:
    kinds, rows = drawn(data, known(family))
    ours, models = zoo(family).both(kinds, rows)
    for kind, row, one in zip(kinds, rows, ours, strict=True):
        assert one.dim() == (2 if "tags" in kind else 1)
        assert one.shape[0] == (len(row) if "tags" in kind else 0 if kind == "none" else one.shape[0])
    assert_equal(ours, models)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@ANY
@given(data=st.data())
def test_a_rows_result_does_not_depend_on_its_place_or_its_neighbours(
    zoo: Any, family: str, data: st.DataObject
) -> None:
    kinds, rows = drawn(data, [kind for kind in known(family) if kind != "none"])
    order = data.draw(st.permutations(range(len(rows))))
    base, plan, hooks = zoo(family).base, zoo(family).plan, zoo(family).hooks
    there = class_logits(base, hooks, plan(kinds), rows)
    moved = class_logits(base, hooks, plan([kinds[i] for i in order]), [rows[i] for i in order])
    assert_equal(moved, [there[i] for i in order])
    assert_equal(class_logits(base, hooks, plan(kinds[:1]), rows[:1]), there[:1])


@pytest.mark.parametrize("family", CLASSES)
def test_rows_of_one_token_and_of_all_positions(zoo: Any, family: str) -> None:
    kinds = [kind for kind in known(family) if kind != "none"]
    limit = 64 - 5 - 1  # positions but for virtual tokens, and for what RoBERTa counts from
    for rows in ([[7]] * len(kinds), [[5 + i % 200 for i in range(limit)], *[[7]] * (len(kinds) - 1)]):
        assert_equal(*zoo(family).both(kinds, rows))


@pytest.mark.parametrize("family", CLASSES)
def test_all_kinds_differ(zoo: Any, family: str) -> None:
    """Else the tests above would prove nothing."""
    kinds = [kind for kind in known(family) if kind != "none"]
    found, _ = zoo(family).both(kinds, [ROW] * len(kinds))
    for i, one in enumerate(found):
        assert all(abs(float(one.flatten()[0] - other.flatten()[0])) > 1e-3 for other in found[:i]), kinds[i]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base(zoo: Any, quantize: str) -> None:
    kinds = ["rank5", "dora", "tags", "prefix2", "ia3", "rank5"]
    assert_equal(*zoo("bert", quantize).both(kinds, [ROW, [9], ROW[1:], ROW, ROW, ROW * 2]), 1e-4)


def test_a_base_in_bfloat16_is_as_near_to_float32_as_the_model_is(zoo: Any) -> None:
    kinds, rows = ["rank5", "dora", "tags", "prefix2", "rank5"], [ROW, [9], ROW[1:], ROW, ROW * 2]
    ours, models = zoo("bert", "none", "bfloat16").both(kinds, rows)
    exact, _ = zoo("bert").both(kinds, rows)
    for one, own, wanted in zip(ours, models, exact, strict=True):
        scale = float(wanted.abs().max())
        assert float((one.float() - wanted).abs().max()) < 2 * float((own.float() - wanted).abs().max()) + 0.02 * scale


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])  # PEFT makes a head of DistilBERT's pre_classifier
def test_one_batch_gives_what_peft_gives_row_by_row(tmp_path: Path, family: str) -> None:
    folder = checkpoint(tmp_path / "base", family)
    base = load_base(str(folder), device="cpu")
    runtime = Runtime(base, Store())
    adapters = [build.lora(base, rank, rank, labels=labels) for rank, labels in SOME]
    refs = [runtime.attach(adapter) for adapter in adapters]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in (1, 30, 8, 8, 2, 17, 9, 30)]
    owners = [2, 0, 1, 0, 2, 1, 1, 0]
    found = runtime.logits(rows, [refs[i] for i in owners])
    assert encoder_of(base) is not None
    for i, (adapter, labels) in enumerate(zip(adapters, [labels for _, labels in SOME], strict=True)):
        (tmp_path / str(i)).mkdir()
        for name, data in adapter.files().items():
            (tmp_path / str(i) / name).write_bytes(data)
        theirs = peft.PeftModel.from_pretrained(peers.plain(folder, "SEQ_CLS", labels), tmp_path / str(i)).eval()
        mine = [k for k, owner in enumerate(owners) if owner == i]
        expected = peers.logits(theirs, [rows[k] for k in mine], [[]] * len(mine))
        assert_equal([found[k] for k in mine], expected)
    runtime.close()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of our forward got."""
    calls: list[int] = []
    own = Encoder.__call__

    def call(self: Encoder, plan: BatchPlan, rows: Any) -> list[torch.Tensor]:
        calls.append(len(rows))
        return own(self, plan, rows)

    monkeypatch.setattr(Encoder, "__call__", call)
    return calls


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_what_our_forward_does_not_know_goes_through_the_model(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    one = zoo(family)
    assert encoder_of(one.base) is not None
    calls = spied(monkeypatch)
    for kinds in (["scaled", "rank5"], ["rank5", "rank1"]):
        plan = one.plan(kinds)
        found = class_logits(one.base, one.hooks, plan, [ROW, ROW[1:]])
        assert_equal(found, model_logits(one.base, one.hooks, plan, [ROW, ROW[1:]]))
    assert calls == [2]


def test_an_adapters_rows_lie_together_and_those_of_one_length_attend_at_once(zoo: Any) -> None:
    one = zoo("bert")
    kinds = ["rank5", "none", "tags", "rank5", "rank5", "tags", "rank1"]
    layout = lay_out(one.plan(kinds), [ROW, ROW, ROW[:2], ROW[:3], ROW, ROW[:1], ROW], one.base.device)
    assert layout.order == [3, 0, 4, 5, 2, 6]
    assert [(run.begin, run.rows, run.length) for run in layout.runs] == [
        (0, 1, 3), (3, 2, 5), (13, 1, 1), (14, 1, 2), (16, 1, 5),
    ]  # fmt: skip
    assert [(span.begin, span.end) for span in layout.spans] == [(0, 13), (13, 16), (16, 21)]
    assert [(span.begin, span.end) for span in layout.read_spans] == [(0, 3), (3, 6), (6, 7)]
    assert layout.read is not None
    assert layout.read.tolist() == [0, 3, 8, 13, 14, 15, 16]


def test_a_layer_that_is_none_of_this_forward(zoo: Any) -> None:
    one = zoo("bert")
    some = one.fitted["rank1"]
    assert some is not None
    stranger = replace(some, sites={**some.sites, nn.Linear(64, 64): next(iter(some.sites.values()))})
    encoder = encoder_of(one.base)
    assert encoder is not None
    assert encoder.knows(one.plan(["rank1"]), [ROW])
    assert not encoder.knows(Composer().compose([stranger], one.base.device), [ROW])


def test_a_text_too_long_is_refused_as_it_was(zoo: Any) -> None:
    one = zoo("bert")
    long = [[5] * 63]
    with pytest.raises(CapacityError):
        class_logits(one.base, one.hooks, one.plan(["prefix2"]), long)
    with pytest.raises(Unsupported, match="head"):
        class_logits(one.base, one.hooks, one.plan(["none"]), [ROW])


@pytest.mark.parametrize(
    ("family", "changes", "used"),
    [
        ("bert", {"hidden_act": "relu"}, True),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}, True),
        ("electra", {"embedding_size": 64}, True),
        ("distilbert", {"activation": "relu"}, True),
        ("bert", {"is_decoder": True}, False),
    ],
)
def test_other_configurations(tmp_path: Path, family: str, changes: dict[str, Any], used: bool) -> None:
    base = load_base(str(checkpoint(tmp_path, family, **changes)), device="cpu")
    assert (encoder_of(base) is not None) == used
    check_alike(base)


def check_alike(base: Base) -> None:
    """Whichever way the rows of one adapter go, they get what the model gives."""
    runtime, hooks = Runtime(base, Store()), SiteHooks()
    fitted = runtime.fitted(runtime.attach(build.lora(base, 2, 3)))
    plan, rows = Composer().compose([fitted] * 3, base.device), [ROW, ROW[:1], ROW * 3]
    hooks.cover(fitted.sites)
    assert_equal(class_logits(base, hooks, plan, rows), model_logits(base, hooks, plan, rows))
    hooks.remove()
    runtime.close()


def odd_activation(base: Base) -> None:
    base.model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda module, args, out: out.clamp(max=0.5))


def odd_attention(base: Base) -> None:
    base.model.bert.encoder.layer[0].attention.self.register_forward_hook(lambda m, a, out: (out[0] * 1.01, *out[1:]))


def odd_pooler(base: Base) -> None:
    base.model.bert.pooler.register_forward_hook(lambda module, args, out: out + 0.01)


def odd_last_layer(base: Base) -> None:
    base.model.bert.encoder.layer[-1].register_forward_hook(lambda module, args, out: out * 1.01)


@pytest.mark.parametrize("odd", [odd_activation, odd_attention, odd_pooler, odd_last_layer])
def test_a_forward_that_differs_is_not_used(tmp_path: Path, odd: Any) -> None:
    """Something in the model that our forward does not know of."""
    base = load_base(str(checkpoint(tmp_path, "bert")), device="cpu")
    odd(base)
    assert encoder_of(base) is None
    check_alike(base)


@pytest.mark.parametrize("family", CLASSES)
def test_the_base_is_what_it_was(tmp_path: Path, family: str) -> None:
    base = load_base(str(checkpoint(tmp_path, family)), device="cpu")
    before, state = base.live_digest(), {k: v.clone() for k, v in base.model.state_dict().items()}
    random = torch.get_rng_state()
    assert encoder_of(base) is not None
    assert encoder_of(base) is encoder_of(base)
    assert torch.equal(torch.get_rng_state(), random)
    assert base.live_digest() == before
    assert all(torch.equal(v, state[k]) for k, v in base.model.state_dict().items())
    assert base.view("SEQ_CLS").head is not None
    assert not base.view("SEQ_CLS").head._heads


def test_taggers_of_a_causal_base_read_its_last_hidden_states(tmp_path: Path) -> None:
    base = load_base(str(tiny.save("llama", tmp_path)), device="cpu")
    head = nn.Linear(32, 4)
    fitted = Fitted("tags", "tags", "TOKEN_CLS", {}, None, head, 0)
    plan = Composer().compose([fitted, fitted], base.device)
    rows = [ROW, ROW[:2]]
    found = class_logits(base, SiteHooks(), plan, rows)
    for row, one in zip(rows, found, strict=True):
        with torch.inference_mode():
            expected = head(base.model.model(torch.tensor([row])).last_hidden_state[0])
        assert_equal([one], [expected])
