"""Compile the Triton kernels without a GPU and read the result: registers, spills, shared memory and instructions.

    python benchmarks/gpu_static.py [--arch 80 90 100] [--op attention group_norm_silu] [--dtype float16] [--quick]

The shapes are those of `model_shapes.py`. Each launch is the one that the op would make, compiled ahead of time with
everything that Triton would know about its arguments. Launches that compile to the same kernel are compiled once.
Nothing is run, and no GPU time is claimed. The last line is JSON.

One table has a line for each compiled kernel and architecture. It counts the instructions in the machine code; those in
the body of a loop count once. `matrix` is the work of the matrix instructions divided by what the tiles need. It is 1
if nothing is padded and nothing computed twice. For sm_100 the compiler takes the first iteration out of a loop and
computes ahead, so products appear up to three times; there, `padded` counts the instructions larger than a tile.
`resident` is the number of programs that one multiprocessor can hold, `declared` the number that the plan intends it to
hold. The faults of a kernel are listed in brackets (see `faults`).

The other table has a line for each shape and pass. Bytes count every tensor once for each kernel that takes it, since
repeated reads come from a cache. Floating-point operations are given for the work itself, for our tiles, and for the
tiles that FlashAttention-2 would compute. A modelled time is the larger of bytes / bandwidth and operations / peak,
both as published. It leaves out launches, latency, caches and exponentials.

FlashAttention-2's tiles (Dao, arXiv:2307.08691; `flash_fwd_launch_template.h` and `flash_bwd_launch_template.h`) are
counted as whole tiles of the block sizes that it uses on A100, with the head padded to the next width it is built for.
It takes no heads wider than 256.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from model_shapes import ATTENTION, GROUP_NORM_SILU, GROUPS, AttentionShape, GroupNormShape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldm_fast.kernels import Launch, attention, attention_backward, group_norm_silu, group_norm_silu_backward
from ldm_fast.kernels.attention_common import Inputs
from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.cases import Attention, GroupNormSilu, flops

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
SHAPES = {"attention": ATTENTION, "group_norm_silu": GROUP_NORM_SILU}
QUICK = {
    "attention": AttentionShape(2, 8, 4096, 77, 40),
    "group_norm_silu": GroupNormShape(2, 320, 64, 64, silu=True, modulated=False),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

REGISTERS = 65536  # per multiprocessor
THREADS = {80: 2048, 86: 1536, 90: 2048, 100: 2048, 120: 1536}
# bytes per multiprocessor; each program takes 1 KB more than it asks for
SHARED = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
TENSOR_MEMORY = 512  # columns


class Gpu(NamedTuple):
    """Published peaks: dense float16 products in FLOP/s, memory in bytes/s."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("A100", 312e12, 2.039e12), Gpu("H100", 989e12, 3.35e12), Gpu("B200", 2250e12, 8.0e12))
# FlashAttention-2's tiles: head width: (queries, keys), forward and backward
FLASH = {
    32: ((128, 128), (128, 128)),
    64: ((128, 128), (128, 128)),
    96: ((128, 64), (64, 128)),
    128: ((128, 64), (64, 128)),
    160: ((128, 32), (64, 64)),
    192: ((128, 64), (64, 64)),
    256: ((128, 64), (64, 64)),
}

# The matrix products in one iteration of each attention kernel: the rows, the columns and what is summed over, each of
# them q(ueries), k(eys) or d (a head's columns). "D" is summed piece by piece if a head is wider than a program holds.
PRODUCTS = {
    "forward_short": ("qkD", "qdk"),
    "forward_long": ("qkD", "qdk"),
    "backward_short": ("kqD", "kqD", "kdq", "kdq", "qdk"),
    "backward_queries": ("qkD", "qkD", "qdk"),
    "backward_keys": ("kqD", "kqD", "kdq", "kdq"),
}


# The kernels of group_norm_silu that see all of x, and how many tiles they read and write in one iteration. Fewer bytes
# are impossible: x once and y once if a group fits on chip, x twice and y once if not. Backward, grad is read as well.
TRAFFIC = {
    "forward_group": (1, 1),
    "stats": (1, 0),
    "apply": (1, 1),
    "backward_group": (2, 1),
    "grad_sums": (2, 0),
    "grad_apply": (2, 1),
}
LOADS = ("tt.load", "ttg.async_copy_global_to_local")


@dataclass(frozen=True)
class Static:
    """One compiled kernel. `local` counts accesses to local memory, where spilled registers go."""

    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    tensor_memory: int
    resident: int  # programs that a multiprocessor can hold
    declared: int  # programs that it is meant to hold
    stack: int
    local: int
    tensor_core: int
    matrix: float  # multiply-adds of the matrix instructions, divided by those that the tiles need
    padded: int  # matrix instructions larger than a tile (sm_100; elsewhere `matrix` shows it)
    exp2: int
    atomics: int
    loads: int
    loads_128: int
    tile_loads: int  # loads of 128 bits that a thread needs for its part of the tiles
    stores: int
    stores_128: int
    tile_stores: int
    reads: int  # whole tiles that a kernel of group_norm_silu reads in one iteration
    writes: int  # whole tiles that it writes
    divisions: int  # of integers, remainders included
    loop_divisions: int  # those inside loops


# ---- the launches ----


def attention_launches(
    shape: AttentionShape | tuple[int, ...], dtype: torch.dtype, mask: torch.Tensor | None = None
) -> list[Launch]:
    """Return the launches of both passes, for tensors as `ldm_fast.models.attention` passes them.

    The tensors are (B, N, H, D) in memory. If no gradients are needed, q, k and v (or k and v of a context) are
    views of one product; see `ldm_fast.models.joined`.
    """
    b, h, n, m, d = shape

    def parts(length: int, count: int) -> tuple[torch.Tensor, ...]:
        return torch.empty(b, length, count, h, d, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind()

    lse = torch.empty(b, h, n, device="meta")
    (out,), (grad,), (dq,), (q,) = (parts(n, 1) for _ in range(4))
    (k,), (v,), (dk,), (dv,) = (parts(m, 1) for _ in range(4))
    joined = parts(n, 3) if n == m else (q, *parts(m, 2))
    forward = attention.forward_launches(Inputs(*joined, mask, d**-0.5), out, lse)
    inputs = Inputs(q, k, v, mask, d**-0.5)
    return forward + attention_backward.backward_launches(grad, inputs, out, lse, (dq, dk, dv))


def group_norm_silu_launches(
    shape: GroupNormShape, dtype: torch.dtype, memory_format: torch.memory_format
) -> list[Launch]:
    """Return the launches: forward with weights of x's dtype, backward with float32 weights, as training keeps them."""
    x, y, grad, dx = (torch.empty(shape[:4], dtype=dtype, device="meta", memory_format=memory_format) for _ in range(4))
    weight, bias, *of_training = (torch.empty(shape.C, dtype=d, device="meta") for d in (dtype,) * 2 + (None,) * 4)
    scale, shift, dscale, dshift = (
        torch.empty(shape[:2], dtype=dtype, device="meta") if shape.modulated else None for _ in range(4)
    )
    statistics = torch.empty(2, shape.B, GROUPS, device="meta")
    silu = "silu" if shape.silu else None
    norm = Norm(x, GROUPS, weight, bias, 1e-5, silu, scale, shift)
    forward = group_norm_silu.forward_launches(norm, y, statistics)
    weight, bias, dweight, dbias = of_training
    norm, gradients = norm._replace(weight=weight, bias=bias), (dx, dweight, dbias, dscale, dshift)
    return forward + group_norm_silu_backward.backward_launches(grad, norm, statistics, gradients)


def works(ops: Iterable[str], dtype: torch.dtype, quick: bool = False) -> Iterator[tuple[str, list[Launch]]]:
    """Yield a readable label and the launches for every shape, or with `quick` for one shape of each op."""
    for op in ops:
        for shape in (QUICK[op],) if quick else SHAPES[op]:
            if op == "attention":
                yield f"attention {tuple(shape)}", attention_launches(shape, dtype)
                continue
            kind = ("", " silu")[shape.silu] + ("", " modulated")[shape.modulated]
            for name, layout in LAYOUTS.items():
                label = f"group_norm_silu {tuple(shape[:4])}{kind} {name}"
                yield label, group_norm_silu_launches(shape, dtype, layout)


class Variant(NamedTuple):
    """A kernel to compile, a label of the first work that needs it, and how many other works need it."""

    launch: Launch
    label: str
    others: int


def distinct(all_works: Iterable[tuple[str, list[Launch]]]) -> list[Variant]:
    """Return the kernels that have to be compiled, each only once."""
    found: dict[str, Variant] = {}
    for label, launches in all_works:
        for launch in launches:
            source = _source(launch)
            what = launch.kernel.__name__, source.signature, source.constants, source.attrs, launch.options
            before = found.get(repr(what), Variant(launch, label, -1))
            found[repr(what)] = before._replace(others=before.others + 1)
    return list(found.values())


# ---- compiling ----


def _source(launch: Launch) -> ASTSource:
    """Return the source with what a launch tells the compiler: types, and which arguments are 1 or multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    for index, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        general = launch.kernel.params[index].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], divisible = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        else:
            signature[name], divisible = "fp32", False
        if divisible and not general:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in names[len(launch.args) :]:
        signature[name], constants[name] = "constexpr", launch.options[name]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, arch: int) -> Static:
    """Compile one launch for sm_`arch` and read the machine code."""
    options = {name: value for name, value in launch.keywords.items() if name not in launch.kernel.arg_names}
    built = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    resources = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # an instruction follows its address and perhaps a predicate; its modifiers come after it, separated by dots
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", code)
    if not names or "REG" not in resources:
        raise RuntimeError(f"gpu_static: the machine code of {launch.kernel.__name__} could not be read")
    counts = Counter(name.split(".")[0] for name in names)
    wide = Counter(name.split(".")[0] for name in names if ".128" in name)
    warps, tensor_memory = built.metadata.num_warps, getattr(built.metadata, "tmem_size", 0) or 0
    blackwell, tiles = _blackwell_products(built.asm["ptx"]), _product_tiles(launch)
    done = _matrix_work(names, warps) + sum(16 * rows * columns for rows, columns in blackwell)
    # every warp computes at least 16 × 8 elements
    needed = sum(max(rows * columns, 16 * 8 * warps) * depth for rows, columns, depth in tiles)
    divisions, loop_divisions = _divisions(built.asm["ptx"])
    loaded, stored = _tiles(built.asm["ttgir"], *LOADS), _tiles(built.asm["ttgir"], "tt.store")
    whole = launch.options.get("CHANNELS", 0), launch.options.get("PIXELS", 0)
    # Asynchronous copies from global to shared memory (LDGSTS) are loads as well. Atomics on shared memory (ATOMS) do
    # not count: Blackwell allocates its tensor memory with them.
    return Static(
        kernel=launch.kernel.__name__.lstrip("_"),
        arch=arch,
        warps=warps,
        registers=resources["REG"],
        shared=built.metadata.shared,
        tensor_memory=tensor_memory,
        resident=_resident(arch, warps, resources["REG"], built.metadata.shared, tensor_memory),
        declared=launch.resident,
        stack=resources["STACK"],
        local=counts["LDL"] + counts["STL"] + resources["LOCAL"],
        tensor_core=counts["HMMA"] + counts["HGMMA"] + counts["UTCHMMA"],
        matrix=round(done / needed, 3) if needed else 0.0,
        padded=sum(size not in {(min(128, rows), columns) for rows, columns, _ in tiles} for size in blackwell),
        exp2=sum(name.startswith("MUFU.EX2") for name in names),
        atomics=sum(counts[name] for name in ("ATOM", "ATOMG", "RED", "REDG")),
        loads=counts["LDG"] + counts["LDGSTS"],
        loads_128=wide["LDG"] + wide["LDGSTS"],
        tile_loads=_wide_accesses(loaded, warps),
        stores=counts["STG"],
        stores_128=wide["STG"],
        tile_stores=_wide_accesses(stored, warps),
        reads=sum(tile[:2] == whole for tile in loaded),
        writes=sum(tile[:2] == whole for tile in stored),
        divisions=divisions,
        loop_divisions=loop_divisions,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _resident(arch: int, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Return how many programs fit on one multiprocessor. Registers are allocated to a thread in units of eight."""
    fits = [REGISTERS // (32 * warps * (registers + 7 & ~7)), SHARED[arch] // (shared + 1024)]
    fits.append(THREADS[arch] // (32 * warps))
    if tensor_memory:
        fits.append(TENSOR_MEMORY // tensor_memory)
    return min(32, *fits)


# ---- reading the code ----


def _lengths(launch: Launch) -> dict[str, list[int]]:
    """Return the queries, keys and columns of the tile of one iteration, each as a list of pieces."""
    options = launch.options
    keys = [options[name] for name in ("M0", "M1", "BLOCK_M") if options.get(name)]
    columns = [options[name] for name in ("D0", "D1") if options.get(name)]
    return {"q": [options["BLOCK_N"]], "k": keys, "d": columns, "D": columns}


def _products(launch: Launch) -> tuple[str, ...]:
    """Return the products of one iteration; if dk and dv are computed apart, of one iteration of each."""
    products = PRODUCTS.get(launch.kernel.__name__.lstrip("_"), ())
    return (*products, "kqD") if launch.options.get("APART") else products


def _product_tiles(launch: Launch) -> list[tuple[int, int, int]]:
    """Return the rows, columns and depth of the products of one iteration."""
    products = _products(launch)
    lengths = _lengths(launch) if products else {}
    return [(x, y, z) for a, b, c in products for x in lengths[a] for y in lengths[b] for z in lengths[c]]


def _matrix_work(names: list[str], warps: int) -> int:
    """Return the multiply-adds of a program's matrix instructions, each instruction counted once.

    A warp executes one of Ampere's instructions, a group of four warps one of Hopper's. Their names contain their size.
    """
    work = 0
    for name, count in Counter(names).items():
        if match := re.match(r"HMMA\.(16)(8)(\d+)", name):
            work += count * warps * math.prod(map(int, match.groups()))
        elif match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            work += count * (warps // 4) * math.prod(map(int, match.groups()))
    return work


def _blackwell_products(ptx: str) -> list[tuple[int, int]]:
    """Return the rows and columns of Blackwell's matrix instructions, which are 16 deep.

    A constant descriptor holds them: rows / 16 from bit 24 on, columns / 8 from bit 17 on.
    """
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    operands = r"\[ [^\]]+\], (?:%rd\d+|\[[^\]]+\]), %rd\d+, (%r\d+|\d+),"
    descriptors = [int(constants.get(x, x)) for x in re.findall(rf"tcgen05\.mma\.\S+ {operands}", ptx)]
    return [((descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8) for descriptor in descriptors]


def _divisions(ptx: str) -> tuple[int, int]:
    """Count the integer divisions and remainders in the PTX, and those of them that are inside loops."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line))}
    inside = set()
    for number, line in enumerate(lines):
        if (match := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) and labels.get(match[1], number) < number:
            inside |= set(range(labels[match[1]], number))
    places = [number for number, line in enumerate(lines) if re.search(r"\b(div|rem)\.[su](16|32|64)\b", line)]
    return len(places), len(inside.intersection(places))


def _tiles(ttgir: str, *operations: str) -> list[tuple[int, int, int]]:
    """Return the rows, columns and bits per element of the tiles that these operations read or write."""
    found = re.findall(rf"(?:{'|'.join(operations)}) .*?: tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>", ttgir)
    return [tuple(map(int, tile)) for tile in found]


def _wide_accesses(tiles: list[tuple[int, int, int]], warps: int) -> int:
    """Return how many 128-bit accesses a thread needs for its part of these tiles; 0 if the part is smaller."""
    return sum(rows * columns * bits // (32 * warps * 128) for rows, columns, bits in tiles)


# ---- checks ----


def faults(static: Static, dtype: torch.dtype, aligned: bool = True) -> list[str]:
    """Return the faults of a compiled kernel. `aligned`: rows are multiples of 16 bytes, and nothing is masked."""
    product, stream = static.kernel in PRODUCTS, static.kernel in TRAFFIC
    half = dtype != torch.float32
    checks = {
        "spills": static.stack == static.local == 0,
        "atomics": static.atomics == 0,
        "occupancy": static.resident >= static.declared,
        # float32 products must avoid the tensor cores, which would round to tf32
        "tensor cores": not product or (static.tensor_core > 0) == half,
        "matrix work": not product or not half or 1 <= static.matrix <= (3 if static.arch >= 100 else 1),
        "padded products": static.padded == 0,
        "exponentials": not product or static.exp2 > 0,
        "narrow loads": not aligned or static.loads_128 >= static.tile_loads,
        "narrow stores": not aligned or static.stores_128 >= static.tile_stores,
        "traffic": not stream or (static.reads, static.writes) == TRAFFIC[static.kernel],
        "division in a loop": not stream or static.loop_divisions == 0,
    }
    return [name for name, holds in checks.items() if not holds]


def aligned(launch: Launch) -> bool:
    """Return whether rows are multiples of 16 bytes. Those of maps of 2 × 2 or 6 × 6 pixels are not."""
    size = next(x for x in launch.args if x is not None).element_size()
    return launch.options.get("UNIT", 1) * size == 16 and launch.options.get("D", 16) * size % 16 == 0


# ---- work and modelled times ----


class Work(NamedTuple):
    """One pass of an op. The operations of tiles include padding and what is computed twice."""

    label: str
    bytes: int
    needed: int
    ours: int
    flash: int | None

    def modelled(self, gpu: Gpu) -> float:
        """Return a bound in seconds from published peaks; this is not a measurement."""
        return max(self.bytes / gpu.bandwidth, self.ours / gpu.flops)


def attention_work(shape: AttentionShape, dtype: torch.dtype) -> list[Work]:
    """Return the work of the forward and of the backward pass."""
    launches = attention_launches(shape, dtype)
    cut = next(i for i, launch in enumerate(launches) if "backward" in launch.kernel.__name__)
    needed, result = flops("attention", Attention(*shape)), []
    for name, part, times in (("forward", launches[:cut], 1.0), ("backward", launches[cut:], 2.5)):
        ours = sum(_attention_flops(launch, shape) for launch in part)
        flash = _flash_flops(shape, name == "backward")
        label = f"attention {tuple(shape)} {name}"
        result.append(Work(label, _bytes(part), int(times * needed), ours, flash))
    return result


def _attention_flops(launch: Launch, shape: AttentionShape) -> int:
    """Return the operations of all iterations of all programs."""
    name, products = launch.kernel.__name__.lstrip("_"), _products(launch)
    if not products:
        return 0
    lengths = {axis: sum(pieces) for axis, pieces in _lengths(launch).items()}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    lengths["D"] *= triton.cdiv(shape.D, lengths["d"])
    programs = launch.programs // (2 if launch.options.get("APART") else 1)
    if "tiles" in arguments:
        turns = arguments["tiles"]
    else:
        turns = triton.cdiv(shape.N, lengths["q"]) if name == "backward_keys" else triton.cdiv(shape.M, lengths["k"])
    return 2 * programs * turns * sum(math.prod(lengths[axis] for axis in product) for product in products)


def _flash_flops(shape: AttentionShape, backward: bool) -> int | None:
    width = next((width for width in FLASH if width >= shape.D), None)
    if width is None:
        return None
    queries, keys = FLASH[width][backward]
    scores = triton.cdiv(shape.N, queries) * queries * triton.cdiv(shape.M, keys) * keys
    return (10 if backward else 4) * shape.B * shape.H * scores * width


def group_norm_silu_work(shape: GroupNormShape, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Work]:
    """Return the work of the forward and of the backward pass. Operations are nominal, and far from any peak."""
    launches = group_norm_silu_launches(shape, dtype, memory_format)
    names = [launch.kernel.__name__ for launch in launches]
    cut = next(i for i, name in enumerate(names) if "backward" in name or "grad" in name)
    needed = flops("group_norm_silu", GroupNormSilu(tuple(shape[:4]), GROUPS))
    layout = next(name for name, layout in LAYOUTS.items() if layout == memory_format)
    label = f"group_norm_silu {tuple(shape[:4])} {layout}"
    return [
        Work(f"{label} {name}", _bytes(part), times * needed, times * needed, None)
        for name, part, times in (("forward", launches[:cut], 1), ("backward", launches[cut:], 2))
    ]


def _bytes(launches: Iterable[Launch]) -> int:
    """Return the bytes of every tensor, counted once for each kernel that takes it."""
    return sum(x.numel() * x.element_size() for launch in launches for x in launch.args if isinstance(x, torch.Tensor))


# ---- the tables ----


def _print_kernels(variants: list[Variant], architectures: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Print the table line by line as the kernels are compiled. Faults come before the work that needs the kernel."""
    columns = [field.name for field in fields(Static)]
    widths = [max(6, len(name)) for name in columns[1:]]
    print("  ".join([f"{'kernel':16}", *(f"{name:>{w}}" for name, w in zip(columns[1:], widths, strict=True)), "for"]))
    results = []
    for launch, label, others in variants:
        for arch in architectures:
            static = compile_launch(launch, arch)
            result = {**asdict(static), "faults": faults(static, dtype, aligned(launch)), "work": label}
            values = (f"{result[name]:>{width}}" for name, width in zip(columns[1:], widths, strict=True))
            wrong = "".join(f"[{fault}] " for fault in result["faults"])
            more = f" and {others} more" if others else ""
            print("  ".join([f"{static.kernel:16}", *values, wrong + label + more]), flush=True)
            results.append(result)
    return results


def _print_works(all_works: list[Work]) -> None:
    times = "  ".join(f"modelled {gpu.name} µs" for gpu in GPUS)
    print(f"{'work':62}  {'MB':>8}  {'GFLOP needed':>12}  {'of our tiles':>12}  {'of FA-2 tiles':>13}  {times}")
    for work in all_works:
        flash = "-" if work.flash is None else f"{work.flash / 1e9:.2f}"
        counts = f"{work.bytes / 1e6:8.2f}  {work.needed / 1e9:12.2f}  {work.ours / 1e9:12.2f}  {flash:>13}"
        print("  ".join([f"{work.label:62}", counts, *(f"{work.modelled(gpu) * 1e6:16.2f}" for gpu in GPUS)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED, default=[80, 90, 100], help="compute capabilities, 80 = sm_80"
    )
    parser.add_argument("--op", nargs="+", choices=SHAPES, default=list(SHAPES), help="which ops")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--quick", action="store_true", help="only one shape of each op")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    shapes = {op: [QUICK[op]] if arguments.quick else SHAPES[op] for op in arguments.op}
    modelled = [work for shape in shapes.get("attention", ()) for work in attention_work(shape, dtype)]
    for shape in shapes.get("group_norm_silu", ()):
        modelled += [work for layout in LAYOUTS.values() for work in group_norm_silu_work(shape, dtype, layout)]
    _print_works(modelled)
    print()
    results = _print_kernels(distinct(works(arguments.op, dtype, arguments.quick)), arguments.arch, dtype)
    print(f"{len(results)} kernels, {sum(bool(result['faults']) for result in results)} with faults")
    print(
        json.dumps(
            {
                "benchmark": "gpu_static",
                "triton": triton.__version__,
                "dtype": arguments.dtype,
                "kernels": results,
                "works": [work._asdict() for work in modelled],
            }
        )
    )


if __name__ == "__main__":
    main()
