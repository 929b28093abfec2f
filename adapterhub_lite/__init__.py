"""adapterhub-lite: train, store, swap, mix and merge adapters on one frozen, quantised base.

    import adapterhub_lite as ahl
    store = ahl.Store()
    base = ahl.load_base("smollm2-135m-instruct", quantize="nf4")
    ref = ahl.train("sql", store=store, base=base)
    runtime = ahl.Runtime(base, store)
    runtime.answer(["..."], adapters=[ref])

Names are imported when they are first used: `import adapterhub_lite` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdapterHubError": "errors",
    "Base": "bases.load",
    "Card": "formats.card",
    "ConflictReport": "combining.conflicts",
    "Difference": "workflows.difference",
    "MergeReport": "merging.report",
    "Prediction": "runtime.predict",
    "Recipe": "recipe",
    "Ref": "names",
    "Runtime": "runtime.runtime",
    "Sampling": "runtime.sampling",
    "SearchResult": "workflows.search_results",
    "Store": "store",
    "TaggedWord": "runtime.predict",
    "combine": "workflows.combine",
    "conflicts": "workflows.conflicts",
    "convert": "workflows.convert",
    "diff": "workflows.diff",
    "evaluate": "workflows.evaluate",
    "export": "workflows.export",
    "load_base": "bases.load",
    "load_recipe": "recipe",
    "merge": "workflows.merge",
    "promote": "workflows.promote",
    "pull": "workflows.hub",
    "push": "workflows.hub",
    "sweep": "workflows.sweep",
    "train": "workflows.train",
    "train_together": "workflows.train",
    "tune": "workflows.tune",
}

__all__ = [
    "AdapterHubError",
    "Base",
    "Card",
    "ConflictReport",
    "Difference",
    "MergeReport",
    "Prediction",
    "Recipe",
    "Ref",
    "Runtime",
    "Sampling",
    "SearchResult",
    "Store",
    "TaggedWord",
    "__version__",
    "combine",
    "conflicts",
    "convert",
    "diff",
    "evaluate",
    "export",
    "load_base",
    "load_recipe",
    "merge",
    "promote",
    "pull",
    "push",
    "sweep",
    "train",
    "train_together",
    "tune",
]

if TYPE_CHECKING:
    from .bases.load import Base, load_base
    from .combining.conflicts import ConflictReport
    from .errors import AdapterHubError
    from .formats.card import Card
    from .merging.report import MergeReport
    from .names import Ref
    from .recipe import Recipe, load_recipe
    from .runtime.predict import Prediction, TaggedWord
    from .runtime.runtime import Runtime
    from .runtime.sampling import Sampling
    from .store import Store
    from .workflows.combine import combine
    from .workflows.conflicts import conflicts
    from .workflows.convert import convert
    from .workflows.diff import diff
    from .workflows.difference import Difference
    from .workflows.evaluate import evaluate
    from .workflows.export import export
    from .workflows.hub import pull, push
    from .workflows.merge import merge
    from .workflows.promote import promote
    from .workflows.search_results import SearchResult
    from .workflows.sweep import sweep
    from .workflows.train import train, train_together
    from .workflows.tune import tune


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
