"""`dti-fast plan`: the plans for a card as a table."""

from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from dti_fast.devices import pick_device, pick_precision
from dti_fast.errors import UserError
from dti_fast.limits import check_limits
from dti_fast.memory.budget import free_memory
from dti_fast.memory.estimator import DTYPES, Estimator, micro_batches, precisions
from dti_fast.memory.plan import GIB, MARGIN, Plan
from dti_fast.progress import phase

WIDTH = 130  # columns of the table where there is no terminal


def plan(
    *,
    pretrained_model_name_or_path: str = "sdxl",
    resolution: int | None = None,
    train_batch_size: int = 4,
    vram: float | None = None,
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16",
    num_validation_images: int = 4,
) -> None:
    """Predict the memory of a training run and pick the cheapest way that fits a card; needs no GPU.

    Counted from the model's configuration; nothing is trained and no weights are read.

    Parameters
    ----------
    pretrained_model_name_or_path
        As for train, or sd15, sd21, sdxl.
    resolution
        Side of the square training pictures in pixels. Default: the model's own.
    train_batch_size
        Pictures in a forward pass; a plan may take them in several.
    vram
        GiB of the card. Default: what the present one has free.
    mixed_precision
        Precision of the frozen model where it is not quantised.
    num_validation_images
        0 if no pictures will be drawn.
    """
    check_limits(
        {
            "resolution": resolution, "train_batch_size": train_batch_size, "vram": vram,
            "num_validation_images": num_validation_images,
        }
    )  # fmt: skip
    if vram is None and not torch.cuda.is_available():
        raise UserError("--vram is missing: give the card's memory in GiB, such as --vram 12")
    room = free_memory(pick_device()) if vram is None else vram * GIB
    dtype = pick_precision(mixed_precision, torch.device("cpu"))
    estimator = Estimator(
        pretrained_model_name_or_path, dtype, batch=train_batch_size, resolution=resolution,
        previews=num_validation_images > 0,
    )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    pick = failure = None
    with phase("counting"):
        try:
            pick = estimator.choose(precisions("auto", dtype), room)
        except UserError as error:
            failure = error
        table = plan_table(estimator, room, pick)
    console.print(table)
    if failure:
        raise failure
    console.print(f"Pick: {pick.describe()}; {pick.total / GIB:.1f} GiB.")
    console.print(
        "Weights and tensors are counted exactly. Context, workspaces and fragmentation are guesses, unconfirmed by a "
        "card."
    )


def plan_table(estimator: Estimator, vram: float, pick: Plan | None) -> Table:
    """Every mode of recomputation with every precision and micro-batch, and the pick, for `vram` bytes.

    Cost is relative to the whole batch at once without recomputation.
    """
    table = Table(
        title=f"{estimator.title}, batch {estimator.batch}, {vram / GIB:.1f} GiB",
        caption=f"GiB; peak is the most at any time, and fits if {MARGIN / GIB:.1f} GiB remain. Cost in FLOPs.",
    )
    stock = estimator.plan(DTYPES[estimator.dtype], estimator.modes[0], estimator.batch)
    for heading in ("recompute", "weights", "passes"):
        table.add_column(heading)
    for heading in (*stock.parts, "peak", "cost"):
        table.add_column(heading, justify="right", min_width=4)
    table.add_column("fits")
    plans = [
        estimator.plan(precision, mode, size).within(vram)
        for precision in precisions("auto", estimator.dtype)
        for size in micro_batches(estimator.batch)
        for mode in estimator.modes
    ]
    for plan in [*plans, *([pick] if pick else [])]:
        if plan is pick:
            table.add_section()
        table.add_row(
            plan.recompute,
            plan.precision,
            f"{plan.passes} x {plan.micro_batch}",
            *(f"{size / GIB:.2f}" for size in plan.parts.values()),
            f"{plan.total / GIB:.2f}",
            f"{plan.cost / stock.cost:.2f}",
            "pick" if plan is pick else "yes" if plan.fits(vram) else "no",
            style="bold" if plan is pick else None,
        )
    return table
