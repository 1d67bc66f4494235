"""TokenEmbedding in real transformers text encoders and tokenizers."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from dti_fast import TokenEmbedding, sphere
from dti_fast.errors import UserError


@pytest.fixture
def encoder(tiny_pipelines):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    return pipeline.text_encoder, pipeline.tokenizer


def hidden(text_encoder, tokenizer, prompt):
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return text_encoder(ids).last_hidden_state


@pytest.mark.parametrize("magnitude", ["mean", "min", "max", "class", 0.7])
def test_magnitude_statistics(encoder, magnitude):
    text_encoder, tokenizer = encoder
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[5] = 0  # a row that was never trained counts in no statistic
    norms = table.detach().double().norm(dim=-1)
    dog = tokenizer("dog", add_special_tokens=False).input_ids[0]
    expected = {"mean": norms[norms > 0].mean(), "min": norms[norms > 0].min(), "max": norms.max(), "class": norms[dog]}
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", magnitude=magnitude)
    assert embedding.magnitudes.item() == pytest.approx(float(expected.get(magnitude, magnitude)), rel=1e-6)
    assert embedding.vectors().norm().item() == pytest.approx(embedding.magnitudes.item(), rel=1e-6)


def test_starts_at_the_initializer_and_is_what_the_model_sees(encoder):
    text_encoder, tokenizer = encoder
    before = hidden(text_encoder, tokenizer, "a photo of a dog on grass")
    TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", magnitude="class")
    after = hidden(text_encoder, tokenizer, "a photo of a <x> on grass")
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_uninstall_restores_everything(encoder):
    text_encoder, tokenizer = encoder
    module, words = text_encoder.get_input_embeddings(), len(tokenizer)
    table, ids = module.weight.clone(), tokenizer("a <x> dog").input_ids
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog cat")
    assert tokenizer("a <x> dog").input_ids != ids
    embedding.directions.data.neg_()
    embedding.uninstall()
    assert text_encoder.get_input_embeddings() is module
    assert torch.equal(module.weight, table)
    assert len(tokenizer) == words
    assert tokenizer("a <x> dog").input_ids == ids
    TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog").uninstall()


def test_only_the_directions_get_a_gradient_and_the_vocabulary_none(encoder):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", num_vectors=2)
    text_encoder.requires_grad_(False)
    embedding.directions.requires_grad_(True)
    hidden(text_encoder, tokenizer, "a <x> <x>_1 cat")[0, 5].sum().backward()
    assert embedding.directions.grad.shape == (2, 32)
    assert (embedding.directions.grad.norm(dim=-1) > 0).all()
    assert embedding.weight.grad is None


@pytest.mark.parametrize(("init", "vectors", "count"), [("dog cat", None, 2), ("dog cat", 1, 1), ("dog cat", 3, 3)])
def test_phrases_and_numbers_of_vectors(encoder, init, vectors, count):
    text_encoder, tokenizer = encoder
    rows = text_encoder.get_input_embeddings().weight.detach()[tokenizer(init, add_special_tokens=False).input_ids]
    units = rows / rows.norm(dim=-1, keepdim=True)
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init=init, num_vectors=vectors)
    assert embedding.tokens == ["<x>", "<x>_1", "<x>_2"][:count]
    expected = sphere.mean(units)[None] if count == 1 else units[[0, 1, 0][:count]]
    torch.testing.assert_close(embedding.directions.data, expected)


def test_two_concepts_at_once(encoder):
    text_encoder, tokenizer = encoder
    first = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    alone = hidden(text_encoder, tokenizer, "a <x> on grass")
    second = TokenEmbedding.install(text_encoder, tokenizer, "<y>", init="cat")
    torch.testing.assert_close(hidden(text_encoder, tokenizer, "a <x> on grass"), alone)
    ids = tokenizer("<x> <y>", return_tensors="pt").input_ids
    both = text_encoder.get_input_embeddings()(ids)[0, 1:3]
    torch.testing.assert_close(both, torch.cat((first.vectors(), second.vectors())), atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="uninstall that first"):
        first.uninstall()
    second.uninstall()
    first.uninstall()
    assert tokenizer.convert_tokens_to_ids("<x>") == tokenizer.unk_token_id


def test_bfloat16_model_keeps_a_float32_direction(encoder):
    text_encoder, tokenizer = encoder
    text_encoder.to(torch.bfloat16)
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    master = embedding.directions.detach().clone()
    text_encoder.to(torch.float16).to(torch.bfloat16)
    assert text_encoder.dtype == torch.bfloat16
    assert torch.equal(embedding.directions, master)
    assert {t.dtype for t in (embedding.directions, embedding.magnitudes, embedding.mu)} == {torch.float32}
    assert embedding(torch.tensor([[embedding.first_id]])).dtype == torch.bfloat16
    assert embedding.directions.data.norm(dim=-1).sub(1).abs().max() < 1e-6


def test_bad_placeholders_and_initializers(encoder):
    text_encoder, tokenizer = encoder
    with pytest.raises(UserError, match="word of this model already"):
        TokenEmbedding.install(text_encoder, tokenizer, "dog", init="cat")
    with pytest.raises(UserError, match="empty"):
        TokenEmbedding.install(text_encoder, tokenizer, "<x>", init=" ")
    with pytest.raises(UserError, match="mean, min, max"):
        TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", magnitude="median")
    with pytest.warns(UserWarning, match="bracketed and lower case"):
        TokenEmbedding.install(text_encoder, tokenizer, "Rex", init="dog")
    with pytest.raises(UserError, match="word of this model already"):
        TokenEmbedding.install(text_encoder, tokenizer, "Rex", init="dog")


@pytest.mark.parametrize("vectors", [1, 3])
def test_hidden_states_equal_a_stock_pipeline_that_loaded_the_file(encoder, tiny_pipelines, tmp_path, vectors):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", num_vectors=vectors)
    embedding.directions.data += 0.1 * torch.randn_like(embedding.directions)
    embedding.directions.data /= embedding.directions.data.norm(dim=-1, keepdim=True)
    ours = hidden(text_encoder, tokenizer, embedding.expand("a photo of <x>, on grass"))
    save_file({"<x>": embedding.vectors().detach()}, tmp_path / "x.safetensors")
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    stock.load_textual_inversion(tmp_path / "x.safetensors")
    theirs, _ = stock.encode_prompt("a photo of <x>, on grass", "cpu", 1, False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:a prompt has '<x>' without its other vectors")
@pytest.mark.parametrize("other_concept", [False, True])
def test_the_gradient_of_a_learned_magnitude(encoder, other_concept):
    """Against autograd through the plain formula e = m0 exp(s) v, at s != 0, in a text encoder of float64."""
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", num_vectors=2, magnitude=0.7)
    s = embedding.train_magnitude()
    assert torch.equal(embedding.vectors(), 0.7 * torch.nn.functional.normalize(embedding.directions))
    s.data = torch.tensor([[0.3], [-0.2]])
    if other_concept:
        TokenEmbedding.install(text_encoder, tokenizer, "<y>", init="cat")
    prompt = "a <x> <x>_1 cat <x>"
    weight = torch.randn(77, 32, generator=torch.Generator().manual_seed(0))
    (hidden(text_encoder, tokenizer, prompt)[0] * weight).sum().backward()

    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    v, exact = (t.detach().double().requires_grad_() for t in (embedding.directions, s))
    rows = torch.cat((embedding.weight.double(), 0.7 * exact.exp() * v))
    text_encoder.double()
    text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows.detach(), freeze=False))
    out = text_encoder(ids.clamp(max=len(rows) - 1)).last_hidden_state[0]
    (out * weight).sum().backward()
    rows.backward(text_encoder.get_input_embeddings().weight.grad)
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding.directions.grad.double(), v.grad, rtol=1e-4, atol=1e-5)


def test_the_prior_of_a_magnitude_is_the_vocabularys_own(encoder):
    text_encoder, tokenizer = encoder
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[5:25] = 1e-6  # rows that no text used
    logs = table.detach().double().norm(dim=-1).log()
    logs = logs[logs > -5]
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", num_vectors=2)
    s = embedding.train_magnitude()
    s.data = (logs.mean() + logs.std() * torch.tensor([[2.0], [0.0]])).float() - embedding.magnitudes.detach().log()
    penalty = embedding.magnitude_penalty()
    assert penalty.item() == pytest.approx(2, rel=1e-3)  # two deviations away: 2^2 / 2
    penalty.backward()
    torch.testing.assert_close(s.grad, torch.tensor([[2 / logs.std().item()], [0.0]]), rtol=1e-3, atol=1e-2)


def test_a_learned_magnitude_stays_float32_too(encoder):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    embedding.train_magnitude().data += 0.1234567
    before = embedding.magnitudes.detach().clone()
    text_encoder.to(torch.bfloat16)
    assert torch.equal(embedding.magnitudes, before)
    assert embedding.log_scales.dtype == torch.float32
