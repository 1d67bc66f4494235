"""TokenEmbedding in real transformers text encoders and tokenizers."""

import copy
import gc
import io
import warnings
import weakref

import encoders
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dti_fast import TokenEmbedding, sphere
from dti_fast.errors import UserError
from dti_fast.tokens import cross_init, initial_magnitudes

OTHERS = ("gemma", "qwen", "t5")


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


# Saving and copying


def words(text_encoder, tokenizer, text="a photo of a dog on grass"):
    """The last hidden state for a prompt of any tokenizer."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return getattr(text_encoder, "model", text_encoder)(ids).last_hidden_state


@pytest.mark.parametrize("concepts", [1, 2])
@pytest.mark.parametrize("name", ["clip", *OTHERS])
def test_a_model_saved_with_a_concept_loads_as_the_plain_one(encoder, tmp_path, name, concepts):
    """Before, its words were drawn anew."""
    text_encoder, tokenizer = encoder if name == "clip" else encoders.make(name)
    expected = words(text_encoder, tokenizer)
    for i in range(concepts):
        TokenEmbedding.install(text_encoder, tokenizer, f"<x{i}>", init="dog")
    text_encoder.save_pretrained(tmp_path)
    loaded = type(text_encoder).from_pretrained(tmp_path).eval()
    _, tokenizer = encoder if name == "clip" else encoders.make(name)
    torch.testing.assert_close(words(loaded, tokenizer), expected, rtol=1e-5, atol=1e-5)
    assert not isinstance(loaded.get_input_embeddings(), TokenEmbedding)


def test_a_state_dict_goes_from_one_model_with_concepts_to_another(tiny_pipelines):
    def make(init):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
        for i, word in enumerate(init):
            TokenEmbedding.install(pipeline.text_encoder, pipeline.tokenizer, f"<x{i}>", init=word)
        return pipeline.text_encoder, pipeline.tokenizer

    (one, tokenizer), (other, _), (plain, _) = make(("dog", "cat")), make(("red", "tree")), make(())
    one.get_input_embeddings().stock.weight.data += 1
    other.load_state_dict(one.state_dict())
    prompt = "a <x0> and a <x1>"
    assert torch.equal(hidden(one, tokenizer, prompt), hidden(other, tokenizer, prompt))
    lacking, beyond = plain.load_state_dict(one.state_dict(), strict=False)
    assert not lacking and beyond and all("learned" in k or "mu" in k or "magnitudes" in k for k in beyond)
    assert torch.equal(hidden(one, tokenizer, "a dog"), hidden(plain, tokenizer, "a dog"))
    with pytest.raises(RuntimeError, match="Missing key"):
        one.load_state_dict(plain.state_dict())


def test_a_copy_of_a_concept_leaves_the_text_encoder_alone(encoder):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    buffer = io.BytesIO()
    torch.save(embedding, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(embedding), torch.load(buffer, weights_only=False)):
        assert torch.equal(clone.vectors(), embedding.vectors()) and clone.rows is not embedding.rows
        ids = torch.tensor([[1, embedding.first_id]])
        assert torch.equal(clone(ids), embedding(ids))
        with pytest.raises(RuntimeError, match="is a copy"):
            clone.uninstall()
        watch = weakref.ref(clone)
        held = [o for o in gc.get_referents(*gc.get_referents(clone), clone) if o is text_encoder or o is tokenizer]
        assert not held and watch() is clone
    embedding.uninstall()


def test_a_copy_of_a_text_encoder_has_its_own_concept(encoder):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog cat")
    teacher = copy.deepcopy(text_encoder)
    theirs = teacher.get_input_embeddings()
    with torch.no_grad():
        embedding.rows.neg_()
    assert torch.equal(theirs.rows, -embedding.rows)
    embedding.uninstall()
    assert len(tokenizer("<x>", add_special_tokens=False).input_ids) == 1  # the copy still uses it
    theirs.uninstall()
    assert isinstance(teacher.get_input_embeddings(), torch.nn.Embedding)
    assert len(tokenizer("<x>", add_special_tokens=False).input_ids) > 1


# Several text encoders, several concepts


def test_text_encoders_may_share_a_tokenizer(tiny_pipelines):
    folder = tiny_pipelines["sd15"]
    first, second = (CLIPTextModel.from_pretrained(folder / "text_encoder") for _ in range(2))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    before = tokenizer("a <x> <y>").input_ids
    one, other = (TokenEmbedding.install(e, tokenizer, "<x>", init="dog") for e in (first, second))
    assert torch.equal(hidden(first, tokenizer, "a <x>"), hidden(second, tokenizer, "a <x>"))
    with pytest.raises(UserError, match="word of this model already"):
        TokenEmbedding.install(second, tokenizer, "<x>", init="dog")
    with pytest.raises(UserError, match="word of this model already"):
        one.uninstall()
        TokenEmbedding.install(first, tokenizer, "<x>", init="dog cat")  # the other has one vector
    third = TokenEmbedding.install(first, tokenizer, "<y>", init="cat")
    other.uninstall()
    ids = tokenizer("a <x> <y>", return_tensors="pt").input_ids
    assert ids[0, 3] == third.first_id
    torch.testing.assert_close(first.get_input_embeddings()(ids)[0, 3], third.vectors()[0])
    third.uninstall()
    assert tokenizer("a <x> <y>").input_ids == before


@pytest.mark.parametrize("magnitude", ["class", "mean"])
def test_a_concept_may_start_at_another(encoder, magnitude):
    text_encoder, tokenizer = encoder
    first = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog cat", magnitude="class")
    with torch.no_grad():
        first.rows.copy_(torch.nn.functional.normalize(torch.randn_like(first.rows), dim=-1))
    start = cross_init(text_encoder, tokenizer, "red <x>")
    torch.testing.assert_close(start, words(text_encoder, tokenizer, first.expand("red <x>"))[0, 1:4])
    second = TokenEmbedding.install(text_encoder, tokenizer, "<y>", init="<x>", magnitude=magnitude)
    torch.testing.assert_close(second.rows, first.rows)
    if magnitude == "class":
        torch.testing.assert_close(second.magnitudes, first.magnitudes)
    third = TokenEmbedding.install(text_encoder, tokenizer, "<z>", init="red <y> <x>")
    assert third.tokens == ["<z>", *(f"<z>_{i}" for i in range(1, 5))]
    torch.testing.assert_close(third.rows[1:], torch.cat((first.rows, first.rows)))


def test_a_word_that_the_text_encoder_does_not_have_is_told(tiny_pipelines):
    folder = tiny_pipelines["sd15"]
    first, second = (CLIPTextModel.from_pretrained(folder / "text_encoder") for _ in range(2))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    TokenEmbedding.install(first, tokenizer, "<x>", init="dog")
    with pytest.raises(UserError, match="no embedding of the initializer's token"):
        TokenEmbedding.install(second, tokenizer, "<y>", init="<x>")


# Several vectors


def test_a_prompt_with_one_of_several_vectors_is_told(encoder):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in ("a <x> <x>_1", embedding.expand("a <x> and <x>"), "a dog"):
            hidden(text_encoder, tokenizer, prompt)
        embedding.vectors()
    for prompt in ("a <x>", "<x> <x>_1 <x>"):
        with pytest.warns(UserWarning, match="'<x>' without its other vectors, up to '<x>_1'"):
            hidden(text_encoder, tokenizer, prompt)


def test_where_ids_cannot_be_looked_at_the_device_remembers(encoder, monkeypatch):
    text_encoder, tokenizer = encoder
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog cat")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedding(tokenizer("a <x>", return_tensors="pt").input_ids)
        embedding(tokenizer(embedding.expand("a <x>"), return_tensors="pt").input_ids)
    with pytest.warns(UserWarning, match="without its other vectors"):
        embedding.vectors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedding.vectors()
    assert "incomplete" not in embedding.state_dict()


def test_nothing_in_a_forward_pass_reads_the_device(encoder):
    text_encoder, tokenizer = encoder
    for i, placeholder in enumerate(("<x>", "<y>")):
        TokenEmbedding.install(text_encoder, tokenizer, placeholder, init="dog cat", num_vectors=3 - i)
    text_encoder.to("meta")
    ids = tokenizer("a <x> <y>", return_tensors="pt").input_ids.to("meta")
    text_encoder(ids).last_hidden_state.sum().backward()


def test_prompts_are_expanded_once(encoder, tiny_pipelines):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    tokenizer = pipeline.tokenizer
    embedding = TokenEmbedding.install(pipeline.text_encoder, tokenizer, "<x>", init="dog cat red")
    single = TokenEmbedding.install(pipeline.text_encoder, tokenizer, "<y>", init="dog")
    prompt = "a photo of <x>, and a <y> with <x>"
    by_hand = prompt.replace("<x>", "<x> <x>_1 <x>_2")

    def rows(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        return pipeline.text_encoder.get_input_embeddings()(ids)

    expected = rows(by_hand)
    once = embedding.expand(prompt)
    texts = [once, embedding.expand(once), embedding.expand(by_hand), single.expand(once)]
    texts += [pipeline.maybe_convert_prompt(text, tokenizer) for text in (prompt, once)]
    for text in texts:
        assert torch.equal(rows(text), expected)
    rows(once).sum().backward()
    ours, embedding.rows.grad = embedding.rows.grad, None
    expected.sum().backward()
    assert torch.equal(ours, embedding.rows.grad) and (ours != 0).any(-1).all()
    assert single.expand("a <y>") == "a <y>"


# Dtypes


@pytest.mark.parametrize("concepts", [1, 2])
def test_float64_text_encoders_and_int32_ids(encoder, concepts):
    text_encoder, tokenizer = encoder
    embeddings = [TokenEmbedding.install(text_encoder, tokenizer, f"<x{i}>", init="dog cat") for i in range(concepts)]
    text_encoder.double()
    ids = tokenizer("a <x0> <x0>_1 red", return_tensors="pt").input_ids
    out = text_encoder(ids.int()).last_hidden_state
    assert out.dtype == torch.float64 and torch.equal(out, text_encoder(ids).last_hidden_state)
    rows = text_encoder.get_input_embeddings()(ids)
    torch.testing.assert_close(rows[0, 2:4], embeddings[0].vectors().double(), rtol=1e-6, atol=0)
    assert torch.equal(rows[0, 4], embeddings[0].weight[ids[0, 4]])
    rows.backward(torch.ones_like(rows))
    expected = embeddings[0].magnitudes.expand(2, rows.shape[-1])
    torch.testing.assert_close(embeddings[0].rows.grad, expected)


# Other text encoders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_other_words_stay_bit_for_bit(name, dtype):
    """Gemma's embedding multiplies by the root of the width."""
    text_encoder, tokenizer = encoders.make(name)
    text_encoder.to(dtype)
    module, expected = text_encoder.get_input_embeddings(), words(text_encoder, tokenizer)
    first = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    second = TokenEmbedding.install(text_encoder, tokenizer, "<y>", init="cat")
    assert torch.equal(words(text_encoder, tokenizer), expected)
    second.uninstall(), first.uninstall()
    assert text_encoder.get_input_embeddings() is module
    assert torch.equal(words(text_encoder, tokenizer), expected)


@pytest.mark.parametrize("phrase", ["dog", "red dog"])
@pytest.mark.parametrize("name", ["clip", *OTHERS])
def test_an_untrained_concept_is_its_initial_phrase(encoder, name, phrase):
    """As it stands in a prompt: after a space, which belongs to the word in some tokenizers."""
    text_encoder, tokenizer = encoder if name == "clip" else encoders.make(name)
    expected = words(text_encoder, tokenizer, f"a photo of a {phrase} on grass")
    embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init=phrase, magnitude="class")
    assert len(embedding.tokens) == len(phrase.split())
    for spelled in (embedding.expand("<x>"), " ".join(embedding.tokens)):
        prompt = f"a photo of a {spelled} on grass"
        torch.testing.assert_close(words(text_encoder, tokenizer, prompt), expected, rtol=1e-5, atol=1e-5)


def test_cross_initialization_finds_the_phrase_in_every_tokenizer(encoder):
    for text_encoder, tokenizer, start in ((*encoder, 1), (*encoders.make("gemma"), 1), (*encoders.make("t5"), 0)):
        rows = cross_init(text_encoder, tokenizer, "red dog")
        assert torch.equal(rows, words(text_encoder, tokenizer, " red dog")[0, start : start + 2])


def test_rows_behind_the_words_count_in_no_statistic():
    text_encoder, tokenizer = encoders.make("qwen")
    table = text_encoder.get_input_embeddings().weight
    known = len(tokenizer)
    with torch.no_grad():
        table[known:] *= 1000
    norms = table[:known].double().norm(dim=-1)
    for magnitude, expected in (("mean", norms.mean()), ("max", norms.max()), ("min", norms.min())):
        embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog", magnitude=magnitude)
        assert embedding.magnitudes.item() == pytest.approx(expected.item(), rel=1e-6)
        embedding.train_magnitude()
        assert embedding.log_norm_statistics[0].item() == pytest.approx(norms.log().mean().item(), rel=1e-4)
        embedding.uninstall()
    assert initial_magnitudes(table, None, table[:1], "max").item() > 100 * norms.max()


def test_an_embedding_that_does_more_than_look_up_is_refused(encoder):
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    text_encoder, tokenizer = encoder
    text_encoder.set_input_embeddings(Shifted(*text_encoder.get_input_embeddings().weight.shape))
    with pytest.raises(UserError, match="Shifted does more than to look up rows"):
        TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    assert len(tokenizer("<x>", add_special_tokens=False).input_ids) > 1


def test_pooling_at_the_placeholder_is_told(tiny_pipelines):
    """SDXL's second text encoder says `eos_token_id: 2`, as the published one does."""

    def load(cls, family, number=""):
        folder = tiny_pipelines[family]
        encoder = cls.from_pretrained(folder / f"text_encoder{number}")
        return encoder, CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")

    text_encoder, tokenizer = load(CLIPTextModelWithProjection, "sdxl", "_2")
    with pytest.warns(UserWarning, match=r"text_encoder\.text_model\.eos_token_id = tokenizer\.eos_token_id") as told:
        embedding = TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
    embedding.uninstall()
    exec(str(told[0].message).rpartition(": ")[2])  # the cure, as it stands there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TokenEmbedding.install(text_encoder, tokenizer, "<x>", init="dog")
        TokenEmbedding.install(*load(CLIPTextModel, "sd15"), "<x>", init="dog")

    def pooled(text):
        return text_encoder(tokenizer(text, padding="max_length", return_tensors="pt").input_ids).text_embeds

    assert not torch.equal(pooled("<x>"), pooled("<x> in the snow"))


def test_a_slow_tokenizer_is_refused(encoder):
    with pytest.raises(UserError, match="load the fast tokenizer"):
        TokenEmbedding.install(encoder[0], object(), "<x>", init="dog")
