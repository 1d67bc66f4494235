"""What a model family is to the rest of the package: `Backbone`, and the `Path` between pictures and noise."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dti_fast.backbones.components import component_names
from dti_fast.backbones.recorder import Tokens, record_tokens
from dti_fast.errors import UserError
from dti_fast.files import hash_tensors
from dti_fast.frozen import optimize_frozen, restore
from dti_fast.frozen.attention import set_attention

DEFAULT_PROMPTS = {
    "object": ("a photo of {}", "a photo of {} on the beach", "a painting of {} in a forest", "{} wearing a red hat"),
    "style": ("a house in the style of {}", "a dog in the style of {}", "a portrait in the style of {}"),
}


@dataclass(frozen=True)
class Path:
    """The way from a picture's latents x to noise n, as T rows that are drawn with equal probability.

    In row i the denoiser sees `a x + b n`, is told `time`, and is to predict `c x + d n`.

    Attributes:
        time: `[T]`, as the denoiser is told it.
        a, b, c, d: float32 `[T]`.
    """

    time: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def __len__(self) -> int:
        return len(self.time)

    def to(self, device: torch.device) -> "Path":
        return Path(*(t.to(device) for t in vars(self).values()))

    def mix(self, latents: Tensor, noise: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the denoiser sees and what it is to predict, both of the shape of `latents` `[B, ...]`; rows `[B]`."""
        shape = (-1, *[1] * (latents.dim() - 1))
        a, b, c, d = (t[rows].view(shape) for t in (self.a, self.b, self.c, self.d))
        return a * latents + b * noise, c * latents + d * noise


def diffusion_path(scheduler) -> Path:
    """The path of a DDPM that predicts the noise, or v = sqrt(alpha) n - sqrt(1 - alpha) x.

    Args:
        scheduler: of a pipeline; only its configuration is read.

    Raises:
        UserError: if the scheduler is no DDPM's, or the model predicts something else.
    """
    from diffusers import DDPMScheduler

    config = scheduler.config
    name = type(scheduler).__name__
    edm = name.startswith("EDM") or config.get("timestep_type") == "continuous"
    if "beta_start" not in config or edm or config.get("use_flow_sigmas"):
        raise UserError(f"this model's noise process ({name}) is none that can be trained: a DDPM's is")
    ddpm = DDPMScheduler.from_config(config)
    kind, alphas = ddpm.config.prediction_type, ddpm.alphas_cumprod.float()
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    if kind == "epsilon":
        target = torch.zeros_like(signal), torch.ones_like(signal)
    elif kind == "v_prediction":
        target = -noise, signal
    else:
        raise UserError(f"this model predicts {kind!r}; only epsilon and v_prediction can be trained")
    return Path(torch.arange(len(alphas), device=alphas.device), signal, noise, *target)


def flow_path(shift: float = 1.0, rows: int = 1000) -> Path:
    """The path of rectified flow, in which the model predicts n - x: x_s = (1 - s) x + s n at time 1000 s.

    Args:
        shift: s of a uniform u in (0, 1] is shift u / (1 + (shift - 1) u).  Source: arXiv 2403.03206, section 5.3.2.
    """
    u = (torch.arange(rows) + 1.0) / rows
    s = shift * u / (1 + (shift - 1) * u)
    one = torch.ones_like(s)
    return Path(1000 * s, 1 - s, s, -one, one)


class Backbone:
    """A loaded diffusers pipeline as training and drawing see it.  A family is a subclass, and a line in `FAMILIES`.

    A subclass says `condition` and `denoise`, and `path` or `encode` where they differ from those here.

    Attributes:
        pipeline: the diffusers pipeline, unchanged but that it draws no progress bars.
        denoiser: the UNet or transformer.
        vae: as the pipeline's.
        text_encoders, tokenizers: in the order in which embedding files name them.
        load_arguments: keyword arguments with which `from_pretrained` loads a pipeline of the family.
        call_arguments: keyword arguments with which the pipeline draws, always.
        guidance_scale: classifier-free guidance by default; None for the pipeline's own.
        lora_targets: names of the denoiser's Linears that a LoRA joins; empty where none is offered.
    """

    load_arguments: Mapping = {}
    call_arguments: Mapping = {}
    guidance_scale: float | None = None
    lora_targets: Sequence[str] = ()

    def __init__(self, pipeline):
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        names = component_names(pipeline.components)
        self.denoiser = getattr(pipeline, names.denoiser)
        self.vae = pipeline.vae
        self.text_encoders = [getattr(pipeline, name) for name in names.text_encoders]
        self.tokenizers = [getattr(pipeline, name) for name in names.tokenizers]
        for module in self.modules():
            module.requires_grad_(False).eval()

    def path(self) -> Path:
        """The noise that training adds, and what the model is to make of it."""
        return flow_path(self.pipeline.scheduler.config.get("shift", 1.0))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures, in the space that the denoiser sees, float32.

        Args:
            pixels: `[N, 3, H, W]` in [-1, 1], on the VAE's device, in its dtype.
        """
        posterior, config = self.vae.encode(pixels).latent_dist, self.vae.config
        mean, std = posterior.mean.float(), posterior.std.float()
        if getattr(config, "latents_mean", None) is not None:
            shift, spread = (
                torch.tensor(values, device=mean.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            mean, std = (mean - shift) / spread, std / spread
        else:
            mean = mean - (getattr(config, "shift_factor", None) or 0.0)
        return mean * config.scaling_factor, std * config.scaling_factor

    def condition(self, tokens: list[Tokens], sizes: Tensor) -> dict:
        """The denoiser's keyword arguments for prompts.

        Args:
            tokens: per text encoder ids and mask, int64 `[B, S]`.
            sizes: `[B, 6]`, SDXL's micro-conditioning (`dti_fast.data.folder.load_pictures`).
        """
        raise NotImplementedError

    def denoise(self, noisy: Tensor, time: Tensor, condition: dict) -> Tensor:
        """The denoiser's prediction in float32, in the space and shape of the latents.

        Args:
            noisy: latents float32 `[B, ...]`.
            time: `[B]` of `path().time`.
        """
        raise NotImplementedError

    def metadata(self) -> dict[str, str]:
        """What an embedding file says of the model beyond its name."""
        return {}

    def modules(self) -> list[nn.Module]:
        return [self.denoiser, self.vae, *self.text_encoders]

    def tokenize(self, prompts: Sequence[str]) -> list[Tokens]:
        """Per text encoder the ids and mask, int64 `[P, S]`, that the stock pipeline makes of prompts."""
        spelled = [self.spell(prompt) for prompt in prompts]
        return record_tokens(self.pipeline, self.text_encoders, self.denoiser, spelled, **self.call_arguments)

    def spell(self, prompt: str) -> str:
        """The prompt in which every concept is written as all of its tokens, unless the pipeline does that itself."""
        if hasattr(self.pipeline, "maybe_convert_prompt"):
            return prompt
        words, known = prompt.split(" "), self.tokenizers[0].get_vocab()
        for i, word in enumerate(words):
            more = 1
            while f"{word}_{more}" in known and word in known:
                words[i] += f" {word}_{more}"
                more += 1
        return " ".join(words)

    def default_resolution(self) -> int:
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def default_prompts(self, learnable_property: str) -> Sequence[str]:
        """Prompts, with {} for the concept, that show an "object" or a "style"."""
        return DEFAULT_PROMPTS[learnable_property]

    def blocks(self) -> list[str]:
        """Names of the denoiser's parts whose recomputation is chosen, in the order of the forward pass."""
        found: list[str] = []
        for name, module in self.denoiser.named_modules():
            inside = any(name.startswith(f"{block}.") for block in found)
            if not inside and name.rpartition(".")[2].isdigit() and type(module).__name__.endswith("Block"):
                found.append(name)
        return found

    def set_pooling(self, pooling: str) -> None:
        """Choose where pooled text features are taken, `eos` or `reference`; most families have no such choice."""

    def optimize_frozen(self, recompute: str | Mapping[str, str], attention: str) -> None:
        """Make the frozen models keep less (`dti_fast.optimize_frozen`), text encoders included.

        Args:
            recompute: as there, for the denoiser.  "block" is for the text encoders too; in a mapping "text_encoders"
                names them.
            attention: one of `dti_fast.frozen.attention.BACKENDS`.
        """
        if isinstance(recompute, str):
            recompute = {"": recompute, "text_encoders": "block" if recompute == "block" else "none"}
        of_denoiser = {name: mode for name, mode in recompute.items() if name != "text_encoders"}
        optimize_frozen(self.denoiser, recompute=of_denoiser)
        set_attention(self.denoiser, attention)
        for text_encoder in self.text_encoders:
            optimize_frozen(text_encoder, recompute=recompute.get("text_encoders", "none"))
            set_attention(text_encoder, attention)

    def restore(self) -> None:
        """Make the models stock again: undo `optimize_frozen` and `set_pooling`, and put the VAE with the denoiser."""
        self.set_pooling("reference")
        for module in (self.denoiser, *self.text_encoders):
            restore(module)
            set_attention(module, "auto")
        device = next(self.denoiser.parameters()).device
        if next(self.vae.parameters()).device != device:  # the module of a fake model cannot be moved
            self.vae.to(device)

    def fingerprint(self) -> str:
        """A short hash of some of the weights: tells models apart, whatever their folder is called."""
        weights = [text_encoder.get_input_embeddings().weight[:64] for text_encoder in self.text_encoders]
        parameters = list(self.denoiser.parameters())
        return hash_tensors(weight.to(torch.bfloat16) for weight in (*weights, parameters[0], parameters[-1]))

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | None = None,
    ) -> list:
        """A PIL picture for each prompt, all in one batch, by the stock pipeline; None leaves a setting to it.

        Picture i starts from noise of `seeds[i]`, drawn on the CPU, so that it is the same on every device.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": size, "width": size}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with self._decoding_one_by_one():
            return self.pipeline(
                prompt=[self.spell(prompt) for prompt in prompts],
                generator=generators,
                **{name: value for name, value in settings.items() if value is not None},
                **self.call_arguments,
            )[0]

    @contextmanager
    def _decoding_one_by_one(self):
        """The VAE's peak is large, and it may have another dtype than the rest of the pipeline."""
        decode = self.vae.decode

        def one_by_one(latents, return_dict=True, **_):
            pictures = torch.cat([decode(one.to(self.vae.dtype)).sample for one in latents.split(1)]).float()
            return SimpleNamespace(sample=pictures) if return_dict else (pictures,)

        self.vae.decode = one_by_one
        try:
            yield
        finally:
            del self.vae.decode


@contextmanager
def decode_in_tiles(vae, side: int = 512) -> Iterator[None]:
    """Let an AutoencoderKL decode tiles of `side` pixels, blended where they overlap; pictures change slightly."""
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side * before[1] // before[0]
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
