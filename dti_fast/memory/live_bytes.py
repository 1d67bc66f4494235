"""Exact live bytes of a computation that is never carried out.

Under `FakeTensorMode` tensors have shapes, dtypes and storages, but no memory, and autograd keeps exactly what it keeps
on a device.  `LiveBytes` adds each storage when an op makes it and subtracts it when the last reference to it is gone,
so it also sees what saved-tensor hooks miss (`ctx.x = x`).  Devices matter: fake CPU tensors take the fused attention
that CUDA takes, tensors on the meta device do not.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dti_fast.ops import operators

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
MAKERS = {aten.gelu.default: "GEGLU gelu(gate)"} | dict.fromkeys(ATTENTION, "attention out and lse")
READERS = {
    aten.gelu.default: "GEGLU projection",
    aten.convolution.default: "conv input",
    aten.silu.default: "SiLU input",
    aten.native_group_norm.default: "GroupNorm input",
    aten.native_layer_norm.default: "LayerNorm input",
} | dict.fromkeys(ATTENTION, "attention q, k, v")
OTHER = "other"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that ops make while the mode is on; those made before are not counted.

    Attributes:
        live: bytes alive now.
        peak: the most that `live` has been.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._readers = READERS | {op.overload: op.keeps for op in operators.values() if op.keeps is not None}
        self._storages: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if func in self._readers:
            self._name(inputs, self._readers[func])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A view of a weight is no new storage, nor is what an op in place returns.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage(), MAKERS.get(func, OTHER))
        return out

    def by_kind(self) -> dict[str, int]:
        """Bytes alive now by kind of tensor, largest first.

        A kind is the op that made a tensor if `MAKERS` has it, else the first op that read it of `READERS` and of ours,
        which say themselves what they keep.
        """
        totals: dict[str, int] = {}
        for size, kind in self._storages.values():
            totals[kind] = totals.get(kind, 0) + size
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = storage.nbytes(), kind
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _name(self, keys: set[int], kind: str) -> None:
        for key in keys & self._storages.keys():
            size, present = self._storages[key]
            if present == OTHER:
                self._storages[key] = size, kind

    def _remove(self, key: int) -> None:
        self.live -= self._storages.pop(key)[0]
