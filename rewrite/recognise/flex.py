"""FlexAttention calls as regions.

`torch.nn.attention.flex_attention` reaches a graph as one higher-order operator with two functions beside it, one from scores to scores and
one that says which pairs take part. Its list of blocks says the same more coarsely, for a kernel that skips, and is not read: what PyTorch
computes without such a kernel is what is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._higher_order_ops.flex_attention import math_attention

from rewrite.ir.expression import QK, B, H, I, J
from rewrite.recognise.assemble import Form, assemble
from rewrite.recognise.contraction import number
from rewrite.recognise.flex_expressions import FlexReader
from rewrite.recognise.index_algebra import Axis, fresh, leaves, regroup, size
from rewrite.recognise.operators import canonical, hinted_shape, shape_of, value_of
from rewrite.recognise.region import NearMissError, Region

_NAMES = (
    *("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options"),
    *("score_mod_other_buffers", "mask_mod_other_buffers"),
)
# Sides of a block from which on there is one block, which holds every pair: what PyTorch puts in where no mask is given.
_ONE_BLOCK = 1 << 30


def is_flex_attention(node: fx.Node) -> bool:
    """True for a call of FlexAttention's operator."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def flex_attention(node: fx.Node) -> Region:
    """A FlexAttention call; raises `NearMissError` where it cannot be read."""
    given = _arguments(node)
    output, readers = _outputs(node)
    query, key, value = (given[name] for name in _NAMES[:3])
    shapes = [hinted_shape(operand) for operand in (query, key, value)]
    batch, heads = fresh("b", shapes[0][0]), fresh("h", shapes[0][1])
    rows, columns = fresh("i", shapes[0][2]), fresh("j", shapes[1][2])
    depth, width = fresh("d", shapes[0][3]), fresh("e", shapes[2][3])

    def in_front(shape: tuple[int, ...]) -> tuple[Axis, Axis]:
        shared = heads if shape[1] == shapes[0][1] else regroup((leaves(heads),), (shape[1], size(heads) // shape[1]))[0][:1]
        return (batch if shape[0] == shapes[0][0] else (), shared if shape[1] != 1 else ())

    region = assemble(
        core=node,
        output=output,
        query=(query, (batch, heads, rows, depth)),
        key=(key, (*in_front(shapes[1]), columns, depth)),
        value=(value, (*in_front(shapes[2]), columns, width)),
        families=((batch, heads), rows, columns, depth, width),
        out_axes=(batch, heads, rows, width),
        form=Form(score=_scale(given["scale"]) * QK),
    )
    traced = (*(shape_of(query) or ())[:3], (shape_of(key) or ())[2])
    reader = FlexReader(dict(zip((B, H, I, J), traced, strict=True)))
    score = reader.score(_function(node, "score_mod"), region.attend.score, given["score_mod_other_buffers"])
    mask = reader.mask(_function(node, "mask_mod"), given["mask_mod_other_buffers"])
    if mask == sympy.true and min(given["block_mask"][-3:-1]) < _ONE_BLOCK:
        raise NearMissError("its list of blocks may leave out pairs that its mask function does not")
    mask = sympy.And(mask, sympy.Not(score.hidden))
    if score.value.has(sympy.oo, sympy.nan, sympy.zoo):
        raise NearMissError(f"its score is not finite ({score.value})")
    try:
        attend = replace(region.attend, score=score.value, mask=mask)
        attend.to_json()
    except (TypeError, ValueError) as error:
        raise NearMissError(str(error)) from None
    return replace(region, attend=attend, tensors=reader.operands, map_readers=readers)


def evaluate_flex(node: fx.Node, load: Callable[[fx.Node], Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the call gives (output, log-sum-exp, maxima) for the values that `load` gives its arguments.

    Positions enter the functions as integers, which become floating-point numbers of the default type: double, here.
    """
    given = {name: value if name in ("score_mod", "block_mask") else fx.map_arg(value, load) for name, value in _arguments(node).items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = math_attention(
            given["query"], given["key"], given["value"], _function(node, "score_mod"), (_function(node, "mask_mod"),),
            _number_of(given["scale"]), {}, tuple(given["score_mod_other_buffers"]), tuple(given["mask_mod_other_buffers"]),
        )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    return result


def described_functions(node: fx.Node) -> str:
    """The call's functions as text, for telling calls apart."""
    return "\n".join(str(_function(node, name).graph) for name in ("score_mod", "mask_mod"))


def _arguments(node: fx.Node) -> dict[str, Any]:
    given = {"score_mod_other_buffers": (), "mask_mod_other_buffers": (), **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    if set(given) != set(_NAMES):
        raise NearMissError(f"it is called with arguments that are not known ({', '.join(sorted(set(given) ^ set(_NAMES)))})")
    return given


def _function(node: fx.Node, name: str) -> fx.GraphModule:
    """The captured graph of the score or the mask function."""
    given = _arguments(node)
    place = given["score_mod"] if name == "score_mod" else given["block_mask"][-1]
    owner = node.graph.owning_module
    body = getattr(owner, str(place.target), None) if isinstance(place, fx.Node) and place.op == "get_attr" else None
    if not isinstance(body, fx.GraphModule):
        raise NearMissError(f"its {name} is not in the graph")
    return body


def _scale(value: Any) -> sympy.Expr:
    found = number(_number_of(value) if isinstance(value, fx.Node) else value)
    if found is None:
        raise NearMissError("its scale is not a number")
    return found


def _number_of(value: Any) -> Any:
    """A number that the graph computes from sizes that never change."""
    traced = value_of(value) if isinstance(value, fx.Node) else value
    if isinstance(traced, torch.SymFloat | torch.SymInt):
        return float(traced.node.expr) if traced.node.expr.is_number else None
    return traced


def _outputs(node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """The node of the attended values, and the names of those that read how they were weighted."""
    outputs = [user for user in node.users if canonical(user) == "getitem" and user.args[1] == 0]
    others = [user for user in node.users if user not in outputs]
    if len(outputs) != 1:
        raise NearMissError("its output is read in several places as a whole, or nowhere")
    return outputs[0], tuple(reader.name for other in others for reader in other.users)
