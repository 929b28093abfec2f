"""Quantised bases on a CPU compute what their dequantised weights say, in whatever order they are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers

from adapterhub_lite.bases import quantization
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.merging.dense import Edit
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers
from tests.training.build import EXAMPLES, Twin, assert_gradients_equal, peft_gradients

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
QUANTIZED = ("nf4", "nf4-double", "int8")
ORDERS = [
    *itertools.permutations(("generate", "evaluate", "train")),
    ("train", "generate", "toggle", "train", "evaluate"),
]


def dequantized(weight: torch.Tensor, quantize: str) -> torch.Tensor:
    """What bitsandbytes itself makes of a weight and gives back."""
    if quantize.startswith("nf4"):
        double = quantize == "nf4-double"
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        return bnb.functional.dequantize_4bit(packed, state)
    values, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return bnb.functional.int8_vectorwise_dequant(values, scale)


def dense_reference(base: Base, task: str = "CAUSAL_LM") -> Any:
    """The checkpoint in plain transformers with dense layers that hold the dequantised weights."""
    model = peers.plain(base.source.folder, task)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantized(module.weight.data, base.quantization).float()
    return model


@pytest.fixture(
    params=[(q, c) for q in QUANTIZED for c in (True, False)], ids=lambda p: f"{p[0]}-{'copies' if p[1] else 'none'}"
)
def base(request, tiny_folder: Callable[..., Any]) -> Base:
    """A quantised tiny Llama, with working copies and without."""
    quantize, copies = request.param
    return load_base(str(tiny_folder("llama", **WIDE)), quantize, device="cpu", working_copies=copies)


def layers(model: torch.nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if quantization.is_quantized(m)}


def test_every_linear_layer_but_the_output_is_quantised(base: Base):
    assert len(layers(base.model)) == 7
    assert not quantization.is_quantized(base.model.lm_head)
    assert base.memory.quantized > 0
    assert (base.memory.working_copies > 0) == (next(iter(layers(base.model).values()))._ahl_copy is not None)


def test_dense_weight_is_bitsandbytes_own_dequantisation(base: Base):
    reference = dict(dense_reference(base).named_modules())
    for name, module in layers(base.model).items():
        found = quantization.dense_weight(module, torch.float32)
        assert torch.equal(found, reference[name].weight), name
        original = peers.plain(base.source.folder, "CAUSAL_LM").get_submodule(name).weight
        assert torch.equal(quantization.quantized_round_trip(original.detach(), base.quantization), found)
        assert not torch.equal(original, found), "the reference is not quantised at all"


def test_logits_equal_the_dense_reference(base: Base):
    runtime = Runtime(base, Store())
    peers.assert_logits_equal(runtime.logits(peers.ROWS, None), peers.logits(dense_reference(base)))


def do(what: str, base: Base, runtime: Runtime, twin: Twin) -> None:
    if what == "generate":
        runtime.generate_ids([[5, 6, 7], [8, 9]], None, 3)
    elif what == "evaluate":
        with torch.no_grad():
            base.model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    elif what == "toggle":
        base.model.train().eval()
    else:
        base.model.train()
        try:
            twin.gradients(EXAMPLES["causal"])
        finally:
            base.model.eval()


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
def test_gradients_are_the_references_after_any_order_of_use(base: Base, kind: str):
    wrapped = peers.wrap(dense_reference(base), peers.config("llama", kind, "CAUSAL_LM"))
    twin = Twin(base, wrapped)
    runtime = Runtime(base, Store())
    loss, theirs = peft_gradients(wrapped, twin, EXAMPLES["causal"])
    before = base.live_digest()
    for order in ORDERS if kind == "lora" else ORDERS[-1:]:
        for what in order:
            do(what, base, runtime, twin)
        found, ours = twin.gradients(EXAMPLES["causal"])
        assert found == pytest.approx(loss, rel=1e-5), order
        assert_gradients_equal(ours, theirs, relative=3e-5)
    assert base.live_digest() == before
    runtime.close()


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_working_copies_change_no_bit_of_an_answer_and_gradients_by_rounding_alone(tiny_folder, quantize: str):
    folder = str(tiny_folder("llama", **WIDE))
    found = []
    for copies in (True, False):
        base = load_base(folder, quantize, device="cpu", working_copies=copies)
        wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "dora", "CAUSAL_LM"))
        logits = Runtime(base, Store()).logits(peers.ROWS, None)
        found.append((logits, *Twin(base, wrapped).gradients(EXAMPLES["causal"])))
    (logits, loss, ours), (others, other_loss, theirs) = found
    assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(logits, others, strict=True))
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def pretend_avx512(model: torch.nn.Module) -> None:
    """bitsandbytes then repacks at the first evaluation forward, as it does on processors with AVX512-BF16."""
    for module in layers(model).values():
        module.support_avx512bf16_for_cpu = True


def test_bitsandbytes_would_repack_the_weights_and_ours_stay(tiny_folder):
    folder = tiny_folder("llama", **WIDE)
    config = quantization.quantization_config("nf4", torch.float32, ["lm_head"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    ours = load_base(str(folder), "nf4", device="cpu", working_copies=False).model
    for model, repacked in ((plain, True), (ours, False)):
        pretend_avx512(model)
        before = {n: m.weight.data.clone() for n, m in layers(model).items()}
        try:
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
        except Exception:  # the packed kernel is not on this machine; the weights are changed before it is called
            assert model is plain
        changed = [n for n, m in layers(model).items() if not torch.equal(m.weight.data.flatten(), before[n].flatten())]
        assert bool(changed) == repacked


def test_the_own_forward_of_bitsandbytes_is_never_called(tiny_folder, monkeypatch: pytest.MonkeyPatch):
    def forward(*_: Any) -> None:
        raise AssertionError("bitsandbytes' own path ran")

    for quantize, name in (("nf4", "Linear4bit"), ("int8", "Linear8bitLt")):
        base = load_base(str(tiny_folder("llama", **WIDE)), quantize, device="cpu")
        monkeypatch.setattr(getattr(bnb.nn, name), "forward", forward)
        wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
        twin = Twin(base, wrapped)
        for what in ("generate", "evaluate", "train", "toggle"):
            do(what, base, Runtime(base, Store()), twin)


def test_an_encoders_head_stays_dense(tiny_folder):
    base = load_base(str(tiny_folder("bert", **WIDE)), "nf4", device="cpu")
    wrapped = peers.wrap(
        _dense_encoder(base),
        peers.config("bert", "lora", "SEQ_CLS", target_modules=["query", "value", "intermediate.dense"]),
    )
    twin = Twin(base, wrapped)
    loss, ours = twin.gradients(EXAMPLES["encoder"])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["encoder"])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_equal(ours, theirs, relative=3e-5)


def _dense_encoder(base: Base) -> Any:
    model = peers.plain(base.source.folder, "SEQ_CLS")
    quantised = layers(base.model)
    assert quantised
    for name, module in model.named_modules():
        if name in quantised:
            module.weight.data = dequantized(module.weight.data, base.quantization).float()
    return model


def test_unknown_quantisation_is_refused(tiny_folder):
    with pytest.raises(Unsupported, match="nf4"):
        load_base(str(tiny_folder("llama")), "int4", device="cpu")


def test_scales_that_are_quantised_are_another_base_of_fewer_bytes(tiny_folder: Callable[..., Any]):
    folder = str(tiny_folder("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    plain, double = (load_base(folder, q, device="cpu", working_copies=False) for q in ("nf4", "nf4-double"))
    assert double.fingerprint.quantization == double.quantization == "nf4-double"
    assert double.fingerprint.identity == plain.fingerprint.identity
    assert double.fingerprint.digest != plain.fingerprint.digest
    count = quantization.bytes_of_weights(plain.model, "int8")  # a byte each
    saved = plain.memory.quantized - double.memory.quantized
    assert saved == pytest.approx(count * (3 / 64 - 4 / 64 / 256) - 7 * 1028, abs=7 * 4)
    assert double.memory.quantized == pytest.approx(quantization.bytes_of_weights(double.model, "nf4-double"), rel=0.1)
    ours, theirs = (
        quantization.dense_weight(next(iter(layers(base.model).values()))) for base in (double, plain)
    )  # fmt: skip
    assert 0 < float((ours - theirs).abs().max()) < 0.02 * float(theirs.abs().max())
    plain_weights = dict(peers.plain(double.source.folder, "CAUSAL_LM").named_modules())
    for name, module in layers(double.model).items():
        again = quantization.quantized_round_trip(plain_weights[name].weight.data, "nf4-double")
        assert torch.equal(again, quantization.dense_weight(module))
    assert Edit(quantization="nf4-double").step == 0  # a part of a weight would have other scales
    # What is quantised twice is part of what must stay as it is.
    before = double.live_digest()
    state = next(iter(layers(double.model).values())).weight.quant_state
    for value in (state.state2.absmax, state.offset):
        value += 1
        assert double.live_digest() != before
        value -= 1


def test_bytes_of_weights_are_those_of_layers_that_are_quantised(tiny_folder: Callable[..., Any]):
    base = load_base(str(tiny_folder("llama", **WIDE)), "none", device="cpu")
    held = {n: m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    count = sum(m.weight.numel() for m in held.values())
    assert quantization.bytes_of_weights(base.model, "none") == 4 * count
    assert quantization.bytes_of_weights(base.model, "int8") == count
    assert quantization.bytes_of_weights(base.model, "nf4") == pytest.approx(count * 0.5625, abs=7)
    again = load_base(str(tiny_folder("llama", **WIDE)), "nf4", device="cpu", working_copies=False)
    assert quantization.bytes_of_weights(again.model, "int8") == count
