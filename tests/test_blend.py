"""Blends between two concepts: endpoints, constant speed, norms, refusals, and the strip that is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import dti_fast, refused

from dti_fast import sphere
from dti_fast.blend import blend
from dti_fast.commands.blend import blend as draw_blend
from dti_fast.commands.generate import generate
from dti_fast.drawing import DrawSettings
from dti_fast.errors import UserError
from dti_fast.formats import read_embeddings, write_diffusers, write_single_file


def concept(seed, count=2, widths=(32, 48), scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(count, width, generator=generator) for width in widths]


def test_endpoints_are_exact():
    a, b = concept(0), concept(1, scale=7)
    for t, expected in ((0, a), (1, b), (0.0, a), (1.0, b)):
        assert all(map(torch.equal, blend(a, b, t), expected))
    opposite_zero = [torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 3.0]])]
    assert torch.equal(blend(*opposite_zero, 1)[0], opposite_zero[1][0])


@pytest.mark.parametrize("t", [0.125, 0.5, 0.9])
def test_each_vector_turns_at_constant_speed_and_scales_at_a_constant_rate(t):
    a, b = concept(0), concept(1, scale=7)
    for x, y, z in zip(a, b, blend(a, b, t), strict=True):
        assert z.dtype == torch.float32
        unit = [v.double() / v.double().norm(dim=-1, keepdim=True) for v in (x, y, z)]
        torch.testing.assert_close(
            sphere.distance(unit[0], unit[2]), t * sphere.distance(unit[0], unit[1]), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            sphere.distance(unit[2], unit[1]), (1 - t) * sphere.distance(unit[0], unit[1]), rtol=1e-6, atol=0
        )
        logs = [v.double().norm(dim=-1).log() for v in (x, y, z)]
        torch.testing.assert_close(logs[2], (1 - t) * logs[0] + t * logs[1], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_blended_is_a_clear_error():
    a = concept(0)
    for other, message in (
        (concept(1, count=3), "2 and 3 vectors"),
        (concept(1, widths=(32,)), "different kinds of models"),
        ([-v for v in a], "opposite"),
        ([0 * v for v in a], "norm 0"),
    ):
        with pytest.raises(UserError, match=message):
            blend(a, other, 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        blend(a, concept(1), 1.5)


def test_the_strip_begins_and_ends_with_the_concepts_themselves(tiny_pipelines, tmp_path, capsys):
    model = str(tiny_pipelines["sd15"])
    for name, seed in (("a", 0), ("b", 1)):
        write_single_file(tmp_path / f"{name}.safetensors", concept(seed, 2, (32,)), {"token": f"<{name}>"})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    settings = {"pretrained_model_name_or_path": model, "num_inference_steps": 2, "seed": 5}
    prompt, output = ["a {} on grass"], tmp_path / "strip.png"
    draw_blend(a, b, prompt=prompt, output=output, steps=3, settings=DrawSettings(num_images=2, **settings))
    angle, _, paths = capsys.readouterr().out.partition("° lie between the two; wrote ")
    assert paths.strip() == str(output)
    assert 30 < float(angle) < 150
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape[:2] == (2 * (128 + 20 + 6) + 6, 480)
    for column, path in ((0, a), (2, b)):
        one = DrawSettings(num_images=1, **settings)
        generate(prompt=prompt, embedding=[path], output=tmp_path / "one.png", settings=one)
        expected = np.asarray(Image.open(tmp_path / "one.png")).repeat(2, 0).repeat(2, 1)
        left = 6 + column * (128 + 6)
        assert np.array_equal(strip[26 : 26 + 128, left : left + 128], expected)


def test_command_line(tiny_pipelines, tmp_path):
    """SDXL: a strip and a saved blend between a folder and a single file; bad input is one line and exit code 2."""
    a, b = concept(0), concept(1, scale=3)
    (tmp_path / "a").mkdir()
    write_diffusers(tmp_path / "a", "<a>", a, {"token": "<a>", "base_model": str(tiny_pipelines["sdxl"])})
    write_single_file(tmp_path / "b.safetensors", b, {"token": "<b>"})
    run = dti_fast("blend", tmp_path / "a", tmp_path / "b.safetensors", "--prompt", "a {}", "--prompt", "{} in snow",
                   "--steps", "2", "--num_inference_steps", "1", "--save", "0.25", "--token", "<ab>",
                   "--output", tmp_path / "ab.png")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "ab.png").height == 2 * (128 + 20 + 6) + 6
    saved, metadata = read_embeddings(tmp_path / "ab-0.25.safetensors")
    assert all(map(torch.equal, saved, blend(a, b, 0.25)))
    assert (metadata["token"], metadata["base_model"]) == ("<ab>", str(tiny_pipelines["sdxl"]))

    write_single_file(tmp_path / "three.safetensors", concept(2, 3), {})
    run = dti_fast("blend", tmp_path / "a", tmp_path / "three.safetensors", "--save", "0.5", cwd=tmp_path)
    refused(run, "error: the concepts have 2 and 3 vectors")
    assert not list(tmp_path.glob("blend*"))


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "give --prompt for a picture, --save for a file"),
        ([], {"save": 1.5}, "between 0 and 1"),
        (["a {}"], {"steps": 1}, "--steps must be at least 2"),
        (["a {}"], {"output": "strip.jpg"}, "must be a .png file"),
        (["a {}"], {"settings": DrawSettings(pretrained_model_name_or_path="no such model")}, "there is no model"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(tmp_path, prompts, settings, message):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, path in enumerate(paths):
        write_single_file(path, concept(i), {})
    output = tmp_path / settings.pop("output", "strip.png")
    with pytest.raises(UserError, match=message):
        draw_blend(*paths, prompt=prompts, output=output, **settings)
    assert sorted(tmp_path.iterdir()) == paths
