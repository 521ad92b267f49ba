"""The machine code of the CUDA kernels of nearest_codebook: limits on registers, spills, loads and the inner loop.

The tests need nvcc, and cuobjdump from the CUDA toolkit or the triton wheel. They need no GPU: none of them runs or
times a kernel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)  # compiled sizes of nearest_chunk and find_in_chunk
TYPES = ("float", "__half", "__nv_bfloat16")
# The bytes of shared memory per block and the registers per thread with which the planned blocks fit on one
# multiprocessor: it has 64 Ki registers, and 164 KiB on sm_80. Registers are by the number of blocks of 128 threads.
SHARED_BUDGET = {"nearest_tensor": 48 * 1024, "": 24 * 1024}
REGISTER_BUDGET = {2: 255, 3: 168, 4: 128}
BLOCKS = {"nearest_tensor": 2, "nearest_tiled": 3, "": 4}

# The default run looks at the variants of the shipped model and of common codebooks, on one architecture.
SELECTED = [
    "nearest_chunk<3, float>",
    "nearest_chunk<4, float>",
    "nearest_chunk<4, __half>",
    "nearest_chunk<16, float>",
    "find_in_chunk<4, float>",
    "nearest_tiled<float>",
    "prepare_queries<float>",
    "prepare_codes<float>",
    "nearest_tensor<float>",
    "nearest_tensor<__nv_bfloat16>",
    "count_digits",
    "scan_digits",
    "scatter_digits",
    "locate_codes<float>",
    "sum_pieces<float>",
    "sum_codes<float>",
]
STATS = ("locate_codes", "sum_pieces", "sum_codes")
SORT = ("count_digits", "scan_digits", "scatter_digits")
PREPARE = ("prepare_queries", "prepare_codes", "half_norms", "reset_keys", "keys_to_indices")
ALL = [
    *[f"{name}<{d}, {t}>" for name in ("nearest_chunk", "find_in_chunk") for d in DIMS for t in TYPES],
    *[f"{name}<{t}>" for name in ("nearest_tiled", "nearest_tensor", *PREPARE, *STATS) for t in TYPES],
    *SORT,
]


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared: int
    stack: int
    spilled: int
    sass: list[str]  # the instructions in order, each from its opcode on


def find_cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


def compile_kernels(variants: list[str], architecture: int) -> dict[str, Kernel]:
    """Compile the variants for sm_<architecture>, and return them by name."""
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        pytest.skip(f"needs nvcc (found: {nvcc}) and cuobjdump (found: {cuobjdump})")
    text = '#include "nearest_codebook.cuh"\nnamespace ldm_fast::nearest {\n'
    for variant in variants:
        text += instantiation(variant)
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "kernels.cu", Path(name) / "kernels.cubin"
        source.write_text(text + "}\n")
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
        command += [f"-I{ROOT / 'csrc/cuda'}", str(source), "-o", str(cubin)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr
        dumped = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
        assert dumped.returncode == 0, dumped.stderr
    usage, code = parse_usage(compiled.stdout + compiled.stderr), parse_sass(dumped.stdout)
    kernels = {}
    for variant in variants:
        symbol = next(s for s in usage if s.startswith(mangled_start(variant)))
        kernels[variant] = Kernel(**usage[symbol], sass=code[symbol])
    return kernels


def instantiation(variant: str) -> str:
    if "<" not in variant:  # not a template, so it is compiled anyway
        return ""
    arguments = "Stats" if variant.startswith(STATS) else "Problem"
    return f"template __global__ void {variant}({arguments}<{variant[:-1].split('<')[1].split(', ')[-1]}>);\n"


def mangled_start(variant: str) -> str:
    """Return the mangled name up to the template's arguments: _ZN8ldm_fast7nearest13nearest_chunkILi4EfEE."""
    name, _, arguments = variant.rstrip(">").partition("<")
    if not arguments:
        return f"_ZN8ldm_fast7nearest{len(name)}{name}E"
    types = {"float": "f", "__half": "6__half", "__nv_bfloat16": "13__nv_bfloat16"}
    codes = (types.get(argument, f"Li{argument}E") for argument in arguments.split(", "))
    return f"_ZN8ldm_fast7nearest{len(name)}{name}I{''.join(codes)}EE"


def parse_usage(log: str) -> dict[str, dict[str, int]]:
    """Return the registers, shared memory, stack and spills of each kernel from `ptxas -v`."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {}
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("shared", r"(\d+) bytes smem"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spilled", r"(\d+) bytes spill stores"),
        ):
            found = re.search(pattern, part)
            assert found or name == "shared", part
            numbers[name] = int(found.group(1)) if found else 0
        usage[part.split("'")[0]] = numbers
    return usage


def parse_sass(text: str) -> dict[str, list[str]]:
    code = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", part, flags=re.MULTILINE)
        code[part.split(maxsplit=1)[0]] = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    return code


def opcodes(kernel: Kernel) -> list[str]:
    return [line.split()[0] for line in kernel.sass]


def inner_loop(kernel: Kernel) -> Counter[str]:
    """Count the opcodes, without suffixes, from the scan's first shared-memory read to its last minimum of a pair.

    Only the scan takes minima. It begins with the loads that come directly before the first of them.
    """
    codes = [code.split(".")[0] for code in opcodes(kernel)]
    minima = [i for i, code in enumerate(codes) if code.startswith("FMNMX")]
    assert minima, "no minimum anywhere"
    start = minima[0]
    while codes[start - 1] != "BRA" and codes[start - 1] != "BAR":
        start -= 1
    return Counter(codes[start : minima[-1] + 1])


def budget(name: str, budgets: dict[str, int]) -> int:
    return next(value for start, value in budgets.items() if name.startswith(start))


def check_resources(name: str, kernel: Kernel) -> None:
    assert (kernel.stack, kernel.spilled) == (0, 0), name
    assert not any(code.startswith(("LDL", "STL")) for code in opcodes(kernel)), name
    assert kernel.shared <= budget(name, SHARED_BUDGET), name
    found = re.match(r"nearest_chunk<(\d+)", name)
    blocks = 3 if found and int(found.group(1)) > 8 else budget(name, BLOCKS)
    assert kernel.registers <= REGISTER_BUDGET[blocks], name


def check_loads(name: str, kernel: Kernel) -> None:
    """The search reads global and shared memory 16 bytes at a time."""
    codes = opcodes(kernel)
    if name.startswith("nearest_tensor"):
        assert any(re.match(r"LDGSTS\.E.*\.128", code) for code in codes), name
        assert not any(re.match(r"LDGSTS(?!.*\.128)", code) for code in codes), name
    if name.startswith(("nearest", "prepare")):
        assert any(re.match(r"LDG\.E.*\.128", code) for code in codes), name
    if name.startswith("nearest"):
        assert any(re.match(r"LDS.*\.128", code) for code in codes), name
    if name.startswith("prepare"):
        assert any(re.match(r"STG\.E.*\.128", code) for code in codes), name


def check_atomics(name: str, kernel: Kernel) -> None:
    """Only the kernels that can merge ranges of codes touch global memory atomically, 64 bits at a time.

    In shared memory atomics have 32 bits: for the candidates of nearest_tensor and the counts of the sort.
    """
    atomics = [code for code in opcodes(kernel) if code.startswith(("ATOM", "RED")) and not code.startswith("REDUX")]
    in_shared = [code for code in atomics if code.startswith("ATOMS")]
    in_global = [code for code in atomics if code not in in_shared]
    assert bool(in_global) == name.startswith("nearest_"), (name, atomics)
    assert all(".64" in code and ".MIN" in code for code in in_global), (name, in_global)
    assert bool(in_shared) == name.startswith(("nearest_tensor", "count_digits")), (name, atomics)
    assert not any(".64" in code for code in in_shared), (name, in_shared)


def check_tensor_cores(name: str, kernel: Kernel) -> None:
    """The product is on the tensor cores if d >= 32, and a slice of it takes no more instructions than necessary.

    A warp multiplies 64 by 64 by 32: 4 x 8 x 2 products of 16 by 8 by 16. There is little else in the loop, since each
    16 bytes that a lane reads from shared memory serve several products.
    """
    products = [line for line in kernel.sass if line.startswith("HMMA")]
    assert bool(products) == name.startswith("nearest_tensor"), name
    if not products:
        return
    assert len(products) == 64, (name, len(products))
    assert all(line.startswith("HMMA.16816.F32.BF16") for line in products), (name, products[0])
    lines = [i for i, code in enumerate(opcodes(kernel)) if code.startswith("HMMA")]
    between = [code for code in opcodes(kernel)[lines[0] : lines[-1]] if not code.startswith("HMMA")]
    assert len(between) <= 64, (name, Counter(between))


def check_inner_loop(name: str, kernel: Kernel) -> None:
    """The inner loop has d multiply-adds and one minimum per pair, and neither compares nor selects."""
    found = re.match(r"nearest_chunk<(\d+)", name)
    if not found:
        return
    dim, loop = int(found.group(1)), inner_loop(kernel)
    # sm_100 can take the minimum of three: one instruction for two pairs.
    minima = loop["FMNMX"] + 2 * loop["FMNMX3"]
    assert minima > 0 and loop["FFMA"] + 2 * loop["FFMA2"] == dim * minima, (name, loop)
    assert not any(code in loop for code in ("FSETP", "FSEL", "SEL", "ISETP") if loop[code] > 2), (name, loop)
    others = sum(loop.values()) - loop["FFMA"] - loop["FMNMX"] - loop["FFMA2"] - loop["FMNMX3"]
    assert others <= 0.25 * (dim + 1) * minima, (name, loop)


CHECKS = [check_resources, check_loads, check_atomics, check_tensor_cores, check_inner_loop]


@pytest.fixture(scope="module")
def selected():
    return compile_kernels(SELECTED, 90)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", SELECTED)
def test_sm_90(variant, check, selected):
    check(variant, selected[variant])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_variant(architecture):
    for name, kernel in compile_kernels(ALL, architecture).items():
        for check in CHECKS:
            check(name, kernel)
