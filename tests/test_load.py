"""Models from folders and single files."""

import pytest
import torch
from tiny import save_tiny_single_file

from dti_fast.backbones.load import load_backbone


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_single_file_equals_the_folder(tiny_pipelines, tmp_path, monkeypatch, family):
    path = save_tiny_single_file(family, tmp_path / "model.safetensors")
    monkeypatch.setattr("dti_fast.backbones.load.config_folder", lambda name: tiny_pipelines[name])
    cpu = torch.device("cpu")
    backbones = [load_backbone(str(source), torch.float32, cpu) for source in (path, tiny_pipelines[family])]
    assert backbones[0].fingerprint() == backbones[1].fingerprint()
    config = backbones[0].pipeline.scheduler.config
    assert config.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    tokens = backbones[0].tokenize(["a dog"])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        outputs = [b.denoise(noisy, torch.tensor([500]), b.condition(tokens, sizes)) for b in backbones]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(("dtype", "vae"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_weights_come_in_their_final_dtype_and_the_vae_never_in_float16(tiny_pipelines, dtype, vae):
    backbone = load_backbone(str(tiny_pipelines["sdxl"]), dtype, torch.device("cpu"))
    assert backbone.vae.dtype == vae
    assert {m.dtype for m in (backbone.denoiser, *backbone.text_encoders)} == {dtype}
    assert not any(p.requires_grad for module in backbone.modules() for p in module.parameters())
