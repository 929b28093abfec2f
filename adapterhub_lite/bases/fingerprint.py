"""What a base is: digests of configuration, tokenizer, chat template and weights, and how it was quantised.

The weights' digest is made of one sha256 per tensor, so it does not depend on how a checkpoint is cut into shards.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseUnavailable
from ..formats.safetensors_header import read_header
from .quantization import state_tensors

# Written by libraries, not by the model's makers: they change with no change of the model.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_commit_hash"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
# A base may be large and hold many tensors; an adapter may not.
_HEADER_LIMIT = 64 * 2**20
_TENSOR_LIMIT = 500_000


@dataclass(frozen=True)
class Fingerprint:
    """Digests (sha256, hexadecimal) that identify a base; `quantization` is none, int8, nf4 or nf4-double."""

    config: str
    tokenizer: str
    chat_template: str
    weights: str
    quantization: str

    @property
    def identity(self) -> str:
        """Digest of what the base is, whatever its quantisation."""
        return _digest_of(self.config, self.tokenizer, self.weights)

    @property
    def digest(self) -> str:
        """Digest of everything."""
        return _digest_of(self.identity, self.chat_template, self.quantization)

    def to_dict(self) -> dict[str, str]:
        """Plain form for a card."""
        return {**asdict(self), "identity": self.identity, "digest": self.digest}

    def differs_from(self, card: Mapping[str, Any]) -> list[str]:
        """Names of the fields in which a fingerprint recorded in a card differs; fields it lacks are not compared."""
        return [k for k, v in asdict(self).items() if card.get(k) not in (None, "", v)]


def fingerprint(folder: Path, tokenizer: Any, quantization: str, memo: Path | None = None) -> Fingerprint:
    """Fingerprint of the checkpoint in `folder` as loaded with `tokenizer` and `quantization`.

    Args:
        memo: a JSON file that remembers tensor digests by (path, inode, size, mtime); None to compute anew.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    return Fingerprint(
        config=_config_digest(folder / "config.json"),
        tokenizer=_tokenizer_digest(folder, tokenizer),
        chat_template=_digest_of(template if isinstance(template, str) else json.dumps(template, sort_keys=True)),
        weights=weights_digest(folder, memo),
        quantization=quantization,
    )


def weights_digest(folder: Path, memo: Path | None = None) -> str:
    """sha256 over the sorted lines `name dtype shape sha256(bytes)` of all tensors of a checkpoint folder."""
    known = _read_memo(memo)
    lines: list[str] = []
    new = False
    for path in weight_files(folder):
        stat = path.stat()
        key = f"{os.path.realpath(path)}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if key not in known:
            known[key] = _tensor_lines(path)
            new = True
        lines += known[key]
    if new:
        _write_memo(memo, {key: value for key, value in known.items() if os.path.exists(key.rsplit(":", 4)[0])})
    return _digest_of(*sorted(lines))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those its index names, or the single file.

    Raises:
        BaseUnavailable: there are none.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and single.is_file():
        raise BaseUnavailable(f"{folder} holds both one weights file and an index of others.", "Remove one of them.")
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        bad = [n for n in names if not isinstance(n, str) or Path(n).name != n]
        if bad:
            raise BaseUnavailable(f"{index} names files outside its folder: {bad[0]!r}.", "Get the checkpoint anew.")
        return [folder / n for n in names]
    if single.is_file():
        return [single]
    raise BaseUnavailable(f"{folder} holds no model.safetensors.", "Only safetensors checkpoints are loaded.")


def live_digest(model: nn.Module) -> str:
    """sha256 of every parameter, buffer and quantisation state of a model in memory: proof that it is frozen."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda item: (item[0], _tensor_digest(item[1])), _live_tensors(model))
        for name, digest in parts:
            whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _live_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield from ((f"{name}.{part}", one) for part, one in state_tensors(state).items())
        for extra in ("CB", "SCB"):
            value = getattr(tensor, extra, None)
            if isinstance(value, torch.Tensor):
                yield f"{name}.{extra}", value
    for name, module in model.named_modules():
        copy = getattr(module, "_ahl_copy", None)
        if copy is not None:  # what a quantised layer on a CPU really computes with
            yield f"{name}.working_copy", copy


def _tensor_digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()  # type: ignore[arg-type]


def _tensor_lines(path: Path) -> list[str]:
    header = read_header(path, limit=_HEADER_LIMIT, max_tensors=_TENSOR_LIMIT)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        body = memoryview(data)[header.body_offset :]
        try:
            return [
                f"{name} {t.dtype} {list(t.shape)} {hashlib.sha256(body[t.begin : t.end]).hexdigest()}"
                for name, t in header.tensors.items()
            ]
        finally:
            body.release()


def _config_digest(path: Path) -> str:
    config = json.loads(path.read_text("utf-8"))
    return _digest_of(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True))


def _tokenizer_digest(folder: Path, tokenizer: Any) -> str:
    """Vocabulary and rules by their files, and which tokens are special, which other files decide."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    lines = [f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files]
    return _digest_of(*lines, json.dumps(special, sort_keys=True))


def _digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_memo(memo: Path | None) -> dict[str, list[str]]:
    try:
        known = json.loads(memo.read_text("utf-8")) if memo else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path | None, known: dict[str, list[str]]) -> None:
    """Best effort: without the memo the digest is only slower."""
    if memo is None:
        return
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_name(f"{memo.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known), "utf-8")
        temporary.replace(memo)
    except OSError:
        return
