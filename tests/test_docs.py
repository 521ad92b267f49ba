"""The documentation is true: its code runs, its commands and the files it names exist, every public name is in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm_fast
from ldm_fast import training
from ldm_fast.checkpoints import published
from ldm_fast.cli.options import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> str:
    """Return the code blocks of a page in one language, joined; blocks that include a file are left out."""
    found = re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return "\n".join(block for block in found if "--8<--" not in block)


# Code on the pages


def run(guide: str) -> dict[str, Any]:
    """Run the Python of a guide from the first line to the last, in this process; return its names."""
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(blocks(ROOT / "docs/guides" / guide, "python"), guide, "exec"), names)
    return names


def test_first_picture(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("first_picture.md")
    assert names["repainted"].shape == (1, 64, 64, 3) and names["prediction"].shape == (1, 4, 16, 16)
    assert "attention on cpu" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_checkpoints(tmp_path, monkeypatch, capsys) -> None:
    diffusers = pytest.importorskip("diffusers")
    import test_drop_in as small

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    theirs = small.unet(norm_num_groups=32), small.vae(block_out_channels=(32, 32), norm_num_groups=32)
    pipe = small.stable_diffusion(diffusers.StableDiffusionPipeline, unet=theirs[0], vae=theirs[1])
    pipe.save_pretrained("stable-diffusion-v1-5")
    unet = ldm_fast.UNet.from_pretrained("stable-diffusion-v1-5", subfolder="unet")
    vae = ldm_fast.AutoencoderKL.from_pretrained("stable-diffusion-v1-5", subfolder="vae")
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.to_compvis().items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in vae.to_compvis().items()}
    torch.save({"state_dict": state}, "sd-v1-4.ckpt")
    known = replace(published.PUBLISHED[0], name="a small one", unet=unet.config)
    monkeypatch.setattr(published, "PUBLISHED", (known, *published.PUBLISHED))

    names = run("checkpoints.md")
    assert "a small one" in capsys.readouterr().out
    assert names["images"].shape == (1, 16, 16, 3) and names["image"].shape == (1, 3, 128, 128)
    assert {"my-unet", "my-unet-compvis", "emojis.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_writing_a_kernel() -> None:
    run("writing_a_kernel.md")


# Commands, files and links


@ids
def test_commands(page: Path) -> None:
    """Commands have known options and arguments, and scripts and tests that exist."""
    for line in re.sub(r"\\\n", " ", blocks(page, "bash")).splitlines():
        for command in line.split("#")[0].split("&&"):
            words = shlex.split(command)
            if words[:1] == ["ldm-fast"]:
                build_parser().parse_args(words[1:])
            if words[:1] in (["python"], ["pytest"]):
                assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command


@ids
def test_files_named_exist(page: Path) -> None:
    """Paths in backticks exist, seen from the root or from the package."""
    rooms = (
        "ldm_fast|kernels|csrc|tests|benchmarks|examples|docs|ops|configs|files|diffusion|interop|models|checkpoints"
    )
    rooms += "|pipelines|training|cli|assets|\\.ci|\\.github"
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(rf"`((?:{rooms})/[\w./*-]*)`", text):
        assert any(any(base.glob(name.rstrip("/"))) for base in (ROOT, ROOT / "ldm_fast")), f"there is no {name}"


@ids
def test_links(page: Path) -> None:
    if "docs" in page.parts:
        return  # mkdocs checks those
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"there is no {target}"


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split(" ")[0] for line in inventory.splitlines()}
    for module in (ldm_fast, ldm_fast.ops, training):
        names = {f"{module.__name__}.{name}" for name in module.__all__} - {"ldm_fast.ops", "ldm_fast.__version__"}
        assert not names - described


def test_comments_on_fields_are_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "training" / "index.html").read_text()
    assert "batches whose gradients are averaged into one step" in page


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)|<link[^>]*href="([^"]+)', page.read_text())
        assert not [a or b for a, b in loaded if "//" in (a or b)], page
