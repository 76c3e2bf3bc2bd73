"""Which of the tokens stay that patches were laid out to: the mask of the patches goes the way of their elements."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from rewrite.lower.cursor import Cursor
from rewrite.lower.pictures import Stay
from rewrite.recognise.relaid import LaidAnew
from rewrite.tokens import kept_elements, rules
from rewrite.tokens.chosen import GIVEN
from rewrite.tokens.flow import tensor_arguments


def elements_handed(found: LaidAnew, at: Cursor) -> fx.Node:
    """The mask of the elements of a tensor that inputs were laid out to, whose patches an earlier graph chose among."""
    given = {source: source.meta[GIVEN] for source in found.sources}
    of_patches = kept_elements.elements_of_patches
    return _elements(found, {node: one.stay if one.relaid else at.call(of_patches, (one.stay, node)) for node, one in given.items()}, at)


def elements_laid(found: LaidAnew, stay: fx.Node, at: Cursor) -> fx.Node:
    """The mask of the elements of a tensor that the patches of a tower were laid out to; stay: bool [pictures, P]."""
    patches = found.sources[0]
    return _elements(found, {patches: at.call(kept_elements.elements_of_patches, (stay, patches))}, at)


def _elements(found: LaidAnew, masks: Mapping[fx.Node, fx.Node], at: Cursor) -> fx.Node:
    made, trail = dict(masks), found.trail
    for step in trail.way_to(found.node):
        how, first = trail.laid[step].how, step.args[0] if step.args else None
        if how == "source":
            continue
        if how == "moved":
            made[step] = at.copy(step, made)
        elif how == "padded":
            made[step] = at.call(kept_elements.elements_padded, (made[first], rules.argument(step, 1, "pad")))  # type: ignore[index]
        elif how == "joined":
            beside = [part for _, part in tensor_arguments(step) if part not in trail.laid]
            made[step] = at.copy(step, {**made, **{part: at.call(kept_elements.elements_beside, (part,)) for part in beside}})
        else:
            like = kept_elements.elements_like if how == "same" else kept_elements.elements_by_token
            mask = next(made[one] for one in step.all_input_nodes if one in trail.laid)
            made[step] = at.call(like, (mask, step))
    return made[found.node]


def handed_anew(found: LaidAnew, at: Cursor) -> Stay:
    """Which visual tokens stay, of patches that an earlier graph chose among."""
    assert found.choice is not None
    mask = at.call(kept_elements.all_tokens_that_stay, (elements_handed(found, at),))
    return Stay(mask, found.choice.share, relaid=True)


def laid_anew(found: LaidAnew, stay: Stay, at: Cursor) -> Stay:
    """Which visual tokens stay, of patches of a tower in the same graph."""
    return Stay(at.call(kept_elements.all_tokens_that_stay, (elements_laid(found, stay.mask, at),)), stay.share, relaid=True)
