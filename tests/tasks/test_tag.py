"""Tagging: spans and figures as conlleval counts them, words as tokens, and rows that are refused with their line."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adapterhub_lite.errors import DataError, Unsupported
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import Rows
from adapterhub_lite.tasks.spans import span_scores, spans
from adapterhub_lite.tasks.task import IGNORED
from adapterhub_lite.tasks.words import pieces, split_words
from tests import tiny

PARTS = {"<cls>": 0, "<sep>": 1, "<unk>": 2, "play": 3, "##ing": 4, "##s": 5, "in": 6, "rome": 7, ".": 8, "a": 9}


def wordpieces() -> PreTrainedTokenizerFast:
    """As BERT's: pieces of words, lower case, special tokens at both ends."""
    raw = Tokenizer(models.WordPiece(PARTS, unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 0), ("<sep>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", cls_token="<cls>", sep_token="<sep>")


def rows(*items: dict) -> Rows:
    return Rows(tuple(items), tuple(range(1, len(items) + 1)), "some.jsonl", "0" * 64)


def row(words: str, tags: str) -> dict:
    return {"w": words.split(), "t": tags.split()}


def tag(**changes):
    return make_task({"type": "tag", "tokens": "w", "tags": "t", **changes})


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """The chunks of conlleval, from its two tables of which tag after which one ends and begins a chunk."""
    found, begin = set(), None
    prev, prev_type = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        part, _, kind = tag.partition("-")
        changes = prev_type != kind
        ends = (prev in "BI" and part in "BSO") or prev in "ES" or (prev != "O" and changes)
        begins = part in ("B", "S") or (prev in "ESO" and part in "EI") or (part != "O" and changes)
        if ends and begin is not None:
            found.add((prev_type, begin, i))
            begin = None
        if begins:
            begin = i
        prev, prev_type = part, kind
    return found


TAGS = st.lists(st.sampled_from(["O", *(f"{p}-{t}" for p in "BIES" for t in ("PER", "LOC"))]), max_size=8)


class TestSpans:
    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            ("O B-PER I-PER O", [("PER", 1, 3)]),
            ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
            ("O I-PER I-PER", [("PER", 1, 3)]),
            ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
            ("I-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
            ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
            ("B-PER I-PER E-PER S-PER E-PER", [("PER", 0, 3), ("PER", 3, 4), ("PER", 4, 5)]),
            ("B-PER L-PER U-PER", [("PER", 0, 2), ("PER", 2, 3)]),
            ("B-a-b I-a-b", [("a-b", 0, 2)]),
            ("per per O loc per", [("per", 0, 2), ("loc", 3, 4), ("per", 4, 5)]),
            ("ex-wife ex-wife", [("ex-wife", 0, 2)]),
            ("", []),
        ],
    )
    def test_by_hand(self, tags: str, expected: list):
        assert spans(tags.split()) == expected

    @given(TAGS)
    def test_as_conlleval(self, tags: list[str]):
        found = spans(tags)
        assert set(found) == conlleval(tags)
        assert len(set(found)) == len(found)

    @given(st.lists(st.tuples(TAGS, st.randoms(use_true_random=False)), min_size=1, max_size=4))
    def test_scores_as_counted_one_by_one(self, texts):
        expected = [tags for tags, _ in texts]
        answers = [[chance.choice([*tags, "O", "I-PER"]) for _ in tags] for tags, chance in texts]
        both = [conlleval(a) & conlleval(e) for a, e in zip(answers, expected, strict=True)]
        right = [(i, span) for i, some in enumerate(both) for span in some]
        said, true = (sum(len(conlleval(t)) for t in some) for some in (answers, expected))
        precision = len(right) / said if said else 0
        recall = len(right) / true if true else 0
        f1 = 2 * precision * recall / (precision + recall) if right else 0
        words = [pair for a, e in zip(answers, expected, strict=True) for pair in zip(a, e, strict=True)]
        accuracy = sum(a == e for a, e in words) / len(words) if words else 0
        found = span_scores(answers, expected)
        assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy})

    def test_a_span_with_a_wrong_end_is_wrong_twice(self):
        found = span_scores([["B-P", "O", "B-L"]], [["B-P", "I-P", "B-L"]])
        assert found == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 2 / 3})

    def test_spans_do_not_reach_from_one_text_to_the_next(self):
        assert span_scores([["B-P"], ["I-P"]], [["B-P"], ["B-P"]])["f1"] == 1


class TestWords:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Anna lives in Rome.", "Anna|lives|in|Rome|."),
            ('He said: "Oslo (or Bergen)?!"', 'He|said|:|"|Oslo|(|or|Bergen|)|?|!|"'),
            ("it's 3.5 e-mail #tag @you $5 U.S. ...", "it's|3.5|e-mail|#tag|@you|$5|U.S|.|..."),
            (" \n\t ", ""),
            ("\u00abRiga\u00bb", "\u00ab|Riga|\u00bb"),
            ("))a((", "))a(("),
        ],
    )
    def test_split(self, text: str, words: str):
        assert "|".join(text[b:e] for b, e in split_words(text)) == words

    @given(st.text(max_size=30))
    def test_nothing_but_white_space_is_left_out(self, text: str):
        found = split_words(text)
        assert "".join(text[b:e] for b, e in found) == "".join(text.split())
        assert all(b < e for b, e in found)
        assert all(one[1] <= other[0] for one, other in pairwise(found))


class TestPieces:
    def test_as_the_tokenizer_does_with_words(self):
        tokenizer = wordpieces()
        words = ["Playing", "in", "Rome.", "plays", "\u200d", "a"]
        (found,) = pieces(words, tokenizer, 64)
        whole = tokenizer(words, is_split_into_words=True)
        assert found.ids == whole["input_ids"]
        first: dict[int, int] = {}
        for place, word in enumerate(whole.word_ids()):
            if word is not None:
                first.setdefault(word, place)
        assert dict(found.first) == first == {0: 1, 1: 3, 2: 4, 3: 6, 5: 8}

    def test_a_tokenizer_that_tells_a_space_is_given_one(self):
        plain, spaced = tiny.tokenizer("encoder"), tiny.tokenizer("encoder")
        spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        expected = spaced(["ab", "c"], is_split_into_words=True)["input_ids"]
        for tokenizer in (plain, spaced):
            (found,) = pieces(["ab", "c"], tokenizer, 64)
            assert found.ids == expected
            assert found.first == [(0, 1), (1, 4)]

    @given(st.lists(st.sampled_from(["playing", "plays", "a", "\u200d", "rome", "in.", "...."]), max_size=12))
    def test_long_texts_lose_no_word(self, words: list[str]):
        tokenizer = wordpieces()
        (whole,) = pieces(words, tokenizer, 1000) or [None]
        found = pieces(words, tokenizer, 5)
        assert [i for piece in found for i, _ in piece.first] == ([i for i, _ in whole.first] if whole else [])
        for piece in found:
            assert len(piece.ids) <= 5
            assert (piece.ids[0], piece.ids[-1]) == (0, 1)
            for index, place in piece.first:
                assert piece.ids[place] == tokenizer(words[index], add_special_tokens=False)["input_ids"][0]

    def test_no_room(self):
        with pytest.raises(DataError, match="no room"):
            pieces(["a"], wordpieces(), 2)


class TestTag:
    def test_labels_are_learnt_in_order(self):
        task = tag()
        task.prepare(rows(row("x y", "O B-P"), row("z", "B-L")))
        assert task.labels == ["B-L", "B-P", "O"]
        assert make_task(task.config).labels == task.labels
        assert task.config["metrics"][0] == task.primary_metric == "f1"

    def test_examples_label_the_first_token_of_a_word(self):
        task = tag(labels=["O", "B-L"])
        found = task.examples(rows(row("playing in rome .", "O O B-L O")), wordpieces(), "encoder", 16)
        assert [e.ids for e in found] == [[0, 3, 4, 6, 7, 8, 1]]
        assert [e.labels for e in found] == [[IGNORED, 0, IGNORED, 0, 1, 0, IGNORED]]

    def test_a_row_longer_than_max_length_is_more_than_one_example(self):
        task = tag(labels=["O", "B-L"])
        found = task.examples(rows(row("playing in rome .", "O O B-L O")), wordpieces(), "encoder", 5)
        assert [(e.ids, e.labels) for e in found] == [
            ([0, 3, 4, 6, 1], [IGNORED, 0, IGNORED, 0, IGNORED]),
            ([0, 7, 8, 1], [IGNORED, 1, 0, IGNORED]),
        ]

    def test_numbers_count_into_the_labels(self):
        task = tag(labels=["O", "B-L"])
        some = rows({"w": ["in", "rome"], "t": [0, 1]})
        task.prepare(some)
        assert task.expected(some, 0) == ["O", "B-L"]
        assert task.targets(some) == [[0, 1]]

    def test_metrics_of_answers(self):
        some = rows(row("a b c", "O B-L I-L"), row("d", "O"))
        task = tag(labels=["O", "B-L", "I-L"])
        assert task.metrics(some, ["O B-L I-L", "O"])["f1"] == 1
        assert task.metrics(some, ["O B-L", ""]) == pytest.approx(
            {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0.75}
        )

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            (row("a b", "O"), "line 2: 2 words and 1 tags"),
            ({"w": "a b", "t": ["O", "O"]}, "line 2: 'w' is no list"),
            ({"w": ["a"], "t": "O"}, "line 2: 't' is no list"),
            ({"w": ["a"]}, "line 2: no field 't'"),
            ({"w": ["a"], "t": ["B L"]}, "line 2: 'B L' is no tag"),
            ({"w": ["a"], "t": [""]}, "line 2: '' is no tag"),
            ({"w": ["a"], "t": [7]}, "line 2: tag 7 is a number"),
            (row("a", "B-X"), "line 2: tag 'B-X' is unknown"),
        ],
    )
    def test_bad_rows_are_named(self, bad: dict, why: str):
        task = tag(labels=["O", "B-L"])
        with pytest.raises(DataError, match=why):
            task.prepare(rows(row("a b", "O B-L"), bad))

    def test_numbers_without_names_are_refused(self):
        with pytest.raises(DataError, match="line 1: tag 0 is a number"):
            tag().prepare(rows({"w": ["a"], "t": [0]}))

    def test_one_tag_alone_is_refused(self):
        with pytest.raises(DataError, match=r"1 tag\(s\)"):
            tag().prepare(rows(row("a b", "O O")))

    def test_other_bases_are_refused(self):
        with pytest.raises(Unsupported, match="encoder"):
            tag(labels=["O", "B-L"]).examples(rows(row("a", "O")), tiny.tokenizer(), "causal", 16)

    def test_rows_without_words(self):
        task = tag(labels=["O", "B-L"])
        assert len(task.examples(rows(row("", ""), row("a", "O")), wordpieces(), "encoder", 16)) == 1
        with pytest.raises(DataError, match="no words"):
            task.examples(rows(row("", "")), wordpieces(), "encoder", 16)

    def test_a_card_without_columns_is_not_complete(self):
        with pytest.raises(Unsupported, match="tags"):
            make_task({"type": "tag", "tokens": "w"})
