"""Build the native modules: `ldm_fast._native` from csrc/cpu and `ldm_fast._native_cuda` from csrc/cuda.

Everything that is only a description (names, dependencies, tools) is in pyproject.toml. Torch is not imported, because
native code sees addresses only. Both modules compile in one run of ninja, which leaves unchanged objects alone.

By default the modules are compiled for this machine. `LDM_FAST_TARGETS` names other targets, separated by commas:

- `all`: everything in ISAS and GPU_ARCHITECTURES that the compilers know, as in a wheel;
- instruction sets, such as `avx2`; `portable` is always compiled. If none is named: the best one that this CPU has;
- GPU architectures, such as `sm_90`, with the PTX of the newest one. If none is named: those of the GPUs in this
  machine; if there is no GPU, the oldest, because every newer GPU runs its PTX.

If a module cannot be built, the install succeeds without it, and `ldm-fast doctor` gives the reason. With
`LDM_FAST_REQUIRE_NATIVE=1` the install fails, with the same reason; only a missing nvcc is never a failure. CXX, NVCC
and CUDA_HOME say which compilers to use. ldm_fast/_build.json records what was built.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_MODULE, CUDA_MODULE = "ldm_fast._native", "ldm_fast._native_cuda"
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Widest last; all but `portable` are for x86-64. csrc/cpu/cpuid.h finds out which of them a CPU has.
ISAS = {"portable": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"]}
GPU_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# No -ffast-math: NaN, infinities and signed zeros keep their meaning. Contraction is off so that an operation is fused
# exactly where the source says so, whatever the compiler.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


class Unbuildable(Exception):
    """What is missing, or what failed, in one line."""


class NoCudaCompiler(Unbuildable):
    """There is no nvcc, as on most machines."""


def run(command: list[str], what: str) -> str:
    """Run a command and return its output. If it fails, show the output and raise Unbuildable."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    except OSError as error:
        raise Unbuildable(f"{what}: cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stdout)
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise Unbuildable(f"{what} failed: {(errors or [f'exit code {done.returncode}'])[0].strip()[:200]}")
    return done.stdout


def native_is_required() -> bool:
    value = os.environ.get("LDM_FAST_REQUIRE_NATIVE", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"LDM_FAST_REQUIRE_NATIVE must be 0 or 1, got {value!r}")
    return value == "1"


# ---- what to build for ----


@dataclass(frozen=True)
class Targets:
    """What LDM_FAST_TARGETS asks for. The machine decides what it leaves empty."""

    everything: bool
    isas: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ()


def read_targets(text: str) -> Targets:
    words = text.replace(",", " ").split()
    for word in words:
        if word != "all" and word not in ISAS and not re.fullmatch(r"sm_\d+", word):
            known = ", ".join(["all", *ISAS, *(f"sm_{arch}" for arch in GPU_ARCHITECTURES)])
            raise SystemExit(f"LDM_FAST_TARGETS: unknown target {word!r}; known are {known}")
    architectures = sorted({int(word[3:]) for word in words if word.startswith("sm_")})
    if architectures and architectures[0] < GPU_ARCHITECTURES[0]:
        raise SystemExit(f"LDM_FAST_TARGETS: the kernels need sm_{GPU_ARCHITECTURES[0]}, got sm_{architectures[0]}")
    return Targets("all" in words, tuple(isa for isa in ISAS if isa in words), tuple(architectures))


def known_isas(compiler: list[str], scratch: Path) -> list[str]:
    """Return the instruction sets that the compiler can compile for."""
    known = ["portable"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        probe = scratch / "flags.cpp"
        probe.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        for isa in list(ISAS)[1:]:
            try:
                run([*compiler, *ISAS[isa], "-c", str(probe), "-o", str(scratch / "flags.o")], f"probe for {isa}")
                known.append(isa)
            except Unbuildable:
                print(f"ldm_fast: the compiler does not know {isa}", file=sys.stderr)
    return known


def machine_isas(compiler: list[str], scratch: Path, known: list[str]) -> list[str]:
    """Return those of the known sets that this CPU has, or all of them if the compiler's programs do not run here."""
    probe, program = scratch / "machine.cpp", scratch / "machine"
    body = "for (const std::string& isa : ldm::machine_isas()) std::puts(isa.c_str());"
    probe.write_text(f'#include <cstdio>\n#include "cpuid.h"\nint main() {{ {body} }}\n')
    knows = [f"-DLDM_KNOWS_{isa.upper()}" for isa in known]
    compile_probe = [*compiler, "-std=c++17", *knows, f"-I{ROOT / 'csrc/cpu'}", str(probe), "-o", str(program)]
    try:
        run(compile_probe, "probe of the CPU")
        return run([str(program)], "probe of the CPU").split()
    except Unbuildable:
        return known


def choose_isas(targets: Targets, compiler: list[str], scratch: Path, known: list[str]) -> list[str]:
    if targets.everything:
        return known
    missing = [isa for isa in targets.isas if isa not in known]
    if missing:
        raise SystemExit(f"LDM_FAST_TARGETS: {compiler[0]} cannot compile for {missing[0]} here")
    chosen = targets.isas or machine_isas(compiler, scratch, known)[-1:]
    return [isa for isa in known if isa == "portable" or isa in chosen]


def machine_architectures() -> list[int]:
    """Return the architectures of the GPUs in this machine, as far as the kernels run on them."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", text, flags=re.MULTILINE)}
    return sorted(arch for arch in found if arch >= GPU_ARCHITECTURES[0])


def choose_architectures(targets: Targets, known: list[int]) -> list[int]:
    """Return the architectures to compile for. A GPU that is newer than nvcc runs the PTX of the newest known one."""
    if targets.everything:
        return [arch for arch in GPU_ARCHITECTURES if arch in known]
    missing = [arch for arch in targets.architectures if arch not in known]
    if missing:
        raise SystemExit(f"LDM_FAST_TARGETS: this nvcc does not know sm_{missing[0]}")
    wanted = targets.architectures or machine_architectures() or GPU_ARCHITECTURES[:1]
    return sorted({max((k for k in known if k <= arch), default=min(known)) for arch in wanted})


# ---- compilers ----


def find_compiler() -> list[str]:
    """Return the C++ compiler as a list of words: $CXX if it is set, else the first of the usual names."""
    if os.name == "nt":
        raise Unbuildable("the native kernels build with GCC or Clang on Linux and macOS only")
    chosen = os.environ.get("CXX")
    for words in map(shlex.split, [chosen] if chosen else ["c++", "g++", "clang++"]):
        if words and shutil.which(words[0]):
            return words
    raise Unbuildable(f"no C++ compiler found ({f'CXX={chosen}' if chosen else 'tried c++, g++, clang++'})")


def find_nvcc() -> str:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which(str(Path(os.environ["CUDA_HOME"]) / "bin/nvcc"))
    if not nvcc or not shutil.which(nvcc):
        raise NoCudaCompiler("no nvcc found: it comes with the CUDA toolkit and has to be on PATH")
    return nvcc


def first_line(command: list[str]) -> str:
    """Return the first line that a command prints, or its name: a compiler that prints none will fail by itself."""
    done = subprocess.run(command, capture_output=True, text=True)
    return next(iter(done.stdout.splitlines()), command[0])


def binding_flags(version: str) -> list[str]:
    """Return the flags of the two bindings files, which alone need the headers of Python and pybind11."""
    try:
        import pybind11
    except ImportError as error:
        raise Unbuildable("pybind11 is not installed (pip install pybind11)") from error
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    return [*CXX_FLAGS, *includes, f"-I{ROOT / 'csrc'}", f'-DLDM_FAST_VERSION="{version}"']


# ---- the two modules ----


@dataclass(frozen=True)
class Plan:
    """How to compile a module, and what to record about it."""

    objects: list[tuple[str, str, Path, list[str]]]  # ninja's rule, name of the object, source, flags
    link: str  # the rule that links the objects
    rules: dict[str, str]  # the command of each rule
    record: dict[str, object]


def plan_cpu(folder: Path, targets: Targets, version: str) -> Plan:
    """Plan the CPU module: csrc/cpu once per instruction set; dispatch, threads and bindings once."""
    compiler = find_compiler()
    bindings = binding_flags(version)
    known = known_isas(compiler, folder)
    isas = choose_isas(targets, compiler, folder, known)
    knows = [f"-DLDM_KNOWS_{isa.upper()}" for isa in known]
    have = [f"-DLDM_HAVE_{isa.upper()}" for isa in isas]
    objects = [("cxx", "bindings.o", ROOT / "csrc/bindings.cpp", [*bindings, *knows])]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem in ("dispatch", "parallel"):
            objects.append(("cxx", f"{source.stem}.o", source, [*CXX_FLAGS, *knows, *have]))
            continue
        objects += [
            ("cxx", f"{source.stem}.{isa}.o", source, [*CXX_FLAGS, *ISAS[isa], f"-DLDM_ISA={isa}"]) for isa in isas
        ]
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    left_out = [isa for isa in known if isa not in isas]
    record = {"compiler": first_line([*compiler, "--version"]), "isas": isas, "left_out": left_out}
    rules = {"cxx": compile_rule(compiler), "link": f"{quoted(compiler)} $in {quoted(link)} -o $out"}
    return Plan(objects, "link", rules, record)


def plan_cuda(folder: Path, targets: Targets, version: str) -> Plan:
    """Plan the CUDA module: kernels by nvcc, bindings by the C++ compiler, the CUDA runtime linked statically."""
    nvcc = find_nvcc()
    compiler = find_compiler()
    bindings = binding_flags(version)
    known = [int(arch[8:]) for arch in run([nvcc, "--list-gpu-arch"], "nvcc --list-gpu-arch").split()]
    known = [arch for arch in known if arch >= GPU_ARCHITECTURES[0]]
    if not known:
        raise Unbuildable(f"nvcc knows no architecture from sm_{GPU_ARCHITECTURES[0]} on")
    architectures = choose_architectures(targets, known)
    newest = architectures[-1]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures[:-1]]
    codes.append(f"-gencode=arch=compute_{newest},code=[sm_{newest},compute_{newest}]")
    if len(codes) > 1:
        codes.append("--threads=0")  # the architectures of one source side by side
    objects = [("nvcc", f"{s.stem}.cu.o", s, [*NVCC_FLAGS, *codes]) for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    objects.append(("cxx", "bindings_cuda.o", ROOT / "csrc/bindings_cuda.cpp", bindings))
    cuda = [nvcc, "-ccbin", compiler[0]]
    release = run([nvcc, "--version"], "nvcc --version").split("release ")[-1].split(",")[0]
    left_out = [arch for arch in GPU_ARCHITECTURES if arch in known and arch not in architectures]
    record = {"nvcc": release, "architectures": architectures, "ptx": newest, "left_out": left_out}
    rules = {"cxx": compile_rule(compiler), "nvcc": compile_rule(cuda)}
    rules["link_cuda"] = f"{quoted(cuda)} $in -shared -cudart static -o $out"
    return Plan(objects, "link_cuda", rules, record)


def quoted(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def compile_rule(compiler: list[str]) -> str:
    return f"{quoted(compiler)} -MD -MF $out.d $flags -c $in -o $out"


def write_ninja(folder: Path, plans: dict[str, Plan]) -> None:
    """Write build.ninja for the plans of modules, given by the names of their files."""
    lines = []
    rules = {rule: command for plan in plans.values() for rule, command in plan.rules.items()}
    for rule, command in rules.items():
        lines += [f"rule {rule}", f"  command = {command}"]
        if not rule.startswith("link"):
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for file, plan in plans.items():
        for rule, name, source, flags in plan.objects:
            lines += [f"build {name}: {rule} {quoted([str(source)])}", f"  flags = {quoted(flags)}"]
        lines.append(f"build {file}: {plan.link} {' '.join(name for _, name, _, _ in plan.objects)}")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))


class BuildNative(build_ext):
    """Build both modules. A failure stops the install only if LDM_FAST_REQUIRE_NATIVE says so."""

    def run(self) -> None:
        required = native_is_required()
        self.in_source = self.editable_mode or self.inplace  # setuptools resets `inplace` while it builds
        self.record, self.errors = {}, {}
        super().run()
        package = ROOT / "ldm_fast" if self.in_source else Path(self.build_lib) / "ldm_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")
        failed = [f"{name}: {error}" for name, error in self.errors.items() if not isinstance(error, NoCudaCompiler)]
        if required and failed:
            raise SystemExit(f"LDM_FAST_REQUIRE_NATIVE=1, but there is no {'; no '.join(failed)}")

    def build_extensions(self) -> None:
        targets, version = read_targets(os.environ.get("LDM_FAST_TARGETS", "")), self.distribution.get_version()
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: Path(self.get_ext_fullpath(name)).resolve() for name in (CUDA_MODULE, CPU_MODULE)}
        plans: dict[str, Plan] = {}
        for name, make_plan in ((CUDA_MODULE, plan_cuda), (CPU_MODULE, plan_cpu)):
            try:
                plans[name] = make_plan(folder, targets, version)
            except (Unbuildable, OSError) as error:
                self.errors[name] = error
        write_ninja(folder, {files[name].name: plan for name, plan in plans.items()})
        with suppress(OSError):  # both side by side, each as far as it goes; the runs below report what went wrong
            subprocess.run([*ninja(folder), "-k", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, plan in plans.items():
            try:
                run([*ninja(folder), files[name].name], f"compiling {short(name)}")
                replace(folder / files[name].name, files[name])
                self.record[short(name)] = {"built": True, "version": version, **plan.record, "message": None}
            except (Unbuildable, OSError) as error:
                self.errors[name] = error
        for name, error in self.errors.items():
            self.forget(name, files[name])
            self.record[short(name)] = {"built": False, "version": version, "message": str(error)}
            print(f"ldm_fast: {name} was not built: {error}", file=sys.stderr)

    def forget(self, name: str, file: Path) -> None:
        """Remove the module of an earlier build, so that nobody loads kernels of another version."""
        in_source = ROOT / "ldm_fast" / Path(self.get_ext_filename(name)).name
        for stale in {file, in_source} if self.in_source else {file}:
            stale.unlink(missing_ok=True)


def short(name: str) -> str:
    return name.rsplit(".", 1)[1]


def ninja(folder: Path) -> list[str]:
    return [*([sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]), "-C", str(folder)]


def replace(built: Path, file: Path) -> None:
    """Copy a module into place by a rename, so that a process that has the old one mapped keeps it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.tmp")
    shutil.copyfile(built, unfinished)
    unfinished.replace(file)


if __name__ == "__main__":  # tests import the functions
    setup(
        packages=[*find_packages(include=["ldm_fast", "ldm_fast.*"]), "ldm_fast.kernels"],
        package_dir={"ldm_fast.kernels": "kernels"},
        package_data={"ldm_fast": ["py.typed", "assets/*", "training/recipes/*.toml"]},
        # The plans list the sources; none are named here, so that setuptools does not compile them its own way.
        ext_modules=[Extension(name, sources=[], optional=True) for name in (CPU_MODULE, CUDA_MODULE)],
        cmdclass={"build_ext": BuildNative},
    )
