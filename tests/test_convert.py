"""Other tools' embedding files, read, written in the two layouts, and loaded into stock pipelines."""

import base64
import json
import os
import warnings
import zlib

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, PngImagePlugin
from runs import dti_fast, refused
from safetensors.torch import load_file, save_file

from dti_fast.commands.convert import convert
from dti_fast.commands.inspect import inspect
from dti_fast.drawing import pick_model
from dti_fast.errors import UserError
from dti_fast.formats import read_embedding_file, read_embeddings, write_single_file

L, G = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.randn(2, 48) / 3
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": L}, "name": "My Dog", "step": 500}
OLD_A1111 = {**A1111, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(L)})}

# File name, contents, the token it should get, the tensors expected, keys that are ignored.
LAYOUTS = {
    "kohya": ("my dog.safetensors", {"emb_params": L}, "<my-dog>", [L], []),
    "onetrainer": ("x.safetensors", {"emp_params": L, "emp_params_out": L + 1}, "<x>", [L], ["emp_params_out"]),
    "diffusers": ("any.safetensors", {"<dog>": L[0]}, "<dog>", [L[:1]], []),
    "sdxl": ("X.safetensors", {"clip_g": G, "clip_l": L}, "<x>", [L, G], []),
    "onetrainer sdxl": (
        "x.safetensors", {"clip_g": G, "clip_l": L, "clip_g_out": G, "clip_l_out": L}, "<x>", [L, G],
        ["clip_g_out", "clip_l_out"],
    ),
    "cog": ("x.safetensors", {"text_encoders_1": G, "text_encoders_0": L}, "<x>", [L, G], []),
    "half": ("x.safetensors", {"clip_g": G.half(), "clip_l": L.half()}, "<x>", [L.half(), G.half()], []),
    "a1111": ("x.pt", A1111, "<my-dog>", [L], []),
    "old a1111": ("x.pt", OLD_A1111, "<my-dog>", [L], []),
    "diffusers pickle": ("learned_embeds.bin", {"<dog>": L[0]}, "<dog>", [L[:1]], []),
    "kohya pickle": ("x.pt", {"clip_g": G, "clip_l": L}, "<x>", [L, G], []),
    "brackets in the name": ("<My Dog>.safetensors", {"emb_params": L}, "<my-dog>", [L], []),
    "brackets in a1111's name": ("x.pt", {**A1111, "name": "<dog>"}, "<dog>", [L], []),
    "crossinit": ("x.bin", {"<dog_0>": L[0], "<dog_1>": L[1]}, "<dog>", [L], []),
    "a key for each token": ("x.safetensors", {"<dog>_1": L[1], "<dog>": L[0]}, "<dog>", [L], []),
    "a1111 list": ("x.pt", [{"a": L[:1], "g": G[0]}, {"b": L[1], "h": G[1:]}], "<x>", [L, G], []),
    "a1111 list of one": ("x.pt", [{"a": L[:1]}, {"b": L[1]}], "<x>", [L], []),
    "onetrainer lora": (
        "x.safetensors",
        {"lora_unet.down": L, "bundle_emb.dog.clip_l": L, "bundle_emb.dog.clip_g": G, "bundle_emb.dog.clip_l_out": L},
        "<dog>", [L, G], ["clip_l_out"],
    ),
    "kohya lora": ("x.safetensors", {"lora_unet.down": L, "bundle_emb.dog.emb_params": L}, "<dog>", [L], []),
    "a1111 lora": ("x.safetensors", {"bundle_emb.Dog.string_to_param.*": L}, "<dog>", [L], []),
}  # fmt: skip


def write(folder, name, contents):
    path = folder / name
    if contents is None:
        Image.new("RGB", (40, 30), "red").save(path)
    elif path.suffix == ".safetensors":
        save_file({k: v.clone() for k, v in contents.items()}, path)
    else:
        torch.save(contents, path)
    return path


def same(a, b):
    return [v.dtype for v in a] == [v.dtype for v in b] and all(map(torch.equal, a, b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_either_of_ours(tmp_path, layout):
    name, contents, token, expected, ignored = LAYOUTS[layout]
    path = write(tmp_path, name, contents)
    file = read_embedding_file(path, allow_pickle=True)
    assert same(file.vectors.values(), expected)
    assert (file.metadata["token"], file.ignored) == (token, ignored)
    for target in (tmp_path / "out.safetensors", tmp_path / "folder"):
        convert(path, target, allow_pickle=True)
        read, metadata = read_embeddings(target)
        assert same(read, expected)
        assert metadata["token"] == token
    written = sorted((tmp_path / "folder").iterdir())
    assert [p.name for p in written] == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"][: len(expected)]
    assert [list(load_file(p)) for p in written] == [[token]] * len(expected)
    keys = ["emb_params"] if len(expected) == 1 else ["clip_g", "clip_l"]
    assert sorted(load_file(tmp_path / "out.safetensors")) == keys


def test_stock_diffusers_reads_what_it_wrote(tiny_pipelines, tmp_path):
    """A OneTrainer file and an SDXL pair through `convert`: text features are those of the tensors loaded directly."""
    source = write(tmp_path, "x.safetensors", {"emp_params": L, "emp_params_out": L})
    convert(source, tmp_path / "one.safetensors", token="<d>")
    convert(source, tmp_path / "folder", token="<d>")
    states = []
    for loaded in (
        lambda p: p.load_textual_inversion({"<d>": L}),
        lambda p: p.load_textual_inversion(tmp_path / "folder"),
        lambda p: p.load_textual_inversion(tmp_path / "one.safetensors", token="<d>"),
    ):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
        loaded(pipeline)
        states.append(pipeline.encode_prompt("a <d> on grass", "cpu", 1, False)[0])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])

    source = write(tmp_path, "y.safetensors", {"text_encoders_0": L, "text_encoders_1": G})
    convert(source, tmp_path / "xl.safetensors")
    convert(source, tmp_path / "xl", token="<d>")
    single = load_file(tmp_path / "xl.safetensors")
    states = []
    for first, second in (
        ({"<d>": L}, {"<d>": G}),
        ({"<d>": single["clip_l"]}, {"<d>": single["clip_g"]}),
        (tmp_path / "xl" / "learned_embeds.safetensors", tmp_path / "xl" / "learned_embeds_2.safetensors"),
    ):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"])
        pipeline.load_textual_inversion(first)
        pipeline.load_textual_inversion(second, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2)
        states.append(pipeline.encode_prompt("a <d> on grass", device="cpu", do_classifier_free_guidance=False))
    for features, pooled in ((state[0], state[2]) for state in states[1:]):
        assert torch.equal(features, states[0][0])
        assert torch.equal(pooled, states[0][2])


@pytest.mark.parametrize("norm", ["mean", "max", 0.25])
def test_renorm_sets_the_norm_and_keeps_the_direction(tiny_pipelines, tmp_path, norm):
    source = write(tmp_path, "strong.safetensors", {"clip_l": 40 * L, "clip_g": 90 * G})
    model = str(tiny_pipelines["sdxl"])
    convert(source, tmp_path / "weak.safetensors", renorm=norm, pretrained_model_name_or_path=model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    vectors, _ = read_embeddings(tmp_path / "weak.safetensors")
    for after, before, encoder in zip(vectors, (L, G), (pipeline.text_encoder, pipeline.text_encoder_2), strict=True):
        words = encoder.get_input_embeddings().weight.double().norm(dim=-1)
        expected = norm if isinstance(norm, float) else getattr(words[words > 0], norm)().item()
        assert after.double().norm(dim=-1).tolist() == pytest.approx([expected] * 2, rel=1e-6)
        cosine = torch.cosine_similarity(after.double(), before.double(), dim=-1)
        assert cosine.tolist() == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "contents", "settings", "message"),
    [
        ("x.safetensors", {"a": L, "b": L}, {}, "is no embedding file: its keys are a, b"),
        ("x.safetensors", {"clip_l": L, "clip_g": G[:1]}, {}, "different number of vectors"),
        ("x.safetensors", {"clip_l": L, "clip_g": G, "t5xxl": L}, {}, "text encoder T5-XXL"),
        ("x.safetensors", {"t5": L}, {}, "text encoder T5-XXL"),
        ("x.safetensors", {"qwen3_4b": L}, {}, "text encoder Qwen3 4B"),
        ("x.safetensors", {"clip_l": L, "mistral3_24b": L}, {}, "text encoder Mistral 3 24B"),
        ("x.safetensors", {"emp_params_out": L}, {}, "holds output embeddings alone (emp_params_out)"),
        ("x.safetensors", {"clip_l_out": L, "clip_g_out": G}, {}, "holds output embeddings alone"),
        ("x.safetensors", {"bundle_emb.a.clip_l": L, "bundle_emb.b.clip_l": L}, {}, "bundles several embeddings, a, b"),
        ("x.safetensors", {"bundle_emb.a.clip_l": L}, {"name": "b"}, "bundles no embedding 'b', but a"),
        ("x.safetensors", {"<d>": L}, {"name": "b"}, "is no LoRA that bundles embeddings"),
        ("x.safetensors", {"IN01": L[0], "OUT01": L[0]}, {}, "its keys are IN01, OUT01"),
        ("x.safetensors", {"<d>": L}, {"token": "x" * 101}, "--token is 101 bytes long"),
        ("x.safetensors", {"<d>": L}, {"token": "<{}>"}, "must not hold {}"),
        ("x.safetensors", {"emb_params": L * torch.nan}, {}, "not finite"),
        ("x.safetensors", {"<d>": L.reshape(2, 4, 8)}, {}, "shape [2, 4, 8]"),
        ("x.safetensors", {"<d>": L.long()}, {}, "torch.int64"),
        ("x.safetensors", {"<d>": L}, {"renorm": "mean"}, "--renorm mean needs the model"),
        ("x.safetensors", {"<d>": L}, {"renorm": -1.0}, "must be positive"),
        ("x.safetensors", {"<d>": L * 0}, {"renorm": 1.0}, "norm 0"),
        ("x.safetensors", {"<d>": L}, {"token": "two words"}, "--token must be one word"),
        ("x.pt", A1111, {}, "is a pickle, which is not read unasked"),
        ("x.pt", {"<d>": print}, {"allow_pickle": True}, "more than plain weights"),
        ("x.pt", [L], {"allow_pickle": True}, "it holds a list"),
        ("x.png", None, {}, "there is no embedding in the picture"),
        ("x.pt", {"state": {}}, {"allow_pickle": True}, "is no embedding file"),
    ],
)
def test_what_cannot_be_converted_is_a_clear_error(tmp_path, name, contents, settings, message):
    path = write(tmp_path, name, contents)
    with pytest.raises(UserError) as error:
        convert(path, tmp_path / "out.safetensors", **settings)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("target", "message"),
    [("out.pt", "is written as a .safetensors file"), ("no/out", "there is no folder"), ("x.safetensors/", "is a f")],
)
def test_targets(tmp_path, target, message):
    path = write(tmp_path, "in.safetensors", {"<d>": L})
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / target)


def test_a_second_file_of_another_concept_is_not_taken_for_its_half(tmp_path):
    path = write(tmp_path, "learned_embeds-steps-500.safetensors", {"<d>": L})
    write(tmp_path, "learned_embeds_2-steps-500.safetensors", {"<e>": G})
    with pytest.raises(UserError, match="holds <e>"):
        read_embeddings(path)
    write(tmp_path, "learned_embeds_2-steps-500.safetensors", {"<d>": G})
    assert same(read_embeddings(path)[0], [L, G])


def a1111_picture(path, content, in_pixels):
    """A picture with an embedding as A1111 writes one, from a description of the format."""
    picture = Image.effect_noise((50, 64), 60).convert("RGB").point(lambda value: max(value, 17))
    text = json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()})
    if not in_pixels:
        info = PngImagePlugin.PngInfo()
        info.add_text("sd-ti-embedding", base64.b64encode(text.encode()).decode())
        picture.save(path, pnginfo=info)
        return path
    data = np.frombuffer(zlib.compress(text.encode(), 9), np.uint8)
    height = picture.height
    data = np.resize(data, -(-(len(data) + 1) // (3 * height)) * 3 * height)
    state, mask = 0, []
    for _ in data:
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        mask.append(state % 255 & 15)
    halves = [(nibble ^ np.array(mask) | 0x50).astype(np.uint8) for nibble in (data & 15, data >> 4)]
    left, right = (half.reshape(height, -1, 3) for half in halves)
    gap = np.zeros((height, 1, 3), np.uint8)
    Image.fromarray(np.concatenate((left, gap, np.asarray(picture), gap, right), 1)).save(path)
    return path


@pytest.mark.parametrize("in_pixels", [False, True], ids=["text", "pixels"])
def test_pictures_of_a1111(tmp_path, in_pixels):
    path = a1111_picture(tmp_path / "x.png", A1111, in_pixels)
    (vectors,), metadata = read_embeddings(path)
    assert torch.equal(vectors, L)
    assert (metadata["token"], metadata["step"]) == ("<my-dog>", "500")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_embeddings(path)


def test_folders_of_pickles(tmp_path):
    """A `.bin` pair in a folder, as of diffusers before safetensors, and safetensors that is called `.bin`."""
    write(tmp_path, "learned_embeds.bin", {"<dog>": L})
    with pytest.raises(UserError, match="is a pickle"):
        read_embeddings(tmp_path)
    assert same(read_embeddings(tmp_path, allow_pickle=True)[0], [L])
    write(tmp_path, "learned_embeds_2.bin", {"<dog>": G})
    assert same(read_embeddings(tmp_path, allow_pickle=True)[0], [L, G])
    save_file({"<dog>": L}, tmp_path / "other.bin")
    assert same(read_embeddings(tmp_path / "other.bin")[0], [L])


def test_one_of_several_embeddings_in_a_lora(tmp_path):
    path = write(tmp_path, "x.safetensors", {"bundle_emb.a.emb_params": L, "bundle_emb.b.emb_params": L + 1})
    convert(path, tmp_path / "b.safetensors", name="b")
    (vectors,), metadata = read_embeddings(tmp_path / "b.safetensors")
    assert torch.equal(vectors, L + 1)
    assert metadata["token"] == "<b>"


@pytest.mark.parametrize("token", ["two words", "x" * 5000, "", "<{}>"])
def test_a_token_that_no_prompt_can_hold_is_replaced(tmp_path, token):
    save_file({"emb_params": L}, tmp_path / "dog.safetensors", metadata={"token": token})
    with pytest.warns(UserWarning, match="it is called <dog> here"):
        assert read_embeddings(tmp_path / "dog.safetensors")[1]["token"] == "<dog>"


def test_file_names_that_are_no_text_or_too_long(tmp_path):
    for name, token in ((b"caf\xe9", "<caf?>"), (b"x" * 200, "<concept>")):
        path = write(tmp_path, os.fsdecode(name) + ".pt", {"emb_params": L})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_embeddings(path, allow_pickle=True)[1]["token"] == token
    with pytest.raises(UserError, match="is not valid UTF-8"):  # which the library demands
        write_single_file(tmp_path / "x.safetensors", [L], {})
        read_embeddings((tmp_path / "x.safetensors").rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors")))


@pytest.mark.parametrize("contents", [A1111, {"<d>": L}, [{"a": L}]], ids=["a1111", "diffusers", "list"])
def test_damaged_pickles_are_a_clear_error(tmp_path, contents):
    path = write(tmp_path, "x.pt", contents)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data[: rng.integers(1, len(data)) if rng.random() < 0.3 else len(data)])
        try:
            read_embeddings(path, allow_pickle=True)
        except UserError as error:
            assert "\n" not in str(error)


def test_what_a_file_names_is_never_fetched(tmp_path, monkeypatch):
    """Not even with a network: the header of a stranger's file decides nothing."""
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked for a network"))
    save_file({"emb_params": L}, tmp_path / "x.safetensors", metadata={"base_model": "someone/else"})
    with pytest.raises(UserError, match="'someone/else', which is not on this machine"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", renorm="mean")
    with pytest.raises(UserError, match="'someone/else', which is not on this machine"):
        pick_model(None, None, [read_embeddings(tmp_path / "x.safetensors")[1]])
    inspect(tmp_path / "x.safetensors")


def test_command_line(tmp_path):
    path = write(tmp_path, "x.pt", A1111)
    run = dti_fast("convert", path, tmp_path / "out.safetensors")
    refused(run, f'dti-fast convert "{path}" "x.safetensors" --allow_pickle', tmp_path / "out.safetensors")
    run = dti_fast("convert", path, "/proc/out.safetensors", "--allow_pickle")
    refused(run, "/proc/out.safetensors")
    run = dti_fast("convert", path, tmp_path / "out.safetensors", "--allow_pickle", "--renorm", "0.5")
    assert run.returncode == 0, run.stderr
    assert "out.safetensors" in run.stdout
    (vectors,), metadata = read_embeddings(tmp_path / "out.safetensors")
    assert vectors.norm(dim=-1).tolist() == pytest.approx([0.5, 0.5])
    assert (metadata["token"], metadata["step"]) == ("<my-dog>", "500")
