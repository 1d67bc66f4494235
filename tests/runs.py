"""Fixtures' raw material: pictures, and the command line in this process and in one of its own."""

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dti_fast import cli

# One backend for all runs: a native library that another test builds must not change bits between two of them.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ, "DTI_FAST_BACKEND": "reference"}


def write_pictures(folder: Path, count: int = 3) -> Path:
    """Smooth random pictures of 80 x 100 pixels, so that a denoiser has something to see."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
        coarse.resize((100, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def dti_fast(*arguments, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """Run `dti-fast` in a process of its own."""
    command = [sys.executable, "-m", "dti_fast.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout, **kwargs)


def command(*arguments) -> subprocess.CompletedProcess:
    """`dti_fast` in this process, which saves the seconds that the imports take; pytest keeps the warnings."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err),
    ):  # fmt: skip
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(sys, "argv", ["dti-fast", *map(str, arguments)])
        patch.setenv("DTI_FAST_BACKEND", "reference")
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


# What a run may have said when it is refused: its phases and summary, and warnings.
SAID_BEFORE = (
    "warning: ", "planning", "counting", "loading the model", "encoding the pictures", "model: ", "pictures: ",
    "not used: ", "prompts: ", "concept: ", "steps: ", "step ", "resuming",
)  # fmt: skip


def refused(run, message, out=None):
    """Assert that a run of the command line ended with one clear line and exit code 2, and left no `out`."""
    assert run.returncode == 2, run.stderr
    lines = run.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], run.stderr
    assert message in lines[-1]
    assert all(line.startswith(SAID_BEFORE) for line in lines[:-1]), run.stderr
    assert "Traceback" not in run.stderr
    assert out is None or not out.exists()


def train_arguments(model: Path, pictures: Path, output: Path, **settings) -> list:
    """Arguments of a short training run; a setting of True is a bare flag."""
    settings = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": pictures,
        "output_dir": output,
        "placeholder_token": "<toy>",
        "initializer_token": "dog",
        "num_validation_images": 0,
        **settings,
    }
    arguments = ["train"]
    for name, value in settings.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", value]
    return arguments
