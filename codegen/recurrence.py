"""Linear attention by recurrence: the state of the keys so far in the place of the keys.

Where what is read of a key and of a query does not change as the sequence grows, and a query sees every key up to its own, a call needs of
all earlier keys nothing but their state (`codegen.torch_state`): with n new tokens it is a causal linear attention over these n with a
state in front of them. For one token that is S' = exp(-r) S + f(k) u(v)^T and f(q) S' (Katharopoulos et al. 2020; Sun et al. 2023).

Padding that hides keys is allowed: hidden keys are zeros in the state, and which they were is remembered, so that a later mask that says
otherwise of them is an error and not another result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch

from codegen.contraction_order import Sizes, best_chunk_of, chunked, state_plan
from codegen.score_block import ScoreBlock
from codegen.state_call import mask_readings
from codegen.state_form import StateForm, state_form
from codegen.tensor_reads import accumulation_dtype
from codegen.torch_state import StateReads, state_forward
from codegen.torch_streaming import attend_forward, output_like
from codegen.visits import Visit
from rewrite.ir.errors import ModelCallError
from rewrite.ir.expression import NK, NQ, I, J, letters, tensor
from rewrite.ir.operations import Attend

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors = Mapping[str, torch.Tensor]

_CAUSAL = J <= I + (NK - NQ)
_SEEN = "seen_keys"
_POSITIONS = {I, J, NQ, NK}


class Continued(NamedTuple):
    """What a call gives.

    out [B, H, n, Dv]. state [B, Hs, F, V] of all keys so far. seen [B, N] bool: which of these the state holds. held: a bool on the CPU,
    False where the mask is none that a state can follow; the state is then of no use (NaN).
    """

    out: torch.Tensor
    state: torch.Tensor
    seen: torch.Tensor
    held: torch.Tensor


@lru_cache(maxsize=1024)
def recurrent(attend: Attend) -> Attend | str:
    """The operation over new tokens alone, its mask being order and the tensor "seen_keys" [B, Nk]; or why there is none, in words."""
    local = replace(attend, mask=sympy.And(sympy.Ne(tensor(_SEEN, "bj"), 0), _CAUSAL))
    form = state_form(local)
    if isinstance(form, str):
        return form
    of_keys = (form.value, form.rate, *(feature.key for feature in form.features))
    of_queries = (form.result, attend.denominator, *(feature.query for feature in form.features))
    for part, allowed in (*((part, "bh") for part in of_keys), *((part, "bhi") for part in of_queries)):
        reads = [letters(read.indices) for read in part.atoms(sympy.Indexed)]
        if any(axes is None or not set(axes) <= set(allowed) for axes in reads):
            return "what is read of a key depends on a tensor by key"
        if _POSITIONS & part.xreplace({read: sympy.Integer(1) for read in part.atoms(sympy.Indexed)}).free_symbols:
            return "what is read of a key or query depends on its place in the sequence or on the sequence's length"
    if sympy.expand(form.shift - (NK - NQ)).free_symbols and form.rate != 0:
        return "the decay depends on more than the distance of query and key"
    return local


@lru_cache(maxsize=1024)
def without_recurrence(attend: Attend, one_query: bool, first: bool, device: str) -> str | None:
    """None where a call may keep a state for keys, as far as sizes and data do not decide; else why not, in words.

    one_query: whether the call has one query; first: whether there are no earlier keys. On the CPU mask tensors are looked at when the call
    runs. Another device would have to be waited for, which is done where there is a state to go on from and not to begin one.
    """
    local = recurrent(attend)
    if isinstance(local, str):
        return local
    attends = _readable(attend, one_query, first)
    if not attends:
        return "its mask is not the order of the tokens and padding"
    if first and device != "cpu" and attends[0] != _ordered(attend, one_query):
        return f"its mask is a tensor of all pairs, which a call on {device} does not wait for to look at"
    return None


@lru_cache(maxsize=1024)
def _ordered(attend: Attend, one_query: bool) -> Attend:
    """The operation with the order of tokens in its mask where that changes nothing."""
    return replace(attend, mask=sympy.And(attend.mask, _CAUSAL)) if one_query else attend


@lru_cache(maxsize=1024)
def _readable(attend: Attend, one_query: bool, first: bool) -> tuple[Attend, ...]:
    """The forms, as the mask tensors are read, in which a query sees every key up to its own that the mask does not hide from all."""
    ordered = _ordered(attend, one_query)
    return tuple(each for each in (ordered, *(reading.attend for reading in mask_readings(ordered))) if _follows_order(each, first))


def _follows_order(attend: Attend, first: bool) -> bool:
    """Whether a query sees every key up to its own; in a `first` call that is every one up to its place among the queries."""
    form = state_form(attend)
    if isinstance(form, str) or form.limit is None or form.sorts_keys or form.seen_queries != sympy.true:
        return False
    terms = form.limit.args if isinstance(form.limit, sympy.Min) else (form.limit,)
    past = NK - NQ
    return all(term == NK or sympy.expand((term - (I + 1 + past)).xreplace({NK: NQ} if first else {})) == 0 for term in terms)


def _forms(attend: Attend, query: torch.Tensor, n_keys: int, tensors: Tensors) -> Iterator[tuple[Attend, Tensors]]:
    """The readings of the mask that hold in this call, with the tensors that they read."""
    n_queries, first = query.shape[2], query.shape[2] == n_keys
    ordered = _ordered(attend, n_queries == 1)
    if _follows_order(ordered, first):
        yield ordered, tensors
    for reading in mask_readings(ordered) if query.device.type == "cpu" or not first else ():
        if _follows_order(reading.attend, first) and reading.holds(tensors[reading.name], n_queries, n_keys):
            yield reading.attend, reading.tensors(tensors)


def _seen_keys(attend: Attend, operands: Operands, tensors: Tensors, n_keys: int) -> torch.Tensor | None:
    """[B, n_keys] bool: the keys that the mask hides from no query but by their order; None where it hides others."""
    query, key, _ = operands
    for each, known in _forms(attend, query, n_keys, tensors):
        form = state_form(each)
        assert isinstance(form, StateForm)
        if form.seen_keys == sympy.true:
            return torch.ones(query.shape[0], n_keys, dtype=torch.bool, device=query.device)
        block = ScoreBlock(each, query, whole(key, n_keys), known, Visit(slice(0, 0), slice(0, n_keys), None))
        seen = torch.as_tensor(block.evaluate(form.seen_keys), device=query.device)
        seen = seen.reshape((1,) * (4 - seen.dim()) + seen.shape)
        if seen.shape[1] == 1:
            return seen[:, 0, 0].expand(query.shape[0], n_keys)
    return None


def whole(key: torch.Tensor, n_keys: int) -> torch.Tensor:
    """A tensor with the sizes of all keys that takes no memory."""
    return key.new_empty(1, 1, 1, 1).expand(key.shape[0], key.shape[1], n_keys, key.shape[3])


def state_shape(attend: Attend, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[int, int, int, int]:
    """[B, Hs, F, V] of the state that a call keeps, from the shapes of its operands."""
    local = recurrent(attend)
    form = local if isinstance(local, str) else state_form(local)
    assert isinstance(form, StateForm), form
    return query[0], key[1] if form.shares_keys else query[1], form.width(key[3]), value[3] + int(form.totals)


def attend_recurrently(
    attend: Attend,
    operands: Operands,
    tensors: Tensors,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    forward: Callable[..., torch.Tensor] | None = None,
) -> Continued:
    """The operation for new tokens. operands: query, key and value of these; tensors: as for all keys. before: state and seen, if any.

    Without a state in front the output is that of `attend_forward`, in the same order of computing. forward: what computes it there
    instead, given query, key and value.

    Raises `ModelCallError` where there is a state and the mask is none that it can follow.
    """
    query, key, value = operands
    local, n_new, held = recurrent(attend), key.shape[2], torch.ones((), dtype=torch.bool)
    assert isinstance(local, Attend), local
    past = 0 if before is None else before[1].shape[1]
    seen = _seen_keys(attend, operands, tensors, past + n_new)
    shape = state_shape(attend, query.shape, key.shape, value.shape)
    if before is not None:
        _require_same(before, shape, seen)
    if seen is None:
        out = attend_forward(attend, query, key, value, tensors)[0]
        state = out.new_full(shape, torch.nan, dtype=accumulation_dtype(query.dtype))
        return Continued(out, state, torch.zeros(query.shape[0], n_new, dtype=torch.bool, device=query.device), ~held)
    known = {name: tensors[name] for name in local.tensors() if name != _SEEN} | {_SEEN: seen[:, past:]}
    reads, sizes, form = StateReads(local, operands, known), Sizes.of(*operands), state_form(local)
    assert isinstance(form, StateForm)
    plan = state_plan(local, sizes) if before is None else chunked(form, sizes, best_chunk_of(form, sizes))
    if plan is None or (before is None and forward is not None):
        out = attend_forward(attend, query, key, value, tensors)[0] if forward is None else forward(query, key, value)
        return Continued(out, reads.next_state(reads.new_state(), 0, n_new), seen.clone(), held)
    out, lse = output_like(query, value)
    state, of = state_forward(reads, plan, (out, lse), None if before is None else before[0])
    return Continued(out, reads.next_state(state, of, n_new), seen.clone(), held)


def _require_same(before: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...], seen: torch.Tensor | None) -> None:
    state, earlier = before
    what = None
    if tuple(state.shape) != shape:
        what = f"the call needs a state {list(shape)}, and the cache holds one {list(state.shape)}"
    elif seen is None:
        what = "the mask of the call is more than the order of the tokens and padding"
    elif not torch.equal(seen[:, : earlier.shape[1]], earlier):
        what = "the mask of the call hides other tokens of the cache than were hidden when they were read"
    if what is not None:
        raise ModelCallError(f"{what}; the keys are not kept where a state stands for them: call with use_cache=False, or from the prompt")
