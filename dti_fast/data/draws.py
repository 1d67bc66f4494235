"""What training draws from, and the random draws of each forward pass."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Everything a step draws from, on the device.  N pictures, P prompts of S tokens."""

    mean: Tensor  # [N, C, h, w] moments of the latents
    std: Tensor  # [N, C, h, w]
    sizes: Tensor  # [N, 6] micro-conditioning
    tokens: list[tuple[Tensor, Tensor]]  # per text encoder ids and mask [P, S]
    prompt_per_picture: bool  # prompt i belongs to picture i

    def to(self, device) -> "Dataset":
        tokens = [(ids.to(device), mask.to(device)) for ids, mask in self.tokens]
        moments = self.mean.to(device), self.std.to(device)
        return Dataset(*moments, self.sizes.to(device), tokens, self.prompt_per_picture)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one forward pass with B samples."""

    picture: Tensor  # [B] indices
    prompt: Tensor  # [B] indices
    timestep: Tensor  # [B]
    posterior_noise: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]

    def split(self, size: int) -> list["Draws"]:
        """The same samples in parts of at most `size`."""
        return [Draws(*parts) for parts in zip(*(t.split(size) for t in vars(self).values()), strict=True)]

    def to(self, device: torch.device) -> "Draws":
        cuda = device.type == "cuda"  # to which only pinned memory is copied without waiting
        tensors = [t.pin_memory() if cuda else t for t in vars(self).values()]
        return Draws(*(t.to(device, non_blocking=True) for t in tensors))


def draw(data: Dataset, batch: int, timesteps: int, seed: int, position: int) -> Draws:
    """The draws of forward pass number `position` of a run, a pure function of these arguments.

    Made on the CPU, so that they are the same whatever the device.  Pictures come in shuffled epochs.
    """
    count = len(data.mean)
    # Hashed into 32 bits, all that torch's CPU generator keeps of a seed.
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {position}").getrandbits(32))
    picture = torch.empty(batch, dtype=torch.long)
    for b in range(batch):
        epoch, place = divmod(position * batch + b, count)
        picture[b] = random.Random(f"{seed} {epoch}").sample(range(count), count)[place]
    prompt = torch.randint(len(data.tokens[0][0]), (batch,), generator=generator)
    shape = (batch, *data.mean.shape[1:])
    draws = Draws(
        picture,
        picture if data.prompt_per_picture else prompt,
        torch.randint(timesteps, (batch,), generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )
    return draws.to(data.mean.device)
