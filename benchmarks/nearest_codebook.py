"""Time nearest_codebook against other software that finds the nearest code.

    python benchmarks/nearest_codebook.py [--shape k16384-d4] [--threads 2] [--compile]

Peers: the formula of taming-transformers (the whole N×K matrix of distances), torch.cdist, FAISS (IndexFlatL2, which is
exact, built beforehand) and scikit-learn (pairwise_distances_argmin). An index is wrong if float32 rounding cannot
explain it, as judged in float64. Ours must give no wrong index; up to 1 % of a peer's may be wrong. The error in the
table is the share of wrong indices.

Two more contenders are ours: the op with counts and sums (nearest_codebook_stats), verified by counting again, and, on
the CPU, plain brute force. The latter shows how close its loop comes to the machine's peak of fused multiply-adds. That
peak is measured in the same run; a matrix product stays below it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _harness import OURS, Bench, Verdict, add_impl_option, implementation, parser, too_large
from torch import Tensor

from ldm_fast import ops
from ldm_fast.ops import cpu, native
from ldm_fast.ops.cases import NearestCodebook, bytes_moved, flops, make_inputs, wrong_codes

TINY = (NearestCodebook(65, 130, 4), NearestCodebook(65, 130, 4, data="kmeans"), NearestCodebook(65, 130, 40))
STATS, BRUTE_FORCE = f"{OURS} with stats", f"{OURS} brute force"
ALLOWED_PEER = 0.01  # of the rows: |z|² + |e|² - 2 z·e cancels, so the wrong one of two equal codes may be chosen
Search = Callable[[Tensor, Tensor], Callable[[], Tensor]]


def taming(z: Tensor, codebook: Tensor) -> Tensor:
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    return distances.argmin(1)


def cdist(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def faiss_search(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda: torch.from_numpy(index.search(z.numpy(), 1)[1][:, 0])


def sklearn_search(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from sklearn.metrics import pairwise_distances_argmin

    return lambda: torch.from_numpy(pairwise_distances_argmin(z.numpy(), codebook.numpy()))


LIBRARIES: dict[str, tuple[str, str, Search]] = {
    # name: (module, package, how to search)
    "FAISS": ("faiss", "faiss-cpu", faiss_search),
    "scikit-learn": ("sklearn", "scikit-learn", sklearn_search),
}


def installed(bench: Bench) -> dict[str, Search]:
    """Return the libraries that are installed, and note the others as absent."""
    found = {}
    for name, (module, package, search) in LIBRARIES.items():
        try:
            __import__(module)
            found[name] = search
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            bench.absent[name] = (
                f"pip install {package}" if missing else f"cannot be imported: {str(error).splitlines()[0]}"
            )
    return found


def verdict(
    case: NearestCodebook, z: Tensor, codebook: Tensor, name: str, found: Tensor | tuple[Tensor, ...]
) -> Verdict:
    """Judge the indices, and for the op with statistics whether counts and sums match the indices."""
    indices, *statistics = found if isinstance(found, tuple) else (found,)
    if indices.shape != (case.N,) or not ((indices >= 0) & (indices < case.K)).all():
        return Verdict(float("inf"), False, "the result is not N indices of codes")
    if statistics:
        counts, sums = torch.bincount(indices, minlength=case.K), torch.zeros(case.K, case.d, dtype=torch.float64)
        sums = sums.to(z.device).index_add_(0, indices, z.double())
        if not torch.equal(statistics[0], counts) or (statistics[1] - sums).abs().max() > 1e-6 * sums.abs().max():
            return Verdict(float("inf"), False, "the counts or sums do not match the indices")
    count = int(wrong_codes(z, codebook, indices.long()).sum())
    allowed = 0 if name.startswith(OURS) else ALLOWED_PEER * case.N
    return Verdict(count / case.N, count <= allowed, f"{count} of {case.N} indices are wrong")


def row(
    bench: Bench, case: NearestCodebook, dtype: torch.dtype, libraries: dict[str, Search], fma_rate: float | None
) -> None:
    z, codebook = make_inputs("nearest_codebook", case, dtype, bench.device).values()
    contenders = {
        OURS: lambda: ops.nearest_codebook(z, codebook, impl=bench.options.impl),
        STATS: lambda: ops.nearest_codebook_stats(z, codebook, impl=bench.options.impl),
    }
    runs_by = implementation("nearest_codebook", bench.options.impl, z, codebook)
    if runs_by == "cpu":
        contenders[BRUTE_FORCE] = lambda: cpu.nearest_codebook(z[None], codebook, "brute force")[0]
    skipped = {}
    matrix = {"taming": taming, "torch.cdist": cdist}
    if bench.options.compile:
        matrix["taming, torch.compile"] = torch.compile(taming)
    reason = too_large(3 * case.N * case.K * dtype.itemsize, bench.device)
    for name, function in matrix.items():
        if reason:
            skipped[name] = reason
        elif name == "torch.cdist" and dtype != torch.float32:
            skipped[name] = "takes only float32"
        else:
            contenders[name] = lambda function=function: function(z, codebook)
    for name, search in libraries.items():
        if bench.device.type == "cpu" and dtype == torch.float32:
            contenders[name] = search(z, codebook)
        else:
            skipped[name] = "takes only float32 on the CPU"

    bench.row(
        str(case),
        str(dtype).removeprefix("torch."),
        contenders,
        lambda name, found: verdict(case, z, codebook, name, found),
        implementation=runs_by,
        flops=flops("nearest_codebook", case),
        moved=bytes_moved("nearest_codebook", case, dtype),
        skipped=skipped,
    )
    add_ratios(bench.rows[-1], fma_rate)


def add_ratios(row: dict[str, Any], fma_rate: float | None) -> None:
    """Add what only this benchmark reports: the cost of the statistics, and how close brute force comes to the peak."""
    times = {name: figures["median_ms"] for name, figures in row["contenders"].items()}
    if not times:
        return
    row["stats_ratio"] = times[STATS] / times[OURS]
    line = f"  with stats: {row['stats_ratio']:.3f} x the plain op"
    if fma_rate and BRUTE_FORCE in times:
        fastest = row["flops"] / row["contenders"][BRUTE_FORCE]["min_ms"] * 1e3
        row["fma_peak_gflops"] = fma_rate / 1e9
        row["brute_force_share_of_fma_peak"] = row["contenders"][BRUTE_FORCE]["gflops"] * 1e9 / fma_rate
        line += f"; brute force: {row['brute_force_share_of_fma_peak']:.0%} of the peak of fused multiply-adds"
        line += f" (at its fastest {fastest / fma_rate:.0%})"
    print(line)


def main(arguments: list[str] | None = None) -> int:
    p = parser(__doc__, dtypes=("float32",))
    add_impl_option(p, "nearest_codebook")
    bench = Bench("nearest_codebook", p.parse_args(arguments))
    libraries = installed(bench)
    fma_rate = native.fused_multiply_add_rate() if bench.device.type == "cpu" and cpu.unavailable() is None else None
    if fma_rate:
        print(f"fused multiply-adds measured now: {fma_rate / 1e9:.0f} GFLOP/s")
    for case in bench.cases("nearest_codebook", TINY):
        for dtype in bench.options.dtype:
            with torch.no_grad():
                row(bench, case, getattr(torch, dtype), libraries, fma_rate)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
