"""What selecting and zeroing the lowest magnitudes costs, beside what else could be used: `python bench_select.py`.

All rows are measured in one run, round after round, and the best of each is shown; ratios are to one pass that reads
and writes the same float32 matrix. `--quick` leaves out the slow peers and takes fewer rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from onnxprune.algorithms.select import lowest, side_by_side, zero

Array = np.ndarray[Any, Any]
SIDE = 4096
SPARSITY = 0.8
COLUMNS = "{:44}{:>10}{:>9}{:>9}{:>10}"


def prune(scores: list[Array], outs: list[Array], count: int, threads: int) -> None:
    masks = lowest(scores, count, threads=threads)
    size = sum(score.size for score in scores) if threads > 1 else 0
    side_by_side(zero, scores, masks, outs, size=size)


def partition(matrix: Array, count: int) -> None:
    magnitude = np.abs(matrix)
    np.multiply(matrix, magnitude > np.partition(magnitude, count - 1, axis=None)[count - 1])


def full_sort(matrix: Array, count: int) -> None:
    magnitude = np.abs(matrix)
    np.multiply(matrix, magnitude > np.sort(magnitude, axis=None)[count - 1])


def torch_l1(matrix: Array) -> Callable[[], object]:
    import torch
    from torch.nn.utils import prune as torch_prune

    torch.set_num_threads(1)
    layer = torch.nn.Module()

    def run() -> None:
        layer.weight = torch.nn.Parameter(torch.from_numpy(matrix))
        torch_prune.l1_unstructured(layer, "weight", SPARSITY)
        torch_prune.remove(layer, "weight")

    return run


def adversarial(normal: Array) -> dict[str, tuple[Array, int]]:
    size = normal.size
    count = int(SPARSITY * size)
    half_zeros = np.where(normal < 0, np.copysign(np.float32(0), normal), normal)
    zeros = int(np.count_nonzero(half_zeros == 0))
    ordered = np.sort(normal, axis=None).reshape(normal.shape)
    outlier = normal * np.float32(1e-3)
    outlier[SIDE // 2, 7] = 1e30
    return {
        "all equal": (np.full_like(normal, -0.5), count),
        "all +-0.0": (np.copysign(np.float32(0), normal), count),
        "sorted": (ordered, count),
        "sorted by magnitude": (np.sort(np.abs(normal), axis=None).reshape(normal.shape), count),
        "one huge outlier": (outlier, size - 1),
        "denormals": (normal * np.float32(1e-40), count),
        "half zeros, 80 %": (half_zeros, count),
        "half zeros, exactly those": (half_zeros, zeros),
        "half zeros and one more": (half_zeros, zeros + 1),
        "two values": (np.where(normal < 0.5, np.float32(1), np.float32(2)), count),
        "255 values": (np.round(normal * 40), count),
        "columns of 8 scales": (normal * np.logspace(-3, 0, 8, dtype=np.float32)[np.arange(SIDE) % 8], count),
        "count 1": (normal, 1),
        "all but one": (normal, size - 1),
        "transposed view": (normal.T, count),
        "every other column": (np.repeat(normal, 2, axis=1)[:, ::2], count),
    }


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best wall time of each in seconds; two rounds are enough for the slow ones (the first touches new memory)."""
    best = dict.fromkeys(works, float("inf"))
    for attempt in range(rounds):
        for name, work in works.items():
            if attempt > 1 and best[name] > 0.5:
                continue
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def extra_memory(scores: list[Array], count: int, threads: int) -> float:
    tracemalloc.start()
    lowest(scores, count, threads=threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - sum(score.size for score in scores)) / 1e6


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds = 5 if quick else 15
    has_torch = not quick and importlib.util.find_spec("torch") is not None
    versions = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    if has_torch:
        import torch

        versions.append(f"torch {torch.__version__}")
    print(f"{processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}; {', '.join(versions)}")

    normal = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    count = int(SPARSITY * normal.size)
    out = np.empty_like(normal)
    mask = lowest([normal], count)[0]
    peers: dict[str, Callable[[], object]] = {
        "one read-and-write pass": lambda: np.add(normal, 1, out=out),
        "select": lambda: lowest([normal], count, threads=1),
        "zero": lambda: zero(normal, mask, out),
        "select and zero": lambda: prune([normal], [out], count, 1),
        "select and zero, 2 threads": lambda: prune([normal], [out], count, 2),
        "np.partition": lambda: partition(normal, count),
    }
    if not quick:
        peers["np.sort"] = lambda: full_sort(normal, count)
    if has_torch:
        peers["torch l1_unstructured"] = torch_l1(normal)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        cast = normal.astype(dtype)
        peers[f"select, {np.dtype(dtype)}"] = lambda cast=cast: lowest([cast], count, threads=1)  # type: ignore[misc]
    held = normal > 1
    peers["select, 16 % held"] = lambda: lowest([normal], count, held=[held], threads=1)

    times = measure(peers, rounds)
    base, ours = times["one read-and-write pass"], times["select and zero"]
    print(f"\n{SIDE} x {SIDE} float32 to {SPARSITY:.0%}, one thread unless said; best of {rounds}")
    print(COLUMNS.format("", "ms", "ns/elem", "passes", "vs ours"))
    for name, seconds in times.items():
        numbers = f"{seconds * 1e3:.1f}", f"{seconds / normal.size * 1e9:.2f}", f"{seconds / base:.1f}"
        print(COLUMNS.format(name, *numbers, f"{seconds / ours:.1f}"))

    hard = adversarial(normal)
    works: dict[str, Callable[[], object]] = {"normal": lambda: lowest([normal], count, threads=1)}
    for name, (matrix, wanted) in hard.items():
        works[name] = lambda matrix=matrix, wanted=wanted: lowest([matrix], wanted, threads=1)  # type: ignore[misc]
    times = measure(works, max(3, rounds // 3))
    print(f"\nselect, other inputs of that size\n{COLUMNS.format('', 'ms', 'ns/elem', 'x normal', 'exact')}")
    for name, seconds in times.items():
        matrix, wanted = hard.get(name, (normal, count))
        exact = "yes" if int(np.count_nonzero(lowest([matrix], wanted)[0])) == wanted else "NO"
        numbers = f"{seconds * 1e3:.1f}", f"{seconds / normal.size * 1e9:.2f}", f"{seconds / times['normal']:.1f}"
        print(COLUMNS.format(name, *numbers, exact))
    del hard, works

    rng = np.random.default_rng(1)
    several = [rng.standard_normal((1024, 1024 * n), dtype=np.float32) for n in (1, 2, 4) * 9]
    total = sum(array.size for array in several)
    whole = int(SPARSITY * total)
    works = {}
    for threads in (1, 2):
        works[f"each on its own, {threads} threads"] = lambda threads=threads: [  # type: ignore[misc]
            lowest([array], int(SPARSITY * array.size), threads=threads) for array in several
        ]
        works[f"all together, {threads} threads"] = lambda threads=threads: lowest(  # type: ignore[misc]
            several, whole, threads=threads
        )
    print(f"\nselect, {len(several)} arrays of {total / 1e6:.0f} M elements together")
    print(COLUMNS.format("", "ms", "ns/elem", "", ""))
    for name, seconds in measure(works, max(3, rounds // 3)).items():
        print(COLUMNS.format(name, f"{seconds * 1e3:.1f}", f"{seconds / total * 1e9:.2f}", "", ""))

    print("\nextra memory beyond the masks, MB")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        print(COLUMNS.format(str(np.dtype(dtype)), f"{extra_memory([normal.astype(dtype)], count, 1):.1f}", "", "", ""))
    print(COLUMNS.format("several arrays, 1 thread", f"{extra_memory(several, whole, 1):.1f}", "", "", ""))
    print(COLUMNS.format("several arrays, 2 threads", f"{extra_memory(several, whole, 2):.1f}", "", "", ""))


if __name__ == "__main__":
    main()
