"""What the benchmarks of training train: a model, pictures, prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import Path
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.backbones.skeleton import skeleton
from dti_fast.data.draws import Dataset
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.data.templates import OBJECT_TEMPLATES
from dti_fast.tokens import TokenEmbedding

NAMES = {"pocket": "pocket", "sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}
PLACEHOLDER = "<concept>"


@dataclass(frozen=True)
class Task:
    """One concept to learn, the same for every contender.

    Attributes:
        pixels: `[N, 3, H, W]` float32 in [-1, 1], on the device, for those who encode them anew in every step.
        data: the same pictures as moments, and the prompts with the placeholder's ids in them.
        path: the noise that training adds.
        first_ids: the placeholder's id in every text encoder.
        vectors: the K embeddings that learning starts from, `[K, D]` float32 for every text encoder.
        batch: pictures a step.
    """

    backbone: Backbone
    pixels: Tensor
    data: Dataset
    path: Path
    initializer: str
    first_ids: list[int]
    vectors: list[Tensor]
    batch: int

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def install(self) -> list[TokenEmbedding]:
        return install(self.backbone, self.initializer)


def make_task(model: str, resolution: int, batch: int, dtype: torch.dtype, device: torch.device) -> Task:
    """The bundled concept on the pocket model, or five random pictures on a random model of the real size."""
    if model == "pocket":
        backbone = load_backbone(Pocket.name, dtype, device)
        pixels, sizes = load_pictures(find_pictures(Pocket.concept), resolution)
        initializer = Pocket.initializer
    else:
        with device:  # the layers' own random initialisation, made where it is used
            backbone = skeleton(model, dtype)
        pixels = torch.rand(5, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
        sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * 5)
        initializer = "dog"
    backbone.set_pooling("eos")
    pixels = pixels.to(device)
    mean, std = encode_moments(backbone, pixels)
    embeddings = install(backbone, initializer)
    tokens = backbone.tokenize([template.format(PLACEHOLDER) for template in OBJECT_TEMPLATES])
    task = Task(
        backbone, pixels, Dataset(mean, std, sizes, tokens, False).to(device), backbone.path().to(device), initializer,
        [e.first_id for e in embeddings], [e.vectors().detach() for e in embeddings], batch,
    )  # fmt: skip
    for embedding in embeddings:
        embedding.uninstall()
    return task


def install(backbone: Backbone, initializer: str) -> list[TokenEmbedding]:
    return [
        TokenEmbedding.install(text_encoder, tokenizer, PLACEHOLDER, init=initializer)
        for text_encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True)
    ]
