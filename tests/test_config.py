"""The configuration that a run leaves behind starts the same run."""

from dataclasses import replace

import pytest
import torch
from dti_fast.trainer.loop import train
from safetensors.torch import load_file

from dti_fast import cli
from dti_fast.trainer.config import TrainConfig


@pytest.fixture
def read_back(monkeypatch, tmp_path):
    """From a configuration's text to what `dti-fast train --config` makes of it."""

    def read(text: str) -> TrainConfig:
        file, got = tmp_path / "config.toml", []
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(cli, "train_command", got.append)
        cli._app().meta(["train", "--config", str(file)], exit_on_error=False, result_action="return_value")
        return got[0]

    return read


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"validation_prompt": ['a "{}"\n\\ on grass', "ein {} im Schnee, süß"], "validation_steps": 5, "save_steps": 2},
        {"method": "ti-rescaled", "magnitude": 0.5, "num_vectors": 3},
        {"method": "crossinit", "lr_scheduler": "cosine", "learning_rate": 1e-7, "adam_weight_decay": 0.0},
        {"optimizer": "adamw", "kappa_mode": "relative", "magnitude": "class", "scale_lr": True},
        {"lora_rank": 4, "lora_start_step": 3, "dco_beta": 1000.0, "train_magnitude": True},
        {"gradient_checkpointing": True, "vram": 11.5, "attention": "math", "deterministic": True},
        {"base_precision": "fp16", "pooling": "reference", "cuda_graph": "on"},
        {"base_precision": "nf4", "quantised_cache": "cache", "resume_from_checkpoint": "latest"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_resolved_settings_come_back_from_their_file(settings, read_back, tmp_path):
    for name in {"quantised_cache"} & settings.keys():
        settings = settings | {name: tmp_path / settings[name]}
    resolved = TrainConfig(**settings).resolved()
    again = read_back(resolved.to_toml()).resolved()
    assert again == replace(resolved, resume_from_checkpoint=None)
    assert again.resolved() == again


def test_a_precision_that_was_picked_comes_back(tiny_pipelines, pictures, read_back, tmp_path):
    """auto picks none on a CPU, so that the folder for quantised models has no use."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_pipelines["sd15"]), train_data_dir=pictures, initializer_token="dog",
        output_dir=tmp_path / "first", max_train_steps=2, train_batch_size=1, num_validation_images=0,
        base_precision="auto", quantised_cache=tmp_path / "cache",
    )  # fmt: skip
    train(config)
    again = read_back((tmp_path / "first" / "config.toml").read_text())
    train(replace(again, output_dir=tmp_path / "second"))
    first, second = (load_file(tmp_path / name / "learned_embeds.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)
