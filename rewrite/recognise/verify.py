"""Proof of a region: its IR against the nodes it was read from, in float64, on random inputs of the traced shapes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from rewrite.ir.expression import NQ, B, I
from rewrite.ir.semantics import attention_weights
from rewrite.recognise.flex import described_functions, evaluate_flex, is_flex_attention
from rewrite.recognise.operators import argument, canonical, hint, hinted_shape, spelled, value_of
from rewrite.recognise.region import Region, viewed
from rewrite.recognise.regions import interior

# Scores of order one, and scores large enough for the softmax to be peaked.
_MILD, _PEAKED = 1.0, 4.0
# The normal distribution's quantile at 2/3.
_TWO_THIRDS = 0.43
# Beyond this many pairs of a query and a key one draw holds both in turn, row by row: each row of a batch is an input of its own.
_LARGE = 1 << 18
# Queries that are compared at least, first and last among them.
_LEAST_QUERIES = 128
# Random numbers are drawn once and repeated: drawing them would take longer than all else. A prime, so that no two rows are alike.
_PERIOD = 65537
# Rounding steps that may pile up per output element beyond the sum over keys: projections' length and the exponential.
_SLACK = 64.0


def structure(region: Region) -> str:
    """A text that two regions share if and only if verifying one verifies the other: operators, constants, shapes and the IR."""
    numbers: dict[fx.Node, int] = {operand.node: place for place, operand in enumerate(region.operands().values())}
    lines = [region.attend.to_json(), str(region.sizes), str(region.output_order), str(region.output_shape)]
    lines += [f"{name} {operand.layout} {_described(operand.node)}" for name, operand in region.operands().items()]

    def write(value: Any) -> str:
        return f"%{numbers.setdefault(value, len(numbers))}:{_described(value)}" if isinstance(value, fx.Node) else repr(value)

    for node in sorted(interior(region)):
        if is_flex_attention(node):
            lines.append(described_functions(node))
        lines.append(f"{spelled(node)} {[fx.map_arg(node.args, write)]} {fx.map_arg(dict(node.kwargs), write)}")
    return "\n".join(lines)


def _described(node: fx.Node) -> str:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return str(value)


def verify(region: Region) -> str | None:
    """None where IR and graph agree on every draw, else what was found, in words."""
    pairs = region.sizes["B"] * region.sizes["H"] * region.sizes["Nq"] * region.sizes["Nk"]
    draws: list[tuple[float, ...]] = [(_MILD, _PEAKED)] if pairs > _LARGE and region.sizes["B"] > 1 else [(_MILD,), (_PEAKED,)]
    for seed, spreads in enumerate(draws):
        generator = torch.Generator().manual_seed(seed)
        reason = _compare(region, {operand.node: _draw(operand.node, spreads, generator, region) for operand in region.operands().values()})
        if reason is not None:
            return reason
    return None


def _compare(region: Region, values: dict[fx.Node, torch.Tensor]) -> str | None:
    """None where IR and graph agree on these values of the operands."""
    actual = _run(region, values)
    sizes = [region.sizes[name] for name in ("B", "H", "Nq", "Dv")]
    permuted = torch.empty([sizes[axis] for axis in region.output_order], device="meta")
    shape = permuted.shape if region.output_shape is None else viewed(permuted, region.output_shape).shape
    if actual.shape != shape:
        return f"the graph gives {tuple(actual.shape)}, the IR {tuple(shape)}"
    actual = actual.reshape(permuted.shape).permute([region.output_order.index(axis) for axis in range(4)])
    operands = {name: operand.layout.apply(values[operand.node]) for name, operand in region.operands().items()}
    rows = _sampled(region)
    if rows is not None:
        operands, actual = _at_rows(region, operands, rows), actual[rows]
    queries = _sampled_queries(region)
    if queries is not None:
        operands, actual = {**operands, "query": operands["query"][:, :, queries]}, actual[:, :, queries]
    weights = attention_weights(region.attend, operands)
    expected = weights @ operands["value"].repeat_interleave(weights.shape[1] // operands["value"].shape[1], dim=1)
    # Every output is a weighted sum of values: the rounding of that sum and of scores up to `largest` is what may differ.
    largest = (operands["query"].norm(dim=-1).amax() * operands["key"].norm(dim=-1).amax()).item()
    total = weights.abs().sum(-1, keepdim=True)
    mass = max(1.0, total.max().item())
    budget = torch.finfo(torch.float64).eps * (_SLACK + region.sizes["Nk"] + largest) * mass * operands["value"].abs().max().item()
    # A query that sees no key is zeros in the IR; what the model makes of it (NaN, a mean, zeros) is not compared.
    compared = (total != 0).expand_as(expected)
    if not compared.any():
        return "its masks hide every key from every query"
    error = (actual - expected)[compared].abs().max().item()
    return None if error <= budget else f"the graph and the IR differ by {error:.3g}, where rounding allows {budget:.3g}"


def _sampled(region: Region) -> torch.Tensor | None:
    """Rows of the batch at which a large attention is evaluated from its IR; None for all.

    The rows are independent and all computed alike, from random numbers that differ: a misreading of any index shows in each of them.
    """
    batch = region.sizes["B"]
    fitting = max(2, _LARGE // (region.sizes["H"] * region.sizes["Nq"] * region.sizes["Nk"]))
    indices = [index for read in region.attend.tensors().values() for index in read]
    expressions = (*region.attend.expressions(), region.attend.mask)
    without_reads = [one.xreplace(dict.fromkeys(one.atoms(sympy.Indexed), sympy.S.Zero)) for one in expressions]
    by_row_alone = all(index == B or not index.has(B) for index in indices) and not any(one.has(B) for one in without_reads)
    return torch.linspace(0, batch - 1, fitting).long() if batch > fitting and by_row_alone else None


def _sampled_queries(region: Region) -> torch.Tensor | None:
    """Queries at which an attention with very many pairs is evaluated from its IR; None for all.

    Only where nothing depends on which query it is: all are then computed alike, from their own random numbers.
    """
    heads, n_queries, n_keys = (region.sizes[name] for name in ("H", "Nq", "Nk"))
    fitting = max(_LEAST_QUERIES, _LARGE // (heads * n_keys))
    indices = [index for read in region.attend.tensors().values() for index in read]
    placed = any({I, NQ} & part.free_symbols for part in (*region.attend.expressions(), region.attend.mask, *indices))
    return torch.linspace(0, n_queries - 1, fitting).long() if n_queries > fitting and not placed else None


def _at_rows(region: Region, operands: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    indices = region.attend.tensors()
    has_rows = {name for name, tensor in operands.items() if tensor.shape[:1] != (1,) and (name not in indices or indices[name][0] == B)}
    return {name: tensor[rows] if name in has_rows else tensor for name, tensor in operands.items()}


def _draw(node: fx.Node, spreads: tuple[float, ...], generator: torch.Generator, region: Region) -> torch.Tensor:
    """A random value for an operand: normal numbers, or a mask that is True for two thirds of the pairs.

    spreads: what scales the numbers, in turn along the first axis. Of every row a mask holds the first key apart from the last, so that
    whichever of True and False hides, some key is seen.
    """
    shape, dtype = hinted_shape(node), value_of(node).dtype
    if dtype == torch.bool:
        mask: torch.Tensor = _numbers(shape, generator) < _TWO_THIRDS
        if mask.ndim and mask.shape[-1] > 1:
            mask[..., 0], mask[..., -1] = True, False
        return mask
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    drawn = _numbers(shape, generator)
    # Products over the last axis are then of the order of the spread.
    factors = torch.tensor(spreads, dtype=torch.float64) / max((1, *shape[-1:])) ** 0.25
    drawn *= factors.repeat(shape[0])[: shape[0]].view(-1, *[1] * (len(shape) - 1)) if shape else factors[0]
    # A sum of weights that may cancel has no bound for what it divides; positive features are what such attention is made for.
    return drawn.abs() if region.attend.normaliser == "sum" or region.attend.renormalised else drawn


def _numbers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of a shape, from a place of the drawn ones on."""
    count, start = math.prod(shape), int(torch.randint(_PERIOD, (), generator=generator))
    pool = _pool()
    repeated = pool[start:] if count <= _PERIOD - start else torch.cat([pool[start:], pool.repeat(-(-count // _PERIOD))])
    return repeated[:count].reshape(shape).clone()


@lru_cache(maxsize=1)
def _pool() -> torch.Tensor:
    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _run(region: Region, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The region's own nodes on the given operands, in float64 wherever the graph says a floating type, dropout off."""
    done: dict[fx.Node, Any] = dict(values)

    def load(node: fx.Node) -> Any:
        if node not in done:
            done[node] = hint(value_of(node)) if isinstance(value_of(node), torch.SymInt | int) else _call(node)
        return done[node]

    def _call(node: fx.Node) -> Any:
        if is_flex_attention(node):
            return evaluate_flex(node, load)
        if canonical(node) == "baddbmm" and node.kwargs.get("beta", 1) == 0:
            # What would be added is not read, and may be anything: memory that was never written, a tensor that is no operand.
            return load(argument(node, "batch1")) @ load(argument(node, "batch2")) * node.kwargs.get("alpha", 1)
        arguments = fx.map_arg(node.args, load)
        keywords = fx.map_arg(dict(node.kwargs), load)
        arguments, keywords = _in_float64(arguments), {name: _in_float64(value) for name, value in keywords.items()}
        if canonical(node) == "dropout":
            return arguments[0]
        if canonical(node) == "attention":
            keywords["dropout_p"] = 0.0
            arguments = arguments[:4]
            keywords.setdefault("is_causal", node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
        if callable(node.target):
            return node.target(*arguments, **keywords)
        if node.target in ("float", "half", "bfloat16", "double"):
            return arguments[0].double()
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)

    result = load(region.output)
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{region.output.name} gives no tensor")
    return result


def _in_float64(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, tuple):
        return tuple(_in_float64(entry) for entry in value)
    if isinstance(value, list):
        return [_in_float64(entry) for entry in value]
    return value
