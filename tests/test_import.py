"""What `import ldm_fast` costs and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "diffusers", "transformers", "PIL", "tqdm", "emoji", "sklearn", "faiss", "scipy")


def run(code: str, folder: Path) -> str:
    """What a fresh interpreter prints that was started in `folder`, which is thereby on its sys.path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_costs_hardly_more_than_torch(tmp_path: Path) -> None:
    """At most 1.15 × `import torch`, both timed in one process, in CPU time, which a busy machine disturbs least.

    Gradient checkpointing counts as PyTorch: its version 2.6 imports the compiler for it.
    """
    code = """if True:
        from time import process_time
        start = process_time()
        import torch, torch.utils.checkpoint
        middle = process_time()
        import ldm_fast
        print((process_time() - start) / (middle - start))
    """
    ratios: list[float] = []
    while len(ratios) < 6 and min(ratios, default=9.0) > 1.15:
        ratios.append(float(run(code, tmp_path)))
    assert min(ratios) <= 1.15, ratios


def test_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""if True:
        import json, sys
        import torch
        before = set(sys.modules)
        import ldm_fast
        print(json.dumps([name for name in {HEAVY} if name in set(sys.modules) - before]))
    """
    assert json.loads(run(code, tmp_path)) == []


def test_works_from_the_repository_root() -> None:
    """There the folder `kernels` is on sys.path, where other libraries look for a package of that name."""
    code = """if True:
        import sys
        import ldm_fast, ldm_fast.kernels
        assert ldm_fast.kernels.__name__ == "ldm_fast.kernels", ldm_fast.kernels
        assert "kernels" not in sys.modules
        reason = ldm_fast.kernels.unavailable()
        assert reason is None or isinstance(reason, str)
        assert "triton" not in sys.modules
        import torch
        x = torch.ones(1, 4, 2)
        assert ldm_fast.ops.group_norm_silu(x, 2, None, None).abs().max() == 0
        print(ldm_fast.explain())
    """
    assert "group_norm_silu on cpu: " in run(code, ROOT)


def test_public_names_exist(tmp_path: Path) -> None:
    code = "import ldm_fast; print([name for name in ldm_fast.__all__ if not hasattr(ldm_fast, name)])"
    assert run(code, tmp_path).strip() == "[]"


def test_what_public_classes_are_made_from_is_public(tmp_path: Path) -> None:
    code = """if True:
        import typing
        import ldm_fast
        made = (ldm_fast.UNet, ldm_fast.AutoencoderKL, ldm_fast.VQModel, ldm_fast.NoiseSchedule)
        print([typing.get_type_hints(cls.__init__)["config"].__name__ in ldm_fast.__all__ for cls in made])
    """
    assert run(code, tmp_path).strip() == "[True, True, True, True]"
