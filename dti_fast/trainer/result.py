"""What a run leaves behind."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        embedding_paths, lora_paths, preview_path: the files of a finished run.
        log_path: log.jsonl.
        placeholder, pooling: the new word, and where pooled text features are taken with it.
        vectors: float32 `[K, D]` for each text encoder, on the CPU.
        magnitudes: for each text encoder the mean norm of its vectors.
        steps: that were made, those before a resume included.
        loss: mean over the last `logging_steps`; NaN if none was read.
        angle_degrees: for each text encoder the mean angle to the initial directions.
        seconds: of this process, from checking the settings on.
        peak_memory: the most bytes that PyTorch held on a CUDA device; None elsewhere.
        stopped: "finished" or "cancelled"; a cancelled run leaves a checkpoint and no embedding files.
    """

    embedding_paths: list[Path]
    lora_paths: list[Path]
    preview_path: Path | None
    log_path: Path
    placeholder: str
    pooling: str
    vectors: list[Tensor]
    magnitudes: list[float]
    steps: int
    loss: float
    angle_degrees: list[float]
    seconds: float
    peak_memory: int | None
    stopped: str
