"""Which attention of a vision tower the visual tokens of a text were the patches of, where they are these patches in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from rewrite.recognise.operators import canonical, hinted_shape
from rewrite.recognise.region import Region
from rewrite.recognise.streams import ancestors
from rewrite.tokens import rules
from rewrite.tokens.chosen import GIVEN
from rewrite.tokens.layout import TokenLayouts
from rewrite.tokens.placement import is_tensor, shape_of


def tower_of(source: fx.Node | None, regions: Iterable[tuple[str, Region]], layouts: TokenLayouts) -> tuple[str, fx.Node] | None:
    """(name of the last attention in front of them, the patches [images, P, C]) of the visual tokens `source` [images * P, C].

    None where they are not all patches of a grid, picture by picture in row-major order: joined with other tokens, reordered, or pooled.
    """
    patches = None if source is None else _pictures(source)
    if patches is None or not patches_behind(patches, layouts):
        return None
    tower = tower_behind(patches, regions, layouts)
    return None if tower is None else (tower, patches)


def patches_behind(node: fx.Node, layouts: TokenLayouts) -> bool:
    """Whether a tensor holds pictures [pictures, P, C]: all patches of a grid in row-major order, and no other token."""
    if len(shape_of(node)) != 3:
        return False
    lies = layouts.of(node)
    whole = lies is not None and lies.window is None and not lies.prefix and not lies.suffix and lies.raster
    return whole and lies is not None and hinted_shape(node)[1] == lies.patches


def tower_behind(patches: fx.Node, regions: Iterable[tuple[str, Region]], layouts: TokenLayouts) -> str | None:
    """The name of the last attention that pictures went through in their vision tower; None where there is none."""
    lies = layouts.of(patches)
    behind, passed = ancestors([patches]), list[str]()
    for name, region in regions:
        at = layouts.of_operand(region.query.node, region.query.layout.steps(), axis=2)
        if region.output in behind and at is not None and lies is not None and at.grid == lies.grid:
            passed.append(name)
    return passed[-1] if passed else None


def given_pictures(source: fx.Node | None) -> tuple[fx.Node, ...]:
    """The inputs whose patches the visual tokens `source` [images * P, C] are, where a pass chose among them earlier; else none."""
    node = source
    while node is not None and GIVEN not in node.meta:
        if rules.name_of(node) == "cat":
            parts: Any = rules.argument(node, 0, "tensors")
            first = rules.argument(node, 1, "dim", "axis", default=0) in (0, -2, -3) and len(shape_of(node)) == len(shape_of(parts[0]))
            alike = {part.meta[GIVEN].choice if GIVEN in part.meta and not part.meta[GIVEN].relaid else None for part in parts}
            return tuple(parts) if first and len(alike) == 1 and None not in alike else ()
        node = _before(node)
    return () if node is None or node.meta[GIVEN].relaid else (node,)


def pictures_of(result: Any) -> tuple[fx.Node | None, int | None]:
    """(the node [images, P, C] that a graph's result is, holds in order as [images * P, C], or is one picture of; which picture, None for
    all); None where it is none of these."""
    if not isinstance(result, fx.Node) or not is_tensor(result):
        return None, None
    if len(shape_of(result)) == 3:
        return result, None
    if rules.name_of(result) != "getitem" or not isinstance(result.args[1], int):
        return (_pictures(result) if len(shape_of(result)) == 2 else None), None
    whole = _stacked(result.args[0])
    return whole, None if whole is None else result.args[1]


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
        given = _before(node)
        if given is None:
            return None
        node = given


def _before(node: fx.Node) -> fx.Node | None:
    """What a node is a view or a cast of, with the same channels; None where it is none."""
    given = node.args[0] if node.args else None
    if not isinstance(given, fx.Node) or not is_tensor(given):
        return None
    name = rules.name_of(node)
    merged = name in {"view", "reshape", "flatten"} and shape_of(given)[-1] == shape_of(node)[-1]
    return given if merged or canonical(node) in ("cast", "contiguous", "clone") or name in rules.FOLLOWS_FIRST else None


def _stacked(whole: Any) -> fx.Node | None:
    """The node [images, P, C] that pictures are taken of one by one, perhaps through `unbind`."""
    if not is_tensor(whole):
        whole = whole.args[0] if rules.name_of(whole) == "unbind" and rules.argument(whole, 1, "dim", default=0) == 0 else None
    return whole if whole is not None and is_tensor(whole) and len(shape_of(whole)) == 3 else None


def _all_pictures(node: fx.Node) -> fx.Node | None:
    """The node that a concatenation along the first axis takes every picture of, in order."""
    parts: Any = rules.argument(node, 0, "tensors")
    if rules.argument(node, 1, "dim", "axis", default=0) not in (0, -2) or not all(rules.name_of(part) == "getitem" for part in parts):
        return None
    wholes = {part.args[0] for part in parts}
    if len(wholes) != 1 or [part.args[1] for part in parts] != list(range(len(parts))):
        return None
    whole = _stacked(wholes.pop())
    return whole if whole is not None and shape_of(whole)[0] == len(parts) else None
