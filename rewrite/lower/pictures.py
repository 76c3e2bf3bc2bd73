"""Visual tokens that a vision tower scores as the patches they were: which of a picture's stay, and what the others go into."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.selection import Pooled, Select
from rewrite.lower.cursor import Cursor
from rewrite.lower.lowering import lower_operand
from rewrite.lower.residual import behind_layer
from rewrite.recognise.operators import value_of
from rewrite.recognise.sites import Found
from rewrite.recognise.streams import is_parameter
from rewrite.tokens import choose, contextual, rules
from rewrite.tokens import pooled as pooling
from rewrite.tokens.chosen import Given
from rewrite.tokens.crops import patches_by_crop


def tower_output(read: Found, by: str) -> fx.Node:
    """[pictures, prefix + P, C]: what leaves the layer of a tower's site `read`, all that visual tokens are made of."""
    output, patches = behind_layer(read), read.patches
    if output is None or patches is None or output not in _made_of(patches, frozenset()):
        raise NotApplicableError(f"{by}: what leaves the layer of {read.site.name}, in which patches would be gathered, was not found")
    beside = next((node for node in _made_of(patches, frozenset({output})) if node.op == "placeholder" and not is_parameter(node)), None)
    if beside is not None:
        raise NotApplicableError(
            f"{by}: visual tokens are made of more than what leaves the layer of {read.site.name}, in which patches would be gathered"
        )
    return output


@dataclass(frozen=True)
class Stay:
    """Which patches stay. mask: bool [pictures, P], share: how much of them. relaid: they were laid out anew, and the mask is that of the
    visual tokens, bool [n], of which another share may stay.

    output, features: what leaves the tower's layer, and what is to take its place; None where that is as it was.
    """

    mask: fx.Node
    share: Fraction
    output: fx.Node | None = None
    features: fx.Node | None = None
    relaid: bool = False


def pooled(rule: Pooled, read: Found, at: Cursor) -> Stay:
    """The first patch of each cell of the grid, in whose place the mean of the cell enters the text."""
    patches, grid = read.patches, read.site.layout.grid
    assert patches is not None
    assert grid is not None
    early = Cursor(at.graph, patches)
    means = early.call(pooling.pooled_patches, (patches, grid, rule.cell))
    means.meta.update({name: patches.meta[name] for name in ("example_value", "nn_module_stack") if name in patches.meta})
    at.last = max(at.last, means)
    return Stay(at.call(pooling.firsts_stay, (patches, grid, rule.cell)), Fraction(1, rule.cell**2), patches, means)


def patches_that_stay(one: Select, read: Found, score: fx.Node, early_score: fx.Node | None, output: fx.Node | None, at: Cursor) -> Stay:
    """By the score [pictures, prefix + P] of the tower's site `read`.

    early_score: [pictures, prefix + P] of an earlier one, where crops share what stays. output: of the tower, where patches that leave are
    gathered in others.
    """
    prefix = read.site.layout.prefix
    patches = read.site.dims["Nk"] - prefix
    if one.crops is not None and early_score is not None:
        crops = one.crops
        thumbnail, others, busy = crops.numbers(one.count, patches)
        shape = (read.site.layout.grid, (crops.rows, crops.columns))
        mask = at.call(patches_by_crop, (early_score, score, prefix, *shape, thumbnail, others, busy, crops.bands))
        return Stay(mask, Fraction(thumbnail + others, crops.pictures * patches))
    kept = one.count.number(patches, patches)
    if one.contextual is None or output is None or kept == patches:
        return Stay(at.call(choose.best_of_pictures, (score, prefix, kept)), Fraction(kept, patches))
    targets = min(one.contextual.count.number(patches, patches), patches - kept)
    early = Cursor(at.graph, max(output, score))
    key = lower_operand(early, read.region, "key")
    divided = early.call(contextual.divided, (score, prefix, kept, targets))
    chosen, rest = (early.call(operator.getitem, (divided, part)) for part in range(2))
    features = early.call(contextual.contextual_tokens, (output, key, chosen, rest, one.contextual.summed))
    features.meta.update({name: output.meta[name] for name in ("example_value", "nn_module_stack") if name in output.meta})
    at.last = max(at.last, features)
    mask = at.call(contextual.patches_that_stay, (score, rest, prefix))
    return Stay(mask, Fraction(kept + targets, patches), output, features)


def replace_features(stay: Stay, patches: fx.Node) -> None:
    """Make the text's visual tokens of what takes the place of a tower's output."""
    if stay.output is not None and stay.features is not None:
        users = set(stay.output.users) - {stay.features, stay.mask}
        within = users & _made_of(patches, frozenset({stay.output})) if patches is not stay.output else users
        for user in within:
            if user.op != "output":
                user.replace_input_with(stay.output, stay.features)


def made_beside(stay: Stay, patches: fx.Node, at: Cursor) -> fx.Node | None:
    """The patches as they are made of what takes the place of a tower's output, beside the model's own; None where nothing does."""
    if stay.output is None or stay.features is None:
        return None
    copies = {stay.output: stay.features}
    needed = sorted(node for node in _made_of(patches, frozenset({stay.output})) if node > stay.output and node.op.startswith("call"))
    for node in needed:
        if rules.in_place(node) or rules.name_of(node) == "setitem":
            raise NotApplicableError(f"patches are gathered in front of {node.name}, which writes where it reads")
        copies[node] = at.copy(node, copies)
    return copies[patches]


def handed_on(given: Sequence[Given], at: Cursor) -> Stay:
    """What an earlier graph chose, and what it made of the patches in their place."""
    mask = at.call(choose.all_handed, ([one.stay for one in given],))
    return Stay(mask, given[0].choice.share)


def _made_of(node: fx.Node, ends: frozenset[fx.Node]) -> set[fx.Node]:
    """The node and the tensors that it was made of, up to `ends`."""
    found, stack = {node}, [node]
    while stack:
        for previous in stack.pop().all_input_nodes:
            if previous not in found and previous not in ends and isinstance(value_of(previous), torch.Tensor | tuple | list):
                found.add(previous)
                stack.append(previous)
    return found
