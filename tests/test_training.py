"""Training of both stages: losses, EMA, the order of the data, checkpoints, and runs that are killed and resumed."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from small_models import KL, UNET, VQ
from torch import nn

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training import (
    CheckpointError,
    DataError,
    TrainingError,
    TrainingStopped,
    checkpoint,
    export,
    load_recipe,
    loop,
    run,
    train,
)
from ldm_fast.training.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from ldm_fast.training.data import DataConfig, synthetic_images
from ldm_fast.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_fast.training.ema import Ema, decay_at
from ldm_fast.training.fingerprint import weights_digest
from ldm_fast.training.first_stage import FirstStage
from ldm_fast.training.loop import learning_rate_factor
from ldm_fast.training.recipe import ConfigError, LoopConfig, Phase
from ldm_fast.training.run import _alone_in, load_first_stage
from ldm_fast.training.second_stage import SecondStage, multiscale_error
from ldm_fast.training.stage import DataOrder, capture, numbered, seeded, trained_parameters, update_weights

CPU = torch.device("cpu")
TINY = load_recipe("tiny")


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, so that sums do not depend on how many threads a process happens to have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def change(recipe, stage, loop=None, **fields):
    config = getattr(recipe, stage)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, **(loop or {})), **fields)
    return dataclasses.replace(recipe, **{stage: config})


# What a run leaves behind, except wall-clock fields


def traces(run_dir):
    found = {}
    for stage in ("first_stage", "second_stage"):
        tensors, state = load_checkpoint(list_checkpoints(run_dir / stage / "checkpoints")[-1])
        found.update({f"{stage}/{name}": tensor for name, tensor in tensors.items()})
        found[f"{stage}/state"] = {key: value for key, value in state.items() if key != "seconds"}
        lines = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
        found[f"{stage}/metrics"] = [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]
        found.update({f"{stage}/{p.name}": p.read_bytes() for p in sorted((run_dir / stage / "samples").iterdir())})
    model = LatentDiffusion.load(run_dir / "model.safetensors")
    found.update({f"exported/{name}": tensor for name, tensor in model.state_dict().items()})
    return found


def assert_same_run(run_dir, whole):
    mine, theirs = traces(run_dir), traces(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, f"{name} differs from the uninterrupted run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("whole")
    train(TINY, run_dir, progress=False)
    return run_dir


# Trains the tiny recipe and kills itself, as `kill -9` would. argv is the run's folder, where to die, and on which
# occasion. The write of a checkpoint dies with half of its file on the disk, a clean-up dies after the rename.
DRIVER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ldm_fast.training import checkpoint, first_stage, second_stage, train

run_dir, where, occasion = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def dying(function, counts=lambda *args: True, last_act=lambda *args: None):
    def wrapped(*args, **kwargs):
        global seen
        seen += counts(*args)
        if seen == occasion and counts(*args):
            last_act(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def is_checkpoint(handle):
    return os.fstat(handle).st_ino in [p.stat().st_ino for p in run_dir.glob("*/checkpoints/.*.tmp")]

def cut_in_half(handle):
    os.ftruncate(handle, os.fstat(handle).st_size // 2)

if where == "first step":
    first_stage.update_weights = dying(first_stage.update_weights)
elif where == "second step":
    second_stage.update_weights = dying(second_stage.update_weights)
elif where == "write":
    os.fsync = dying(os.fsync, is_checkpoint, cut_in_half)
elif where == "clean-up":
    checkpoint.list_checkpoints = dying(checkpoint.list_checkpoints)
train("tiny", run_dir, progress=False)
"""


@pytest.mark.parametrize(
    "where, occasion, stage, done",
    [
        ("first step", 13, "first_stage", 6),  # two optimisers from step 5 on: the discriminator's half of step 9
        ("second step", 5, "second_stage", 3),
        ("write", 3, "first_stage", 6),  # the third checkpoint of the first stage
        ("write", 6, "second_stage", 3),
        ("clean-up", 4, "first_stage", 9),
    ],
)
def test_killed_and_resumed_is_the_same_run(tmp_path, whole, where, occasion, stage, done):
    command = [sys.executable, "-c", DRIVER, str(tmp_path), where, str(occasion)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged checkpoint would give a warning
        assert newest_checkpoint(tmp_path / stage / "checkpoints")[1]["step"] == done
    train(TINY, tmp_path, progress=False)
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("stage", ["first_stage", "second_stage"])
def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, whole, monkeypatch, stage):
    """Earlier versions stored the optimizers' state by number, in the order that parameters had then."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    list_checkpoints(tmp_path / stage / "checkpoints")[-1].unlink()
    if stage == "first_stage":
        shutil.rmtree(tmp_path / "second_stage")
    before, renamed = loop.restore, []

    def restore_numbered(stage, tensors):
        for name, optimizer in stage.optimizers().items():
            parameters = trained_parameters(stage, optimizer)
            for parameter, number in zip(parameters, numbered(parameters), strict=True):
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    tensors[f"optimizer/{name}/{number}/{key}"] = tensors.pop(f"optimizer/{name}/{parameter}/{key}")
                    renamed.append(key)
        before(stage, tensors)

    monkeypatch.setattr(loop, "restore", restore_numbered)
    train(TINY, tmp_path, progress=False)
    assert len(renamed) > 100
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "build, digest",
    [
        (lambda: UNet(replace(UNET, num_class_embeds=3, layers_per_block=11)), "c259b54d30c3fff0"),
        (lambda: VQModel(VQ), "29c47ebf7ada183a"),
        (lambda: AutoencoderKL(KL), "a8d90ce0df17b6dc"),
    ],
    ids=["unet", "vq", "kl"],
)
def test_the_numbers_that_parameters_had_in_earlier_versions(build, digest):
    """The digest is that of the parameters' names in the order they had then."""
    with torch.device("meta"):
        names = [name for name, _ in build().named_parameters()]
    numbers = dict(zip(map(int, numbered([f"model/{name}" for name in names])), names, strict=True))
    before = "\n".join(numbers[i] for i in range(len(names)))
    assert hashlib.sha256(before.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_writes_a_checkpoint_and_resumes(tmp_path, whole, monkeypatch, number):
    step = FirstStage.step

    def interrupted(self, done, *arguments):
        if done == 3:
            os.kill(os.getpid(), number)
        return step(self, done, *arguments)

    monkeypatch.setattr(FirstStage, "step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match="first_stage stopped after step 4 of 12") as stopped:
        train(TINY, tmp_path, progress=False)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "first_stage" / "checkpoints")[1]["step"] == 4
    train(TINY, tmp_path, progress=False)
    assert_same_run(tmp_path, whole)


def test_a_run_asked_to_stop_in_the_last_step_does_not_begin_the_second_stage(tmp_path, whole, monkeypatch):
    evaluate = FirstStage.evaluate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(FirstStage, "evaluate", interrupted)
    recipe = change(TINY, "first_stage", loop={"evaluate_every": 12})
    with pytest.raises(TrainingStopped, match="first_stage stopped after step 12 of 12"):
        train(recipe, tmp_path, progress=False)
    monkeypatch.undo()
    train(recipe, tmp_path, progress=False)
    exported = (LatentDiffusion.load(folder / "model.safetensors").state_dict() for folder in (tmp_path, whole))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*(e.values() for e in exported), strict=True))


def test_more_steps_continue_whatever_the_memory_layout(tmp_path):
    """channels_last optimiser state must come back in its layout, or the fused optimiser would mix up its entries."""
    loop = {"channels_last": True, "precision": "bf16", "accumulate": 2, "checkpoint_every": 1}
    short, long = (change(TINY, "first_stage", loop={**loop, "steps": steps}) for steps in (5, 7))
    train(short, tmp_path / "two parts", stage="first", progress=False)
    train(long, tmp_path / "two parts", stage="first", progress=False)
    train(long, tmp_path / "one part", stage="first", progress=False)
    mine, theirs = (
        newest_checkpoint(tmp_path / n / "first_stage" / "checkpoints")[0] for n in ("one part", "two parts")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())


def test_a_finished_run_is_left_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("step_*")}
    train(TINY, whole, progress=False)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("step_*")} == before


def test_training_does_not_depend_on_the_global_seed(tmp_path, whole):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    train(TINY, tmp_path, stage="first", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    mine = newest_checkpoint(tmp_path / "first_stage" / "checkpoints")[0]
    theirs = newest_checkpoint(whole / "first_stage" / "checkpoints")[0]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_changed_recipe_is_named(whole):
    with pytest.raises(CheckpointError, match=r"second_stage\.loop\.learning_rate: 0\.001 -> 0\.1"):
        train(change(TINY, "second_stage", loop={"learning_rate": 0.1}), whole, progress=False)
    train(change(TINY, "second_stage", loop={"checkpoint_every": 5}), whole, progress=False)


def test_a_finished_cosine_may_be_followed_by_another(tmp_path, whole):
    """A run that is trained on after its end equals one whose recipe was longer from the start."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    phases = (Phase(12, timestep_shift=4.0, loss_levels=2), Phase(15, condition_dropout=0.0))
    longer = change(TINY, "second_stage", loop={"steps": 18, "lr_restarts": (12,)}, phases=phases)
    train(longer, run_dir, progress=False)
    train(longer, tmp_path / "at once", progress=False)
    assert_same_run(run_dir, tmp_path / "at once")
    with pytest.raises(CheckpointError, match=r"second_stage\.loop\.steps: 12 -> 18"):
        train(change(TINY, "second_stage", loop={"steps": 18}), whole, progress=False)
    with pytest.raises(CheckpointError, match=r"second_stage\.phases: .* -> "):
        train(change(longer, "second_stage", phases=phases[:1]), run_dir, progress=False)
    with pytest.raises(CheckpointError, match=r"second_stage\.phases: \[\] -> "):
        train(change(TINY, "second_stage", phases=(Phase(11, loss_levels=2),)), whole, progress=False)


def test_a_trained_model_is_exported_without_reading_anything_again(tmp_path, monkeypatch):
    """The data are decoded once, no checkpoint is read, and the file has the same bytes as one that `export` writes."""
    calls = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or function(*args))

    counted(run, "load_data")
    counted(checkpoint, "load_checkpoint")
    loop = {"channels_last": True, "precision": "bf16"}
    recipe = change(change(TINY, "first_stage", loop=loop), "second_stage", loop=loop)
    path = train(recipe, tmp_path, progress=False)
    assert calls == ["load_data"]
    random = torch.get_rng_state()
    again = export(recipe, tmp_path, tmp_path / "again.safetensors")
    assert calls[1:] == ["load_checkpoint", "load_checkpoint", "load_data"]
    assert path.read_bytes() == again.read_bytes()
    assert torch.equal(torch.get_rng_state(), random)


def test_digests_are_those_in_existing_run_folders():
    """Digests of checkpoints and fingerprints must not change, so that a run of an earlier version can be resumed."""
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    assert checkpoint._digest(tensors) == "39b4d88cb143bdb1a98689f09edaf2369ac0f44e2ffd763273f4962fbdf4cc06"
    model = nn.Linear(1, 2)
    model.load_state_dict({"weight": torch.tensor([[1.0], [2.0]]), "bias": torch.tensor([3.0, 4.0])})
    assert weights_digest(model) == "b04d4d14d9c3f2a32fb258a6c82bcd9f9c1d4e18d1847b25019c39aa28158be7"


def test_another_first_stage_is_refused(tmp_path, whole):
    other = dataclasses.replace(TINY, seed=1)
    train(other, tmp_path, stage="first", progress=False)
    with pytest.raises(CheckpointError, match="trained on another first stage"):
        export(TINY, whole, tmp_path / "model.safetensors", first_stage=tmp_path)


def test_second_stage_needs_a_first_that_is_finished(tmp_path, whole):
    with pytest.raises(CheckpointError, match="is at step 12 of 13: train it to the end"):
        train(change(TINY, "first_stage", loop={"steps": 13}), whole, stage="second", progress=False)
    with pytest.raises(CheckpointError, match="there is no first stage"):
        train(TINY, tmp_path, stage="second", progress=False)
    path = train(TINY, tmp_path, stage="second", first_stage=whole, progress=False)
    mine, theirs = (LatentDiffusion.load(p).state_dict() for p in (path, whole / "model.safetensors"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_published_first_stage(tmp_path):
    kl = AutoencoderConfig(block_out_channels=(32, 32, 32), layers_per_block=1, latent_channels=3)
    published = AutoencoderKL(kl).eval()
    published.save_pretrained(tmp_path / "vae")
    torch.save({"state_dict": published.to_compvis()}, tmp_path / "published.ckpt")
    for source in ("vae", "published.ckpt"):
        recipe = dataclasses.replace(change(TINY, "second_stage", loop={"steps": 1}), first_stage=None)
        model = LatentDiffusion.load(train(recipe, tmp_path / "run", first_stage=tmp_path / source, progress=False))
        mine, theirs = model.first_stage.state_dict(), published.state_dict()
        assert all(torch.equal(mine[name], theirs[name].half().float()) for name in theirs)
    with pytest.raises(ConfigError, match="first_stage: this section is missing; write it, or give"):
        train(recipe, tmp_path / "run", progress=False)


def test_the_first_stage_of_a_run_needs_its_recipe(tmp_path, whole):
    with pytest.raises(ConfigError, match="first_stage: this section is missing; the run in"):
        train(dataclasses.replace(TINY, first_stage=None), tmp_path, first_stage=whole, progress=False)


# Checkpoints


def saved(folder, step, value):
    return save_checkpoint(folder, step, {"w": torch.full((1000,), value)}, {"note": value})


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_the_checkpoint_before_a_damaged_newest_one_is_taken(tmp_path, harm):
    saved(tmp_path, 1, 1.0)
    path = saved(tmp_path, 2, 2.0)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes({"truncate": content[:-100], "flip": content, "empty": b""}[harm])
    with pytest.warns(UserWarning, match=r"step_00000002\.safetensors"):
        tensors, state = newest_checkpoint(tmp_path)
    assert state == {"note": 1.0, "step": 1} and tensors["w"].unique().tolist() == [1.0]


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        saved(tmp_path, step, float(step))
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000003.safetensors",
        "step_00000010.safetensors",
    ]


def test_unfinished_files_of_a_killed_run_are_removed_by_the_next(tmp_path):
    """Whatever only reads, such as export, leaves them: a run may still be writing them."""
    short = change(TINY, "first_stage", loop={"steps": 1})
    train(short, tmp_path, stage="first", progress=False)
    stage = tmp_path / "first_stage"
    names = (
        stage / "checkpoints" / "step_00000002.safetensors",
        stage / "metrics.jsonl",
        tmp_path / "model.safetensors",
    )
    unfinished = [name.with_name(f"{name.name}.0123abcd.tmp") for name in names]
    for path in (*unfinished, tmp_path / "mine.tmp"):
        path.write_bytes(b"half of it")
    load_first_stage(short.first_stage, tmp_path)
    assert all(path.exists() for path in unfinished)
    train(short, tmp_path, stage="first", progress=False)
    assert list(tmp_path.rglob("*.tmp")) == [tmp_path / "mine.tmp"]


def test_starting_again_leaves_nothing_of_the_run_before(tmp_path):
    loop = {"sample_every": 1, "checkpoint_every": 1}
    train(change(TINY, "first_stage", loop={"steps": 3, **loop}), tmp_path, stage="first", progress=False)
    train(change(TINY, "first_stage", loop={"steps": 1, **loop}), tmp_path, stage="first", resume=False, progress=False)
    found = sorted(path.name for path in tmp_path.rglob("step_*"))
    assert found == ["step_00000001.png", "step_00000001.safetensors"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "first_stage" / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {1}


def test_no_readable_checkpoint_is_an_error(tmp_path):
    saved(tmp_path, 1, 1.0).write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_full_disk_while_writing(tmp_path, monkeypatch):
    path = saved(tmp_path, 1, 1.0)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        saved(tmp_path, 2, 2.0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_write_that_ends_in_the_middle(tmp_path):
    """A limit on file sizes stops the write half-way, as a full disk does."""
    path = saved(tmp_path, 1, 1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not write the checkpoint"):
            saved(tmp_path, 2, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [path] and newest_checkpoint(tmp_path)[1]["step"] == 1


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path):
    saved(tmp_path / "first_stage" / "checkpoints", 3, 1.0)
    with pytest.raises((CheckpointError, KeyError)):
        train(TINY, tmp_path, stage="first", progress=False)


# The loop's parts


def test_every_epoch_shows_every_example_once():
    order = DataOrder(7, 0, "stage")
    stream = torch.cat([order.take(i * 3, 3) for i in range(14)])  # six epochs, in batches that cross the epochs' ends
    for epoch in stream.reshape(6, 7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert not torch.equal(stream[:7], stream[7:14])
    assert torch.equal(DataOrder(7, 0, "stage").take(10, 5), stream[10:15])
    assert not torch.equal(DataOrder(7, 1, "stage").take(0, 7), stream[:7])


def test_learning_rate_warms_up_and_follows_the_cosine():
    loop = LoopConfig(
        steps=110, batch_size=1, learning_rate=1.0, warmup_steps=10, lr_schedule="cosine", final_lr_ratio=0.1
    )
    assert learning_rate_factor(0, loop) == pytest.approx(1 / 11)
    assert learning_rate_factor(10, loop) == 1
    assert learning_rate_factor(60, loop) == pytest.approx(0.55)
    assert learning_rate_factor(110, loop) == pytest.approx(0.1)
    assert learning_rate_factor(60, dataclasses.replace(loop, lr_schedule="constant")) == 1


def test_learning_rate_restarts():
    loop = LoopConfig(
        steps=30, batch_size=1, learning_rate=1.0, warmup_steps=3, lr_schedule="cosine", lr_restarts=(10, 18)
    )
    for start, end in [(0, 10), (10, 18), (18, 30)]:
        alone = dataclasses.replace(loop, steps=end - start, lr_restarts=())
        for step in range(start, end):
            assert learning_rate_factor(step, loop) == learning_rate_factor(step - start, alone)


def test_multiscale_error():
    """One level is the mean square. An error that averages out counts once, a constant one 4^l times on level l."""
    difference = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = difference.square().flatten(1).mean(1)
    assert torch.equal(multiscale_error(difference, 1), plain)
    means = difference.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))  # (3, 2, 4, 4)
    torch.testing.assert_close(multiscale_error(difference, 2), (plain + 4 * means.square().flatten(1).mean(1)) / 2)
    assert multiscale_error(torch.ones(1, 1, 8, 8), 3).item() == pytest.approx((1 + 4 + 16) / 3)
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert multiscale_error(checkers, 3).item() == pytest.approx(1 / 3)


def test_phases_follow_one_another():
    recipe = change(
        TINY, "second_stage", phases=(Phase(3, loss_levels=2), Phase(7, condition_dropout=0.5, loss_levels=3))
    ).second_stage
    for step, levels, dropout in ((0, 1, 0.1), (2, 1, 0.1), (3, 2, 0.1), (6, 2, 0.1), (7, 3, 0.5), (99, 3, 0.5)):
        now = recipe.at(step)
        assert (now.loss_levels, now.condition_dropout, now.phases) == (levels, dropout, ())
        assert now.timestep_shift == recipe.timestep_shift
    for wrong in ((Phase(0),), (Phase(4), Phase(4)), (Phase(4), Phase(3))):
        with pytest.raises(ValueError, match="phases must start one after the other"):
            change(TINY, "second_stage", phases=wrong)
    with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\], got 1.5"):
        change(TINY, "second_stage", phases=(Phase(4, condition_dropout=1.5),))


@pytest.mark.parametrize("field", [{"loss_levels": 2}, {"timestep_shift": 9.0}, {"condition_dropout": 1.0}], ids=str)
def test_a_phase_changes_the_loss_from_its_step_on(field):
    first = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU).ema.module
    losses = []
    for phases in ((), (Phase(3, **field),)):
        recipe = change(TINY, "second_stage", phases=phases).second_stage
        stage = SecondStage(recipe, first, synthetic_images(16), 0, CPU)
        losses.append([])
        for n in range(4):
            torch.manual_seed(n)  # dropout
            losses[-1].append(stage.step(n, [torch.arange(4)], seeded(n))["loss"])
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]


def test_more_scales_than_the_latents_have_are_refused():
    first = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU).ema.module
    recipe = change(TINY, "second_stage", phases=(Phase(4, loss_levels=9),)).second_stage
    with pytest.raises(DataError, match="second_stage.loss_levels is 9"):
        SecondStage(recipe, first, synthetic_images(16), 0, CPU)


@pytest.mark.parametrize(("clip", "moved"), [(None, (3.0, 4.0)), (1.0, (0.6, 0.8)), (50.0, (3.0, 4.0))])
def test_gradients_are_clipped_and_their_norm_is_returned(clip, moved):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(update_weights(torch.optim.SGD([weight], lr=1.0), clip)) == 5
    assert weight.grad is None
    torch.testing.assert_close(-weight.detach(), torch.tensor(moved), rtol=1e-5, atol=0)


def test_ema_follows_the_formula():
    followed = nn.Linear(2, 1, bias=False)
    followed.weight.data.fill_(0.0)
    ema, expected = Ema(followed, decay=0.5), 0.0
    for n, weight in enumerate([1.0, 2.0, -1.0, 5.0, 3.0, 0.5, 0.25, 4.0, 4.0, 4.0]):
        followed.weight.data.fill_(weight)
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
        assert ema.module.weight.tolist()[0] == pytest.approx([expected, expected], rel=1e-6)
    assert decay_at(10**9, 0.9999) == 0.9999 and not ema.module.weight.requires_grad


def test_adaptive_weight_by_hand():
    """For two losses that are linear in the last layer, with gradients a and b, the weight is |a| / (|b| + 1e-4)."""
    weight = nn.Parameter(torch.zeros(2))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert float(adaptive_weight(weight @ a, weight @ b, weight)) == pytest.approx(5 / 0.5001, rel=1e-6)
    assert float(adaptive_weight(weight @ a, weight @ (b * 0), weight)) == 1e4
    assert weight.grad is None


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))


def test_the_discriminator_sees_patches():
    assert PatchDiscriminator(8, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


# The stages


def test_the_discriminator_waits_for_disc_start():
    stage = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU)
    weights = [p for p in stage.discriminator.parameters() if p.ndim == 4]
    before = [w.detach().clone() for w in weights]
    metrics = stage.step(3, [torch.arange(4)], seeded(0))
    assert "adaptive" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    metrics = stage.step(4, [torch.arange(4)], seeded(0))
    assert metrics["adaptive"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_weight_zero_leaves_the_discriminator_out():
    recipe = change(TINY, "first_stage", disc_weight=0.0).first_stage
    stage = FirstStage(recipe, synthetic_images(16), 0, CPU)
    assert stage.discriminator is None and list(stage.modules()) == ["model", "ema", "logvar"]


def test_dead_codes_restart_in_the_average_too():
    stage = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU)
    stage.step(0, [torch.arange(4)], seeded(0))
    parameter = stage.model.quantize.embedding.weight
    codebook = parameter.detach()
    codebook[5:] = 1e3  # nothing will choose these
    stage.counts.zero_()
    for number in range(1, 5):
        stage.step(number, [torch.arange(4)], seeded(number))
    assert float(codebook.max()) < 100 and int(stage.counts.sum()) == 0
    revived = torch.isclose(stage.ema.module.quantize.embedding.weight, codebook).all(dim=1)
    assert int(revived[5:].sum()) == 27
    assert float(stage.optimizer.state[parameter]["exp_avg"][5:].abs().max()) == 0


def test_a_codebook_of_moving_averages(tmp_path):
    """Training resumes where it stopped, restarts dead codes, and leaves none of its own state in the model."""
    vq = dataclasses.replace(TINY.first_stage.vq, codebook_ema_decay=0.9)
    loop = {"checkpoint_every": 1}
    short, long = (change(TINY, "first_stage", loop={**loop, "steps": n}, vq=vq, revive_every=2) for n in (4, 7))
    train(short, tmp_path / "two parts", stage="first", progress=False)
    train(long, tmp_path / "two parts", stage="first", progress=False)
    train(long, tmp_path / "one part", stage="first", progress=False)
    mine, theirs = (
        newest_checkpoint(tmp_path / n / "first_stage" / "checkpoints")[0] for n in ("one part", "two parts")
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert float(mine["weights/model/quantize.ema_counts"].min()) > 0
    assert not torch.equal(mine["weights/model/quantize.ema_counts"], torch.ones(vq.num_vq_embeddings))
    long = change(long, "second_stage", loop={"steps": 1})
    model = LatentDiffusion.load(train(long, tmp_path / "one part", progress=False)).first_stage
    assert torch.equal(model.quantize.embedding.weight, mine["weights/ema/quantize.embedding.weight"].half().float())
    assert model.config == dataclasses.replace(vq, codebook_ema_decay=None)
    assert not any("ema" in name for name in model.state_dict())


def test_kl_loss_by_hand():
    kl = AutoencoderConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )
    recipe = change(TINY, "first_stage", vq=None, kl=kl, disc_weight=0.0, kl_weight=0.25, shift=0).first_stage
    stage = FirstStage(recipe, synthetic_images(16), 0, CPU)
    stage.logvar["logvar"].data.fill_(0.5)
    images = stage.data.batch(torch.arange(4))
    loss, reconstruction, _ = stage._generator_loss(images, seeded(3), None)
    out = stage.model(images, sample_posterior=True, generator=seeded(3))
    pixel = ((out.sample - images).abs() / math.exp(0.5) + 0.5).sum() / 4
    assert torch.equal(out.sample, reconstruction)
    assert float(loss.detach()) == pytest.approx(float((pixel + 0.25 * out.regulariser.kl().mean()).detach()), rel=1e-5)
    loss.backward()
    assert stage.logvar["logvar"].grad is not None


def test_training_starts_with_the_identity_around_the_latents():
    """The 1x1 convolutions around the latent start as the identity; with random weights its channels collapse."""
    model = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU).model
    z = torch.randn(2, model.config.latent_channels, 3, 3)
    assert torch.equal(model.post_quant_conv(model.quant_conv(z)), z)


def test_latent_noise_is_relative_to_the_latents():
    recipe = change(TINY, "first_stage", latent_noise=0.5).first_stage
    stage = FirstStage(recipe, synthetic_images(16), 0, CPU)
    z = (torch.randn(8, 4, 32, 32) * 3 + 10).requires_grad_()
    noise = stage._noisy(z, seeded(0)) - z
    assert float(noise.detach().std()) == pytest.approx(1.5, rel=0.02)
    assert torch.equal(stage._noisy(z, seeded(1)), stage._noisy(z, seeded(1)))
    scaled = stage._noisy(2 * z, seeded(0))  # larger latents get proportionally more noise
    torch.testing.assert_close(scaled, 2 * stage._noisy(z, seeded(0)))


@pytest.fixture(scope="module")
def second_stage():
    first = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU)
    return SecondStage(TINY.second_stage, first.ema.module, synthetic_images(16), 0, CPU)


def test_scaling_factor_is_one_over_the_first_batchs_deviation(second_stage):
    first = DataOrder(len(second_stage), 0, "second_stage").take(0, 4)
    z = second_stage.first_stage.encode(second_stage.data.batch(first)).latents
    assert float(second_stage.scaling_factor) == pytest.approx(1 / float(z.std()), rel=1e-5)


@pytest.mark.parametrize("held_out", [True, False])
def test_the_loss_is_named_after_its_data(second_stage, held_out):
    data = second_stage.data if not held_out else synthetic_images(16)
    stage = SecondStage(TINY.second_stage, second_stage.first_stage, data, 0, CPU)
    assert list(stage.evaluate()) == ["held_out_loss" if held_out else "trained_loss"]
    assert stage.evaluate() == stage.evaluate()


def test_convolutions_are_deterministic_while_it_trains(tmp_path, monkeypatch):
    step, seen = FirstStage.step, set()

    def looking(self, *arguments):
        seen.add(torch.backends.cudnn.deterministic)
        return step(self, *arguments)

    monkeypatch.setattr(FirstStage, "step", looking)
    train(change(TINY, "first_stage", loop={"steps": 1}), tmp_path, stage="first", progress=False)
    assert seen == {True} and not torch.backends.cudnn.deterministic


def test_stratified_timesteps_cover_the_range(second_stage):
    t = second_stage._timesteps(10, seeded(0), shift=1.0)
    assert (t // 100).tolist() == list(range(10))


def test_shifted_timesteps(second_stage):
    """A shift of 3 moves the median to three quarters of the range: t' = 3 t / (1 + 2 t)."""
    t = second_stage._timesteps(1000, seeded(0), shift=3.0)
    assert abs(int((t >= 750).sum()) - 500) <= 1
    assert int(t.max()) == 999


def test_dropped_conditions_are_the_empty_caption(second_stage):
    kept = second_stage.conditions.clone()
    dropped = second_stage._dropped(second_stage.conditions, torch.zeros(2000, dtype=torch.int64), seeded(0), 0.1)
    empty = (dropped == second_stage.model.condition.tokenizer("")).all(dim=1)
    assert 0.05 < float(empty.float().mean()) < 0.15
    assert torch.equal(dropped[~empty], kept[:1].expand(int((~empty).sum()), -1))
    assert torch.equal(second_stage.conditions, kept)


def test_second_stage_loss_by_hand(second_stage):
    index = torch.arange(4)
    z = second_stage.latents.take(index, seeded(0))
    second_stage.model.eval()
    loss = second_stage._loss(second_stage.model, z, second_stage.conditions[index], seeded(7), second_stage.recipe)
    generator, schedule = seeded(7), second_stage.schedule
    t = second_stage._timesteps(4, generator, second_stage.recipe.timestep_shift)
    noise = torch.randn(z.shape, generator=generator)
    z_0 = z * float(second_stage.scaling_factor)
    alpha = schedule.alphas_cumprod[t].float()[:, None, None, None]
    z_t = alpha.sqrt() * z_0 + (1 - alpha).sqrt() * noise
    context = second_stage.model.condition([second_stage.data.captions[i] for i in range(4)])
    v = second_stage.model.unet(z_t, t, context).sample
    error = (v - (alpha.sqrt() * noise - (1 - alpha).sqrt() * z_0)).square().mean(dim=(1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    expected = (error * snr.clamp(max=5.0) / (snr + 1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_accumulation_averages_gradients(monkeypatch):
    """Two batches in one step give the mean of the gradients that each batch gives by itself."""
    from ldm_fast.training import first_stage as module

    recipe = change(TINY, "first_stage", disc_weight=0.0, shift=0, init_codebook=False).first_stage
    gradients = []

    def record(optimizer, clip):
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        optimizer.zero_grad()
        return torch.zeros(())

    monkeypatch.setattr(module, "update_weights", record)
    stage = FirstStage(recipe, synthetic_images(16), 0, CPU)
    first, second = torch.arange(4), torch.arange(4, 8)
    for batches in ([first, second], [first], [second]):
        stage.step(1, batches, seeded(0))
    together, *alone = gradients
    for mean, a, b in zip(together, *alone, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)


VARIANTS = {
    "class": {"condition": "class", "text": None},
    "unconditional": {"condition": "none", "text": None},
    "flip": {"horizontal_flip": True},
    "eps": {"diffusion": dataclasses.replace(TINY.second_stage.diffusion, prediction_type="epsilon")},
    "x0": {"diffusion": dataclasses.replace(TINY.second_stage.diffusion, prediction_type="sample")},
    "bf16": {"loop": {"precision": "bf16", "channels_last": True, "accumulate": 2}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_recipe_train_and_generate(tmp_path, name):
    fields = dict(VARIANTS[name])
    loop = {"steps": 2, **fields.pop("loop", {})}
    for i in range(6):
        file = tmp_path / "data" / ("dog" if i % 2 else "cat") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 255 - 40 * i, 90)).save(file)
    recipe = change(TINY, "first_stage", loop={**loop, "steps": 2})
    unet = recipe.second_stage.unet
    if name == "unconditional":
        fields["unet"] = dataclasses.replace(
            unet, down_block_types=("DownBlock2D", "AttnDownBlock2D"), mid_block_type="UNetMidBlock2D"
        )
    if name in ("class", "unconditional"):
        fields["sampling"] = dataclasses.replace(recipe.second_stage.sampling, guidance=2.0)
        recipe = dataclasses.replace(recipe, data=DataConfig("folder", 16, path=str(tmp_path / "data")))
    recipe = change(recipe, "second_stage", loop=loop, **fields)
    path = train(recipe, tmp_path / "run", progress=False)
    prompts = {"class": [0, 1], "unconditional": 2}.get(name, ["red square", "blue disc"])
    trained = LatentDiffusion.load(path)
    assert trained.generate(prompts).shape == (2, 16, 16, 3)
    assert trained.card.get("classes") == (["cat", "dog"] if name == "class" else None)


def test_a_kl_first_stage_trains_to_the_end(tmp_path):
    kl = AutoencoderConfig(block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4)
    recipe = change(TINY, "first_stage", loop={"steps": 6}, vq=None, kl=kl, kl_weight=1e-6)
    recipe = change(recipe, "second_stage", loop={"steps": 2})
    whole = LatentDiffusion.load(train(recipe, tmp_path, progress=False))
    assert type(whole.first_stage).__name__ == "AutoencoderKL"
    first = [json.loads(line) for line in (tmp_path / "first_stage" / "metrics.jsonl").read_text().splitlines()]
    assert first[0]["kl"] > 0 and "psnr" in first[-1]


# Bad input


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, monkeypatch):
    step = FirstStage.step
    monkeypatch.setattr(
        FirstStage, "step", lambda self, n, *a: {**step(self, n, *a), "loss": math.nan if n == 7 else 1}
    )
    with pytest.raises(TrainingError, match="first_stage: loss is nan at step 8"):
        train(TINY, tmp_path, progress=False)
    assert newest_checkpoint(tmp_path / "first_stage" / "checkpoints")[1]["step"] == 6


def test_a_gradient_that_is_not_finite_never_gets_into_a_checkpoint(tmp_path, monkeypatch):
    """This holds even if the loss is finite. The next one would not be, but by then a checkpoint would be written."""

    def overflow(optimizer, clip):
        return update_weights(optimizer, clip) * math.inf

    monkeypatch.setattr("ldm_fast.training.first_stage.update_weights", overflow)
    with pytest.raises(TrainingError, match="first_stage: gradient_norm is inf at step 1"):
        train(TINY, tmp_path, progress=False)
    assert newest_checkpoint(tmp_path / "first_stage" / "checkpoints") is None


def test_sizes_and_channels_that_do_not_fit():
    with pytest.raises(DataError, match=r"data\.size 18 is no multiple .* f = 4"):
        FirstStage(TINY.first_stage, synthetic_images(18), 0, CPU)
    first = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU)
    unet = dataclasses.replace(TINY.second_stage.unet, in_channels=4)
    with pytest.raises(DataError, match="4 input and 3 output channels; the first stage's latents have 3"):
        SecondStage(dataclasses.replace(TINY.second_stage, unet=unet), first.ema.module, synthetic_images(16), 0, CPU)


UNFIT = {
    "captions": ({}, "have no captions"),
    "classes": ({"condition": "class"}, "have no classes"),
    "channels": ({"in_channels": 4}, "4 input and 3 output channels"),
    "size": ({"sample_size": 8}, "sample_size is 8; the latents have 4 a side"),
    "scales": ({"loss_levels": 4}, "loss_levels is 4: means over 8 × 8 cells; the latents have 4 a side"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_known_before_the_first_stage_is_trained(tmp_path, name):
    fields, message = UNFIT[name]
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    unet = TINY.second_stage.unet
    of_unet = {key: value for key, value in fields.items() if hasattr(unet, key)}
    fields = {key: value for key, value in fields.items() if key not in of_unet}
    recipe = change(TINY, "second_stage", unet=dataclasses.replace(unet, **of_unet), **fields)
    if name in ("captions", "classes"):
        recipe = dataclasses.replace(recipe, data=DataConfig("folder", 16, path=str(tmp_path)))
    with pytest.raises(DataError, match=message):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("text", {"max_length": 1}, "max_length is 1; at least 2"),
        ("unet", {"num_attention_heads": 3}, "32 channels do not divide into 3 heads"),
    ],
)
def test_what_cannot_be_built_is_known_before_the_first_stage_is_trained(tmp_path, part, fields, message):
    config = dataclasses.replace(getattr(TINY.second_stage, part), **fields)
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(change(TINY, "second_stage", **{part: config}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_discriminator():
    """The error comes before the first step, not at disc_start."""
    FirstStage(dataclasses.replace(TINY.first_stage, disc_layers=2), synthetic_images(16), 0, CPU)
    with pytest.raises(DataError, match=r"data\.size 16 is too small for disc_layers = 3: 24 is needed"):
        FirstStage(dataclasses.replace(TINY.first_stage, disc_layers=3), synthetic_images(16), 0, CPU)
    for layers in (1, 2, 3):
        images = torch.zeros(1, 3, *(2 * [PatchDiscriminator.least_side(layers)]))
        assert PatchDiscriminator(8, layers).eval()(images).shape == (1, 1, 1, 1)


def test_training_the_first_stage_takes_no_other_first_stage(tmp_path, whole):
    with pytest.raises(ValueError, match='with stage="first" give none'):
        train(TINY, tmp_path, stage="first", first_stage=whole, progress=False)


def test_only_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    with _alone_in(tmp_path), pytest.raises(TrainingError, match="another process is training in"):
        train(TINY, tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
        with _alone_in(tmp_path):
            pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="training is done by one process; this is one of 2"):
        train(TINY, tmp_path, progress=False)


def folder_recipe(folder, steps):
    recipe = dataclasses.replace(TINY, data=DataConfig("folder", 16, path=str(folder)))
    recipe = change(recipe, "first_stage", loop={"steps": 2})
    return change(recipe, "second_stage", loop={"steps": steps, "lr_schedule": "constant"})


def test_captured_tensors_do_not_change_with_the_stage():
    stage = FirstStage(TINY.first_stage, synthetic_images(16), 0, CPU)
    captured = capture(stage)
    before = {name: tensor.clone() for name, tensor in captured.items()}
    with torch.no_grad():
        for module in stage.modules().values():
            for parameter in module.parameters():
                parameter.add_(1)
    assert before and all(torch.equal(captured[name], before[name]) for name in before)


def test_other_data_is_refused_wherever_it_lies(tmp_path):
    """If a caption changed between two parts of a run, the learned numbers would stand for other words."""
    folder, run_dir = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} thing")
    train(folder_recipe(folder, 2), run_dir, progress=False)
    folder = folder.rename(tmp_path / "moved")
    train(folder_recipe(folder, 3), run_dir, progress=False)
    (folder / "red.txt").write_text("aaa thing")
    train(folder_recipe(folder, 4), run_dir, stage="first", progress=False)
    with pytest.raises(CheckpointError, match=r"second_stage was trained with .* other data \(data\.conditions"):
        train(folder_recipe(folder, 4), run_dir, progress=False)
    with pytest.raises(CheckpointError, match="with other captions or classes than these"):
        export(folder_recipe(folder, 3), run_dir)
    (folder / "red.txt").write_text("red thing")
    Image.new("RGB", (16, 16), "green").save(folder / "blue.png")
    with pytest.raises(CheckpointError, match=r"first_stage was trained with .* other data \(data\.images"):
        train(folder_recipe(folder, 4), run_dir, progress=False)
