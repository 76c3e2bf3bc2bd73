"""What fitting brings down: the distance of a rewritten site from the original's, and of the model's output from the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from rewrite.beside import SiteFunctions
from rewrite.ir.errors import FittingError
from rewrite.ir.expression import TOTAL, W
from rewrite.ir.operations import Attend
from rewrite.ir.passes import AttentionInputs, Pass
from rewrite.ir.semantics import attention_weights


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the mean square of what is wanted, in float32 at least: 1 for zeros, whatever the scale."""
    kind = torch.promote_types(wanted.dtype, torch.float32)
    actual, wanted = actual.to(kind), wanted.to(kind)
    return (actual - wanted).square().mean() / wanted.square().mean().clamp_min(torch.finfo(kind).tiny)


def cross_entropy(actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the Kullback-Leibler divergence of maps [B, H, Nq, Nk] whose rows sum to one."""
    tiny = torch.finfo(actual.dtype).tiny
    logs = actual.clamp_min(tiny).log() - wanted.clamp_min(tiny).log()
    return -(wanted * logs).sum(-1).mean()


def site_loss(functions: SiteFunctions, values: Mapping[fx.Node, Any]) -> torch.Tensor:
    """The distance of a site from the original's on the original's operands, as each pass that has parameters there compares it, summed."""
    owners = tuple(dict.fromkeys(functions.owners.values()))
    terms = [map_loss(owner, functions, values) for owner in owners if owner.fitting.compares == "map"]
    if any(owner.fitting.compares == "output" for owner in owners):
        terms.append(relative_error(functions.body(values), functions.output(values)))
    return torch.stack(terms).sum()


def map_loss(owner: Pass, functions: SiteFunctions, values: Mapping[fx.Node, Any]) -> torch.Tensor:
    """The distance of the map that a pass's parameters make from the original's, in float32 at least."""
    operands = {name: _at_least_float32(tensor) for name, tensor in functions.operands(values).items()}
    given = {name: values[node] for name, node in functions.given.items()}
    attend = functions.site.attend
    with torch.autocast(operands["query"].device.type, enabled=False):
        query, key, value = (operands[name] for name in ("query", "key", "value"))
        shared = query.shape[1] // key.shape[1]
        actual = owner.attention_map(
            AttentionInputs(
                query,
                key.repeat_interleave(shared, dim=1),
                value.repeat_interleave(shared, dim=1),
                _logits(attend, operands),
                functions.site,
                given.get("hidden"),
                given.get("visual"),
                {name: _at_least_float32(given[name]) for name, by in functions.owners.items() if by == owner},
            )
        )
        wanted = attention_weights(attend, operands)
        return (cross_entropy if owner.fitting.map_loss == "cross_entropy" else relative_error)(actual, wanted)


def _logits(attend: Attend, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, Nq, Nk]: the scores, -inf where they are masked."""
    scores = replace(
        attend, normaliser="none", denominator=TOTAL, sink=None, weight=W, renormalised=False, weight_mix=None, groups=None, choice=None
    )
    seen = replace(scores, score=sympy.Integer(1), score_mix=None)
    return attention_weights(scores, operands).masked_fill(attention_weights(seen, operands) == 0, -torch.inf)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def output_loss(actual: Any, wanted: Any) -> torch.Tensor:
    """The distance of a model's output from the original's.

    An output that holds `logits` [..., classes]: the Kullback-Leibler divergence of their softmax, mean over all other axes. Any other: the
    relative error of its floating-point tensors, mean over them. Raises `FittingError` where the outputs are of other shapes.
    """
    logits = [_logits_of(output) for output in (actual, wanted)]
    if logits[0] is not None and logits[1] is not None:
        _require_alike(logits[0], logits[1])
        student, teacher = (_at_least_float32(each).log_softmax(-1).flatten(0, -2) for each in (logits[0], logits[1]))
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    tensors = [
        [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()] for output in (actual, wanted)
    ]
    if len(tensors[0]) != len(tensors[1]) or not tensors[0]:
        raise FittingError(
            f"the rewritten model's output holds {len(tensors[0])} floating-point tensors and the original's {len(tensors[1])}; give loss="
        )
    for pair in zip(*tensors, strict=True):
        _require_alike(*pair)
    return torch.stack([relative_error(*pair) for pair in zip(*tensors, strict=True)]).mean()


def _logits_of(output: Any) -> torch.Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, torch.Tensor) and found.ndim > 1 else None


def _require_alike(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    if actual.shape != wanted.shape:
        raise FittingError(f"the rewritten model gives {tuple(actual.shape)} where the original gives {tuple(wanted.shape)}; give loss=")
