"""Which tensors of a block write to the residual stream, by their names.

The names are those of the last projection of each sublayer, on disk and in transformers' modules
alike. They only propose: `modeling/identity.py` follows what the model does with them.
"""

from __future__ import annotations

import re

_OUTPUT = re.compile(
    r"(.*\.)?("
    r"o_proj|out_proj|c_proj|wo|fc2|fc_out|dense_4h_to_h|linear_out|output_linear|down_proj|w2"
    r"|\w*attention\.dense|self_attn\.dense|output\.dense"
    r")([._](weight|bias))?",
    re.IGNORECASE,
)


def writes_to_residual(name: str) -> bool:
    """Whether `name`, inside a block, is the last projection of a sublayer or its bias: that of
    attention or another mixer, of an MLP, of an expert routed or shared."""
    return _OUTPUT.fullmatch(name) is not None
