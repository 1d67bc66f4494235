"""A tiny model with what learns in it, for tests of single training steps."""

import torch

from dti_fast.backbones.load import load_backbone
from dti_fast.data.draws import Dataset
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.learner import Learner, install_embeddings

GOOD = torch.zeros(())  # no step has failed yet


def load_cpu(folder, dtype=torch.float32):
    """The backbone in `folder`, or of that name, on the CPU."""
    return load_backbone(str(folder), dtype, torch.device("cpu"))


def setup(folder, device="cpu", lr=0.04, prompts=("a photo of <x>", "<x> on grass"), scaler=None, **settings):
    """A backbone with a concept, a random dataset of five pictures, the path, and what learns with `settings`."""
    backbone = load_cpu(folder)
    config = TrainConfig(placeholder_token="<x>", **{"initializer_token": "dog", **settings}).resolved()
    embeddings = install_embeddings(config, backbone)
    mean, std = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 5)
    data = Dataset(mean, 0.1 * std.abs(), sizes, backbone.tokenize(prompts), False).to(device)
    for module in backbone.modules():
        module.to(device)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    learner = Learner(config, backbone, embeddings, torch.full((), lr, device=device), scaler)
    return backbone, data, backbone.path().to(device), learner
