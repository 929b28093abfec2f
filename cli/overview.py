"""The commands there are, and the text of `ahl --help`. Imports nothing, so that asking for help is instant."""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Show everything once, on real models: train, swap, mix, merge."),
    "train": ("train", "Train the adapter that a recipe describes and store it."),
    "recipes": ("recipes", "List the built-in recipes, or print one."),
    "list": ("list", "List the stored adapters."),
    "show": ("show", "Show what is known of one adapter."),
    "alias": ("alias", "Point an alias at a version, look at it, or take it away."),
    "remove": ("remove", "Remove a version for ever."),
    "import": ("import_", "Store a PEFT folder as a new version."),
    "export": ("export", "Write a version as a folder that PEFT loads."),
    "verify": ("verify", "Check the bytes of one version, or of the whole store."),
    "run": ("run", "Answer one prompt, streaming."),
    "chat": ("chat", "Talk to a base and switch its adapters as you go."),
    "predict": ("predict", "Answer every row of a file."),
    "eval": ("eval", "Measure an adapter against its bare base."),
    "merge": ("merge", "Bake an adapter into a checkpoint that plain transformers loads."),
    "base": ("base", "List, fetch and show base models."),
    "doctor": ("doctor", "Say what was chosen on this machine and why, and what is wrong."),
}
"""name -> (module in `commands`, one line of help)."""

_SECTIONS = {
    "Start": ("demo", "train", "recipes"),
    "Stored adapters": ("list", "show", "alias", "remove", "import", "export", "verify"),
    "Use them": ("run", "chat", "predict", "eval", "merge"),
    "This machine": ("base", "doctor"),
}
_HEAD = """usage: ahl COMMAND [OPTIONS]

Train, store, swap, mix and merge adapters on one frozen, quantised base model.
"""
_TAIL = """Options:
  -h, --help            Show this text; `ahl COMMAND --help` shows examples.
  -V, --version         Show the version.
  --install-completion  Install completion for this shell.
  --show-completion     Print it, to install it yourself.

An adapter is named NAME (its newest version), NAME@3 (that version) or NAME:ALIAS.
The store is --store DIR, else the folder AHL_HOME names, else the user's data folder.
"""


def overview() -> str:
    """The text of `ahl --help`."""
    parts = [_HEAD]
    for title, names in _SECTIONS.items():
        lines = [f"  {name:<9} {COMMANDS[name][1]}" for name in names]
        parts.append("\n".join([f"{title}:", *lines, ""]))
    return "\n".join([*parts, _TAIL])
