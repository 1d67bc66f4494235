"""What is said before the first step, and what is warned of."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command, train_arguments, write_pictures

from dti_fast.backbones.load import load_backbone
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.prompts import training_prompts
from dti_fast.trainer import summary
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.learner import install_embeddings
from dti_fast.trainer.preview import save_preview


@pytest.fixture(scope="module")
def backbone(tiny_pipelines):
    return load_backbone(str(tiny_pipelines["sd15"]), torch.float32, torch.device("cpu"))


@pytest.fixture
def summarised(tiny_pipelines, backbone, tmp_path):
    """The lines and the warnings for a run of a folder of pictures."""

    def summarised(folder, **settings):
        settings = {"resolution": 64, "initializer_token": "red dog", "mixed_precision": "no"} | settings
        model = str(tiny_pipelines["sd15"])
        config = TrainConfig(
            pretrained_model_name_or_path=model, train_data_dir=folder, output_dir=tmp_path / "out", **settings
        ).resolved()
        embeddings = install_embeddings(config, backbone)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pictures = find_pictures(folder)
                _, captions = training_prompts(pictures, config.placeholder_token, config.learnable_property)
                _, sizes = load_pictures(pictures, config.resolution)
                caught.clear()
                text = summary.summarise(config, backbone, embeddings, pictures, captions, sizes)
        finally:
            for embedding in embeddings:
                embedding.uninstall()
        return text.splitlines(), [str(warning.message) for warning in caught]

    return summarised


def test_lines(summarised, tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 3)
    for name in ("a.heic", "0.caption", "broken.png"):
        (folder / name).write_text("x")
    Image.new("L", (80, 80)).save(folder / "1_mask.png")
    lines, warned = summarised(folder)
    assert warned == []
    assert lines[0].startswith(f"model: {tiny_pipelines['sd15']}, ")
    assert lines[0].endswith(" million weights in fp32 on cpu")
    assert lines[1:] == [
        f"pictures: 3 of {folder}, 64 x 64 pixels: 0.png, 1.png, 2.png",
        "not used: 0.caption (captions are read from a .txt beside each picture), "
        "1_mask.png (a mask; masks are not used), a.heic (not read by Pillow; save it as JPEG or PNG), "
        "broken.png (cannot be read)",
        "prompts: templates for an object",
        "concept: <concept> from 'red dog', 2 vectors",
        "steps: 400 of 4 pictures, method dti, learning rate 0.04, cosine",
    ]
    (folder / "0.txt").write_text("a {} on grass")
    lines, _ = summarised(folder)
    assert "prompts: the captions; a template for 1.png, 2.png" in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 128}, "enlarged to 128 pixels, which blurs them: 0.png (100 x 80)"),
        ({"lr_warmup_steps": 500}, "--lr_warmup_steps 500 is no shorter than the run of 400 steps"),
        ({"learning_rate": 5e-4, "max_train_steps": 40}, "40 steps turn a vector by about 0.6 degrees at most"),
        ({"learning_rate": 1.5}, "every step turns a vector by more than 45 degrees"),
        ({"validation_prompt": ["a dog"]}, "--validation_prompt 'a dog' has no {} for the concept"),
        ({"validation_prompt": ["a dog"], "num_validation_images": 0}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_warnings(summarised, tmp_path, settings, message):
    _, warned = summarised(write_pictures(tmp_path / "pictures", 1), **settings)
    assert len(warned) == (message is not None)
    assert message is None or message in warned[0]


def test_a_large_model_on_a_cpu(summarised, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "CPU_WEIGHTS", 1e3)
    _, warned = summarised(write_pictures(tmp_path / "pictures", 1))
    assert len(warned) == 1
    assert "billion weights on the CPU" in warned[0]


def test_a_run_that_learned_nothing_is_told(tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    run = command(*train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out", max_train_steps=10, kappa=1e9))
    assert run.returncode == 0, run.stderr
    assert "degrees from the initial word, so hardly anything was learned" in run.stderr
    assert "a smaller --kappa" in run.stderr


def test_the_preview_shows_the_pictures_as_the_model_sees_them(backbone, tmp_path, monkeypatch):
    """What is transparent is white, and 16 bits keep their tones."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "a.png")
    Image.fromarray(np.full((64, 64), 32896, np.uint16)).save(folder / "b.png")
    monkeypatch.setattr(backbone, "draw", lambda prompts, seeds, **_: [Image.new("RGB", (64, 64))] * len(prompts))
    config = TrainConfig(
        train_data_dir=folder, pretrained_model_name_or_path="pocket", output_dir=tmp_path, num_validation_images=1,
        resolution=64,
    ).resolved()  # fmt: skip
    budget = SimpleNamespace(tiled_decoding=False, drawn_at_once=lambda size: 1)
    save_preview(config, backbone, find_pictures(folder), tmp_path / "preview.png", budget)
    row = np.asarray(Image.open(tmp_path / "preview.png"))[26 + 64]
    assert (row[6 + 64] == 255).all()
    assert (row[6 + 128 + 6 + 64] == 128).all()
