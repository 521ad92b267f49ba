"""Time and memory of decoding a large image with the first stage: in bands, all at once, and with diffusers.

    python benchmarks/first_stage.py [--size 1024] [--tile 64] [--dtype float32]

The first stage is kl-f8 at its full size, with random weights. Each contender runs in a process of its own; its memory
is the peak of that process. A result is right if it differs from that of decoding all at once by at most 1e-4
(bfloat16: 5e-2), relative to the largest element.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import describe, largest_error
from torch import Tensor

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.models.autoencoder import AutoencoderKL

CONTENDERS = ("in bands", "whole", "diffusers")
ALLOWED = {"float32": 1e-4, "bfloat16": 5e-2}
QUICK = dict(block_out_channels=(32, 64), layers_per_block=1)


def first_stage(options: argparse.Namespace) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderConfig(**(QUICK if options.quick else {}))).eval()
    model.join_projections()
    return model.to(getattr(torch, options.dtype))


def decoder(name: str, options: argparse.Namespace) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return a function that decodes, without an encoder in memory, and the downsampling factor."""
    model = first_stage(options)
    factor = model.config.downsampling_factor
    if name == "diffusers":
        from diffusers import AutoencoderKL as Peer

        levels = len(model.config.block_out_channels)
        peer = Peer(
            block_out_channels=model.config.block_out_channels,
            layers_per_block=model.config.layers_per_block,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=4,
            sample_size=512,
        )
        peer = peer.eval().to(model.dtype)
        peer.load_state_dict({k: v for k, v in model.state_dict().items() if k in peer.state_dict()}, strict=False)
        model = peer
    tile = {"tile": options.tile} if name == "in bands" else {}
    model.encoder = None
    return lambda z: model.decode(z, return_dict=False, **tile)[0], factor


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one contender in this process, and write its image and figures to `options.out`."""
    if options.threads:
        torch.set_num_threads(options.threads)
    decode, factor = decoder(name, options)
    side = options.size // factor
    z = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(getattr(torch, options.dtype))
    before = peak_memory()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        image = decode(z)
        seconds.append(time.perf_counter() - start)
    record = {"seconds": seconds, "peak_mb": peak_memory(), "before_mb": before, "threads": torch.get_num_threads()}
    torch.save({"image": image.float(), **record}, options.out)


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e6 if sys.platform == "darwin" else 1024 * 1.048576)


def results(options: argparse.Namespace, arguments: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in CONTENDERS:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "out.pt")
            command = [sys.executable, __file__, *arguments, "--only", name, "--out", out]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found[name] = torch.load(out)
            else:
                print(f"absent: {name} ({done.stderr.strip().splitlines()[-1]})")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=1024, help="side of the image in pixels (default 1024)")
    p.add_argument("--tile", type=int, default=64, help="side of a tile in latents (default 64)")
    p.add_argument("--dtype", default="float32", choices=tuple(ALLOWED))
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--repeats", type=int, default=1, help="calls of each contender (default 1)")
    p.add_argument("--allow", type=float, help="largest error that counts as right (default: by dtype)")
    p.add_argument("--quick", action="store_true", help="a tiny first stage, to try out the benchmark")
    p.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    p.add_argument("--out", help=argparse.SUPPRESS)
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.only:
        measure(options.only, options)
        return 0
    found = results(options, arguments)
    if "whole" not in found or "in bands" not in found:
        return 1
    truth = found["whole"]["image"]
    wrong, rows = [], {}
    allowed = ALLOWED[options.dtype] if options.allow is None else options.allow
    print(f"first_stage: {describe(torch.device('cpu'))}, PyTorch {torch.__version__}, {options.dtype}")
    print(f"{options.size} x {options.size} pixels, tiles of {options.tile} latents; error against all at once")
    for name, result in found.items():
        error = largest_error(result["image"], truth)
        row = {"median_s": statistics.median(result["seconds"]), "error": error}
        row |= {key: result[key] for key in ("peak_mb", "before_mb", "threads")}
        rows[name] = row
        if error > allowed:
            wrong.append(name)
            print(f"  {name:10} WRONG: error {error:.2e}")
            continue
        print(
            f"  {name:10} {row['median_s']:8.2f} s   at most {row['peak_mb']:6.0f} MB "
            f"({row['before_mb']:.0f} before)   error {error:.1e}"
        )
    print(json.dumps({"benchmark": "first_stage", **vars(options), "wrong": wrong, "rows": rows}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
