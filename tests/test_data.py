"""Pictures, captions, cached moments."""

import pytest
import torch
from PIL import Image

from dti_fast.backbones.load import load_backbone
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.data.prompts import training_prompts
from dti_fast.data.templates import TEMPLATES
from dti_fast.errors import UserError


def test_pictures_are_turned_resized_and_cropped(tmp_path):
    image = Image.new("RGB", (120, 60), "red")
    image.paste("blue", (0, 0, 60, 60))  # blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: blue on top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, sizes = load_pictures(find_pictures(tmp_path), 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert sizes.tolist() == [[120, 60, 16, 0, 32, 32]]
    assert pixels[0, 2, 2].mean() > 0.9 > -0.9 > pixels[0, 2, -3].mean()


def test_transparency_becomes_white_and_grey_becomes_colour(tmp_path):
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (40, 40), 0).save(tmp_path / "b.png")
    pixels, _ = load_pictures(find_pictures(tmp_path), 32)
    assert torch.equal(pixels[0], torch.ones(3, 32, 32))
    assert torch.equal(pixels[1], -torch.ones(3, 32, 32))


def test_hidden_and_foreign_files_are_ignored_and_broken_ones_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "._good.png").write_bytes(b"apple")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty.jpg").touch()
    with pytest.warns(UserWarning, match=r"skipping empty\.jpg"):
        assert [p.path.name for p in find_pictures(tmp_path)] == ["good.png"]
    (tmp_path / "good.png").unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"broken: empty\.jpg"):
        find_pictures(tmp_path)


def test_captions_and_templates(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    assert training_prompts(find_pictures(tmp_path), "<x>", "object")[1] is False
    assert len(TEMPLATES["object"]) == 27
    assert len(TEMPLATES["style"]) == 19
    (tmp_path / "a.txt").write_text("a {} on a chair\n")
    (tmp_path / "b.txt").write_text("my <x> at home")
    prompts, per_picture = training_prompts(find_pictures(tmp_path), "<x>", "object")
    assert prompts == ["a <x> on a chair", "my <x> at home", "a photo of a <x>"]
    assert per_picture
    (tmp_path / "b.txt").write_text("a chair")
    with pytest.raises(UserError, match=r"no '<x>' in b\.txt"):
        training_prompts(find_pictures(tmp_path), "<x>", "object")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf{} at home")  # a byte-order mark is no part of the caption
    assert training_prompts(find_pictures(tmp_path), "<x>", "object")[0][1] == "<x> at home"
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 {}")
    with pytest.raises(UserError, match=r"b\.txt' is not UTF-8"):
        find_pictures(tmp_path)


def test_moments_have_the_distribution_of_encoding_anew(tiny_pipelines):
    backbone = load_backbone(str(tiny_pipelines["sd15"]), torch.float32, torch.device("cpu"))
    vae = backbone.vae
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_moments(backbone, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        anew = posterior.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    torch.testing.assert_close(mean + std * noise, anew, atol=1e-5, rtol=1e-4)
