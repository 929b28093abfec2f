"""The folders of a user: where stored adapters and rebuildable things lie. Never: makes or opens one."""

from __future__ import annotations

import os
from pathlib import Path


def default_root() -> Path:
    """The folder of the store: the one AHL_HOME names, else the user's data folder."""
    home = os.environ.get("AHL_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("adapterhub-lite", appauthor=False))


def cache_root() -> Path:
    """The folder that AHL_CACHE names, else the user's cache folder: what can be made again."""
    named = os.environ.get("AHL_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("adapterhub-lite"))
