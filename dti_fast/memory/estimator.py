"""What a training run of a model costs in memory and FLOPs under every plan, counted when asked for."""

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import decode_in_tiles
from dti_fast.backbones.skeleton import configurations, skeleton
from dti_fast.data.draws import Dataset, Draws
from dti_fast.errors import UserError
from dti_fast.frozen.quantise import PRECISIONS, replaceable, weight_bytes
from dti_fast.loss import Consistency, diffusion_loss
from dti_fast.memory import store
from dti_fast.memory.count import Count, Segment, compose, count_step, ladder
from dti_fast.memory.live_bytes import LiveBytes
from dti_fast.memory.plan import GIB, MARGIN, MODES, Model, Plan, choose
from dti_fast.tokens import TokenEmbedding

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PROMPT = "a photo of a <concept>"  # only its length matters

# Puts what learns beside the embeddings into a backbone; returns what it makes of the loss.
Extend = Callable[[Backbone, list[TokenEmbedding]], Consistency | None]


class Estimator:
    """Counts a training run; the model's weights are not needed.

    Args:
        model: as for `load_backbone`, or one of the shipped configurations.
        dtype: of the frozen model.
        batch: pictures in a forward pass.
        resolution: in pixels; None for the model's own.
        attention: as for `Backbone.optimize_frozen`.
        modes: the modes of recomputation to choose from.
        previews: whether pictures are drawn.
        extend: adds what learns beside the embeddings, if anything does.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        *,
        batch: int,
        resolution: int | None = None,
        attention: str = "auto",
        modes: Sequence[str] = MODES,
        previews: bool = True,
        extend: Extend | None = None,
    ):
        self.name, self.dtype, self.batch, self.modes, self.previews = model, dtype, batch, tuple(modes), previews
        self._resolution, self._extend = resolution, extend
        self._attention = "auto" if attention == "xformers" else attention  # which keeps as much as sdpa
        self._fake = FakeTensorMode()
        self._consistency: Consistency | None = None
        folder = configurations(model)
        self._key = None if extend else store.model_key(folder, dtype)

    @cached_property
    def _backbone(self) -> Backbone:
        with self._fake:
            backbone = skeleton(self.name, self.dtype)
            embeddings = [
                TokenEmbedding.install(text_encoder, tokenizer, "<concept>", init=torch.empty(1, width))
                for text_encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True)
                for width in text_encoder.get_input_embeddings().weight.shape[1:]
            ]
            backbone.optimize_frozen(self.modes[0], self._attention)
        if self._extend is not None:
            self._consistency = self._extend(backbone, embeddings)
            for module in [backbone.denoiser, *embeddings]:
                self._make_fake(module)
        return backbone

    def _make_fake(self, module: nn.Module) -> None:
        """Give a module fake parameters for real ones: peft casts those that it makes, which fake ones do not allow."""
        for child in module.modules():
            for name, p in child.named_parameters(recurse=False):
                if not isinstance(p, FakeTensor):
                    fake = self._fake.from_tensor(p.detach())
                    child.register_parameter(name, nn.Parameter(fake, p.requires_grad))

    def _stored(self, what: str, count: Callable[[], Any]) -> Any:
        """What `count` gives, or gave once for a model of the same configuration."""
        if self._key is None:
            return count()
        key = f"{self._key} {what}"
        found = store.read(key)
        if found is None:
            found = count()
            store.write(key, found)
        return found

    @cached_property
    def resolution(self) -> int:
        return self._resolution or self._stored("resolution", lambda: self._backbone.default_resolution())

    @property
    def title(self) -> str:
        return f"{self.name} at {self.resolution} pixels"

    @cached_property
    def _lengths(self) -> list[int]:
        """Tokens of a prompt, for each text encoder."""
        return [ids.shape[1] for ids, _ in self._backbone.tokenize([PROMPT])]

    def _dataset(self, count: int) -> Dataset:
        """Under `FakeTensorMode`, `count` pictures and prompts."""
        ids = [torch.ones(count, length, dtype=torch.int64) for length in self._lengths]
        tokens = [(of_encoder, torch.ones_like(of_encoder)) for of_encoder in ids]
        latents = self._latents(count)
        return Dataset(latents, latents, torch.empty(count, 6), tokens, False)

    @cached_property
    def _latent_shape(self) -> torch.Size:
        with self._fake, torch.no_grad():
            mean, _ = self._backbone.encode(self._pixels())
        return mean.shape[1:]

    def _latents(self, count: int) -> Tensor:
        return torch.empty(count, *self._latent_shape)

    def _pixels(self) -> Tensor:
        return torch.empty(1, 3, self.resolution, self.resolution, dtype=self._backbone.vae.dtype)

    @cached_property
    def model(self) -> Model:
        """What no choice of recomputation changes."""
        fields = self._stored(f"model at {self.resolution}", lambda: list(vars(self._count_model()).values()))
        return Model(*fields)

    def _count_model(self) -> Model:
        backbone, vae = self._backbone, self._backbone.vae
        self._lengths, self._latent_shape  # noqa: B018, asked for before anything is counted

        def most(compute) -> int:
            with self._fake, torch.no_grad(), LiveBytes() as counter:
                compute()
            return counter.peak

        def denoise():  # two of each, for guidance
            data = self._dataset(2)
            condition = backbone.condition(data.tokens, data.sizes)
            backbone.denoise(data.mean, backbone.path().time[torch.zeros(2, dtype=torch.int64)], condition)

        def decode():
            vae.decode(self._latents(1).to(vae.dtype))

        def weights(modules) -> dict[str, int]:
            # Of quantised modules also the largest matrix, which is there in full while it works.
            largest = max((m.get_submodule(name).weight.nbytes for m in modules for name in replaceable(m)), default=0)
            return {
                p: sum(weight_bytes(m, p, self.dtype) for m in modules) + (largest if p in PRECISIONS else 0)
                for p in precisions("auto", self.dtype)
            }

        whole = most(decode)
        with decode_in_tiles(vae):
            tiled = most(decode)
        return Model(
            weights=weights([backbone.denoiser]),
            text_encoders=weights(backbone.text_encoders),
            vae=weight_bytes(vae, "", vae.dtype),
            encode=most(lambda: backbone.encode(self._pixels())),
            guidance=most(denoise),
            decode=whole,
            decode_tiled=tiled,
        )

    @cache  # noqa: B019, an estimator lives as long as its run
    def count(self, mode: str, micro_batch: int) -> Count:
        """A pass of `micro_batch` pictures with every part in one mode."""
        what = f"{micro_batch} at {self.resolution}, {mode}, attention {self._attention}"
        forward, *segments = self._stored(what, lambda: self._count_pass(mode, micro_batch).as_list())
        return Count([Segment(*segment) for segment in segments], forward)

    def _count_pass(self, mode: str, micro_batch: int) -> Count:
        backbone, _ = self._backbone, self._lengths
        backbone.optimize_frozen(mode, self._attention)
        for module in backbone.modules():  # as in a run's first step, which makes the gradients
            module.zero_grad(set_to_none=True)
        with self._fake:
            data, path = self._dataset(micro_batch), backbone.path()
            index = torch.zeros(micro_batch, dtype=torch.int64)
            draws = Draws(index, index, index, data.mean, data.mean)
            return count_step(
                backbone.denoiser,
                backbone.blocks(),
                lambda: diffusion_loss(backbone, data, path, draws, self._consistency),
            )

    def plan(self, precision: str, mode: str, micro_batch: int) -> Plan:
        """All parts in one mode."""
        return self._plans(precision, {mode: self.count(mode, micro_batch)}, micro_batch)[0]

    def plans(self, precision: str) -> list[Plan]:
        """Every plan worth considering for one precision."""
        plans = []
        for micro_batch in micro_batches(self.batch):
            counts = {mode: self.count(mode, micro_batch) for mode in self.modes}
            plans += self._plans(precision, counts, micro_batch)
        return plans

    def _plans(self, precision: str, counts: dict[str, Count], micro_batch: int) -> list[Plan]:
        passes = self.batch // micro_batch
        return [
            Plan(self.model, precision, modes, micro_batch, passes, compose(counts, modes), self.previews)
            for modes in ladder(counts)
        ]

    def smallest(self, allowed: Sequence[str]) -> Plan:
        """The plan that needs least, in any of the `allowed` precisions."""
        plans = (plan.within(0) for precision in allowed for plan in self.plans(precision))
        return min(plans, key=lambda plan: plan.total)

    def choose(self, allowed: Sequence[str], vram: float) -> Plan:
        """The cheapest plan that fits `vram` bytes, in the first of the `allowed` precisions in which there is one.

        Raises:
            UserError: if none fits; names the smallest.
        """
        for precision in allowed:
            plan = self.plan(precision, self.modes[0], self.batch).within(vram)
            if plan.fits(vram):  # the cheapest of all: nothing else need be counted
                return plan
            fitting = choose(self.plans(precision), vram)
            if fitting is not None:
                return fitting
        smallest = self.smallest(precisions("auto", self.dtype))
        raise UserError(
            f"training {self.title} does not fit {vram / GIB:.1f} GiB; the smallest plan "
            f"({smallest.describe()}) needs {math.ceil((smallest.total + MARGIN) / GIB * 10) / 10} GiB"
        )


def precisions(choice: str | None, dtype: torch.dtype) -> list[str]:
    """The precisions that weights may have under a `--base_precision`, best first."""
    own = DTYPES[dtype]
    return [own, *PRECISIONS] if choice == "auto" else [choice if choice in PRECISIONS else own]


def micro_batches(batch: int) -> list[int]:
    """Sizes of equal parts of a batch: all of it, half or fewer, half of that or fewer, down to one."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(max(size for size in range(1, sizes[-1] // 2 + 1) if batch % size == 0))
    return sizes
