"""What each key receives, by an attention kernel with queries and keys exchanged.

With lse_i the log-sum-exp of query i, kept from the attention itself, and u_i the weight of its row, what key j receives is

    r_j = sum_i u_i exp(s_ij - lse_i) = exp(lse'_j) o_j,    s'_ji = s_ij - lse_i + log|u_i|

lse' and o being the log-sum-exp and the result of the attention whose queries are the keys, whose scores are s' and whose values are the
signs of u. Block lists, GQA, masks and biases are those of any attention, memory is O(N), and no kernel had to be written for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch
from sympy.logic.boolalg import Boolean

from codegen.kernel import has_triton_form
from codegen.torch_statistics import softmax_score
from codegen.torch_streaming import output_like
from codegen.tuned_launch import launch_attention
from rewrite.ir.evaluation import all_positions, evaluate_expression, read_at
from rewrite.ir.expression import NK, NQ, I, J, W, letters, tensor, tensors_in
from rewrite.ir.operations import Attend
from rewrite.ir.statistic import Statistic

# Names of the exchanged attention's own tensors, which no operand of a site has.
LSE, LOG_WEIGHT = "log_sum_exp_", "log_weight_"
# Columns of the signs: as narrow as tl.dot takes.
WIDTH = 16
_EXCHANGED = {I: J, J: I, NQ: NK, NK: NQ}


@dataclass(frozen=True)
class Exchanged:
    """attend: the attention of the module's docstring. weight: u in b, h, i. turned: tensors whose query and key axes change places."""

    attend: Attend
    weight: sympy.Expr
    turned: Mapping[str, tuple[int, int]]


def reason_against_exchange(statistic: Statistic) -> str | None:
    """Why a statistic over queries has no kernel, in words, or None."""
    if softmax_score(statistic) is None:
        return "its weights are not the exponentials of scores that are linear in qk"
    weight = statistic.term / W
    if {W, J} & weight.free_symbols:
        return f"its term {statistic.term} is not w times a weight of the query's row"
    return has_triton_form(exchanged(statistic).attend)


@lru_cache(maxsize=1024)
def exchanged(statistic: Statistic) -> Exchanged:
    """The exchanged attention of a statistic over queries whose term is w times a weight of the row."""
    attend = statistic.attend
    turned, named = {}, dict[sympy.Basic, sympy.Basic]()
    for each in attend.score.atoms(sympy.Indexed) | attend.mask.atoms(sympy.Indexed):
        plain = letters(each.indices)
        if plain is not None:
            # Its letters go on in order: where it had both, its own axes change places instead.
            named[each] = tensor(str(each.base.label), "".join(sorted(plain.translate(str.maketrans("ij", "ji")))))
            if "ij" in plain:
                turned[str(each.base.label)] = (plain.index("i"), plain.index("j"))
        else:
            named[each] = each.xreplace(_EXCHANGED)
    weight = sympy.sympify(statistic.term / W)
    score = _exchange(attend.score, named) - tensor(LSE, "bhj") + (0 if weight == 1 else tensor(LOG_WEIGHT, "bhj"))
    mask = sympy.And(_exchange(attend.mask, named), _rows(statistic))
    return Exchanged(replace(attend, score=score, mask=mask, sink=None), weight, turned)


def _exchange(expression: sympy.Basic, named: Mapping[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    reads = {each: sympy.Dummy(real=True) for each in named}
    plain = expression.xreplace(reads).xreplace(_EXCHANGED)
    return plain.xreplace({reads[each]: named[each] for each in named})


def _rows(statistic: Statistic) -> Boolean:
    """Which keys of the exchanged attention, queries of the statistic's, are read."""
    start, stop = statistic.rows or (0, None)
    first = start if start >= 0 else NK + start
    before = sympy.true if stop is None else sympy.Lt(J, stop if stop >= 0 else NK + stop)
    return sympy.And(sympy.Ge(J, first), before)


def received(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor], lse: torch.Tensor
) -> torch.Tensor:
    """[B, H, Nk] float32, of a statistic that `reason_against_exchange` has nothing against; lse [B, H, Nq] is the attention's own."""
    made = exchanged(statistic)
    batch, heads, n_queries, _ = query.shape
    # A query that sees no key gives nothing.
    own = {LSE: lse.masked_fill(lse == -torch.inf, torch.inf)}
    sign = torch.ones(1, 1, 1, dtype=query.dtype, device=query.device)
    if made.weight != 1:
        weight = row_weights(made.weight, (batch, heads, n_queries, key.shape[2]), tensors, query.device)
        own[LOG_WEIGHT], sign = weight.abs().log(), weight.sign().to(query.dtype)
    value = torch.zeros(batch, heads, n_queries, WIDTH, dtype=query.dtype, device=query.device)
    value[..., 0] = sign
    repeated = key.repeat_interleave(heads // key.shape[1], dim=1)
    given = {name: operand.transpose(*made.turned[name]) if name in made.turned else operand for name, operand in tensors.items()} | own
    out, total = output_like(repeated, value)
    operands = [given[name] for name in made.attend.tensors()]
    launch_attention(made.attend.to_json(), (repeated, query, value), operands, out, total)
    return total.exp() * out[..., 0].float()


def row_weights(
    weight: sympy.Expr, sizes: tuple[int, int, int, int], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """[B or 1, H or 1, Nq or 1] float32: an expression in b, h, i and tensors read there. sizes: B, H, Nq, Nk."""
    values = all_positions(sizes, device)
    values |= {name: read_at(tensors[name].float(), indices, values) for name, indices in tensors_in(weight).items()}
    found = torch.as_tensor(evaluate_expression(weight, values), dtype=torch.float32, device=device)
    return found.view((1,) * (4 - found.dim()) + found.shape)[..., 0]
