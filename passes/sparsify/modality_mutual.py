"""Modality-mutual attention (MMA): visual tokens also see the text that follows them.

Wang et al. 2025, "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs" (AKI). Under a
causal mask an image in front of its question is encoded without having seen the question. MMA begins with the causal mask and unlocks, for
visual queries, the columns of later text:

    i sees j  if  j <= i   or   i is visual, j is text and j > i;        padding is hidden as before

The published code unlocks up to a marker at the question's end. Models at hand have none: all later text of the row's prompt counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from passes.sparsify.narrowing import reasons_against_layer
from rewrite.ir import (
    CHANGES_NOTHING,
    NK,
    NQ,
    QK,
    Attend,
    AttentionInputs,
    B,
    Fits,
    I,
    J,
    NotApplicableError,
    Operation,
    Pass,
    Site,
    Sum,
    parameter,
    read,
    register_pass,
    tensor,
    tensors_in,
)

# An additive mask hides a key where it adds this or less: e^-1e4 is zero in every floating type.
HIDDEN = -1e4

# A tensor is read at one place under one name. These are the names it has for a pair the other way round, and for a key by itself.
OTHER_WAY, ITSELF = "{}_other_way", "{}_itself"


@register_pass
@dataclass(frozen=True)
class ModalityMutual(Pass):
    """Unlocks later text for the visual queries of a prompt. Decoding goes on causally: the prompt does not see what is generated.

    A causal mask that the model built as a tensor hides more than what is later, padding for one. So a visual query i is shown the later
    text j where the site's own mask lets j see itself (it is no padding) and lets j see i (they belong together), and what an additive mask
    or bias gives the pair is what it gives it the other way round.

    All that a call brings counts as prompt. A call that holds the answer too, as training with labels and the scoring of continuations do,
    lets the answer leak to itself through the image: use the pass on prompts alone.
    """

    name = "modality_mutual"
    family = "sparsify"
    paper = "Wang et al.: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs (AKI), 2025 (arXiv 2503.02597)"
    formula = "out[i] = sum_{j in S(i)} softmax_{j in S(i)}(score[i,j]) v[j], S(i) = {j <= i}, and text j > i where i is visual"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=True, visual=True)
    excludes = ("composite",)

    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from reasons_against_layer(site, self.layers)
        if "visual" not in site.operands:
            yield "which of its new tokens are visual was not found"
        if site.dims["Nq"] == 1:
            yield f"it has one query, and no text behind it: the pass {CHANGES_NOTHING} here"
        for attend in site.body.attends():
            dot, _ = _parts(attend.score)
            if pairs := [name for name, places in tensors_in(dot).items() if {I, J} <= set().union(*(p.free_symbols for p in places))]:
                yield f"its score reads {', '.join(pairs)} other than by adding it, and what that would be for a hidden pair is not known"

    def transform(self, site: Site) -> Site:
        attend, mutual = site.attend, _Mutual(NK - NQ if site.cached else sympy.Integer(0))
        dot, rest = _parts(attend.score)
        back, alone = mutual.other_way(attend.mask), mutual.itself(attend.mask)
        added = mutual.other_way(rest)
        if rest.has(J):
            back, alone = sympy.And(back, sympy.Gt(added, HIDDEN)), sympy.And(alone, sympy.Gt(mutual.itself(rest), HIDDEN))
        unlocked = sympy.And(mutual.later_text(), back, alone)
        changed = replace(
            attend,
            mask=sympy.Or(attend.mask, unlocked),
            score=dot + sympy.Piecewise((added, unlocked), (rest, True)) if rest.has(J) else attend.score,
        )
        operations: list[Operation] = []
        for operation in site.body.operations:
            operations += [*mutual.names(changed), changed] if isinstance(operation, Attend) else [operation]
        return replace(site.with_operations(*operations), hides_later=False)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Pair by pair."""
        visual, queries, keys = attention.visual, attention.logits.shape[-2], attention.logits.shape[-1]
        if visual is None:
            raise NotApplicableError(f"{self}: {attention.site.name} gives no visual positions")
        dots = float(attention.site.scale) * attention.query @ attention.key.transpose(-2, -1)
        logits, added, past = attention.logits.clone(), attention.logits - dots, keys - queries
        for row in range(len(visual)):
            for query in visual[row, past:].nonzero().flatten().tolist():
                for other in range(query + 1, queries):
                    if not visual[row, past + other]:
                        back, alone = added[row, :, other, past + query], added[row, :, other, past + other]
                        shown = (back > HIDDEN) & (alone > HIDDEN)
                        logits[row, shown, query, past + other] = (dots[row, :, query, past + other] + back)[shown]
        return logits.softmax(-1).nan_to_num(0.0) @ attention.value


@dataclass(frozen=True)
class _Mutual:
    """Expressions of a site read for pairs (i, j) of new tokens the other way round; `past` is the number of keys in front of them."""

    past: sympy.Expr

    def later_text(self) -> Boolean:
        """Query i is visual, key j text and behind it. Where queries are all the keys, both are read by token."""
        of_key = read("visual_itself", B, J - self.past)
        return sympy.And(sympy.Ne(tensor("visual", "bi"), 0), sympy.Eq(of_key, 0), sympy.Gt(J, I + self.past))

    def other_way(self, expression: sympy.Basic) -> sympy.Basic:
        """Its value for token j as the query and token i as the key."""
        return _at(expression, {I: J - self.past, J: I + self.past}, OTHER_WAY)

    def itself(self, expression: sympy.Basic) -> sympy.Basic:
        """Its value for token j as both."""
        return _at(expression, {I: J - self.past}, ITSELF)

    @staticmethod
    def names(attend: Attend) -> list[Sum]:
        """The second and third names of the tensors that the operation reads."""
        found: list[Sum] = []
        for form in (OTHER_WAY, ITSELF):
            suffix = form.format("")
            found += [Sum(name, (name.removesuffix(suffix),)) for name in attend.tensors() if name.endswith(suffix)]
        return found


def _at(expression: sympy.Basic, places: Mapping[sympy.Symbol, sympy.Expr], form: str) -> sympy.Basic:
    """The expression at other positions, the tensors it reads there named anew."""
    moved: dict[sympy.Basic, sympy.Basic] = dict(places)
    for each in expression.atoms(sympy.Indexed):
        moved[each] = read(form.format(each.base.label), *(index.xreplace(places) for index in each.indices))
    return expression.xreplace(moved)


def _parts(score: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(what the product of query and key is in, what is added to it)."""
    rest, dot = sympy.expand_mul(score).as_independent(QK, as_Add=True)
    return dot, rest
