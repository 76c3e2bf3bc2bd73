"""Statistics by emitted kernels: over queries what each key receives, over keys what each query gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from codegen.given_kernel import given, reason_against_sums, row_sums, softmax_of
from codegen.received_kernel import reason_against_exchange, received
from rewrite.ir.statistic import Statistic


def has_triton_statistic(statistic: Statistic) -> str | None:
    """None where a kernel of an attention computes the statistic, else why not, in words: torch operators do, on every device."""
    return reason_against_sums(statistic) if statistic.over == "keys" else reason_against_exchange(statistic)


def statistic_by_kernel(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor], lse: torch.Tensor | None
) -> torch.Tensor:
    """The result of a statistic that `has_triton_statistic`, float32; lse [B, H, Nq]: the attention's own, if at hand."""
    if statistic.over == "keys":
        return given(statistic, query, key, tensors, lse)
    return received(statistic, query, key, tensors, row_sums(softmax_of(statistic), query, key, tensors) if lse is None else lse)
