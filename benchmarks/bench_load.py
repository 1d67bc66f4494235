"""Seconds until the frozen model is ready: `python -m benchmarks.bench_load`.

Stable Diffusion 1.5 with random weights, a folder of 16-bit safetensors: loaded as it is, quantised on load, and read
from --quantised_cache.  Every load is a process of its own; before anything is timed, the cached model must predict
bit for bit what the freshly quantised one does.  The rounds alternate between the ways; files are in the page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks._harness import provenance
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.skeleton import skeleton
from dti_fast.frozen.quantise import PRECISIONS

CPU = torch.device("cpu")


def load(model: Path, precision: str | None, cache: Path | None):
    return load_backbone(str(model), torch.bfloat16, CPU, base_precision=precision, quantised_cache=cache)


@torch.no_grad()
def prediction(backbone) -> torch.Tensor:
    channels = backbone.denoiser.config.in_channels
    latents = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = backbone.condition(backbone.tokenize(["a dog"]), torch.zeros(1, 6))
    return backbone.denoise(latents, torch.tensor([500]), condition)


def timed_load(model: Path, precision: str | None, cache: Path | None) -> float:
    """Seconds without the imports."""
    command = [sys.executable, "-m", "benchmarks.bench_load", "--load", model, precision or "", cache or ""]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def load_here(model: str, precision: str, cache: str) -> None:
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    start = time.perf_counter()
    load(Path(model), precision or None, Path(cache) if cache else None)
    print(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the pocket model's sizes")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load.json"))
    options = parser.parse_args()
    if options.load:
        return load_here(*options.load)
    origin = provenance(CPU)
    with tempfile.TemporaryDirectory() as name:
        model, cache = Path(name) / "model", Path(name) / "cache"
        skeleton("pocket" if options.smoke else "sd15", torch.bfloat16).pipeline.save_pretrained(model)
        ways = {"bf16": (None, None)}
        for precision in PRECISIONS:
            if not torch.equal(*(prediction(load(model, precision, cache)) for _ in range(2))):
                sys.exit(f"{precision}: the cached model differs; nothing is timed")
            ways |= {precision: (precision, None), f"{precision}, cached": (precision, cache)}
        samples = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, arguments in ways.items():
                samples[way].append(timed_load(model, *arguments))
        sizes = {path.name.split("-")[1]: path.stat().st_size for path in cache.iterdir()}
    rows = []
    for way, seconds in samples.items():
        ratio = statistics.median(base / own for base, own in zip(samples["bf16"], seconds, strict=True))
        rows.append({"way": way, "seconds": statistics.median(seconds), "bf16_over_this": ratio})
    result = {**origin, "rounds": options.rounds, "file_bytes": sizes, "rows": rows}
    lines = ["| loaded as | seconds | bf16 over this |", "|---|---|---|"]
    lines += [f"| {row['way']} | {row['seconds']:.1f} | {row['bf16_over_this']:.2f} |" for row in rows]
    lines.append(
        f"\n({result['device']}, {result['threads']} thread, torch {result['torch']}, commit {result['commit']}; "
        "`python -m benchmarks.bench_load`)"
    )
    print("\n".join(lines))
    if not options.smoke:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
