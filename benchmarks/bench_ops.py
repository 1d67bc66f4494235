"""Every op against eager PyTorch: first that the answers are right, then how long they take, in pairs.

python -m benchmarks.bench_ops                       all of them
python -m benchmarks.bench_ops geglu --smoke         one, a small case, few samples
python -m benchmarks.bench_ops --csv FILE            append the rows, a case as it ends

A differentiable op is timed forward and backward.  On a CPU a sample is a block of calls.  On a GPU it is one replay of
a CUDA graph that holds a call for each of many copies of the arguments, together larger than the cache: neither
launches nor a warm cache are timed.  Samples of the implementations alternate, so that a slower moment of the machine
meets them all, and the ratio is the median of the ratios of neighbours.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks._harness import alternate, append, copy_rate, paired_ratio, provenance, quantiles
from benchmarks._ops import Case, by_stem, forced, problems


def cases(stem: str, device: torch.device, smoke: bool) -> Iterator[tuple[str, Case]]:
    """By name."""
    module = problems(stem)
    for size in (module.SMOKE,) if smoke else module.SIZES:
        for dtype in (torch.float32,) if smoke else (torch.float32, torch.bfloat16):
            case = module.case(*size, dtype=dtype, device=device)
            yield f"{case.name} {str(dtype).removeprefix('torch.')}", case


def measure(case: Case, backends: tuple[str, ...], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds a call for each implementation and round.

    Raises:
        ValueError: for an implementation with more than twice the error of eager PyTorch, both against float64.
    """
    for result, (errors, size) in case.errors(backends).items():
        allowed = 2 * errors["eager"] + 4 * torch.finfo(torch.float32).eps * size
        for name, error in errors.items():
            if not error <= allowed:
                raise ValueError(f"{result} of {name} is wrong by {error:.3g}, allowed is {allowed:.3g}")
    timer = _graph if device.type == "cuda" else _block
    timers = {name: timer(case, backend, call) for name, (backend, call) in case.calls(backends).items()}
    return alternate(timers, rounds)


def _block(case: Case, backend: str | None, call: Callable) -> Callable[[], float]:
    arguments = case.make(0)

    def timer(count: int) -> float:
        with forced(backend):
            start = time.perf_counter()
            for _ in range(count):
                call(*arguments)
            return (time.perf_counter() - start) / count

    timer(3)
    count = max(1, int(0.01 / timer(5)))
    return lambda: timer(count)


def _graph(case: Case, backend: str | None, call: Callable) -> Callable[[], float]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [case.make(seed) for seed in range(min(max(3 * cache // case.bytes, 2), 200))]
    with forced(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(*copies[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for arguments in copies:
                call(*arguments)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(copies)

    timer()
    return timer


def main() -> None:
    ops = by_stem()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(ops)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one small case of each op, few samples")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    options = parser.parse_args()
    for unknown in [stem for stem in options.ops if stem not in ops]:
        parser.error(f"there is no op {unknown!r}: ops are {', '.join(ops)}")
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    origin = provenance(device)
    print(" ".join(f"{name}={value}" for name, value in origin.items()))
    rate = copy_rate(device, 1 << (24 if options.smoke else 28))
    print(f"copy {rate:.1f} GB/s")
    for stem in options.ops or ops:
        fused = ops[stem].fused
        backends = fused if device.type == "cuda" else ("native" if "native" in fused else "reference",)
        for case_name, case in cases(stem, device, options.smoke):
            try:
                samples = measure(case, backends, device, rounds=5 if options.smoke else 41)
            except ValueError as error:
                sys.exit(f"{stem} {case_name}: {error}; it is not timed")
            rows = []
            for name, times in samples.items():
                low, median, high = quantiles(times)
                ratio = paired_ratio(samples["eager"], times)
                row = {"op": ops[stem].name, "case": case_name, "implementation": name}
                row |= {"us_median": median * 1e6, "us_p20": low * 1e6, "us_p80": high * 1e6, "eager_over_this": ratio}
                row |= {"bytes": case.bytes, "gb_per_s": case.bytes / median / 1e9, "copy_gb_per_s": rate}
                rows.append(row | origin)
                print(
                    f"{ops[stem].name:16} {case_name:32} {name:10} {median * 1e6:10.2f} us"
                    f"  [{low * 1e6:.2f}, {high * 1e6:.2f}]  {ratio:6.2f}x eager  {row['gb_per_s']:8.2f} GB/s"
                )
            if options.csv:
                append(options.csv, rows)


if __name__ == "__main__":
    main()
