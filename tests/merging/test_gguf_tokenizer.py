"""Tokenizers of GGUF files: the same ids in transformers' reader; what llama.cpp has no name for is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from adapterhub_lite.errors import FormatError, Unsupported
from adapterhub_lite.events import Event, Note
from adapterhub_lite.merging.gguf_model import write_gguf
from adapterhub_lite.merging.gguf_tokenizer import _add_templates
from adapterhub_lite.merging.gguf_writer import Metadata
from tests.merging import gguf_models as tiny

ESCAPES = ["<|im_start|>user\nHi<|im_end|>", "x<tool>y", "<|endoftext|>"]


def written(tmp_path: Path, tokenizer: Any, events: list[Event] | None = None, **config: Any) -> Path:
    """A file of a tiny Llama with this tokenizer."""
    folder = tmp_path / "base"
    tiny.model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    listener = events.append if events is not None else lambda event: None
    write_gguf(tiny.plan_of(folder, **config), folder, tmp_path / "model.gguf", on_event=listener)
    return tmp_path / "model.gguf"


def from_gguf(path: Path) -> Any:
    """The file's tokenizer in plain transformers."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rule", tiny.RULES)
def test_ids_are_those_of_the_base(tmp_path, rule, bos):
    own = tiny.tokenizer(rule, bos=bos)
    path = written(tmp_path, own)
    fields, _, _ = tiny.read(path)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == rule
    got = from_gguf(path)
    if rule in ("smollm", "gpt-2"):  # transformers takes all names that it does not know for one
        got.backend_tokenizer.pre_tokenizer = tiny.words(rule)
    texts = [*tiny.TEXTS, *ESCAPES]
    assert [got(t, add_special_tokens=False)["input_ids"] for t in texts] == [
        own(t, add_special_tokens=False)["input_ids"] for t in texts
    ]
    assert [got.decode(own(t)["input_ids"]) for t in texts] == [own.decode(own(t)["input_ids"]) for t in texts]
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (bos, False)
    assert fields["tokenizer.ggml.add_space_prefix"] is False


def test_rules_tell_the_texts_apart():
    cut = {rule: [tiny.tokenizer(rule)(t)["input_ids"] for t in tiny.TEXTS] for rule in ("gpt-2", "smollm", "qwen2")}
    assert len({json.dumps(ids) for ids in cut.values()}) == len(cut)


def test_tokens_types_ids_and_template(tmp_path):
    own = tiny.tokenizer("smollm")
    fields, _, _ = tiny.read(written(tmp_path, own))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = len(own)
    assert len(tokens) == len(types) == tiny.SIZE > size
    assert tokens[:size] == own.convert_ids_to_tokens(list(range(size)))
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, tiny.SIZE)]
    assert types[: len(tiny.SPECIALS)] == [3] * len(tiny.SPECIALS)
    assert types[own.convert_tokens_to_ids("<tool>")] == 4
    assert set(types[len(tiny.SPECIALS) : size - 1]) == {1}
    assert set(types[size:]) == {5}
    kinds = ("bos", "eos", "padding", "unknown")
    assert [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in kinds] == [1, 2, 3, 0]
    assert fields["tokenizer.chat_template"] == tiny.TEMPLATE
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    assert merges == [tuple(m) for m in json.loads(own.backend_tokenizer.to_str())["model"]["merges"]]


def test_ids_that_the_tokenizer_does_not_name_come_from_the_configuration(tmp_path):
    own = tiny.tokenizer("qwen2")
    own.bos_token = None
    fields, _, _ = tiny.read(written(tmp_path, own, bos_token_id=7))
    assert fields["tokenizer.ggml.bos_token_id"] == 7
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_a_composing_tokenizer_is_told(tmp_path):
    events: list[Event] = []
    written(tmp_path, tiny.tokenizer("qwen2"), events)
    assert any(isinstance(e, Note) and "NFC" in e.text for e in events)


def test_several_templates_are_kept(tmp_path):
    own = tiny.tokenizer()
    own.chat_template = {"default": "a{{ messages }}", "tools": "b{{ messages }}"}
    fields, _, _ = tiny.read(written(tmp_path, own))
    assert fields["tokenizer.chat_template"] == "a{{ messages }}"
    assert fields["tokenizer.chat_template.tools"] == "b{{ messages }}"


def test_names_of_templates_that_are_no_part_of_a_key_are_left_out_and_said():
    metadata, events = Metadata(), []
    odd = ["", "a.b", "a b", "a\nb", "\u00e4", "x" * 65, "long"]
    texts = dict.fromkeys(odd, "t") | {f"n{i}": "t" for i in range(40)}
    _add_templates(metadata, {"default": "d", **texts, "long": "t" * ((1 << 20) + 1)}, events.append)
    told = [event.text for event in events if isinstance(event, Note)]
    assert told == ["15 of the tokenizer's chat templates have no place in a GGUF file: '', 'a.b', 'a b', ...."]
    assert len(metadata) == 34  # the default, 32 others and the list of their names
    assert b"tokenizer.chat_template.n31" in metadata.packed()


def test_a_template_without_end_is_refused():
    with pytest.raises(Unsupported, match="too long"):
        _add_templates(Metadata(), "x" * ((1 << 20) + 1), lambda event: None)


def test_a_tokenizer_of_bytes_has_an_empty_list_of_merges(tmp_path):
    from tests.tiny import tokenizer

    path = written(tmp_path, tokenizer())
    got = from_gguf(path)
    assert got("one 1")["input_ids"] == tokenizer()("one 1")["input_ids"]


def broken(change: Any, rule: str = "gpt-2", **given: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with something changed that llama.cpp does not know."""
    raw = Tokenizer.from_str(tiny.tokenizer(rule).backend_tokenizer.to_str())
    change(raw)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"eos_token": "<|im_end|>", **given})


def split_on(pattern: str, behavior: str = "isolated") -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), bytes_only])


def around(single: str) -> Any:
    ids = [("<|im_start|>", 1), ("<|im_end|>", 2), ("<pad>", 3)]
    return processors.TemplateProcessing(single=single, special_tokens=ids)


UNKNOWN = {
    "an unknown rule": (lambda raw: setattr(raw, "pre_tokenizer", split_on(r"\w+|\W+")), "no name in llama.cpp"),
    "removed words": (
        lambda raw: setattr(raw, "pre_tokenizer", split_on(tiny.WORDS % "", "removed")),
        "no name in llama.cpp",
    ),
    "digits in groups": (
        lambda raw: setattr(
            raw,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
        "no name in llama.cpp",
    ),
    "a space first": (lambda raw: setattr(raw, "pre_tokenizer", pre_tokenizers.ByteLevel()), "begins each text"),
    "no bytes": (lambda raw: setattr(raw, "pre_tokenizer", pre_tokenizers.Whitespace()), "not byte-level"),
    "lower case": (lambda raw: setattr(raw, "normalizer", normalizers.Lowercase()), "Lowercase"),
    "other tokens around": (lambda raw: setattr(raw, "post_processor", around("<pad> $A")), "other tokens around"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, case):
    change, reason = UNKNOWN[case]
    with pytest.raises(Unsupported, match=reason):
        written(tmp_path, broken(change))
    assert not (tmp_path / "model.gguf").exists()


def test_taking_whole_words_must_be_what_the_name_means(tmp_path):
    def whole(raw: Tokenizer) -> None:
        raw.model = models.BPE(raw.get_vocab(), [], ignore_merges=True)

    with pytest.raises(Unsupported, match="has no name in"):
        written(tmp_path, broken(whole, "qwen2"))


def test_other_kinds_of_tokenizers_and_none_are_refused(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})))
    with pytest.raises(Unsupported, match="WordPiece"):
        written(tmp_path, words)
    (tmp_path / "base" / "tokenizer.json").unlink()
    plan = tiny.plan_of(tmp_path / "base")
    with pytest.raises(Unsupported, match="no tokenizer"):
        write_gguf(plan, tmp_path / "base", tmp_path / "model.gguf")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="could not be loaded"):
        write_gguf(plan, tmp_path / "base", tmp_path / "model.gguf")


def test_a_tokenizer_without_an_end_or_of_another_model_is_refused(tmp_path):
    nothing: Any = {"eos_token": None}
    with pytest.raises(Unsupported, match="no token ends"):
        written(tmp_path, broken(lambda raw: None, **nothing), eos_token_id=None)
    more = tiny.tokenizer()
    more.add_tokens([f"<more{i}>" for i in range(20)])
    with pytest.raises(Unsupported, match="an id 384"):
        written(tmp_path, more)


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A tokenizer joins the pieces with the best score first.",
    "Texts have  two  blanks, naïve words, and numbers: 3.14, 42.",
    "the other the them then there their these",
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte fallback, as Llama 2 has one."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "texts.txt").write_text("\n".join(SENTENCES * 20), "utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def of_pieces(pieces: Path) -> Any:
    """What transformers makes of a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    scores = {model.id_to_piece(i): model.get_score(i) for i in range(model.get_piece_size())}
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    skipped = [piece for i, piece in enumerate(scores) if i < 3 or model.is_byte(i)]
    merges = generate_merges(vocabulary, scores, skipped)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False, add_bos_token=True)


@pytest.mark.parametrize("with_model", [True, False])
def test_sentencepiece_ids_are_those_of_the_base(tmp_path, pieces, with_model):
    folder = tmp_path / "base"
    tiny.model("llama").save_pretrained(folder)
    own = of_pieces(pieces)
    own.save_pretrained(folder)
    if with_model:
        (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    events: list[Event] = []
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", on_event=events.append)
    assert any(isinstance(e, Note) and "space behind every control token" in e.text for e in events)
    fields, _, _ = tiny.read(tmp_path / "model.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    types = fields["tokenizer.ggml.token_type"]
    assert types.count(6) == 256
    assert types[:3] == [2, 3, 3]
    import sentencepiece

    truth = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    scores = fields["tokenizer.ggml.scores"]
    for text in [*SENTENCES, "🦙 über", "  they  ", "theother", ""]:
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert joined(text, fields["tokenizer.ggml.tokens"], scores) == truth.encode(text), text
        assert truth.encode(text) == ids or text.startswith(" "), text
    if with_model:
        assert scores[3:360] == pytest.approx([truth.get_score(i) for i in range(3, 360)])
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def joined(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's way with SentencePiece: join the neighbours whose token has the best score, the left ones first."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_a_vocabulary_that_merges_do_not_make_needs_its_model(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "b": 4, "ab": 5}
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "always", split=False)
    with pytest.raises(Unsupported, match="no merge makes its token 'ab'"):
        written(tmp_path, PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))
