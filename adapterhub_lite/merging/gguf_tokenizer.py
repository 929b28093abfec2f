"""A base's tokenizer in the metadata of a GGUF file.

llama.cpp has two of the tokenizers that language models use: byte-level BPE ("gpt2"), whose rule for cutting text into
words goes by a name, and SentencePiece's BPE ("llama"), which joins the pieces of the best score. What the base's own
tokenizer does is read from the tokenizer that transformers makes of the folder; anything that llama.cpp would do
otherwise is refused, since a model that is served other tokens than it was trained on is wrong without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from ..bases.quiet import quiet
from ..errors import FormatError, Unsupported
from ..events import Listener, Note
from .gguf_writer import Metadata

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE = "\u2581"  # SentencePiece's mark of a space
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how words are cut, whether a word that is a token is taken whole) -> llama.cpp's name for both.
_SPLITS = {
    (_WORDS % "{1,3}", True): "llama-bpe",
    (_WORDS % "{1,3}", False): "smaug-bpe",
    (_WORDS % "", False): "qwen2",
    (_TEKKEN, True): "tekken",
}
_TEMPLATES, _TEMPLATE = 32, 1 << 20  # named ones beside the default, and characters of each
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_HINT = "Write safetensors, or convert that folder with llama.cpp's own convert_hf_to_gguf.py."


@dataclass(frozen=True)
class Vocabulary:
    """Texts and types of all ids; `scores` for SentencePiece only."""

    texts: list[str]
    types: list[int]
    scores: list[float] | None = None


def add_tokenizer(metadata: Metadata, folder: Path, config: Any, on_event: Listener) -> None:
    """Add the tokenizer of a checkpoint folder.

    Args:
        config: transformers' configuration; its vocab_size may be more than the tokenizer has.

    Raises:
        Unsupported: there is none, or llama.cpp has none that does the same.
    """
    tokenizer = _load(folder)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        raise _unlike(f"its model is {model.get('type')}")
    vocabulary = _vocabulary(raw, config.vocab_size)
    if model.get("byte_fallback"):
        prefixed = _sentencepiece_prefix(raw, on_event)
        vocabulary = _scored(vocabulary, raw, folder, tokenizer.unk_token or model.get("unk_token"))
        metadata.text(Keys.Tokenizer.MODEL, "llama")
        metadata.text(Keys.Tokenizer.PRE, "default")
    else:
        prefixed, name = False, _words(raw, on_event)
        metadata.text(Keys.Tokenizer.MODEL, "gpt2")
        metadata.text(Keys.Tokenizer.PRE, name)
        metadata.texts(Keys.Tokenizer.MERGES, [" ".join(_escaped(pair)) for pair in _merges(model)])
    if len(set(vocabulary.texts)) != len(vocabulary.texts):
        raise _unlike("two of its tokens have one text")
    metadata.texts(Keys.Tokenizer.LIST, vocabulary.texts)
    metadata.integers(Keys.Tokenizer.TOKEN_TYPE, vocabulary.types)
    if vocabulary.scores is not None:
        metadata.reals(Keys.Tokenizer.SCORES, vocabulary.scores)
    metadata.flag(Keys.Tokenizer.ADD_PREFIX, prefixed)
    _add_specials(metadata, tokenizer, config)
    _add_templates(metadata, tokenizer.chat_template, on_event)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise Unsupported(
            f"{folder} has no tokenizer, and a GGUF file without one reads no text.",
            f"Put the base's {_FILES[0]} there, or write safetensors.",
        )
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a broken tokenizer fails in as many ways as there are libraries below
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FormatError(f"The tokenizer of {folder} could not be loaded: {reason}", "Copy it anew.") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _unlike(f"{type(tokenizer).__name__} has no tokenizer.json")
    return tokenizer


def _vocabulary(raw: dict[str, Any], size: int) -> Vocabulary:
    """Texts and types by id; ids that the tokenizer does not have are filled up, as the embedding has rows for them."""
    texts: list[str | None] = [None] * size
    types = [int(TokenType.UNUSED)] * size
    entries = [(i, text, TokenType.NORMAL) for text, i in raw["model"]["vocab"].items()]
    entries += [(token["id"], *_added(token, raw)) for token in raw["added_tokens"]]
    for i, text, kind in entries:
        if not 0 <= i < size:
            raise Unsupported(
                f"The tokenizer has an id {i}, and the model {size} tokens.", "Is it this base's tokenizer?"
            )
        texts[i], types[i] = text, int(kind)
    return Vocabulary([f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)], types)


def _added(token: dict[str, Any], raw: dict[str, Any]) -> tuple[str, TokenType]:
    """An added token's text and type: control tokens are read from templates only, others wherever they are."""
    text = str(token["content"])
    # llama.cpp's rule: some models do not mark what are control tokens.
    if token["special"] or (text.startswith("<|") and text.endswith("|>")):
        return text, TokenType.CONTROL
    return text.replace(_SPACE, " ") if raw["model"].get("byte_fallback") else text, TokenType.USER_DEFINED


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _escaped(pair: Sequence[str]) -> Iterator[str]:
    return (part.replace(" ", "\u0120") for part in pair)  # a space separates the pair; byte-level BPE writes it so


def _words(raw: dict[str, Any], on_event: Listener) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts a text into words."""
    model = raw["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unlike("its pieces are marked by where they stand in a word")
    normalizers = [step["type"] for step in _steps(raw["normalizer"], "normalizers")]
    if normalizers == ["NFC"]:
        on_event(Note("The tokenizer composes characters (NFC) before it cuts them, and llama.cpp does not.", "info"))
    elif normalizers:
        raise _unlike(f"it rewrites texts ({', '.join(normalizers)})")
    steps = list(_steps(raw["pre_tokenizer"], "pretokenizers"))
    last = steps.pop() if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unlike("it is not byte-level, or begins each text with a space")
    whole = bool(model.get("ignore_merges"))
    if last.get("use_regex", True):
        if not steps and not whole:
            return "gpt-2"
        if [(step["type"], step.get("individual_digits")) for step in steps] == [("Digits", True)] and not whole:
            return "smollm"
    elif len(steps) == 1 and steps[0]["type"] == "Split":
        split = steps[0]
        name = _SPLITS.get((split["pattern"].get("Regex", ""), whole))
        if name and split["behavior"] == "Isolated" and not split["invert"]:
            return name
    raise _unlike("it cuts texts into words by a rule that has no name in llama.cpp, or that is not known here")


def _sentencepiece_prefix(raw: dict[str, Any], on_event: Listener) -> bool:
    """Whether a tokenizer with SentencePiece's bytes begins each text with a space.

    Raises:
        Unsupported: it does something to texts that llama.cpp does not.
    """
    prefixed, marked = False, False
    for step in _steps(raw["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefixed = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            marked = True
        else:
            raise _unlike(f"it rewrites texts ({step['type']})")
    for step in _steps(raw["pre_tokenizer"], "pretokenizers"):
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split", True):
            raise _unlike(f"it cuts texts into words ({step['type']})")
        marked, prefixed = True, prefixed or step["prepend_scheme"] != "never"
        if step["prepend_scheme"] == "first":
            text = "llama.cpp puts a space behind every control token of a text, and this tokenizer at its begin only."
            on_event(Note(text, "info"))
    if not marked:
        raise _unlike("it does not mark spaces")
    return prefixed


def _scored(vocabulary: Vocabulary, raw: dict[str, Any], folder: Path, unknown: str | None) -> Vocabulary:
    """The same with scores and with the types that SentencePiece has besides."""
    types = list(vocabulary.types)
    for i, text in enumerate(vocabulary.texts):
        if types[i] == TokenType.NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = int(TokenType.BYTE)
        elif text == unknown:
            types[i] = int(TokenType.UNKNOWN)
    typed = Vocabulary(vocabulary.texts, types)
    scores = _scores_of_model(folder / "tokenizer.model", typed) or _scores_of_merges(typed, raw)
    return Vocabulary(vocabulary.texts, types, scores)


def _scores_of_model(path: Path, vocabulary: Vocabulary) -> list[float] | None:
    """The scores that tokenizer.model has; None where there is no such file."""
    if not path.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise FormatError(f"{path} is no SentencePiece model.", "Copy it anew, or remove it.") from error
    scores = [-1000.0] * len(vocabulary.texts)
    for i in range(min(model.get_piece_size(), len(scores))):
        if vocabulary.types[i] in (TokenType.NORMAL, TokenType.BYTE):
            if model.id_to_piece(i) != vocabulary.texts[i]:
                raise FormatError(f"{path} has another token {i} than tokenizer.json.", "Remove the one that is wrong.")
            scores[i] = float(model.get_score(i))
    return scores


def _scores_of_merges(vocabulary: Vocabulary, raw: dict[str, Any]) -> list[float]:
    """Scores in the order of the merges: what is joined first has the best."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(raw["model"])):
        first.setdefault(left + right, rank)
    scores = [-1000.0] * len(vocabulary.texts)
    for i, text in enumerate(vocabulary.texts):
        if text in first:
            scores[i] = -float(first[text])
        elif vocabulary.types[i] == TokenType.NORMAL and len(text) > 1:
            # llama.cpp would join to it whatever stands side by side and gives its text.
            raise _unlike(f"no merge makes its token {text!r}, and there is no tokenizer.model")
    return scores


def _add_specials(metadata: Metadata, tokenizer: Any, config: Any) -> None:
    for kind, key in (
        ("bos", Keys.Tokenizer.BOS_ID),
        ("eos", Keys.Tokenizer.EOS_ID),
        ("unk", Keys.Tokenizer.UNK_ID),
        ("pad", Keys.Tokenizer.PAD_ID),
    ):
        value = getattr(tokenizer, f"{kind}_token_id", None)
        if value is None:
            value = getattr(config, f"{kind}_token_id", None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < config.vocab_size:
            metadata.integer(key, value)
        elif kind == "eos":  # llama.cpp would take a number of its own for it
            raise _unlike("no token ends a text")
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                metadata.flag(Keys.Tokenizer.ADD_BOS, begins)
                metadata.flag(Keys.Tokenizer.ADD_EOS, ends)
                return
    raise _unlike("it puts other tokens around a text than one at its begin and one at its end")


def _add_templates(metadata: Metadata, template: Any, on_event: Listener) -> None:
    """The default template, and the others as far as their names can be part of a key."""
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    if not all(isinstance(text, str) for text in named.values()):
        raise Unsupported("The tokenizer's chat_template is no text.", "Mend tokenizer_config.json of the base.")
    if len(named.get("default", "")) > _TEMPLATE:
        raise Unsupported("The tokenizer's chat_template is too long to be one.", "Mend it in the base, or remove it.")
    others = [name for name in named if name != "default"]
    kept = [name for name in others if _TEMPLATE_NAME.fullmatch(name) and len(named[name]) <= _TEMPLATE][:_TEMPLATES]
    if left := [name for name in others if name not in kept]:
        listed = ", ".join(repr(name[:40]) for name in left[:3]) + (", ..." if len(left) > 3 else "")
        on_event(Note(f"{len(left)} of the tokenizer's chat templates have no place in a GGUF file: {listed}."))
    for name in [*(["default"] if "default" in named else []), *kept]:
        key = Keys.Tokenizer.CHAT_TEMPLATE if name == "default" else Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
        metadata.text(key, named[name])
    if kept:
        metadata.texts(Keys.Tokenizer.CHAT_TEMPLATES, kept)


def _steps(step: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, of a single step, or of none."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[inside]:
            yield from _steps(inner, inside)
    else:
        yield step


def _unlike(what: str) -> Unsupported:
    return Unsupported(f"llama.cpp has no tokenizer like this base's: {what}.", _HINT)
