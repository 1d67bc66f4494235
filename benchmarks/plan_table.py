"""What `train --vram` picks for common cards, as docs/memory.md shows it: predicted, no card is asked.

python -m benchmarks.plan_table                           the Markdown
python -m benchmarks.plan_table --update docs/memory.md   the same, as a section of that file
"""

import argparse
from pathlib import Path

import torch

from benchmarks._harness import update_section
from benchmarks._models import NAMES
from dti_fast.errors import UserError
from dti_fast.memory.estimator import Estimator
from dti_fast.memory.plan import CUDA_CONTEXT, FRAGMENTATION, GIB, MARGIN, MODES, PASS_FLOPS, WORKSPACES, Plan

CARDS = (6, 8, 12, 16, 24)
CASES = (
    ("sd15", 512, "bf16"), ("sd15", 768, "bf16"), ("sd15", 1024, "bf16"),
    ("sdxl", 512, "bf16"), ("sdxl", 768, "bf16"), ("sdxl", 1024, "bf16"),
    ("sdxl", 768, "int8"), ("sdxl", 1024, "int8"), ("sdxl", 768, "nf4"), ("sdxl", 1024, "nf4"),
)  # fmt: skip
BATCH = 4

INTRODUCTION = f"""
Predicted, **unconfirmed by a card**: what `train --vram` picks for a batch of {BATCH} with previews, the cheapest that
fits. Weights and tensors are counted to the byte. Guesses come on top: {CUDA_CONTEXT / GIB:.1f} GiB for the CUDA
context, {WORKSPACES / GIB:.1f} GiB for workspaces, {FRAGMENTATION:.0%} of a step's tensors for fragmentation.
{MARGIN / GIB:.1f} GiB of the card stay free. Cost is in FLOPs, relative to the whole batch at once without
recomputation; each further pass counts as {PASS_FLOPS / 1e12:.2f} TFLOP, a guess too.

A cell has the recomputation, the passes (4 x 1: four of one picture), the predicted peak in GiB and the cost.
*mixed*: some blocks have another mode; `dti-fast plan` names them. **E**: text encoders and UNet wait in main memory
while the VAE encodes. **T**: previews are decoded in tiles. **no**: nothing fits; below it, what the smallest plan
needs.
"""


def cell(plan: Plan, stock: Plan) -> str:
    """A pick in a few characters."""
    name = plan.recompute if plan.recompute in MODES else f"{plan.recompute.split(',')[0]}, *mixed*"
    flags = " E" * plan.encode_alone + " T" * plan.tiled_decoding
    return f"{name}, {plan.passes} x {plan.micro_batch}<br>{plan.total / GIB:.1f}, {plan.cost / stock.cost:.2f}{flags}"


def markdown() -> str:
    rows = [["", *(f"{card} GiB" for card in CARDS)], ["---"] * (len(CARDS) + 1)]
    estimators = {}
    for model, resolution, precision in CASES:
        if (model, resolution) not in estimators:
            estimators[model, resolution] = Estimator(model, torch.bfloat16, batch=BATCH, resolution=resolution)
        estimator = estimators[model, resolution]
        stock = estimator.plan(precision, MODES[0], BATCH)
        row = [f"{NAMES[model]} {resolution}², {precision}"]
        for card in CARDS:
            try:
                row.append(cell(estimator.choose([precision], card * GIB), stock))
            except UserError:
                smallest = estimator.smallest([precision]).total
                row.append(f"**no**<br>{(smallest + MARGIN) / GIB:.1f}")
        rows.append(row)
    return INTRODUCTION + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.update:
        update_section(options.update, "Plans", markdown())
    else:
        print(markdown())


if __name__ == "__main__":
    main()
