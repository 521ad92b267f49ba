"""`train`: a recipe from beginning to end, and `export`: the model file of any checkpoint.

RUN/first_stage/   checkpoints/  samples/  metrics.jsonl
RUN/second_stage/  checkpoints/  samples/  metrics.jsonl
RUN/model.safetensors  lock
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_fast.checkpoints.load import load
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.from_dict import to_dict
from ldm_fast.files.atomic import reason, remove_unfinished
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.names import without_training_state
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.training.checkpoint import list_checkpoints, newest_checkpoint
from ldm_fast.training.data import load_data
from ldm_fast.training.fingerprint import Fingerprint, conditions_digest, fingerprint, tensors_digest
from ldm_fast.training.first_stage import FirstStage
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.loop import TrainingError, run_stage
from ldm_fast.training.recipe import ConfigError, FirstStageRecipe, Recipe, load_recipe
from ldm_fast.training.second_stage import SecondStage, assemble, build_model, check_fits


def train(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    *,
    stage: Literal["all", "first", "second"] = "all",
    resume: bool = True,
    progress: bool = True,
    first_stage: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Path:
    """Trains a recipe (a `Recipe`, a shipped one's name or a path) in `run_dir`, going on where a former call ended.

    stage: "first" and "second" train one alone; "second" needs a first stage, in `run_dir` or given as `first_stage`:
    another run's folder, or any file or folder in which `ldm_fast.load` finds one, Stable Diffusion's say. Returns the
    exported model's path, for "first" the last checkpoint's.

    Raises ConfigError, DataError, CheckpointError, TrainingError, each with one line that names what is wrong, and
    TrainingStopped after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if stage not in ("all", "first", "second"):
        raise ValueError(f'train: stage must be "all", "first" or "second", got {stage!r}')
    if stage == "first" and first_stage is not None:
        raise ValueError('train: a first_stage is what the second stage is trained on; with stage="first" give none')
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainingError(f"training is done by one process; this is one of {processes} (WORLD_SIZE): start it alone")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.first_stage is None and first_stage is None:
        raise ConfigError("first_stage: this section is missing; write it, or give a first stage that is trained")
    run_dir, device = Path(run_dir), _device(device)
    autoencoder = None if first_stage is None else load_first_stage(recipe.first_stage, first_stage)
    data = load_data(recipe.data)
    if stage != "first":
        _check_second_stage(recipe, data, recipe.first_stage.model if autoencoder is None else autoencoder.config)
    with _alone_in(run_dir):
        if stage != "second" and autoencoder is None:
            folder = run_dir / "first_stage"
            about = fingerprint(recipe, "first_stage", data)
            trained = FirstStage(recipe.first_stage, data, recipe.seed, device)
            run_stage(trained, recipe.first_stage.loop, recipe.seed, folder, about, progress, resume)
            if stage == "first":
                return list_checkpoints(folder / "checkpoints")[-1]
        if autoencoder is None:
            _check_finished(recipe, run_dir)
            autoencoder = load_first_stage(recipe.first_stage, run_dir)
        about = fingerprint(recipe, "second_stage", data)
        about |= Fingerprint({"first_stage": tensors_digest(autoencoder.state_dict())})
        trained = SecondStage(recipe.second_stage, autoencoder, data, recipe.seed, device)
        run_stage(trained, recipe.second_stage.loop, recipe.seed, run_dir / "second_stage", about, progress, resume)
        return export(recipe, run_dir, first_stage=autoencoder)


def export(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    path: str | Path | None = None,
    *,
    first_stage: str | Path | nn.Module | None = None,
    half: bool | None = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """Writes the newest checkpoint's EMA weights as one model file (default: run_dir/model.safetensors).

    first_stage: the one that the second stage was trained on, where it is not in `run_dir`. half: float16 weights
    (default: what the recipe says). card: fields to add to the model card.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run_dir = Path(run_dir)
    found = newest_checkpoint(run_dir / "second_stage" / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no second stage in {run_dir}: train it first")
    tensors, state = found
    about = state["fingerprint"]
    given = isinstance(first_stage, nn.Module)
    autoencoder = first_stage if given else load_first_stage(recipe.first_stage, first_stage or run_dir)
    if about["first_stage"] != tensors_digest(autoencoder.state_dict()):
        raise CheckpointError(f"the second stage in {run_dir} was trained on another first stage than this one")
    data = load_data(recipe.data)
    if any(about.get(name, digest) != digest for name, digest in conditions_digest(recipe, data).items()):
        raise CheckpointError(f"the second stage in {run_dir} was trained with other captions or classes than these")
    data = data.training()
    model = build_model(recipe.second_stage, data)
    _load(model, tensors, "weights/ema/", f"the second stage in {run_dir}")
    about = {
        "recipe": to_dict(recipe),
        **({"classes": list(data.classes)} if recipe.second_stage.condition == "class" else {}),
        "second_stage_steps": state["step"],
        "second_stage_seconds": round(state["seconds"]),
        **_first_stage_facts(run_dir),
        **(card or {}),
    }
    whole = assemble(recipe.second_stage, model, autoencoder, float(tensors["extra/scaling_factor"]), about)
    half = recipe.second_stage.export_half if half is None else half
    path = run_dir / "model.safetensors" if path is None else Path(path)
    whole.save(path, dtype=torch.float16 if half else None)
    return path


def load_first_stage(recipe: FirstStageRecipe | None, source: str | Path) -> nn.Module:
    """A trained first stage in float32: with its EMA weights from a run's folder, or what `ldm_fast.load` finds."""
    source = Path(source)
    if source.is_file() or any((source / name).is_file() for name in ("config.json", "model_index.json")):
        model = load(source, parts=["first_stage"], torch_dtype=torch.float32).first_stage
        return model.eval().requires_grad_(False)
    found = newest_checkpoint(source / "first_stage" / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no first stage in {source}: train it first, or give one")
    if recipe is None:
        raise ConfigError(f"first_stage: this section is missing; the run in {source} does not say what it trained")
    model = AutoencoderKL(recipe.kl) if recipe.vq is None else VQModel(recipe.vq.trained)
    _load(model, found[0], "weights/ema/", f"the first stage in {source}")
    return model.eval().requires_grad_(False)


def _check_second_stage(recipe: Recipe, data: ImageSet, first_stage: AutoencoderConfig) -> None:
    """What is wrong with the second stage is said now, not once the first one is trained."""
    check_fits(recipe.second_stage, first_stage, data)
    with torch.device("meta"):
        build_model(recipe.second_stage, data.training())


def _check_finished(recipe: Recipe, run_dir: Path) -> None:
    """A second stage on a first one that still changes would have to start anew."""
    found = newest_checkpoint(run_dir / "first_stage" / "checkpoints")
    if found is not None and found[1]["step"] < recipe.first_stage.loop.steps:
        raise CheckpointError(
            f"the first stage in {run_dir} is at step {found[1]['step']} of {recipe.first_stage.loop.steps}: "
            'train it to the end first (stage="first" or "all")'
        )


def _first_stage_facts(run_dir: Path) -> dict[str, Any]:
    found = newest_checkpoint(run_dir / "first_stage" / "checkpoints")
    if found is None:
        return {}
    return {"first_stage_steps": found[1]["step"], "first_stage_seconds": round(found[1]["seconds"])}


def _load(model: nn.Module, tensors: dict[str, Tensor], prefix: str, what: str) -> None:
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(without_training_state(weights))
    except RuntimeError as error:
        raise CheckpointError(f"{what} does not fit the recipe: {error}") from error


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """One process at a time trains in a folder; what a killed one was writing there is removed."""
    with _locked(run_dir / "lock"):
        stages = [run_dir / stage for stage in ("first_stage", "second_stage")]
        for folder in (run_dir, *stages, *(stage / name for stage in stages for name in ("checkpoints", "samples"))):
            remove_unfinished(folder)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock ends with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}") from error
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(f"another process is training in {path.parent}") from None
            except OSError:  # a file system without locks
                pass
        yield


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train: device {device} cannot be used: {error}") from error
