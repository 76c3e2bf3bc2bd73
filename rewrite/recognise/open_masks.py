"""Masks that hide nothing, taken off our copy of the graph before it is read.

A library that may not look at a mask while it is traced builds one of positions alone, such as ``arange(n) >= 0``, where without a trace it
would build none. What such a mask holds is known from the graph; passes that decline masked sites should not decline these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from rewrite.recognise.masks import evaluate
from rewrite.recognise.operators import argument, canonical, value_of

# Functions that make a tensor of numbers alone, always the same; others without operands (rand, empty) are not evaluated.
_MAKES = frozenset({"arange", "ones", "zeros", "full", "tensor", "scalar_tensor"})
_RANDOM = frozenset({"dropout", "bernoulli", "multinomial", "rand_like", "randn_like", "randint_like", "bernoulli_", "uniform_", "normal_"})
# A mask of positions is a few dozen operators.
_LONGEST = 100


def drop_open_masks(graph: fx.Graph) -> None:
    """Attention calls lose a mask, and scores a bias, that changes nothing at any input of the graph."""
    known: dict[fx.Node, bool] = {}

    def is_open(operand: object) -> bool:
        if not isinstance(operand, fx.Node) or not isinstance(value_of(operand), torch.Tensor):
            return False
        if operand not in known:
            known[operand] = _hides_nothing(operand)
        return known[operand]

    for node in list(graph.nodes):
        drop = _DROP.get(canonical(node))
        if drop is not None:
            drop(node, is_open)


def _hides_nothing(mask: fx.Node) -> bool:
    """True for a mask of numbers alone that is True, or zero, everywhere."""
    if not _is_constant(mask):
        return False
    held = evaluate(mask, {})
    if held is None:
        return False
    return bool(held.all()) if held.dtype == torch.bool else not bool(held.any())


def _is_constant(node: fx.Node) -> bool:
    """Whether a tensor depends on no input: made of numbers, at sizes that are fixed but for those it is expanded to."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op not in ("call_function", "call_method") or len(seen) > _LONGEST:
            return False
        name = current.target if isinstance(current.target, str) else getattr(current.target, "__name__", "")
        value = value_of(current)
        fixed = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
        tensors = [source for source in current.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
        sizes = [source for source in current.all_input_nodes if source not in tensors]
        if name in _RANDOM or not isinstance(value, torch.Tensor) or not (fixed or canonical(current) == "expand"):
            return False
        if (sizes and canonical(current) != "expand") or not (tensors or name in _MAKES):
            return False
        for source in tensors:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return True


Open = Callable[[object], bool]


def _attention(node: fx.Node, is_open: Open) -> None:
    mask = argument(node, "attn_mask")
    if is_open(mask):
        node.args = tuple(None if operand is mask else operand for operand in node.args)
        node.kwargs = {name: None if operand is mask else operand for name, operand in node.kwargs.items()}


def _add(node: fx.Node, is_open: Open) -> None:
    if len(node.args) != 2 or node.kwargs:
        return
    for kept, added in (node.args, node.args[::-1]):
        if not isinstance(kept, fx.Node) or not is_open(added):
            continue
        before, after = value_of(kept), value_of(node)
        same = isinstance(before, torch.Tensor) and before.dtype == after.dtype and before.shape == after.shape
        if same and before.dtype.is_floating_point:
            node.replace_all_uses_with(kept)
            return


_DROP: Mapping[str, Callable[[fx.Node, Open], None]] = {"attention": _attention, "add": _add}
