"""Other tools' embedding files, read, written in the two layouts, and loaded into stock pipelines."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from dti_fast.convert import convert
from runs import dti_fast, refused
from safetensors.torch import load_file, save_file

from dti_fast.errors import UserError
from dti_fast.formats import read_embedding_file, read_embeddings

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
}  # fmt: skip


def write(folder, name, contents):
    path = folder / name
    if path.suffix == ".safetensors":
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
        written = convert(path, target, allow_pickle=True)
        read, metadata = read_embeddings(target)
        assert same(read, expected)
        assert metadata["token"] == token
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
    convert(source, tmp_path / "weak.safetensors", renorm=norm, model=model if isinstance(norm, str) else None)
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
        ("x.safetensors", {"clip_l": L, "clip_g": G, "t5xxl": L}, {}, "text encoder t5xxl"),
        ("x.safetensors", {"t5": L}, {}, "text encoder t5"),
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


def test_command_line(tmp_path):
    path = write(tmp_path, "x.pt", A1111)
    run = dti_fast("convert", path, tmp_path / "out.safetensors")
    refused(run, f'dti-fast convert "{path}" "x.safetensors" --allow_pickle', tmp_path / "out.safetensors")
    run = dti_fast("convert", path, "/proc/out.safetensors", "--allow_pickle")
    refused(run, "/proc/out.safetensors.tmp")
    run = dti_fast("convert", path, tmp_path / "out.safetensors", "--allow_pickle", "--renorm", "0.5")
    assert run.returncode == 0, run.stderr
    assert "out.safetensors" in run.stdout
    (vectors,), metadata = read_embeddings(tmp_path / "out.safetensors")
    assert vectors.norm(dim=-1).tolist() == pytest.approx([0.5, 0.5])
    assert (metadata["token"], metadata["step"]) == ("<my-dog>", "500")
