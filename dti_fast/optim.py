"""Learned directions as ordinary optimizers.

SphericalSGD moves unit rows, DirectionSGD the rows of a whole embedding matrix, each at its own norm.  SphericalAdam is
what SphericalSGD is to be compared with.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from dti_fast import sphere
from dti_fast.ops import sphere_step_
from dti_fast.ops._dispatch import has_values
from dti_fast.reference.sphere_step import sphere_step

_SINGLE_AND_DOUBLE = (torch.float32, torch.float64)
_SLOW = 1e-3  # tangent of the angle of a step below which a run of ordinary length hardly moves


class _Spherical(torch.optim.Optimizer):
    """What the optimizers here share: checks of settings, loss scaling, states that keep their dtype.

    A row whose loss gradient is exactly zero stays where it is, bit for bit, with its state.
    """

    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, name = self.param_groups[-1], type(self).__name__
        for key in ("kappa", "beta", "eps"):
            if key in group:
                group[key] = float(group[key])
                if not 0 <= group[key] < math.inf:
                    raise ValueError(f"{key} must be a number that is not negative, got {group[key]}")
        decays = [(key, group.get(key, 0)) for key in ("beta", "momentum")]
        for key, decay in [*decays, *(("betas", b) for b in group.get("betas", ()))]:
            if not 0 <= decay < 1:
                raise ValueError(f"{key} must lie in [0, 1), got {group[key]}")
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"  # where nobody may read it
        if not on_device and (not isinstance(lr, Tensor) or has_values(lr)):
            if not 0 <= float(lr) < math.inf:
                raise ValueError(f"lr must be a number that is not negative, got {float(lr)}")
            if not isinstance(lr, Tensor) and 0 < lr < _SLOW:
                warnings.warn(
                    f"{name} turns a row by {math.degrees(math.atan(lr)):.2g} degrees a step at lr {lr:g}, which is "
                    "the tangent of that angle and not a step of Adam; 0.04 is a good start",
                    stacklevel=4,
                )
        for p in _moving(group):
            self._check(p, group)

    def _check(self, p: Tensor, group: dict) -> None:
        """Raise a ValueError unless this optimizer can move `p`."""
        name = type(self).__name__
        if p.dim() != 2 or p.dtype not in _SINGLE_AND_DOUBLE:
            raise ValueError(f"{name} takes float32 or float64 [K, D] parameters, got {p.dtype} {list(p.shape)}")
        mu = group["mu"]
        if group["kappa"] != 0 and mu is None:
            raise ValueError("kappa needs mu, the prior's mean directions")
        if mu is not None and mu.shape != p.shape:
            raise ValueError(f"mu is {list(mu.shape)} but the parameter is {list(p.shape)}")
        _check_unit(p, f"{name} moves unit rows. dti_fast.DirectionSGD keeps every row at its own norm")
        if mu is not None:
            _check_unit(mu, "mu holds unit rows, the prior's mean directions")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler sets these two before it calls step.
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for group in self.param_groups:
            for p in _moving(group):
                if not p.requires_grad:
                    warnings.warn(
                        f"{type(self).__name__} was given a parameter {list(p.shape)} that no longer requires a "
                        "gradient, so it does not learn. Freeze the text encoder, or wrap it with PEFT, before "
                        "TokenEmbedding.install; or call requires_grad_(True) on the parameter",
                        stacklevel=4,
                    )
                if p.grad is None:
                    continue
                if not self.state[p] and p.device.type == "cpu":  # other rows may have been loaded since
                    self._check(p, group)
                # The model may have moved, or a state come from another device: torch moves none of these.
                for key, value in self.state[p].items():
                    self.state[p][key] = value.to(p.device)
                lr, dtype = group["lr"], torch.float64 if p.dtype == torch.float64 else torch.float32
                if isinstance(lr, Tensor):
                    lr = lr.to(p.device, dtype)
                else:
                    lr = torch.full((), float(lr), dtype=dtype, device=p.device)
                self._update(p, group, lr, **{k: None if t is None else t.to(p.device) for k, t in scaling.items()})
        return loss

    def _update(self, p: Tensor, group: dict, lr: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Move the rows of `p` by one step of `p.grad`."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch gives every state the dtype of its parameter, which would round what is kept in float32.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = value.to(p.device)


def _moving(group: dict) -> list[Tensor]:
    """The parameters of a group that move; with `per_sample` each is followed by its counts."""
    return group["params"][:: 2 if group.get("per_sample") else 1]


def _counts(p: Tensor, group: dict) -> Tensor | None:
    """The counts that follow `p` in a group with `per_sample`, or None if they are missing."""
    pairs = zip(group["params"][::2], group["params"][1::2], strict=False)
    return next((counts for rows, counts in pairs if rows is p), None)


def _check_unit(rows: Tensor, what: str) -> None:
    """Raise a ValueError that begins with `what` unless all rows have a norm of 1."""
    if not has_values(rows):
        return
    off = (torch.linalg.vector_norm(rows.detach(), dim=-1) - 1).abs().max().item()
    if not off < 1e-2:  # not a number is wrong, too
        raise ValueError(f"{what}; got a row whose norm is {off:.4g} away from 1")


def _has_gradient(grad: Tensor) -> Tensor:
    """Which rows have a loss gradient, `[K, 1]`."""
    return (grad != 0).any(-1, keepdim=True)


def _with_prior(v: Tensor, grad: Tensor, mu: Tensor | None, group: dict, grad_scale: Tensor | None) -> Tensor:
    """Gradient of the loss and the prior with respect to unit rows `v`, in their dtype: grad / grad_scale - kappa mu.

    With `relative`, kappa is multiplied by the norm of the row's own grad / grad_scale along the sphere.
    """
    g = grad.to(v.dtype) if grad_scale is None else grad.to(v.dtype) / grad_scale
    if group["kappa"] == 0:
        return g
    kappa = group["kappa"]
    if group["relative"]:
        kappa = kappa * sphere.tangent(v, g).norm(dim=-1, keepdim=True)
    return g - kappa * mu


def _start(rows: Tensor, group: dict) -> dict[str, Tensor]:
    """The state of `_turn` before the first step.

    `step`, with a running mean of norms one for each row; `second_moment`; `momentum_buffer`.
    """
    state = {"momentum_buffer": torch.zeros_like(rows)} if group.get("momentum", 0) > 0 else {}
    if group["beta"] == 0:
        return state | {"step": torch.zeros((), dtype=torch.float32, device=rows.device)}
    zeros = torch.zeros((len(rows), 1), dtype=torch.float32, device=rows.device)
    return state | {"step": zeros, "second_moment": zeros.to(rows.dtype, copy=True)}


def _turn(
    v: Tensor, grad: Tensor, mu: Tensor | None, state: dict, group: dict, lr: Tensor,
    grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """Move unit rows `v` one step along the sphere, in place, and count it in `state` (`_start`)."""
    taken = 1 if found_inf is None else (found_inf == 0).reshape(())
    state["step"] += taken * _has_gradient(grad) if group["beta"] > 0 else taken
    kappa = group["kappa"]
    if group["relative"]:  # the prior is added here, so that the step has none to add
        grad, kappa, grad_scale = _with_prior(v, grad, mu, group, grad_scale), 0.0, None
    arguments = (v, grad, mu, state.get("second_moment"), state["step"], lr)
    options = {"kappa": kappa, "beta": group["beta"], "eps": group["eps"]}
    if (buffer := state.get("momentum_buffer")) is not None:
        options |= {"momentum": group["momentum"], "momentum_buffer": buffer}
    options |= {"grad_scale": grad_scale, "found_inf": found_inf}
    if v.dtype == torch.float32:
        return sphere_step_(*arguments, **options)
    moved, moment, mean = sphere_step(*arguments, **options)
    v.copy_(moved)
    if moment is not None:
        state["second_moment"].copy_(moment)
    if buffer is not None:
        buffer.copy_(mean)


class SphericalSGD(_Spherical):
    """Riemannian SGD for unit rows with a von Mises-Fisher prior (arXiv 2512.13672).

    Every parameter is a `[K, D]` of unit rows, float32 or float64.  All arguments but `params` are keys of the
    parameter group.  The caller's `.grad` is never modified, and no step waits for the device.  Works
    under `torch.amp.GradScaler`: the gradient is unscaled before the prior enters, and an overflow skips
    the update exactly.  A row whose loss gradient is exactly zero stays where it is, with its running means: the prior
    alone moves nothing.

    Args:
        params: parameters or parameter groups; with `per_sample` each parameter is followed by its counts.
        lr: a number, or a one-element tensor on the parameters' device (needed inside a CUDA graph).  With
            `beta` 0 every step turns every row by arctan(lr).
        kappa: concentration of the prior; 0 is no prior.
        mu: `[K, D]` unit rows, the prior's mean directions.  One tensor serves every parameter of its group.
        relative: multiply kappa by the norm of each row's loss gradient along the sphere, so that the prior's share
            does not depend on the scale of the loss.  Official code and paper: False.
        beta: decay of the running mean of squared gradient norms; 0 normalises by the present norm alone.
        eps: added to the norm.
        momentum: decay of the running mean of gradients along the sphere, which takes the gradient's place; each step
            carries it to the tangent space of the present point.  0 steps along the present gradient alone.
        per_sample: step along the mean of every sample's own unit gradient, so that none outweighs another
            (`dti_fast.TokenEmbedding.per_sample`).  A parameter's `.grad` then is the sum of these and the `.grad` of
            the counts, `[K, 1]`, their number; kappa weighs the prior against a mean of unit vectors, and a loss scale
            cancels.  To scale or clip both gradients by one factor changes nothing.

    Raises:
        ValueError: for a parameter that is not a float `[K, D]` of unit rows, for one without its counts, for `kappa`
            without `mu`, or for settings out of range.  Norms are looked at here and, on the CPU, at the first step;
            elsewhere that would wait for the device.
        RuntimeError: in `step`, for a gradient without counts.

    Warns:
        UserWarning: for an lr so small that hardly anything moves, and in `step` for a parameter that was frozen since.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        kappa: float = 0.0,
        mu: Tensor | None = None,
        relative: bool = False,
        beta: float = 0.0,
        eps: float = 1e-8,
        momentum: float = 0.0,
        per_sample: bool = False,
    ):
        defaults = {"lr": lr, "kappa": kappa, "mu": mu, "relative": relative, "beta": beta, "eps": eps}
        super().__init__(params, defaults | {"momentum": momentum, "per_sample": per_sample})

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # a state of an earlier version has neither
            group.setdefault("momentum", 0.0)
            group.setdefault("per_sample", False)

    def _check(self, p, group):
        super()._check(p, group)
        if group["per_sample"]:
            counts = _counts(p, group)
            if counts is None or counts.shape != (len(p), 1):
                raise ValueError(
                    f"per_sample needs the counts of a parameter, [{len(p)}, 1], after it: "
                    "params=[embedding.rows, embedding.per_sample()]"
                )

    def _update(self, p, group, lr, grad_scale, found_inf):
        if not self.state[p]:
            self.state[p] = _start(p, group)
        if group["per_sample"]:
            counts = _counts(p, group).grad
            if counts is None:
                raise RuntimeError("the parameter has a gradient without counts: call TokenEmbedding.per_sample first")
            grad_scale = counts + (counts == 0)  # a row without samples has no part in the step
        mu = group["mu"] = None if group["mu"] is None else group["mu"].to(p.device)
        _turn(p, p.grad, None if mu is None else mu.to(p.dtype), self.state[p], group, lr, grad_scale, found_inf)


class DirectionSGD(_Spherical):
    """SphericalSGD for whole embedding matrices: every row keeps its own norm, and only its direction learns.

    For trainers that extend a vocabulary, hand over the whole matrix and name their optimizer, such as kohya's
    `--optimizer_type dti_fast.DirectionSGD`.  The prior's mean direction of a row is its direction at the first step.
    Gradients are those of the rows; with respect to a row's direction they are longer by its norm, so that `kappa`
    means what it means to SphericalSGD behind a TokenEmbedding.

    Parameters are `[V, D]`.  float16 and bfloat16 need `rows`: their learned rows have float32 masters, kept in the
    optimizer's state.  A row that somebody else has written meanwhile is taken over as it is.  The caller's `.grad` is
    never modified, and no step waits for the device.  Works under `torch.amp.GradScaler`.

    Args:
        params: parameters or parameter groups.
        lr: as SphericalSGD's; a step turns a row by arctan(lr), whatever its norm.
        kappa, relative, beta, eps: as SphericalSGD's.
        rows: how many rows learn, the last ones of every matrix; they are where added tokens are.  None is for every
            row that receives a gradient, at the price of some copies of the matrix, one of which is kept if there is a
            prior.

    Raises:
        ValueError: for a parameter that is not a float `[V, D]`, or settings out of range.
        RuntimeError: in `step`, for a sparse gradient.

    Warns:
        UserWarning: as SphericalSGD.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 0.04,
        *,
        kappa: float = 1e-4,
        rows: int | None = None,
        relative: bool = False,
        beta: float = 0.0,
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "kappa": kappa, "rows": rows, "relative": relative, "beta": beta, "eps": eps}
        super().__init__(params, defaults)

    def _check(self, p, group):
        rows = group["rows"]
        if p.dim() != 2 or not p.is_floating_point():
            raise ValueError(f"DirectionSGD takes [V, D] embeddings, got {p.dtype} {list(p.shape)}")
        if rows is not None and not 0 < rows <= len(p):
            raise ValueError(f"rows must lie between 1 and {len(p)}, the rows of the embedding, got {rows}")
        if rows is None and p.dtype not in _SINGLE_AND_DOUBLE:
            raise ValueError(
                f"{p.dtype} is too coarse for steps this small: give rows, the number of rows that learn, so that they "
                "alone are kept in float32 too"
            )

    def _update(self, p, group, lr, grad_scale, found_inf):
        if p.grad.is_sparse:
            raise RuntimeError("DirectionSGD takes no sparse gradients; make the embedding with sparse=False")
        state, first = self.state[p], 0 if group["rows"] is None else len(p) - group["rows"]
        stored, grad, rows = p[first:], p.grad[first:], p[first:]
        if p.dtype not in _SINGLE_AND_DOUBLE:
            self._check(p, group)  # the model may have got another dtype since
            rows = state.setdefault("masters", stored.float())
            rows.copy_(torch.where(stored == rows.to(p.dtype), rows, stored.float()))
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if "step" not in state:
            state |= _start(rows, group) | {"norms": norms.clone()}
        # The first norm: by rounding, the present one would drift.
        norms = state["norms"].copy_(torch.where((norms / state["norms"] - 1).abs() < 1e-2, state["norms"], norms))
        directions = F.normalize(rows, dim=-1)
        if group["kappa"] != 0 and "mu" not in state:
            state["mu"] = directions.clone()
        along = grad.to(rows.dtype) * norms
        _turn(directions, along, state.get("mu"), state, group, lr, grad_scale, found_inf)
        # Times the norm, a row that did not move would still change its last bits.
        moves = _has_gradient(along) if found_inf is None else _has_gradient(along) & (found_inf == 0)
        rows.copy_(torch.where(moves, norms * directions, rows))
        if rows is not stored:
            stored.copy_(torch.where(moves, rows.to(p.dtype), stored))


class SphericalAdam(_Spherical):
    """Adam for unit rows, with the prior of SphericalSGD: what that optimizer is to be compared with.

        g  = grad / grad_scale - kappa mu
        g  = g - (g . p) p                                            tangent projection
        m  = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2              element by element
        u  = (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)
        u  = u - (u . p) p                                            m is of earlier points, and the division turns it
        p  = normalise(p - lr u / sqrt(D))                            retraction; a row with u = 0 stays as it is

    Adam's u has elements of about 1 while the gradient is steady, so a norm of sqrt(D): divided by that, `lr` means
    what it means to SphericalSGD, a turn of about arctan(lr), for every width D.  Weight decay would be along p,
    which the projection removes, so there is none.  A row whose loss gradient is exactly zero stays where it is, with
    its m, v and step.

    Args:
        params, lr, kappa, mu, relative: as SphericalSGD's.
        betas: decays of m and v.
        eps: added to the root.

    Raises:
        ValueError: as SphericalSGD.

    Warns:
        UserWarning: as SphericalSGD.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        kappa: float = 0.0,
        mu: Tensor | None = None,
        relative: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "kappa": kappa, "mu": mu, "relative": relative, "betas": betas, "eps": eps}
        super().__init__(params, defaults)

    def _update(self, p, group, lr, grad_scale, found_inf):
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((len(p), 1), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        mu = group["mu"] = None if group["mu"] is None else group["mu"].to(p.device)
        g = sphere.tangent(p, _with_prior(p, p.grad, mu, group, grad_scale))
        step = state["step"] + 1
        mean, square = torch.lerp(g, state["exp_avg"], b1), torch.lerp(g.square(), state["exp_avg_sq"], b2)
        u = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + group["eps"])
        u = sphere.tangent(p, u)
        moved = sphere.retract(p, -lr / p.shape[1] ** 0.5 * u)
        # Normalising a row that did not move would still change its last bits.
        moved = torch.where((u == 0).all(-1, keepdim=True), p, moved)
        keep = ~_has_gradient(p.grad) if found_inf is None else ~_has_gradient(p.grad) | (found_inf != 0)
        for old, new in ((p, moved), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            old.copy_(torch.where(keep, old, new))
        state["step"] += ~keep
