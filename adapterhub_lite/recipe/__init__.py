"""Recipes: what to train, on what, and how, as one checked value.

Takes: YAML (a built-in name or a file) and overrides.
Gives: a frozen, complete `Recipe`, or every problem at once with its field path, line and nearest name.
Never: imports or runs anything that a YAML names, or reads the data it points to.
"""

from .copied import copied_text
from .files import check_files
from .load import changed_recipe, list_recipes, load_recipe, recipe_dict
from .options import PeftAdapter
from .schema import (
    METRICS,
    Adapter,
    ClassifyTask,
    DataConfig,
    DataSource,
    FileData,
    HubData,
    InstructTask,
    LoraAdapter,
    PrefixAdapter,
    Recipe,
    TagTask,
    Task,
)
from .training import EarlyStopping, TrainingConfig

__all__ = [
    "METRICS",
    "Adapter",
    "ClassifyTask",
    "DataConfig",
    "DataSource",
    "EarlyStopping",
    "FileData",
    "HubData",
    "InstructTask",
    "LoraAdapter",
    "PeftAdapter",
    "PrefixAdapter",
    "Recipe",
    "TagTask",
    "Task",
    "TrainingConfig",
    "changed_recipe",
    "check_files",
    "copied_text",
    "list_recipes",
    "load_recipe",
    "recipe_dict",
]
