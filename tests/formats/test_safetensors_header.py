from __future__ import annotations

import io
import json
import os
import pickle
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from adapterhub_lite.errors import FormatError, NotFound, UnsafeFile
from adapterhub_lite.formats.safetensors_header import parse_header, read_header
from tests.formats.build import f32, raw_safetensors, safetensors


def tensor(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_names_shapes_offsets_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": f32(2, 3), "b.c-d_1": f32(4)}, {"format": "pt"}))
    header = read_header(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b.c-d_1": (4,)}
    assert header.tensors["b.c-d_1"].begin == 24
    assert header.tensors["b.c-d_1"].end == 40
    assert header.tensors["a"].elements == 6
    assert header.metadata == {"format": "pt"}
    assert path.read_bytes()[header.span("a")] == f32(2, 3)[2]
    assert header == parse_header(path.read_bytes())


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cannot hold"),
    "seven bytes": (b"1234567", "cannot hold"),
    "length beyond the file": (raw_safetensors("{}")[:-1], "cannot hold"),
    "length 2**63": (b"\0" * 7 + b"\x80" + b"{}", "cannot hold"),
    "not JSON": (raw_safetensors("{nope}"), "not valid JSON"),
    "not an object": (raw_safetensors("[]"), "does not begin"),
    "leading space": (raw_safetensors(" {}"), "does not begin"),
    "invalid UTF-8": (raw_safetensors(b'{"\xff":1}'), "not valid JSON"),
    "key twice": (raw_safetensors('{"a":%s,"a":%s}' % ((json.dumps(tensor()),) * 2), bytes(4)), "occurs twice"),
    "field twice": (
        raw_safetensors('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "occurs twice",
    ),
    "trailing byte": (raw_safetensors(json.dumps({"a": tensor()}), bytes(5)), "end at byte 4"),
    "truncated body": (raw_safetensors(json.dumps({"a": tensor()}), bytes(3)), "end at byte 4"),
    "hole": (raw_safetensors(json.dumps({"a": tensor(), "b": tensor(offsets=[8, 12])}), bytes(12)), "hole"),
    "hole at the start": (raw_safetensors(json.dumps({"a": tensor(offsets=[4, 8])}), bytes(8)), "hole"),
    "overlap": (raw_safetensors(json.dumps({"a": tensor(), "b": tensor(offsets=[2, 6])}), bytes(6)), "overlaps"),
    "same bytes twice": (raw_safetensors(json.dumps({"a": tensor(), "b": tensor()}), bytes(4)), "overlaps"),
    "shape and bytes disagree": (raw_safetensors(json.dumps({"a": tensor(shape=[2])}), bytes(4)), "needs another"),
    "shape overflow": (
        raw_safetensors(json.dumps({"a": tensor(shape=[2**40, 2**40, 0], offsets=[0, 0])})),
        "too large",
    ),
    "huge dimension": (raw_safetensors(json.dumps({"a": tensor(shape=[0, 2**63], offsets=[0, 0])})), "natural"),
    "negative offset": (raw_safetensors(json.dumps({"a": tensor(offsets=[-4, 0])})), "not an offset"),
    "minus zero": (raw_safetensors('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "not an offset"),
    "float offset": (raw_safetensors(json.dumps({"a": tensor(offsets=[0, 4.0])}), bytes(4)), "natural"),
    "boolean offset": (raw_safetensors(json.dumps({"a": tensor(offsets=[False, 4])}), bytes(4)), "natural"),
    "three offsets": (raw_safetensors(json.dumps({"a": tensor(offsets=[0, 4, 4])}), bytes(4)), "natural"),
    "end before begin": (raw_safetensors(json.dumps({"a": tensor(offsets=[4, 0])}), bytes(4)), "needs another"),
    "unknown dtype": (raw_safetensors(json.dumps({"a": tensor(dtype="Q4")}), bytes(4)), "unknown dtype"),
    "dtype is a list": (raw_safetensors(json.dumps({"a": tensor(dtype=[])}), bytes(4)), "unknown dtype"),
    "extra field": (raw_safetensors(json.dumps({"a": {**tensor(), "x": 1}}), bytes(4)), "exactly"),
    "missing field": (raw_safetensors('{"a":{"dtype":"F32","shape":[1]}}', bytes(4)), "exactly"),
    "metadata of numbers": (raw_safetensors('{"__metadata__":{"a":1}}'), "object of strings"),
    "metadata null": (raw_safetensors('{"__metadata__":null}'), "object of strings"),
    "half a surrogate": (raw_safetensors('{"__metadata__":{"a":"\\ud800"}}'), "surrogate"),
    "path as key": (raw_safetensors(json.dumps({"../../x": tensor()}), bytes(4)), "tensor name"),
    "dots in key": (raw_safetensors(json.dumps({"a..b": tensor()}), bytes(4)), "tensor name"),
    "NUL in key": (raw_safetensors(json.dumps({"a\0": tensor()}), bytes(4)), "tensor name"),
    "key is not ASCII": (raw_safetensors(json.dumps({"ä": tensor()}), bytes(4)), "tensor name"),
    "newline after key": (raw_safetensors(json.dumps({"a\n": tensor()}), bytes(4)), "tensor name"),
    "long key": (raw_safetensors(json.dumps({"a" * 513: tensor()}), bytes(4)), "tensor name"),
    "NaN": (raw_safetensors('{"a":NaN}'), "not a JSON number"),
    "deep": (raw_safetensors('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested deeper"),
    "deeper than it should be": (raw_safetensors('{"a":[[[[[]]]]]}'), "nested deeper"),
}


@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        read_header(path)
    with pytest.raises(FormatError, match=words):
        parse_header(data)
    assert len(str(caught.value)) < 600


def test_limits_are_checked_before_the_header_is_read(tmp_path: Path) -> None:
    data = safetensors({f"t{index}": f32(1) for index in range(30)})
    length = int.from_bytes(data[:8], "little")
    parse_header(data, limit=length, max_tensors=30)
    with pytest.raises(FormatError, match=f"header of {length} bytes; the limit is {length - 1}"):
        parse_header(data, limit=length - 1)
    with pytest.raises(FormatError, match="30 tensors; the limit is 29"):
        parse_header(data, max_tensors=29)
    sparse = tmp_path / "big"
    with sparse.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)
    before = time.perf_counter()
    with pytest.raises(FormatError, match="the limit is 4194304"):
        read_header(sparse)
    assert time.perf_counter() - before < 0.05


def test_pickles_and_archives_are_named_as_such(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "x")
    for data in (pickle.dumps({"a": [1] * 99}), archive.getvalue()):
        with pytest.raises(UnsafeFile, match="pickle or an archive"):
            parse_header(data)


def test_a_header_of_640_bytes_is_no_pickle() -> None:
    # Its length begins with the bytes 80 02, as pickles of protocol 2 do.
    data = raw_safetensors("{}".ljust(640))
    assert data[:2] == b"\x80\x02"
    assert parse_header(data).tensors == {}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(safetensors({"a": f32(1)}))
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        read_header(tmp_path / "link")
    for other in (tmp_path / "fifo", tmp_path):
        with pytest.raises(UnsafeFile, match="regular file"):
            read_header(other)
    with pytest.raises(NotFound):
        read_header(tmp_path / "absent")


NUMBERS = st.one_of(st.integers(-2, 20), st.sampled_from([0, 4, 8, 2**31, 2**63, 2**64, 0.0, 4.0, True, None, "4"]))
INFOS = st.one_of(
    st.builds(
        tensor,
        st.lists(NUMBERS, max_size=3),
        st.lists(NUMBERS, min_size=1, max_size=3),
        st.sampled_from(["F32", "BF16", "U8", "F4", "f32", 1]),
    ),
    st.builds(
        lambda count, begin: tensor([count], [begin, begin + count], "U8"),
        st.integers(0, 8),
        st.sampled_from([0, 1, 4, 8]),
    ),
    NUMBERS,
)
KEYS = st.one_of(st.sampled_from(["a", "b", "c", "__metadata__", "", "../x"]), st.text(max_size=3))


def assert_no_wider_than_the_library(data: bytes) -> None:
    try:
        header = parse_header(data)
    except FormatError:
        return
    found = {name: tuple(info["shape"]) for name, info in deserialize(data)}  # type: ignore[no-untyped-call]
    assert found == {name: info.shape for name, info in header.tensors.items()}


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(KEYS, INFOS, max_size=4), st.integers(0, 24))
def test_never_accepts_what_the_library_refuses_built(fields: dict[str, object], body: int) -> None:
    assert_no_wider_than_the_library(raw_safetensors(json.dumps(fields), bytes(body)))


SEED = safetensors({"a.lora_A.weight": f32(2, 3), "b": f32(2), "c": ("U8", [0], b"")}, {"format": "pt"})


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.binary(max_size=3), st.integers(0, 2)), min_size=1, max_size=4)
)
def test_never_accepts_what_the_library_refuses_mutated(edits: list[tuple[int, bytes, int]]) -> None:
    data = SEED
    for position, insert, delete in edits:
        data = data[:position] + insert + data[position + delete :]
    assert_no_wider_than_the_library(data)
    length = int.from_bytes(SEED[:8], "little")
    head = bytearray(SEED[8 : 8 + length])
    for position, insert, delete in edits:
        head[position % length : position % length + delete] = insert
    assert_no_wider_than_the_library(raw_safetensors(bytes(head), SEED[8 + length :]))


def test_the_seed_is_accepted_by_both() -> None:
    assert len(parse_header(SEED).tensors) == len(deserialize(SEED)) == 3  # type: ignore[no-untyped-call]
    with pytest.raises(SafetensorError):
        deserialize(SEED + b"\0")  # type: ignore[no-untyped-call]
