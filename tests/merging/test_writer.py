"""Shards byte by byte: what stays is copied, what changes is made in blocks, and little of it is in memory."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.errors import AdapterMismatch, BaseUnavailable
from adapterhub_lite.formats.safetensors_header import read_header
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.merging import dense, writer
from adapterhub_lite.merging.checkpoint import Checkpoint, Planned, made, planned
from adapterhub_lite.merging.dense import Edit, Kronecker, Product, Term
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.writer import is_written, pieces, shard_header, write_shard
from adapterhub_lite.store.fs import FileSystem
from tests import tiny
from tests.merging.peft_merges import files_of, plan_of, saved, sharded, tensors_of
from tests.store.faulty import Unsynced

ROOT = Path(__file__).parents[2]


def written(base: Path, out: Path, adapter: Path, fs: FileSystem | None = None, **options) -> dict[str, bytes]:
    with staged_merge(plan_of(base, (adapter, 1.0), **options), base, out, fs=fs or Unsynced()):
        pass
    return files_of(out)


def test_what_stays_is_byte_for_byte_the_bases(tmp_path):
    base = sharded("llama", tmp_path / "base")
    adapter = saved(tmp_path / "one", base, "llama", "lora", target_modules=["q_proj", "down_proj"])
    plan = plan_of(base, (adapter, 1.0))
    with staged_merge(plan, base, tmp_path / "out"):
        pass
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        header = read_header(path)
        before, after = bytearray(path.read_bytes()), bytearray((tmp_path / "out" / path.name).read_bytes())
        for name in header.tensors:
            if name in plan.changed:
                span = header.span(name)
                assert before[span] != after[span]
                before[span] = after[span] = b"\0" * (span.stop - span.start)
        assert before == after
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((folder / index).read_text()) for folder in (tmp_path / "out", base))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_the_file_systems_copy_and_its_hint(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    fs = FileSystem()
    source, target = os.open(tmp_path / "a", os.O_RDONLY), fs.create(tmp_path / "b", 0o644)
    try:
        assert fs.write(target, memoryview(b"begin")) == 5
        assert fs.copy_range(source, target, 10, 30) == 30
        assert fs.copy_range(source, target, 95, 30) == 5
        assert fs.copy_range(source, target, 100, 30) == 0
        fs.begin_sync(target, 0, 40)
    finally:
        fs.close(source)
        fs.close(target)
    fs.begin_sync(target, 0, 40)  # a hint never fails
    assert (tmp_path / "b").read_bytes() == b"begin" + bytes(range(10, 40)) + bytes(range(95, 100))


def test_neighbours_that_stay_are_one_run(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "lora", target_modules=["down_proj"])
    (tensors,) = plan_of(base, (adapter, 1.0)).shards.values()
    found = list(pieces(tensors))
    assert sum(isinstance(p, writer.Run) for p in found) <= 3
    assert sum(isinstance(p, writer.Rows) for p in found) == 2


class Counting(Unsynced):
    """Counts bytes by the way they came."""

    def __init__(self) -> None:
        self.copied = self.written = 0

    def copy_range(self, source: int, target: int, offset: int, count: int) -> int:
        count = super().copy_range(source, target, offset, count)
        self.copied += count
        return count

    def write(self, fd: int, data: memoryview) -> int:
        count = super().write(fd, data)
        self.written += count
        return count


def test_the_system_copies_what_stays(tmp_path, tiny_folder):
    base = tiny_folder("llama", vocab_size=5000)
    adapter = saved(tmp_path / "one", base, "llama", "lora", target_modules=["down_proj"])
    fs = Counting()
    written(base, tmp_path / "out", adapter, fs)
    assert fs.copied > 0.9 * (base / "model.safetensors").stat().st_size
    changed = sum(t.nbytes for n, t in load_file(base / "model.safetensors").items() if "down_proj" in n)
    assert fs.written < changed + 100_000


class Short(Unsynced):
    """Takes little at once; copies nothing where `number` says why."""

    def __init__(self, most: int, number: int | None = None, after: int = 0) -> None:
        self.most, self.number, self.after = most, number, after

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[: self.most])

    def copy_range(self, source: int, target: int, offset: int, count: int) -> int:
        self.after -= 1
        if self.number is not None and self.after < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().copy_range(source, target, offset, min(count, self.most))


@pytest.mark.parametrize("fs", [Short(997), Short(1 << 30, errno.EXDEV), Short(511, errno.ENOSYS, after=3)])
def test_short_writes_and_systems_that_do_not_copy(tmp_path, tiny_folder, fs):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    assert written(base, tmp_path / "some", adapter, fs) == written(base, tmp_path / "out", adapter)


def test_a_copy_that_fails_otherwise_is_an_error(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    with pytest.raises(OSError, match="Input/output"):
        written(base, tmp_path / "out", adapter, Short(1 << 30, errno.EIO))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "lokr"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_blocks_of_any_size_and_torch_give_the_same_bytes(
    tmp_path, tiny_folder, monkeypatch, dtype, kind, quantization
):
    base = tiny_folder("llama", hidden_size=40, intermediate_size=72)
    adapter = saved(tmp_path / "one", base, "llama", kind)
    options = {"dtype": dtype, "quantization": quantization}
    expected = written(base, tmp_path / "out", adapter, **options)
    for number, block in enumerate((1, 1000, 1 << 30)):
        monkeypatch.setattr(writer, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda cores=2 * number: cores)
        assert written(base, tmp_path / f"b{number}", adapter, **options) == expected
    monkeypatch.undo()
    monkeypatch.setattr(dense, "merge_rows", lambda *_: None)
    assert written(base, tmp_path / "torch", adapter, **options) == expected


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_blocks_of_weights_that_are_stored_the_other_way_round(tmp_path, tiny_folder, monkeypatch, kind):
    base = tiny_folder("gpt2")
    adapter = saved(tmp_path / "one", base, "gpt2", kind)
    expected = written(base, tmp_path / "out", adapter)
    monkeypatch.setattr(writer, "BLOCK", 1)
    assert written(base, tmp_path / "rows", adapter) == expected


def test_values_of_every_dtype_are_rounded_once(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    whole = {p.name: p.make() for t in plan_of(base, (adapter, 1.0)).shards.values() for p in t}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        written(base, tmp_path / name, adapter, dtype=name)
        found = tensors_of(tmp_path / name)
        assert all(torch.equal(found[n], t.to(dtype)) for n, t in whole.items())


def test_what_float16_has_no_room_for_is_refused(tmp_path, tiny_folder):
    base = tmp_path / "base"
    tiny.save("llama", base)
    adapter = saved(tmp_path / "one", base, "llama", "lora", target_modules=["q_proj"])
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensors = load_file(base / "model.safetensors")
        kept = tensors[name].clone()
        tensors[name].view(-1)[3] = 70000.0
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterMismatch, match=name.replace(".", r"\.")):
            written(base, tmp_path / "out", adapter, dtype="float16")
        written(base, tmp_path / f"wide{len(name)}", adapter, dtype="bfloat16")
        tensors[name] = kept
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_meanwhile_is_noticed(tmp_path, tiny_folder):
    base = tmp_path / "base"
    tiny.save("llama", base)
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    plan = plan_of(base, (adapter, 1.0))
    weights = base / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + b"x")
    with pytest.raises(BaseUnavailable, match="was changed"), staged_merge(plan, base, tmp_path / "out"):
        pass
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(BaseUnavailable, match="ends early"), staged_merge(plan, base, tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_foreign_files_and_odd_tensors(tmp_path, tiny_folder):
    """A header that lists tensors in another order than their bytes, scalars, empty tensors, whole numbers."""
    base = tmp_path / "base"
    tiny.save("llama", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.odd"] = torch.arange(3, dtype=torch.int8)  # what follows is not aligned
    tensors |= {"empty": torch.empty(0, 7), "scalar": torch.tensor(2.5), "cube": torch.randn(3, 4, 5)}
    _foreign(base / "model.safetensors", tensors)
    adapter = saved(tmp_path / "one", tiny_folder("llama"), "llama", "lora")
    expected = tensors_of_merge(tmp_path, tiny_folder("llama"), adapter)
    for dtype in ("auto", "bfloat16"):
        written(base, tmp_path / dtype, adapter, dtype=dtype)
        found = tensors_of(tmp_path / dtype)
        for name, tensor in {**tensors, **expected}.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name
        assert found["model.layers.0.self_attn.odd"].dtype == torch.int8
    head = read_header(base / "model.safetensors").body_offset
    ours, theirs = ((f / "model.safetensors").read_bytes()[:head] for f in (tmp_path / "auto", base))
    assert ours == theirs


def tensors_of_merge(tmp_path: Path, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    written(base, tmp_path / "plain", adapter)
    return tensors_of(tmp_path / "plain")


def _foreign(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries, body = {}, b""
    names = {torch.float32: "F32", torch.int8: "I8"}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0][::-1]):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        span = [len(body), len(body) + len(data)]
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        body += data
    text = json.dumps({"__metadata__": {"format": "pt", "by": "us"}, **dict(sorted(entries.items()))}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_tensor_of_another_shape_than_planned_is_an_error(tmp_path):
    wrong = Planned("a", torch.float32, (2, 2), lambda: torch.zeros(3, 2))
    with pytest.raises(ValueError, match="planned"):
        write_shard(Unsynced(), tmp_path / "a", b"", [wrong], lambda _: None)


def test_a_shard_is_looked_at_before_it_is_believed(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    plan = plan_of(base, (saved(tmp_path / "one", base, "llama", "lora"), 1.0), dtype="bfloat16")
    ((file, tensors),) = plan.shards.items()
    header, path = shard_header(plan.checkpoint, file, tensors), tmp_path / "shard"
    write_shard(Unsynced(), path, header, tensors, lambda _: None)
    assert is_written(path, header, tensors)
    data = path.read_bytes()
    assert isinstance(header, bytes)
    for place in (0, len(header) - 10, len(header) + 1, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert not is_written(path, header, tensors)
    path.write_bytes(data[:-2])
    assert not is_written(path, header, tensors)


def test_a_kronecker_product_in_rows():
    one, two = torch.randn(3, 4), torch.randn(5, 2)
    expected = torch.kron(one, two) * 0.5 * 3
    for start in range(15):
        for stop in range(start + 1, 16):
            assert torch.equal(Kronecker(one, two, 0.5).rows(start, stop, 3.0), expected[start:stop])


@pytest.mark.parametrize("rank", [8, 16, 200, 500])
def test_a_product_in_rows_has_the_bits_of_the_whole(rank):
    product = Product(torch.randn(65, rank), torch.randn(rank, 576), 0.3)
    whole = (product.left @ product.right) * (0.3 * 2.0)
    for rows in (1, 2, 7, 64):
        parts = [product.rows(start, min(65, start + rows), 2.0) for start in range(0, 65, rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_what_an_edit_makes_of_a_tensor_as_a_whole(tmp_path):
    source, left, right = torch.randn(70, 33), torch.randn(70, 3), torch.randn(3, 33)
    save_file({"a": source, "b": source.bfloat16()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    term = Term(lambda: Product(left, right, 0.3), 2.0)
    whole = made(checkpoint.place("a"), Edit((term,)), "a")
    assert torch.equal(whole, source + (left @ right) * (0.3 * 2.0))
    narrow = planned("b", torch.bfloat16, checkpoint.place("b"), Edit((term,)))
    assert narrow.make().dtype == torch.float32
    assert torch.equal(narrow.make(), source.bfloat16().float() + (left @ right) * (0.3 * 2.0))


SCRIPT = """
import resource, sys
from pathlib import Path
import peft, torch, transformers  # libraries are no part of what merging takes
import transformers.models.llama.modeling_llama
from adapterhub_lite.kernels.library import library
from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import plan_merge

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

torch.set_num_threads(1)
torch.ones(2000, 2000) @ torch.ones(2000, 16)
library()
base, adapter, out, dtype, room = map(str, sys.argv[1:])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + int(room),) * 2)
plan = plan_merge([(read_adapter(Path(adapter)), 1.0)], Checkpoint.open(Path(base)), quantization="none", bake="auto",
                  dtype=dtype, labels=None)
with staged_merge(plan, Path(base), Path(out)):
    pass
print(plan.nbytes, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak")
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_memory_stays_small_however_large_the_checkpoint(tmp_path, dtype):
    """360 MB, with one tensor of 164 MB, under a hard limit of the address space."""
    base = _large(tmp_path / "base")
    adapter = _adapter_of(base, tmp_path / "adapter")
    command = [sys.executable, "-c", SCRIPT, str(base), str(adapter), str(tmp_path / "out"), dtype, str(140 << 20)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    nbytes, peak = map(int, done.stdout.split())
    assert nbytes > 340e6
    assert peak < nbytes / 8
    found = Checkpoint.open(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    lora = read_adapter(adapter).tensors
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    delta = (lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]) * 2.0
    expected = Checkpoint.open(base).read(name).float() + delta
    assert torch.equal(found.read(name), expected.to(found.read(name).dtype))


def _large(folder: Path) -> Path:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 1280, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 64000}
    config = LlamaConfig(**sizes, num_attention_heads=10, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    from adapterhub_lite.bases.skeleton import skeleton

    torch.manual_seed(0)
    tensors = {
        name: torch.randn(tuple(parameter.shape)).bfloat16()
        for name, parameter in skeleton(folder, None).model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _adapter_of(base: Path, folder: Path) -> Path:
    from adapterhub_lite.adapters.sites import features, select_sites
    from adapterhub_lite.bases.skeleton import skeleton

    view, tensors = skeleton(base, None), {}
    sites = select_sites(view.modules, "all-linear", view.model.get_output_embeddings())
    for name, module in sites.items():
        n_in, n_out = features(module)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, n_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, 4) * 0.1
    spec = LoraSpec(4, 8.0, tuple(sorted(sites)), task_type="CAUSAL_LM")
    folder.mkdir()
    for name, data in Adapter(spec, tensors).files().items():
        (folder / name).write_bytes(data)
    return folder


def test_a_plan_without_sources_is_written_too(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    plan = plan_of(base, (adapter, 1.0))
    bare = replace(
        plan, shards={f: [Planned(p.name, p.dtype, p.shape, p.make) for p in t] for f, t in plan.shards.items()}
    )
    for which, out in ((plan, tmp_path / "a"), (bare, tmp_path / "b")):
        with staged_merge(which, base, out):
            pass
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
