"""What the tests of differentiable ops over frozen weights share: lanes, error model, bytes kept by autograd."""

import os
from contextlib import contextmanager

import pytest
import torch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LANES = pytest.mark.parametrize(
    "lane",
    [("reference", "cpu"), ("triton", "cpu"), pytest.param(("triton", "cuda"), marks=pytest.mark.gpu)],
    indirect=True,
    ids=["reference", "interpreter", "triton"],
)


def check(ours, plain, exact):
    """At most twice the error of plain PyTorch in the same dtype, both against float64."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype and ours.isfinite().all()
    if exact.numel() == 0:
        return
    allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    if os.environ["DTI_FAST_BACKEND"] == "triton" and ours.device.type == "cpu" and ours.dtype == torch.bfloat16:
        allowed = allowed + torch.finfo(torch.bfloat16).eps * exact.abs()  # Triton's interpreter truncates
    assert ((ours - exact).abs() <= allowed).all()


def run(layer, x, weight):
    """A layer's output and the gradient of `(output * weight).sum()` with respect to x."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return out.detach(), torch.autograd.grad(out, x, weight.to(out.dtype))[0]


@contextmanager
def poisoned():
    """Fresh tensors hold NaN, so that an element which nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def framed(tensor, step=2):
    """The same values as a strided view into NaN, so that a read beyond them shows."""
    sizes = [size * step + 3 for size in tensor.shape]
    home = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = home[tuple(slice(2, 2 + size * step, step) for size in tensor.shape)]
    return view.copy_(tensor)


def kept(layer, x, frozen=()):
    """Bytes that autograd keeps for backward, by dtype, besides the frozen tensors; views of one storage count once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.dtype, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    for tensor in frozen:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    total = {}
    for dtype, size in storages.values():
        total[dtype] = total.get(dtype, 0) + size
    del out
    return total


def capture(step):
    """A CUDA graph of `step`, warmed up on a side stream as capture demands, and what `step` returned in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
