"""The commands. Each takes the parsed options. It raises errors, which `main` turns into one line."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_fast import __version__
from ldm_fast.cli.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ldm_fast.configs.encoders import ClassEmbedderConfig
    from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

MAX_SIDE = 2048  # pixels; attention over the latent of a larger picture takes hours and all memory


class Stopped(Exception):
    """A command was stopped by a signal, once it had saved its work."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def say(text: str) -> None:
    """Print a line with names of files, which need not be UTF-8."""
    from ldm_fast.files.file_names import printable

    print(printable(text))


def generate(options: argparse.Namespace) -> None:
    """Draw pictures from words or classes, one PNG each or all in one."""
    from ldm_fast.files import images as pictures
    from ldm_fast.files.atomic import check_writable

    prompts = [prompt for prompt in options.prompts for _ in range(options.num)]
    paths = _output_paths(options, 1 if options.grid else len(prompts))
    for path in paths:
        check_writable(path)
    model = _load_model(options)
    conditions, negative = _conditions(model, prompts, options.negative)
    size = options.size or model.image_size
    init, mask = _read_init_and_mask(options, size)
    began = time.perf_counter()
    with Progress() as progress:
        images = model.generate(
            conditions,
            negative=negative,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            eta=options.eta,
            spacing=options.spacing,
            seed=options.seed,
            size=size,
            init=init,
            strength=options.strength,
            mask=mask,
            progress=lambda done, total: progress("sampling", done, total),
        )
    seconds = time.perf_counter() - began
    about = _about(model, options, size)
    if options.grid:
        text = {"prompt": json.dumps(prompts, ensure_ascii=False), "seed": str(options.seed), **about}
        pictures.write_png(paths[0], pictures.grid(images), text)
    else:
        for i, (path, prompt, image) in enumerate(zip(paths, prompts, images, strict=True)):
            pictures.write_png(path, image, {"prompt": prompt, "seed": str(options.seed + i), **about})
    names = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
    count = f"{len(images)} images of " if len(images) > 1 else ""
    say(f"{names}: {count}{size[1]}x{size[0]} pixels in {seconds:.1f} s")


def _load_model(options: argparse.Namespace) -> LatentDiffusion:
    """The model where --device says and as --dtype says; by default on the GPU, if there is one."""
    import torch

    from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(options.model)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, getattr(options, "dtype", None) or "float32")
    try:
        return model.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error


def _conditions(
    model: LatentDiffusion, prompts: list[str], negative: str | None
) -> tuple[list[str] | list[int] | int, str | int | None]:
    """Return prompts and negative prompt as the model takes them: words, class labels, or only how many images."""
    from ldm_fast.models.encoders import ClassEmbedder

    if model.conditioning_key is None:
        if any(prompts) or negative:
            raise ValueError('this model is unconditional: give "" as PROMPT, and --num')
        return len(prompts), None
    if isinstance(model.cond_stage, ClassEmbedder):
        names, config = model.card.get("classes", []), model.cond_stage.config
        labels = [_label(prompt, names, config) for prompt in prompts]
        return labels, None if negative is None else _label(negative, names, config)
    if model.cond_stage is None or not model.cond_stage.takes_text:
        raise ValueError("this model takes neither words nor classes; use LatentDiffusion.generate from Python")
    return prompts, negative


def _label(prompt: str, names: list[str], config: ClassEmbedderConfig) -> int:
    """The number of a class given by its number, or by its name in the model card; "" is the class of no condition."""
    if prompt in names:
        return names.index(prompt)
    if prompt == "" and config.null_class is not None:
        return config.null_class
    if not re.fullmatch(r"[0-9]+", prompt):
        known = f" or one of {', '.join(names)}" if names else f" below {config.num_classes}"
        raise ValueError(f"this model draws classes, and {prompt!r} is none: give a number{known}")
    return int(prompt)


def _output_paths(options: argparse.Namespace, count: int) -> list[Path]:
    from ldm_fast.files.file_names import MOST_BYTES, fitting_name

    words = re.findall(r"\w+", options.prompts[0].lower())[:8]
    name = fitting_name("-".join(words)[:60] or "unconditional", ".png", MOST_BYTES - len(f"-{count}"))
    out = Path(options.out or name)
    if not out.suffix:
        out = out.with_name(out.name + ".png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: only PNG files can be written; give a name that ends in .png")
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:0{len(str(count))}d}.png") for i in range(1, count + 1)]


def _read_init_and_mask(options: argparse.Namespace, size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    from ldm_fast.files.images import read_image, read_mask

    if options.init is None:
        for name in ("strength", "mask"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --init IMAGE")
        return None, None
    if options.mask is not None:
        shapes = [tuple(read(path).shape[:2]) for read, path in ((read_image, options.init), (read_mask, options.mask))]
        if shapes[0] != shapes[1]:
            (h, w), (mh, mw) = shapes
            raise ValueError(
                f"--mask {options.mask} is {mw}x{mh} pixels, --init {options.init} {w}x{h}; they must agree"
            )
    mask = None if options.mask is None else read_mask(options.mask, size)
    return read_image(options.init, size), mask


def _about(model: LatentDiffusion, options: argparse.Namespace, size: tuple[int, int]) -> dict[str, str]:
    """What goes into a PNG beside prompt and seed: together with the model file, enough to draw it again."""
    chosen = {name: getattr(options, name) for name in ("steps", "guidance", "sampler")}
    about = {name: str(getattr(model.defaults, name) if v is None else v) for name, v in chosen.items()}
    about |= {"size": f"{size[1]}x{size[0]}", "model": model.origin, "software": f"ldm_fast {__version__}"}
    given = ("negative", "strength", "eta", "spacing", "dtype")
    about |= {name: str(value) for name in given if (value := getattr(options, name)) is not None}
    about |= {name: Path(value).name for name in ("init", "mask") if (value := getattr(options, name)) is not None}
    return about


def reconstruct(options: argparse.Namespace) -> None:
    """Send a picture through the first stage and back."""
    from ldm_fast.files import images as pictures
    from ldm_fast.files.atomic import check_writable
    from ldm_fast.files.file_names import fitting_name
    from ldm_fast.training.metrics import psnr

    source = Path(options.image)
    out = Path(options.out or source.with_name(fitting_name(source.stem, "-reconstructed.png")))
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: only PNG files can be written; give a name that ends in .png")
    check_writable(out)
    image = pictures.read_image(source, options.size)
    if max(image.shape[:2]) > MAX_SIDE:
        raise ValueError(f"{source} is {image.shape[1]}x{image.shape[0]}; give --size with at most {MAX_SIDE} a side")
    model = _load_model(options)
    again = model.reconstruct(image[None])[0]
    decibels = float(psnr((again.double() - image.double()).square().mean()))
    pictures.write_png(
        out, again, {"source": source.name, "model": model.origin, "software": f"ldm_fast {__version__}"}
    )
    say(f"{out}: {again.shape[1]}x{again.shape[0]} pixels, PSNR {decibels:.2f} dB")


def evaluate(options: argparse.Namespace) -> None:
    """Measure the figures of the model card."""
    from ldm_fast.training import evaluation
    from ldm_fast.training.data import DataConfig, load_data

    model = _load_model(options)
    data = load_data(DataConfig(kind="emoji", size=model.image_size[0]))
    with Progress() as report:
        metrics = evaluation.evaluate(
            model,
            data,
            seen=options.seen,
            held_out=options.held_out,
            seed=options.seed,
            batch_size=options.batch_size,
            report=report,
        )
    say(f"model {model.origin}")
    print(evaluation.table(metrics))
    print(evaluation.json_line(metrics))


def train(options: argparse.Namespace) -> None:
    """Train a recipe."""
    from ldm_fast.training import TrainingStopped
    from ldm_fast.training import train as run_training

    run_dir = Path(options.run_dir or Path("runs") / Path(options.recipe).stem)
    try:
        path = run_training(
            options.recipe,
            run_dir,
            stage=options.stage,
            resume=not options.restart,
            first_stage=options.first_stage,
            device=options.device,
        )
    except TrainingStopped as stopped:
        raise Stopped(str(stopped), stopped.signal) from stopped
    say(f"{path}: written")


def doctor(options: argparse.Namespace) -> None:
    """Say what was built, and what each op runs here."""
    import platform

    import torch

    import ldm_fast
    from ldm_fast.ops import native

    print(f"ldm_fast {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        print(f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name()}")
    print("\nbuilt")
    print("\n".join(f"  {line}" for line in native.describe()))
    print("\nwhat runs here")
    print("\n".join(f"  {line}" for line in str(ldm_fast.explain()).splitlines()))
    shipped = Path(ldm_fast.__file__).parent / "assets" / "emoji.safetensors"
    say(f"\nshipped model: {shipped if shipped.is_file() else 'missing: give --model PATH'}")


def bench(options: argparse.Namespace) -> int:
    """Run benchmarks; the exit code is the largest of theirs."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if not known:
        raise ValueError(f"no benchmarks in {folder}: they come with a clone of the repository, not with the package")
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise ValueError(f"no benchmark called {unknown[0]!r}; there are {', '.join(known)}")
    codes = []
    for name in options.names or known:
        print(f"== {name}", flush=True)
        codes.append(subprocess.run([sys.executable, str(folder / f"{name}.py")], check=False).returncode)
    return max(map(abs, codes))
