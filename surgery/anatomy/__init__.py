"""Anatomy: what each tensor of a checkpoint is, inferred from names, shapes and the config.

It only annotates: the files say which tensors there are, and one that isn't recognised is
reported and copied byte for byte.
"""

from surgery.anatomy.corrections import Corrections
from surgery.anatomy.infer import Anatomy, infer
from surgery.anatomy.mlp import MLP, Kind, Projection
from surgery.anatomy.places import Place, Role
from surgery.anatomy.said import MLPCorrection
from surgery.anatomy.tying import settled_config, untied_config

__all__ = [
    "MLP",
    "Kind",
    "Anatomy",
    "Corrections",
    "MLPCorrection",
    "Place",
    "Projection",
    "Role",
    "infer",
    "settled_config",
    "untied_config",
]
