"""setup.py: what it builds for, and what happens if something is missing or of another version."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import ldm_fast
from ldm_fast.ops import native

ROOT = Path(__file__).resolve().parent.parent
BUILT = ("*.so", "__pycache__", "_build.json")

# Imports the copy installed in argv[1]. The finder of an editable install would add the modules of the repository.
ASK_COPY = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
"""
ASK = f"{ASK_COPY}from ldm_fast.ops import cpu\nprint(cpu.__file__, cpu.unavailable())\n"


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ldm_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_compiler_is_named(build, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.Unbuildable, match="no C.. compiler found .CXX=/nowhere/c.."):
        build.find_compiler()


def test_missing_nvcc_is_named(build, monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(build.NoCudaCompiler, match="no nvcc found"):
        build.plan_cuda(tmp_path, build.read_targets(""), "1.0")


def test_failing_command_is_one_line(build):
    script = "print('note: first'); print('x.cpp:1: error: wrong'); print('error: second'); raise SystemExit(3)"
    with pytest.raises(build.Unbuildable) as caught:
        build.run([sys.executable, "-c", script], "compiling x")
    assert str(caught.value) == "compiling x failed: x.cpp:1: error: wrong"


def test_instruction_sets_the_compiler_lacks_are_left_out(build, monkeypatch, tmp_path):
    def old_compiler(command, what):
        if "-mavx512bf16" in command:
            raise build.Unbuildable(what)

    monkeypatch.setattr(build, "run", old_compiler)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.known_isas(["c++"], tmp_path) == ["portable", "avx2", "avx512"]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.known_isas(["c++"], tmp_path) == ["portable"]


@pytest.mark.parametrize(
    ("targets", "machine", "chosen"),
    [
        ("", ["portable", "avx2"], ["portable", "avx2"]),
        ("", ["portable", "avx2", "avx512"], ["portable", "avx512"]),
        ("", ["portable"], ["portable"]),
        ("all", ["portable"], ["portable", "avx2", "avx512"]),
        ("avx2", ["portable", "avx2", "avx512"], ["portable", "avx2"]),
        ("avx512, avx2", ["portable"], ["portable", "avx2", "avx512"]),
        ("portable", ["portable", "avx2"], ["portable"]),
        ("sm_90", ["portable", "avx2"], ["portable", "avx2"]),
    ],
)
def test_instruction_sets_are_those_asked_for_or_the_best(build, monkeypatch, targets, machine, chosen):
    monkeypatch.setattr(build, "machine_isas", lambda *_: machine)
    known = ["portable", "avx2", "avx512"]
    assert build.choose_isas(build.read_targets(targets), ["c++"], None, known) == chosen


@pytest.mark.parametrize(
    ("targets", "gpus", "chosen"),
    [
        ("", "", [80]),
        ("avx2", "", [80]),
        ("", "9.0\n9.0\n", [90]),
        ("", "8.6\n12.0\n", [86, 120]),
        ("", "7.5\n", [80]),
        ("", "13.0\n", [120]),  # newer than this nvcc, so it gets the PTX of the newest that nvcc knows
        ("", "No devices were found\n", [80]),
        ("all", "9.0\n", [80, 86, 90, 100, 120]),
        ("sm_86 sm_90", "9.0\n", [86, 90]),
        ("sm_103", "", [103]),
    ],
)
def test_gpu_architectures_are_those_asked_for_or_of_this_machine(build, monkeypatch, targets, gpus, chosen):
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=gpus))
    known = [80, 86, 87, 90, 100, 103, 120]
    assert build.choose_architectures(build.read_targets(targets), known) == chosen


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("avx3", "unknown target 'avx3'; known are all, portable, avx2, avx512, avx512bf16, sm_80, "),
        ("90", "unknown target '90'"),
        ("sm_75", "need sm_80, got sm_75"),
        ("avx512bf16", r"c\+\+ cannot compile for avx512bf16 here"),
        ("sm_81", "this nvcc does not know sm_81"),
    ],
)
def test_wrong_targets_stop_the_build(build, targets, reason):
    with pytest.raises(SystemExit, match=reason):
        wanted = build.read_targets(targets)
        build.choose_architectures(wanted, [80, 90])
        build.choose_isas(wanted, ["c++"], None, ["portable", "avx2", "avx512"])


def test_this_machine_is_among_those_the_compiler_knows(build, tmp_path):
    try:
        compiler = build.find_compiler()
    except build.Unbuildable as reason:
        pytest.skip(str(reason))
    known = build.known_isas(compiler, tmp_path)
    machine = build.machine_isas(compiler, tmp_path, known)
    assert machine == known[: len(machine)]
    if native.extension():
        assert native.extension().machine_isas() == machine


def test_the_version_is_written_in_one_place():
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ldm_fast", "kernels", "csrc", ".")
        for path in (ROOT / folder).glob("**/*" if folder != "." else "*")
        if path.suffix in (".py", ".toml", ".cpp", ".h", ".cuh", ".cu")
        and f'"{ldm_fast.__version__}"' in path.read_text()
    ]
    assert set(found) == {"ldm_fast/ops/version.py"}


@pytest.fixture
def next_version(tmp_path):
    """A copy of the package, native modules included, whose Python files have another version."""
    if native.extension() is None:
        pytest.skip(native.load_module("_native")[1])
    copy = tmp_path / "ldm_fast"
    shutil.copytree(ROOT / "ldm_fast", copy, ignore=shutil.ignore_patterns("__pycache__", "assets", "kernels"))
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    version = copy / "ops/version.py"
    version.write_text(version.read_text().replace(f'"{ldm_fast.__version__}"', '"99.9"'))
    return tmp_path


def run_copy(folder, code):
    return subprocess.run([sys.executable, "-c", ASK_COPY + code, folder], capture_output=True, text=True, cwd=folder)


def test_native_modules_of_another_version_are_reported_and_not_used(next_version):
    code = "import ldm_fast; print(ldm_fast.ops.native.load_module('_native')[0], ldm_fast.explain())"
    done = run_copy(next_version, code)
    assert done.returncode == 0, done.stderr
    reason = (
        f"the native CPU kernels were built from ldm_fast {ldm_fast.__version__}, and this is ldm_fast 99.9: run `pip"
    )
    assert done.stderr.count(f"RuntimeWarning: {reason}") == 1
    assert done.stdout.startswith("None attention on cpu: torch")
    assert f"not cpu: {reason}" in done.stdout
    doctor = run_copy(next_version, "from ldm_fast.cli import main; main(['doctor'])")
    assert f"built\n  {reason}" in doctor.stdout, doctor.stderr


def test_a_source_distribution_holds_the_whole_checkout(tmp_path):
    """The archive holds everything that is needed to build, run and test the package."""
    source, folders = tmp_path / "source", ("ldm_fast", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
    for name in folders:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "mkdocs.yml", "MANIFEST.in", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, source)
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not there - held


@pytest.fixture
def source(tmp_path):
    """The files that an install is made from."""
    for name in ("ldm_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("required", "reason"),
    [
        ("1", "LDM_FAST_REQUIRE_NATIVE=1, but there is no ldm_fast._native: no C++ compiler found (CXX=/nowhere/c++)"),
        ("0", ""),
        ("yes", "LDM_FAST_REQUIRE_NATIVE must be 0 or 1, got 'yes'"),
    ],
)
def test_a_missing_module_fails_the_build_if_it_is_required(source, required, reason):
    environment = {**os.environ, "CXX": "/nowhere/c++", "NVCC": "/nowhere/nvcc", "LDM_FAST_REQUIRE_NATIVE": required}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert bool(done.returncode) == bool(reason), done.stderr
    assert reason in done.stderr
    assert required == "yes" or not json.loads((source / "ldm_fast/_build.json").read_text())["_native"]["built"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/c++", "no C++ compiler found (CXX=/nowhere/c++)"), ("false", "compiling _native failed")],
    ids=["no compiler", "compiler fails"],
)
def test_install_succeeds_without_kernels(tmp_path, source, compiler, reason):
    target = tmp_path / "target"
    # If the build imports torch, it gets this one.
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch/torch.py").write_text("raise RuntimeError('the build imported torch')\n")

    environment = {**os.environ, "CXX": compiler, "PYTHONPATH": str(tmp_path / "no_torch")}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        target,
        source,
    ]
    done = subprocess.run(pip, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    told = [line.strip() for line in output.splitlines() if "ldm_fast._native was not built" in line]
    assert len(told) == 1 and reason in told[0]

    record = json.loads((target / "ldm_fast/_build.json").read_text())
    assert not record["_native"]["built"] and reason in record["_native"]["message"]
    assert not list(target.glob("ldm_fast/_native*.so"))
    for name in ("py.typed", "assets/emoji.safetensors", "training/recipes/emoji.toml", "kernels/attention.py"):
        assert (target / "ldm_fast" / name).is_file()
    asked = subprocess.run([sys.executable, "-c", ASK, target], capture_output=True, text=True, cwd=tmp_path)
    assert asked.stdout.startswith(str(target)) and reason in asked.stdout, asked.stdout + asked.stderr
