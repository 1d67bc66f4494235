"""`dti-fast train`: learn a concept."""

import os
import shlex
import sys

from rich.console import Console

from dti_fast.commands.interruption import Interrupted, on_signals
from dti_fast.session import train as learn
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.loggers import Logger, Start, make_logger


def train(*, settings: TrainConfig | None = None) -> None:
    """Learn a concept from pictures.

    With no arguments: a bundled creature on the bundled pocket model. The learning rate's default,
    0.04 for any batch, is the paper's 0.01 scaled by its batch of 4.
    """
    config = settings or TrainConfig()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    saved = str(config.output_dir / "config.toml")
    go_on = shlex.join(["dti-fast", "train", "--config", saved, "--resume_from_checkpoint", "latest"])
    cancel = CancelBySignal()
    try:
        with on_signals(cancel):
            result = learn(config, loggers=[make_logger("console"), cancel], cancel=cancel)
    except Interrupted:
        if cancel.resumable:
            console.print(f"Stopped at once. To go on from the last checkpoint: {go_on}")
        raise
    if result.stopped == "cancelled":
        console.print(f"Stopped after step {result.steps}. To go on: {go_on}")
        sys.exit(128 + cancel.number)
    norms = ", ".join(f"{m:.3f}" for m in result.magnitudes)
    console.print(f"Learned {result.placeholder} (norm {norms}). Files in {config.output_dir}:")
    pictures = [result.preview_path] if result.preview_path else []
    for path in [*result.embedding_paths, *result.lora_paths, *pictures, result.log_path]:
        console.print(f"  {path.name}")
    prompt = "a painting in the style of {}" if config.learnable_property == "style" else "a photo of a {}"
    command = ["dti-fast", "generate", "--embedding", str(config.output_dir), "--prompt", prompt]
    console.print(f"Use it: {shlex.join(command)}")
    if len(result.vectors) > 1 and config.pooling == "eos":
        console.print(
            "Text features were pooled at the end of the text, as ComfyUI and A1111 do. For the same in diffusers "
            "load it with dti_fast.load_embedding(pipeline, path): a stock SDXL pipeline pools at the placeholder."
        )


class CancelBySignal(Logger):
    """A signal ends the run after its present step, with a checkpoint.

    Before the first step and after the last there is nothing to lose, so that it ends the run at once, as the second
    signal always does.

    Attributes:
        number: of the signal that arrived; 0 if none did.
        resumable: whether a checkpoint was written.
    """

    def __init__(self):
        self.number, self.learning, self.resumable = 0, False, False

    def is_set(self) -> bool:
        return self.number != 0

    def start(self, start: Start) -> None:
        self.steps, self.learning, self.resumable = start.steps, True, start.first_step > 0

    def checkpoint(self, step: int, path) -> None:
        self.learning, self.resumable = step < self.steps, True

    def __call__(self, number: int, frame) -> None:
        if self.number or not self.learning:
            raise Interrupted(number)
        self.number = number
        # Not by print, which a signal may have interrupted.
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")
