"""Models from folders and single files."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from runs import ENVIRONMENT
from safetensors.torch import load_file, save_file
from tiny import save_tiny_single_file
from torch._subclasses.fake_tensor import FakeTensorMode

from dti_fast.backbones.base import diffusion_path
from dti_fast.backbones.load import check_model, load_backbone
from dti_fast.backbones.skeleton import skeleton
from dti_fast.backbones.vocabulary import load_vocabularies
from dti_fast.errors import UserError

CPU = torch.device("cpu")


def load(source, **settings):
    return load_backbone(str(source), torch.float32, CPU, **settings)


@pytest.fixture
def model(tiny_pipelines, tmp_path):
    """A folder of SD 1.5's layout that a test may damage."""
    return shutil.copytree(tiny_pipelines["sd15"], tmp_path / "model")


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def as_variant(folder, name="fp16"):
    """Give every file of weights the name of a variant."""
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{name}.safetensors"))


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


def test_variants(tiny_pipelines, model):
    """Where only they exist they load by themselves; else they are asked for, or the plain weights are taken."""
    plain = load(model).fingerprint()
    as_variant(model)
    assert load(model).fingerprint() == plain
    assert len(load_vocabularies(str(model))) == 1
    for path in list(model.glob("*/*.fp16.safetensors")):
        negated = {key: -tensor for key, tensor in load_file(path).items()}
        save_file(negated, path.with_name(path.name.replace(".fp16", "")), metadata={"format": "pt"})
    assert load(model).fingerprint() != plain  # the plain weights go before a variant
    assert load(model, variant="fp16").fingerprint() == plain
    with pytest.raises(UserError, match="has no variant 'bf16' of any part; there is fp16"):
        load(model, variant="bf16")
    with pytest.raises(UserError, match="has no variant 'fp16' of any part; there are only the plain weights"):
        load(tiny_pipelines["sd15"], variant="fp16")


def test_several_variants_and_no_plain_weights(model):
    for path in list(model.glob("*/*.safetensors")):
        shutil.copy(path, path.with_name(f"{path.stem}.bf16.safetensors"))
        path.rename(path.with_name(f"{path.stem}.int8.safetensors"))
    with pytest.raises(UserError, match="holds the variants bf16, int8; choose one with --variant"):
        load(model)
    assert load(model, variant="bf16").fingerprint()


def test_weights_in_pieces_of_a_variant(model):
    path = weights(model, "unet")
    tensors = load_file(path)
    names = sorted(tensors)
    pieces = {f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    plain = load(model).fingerprint()
    path.unlink()
    for name, keys in pieces.items():
        save_file({key: tensors[key] for key in keys}, path.with_name(name), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in pieces.items() for key in keys}}
    target = path.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    target.write_text(json.dumps(index))
    assert load(model).fingerprint() == plain
    path.with_name(next(iter(pieces))).unlink()
    with pytest.raises(UserError, match="the unet of"):
        load(model)


def drop_tensor(part, change):
    def damage(folder):
        path = weights(folder, part)
        tensors = load_file(path)
        name = sorted(tensors)[3]
        tensors = {k: v for k, v in tensors.items() if k != name} | change(name, tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def pickled(folder):
    path = weights(folder, "unet")
    torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()


def index(**entries):
    def damage(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return damage


DAMAGE = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet' holds no .safetensors weights"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
    "no words": (lambda f: [p.unlink() for p in f.glob("tokenizer/[vmt]*.*") if "config" not in p.name], "tokenizer"),
    "no merges": (
        lambda f: [(f / "tokenizer" / n).unlink(missing_ok=True) for n in ("merges.txt", "tokenizer.json")],
        "the tokenizer of",
    ),
    "no configuration": (lambda f: (f / "text_encoder" / "config.json").unlink(), "the text_encoder of"),
    "half a configuration": (lambda f: cut(f / "vae" / "config.json"), "the vae of"),
    "half the weights": (lambda f: cut(weights(f, "unet")), "the unet of"),
    "no bytes": (lambda f: weights(f, "text_encoder").write_bytes(b""), "the text_encoder of"),
    "a pointer of git": (lambda f: weights(f, "vae").write_text("version https://git-lfs.github.com"), "the vae of"),
    "a tensor less in the unet": (drop_tensor("unet", lambda k, v: {}), "its weights lack"),
    "a tensor less in the encoder": (drop_tensor("text_encoder", lambda k, v: {}), "its weights lack"),
    "a tensor less in the vae": (drop_tensor("vae", lambda k, v: {}), "its weights lack"),
    "another shape": (drop_tensor("text_encoder", lambda k, v: {k: v.repeat(2, 1)}), "the text_encoder of"),
    "another shape in the unet": (drop_tensor("unet", lambda k, v: {k: torch.cat((v, v))}), "the unet of"),
    "pickles": (pickled, "only pickled ones, which are not read"),
    "half an index": (lambda f: cut(f / "model_index.json"), "model_index.json' is damaged"),
    "a list for an index": (lambda f: (f / "model_index.json").write_text("[]"), "it names no pipeline"),
    "a class that is none": (index(unet=["diffusers", "NoNet"]), "'NoNet' of 'diffusers' is no class"),
    "another library": (index(unet=["subprocess", "Popen"]), "'Popen' of 'subprocess' is no class"),
    "half an entry": (index(vae=["diffusers"]), "vae is ['diffusers'], no library and class"),
    "no vae": (index(vae=[None, None]), "has no vae"),
    "no denoiser": (index(unet=[None, None]), "no denoiser"),
    "a number for a beta": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text('{"beta_start": "much"}'), "the scheduler of"
    ),
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_one_line_that_names_it(model, damage):
    change, message = DAMAGE[damage]
    change(model)
    with pytest.raises(UserError) as error:
        load(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with FakeTensorMode(allow_non_fake_inputs=True), suppress(UserError):  # the planner's, which reads no weights
        skeleton(str(model), torch.float32)


def test_any_damage_is_an_error_of_one_line_or_none(tiny_pipelines, tmp_path):
    """Bits flipped and ends cut off in any small file, and in the headers of the weights."""
    rng = np.random.default_rng(0)
    names = sorted(p.relative_to(tiny_pipelines["sdxl"]) for p in tiny_pipelines["sdxl"].rglob("*") if p.is_file())
    begun, outcomes = time.monotonic(), []
    for i in range(60):
        folder = tmp_path / str(i)
        shutil.copytree(tiny_pipelines["sdxl"], folder, copy_function=os.link)
        path = folder / names[rng.integers(len(names))]
        data = bytearray(path.read_bytes())
        size = min(len(data), 2000)
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        else:
            for position in rng.integers(size, size=3):
                data[position] ^= 1 << rng.integers(8)
        path.unlink()  # the link alone
        path.write_bytes(data)
        try:
            load(folder)
            outcomes.append(True)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.append(False)
        shutil.rmtree(folder)
        if time.monotonic() - begun > 20:
            break
    assert not all(outcomes)


def test_a_damaged_single_file(tiny_pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr("dti_fast.backbones.load.config_folder", lambda name: tiny_pipelines[name])
    path = save_tiny_single_file("sd15", tmp_path / "model.safetensors")
    whole, tensors = path.read_bytes(), load_file(path)
    for prefix in ("model.diffusion_model.out.", "first_stage_model.decoder.conv_in", "cond_stage_model.transformer"):
        name = next(key for key in sorted(tensors) if key.startswith(prefix))
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
        with pytest.raises(UserError, match=r"lacks weights of|cannot be loaded"):
            load(path)
    for damaged in (whole[: len(whole) // 2], whole[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["./modles/sdxl", "./sdxl", "../sdxl", "models\\sdxl", "models/sd16", "a/b.safetensors"]
)
def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no model"):
        check_model(name)
    check_model("someone/model")


@pytest.mark.parametrize(
    ("environment", "why"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
     ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub does not answer")],
)  # fmt: skip
def test_without_a_network_it_is_said_at_once(tmp_path, environment, why):
    code = (
        "import torch; from dti_fast.backbones.load import load_backbone; from dti_fast.errors import UserError\n"
        "import dti_fast.backbones.load as load, time; begun = time.monotonic()\n"
        "try: load_backbone('someone/model', torch.float32, torch.device('cpu'))\n"
        "except UserError as error: print(error)"
    )
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path), **environment}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == f"the model 'someone/model' is not on this machine, and {why}" + (
        ": is there a network?\n" if "answer" in why else "\n"
    )
    assert "Retrying" not in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_of_the_hub_without_a_network(tiny_pipelines, tmp_path, monkeypatch):
    """What was downloaded before is used, and what was not is named."""
    folder = tmp_path / "snapshot"
    shutil.copytree(tiny_pipelines["sd15"], folder)
    monkeypatch.setattr("dti_fast.backbones.load.cached_folder", lambda hub_id: folder)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    assert load("someone/model").fingerprint() == load(tiny_pipelines["sd15"]).fingerprint()
    weights(folder, "vae").unlink()
    with pytest.raises(UserError, match=r"vae' holds no \.safetensors weights"):
        load("someone/model")


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMDPMSolverMultistepScheduler(sigma_data=0.5),  # Playground v2.5's
        FlowMatchEulerDiscreteScheduler(),
        EulerDiscreteScheduler(use_karras_sigmas=True, timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=["EDM", "flow", "continuous"],
)
def test_other_noise_processes_are_refused(tiny_pipelines, tmp_path, scheduler):
    folder = shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")
    scheduler.save_pretrained(folder / "scheduler")
    index(scheduler=["diffusers", type(scheduler).__name__])(folder)
    with pytest.raises(UserError, match=r"noise process .* is none that can be trained"):
        load(folder).path()


def test_statistics_of_the_latents(tiny_pipelines, tmp_path):
    """SDXL's pipeline decodes `latents * std / scale + mean`: encoding is its inverse."""
    folder = shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")
    mean, std = [-1.66, 1.89, -1.38, 2.52], [8.49, 5.90, 6.55, 5.23]
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}))  # fmt: skip
    backbone = load(folder)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = backbone.vae.encode(pixels).latent_dist
        ours = backbone.encode(pixels)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    torch.testing.assert_close(ours[0] * std / 0.5 + mean, posterior.mean)
    torch.testing.assert_close(ours[1] * std / 0.5, posterior.std)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_marks_in_single_files(tiny_pipelines, tmp_path, monkeypatch, family):
    """`v_pred` and `ztsnr`: the model predicts v, and the last step is noise alone, for training and drawing."""
    monkeypatch.setattr("dti_fast.backbones.load.config_folder", lambda name: tiny_pipelines[name])
    path = save_tiny_single_file(family, tmp_path / "model.safetensors")
    save_file(load_file(path) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    backbone = load(path)
    config, noise = backbone.pipeline.scheduler.config, backbone.path()
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert noise.a[-1] == 0
    assert torch.equal(noise.c, -noise.b)
    assert noise.a[0].item() == pytest.approx((1 - 0.00085) ** 0.5)  # the first step keeps its noise
    assert torch.equal(noise.a, diffusion_path(backbone.pipeline.scheduler).a)
    backbone.pipeline.scheduler.set_timesteps(4)
    assert backbone.pipeline.scheduler.timesteps[0] == 999
    assert load(path, prediction_type="epsilon").pipeline.scheduler.config.prediction_type == "epsilon"
    save_file(load_file(path) | {"edm_mean": torch.zeros(4)}, path)
    with pytest.raises(UserError, match="noise process is EDM's"):
        load(path)


def test_a_prediction_type_that_is_none(tiny_pipelines):
    """As the header of a stranger's file may say."""
    with pytest.raises(UserError, match="a model predicts epsilon or v_prediction, not 'foo'"):
        load(tiny_pipelines["sd15"], prediction_type="foo")
