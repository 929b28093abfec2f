from __future__ import annotations

import gzip
import io
import os
import re
import stat
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import AdapterHubError, FormatError, NotFound, UnsafeFile, Unsupported
from adapterhub_lite.formats.archive import archive_kind, is_archive, read_archive, tar_bytes
from adapterhub_lite.formats.archive_members import MAX_MEMBERS, SLACK
from adapterhub_lite.formats.archive_streams import CHUNK
from tests.formats.archives import (
    BLOCK,
    END,
    FILES,
    GNU,
    Zipped,
    checked,
    file,
    good,
    good_zip,
    gzip_bomb,
    head,
    pax,
    raw_zip,
    with_tarfile,
    with_zipfile,
    zip_of_a_pipe,
)
from tests.fuzz.archive import LIMITS, by_standard_library, fuzz

CONFIG, WEIGHTS, CARD = LIMITS
TOTAL = sum(LIMITS.values()) + SLACK
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def read(folder: Path, data: bytes) -> tuple[dict[str, bytes], list[str]]:
    """What `read_archive` makes of `data`; nothing else may appear beside it."""
    path = folder / "x.bin"  # names tell nothing
    path.write_bytes(data)
    try:
        return read_archive(path, LIMITS)
    finally:
        assert [entry.name for entry in folder.iterdir()] == ["x.bin"]
        assert path.read_bytes() == data


def zip64_at_the_content() -> bytes:
    """An ordinary directory, and a local header whose two sizes (at 18 and 22) point to a zip64 field."""
    whole = raw_zip(*good_zip())
    return whole[:18] + struct.pack("<2L", 0xFFFFFFFF, 0xFFFFFFFF) + whole[26:]


def peak_of(path: Path, error: type[AdapterHubError], words: str) -> int:
    """Memory that refusing an archive takes, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words):
            read_archive(path, LIMITS)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# What is read


@pytest.mark.parametrize("folder", ["", "my-lora", "./my-lora", "an adapter of 20 letters and more " * 4 + "ä"])
@pytest.mark.parametrize("form", FORMATS, ids=("ustar", "gnu", "pax"))
def test_tars_of_python(tmp_path: Path, form: int, folder: str) -> None:
    if form == tarfile.USTAR_FORMAT and len(folder) > 100:
        folder = folder[:100].rstrip()
    data = with_tarfile({**FILES, "README.md": b"hello"}, form, folder)
    assert read(tmp_path, data) == (FILES, ["README.md"])
    assert read(tmp_path, gzip.compress(data)) == (FILES, ["README.md"])


@pytest.mark.parametrize("folder", ["", "my-lora", "ädapter"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_of_python(tmp_path: Path, method: int, folder: str) -> None:
    data = with_zipfile({**FILES, "notes/README.md": b"hello"}, folder, method)
    assert read(tmp_path, data) == (FILES, ["notes/README.md"])


def test_a_zip_written_to_a_pipe_or_with_a_comment(tmp_path: Path) -> None:
    data = zip_of_a_pipe(FILES)
    assert struct.unpack_from("<H", data, 6)[0] & 8
    assert read(tmp_path, data) == (FILES, [])
    assert read(tmp_path, raw_zip(*good_zip(), comment=b"a comment")) == (FILES, [])


def test_contents_of_any_length(tmp_path: Path) -> None:
    for length in (*range(70), (1 << 16) - 1, 1 << 16, (1 << 16) + 1):
        files = {WEIGHTS: bytes(i % 251 for i in range(length))}
        for data in (with_zipfile(files), with_zipfile(files, method=zipfile.ZIP_STORED), b"".join(tar_bytes(files))):
            assert read(tmp_path, data)[0] == files
        assert read(tmp_path, gzip.compress(b"".join(tar_bytes(files))))[0] == files


def test_a_zip_that_says_a_name_in_both_ways(tmp_path: Path) -> None:
    name = "lesé.md".encode()
    extra = struct.pack("<2HBL", 0x7075, 5 + len(name), 1, zlib.crc32(name)) + name
    assert read(tmp_path, raw_zip(*good_zip(), Zipped(name, flags=0x800, extra=extra))) == (FILES, ["lesé.md"])


def test_an_archive_of_the_systems_tar(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "lora"
    (folder / "checkpoint-5").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
        (folder / "checkpoint-5" / name).write_bytes(b"another")
    for place, what in (("in", "lora"), ("in/lora", ".")):
        subprocess.run(["tar", "-czf", str(tmp_path / "x.tgz"), "-C", str(tmp_path / place), what], check=True)
        found, ignored = read_archive(tmp_path / "x.tgz", LIMITS)
        assert found == FILES
        assert ignored == ["checkpoint-5/", *(f"checkpoint-5/{name}" for name in FILES)]


def test_what_is_not_wanted_is_listed_and_may_lie_first(tmp_path: Path) -> None:
    others = file("adapter_model.bin") + file("checkpoint/" + WEIGHTS, b"old") + file("nö\u202e", b"") + file(b"\xff")
    more = file("__MACOSX/._x") + file("._lora") + head("./", 0, b"5") + head("v7/", 0, b"\0")
    found, ignored = read(tmp_path, pax({"comment": "git"}, b"g") + others + more + good() + END)
    assert found == FILES
    names = ["._lora", "__MACOSX/._x", "adapter_model.bin", f"checkpoint/{WEIGHTS}", "n\\xf6\\u202e", "\\udcff", "v7/"]
    assert sorted(name.strip("'") for name in ignored) == sorted(names)


def test_macos_puts_its_own_files_beside_the_top_folder(tmp_path: Path) -> None:
    data = file("._lora") + head("lora/", 0, b"5") + good("lora/") + file("lora/._x") + file("__MACOSX/lora/x")
    assert read(tmp_path, data + END) == (FILES, ["._lora", "._x", "__MACOSX/lora/x"])


def test_long_names_are_listed_in_short(tmp_path: Path) -> None:
    _, ignored = read(tmp_path, pax({"path": "a/" * 100 + "b"}) + file("cut") + good() + END)
    assert ignored == [ascii("a/" * 100 + "b")[:76] + "...'"]


def test_links_and_folders_are_no_archives(tmp_path: Path) -> None:
    real = tmp_path / "real.tar"
    real.write_bytes(good() + END)
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo")
    assert is_archive(real)
    for other in ("link", "fifo", "absent", "."):
        assert not is_archive(tmp_path / other)
        with pytest.raises(NotFound if other == "absent" else UnsafeFile):
            read_archive(tmp_path / other, LIMITS)


def test_kinds_are_told_by_content() -> None:
    starts = {"tar": good(), "gzip": gzip.compress(b""), "zip": raw_zip(*good_zip())}
    assert {kind: archive_kind(start[:BLOCK]) for kind, start in starts.items()} == {kind: kind for kind in starts}
    assert archive_kind(raw_zip()) == "zip"
    assert archive_kind(b"") is archive_kind(b"\x80\x04pickle") is None


# What is refused

ZIP64 = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
TARS: dict[str, tuple[bytes, type[AdapterHubError], str]] = {
    "absolute path": (file("/etc/" + CONFIG), UnsafeFile, "'/etc/adapter_config.json' has an absolute path"),
    "parent folder": (file("../" + CONFIG), UnsafeFile, r"has '\.\.' in its path"),
    "parent folder inside": (file("a/../../x"), UnsafeFile, r"has '\.\.'"),
    "parent folder, as a folder": (head("..", 0, b"5"), UnsafeFile, r"has '\.\.'"),
    "backslash": (file("..\\" + CONFIG), UnsafeFile, "backslash"),
    "drive": (file("C:" + CONFIG), UnsafeFile, "absolute path"),
    "drive after ./": (file("./C:/" + CONFIG), UnsafeFile, "absolute path"),
    "NUL in the name": (file(CONFIG.encode() + b"\0x"), UnsafeFile, "behind a NUL"),
    "NUL in a pax name": (pax({"path": CONFIG + "\0x"}) + file("x"), UnsafeFile, "control character"),
    "NUL in a long name": (file("L", b"a\0b\0", kind=b"L") + file("x"), UnsafeFile, "behind a NUL"),
    "newline": (file("a\nb"), UnsafeFile, r"'a\\nb' has a control character"),
    "C1 control": (file("a\x9bb"), UnsafeFile, "control character"),
    "256 characters": (pax({"path": "a" * 256}) + file("x"), UnsafeFile, "256 characters; the limit is 255"),
    "no name": (file(""), UnsafeFile, "has no name"),
    "folder without a name": (head("", 0, b"5"), UnsafeFile, "has no name"),
    "a name of dots": (file("./."), UnsafeFile, "has no name"),
    "file named as a folder": (file("a/"), UnsafeFile, "name of a folder"),
    "folder with content": (file("a/", kind=b"5"), UnsafeFile, "folder with content"),
    "V7 folder with content": (file("a/", kind=b"\0"), UnsafeFile, "folder with content"),
    "symbolic link": (head("a", 0, b"2", put={157: b"/etc/passwd"}), UnsafeFile, "'a' is a symbolic link"),
    "hard link": (head(WEIGHTS, 0, b"1", put={157: b"x"}), UnsafeFile, "is a hard link"),
    "long link": (file("L", b"target\0", kind=b"K"), UnsafeFile, "is a link"),
    "pax link": (pax({"linkpath": "x"}) + head("a", 0, b"2"), UnsafeFile, "is a link"),
    "fifo": (head("a", 0, b"6"), UnsafeFile, "is a fifo"),
    "character device": (head("a", 0, b"3"), UnsafeFile, "is a device"),
    "block device": (head("a", 0, b"4"), UnsafeFile, "is a device"),
    "GNU sparse": (head("a", 0, b"S"), UnsafeFile, "is a sparse file"),
    "pax sparse": (pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + file("a"), UnsafeFile, "sparse file"),
    "sparse name": (pax({"GNU.sparse.name": CONFIG}) + file("a"), UnsafeFile, "sparse file"),
    "sparse for all": (pax({"GNU.sparse.size": "9"}, b"g") + file("a"), UnsafeFile, "sparse file"),
    "unknown type": (head("a", 0, b"V"), UnsafeFile, "unknown type 'V'"),
    "contiguous": (file("a", kind=b"7"), UnsafeFile, "unknown type '7'"),
    "name twice": (file("a") * 2, UnsafeFile, "'a' is there twice"),
    "name twice but for case": (file("a") + file("A"), UnsafeFile, "'A' is there twice"),
    "name twice but for ./": (file("a") + file("./a"), UnsafeFile, r"'\./a' is there twice"),
    "name twice but for a slash": (file("a/b") + file("a//b"), UnsafeFile, "there twice"),
    "name twice but for its form": (file("ä") + file("a\u0308"), UnsafeFile, "there twice"),
    "file and folder": (file("a") + head("a/", 0, b"5"), UnsafeFile, "there twice"),
    "path for all": (pax({"path": CONFIG}, b"g") + file("x"), UnsafeFile, "renames or resizes all"),
    "size for all": (pax({"size": "9"}, b"g") + file("x"), UnsafeFile, "renames or resizes all"),
    "two sizes": (pax({"size": "512"}) + file("a"), UnsafeFile, "has two sizes, 1 and 512"),
    "two pax headers": (pax({"path": "a"}) + pax({"path": "b"}) + file("x"), FormatError, "two extended headers"),
    "pax and long name": (pax({"path": "a"}) + file("L", b"b", kind=b"L"), FormatError, "two extended headers"),
    "pax header last": (good() + pax({"path": "a"}) + END, FormatError, "ends after an extended header"),
    "pax of 64 KiB": (head("x", 65_537, b"x"), FormatError, "extended header of 65537 bytes; the limit is 65536"),
    "pax of 8 GiB": (head("x", 8**11 - 1, b"x"), FormatError, "the limit is 65536"),
    "long name of 8 GiB": (head("x", 8**11 - 1, b"L"), FormatError, "the limit is 65536"),
    "pax record beyond its header": (pax(b"99 path=a\n"), FormatError, "damaged pax header"),
    "pax record of length 0": (pax(b"0 path=a\n"), FormatError, "damaged pax header"),
    "pax record too short": (pax(b"6 path=a\n"), FormatError, "damaged pax header"),
    "pax record without newline": (pax(b"11 path=ab "), FormatError, "damaged pax header"),
    "pax record twice": (pax(b"9 path=a\n9 path=b\n"), FormatError, "damaged pax header"),
    "pax record in the padding": (
        head("x", 9, b"x") + b"9 path=a\n9 path=b\n".ljust(BLOCK, b"\0"), FormatError, "behind an extended header",
    ),
    "pax of 101 records": (pax({f"k{i}": "" for i in range(101)}), FormatError, "more records than the limit of 100"),
    "pax size negative": (pax({"size": "-1"}) + file("a"), FormatError, "negative or absurd"),
    "pax size absurd": (pax({"size": "9" * 400}) + file("a"), FormatError, "negative or absurd"),
    "pax size of 2**59": (pax({"size": str(1 << 59)}) + file("a"), FormatError, f"limit of {TOTAL} bytes"),
    "size negative": (head("a", b"\xff" * 12), FormatError, "negative or absurd"),
    "size of 2**80": (head("a", b"\x80\0" + b"\xff" * 10), FormatError, "negative or absurd"),
    "size of 2**62": (head("a", b"\x80\0\0\0" + (1 << 62).to_bytes(8, "big")), FormatError, f"limit of {TOTAL} bytes"),
    "size of twelve bytes": (head("a", b"\x81" + bytes(10) + b"\1"), FormatError, "negative or absurd"),
    "size is text": (head("a", b"0x10\0"), FormatError, "negative or absurd"),
    "size with a sign": (head("a", b"-0000000001\0"), FormatError, "negative or absurd"),
    "mode is text": (head("a", put={100: b"rw-r--r-"}), FormatError, "not a number"),
    "wanted beyond its limit": (head(CONFIG, 65_537), FormatError, f"'{CONFIG}' is 65537 bytes; the limit is 65536"),
    "all beyond the total": (head("a", TOTAL + 1), FormatError, f"more than the limit of {TOTAL} bytes"),
    "too many": (b"".join(head(f"f{i}") for i in range(MAX_MEMBERS + 1)), FormatError, "more members than .* 1000"),
    "wrong checksum": (good()[:500] + b"\1" + good()[501:] + END, FormatError, "checksum of a header"),
    "no magic": (good() + checked(head("a").replace(b"ustar", b"ratsu")), FormatError, "without its magic"),
    "GNU backup": (head("a", magic=GNU, put={345: b"14577777777"}), FormatError, "incremental backup"),
    "no end": (good(), FormatError, "ends too early"),
    "half an end": (good() + END[:BLOCK], FormatError, "ends too early"),
    "cut in a content": (good()[:-BLOCK], FormatError, "ends too early"),
    "cut in a header": (good()[:-1300], FormatError, "ends too early"),
    "cut in what is ignored": (good() + head("a", 1000) + b"x", FormatError, "ends too early"),
    "another archive behind": (good() + END + good() + END, FormatError, "goes on after its end"),
    "a zip behind": (good() + END + raw_zip(*good_zip()), FormatError, "goes on after its end"),
    "one block of zeros": (good() + END[:BLOCK] + file("a") + END, FormatError, "goes on after its end"),
    "a mebibyte of zeros behind": (good() + bytes((1 << 20) + BLOCK), FormatError, "bytes of zeros at its end"),
    "no member": (END, FormatError, "not an archive"),
    "nothing wanted": (file("adapter_model.bin") + END, FormatError, f"holds none of {CONFIG}, {WEIGHTS}"),
    "a folder with a wanted name": (head(CONFIG, 0, b"5") + file("x") + END, FormatError, "holds none of"),
    "two top folders": (good("a/") + file("b/x") + END, FormatError, "one common top folder"),
    "two folders deep": (good("a/b/") + END, FormatError, "one common top folder"),
    "a file beside the folder": (good("a/") + file("README") + END, FormatError, "one common top folder"),
}  # fmt: skip

# Links that leave the folder step by step, as for CVE-2025-4517: each one alone looks harmless.
TARS["chain of links"] = (
    b"".join(
        head("/".join("abcdef"[:depth]), 0, b"5") + head(f"{'/'.join('abcdef'[:depth])}/l", 0, b"2", put={157: b".."})
        for depth in range(1, 6)
    )
    + file("a/l/l/l/" + CONFIG),
    UnsafeFile,
    "'a/l' is a symbolic link",
)
ZIPS: dict[str, tuple[bytes, type[AdapterHubError], str]] = {
    "absolute path": (raw_zip(Zipped(b"/" + CONFIG.encode())), UnsafeFile, "absolute path"),
    "parent folder": (raw_zip(Zipped(b"a/../../x")), UnsafeFile, r"has '\.\.'"),
    "backslash": (raw_zip(Zipped(b"a\\x")), UnsafeFile, "backslash"),
    "drive": (raw_zip(Zipped(b"c:x")), UnsafeFile, "absolute path"),
    "NUL": (raw_zip(Zipped(CONFIG.encode() + b"\0.txt")), UnsafeFile, "control character"),
    "256 characters": (raw_zip(Zipped(b"a" * 256)), UnsafeFile, "256 characters"),
    "no name": (raw_zip(Zipped(b"")), UnsafeFile, "has no name"),
    "symbolic link": (raw_zip(Zipped(b"a", b"/etc", mode=stat.S_IFLNK | 0o777)), UnsafeFile, "'a' is a link"),
    "device": (raw_zip(Zipped(b"a", mode=stat.S_IFCHR)), UnsafeFile, "is a device"),
    "fifo": (raw_zip(Zipped(b"a", mode=stat.S_IFIFO)), UnsafeFile, "special file"),
    "folder named as a file": (raw_zip(Zipped(b"a", b"", mode=stat.S_IFDIR)), UnsafeFile, "is a folder"),
    "folder with content": (raw_zip(Zipped(b"a/")), UnsafeFile, "folder with content"),
    "encrypted": (raw_zip(Zipped(b"a", flags=1)), UnsafeFile, "'a' is encrypted"),
    "strongly encrypted": (raw_zip(Zipped(b"a", flags=0x40)), UnsafeFile, "is encrypted"),
    "masked directory": (raw_zip(Zipped(b"a", flags=0x2000)), UnsafeFile, "is encrypted"),
    "patch": (raw_zip(Zipped(b"a", flags=0x20)), FormatError, "flags 0x20; stored and deflated"),
    "bzip2": (raw_zip(Zipped(b"a", method=12)), FormatError, "method 12 .* stored and deflated members are read"),
    "name twice": (raw_zip(Zipped(b"a"), Zipped(b"A")), UnsafeFile, "'A' is there twice"),
    "name twice but for ./": (raw_zip(Zipped(b"a"), Zipped(b"./a")), UnsafeFile, "there twice"),
    "another local name": (raw_zip(Zipped(CONFIG.encode(), local_name=b"x")), UnsafeFile, "another name at its"),
    "another local flag": (raw_zip(Zipped(b"a", local_flags=0x800)), UnsafeFile, "described differently"),
    "another local checksum": (raw_zip(Zipped(b"a", local_crc=7)), UnsafeFile, "described differently"),
    "a second name": (
        raw_zip(Zipped(b"a", extra=struct.pack("<2HBL", 0x7075, 5 + len(CONFIG), 1, 0) + CONFIG.encode())),
        UnsafeFile, "'a' has a second name",
    ),
    "not UTF-8": (raw_zip(Zipped(b"\xff", flags=0x800)), UnsafeFile, "not the UTF-8"),
    "damaged extra field": (raw_zip(Zipped(b"a", extra=b"\1\0\xff\0")), FormatError, "damaged zip directory"),
    "stored in two sizes": (raw_zip(Zipped(b"a", b"abc", size=2)), UnsafeFile, "has two sizes, 3 and 2"),
    "too many": (raw_zip(*(Zipped(b"%d" % i) for i in range(1001))), FormatError, "1001 members; the limit is 1000"),
    "fewer than there are": (raw_zip(*good_zip(), end={3: 1, 4: 1}), FormatError, "damaged zip directory"),
    "more than there are": (raw_zip(*good_zip(), end={3: 3, 4: 3}), FormatError, "damaged zip directory"),
    "split": (raw_zip(*good_zip(), end={1: 1}), FormatError, "split zip"),
    "entry on another disk": (raw_zip(Zipped(b"a", disk=1)), FormatError, "damaged zip directory"),
    "newer format": (raw_zip(Zipped(b"a", version=64)), FormatError, "damaged zip directory"),
    "directory is none": (raw_zip(Zipped(b"a")).replace(b"PK\1\2", b"PK\1\3"), FormatError, "damaged zip directory"),
    "zip64 count": (raw_zip(*good_zip(), end={3: 0xFFFF, 4: 0xFFFF}), FormatError, "zip64"),
    "zip64 offset": (raw_zip(*good_zip(), end={6: 0xFFFFFFFF}), FormatError, "zip64"),
    "zip64 size": (raw_zip(Zipped(b"a", size=0xFFFFFFFF, packed_size=0xFFFFFFFF)), FormatError, "zip64"),
    "zip64 at the content": (zip64_at_the_content(), FormatError, "zip64"),
    "zip64 locator": (
        raw_zip(*good_zip(), Zipped(b"a", extra=struct.pack("<2H", 9, len(ZIP64)) + ZIP64)), FormatError, "zip64",
    ),
    "huge directory": (raw_zip(*good_zip(), end={5: 1 << 31}), FormatError, "something before or after"),
    "directory of 600 KiB": (
        raw_zip(*(Zipped(b"%d" % i, extra=struct.pack("<2H", 9, 60_000) + bytes(60_000)) for i in range(10))),
        FormatError, "the limit is 524288",
    ),
    "something before": (b"PK\3\4" + raw_zip(*good_zip()), FormatError, "before or after"),
    "something before, accounted for": (raw_zip(Zipped(b"a", before=b"PK\3\4")), UnsafeFile, "hides something before"),
    "something between": (raw_zip(Zipped(b"a"), Zipped(b"b", before=b"-")), UnsafeFile, "'b' overlaps .* or hides"),
    "something at the end": (raw_zip(*good_zip(), gap=b"-"), FormatError, "before its directory"),
    "something behind": (raw_zip(*good_zip()) + b"-", FormatError, "does not end as one"),
    "another archive behind": (raw_zip(*good_zip()) * 2, FormatError, "before or after"),
    "a tar behind": (raw_zip(*good_zip()) + good() + END, FormatError, "does not end as one"),
    "cut": (raw_zip(*good_zip())[:-1], FormatError, "does not end as one"),
    "no end": (raw_zip(*good_zip())[:-22], FormatError, "does not end as one"),
    "an end in the comment": (raw_zip(*good_zip(), comment=b"PK\5\6" + bytes(18)), FormatError, "before or after"),
    "half an end in the comment": (raw_zip(*good_zip(), comment=b"PK\5\6"), FormatError, "does not end as one"),
    "overlapping members": (raw_zip(*good_zip(), Zipped(b"a", at=0)), UnsafeFile, "overlaps another member"),
    "nested members": (
        raw_zip(Zipped(b"a", (inner := raw_zip(Zipped(b"b")))), Zipped(b"b", at=31)), UnsafeFile, "overlaps another",
    ),
    "member beyond the directory": (raw_zip(Zipped(b"a", at=9999)), UnsafeFile, "overlaps"),
    "content beyond the directory": (
        raw_zip(Zipped(b"a", size=99, packed_size=99)), UnsafeFile, "overlaps the directory",
    ),
    "local header is none": (raw_zip(Zipped(b"a")).replace(b"PK\3\4", b"PK\5\6"), FormatError, "damaged zip directory"),
    "wrong checksum": (raw_zip(Zipped(CONFIG.encode(), crc=7)), FormatError, "checksum of a member"),
    "damaged content": (raw_zip(Zipped(CONFIG.encode(), method=8, packed=b"\xff")), FormatError, "damaged compressed"),
    "content too short": (raw_zip(Zipped(CONFIG.encode(), method=8, size=9)), FormatError, "ends too early"),
    "content too long": (raw_zip(Zipped(CONFIG.encode(), b"ab", 8, size=1)), FormatError, "more bytes than"),
    "content goes on": (
        raw_zip(Zipped(CONFIG.encode(), b"ab", 8, packed=zlib.compress(b"ab", wbits=-15) + b"-")),
        FormatError, "goes on after the end",
    ),
    "wanted beyond its limit": (raw_zip(Zipped(CONFIG.encode(), bytes(65_537), 8)), FormatError, "limit is 65536"),
    "all beyond the total": (
        raw_zip(Zipped(b"a", method=8, size=TOTAL), Zipped(b"b")), FormatError, f"limit of {TOTAL} bytes",
    ),
    "nothing wanted": (with_zipfile({"adapter_model/data.pkl": b"x"}), FormatError, "holds none of"),
    "a folder with a wanted name": (
        raw_zip(Zipped(CONFIG.encode() + b"/", b""), Zipped(b"README")), FormatError, "holds none of",
    ),
    "empty": (raw_zip(), FormatError, "holds none of"),
}  # fmt: skip
PACKED = gzip.compress(good() + END)


def full_chunk() -> bytes:
    """A gzip file whose comment makes it as long as what is read at once."""
    comment = b"c" * (CHUNK - len(PACKED) - 1) + b"\0"
    return PACKED[:3] + b"\x10" + PACKED[4:10] + comment + PACKED[10:]


OTHERS: dict[str, tuple[bytes, type[AdapterHubError], str]] = {
    "empty": (b"", FormatError, "is not an archive"),
    "text": (b"hello", FormatError, r"read as \.tar, \.tar\.gz and \.zip"),
    "bzip2": (b"BZh9", FormatError, r"packed with bzip2\. Archives are read as \.tar, \.tar\.gz and \.zip"),
    "xz": (b"\xfd7zXZ\0", FormatError, "packed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd", FormatError, "packed with zstd"),
    "gzip of gzip": (gzip.compress(PACKED + bytes(999)), FormatError, "not a tar archive"),
    "gzip of a file": (gzip.compress(FILES[WEIGHTS]), FormatError, "not a tar archive"),
    "gzip cut": (PACKED[:-1], FormatError, "ends too early"),
    "gzip cut early": (PACKED[:40], FormatError, "ends too early"),
    "gzip with a wrong checksum": (PACKED[:-8] + bytes(8), FormatError, "damaged compressed data"),
    "gzip twice": (PACKED * 2, FormatError, "goes on after the end of its compressed data"),
    "gzip and zeros": (PACKED + bytes(9), FormatError, "goes on after the end of its compressed data"),
    "gzip that ends with a chunk": (full_chunk() + b"-", FormatError, "goes on after the end of its compressed data"),
    "gzip of empty blocks": (
        PACKED[:10] + b"\0\0\0\xff\xff" * 100_000 + PACKED[10:], FormatError, "unpacks to next to nothing",
    ),
    "gzip with an endless name": (b"\x1f\x8b\x08\x08" + b"n" * 999_999, FormatError, "next to nothing"),
    "gzip of a link": (gzip.compress(head("a", 0, b"2")), UnsafeFile, "symbolic link"),
}  # fmt: skip
CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("tar", TARS), ("zip", ZIPS), ("", OTHERS))
    for name, case in cases.items()
}


@pytest.mark.parametrize(("data", "error", "words"), CASES.values(), ids=CASES.keys())
def test_refused(tmp_path: Path, data: bytes, error: type[AdapterHubError], words: str) -> None:
    with pytest.raises(error) as caught:
        read(tmp_path, data)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "x.bin"))
    assert re.search(words, text.removeprefix(str(tmp_path)))  # the folder's name is this test's
    assert text.isascii()
    assert len(text) < 500


@pytest.mark.parametrize("case", [name for name in TARS if not name.startswith(("no ", "cut", "half"))])
def test_refused_when_compressed_as_well(tmp_path: Path, case: str) -> None:
    data, error, _ = TARS[case]
    with pytest.raises(error):
        read(tmp_path, gzip.compress(data))


def test_the_builders_build_what_is_read(tmp_path: Path) -> None:
    for data in (good() + END, raw_zip(*good_zip()), PACKED):
        assert read(tmp_path, data) == (FILES, [])
        assert by_standard_library(data) == (FILES, [])


# Bombs

LIMIT = 20 << 20  # bytes of memory
MANY = b"".join(head(f"f{i}") for i in range(2_000))
ZEROS = bytes(1 << 20)
BOMBS = {
    "a million members": (gzip_bomb(MANY, b"".join([head("f")] * 2_000), 499), "more members than the limit of 1000"),
    "4 GiB behind the end": (gzip_bomb(good() + END, ZEROS, 4 << 10), "bytes of zeros at its end"),
    "60 MiB of zeros in an ignored file": (gzip_bomb(head("a", 60 << 20), ZEROS, 60), "more than 100 times"),
    "overlapping members": (
        raw_zip(
            Zipped(b"0", bytes(8 << 20), 8),
            *(Zipped(b"%d" % i, b"", 8, size=60_000, packed_size=60_000, at=0) for i in range(1, 900)),
        ),
        "overlaps another member",
    ),
    "a zip member that is none": (raw_zip(Zipped(CONFIG.encode(), bytes(60 << 20), 8, size=1)), "more bytes than"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), BOMBS.values(), ids=BOMBS.keys())
def test_bombs_take_little_memory(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(data)
    assert peak_of(path, FormatError, words) < LIMIT


def test_a_wanted_file_is_no_bomb_either(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    limits = {WEIGHTS: 8 << 30}
    for data in (
        gzip_bomb(head(WEIGHTS, 4 << 30), ZEROS, 4 << 10),
        raw_zip(Zipped(WEIGHTS.encode(), b"", 8, packed=zlib.compress(bytes(64 << 20), wbits=-15), size=4_000_000_000)),
    ):
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(FormatError, match="more than 100 times"):
            read_archive(path, limits)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LIMIT


def test_a_file_cut_short_is_not_read_first(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(file("README", bytes(300_000)) + head(WEIGHTS, 1 << 20) + bytes(900_000))
    assert peak_of(path, FormatError, "ends too early") < 200_000


def test_extended_headers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.formats.archive_members.SLACK", 0)
    (tmp_path / "x.tar").write_bytes(pax({"comment": "x" * 990}) + file(CONFIG, b"{}") + END)
    assert read_archive(tmp_path / "x.tar", {CONFIG: 1010})[0] == {CONFIG: b"{}"}
    with pytest.raises(FormatError, match="more than the limit of 1000 bytes"):
        read_archive(tmp_path / "x.tar", {CONFIG: 1000})


@pytest.mark.parametrize("start", [head(WEIGHTS, 8**11 - 1), head("x", 8**11 - 1, b"x"), head("a", 60 << 20)])
def test_declared_sizes_take_no_memory(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "claims"
    path.write_bytes(start)
    assert peak_of(path, FormatError, "limit|ends too early") < 1 << 20
    path.write_bytes(gzip.compress(start))
    assert peak_of(path, FormatError, "limit|ends too early") < 1 << 20


def test_files_with_holes_are_not_read_through(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    path.write_bytes(raw_zip(*good_zip()))
    os.truncate(path, 1 << 40)
    assert peak_of(path, FormatError, "does not end as one") < 1 << 20
    path.write_bytes(good() + END)
    os.truncate(path, 1 << 40)
    assert peak_of(path, FormatError, "zeros at its end") < 1 << 20


# Writing


def test_round_trip(tmp_path: Path) -> None:
    files = {**FILES, CARD: b"", "x": bytes(BLOCK)}
    data = b"".join(tar_bytes(files))
    assert data == b"".join(tar_bytes(dict(reversed(files.items()))))
    assert read(tmp_path, data) == ({**FILES, CARD: b""}, ["x"])
    assert len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == sorted(files)
        assert {m.name: archive.extractfile(m).read() for m in members} == files  # type: ignore[union-attr]
        for member in members:
            assert (member.mode, member.uid, member.gid, member.mtime) == (0o644, 0, 0, 0)
            assert (member.uname, member.gname, member.type, member.pax_headers) == ("", "", tarfile.REGTYPE, {})


def test_the_system_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"".join(tar_bytes(FILES)))
    done = subprocess.run(["tar", "-tvf", str(tmp_path / "x.tar")], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [line.split()[-1] for line in done.stdout.splitlines()] == sorted(FILES)


def test_contents_are_streamed_not_copied() -> None:
    data = bytes(1000)
    assert any(chunk is data for chunk in tar_bytes({"a": data}))


class Huge(bytes):
    def __len__(self) -> int:
        return 8 << 30


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({WEIGHTS: Huge()}, Unsupported, "8589934592 bytes; the limit in a tar archive is 8589934591"),
        ({"a" * 101: b""}, Unsupported, "at most 100"),
        ({"ä": b""}, Unsupported, "ASCII"),
        ({"../a": b""}, UnsafeFile, r"'\.\.'"),
        ({"a": b"", "A": b""}, UnsafeFile, "twice"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_first_byte(
    files: dict[str, bytes], error: type[AdapterHubError], words: str
) -> None:
    with pytest.raises(error, match=words):
        tar_bytes(files)


# Any bytes

SEEDS = [
    *(with_tarfile({**FILES, "notes/README": b"x"}, form, "lora") for form in FORMATS),
    pax({"path": "l/" + CONFIG, "uid": "7"}) + file("cut", b"{}") + file("L", b"l/x\0", kind=b"L") + file("y") + END,
    with_zipfile({**FILES, "notes/README": b"x"}, "lora"),
    raw_zip(*good_zip(), Zipped(b"x", extra=b"UT\5\0\3abcd"), comment=b"hello"),
    zip_of_a_pipe(FILES),
    PACKED,
]  # fmt: skip
PIECES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from([
        b"/", b"..", b"\0", b"\\", b"1", b"5", b"L", b"x", b"g", b"7", b"\x80", b"\xff", b"ustar  \0", END[:BLOCK],
        b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\7", CONFIG.encode(), head(CONFIG, 1), file("a"), pax({"path": CARD}),
        pax({"size": "1"}), pax({"path": "a/" + CARD}, b"g"), file("L", CARD.encode(), kind=b"L"), head("d/", 0, b"5"),
    ]),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), PIECES, st.sampled_from(["insert", "overwrite", "delete", "cut", "flip"])),
    max_size=4,
)


def mutated(data: bytes, edits: list[tuple[int, bytes, str]], aligned: bool) -> bytes:
    for position, piece, how in edits:
        at = position % (len(data) + 1)
        at -= at % BLOCK if aligned and len(piece) >= BLOCK else 0
        if how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "overwrite":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "delete":
            data = data[:at] + data[at + max(len(piece), 1) :]
        elif how == "cut":
            data = data[:at]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << position % 8)]) + data[at + 1 :]
    return data


def mended(data: bytes) -> bytes:
    """The same with the checksum of every tar header right again, so that mutations reach what is behind it."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    return b"".join(checked(b) if len(b) == BLOCK and b[257:262] == b"ustar" else b for b in blocks)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2_000))
def test_any_bytes(data: bytes) -> None:
    fuzz(data)
    fuzz(b"\x1f\x8b\x08\0" + data)
    fuzz(b"PK\3\4" + data)
    fuzz(gzip.compress(mended(data[:257] + b"ustar\x0000" + data[265:])))


@settings(max_examples=1_000, deadline=None)
@given(st.sampled_from(SEEDS), EDITS, st.booleans(), st.booleans())
@example(SEEDS[3], [], False, False)
def test_mutations_of_valid_archives(seed: bytes, edits: list[tuple[int, bytes, str]], mend: bool, pack: bool) -> None:
    data = mutated(seed, edits, mend)
    data = mended(data) if mend else data
    fuzz(gzip.compress(data, 1) if pack else data)


NAMES = st.sampled_from(
    [CONFIG, WEIGHTS, f"lora/{CONFIG}", f"./lora//{CARD}", "lora/", "lora", "a", "A", "./", "b/._x", "__MACOSX"]
)
SIZES = st.sampled_from(
    [b"", b"00000000001\0", b"          1 ", b"\x80" + bytes(10) + b"\1", b"00000001000\0", b"0o1\0"]
)
KINDS = st.sampled_from([b"0", b"0", b"\0", b"5", b"7", b"L", b"g"])
RECORDS = st.dictionaries(
    st.sampled_from(["path", "path", "size", "mtime", "linkpath", "comment", "hdrcharset"]),
    st.one_of(NAMES, st.sampled_from(["1", "0", "01", " 1", "512", "BINARY"])),
    max_size=2,
)
CONTENTS = st.sampled_from([b"", b"1", bytes(BLOCK)])
PARTS = st.one_of(
    st.builds(file, NAMES, CONTENTS),
    st.builds(lambda told, name, data: pax(told) + file(name, data), RECORDS, NAMES, CONTENTS),
    st.builds(lambda told, name, data: pax(told, b"g") + file(name, data), RECORDS, NAMES, CONTENTS),
    st.builds(lambda name, data: file("L", name.encode() + b"\0", kind=b"L") + file("x", data), NAMES, CONTENTS),
    st.builds(lambda name, kind: head(name, 0, kind), NAMES, KINDS),
    st.builds(lambda name, size, kind: head(name, size, kind) + b"1".ljust(BLOCK, b"\0"), NAMES, SIZES, KINDS),
    st.builds(lambda name, at: head(name, magic=GNU, put={at: b"7"}), NAMES, st.integers(100, 511)),
    st.sampled_from([b"", END[:BLOCK], pax({"path": CARD}), file("L", CARD.encode(), kind=b"L")]),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from([END, END, END, END[:BLOCK], END + b"x"]))
@example([pax({"path": CARD, "size": "1"}), file("x")], END)
def test_tars_built_of_any_parts(parts: list[bytes], end: bytes) -> None:
    fuzz(b"".join(parts) + end)


ODD = st.one_of(
    *(st.tuples(st.just(key), st.integers(0, 60)) for key in ("size", "crc", "at", "local_crc", "packed_size")),
    st.tuples(st.just("name"), NAMES.map(str.encode)),
    st.tuples(st.just("local_name"), NAMES.map(str.encode)),
    st.tuples(st.just("data"), st.sampled_from([b"", b"ab" * 20])),
    st.tuples(st.just("method"), st.sampled_from([0, 8, 12])),
    st.tuples(st.just("flags"), st.sampled_from([1, 2, 8, 0x800, 0x808])),
    st.tuples(st.just("local_flags"), st.sampled_from([1, 2, 8, 0x800, 0x808])),
    st.tuples(st.just("mode"), st.sampled_from([0, stat.S_IFDIR, stat.S_IFLNK])),
    st.tuples(st.just("before"), st.sampled_from([bytes(12), bytes(16), b"-"])),
    st.tuples(st.just("extra"), st.sampled_from([b"-", b"\1\0\x08\0" + bytes(8), b"up\x06\0\1" + bytes(4) + b"a"])),
)
ZIPPED = st.builds(
    lambda name, odd: Zipped(**{"name": name.encode(), "data": b"x", "method": 8, **dict(odd)}),
    NAMES,
    st.lists(ODD, max_size=2),
)
COMMENTS = st.sampled_from([b"", b"", b"hello", b"PK\5\6" + bytes(18), raw_zip(*good_zip())])


@settings(max_examples=600, deadline=None)
@given(
    st.lists(ZIPPED, min_size=1, max_size=3),
    COMMENTS,
    st.dictionaries(st.integers(1, 7), st.integers(0, 99), max_size=1),
)
@example([Zipped(CONFIG.encode(), b"{}", 8, 8), Zipped(b"x", before=bytes(16))], b"", {})
def test_zips_built_of_any_parts(members: list[Zipped], comment: bytes, end: dict[int, int]) -> None:
    fuzz(raw_zip(*members, comment=comment, end=end))


def test_the_seeds_are_accepted(tmp_path: Path) -> None:
    for seed in SEEDS:
        assert read(tmp_path, seed)[0]
        fuzz(seed)


def test_the_fuzz_function_finds_what_is_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.archive.read_archive", lambda *_: ({CONFIG: b"{}"}, []))
    with pytest.raises(AssertionError):
        fuzz(good() + END)
