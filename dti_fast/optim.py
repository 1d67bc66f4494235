"""SphericalSGD: learned directions as an ordinary `torch.optim.Optimizer`."""

import torch
from torch import Tensor

from dti_fast.ops import sphere_step_


class SphericalSGD(torch.optim.Optimizer):
    """Riemannian SGD for unit rows with a von Mises-Fisher prior (arXiv 2512.13672).

    Every parameter is a float32 `[K, D]` of unit rows.  `lr`, `kappa`, `mu`, `beta` and `eps` are keys of
    the parameter group.  The caller's `.grad` is never modified, and no step waits for the device.  Works
    under `torch.amp.GradScaler`: the gradient is unscaled before the prior enters, and an overflow skips
    the update exactly.

    Args:
        params: parameters or parameter groups.
        lr: a float, or a one-element tensor on the parameters' device (needed inside a CUDA graph).  With
            `beta` 0 every step turns every row by arctan(lr).
        kappa: concentration of the prior; 0 is no prior.
        mu: `[K, D]` unit rows, the prior's mean directions.  One tensor serves every parameter of its group.
        beta: decay of the running mean of squared gradient norms; 0 normalises by the present norm alone.
        eps: added to the norm.

    Raises:
        ValueError: for a parameter that is not float32 `[K, D]`, for `kappa` without `mu`, or settings out of range.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        kappa: float = 0.0,
        mu: Tensor | None = None,
        beta: float = 0.0,
        eps: float = 1e-8,
    ):
        super().__init__(params, {"lr": lr, "kappa": kappa, "mu": mu, "beta": beta, "eps": eps})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not isinstance(group["lr"], Tensor) and group["lr"] < 0:
            raise ValueError(f"lr must not be negative, got {group['lr']}")
        if not 0 <= group["beta"] < 1:
            raise ValueError(f"beta must lie in [0, 1), got {group['beta']}")
        if group["kappa"] != 0 and group["mu"] is None:
            raise ValueError("kappa needs mu, the prior's mean directions")
        for p in group["params"]:
            if p.dim() != 2 or p.dtype != torch.float32:
                raise ValueError(f"SphericalSGD takes float32 [K, D] parameters, got {p.dtype} {list(p.shape)}")
            if group["mu"] is not None and group["mu"].shape != p.shape:
                raise ValueError(f"mu is {list(group['mu'].shape)} but the parameter is {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler sets these two before it calls step.
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    if group["beta"] > 0:
                        state["second_moment"] = torch.zeros((len(p), 1), dtype=torch.float32, device=p.device)
                # The model may have moved, or a state come from another device: torch moves neither of these.
                state["step"] = state["step"].to(p.device)
                mu = group["mu"] = None if group["mu"] is None else group["mu"].to(p.device)
                local = {name: None if t is None else t.to(p.device) for name, t in scaling.items()}
                found_inf, lr = local["found_inf"], group["lr"]
                state["step"] += 1 if found_inf is None else (found_inf == 0).reshape(())
                sphere_step_(
                    p,
                    p.grad,
                    mu,
                    state.get("second_moment"),
                    state["step"],
                    torch.full((), lr, dtype=torch.float32, device=p.device)
                    if isinstance(lr, float | int)
                    else lr.to(p.device),
                    kappa=group["kappa"],
                    beta=group["beta"],
                    eps=group["eps"],
                    **local,
                )
        return loss
