"""--base_precision from the command line to the loaded model, and the folder that keeps quantised models."""

import json
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from diffusers import DiffusionPipeline
from runs import ENVIRONMENT, dti_fast, train_arguments
from safetensors.torch import load_file, save_file
from tiny import save_tiny_single_file
from torch import nn

from dti_fast import load_embedding
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.quantised_cache import cached_file
from dti_fast.errors import UserError
from dti_fast.frozen.quantise import QuantisedLinear

CPU = torch.device("cpu")


def prediction(backbone):
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = backbone.condition(backbone.tokenize(["a dog"]), torch.tensor([[64, 64, 0, 0, 64, 64]]))
        return backbone.denoise(noisy, torch.tensor([500]), condition)


def load(source, precision="nf4", cache=None, dtype=torch.bfloat16):
    return load_backbone(str(source), dtype, CPU, base_precision=precision, quantised_cache=cache)


def test_a_run_and_its_files(tiny_pipelines, pictures, tmp_path):
    out = tmp_path / "out"
    settings = {"base_precision": "nf4", "max_train_steps": 2, "num_validation_images": 1, "validation_steps": 1}
    settings |= {"gradient_checkpointing": True, "learning_rate": 0.2}
    run = dti_fast(*train_arguments(tiny_pipelines["sdxl"], pictures, out, **settings))
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr.lower()
    assert tomllib.loads((out / "config.toml").read_text())["base_precision"] == "nf4"
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipelines["sdxl"])
    token = load_embedding(pipeline, out)
    loaded = pipeline.text_encoder_2.get_input_embeddings().weight[pipeline.tokenizer_2.convert_tokens_to_ids(token)]
    assert torch.equal(loaded, load_file(out / "toy.safetensors")["clip_g"][0])
    settings |= {"base_precision": "int8", "resume_from_checkpoint": "latest"}
    run = dti_fast(*train_arguments(tiny_pipelines["sdxl"], pictures, out, **settings))
    assert run.returncode == 2
    assert "base_precision (was nf4)" in run.stderr


def test_without_bitsandbytes(tiny_pipelines, pictures, tmp_path):
    code = "import sys; sys.modules['bitsandbytes'] = None; from dti_fast.cli import main; main()"
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", base_precision="nf4")
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "error: --base_precision nf4 needs bitsandbytes: install it with pip install bitsandbytes"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_load_quantises_unet_and_text_encoders(tiny_pipelines, precision):
    backbone = load(tiny_pipelines["sdxl"], precision)
    full = load(tiny_pipelines["sdxl"], "auto", dtype=torch.float32)
    for model in (backbone.denoiser, *backbone.text_encoders):
        assert any(isinstance(child, QuantisedLinear) for child in model.modules())
        assert model.dtype == torch.bfloat16
        assert not any(p.requires_grad for p in model.parameters())
    assert not any(isinstance(child, QuantisedLinear) for child in backbone.vae.modules())
    assert backbone.fingerprint() == full.fingerprint()
    exact, ours = prediction(full), prediction(backbone)
    error = ((ours - exact).norm() / exact.norm()).item()
    assert 0 < error < {"int8": 0.02, "nf4": 0.15}[precision]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("single_file", [False, True], ids=["folder", "file"])
def test_cache(tiny_pipelines, tmp_path, monkeypatch, precision, single_file):
    monkeypatch.setattr("dti_fast.backbones.load.config_folder", lambda name: tiny_pipelines[name])
    source = save_tiny_single_file("sdxl", tmp_path / "m.safetensors") if single_file else tiny_pipelines["sdxl"]
    fresh = load(source, precision, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("dti_fast.backbones.load.quantise_frozen", None)  # the second start quantises nothing
    again = load(source, precision, tmp_path / "cache")
    assert torch.equal(prediction(fresh), prediction(again))
    for old, new in zip((fresh.denoiser, *fresh.text_encoders), (again.denoiser, *again.text_encoders), strict=True):
        assert old.state_dict().keys() == new.state_dict().keys()
        assert not any(p.requires_grad or p.is_meta for p in new.parameters())
        assert not new.training
    assert list((tmp_path / "cache").iterdir()) == [kept]


def test_cache_tells_models_apart(tiny_pipelines, tmp_path):
    model = shutil.copytree(tiny_pipelines["sd15"], tmp_path / "model")
    names = {cached_file(tmp_path, model, *kind).name for kind in
             [("nf4", torch.bfloat16), ("int8", torch.bfloat16), ("nf4", torch.float16)]}  # fmt: skip
    assert len(names) == 3
    before = cached_file(tmp_path, model, "nf4", torch.bfloat16)
    shutil.move(model, tmp_path / "elsewhere" / "model")
    model = tmp_path / "elsewhere" / "model"
    assert cached_file(tmp_path, model, "nf4", torch.bfloat16) == before
    path = model / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(k for k in weights if k.endswith("layers.1.mlp.fc2.weight"))
    weights[name][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    assert cached_file(tmp_path, model, "nf4", torch.bfloat16) != before


def test_cache_in_a_bad_place(tiny_pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="the hub's own cache"):
        load(tiny_pipelines["sd15"], "nf4", tmp_path / "hub" / "models--x")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"):
        load(tiny_pipelines["sd15"], "nf4", file / "cache")
    empty = shutil.copytree(tiny_pipelines["sd15"], tmp_path / "model")
    for path in empty.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        load(empty, "nf4", tmp_path / "cache")
    kept = cached_file(tmp_path / "cache", tiny_pipelines["sd15"], "nf4", torch.bfloat16)
    kept.parent.mkdir()
    kept.write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a safetensors file"):
        load(tiny_pipelines["sd15"], "nf4", tmp_path / "cache")


def test_model_of_the_hub(tiny_pipelines, tmp_path, monkeypatch):
    """A hub id, already downloaded: its files are found in the hub's cache, the quantised model goes elsewhere."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_pipelines["sd15"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = (
        "import sys, json, torch; from pathlib import Path\n"
        "from dti_fast.backbones.load import load_backbone\n"
        "for _ in range(2):\n"
        "    load_backbone('some/model', torch.bfloat16, torch.device('cpu'), base_precision='nf4',"
        " quantised_cache=Path(sys.argv[1]))\n"
        "print(json.dumps([p.name for p in Path(sys.argv[1]).iterdir()]))"
    )
    environment = {**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cache"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout.splitlines()[-1])) == 1


def test_biases_and_norms_stay_in_the_dtype_of_the_computation(tiny_pipelines):
    unet = load(tiny_pipelines["sd15"], "int8", dtype=torch.float16).denoiser
    some = (QuantisedLinear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    kinds = {
        type(child).__name__: {p.dtype for p in child.parameters(recurse=False) if p.is_floating_point()}
        for child in unet.modules()
        if isinstance(child, some)
    }
    assert set(kinds) == {"Int8Linear", "Conv2d", "GroupNorm", "LayerNorm"}
    assert set.union(*kinds.values()) == {torch.float16}
