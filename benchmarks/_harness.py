"""What the benchmarks share: clocks, samples in turn, ceilings, where a number comes from, tables in files."""

import csv
import importlib.metadata
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def alternate(timers: dict[str, Callable[[], float]], rounds: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """Samples of every timer, taken in turn; fewer than `rounds` of each, but at least 2, once `seconds` are over."""
    samples = {name: [] for name in timers}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 2 and time.monotonic() > end:
            break
        for name, timer in timers.items():
            samples[name].append(timer())
    return samples


def paired_ratio(base: list[float], own: list[float]) -> float:
    """Median of base / own over neighbours of one round."""
    return statistics.median(b / o for b, o in zip(base, own, strict=True))


def paired_difference(base: list[float], own: list[float]) -> float:
    """Median of base - own over neighbours of one round."""
    return statistics.median(b - o for b, o in zip(base, own, strict=True))


def copy_rate(device: torch.device, size: int) -> float:
    """GB/s of a large copy, read and written bytes together: the ceiling of a kernel that only moves memory."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times) / 1e9


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of wall time, all work of a GPU done; on a CPU of the process's own CPU time.

    With one thread on an idle machine the latter is wall time too, and what else runs on a busy one does not count.
    """
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def seconds_per_call(call: Callable, device: torch.device) -> float:
    """The median over blocks of 50 ms."""
    now = clock(device)

    def block(count: int) -> float:
        start = now()
        for _ in range(count):
            call()
        return (now() - start) / count

    block(3)
    count = max(1, int(0.05 / block(3)))
    return statistics.median(block(count) for _ in range(7))


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of PyTorch's own matrix product, 2 m k n operations: the ceiling of a step."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).t()
    return 2 * m * k * n / seconds_per_call(lambda: a @ b, device)


def provenance(device: torch.device) -> dict[str, str]:
    """What a number depends on besides the code under test."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "absent"
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip()
    except FileNotFoundError:  # no git here
        commit = ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit or "unknown",
    }


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    fifths = statistics.quantiles(times, n=5)
    return fifths[0], statistics.median(times), fifths[3]


def append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def update_section(path: Path, heading: str, body: str) -> None:
    """Replace what stands under `## heading` in a Markdown file, up to the next heading of that level."""
    before, mark, after = path.read_text().partition(f"## {heading}\n")
    if not mark:
        sys.exit(f"{path} has no section {heading!r}")
    _, following, rest = after.partition("\n## ")
    path.write_text(f"{before}{mark}\n{body}\n{following}{rest}")
