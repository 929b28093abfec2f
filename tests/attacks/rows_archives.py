"""I1 to I3: archives. tests/formats/test_archive.py has every detail; here is what each row stands for, end to end."""

from __future__ import annotations

import gzip
import stat
import zlib

from adapterhub_lite.errors import FormatError, NotFound, UnsafeFile
from adapterhub_lite.formats.archive_members import MAX_MEMBERS
from tests.attacks import build
from tests.attacks.attack import Attack, rows
from tests.attacks.build import CONFIG, WEIGHTS
from tests.formats.archives import END, GNU, Zipped, file, gzip_bomb, head, pax, raw_zip

_FILES = build.files()
_GOOD = b"".join(file(name, data) for name, data in _FILES.items())
_ZIPPED = [Zipped(name.encode(), data, 8) for name, data in _FILES.items()]


def _tar(*before: bytes) -> bytes:
    return b"".join(before) + _GOOD + END


def _zip(*before: Zipped) -> bytes:
    return raw_zip(*before, *_ZIPPED)


_CHAIN = b"".join(
    head("/".join("abcdef"[:depth]), 0, b"5") + head(f"{'/'.join('abcdef'[:depth])}/l", 0, b"2", put={157: b".."})
    for depth in range(1, 6)
)
NAMES = {
    "../x in a tar": (_tar(file("../x")), r"'\.\./x' has '\.\.' in its path"),
    "../x in a tar.gz": (gzip.compress(_tar(file("../x"))), r"'\.\./x' has '\.\.' in its path"),
    "../x in a zip": (_zip(Zipped(b"../x")), r"'\.\./x' has '\.\.' in its path"),
    "/etc/x in a tar": (_tar(file("/etc/x")), "'/etc/x' has an absolute path"),
    "/etc/x in a zip": (_zip(Zipped(b"/etc/x")), "'/etc/x' has an absolute path"),
    "a/../../x in a tar": (_tar(file("a/../../x")), r"has '\.\.'"),
    "backslashes in a tar": (_tar(file("..\\x")), "backslash"),
    "backslashes in a zip": (_zip(Zipped(b"..\\x")), "backslash"),
    "a drive": (_tar(file("C:x")), "absolute path"),
    "NUL in a tar": (_tar(file(CONFIG.encode() + b"\0x")), "behind a NUL"),
    "NUL in a zip": (_zip(Zipped(b"a\0b")), "control character"),
    "5000 characters": (_tar(pax({"path": "a" * 5000}) + file("x")), "5000 characters"),
    "a newline": (_tar(file("a\nb")), "control character"),
    "a chain of links (CVE-2025-4517)": (_tar(_CHAIN + file("a/l/l/l/x")), "'a/l' is a symbolic link"),
    "a path by a pax header": (_tar(pax({"path": "../x"}) + file("x")), r"has '\.\.'"),
    "a path by a long name": (_tar(file("L", b"../x\0", kind=b"L") + file("x")), r"has '\.\.'"),
    "another name at the content": (_zip(Zipped(b"a", local_name=b"../x")), "another name at its content"),
}
KINDS = {
    "symbolic link in a tar": (_tar(head("a", 0, b"2", put={157: b"/etc/passwd"})), "symbolic link"),
    "symbolic link in a zip": (_zip(Zipped(b"a", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)), "is a link"),
    "the weights as a link": (
        file(CONFIG, _FILES[CONFIG]) + head(WEIGHTS, 0, b"2", put={157: b"/etc/passwd"}) + END, "symbolic link",
    ),
    "hard link": (_tar(head("a", 0, b"1", put={157: b"/etc/passwd"})), "hard link"),
    "fifo": (_tar(head("a", 0, b"6")), "fifo"),
    "device": (_tar(head("a", 0, b"3")), "device"),
    "sparse": (_tar(head("a", 0, b"S", magic=GNU)), "sparse"),
    "sparse by a pax header": (_tar(pax({"GNU.sparse.major": "1"}) + file("a")), "sparse"),
    "the configuration twice in a tar": (_tar(file(CONFIG, b"{}")), "there twice"),
    "the configuration twice in a zip": (_zip(Zipped(CONFIG.encode(), b"{}")), "there twice"),
    "the configuration twice but for case": (_tar(file(CONFIG.upper(), b"{}")), "there twice"),
    "encrypted": (_zip(Zipped(b"a", flags=1)), "encrypted"),
    "two members of the same bytes": (_zip(Zipped(b"a", size=60_000, packed_size=60_000, at=0)), "overlaps"),
}  # fmt: skip
_MANY = b"".join(head(f"f{number}") for number in range(2_000))
BOMBS = {
    "a million members": (lambda: gzip_bomb(_MANY, b"".join([head("f")] * 2_000), 499), f"limit of {MAX_MEMBERS}"),
    "4 GiB behind the end": (lambda: gzip_bomb(_tar(), bytes(1 << 20), 4 << 10), "zeros at its end"),
    "weights of 4 GiB out of 4 MB": (
        lambda: gzip_bomb(head(WEIGHTS, 4 << 30), bytes(1 << 20), 4 << 10), "more than 100 times",
    ),
    "weights of 4 GB in a zip": (
        lambda: raw_zip(
            Zipped(WEIGHTS.encode(), b"", 8, packed=zlib.compress(bytes(64 << 20), wbits=-15), size=4 * 10**9)
        ),
        "more than 100 times",
    ),
    "a size of 8 GiB that is not there": (_tar(head("a", 8**11 - 1)), "limit of|ends too early"),
    "a size of 2**80": (_tar(head("a", b"\x80\0" + b"\xff" * 10)), "negative or absurd"),
    "a pax header of 8 GiB": (_tar(head("x", 8**11 - 1, b"x")), "the limit is 65536"),
    "a lying size in a zip": (raw_zip(Zipped(CONFIG.encode(), bytes(60 << 20), 8, size=1)), "more bytes than"),
    "an archive in an archive": (gzip.compress(gzip.compress(_tar())), "not a tar archive"),
    "two archives": (_tar() + _tar(), "goes on after its end"),
    "a zip behind a tar": (_tar() + _zip(), "goes on after its end"),
    "bzip2": (b"BZh91AY&SY" + bytes(600), "neither a folder nor an archive"),
    "text": (b"hello" * 200, "neither a folder nor an archive"),
    "nothing": (b"", "neither a folder nor an archive"),
    "nothing wanted": (file("README.md") + END, "holds none of"),
}  # fmt: skip

ATTACKS = [
    *rows("I1", "archive", UnsafeFile, NAMES),
    *rows("I2", "archive", UnsafeFile, KINDS),
    *rows("I3", "archive", FormatError, BOMBS, header=True),
    Attack("I4 an archive of a checkpoint", "archive", build.zip_of_pickle(), FormatError, "holds none of"),
    Attack(
        "I4 an archive with a pickle for weights",
        "archive",
        build.tar({CONFIG: _FILES[CONFIG], "adapter_model.bin": build.pickled()}),
        UnsafeFile,
        "pickle",
    ),
    Attack("I12 an archive without weights", "archive", build.tar({CONFIG: _FILES[CONFIG]}), NotFound, WEIGHTS),
]
