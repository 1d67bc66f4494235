"""The frozen engine on the pocket model, against the stock model: `python -m benchmarks.bench_frozen`.

A step is the text encoder, the UNet and their backward pass to a learned direction.  Gradients must agree before
anything is timed.  Steps alternate, stock and each `recompute`; the ratio is the median over pairs.  On a CPU the time
is the process's own CPU time, so that other programs do not count; on a GPU it is wall time between synchronisations.
Peak memory is measured in a process of its own for each mode (resident set on a CPU, allocated on a GPU), beside the
peak that `LiveBytes` counts.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks._harness import append, provenance
from dti_fast import TokenEmbedding
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.memory.live_bytes import LiveBytes

MODES = ("stock", "none", "geglu", "block")
MIB = 1 << 20


class Step:
    """One forward and backward pass on the pocket model; the gradient with respect to the direction."""

    def __init__(self, device: torch.device):
        self.device, self.backbone = device, load_backbone(Pocket.name, torch.float32, device)
        encoder, tokenizer = self.backbone.text_encoders[0], self.backbone.tokenizers[0]
        self.embedding = TokenEmbedding.install(encoder, tokenizer, "<x>", init=Pocket.initializer)
        ((ids, mask),) = self.backbone.tokenize(["a photo of a <x> on the beach"])
        self.tokens = ids.to(device), mask.to(device)

    def use(self, mode: str) -> None:
        if mode == "stock":
            self.backbone.restore()
        else:
            self.backbone.optimize_frozen(mode, "auto")

    def __call__(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noisy, target = torch.randn(2, batch, 6, 8, 8, generator=generator).to(self.device)
        timesteps = torch.linspace(1, 999, batch).long().to(self.device)
        self.embedding.directions.grad = None
        tokens = [tuple(t.expand(batch, -1) for t in self.tokens)]
        prediction = self.backbone.denoise(noisy, timesteps, self.backbone.condition(tokens, torch.empty(batch, 6)))
        (prediction - target).square().mean().backward()
        return self.embedding.directions.grad.clone()

    def seconds(self, batch: int) -> float:
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self._synchronize()
        start = clock()
        self(batch)
        self._synchronize()
        return clock() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ratios(step: Step, batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and median of stock over this, for each mode; refuses to time a wrong gradient."""
    gradients = {}
    for mode in MODES:
        step.use(mode)
        gradients[mode] = step(batch)
        error = ((gradients[mode] - gradients["stock"]).norm() / gradients["stock"].norm()).item()
        if not error < 1e-5:
            sys.exit(f"{mode}: the gradient differs by {error:.2g}; nothing is timed")
    times = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            step.use(mode)
            times[mode].append(step.seconds(batch))
    return {
        mode: (
            1e3 * statistics.median(own),
            statistics.median(stock / mine for stock, mine in zip(times["stock"], own, strict=True)),
        )
        for mode, own in times.items()
    }


def memory(device: torch.device, mode: str, batch: int) -> dict[str, float]:
    """MiB that a step takes at its peak, measured and counted."""
    step = Step(device)
    step.use(mode)
    step(1)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        measured = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step(batch)
        measured = _resident("VmHWM") - before
    with LiveBytes() as counter:
        step(batch)
    return {"measured": measured / MIB, "counted": counter.peak / MIB}


def _resident(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32], help="pictures a step, for the times")
    parser.add_argument("--memory_batch", type=int, default=64, help="pictures a step, for the memory")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("--memory", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory(device, options.memory, options.memory_batch)))
        return
    origin, step, rows = provenance(device), Step(device), []
    for batch in options.batches:
        for mode, (milliseconds, ratio) in ratios(step, batch, options.rounds).items():
            print(f"batch {batch:3} {mode:6} {milliseconds:8.1f} ms  stock over this {ratio:.3f}")
            rows.append(
                {"measure": "ms", "batch": batch, "mode": mode, "value": milliseconds, "stock_over_this": ratio}
            )
    for mode in MODES:
        command = [sys.executable, "-m", "benchmarks.bench_frozen", "--memory", mode, "--device", options.device]
        command += ["--memory_batch", str(options.memory_batch)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for measure, value in json.loads(lines[-1]).items():
            print(f"batch {options.memory_batch:3} {mode:6} {value:8.1f} MiB {measure}")
            rows.append({"measure": f"MiB {measure}", "batch": options.memory_batch, "mode": mode, "value": value})
    if options.csv:
        append(options.csv, [{"stock_over_this": "", **row, **origin} for row in rows])


if __name__ == "__main__":
    main()
