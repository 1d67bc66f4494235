"""Largest error of every op, dtype and backend against float64, next to plain PyTorch's own.

python -m benchmarks.kernel_errors                             Markdown
python -m benchmarks.kernel_errors --update docs/kernels.md    the same, as a section of that file

Without a GPU, TRITON_INTERPRET=1 lets the Triton kernels take part, in Triton's interpreter.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks._harness import update_section
from benchmarks._ops import by_stem, problems

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native", "triton")


def rows(stem: str, device: torch.device) -> Iterator[str]:
    operator = by_stem()[stem]
    backends = [backend for backend in BACKENDS if backend in ("reference", *operator.fused)]
    for dtype in DTYPES:
        for case in problems(stem).error_cases(dtype, device):
            for result, (errors, _) in case.errors(backends).items():
                cells = " | ".join(f"{errors[name]:.1e}" if name in errors else "" for name in ("eager", *BACKENDS))
                of = ", ".join(filter(None, (result, case.name)))
                yield f"| {operator.name} | {str(dtype).removeprefix('torch.')} | {of} | {cells} |"


def markdown() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    lines = [f"Largest absolute error against float64 on {where}; torch {torch.__version__}.", ""]
    if device.type == "cpu":
        lines += ["Triton ran in its interpreter, which truncates to bfloat16 where a GPU rounds.", ""]
    lines += ["| op | dtype | of | plain PyTorch | " + " | ".join(BACKENDS) + " |", "|---" * (4 + len(BACKENDS)) + "|"]
    return "\n".join([*lines, *(row for stem in by_stem() for row in rows(stem, device))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.update:
        update_section(options.update, "Errors", markdown())
    else:
        print(markdown())


if __name__ == "__main__":
    main()
