"""Training of both stages: `train("emoji", "runs/emoji")` makes the shipped model.

run.py is the whole way from a recipe (recipe.py, recipes/*.toml) and a data set (data.py) to a model file. The two
stages are in first_stage.py and second_stage.py, the loop that both share in loop.py, its checkpoints in checkpoint.py.
"""

from __future__ import annotations

from ldm_fast.configs.from_dict import ConfigError
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.training.data import DataConfig, load_data
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.loop import TrainingError, TrainingStopped
from ldm_fast.training.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from ldm_fast.training.run import export, train

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "ImageSet",
    "Recipe",
    "TrainingError",
    "TrainingStopped",
    "export",
    "load_data",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "train",
]
