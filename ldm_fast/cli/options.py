"""The options of every command, and its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from ldm_fast import __version__
from ldm_fast.cli import commands

GENERATE_EXAMPLES = """\
examples:
  ldm-fast generate "red apple" --out apple.png
  ldm-fast generate "red apple" --num 16 --grid --out apples.png    sixteen, in one picture; seeds 0 to 15
  ldm-fast generate "red apple" --seed 7                            another one; the same seed, the same picture
  ldm-fast generate "astronaut" "cat face" --steps 50 --guidance 5 --sampler dpm_solver_pp_2m
  ldm-fast generate "cat face" --negative "tear" --out cat.png      steer away from something
  ldm-fast generate "grinning face" --init me.png --strength 0.6    start from a picture (img2img)
  ldm-fast generate "blue heart" --init me.png --mask mask.png      repaint where the mask is white
  ldm-fast generate "" --num 9 --grid                               no words: anything may come
  ldm-fast generate 3 7 --model classes.safetensors                 one class each, if the model draws classes

Every PNG holds its prompt, seed, model and settings as text. Image i of a run is the one that seed + i gives alone.
"""
RECONSTRUCT_EXAMPLES = """\
Shows what the first stage keeps of a picture: it is encoded to a latent and decoded again.

example:
  ldm-fast reconstruct photo.png --out again.png
"""
EVALUATE_EXAMPLES = """\
Measures the figures of the model card on the OpenMoji emojis (needs: pip install "ldm_fast[emoji]"):
PSNR of held-out emojis, codebook usage, and how often an emoji generated from its name is nearest to the true one.

examples:
  ldm-fast evaluate
  ldm-fast evaluate --model runs/emoji/model.safetensors --seen 50 --held-out 20    a quick look
"""
TRAIN_EXAMPLES = """\
Trains a first stage, then a second stage on its latents. You may stop it at any time, even by kill -9: the same command
continues from the last checkpoint, and the result is bit for bit that of an uninterrupted run.

examples:
  ldm-fast train emoji --run-dir runs/emoji                 the shipped model, by its recipe
  ldm-fast train my/recipe.toml --run-dir runs/mine --stage first
  ldm-fast train my/recipe.toml --first-stage sd-v1-4/vae   on the latents of a first stage that exists
"""
DOCTOR_EXAMPLES = """\
Tells what was built, which implementation each op uses on this machine, and why not a better one.
"""
BENCH_EXAMPLES = """\
Runs the benchmarks of a checkout: each verifies, then times, and ends with one line of JSON.

examples:
  ldm-fast bench                     all of them
  ldm-fast bench attention unet
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    with_device = Parser(add_help=False)
    with_device.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    with_model = Parser(add_help=False, parents=[with_device])
    with_model.add_argument("--model", metavar="PATH", help="a model file (default: the text-to-emoji model shipped)")

    parser = Parser(
        prog="ldm-fast",
        description="Latent diffusion on your own machine.",
        epilog="ldm-fast COMMAND --help shows examples of each command.",
    )
    parser.add_argument("--version", action="version", version=f"ldm-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def command(run: Callable[..., int | None], summary: str, text: str, *parents: Parser) -> Parser:
        added = subparsers.add_parser(
            run.__name__,
            help=summary,
            epilog=text,
            parents=[*parents, common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _generate_options(command(commands.generate, "make pictures from words", GENERATE_EXAMPLES, with_model))

    p = command(commands.reconstruct, "send a picture through the first stage", RECONSTRUCT_EXAMPLES, with_model)
    p.add_argument("image", metavar="IMAGE")
    p.add_argument("--out", metavar="PNG", help="default: IMAGE's name with -reconstructed")
    p.add_argument("--size", type=_size, metavar="W[xH]", help="first scale and crop the picture to this size")

    p = command(commands.evaluate, "measure the model card's figures", EVALUATE_EXAMPLES, with_model)
    p.add_argument("--seen", type=_count, default=200, metavar="N", help="captions seen in training (default 200)")
    p.add_argument("--held-out", type=_count, metavar="N", help="held-out captions (default: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=_positive, default=48, metavar="N")

    p = command(commands.train, "train both stages as a recipe says", TRAIN_EXAMPLES, with_device)
    p.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or the path of a .toml file")
    p.add_argument("--run-dir", metavar="DIR", help="checkpoints, samples, metrics (default: runs/RECIPE)")
    p.add_argument("--stage", choices=("all", "first", "second"), default="all")
    trained = "a trained first stage: a run's folder, a model file or a published checkpoint"
    p.add_argument("--first-stage", metavar="PATH", help=trained)
    p.add_argument("--restart", action="store_true", help="start again instead of continuing from the last checkpoint")

    command(commands.doctor, "show what was built, and which code runs here", DOCTOR_EXAMPLES)

    p = command(commands.bench, "run the benchmarks of a checkout", BENCH_EXAMPLES)
    p.add_argument("names", nargs="*", metavar="OP", help="attention, unet, ... (default: all)")
    return parser


def _generate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help='words, or a class; "" is no condition')
    p.add_argument("--out", metavar="PNG", help="default: the prompt's words; several images get -1, -2, ... added")
    p.add_argument("--num", type=_positive, default=1, metavar="N", help="images of each prompt (default 1)")
    p.add_argument("--grid", action="store_true", help="all images in one picture")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p.add_argument("--negative", metavar="PROMPT", help="what to steer away from")
    p.add_argument("--steps", type=int, metavar="N", help="more steps are finer and slower (default: the model's)")
    p.add_argument("--guidance", type=float, metavar="G", help="how closely to follow the words; 1 is no guidance")
    p.add_argument("--sampler", metavar="NAME", help="ddim, ddpm, plms, dpm_solver_pp_2m")
    p.add_argument("--eta", type=float, metavar="E", help="ddim's noise at every step, 0 to 1")
    p.add_argument("--spacing", metavar="NAME", help="how steps are spaced: leading, trailing, linspace")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what to compute in (default float32)")
    p.add_argument("--size", type=_size, metavar="W[xH]", help="in pixels (default: what the model was trained on)")
    p.add_argument("--init", metavar="IMAGE", help="a picture to start from; it is scaled and cropped to the size")
    p.add_argument("--strength", type=float, metavar="S", help="how much of --init to change, above 0 to 1")
    p.add_argument("--mask", metavar="IMAGE", help="white where --init is to be repainted, black where it is kept")


def _size(text: str) -> tuple[int, int]:
    """Read "64" or "96x64" (width x height) as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 64, or 96x64 (width x height)")
    width, height = int(match[1]), int(match[2] or match[1])
    if max(width, height) > commands.MAX_SIDE or min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sides must be between 1 and {commands.MAX_SIDE}")
    return height, width


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)
