"""The attention IR: small, typed, frozen, printable. Passes and kernels see this and nothing else of the compiler."""

from rewrite.ir.errors import ModelCallError, NoAttentionError, NotApplicableError, PassError, RewriteError
from rewrite.ir.expression import INDICES, NK, NQ, QK, B, H, I, J, conjuncts, is_static, mass, tensor, tensors_in
from rewrite.ir.operations import (
    Attend,
    Body,
    DepthwiseConv,
    GridBias,
    Groups,
    Operation,
    Parameter,
    Pool,
    SinkGroups,
    Sum,
)
from rewrite.ir.passes import CHANGES_NOTHING, PHASES, AttentionInputs, Family, Fits, Pass, parameter
from rewrite.ir.program import Exit, Program
from rewrite.ir.registry import as_passes, available_passes, parse_pass, pass_class, register_pass
from rewrite.ir.site import Site, TokenLayout

__all__ = [
    "CHANGES_NOTHING",
    "INDICES",
    "NK",
    "NQ",
    "PHASES",
    "QK",
    "Attend",
    "AttentionInputs",
    "B",
    "Body",
    "DepthwiseConv",
    "Exit",
    "Family",
    "Fits",
    "GridBias",
    "Groups",
    "H",
    "I",
    "J",
    "ModelCallError",
    "NoAttentionError",
    "NotApplicableError",
    "Operation",
    "Parameter",
    "Pass",
    "PassError",
    "Pool",
    "Program",
    "RewriteError",
    "SinkGroups",
    "Site",
    "Sum",
    "TokenLayout",
    "as_passes",
    "available_passes",
    "conjuncts",
    "is_static",
    "mass",
    "parameter",
    "parse_pass",
    "pass_class",
    "register_pass",
    "tensor",
    "tensors_in",
]
