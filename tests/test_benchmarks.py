"""Every benchmark on tiny shapes: it verifies, prints a table, ends with one line of JSON, and refuses a wrong op."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import first_stage
import nearest_codebook
import pytest
import torch

from ldm_fast import ops
from ldm_fast.ops import cpu, dispatch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# brute force by the native kernels is another contender if they are built
NEAREST_CODEBOOK = {"taming", "torch.cdist", "ldm_fast with stats"}
NEAREST_CODEBOOK |= {"ldm_fast brute force"} if cpu.unavailable() is None else set()
# options besides --quick, contenders that need nothing installed, peers that may be absent, number of rows
BENCHMARKS = {
    "attention": (["--backward"], {"SDPA", "SDPA flash", "SDPA math", "eager"}, set(), 8),
    "group_norm_silu": ([], {"eager"}, set(), 8),
    "nearest_codebook": ([], NEAREST_CODEBOOK, {"FAISS", "scikit-learn"}, 3),
    "unet": ([], {"PyTorch's ops", "ldm_fast, attention only"}, {"diffusers"}, 2),
}
FIGURES = ("median_ms", "min_ms", "max_ms", "gflops", "gbs", "share_of_matmul_peak", "share_of_copy")


def last_line(output: str) -> dict[str, Any]:
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_as_a_script(name: str) -> None:
    arguments, peers, optional, rows = BENCHMARKS[name]
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--threads", "1", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = last_line(done.stdout)
    assert record["benchmark"] == name and record["threads"] == 1 and record["quick"] and record["wrong"] == []
    assert record["device"] and record["torch"] == torch.__version__
    assert record["peaks"]["copy_gbs"] > 0 and all(peak > 0 for peak in record["peaks"]["matmul_gflops"].values())
    assert len(record["rows"]) == rows
    for row in record["rows"]:
        assert row["verified"] and row["implementation"] and row["dtype"] in record["peaks"]["matmul_gflops"]
        assert {"ldm_fast", *peers} <= set(row["contenders"]) <= {"ldm_fast", *peers, *optional}
        for contender in row["contenders"].values():
            assert all(contender[figure] >= 0 for figure in FIGURES) and contender["error"] >= 0
            assert 0 < contender["min_ms"] <= contender["median_ms"] <= contender["max_ms"]
        peer, ours = row["contenders"][row["best_peer"]], row["contenders"]["ldm_fast"]
        assert row["speedup"] == pytest.approx(peer["median_ms"] / ours["median_ms"], rel=1e-2)
    missing = optional - set(record["rows"][0]["contenders"])
    assert missing == set(record["absent"]), "a peer that is not timed is named as absent, with how to install it"
    for peer in missing:
        assert f"absent: {peer} (" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_attention_benchmark_measures_extra_memory() -> None:
    attention.extra_memory(lambda: torch.ones(1 << 20))
    assert 95 < attention.extra_memory(lambda: torch.ones(25_000_000)) < 110
    assert attention.extra_memory(lambda: torch.ones(1 << 10)) < 5


def off_by_little(op: str) -> Callable[..., torch.Tensor]:
    """The op with one slightly wrong element, except by the reference implementation, which is the truth of unet.py."""
    right = getattr(ops, op)

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs)
        if dispatch.forced() == "reference":
            return out
        one = (torch.arange(out.numel(), device=out.device) == out.numel() // 2).reshape(out.shape).to(out.dtype)
        return out + one if op == "nearest_codebook" else out + one * out  # so that the gradient is wrong as well

    return wrong


def test_first_stage_compares_time_and_memory() -> None:
    options = ["--quick", "--threads", "1", "--size", "64", "--tile", "8"]
    command = [sys.executable, str(FOLDER / "first_stage.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = last_line(done.stdout)
    assert record["benchmark"] == "first_stage" and record["wrong"] == []
    assert {"in bands", "whole"} <= set(record["rows"]) <= {"in bands", "whole", "diffusers"}
    for row in record["rows"].values():
        assert row["error"] <= 1e-4 and row["median_s"] > 0 and row["peak_mb"] >= row["before_mb"] > 0


def test_first_stage_refuses_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    image = torch.rand(1, 3, 8, 8)
    figures = {"seconds": [1.0], "peak_mb": 2.0, "before_mb": 1.0, "threads": 1}
    results = {"whole": {"image": image, **figures}, "in bands": {"image": image + 2e-4, **figures}}
    monkeypatch.setattr(first_stage, "results", lambda options, arguments: results)
    for allowed, code, wrong in (([], 1, ["in bands"]), (["--allow", "1e-3"], 0, [])):
        assert first_stage.main(["--quick", *allowed]) == code
        printed = capsys.readouterr().out
        assert last_line(printed)["wrong"] == wrong and ("in bands   WRONG: error" in printed) == bool(wrong)


@pytest.mark.parametrize(
    ("name", "op"),
    [(op, op) for op in dispatch.IMPLEMENTATIONS if op in BENCHMARKS]
    + [("unet", "group_norm_silu"), ("unet", "attention")],
)
def test_refuses_a_wrong_result(name: str, op: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    main = importlib.import_module(name).main
    monkeypatch.setattr(ops, op, off_by_little(op))
    assert main(["--quick", "--dtype", "float32", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    record = last_line(printed)
    assert record["wrong"] and "WRONG" in printed
    for row in record["rows"]:
        assert not row["verified"] and row["contenders"] == {} and "speedup" not in row
    assert " x\n" not in printed, "a speed-up was printed for a wrong result"


def test_leaves_out_a_wrong_peer(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(attention, "exact", lambda q, k, v: attention.sdpa(q.double(), k.double(), v.double()))
    monkeypatch.setattr(attention, "eager", lambda q, k, v: q * 0)
    assert attention.main(["--quick", "--dtype", "float32", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for row in last_line(printed)["rows"]:
        assert "eager" not in row["contenders"] and row["left_out"]["eager"].startswith("wrong: error of out")
    assert "eager                   not timed: wrong" in printed


def test_peer_that_raises_and_unknown_shape(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:

    def fails(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nearest_codebook, "cdist", fails)
    assert nearest_codebook.main(["--quick", "--shape", "d40", "--device", "cpu"]) == 0
    (row,) = last_line(capsys.readouterr().out)["rows"]
    assert row["case"] == "n65-k130-d40" and "raises RuntimeError: out of memory" in row["left_out"]["torch.cdist"]
    with pytest.raises(SystemExit, match="no row's name contains 'd7'; the rows are: n65-k130-d4"):
        nearest_codebook.main(["--quick", "--shape", "d7", "--device", "cpu"])


def test_peers_too_large_for_the_memory_are_not_started(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert nearest_codebook.too_large(1, torch.device("cpu")) is None
    assert "are free" in nearest_codebook.too_large(1 << 60, torch.device("cpu"))
    monkeypatch.setattr(nearest_codebook, "too_large", lambda needed, device: "needs 9 GB")
    assert nearest_codebook.main(["--quick", "--device", "cpu"]) == 0
    for row in last_line(capsys.readouterr().out)["rows"]:
        assert row["left_out"]["taming"] == row["left_out"]["torch.cdist"] == "needs 9 GB"
        assert "ldm_fast" in row["contenders"]
