"""What CUDA computes with, tried without CUDA: its attention's calls by an oracle, its copies by a slow copier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.training.computation import Settings
from adapterhub_lite.training.decoder import cuda as decoder_cuda
from adapterhub_lite.training.decoder import parts as decoder_parts
from adapterhub_lite.training.decoder.cuda import CudaOps, cuda_ops, unlike
from adapterhub_lite.training.decoder.fused import FusedDecoder
from adapterhub_lite.training.decoder.ops import AttentionShape, TorchOps
from adapterhub_lite.training.decoder.parts import not_covered, parts_of
from adapterhub_lite.training.memory import buffers as buffers_module
from adapterhub_lite.training.memory import offload, scratch
from adapterhub_lite.training.memory.buffers import Buffers
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import EXAMPLES, Peer, rows_of
from tests.training.flash_oracle import backward, forward, oracle

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = cases.folder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return find


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch):
    with cases.precision(monkeypatch, "float64"):
        yield


def fused_of(peer: Peer, settings: Settings, ops: CudaOps) -> FusedDecoder:
    assert not_covered(peer.base, [peer.learner]) is None
    return FusedDecoder(peer.base, [peer.learner], settings, parts=parts_of(peer.base), ops=ops)


def check(peer: Peer, fused: FusedDecoder, bound: float, examples: list[Any] | None = None) -> None:
    rows = rows_of(examples or EXAMPLES)
    expected, theirs = peer.gradients(rows)
    for _ in range(2):
        peer.clear()
        (sums,) = fused.gradients(rows)
        assert sums.total == pytest.approx(expected, rel=10 * bound)
        assert cases.error(peer.ours(), theirs) <= bound


SHARED = [type(EXAMPLES[0])([*range(20, 32), 5 + i, 6, 7, 2], [-100] * 12 + [-100, 6, 7, 2]) for i in range(3)]
SETTINGS = [Settings(24), Settings(64, checkpoint=True), Settings(24, offload=True)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_equal_in_double_precision(folder, double, family: str, kind: str, settings: Settings):
    peer = Peer(cases.base_of(folder(family), "float64"), kind)
    check(peer, fused_of(peer, settings, oracle()), 1e-10, [*EXAMPLES, *SHARED])


def test_equal_with_dropout(folder, double):
    peer = Peer(cases.base_of(folder("llama"), "float64"), "lora", lora_dropout=0.3)
    check(peer, fused_of(peer, Settings(24, checkpoint=True), oracle()), 1e-10)


def test_a_context_is_one_call_and_large_ones_are_several(monkeypatch: pytest.MonkeyPatch):
    spans = [[0, 11, 5, 0, 5], [11, 9, 16, 5, 11], [20, 17, 25, 5, 11]]
    assert len(decoder_cuda.calls_of(spans, CPU)) == 1
    monkeypatch.setattr(decoder_cuda, "_LEAST_KEYS", 30)
    monkeypatch.setattr(decoder_cuda, "_MORE_KEYS", 1)
    first, second, *more = decoder_cuda.calls_of(spans, CPU)
    assert not more
    assert (first.first, first.end, second.first, second.end) == (0, 20, 20, 37)
    assert first.key_starts.tolist() == [0, 16, 36]
    torch.manual_seed(0)
    for window in (None, 6):
        shape = AttentionShape(4, 2, 16, 0.3, window)
        assert decoder_cuda._difference(oracle(), torch.tensor(spans), shape, torch.float64) < 1e-12
    plain = decoder_cuda.calls_of([[0, 3, 4, 0, 0], [3, 2, 7, 0, 0]], CPU)
    assert [call.keys for call in plain] == [slice(4, 9)]


def test_a_kernel_that_is_wrong_or_missing_is_not_used():
    shape = AttentionShape(4, 2, 16, 0.3, 6)
    assert unlike(oracle(), shape, CPU, torch.bfloat16) is None

    def other(*given: Any) -> Any:  # aligned at the top left, as old versions have it
        found = backward(*given)
        return found[0], found[1] * 1.1, found[2]

    assert "wrong by" in str(unlike(CudaOps(forward, other), shape, CPU, torch.bfloat16))
    assert "does not run here" in str(unlike(CudaOps(), shape, CPU, torch.bfloat16))  # not on a CPU without its kernel
    ops = cuda_ops(shape, CPU, torch.bfloat16)
    assert ops.note is not None
    assert "slow" in ops.note
    assert decoder_cuda._difference(ops, torch.tensor([[0, 5, 0, 0, 0]]), shape, torch.float32) < 1e-6
    assert "float32" in str(cuda_ops(shape, CPU, torch.float32).note)


@pytest.mark.parametrize("temporary", [1, 700, 1 << 20])
def test_blocks_of_rows_change_nothing(temporary: int):
    torch.manual_seed(1)
    ops, plain = oracle(), TorchOps()
    ops.temporary = temporary
    x, grad, gate_up = torch.randn(37, 24), torch.randn(37, 24), torch.randn(37, 48)
    weight, logits, targets = torch.rand(24), torch.randn(37, 24) * 3, torch.randint(24, (37,))
    found = []
    for one in (ops, plain):
        made = [copy.deepcopy(v) for v in (x, gate_up, logits, torch.zeros(37), torch.zeros(37), x, x)]
        one.rms_norm(x, weight, 1e-5, made[0], made[3])
        one.add_rms_norm(x, grad, weight, 1e-5, made[5], made[0], made[3])
        one.rms_norm_back(grad, made[5], weight, made[3], made[6], True)
        one.cross_entropy(made[2], targets, made[4])
        out = grad.clone() if one is ops else torch.empty_like(grad)
        one.swiglu(made[1], made[0])
        one.swiglu_back(made[1], out if one is ops else grad, out)  # it may write over the gradient
        one.drop(x, targets, targets, 3, 0.4, made[0])
        found.append([*made, out])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_never_two_weights_are_dense(folder, monkeypatch: pytest.MonkeyPatch, quantize: str):
    base = cases.base_of(folder("llama"), "float32", quantize, working_copies=False)
    peer = Peer(base, "lora")
    fused = fused_of(peer, Settings(64, checkpoint=True), oracle())
    written: list[tuple[int, torch.Size]] = []
    write = scratch.write_dense

    def watched(module: torch.nn.Module, out: torch.Tensor) -> None:
        write(module, out)
        written.append((out.data_ptr(), out.shape))
        assert torch.equal(out, dense_weight(module, out.dtype))

    monkeypatch.setattr(decoder_parts, "write_dense", watched)
    check(peer, fused, 1e-5)
    widest = max(shape.numel() for _, shape in written)
    held = fused._buffers._kept["dequantised", torch.float32]
    assert {address for address, _ in written[len(written) // 2 :]} == {held.data_ptr()}
    assert held.numel() == widest == 64 * 128
    # Forward, backward, and again all but the last product; nothing goes on below the lowest layer.
    assert len(written) == 2 * (3 * (7 + 7 + 6) - 3)


class SlowCopier:
    """Copies only when somebody waits, in order: who reads without waiting, or writes too early, sees it."""

    def __init__(self) -> None:
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = self.count = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> int:
        self.begun.append((source, target))
        return len(self.begun)

    def wait(self, begun: int) -> None:
        while self.done < begun:
            source, target = self.begun[self.done]
            target.copy_(source)
            self.done += 1


def test_offloaded_inputs_come_back(folder, double, monkeypatch: pytest.MonkeyPatch):
    where = cases.folder(folder("llama").parent / "deep", "llama", num_hidden_layers=6)
    peer = Peer(cases.base_of(where, "float64"), "lora")
    copier = SlowCopier()
    monkeypatch.setattr(offload, "PlainCopier", lambda: copier)
    fused = fused_of(peer, Settings(16, offload=True), oracle())
    check(peer, fused, 1e-10)
    packs = len(copier.begun) // (2 * 4)
    assert len(copier.begun) == 2 * 4 * packs > 8  # of six layers' inputs four leave and come back, in each pack
    assert copier.done == len(copier.begun)
    names = {name for name, _ in fused._buffers._kept if name.startswith("x ")}
    assert names <= {"x 0", "x 1", "x "}


def test_freed_buffers_are_gone_and_others_stay():
    lean, kept = Buffers(CPU, torch.float32, True), Buffers(CPU, torch.float32)
    for one in (lean, kept):
        one("a", 3, 5)
        one("b", 2, 2)
        one.free("a", "c")
    assert lean.nbytes == 16
    assert lean.most == kept.nbytes == kept.most == 76
    assert buffers_module._STEP == 64


def test_a_table_elsewhere_is_looked_up():
    table, ids, out = torch.randn(9, 4), torch.tensor([3, 3, 8]), torch.empty(3, 4)
    offload.look_up(table, ids, out)
    assert torch.equal(out, table[ids])
    far = torch.empty(3, 4, device="meta")
    offload.look_up(table, ids, far)  # from one device to another


@needs_cuda
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("heads", [(4, 2, 64), (32, 8, 128), (9, 3, 64)])
def test_flash_attention_is_right_on_this_device(heads: tuple[int, int, int], window: int | None):
    shape = AttentionShape(*heads, heads[2] ** -0.5, window)
    assert unlike(CudaOps(), shape, torch.device("cuda"), torch.bfloat16) is None


@needs_cuda
def test_the_cuda_copier_keeps_order():
    device = torch.device("cuda")
    copier = offload.CudaCopier(device)
    for i in range(20):
        source, host, back = (
            torch.full((1 << 20,), float(i), device=device),
            torch.empty(1 << 20, pin_memory=True),
            None,
        )
        copier.copy(source, host)
        back = torch.empty_like(source)
        copier.wait(copier.copy(host, back))
        assert float((back - i).abs().max()) == 0


@pytest.mark.parametrize("settings", [Settings(24), Settings(1024, checkpoint=True)])
def test_stacked_learners_have_their_own_gradients(folder, double, settings: Settings):
    base = cases.base_of(folder("qwen2"), "float64")
    some = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    peers = [Peer(base, "lora", 1, r=3), Peer(base, "lora", 2, r=5, **some), Peer(base, "rslora", 3)]
    learners = [peer.learner for peer in peers]
    assert not_covered(base, learners) is None
    fused = FusedDecoder(base, learners, settings, parts=parts_of(base), ops=oracle())
    assert any(change.stack is not None for layer in fused._layers for change in layer.changes)
    rows = [row for i in range(3) for row in rows_of(EXAMPLES[i:] + SHARED, i)]
    for _ in range(2):
        for peer in peers:
            peer.clear()
        sums = fused.gradients(rows)
        for i, peer in enumerate(peers):
            expected, theirs = peer.gradients(rows_of(EXAMPLES[i:] + SHARED))
            assert sums[i].total == pytest.approx(expected, rel=1e-9)
            assert cases.error(peer.ours(), theirs) <= 1e-10
    dropping = Peer(base, "lora", 4, lora_dropout=0.2)
    mixed = FusedDecoder(base, [learners[0], dropping.learner], settings, parts=parts_of(base), ops=oracle())
    assert all(change.stack is None for layer in mixed._layers for change in layer.changes)
