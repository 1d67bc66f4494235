"""What the model predicts: told by a setting where its files cannot say it, and remembered by the embedding."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_single_file

from dti_fast import TrainConfig, train
from dti_fast.backbones.load import load_backbone
from dti_fast.commands.generate import generate
from dti_fast.drawing import DrawSettings
from dti_fast.formats import read_embeddings


@pytest.mark.parametrize(
    ("family", "setting", "expected"),
    [
        ("sd21", None, "v_prediction"),
        ("sd21", "epsilon", "epsilon"),
        ("sdxl", None, "epsilon"),
        ("sdxl", "v_prediction", "v_prediction"),
    ],
)
def test_single_files(tiny_pipelines, tmp_path, monkeypatch, family, setting, expected):
    monkeypatch.setattr("dti_fast.backbones.load.config_folder", lambda name: tiny_pipelines[name])
    path = save_tiny_single_file(family, tmp_path / "model.safetensors")
    backbone = load_backbone(str(path), torch.float32, torch.device("cpu"), prediction_type=setting)
    assert backbone.pipeline.scheduler.config.prediction_type == expected
    path = backbone.path()  # what is to be predicted: the noise, or sqrt(alpha) n - sqrt(1 - alpha) x
    zero, one = torch.zeros(len(path)), torch.ones(len(path))
    assert torch.equal(path.c, zero if expected == "epsilon" else -path.b)
    assert torch.equal(path.d, one if expected == "epsilon" else path.a)
    default = load_backbone(str(tiny_pipelines[family]), torch.float32, torch.device("cpu")).pipeline.scheduler
    kept = {k: v for k, v in default.config.items() if k not in ("prediction_type", "_use_default_values")}
    assert {k: backbone.pipeline.scheduler.config[k] for k in kept} == kept
    assert type(backbone.pipeline.scheduler) is type(default)


def test_train_then_generate(tiny_pipelines, pictures, tmp_path):
    """Another target teaches another vector, and `generate` draws as it was taught without being told."""
    model, learned = str(tiny_pipelines["sd15"]), []
    for name in ("epsilon", "v_prediction"):
        config = TrainConfig(
            pretrained_model_name_or_path=model, train_data_dir=pictures, output_dir=tmp_path / name,
            placeholder_token="<toy>", initializer_token="dog", max_train_steps=2, num_validation_images=0,
            prediction_type=name, deterministic=True,
        )  # fmt: skip
        train(config)
        assert not torch.are_deterministic_algorithms_enabled()  # the switch is given back
        assert read_embeddings(tmp_path / name)[1]["prediction_type"] == name
        learned.append(load_file(tmp_path / name / "learned_embeds.safetensors")["<toy>"])
    assert not torch.equal(*learned)

    output = tmp_path / "out.png"
    settings = DrawSettings(num_images=1, num_inference_steps=2)
    generate(prompt=["a {}"], embedding=[tmp_path / "v_prediction"], output=output, settings=settings)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_textual_inversion(tmp_path / "v_prediction" / "learned_embeds.safetensors")
    images = []
    for prediction_type in ("v_prediction", "epsilon"):
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
        images.append(pipeline("a <toy>", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])
    assert Image.open(output).tobytes() == images[0].tobytes()
    assert images[0].tobytes() != images[1].tobytes()
