"""A training step of ours beside what others do: `python -m benchmarks.bench_train [--model sdxl] [--smoke]`.

Every contender (`benchmarks._peers`) trains the same model on the same pictures, prompts and draws, in one process, in
turn.  Before anything is timed: the losses must agree, and at the real sizes of SD 1.5 and SDXL the counted FLOPs and
bytes of each must be what `GROUND` says, so that no baseline is weaker than the real one.

On a GPU a sample is the wall time of a block of steps, waited for at both ends.  On a CPU it is the process's own CPU
time, which on an idle machine with one thread is the same and on a busy one does not grow with what else runs.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import _harness
from benchmarks._count import Counts, count, count_task
from benchmarks._models import NAMES, Task, make_task
from benchmarks._peers import diffusers_ti, official_dti, ours
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.data.latents import encode_moments
from dti_fast.formats import write_embeddings
from dti_fast.memory.plan import GIB

STEPS = 400  # of a finished concept, the paper's for SDXL
OURS = "dti-fast"
CONTENDERS = {
    "diffusers TI": diffusers_ti,
    "official DTI": official_dti,
    "diffusers TI, checkpointing": partial(diffusers_ti, checkpointing=True),
    "official DTI, checkpointing": partial(official_dti, checkpointing=True),
    OURS: partial(ours, recompute="none"),
    f"{OURS}, --recompute geglu": partial(ours, recompute="geglu"),
    f"{OURS}, --recompute block": partial(ours, recompute="block"),
}
# From diffusers' step to ours, one waste less at a time; the last is ours.
LADDER = {
    "VAE encode": partial(diffusers_ti, encode=False),
    "host reads": partial(diffusers_ti, encode=False, host_reads=False),
    "restoring frozen rows": partial(diffusers_ti, encode=False, host_reads=False, restore=False),
    "AdamW over the vocabulary": ours,
    "layers that save for weight gradients": CONTENDERS[OURS],
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of losses, relative


class Ground(NamedTuple):
    """What a picture costs at a real size, in bfloat16: counted from layer shapes, apart from this code.

    TFLOP of the UNet's forward and backward (input gradients), of the VAE's encoder, of the text encoders' forward
    and backward; GiB that the stock UNet keeps from forward to backward, and with every block checkpointed.
    """

    forward: float
    backward: float
    encode: float
    text: float
    live: float
    checkpointed: float | None


GROUND = {
    ("sd15", 512): Ground(0.80, 0.87, 1.12, 0.0268, 0.69, None),
    ("sdxl", 512): Ground(1.59, 1.64, 1.12, 0.2235, 1.25, 0.47 / 4),
    ("sdxl", 768): Ground(3.64, 3.88, 2.61, 0.2235, 2.79, 0.47 * 9 / 16),
    ("sdxl", 1024): Ground(6.76, 7.51, 4.88, 0.2235, 4.94, 0.47),
}


def near(value: float, stated: float) -> bool:
    return abs(value - stated) <= 0.02 * stated


def check_ground(
    sizes: list[tuple[str, int, int]], names: Iterable[str] = CONTENDERS
) -> dict[tuple[str, int, int], dict[str, Counts]]:
    """Counts of contenders at sizes (model, resolution, batch); exits if a peer's differ from `GROUND` by over 2 %.

    Checkpointing does not compute again what nothing needs, such as a block's last matrix product: a whole forward pass
    is an upper bound on what it adds.
    """
    counts = {}
    for size in sizes:
        model, resolution, batch = size
        counts[size] = count({name: _countable(CONTENDERS[name]) for name in names}, *size)
        ground = GROUND.get((model, resolution))
        for name, counted in counts[size].items() if ground else ():
            tflop, live = counted.flops / 1e12 / batch, counted.live / GIB / batch
            own = name.startswith(OURS)
            work = ground.forward + ground.backward + ground.text + (0 if own else ground.encode)
            if name == OURS:
                good = near(tflop, work) and live < ground.live
            elif own:
                good = tflop < 1.02 * (work + ground.forward) and live < ground.live
            elif "checkpointing" in name:
                good = tflop < 1.02 * (work + ground.forward)
                good &= ground.checkpointed is None or near(live, ground.checkpointed)
            else:
                good = near(tflop, work) and near(live, ground.live)
            if not good:
                sys.exit(f"{size}: {name} needs {tflop:.3f} TFLOP and keeps {live:.3f} GiB a picture, but {ground}")
    return counts


def _countable(make: Callable) -> Callable:
    """Fake tensors cannot be read, and reads cost no FLOPs."""
    return make if getattr(make, "func", make) is ours else partial(make, host_reads=False)


def check_losses(task: Task) -> dict[str, list[float]]:
    """Losses of three steps of everyone; exits unless ours and the official code's agree, and all at the start."""
    losses = {}
    for name, make in CONTENDERS.items():
        with make(task) as contender:
            losses[name] = [float(contender.step(i)) for i in range(3)]
    allowed = TOLERANCE[task.backbone.denoiser.dtype]
    for name, values in losses.items():
        compared = 1 if name.startswith("diffusers") else 3
        for value, own in zip(values[:compared], losses[OURS], strict=False):
            if not abs(value - own) <= allowed * abs(own):
                sys.exit(f"{name} has the losses {values}, ours {losses[OURS]}: not the same step; nothing is timed")
    return losses


def one_off(task: Task, model: str) -> dict[str, float | None]:
    """Seconds for what a run does once.  A random model is not read from a disk, so nothing is said of start-up."""
    clock = _harness.clock(task.device)

    def seconds(call: Callable) -> float:
        start = clock()
        call()
        return clock() - start

    with tempfile.TemporaryDirectory() as folder:
        return {
            "startup_s": seconds(lambda: load_backbone(Pocket.name, torch.float32, task.device))
            if model == "pocket"
            else None,
            "caching_s": seconds(lambda: encode_moments(task.backbone, task.pixels)),
            "saving_s": seconds(lambda: write_embeddings(Path(folder), "<concept>", task.vectors, {})),
        }


def make_timer(task: Task, make: Callable, steps: int, peaks: dict[str, int]) -> Callable[[], float]:
    """Seconds a step, set-up and the first two steps apart; fills `peaks` in bytes on a GPU."""
    clock, cuda = _harness.clock(task.device), task.device.type == "cuda"

    def timer() -> float:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with make(task) as contender:
            for i in range(2):
                contender.step(i)
            start = clock()
            for i in range(steps):
                contender.step(2 + i)
            seconds = (clock() - start) / steps
        if cuda:
            peaks["allocated"], peaks["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return seconds

    return timer


def bench(
    size: tuple[str, int, int], device: torch.device, rounds: int, steps: int, seconds: float, counts: dict | None
) -> dict:
    """One case: rows of all contenders, and where the difference between diffusers' step and ours comes from."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, resolution, batch = size
    task = make_task(*size, dtype, device)
    losses = check_losses(task)
    if counts is None:
        counts = {name: count_task(make, task) for name, make in CONTENDERS.items()}
    ceiling = _harness.matrix_rate(*(8192 if device.type == "cuda" else 1024,) * 3, dtype, device)
    once = one_off(task, model)
    timed = CONTENDERS | {f"without {waste}": make for waste, make in list(LADDER.items())[:-1]}
    peaks = {name: {} for name in timed}
    timers = {
        name: make_timer(task, make, 5 if device.type == "cuda" else 3, peaks[name]) for name, make in timed.items()
    }
    samples = _harness.alternate(timers, rounds, seconds)
    shared = {
        "model": NAMES[model], "resolution": resolution, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    rows = []
    for name in CONTENDERS:
        low, median, high = _harness.quantiles(samples[name])
        spent = [once["startup_s"], once["caching_s"] if name.startswith(OURS) else 0.0, once["saving_s"]]
        rows.append(
            shared
            | {"contender": name, "s_p20": low, "s_p50": median, "s_p80": high, "images_per_s": batch / median}
            | {"times_ours": _harness.paired_ratio(samples[name], samples[OURS]), "samples": len(samples[name])}
            | {"tflop": counts[name].flops / 1e12, "live_gib": counts[name].live / GIB}
            | {"share_of_matrix_rate": counts[name].flops / median / ceiling}
            | {f"peak_{kind}_gib": nbytes / GIB for kind, nbytes in peaks[name].items()}
            | {"concept_s": sum(filter(None, spent)) + STEPS * median, "loss": losses[name][0]}
        )
    return shared | {"ceiling_tflop_per_s": ceiling / 1e12} | once | {"rows": rows, "breakdown": breakdown(samples)}


def breakdown(samples: dict[str, list[float]]) -> dict:
    """Seconds a step that each waste costs, by medians over rounds of paired differences, and the whole beside them."""
    rungs = [samples["diffusers TI"], *(samples[f"without {waste}"] for waste in list(LADDER)[:-1]), samples[OURS]]
    parts = {waste: _harness.paired_difference(*rungs[i : i + 2]) for i, waste in enumerate(LADDER)}
    whole = _harness.paired_difference(rungs[0], rungs[-1])
    return {"seconds": parts, "whole": whole, "sum_over_whole": sum(parts.values()) / whole}


def markdown(case: dict) -> str:
    """The case's table, for a page."""
    cuda = "peak_allocated_gib" in case["rows"][0]
    head = ["", "s/step p20 / p50 / p80", "images/s", "time, ours = 1", "TFLOP", "of matrix rate", "concept, s"]
    head += ["kept by the UNet, GiB"] + (["peak allocated", "reserved, GiB"] if cuda else [])
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in case["rows"]:
        cells = [row["contender"], f"{row['s_p20']:.4f} / {row['s_p50']:.4f} / {row['s_p80']:.4f}"]
        cells += [f"{row['images_per_s']:.1f}", f"{row['times_ours']:.2f}", f"{row['tflop']:.4g}"]
        cells += [f"{row['share_of_matrix_rate']:.0%}", f"{row['concept_s']:.0f}", f"{row['live_gib']:.3g}"]
        cells += [f"{row[f'peak_{kind}_gib']:.2f}" for kind in ("allocated", "reserved")] if cuda else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def breakdown_markdown(case: dict) -> str:
    parts, whole = case["breakdown"]["seconds"], case["breakdown"]["whole"]
    lines = [["what diffusers' step does and ours does not", "ms a step", "share"], ["---", "---:", "---:"]]
    lines += [[waste, f"{1e3 * seconds:.1f}", f"{seconds / whole:.0%}"] for waste, seconds in parts.items()]
    lines.append(["sum", f"{1e3 * sum(parts.values()):.1f}", f"{case['breakdown']['sum_over_whole']:.0%}"])
    lines.append(["the whole difference, measured on its own", f"{1e3 * whole:.1f}", "100%"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=NAMES, help="default: pocket on a CPU, three real sizes on a GPU")
    parser.add_argument("--resolution", type=int, help="of the square pictures, in pixels; with --model")
    parser.add_argument("--batch", type=int, default=4, help="pictures a step; with --model")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each contender")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new round of samples after these")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--note", default="", help="to be kept with the results: what else ran")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--smoke", action="store_true", help="the pocket model, two samples, one real size counted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.model or options.smoke or device.type == "cpu":
        model = "pocket" if options.smoke else options.model or "pocket"
        cases = [(model, options.resolution or {"pocket": 32, "sdxl": 1024}.get(model, 512), options.batch)]
    else:
        cases = [("sdxl", 768, 4), ("sdxl", 1024, 1), ("sd15", 512, 4)]
    real = [case for case in cases if case[0] != "pocket"]
    if options.smoke:
        counts = check_ground([("sd15", 512, 1)], ["diffusers TI", OURS])
    else:
        counts = check_ground(real or [("sd15", 512, 1), ("sdxl", 1024, 1)])
    results = _harness.provenance(device) | {"clock": "wall" if device.type == "cuda" else "CPU time of the process"}
    results |= {"note": options.note, "cases": []}
    print(" ".join(f"{name}={value}" for name, value in results.items() if name != "cases"))
    for size in cases:
        rounds, steps = (2, 1) if options.smoke else (options.rounds, 5 if device.type == "cuda" else 3)
        case = bench(size, device, rounds, steps, options.seconds / len(cases), counts.get(size))
        results["cases"].append(case)
        print(f"\n{case['model']} {size[1]} px, batch {size[2]}, {case['dtype']}\n\n{markdown(case)}\n")
        print(breakdown_markdown(case))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
