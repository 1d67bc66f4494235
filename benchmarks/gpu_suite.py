"""All there is to measure on a GPU, in calls of less than nine minutes each:

    python -m benchmarks.gpu_suite --out DIR1 --stages environment,tests,ceilings,ops
    python -m benchmarks.gpu_suite --out DIR2 --stages train,graph,pocket
    python -m benchmarks.gpu_suite --out DIR3 --stages memory,cards,job
    python -m benchmarks.gpu_suite --out DIR --smoke

    environment  versions, driver, which backend serves each op            environment.txt
    tests        the tests marked `gpu`                                     tests.txt
    ceilings     what the chip can do: copy, bf16 and int8 matrix products
    ops          bench_ops, which checks the answers before it times        ops.csv, ops.txt
    train        bench_train: SDXL and SD 1.5 of real size, ours and peers  train.json
    graph        the step as a CUDA graph: is it the eager step, and how fast
    pocket       the bundled example, from the command line
    memory       the most memory of a step, predicted and measured
    cards        training within what cards of 12, 8 and 6 GB leave
    job          a full-size SDXL folder: train --vram 12, checkpoint, preview, save, load and generate
                                                                            job.png; what the commands say: log.txt

A stage runs in a process of its own and has a time limit, so that neither a crash nor a hang takes the others with it.
results.json is written anew with every result.  The exit code is 1 if a stage failed.  A large card held to less proves
that the memory suffices and the result is right; it says nothing about the speed of a smaller card.
"""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from benchmarks import _harness
from benchmarks._harness import matrix_rate, seconds_per_call
from benchmarks._ops import by_stem
from dti_fast.memory.plan import GIB

ROOT = Path(__file__).parents[1]
SHAPES = {
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "SDXL feed-forward at 1024 px, batch 4: 4096 x 1280 x 10240": (4096, 1280, 10240),
    "SDXL projection at 1024 px, batch 1: 1024 x 1280 x 1280": (1024, 1280, 1280),
}
# What a card leaves to PyTorch's allocator, GiB: a guess, after the desktop, the driver and its context.
CARDS = {"12 GB": 11.0, "8 GB": 7.2, "6 GB": 5.3}
SMOKE_SHAPES = {"256 x 256 x 256": (256, 256, 256)}


class Context(NamedTuple):
    """What a stage gets: `record(name, value)` keeps a result, `seconds` are what is left for it."""

    out: Path
    device: torch.device
    smoke: bool
    ops: list[str]
    seconds: float
    record: Callable


def environment(context: Context) -> None:
    from dti_fast.commands.doctor import report

    text = report()
    if shutil.which("nvidia-smi"):
        text += "\n\n" + subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    (context.out / "environment.txt").write_text(text + "\n")
    context.record("report", text.splitlines())


def tests(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder, (context.out / "tests.txt").open("w") as log:
        xml = Path(folder) / "junit.xml"
        processes = "0" if context.smoke else "4"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "-n", processes, f"--junitxml={xml}"]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        if not xml.exists():
            raise RuntimeError(f"pytest ended with code {code} before it ran anything; see tests.txt")
        suite = ElementTree.parse(xml).find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    broken = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
    context.record("passed", passed)
    context.record("skipped", counts["skipped"])
    context.record("failed", [f"{case.get('classname')}::{case.get('name')}" for case in broken])
    if code or not (passed or context.smoke):
        raise RuntimeError(f"pytest ended with code {code}, {passed} tests passed; see tests.txt")


def ceilings(context: Context) -> None:
    """Rates of PyTorch's own operations; GB/s counts bytes read and written, a product has 2 m k n operations."""
    device = context.device
    source = torch.ones(1 << (20 if context.smoke else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    context.record("copy GB/s", 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source), device) / 1e9)
    for name, (m, k, n) in (SMOKE_SHAPES if context.smoke else SHAPES).items():
        context.record(f"bf16 TFLOP/s, {name}", matrix_rate(m, k, n, torch.bfloat16, device) / 1e12)
        a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
        b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device).t()
        if not torch.equal(torch._int_mm(a, b)[:64].double(), a[:64].double() @ b.double()):
            raise RuntimeError(f"torch._int_mm is wrong for {name}")
        seconds = seconds_per_call(lambda a=a, b=b: torch._int_mm(a, b), device)
        context.record(f"int8 TOP/s, {name}", 2 * m * k * n / seconds / 1e12)


def ops(context: Context) -> None:
    deadline = time.monotonic() + context.seconds
    table, failed, origin = context.out / "ops.csv", [], _harness.provenance(context.device)
    for i, op in enumerate(context.ops):
        command = [sys.executable, "-m", "benchmarks.bench_ops", op, "--device", context.device.type, "--csv", table]
        before = len(_rows(table))
        share = max(1, (deadline - time.monotonic()) / (len(context.ops) - i) - 1)
        with (context.out / "ops.txt").open("a") as log:
            try:
                code = subprocess.run(
                    [*command, *(["--smoke"] if context.smoke else [])],
                    cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=share,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = f"none after {share:.0f} s"
        context.record(op, {"exit code": code, "rows": _rows(table, origin)[before:]})
        if code != 0:
            failed.append(op)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; see ops.txt")


def train(context: Context) -> None:
    table = context.out / "train.json"
    arguments = ["--smoke"] if context.smoke else ["--rounds", 11, "--seconds", 0.5 * context.seconds]
    _run(context, "benchmarks.bench_train", "--device", context.device.type, "--json", table, *arguments)
    for case in json.loads(table.read_text())["cases"]:
        ratios = {row["contender"]: round(row["times_ours"], 3) for row in case["rows"]}
        name = f"{case['model']} {case['resolution']} px, batch {case['batch']}"
        context.record(f"{name}: time, ours = 1", ratios)


def graph(context: Context) -> None:
    """Losses of twenty steps, eager, eager again (what atomics alone change) and captured; then the time of a step."""
    for size in [("pocket", 32, 2)] if context.smoke else [("pocket", 32, 4), ("sd15", 512, 1), ("sdxl", 1024, 1)]:
        name, (eager, again, captured) = f"{size[0]} {size[1]} px, batch {size[2]}", _learn_thrice(context, size)
        apart = [max(abs(a - b) for a, b in zip(eager[0], other[0], strict=True)) for other in (again, captured)]
        context.record(
            name,
            {"eager s/step": eager[1], "captured s/step": captured[1], "largest loss": max(eager[0])}
            | {"eager differs from itself by": apart[0], "captured differs by": apart[1]},
        )
        # Twice what the card differs from itself, and what bfloat16 leaves of a loss where it does not.
        if not apart[1] <= 2 * apart[0] + 1e-3 * max(eager[0]):
            raise RuntimeError(f"{name}: the captured step has other losses: {captured[0]}, not {eager[0]}")


def _learn_thrice(context: Context, size: tuple[str, int, int]) -> list[tuple[list[float], float]]:
    """Losses and seconds a step of two eager runs and a captured one; on a CPU the capture is the step itself."""
    from benchmarks._models import make_task
    from benchmarks._peers import ours
    from dti_fast.trainer.graph import cuda_graph

    task = make_task(*size, torch.float32 if context.smoke else torch.bfloat16, context.device)
    now, runs = _harness.clock(context.device), []
    for capture in (None, None, (lambda run: run) if context.smoke else cuda_graph):
        with ours(task, recompute="none", capture=capture) as contender:
            losses = [contender.step(i) for i in range(10)]
            start = now()
            losses += [contender.step(i) for i in range(10, 20)]
            seconds = (now() - start) / 10
        runs.append((torch.stack(losses).tolist(), seconds))
    return runs


def pocket(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--max_train_steps", 3, "--num_validation_images", 0] if context.smoke else []
        start = time.monotonic()
        _run(context, "dti_fast.cli", "train", "--output_dir", folder, *arguments)
        context.record("seconds with start-up and preview", time.monotonic() - start)
        context.record("last line of the log", json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1]))


def memory(context: Context) -> None:
    """The most bytes of a step: counted, with what the plan assumes on top, and measured."""
    from functools import partial

    from benchmarks._count import count_task
    from benchmarks._models import make_task
    from benchmarks._peers import ours
    from dti_fast.memory.estimator import DTYPES, Estimator

    cuda = context.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    for size in [("pocket", 32, 2)] if context.smoke else [("sd15", 512, 4), ("sdxl", 768, 4), ("sdxl", 1024, 1)]:
        model, resolution, batch = size
        estimator = Estimator(model, dtype, batch=batch, resolution=resolution)
        task = make_task(*size, dtype, context.device)
        for mode in ("none", "geglu", "block"):
            plan = estimator.plan(DTYPES[dtype], mode, batch)
            contender = partial(ours, recompute=mode)
            row = {name: nbytes / GIB for name, nbytes in plan.parts.items()} | {"counted": plan.step.peak / GIB}
            if cuda:
                with contender(task) as ready:
                    torch.cuda.empty_cache()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    for i in range(2):
                        ready.step(i)
                    torch.cuda.synchronize()
                    row["measured"] = (torch.cuda.max_memory_allocated() - before) / GIB
                    row["measured, reserved"] = (torch.cuda.max_memory_reserved() - before) / GIB
            else:
                row["counted on real tensors"] = count_task(contender, task).peak / GIB
            context.record(f"{model} {resolution} px, batch {batch}, recompute {mode}, GiB", row)
        del task


def cards(context: Context) -> None:
    """Three steps through the command line within each card; batches of four halve until one fits."""
    sizes = [(32, 2)] if context.smoke else [(1024, 4), (1024, 1), (768, 1), (512, 1)]
    model = "pocket" if context.smoke else _random_folder(context, "sdxl")
    for card, room in list(CARDS.items())[: 1 if context.smoke else None]:
        for resolution, batch in sizes:
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder) / "report.json"
                settings = {"resolution": resolution, "train_batch_size": batch, "max_train_steps": 3, "vram": room}
                settings |= {"num_validation_images": 0}
                arguments = _arguments(model, Path(folder), settings)
                code = _run(context, "benchmarks.limited", room, report, "train", *arguments, check=False)
                result = {"exit code": code} | (json.loads(report.read_text()) if report.exists() else {})
            context.record(f"{card}, {room} GiB: SDXL {resolution} px, batch {batch}", result)
            if code == 0:
                break
        else:
            raise RuntimeError(f"nothing fits a {card} card; see log.txt")


def job(context: Context) -> None:
    """What a user does, with a model of the real size and random weights."""
    model = "pocket" if context.smoke else _random_folder(context, "sdxl")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        settings = {"resolution": 1024, "max_train_steps": 20, "checkpointing_steps": 10, "vram": 12}
        settings |= {"num_validation_images": 1}
        if context.smoke:
            settings |= {"resolution": 32, "max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 0}
        start = time.monotonic()
        _run(context, "dti_fast.cli", "train", *_arguments(model, output, settings))
        context.record("train, seconds with loading, caching, preview", time.monotonic() - start)
        context.record("last line of the log", json.loads((output / "log.jsonl").read_text().splitlines()[-1]))
        context.record("files", sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()))
        picture, start = context.out / "job.png", time.monotonic()
        few = ["--num_inference_steps", 2 if context.smoke else 20, "--num_images", 1]
        _run(
            context, "dti_fast.cli", "generate", "--pretrained_model_name_or_path", model, "--embedding", output,
            "--prompt", "a photo of a {}", "--output", picture, *few,
        )  # fmt: skip
        context.record("generate, seconds with loading", time.monotonic() - start)


STAGES = {
    stage.__name__: stage
    for stage in (environment, tests, ceilings, ops, train, graph, pocket, memory, cards, job)
}  # fmt: skip
LIMITS = {  # seconds
    "environment": 50, "tests": 230, "ceilings": 50, "ops": 190,
    "train": 320, "graph": 130, "pocket": 70,
    "memory": 130, "cards": 220, "job": 170,
}  # fmt: skip
CALL = 9 * 60 - 15  # seconds
CALLS = ("environment,tests,ceilings,ops", "train,graph,pocket", "memory,cards,job")


def _run(context: Context, module: str, *arguments, check: bool = True) -> int:
    """Run a module; what it says goes to log.txt, and RuntimeError if it fails and `check`."""
    with (context.out / "log.txt").open("a") as log:
        print("\n$", module, *arguments, file=log, flush=True)
        command = [sys.executable, "-m", module, *map(str, arguments)]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code and check:
        raise RuntimeError(f"{module} ended with code {code}; see log.txt")
    return code


def _arguments(model: str | Path, output: Path, settings: dict) -> list:
    """Flags of a training run on the bundled pictures."""
    from dti_fast.backbones.pocket import Pocket

    settings = {
        "pretrained_model_name_or_path": model, "train_data_dir": Pocket.concept, "output_dir": output,
        "placeholder_token": "<toy>", "initializer_token": Pocket.initializer, **settings,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def _random_folder(context: Context, model: str) -> Path:
    """A diffusers folder of the real size with random weights, made on the device once and then kept."""
    from dti_fast.backbones.skeleton import skeleton

    folder = Path(tempfile.gettempdir()) / f"dti-fast-random-{model}"
    if not folder.exists():
        start = time.monotonic()
        partial = folder.with_suffix(".partial")
        with context.device:
            skeleton(model, torch.bfloat16).pipeline.save_pretrained(partial)
        partial.rename(folder)
        torch.cuda.empty_cache()
        context.record("seconds to write a random model", time.monotonic() - start)
    return folder


def run_stage(name: str, out: Path, smoke: bool, ops: list[str], seconds: float, keep: Callable) -> dict:
    """Run a stage in a process of its own for at most `seconds`.

    Calls `keep` at every result with all that is known: `status` (running, ok, failed or timed out), `seconds`,
    `results` and, for a failure, the lines of its `error`.  Returns the last of these.
    """
    result = {"status": "running", "seconds": 0.0, "results": {}}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, out, smoke, ops, seconds, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    while result["status"] == "running":
        left = start + seconds - time.monotonic()
        try:
            if not receiver.poll(max(left, 0)):
                result["status"] = "timed out"
            else:
                key, value = receiver.recv()
                (result if key in ("status", "error") else result["results"])[key] = value
        except EOFError:
            process.join()
            result |= {"status": "failed", "error": [f"its process ended with code {process.exitcode}"]}
        result["seconds"] = round(time.monotonic() - start, 1)
        keep(result)
    process.join(0 if result["status"] == "timed out" else 10)
    if process.is_alive():
        with suppress(ProcessLookupError):  # before it leads a group of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return result


def _work(name: str, out: Path, smoke: bool, ops: list[str], seconds: float, sender) -> None:
    os.setpgrp()  # what the stage starts dies with it
    device = torch.device("cpu" if smoke else "cuda")
    try:
        STAGES[name](Context(out, device, smoke, ops, seconds - 10, lambda *pair: sender.send(pair)))
        sender.send(("status", "ok"))
    except Exception:
        sender.send(("error", traceback.format_exc().splitlines()))
        sender.send(("status", "failed"))


def _rows(table: Path, left_out: Iterable[str] = ()) -> list[dict]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items() if k not in left_out} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _write(results: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def main() -> int:
    available = list(by_stem())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--stages", help="some of them, by comma; default: the first four, or all of a smoke run")
    parser.add_argument("--ops", default=",".join(available), help="some of them, by comma; default: all")
    parser.add_argument("--commit", help="what to note as the commit where the code lies outside its git repository")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU: a test of this program")
    options = parser.parse_args()
    default = ",".join(STAGES) if options.smoke else CALLS[0]
    stages, chosen = (options.stages or default).split(","), options.ops.split(",")
    for unknown in [name for name in stages if name not in STAGES] + [name for name in chosen if name not in available]:
        parser.error(f"there is no {unknown!r}: stages are {', '.join(STAGES)}; ops are {', '.join(available)}")
    seconds = sum(LIMITS[name] for name in stages)
    if seconds > CALL and not options.smoke:
        parser.error(
            f"these stages may take {seconds} s together, over {CALL}: take one of --stages {' or '.join(CALLS)}"
        )
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{str(options.out)!r} is not empty")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke tries the program on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)

    results = {"kind": "smoke run on a CPU: its numbers are no GPU measurements" if options.smoke else "measurement"}
    results |= {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    results |= _harness.provenance(torch.device("cpu" if options.smoke else "cuda"))
    results |= ({"commit": options.commit} if options.commit else {}) | {"stages": {}}
    print(" ".join(f"{name}={value}" for name, value in results.items() if name != "stages"), flush=True)

    for name in stages:

        def keep(stage: dict, name: str = name) -> None:
            results["stages"][name] = stage
            _write(results, options.out / "results.json")

        limit = 300 if options.smoke else LIMITS[name]  # a CPU may be busy with much else
        stage = run_stage(name, options.out.resolve(), options.smoke, chosen, limit, keep)
        print(f"{name}: {stage['status']} after {stage['seconds']} s", *stage.get("error", [])[-1:], flush=True)
        if name == "ceilings":
            print(*(f"  {key}: {value:.4g}" for key, value in stage["results"].items()), sep="\n")
    print(f"{results['kind']}; wrote {options.out / 'results.json'}")
    return int(any(stage["status"] != "ok" for stage in results["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
