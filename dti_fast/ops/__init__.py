"""Public ops.  This layer alone knows which backend runs."""

from dti_fast.ops._dispatch import backends, operators
from dti_fast.ops.geglu import geglu
from dti_fast.ops.group_norm_silu import group_norm_silu
from dti_fast.ops.layer_norm import layer_norm
from dti_fast.ops.sphere_step import sphere_step_
from dti_fast.ops.tangent_sum import tangent_sum
from dti_fast.ops.token_embed import token_embed

__all__ = [
    "sphere_step_",
    "tangent_sum",
    "token_embed",
    "group_norm_silu",
    "layer_norm",
    "geglu",
    "backends",
    "operators",
]
