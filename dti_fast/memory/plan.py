"""Which recomputation, precision and micro-batch fit a card, by counts of what a step keeps alive."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dti_fast.memory.count import Step

MODES = ("none", "geglu", "block")
GIB = 1 << 30

# What cannot be counted.  No card has confirmed any of these.
CUDA_CONTEXT = int(0.4 * GIB)  # driver context and loaded kernels: a guess
WORKSPACES = int(0.1 * GIB)  # cuBLAS takes 8 MiB, on Hopper 32 (PyTorch's defaults); the rest, for cuDNN, is a guess
FRAGMENTATION = 0.05  # of what a step makes, for the allocator's rounding and unusable gaps: a guess
MARGIN = int(0.3 * GIB)  # of the card left alone, for the desktop and for errors of the numbers above: a choice
# What splitting a batch costs, in FLOPs for each further pass: small batches keep a card less busy.  A guess.
PASS_FLOPS = 0.25e12


@dataclass(frozen=True)
class Model:
    """Bytes of a model at one resolution that no choice of recomputation changes.

    Attributes:
        weights, text_encoders: weights of the denoiser and of the text encoders, for each precision that they may have.
        vae: its weights.
        encode: the most that encoding one picture keeps alive beside them.
        guidance: the most that a denoising step of a preview keeps alive.
        decode, decode_tiled: the most that decoding one picture keeps alive, whole and in tiles.
    """

    weights: Mapping[str, int]
    text_encoders: Mapping[str, int]
    vae: int
    encode: int
    guidance: int
    decode: int
    decode_tiled: int


@dataclass(frozen=True)
class Plan:
    """One way to carry out a training run.

    Attributes:
        precision: a key of `model.weights`.
        modes: recomputation of every part.
        micro_batch: pictures in a pass.
        passes: in which a batch goes through.
        step: memory and FLOPs of a pass.
        previews: whether pictures are drawn.
        encode_alone: text encoders and denoiser wait in main memory while the VAE encodes.
        tiled_decoding: previews are decoded in tiles.
    """

    model: Model
    precision: str
    modes: Mapping[str, str]
    micro_batch: int
    passes: int
    step: Step
    previews: bool = True
    encode_alone: bool = False
    tiled_decoding: bool = False

    @property
    def cost(self) -> float:
        """FLOPs of a batch, and what its passes cost beyond them."""
        return self.passes * self.step.flops + (self.passes - 1) * PASS_FLOPS

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part.

        Context, weights and text encoders are there all the time; saved and transient tensors during a step; the VAE
        encodes before the first step, and the preview is drawn after the last.
        """
        slack = 1 + FRAGMENTATION
        drawing = max(self.model.guidance, self.model.decode_tiled if self.tiled_decoding else self.model.decode)
        return {
            "context": CUDA_CONTEXT + WORKSPACES,
            "weights": self.model.weights[self.precision],
            "text encoders": self.model.text_encoders[self.precision],
            "saved": slack * self.step.saved,
            "transient": slack * (self.step.peak - self.step.saved),
            "VAE encode": self.model.vae + slack * self.model.encode,
            "preview": self.model.vae + slack * drawing if self.previews else 0,
        }

    @property
    def total(self) -> float:
        """The most bytes of the card that the run needs at any time."""
        parts = self.parts
        resident = parts["weights"] + parts["text encoders"]
        encoding = parts["VAE encode"] + (0 if self.encode_alone else resident)
        return parts["context"] + max(
            resident + parts["saved"] + parts["transient"], encoding, resident + parts["preview"]
        )

    def within(self, vram: float) -> "Plan":
        """The same plan, with the VAE encoding alone and previews decoded in tiles where `vram` bytes ask for it."""
        parts = self.parts
        room = vram - MARGIN - parts["context"] - parts["weights"] - parts["text encoders"]
        return replace(self, encode_alone=parts["VAE encode"] > room, tiled_decoding=parts["preview"] > room)

    def drawn_at_once(self, vram: float) -> int:
        """How many pictures of a preview `vram` bytes have room for, at least one."""
        parts = self.parts
        rest = vram - MARGIN - parts["context"] - parts["weights"] - parts["text encoders"] - parts["preview"]
        return 1 + max(0, int(rest / ((1 + FRAGMENTATION) * self.model.guidance)))

    def fits(self, vram: float) -> bool:
        return self.total <= vram - MARGIN

    @property
    def recompute(self) -> str:
        """ "none", "geglu" or "block", and the parts that have another mode: "geglu, mid_block block"."""
        usual = max(MODES, key=list(self.modes.values()).count)
        return ", ".join([usual, *(f"{part} {mode}" for part, mode in self.modes.items() if mode != usual)])

    def describe(self) -> str:
        """The choices in a few words."""
        words = [f"recompute {self.recompute}", f"weights {self.precision}"]
        if self.passes > 1:
            words.append(f"{self.passes} passes of {self.micro_batch}")
        words += ["the VAE encodes alone"] * self.encode_alone + ["previews in tiles"] * self.tiled_decoding
        return ", ".join(words)


def choose(plans: Iterable[Plan], vram: float) -> Plan | None:
    """The cheapest of `plans` that fits `vram` bytes, or None."""
    fitting = [plan for plan in (plan.within(vram) for plan in plans) if plan.fits(vram)]
    return min(fitting, key=lambda plan: (plan.cost, plan.total), default=None)
