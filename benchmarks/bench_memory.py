"""Memory of a training step through the frozen UNet, counted to the byte: `python -m benchmarks.bench_memory`.

What is counted is every tensor that the UNet's forward and backward make in bf16 while a prompt embedding is learned:
weights are frozen, the text features require a gradient.  Weights, text encoders and VAE are not in the numbers.
Needs no GPU and no weights; the allocator's rounding and cuDNN's workspaces come on top.

    stock           diffusers as it is
    checkpointing   diffusers' own gradient checkpointing
    none, geglu, block    `dti_fast.optimize_frozen` with this `recompute`
"""

import argparse
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks._harness import update_section
from benchmarks._models import NAMES
from dti_fast.memory.live_bytes import LiveBytes
from dti_fast.memory.plan import GIB

MODES = ("stock", "none", "geglu", "checkpointing", "block")
CASES = (("sdxl", 1024, 1), ("sdxl", 768, 4), ("sdxl", 512, 1), ("sd15", 512, 1))


def measure(model: str, resolution: int, batch: int, mode: str = "stock") -> tuple[dict[str, int], int]:
    """Bytes alive after the UNet's forward by kind of tensor, and the peak through forward and backward.

    Args:
        model: "sd15", "sd21" or "sdxl".
        resolution: of the square picture in pixels, a multiple of 64.
        batch: pictures a step.
        mode: one of MODES.
    """
    from diffusers import UNet2DConditionModel

    from dti_fast import optimize_frozen
    from dti_fast.backbones.configs import config_folder

    config = UNet2DConditionModel.load_config(config_folder(model) / "unet")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
            if mode == "checkpointing":
                unet.enable_gradient_checkpointing()
            elif mode != "stock":
                optimize_frozen(unet, recompute=mode)
            latents = torch.empty(batch, 4, resolution // 8, resolution // 8)
            text = torch.empty(batch, 77, unet.config.cross_attention_dim, requires_grad=True)
            extra = {}
            if unet.config.addition_embed_type == "text_time":
                pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
                extra = {
                    "text_embeds": torch.empty(batch, pooled, requires_grad=True),
                    "time_ids": torch.empty(batch, 6),
                }
            timesteps = torch.empty(batch, dtype=torch.int64)
            with LiveBytes() as counter:
                out = unet(latents, timesteps, text, added_cond_kwargs=extra, return_dict=False)[0]
                kinds = counter.by_kind()
                out.float().square().mean().backward()
    finally:
        torch.set_default_dtype(before)
    return kinds, counter.peak


def table(columns: dict[str, tuple[dict[str, int], int]]) -> str:
    """A Markdown table in GiB, one column for each measurement; the kinds add up to its first row."""
    kinds = sorted({kind for kinds, _ in columns.values() for kind in kinds}, key=lambda k: (k == "other", k))
    rows = [["GiB", *columns], ["---", *["---:"] * len(columns)]]
    rows.append(["live after forward", *(f"{sum(kinds.values()) / GIB:.2f}" for kinds, _ in columns.values())])
    rows.append(["peak through backward", *(f"{peak / GIB:.2f}" for _, peak in columns.values())])
    rows += [[kind, *(f"{k.get(kind, 0) / GIB:.3f}" for k, _ in columns.values())] for kind in kinds]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(cases, modes=MODES) -> str:
    """A Markdown table in GiB, live after the forward and peak through the backward, for each mode and case."""
    rows = [["live / peak, GiB", *modes], ["---", *["---:"] * len(modes)]]
    for model, resolution, batch in cases:
        row = [f"{NAMES[model]} {resolution}² b{batch}"]
        for mode in modes:
            kinds, peak = measure(model, resolution, batch, mode)
            row.append(f"{sum(kinds.values()) / GIB:.2f} / {peak / GIB:.2f}")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=[model for model in NAMES if model != "pocket"], help="default: a table of four cases"
    )
    parser.add_argument("--resolution", type=int, default=1024, help="of the square picture, pixels; with --model")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step; with --model")
    parser.add_argument("--mode", choices=MODES, help="by kind of tensor; default: live and peak of all modes")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the table of all modes into this document")
    options = parser.parse_args()
    if options.resolution < 64 or options.resolution % 64 or options.batch < 1:
        parser.error("--resolution is a multiple of 64 and --batch at least 1")
    cases = CASES if options.model is None else [(options.model, options.resolution, options.batch)]
    if options.mode is None:
        print("UNet in bf16, weights frozen\n")
        text = summary(cases)
        print(text)
        if options.update:
            update_section(options.update, "Counted", text + "\n")
        return
    columns = {
        f"{NAMES[model]} {resolution}² b{batch}": measure(model, resolution, batch, options.mode)
        for model, resolution, batch in cases
    }
    print(f"UNet in bf16, weights frozen, {options.mode}\n")
    print(table(columns))


if __name__ == "__main__":
    main()
