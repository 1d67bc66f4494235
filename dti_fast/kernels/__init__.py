"""Triton kernels.  Importing one needs triton but no GPU; `dti_fast.ops` decides when that happens."""
