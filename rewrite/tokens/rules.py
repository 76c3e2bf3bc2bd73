"""The operators of a traced graph, as tables: what each does to the axes of its operands.

Names are canonical: functions, methods, in-place methods and overloads of one operator share one. A table of dimensions gives the place
of the dimension argument, counted with the tensor as argument zero, and its default.
"""

from __future__ import annotations

import operator
from types import MappingProxyType
from typing import Any

import torch
from torch import fx


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# out[i] = f(a[i], b[i], ...), operands broadcast from the right
POINTWISE = frozenset(
    _names("""
    abs add addcdiv addcmul and bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh
    div elu empty_like eq erf erfc exp exp2 expm1 fill floor floor_divide floordiv fmod full_like ge gelu gt hardsigmoid hardswish
    hardtanh inv invert isfinite isinf isnan isneginf isposinf le leaky_relu lerp log log10 log1p log2 logaddexp logical_and logical_not
    logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mish mod mul multiply nan_to_num ne neg negative ones_like
    or pos positive pow prelu reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink
    softsign sqrt square sub subtract tan tanh threshold truediv trunc true_divide where xor zero zeros_like
    """)
)

# out[i] = f(a[i]); further operands give a type, a device or a rate
FOLLOWS_FIRST = frozenset(
    _names("""
    alias alpha_dropout bfloat16 bool byte char clone contiguous cpu cuda detach double dropout feature_dropout float half identity int
    long requires_grad short to type type_as
    """)
)

# new tensors of sizes written out, which mean full lengths
FRESH = frozenset(_names("new_empty new_full new_ones new_tensor new_zeros"))

# out[..., j] = f(a[..., :]): the trailing axes are computed over; how many, or the place of the shape that says it
LAST_AXES: MappingProxyType[str, int | str] = MappingProxyType(
    {"linear": 1, "layer_norm": "shape", "rms_norm": "shape", "token_by_token": 1}
)

# sums and their like: the dimensions are gone, or of size one
REDUCE: MappingProxyType[str, tuple[int, int | None]] = MappingProxyType(
    {
        **dict.fromkeys(
            _names("""
            all amax amin any argmax argmin count_nonzero logsumexp max mean median min nanmean nansum prod std std_mean sum var var_mean
            """),
            (1, None),
        ),
        "norm": (2, None),
        "vector_norm": (2, None),
    }
)

# every element of the dimension is computed from all of them, and the dimension stays
ALONG: MappingProxyType[str, tuple[int, int | None]] = MappingProxyType(
    {
        **dict.fromkeys(_names("argsort cummax cummin cumprod cumsum logcumsumexp sort"), (1, -1)),
        "glu": (1, -1),
        "normalize": (2, 1),
        "topk": (2, -1),
    }
)

# weights over a dimension that sum to one: over tokens that is attention, and over selected tokens attention with the others masked out
NORMALISE: MappingProxyType[str, tuple[int, int | None]] = MappingProxyType({"softmax": (1, None), "log_softmax": (1, None)})

# pieces of one dimension
PIECES: MappingProxyType[str, tuple[int, int | None]] = MappingProxyType(
    {"chunk": (2, 0), "split": (2, 0), "split_with_sizes": (2, 0), "tensor_split": (2, 0), "narrow": (1, None), "roll": (2, None)}
)

# the elements of the first operand in other places, and no others; any other tensor is an index
MOVES = frozenset(
    _names("""
    adjoint chunk expand expand_as flatten gather getattr getitem index_select movedim narrow permute ravel repeat repeat_interleave reshape
    roll select split split_with_sizes squeeze t take_along_dim tensor_split transpose unbind unflatten unsqueeze view
    """)
)

# the elements of several operands side by side
JOINS = frozenset({"cat", "stack"})

# positions matter on the last two axes
TRIANGLES = frozenset({"tril", "triu"})

# the engine's own choice of tokens: they take tensors with the tokens that are left, and give places among these
CHOICES = frozenset(
    {
        "attended",
        "attention_received",
        "chosen_patches",
        "fused_match",
        "matched",
        "patches_of_mass",
        "places_of_present",
        "present_with_fused",
        "received_as_one_head",
        "routed_features",
        "rows_leaving_irrelevant",
        "visual_leaving",
        "visual_leaving_by_picture",
        "visual_leaving_spread",
    }
)
# what it cuts a stream with: the result has the tokens that were chosen
CUTS = frozenset({"gather_tokens", "fused_of_mass", "fused_tokens", "merged_tokens", "fused_rows"})
# what gives each token what it went into: as many as there were before
SPREADS = frozenset({"spread_values"})

LOSSES = frozenset({"cross_entropy", "nll_loss"})

SIZES = frozenset({"size", "numel", "len", "sym_size", "sym_numel", "dim", "ndimension"})

_ALIASES = MappingProxyType(
    {
        **{name + "_": name for name in ("and", "or")},
        **{"i" + name: name for name in _names("add sub mul truediv floordiv pow mod and or xor")},
        **{"swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "concat": "cat", "concatenate": "cat"},
        # Dynamo before 2.12 writes a tensor's comparisons as methods.
        **{f"__{name}__": name for name in _names("getitem eq ne lt le gt ge")},
        **{"special_softmax": "softmax", "special_expit": "sigmoid", "tile": "repeat"},
        **{"broadcast_to": "expand", "_softmax": "softmax", "_to_copy": "to", "linalg_vector_norm": "vector_norm"},
    }
)
_IN_PLACE_OPERATORS = frozenset(_names("iadd isub imul itruediv ifloordiv ipow imod iand ior ixor"))


def name_of(node: fx.Node) -> str:
    """The canonical operator name of a node; empty for a placeholder, an attribute, a module call or the output."""
    if node.op == "call_method":
        name = str(node.target).rstrip("_") if not str(node.target).startswith("__") else str(node.target)
    elif node.op == "call_function":
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = target.overloadpacket
        name = str(getattr(target, "__name__", target))
        if name not in _ALIASES and name.endswith("_") and not name.startswith("__"):
            name = name.rstrip("_")
    else:
        return ""
    return _ALIASES.get(name, name)


def in_place(node: fx.Node) -> bool:
    """Whether a node writes its result into its first operand."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_function" and getattr(operator, name, None) is node.target:
        return name in _IN_PLACE_OPERATORS
    return name.endswith("_") and not name.endswith("__")


def argument(node: fx.Node, place: int, *names: str, default: Any = None) -> Any:
    """The argument at `place` (the tensor is place zero) or under one of `names`."""
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def variadic(node: fx.Node, *names: str) -> tuple[Any, ...]:
    """Sizes or dimensions given one by one, as one tuple, or by name."""
    given: Any = node.args[1:] or next((node.kwargs[name] for name in names if name in node.kwargs), ())
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return tuple(given)
