"""Largest error of every op, dtype and backend against float64, next to plain PyTorch's own.

python -m benchmarks.kernel_errors                             Markdown
python -m benchmarks.kernel_errors --update docs/kernels.md    the same, as a section of that file

Without a GPU, TRITON_INTERPRET=1 lets the Triton kernels take part, in Triton's interpreter.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks._harness import forced, update_section
from dti_fast.ops import geglu, group_norm_silu, layer_norm, sphere_step_, token_embed
from dti_fast.reference import token_embed as embed
from dti_fast.reference.sphere_step import sphere_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native", "triton")


def sphere_step_errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """[33, 768] with the prior; `dtype` is the gradient's."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(33, 768, generator=generator)).to(device) for _ in range(3)]
    start, grad, mu = rows[0], rows[1].to(dtype), rows[2]
    for beta in (0.0, 0.9):
        options = {"kappa": 0.1, "beta": beta, "eps": 1e-8}
        moment = torch.full((33, 1), 1.0, device=device) if beta else None
        tensors = (start, grad, mu, moment, torch.tensor(3.0, device=device), torch.tensor(0.04, device=device))
        exact, _ = sphere_step(*(None if t is None else t.double() for t in tensors), **options)
        plain, _ = sphere_step(*tensors, **options)
        errors = {"plain PyTorch": (plain - exact).abs().max().item()}
        for backend in BACKENDS:
            p, *rest = (None if t is None else t.clone() for t in tensors)
            with forced(backend):
                sphere_step_(p, *rest, **options)
            errors[backend] = (p - exact).abs().max().item()
        yield f"p, beta {beta}", errors


def token_embed_errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """[2, 77] ids into 768 columns, 4 directions, each at some ten positions; `dtype` is the vocabulary's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 36, (2, 77), generator=generator).to(device)
    vocabulary = torch.randn(32, 768, generator=generator).to(device, dtype)
    directions = F.normalize(torch.randn(4, 768, generator=generator)).to(device)
    magnitudes = torch.rand(4, 1, generator=generator).add(0.2).to(device)
    weight = torch.randn(2, 77, 768, generator=generator).to(device, dtype)
    exact = embed.token_embed(ids, *(t.double() for t in (vocabulary, directions, magnitudes)), 32)
    slope = embed.token_embed_backward(weight.double(), ids, magnitudes.double(), 32)
    plain = directions.clone().requires_grad_()
    out = torch.where((ids < 32)[..., None], vocabulary[ids.clamp(max=31)], (magnitudes * plain).to(dtype)[ids % 4])
    (gradient,) = torch.autograd.grad(out, plain, weight)
    forward, backward = ({"plain PyTorch": (a - b).abs().max().item()} for a, b in ((out, exact), (gradient, slope)))
    for backend in BACKENDS:
        with forced(backend):
            out = token_embed(ids, vocabulary, directions.requires_grad_(), magnitudes, 32)
            (gradient,) = torch.autograd.grad(out, directions, weight)
        forward[backend] = (out - exact).abs().max().item()
        backward[backend] = (gradient - slope).abs().max().item()
    yield "embeddings", forward
    yield "gradient", backward


def group_norm_silu_errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """[1, 320, 32, 32] in 32 groups, whose mean is half a deviation."""
    for layout, memory in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        for of, errors in layer_errors(
            lambda x, weight, bias: group_norm_silu(x, 32, weight, bias),
            lambda x, weight, bias: F.silu(F.group_norm(x, 32, weight, bias)),
            *((t + 0.5).contiguous(memory_format=memory) for t in normal(dtype, device, (1, 320, 32, 32))),
            *normal(dtype, device, (320,)),
        ):
            yield f"{of}, {layout}", errors


def layer_norm_errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """[64, 1280] rows whose mean is half a deviation."""
    x, grad = normal(dtype, device, (64, 1280))
    return layer_errors(
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (1280,), weight, bias),
        x + 0.5, grad, *normal(dtype, device, (1280,)),
    )  # fmt: skip


def geglu_errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """[16, 2 x 1280]."""
    projected, _ = normal(dtype, device, (16, 2560))
    for approximate in ("none", "tanh"):
        for of, errors in layer_errors(
            lambda x, a=approximate: geglu(x, a),
            lambda x, a=approximate: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1], approximate=a),
            projected,
            normal(dtype, device, (16, 1280))[1],
        ):
            yield f"{of}, {approximate}", errors


def layer_errors(ours: Callable, plain: Callable, x, grad, *frozen) -> Iterator[tuple[str, dict[str, float]]]:
    """Of a layer's output and input gradient."""

    def both(layer: Callable, x, *frozen) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = layer(x, *frozen)
        return out.detach(), torch.autograd.grad(out, x, grad.to(out.dtype))[0]

    exact = both(plain, *(t.double().contiguous() for t in (x, *frozen)))
    results = {"plain PyTorch": both(plain, x, *frozen)}
    for backend in ("reference", "triton"):
        with forced(backend):
            results[backend] = both(ours, x, *frozen)
    for index, of in enumerate(("output", "gradient")):
        yield of, {name: (result[index] - exact[index]).abs().max().item() for name, result in results.items()}


def normal(dtype: torch.dtype, device: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


def markdown() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    lines = [f"Largest absolute error against float64 on {where}; torch {torch.__version__}.", ""]
    if device == "cpu":
        lines += ["Triton ran in its interpreter, which truncates to bfloat16 where a GPU rounds.", ""]
    lines += ["| op | dtype | of | plain PyTorch | " + " | ".join(BACKENDS) + " |", "|---" * (4 + len(BACKENDS)) + "|"]
    for op, errors in (
        ("sphere_step_", sphere_step_errors),
        ("token_embed", token_embed_errors),
        ("group_norm_silu", group_norm_silu_errors),
        ("layer_norm", layer_norm_errors),
        ("geglu", geglu_errors),
    ):
        for dtype in DTYPES:
            for what, row in errors(dtype, device):
                cells = " | ".join(f"{row[name]:.1e}" if name in row else "" for name in ("plain PyTorch", *BACKENDS))
                lines.append(f"| {op} | {str(dtype).removeprefix('torch.')} | {what} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.update:
        update_section(options.update, "Errors", markdown())
    else:
        print(markdown())


if __name__ == "__main__":
    main()
