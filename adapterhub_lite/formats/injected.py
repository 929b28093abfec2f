"""PEFT methods without a form of ours: which keys of their configurations there are, and what they may be.

PEFT itself computes with these adapters (`adapters.injected`), on what is read here and nothing else: every option has
a type and a range, none is a path, a name to import or a pattern to compile, and how the tensors began is left out,
since the file holds them as they are. Source of keys and defaults: `peft.tuners.*.config` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .fields import Check, Fields, boolean, integer, number, optional, shown
from .peft_fields import common, named_modules, pattern, targets
from .specs import InjectedSpec

MAX_RANK = 8192
INDEX_DTYPES = frozenset({"I32", "I64"})
_SEED = integer(0, (1 << 63) - 1)
_SIZE = integer(1, 1 << 24)
_SMALL = 64  # a rank up to this is not worth checking: a pattern may replace it everywhere
_rank = integer(1, MAX_RANK)
_dropout = number(0.0, 1.0)
Option = tuple[Check[Any], Any]
"""What reads a key, and the value that PEFT takes where it is absent."""


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Attributes:
        options: what PEFT needs to build the layers around the tensors.
        unread: keys that say how the tensors began, or of training alone.
        sizes: options that size what PEFT allocates; each must be a dimension of some tensor of the file.
        indices: last names of tensors that hold whole numbers, places in the weight of their module.
        layers: the layers that an adapter may change.
        heads: whether PEFT saves a classification head with it.
        everywhere: whether every layer that is changed has a tensor of its own in the file.
        coherent: what is wrong with options that are right one by one, or None.
    """

    options: Mapping[str, Option]
    unread: tuple[str, ...] = ("init_weights",)
    sizes: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()
    layers: Literal["linear", "norm", "embedding"] = "linear"
    heads: bool = True
    everywhere: bool = True
    coherent: Callable[[Mapping[str, Any]], str | None] = field(default=lambda options: None)


def tensor_mark(method: str) -> str:
    """What the names of a method's own tensors begin with, after the path of a module."""
    return f"{method.lower()}_"


def module_of(method: str, name: str) -> str | None:
    """The path inside the base of the module that a tensor belongs to; "" for one that all share, None: no such tensor.

    Names are `base_model.model.<module>.<mark>...`, and `base_model.<mark>...` for what all modules share.
    """
    parts = name.split(".")
    mark = tensor_mark(method)
    place = next((i for i, part in enumerate(parts) if part.startswith(mark)), None)
    if place is None or parts[0] != "base_model" or place == 2 or (place > 2 and parts[1] != "model"):
        return None
    return ".".join(parts[2:place])


def is_index(method: str, name: str) -> bool:
    """Whether a tensor holds places in a weight, as whole numbers."""
    return name.rpartition(".")[2] in METHODS[method].indices


def unsized(spec: InjectedSpec, shapes: Iterable[tuple[int, ...]]) -> str | None:
    """A size that the configuration claims and no tensor has: PEFT would allocate by it before it sees a tensor."""
    given = list(shapes)
    found = {size for shape in given if 0 not in shape for size in shape}
    claimed = list(METHODS[spec.method].sizes)
    claimed += [key for key in ("r", "rank") if type(spec.options.get(key)) is int and spec.options[key] > _SMALL]
    for key in claimed:
        if spec.options[key] not in found:
            return f"{key} is {spec.options[key]}, and no tensor has this size"
    if spec.options.get("depth", 0) > len(given):
        return f"depth is {spec.options['depth']}, and the file holds {len(given)} tensors"
    return None


def read_injected(fields: Fields, method: str) -> InjectedSpec:
    """The spec of a configuration whose `peft_type` is one of METHODS; problems are collected in `fields`."""
    known = METHODS[method]
    fields.neutral("bias", "none", reason="it moves biases of the base, which all adapters share")
    for key in known.unread:
        fields.take(key, _unread, None)
    options = {key: fields.take(key, check, default) for key, (check, default) in known.options.items()}
    for key, (values, reason) in _ONLY.get(method, {}).items():
        fields.neutral(key, *values, reason=reason)
    if not known.heads:
        fields.neutral("modules_to_save", None, reason=f"PEFT saves none with {method}")
    names: tuple[str, ...] = ()
    if known.layers == "embedding":
        names = fields.need("target_modules", named_modules, names)
    else:
        names = targets(fields, "exclude_modules", "layers_to_transform", "layers_pattern")
    spec = InjectedSpec(method, options, names, **common(fields))
    if not fields.problems and (wrong := known.coherent(options)):
        fields.problems.append(wrong)
    fields.finish()
    return spec


def injected_keys(spec: InjectedSpec) -> dict[str, Any]:
    """The keys of its own that PEFT reads a spec from."""
    return {**spec.options, "peft_type": spec.method, "target_modules": sorted(spec.target_modules)}


def _unread(value: Any) -> None:
    if isinstance(value, list | dict) or (isinstance(value, str) and len(value) > 64):
        raise ValueError("expected one value")


def _one_of(*values: object) -> Check[Any]:
    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"expected one of {', '.join(map(shown, values))}")
        return value

    return check


def _real(low: float, high: float) -> Check[Any]:
    """A number that stays whole if it was, as PEFT types many of them."""
    check = number(low, high)

    def checked(value: Any) -> Any:
        check(value)
        return value

    return checked


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list) or not 0 < len(value) <= 100_000 or len(set(map(repr, value))) < len(value):
        raise ValueError("expected a list of different token ids")
    return [integer(0, 1 << 31)(one) for one in value]


def _share(value: Any) -> Any:
    return integer(1, 1 << 24)(value) if type(value) is int else number(0.0, 1.0, open_low=True)(value)


def _one_given(first: str, second: str) -> Callable[[Mapping[str, Any]], str | None]:
    """PEFT takes one of two sizes and makes the other of it."""
    return lambda o: None if bool(o[first]) != bool(o[second]) else f"{first}: give it or {second}, the other as 0"


_fan: dict[str, Option] = {"fan_in_fan_out": (boolean, False)}
_SAVED = "only what is saved with its projections or indices as they are is read"
_ONLY: dict[str, dict[str, tuple[tuple[object, ...], str]]] = {
    # PEFT compiles CUDA code for larger ones, and where it cannot it leaves their factors out.
    "BOFT": {"boft_n_butterfly_factor": ((1,), "it needs code that PEFT compiles")},
    "PVERA": {"sample_at_inference": ((False,), "answers would be random"), "generator_seed": ((None,), "as above")},
    "SUPERTUNING": {"save_precomputed_indices": ((True,), _SAVED)},
    "TINYLORA": {"save_projection": ((True,), _SAVED)},
    "UNILORA": {"save_indices": ((False,), "the indices follow from proj_seed")},
    "VBLORA": {"save_only_topk_weights": ((False,), "the logits that PEFT makes of it are infinite")},
}
_projection: dict[str, Option] = {"projection_prng_key": (_SEED, 0), "save_projection": (boolean, True)}
_cayley: dict[str, Option] = {"num_cayley_neumann_terms": (integer(1, 64), 5)}
_patterned: dict[str, Option] = {"rank_pattern": (pattern(_rank), {})}
_frequencies: dict[str, Option] = {
    "n_frequency_pattern": (pattern(_SIZE), {}),
    "random_loc_seed": (_SEED, 777),
    **_fan,
}

METHODS: Mapping[str, Method] = {
    # arXiv 2509.15974
    "BEFT": Method({}),
    # arXiv 2311.06243
    "BOFT": Method(
        {"boft_block_size": (integer(0, 1 << 16), 4), "boft_block_num": (integer(0, 1 << 16), 0),
         "boft_dropout": (_dropout, 0.0), **_fan},
        coherent=_one_given("boft_block_size", "boft_block_num"),
    ),
    # arXiv 2407.19342
    "C3A": Method({"block_size": (_SIZE, 256), "block_size_pattern": (pattern(_SIZE), {})}),
    "DEFT": Method(
        {"r": (_rank, 8), "decomposition_method": (_one_of("relu", "qr"), "relu"), "alpha": (optional(_SIZE), None),
         "para": (boolean, False), "deft_dropout": (_dropout, 0.0), **_fan},
        unread=("init_weights", "init_scale"),
    ),
    # arXiv 2503.18225
    "DELORA": Method(
        {"r": (_rank, 8), "delora_lambda": (_real(0.0, 1e6), 15), "module_dropout": (_dropout, 0.0), **_patterned,
         "lambda_pattern": (pattern(_real(0.0, 1e6)), {})},
    ),
    # arXiv 2405.03003
    "FOURIERFT": Method({"n_frequency": (_SIZE, 1000), "scaling": (_real(-1e6, 1e6), 150.0), **_frequencies}),
    # arXiv 2306.07967
    "GLORA": Method(
        {"r": (_rank, 8), "config_A_B": (_one_of("lora", "vector", "constant", "none"), "lora"),
         "config_C": (_one_of("lora", "vector", "none"), "lora"),
         "config_D_E": (_one_of("vector", "constant", "none"), "constant")},
    ),
    # arXiv 2505.20355
    "GRALORA": Method(
        {"r": (_rank, 32), "hybrid_r": (integer(0, MAX_RANK), 0), "alpha": (_real(0.0, 1e6), 64),
         "gralora_k": (_rank, 2), "gralora_dropout": (_dropout, 0.0), **_fan},
        coherent=lambda o: f"r: {o['r']} is no multiple of gralora_k" if o["r"] % o["gralora_k"] else None,
    ),
    "HIRA": Method({"r": (_rank, 32), "hira_dropout": (_dropout, 0.0), **_patterned, **_fan}),
    # arXiv 2405.17484
    "HRA": Method({"r": (_rank, 8), "apply_GS": (boolean, False)}),
    # arXiv 2312.11420
    "LN_TUNING": Method({}, unread=(), layers="norm"),
    # arXiv 2409.15371; `bat` and `mini` are other forms of it, not other beginnings
    "MISS": Method(
        {"r": (_rank, 64), "mini_r": (_rank, 1), "init_weights": (_one_of(True, False, "bat", "mini"), True),
         "miss_dropout": (_dropout, 0.0)},
        unread=(),
    ),
    # arXiv 2306.07280
    "OFT": Method(
        {"r": (integer(0, 1 << 16), 0), "oft_block_size": (integer(0, 1 << 16), 32), "coft": (boolean, False),
         "eps": (_real(0.0, 1.0), 6e-5), "block_share": (boolean, False), "use_cayley_neumann": (boolean, True),
         "module_dropout": (_dropout, 0.0), **_cayley, **_fan},
        coherent=_one_given("r", "oft_block_size"),
    ),
    # arXiv 2504.07097
    "OSF": Method(
        {"effective_rank": (optional(_share), None), "rank_pattern": (optional(pattern(_share)), None),
         "target_svd_config": (optional(pattern(_SIZE)), None)},
    ),
    # arXiv 2410.01870
    "PEANUT": Method(
        {"r": (_rank, 32), "depth": (integer(0, 64), 0), "scaling": (_real(-1e6, 1e6), 1.0),
         "act_fn": (_one_of("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "linear"), "relu")},
    ),
    # arXiv 2505.11235
    "PSOFT": Method(
        {"r": (_rank, 32), "psoft_alpha": (_real(0.0, 1e6), 32), "psoft_dropout": (_dropout, 0.0),
         "ab_svd_init": (_one_of("psoft_init", "pissa_init"), "psoft_init"),
         "psoft_svd": (_one_of("full", "lowrank"), "full"), "psoft_svd_lowrank_niter": (integer(1, 64), 10),
         "random_seed": (_SEED, 0), "psoft_orth": (boolean, True), "psoft_mag_a": (boolean, True),
         "psoft_mag_b": (boolean, True), "use_cayley_neumann": (boolean, False),
         "cayley_neumann_eps": (optional(_real(1e-9, 0.999999)), None), **_cayley, **_fan},
    ),
    # arXiv 2512.07703
    "PVERA": Method({"r": (_rank, 256), "pvera_dropout": (_dropout, 0.0), **_projection, **_fan},
                    unread=("init_weights", "d_initial")),
    # arXiv 2502.00987
    "RANDLORA": Method(
        {"r": (_rank, 32), "sparse": (boolean, False), "very_sparse": (boolean, False),
         "randlora_alpha": (_real(0.0, 1e6), 640), "randlora_dropout": (_dropout, 0.0), **_projection, **_fan},
        sizes=("r",),
    ),
    # arXiv 2409.00119
    "ROAD": Method(
        {"variant": (_one_of("road_1", "road_2", "road_4"), "road_1"), "group_size": (_SIZE, 64)},
        coherent=lambda o: f"group_size: {o['group_size']} is odd" if o["group_size"] % 2 else None,
    ),
    # arXiv 2406.13175
    "SHIRA": Method({"r": (_rank, 32), "mask_type": (_one_of("random"), "random"),
                     "random_seed": (optional(_SEED), None), **_fan}, indices=("shira_indices",)),
    # arXiv 2607.09287
    "SUPERTUNING": Method(
        {"sparsity": (_real(0.0, 1.0), 0.99), "select_top": (boolean, True), "r": (optional(_rank), None),
         "lora_alpha": (optional(_real(0.0, 1e6)), None), "lora_dropout": (_dropout, 0.0)},
        indices=("supertuning_indices",),
    ),
    # arXiv 2602.04118
    "TINYLORA": Method(
        {"r": (integer(1, 64), 2), "u": (integer(1, 1 << 16), 64), "weight_tying": (_real(0.0, 1.0), 0.0),
         "projection_seed": (_SEED, 42), "tinylora_dropout": (_dropout, 0.0), **_fan},
        unread=("init_weights", "init_v_bound"), sizes=("u",),
    ),
    "TRAINABLE_TOKENS": Method(
        {"token_indices": (_tokens, [])},
        layers="embedding", heads=False,
        coherent=lambda o: None if o["token_indices"] else "token_indices: names no token",
    ),
    # arXiv 2506.00799
    "UNILORA": Method(
        {"r": (integer(1, 1024), 4), "proj_seed": (_SEED, 42), "theta_d_length": (_SIZE, 256),
         "unilora_dropout": (_dropout, 0.0), **_fan},
        unread=("init_weights", "init_theta_d_bound"), sizes=("theta_d_length",), everywhere=False,
    ),
    # arXiv 2405.15179
    "VBLORA": Method(
        {"r": (integer(1, 1024), 4), "num_vectors": (_SIZE, 256), "vector_length": (_SIZE, 256),
         "topk": (integer(1, 1024), 2), "vblora_dropout": (_dropout, 0.0), **_fan},
        unread=("init_vector_bank_bound", "init_logits_std"), sizes=("num_vectors", "vector_length"),
    ),
    # arXiv 2310.11454
    "VERA": Method({"r": (_rank, 256), "vera_dropout": (_dropout, 0.0), **_projection, **_fan},
                   unread=("init_weights", "d_initial"), sizes=("r",)),
    # arXiv 2505.12532
    "WAVEFT": Method(
        {"n_frequency": (_SIZE, 2592), "scaling": (_real(-1e6, 1e6), 25.0), "use_idwt": (boolean, True),
         "wavelet_family": (_one_of(*(f"db{i}" for i in range(1, 39)), *(f"sym{i}" for i in range(2, 21)),
                                    *(f"coif{i}" for i in range(1, 18))), "db1"),
         "proportional_parameters": (boolean, False), **_frequencies},
    ),
}  # fmt: skip

REFUSED: Mapping[str, str] = {
    "ADAMSS": "PEFT finds its layers by clustering the base's weights with scikit-learn",
    "ADAPTION_PROMPT": "it replaces whole attention blocks of one architecture",
    "CARTRIDGE": "it is a cache of keys and values that was distilled for one text",
    "CPT": "it is made of the tokens of its training examples",
    "FROD": "PEFT decomposes all weights of the base together at every load, and no file holds the result",
    "LILY": "its router averages over all tokens of a batch: the answer of a row would depend on the rows beside it",
    "MULTITASK_PROMPT_TUNING": "each text needs the number of a task beside it",
    "POLY": "each text needs the number of a task beside it",
    "SHADOW": "it runs a second model beside the base",
    "XLORA": "it is a mixture of other adapters, which it names by their paths",
}
