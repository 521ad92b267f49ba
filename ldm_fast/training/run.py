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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ldm_fast.checkpoints.load import load
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.from_dict import ConfigError, to_dict
from ldm_fast.files.atomic import reason, remove_unfinished
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.checkpoint import list_checkpoints, newest_checkpoint
from ldm_fast.training.data import load_data
from ldm_fast.training.denoiser import Denoiser
from ldm_fast.training.fingerprint import Fingerprint, conditions_digest, fingerprint, weights_digest
from ldm_fast.training.first_stage import FirstStage, trained_model
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.loop import RunState, TrainingError, run_stage
from ldm_fast.training.recipe import FirstStageRecipe, Recipe, load_recipe
from ldm_fast.training.second_stage import SecondStage, check_fits
from ldm_fast.training.stage import under


@dataclass(frozen=True)
class TrainedFirstStage:
    """A first stage to train a second one on. `about`: what the model card says of its training."""

    model: AutoencoderKL | VQModel
    about: dict[str, int] = field(default_factory=dict)


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
    """Train a recipe in `run_dir`, continuing where an earlier call ended. Return the path of the exported model.

    Args:
        recipe: a `Recipe`, the name of a shipped one, or a path.
        stage: "first" and "second" train one stage alone. "first" returns the path of its last checkpoint; "second"
            needs a first stage, in `run_dir` or given as `first_stage`.
        resume: False starts again.
        progress: whether a progress bar is shown.
        first_stage: a trained first stage: another run's folder, or any file or folder in which `ldm_fast.load` finds
            one (Stable Diffusion's, for example).
        device: default: a GPU if there is one.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: each with one line that names what is wrong.
        TrainingStopped: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if stage not in ("all", "first", "second"):
        raise ValueError(f'train: stage must be "all", "first" or "second", got {stage!r}')
    if stage == "first" and first_stage is not None:
        raise ValueError('train: a first_stage is what the second stage is trained on; with stage="first" give none')
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainingError(f"training is done by one process; this is one of {processes} (WORLD_SIZE): start it alone")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run_dir, device, given = Path(run_dir), _device(device), None
    if first_stage is not None:
        given = load_first_stage(recipe.first_stage, first_stage)
        shape = given.model.config
    elif recipe.first_stage is not None:
        shape = recipe.first_stage.model
    else:
        raise ConfigError("first_stage: this section is missing; write it, or give a first stage that is trained")
    data = load_data(recipe.data)
    if stage != "first":
        _check_second_stage(recipe, data, shape)
    with _alone_in(run_dir):
        if given is None and stage == "second":
            given = load_first_stage(recipe.first_stage, run_dir, unfinished=False)
        elif given is None:
            given = _train_first_stage(recipe, run_dir, data, device, progress, resume)
        if stage == "first":
            return list_checkpoints(run_dir / "first_stage" / "checkpoints")[-1]
        return _train_second_stage(recipe, run_dir, given, data, device, progress, resume)


def _train_first_stage(
    recipe: Recipe, run_dir: Path, data: ImageSet, device: torch.device, progress: bool, resume: bool
) -> TrainedFirstStage:
    assert recipe.first_stage is not None
    stage = FirstStage(recipe.first_stage, data, recipe.seed, device)
    about = fingerprint(recipe, "first_stage", data)
    state = run_stage(stage, stage.loop, recipe.seed, run_dir / "first_stage", about, progress, resume)
    return TrainedFirstStage(stage.trained(), _first_stage_card(state))


def _train_second_stage(
    recipe: Recipe,
    run_dir: Path,
    first_stage: TrainedFirstStage,
    data: ImageSet,
    device: torch.device,
    progress: bool,
    resume: bool,
) -> Path:
    about = fingerprint(recipe, "second_stage", data) | Fingerprint({"first_stage": weights_digest(first_stage.model)})
    stage = SecondStage(recipe.second_stage, first_stage.model, data, recipe.seed, device)
    state = run_stage(stage, stage.loop, recipe.seed, run_dir / "second_stage", about, progress, resume)
    path = run_dir / "model.safetensors"
    _save(stage.latent_diffusion(_card(recipe, data, state, first_stage)), path, recipe.second_stage.export_half)
    return path


def export(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    path: str | Path | None = None,
    *,
    first_stage: str | Path | AutoencoderKL | VQModel | None = None,
    half: bool | None = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write the averaged weights of the newest checkpoint as one model file, as `train` does at its end.

    Args:
        path: default: run_dir/model.safetensors.
        first_stage: the one that the second stage was trained on, if it is not in `run_dir`.
        half: whether weights are stored in float16; default: as the recipe says.
        card: fields to add to the model card.

    Raises:
        CheckpointError: there is no second stage, or it was trained on another first stage or with other conditions.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run_dir = Path(run_dir)
    found = newest_checkpoint(run_dir / "second_stage" / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no second stage in {run_dir}: train it first")
    tensors, state = found
    trained_with = state["fingerprint"]
    if isinstance(first_stage, AutoencoderKL | VQModel):
        given = TrainedFirstStage(first_stage)
    else:
        given = load_first_stage(recipe.first_stage, first_stage or run_dir)
    if trained_with["first_stage"] != weights_digest(given.model):
        raise CheckpointError(f"the second stage in {run_dir} was trained on another first stage than this one")
    data = load_data(recipe.data)
    if any(trained_with.get(name, digest) != digest for name, digest in conditions_digest(recipe, data).items()):
        raise CheckpointError(f"the second stage in {run_dir} was trained with other captions or classes than these")
    with torch.device("meta"):
        model = Denoiser(recipe.second_stage, data.training()).eval()
    try:
        model.load_state_dict(under(tensors, "weights/ema/"), assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the second stage in {run_dir} does not fit the recipe: {error}") from error
    about = {**_card(recipe, data, RunState.of(state), given), **(card or {})}
    whole = model.latent_diffusion(given.model, float(tensors["extra/scaling_factor"]), about)
    path = run_dir / "model.safetensors" if path is None else Path(path)
    _save(whole, path, recipe.second_stage.export_half if half is None else half)
    return path


def _save(model: LatentDiffusion, path: Path, half: bool) -> None:
    model.save(path, dtype=torch.float16 if half else None)


def _card(recipe: Recipe, data: ImageSet, state: RunState, first_stage: TrainedFirstStage) -> dict[str, Any]:
    """The model card's fields."""
    classes = {"classes": list(data.classes)} if recipe.second_stage.condition == "class" else {}
    second_stage = {"second_stage_steps": state.step, "second_stage_seconds": round(state.seconds)}
    return {"recipe": to_dict(recipe), **classes, **second_stage, **first_stage.about}


def _first_stage_card(state: RunState) -> dict[str, int]:
    return {"first_stage_steps": state.step, "first_stage_seconds": round(state.seconds)}


def load_first_stage(
    recipe: FirstStageRecipe | None, source: str | Path, *, unfinished: bool = True
) -> TrainedFirstStage:
    """Load a trained first stage in float32: the averaged weights in a run's folder, or what `ldm_fast.load` finds.

    unfinished: whether a run may still have steps to go. (A second stage on a first one that changes afterwards would
    have to start again.)
    """
    source = Path(source)
    if source.is_file() or any((source / name).is_file() for name in ("config.json", "model_index.json")):
        model = load(source, parts=["first_stage"], torch_dtype=torch.float32).first_stage
        assert model is not None  # it was asked for
        return TrainedFirstStage(model.eval().requires_grad_(False))
    found = newest_checkpoint(source / "first_stage" / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no first stage in {source}: train it first, or give one")
    if recipe is None:
        raise ConfigError(f"first_stage: this section is missing; the run in {source} does not say what it trained")
    tensors, state = found[0], RunState.of(found[1])
    if not unfinished and state.step < recipe.loop.steps:
        raise CheckpointError(
            f"the first stage in {source} is at step {state.step} of {recipe.loop.steps}: "
            'train it to the end first (stage="first" or "all")'
        )
    model = trained_model(recipe, under(tensors, "weights/ema/"), f"the first stage in {source}")
    return TrainedFirstStage(model, _first_stage_card(state))


def _check_second_stage(recipe: Recipe, data: ImageSet, first_stage: AutoencoderConfig) -> None:
    """What is wrong with the second stage is said now, not once the first one is trained."""
    check_fits(recipe.second_stage, first_stage, data)
    with torch.device("meta"):
        Denoiser(recipe.second_stage, data.training())


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
    """Hold a lock, which ends with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
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
