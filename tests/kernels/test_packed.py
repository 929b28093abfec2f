"""Packed weights against the same product in float64: every form, any shape, any number of rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.kernels import library as building
from adapterhub_lite.kernels.library import library
from adapterhub_lite.kernels.packed import PackedWeight, pack_dense, pack_int8, pack_nf4

FORMS = ("float32", "bfloat16", "nf4", "int8")
needs_library = pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")


def made(form: str, n_out: int, n_in: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight, and the dense weight [out, in] that it stands for."""
    weight = torch.randn((n_out, n_in), generator=torch.Generator().manual_seed(seed))
    if form == "float32":
        return pack_dense(weight), weight
    if form == "bfloat16":
        weight = weight.bfloat16().float()
        return pack_dense(weight), weight
    if form == "nf4":
        data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        codes = torch.stack([data.view(-1) >> 4, data.view(-1) & 15], 1).view(n_out, n_in)
        return pack_nf4(codes, state.absmax.view(n_out, -1), state.code), bnb.dequantize_4bit(data, state)
    values, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    return pack_int8(values, scale / 127), bnb.int8_vectorwise_dequant(values, scale).float()


def check(form: str, n_out: int, n_in: int, rows: int, bias: bool, seed: int) -> None:
    packed, dense = made(form, n_out, n_in, seed)
    assert (packed.form, packed.n_in, packed.n_out) == (form, n_in, n_out)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn((rows, n_in), generator=generator)
    own = torch.randn(n_out, generator=generator) if bias else None
    expected = x.double() @ dense.double().T + (0 if own is None else own.double())
    # The bound of a sum of n products in float32, in units of the sum of their sizes.
    size = x.double().abs() @ dense.double().abs().T + (0 if own is None else own.double().abs())
    assert ((packed(x, own) - expected).abs() <= 2e-6 * size + 1e-30).all()


@needs_library
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 19])
def test_the_product_of_rows(form: str, rows: int) -> None:
    check(form, 96, 192, rows, bias=rows % 2 == 0, seed=rows)


@needs_library
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMS), st.integers(1, 100), st.integers(1, 150), st.integers(1, 20), st.booleans())
def test_any_shape(form: str, n_out: int, n_in: int, rows: int, bias: bool) -> None:
    check(form, n_out, -(-n_in // 64) * 64 if form == "nf4" else n_in, rows, bias, seed=n_in)


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_its_neighbours(form: str) -> None:
    packed, _ = made(form, 64, 128)
    x = torch.randn((8, 128), generator=torch.Generator().manual_seed(5))
    spoiled = x.clone()
    spoiled[3] = float("nan")
    kept = [row for row in range(8) if row != 3]
    assert torch.equal(packed(spoiled)[kept], packed(x)[kept])
    assert packed(spoiled)[3].isnan().all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    packed, dense = made("bfloat16", 64, 512)
    x = torch.randn((2, 3, 512), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert packed(x).dtype == dtype
    assert torch.equal(packed(x), packed(x.float()).to(dtype))
    assert packed(x).shape == (2, 3, 64)
    torch.testing.assert_close(packed(x).float(), x.float() @ dense.T, rtol=0.01, atol=0.05)


@needs_library
def test_a_strided_input() -> None:
    packed, dense = made("float32", 40, 30)
    wide = torch.randn((4, 90), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(packed(wide[:, 30:60]), wide[:, 30:60] @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1.0 + 2.0**-8, 2.0**-140, 3.4e38])
def test_a_value_that_bfloat16_lacks_keeps_the_weight_in_float32(value: float) -> None:
    weight = torch.ones((32, 4))
    assert pack_dense(weight).form == "bfloat16"
    weight[31, 3] = value
    assert pack_dense(weight).form == "float32"
    assert pack_dense(weight).panels.view(-1, 32)[3, 31] == torch.tensor(value)


@needs_library
def test_each_form_reads_the_bytes_of_its_kind() -> None:
    assert [made(form, 64, 128)[0].nbytes / (64 * 128) for form in FORMS] == [4, 2, 0.5 + 4 / 64, 1 + 4 / 128]


def test_it_can_be_kept_away() -> None:
    code = "from adapterhub_lite.kernels.library import library; print(library().functions, library().reason)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"AHL_KERNELS": "0"}
    )
    assert done.stdout.strip() == "None AHL_KERNELS=0 keeps them away"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("AHL_CACHE", str(tmp_path))
    monkeypatch.delenv("AHL_KERNELS", raising=False)
    building.library.cache_clear()
    yield tmp_path
    building.library.cache_clear()


def test_without_a_compiler_there_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    assert library().functions is None
    assert "no C compiler" in library().reason


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such flag" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(building.shutil, "which", lambda name: str(compiler))
    assert library().functions is None
    assert library().reason == f"{compiler} failed: no such flag"


@needs_library
def test_it_is_built_once_and_nothing_is_left_over(fresh: Path) -> None:
    assert library().functions is not None
    (made_file,) = (fresh / "kernels").iterdir()
    before = made_file.stat().st_mtime_ns
    building.library.cache_clear()
    assert library().functions is not None
    assert [(path, path.stat().st_mtime_ns) for path in (fresh / "kernels").iterdir()] == [(made_file, before)]


@needs_library
def test_a_file_that_was_cut_short_is_built_anew(fresh: Path) -> None:
    assert library().functions is not None
    (made_file,) = (fresh / "kernels").iterdir()
    whole = made_file.read_bytes()
    made_file.unlink()  # what is loaded stays mapped
    made_file.write_bytes(whole[:1000])
    code = "from adapterhub_lite.kernels.library import library; print(library().functions is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    (built,) = (fresh / "kernels").iterdir()
    assert built.stat().st_size == pytest.approx(len(whole), rel=0.1)


@needs_library
@pytest.mark.parametrize("name", ["vectors.h", "wide.c"])
def test_code_that_computes_wrongly_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = "widen_signed(const char *p) { return "
    wrong = {"vectors.h": (f"{start}(ints)", f"{start}1 + (ints)"), "wide.c": ("both << 16", "both << 15")}[name]
    real = building._built
    monkeypatch.setattr(building, "_FLAGS", ("-O1", *building._FLAGS[1:]))  # built in half the time

    def built(compiler: str, sources: dict[str, bytes]) -> Path:
        text = sources[name].decode()
        if wrong[0] not in text:
            pytest.skip("this processor uses the general form")
        return real(compiler, {**sources, name: text.replace(*wrong).encode()})

    monkeypatch.setattr(building, "_built", built)
    assert library().functions is None
    assert "does not compute" in library().reason
