"""Compiles what a launcher would launch, for a GPU that is not there."""

from collections.abc import Callable
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _AbsentGPU:
    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one cache of kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(call: Callable[[], object], capability: int) -> list:
    """The kernels that `call`, given tensors on the meta device, would launch on compute capability `capability`.

    Tile, warps and the specialisation to the arguments are those of the launch itself.  Needs no GPU and no
    driver, and does not work under TRITON_INTERPRET=1.
    """
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))

    before = dict(vars(driver))  # asking it for the active driver would look for a GPU
    driver.set_active(_AbsentGPU(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    finally:
        vars(driver).update(before)
    return kernels
