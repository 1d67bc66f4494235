"""What the preview shows of the training pictures."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from dti_fast.backbones.load import load_backbone
from dti_fast.data.folder import find_pictures
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.preview import save_preview


def test_the_preview_shows_the_pictures_as_the_model_sees_them(tiny_pipelines, tmp_path, monkeypatch):
    """What is transparent is white, and 16 bits keep their tones."""
    backbone = load_backbone(str(tiny_pipelines["sd15"]), torch.float32, torch.device("cpu"))
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
