"""Training of both stages: `train("emoji", "runs/emoji")` makes the shipped model.

Data sets are in data.py, recipes (TOML) in recipe.py and recipes/, the two stages in first_stage.py and
second_stage.py, and the loop that both share, with its checkpoints, in loop.py and checkpoint.py.
"""

from __future__ import annotations

from ldm_fast.files.tensors import CheckpointError
from ldm_fast.training.data import DataConfig, load_data
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.loop import TrainingError, TrainingStopped
from ldm_fast.training.recipe import ConfigError, Recipe, load_recipe, parse_recipe, shipped_recipes
from ldm_fast.training.run import export, train

__all__ = [
    "CheckpointError",
    "DataConfig",
    "DataError",
    "ImageSet",
    "Recipe",
    "ConfigError",
    "TrainingError",
    "TrainingStopped",
    "export",
    "load_data",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "train",
]
