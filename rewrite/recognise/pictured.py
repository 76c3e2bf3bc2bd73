"""Which attention of a vision tower the visual tokens of a text were the patches of, where they are these patches in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from rewrite.recognise.operators import canonical, hinted_shape
from rewrite.recognise.region import Region
from rewrite.tokens import rules
from rewrite.tokens.layout import TokenLayouts
from rewrite.tokens.placement import is_tensor, shape_of


def tower_of(source: fx.Node | None, regions: Iterable[tuple[str, Region]], layouts: TokenLayouts) -> tuple[str, fx.Node] | None:
    """(name of the last attention in front of them, the patches [images, P, C]) of the visual tokens `source` [images * P, C].

    None where they are not all patches of a grid, picture by picture in row-major order: joined with other tokens, reordered, or pooled.
    """
    patches = None if source is None else _pictures(source)
    lies = None if patches is None else layouts.of(patches)
    if patches is None or lies is None or lies.window is not None or lies.prefix or lies.suffix or not lies.raster:
        return None
    if len(hinted_shape(patches)) != 3 or hinted_shape(patches)[1] != lies.patches:
        return None
    behind, passed = _ancestors(patches), list[str]()
    for name, region in regions:
        at = layouts.of_operand(region.query.node, region.query.layout.steps(), axis=2)
        if region.output in behind and at is not None and at.grid == lies.grid:
            passed.append(name)
    return (passed[-1], patches) if passed else None


def _pictures(source: fx.Node) -> fx.Node | None:
    """The node [images, P, C] whose tokens `source` holds in order, one picture after the other."""
    node = source
    while True:
        shape = shape_of(node)
        if len(shape) == 3:
            return node
        name = rules.name_of(node)
        if name == "cat":
            return _all_pictures(node)
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node) or not is_tensor(given):
            return None
        merged = name in {"view", "reshape", "flatten"} and shape_of(given)[-1] == shape[-1]
        if not merged and canonical(node) not in ("cast", "contiguous", "clone") and name not in rules.FOLLOWS_FIRST:
            return None
        node = given


def _all_pictures(node: fx.Node) -> fx.Node | None:
    """The node that a concatenation along the first axis takes every picture of, in order."""
    parts: Any = rules.argument(node, 0, "tensors")
    if rules.argument(node, 1, "dim", "axis", default=0) not in (0, -2) or not all(rules.name_of(part) == "getitem" for part in parts):
        return None
    wholes = {part.args[0] for part in parts}
    if len(wholes) != 1 or [part.args[1] for part in parts] != list(range(len(parts))):
        return None
    whole = wholes.pop()
    if not is_tensor(whole):
        whole = whole.args[0] if rules.name_of(whole) == "unbind" and rules.argument(whole, 1, "dim", default=0) == 0 else None
    return whole if whole is not None and len(shape_of(whole)) == 3 and shape_of(whole)[0] == len(parts) else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for previous in stack.pop().all_input_nodes:
            if previous not in found:
                found.add(previous)
                stack.append(previous)
    return found
