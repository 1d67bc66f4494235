"""`sphere_step_`: one Riemannian step of unit rows, in place."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, describe
from dti_fast.reference.sphere_step import sphere_step


# Plain comparisons: torch._check with its closures takes longer than the whole step of a few rows.
def _check(
    p, grad, mu, second_moment, step, lr, *,
    kappa, beta, eps, momentum=0.0, momentum_buffer=None, grad_scale=None, found_inf=None,
) -> None:  # fmt: skip
    shape, device = p.shape, p.device
    if len(shape) != 2 or p.dtype != torch.float32:
        raise RuntimeError(f"p must be float32 [K, D], got {describe(p)}")
    for name, tensor in (("grad", grad), ("mu", mu)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in FLOATS or tensor.device != device):
            raise RuntimeError(f"{name} must be a float tensor like p, {describe(p)}, got {describe(tensor)}")
    if second_moment is not None and (
        second_moment.shape != (shape[0], 1) or second_moment.dtype != torch.float32 or second_moment.device != device
    ):
        raise RuntimeError(f"second_moment must be float32 [{shape[0]}, 1] like p, got {describe(second_moment)}")
    if momentum_buffer is not None and (
        momentum_buffer.shape != shape or momentum_buffer.dtype != torch.float32 or momentum_buffer.device != device
    ):
        raise RuntimeError(f"momentum_buffer must be float32 like p, {describe(p)}, got {describe(momentum_buffer)}")
    for name, scalar in (("step", step), ("grad_scale", grad_scale)):
        if scalar is not None and (
            (scalar.shape != (shape[0], 1) and scalar.numel() != 1)
            or scalar.dtype != torch.float32
            or scalar.device != device
        ):
            raise RuntimeError(
                f"{name} must be one float32 number or [{shape[0]}, 1] on {device}, got {describe(scalar)}"
            )
    for name, scalar in (("lr", lr), ("found_inf", found_inf)):
        if scalar is not None and (scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != device):
            raise RuntimeError(f"{name} must be one float32 number on {device}, got {describe(scalar)}")
    if mu is None and kappa != 0.0:
        raise RuntimeError("kappa needs mu, the prior's mean directions")
    if not 0.0 <= beta < 1.0:
        raise RuntimeError(f"beta must lie in [0, 1), got {beta}")
    if (beta == 0.0) != (second_moment is None):
        raise RuntimeError("second_moment goes with a beta above 0, and only then")
    if not 0.0 <= momentum < 1.0:
        raise RuntimeError(f"momentum must lie in [0, 1), got {momentum}")
    if (momentum == 0.0) != (momentum_buffer is None):
        raise RuntimeError("momentum_buffer goes with a momentum above 0, and only then")


def _reference(p, grad, mu, second_moment, step, lr, *, momentum_buffer=None, **options) -> None:
    new_p, new_moment, new_buffer = sphere_step(
        p, grad, mu, second_moment, step, lr, momentum_buffer=momentum_buffer, **options
    )
    p.copy_(new_p)
    if second_moment is not None:
        second_moment.copy_(new_moment)
    if momentum_buffer is not None:
        momentum_buffer.copy_(new_buffer)


Operator(
    "sphere_step_(Tensor(a!) p, Tensor grad, Tensor? mu, Tensor(b!)? second_moment, Tensor step, Tensor lr, *, "
    "float kappa, float beta, float eps, float momentum=0.0, Tensor(c!)? momentum_buffer=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    stem="sphere_step",
    check=_check,
    reference=_reference,
)


def _number(value: Tensor | float, p: Tensor) -> Tensor:
    """In float32; one of the host's also on p's device, where a tensor has to be already."""
    return value.float() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=p.device)


def sphere_step_(
    p: Tensor,
    grad: Tensor,
    mu: Tensor | None,
    second_moment: Tensor | None,
    step: Tensor | float,
    lr: Tensor | float,
    *,
    kappa: float,
    beta: float,
    eps: float,
    momentum: float = 0.0,
    momentum_buffer: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Move unit rows `p` one step along the sphere, in place; nothing waits for the device.

    The formula is `dti_fast.reference.sphere_step`'s.  A row whose loss gradient is exactly zero keeps its `p`,
    `second_moment` and `momentum_buffer` bit for bit, whatever kappa is; one whose projected gradient, or mean of them,
    is zero keeps its `p`.

    Args:
        p: float32 `[K, D]`, unit rows.
        grad: float32, bfloat16, float16 or float64 `[K, D]`, the loss gradient with respect to `p`; not modified.
        mu: `[K, D]` unit rows in any of these dtypes, the mean directions of the von Mises-Fisher prior, or None.
        second_moment: float32 `[K, 1]`, the running mean of squared row norms, in place; None when `beta` is 0.
        step: one number, 1 at the first update, or `[K, 1]`, 1 at the first update of each row.  This and `lr` are
            tensors of any dtype on p's device, as a CUDA graph needs them, or numbers of the host's, which a replay
            would not change.
        lr: one number; at `beta` 0 the tangent of the angle by which every row turns.
        kappa: concentration of the prior; enters before projection and normalisation.
        beta: decay of `second_moment`.
        eps: added to the gradient's norm.
        momentum: decay of `momentum_buffer`.
        momentum_buffer: float32 `[K, D]`, the running mean of gradients along the sphere, zero at first, in place; None
            when `momentum` is 0.
        grad_scale: one float32 number, the loss scale by which `grad` is divided first; or `[K, 1]`, each row's own.
        found_inf: one float32 number; non-zero leaves everything exactly as it is.

    Raises:
        RuntimeError: for a shape or dtype other than these, and for tensors on different devices.
    """
    with torch.no_grad():
        torch.ops.dti_fast.sphere_step_(
            p, grad, mu, second_moment, _number(step, p), _number(lr, p),
            kappa=kappa, beta=beta, eps=eps, momentum=momentum, momentum_buffer=momentum_buffer,
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
