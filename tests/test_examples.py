"""The examples run, learn a direction, and leave a file that a stock pipeline loads."""

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import ENVIRONMENT
from safetensors.torch import load_file

import dti_fast
from dti_fast.session import Session
from dti_fast.trainer.config import TrainConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PLAIN = ["--initializer", "dog", "--placeholder", "<toy>", "--steps", "4", "--batch", "2", "--resolution", "64"]
STOCK = ["--initializer_token", "dog", "--placeholder_token", "<toy>", "--max_train_steps", "4", "--resolution", "64",
         "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine"]  # fmt: skip


def check(path: Path, model: Path, at_least_degrees: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    words = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    (token, learned), = load_file(path).items()  # fmt: skip
    assert (token, learned.shape, learned.dtype) == ("<toy>", (1, words.shape[1]), torch.float32)
    norms = words.norm(dim=-1)
    torch.testing.assert_close(learned.norm(), norms[norms > 0].mean(), rtol=1e-5, atol=0)
    initial = words[pipeline.tokenizer("dog", add_special_tokens=False).input_ids[0]]
    assert F.cosine_similarity(learned[0], initial, dim=0) < torch.tensor(at_least_degrees).deg2rad().cos()
    pipeline.load_textual_inversion(path)
    loaded = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("<toy>")]
    assert torch.equal(loaded, learned[0])


def run(script: str, *arguments) -> None:
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_plain_pytorch(tiny_pipelines, pictures, tmp_path, precision):
    """fp16 goes through autocast and GradScaler."""
    path = tmp_path / "toy.safetensors"
    model = tiny_pipelines["sd15"]
    run("plain_pytorch.py", "--model", model, "--pictures", pictures, "--output", path, "--precision", precision,
        *PLAIN)  # fmt: skip
    check(path, model, 2)


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_diffusers_textual_inversion(tiny_pipelines, pictures, tmp_path, precision):
    pytest.importorskip("accelerate")
    model = tiny_pipelines["sd15"]
    run("diffusers_textual_inversion.py", "--pretrained_model_name_or_path", model, "--train_data_dir", pictures,
        "--output_dir", tmp_path, "--mixed_precision", precision, *STOCK)  # fmt: skip
    check(tmp_path / "learned_embeds.safetensors", model, 2)


def test_python_in_the_readme(pictures, tmp_path, monkeypatch):
    """As it stands there, but on the pocket model and with few steps."""
    (code,) = re.findall(r"```python\n(.*? Session\(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for word in ("dog", "cat"):
        shutil.copytree(pictures, f"my_{word}")
    config = partial(TrainConfig, pretrained_model_name_or_path="pocket", max_train_steps=2, num_validation_images=0)
    monkeypatch.setattr(dti_fast, "TrainConfig", config, raising=False)
    monkeypatch.setattr(dti_fast, "Session", lambda model, **settings: Session("pocket", **settings), raising=False)
    exec(code, {})
    assert Path("my_dog_dti/learned_embeds.safetensors").is_file()
    for word in ("dog", "cat"):
        assert Image.open(f"my_{word}_sd15/watercolor.png").size == (32, 32)
