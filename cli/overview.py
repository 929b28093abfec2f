"""The commands there are, and the text of `ahl --help`. Imports nothing, so that asking for help is instant."""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Show everything once, on real models: train, swap, mix, merge."),
    "train": ("train", "Train the adapter that a recipe describes and store it."),
    "plan": ("plan", "Say what training a recipe would take, before the first step."),
    "runs": ("runs", "List training runs, sweeps and tunes that have not ended, and how to go on."),
    "sweep": ("sweep", "Train every point of a grid together, store each, and compare them."),
    "tune": ("tune", "Search learning rate, rank and the like in a given time; store the best."),
    "recipes": ("recipes", "List the built-in recipes, or print one."),
    "list": ("list", "List the stored adapters."),
    "show": ("show", "Show what is known of one adapter."),
    "search": ("search", "Find adapters by words, base and metrics; everything must hold."),
    "log": ("log", "Show the history of a name, the latest first."),
    "diff": ("diff", "Compare two versions: recipe, data, metrics, weights, answers."),
    "alias": ("alias", "Point an alias at a version, look at it, or take it away."),
    "promote": ("promote", "Point an alias at a version if it is no worse than what the alias names now."),
    "rollback": ("rollback", "Point an alias at the version it named before."),
    "remove": ("remove", "Remove a version for ever."),
    "import": ("import_", "Store a PEFT folder, an archive or a Hub repository as a new version."),
    "export": ("export", "Write a version as a folder that PEFT loads, or as one file."),
    "push": ("push", "Upload a version to the Hugging Face Hub, with a model card, in one commit."),
    "verify": ("verify", "Check the bytes of one version, or of the whole store."),
    "gc": ("gc", "Remove what crashed or finished work has left behind."),
    "run": ("run", "Answer one prompt, streaming."),
    "chat": ("chat", "Talk to a base and switch its adapters as you go."),
    "predict": ("predict", "Answer every row of a file."),
    "eval": ("eval", "Measure an adapter against its bare base."),
    "conflicts": ("conflicts", "Compare what adapters would do to each other if they were combined."),
    "combine": ("combine", "Combine adapters of one base into a new version, measured on their test data."),
    "convert": ("convert", "Bring an adapter into plain LoRA, or to another rank, as a new version."),
    "merge": ("merge", "Bake adapters into a model that plain transformers, or llama.cpp, loads."),
    "base": ("base", "List, fetch and show base models."),
    "doctor": ("doctor", "Say what was chosen on this machine and why, and what is wrong."),
}
"""name -> (module in `commands`, one line of help)."""

_SECTIONS = {
    "Start": ("demo", "train", "plan", "sweep", "tune", "runs", "recipes"),
    "Stored adapters": ("list", "show", "search", "log", "diff", "alias", "promote", "rollback", "remove"),
    "Move and keep them": ("import", "export", "push", "verify", "gc"),
    "Use them": ("run", "chat", "predict", "eval", "conflicts", "combine", "convert", "merge"),
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
