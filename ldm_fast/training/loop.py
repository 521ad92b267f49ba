"""The loop both stages share: batches, learning rate, progress, metrics, sample grids, checkpoints, resuming.

Nothing random carries over from one step to the next. What step n draws comes from generators seeded by
(seed, stage, n), the order of epoch e from (seed, stage, e). So a run resumed from the checkpoint of step n is, bit for
bit, the run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from ldm_fast.files.atomic import reason, write_atomically
from ldm_fast.files.images import write_png
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.training.checkpoint import newest_checkpoint, save_checkpoint
from ldm_fast.training.fingerprint import Fingerprint
from ldm_fast.training.recipe import LoopConfig
from ldm_fast.training.stage import DataOrder, Stage, capture, global_seed, restore, seeded


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the reason."""


class TrainingStopped(Exception):
    """Training was asked to stop by `signal` (SIGINT: Ctrl-C; SIGTERM) and did, after writing a checkpoint."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    """The learning rate of `step` (from 0) over the peak's: linear warm-up, then constant or half a cosine.

    Each of `config.lr_restarts` begins all of it anew (SGDR, arXiv:1608.03983).
    """
    start = max([0, *(restart for restart in config.lr_restarts if restart <= step)])
    end = min([config.steps, *(restart for restart in config.lr_restarts if restart > step)])
    warmup = min(1.0, (step - start + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "constant":
        return warmup
    progress = min(1.0, max(0, step - start - config.warmup_steps) / max(1, end - start - config.warmup_steps))
    low = config.final_lr_ratio
    return warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class RunState:
    """How far a stage's run is: what a checkpoint holds besides tensors and the fingerprint.

    seconds: the time spent in steps, evaluation and samples; metrics: those not logged yet, as (sum, number of steps).
    """

    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> RunState:
        """The state in a checkpoint."""
        return cls(saved["step"], saved["seconds"], saved["metrics"])


def run_stage(
    stage: Stage, config: LoopConfig, seed: int, folder: Path, fingerprint: Fingerprint, progress: bool, resume: bool
) -> RunState:
    """Train `stage` up to config.steps in `folder` (checkpoints/, samples/, metrics.jsonl), resuming a run found there.

    Raises TrainingError for a loss that is not finite, CheckpointError for a checkpoint that cannot be written or read
    or that another recipe made, TrainingStopped after SIGINT or SIGTERM.
    """
    state = RunState()
    if resume and (found := newest_checkpoint(folder / "checkpoints")) is not None:
        tensors, saved = found
        _check_unchanged(saved, fingerprint, config, stage.name, folder)
        restore(stage, tensors)
        state = RunState.of(saved)
    elif not resume:
        for old in (*folder.glob("checkpoints/step_*"), *folder.glob("samples/step_*")):
            old.unlink()
    log = MetricsLog(folder / "metrics.jsonl", keep_until=state.step)
    with torch.random.fork_rng(devices=[]), _deterministic_convolutions(), _stop_requests() as stop:
        _Loop(stage, config, seed, folder, fingerprint, log, state).run(progress, stop)
    return state


def _check_unchanged(
    saved: dict[str, Any], fingerprint: Fingerprint, config: LoopConfig, stage: str, folder: Path
) -> None:
    """CheckpointError if the recipe or the data differ from those of the steps already run.

    Two changes are allowed. The number of steps and the restarts may change if the steps already run keep their
    learning rates: a constant one continues, and a finished cosine may be followed by another. And phases that are
    still to come may change.
    """
    before, step, allowed = saved.get("fingerprint", {}), saved["step"], set()
    changes = fingerprint.changes(before)
    steps, restarts, phases = (f"{stage}.{name}" for name in ("loop.steps", "loop.lr_restarts", "phases"))
    if changes.keys() & {steps, restarts}:
        then = dataclasses.replace(
            config, steps=before.get(steps, config.steps), lr_restarts=tuple(before.get(restarts, ()))
        )
        if all(learning_rate_factor(n, then) == learning_rate_factor(n, config) for n in range(step)):
            allowed |= {steps, restarts}
    if phases in changes and _begun(before.get(phases, []), step) == _begun(fingerprint.fields[phases], step):
        allowed.add(phases)
    refused = [change for name, change in changes.items() if name not in allowed]
    if refused:
        raise CheckpointError(
            f"{folder} was trained with another recipe or other data ({'; '.join(refused[:5])}): "
            "restore them, train in another folder or start again without resuming"
        )


def _begun(phases: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [phase for phase in phases if phase["start"] < step]


class _Loop:
    """One stage's run."""

    def __init__(
        self,
        stage: Stage,
        config: LoopConfig,
        seed: int,
        folder: Path,
        fingerprint: Fingerprint,
        log: MetricsLog,
        state: RunState,
    ):
        self.stage, self.config, self.seed, self.folder = stage, config, seed, folder
        self.fingerprint, self.log, self.state = fingerprint, log, state
        self.order = DataOrder(len(stage), seed, stage.name)

    def run(self, progress: bool, stop: StopRequest) -> None:
        config, interactive = self.config, sys.stderr.isatty()
        rate = None
        with tqdm(
            total=config.steps,
            initial=self.state.step,
            desc=self.stage.name.replace("_", " "),
            unit="step",
            disable=not progress,
            mininterval=0.3 if interactive else 30,
            dynamic_ncols=interactive,
        ) as bar:
            for number in range(self.state.step, config.steps):
                start = time.perf_counter()
                metrics = self._step(number)
                seconds = time.perf_counter() - start
                images = config.batch_size * config.accumulate / seconds
                rate = images if rate is None else 0.95 * rate + 0.05 * images
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                self._after_step(number + 1, metrics, seconds, stop)
                bar.update()

    def _step(self, number: int) -> dict[str, float]:
        """Do step `number`, counted from 0."""
        config, stage = self.config, self.stage
        for optimizer in stage.optimizers().values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(number, config)
        generator = seeded(self.seed, stage.name, "step", number)
        torch.manual_seed(global_seed(generator))  # dropout
        each, first = config.batch_size, number * config.batch_size * config.accumulate
        batches = [self.order.take(first + i * each, each) for i in range(config.accumulate)]
        metrics = stage.step(number, batches, generator)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{stage.name}: {name} is {value} at step {number + 1}; "
                    "the last checkpoint is unharmed, but the same recipe would come to the same end: "
                    "lower the learning rate or clip gradients (grad_clip), and start again"
                )
        return metrics

    def _after_step(self, step: int, metrics: dict[str, float], seconds: float, stop: StopRequest) -> None:
        """Log, draw and save what is due after `step` steps. A step's checkpoint is the last thing that is written."""
        config, state, last = self.config, self.state, step == self.config.steps
        state.step = step
        state.seconds += seconds
        for name, value in metrics.items():
            total, count = state.metrics.get(name, (0.0, 0))
            state.metrics[name] = (total + value, count + 1)
        start = time.perf_counter()
        if last or step % config.log_every == 0:
            self._log_means()
        if last or (config.evaluate_every and step % config.evaluate_every == 0):
            self.log.write({"step": step, **self.stage.evaluate()})
        if last or (config.sample_every and step % config.sample_every == 0):
            self._write_sample()
        state.seconds += time.perf_counter() - start
        stopping = stop.signal
        if last or stopping or step % config.checkpoint_every == 0:
            self.log.sync()
            about = {**dataclasses.asdict(state), "fingerprint": self.fingerprint.fields}
            save_checkpoint(self.folder / "checkpoints", step, capture(self.stage), about)
        if stopping:
            raise TrainingStopped(
                f"{self.stage.name} stopped after step {step} of {config.steps}, checkpoint written; "
                "the same command continues",
                stopping,
            )

    def _write_sample(self) -> None:
        picture = self.stage.sample(seeded(self.seed, self.stage.name, "sample"))
        path = self.folder / "samples" / f"step_{self.state.step:08d}.png"
        with _full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, picture, {})

    def _log_means(self) -> None:
        """Log the metrics averaged over the steps since the last line."""
        state, config = self.state, self.config
        means = {name: total / count for name, (total, count) in state.metrics.items()}
        rate = learning_rate_factor(state.step - 1, config) * config.learning_rate
        self.log.write({"step": state.step, **means, "learning_rate": rate, "seconds": round(state.seconds, 3)})
        state.metrics = {}


# Files beside the checkpoints


class MetricsLog:
    """A file with one JSON object a line. Lines of steps after `keep_until`, which a killed run lost, are dropped."""

    def __init__(self, path: Path, keep_until: int):
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line + "\n")
        with _full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(kept).encode())

    def write(self, values: dict[str, Any]) -> None:
        with _full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        with _full_disk(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}") from error


@contextlib.contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """cuDNN's fastest gradients depend on which thread adds first."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@dataclass
class StopRequest:
    """The signal that asked training to stop; 0 if none did."""

    signal: int = 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[StopRequest]:
    """Within it SIGINT and SIGTERM are noted; a second one does what it always does."""
    stop = StopRequest()
    before: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours to take
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for taken, handler in before.items():
            signal.signal(taken, handler)
