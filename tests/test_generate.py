"""Pictures from several concepts at once, and the clashes that are refused."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from dti_fast.generate import blend_concepts, generate_pictures
from PIL import Image
from runs import dti_fast, refused

from dti_fast.errors import UserError
from dti_fast.formats import write_single_file


@pytest.fixture
def concepts(tiny_pipelines, tmp_path):
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(count, 32, generator=generator) for name, count in (("a", 2), ("b", 1))}
    paths = {name: tmp_path / f"{name}.safetensors" for name in vectors}
    for name, tensor in vectors.items():
        metadata = {"token": f"<{name}>", "base_model": str(tiny_pipelines["sd15"])}
        write_single_file(paths[name], [tensor], metadata)
    return vectors, paths


def test_two_concepts_in_one_prompt_are_what_stock_diffusers_draws(tiny_pipelines, concepts, tmp_path):
    vectors, paths = concepts
    prompt, output = "a <a> with a <b>", tmp_path / "out.png"
    run = dti_fast("generate", "--embedding", paths["a"], "--embedding", paths["b"], "--prompt", prompt,
                   "--output", output, "--num_images", "1", "--num_inference_steps", "2", "--seed", "3")  # fmt: skip
    assert run.returncode == 0, run.stderr
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    pipeline.load_textual_inversion([vectors["a"], vectors["b"][0]], token=["<a>", "<b>"])
    image = pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    assert Image.open(output).tobytes() == image.tobytes()

    run = dti_fast("generate", "--embedding", paths["a"], "--embedding", paths["a"], "--prompt", "a <a>")
    refused(run, "both call themselves <a>")
    assert "--token" in run.stderr


def test_refusals(concepts, tmp_path):
    vectors, paths = concepts
    output = tmp_path / "out.png"
    with pytest.raises(UserError, match="write their tokens into the prompt"):
        generate_pictures(["a {}"], list(paths.values()), output)
    # <a> has two vectors, so diffusers calls the second <a>_1.
    write_single_file(tmp_path / "c.safetensors", [vectors["b"]], {"token": "<a>_1"})
    with pytest.raises(UserError, match="both call themselves <a>_1"):
        generate_pictures(["a <a>"], [paths["a"], tmp_path / "c.safetensors"], output)
    metadata = {"token": "dog</w>", "base_model": str(paths)}
    write_single_file(tmp_path / "c.safetensors", [vectors["b"]], metadata)
    with pytest.raises(UserError, match="there is no model"):
        generate_pictures(["a {}"], [tmp_path / "c.safetensors"], output)
    with pytest.raises(UserError, match="between 1 and 1000, got 1001"):
        generate_pictures(["a <a>"], [paths["a"]], output, num_inference_steps=1001)
    with pytest.raises(UserError, match="--token must be one word"):
        blend_concepts(paths["a"], paths["a"], [], output, save=0.5, token="two words")
    assert not list(tmp_path.glob("out*"))


def test_a_token_that_is_a_word(tiny_pipelines, concepts, tmp_path):
    write_single_file(tmp_path / "c.safetensors", [concepts[0]["b"]], {"token": "dog</w>"})
    with pytest.raises(UserError, match="is a word of this model already"):
        generate_pictures(
            ["a {}"], [tmp_path / "c.safetensors"], tmp_path / "out.png", model=str(tiny_pipelines["sd15"])
        )
