"""Regions in which tokens are sorted by their expert, worked on expert by expert, and put back: mixtures of experts.

    ids [T, k] -> sort -> rows of x [T, C] in that order -> products by expert -> the inverse order -> [T, k, C]

Such a region computes over the tokens (it sorts and counts them), and still each token's result depends on that token alone, so that it can
be run on the tokens that are left. That is not read off the operators: a region is what lies between a sort of integers and the first
tensor with a row for each token that everything behind it goes through, and whether its rows are independent is tried out, with random
operands in float32, on all tokens and on each half of them: once as they are spread over the experts by chance, and once with all of them
at the same ones, where an expert that takes only so many tokens would leave some out. Sizes written out for the tokens, of leading axes,
become the number of those that are left.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree

from rewrite.tokens import rules
from rewrite.tokens.edits import combine, set_argument
from rewrite.tokens.flow import Path
from rewrite.tokens.placement import example, extents, first_tensor, is_tensor
from rewrite.tokens.structure import literal_sizes

_SORTS = frozenset({"sort", "argsort"})
# Operators whose result has a leading axis of a size that is written out, as their first argument.
_SIZED = frozenset({"arange", "empty", "full", "ones", "zeros"})
_TURNED_FLAT = frozenset({"flatten", "int", "long", "ravel", "reshape", "to", "view"})
# Of the results on some of the tokens against those on all, in units of float32's precision: sums over channels may be in another order.
_TOLERANCE = 1e3
# What is tried out in float32 instead: in these what other tokens leak could be less than the rounding.
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Routed:
    """nodes: the region, in order, its `exit` last. entries: tensors [T, ...] that it reads from outside, a row for each token."""

    nodes: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]

    @property
    def exit(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def tokens(self) -> int:
        return extents(self.entries[0])[0]

    def sizes(self) -> list[tuple[fx.Node, Path, int]]:
        """Sizes of leading axes that are written out and mean all tokens: (node, where, how many times their number)."""
        found = []
        for node in self.nodes:
            name = rules.name_of(node)
            paths = [path for path, axis in literal_sizes(node).items() if axis == 0] if name in {"view", "reshape", "expand"} else []
            if name in _SIZED and node.args:
                paths = [("args", 0, 0) if isinstance(node.args[0], (tuple, list)) else ("args", 0)]
            for path in paths:
                size = _number(_at(node, path))
                if size > 0 and size % self.tokens == 0:
                    found.append((node, path, size // self.tokens))
        return found

    def shorten(self, kept: int | fx.Node) -> None:
        """Make it a region of `kept` tokens; the graph inserts in front of its first node."""
        for node, path, times in self.sizes():
            with node.graph.inserting_before(self.nodes[0]):
                set_argument(node, path, combine(node, operator.mul, [times, kept]) if times > 1 else kept)


def routed_regions(graph: fx.Graph) -> list[Routed]:
    """The regions of a graph whose tokens are proved to be independent."""
    found: list[Routed] = []
    proved: dict[Any, bool] = {}
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if rules.name_of(node) in _SORTS and node not in taken and (region := _region(graph, node)) is not None:
            key = _structure(region)
            if key not in proved:
                proved[key] = all(_independent(region, alike) for alike in (False, True))
            if proved[key]:
                found.append(region)
                taken.update(region.nodes)
    return found


def _structure(region: Routed) -> tuple[Any, ...]:
    """What a proof holds for: the operators, what each takes from where, and the shapes and types of what is read from outside."""
    numbers: dict[fx.Node, Any] = {node: number for number, node in enumerate(region.nodes)}
    for node in region.nodes:
        for source in node.all_input_nodes:
            value = example(source)
            of = (extents(source), value.dtype) if isinstance(value, torch.Tensor) else str(value)
            numbers.setdefault(source, (len(numbers), source in region.entries, of))
    told = [(node.target, *fx.map_arg((node.args, node.kwargs), lambda source: str(numbers[source]))) for node in region.nodes]
    return tuple(map(str, told))


def _region(graph: fx.Graph, sort: fx.Node) -> Routed | None:
    """What is sorted and put back around a sort of one integer for each token, or k for each."""
    ids = sort.args[0]
    if not isinstance(ids, fx.Node) or not is_tensor(ids) or len(extents(ids)) != 1 or example(ids).is_floating_point():
        return None
    source = ids
    while len(extents(source)) == 1 and rules.name_of(source) in _TURNED_FLAT and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    tokens = extents(source)[0]
    order = {node: place for place, node in enumerate(graph.nodes)}
    inside, exit_ = _forward(graph, sort, tokens, order)
    if exit_ is None:
        return None
    entries: dict[fx.Node, None] = {}
    weights = _of_no_token(graph)
    pending = list(inside)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in inside or node in weights or example(node) is None or _number(node):
                continue
            made = node.op != "placeholder" and all(first_tensor(source) is None for source in node.all_input_nodes)
            if is_tensor(node) and extents(node)[:1] == (tokens,) and not made:
                entries[node] = None
            elif node.op == "placeholder" or not set(node.users) <= inside | _behind(node, inside):
                return None  # what is read has no row for each token, and is read elsewhere too
            else:
                inside.add(node)
                pending.append(node)
    return Routed(tuple(sorted(inside, key=order.__getitem__)), tuple(entries)) if entries else None


def _behind(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The users of a node that give its size, or nothing that is read."""
    return {user for user in node.users if user not in inside and (not user.users or rules.name_of(user) in rules.SIZES)}


def _forward(graph: fx.Graph, sort: fx.Node, tokens: int, order: Mapping[fx.Node, int]) -> tuple[set[fx.Node], fx.Node | None]:
    """From the sort to the first tensor [tokens, ...] of numbers that all that follows goes through."""
    inside = {sort}
    open_ = {sort: max((order[user] for user in sort.users), default=0)}
    for node in graph.nodes:
        if order[node] <= order[sort] or node.op == "output" or not any(source in inside for source in node.all_input_nodes):
            continue
        inside.add(node)
        if rules.name_of(node) == "setitem":  # what was written to is what is read
            continue
        open_[node] = max((order[user] for user in node.users), default=0)
        alone = [one for one, last in open_.items() if last > order[node]] == [node]
        if alone and is_tensor(node) and example(node).is_floating_point() and len(extents(node)) > 1 and extents(node)[0] == tokens:
            return inside, node
    return inside, None


def _of_no_token(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, and what is made of them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        learned = isinstance(example(node), torch.nn.Parameter) or node.op == "get_attr"
        if learned or (node.op.startswith("call") and node.all_input_nodes and all(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _independent(region: Routed, alike: bool) -> bool:
    """Whether the rows of some tokens are the same with the others there and without them, for random operands; alike: all tokens have the
    same experts."""
    with _python_dispatch._disable_current_modes(), torch.no_grad():
        try:
            operands = _operands(region, alike)
            whole = _computed(region, operands, region.tokens)
            allowed = _TOLERANCE * torch.finfo(whole.dtype).eps * whole.abs().max()
            if not torch.isfinite(whole).all() or not whole.abs().max() > 0:
                return False
            # Each half: what an expert that is full leaves out is the last, or the first.
            for some in (torch.arange(half, region.tokens, 2, device=whole.device) for half in range(min(2, region.tokens))):
                chosen = {node: value[some] if node in region.entries else value for node, value in operands.items()}
                part = _computed(region, chosen, len(some))
                if part.shape != whole[some].shape or not (part - whole[some]).abs().max() <= allowed:
                    return False
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False  # it does not run on fewer tokens
    return True


def _operands(region: Routed, alike: bool) -> dict[fx.Node, torch.Tensor]:
    """Random values of all that a region reads; integers as they follow from random ones, `alike` from the same for each token."""
    values: dict[fx.Node, Any] = {}
    generators: dict[torch.device, torch.Generator] = {}

    def value(node: fx.Node, chooses: bool) -> Any:
        if node not in values:
            given = example(node)
            if isinstance(given, torch.Tensor) and given.is_floating_point():
                generator = generators.setdefault(given.device, torch.Generator(given.device).manual_seed(0))
                drawn = torch.randn(extents(node), generator=generator, dtype=_precise(given.dtype), device=given.device)
                values[node] = drawn[:1].expand_as(drawn).clone() if chooses and alike else drawn
            else:
                values[node] = _call(node, {source: value(source, True) for source in node.all_input_nodes if not _number(source)})
        return values[node]

    inside = set(region.nodes)
    read = dict.fromkeys(source for node in region.nodes for source in node.all_input_nodes if not (source in inside or _number(source)))
    # What experts are chosen by comes first: it may be read for itself, too.
    first = sorted(read, key=lambda node: isinstance(example(node), torch.Tensor) and example(node).is_floating_point())
    return {source: value(source, False) for source in first}


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _computed(region: Routed, operands: Mapping[fx.Node, Any], tokens: int) -> torch.Tensor:
    """The region's result on so many tokens."""
    sizes = {(node, path): times * tokens for node, path, times in region.sizes()}
    values = dict(operands)
    for node in region.nodes:
        values[node] = _call(node, values, {path: size for (of, path), size in sizes.items() if of is node})
    result: torch.Tensor = values[region.exit]
    return result


def _call(node: fx.Node, values: Mapping[fx.Node, Any], sizes: Mapping[Path, int] | None = None) -> Any:
    """One operator on values, with sizes put where they are written out."""
    if node.op not in {"call_function", "call_method"}:
        raise TypeError(f"{node.op} has no value here")
    args: Any = fx.map_arg(node.args, lambda source: _value(source, values))
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: _value(source, values))
    for path, size in (sizes or {}).items():
        held = {"args": args, "kwargs": kwargs}
        *outer, last = path
        place: Any = held
        for key in outer:
            place[key] = list(place[key]) if isinstance(place[key], tuple) else place[key]
            place = place[key]
        place[last] = size
        args, kwargs = held["args"], held["kwargs"]
    args, kwargs = pytree.tree_map(lambda given: _precise(given) if isinstance(given, torch.dtype) else given, (args, kwargs))
    target: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    return target(*args[1:] if node.op == "call_method" else args, **kwargs)


def _value(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    return values[node] if node in values else _number(node)


def _at(node: fx.Node, path: Path) -> Any:
    """The argument at a path such as ("args", 1, 0)."""
    value: Any = {"args": node.args, "kwargs": node.kwargs}
    for key in path:
        value = value[key]
    return value


def _number(size: Any) -> int:
    """A size in numbers; 0 for what is none."""
    given = example(size) if isinstance(size, fx.Node) else size
    if isinstance(given, torch.SymInt):
        return int(given.node.hint or 0)
    return given if isinstance(given, int) and not isinstance(given, bool) else 0
