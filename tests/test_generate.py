"""Pictures from several concepts at once, and the clashes that are refused."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import command, refused

from dti_fast.commands.blend import blend
from dti_fast.commands.generate import generate
from dti_fast.drawing import DrawSettings
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
    run = command("generate", "--embedding", paths["a"], "--embedding", paths["b"], "--prompt", prompt,
                   "--output", output, "--num_images", "1", "--num_inference_steps", "2", "--seed", "3")  # fmt: skip
    assert run.returncode == 0, run.stderr
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    pipeline.load_textual_inversion([vectors["a"], vectors["b"][0]], token=["<a>", "<b>"])
    image = pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    assert Image.open(output).tobytes() == image.tobytes()

    run = command("generate", "--embedding", paths["a"], "--embedding", paths["a"], "--prompt", "a <a>")
    refused(run, "both call themselves <a>")
    assert "--token" in run.stderr


def test_refusals(concepts, tmp_path):
    vectors, paths = concepts
    output = tmp_path / "out.png"
    with pytest.raises(UserError, match="write their tokens into the prompt"):
        generate(prompt=["a {}"], embedding=list(paths.values()), output=output)
    # <a> has two vectors, so diffusers calls the second <a>_1.
    write_single_file(tmp_path / "c.safetensors", [vectors["b"]], {"token": "<a>_1"})
    with pytest.raises(UserError, match="both call themselves <a>_1"):
        generate(prompt=["a <a>"], embedding=[paths["a"], tmp_path / "c.safetensors"], output=output)
    metadata = {"token": "dog</w>", "base_model": str(paths)}
    write_single_file(tmp_path / "c.safetensors", [vectors["b"]], metadata)
    with pytest.raises(UserError, match="which is not on this machine"):
        generate(prompt=["a {}"], embedding=[tmp_path / "c.safetensors"], output=output)
    with pytest.raises(UserError, match="between 1 and 1000, got 1001"):
        settings = DrawSettings(num_inference_steps=1001)
        generate(prompt=["a <a>"], embedding=[paths["a"]], output=output, settings=settings)
    with pytest.raises(UserError, match=r"must be a \.png file, got"):
        generate(prompt=["a <a>"], embedding=[paths["a"]], output=tmp_path / "out.jpg")
    with pytest.raises(UserError, match=r"there is no folder .*; make it first"):
        generate(prompt=["a <a>"], embedding=[paths["a"]], output=tmp_path / "new" / "out.png")
    with pytest.raises(UserError, match="--token must be one word"):
        blend(paths["a"], paths["a"], save=0.5, token="two words", output=output)
    write_single_file(tmp_path / "c.safetensors", [vectors["b"]], {"token": "<c>"})
    with pytest.raises(UserError, match="does not say which model it is for: give --pretrained_model_name_or_path"):
        generate(prompt=["a {}"], embedding=[tmp_path / "c.safetensors"], output=output)
    assert not list(tmp_path.glob("out*"))


def test_a_concept_that_the_text_encoder_does_not_see_is_told(concepts, tmp_path):
    prompts, settings = ["dog " * 74 + "{}", "dog " * 73 + "{}"], DrawSettings(num_images=1, num_inference_steps=2)
    with pytest.warns(UserWarning, match="<a> lies beyond the 77 tokens") as caught:
        generate(prompt=prompts, embedding=[concepts[1]["a"]], output=tmp_path / "out.png", settings=settings)
    assert len(caught) == 1


def test_a_token_that_is_a_word(tiny_pipelines, concepts, tmp_path):
    path, settings = tmp_path / "c.safetensors", DrawSettings(pretrained_model_name_or_path=str(tiny_pipelines["sd15"]))
    write_single_file(path, [concepts[0]["b"]], {"token": "dog</w>"})
    with pytest.raises(UserError, match="is a word of this model already"):
        generate(prompt=["a {}"], embedding=[path], output=tmp_path / "out.png", settings=settings)


def cells(sheet, side=128, gap=6, label=20):
    """The pictures of a sheet, as rows of arrays; a picture of 64 pixels is drawn twice as large."""
    pixels = np.asarray(Image.open(sheet))
    return [
        [pixels[y : y + side : 2, x : x + side : 2] for x in range(gap, pixels.shape[1] - side + 1, side + gap)]
        for y in range(gap + label, pixels.shape[0] - side + 1, side + label + gap)
    ]


def test_picture_i_depends_on_seed_plus_i_alone(tiny_pipelines, concepts, tmp_path):
    """Neither on the seed that the row began with nor on how many there are, nor on the rows before."""
    _, paths = concepts

    def sheet(prompts, seed, count):
        settings = DrawSettings(num_images=count, num_inference_steps=2, seed=seed)
        generate(prompt=prompts, embedding=[paths["b"]], output=tmp_path / "out.png", settings=settings)
        return [row[:count] for row in cells(tmp_path / "out.png")]

    (three,) = sheet(["a <b>"], 7, 3)
    _, two = sheet(["a <b> on grass", "a <b>"], 8, 2)
    assert all(np.array_equal(a, b) for a, b in zip(three[1:], two, strict=True))
    assert not np.array_equal(three[0], three[1]) and not np.array_equal(three[1], three[2])


def test_every_picture_of_a_blend_has_the_noise_of_its_row(tiny_pipelines, concepts, tmp_path):
    """Row i from seed + i: the ends are what `generate` draws of the concepts, and the next row the next seed's."""
    vectors, _ = concepts
    other = tmp_path / "other.safetensors"
    write_single_file(other, [-vectors["b"].roll(1)], {"token": "<c>", "base_model": str(tiny_pipelines["sd15"])})
    first = concepts[1]["b"]

    def strip(seed, count):
        settings = DrawSettings(num_images=count, num_inference_steps=2, seed=seed)
        blend(first, other, prompt=["a {}"], steps=3, output=tmp_path / "strip.png", settings=settings)
        return [row[:3] for row in cells(tmp_path / "strip.png")]

    two = strip(4, 2)
    (later,) = strip(5, 1)
    assert all(np.array_equal(a, b) for a, b in zip(two[1], later, strict=True))
    assert not np.array_equal(two[0][0], two[1][0])
    for end, path in ((0, first), (-1, other)):
        settings = DrawSettings(num_images=2, num_inference_steps=2, seed=4)
        generate(prompt=["a {}"], embedding=[path], output=tmp_path / "end.png", settings=settings)
        (drawn,) = cells(tmp_path / "end.png")
        assert all(np.array_equal(row[end], picture) for row, picture in zip(two, drawn[:2], strict=True))
