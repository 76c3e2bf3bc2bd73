"""Calls that hide an attention inside one operator, replaced by the operators they are made of.

What each is made of is written in `composite_forms`, and is not taken on trust: before a call is replaced, it and its form are run on
random float64 inputs of the traced shapes. What they may differ by is measured too: it is what rounding does to the form in float32,
scaled to float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from rewrite.recognise import composite_forms as forms
from rewrite.recognise.composite_forms import Form, UncoveredError
from rewrite.recognise.operators import canonical, hint, hinted_shape, spelled, value_of
from rewrite.recognise.writes import written_by

# How much more than float32's scaled error may be seen: the two run through different kernels, which sum in other orders.
_SLACK = 64.0


@dataclass(frozen=True)
class Composite:
    """A call, its arguments in order with their defaults, and its form.

    masks: the arguments that hide pairs of queries and keys. quiet: arguments that switch off what is random. inside: the attribute that
    holds the attention, of the class of module that makes the call.
    """

    arguments: Mapping[str, Any]
    form: Form
    masks: tuple[str, ...]
    quiet: Mapping[str, Any]
    single: bool = False
    inside: tuple[type[nn.Module], str, type[nn.Module]] | None = None


_REQUIRED = inspect.Parameter.empty


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _schema(overload: torch._ops.OpOverload) -> dict[str, Any]:
    return {each.name: each.default_value if each.has_default_value() else _REQUIRED for each in overload._schema.arguments}


_COMPOSITES: Mapping[Any, Composite] = {
    functional.multi_head_attention_forward: Composite(
        _signature(functional.multi_head_attention_forward),
        forms.multi_head_attention,
        masks=("attn_mask", "key_padding_mask"),
        quiet={"dropout_p": 0.0},
    ),
    torch._native_multi_head_attention: Composite(
        _schema(torch.ops.aten._native_multi_head_attention.default),
        forms.native_multi_head_attention,
        masks=("mask",),
        quiet={},
    ),
    torch._transformer_encoder_layer_fwd: Composite(
        _schema(torch.ops.aten._transformer_encoder_layer_fwd.default),
        forms.transformer_encoder_layer,
        masks=("mask",),
        quiet={},
        single=True,
        inside=(nn.TransformerEncoderLayer, "self_attn", nn.MultiheadAttention),
    ),
}


def expand_composites(graph: fx.Graph, proofs: dict[str, str | None]) -> list[tuple[fx.Node, str]]:
    """Replace every composite attention call of the graph by its operators; returns those that stay, each with the reason.

    proofs: what earlier proofs found, by structure, and what is found now; an expansion that was proved once is not proved again.
    """
    left: list[tuple[fx.Node, str]] = []
    for node in list(graph.nodes):
        composite = _COMPOSITES.get(node.target) if node.op == "call_function" else None
        if composite is None:
            continue
        try:
            _expand(node, composite, proofs)
        except UncoveredError as error:
            left.append((node, f"{spelled(node)} is not taken apart: {error}"))
    return left


def _expand(node: fx.Node, composite: Composite, proofs: dict[str, str | None]) -> None:
    given = _bound(node, composite)
    results = _results(node, composite)
    hidden = {name: mask for name in composite.masks if (mask := _where_hidden(given[name])) is not None}
    for each in node.all_input_nodes:
        if not isinstance(value_of(each), Tensor | int | float | torch.SymInt | torch.SymFloat):
            raise UncoveredError(f"{each.name} has no traced value")
        if getattr(value_of(each), "is_nested", False):
            raise UncoveredError(f"{each.name} is a nested tensor")
    key = _structure(node, given, hidden, tuple(results))
    if key not in proofs:
        proofs[key] = _prove(node, composite, given, hidden, tuple(results))
    if proofs[key] is not None:
        raise UncoveredError(f"its expansion was not confirmed: {proofs[key]}")
    _replace(node, composite, {**given, **hidden}, results)


def _bound(node: fx.Node, composite: Composite) -> dict[str, Any]:
    names = list(composite.arguments)
    given = {**composite.arguments, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    missing = [name for name, value in given.items() if value is _REQUIRED]
    if missing or len(given) > len(names):
        raise UncoveredError(f"it is called with arguments that are not known ({', '.join(missing or [*given][len(names) :])})")
    return given


def _results(node: fx.Node, composite: Composite) -> dict[int, list[fx.Node]]:
    """The nodes that read the call's results, by the results' places."""
    if composite.single:
        return {0: [node]}
    found: dict[int, list[fx.Node]] = {0: []}
    for user in node.users:
        if canonical(user) != "getitem" or not isinstance(user.args[1], int):
            raise UncoveredError(f"{user.name} reads its results as a whole")
        if user.users and not isinstance(value_of(user), Tensor):
            raise UncoveredError(f"{user.name} reads weights that it does not give")
        if user.users:
            found.setdefault(user.args[1] % 2, []).append(user)
    return found


def _where_hidden(mask: Any) -> fx.Node | None:
    """The bool mask that a mask of zeros and minus infinities was made of, where the graph shows it."""
    if not isinstance(mask, fx.Node) or canonical(mask) != "masked_fill" or len(mask.args) < 3 or mask.args[2] != -math.inf:
        return None
    zeros, hidden = mask.args[:2]
    if not isinstance(zeros, fx.Node) or not isinstance(hidden, fx.Node) or spelled(zeros) not in ("zeros_like", "zeros", "new_zeros"):
        return None
    if value_of(hidden).dtype != torch.bool or hinted_shape(hidden) != hinted_shape(mask):
        return None
    others = [user for held in (zeros, hidden, mask) for user in held.users if user is not mask and held in written_by(user)]
    return None if others else hidden


def _structure(node: fx.Node, given: Mapping[str, Any], hidden: Mapping[str, fx.Node], read: tuple[int, ...]) -> str:
    """A text that two calls share only if what proves one proves the other."""
    numbers: dict[fx.Node, int] = {}

    def write(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        traced = value_of(value)
        kind = f"{tuple(hinted_shape(value))} {traced.dtype} {traced.device.type}" if isinstance(traced, Tensor) else f"{traced}"
        return f"%{numbers.setdefault(value, len(numbers))} {kind}"

    return f"{spelled(node)} {sorted(read)} {sorted(hidden)} {[(name, fx.map_arg(value, write)) for name, value in given.items()]}"


def _prove(
    node: fx.Node, composite: Composite, given: Mapping[str, Any], hidden: Mapping[str, fx.Node], read: tuple[int, ...]
) -> str | None:
    """None where the call and its form agree, else what was found, in words."""
    generator = torch.Generator().manual_seed(0)
    masks = {given[name] for name in composite.masks if isinstance(given[name], fx.Node)}
    drawn: dict[fx.Node, Any] = {}
    for each in node.all_input_nodes:
        # Float masks of the fast paths hide where they are not zero; any other is added.
        hides = each in masks and (composite.form is not forms.multi_head_attention or any(given[name] is each for name in hidden))
        drawn[each] = _draw(each, generator, hides)
    exact = {name: fx.map_arg(value, drawn.__getitem__) for name, value in {**given, **composite.quiet}.items()}
    formed = {**exact, **{name: exact[name] != 0 for name in hidden}}
    with torch.no_grad():
        actual = composite.form(formed, read)
        rounded = composite.form(_in_float32(formed), read)
        try:
            expected = node.target(**exact) if callable(node.target) else None
        except (RuntimeError, TypeError) as failure:
            return f"the call does not run on random numbers in float64 ({str(failure).splitlines()[0]})"
    results = (expected,) if composite.single else expected
    assert isinstance(results, tuple)
    for place, value in actual.items():
        if value.shape != results[place].shape:
            return f"the call gives {tuple(results[place].shape)}, its operators {tuple(value.shape)}"
        steps = (rounded[place].double() - value).abs().max().item() / torch.finfo(torch.float32).eps
        budget = torch.finfo(torch.float64).eps * _SLACK * (steps + value.abs().max().item())
        error = (value - results[place]).abs().max().item()
        if not error <= budget:
            return f"the call and its operators differ by {error:.3g}, where rounding allows {budget:.3g}"
    return None


def _in_float32(given: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the arguments in float32, those that are one tensor staying one."""
    made: dict[int, Any] = {}
    for value in given.values():
        floating = isinstance(value, Tensor) and value.is_floating_point()
        made.setdefault(id(value), value.float() if floating else value)
    return {name: made[id(value)] for name, value in given.items()}


def _draw(node: fx.Node, generator: torch.Generator, hides: bool) -> Any:
    """A random value for an argument: numbers that keep sums of order one, or a mask that leaves every query the first key."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return float(value.node.hint) if isinstance(value, torch.SymFloat) else value if isinstance(value, float) else hint(value)
    shape = hinted_shape(node)
    if value.dtype == torch.bool or hides:
        mask = torch.rand(shape, generator=generator) < 1 / 3
        mask[..., 0] = False
        return mask if value.dtype == torch.bool else torch.zeros(shape, dtype=torch.float64).masked_fill(mask, -math.inf)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * max((1, *shape[-1:])) ** -0.25


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Records what a form does, each operator with the value it would have been traced with."""

    def __init__(self, graph: fx.Graph, like: fx.Node, inside: tuple[type[nn.Module], str, type[nn.Module]] | None) -> None:
        super().__init__(graph)
        self.made: list[fx.Node] = []
        self._like, self._inside = like, inside
        self._fake = next(
            (value.fake_mode for value in map(value_of, like.all_input_nodes) if isinstance(value, FakeTensor)), nullcontext()
        )

    def create_node(self, *arguments: Any, **keywords: Any) -> fx.Node:
        node = super().create_node(*arguments, **keywords)
        self.made.append(node)
        node.meta.update({name: value for name, value in self._like.meta.items() if name != "example_value"})
        if canonical(node) == "attention" and self._inside is not None:
            node.meta["nn_module_stack"] = _entered(self._like.meta.get("nn_module_stack") or {}, *self._inside)
        given, named = fx.map_arg(node.args, value_of), fx.map_arg(dict(node.kwargs), value_of)
        with torch.no_grad(), self._fake:
            method = getattr(given[0], str(node.target), None) if node.op == "call_method" else None
            value = method(*given[1:], **named) if method is not None else node.target(*given, **named)  # type: ignore[operator]
        node.meta["example_value"] = value
        return node


def _entered(stack: Mapping[str, Any], outer: type[nn.Module], name: str, inner: type[nn.Module]) -> dict[str, Any]:
    """The module stack with the submodule `name` entered, where the innermost module is of the class that has one."""
    key, (path, kind) = list(stack.items())[-1] if stack else ("", ("", None))
    entered = isinstance(kind, type) and issubclass(kind, outer)
    return {**stack, f"{key}.{name}": (f"{path}.{name}", inner)} if entered else dict(stack)


@contextmanager
def _taken_back(tracer: _Tracer) -> Iterator[None]:
    """Take what was recorded out of the graph again where recording fails."""
    try:
        yield
    except BaseException:
        for node in reversed(tracer.made):
            tracer.graph.erase_node(node)
        raise


def _replace(node: fx.Node, composite: Composite, given: Mapping[str, Any], results: Mapping[int, list[fx.Node]]) -> None:
    """Put the form's operators in front of the call, and take the call out of the graph."""
    tracer = _Tracer(node.graph, node, composite.inside)
    autocast = _autocast_of(node)
    with _taken_back(tracer), node.graph.inserting_before(node), autocast:
        proxies = {each: fx.Proxy(each, tracer) for each in node.all_input_nodes}
        proxies |= {each: fx.Proxy(each, tracer) for each in given.values() if isinstance(each, fx.Node)}
        proxied: Callable[[fx.Node], Any] = proxies.__getitem__
        arguments = {name: fx.map_arg(value, proxied) for name, value in given.items()}
        made = composite.form(arguments, tuple(results))
        for place, readers in results.items():
            if place not in made:
                raise UncoveredError(f"{readers[0].name} reads a result that it does not give")
            for reader in readers:
                before, after = value_of(reader), value_of(made[place].node)
                if before.dtype != after.dtype:
                    raise UncoveredError(f"its operators give {after.dtype} where it gives {before.dtype}")
    for place, readers in results.items():
        for reader in readers:
            made[place].node.meta["example_value"] = value_of(reader)
            reader.replace_all_uses_with(made[place].node)
    for user in list(node.users):
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _autocast_of(node: fx.Node) -> Any:
    """The autocast under which the call was traced, seen by the type it gives."""
    first = value_of(node)
    first = first[0] if isinstance(first, tuple) else first
    source = next(value for value in map(value_of, node.all_input_nodes) if isinstance(value, Tensor))
    if not isinstance(first, Tensor) or first.dtype == source.dtype or first.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(first.device.type, first.dtype)
