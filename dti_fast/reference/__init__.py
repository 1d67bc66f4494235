"""Every op's formula in plain PyTorch: readable, differentiable where the op is, on any device."""
