"""The algebra of linear attention: an attention whose map is a product of something of the query and something of the key.

A score that is a polynomial of degree one in qk, its coefficients sums of products of a part read at (b, h, i) and one read at (b, h, j),

    score[i,j] = exp(rate[b,h] (j - i - shift)) sum_t query_t[b,h,i] key_t[b,h,j] (qk or 1)

is a dot product of features: of the query, query_t times query[i,:] or one; of the key, key_t times key[j,:] or one. By associativity
sum_j (features[i] . features[j]) value[j] is features[i] times the *state* sum_j features[j] value[j]^T: Nq + Nk products of F x Dv
instead of Nq Nk of F + Dv (Katharopoulos et al. 2020). Where a query sees the first limit(i) keys the state grows from chunk to chunk of
queries, and what is new within a chunk is multiplied pair by pair; an exponential in j - i carries over as a decay of the state (Sun et
al. 2023, Qin et al. 2024), relative to the last key that it holds, so that no factor is larger than a weight. Where a query sees the keys
of its own segment alone (packed sequences), each segment has a state of its own, which grows in the same way; so it does where a query sees
the keys up to a number of its own (positions that are data), in the order of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import sympy
from sympy.logic.boolalg import Boolean

from codegen.masks import depends_on_positions_only
from codegen.tile_masks import sides_of
from codegen.weight_form import weight_factor
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import NK, NQ, QK, H, I, J, conjuncts
from rewrite.ir.operations import Attend

# Of a query and of a key, what agrees where both are of one segment.
Segments = tuple[tuple[sympy.Expr, sympy.Expr], ...]


class Order(NamedTuple):
    """A query sees the keys whose number is not above its own, or below it where `strict`; where `descending`, not below, or above.

    query, key: the numbers, expressions at b, i and at b, j.
    """

    query: sympy.Expr
    key: sympy.Expr
    strict: bool
    descending: bool


@dataclass(frozen=True)
class Feature:
    """One term of a score: ``query * key * qk`` where `dot`, else ``query * key``; query is read at b, h, i and key at b, h, j."""

    query: sympy.Expr
    key: sympy.Expr
    dot: bool


@dataclass(frozen=True)
class StateForm:
    """An attention as features, a state and what becomes of the result.

    features: the score's terms. value: what a value is multiplied by, at b, h, j. result: what a result is multiplied by, at b, h, i.
    seen_keys, seen_queries: which keys (queries) take part at all, predicates at b, h, j (b, h, i). limit: how many of the first keys a
    query sees, an integer expression in i, Nq and Nk that may leave 0..Nk; None where it sees all. segments: pairs of an expression at b, i
    and one at b, j, all of which agree where a query sees a key; none where there are no segments. order: by which numbers a query sees
    keys, instead of a limit. rate, shift: of the decay ``exp(rate (j - i - shift))``, rate at b, h and shift an integer expression in Nq
    and Nk; a rate of zero is no decay.
    totals: whether the sum of the scores is needed too.
    """

    features: tuple[Feature, ...]
    value: sympy.Expr
    result: sympy.Expr
    seen_keys: Boolean
    seen_queries: Boolean
    limit: sympy.Expr | None
    segments: Segments
    order: Order | None
    rate: sympy.Expr
    shift: sympy.Expr
    totals: bool

    def width(self, head_dim: int) -> int:
        """Features of a query or a key of `head_dim`."""
        return sum(head_dim if feature.dot else 1 for feature in self.features)

    @property
    def sorts_keys(self) -> bool:
        """Whether queries see intervals of keys that are sorted first."""
        return bool(self.segments) or self.order is not None

    @property
    def shares_keys(self) -> bool:
        """Whether query heads that share keys share the state."""
        of_keys = (*(feature.key for feature in self.features), self.value, self.seen_keys, self.rate)
        return self.rate == 0 and not any(H in part.free_symbols for part in of_keys)


@lru_cache(maxsize=1024)
def state_form(attend: Attend) -> StateForm | str:
    """The operation's state form, or why it has none, in words that follow "it has no state form:"."""
    try:
        return _state_form(attend)
    except RewriteError as reason:
        return str(reason)


def has_sorted_keys(attend: Attend) -> bool:
    """Whether its states are of keys that have to be sorted: by segment, or by numbers that are data."""
    form = state_form(attend)
    return isinstance(form, StateForm) and form.sorts_keys


def _state_form(attend: Attend) -> StateForm:
    if attend.normaliser == "softmax":
        raise RewriteError("a softmax is no product of queries and keys")
    if attend.mixes or attend.renormalised or attend.choice is not None:
        raise RewriteError("heads are mixed, weights normalised again or keys chosen from the data")
    factor, slope = weight_factor(attend.weight), attend.score.diff(QK)
    if factor is None:
        raise RewriteError(f"the weight {attend.weight} is not w times a factor")
    if QK in slope.free_symbols:
        raise RewriteError(f"the score {attend.score} is not linear in qk")
    terms = [(True, *term) for term in _terms(slope)] + [(False, *term) for term in _terms(attend.score.xreplace({QK: sympy.Integer(0)}))]
    of_weight = _terms(factor)
    if not terms or len(of_weight) != 1 or of_weight[0][2] != 0:
        raise RewriteError(f"the weight {attend.weight} is no product of a query's and a key's part" if terms else "its score is zero")
    exponents = {exponent for *_, exponent in terms}
    if len(exponents) > 1:
        raise RewriteError(f"the terms of the score {attend.score} decay differently")
    mask = split_by_side(attend.mask)
    rate, shift, constant = _decay(exponents.pop())
    if rate != 0 and mask.limit is None:
        raise RewriteError(f"the score {attend.score} grows with the distance of keys that come later, and no mask hides these")
    gathered: dict[tuple[bool, sympy.Expr], sympy.Expr] = {}
    for dot, query, key, _ in terms:
        gathered[dot, key] = gathered.get((dot, key), sympy.Integer(0)) + query * constant
    features = tuple(Feature(query, key, dot) for (dot, key), query in gathered.items())
    ((result, value, _),) = of_weight
    return StateForm(features, value, result, *mask, rate, shift, attend.normaliser == "sum")


def _terms(expression: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr, sympy.Expr]]:
    """(query's factor, key's factor, the exponent that holds both) of every term of a sum; what both may read goes to the query."""
    found = []
    for term in sympy.Add.make_args(sympy.expand_mul(expression)):
        parts = {"query": sympy.Integer(1), "key": sympy.Integer(1)}
        exponent = sympy.Integer(0)
        for factor in sympy.Mul.make_args(term):
            if J not in factor.free_symbols:
                parts["query"] *= factor
            elif I not in factor.free_symbols:
                parts["key"] *= factor
            elif isinstance(factor, sympy.exp):
                exponent += factor.args[0]
            else:
                raise RewriteError(f"{factor} depends on a query and a key together")
        if term != 0:
            found.append((parts["query"], parts["key"], sympy.expand(exponent)))
    return found


def _decay(exponent: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """(rate, shift, factor) of  exp(exponent) = factor * exp(rate (j - i - shift))."""
    rate = exponent.coeff(J, 1)
    rest = sympy.expand(exponent - rate * (J - I))
    if {I, J} & (rate.free_symbols | rest.free_symbols):
        raise RewriteError(f"exp({exponent}) is no decay with the distance i - j at a rate of its head")
    if rest == 0:
        return rate, sympy.Integer(0), sympy.Integer(1)
    # Within the exponent the shift is exact: apart, one factor could overflow where their product does not.
    shift = sympy.cancel(-rest / rate)
    if shift.is_integer and shift.free_symbols <= {NQ, NK}:
        return rate, shift, sympy.Integer(1)
    return rate, sympy.Integer(0), sympy.exp(rest)


class MaskSides(NamedTuple):
    """The parts of a mask, as `StateForm` has them."""

    seen_keys: Boolean
    seen_queries: Boolean
    limit: sympy.Expr | None
    segments: Segments
    order: Order | None

    @property
    def compared(self) -> tuple[sympy.Expr, ...]:
        """The numbers that decide which keys a query sees."""
        pairs = [*self.segments, *([self.order[:2]] if self.order else [])]
        return tuple(number for pair in pairs for number in pair)


@lru_cache(maxsize=1024)
def split_by_side(mask: Boolean) -> MaskSides:
    """Raises `RewriteError` for a mask that is no conjunction of such parts."""
    keys, queries, limit = sympy.true, sympy.true, NK
    segments: list[tuple[sympy.Expr, sympy.Expr]] = []
    orders: list[Order] = []
    for term in conjuncts(mask):
        if I not in term.free_symbols:
            keys = sympy.And(keys, term)
        elif J not in term.free_symbols:
            queries = sympy.And(queries, term)
        elif isinstance(term, _COMPARED) and not depends_on_positions_only(term) and (sides := sides_of(term)) is not None:
            _require_integers(term)
            orders.append(_order(type(term), *sides))
        elif isinstance(term, sympy.Eq) and (sides := sides_of(term)) is not None:
            _require_integers(term)
            segments.append(sides if I in sides[0].free_symbols else sides[::-1])
        else:
            limit = sympy.Min(limit, _limit(term))
    if len(orders) > 1 or (orders and limit != NK):
        raise RewriteError(f"the mask {mask} orders keys in several ways")
    return MaskSides(keys, queries, None if limit == NK else limit, tuple(segments), orders[0] if orders else None)


def _require_integers(term: sympy.Rel) -> None:
    """Raise `RewriteError` for a comparison of others than integers at b, i and b, j, taking tensors for such."""
    whole = term.xreplace({read: sympy.Dummy(integer=True) for read in term.atoms(sympy.Indexed)})
    if H in term.free_symbols or not all(side.is_integer for side in whole.args):
        raise RewriteError(f"the mask {term} gives each head segments of its own, or none that integers tell apart")


_COMPARED = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def _order(relation: type[sympy.Rel], left: sympy.Expr, right: sympy.Expr) -> Order:
    key_first, upward = J in left.free_symbols, relation in (sympy.Le, sympy.Lt)
    query, key = (right, left) if key_first else (left, right)
    return Order(query, key, relation in (sympy.Lt, sympy.Gt), key_first != upward)


def _limit(predicate: Boolean) -> sympy.Expr:
    """n such that the predicate holds for the keys j < n and no others."""
    if not depends_on_positions_only(predicate):
        raise RewriteError(f"the mask {predicate} depends on a query and a key together, and on more than their positions")
    if isinstance(predicate, sympy.And | sympy.Or):
        join = sympy.Min if isinstance(predicate, sympy.And) else sympy.Max
        return join(*map(_limit, predicate.args))
    if J not in predicate.free_symbols:
        return sympy.Piecewise((NK, predicate), (sympy.Integer(0), True))
    if isinstance(predicate, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        upper = isinstance(predicate, sympy.Le | sympy.Lt)
        strict = isinstance(predicate, sympy.Lt | sympy.Gt)
        difference = predicate.lhs - predicate.rhs if upper else predicate.rhs - predicate.lhs
        found = _largest(sympy.expand(difference), strict)
        if found is not None:
            return found
    raise RewriteError(f"the mask {predicate} does not let a query see the first keys up to some limit")


def _largest(difference: sympy.Expr, strict: bool) -> sympy.Expr | None:
    """n such that  difference <= 0  (< 0 where strict) for the integers j < n and no others; None where there is none of that form."""
    floors = [part for part in difference.atoms(sympy.floor) if J in part.free_symbols]
    if len(floors) == 1:
        (whole,) = floors
        rest = sympy.expand(difference - whole)
        # floor(x) <= y is  x < y + 1, and floor(x) < y is  x < y, for integers y.
        if J in rest.free_symbols or not rest.is_integer:
            return None
        difference, strict = sympy.expand(whole.args[0] + rest - (0 if strict else 1)), True
    slope = difference.coeff(J, 1)
    rest = sympy.expand(difference - slope * J)
    if J in rest.free_symbols or not (slope.is_number and slope.is_positive):
        return None
    return -sympy.floor(rest / slope) if strict else sympy.floor(-rest / slope) + 1
