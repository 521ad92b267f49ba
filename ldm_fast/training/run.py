"""`train`: a recipe from beginning to end, and `export`: the model file of any checkpoint.

RUN/first_stage/   checkpoints/  samples/  metrics.jsonl
RUN/second_stage/  checkpoints/  samples/  metrics.jsonl
RUN/model.safetensors
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_fast.autoencoder import AutoencoderKL, VQModel
from ldm_fast.files import CheckpointError
from ldm_fast.pipeline import LatentDiffusion
from ldm_fast.training.checkpoint import list_checkpoints, newest_checkpoint
from ldm_fast.training.data import load_data
from ldm_fast.training.first_stage import FirstStage
from ldm_fast.training.loop import run_stage
from ldm_fast.training.recipe import Fingerprint, FirstStageRecipe, Recipe, load_recipe, to_dict
from ldm_fast.training.second_stage import SecondStage, assemble, build_model
from ldm_fast.weights import without_training_state


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

    stage: "first" and "second" train one alone; "second" needs a first stage, in `run_dir` or given as `first_stage`
    (another run's folder, or a model file). Returns the exported model's path, for "first" the last checkpoint's.

    Raises RecipeError, DataError, CheckpointError, TrainingError, each with one line that names what is wrong, and
    TrainingStopped after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if stage not in ("all", "first", "second"):
        raise ValueError(f'train: stage must be "all", "first" or "second", got {stage!r}')
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run_dir, device = Path(run_dir), _device(device)
    data = load_data(recipe.data)
    if stage != "second" and first_stage is None:
        folder = run_dir / "first_stage"
        about = _fingerprint(recipe, "first_stage")
        trained = FirstStage(recipe.first_stage, data, recipe.seed, device)
        run_stage(trained, recipe.first_stage.loop, recipe.seed, folder, about, progress, resume)
        if stage == "first":
            return list_checkpoints(folder / "checkpoints")[-1]
    if first_stage is None:
        _check_finished(recipe, run_dir)
    autoencoder = load_first_stage(recipe.first_stage, first_stage or run_dir)
    about = _fingerprint(recipe, "second_stage") | Fingerprint({"first_stage": _digest(autoencoder)})
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
    if about["first_stage"] != _digest(autoencoder):
        raise CheckpointError(f"the second stage in {run_dir} was trained on another first stage than this one")
    data = load_data(recipe.data).training()
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


def load_first_stage(recipe: FirstStageRecipe, source: str | Path) -> nn.Module:
    """A trained first stage with its EMA weights from a run's folder, or from a model file."""
    source = Path(source)
    if source.is_file():
        return LatentDiffusion.load(source).first_stage
    found = newest_checkpoint(source / "first_stage" / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no first stage in {source}: train it first, or give one")
    model = AutoencoderKL(recipe.kl) if recipe.vq is None else VQModel(recipe.vq.trained)
    _load(model, found[0], "weights/ema/", f"the first stage in {source}")
    return model.eval().requires_grad_(False)


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


def _fingerprint(recipe: Recipe, stage: str) -> Fingerprint:
    """What must not change between two parts of one run."""
    seed = Fingerprint({"seed": recipe.seed})
    return seed | Fingerprint.of(recipe.data, "data") | Fingerprint.of(getattr(recipe, stage), stage)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
