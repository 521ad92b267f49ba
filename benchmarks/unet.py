"""Time one evaluation of Stable Diffusion 1.x's UNet: ours, only attention ours, PyTorch's own ops, and diffusers.

    python benchmarks/unet.py [--full] [--batch 2] [--latent 64] [--compile]

Without --full the UNet has half the channels and half the heads (215 M parameters instead of 860 M), so the widths of
the heads and the lengths of the sequences are those of the real one. All contenders have the same random weights. A
float32 result counts as right if it is within 1e-5 (relative L2) of the reference implementation, a half-precision
result if its error is at most twice that of PyTorch's own ops in the same dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from _eager import eager_ops
from _harness import OURS, Bench, Verdict, parser
from torch import Tensor

from ldm_fast import UNet, UNetConfig, explain, use_impl

FULL = UNetConfig()
HALF = UNetConfig(block_out_channels=(160, 320, 640, 640), num_attention_heads=4)
TINY = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    cross_attention_dim=32,
    num_attention_heads=2,
)
FLOAT32_ERROR = 1e-5
PEER_ERROR = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # a peer need only show that it is the same network
EAGER = "PyTorch's ops"


def build(config: UNetConfig, bench: Bench) -> UNet:
    """Return a UNet with PyTorch's initial weights, drawn with a fixed seed."""
    torch.manual_seed(0)
    with bench.device:
        model = UNet(config).eval().requires_grad_(False)
    model.join_projections()
    return model


def build_diffusers(model: UNet, bench: Bench) -> Any | None:
    """Return diffusers' UNet with our parameters (the same tensors), or None if diffusers is not installed."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "diffusers"
        bench.absent["diffusers"] = (
            "pip install diffusers" if missing else f"cannot be imported: {str(error).splitlines()[0]}"
        )
        return None
    config = model.config
    up = tuple(name.replace("Down", "Up") for name in reversed(config.down_block_types))
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            sample_size=config.sample_size,
            down_block_types=config.down_block_types,
            up_block_types=up,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=config.num_attention_heads,  # their name for the number of heads
        )
    theirs.load_state_dict(model.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)


def make_contenders(model: UNet, theirs: Any | None, inputs: tuple[Any, ...], compiled: bool) -> dict[str, Callable]:
    def ours() -> Tensor:
        return model(*inputs).sample

    def one_op() -> Tensor:
        with eager_ops("group_norm_silu"):
            return model(*inputs).sample

    def eager() -> Tensor:
        with eager_ops():
            return model(*inputs).sample

    contenders = {OURS: ours, f"{OURS}, attention only": one_op, EAGER: eager}
    if theirs is not None:
        contenders["diffusers"] = lambda: theirs(*inputs).sample
    if compiled:
        whole = [name for name in contenders if "only" not in name]
        contenders |= {f"{name}, torch.compile": compiled_twin(name, model, theirs, inputs) for name in whole}
    return contenders


def compiled_twin(name: str, model: UNet, theirs: Any | None, inputs: tuple[Any, ...]) -> Callable[[], Tensor]:
    twin = torch.compile(theirs if name == "diffusers" else lambda *args: model(*args))

    def run() -> Tensor:
        with eager_ops() if name == EAGER else contextlib.nullcontext():
            return twin(*inputs).sample

    return run


def row(bench: Bench, config: UNetConfig, label: str, dtype: str) -> None:
    options = bench.options
    model = build(config, bench)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(options.batch, config.in_channels, options.latent, options.latent, generator=generator)
    context = torch.randn(options.batch, options.tokens, config.cross_attention_dim, generator=generator)
    sample, context = sample.to(bench.device), context.to(bench.device)
    kind = getattr(torch, dtype)
    model, sample, context = model.to(kind), sample.to(kind), context.to(kind)
    # the rounded weights and inputs, computed in float32
    with use_impl("reference"):
        truth = model.float()(sample.float(), 500, context.float()).sample
    model = model.to(kind)

    def error(out: Tensor) -> float:
        return float((out.float() - truth).norm() / truth.norm()) if out.shape == truth.shape else float("inf")

    inputs = (sample, 500, context)
    contenders = make_contenders(model, build_diffusers(model, bench), inputs, options.compile)
    allowed = FLOAT32_ERROR if dtype == "float32" else 2 * error(contenders[EAGER]())

    def verify(name: str, out: Tensor) -> Verdict:
        found, limit = error(out), allowed if name.startswith(OURS) else PEER_ERROR[dtype]
        return Verdict(found, found <= limit, f"relative L2 error {found:.2e}, allowed {limit:.2e}")

    # for ordinary inputs; explain lists each op once for each device
    chosen = {c.op: c.chosen for c in explain(kind).choices if c.device == bench.device.type}
    who = f"attention by {chosen['attention']}, group_norm_silu by {chosen['group_norm_silu']}"
    bench.row(label, dtype, contenders, verify, implementation=who)


def main(arguments: list[str] | None = None) -> int:
    p = parser(__doc__, dtypes=("float32", "bfloat16"))
    p.add_argument("--full", action="store_true", help="Stable Diffusion 1.x at full size: slow, up to 12 GB of memory")
    p.add_argument("--batch", type=int, default=2, metavar="N", help="default 2: with and without the condition")
    p.add_argument("--latent", type=int, default=64, metavar="N", help="side of the latent (default 64: 512² pixels)")
    p.add_argument("--tokens", type=int, default=77, metavar="N", help="tokens of the condition (default 77)")
    options = p.parse_args(arguments)
    config, label = (FULL, "SD 1.x") if options.full else (HALF, "SD 1.x at half width")
    if options.quick:
        config, label, options.latent = TINY, "tiny", 8
    config = dataclasses.replace(config, sample_size=options.latent)
    bench = Bench("unet", options)
    label += f", batch {options.batch}, {options.latent}x{options.latent}, {options.tokens} tokens"
    if options.shape and options.shape not in label:
        raise SystemExit(f"unet: the name of the only row does not contain {options.shape!r}: {label}")
    with torch.no_grad():
        for dtype in options.dtype:
            row(bench, config, label, dtype)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
