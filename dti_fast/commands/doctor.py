"""`dti-fast doctor`: what this installation is made of and what runs on it, as plain text for a bug report."""

import logging
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from dti_fast import __version__
from dti_fast.ops import backends

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "peft", "bitsandbytes", "xformers")
SETTINGS = ("DTI_FAST_BACKEND", "DTI_FAST_CACHE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
ABSENT = "not installed"


def doctor() -> None:
    """Print versions, GPUs and which backend serves each op: what a bug report needs."""
    print(report())


def report() -> str:
    """Versions, GPUs, the backend of each op and why, and whether xformers and bitsandbytes work.

    Needs the base install only, and raises nothing for a broken part: the part's own line says what is wrong.
    """
    sections = {
        f"dti-fast {__version__}": _versions(),
        "GPU": _gpus(),
        "Ops": _ops(),
        "Optional parts, tried": [
            f"xformers attention: {_outcome('xformers', _try_xformers)}",
            f"bitsandbytes nf4: {_outcome('bitsandbytes', _try_bitsandbytes)}",
        ],
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {line}" for line in lines)))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _versions() -> list[str]:
    lines = [f"{'python':13} {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"]
    lines += [f"{package:13} {_installed(package)}" for package in PACKAGES]
    return lines + [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        return [f"no CUDA device ({f'torch is built for {built_for}' if built_for else 'this torch is a CPU build'})"]
    lines = [f"driver {_driver()}, torch built for CUDA {torch.version.cuda}"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"{i}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        )
    return lines


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"


def _ops() -> list[str]:
    try:
        rows = backends()
    except ValueError as error:  # DTI_FAST_BACKEND names no backend
        return [str(error)]
    return [f"{row.op:24} {row.device:5} {row.backend or 'none':10} {_first_line(row.why)}" for row in rows]


def _outcome(package: str, attempt) -> str:
    """What `attempt` returns, or how it fails."""
    if _installed(package) == ABSENT:
        return ABSENT
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        return attempt("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # a broken binary may raise anything, and this is where to say so
        return f"does not run: {type(error).__name__}: {_first_line(str(error))}"
    finally:
        logging.disable(before)


def _try_xformers(device: str) -> str:
    from xformers.ops import memory_efficient_attention

    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True)
    found = memory_efficient_attention(q, k, v)
    torch.autograd.grad(found.sum(), (q, k, v))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return _agreement(found, expected, device, 0.02)


def _try_bitsandbytes(device: str) -> str:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
    return _agreement(dequantize_4bit(*quantize_4bit(x, quant_type="nf4")), x, device, 0.2)


def _agreement(found: torch.Tensor, expected: torch.Tensor, device: str, allowed: float) -> str:
    error = (found - expected).abs().max().item()
    return f"{'runs' if error <= allowed else 'gives wrong results'} on {device} (largest error {error:.2g})"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
