"""Lines of the backward kernels for one tile of pairs: scores recomputed, weights, and what flows back through them.

With a the weight expression's factor, w the normalised weights, p = a w what the values were multiplied by, and

    d_weight[i,j] = d_out[i] . v[j]        d_normalised = a d_weight        c[i] = sum_j p[i,j] d_weight[i,j] = d_out[i] . out[i]

the gradient of the scores is, in terms of what is known of a query (`row_facts`; lse gives `shift`)

    softmax   w = exp(score - lse)    d_score = w (d_normalised - delta)         delta = c - d_lse
    sum       w = score share         d_score = d_normalised share - delta       delta = D' c share - d_lse / sum_j score
    none      w = score               d_score = d_normalised

where D is the denominator, D' its derivative by the sum and share = 1 / D (see `codegen.normalise`). From there it reaches the dot products
and the tensors by the symbolic slopes of the expressions. A tile stands [queries, keys] where a program owns queries, and [keys, queries]
where it owns keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean

from codegen.backward_groups import group_factors, group_facts, load_group
from codegen.base_two import LOG2_E
from codegen.kernel_reads import KernelReads, Owner
from codegen.tensor_reads import derivative
from codegen.tile_masks import split_tiles
from codegen.tiles import Crowding
from codegen.triton_printer import triton_text
from codegen.weight_form import weight_factor
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import QK, I, Indices, J, W, conjuncts, letters, tensors_in
from rewrite.ir.operations import Attend, Normaliser

_ROW_FACTS: Mapping[Normaliser, tuple[str, ...]] = {"softmax": ("delta",), "sum": ("delta", "share"), "none": ()}


def row_facts(attend: Attend) -> tuple[str, ...]:
    """What the kernel that owns queries leaves for the one that owns keys, [B, H, Nq] float32 each."""
    return (*_ROW_FACTS[attend.normaliser], *(() if attend.groups is None else group_facts(attend.groups)))


def read_of(name: str, indices: Indices) -> sympy.Indexed:
    """The tensor as expressions read it."""
    return sympy.Indexed(sympy.IndexedBase(name, real=True), *indices)


def crowding(attend: Attend) -> Crowding:
    """Where a tile has more to hold than its scores: what `codegen.tiles.backward_tiles` asks for.

    Of both kernels: tensors read by pair, groups. Of the one that owns queries: scores that are weights without a normaliser, and a mask
    that reads tensors of queries and of keys.
    """
    read = {name: set[sympy.Basic]().union(*(index.free_symbols for index in places)) for name, places in attend.tensors().items()}
    if attend.groups is not None or any({I, J} <= symbols for symbols in read.values()):
        return "both"
    masking = set[sympy.Basic]().union(*(read[name] for name in tensors_in(attend.mask)))
    return "queries" if attend.normaliser == "none" or {I, J} <= masking else "none"


def reached(attend: Attend, name: str) -> bool:
    """Whether a gradient reaches the tensor: arithmetic reads it, where a mask only compares."""
    variable = read_of(name, attend.tensors()[name])
    return any(expression.has(variable) for expression in attend.expressions())


def reason_against_gradient(attend: Attend, name: str) -> str | None:
    """Why the kernels cannot give the gradient of a tensor that is reached, in words, or None."""
    indices = attend.tensors()[name]
    if letters(indices) is None:
        places = ", ".join(map(str, indices))
        return f"pairs of several programs meet in the gradient of {name}[{places}], and their sum would have no fixed order"
    try:
        for expression in attend.expressions():
            derivative(expression, read_of(name, indices))
    except RewriteError as error:
        return str(error)
    return None


def way_of(attend: Attend, name: str) -> str:
    """How the gradient of a tensor is summed where all its axes have their sizes: by "pairs", "keys" or "rows" (queries)."""
    axes = set(letters(attend.tensors()[name]) or "")
    return "pairs" if {"i", "j"} <= axes else "keys" if "j" in axes else "rows"


class BackwardBlock:
    """Lines for the tiles of one kernel. slope: of the score by qk. gradients: tensor name -> what its gradient is called."""

    def __init__(self, attend: Attend, owner: Owner) -> None:
        self.attend, self.owner = attend, owner
        self.reads = KernelReads(attend, owner)
        self.mask = split_tiles(attend)
        self.factor = sympy.sympify(weight_factor(attend.weight))
        self.slope = sympy.sympify(derivative(attend.score, QK))
        self._edge = f"{'in_keys' if owner == 'queries' else 'in_rows'}[None, :]"

    @cached_property
    def gradients(self) -> dict[str, str]:
        """For every tensor whose gradient the kernels give (`reason_against_gradient`)."""
        taken = set(self.reads.ids.values())
        chosen: dict[str, str] = {}
        for name in self.attend.tensors():
            if reached(self.attend, name) and reason_against_gradient(self.attend, name) is None:
                chosen[name] = f"d_{self.reads.ids[name]}"
                while chosen[name] in taken:
                    chosen[name] += "_"
                taken.add(chosen[name])
        return chosen

    def read_before(self) -> list[str]:
        """Loads of the tensors that do not change along the walk."""
        attend = self.attend
        lines = self.reads.outside_loop("rows" if self.owner == "queries" else "keys", attend.score, attend.mask, attend.weight)
        group = [] if attend.groups is None or self.owner == "queries" else [load_group(attend.groups, self.reads)]
        return [*(line.removeprefix("    ") for line in lines), *group]

    def scores(self) -> list[str]:
        """qk and score; where the mask hides a key it weighs nothing."""
        attend, reads = self.attend, self.reads
        softmax = attend.normaliser == "softmax"
        text = triton_text(sympy.Float(LOG2_E) * attend.score if softmax else attend.score, reads.inside_names)
        left, right = ("query", "key") if self.owner == "queries" else ("key", "query")
        always = (attend.score, self.mask.by_pair, attend.weight)
        tiles = reads.inside_loop(self.mask.by_tile, beside=always)
        return [
            *reads.inside_loop(*always),
            *(["if CHECKED:", *(f"    {line}" for line in tiles)] if tiles else []),
            f"qk = tl.dot({left}_tile, tl.trans({right}_tile), input_precision=PRECISION)",
            f"score = {text}{'  # in base 2: times log2(e)' if softmax else ''}",
            *([] if attend.score.has(QK) else ["score += tl.zeros_like(qk)"]),
            *self._hide("score", 'float("-inf")' if softmax else "0.0"),
        ]

    def _hide(self, target: str, nothing: str) -> list[str]:
        """A line for the end of what is walked over, and one for each term of the mask."""

        def where(condition: str) -> str:
            return f"{target} = tl.where({condition}, {target}, {nothing})"

        def terms(mask: Boolean) -> list[str]:
            return [] if mask == sympy.true else [where(triton_text(term, self.reads.inside_names)) for term in conjuncts(mask)]

        mask = self.mask
        cut = [where(self._edge), *terms(mask.by_position), *terms(mask.by_tile)]
        return ["if CHECKED:", *(f"    {line}" for line in cut), *terms(mask.by_pair)]

    def weights(self) -> list[str]:
        """weight: normalised, before its factor."""
        by_query = self.reads.by_query
        text = {"softmax": f"tl.exp2(score - shift{by_query})", "sum": f"score * share{by_query}", "none": "score"}
        return [f"weight = {text[self.attend.normaliser]}"]

    def factors(self) -> list[str]:
        """factor: what the weight expression multiplies by; past the end it is made of whatever its tensors read as there."""
        groups = self.attend.groups
        if groups is not None:
            return [*([load_group(groups, self.reads)] if self.owner == "queries" else []), *group_factors(groups, self.reads)]
        if self.attend.weight == W:
            return []
        text = triton_text(self.factor, self.reads.inside_names)
        return [f"factor = {text}", "if CHECKED:", f"    factor = tl.where({self._edge}, factor, 0.0)"]

    @property
    def counted(self) -> str:
        """What the values were multiplied by."""
        return "weight" if self.attend.weight == W and self.attend.groups is None else "(weight * factor)"

    def weight_gradients(self) -> list[str]:
        """d_weight."""
        left, right = ("d_out", "value") if self.owner == "queries" else ("value", "d_out")
        return [f"d_weight = tl.dot({left}_tile, tl.trans({right}_tile), input_precision=PRECISION)"]

    def score_gradients(self) -> list[str]:
        """d_weight, d_normalised and d_score."""
        by_query, normaliser = self.reads.by_query, self.attend.normaliser
        received = "d_weight" if self.attend.weight == W else "d_weight * factor"
        received = received if self.attend.groups is None else "d_weight * factor + offset"
        text = {
            "softmax": f"weight * (d_normalised - delta{by_query})",
            "sum": f"d_normalised * share{by_query} - delta{by_query}",
            "none": "d_normalised",
        }
        return [
            *self.weight_gradients(),
            f"d_normalised = {received}",
            f"d_score = {text[normaliser]}",
            *([] if normaliser == "softmax" else self._hide("d_score", "0.0")),
        ]

    def dot_gradients(self) -> list[str]:
        """d_dot: the gradient of qk, where the slope is no number; a number is left to the end of the walk."""
        if self.slope.is_number:
            return ["d_dot = d_score"]
        return [f"d_dot = {self._reached_by('d_score', self.slope)}"]

    def _reached_by(self, received: str, slope: sympy.Expr) -> str:
        """received * slope; a slope may be infinite where nothing is received, past the end or at a hidden pair."""
        if slope.is_number:
            return received if slope == 1 else f"{received} * {triton_text(slope, self.reads.inside_names)}"
        return f"tl.where({received} != 0, {received} * ({triton_text(slope, self.reads.inside_names)}), 0.0)"

    def change(self, name: str) -> str | None:
        """What one tile gives to the gradient of a tensor; None where score and weight do not read it."""
        variable = read_of(name, self.attend.tensors()[name])
        parts = [
            self._reached_by(received, slope)
            for received, slope in (
                ("d_score", sympy.sympify(derivative(self.attend.score, variable))),
                ("d_weight * weight", sympy.sympify(derivative(self.factor, variable))),
            )
            if slope != 0
        ]
        return " + ".join(parts) or None
