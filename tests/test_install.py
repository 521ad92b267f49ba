"""setup.py where something is missing: the install succeeds, and one line says what is missing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = ("*.so", "__pycache__", "_build.json")

# Asks the copy installed in argv[1]; the finder of an editable install would add the modules built in the repository.
ASK = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
from ldm_fast.ops import cpu
print(cpu.__file__, cpu.unavailable())
"""


@pytest.fixture(scope="module")
def build():
    """The functions of setup.py."""
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
    with pytest.raises(build.Unbuildable, match="no nvcc found"):
        build.build_cuda(tmp_path, tmp_path / "_native_cuda.so")


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
    assert list(build.find_isas(["c++"], tmp_path)) == ["portable", "avx2", "avx512"]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert list(build.find_isas(["c++"], tmp_path)) == ["portable"]


def test_a_source_distribution_holds_the_whole_checkout(tmp_path):
    """What builds, what runs and what tests it."""
    source, folders = tmp_path / "source", ("ldm_fast", "kernels", "csrc", "tests", "benchmarks")
    for name in folders:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "DESIGN.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not there - held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/c++", "no C++ compiler found (CXX=/nowhere/c++)"), ("false", "compiling _native failed")],
    ids=["no compiler", "compiler fails"],
)
def test_install_succeeds_without_kernels(tmp_path, compiler, reason):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("ldm_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    # Whoever imports torch while building gets this one.
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
