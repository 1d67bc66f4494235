"""The command line as a user runs it: train, load in stock diffusers, generate."""

import json
import tomllib

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from runs import command, train_arguments
from safetensors.torch import load_file
from tiny import save_tiny_pipeline

ONE_ENCODER = ["learned_embeds.safetensors", "toy.safetensors"]
TWO_ENCODERS = ["learned_embeds.safetensors", "learned_embeds_2.safetensors", "toy.safetensors"]


@pytest.mark.parametrize(
    ("family", "settings", "files"),
    [
        (
            "sd15",
            {"num_validation_images": 1, "validation_prompt": "a {} on grass", "lr_scheduler": "cosine"},
            ONE_ENCODER,
        ),
        ("sd21", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, ONE_ENCODER),
        (
            "sdxl",
            {"initializer_token": "dog cat", "validation_prompt": "a {}", "num_validation_images": 1},
            TWO_ENCODERS,
        ),
    ],
)
def test_train_then_generate(tiny_pipelines, pictures, tmp_path, family, settings, files):
    out = tmp_path / "out"
    run = command(*train_arguments(tiny_pipelines[family], pictures, out, max_train_steps=12, **settings))
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(files)
    assert "--embedding" in run.stdout

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [10, 12]
    assert all(angle > 1 for angle in log[-1]["angle_degrees"])
    resolved = tomllib.loads((out / "config.toml").read_text())
    assert resolved["max_train_steps"] == 12
    assert resolved["initializer_token"] == settings.get("initializer_token", "dog")

    pipeline_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(tiny_pipelines[family])
    vectors = load_file(out / files[0])["<toy>"]
    words = pipeline.text_encoder.get_input_embeddings().weight.norm(dim=-1)
    expected = (words[words > 0].mean()).expand(len(vectors))
    torch.testing.assert_close(vectors.norm(dim=-1), expected, rtol=1e-5, atol=0)
    assert len(vectors) == (2 if family == "sdxl" else 1)
    pipeline.load_textual_inversion(out / files[0])
    if family == "sdxl":
        both = load_file(out / "toy.safetensors")
        assert {k: v.shape[0] for k, v in both.items()} == {"clip_l": 2, "clip_g": 2}
        second = load_file(out / files[1])
        assert torch.equal(second["<toy>"], both["clip_g"])
        pipeline.load_textual_inversion(second, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2)
    image = pipeline("a photo of <toy>", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)

    if settings.get("num_validation_images"):
        preview = Image.open(out / "preview.png")
        assert preview.height == 3 * (128 + 20 + 6) + 6  # pictures, the initializer, one prompt
        picture = tmp_path / "p.png"
        made = command("generate", "--embedding", out, "--prompt", "a photo of {}", "--output", picture,
                        "--num_images", "1", "--num_inference_steps", "2")  # fmt: skip
        assert made.returncode == 0, made.stderr
        if family == "sd15":  # what stock diffusers draws
            assert Image.open(picture).tobytes() == image.tobytes()


def test_real_vocabulary_captions_and_config_file(pictures, tmp_path):
    """The 49,408-entry tokenizer, captions, a TOML file overridden by a flag, dashes for underscores."""
    model = save_tiny_pipeline("sdxl", tmp_path / "model", real_vocabulary=True)
    (tmp_path / "pictures").mkdir()
    for path in pictures.iterdir():
        (tmp_path / "pictures" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "pictures" / path.with_suffix(".txt").name).write_text("a stuffed animal called {} on a sofa")
    config = tmp_path / "run.toml"
    config.write_text(
        f'pretrained_model_name_or_path = "{model}"\ntrain_data_dir = "{tmp_path / "pictures"}"\n'
        'placeholder_token = "<toy>"\ninitializer_token = "stuffed animal"\nmax_train_steps = 9\n'
        f'num_validation_images = 0\nseed = 3\noutput_dir = "{tmp_path / "out"}"\n'
    )
    run = command("train", "--config", config, "--max-train-steps", "3", "--magnitude", "class")
    assert run.returncode == 0, run.stderr
    resolved = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (resolved["max_train_steps"], resolved["seed"], resolved["magnitude"]) == (3, 3, "class")
    learned = load_file(tmp_path / "out" / "toy.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    for key, encoder in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2)):
        words = encoder.get_input_embeddings().weight[pipeline.tokenizer("stuffed animal").input_ids[1:3]]
        torch.testing.assert_close(learned[key].norm(dim=-1), words.norm(dim=-1), rtol=1e-5, atol=0)
    again = command("train", "--config", tmp_path / "out" / "config.toml", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    repeated = load_file(tmp_path / "again" / "toy.safetensors")
    assert all(torch.equal(learned[k], repeated[k]) for k in learned)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(tiny_pipelines, pictures, tmp_path, precision):
    """A frozen model in 16 bits; the direction stays float32 and its norm exact."""
    run = command(
        *train_arguments(
            tiny_pipelines["sdxl"],
            pictures,
            tmp_path,
            max_train_steps=10,
            mixed_precision=precision,
            num_vectors=2,
            num_validation_images=1,
            validation_prompt="a {}",
        )
    )
    assert run.returncode == 0, run.stderr
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    for name, magnitude, angle in zip(TWO_ENCODERS, last["magnitude"], last["angle_degrees"], strict=False):
        learned = load_file(tmp_path / name)["<toy>"]
        assert learned.dtype == torch.float32
        torch.testing.assert_close(learned.norm(dim=-1), torch.full((2,), magnitude), rtol=1e-5, atol=0)
        assert angle > 1
