"""Pictures, captions, cached moments."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from runs import dti_fast, refused, train_arguments, write_pictures

from dti_fast.backbones.load import load_backbone
from dti_fast.data.folder import SUFFIXES, Ignored, find_pictures, ignored_files, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.data.prompts import training_prompts
from dti_fast.data.templates import TEMPLATES
from dti_fast.errors import UserError
from dti_fast.files import write_text


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
    with pytest.warns(UserWarning, match=r"no '<x>' in b\.txt: the concept learns nothing there"):
        prompts, _ = training_prompts(find_pictures(tmp_path), "<x>", "object")
    assert prompts == ["a <x> on a chair", "a chair", "a photo of a <x>"]
    (tmp_path / "a.txt").write_text("a table")
    with pytest.raises(UserError, match=r"no '<x>' in a\.txt, b\.txt"):
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


def ramp(dtype, top):
    return np.tile(np.linspace(0, top, 64), (64, 1)).astype(dtype)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", ramp(np.uint16, 65535)),
        ("16.tif", ramp(np.uint16, 65535)),
        ("32.tif", ramp(np.int32, 65535)),
        ("most.tif", ramp(np.int32, 2**31 - 128)),
        ("one.tif", ramp(np.float32, 1)),
        ("float.tif", ramp(np.float32, 255)),
        ("high.tif", ramp(np.float32, 1e6) - 1),
    ],
)
def test_more_than_eight_bits_keep_their_tones(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    pixels, _ = load_pictures(find_pictures(tmp_path), 64)
    expected = torch.linspace(-1, 1, 64)
    assert (pixels[0, :, 5] - expected).abs().max() < 1.5 / 127.5


def test_floats_that_are_no_numbers(tmp_path):
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif' holds values that are not finite"):
        load_pictures(find_pictures(tmp_path), 64)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".jp2", ".avif"])
def test_other_endings_of_pictures(tmp_path, suffix):
    assert suffix in SUFFIXES
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {suffix}")
    Image.new("RGB", (40, 40), "red").save(tmp_path / f"a{suffix}")
    assert load_pictures(find_pictures(tmp_path), 32)[0][0, 0].mean() > 0.9


def test_captions_of_any_ending(tmp_path):
    for name, caption in (("a", "a.TXT"), ("b", "b.Txt"), ("c.d", "c.d.txt")):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
        (tmp_path / caption).write_text(f"{name} {{}}")
    assert [p.caption for p in find_pictures(tmp_path)] == ["a {}", "b {}", "c.d {}"]
    (tmp_path / "a.txt").write_text("lower {}")  # of two, the usual name
    assert find_pictures(tmp_path)[0].caption == "lower {}"


def test_what_is_ignored_is_named(tmp_path):
    write_pictures(tmp_path, 1)
    for name in ("a.heic", "0.caption", "metadata.jsonl", "lost.txt", "notes.md", ".hidden", "0.txt"):
        (tmp_path / name).write_text("{}")
    for name in ("0-masklabel.png", "0_mask.png", "sun_mask.png"):
        Image.new("L", (40, 40)).save(tmp_path / name)
    write_pictures(tmp_path / "10_dog", 2)
    (tmp_path / "empty").mkdir()
    captions = "captions are read from a .txt beside each picture"
    assert ignored_files(tmp_path, find_pictures(tmp_path)) == [
        Ignored("0-masklabel.png", "a mask; masks are not used"),
        Ignored("0.caption", captions),
        Ignored("0_mask.png", "a mask; masks are not used"),
        Ignored("10_dog", "a folder with 2 pictures; move them up, or name it"),
        Ignored("a.heic", "not read by Pillow; save it as JPEG or PNG"),
        Ignored("lost.txt", "a caption without a picture of its name"),
        Ignored("metadata.jsonl", captions),
        Ignored("notes.md", "no picture"),
    ]
    assert [p.path.name for p in find_pictures(tmp_path)] == ["0.png", "sun_mask.png"]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no pictures .*10_dog: a folder with 2 pictures"):
        find_pictures(tmp_path)


def test_a_run_s_previews_are_no_pictures(tmp_path):
    """The output folder may be that of the pictures, and the next run must not learn from the last one's previews."""
    write_pictures(tmp_path, 1)
    for name in ("preview.png", "preview-000100.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    assert len(find_pictures(tmp_path)) == 3
    for name in ("log.jsonl", "config.toml"):
        (tmp_path / name).touch()
    assert [p.path.name for p in find_pictures(tmp_path)] == ["0.png"]


def test_names_of_any_bytes(tiny_pipelines, tmp_path):
    """A picture trains whatever its file is called; a folder that config.toml could not name is refused."""
    folder, out = write_pictures(tmp_path / "pictures", 1), tmp_path / "out"
    (folder / "0.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    (folder / os.fsdecode(b"br\xfb.png")).write_bytes(b"no picture")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a {}")
    (folder / os.fsdecode(b"\xe9.md")).touch()
    assert [i.name for i in ignored_files(folder, find_pictures(folder))] == ["\\udce9.md", "br\\udcfb.png"]
    run = dti_fast(*train_arguments(tiny_pipelines["sd15"], folder, out, max_train_steps=2, num_validation_images=1))
    assert run.returncode == 0, run.stderr
    assert "warning: skipping br\\udcfb.png" in run.stderr
    other = folder.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    run = dti_fast(*train_arguments(tiny_pipelines["sd15"], other, tmp_path / "other", max_train_steps=2))
    refused(run, "is not UTF-8 text; rename it", tmp_path / "other")
    with pytest.raises(UserError, match=r"config.toml cannot hold 'output_dir = \"out.udce9\"', which is not UTF-8"):
        write_text('a = 1\noutput_dir = "out\udce9"\nb = 2', tmp_path / "config.toml")
    assert not (tmp_path / "config.toml").exists()


def test_a_caption_without_the_concept_trains(tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "0.txt").write_text("a {} on grass")
    (folder / "1.txt").write_text("a chair")
    run = dti_fast(*train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out", max_train_steps=4))
    assert run.returncode == 0, run.stderr
    assert "warning: no '<toy>' in 1.txt" in run.stderr
