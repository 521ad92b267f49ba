"""What the compiler makes of the Triton kernels: registers, spills, shared memory and instructions, without a GPU.

    python benchmarks/gpu_static.py [--arch 80 90 100] [--op attention group_norm_silu] [--dtype float16] [--quick]

Every launch is the one that the op would make, compiled ahead of time with what Triton would know of its arguments.
Nothing here is run and no time on a GPU is claimed. Counts are of instructions in the machine code: the body of a loop
counts once. The last line is JSON.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldm_fast.kernels import Launch, attention, group_norm_silu

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")  # Ampere's, Hopper's, Blackwell's
SHAPES = {
    "attention": [  # B, H, N, M, D
        (2, 8, 4096, 77, 40),
        (2, 8, 1024, 77, 80),
        (2, 8, 256, 77, 160),
        (2, 10, 4096, 77, 64),
        (2, 8, 4096, 4096, 40),
        (2, 8, 1024, 1024, 80),
        (2, 8, 256, 256, 160),
        (2, 20, 1024, 1024, 64),
        (1, 1, 4096, 4096, 512),
    ],
    "group_norm_silu": [  # shape of x, 32 groups
        (2, 320, 64, 64),
        (2, 640, 32, 32),
        (2, 1280, 16, 16),
        (2, 2560, 8, 8),
        (1, 128, 512, 512),
    ],
}


@dataclass(frozen=True)
class Static:
    """One compiled kernel; `local` counts accesses to local memory, which is where spilled registers go."""

    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    tensor_core: int
    exp2: int
    atomics: int
    loads: int
    loads_128: int
    stores: int
    stores_128: int


def _specialise(launch: Launch) -> ASTSource:
    """The source with what a launch tells the compiler: types, ones, and which arguments 16 divides."""
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
    options = {name: value for name, value in launch.options.items() if name not in launch.kernel.arg_names}
    built = triton.compile(_specialise(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    resources = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # an instruction stands behind its address, perhaps behind a predicate; its modifiers follow it after dots
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", code)
    if not names or "REG" not in resources:
        raise RuntimeError(f"gpu_static: no machine code of {launch.kernel.__name__} could be read")
    counts = Counter(name.split(".")[0] for name in names)
    wide = Counter(name.split(".")[0] for name in names if ".128" in name)
    # asynchronous copies from global to shared memory (LDGSTS) are loads as well; atomics on shared memory (ATOMS) are
    # how Blackwell hands out its tensor memory
    return Static(
        kernel=launch.kernel.__name__.lstrip("_"),
        arch=arch,
        warps=built.metadata.num_warps,
        registers=resources["REG"],
        shared=built.metadata.shared,
        stack=resources["STACK"],
        local=counts["LDL"] + counts["STL"] + resources["LOCAL"],
        tensor_core=sum(counts[name] for name in TENSOR_CORE),
        exp2=sum(name.startswith("MUFU.EX2") for name in names),
        atomics=sum(counts[name] for name in ("ATOM", "ATOMG", "RED", "REDG")),
        loads=counts["LDG"] + counts["LDGSTS"],
        loads_128=wide["LDG"] + wide["LDGSTS"],
        stores=counts["STG"],
        stores_128=wide["STG"],
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def attention_launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, mask: torch.Tensor | None = None
) -> list[Launch]:
    """Forward and backward of tensors as a transformer block passes them: (B, N, H, D) in memory."""
    b, h, n, m, d = shape
    q, out, dq, grad = (torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
    k, v, dk, dv = (torch.empty(b, m, h, d, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
    lse = torch.empty(b, h, n, device="meta")
    forward = attention.forward_launches(q, k, v, mask, d**-0.5, out, lse)
    return forward + attention.backward_launches(grad, q, k, v, mask, d**-0.5, out, lse, dq, dk, dv)


def group_norm_silu_launches(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> list[Launch]:
    """Forward and backward in 32 groups with float32 weight and bias, a modulation and SiLU."""
    x, y, grad, dx = (torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format) for _ in range(4))
    weight, bias, dweight, dbias = (torch.empty(shape[1], device="meta") for _ in range(4))
    scale, shift, dscale, dshift = (torch.empty(shape[:2], dtype=dtype, device="meta") for _ in range(4))
    mean, rstd = (torch.empty(shape[0], 32, device="meta") for _ in range(2))
    inputs = (x, 32, weight, bias)
    forward = group_norm_silu.forward_launches(*inputs, 1e-5, "silu", scale, shift, y, mean, rstd)
    return forward + group_norm_silu.backward_launches(
        grad, *inputs, "silu", scale, shift, mean, rstd, dx, dweight, dbias, dscale, dshift
    )


def table(ops: list[str], dtype: torch.dtype, quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """A label for people and a launch, for every kernel of every shape; quick: of each op's first shape."""
    for op in ops:
        for shape in SHAPES[op][: 1 if quick else None]:
            if op == "attention":
                yield from ((f"attention {shape}", launch) for launch in attention_launches(shape, dtype))
                continue
            for layout in (torch.contiguous_format, torch.channels_last):
                label = f"group_norm_silu {shape} {str(layout).removeprefix('torch.').removesuffix('_format')}"
                yield from ((label, launch) for launch in group_norm_silu_launches(shape, dtype, layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, 80 = sm_80")
    parser.add_argument("--op", nargs="+", choices=SHAPES, default=list(SHAPES), help="which ops")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--quick", action="store_true", help="only the first shape of each op")
    arguments = parser.parse_args()

    columns = [field.name for field in fields(Static)]
    print("  ".join([f"{'kernel':18}", *(f"{column:>11}" for column in columns[1:])]))
    results, label_before = [], ""
    for label, launch in table(arguments.op, getattr(torch, arguments.dtype), arguments.quick):
        if label != label_before:
            print(f"{label} {arguments.dtype}", flush=True)
        label_before = label
        for arch in arguments.arch:
            static = asdict(compile_launch(launch, arch))
            print(
                "  ".join([f"{static['kernel']:18}", *(f"{static[column]:>11}" for column in columns[1:])]), flush=True
            )
            results.append({"work": label, "dtype": arguments.dtype, **static})
    spilling = sum(result["local"] > 0 or result["stack"] > 0 for result in results)
    print(f"{len(results)} kernels, {spilling} with spills")
    print(json.dumps({"benchmark": "gpu_static", "triton": triton.__version__, "kernels": results}))


if __name__ == "__main__":
    main()
