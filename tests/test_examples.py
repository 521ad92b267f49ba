"""The scripts in examples/ run, and show what they claim to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, script: str, *arguments: str) -> str:
    """Run the example in `folder`, and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested


def test_text_to_image(tmp_path: Path) -> None:
    printed = run(tmp_path, "text_to_image.py", "red apple", "dog face", "--steps", "4")
    assert "attention on cpu" in printed and "2 pictures" in printed
    assert Image.open(tmp_path / "pictures.png").size == (128, 64)


def test_diffusers_drop_in(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    difference = float(re.search("largest difference (\\S+)", run(tmp_path, "diffusers_drop_in.py", "--steps", "3"))[1])
    assert difference < 1e-4


def test_vq_vae_with_ema_codebook(tmp_path: Path) -> None:
    printed = run(tmp_path, "vq_vae_with_ema_codebook.py", "--steps", "60")
    errors = [float(error) for error in re.findall("error (\\S+)", printed)]
    used = [int(count) for count in re.findall("(\\d+) of 64", printed)]
    assert errors[-1] < 0.6 * errors[0] and used[-1] >= 16, printed


def test_attention_in_your_transformer(tmp_path: Path) -> None:
    printed = run(tmp_path, "attention_in_your_transformer.py", "--steps", "60")
    assert int(re.findall("(\\d+)% of the digits", printed)[-1]) >= 95, printed


def test_train_on_a_folder(tmp_path: Path) -> None:
    printed = run(tmp_path, "train_on_a_folder.py", "--steps", "4", "--run-dir", str(tmp_path / "run"))
    assert "model.safetensors: 2 pictures" in printed
    assert Image.open(tmp_path / "run" / "drawn.png").size == (64, 32)
