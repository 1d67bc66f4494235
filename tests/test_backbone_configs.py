import json
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from tiny import WORDS, original_state_dict, save_tiny_pipeline, save_tiny_single_file
from transformers import CLIPTokenizer

from dti_fast.backbones import clip_vocabulary
from dti_fast.backbones.configs import CONFIGS, config_folder, identify_single_file

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
CLIP_TOKENIZERS = [("sd15", "tokenizer"), ("sdxl", "tokenizer")]
OPEN_CLIP_TOKENIZERS = [("sd21", "tokenizer"), ("sdxl", "tokenizer_2")]
BOS, EOS = 49406, 49407


@pytest.fixture(scope="module", autouse=True)
def user_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """Tiny pipelines with seed 0, each written once."""
    return cache(lambda family: save_tiny_pipeline(family, tmp_path_factory.mktemp(family)))


@cache
def full_size_components(family: str) -> SimpleNamespace:
    """The models named in the configs of `family`, without memory for their weights."""
    folder = config_folder(family)
    index = json.loads((folder / "model_index.json").read_text())
    models = {}
    with torch.device("meta"):
        for name in PARAMETERS[family]:
            library, class_name = index[name]
            if library == "diffusers":
                model_class = getattr(diffusers, class_name)
                models[name] = model_class.from_config(model_class.load_config(folder / name))
            else:
                model_class = getattr(transformers, class_name)
                models[name] = model_class(model_class.config_class.from_pretrained(folder / name))
    return SimpleNamespace(**models)


def write_header(path, shapes):
    """A safetensors file whose tensors are declared but not there."""
    entries = {name: {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize(("family", "name"), CLIP_TOKENIZERS + OPEN_CLIP_TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("An astronaut  riding\na horse on MARS", [550, 18376, 6765, 320, 4558, 525, 7496]),
        ("hello, world.", [3306, 267, 1002, 269]),
        ("it's a café", [585, 568, 320, 15304]),
        ("", []),
    ],
)
def test_tokenizers_give_the_ids_of_clip(family, name, prompt, ids):
    tokenizer = CLIPTokenizer.from_pretrained(config_folder(family) / name)
    assert tokenizer(prompt).input_ids == [BOS, *ids, EOS]
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)


@pytest.mark.parametrize(("family", "name"), CLIP_TOKENIZERS)
def test_clip_pads_with_the_end_token(family, name):
    tokenizer = CLIPTokenizer.from_pretrained(config_folder(family) / name)
    assert tokenizer("! !! !!!").input_ids == [BOS, 256, 748, 995, EOS]
    ids = tokenizer("a cat", padding="max_length", truncation=True).input_ids
    assert ids == [BOS, 320, 2368, EOS] + [EOS] * 73


@pytest.mark.parametrize(("family", "name"), OPEN_CLIP_TOKENIZERS)
def test_open_clip_pads_with_zero_and_so_reads_exclamation_marks_as_padding(family, name):
    tokenizer = CLIPTokenizer.from_pretrained(config_folder(family) / name)
    assert tokenizer("! !! !!!").input_ids == [BOS, 0, 0, 0, 0, 0, 0, EOS]
    ids = tokenizer("a cat", padding="max_length", truncation=True).input_ids
    assert ids == [BOS, 320, 2368, EOS] + [0] * 73


def test_config_folder_is_written_once_even_when_asked_for_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(config_folder, ["sd15"] * 4))
    assert len(folders) == 1
    folder = folders.pop()
    assert [entry.name for entry in folder.parent.iterdir()] == ["sd15"]
    assert folder.parent.parent == tmp_path / "dti-fast"
    vocabulary = folder / "tokenizer" / "vocab.json"
    written = vocabulary.stat().st_mtime_ns
    assert config_folder("sd15") == folder
    assert vocabulary.stat().st_mtime_ns == written


def test_an_interrupted_config_folder_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(clip_vocabulary, "write_clip_vocabulary", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            config_folder("sd15")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (config_folder("sd15") / "tokenizer" / "vocab.json").is_file()


def test_unknown_family():
    with pytest.raises(ValueError, match=r"'sd3'.*sd15, sd21, sdxl"):
        config_folder("sd3")


@pytest.mark.parametrize("family", CONFIGS)
def test_full_size_models_have_the_published_parameter_counts(family):
    models = vars(full_size_components(family))
    assert {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()} == PARAMETERS[family]


@pytest.mark.parametrize(
    ("family", "name", "prediction"),
    [
        ("sd15", "PNDMScheduler", "epsilon"),
        ("sd21", "DDIMScheduler", "v_prediction"),
        ("sdxl", "EulerDiscreteScheduler", "epsilon"),
    ],
)
def test_schedulers(family, name, prediction):
    scheduler = getattr(diffusers, name).from_pretrained(config_folder(family) / "scheduler")
    assert scheduler.config.prediction_type == prediction
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


@pytest.mark.parametrize(("family", "factor"), [("sd15", 0.18215), ("sd21", 0.18215), ("sdxl", 0.13025)])
def test_latent_scale(family, factor):
    config = AutoencoderKL.load_config(config_folder(family) / "vae")
    assert config["scaling_factor"] == factor


@pytest.mark.parametrize("family", CONFIGS)
def test_tiny_pipeline_makes_an_image(family, tiny_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a photo of a dog on the beach", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (64, 64)
    assert len(image.getcolors(64 * 64)) > 100


@pytest.mark.parametrize("family", CONFIGS)
def test_tiny_tokenizers(family, tiny_folder):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder(family) / "tokenizer")
    words = tokenizer(WORDS, add_special_tokens=False).input_ids
    assert len(words) == len(set(words)) == len(WORDS.split())
    assert len(tokenizer("zxq").input_ids) == 5
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.pad_token_id == (0 if family == "sd21" else tokenizer.eos_token_id)


def test_tiny_pipeline_keeps_the_quirks_of_the_published_one(tiny_folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder("sdxl"), local_files_only=True)
    assert pipeline.text_encoder_2.config.eos_token_id == 2
    assert pipeline.tokenizer_2.pad_token_id == 0
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.vae.config.force_upcast


def test_tiny_pipeline_with_the_real_vocabulary(tmp_path):
    folder = save_tiny_pipeline("sdxl", tmp_path, real_vocabulary=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert pipeline.tokenizer_2("a cat").input_ids == [BOS, 320, 2368, EOS]
    assert pipeline.text_encoder.config.eos_token_id == EOS
    assert pipeline.text_encoder_2.get_input_embeddings().num_embeddings == 49408


@pytest.mark.parametrize("family", CONFIGS)
def test_tiny_single_file_round_trip(family, tiny_folder, tmp_path):
    """Another seed than the folder's: diffusers fills what a file lacks from the folder."""
    path = save_tiny_single_file(family, tmp_path / "model.safetensors", seed=1)
    assert identify_single_file(path) == family
    pipeline_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    loaded = pipeline_class.from_single_file(path, config=str(tiny_folder(family)), local_files_only=True)
    reference = DiffusionPipeline.from_pretrained(save_tiny_pipeline(family, tmp_path / "folder", seed=1))
    for name in PARAMETERS[family]:
        expected = getattr(reference, name).state_dict()
        actual = getattr(loaded, name).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_full_size_header_is_identified(family, tmp_path):
    state = original_state_dict(family, full_size_components(family))
    path = write_header(tmp_path / "model.safetensors", {name: tensor.shape for name, tensor in state.items()})
    assert identify_single_file(path) == family


UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (320, 8)}, "not a Stable Diffusion"),
        ({UNET_INPUT: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": (1280,)}, "not a Stable"),
        ({UNET_INPUT: (320, 9, 3, 3), "cond_stage_model.transformer.text_model.x": (1,)}, "takes 9 channels"),
        ({"cond_stage_model.transformer.text_model.x": (1,)}, "not a Stable Diffusion"),
    ],
    ids=["adapter", "refiner", "inpainting", "text encoder alone"],
)
def test_other_models_are_refused(shapes, message, tmp_path):
    path = write_header(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ValueError, match=message) as error:
        identify_single_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"PK\x03\x04" * 99, struct.pack("<Q", 50) + b"{", struct.pack("<Q", 2) + b"[]"]
)
def test_files_of_another_format_are_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        identify_single_file(path)


def test_a_diffusers_component_is_refused(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(320, 4, 3, 3)}, path)
    with pytest.raises(ValueError, match="in the original layout"):
        identify_single_file(path)
