"""I4 to I8, I11, I12, I14, I16: files of adapters, in folders and archives and handed over as bytes."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

from adapterhub_lite.errors import AdapterMismatch, FormatError, NoEffect, NotFound, UnsafeFile, Unsupported
from adapterhub_lite.formats.safetensors_header import MAX_METADATA, MAX_TENSORS
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.attacks import build
from tests.attacks.attack import Attack, rows
from tests.attacks.build import (
    CARD,
    CONFIG,
    MANIFEST,
    STEM,
    WEIGHTS,
    config,
    header,
    one,
    repeated,
    said,
    tensors,
    through_peft,
)
from tests.formats.build import f32, lora_config, raw_safetensors, safetensors

# --- I4: other formats -------------------------------------------------------------------------------------------

PICKLES = {
    "a pickle in place of the weights": (partial(build.files, weights=build.pickled()), "pickle or an archive"),
    "a zip in place of the weights": (partial(build.files, weights=build.zip_of_pickle()), "pickle or an archive"),
    "adapter_model.bin alone": ({CONFIG: lora_config(), "adapter_model.bin": build.pickled()}, "pickle"),
    "adapter_model.pt alone": ({CONFIG: lora_config(), "adapter_model.pt": build.zip_of_pickle()}, "pickle"),
}
ABSENT = {
    "an .npz alone": ({CONFIG: lora_config(), "adapter_model.npz": build.zip_of_pickle()}, WEIGHTS),
    "a .gguf alone": ({CONFIG: lora_config(), "adapter_model.gguf": b"GGUF"}, WEIGHTS),
}

# --- I5: headers -------------------------------------------------------------------------------------------------

_ONE = json.dumps(one())
HEADERS = {
    "nothing": (build.files(weights=b""), "cannot hold"),
    "seven bytes": (build.files(weights=b"1234567"), "cannot hold"),
    "length beyond the file": (build.files(weights=raw_safetensors("{}")[:-1]), "cannot hold"),
    "length of 2**63": (build.files(weights=bytes(7) + b"\x80{}"), "cannot hold"),
    "5 MiB": (partial(header, b"{}".ljust(5 << 20)), "the limit is 4194304"),
    "not JSON": (header("{nope}"), "not valid JSON"),
    "a list": (header("[]"), "does not begin"),
    "not UTF-8": (header(b'{"\xff":1}'), "not valid JSON"),
    "key twice": (header(f'{{"a":{_ONE},"a":{_ONE}}}', bytes(4)), "'a' occurs twice"),
    "field twice": (
        header('{"a":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "'dtype' occurs twice",
    ),
    "trailing byte": (header(said(a=one()), bytes(5)), "end at byte 4 of a body of 5"),
    "truncated body": (header(said(a=one()), bytes(3)), "end at byte 4 of a body of 3"),
    "hole": (header(said(a=one(), b=one(offsets=[8, 12])), bytes(12)), "leaves a hole"),
    "overlap": (header(said(a=one(), b=one(offsets=[2, 6])), bytes(6)), "overlaps"),
    "the same bytes twice": (header(said(a=one(), b=one()), bytes(4)), "overlaps"),
    "product beyond 2**64": (header(said(a=one([2**33, 2**33, 0], [0, 0]))), "too large"),
    "dimension of 2**63": (header(said(a=one([0, 2**63], [0, 0]))), "small natural numbers"),
    "unknown dtype": (header(said(a=one(dtype="Q4_K")), bytes(4)), "unknown dtype"),
    "negative offset": (header(said(a=one(offsets=[-4, 0]))), "not an offset"),
    "float offset": (header(said(a=one(offsets=[0, 4.0])), bytes(4)), "small natural numbers"),
    "minus zero": (header('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "not an offset"),
    "NaN as offset": (header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}'), "not a JSON number"),
    "another field": (header(said(a=one(exec="rm")), bytes(4)), "exactly dtype, shape"),
    "metadata of objects": (header('{"__metadata__":{"a":{}}}'), "object of strings"),
    "metadata of 2 MiB": (
        partial(header, repeated(b'{"__metadata__":{"a":"', b"x", b'"}}', 2 << 20)), f"the limit of {MAX_METADATA}",
    ),
    "metadata of many keys": (
        lambda: header(b'{"__metadata__":%b}' % build.numbered('"%d":""', 100_000)), "more tensors than the limit",
    ),
    "60 000 empty tensors": (
        lambda: header(build.numbered('"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', 60_000)),
        f"60000 tensors; the limit is {MAX_TENSORS}",
    ),
    "one tensor beyond the limit": (
        lambda: header(build.numbered('"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', MAX_TENSORS + 1)),
        f"{MAX_TENSORS + 1} tensors; the limit is {MAX_TENSORS}",
    ),
    "100 000 levels": (header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested deeper"),
    "4 MiB of levels": (partial(header, repeated(b'{"a":', b"[", b"")), "nested deeper"),
    # What a few bytes become when they are parsed.
    "4 MiB of objects": (partial(header, repeated(b'{"a":[', b"{},", b"{}]}")), "values beside them"),
    "4 MiB of lists": (partial(header, repeated(b'{"a":[', b"[],", b"[]]}")), "values beside them"),
    "4 MiB of numbers": (partial(header, repeated(b'{"a":[', b"0,", b"0]}")), "values beside them"),
    "4 MiB of texts": (partial(header, repeated(b'{"a":[', b'"ab",', b'""]}')), "values beside them"),
    "4 MiB of keys": (lambda: header(build.numbered('"%d":0', 350_000)), "values beside them"),
    "a number of 400 digits": (
        header('{"a":{"dtype":"F32","shape":[' + "9" * 400 + '],"data_offsets":[0,4]}}'), "not an offset or dimension",
    ),
}  # fmt: skip

# --- I6: names of tensors ----------------------------------------------------------------------------------------

KEYS = {
    "a path": (header(said(**{"../../x": one()}), bytes(4)), "tensor name"),
    "an absolute path": (header(said(**{"/etc/x": one()}), bytes(4)), "tensor name"),
    "two dots": (header(said(**{"a..b": one()}), bytes(4)), "tensor name"),
    "NUL": (header(said(**{"a\0": one()}), bytes(4)), "tensor name"),
    "newline": (header(said(**{"a\n": one()}), bytes(4)), "tensor name"),
    "not ASCII": (header(said(**{"\uff41": one()}), bytes(4)), "tensor name"),
    "right-to-left mark": (header(said(**{"a\u202eb": one()}), bytes(4)), "tensor name"),
    "10 KB": (header(said(**{"a" * 10_000: one()}), bytes(4)), "tensor name"),
    "empty": (header(said(**{"": one()}), bytes(4)), "tensor name"),
    "escaped": (header('{"a\\u002e\\u002e/b":' + _ONE + "}", bytes(4)), "tensor name"),
}
PREFIXES = {
    "no prefix": (
        build.files(weights=safetensors({"model.layers.0.self_attn.q_proj.lora_A.weight": f32(2, 4)})),
        "expected 0 tensors, found 1, missing 0, unexpected 1",
    ),
    "a prefix twice": (tensors(A=None, **{f"base_model.model.{STEM}.lora_A.weight": f32(2, 4)}), "missing 2"),
}  # fmt: skip

# --- I7: configurations ------------------------------------------------------------------------------------------

CONFIGS = {
    "unknown key": (config(surprise=1), "surprise: unknown key"),
    "auto_mapping of other keys": (config(auto_mapping={"run": "x"}), "auto_mapping"),
    "auto_mapping of text": (config(auto_mapping="os.system"), "auto_mapping"),
    "megatron_core": (config(megatron_core="os"), "megatron_core"),
    "megatron_config": (config(megatron_config={"a": 1}), "megatron_config"),
    "pissa": (config(init_lora_weights="pissa"), "changed the base weights"),
    "pissa in steps": (config(init_lora_weights="pissa_niter_16"), "changed the base weights"),
    "loftq": (config(init_lora_weights="loftq"), "changed the base weights"),
    "a regular expression as rank_pattern": (config(rank_pattern={"(a+)+$": 4}), "not compiled"),
    "a regular expression as module": (config(target_modules=["(a+)+$"]), "target_modules"),
    "a method that PEFT compiles code for": (through_peft({}, "BOFT", boft_n_butterfly_factor=2), "compiles"),
    "a function by its name": (through_peft({}, "PEANUT", act_fn="os.system"), "act_fn: expected one of"),
    "a regular expression as pattern of another method": (
        through_peft({}, "DELORA", lambda_pattern={"(a+)+$": 4}), "not compiled",
    ),
    "biases of the base": (through_peft({}, "FOURIERFT", bias="all"), "biases of the base"),
    "r of 10**9": (config(r=10**9), "r: expected"),
    "r of -1": (config(r=-1), "r: expected"),
    "r of 10**400": (config(r=10**400), "r: expected"),
    "alpha NaN": (build.files(config=b'{"peft_type":"LORA","r":2,"lora_alpha":NaN}'), "not a JSON number"),
    "alpha of 1e308": (config(lora_alpha=1e308), "lora_alpha: expected"),
    "alpha of 1e999": (build.files(config=b'{"peft_type":"LORA","r":2,"lora_alpha":1e999}'), "too large"),
    "alpha as text": (config(lora_alpha="8"), "lora_alpha: expected"),
    "alpha of 5000 digits": (
        build.files(config=b'{"peft_type":"LORA","lora_alpha":' + b"9" * 5000 + b"}"), "not valid JSON",
    ),
    "key twice": (build.files(config=b'{"peft_type":"LORA","r":2,"r":2}'), "'r' occurs twice"),
    "50 MB": (lambda: build.files(config=b"{" + b" " * (50 << 20)), "limit (is|of) 1048576"),
    "100 000 levels": (
        build.files(config=b'{"peft_type":"LORA","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested deeper",
    ),
    "1 MiB of lists": (
        partial(build.files, config=repeated(b'{"x":[', b"[],", b"[]]}", 1 << 20)), "more values than the limit",
    ),
    "100 000 unknown keys": (
        lambda: build.files(config=build.numbered('"%d":0', 90_000).replace(b"{", b'{"peft_type":"LORA",', 1)),
        "90000 problems(.|\n)*and 89950 more$",
    ),
    "20 levels where nothing is looked at": (
        config(init_lora_weights="eva", eva_config=build.nested(20)), "nested deeper than 16",
    ),
    "half a surrogate": (build.files(config=b'{"peft_type":"LORA","revision":"\\ud800"}'), "surrogate"),
    "layer_replication": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "modules_to_save as a path": (config(modules_to_save=["../x"]), "modules_to_save"),
    "a name that steers a terminal": (config(base_model_name_or_path="\x1b[2J"), "base_model_name_or_path"),
    "a list": (build.files(config=b"[]"), "not a JSON object"),
    "not UTF-8": (build.files(config=b"\xff\xfe{}"), "not valid JSON"),
}  # fmt: skip


def untouched(store: Store, ref: Ref) -> None:
    """What was foreign is not in our form of the configuration."""
    text = (store.folder(ref) / CONFIG).read_text("utf-8")
    for word in ("auto_mapping", "os.system", "(a+)+", "parent_library"):
        assert word not in text


NEUTRAL = {
    "auto_mapping is dropped": (config(auto_mapping={"base_model_class": "os.system", "parent_library": "os"}), ""),
    "a regular expression is not compiled": (config(target_modules="(a+)+$"), ""),
}

# --- I8: names of bases ------------------------------------------------------------------------------------------

BASES = (
    "https://evil.example/model", "/etc/passwd", "../outside", "../../outside/precious.txt", "file:///etc/passwd",
    "evil/model", "\\\\host\\share", "~/.ssh/id_rsa", "$(touch pwned)", "hub:evil/model", "",
)  # fmt: skip


def named(name: str) -> Attack:
    """A base's name is text: shown and compared, never opened."""

    def kept(store: Store, ref: Ref) -> None:
        assert store.card(ref).base.get("name") in (name, None)  # bytes that were handed over come with another card
        assert store.spec(ref).base_model == name

    what = config(base_model_name_or_path=name)
    return Attack(f"I8 base {name!r}", "files", what, None, harmless=kept)


# --- I11, I12: values and shapes ---------------------------------------------------------------------------------

_SUBNORMAL = 5e-45
_SECOND_B = f"{STEM.replace('0', '1')}.lora_B.weight"
VALUES = {
    "NaN": (tensors(A=build.valued("F32", "f", [0.5, math.nan])), "NaN or infinity at value 1 of 8"),
    "infinity": (tensors(A=build.valued("F32", "f", [1.0, 1.0, math.inf])), "NaN or infinity at value 2 of 8"),
    "minus infinity": (tensors(A=build.valued("F32", "f", [-math.inf])), "NaN or infinity at value 0 of 8"),
    "NaN of half precision": (tensors(A=build.valued("F16", "e", [0.5, math.nan])), "NaN or infinity at value 1"),
    "NaN of bfloat16": (tensors(A=build.valued("BF16", "H", [0x3F80, 0x7FC1])), "NaN or infinity at value 1"),
    "a NaN with a payload": (tensors(A=build.valued("F32", "I", [0x7F800001])), "NaN or infinity at value 0"),
    "NaN of double precision": (tensors(A=build.valued("F64", "d", [0.5, math.nan])), "NaN or infinity at value 1"),
    "int8": (tensors(A=build.valued("I8", "b", [1])), "dtype I8"),
    "float8": (tensors(A=build.valued("F8_E4M3", "B", [1])), "dtype F8_E4M3"),
    "boolean": (tensors(A=build.valued("BOOL", "B", [1])), "dtype BOOL"),
}
NOTHING = {
    f"B of {value}": (tensors(B=f32(4, 2, value=value), **{_SECOND_B: f32(4, 2, value=value)}), "changes nothing")
    for value in (0.0, -0.0)
}  # fmt: skip
SMALL = {
    "subnormal values": (tensors(A=build.valued("F32", "f", [_SUBNORMAL])), ""),
    "double precision": (tensors(A=build.valued("F64", "d", [0.5])), ""),
}
SHAPES = {
    "another rank than the configuration's": (config(r=4), "has rank 2 in its tensors and 4 in the configuration"),
    "ranks of A and B differ": (tensors(A=f32(3, 4)), r"A \[3, 4\] and B \[4, 2\] do not share a rank"),
    "a layer without B": (tensors(B=None), "expected 4 tensors, found 3, missing 1, unexpected 0. Missing: .*lora_B"),
    "one more tensor": (tensors(extra=f32(2, 2)), "found 5, missing 0, unexpected 1. Unexpected: extra"),
    "a module that is not targeted": (config(target_modules=["k_proj"]), "unexpected 4"),
    "no tensor at all": (header("{}"), "found 0"),
    "a bank of 2**48 values": (
        through_peft({"vblora_vector_bank": f32(2, 2)}, "VBLORA", num_vectors=1 << 24, vector_length=1 << 24),
        "num_vectors is 16777216, and no tensor has this size",
    ),
    "a weight of the base beside VeRA's": (
        through_peft({"vera_A": f32(2, 4), "model.model.layers.0.self_attn.q_proj.weight": f32(4, 4)}, "VERA", r=2),
        "unexpected 1. Unexpected: .*q_proj.weight",
    ),
    "the layer that PEFT wraps": (
        through_peft({"model.q_proj.vera_lambda_d": f32(2), "model.q_proj.base_layer.weight": f32(4, 4)}, "VERA", r=2),
        "unexpected 1. Unexpected: .*base_layer",
    ),
    "places that are fractions": (
        through_peft({"model.q_proj.shira_weight": f32(2), "model.q_proj.shira_indices": f32(2, 2)}, "SHIRA", r=1),
        "shira_indices has dtype F32",
    ),
    "a head that is not there": (config(modules_to_save=["score"]), "no tensor of them"),
    "three examples of many": (
        tensors(**{f"x{number}": f32(1) for number in range(9)}), "unexpected 9. Unexpected: x0, x1, x2. Export",
    ),
}  # fmt: skip
CONVOLUTIONS = {"three dimensions": (tensors(A=f32(2, 4, 1), B=f32(4, 2, 1)), "convolution")}

# --- I14: sizes, I15: what is no plain file, I16: what else lies there -------------------------------------------


def _sparse(name: str, start: bytes, size: int, folder: Path) -> None:
    build.sparse(folder / name, start, size)


_CLAIM = raw_safetensors(said(a=one([2**28], [0, 2**30])))
SIZES = {
    "weights of 9 GiB": (partial(_sparse, WEIGHTS, raw_safetensors("{}"), 9 << 30), "end at byte 0|the limit is"),
    "weights of 1 GiB that are none": (partial(_sparse, WEIGHTS, raw_safetensors("{}"), 1 << 30), "end at byte 0"),
    "weights of 1 GiB of another format": (partial(_sparse, WEIGHTS, b"GGUF", 1 << 30), "not a safetensors file|limit"),
    "a header of 7 GiB": (partial(_sparse, WEIGHTS, (7 << 30).to_bytes(8, "little"), 8 << 30), "the limit is 4194304"),
    "a million tensors": (
        partial(_sparse, WEIGHTS, (59_000_000).to_bytes(8, "little") + b"{", 60_000_000), "the limit is 4194304",
    ),
    "a configuration of 8 GiB": (partial(_sparse, CONFIG, b"{", 8 << 30), "the limit is 1048576"),
}  # fmt: skip
TOO_LARGE = {
    "1 GiB that the configuration does not know": (
        partial(_sparse, WEIGHTS, _CLAIM, len(_CLAIM) + (1 << 30)), "missing",
    ),
}  # fmt: skip


def _in_place(name: str, change: str, folder: Path) -> None:
    path = folder / name
    if change == "link":
        path.rename(folder / "real")
        path.symlink_to("real")
    elif change == "link outside":
        path.unlink()
        path.symlink_to("/etc/passwd")
    elif change == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif change == "folder":
        path.unlink()
        path.mkdir()
    elif change == "device":
        path.unlink()
        path.symlink_to("/dev/zero")


SPECIAL = {
    f"{name} is a {change}": (partial(_in_place, name, change), "symbolic link|not a regular file")
    for name in (CONFIG, WEIGHTS)
    for change in ("link", "link outside", "fifo", "folder", "device")
}
_EXTRA = {
    "run.py": b"raise SystemExit", "setup.py": b"raise SystemExit", "__init__.py": b"raise SystemExit",
    "tokenizer_config.json": b'{"chat_template": "{{ cycler.__init__.__globals__.os }}"}',
    "README.md": b"---\nlicense: mit\n---\n", "adapter_model.bin": build.pickled(), "optimizer.pt": build.pickled(),
    **{f"checkpoint-{number}.bin": b"x" for number in range(300)},
}  # fmt: skip


def listed(store: Store, ref: Ref) -> None:
    """Other files are written down by name, the first hundred of them."""
    ignored = store.card(ref).origin["ignored"]
    assert "README.md" in ignored
    assert len(ignored) == 100
    assert not [name for name in os.listdir(store.folder(ref)) if name not in (CONFIG, WEIGHTS, CARD, MANIFEST)]


def _odd_names(folder: Path) -> None:
    for name in (b"\xff\xfe", b"a\nb", b"\x1b[2J", "\u202e".encode(), b"-rf", b" "):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"x")


def printable(store: Store, ref: Ref) -> None:
    """Their names are shown in a form that can be."""
    assert all(name.isprintable() for name in store.card(ref).origin["ignored"])
    assert len(store.card(ref).origin["ignored"]) == 6


# --- exports that were tampered with -----------------------------------------------------------------------------


def foreign(store: Store, ref: Ref) -> None:
    """Taken for an adapter of anybody's: what its card claims counts for nothing."""
    card = store.card(ref)
    assert store.received(ref) is None
    assert card.metrics == {}
    assert card.origin["kind"] == "imported"
    assert {CARD, MANIFEST} <= set(card.origin["ignored"])


def _digest(text: str) -> object:
    return lambda told: told["files"][WEIGHTS].update(sha256=text)


DIGESTS = {
    "a path as digest": (build.with_manifest(_digest("sha256:../../x")), ""),
    "a digest in upper case": (build.with_manifest(_digest("A" * 64)), ""),
    "a digest of 63 digits": (build.with_manifest(_digest("a" * 63)), ""),
    "a digest of full-width digits": (build.with_manifest(_digest("\uff11" * 64)), ""),
    "another file": (
        build.with_manifest(lambda told: told["files"].update({"../../x": {"sha256": "0" * 64, "size": 1}})), "",
    ),
    "a negative size": (build.with_manifest(lambda told: told["files"][WEIGHTS].update(size=-1)), ""),
    "a configuration in another form": (build.export_of(lora_config(auto_mapping={"parent_library": "os"})), ""),
    "a seal of its own": (build.with_manifest(lambda told: told.update(seal="0" * 64)), ""),
}  # fmt: skip
# Cards that would break every listing of the store that took them in.
POISON = {
    "metrics that are a number": (build.export(task={"metrics": 5}, metrics={"test": {"accuracy": 1.0}}), ""),
    "metrics that are lists": (build.export(task={"metrics": [[1]]}, metrics={"test": {"accuracy": 1.0}}), ""),
    "a task that is a list": (build.export(task={"type": ["x"]}), ""),
    "a seed of 400 digits": (build.export(seed=10**400), ""),
    "tokens of 400 digits": (build.export(adapter={"type": "lora", "tokens": 10**400}), ""),
    "a metric that steers a terminal": (build.export(metrics={"\x1b[2J": {"\x1b[2J": 1.0}}), ""),
    "data that steer a terminal": (build.export(data={"\x1b[2J": {"source": "x"}}), ""),
    "1e400": (build.export(metrics={"test": {"accuracy": 10**400}}), ""),
}


def claims(store: Store, ref: Ref) -> None:
    """An export in good order from somebody else: nothing it names is followed."""
    card = store.card(ref)
    assert card.recipe is None
    assert card.parents == []
    assert not any("path" in facts for facts in card.data.values())
    assert card.origin["claimed_parents"] == ["../../x", "sql@1"]
    assert store.received(ref) is not None


CLAIMS = build.export(
    base={"name": "/etc/passwd\x1b[2J", "fingerprint": {"digest": "../../x"}, "quantization": "\u202e"},
    data={"test": {"path": "/etc/passwd", "source": "../../x\x1b", "sha256": "0", "rows": -1}},
    recipe={"data": {"test": {"hub": "evil/data"}}, "\x1b[2J": "\x1b]0;x\x07"},
    parents=["../../x", "sql@1"],
    libraries={"\x1b": "\x1b"},
    task={"type": "\x1b[2J", "metrics": ["../../x"]},
    examples={"test": {"rows": [0], "answers": ["\x1b[2J"]}},
    origin={"kind": "trained", "losses": [1e300, -1e300], "time": 5},
    created="9999-12-31T23:59:59Z",
    duration_seconds=1e300,
)

ATTACKS = [
    *rows("I4", "files", UnsafeFile, PICKLES),
    *rows("I4", "files", NotFound, ABSENT),
    *rows("I5", "files", FormatError, HEADERS, header=True),
    *rows("I6", "files", FormatError, KEYS, header=True),
    *rows("I6", "files", AdapterMismatch, PREFIXES),
    *rows("I7", "files", FormatError, CONFIGS),
    *rows("I7", "files", None, NEUTRAL, harmless=untouched),
    Attack("I7 another method", "files", config(peft_type="POLY"), Unsupported, "type 'POLY' are not supported"),
    Attack(
        "I7 a second model by its name",
        "files",
        config(peft_type="SHADOW", shadow_model="evil/model"),
        Unsupported,
        "it runs a second model",
    ),
    *map(named, BASES),
    *rows("I9", "files", None, DIGESTS, harmless=foreign),
    *rows("I9 card", "files", None, POISON, harmless=foreign),
    Attack("I9 an export that claims much", "files", CLAIMS, None, harmless=claims),
    *rows("I11", "files", AdapterMismatch, VALUES),
    *rows("I11", "files", NoEffect, NOTHING),
    *rows("I11", "files", None, SMALL),
    *rows("I12", "files", AdapterMismatch, SHAPES),
    *rows("I12", "files", Unsupported, CONVOLUTIONS),
    *rows("I14", "folder", FormatError, SIZES, header=True),
    *rows("I14", "folder", AdapterMismatch, TOO_LARGE, header=True),
    *rows("I15", "folder", UnsafeFile, SPECIAL),
    Attack("I16 300 other files", "files", {**build.files(), **_EXTRA}, None, harmless=listed),
    Attack("I16 other files with odd names", "folder", _odd_names, None, harmless=printable),
]
