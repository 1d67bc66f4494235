"""What a run is about to do, said before its first step, with a warning for what can hardly be meant."""

import math
import warnings

import torch
from torch import Tensor

from dti_fast.backbones import Backbone
from dti_fast.data.folder import Picture, ignored_files
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.config import Settings
from dti_fast.trainer.step import learning_rates

LEAST_TURN = 10.0  # degrees; a run that cannot turn its vectors that far can hardly learn a concept
CPU_WEIGHTS = 3e8  # the bundled model has 11 million, Stable Diffusion 1.5 a billion
NAMED = 5  # files named in a line


def summarise(
    config: Settings,
    backbone: Backbone,
    embeddings: list[TokenEmbedding],
    pictures: list[Picture],
    captions: bool,
    sizes: Tensor,
) -> str:
    """Lines on the model, pictures, prompts, concept and steps of a run.

    Args:
        captions: whether the pictures have captions, instead of templates for all.
        sizes: int64 `[N, 6]`, as `load_pictures` gives them.

    Warns:
        UserWarning: a large model on a CPU; pictures smaller than the resolution; a learning rate that cannot turn
            the vectors far, or turns them too far at once; a warm-up without an end; a validation prompt without the
            concept.
    """
    weights = sum(p.numel() for module in backbone.modules() for p in module.parameters())
    device = next(backbone.denoiser.parameters()).device
    side = int(sizes[0, -1])
    _warn(config, device, weights, pictures, sizes)
    precision = config.base_precision or {"no": "fp32"}.get(config.mixed_precision, config.mixed_precision)
    size = f"{weights / 1e6:,.0f} million weights"
    lines = [
        f"model: {config.pretrained_model_name_or_path}, {size} in {precision} on {device}",
        f"pictures: {len(pictures)} of {config.train_data_dir}, {side} x {side} pixels",
    ]
    if unused := ignored_files(config.train_data_dir, pictures):
        lines.append(f"not used: {_some([f'{entry.name} ({entry.reason})' for entry in unused])}")
    if captions:
        lacking = [picture.path.name for picture in pictures if not picture.caption]
        lines.append(f"prompts: the captions{f'; a template for {_some(lacking)}' if lacking else ''}")
    else:
        lines.append(f"prompts: templates for {'an object' if config.learnable_property == 'object' else 'a style'}")
    count = len(embeddings[0].tokens)
    what = f"{count} vectors" if count > 1 else "a vector"
    encoders = f" in each of {len(embeddings)} text encoders" if len(embeddings) > 1 else ""
    lines.append(f"concept: {config.placeholder_token} from {config.initializer_token!r}, {what}{encoders}")
    lines.append(
        f"steps: {config.max_train_steps} of {config.samples_per_step} pictures, method {config.method}, learning rate "
        f"{config.effective_learning_rate:g}, {config.lr_scheduler}"
    )
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _warn(config: Settings, device: torch.device, weights: int, pictures: list[Picture], sizes: Tensor) -> None:
    found = []
    if device.type == "cpu" and weights > CPU_WEIGHTS:
        found.append(
            f"a model of {weights / 1e9:.1f} billion weights on the CPU: every step will take very long; if there is a "
            "GPU, install a build of PyTorch for it (dti-fast doctor shows what there is)"
        )
    side = int(sizes[0, -1])
    small = [
        f"{picture.path.name} ({width} x {height})"
        for picture, (height, width, *_) in zip(pictures, sizes.tolist(), strict=True)
        if min(height, width) < side
    ]
    if small:
        found.append(
            f"enlarged to {side} pixels, which blurs them: {_some(small)}; a smaller --resolution would suit them"
        )
    if config.lr_warmup_steps >= config.max_train_steps:
        found.append(
            f"--lr_warmup_steps {config.lr_warmup_steps} is no shorter than the run of {config.max_train_steps} steps, "
            "so that the learning rate is never reached"
        )
    turn = math.degrees(learning_rates(config).double().arctan().sum().item())
    if config.method == "dti" and turn < LEAST_TURN:
        found.append(
            f"at this learning rate {config.max_train_steps} steps turn a vector by about {turn:.1f} degrees at most, "
            "which is hardly enough; raise --learning_rate (its default is 0.04) or --max_train_steps"
        )
    if config.method == "dti" and config.effective_learning_rate > 1:
        found.append(
            f"at a learning rate of {config.effective_learning_rate:g} every step turns a vector by more than 45 "
            "degrees, so that the steps undo each other; the default is 0.04"
        )
    for prompt in (config.validation_prompt or []) if config.num_validation_images else []:
        if "{}" not in prompt and config.placeholder_token not in prompt:
            found.append(f"--validation_prompt {prompt!r} has no {{}} for the concept, so its preview cannot show it")
    for warning in found:
        warnings.warn(warning, stacklevel=3)
