"""Build the native products for this machine, once, and load them.

The source is compiled with the system's C compiler for the very processor that runs it; the result lies in the cache
under the digest of source, flags, compiler and processor. Without a compiler, or where the result does not compute
what it should, everything runs on torch's own products.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from ..places import cache_root

# No -ffast-math: it would make the whole process flush denormal numbers to zero.
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC")
_HEADERS = (
    "vectors.h", "work.h", "tall.h", "laying.h", "training.h", "training_rows.h", "training_panels.h",
    "training_attention.h", "training_encoder.h", "training_layers.h",
)  # fmt: skip
_SOURCES = (
    *_HEADERS, "wide.c", "lanes.c", "forward.c", "matrices.c", "tall.c", "ragged.c", "encoder.c", "products.c",
    "training.c", "training_loss.c", "training_attention.c", "training_attention_back.c",
    "training_short.c", "training_lora.c", "training_encoder.c",
    "training_encoder_back.c", "quantise.c", "merge.c",
)  # fmt: skip
# p: pointer, l: long, i: int, f: float
_SIGNATURES = {
    "ahl_linear": "pllpippplpi",
    "ahl_change": "pllpplppplpli",
    "ahl_transpose": "plpl",
    "ahl_all_finite": "pl",
    "ahl_forward": "pppppplpppii",
    "ahl_encode": "pppppppi",
    "ahl_products": "pi",
    "ahl_wide_registers": "",
    "ahl_norm": "pi",
    "ahl_norm_back": "ppppppllii",
    "ahl_gated": "ipllpi",
    "ahl_gated_back": "ippllppi",
    "ahl_activate": "ipplpi",
    "ahl_rotate": "pllpplllii",
    "ahl_drop": "ppllpi",
    "ahl_cross_entropy": "ppllpii",
    "ahl_attend": "pi",
    "ahl_attend_back": "pi",
    "ahl_are_spans": "plll",
    "ahl_encoder_room": "pi",
    "ahl_encoder_forward": "pi",
    "ahl_encoder_backward": "pi",
    "ahl_merge": "p",
    "ahl_nf4_search": "plplpllppppi",
    "ahl_nf4_feedback": "plpppppi",
}
_ANSWERS = frozenset(
    {
        "ahl_all_finite",
        "ahl_transpose",
        "ahl_wide_registers",
        "ahl_cross_entropy",
        "ahl_attend",
        "ahl_attend_back",
        "ahl_are_spans",
        "ahl_encoder_forward",
        "ahl_encoder_backward",
        "ahl_merge",
    }
)
_SECONDS = 120


@dataclass(frozen=True)
class Library:
    """The loaded functions, or None and the reason there are none."""

    functions: ctypes.CDLL | None
    reason: str


@cache
def library() -> Library:
    """The native products of this machine; built at the first call. AHL_KERNELS=0 keeps them away."""
    if os.environ.get("AHL_KERNELS") == "0":
        return Library(None, "AHL_KERNELS=0 keeps them away")
    import torch  # its OpenMP runtime must be loaded first, so that both share one pool of threads

    assert torch.get_num_threads() > 0
    compiler = next((found for name in ("cc", "gcc") if (found := shutil.which(name))), None)
    if compiler is None:
        return Library(None, "no C compiler (cc or gcc) is installed")
    try:
        functions = _loaded(compiler, {name: (files(__package__) / name).read_bytes() for name in _SOURCES})
    except subprocess.CalledProcessError as error:
        return Library(None, f"{compiler} failed: {_first_line(error.stderr)}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Library(None, f"{type(error).__name__}: {error}")
    if not _computes(functions):
        return Library(None, f"what {compiler} built does not compute what it should")
    return Library(functions, f"built with {compiler} for this processor")


def _loaded(compiler: str, sources: dict[str, bytes]) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(_built(compiler, sources)))
    _declare(functions)
    return functions


def _built(compiler: str, sources: dict[str, bytes]) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS).stdout
    mark = b"\0".join([*sources.values(), " ".join(_FLAGS).encode(), version, _processor().encode()])
    folder, stem = cache_root() / "kernels", hashlib.sha256(mark).hexdigest()[:32]
    for path in folder.glob(f"{stem}-*.so"):
        # Its name says its content: loading a file that was cut short would end the process.
        if path.stem == f"{stem}-{_digest(path)}":
            return path
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as build:
        for name, source in sources.items():
            (Path(build) / name).write_bytes(source)
        code = [Path(build) / name for name in sources if name.endswith(".c")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
            objects = list(pool.map(partial(_compiled, compiler), code))
        made = Path(build) / "native.so"
        _run([compiler, "-shared", *_FLAGS, "-o", str(made), *map(str, objects), "-lm"])
        return made.replace(folder / f"{stem}-{_digest(made)}.so")


def _compiled(compiler: str, source: Path) -> Path:
    made = source.with_suffix(".o")
    _run([compiler, *_FLAGS, "-c", "-o", str(made), str(source)])
    return made


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _declare(functions: ctypes.CDLL) -> None:
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
    for name, arguments in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype = ctypes.c_int if name in _ANSWERS else None
        function.argtypes = [kinds[kind] for kind in arguments]


def _computes(functions: ctypes.CDLL) -> bool:
    """Whether a product of small whole numbers is right in each form: sums of 0..63 times 1, 1, 2 and 3."""
    import torch

    x, out = torch.arange(64.0), torch.empty(32)
    table = torch.arange(16.0)
    forms = (
        (torch.ones((64, 32)), torch.ones(32), 1),
        (torch.ones((64, 32), dtype=torch.bfloat16), torch.ones(32), 1),
        (torch.full((64, 16), 0x11, dtype=torch.uint8), torch.full((32,), 2.0), 2),
        (torch.ones((64, 32), dtype=torch.int8), torch.full((32,), 3.0), 3),
    )
    for form, (weight, scales, factor) in enumerate(forms):
        functions.ahl_linear(
            x.data_ptr(), 1, 64, weight.data_ptr(), form, scales.data_ptr(), table.data_ptr(), None, 32,
            out.data_ptr(), 1,
        )  # fmt: skip
        if not bool((out == 2016.0 * factor).all()):
            return False
    return True


def _processor() -> str:
    """What decides which instructions `-march=native` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _first_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no message"])[0][:200]
