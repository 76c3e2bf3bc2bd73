"""Every attention of a graph: from each normaliser outward to a region, or a near miss with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rewrite.recognise.fused import fused_attention
from rewrite.recognise.index_algebra import (
    MismatchError,
)
from rewrite.recognise.operators import canonical, module_path, spelled, value_of
from rewrite.recognise.region import NearMissError, Region
from rewrite.recognise.softmax import contraction_after, written_out_attention


@dataclass(frozen=True)
class NearMiss:
    """A softmax that feeds a contraction, or a call named attention, that was not recognised: where, and what did not fit first."""

    node: str
    module: str
    reason: str


def find_regions(graph: fx.Graph) -> tuple[list[Region], list[NearMiss]]:
    """Every attention of a graph in program order, and what looked like one."""
    regions: list[Region] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        name = canonical(node)
        try:
            if name == "attention":
                regions.append(fused_attention(node))
            elif name == "softmax" and isinstance(value_of(node), torch.Tensor):
                product = contraction_after(node)
                if product is not None:
                    regions.append(written_out_attention(node, *product))
            elif not name and node.op.startswith("call") and "attention" in spelled(node).lower():
                raise NearMissError(f"{spelled(node)} is an attention call this does not read")
        except (NearMissError, MismatchError) as error:
            misses.append(NearMiss(node.name, module_path(node), str(error)))
    return regions, misses


def interior(region: Region) -> Iterator[fx.Node]:
    """The nodes from the operands (exclusive) to the output (inclusive), in reverse order of need."""
    stop = {operand.node for operand in region.operands().values()}
    stack, seen = [region.output], {region.output}
    while stack:
        node = stack.pop()
        yield node
        for source in node.all_input_nodes:
            if source not in stop and source not in seen:
                seen.add(source)
                stack.append(source)
