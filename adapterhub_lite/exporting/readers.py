"""The readers an adapter is exported for: what each refuses, or reads otherwise than PEFT without a word.

A reader is one entry of `READERS` and one test. What `says` names is a rule of `traits.TRAITS`; a rule that is not
named is read as PEFT reads it. Readers change: each entry names the code that its facts were read in (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import Unsupported
from .findings import Severity

Says = tuple[Severity, str]


@dataclass(frozen=True)
class Reader:
    """One program that loads adapters.

    Attributes:
        form: what it reads: PEFT's folder or a GGUF file.
        says: rule -> what it does with a version that has this trait.
        advice: what to know when it is served; `{rank}` stands for the rank of the file.
        plain: whether it reads one rank and one scale for the whole file, and LoRA only.
        limit: the largest rank it takes as it comes; None: any.
        limits: the values that this setting of its server can have; empty: any.
        ranks: ranks that its kernels have; a rank between is padded to the next.
        fills: which layers must have matrices, be they zero: those fused with a changed one, or those of all layers.
        heads: heads that it loads as whole tensors; `*` for any.
        named: whether the user must say what it calls the base.
        quantized: quantisation of a base -> how it is told to load one so; none where it is not known to.
    """

    name: str
    form: Literal["peft", "gguf"] = "peft"
    says: Mapping[str, Says] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    plain: bool = True
    limit: int | None = None
    limits: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    fills: Literal["siblings", "layers"] | None = None
    heads: tuple[str, ...] = ()
    named: bool = False
    quantized: Mapping[str, str] = field(default_factory=dict)

    def padded(self, rank: int) -> int:
        """The rank that a file gets whose largest is `rank`."""
        beyond = self.ranks[-1] if self.ranks else 1
        return next((known for known in self.ranks if known >= rank), -(-rank // beyond) * beyond)

    def room(self, rank: int) -> int | None:
        """The setting by which its server takes a file of this rank; None where no setting does."""
        if self.limits:
            return next((known for known in self.limits if known >= rank), None)
        return rank if self.limit is None or rank <= self.limit else None

    def checked_limit(self, wanted: int | None) -> int | None:
        """The largest rank, where the user said how the server was started.

        Raises:
            Unsupported: a value that this setting cannot have.
        """
        if wanted is not None and self.limits and wanted not in self.limits:
            known = ", ".join(map(str, self.limits))
            raise Unsupported(f"{self.name} has no largest rank of {wanted}.", f"--max-rank is one of {known}.")
        return self.limit if wanted is None else wanted


_REFUSED: Severity = "refused"
_WRONG: Severity = "silently wrong"
_INFO: Severity = "info"
_NO_LORA: dict[str, Says] = {
    "method": (_REFUSED, "loads LoRA only"),
    "ia3": (_REFUSED, "loads LoRA only"),
    "factored": (_REFUSED, "loads LoRA only"),
}
_NO_BASE: Says = (_REFUSED, "has no such layers to change")

_DOUBLE = " (near it: scales are quantised too)"

# peft 0.21: `utils.save_and_load.set_peft_model_state_dict`, `tuners.tuners_utils`, `utils.other.get_pattern_key`.
PEFT = Reader(
    "peft",
    plain=False,
    says={
        "lora_bias": (_INFO, "reads it from 0.14 on"),
        "rank_pattern": (_INFO, "reads its keys as 0.15 and later do: older ones know none that begins with ^"),
        "head": (_INFO, "loads it in place of the base's, for the task type that the file names"),
        "base_name": (_INFO, "looks for the base by it in AutoPeftModel and warns when it differs"),
    },
    advice=("PeftModel.from_pretrained(base, FOLDER) loads it.",),
    quantized={
        "int8": "BitsAndBytesConfig(load_in_8bit=True)",
        "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
        "nf4-double": (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
        ),
    },
)

# vllm: `lora/peft_helper.py` (PEFTHelper.from_dict keeps r, lora_alpha, target_modules, bias, modules_to_save,
# use_rslora, use_dora; validate_legal), `config/lora.py` (MaxLoRARanks), `lora/lora_model.py` (its check of modules
# looks at last names only), `lora/utils.py` (parse_fine_tuned_lora_name), the filesystem resolver of `plugins`
# (peft_type and base_model_name_or_path compared as strings); heads: pull request 53555 (2026-09);
# `model_executor/model_loader/bitsandbytes_loader.py` (quantize_4bit with compress_statistics and quant_type nf4).
VLLM = Reader(
    "vllm",
    says={
        **_NO_LORA,
        "dora": (_REFUSED, "refuses use_dora"),
        "lora_bias": (_REFUSED, "drops the key lora_bias and refuses tensors called lora_B.bias"),
        "head": (_REFUSED, "refuses modules_to_save; from 2026-09 on it loads the head of a sequence classifier"),
        "rank_pattern": (_WRONG, "reads one r for all modules, which scales those of another rank wrongly"),
        "alpha_pattern": (_WRONG, "reads one lora_alpha for all modules, but for its newest versions"),
        "rank_limit": (_REFUSED, "refuses ranks above --max-lora-rank, which is 16 unless set"),
        "module": _NO_BASE,
        "key_prefix": (_WRONG, "looks at the last name only, finds no module and answers as the base does"),
        "embedding": (_INFO, "loads it where the model's class lists its embedding and the vocabulary is the base's"),
        "conv1d": (_INFO, "has LoRA for no model of this type so far"),
        "base_name": (_WRONG, "in its filesystem resolver compares it with the served model's name, letter by letter"),
    },
    advice=(
        "vllm serve BASE --enable-lora --max-lora-rank {server_rank} --lora-modules NAME=FOLDER",
        "--max-lora-rank is one of 1, 8, 16, 32, 64, 128, 256, 320, 512.",
    ),
    limit=16,
    limits=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    heads=("score.weight", "score.bias", "classifier.weight", "classifier.bias"),
    quantized={
        "nf4": f"--quantization bitsandbytes{_DOUBLE}",
        "nf4-double": "--quantization bitsandbytes",
    },
)

# sglang: `srt/lora/lora.py` (LoRAAdapter.scaling = lora_alpha / r; normalize_qkv_proj wants q_proj and v_proj where one
# of the three is; normalize_gate_up_proj starts from gate_proj), `srt/lora/lora_config.py`, `srt/lora/mem_pool.py`
# (can_support: r against max_lora_rank, target_modules by their last names; buffers of one rank).
SGLANG = Reader(
    "sglang",
    says={
        **_NO_LORA,
        "dora": (_WRONG, "does not read magnitudes"),
        "rslora": (_WRONG, "scales by alpha / r whatever use_rslora says"),
        "lora_bias": (_WRONG, "does not read lora_B.bias"),
        "head": (_WRONG, "does not read heads"),
        "rank_pattern": (_WRONG, "reads one r; newer versions refuse the pattern"),
        "alpha_pattern": (_WRONG, "reads one lora_alpha; newer versions refuse the pattern"),
        "rank_limit": (_REFUSED, "refuses ranks above --max-lora-rank"),
        "module": _NO_BASE,
        "key_prefix": (_WRONG, "finds layers by their number and last name only"),
        "siblings": (_REFUSED, "fuses q, k, v and gate, up, and finds the change of one without the others a mistake"),
        "embedding": (_INFO, "loads embed_tokens and lm_head where they are in target_modules"),
        "conv1d": (_INFO, "knows the layers of decoders built as Llama is"),
    },
    advice=("python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME=FOLDER",),
    fills="siblings",
)

# lorax: `server/lorax_server/adapters/lora.py` (map_weights_for_model skips modules without lora_A and lora_B;
# LoraWeights.load returns None where one layer of a type lacks them, and writes the padded rank into config.r, by which
# the types that come after it are divided), `utils/sgmv.py` (pad_rank; kernels of rank 16, 32, 64, 128),
# `docs/guides/quantization.md` (bitsandbytes-nf4), whose layers have compress_statistics.
LORAX = Reader(
    "lorax",
    says={
        **_NO_LORA,
        "dora": (_WRONG, "does not read magnitudes"),
        "lora_bias": (_WRONG, "does not read lora_B.bias"),
        "head": (_WRONG, "does not read heads of modules_to_save"),
        "rank_pattern": (_REFUSED, "stacks the matrices of all layers, which must have one rank"),
        "alpha_pattern": (_WRONG, "reads one lora_alpha for all modules"),
        "padded_rank": (_WRONG, "pads ranks itself, then divides alpha by the padded rank in all types but the first"),
        "rank_limit": (_REFUSED, "has no kernels for ranks above 128"),
        "module": _NO_BASE,
        "key_prefix": (_WRONG, "skips keys that are not those of the served class"),
        "layers": (_WRONG, "drops a type of layers altogether where one layer has no change of it"),
        "embedding": (_WRONG, "does not read lora_embedding_A and lora_embedding_B"),
    },
    advice=("Serve it on one or two GPUs: on more it pads rank 16 to 8 times their number, with that division.",),
    limit=128,
    ranks=(16, 32, 64, 128),
    fills="layers",
    quantized={
        "nf4": f"--quantize bitsandbytes-nf4{_DOUBLE}",
        "nf4-double": "--quantize bitsandbytes-nf4",
    },
)

# llama.cpp: `convert_lora_to_gguf.py` (one alpha; exits on tensors that are not lora_A or lora_B; raises for lm_head of
# a tied base), `src/llama-adapter.cpp` (architecture and shapes checked), `src/llama-graph.cpp` (scale = alpha / rank).
_GGUF_SAYS: dict[str, Says] = {
    **_NO_LORA,
    "dora": (_REFUSED, "has no magnitudes in its format"),
    "rslora": (_WRONG, "in its converter does not read use_rslora: scales by alpha / r"),
    "lora_bias": (_REFUSED, "has no biases in its format"),
    "head": (_REFUSED, "has no heads in its format"),
    "alpha_pattern": (_WRONG, "in its converter reads one lora_alpha for all modules"),
    "module": _NO_BASE,
    "key_prefix": (_REFUSED, "finds no tensor by names of another class"),
    "architecture": (_REFUSED, "finds tensors by the names that an architecture has"),
    "embedding": (_INFO, "takes it in a form of its own"),
    "tied_output": (_REFUSED, "cannot change one of the two alone"),
}
LLAMA_CPP = Reader(
    "llama.cpp",
    form="gguf",
    says=_GGUF_SAYS,
    advice=("llama-server -m BASE.gguf --lora FOLDER/adapter.gguf",),
)

# ollama: `docs/import.md` (FROM, ADAPTER), `runner/ollamarunner/runner.go` ("loras are not yet implemented" for
# architectures that its own engine runs); adapters otherwise go to the llama.cpp within it.
OLLAMA = Reader(
    "ollama",
    form="gguf",
    says={**_GGUF_SAYS, "base_name": (_INFO, "takes the base by the name after FROM, which nothing else checks")},
    advice=(
        "ollama create NAME -f FOLDER/Modelfile",
        "Architectures that Ollama runs by its own engine answer `loras are not yet implemented`: "
        "then bake it, with ahl merge --to gguf-q8_0.",
    ),
    named=True,
)

READERS: dict[str, Reader] = {reader.name: reader for reader in (PEFT, VLLM, SGLANG, LORAX, LLAMA_CPP, OLLAMA)}
"""Every reader by name."""


_CUT: dict[str, Says] = {
    "method": (_INFO, "reads it, but there is no rank to cut"),
    "dora": (_INFO, "reads it, but cut to a rank it is LoRA"),
    "ia3": (_INFO, "reads it, but cut to a rank it is LoRA"),
    "factored": (_INFO, "reads it, but cut to a rank it is LoRA"),
    "lora_bias": (_INFO, "reads it"),
    "head": (_INFO, "loads it in place of the base's"),
    "rslora": (_INFO, "reads it"),
    "alpha_pattern": (_INFO, "reads it"),
    "rank_pattern": (_INFO, "reads it"),
    "module": _NO_BASE,
}


def as_cut(reader: Reader) -> Reader:
    """A reader of all that PEFT writes, for an adapter whose ranks are cut: that is plain LoRA."""
    return (
        reader
        if reader.plain
        else replace(reader, plain=True, says={**_CUT, "base_name": reader.says["base_name"]}, heads=("*",))
    )


def reader_named(name: str) -> Reader:
    """A reader of the registry.

    Raises:
        Unsupported: there is none of this name.
    """
    if name not in READERS:
        raise Unsupported(f"{name!r} is no reader that exports are made for.", f"Use one of {', '.join(READERS)}.")
    return READERS[name]
