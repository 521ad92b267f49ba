"""Builds the native modules and never stops an install: `ldm-fast doctor` tells what could not be built, and why.

Everything that is only a description (names, dependencies, tools) is in pyproject.toml. This file

- maps the folder ``kernels/`` to the package ``ldm_fast.kernels``;
- compiles ``csrc/cpu`` once per instruction set into ``ldm_fast._native`` (cpuid decides at run time which one runs);
- compiles ``csrc/cuda`` with nvcc, where there is one, into ``ldm_fast._native_cuda`` (with the static CUDA runtime);
- writes ``ldm_fast/_build.json``: what was built, with what, or one line that says what is missing.

The commands go to ninja, so objects compile in parallel and an unchanged one is not compiled again. Torch is not
imported: native code only ever sees addresses.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_MODULE, CUDA_MODULE = "ldm_fast._native", "ldm_fast._native_cuda"
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_ISAS = {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"]}
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# No -ffast-math: NaN, infinities and signed zeros keep their meaning. Contraction is off so that an operation is fused
# exactly where the source says so, whatever the compiler.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class Unbuildable(Exception):
    """One line: what is missing, or what failed."""


def run(command, what):
    """Run a command and return its output; a failure is Unbuildable and shows what the command said."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    except OSError as error:
        raise Unbuildable(f"{what}: cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stdout)
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise Unbuildable(f"{what} failed: {(errors or [f'exit code {done.returncode}'])[0].strip()[:200]}")
    return done.stdout


def find_compiler():
    """The C++ compiler as a list of words: $CXX alone if it is set, else the usual names."""
    if os.name == "nt":
        raise Unbuildable("the native kernels build with GCC or Clang on Linux and macOS only")
    chosen = os.environ.get("CXX")
    for words in map(shlex.split, [chosen] if chosen else ["c++", "g++", "clang++"]):
        if words and shutil.which(words[0]):
            return words
    raise Unbuildable(f"no C++ compiler found ({f'CXX={chosen}' if chosen else 'tried c++, g++, clang++'})")


def find_isas(compiler, scratch):
    """Instruction sets to compile for: the portable one, and on x86-64 those whose flags this compiler takes."""
    isas = {"portable": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        probe = scratch / "probe.cpp"
        probe.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        for isa, flags in X86_ISAS.items():
            try:
                run([*compiler, *flags, "-c", str(probe), "-o", str(scratch / "probe.o")], f"probe for {isa}")
                isas[isa] = flags
            except Unbuildable:
                print(f"ldm_fast: the compiler does not know {isa}; built without it", file=sys.stderr)
    return isas


def include_flags():
    """Where the headers of Python and pybind11 are; only the two bindings files need them."""
    try:
        import pybind11
    except ImportError as error:
        raise Unbuildable("pybind11 is not installed (pip install pybind11)") from error
    return [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]


def quoted(words):
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def ninja_build(folder, compiler, link_flags, objects, target):
    """Write build.ninja for objects = [(object name, source, flags)] linked into target, and run it."""
    lines = [
        "rule compile",
        f"  command = {quoted(compiler)} -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {quoted(compiler)} $in {quoted(link_flags)} -o $out",
    ]
    for name, source, flags in objects:
        lines += [f"build {name}: compile {quoted([source])}", f"  flags = {quoted(flags)}"]
    lines += [f"build {target.name}: link {' '.join(name for name, _, _ in objects)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    try:
        import ninja  # noqa: F401

        command = [sys.executable, "-m", "ninja"]
    except ImportError:
        command = ["ninja"]
    run([*command, "-C", str(folder)], f"compiling {target.name.split('.')[0]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # By a rename: a process that has the old module mapped keeps it.
    unfinished = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(folder / target.name, unfinished)
    os.replace(unfinished, target)


def build_cpu(folder, target):
    """Compile csrc/cpu once per instruction set (dispatch and bindings once) into target; returns the record."""
    compiler = find_compiler()
    includes = include_flags()
    isas = find_isas(compiler, folder)
    objects = [("bindings.o", ROOT / "csrc/bindings.cpp", [*CXX_FLAGS, *includes])]
    have = [f"-DLDM_HAVE_{isa.upper()}" for isa in isas]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem in ("dispatch", "parallel"):
            objects.append((f"{source.stem}.o", source, [*CXX_FLAGS, *have]))
            continue
        for isa, flags in isas.items():
            objects.append((f"{source.stem}.{isa}.o", source, [*CXX_FLAGS, *flags, f"-DLDM_ISA={isa}"]))
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    ninja_build(folder, compiler, link, objects, target)
    version = run([*compiler, "--version"], "compiler version").splitlines()[0]
    return {"built": True, "compiler": version, "isas": list(isas), "message": None}


def build_cuda(folder, target):
    """Compile csrc/cuda with nvcc (which also drives the host compiler for the bindings); returns the record."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which(str(Path(os.environ["CUDA_HOME"]) / "bin/nvcc"))
    if not nvcc or not shutil.which(nvcc):
        raise Unbuildable("no nvcc found (install the CUDA toolkit, put nvcc on PATH, then install ldm_fast again)")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if not sources:
        raise Unbuildable("no CUDA sources in csrc/cuda")
    host = find_compiler()
    known = run([nvcc, "--list-gpu-arch"], "nvcc --list-gpu-arch").split()
    architectures = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    if not architectures:
        raise Unbuildable(f"nvcc knows none of the architectures {CUDA_ARCHITECTURES}")
    newest = architectures[-1]  # its PTX too, for GPUs that come later
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    # --threads=0: the architectures of one source are compiled side by side.
    flags = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
    objects = [(f"{source.stem}.cu.o", source, [*flags, *codes]) for source in sources]
    includes = [flag.replace("-isystem", "-I") for flag in include_flags()]
    objects.append(("bindings_cuda.o", ROOT / "csrc/bindings_cuda.cpp", [*flags, *includes]))
    link = ["-shared", "-cudart", "static"]
    ninja_build(folder, [nvcc, "-ccbin", host[0]], link, objects, target)
    version = run([nvcc, "--version"], "nvcc --version").split("release ")[-1].split(",")[0]
    return {"built": True, "nvcc": version, "architectures": architectures, "message": None}


class BuildNative(build_ext):
    """Builds both modules on their own terms; a failure costs the module, never the install."""

    def run(self):
        self.record = {}
        super().run()
        folder = ROOT / "ldm_fast" if self.editable_mode or self.inplace else Path(self.build_lib) / "ldm_fast"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extension(self, ext):
        short = ext.name.rsplit(".", 1)[1]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{short}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.record[short] = (build_cpu if ext.name == CPU_MODULE else build_cuda)(folder, target)
        except (Unbuildable, OSError) as error:
            self.forget(ext, target)
            self.record[short] = {"built": False, "message": str(error)}
            print(f"ldm_fast: {ext.name} was not built: {error}", file=sys.stderr)

    def forget(self, ext, target):
        """Remove what an earlier build left, so that nobody loads kernels of another version."""
        in_source = ROOT / "ldm_fast" / Path(self.get_ext_filename(ext.name)).name
        for stale in {target, in_source} if self.editable_mode or self.inplace else {target}:
            stale.unlink(missing_ok=True)


if __name__ == "__main__":  # tests import the functions
    setup(
        packages=[*find_packages(include=["ldm_fast", "ldm_fast.*"]), "ldm_fast.kernels"],
        package_dir={"ldm_fast.kernels": "kernels"},
        package_data={"ldm_fast": ["py.typed", "assets/*", "training/recipes/*.toml"]},
        # The sources are listed by the build functions; naming none keeps setuptools from compiling them its own way.
        ext_modules=[Extension(name, sources=[], optional=True) for name in (CPU_MODULE, CUDA_MODULE)],
        cmdclass={"build_ext": BuildNative},
    )
