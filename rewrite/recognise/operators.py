"""One name per operator, however it was spelt: function, method, in-place method or Python operator.

The graphs that Dynamo hands to a backend hold torch-level calls; everything downstream asks for `canonical(node)` and `argument(...)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn import functional

from rewrite.recognise.assignment import assigned

# canonical name -> the functions that mean it (method names are matched by `_METHODS`).
_FUNCTIONS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "add": (torch.add, operator.add, operator.iadd),
    "sub": (torch.sub, torch.subtract, operator.sub, operator.isub),
    "mul": (torch.mul, torch.multiply, operator.mul, operator.imul),
    "div": (torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv),
    "matmul": (torch.matmul, torch.bmm, operator.matmul),
    "baddbmm": (torch.baddbmm,),
    "addmm": (torch.addmm,),
    "einsum": (torch.einsum, functional.__dict__.get("einsum", torch.einsum)),
    "linear": (functional.linear, torch._C._nn.linear),
    "conv": (torch.conv1d, torch.conv2d, torch.conv3d, functional.conv1d, functional.conv2d, functional.conv3d),
    "softmax": (torch.softmax, functional.softmax, torch.special.softmax),
    "log_softmax": (torch.log_softmax, functional.log_softmax, torch.special.log_softmax),
    "neg": (torch.neg, torch.negative, operator.neg),
    "exp": (torch.exp,),
    "log": (torch.log,),
    "tanh": (torch.tanh, functional.tanh),
    "sigmoid": (torch.sigmoid, functional.sigmoid, torch.special.expit),
    "relu": (torch.relu, functional.relu),
    "square": (torch.square,),
    "clamp": (torch.clamp, torch.clip),
    "clamp_min": (torch.clamp_min,),
    "clamp_max": (torch.clamp_max,),
    "maximum": (torch.maximum,),
    "minimum": (torch.minimum,),
    "sum": (torch.sum,),
    "amax": (torch.amax,),
    "max": (torch.max,),
    "logsumexp": (torch.logsumexp, torch.special.logsumexp),
    "pad": (functional.pad, torch._C._nn.pad),
    "narrow": (torch.narrow,),
    "roll": (torch.roll,),
    "detach": (torch.detach,),
    "attention": (functional.scaled_dot_product_attention,),
    "dropout": (functional.dropout, torch.dropout, functional.dropout1d),
    "transpose": (torch.transpose, torch.swapaxes, torch.swapdims),
    "permute": (torch.permute,),
    "matrix_transpose": (torch.t, torch.adjoint),
    "movedim": (torch.movedim, torch.moveaxis),
    "reshape": (torch.reshape,),
    "flatten": (torch.flatten,),
    "unflatten": (torch.unflatten,),
    "unsqueeze": (torch.unsqueeze,),
    "squeeze": (torch.squeeze,),
    "getitem": (operator.getitem,),
    "assigned": (assigned,),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "masked_fill": (torch.masked_fill,),
    "where": (torch.where,),
    "layer_norm": (functional.layer_norm, torch.layer_norm),
    "rms_norm": (functional.rms_norm, torch.rms_norm),
    "normalize": (functional.normalize,),
    "unbind": (torch.unbind,),
    "chunk": (torch.chunk,),
    "split": (torch.split,),
    "repeat_interleave": (torch.repeat_interleave,),
    "clone": (torch.clone,),
}

# canonical name -> the tensor methods that mean it.
_METHODS: Mapping[str, tuple[str, ...]] = {
    "add": ("add", "add_", "__add__", "__radd__"),
    "sub": ("sub", "sub_", "subtract", "subtract_"),
    "mul": ("mul", "mul_", "multiply", "multiply_"),
    "div": ("div", "div_", "divide", "divide_", "true_divide"),
    "matmul": ("matmul", "bmm", "__matmul__"),
    "baddbmm": ("baddbmm",),
    "addmm": ("addmm",),
    "softmax": ("softmax",),
    "unbind": ("unbind",),
    "chunk": ("chunk",),
    "split": ("split", "split_with_sizes"),
    "log_softmax": ("log_softmax",),
    "neg": ("neg", "neg_", "__neg__"),
    "exp": ("exp", "exp_"),
    "log": ("log",),
    "tanh": ("tanh", "tanh_"),
    "sigmoid": ("sigmoid", "sigmoid_"),
    "relu": ("relu", "relu_"),
    "square": ("square", "square_"),
    "clamp": ("clamp", "clamp_", "clip", "clip_"),
    "clamp_min": ("clamp_min", "clamp_min_"),
    "clamp_max": ("clamp_max", "clamp_max_"),
    "maximum": ("maximum",),
    "minimum": ("minimum",),
    "sum": ("sum",),
    "amax": ("amax",),
    "max": ("max",),
    "logsumexp": ("logsumexp",),
    "narrow": ("narrow",),
    "roll": ("roll",),
    "detach": ("detach",),
    "transpose": ("transpose", "swapaxes", "swapdims"),
    "permute": ("permute",),
    "matrix_transpose": ("t", "adjoint"),
    "movedim": ("movedim", "moveaxis"),
    "reshape": ("reshape", "view", "reshape_as", "view_as"),
    "flatten": ("flatten",),
    "unflatten": ("unflatten",),
    "unsqueeze": ("unsqueeze",),
    "squeeze": ("squeeze",),
    "expand": ("expand",),
    "expand_as": ("expand_as",),
    "repeat_interleave": ("repeat_interleave",),
    "masked_fill": ("masked_fill", "masked_fill_"),
    "where": ("where",),
    "cast": ("to", "float", "half", "bfloat16", "double", "type", "type_as"),
    "contiguous": ("contiguous",),
    "clone": ("clone",),
}

_BY_FUNCTION: dict[Any, str] = {function: name for name, functions in _FUNCTIONS.items() for function in functions}
_BY_METHOD: dict[str, str] = {method: name for name, methods in _METHODS.items() for method in methods}

# The position at which each operator takes an argument that may also be given by name.
_POSITIONS: Mapping[tuple[str, str], int] = {
    ("baddbmm", "input"): 0,
    ("baddbmm", "batch1"): 1,
    ("baddbmm", "batch2"): 2,
    ("matmul", "input"): 0,
    ("linear", "input"): 0,
    ("linear", "weight"): 1,
    ("linear", "bias"): 2,
    ("conv", "input"): 0,
    ("conv", "weight"): 1,
    ("conv", "bias"): 2,
    ("layer_norm", "input"): 0,
    ("rms_norm", "input"): 0,
    ("matmul", "other"): 1,
    ("softmax", "dim"): 1,
    ("log_softmax", "dim"): 1,
    ("sum", "dim"): 1,
    ("sum", "keepdim"): 2,
    ("amax", "dim"): 1,
    ("amax", "keepdim"): 2,
    ("max", "dim"): 1,
    ("max", "keepdim"): 2,
    ("logsumexp", "dim"): 1,
    ("logsumexp", "keepdim"): 2,
    ("clamp", "min"): 1,
    ("clamp", "max"): 2,
    ("clamp_min", "min"): 1,
    ("clamp_max", "max"): 1,
    ("pad", "pad"): 1,
    ("pad", "mode"): 2,
    ("pad", "value"): 3,
    ("attention", "attn_mask"): 3,
    ("attention", "dropout_p"): 4,
    ("attention", "is_causal"): 5,
    ("dropout", "p"): 1,
    ("dropout", "training"): 2,
    ("cat", "dim"): 1,
    ("unsqueeze", "dim"): 1,
    ("flatten", "start_dim"): 1,
    ("flatten", "end_dim"): 2,
    ("layer_norm", "normalized_shape"): 1,
    ("unbind", "dim"): 1,
    ("chunk", "dim"): 2,
    ("split", "dim"): 2,
}


def canonical(node: fx.Node) -> str:
    """The operator's one name, or an empty string for placeholders, outputs and operators not in the table."""
    if node.op == "call_function":
        if node.target is getattr:
            return "matrix_transpose" if node.args[1] in ("mT", "mH") else ""
        return _BY_FUNCTION.get(node.target, "")
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target), "")
    return ""


def spelled(node: fx.Node) -> str:
    """The operator as the graph spells it, for messages."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by name, wherever it was written."""
    if name in node.kwargs:
        return node.kwargs[name]
    position = _POSITIONS.get((canonical(node), name))
    return node.args[position] if position is not None and position < len(node.args) else default


def value_of(node: fx.Node) -> Any:
    """What the node held when it was traced: a fake tensor, a size, or a tuple of such."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The traced shape of a tensor node (sizes may be symbolic), or None."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


# What a size that depends on data is taken to be: larger than the axes that heads and windows have, and odd.
_STAND_IN = 17


class Extent(int):
    """The length of an axis as it was traced, and what it is exactly: an expression in the symbols of the trace."""

    exact: sympy.Expr

    def __new__(cls, length: int, exact: sympy.Expr | int) -> Extent:
        extent = super().__new__(cls, length)
        extent.exact = sympy.sympify(exact)
        return extent

    def __reduce__(self) -> tuple[type[Extent], tuple[int, sympy.Expr]]:
        return Extent, (int(self), self.exact)


def hint(size: Any) -> int:
    """A size as a number: the one it was traced with where it is symbolic, or a stand-in where it depends on data.

    What is read at stand-ins holds at other sizes because lengths are compared exactly too (see `Extent`).
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    unbacked = free_unbacked_symbols(size)
    if not unbacked:
        return int(size.node.hint)
    known = {symbol: _STAND_IN + 2 * number for number, symbol in enumerate(sorted(unbacked, key=str))}
    rest = size.node.expr.subs(known)
    return max(1, int(size.node.shape_env.size_hint(rest)))


def exact(size: Any) -> sympy.Expr:
    """A size as an expression: a number, or one in the symbols of the trace."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def hinted_shape(node: fx.Node) -> tuple[Extent, ...]:
    """The traced shape of a tensor node in numbers."""
    shape = shape_of(node)
    if shape is None:
        raise ValueError(f"{node.name} is not a tensor")
    return tuple(Extent(hint(size), exact(size)) for size in shape)


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module the node was traced in, relative to the traced root ("" for the root itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # Dynamo writes L['self'].a.b or L['self']._modules['a']...; what follows the first ] names the module.
    return path.split("].", 1)[1] if "]." in path else ""
