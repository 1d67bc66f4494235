"""TokenEmbedding: a frozen vocabulary plus K learned directions, in place of a text encoder's embedding."""

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dti_fast import sphere
from dti_fast.errors import UserError
from dti_fast.ops import tangent_sum, token_embed
from dti_fast.ops._dispatch import has_values
from dti_fast.reference import token_embed as reference

MAGNITUDES = ("mean", "min", "max", "class")


@dataclass(eq=False)
class _AddedWords:
    """New words of a tokenizer, its backend before them, and the embeddings that use them."""

    words: list[str]
    before: object
    users: WeakSet = field(default_factory=WeakSet)


# What `install` added to each tokenizer, oldest first.  Several text encoders may share one.
_added: WeakKeyDictionary[object, list[_AddedWords]] = WeakKeyDictionary()


class _PerSample(torch.autograd.Function):
    """Unit rows `[K, D]` as each of B samples' own, `[B, K, D]`; their gradients come back through `tangent_sum`.

    The rows receive the sum of unit tangents, the counts `[K, 1]` how many these are.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Tensor, samples: int) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.expand(samples, -1, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *tangent_sum(grad, *ctx.saved_tensors), None


class TokenEmbedding(nn.Module):
    """Maps token ids `[B, S]` to `[B, S, D]`: vocabulary rows, or `magnitude x direction` for learned tokens.

    Made by `install`.  The vocabulary is the model's own module: never copied, resized or written.  What that module
    does to a row, such as Gemma's scale, is done to learned vectors too.

    A state dict has the stock embedding's `weight`, so that a model saved with a concept inside loads as the plain
    model, and beside it `learned.0` and so on, which the plain model does not know.  A copy (`copy.deepcopy`, pickle)
    takes the vocabulary along, but not the text encoder.

    Attributes:
        rows: Parameter `[K, D]` float32, all that learns, unless `train_magnitude` is called: unit rows, the directions
            v; with free norms the vectors themselves.
        directions: `[K, D]` float32 unit rows; `rows` itself, unless the norms are free.
        magnitudes: `[K, 1]` float32, the norms m; fixed, or m0 exp(log_scales).  With free norms 1, a factor of `rows`.
        log_scales: Parameter `[K, 1]` float32 after `train_magnitude`, None before.
        counts: Parameter `[K, 1]` float32 after `per_sample`, None before.
        mu: `[K, D]` float32 unit rows: the initial directions, the mean of the von Mises-Fisher prior.
        tokens: the K token names, `<x>`, `<x>_1`, ..., as diffusers names them.  With K > 1 `<x>_0` is another name of
            `<x>`, and has the id after them (`expand`).
    """

    def __init__(
        self, vocabulary: nn.Module, initial: Tensor, magnitudes: Tensor | None, first_id: int, tokens: list[str]
    ):
        super().__init__()
        self.vocabulary = vocabulary
        directions = F.normalize(initial, dim=-1)
        self.free = magnitudes is None
        rows = initial if self.free else directions
        # A list, so that the vocabulary's parameters come first: libraries take a model's dtype from its first one.
        self.learned = nn.ParameterList([nn.Parameter(rows.clone())])
        self.register_parameter("counts", None)
        magnitudes = torch.ones_like(rows[:, :1]) if self.free else magnitudes
        self.register_buffer("initial_magnitudes", magnitudes)
        self.register_buffer("mu", directions)
        # Whether a prompt had the first vector without the last.
        self.register_buffer("incomplete", torch.zeros((), dtype=torch.bool, device=rows.device), persistent=False)
        self.first_id = first_id
        self.tokens = tokens
        self._home = None  # the text encoder and the tokenizer

    @classmethod
    def install(
        cls,
        text_encoder: nn.Module,
        tokenizer,
        placeholder: str,
        *,
        init: str | Tensor | None = None,
        num_vectors: int | None = None,
        magnitude: str | float | None = "mean",
    ) -> "TokenEmbedding":
        """Add `placeholder` to the tokenizer and put a TokenEmbedding into the text encoder.

        Args:
            text_encoder: a transformers text encoder (`get_input_embeddings`, `set_input_embeddings`).
            tokenizer: its tokenizer.  Text encoders may share one; then they share the placeholder's tokens too.
            placeholder: the new word, best bracketed and lower case, such as `<dog>`.
            init: a word or phrase, which may hold concepts that were installed before; or a tensor `[K, D]` whose rows
                give the directions; None draws them at random.
            num_vectors: K; by default one for every token of `init`.  Fewer than that: each vector is the spherical
                mean of its share of the tokens.  More: the tokens repeat.
            magnitude: the norm m of the learned embedding: `mean`, `min` or `max` of the vocabulary's non-zero norms,
                `class` for those of the initial rows, or a number.  None leaves the norm free: what learns are the
                vectors themselves, as in Textual Inversion, from the initial rows as they are.

        Raises:
            UserError: if the placeholder is a word already, `init` has no token, the tokenizer is a slow one, or the
                text encoder's embedding does to its rows what is not known here.

        Warns:
            UserWarning: for a placeholder that would be found inside other words, and for a text encoder that pools its
                features at the placeholder, as SDXL's second one and both of SD3's do.  So does FLUX's; but as the
                same class serves Stable Diffusion 1.x, which does not use them, there the warning is left out.
        """
        if not hasattr(tokenizer, "_tokenizer"):
            raise UserError(f"{type(tokenizer).__name__} cannot be extended and restored; load the fast tokenizer")
        module = text_encoder.get_input_embeddings()
        initial = initial_rows(module, tokenizer, init, num_vectors)
        tokens = [placeholder] + [f"{placeholder}_{i}" for i in range(1, len(initial))]
        words = [*tokens, f"{placeholder}_0"] if len(tokens) > 1 else tokens
        added = _added.setdefault(tokenizer, [])
        entry = next((e for e in added if e.words == words and not e.users.intersection(_concepts(module))), None)
        if entry is None:
            _check_placeholder(tokenizer, placeholder, words)
        first_id = len(tokenizer) if entry is None else tokenizer.convert_tokens_to_ids(placeholder)
        magnitudes = None
        if magnitude is not None:  # rows behind the tokenizer's words were never trained
            magnitudes = initial_magnitudes(module.weight[:first_id], init, initial, magnitude)
        self = cls(module, initial, magnitudes, first_id, tokens)
        if has_values(module.weight):
            _check_same(self, module)
            _warn_of_pooling(text_encoder, tokenizer)
        if entry is None:
            entry = _AddedWords(words, copy.deepcopy(tokenizer._tokenizer))
            tokenizer.add_tokens([_new_word(tokenizer, word) for word in words])
            added.append(entry)
            self.first_id = tokenizer.convert_tokens_to_ids(placeholder)
        self._home = text_encoder, tokenizer
        entry.users.add(self)
        text_encoder.set_input_embeddings(self)
        return self

    def uninstall(self) -> None:
        """Give the text encoder its own embedding back and take the tokens out of the tokenizer.

        Several concepts come off in the reverse order of their installation.  Tokens that another text encoder still
        uses, and those below them, stay until it lets them go.

        Raises:
            RuntimeError: if another concept was installed after this one, or this one is installed nowhere.
        """
        if self._home is None:
            raise RuntimeError("this concept is not installed in a text encoder: it was taken off, or is a copy")
        text_encoder, tokenizer = self._home
        if text_encoder.get_input_embeddings() is not self:
            raise RuntimeError("another embedding was installed after this one; uninstall that first")
        text_encoder.set_input_embeddings(self.vocabulary)
        self._home = None
        added = _added[tokenizer]
        for entry in added:
            entry.users.discard(self)
        while added and not added[-1].users:
            tokenizer._tokenizer = added.pop().before

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_home": None}

    def __deepcopy__(self, memo: dict) -> "TokenEmbedding":
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        if self._home is not None and id(self._home[0]) in memo:  # the text encoder is being copied, concepts and all
            clone._home = memo[id(self._home[0])], self._home[1]
            for entry in _added[self._home[1]]:
                if self in entry.users:
                    entry.users.add(clone)
        return clone

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        weight = state.pop(f"{prefix}vocabulary.weight")
        state.pop(f"{prefix}counts", None)  # zeros, there for their gradient alone
        # Copies, because T5 holds its embedding in two places, and safetensors writes no tensor twice.
        state |= {k: v.clone() for k, v in state.items() if k.startswith(prefix) and not kwargs.get("keep_vars")}
        state[f"{prefix}weight"] = weight
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}vocabulary.weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def rows(self) -> nn.Parameter:
        return self.learned[0]

    @property
    def directions(self) -> Tensor:
        return F.normalize(self.rows, dim=-1) if self.free else self.rows

    @property
    def log_scales(self) -> nn.Parameter | None:
        return self.learned[1] if len(self.learned) > 1 else None

    @property
    def magnitudes(self) -> Tensor:
        return self.initial_magnitudes if self.log_scales is None else self.initial_magnitudes * self.log_scales.exp()

    def train_magnitude(self) -> nn.Parameter:
        """Let the norms learn too: m = m0 exp(s), with s, `[K, 1]` float32 and zero at first, a new parameter.

        Its gradient needs no other op: for e = m v, dL/ds = m <dL/de, v> = <dL/dv, v>.  Returns s.
        """
        if self.log_scales is None:
            self.learned.append(nn.Parameter(torch.zeros_like(self.initial_magnitudes)))
            norms = torch.linalg.vector_norm(self.weight.detach()[: self.first_id], dim=-1, dtype=torch.float32)
            # Rows that no text ever used have norms near zero, whose logarithms would drown all others.
            used = norms > norms.mean() / 10
            logs = norms.log().masked_fill(~used, 0)
            mean = logs.sum() / used.sum()
            variance = (logs - mean).square().masked_fill(~used, 0).sum() / (used.sum() - 1)
            self.register_buffer("log_norm_statistics", torch.stack((mean, variance.sqrt())))
        return self.log_scales

    def per_sample(self) -> nn.Parameter:
        """From now on bring every sample's gradient to length one along the sphere before they are added.

        A sample is a row of the ids `[B, S]`, one prompt of the loss.  `rows.grad` is then not the gradient of the loss
        but the sum over samples of unit tangents, and the `.grad` of the counts returned, `[K, 1]`, is how many samples
        these are: those with a gradient for the row (`dti_fast.reference.tangent_sum`).  Both add up over backward
        passes, of whatever sizes.  `SphericalSGD` takes rows and counts, with its own `per_sample`.

        Raises:
            ValueError: for free norms, which have no sphere.
        """
        if self.free:
            raise ValueError("per_sample normalises along the sphere: give the embedding a magnitude")
        if self.counts is None:
            self.counts = nn.Parameter(torch.zeros_like(self.initial_magnitudes))
        return self.counts

    def magnitude_penalty(self) -> Tensor:
        """-log p(log m) of a normal prior, without its constant; differentiable in `log_scales`.

            sum over k of ((log m_k - mean) / std)^2 / 2

        Mean and standard deviation are those of the vocabulary's own log-norms: a learned word should be as long as
        words of this model are, and the model says how strictly.  A norm is positive and acts by its ratio to the
        norm of its neighbours in the prompt, hence the logarithm.
        """
        mean, std = self.log_norm_statistics
        z = (self.magnitudes.log() - mean) / std
        return z.square().sum() / 2

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but stay float32 when it changes its dtype."""
        own = [*self.learned, *([] if self.counts is None else [self.counts])]
        parameters = [p.data for p in own]
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        device = self.rows.device
        if self.rows.dtype != torch.float32:
            for p, master in zip(own, parameters, strict=True):
                p.data = master.to(device)
            for name, master in buffers.items():
                setattr(self, name, master.to(device))
        return self

    @property
    def placeholder(self) -> str:
        return self.tokens[0]

    @property
    def weight(self) -> Tensor:
        """The frozen vocabulary `[V, D]`, for code that asks an embedding for its weight."""
        return self.vocabulary.weight

    def vectors(self) -> Tensor:
        """The learned embeddings m v, `[K, D]` float32, their norms exactly the magnitudes unless they are free.

        Warns:
            UserWarning: if a prompt had the first of several vectors without the last.  Ids on the CPU are looked at as
                they come; about those on a GPU nobody asks before this call, which waits for it.
        """
        self._tell_incomplete()
        return self.magnitudes * (self.rows if self.free else F.normalize(self.rows, dim=-1))

    def expand(self, prompt: str) -> str:
        """Spell the placeholder out as all of its K tokens, as diffusers does when it generates.

        Where there are several, the first is spelled `<x>_0`.  That means the same, but a diffusers pipeline takes
        `<x>` for a word that it has yet to spell out.  What is spelled out already, by either, stays as it is.
        """
        if len(self.tokens) == 1:
            return prompt
        rest = r"\s*".join(re.escape(token) for token in self.tokens[1:])
        spelled = " ".join([f"{self.placeholder}_0", *self.tokens[1:]])
        return re.sub(rf"{re.escape(self.placeholder)}(?!_\d)(\s*{rest}(?!\d))?", lambda _: spelled, prompt)

    def _tell_incomplete(self) -> None:
        if len(self.tokens) > 1 and has_values(self.incomplete) and self.incomplete:
            self.incomplete.zero_()
            warnings.warn(
                f"a prompt has {self.placeholder!r} without its other vectors, up to {self.tokens[-1]!r}, which then "
                "learn nothing: tokenise concept.expand(prompt), and leave it enough room",
                stacklevel=3,
            )

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings `[B, S, D]` of ids `[B, S]`, int64 or int32, in the vocabulary's dtype."""
        out, scale = self._lookup(ids.long()), getattr(self.stock, "embed_scale", None)
        if scale is None:
            return out
        return out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)

    @property
    def stock(self) -> nn.Module:
        """The text encoder's own embedding, below all concepts."""
        return self.vocabulary.stock if isinstance(self.vocabulary, TokenEmbedding) else self.vocabulary

    def _lookup(self, ids: Tensor) -> Tensor:
        """Rows of the vocabulary and learned vectors, without what the stock module does to them."""
        rows, last_id = self.rows, self.first_id + len(self.tokens) - 1
        if len(self.tokens) > 1:
            ids = ids.masked_fill(ids == last_id + 1, self.first_id)  # `<x>_0`
            self.incomplete |= ((ids == self.first_id).sum(-1) > (ids == last_id).sum(-1)).any()
            if ids.device.type == "cpu" and not torch.compiler.is_compiling():
                self._tell_incomplete()
        if self.counts is not None and torch.is_grad_enabled():
            rows = _PerSample.apply(rows, self.counts, len(ids))
        if self.log_scales is not None:
            # Times one, exactly, but with the gradient of exp(s): the op differentiates the directions alone.
            rows = rows * (self.log_scales - self.log_scales.detach()).exp()
        embed = partial(
            reference.token_embed if self.weight.dtype == torch.float64 else token_embed,
            vocabulary=self.weight, directions=rows, magnitudes=self.magnitudes.detach(), first_id=self.first_id,
        )  # fmt: skip
        if not isinstance(self.vocabulary, TokenEmbedding):
            return embed(ids)
        learned = (ids >= self.first_id) & (ids <= last_id)
        own = embed(ids.masked_fill(~learned, 0))
        return torch.where(learned.unsqueeze(-1), own, self.vocabulary._lookup(ids.masked_fill(learned, 0)))


@torch.no_grad()
def cross_init(text_encoder: nn.Module, tokenizer, phrase: str) -> Tensor:
    """What a text encoder makes of a phrase, one row for each of its K tokens, `[K, D]` float32.

    The prompt is the phrase alone.  The rows are the last hidden state, after the final layer norm, at the phrase's
    tokens, without those of the begin and the end, whichever the tokenizer adds.  Source: Cross Initialization (arXiv
    2312.15905), which starts a new word's input embedding from this output.  Padding behind the prompt would change
    nothing in CLIP, whose attention looks back only.
    """
    phrase = _as_in_a_prompt(text_encoder.get_input_embeddings(), phrase)
    own, ids = _token_ids(tokenizer, phrase), tokenizer(phrase).input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)
    hidden = text_encoder(torch.tensor([ids], device=text_encoder.device)).last_hidden_state
    return hidden[0, start : start + len(own)].float()


def _concepts(module: nn.Module) -> Iterator[TokenEmbedding]:
    """The concepts that are installed in a text encoder whose embedding is `module`, the latest first."""
    while isinstance(module, TokenEmbedding):
        yield module
        module = module.vocabulary


def _as_in_a_prompt(module: nn.Module | Tensor, phrase: str) -> str:
    """A phrase as it stands between other words: after a space, which is a part of the token in some tokenizers, and
    with all the vectors of a concept."""
    for concept in _concepts(module):
        phrase = concept.expand(phrase)
    return f" {phrase.strip()}"


def _token_ids(tokenizer, phrase: str) -> list[int]:
    ids = tokenizer(phrase, add_special_tokens=False).input_ids if phrase.strip() else []
    if not ids:
        raise UserError("the initializer token is empty; name what the pictures show in a word or two, such as 'dog'")
    return ids


def _rows_of(module: nn.Module | Tensor, ids: list[int]) -> Tensor:
    """Vocabulary rows and learned vectors, `[len(ids), D]` float32."""
    weight = getattr(module, "weight", module).detach()
    learned = {}
    for concept in _concepts(module):
        vectors = concept.vectors().detach()
        learned |= {concept.first_id + k: row for k, row in enumerate([*vectors, vectors[0]])}
    if unknown := [i for i in ids if i not in learned and i >= len(weight)]:
        raise UserError(f"this text encoder has no embedding of the initializer's token {unknown[0]}")
    return torch.stack([learned[i] if i in learned else weight[i].float() for i in ids])


def initial_rows(
    vocabulary: nn.Module | Tensor, tokenizer, init: str | Tensor | None, num_vectors: int | None
) -> Tensor:
    """Where K vectors start, float32 `[K, D]`, as `TokenEmbedding.install` says of `init` and `num_vectors`.

    `vocabulary` is a text encoder's embedding, or its weight `[V, D]`.
    """
    module, vocabulary = vocabulary, getattr(vocabulary, "weight", vocabulary)
    if init is None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(num_vectors or 1, vocabulary.shape[1], generator=generator).to(vocabulary.device)
    elif isinstance(init, Tensor):
        rows = init.detach().to(vocabulary.device, torch.float32)
    else:
        rows = _rows_of(module, _token_ids(tokenizer, _as_in_a_prompt(module, init)))
    count = len(rows) if num_vectors is None else num_vectors
    if count < 1:
        raise UserError(f"the number of vectors must be at least 1, got {num_vectors}")
    if count < len(rows):
        shares = rows.tensor_split(count)
        return torch.stack([sphere.mean(F.normalize(s, dim=-1)) * s.norm(dim=-1).mean() for s in shares])
    return rows[torch.arange(count, device=rows.device) % len(rows)]


def initial_magnitudes(vocabulary: Tensor, init, initial: Tensor, magnitude: str | float) -> Tensor:
    """Norms for K learned rows, `[K, 1]` float32, as `TokenEmbedding.install` says of `magnitude`."""
    if magnitude == "class":
        if init is None:
            raise UserError("magnitude 'class' is the initializer's norm and needs an initializer")
        return initial.norm(dim=-1, keepdim=True)
    if isinstance(magnitude, str):
        if magnitude not in MAGNITUDES:
            raise UserError(f"magnitude is {', '.join(MAGNITUDES)} or a number, got {magnitude!r}")
        norms = torch.linalg.vector_norm(vocabulary.detach(), dim=-1, dtype=torch.float32)
        value = {
            "mean": norms.sum() / (norms > 0).sum(),
            "min": torch.where(norms > 0, norms, torch.inf).min(),
            "max": norms.max(),
        }[magnitude]
    else:
        if not magnitude > 0:
            raise UserError(f"the magnitude must be positive, got {magnitude}")
        value = torch.tensor(float(magnitude), device=vocabulary.device)
    return value.expand(len(initial), 1).clone()


@torch.no_grad()
def _check_same(concept: TokenEmbedding, module: nn.Module) -> None:
    """Raise a UserError unless words are embedded as `module` embeds them, on a few of them."""
    ids = torch.arange(min(16, len(module.weight), concept.first_id), device=module.weight.device)
    if not torch.allclose(concept(ids), module(ids), rtol=0, atol=0, equal_nan=True):
        raise UserError(
            f"{type(module).__name__} does more than to look up rows of its weight, so that all other words would be "
            "embedded wrongly; this text encoder cannot be used"
        )


def _warn_of_pooling(text_encoder: nn.Module, tokenizer) -> None:
    text_model = getattr(text_encoder, "text_model", None)
    if not hasattr(text_encoder, "text_projection") or getattr(text_model, "eos_token_id", None) != 2:
        return
    if tokenizer.eos_token_id != 2:
        warnings.warn(
            "this text encoder pools its features at the largest token id, which is now the placeholder: words after "
            "it are not seen there. To pool at the end of the text, in training and in drawing: "
            "text_encoder.text_model.eos_token_id = tokenizer.eos_token_id",
            stacklevel=3,
        )


def _new_word(tokenizer, word: str):
    """What to add to a tokenizer: where a lone space is a token, a word that takes the space before it along."""
    if not tokenizer(" ", add_special_tokens=False).input_ids:
        return word  # with the space, diffusers' pipelines would not find it in a prompt
    from tokenizers import AddedToken

    return AddedToken(word, lstrip=True, normalized=False)


def _check_placeholder(tokenizer, placeholder: str, tokens: list[str]) -> None:
    taken = set(tokenizer.added_tokens_encoder) & set(tokens)
    if taken or len(tokenizer(placeholder, add_special_tokens=False).input_ids) == 1:
        raise UserError(f"{placeholder!r} is a word of this model already; choose another, such as '<{placeholder}-1>'")
    if not re.fullmatch(r"<[^<>\sA-Z]+>", placeholder):
        warnings.warn(
            f"the placeholder {placeholder!r} is not bracketed and lower case, like '<dog>': "
            "pipelines lower prompts and would also find it inside other words",
            stacklevel=3,
        )
