"""Launching the kernels of an attention with its tokens in the order that suits what it reads (`codegen.token_order`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from codegen.launching import capability
from codegen.tile_list import is_worth_a_list
from codegen.tiles import tile_for
from codegen.token_order import TokenOrder, token_order
from codegen.torch_streaming import output_like
from codegen.tuned_launch import Operands, Received, launch_attention, launch_backward
from rewrite.ir.operations import Attend


def order_of(attend_json: str, operands: Operands) -> TokenOrder | None:
    """The order in which the kernels are to be given the tokens of query, key and value; None for their own."""
    query, key, value = operands
    attend = Attend.from_json(attend_json)
    if attend.choice is None or not is_worth_a_list(operands):
        return None
    tile = tile_for(query.shape[3], value.shape[3], query.element_size(), capability(query.device), query.shape[2])
    return token_order(attend, query.shape[2], key.shape[2], tile, query.device)


def launch_attention_in_order(
    attend_json: str, operands: Operands, tensors: Sequence[torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """As `codegen.tuned_launch.launch_attention`."""
    order = order_of(attend_json, operands)
    if order is None:
        launch_attention(attend_json, operands, tensors, out, lse)
        return
    query, key, value = operands
    own = (order.of_queries(query), order.of_keys(key), order.of_keys(value))
    own_out, own_lse = output_like(own[0], own[2])
    launch_attention(order.attend.to_json(), own, order.tensors(tensors), own_out, own_lse)
    out.index_copy_(2, order.queries, own_out)
    lse.index_copy_(2, order.queries, own_lse)


def launch_backward_in_order(
    attend_json: str,
    operands: Operands,
    tensors: Sequence[torch.Tensor],
    received: Received,
    gradients: Operands,
    wanted: Sequence[int],
) -> list[torch.Tensor]:
    """As `codegen.tuned_launch.launch_backward`."""
    order = order_of(attend_json, operands)
    if order is None:
        return launch_backward(attend_json, operands, tensors, received, gradients, wanted)
    query, key, value = operands
    own = (order.of_queries(query), order.of_keys(key), order.of_keys(value))
    out, lse, d_out, d_lse = (order.of_queries(each) for each in received)
    d_own = (torch.empty_like(gradients[0]), torch.empty_like(gradients[1]), torch.empty_like(gradients[2]))
    found = launch_backward(order.attend.to_json(), own, order.tensors(tensors), (out, lse, d_out, d_lse), d_own, wanted)
    for gradient, made, positions in zip(gradients, d_own, (order.queries, order.keys, order.keys), strict=True):
        gradient.index_copy_(2, positions, made)
    return [order.restored(place, gradient) for place, gradient in zip(wanted, found, strict=True)]
