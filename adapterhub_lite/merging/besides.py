"""What lies in a checkpoint folder besides weights and configuration, and what of it a merged model needs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

# All files that transformers' tokenizers and processors read, by the names that its classes give them.
_COPIED = (
    "generation_config.json",
    "tokenizer*.json",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "entity_vocab.json",
    "dict.txt",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "emoji.json",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "*.model",
    "tokenizer.model.*",
    "*.tokenizer",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
)
# What a merged folder has of its own, and what is no part of a model.
_OWN = (
    "config.json",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "merge_report.*",
    "README*",
    "LICENSE*",
    "source.json",  # where our cache has a base from
    ".*",
)
_SHOWN = 8


@dataclass(frozen=True)
class Besides:
    """Names of files below a checkpoint folder: those a merge copies, and those that it leaves without knowing them."""

    copied: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def remark(self) -> str:
        """A sentence on what is left; "" where nothing is."""
        if not self.left:
            return ""
        more = f" and {len(self.left) - _SHOWN} more" if len(self.left) > _SHOWN else ""
        return f"Files of the base that are not known were not copied: {', '.join(self.left[:_SHOWN])}{more}."


def besides(folder: Path) -> Besides:
    """Look at a checkpoint folder, and at its folder of chat templates."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            names.append(path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            names += [f"{path.name}/{inner.name}" for inner in sorted(path.iterdir()) if inner.is_file()]
        elif path.is_dir() and not path.name.startswith("."):
            names.append(f"{path.name}/")
    copied = [name for name in names if _matches(name, _COPIED)]
    left = [name for name in names if name not in copied and not _matches(name, _OWN)]
    return Besides(tuple(copied), tuple(left))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
