"""`dti-fast train`: learn a concept."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from dti_fast.session import train as learn
from dti_fast.trainer.config import TrainConfig


def train(*, settings: TrainConfig | None = None) -> None:
    """Learn a concept from pictures.

    With no arguments: a bundled creature on the bundled pocket model. The learning rate's default,
    0.04 for any batch, is the paper's 0.01 scaled by its batch of 4.
    """
    config = settings or TrainConfig()
    with cancelled_by_signals() as cancel:
        result = learn(config, cancel=cancel)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if result.stopped == "cancelled":
        console.print(
            f"Stopped after step {result.steps}. To go on: dti-fast train --config {config.output_dir / 'config.toml'} "
            "--resume_from_checkpoint latest"
        )
        sys.exit(128 + cancel.signal)
    norms = ", ".join(f"{m:.3f}" for m in result.magnitudes)
    console.print(f"Learned {result.placeholder} (norm {norms}). Files in {config.output_dir}:")
    pictures = [result.preview_path] if result.preview_path else []
    for path in [*result.embedding_paths, *result.lora_paths, *pictures, result.log_path]:
        console.print(f"  {path.name}")
    console.print(
        f'Use it: dti-fast generate --embedding {config.output_dir} --prompt "a photo of a {result.placeholder}"'
    )
    if len(result.vectors) > 1 and config.pooling == "eos":
        console.print(
            "Text features were pooled at the end of the text, as ComfyUI and A1111 do. For the same in diffusers "
            "load it with dti_fast.load_embedding(pipeline, path): a stock SDXL pipeline pools at the placeholder."
        )


class SignalCancel(threading.Event):
    """Set by the first signal, whose number it keeps."""

    signal = 0


@contextmanager
def cancelled_by_signals() -> Iterator[SignalCancel]:
    """Ctrl-C and a request to terminate end the run after its present step; a second one ends it at once."""
    cancel = SignalCancel()

    def ask(number, frame):
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.signal = number
        cancel.set()
        print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
