"""Every attention of a graph: from each normaliser outward to a region, or a near miss with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from rewrite.recognise.flex import flex_attention, is_flex_attention
from rewrite.recognise.fused import fused_attention
from rewrite.recognise.index_algebra import MismatchError
from rewrite.recognise.operators import canonical, module_path, spelled
from rewrite.recognise.region import NearMissError, Region
from rewrite.recognise.unnormalised import linear_attention, quadratic_attention
from rewrite.recognise.written_out import contraction_after, normalised_weights, written_out_attention

# What reading an operator raises whose arguments are not where they are looked for: a reason to leave it alone, not to fail.
_UNREAD = (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError)


@dataclass(frozen=True)
class NearMiss:
    """A softmax that feeds a contraction, or a call named attention, that was not recognised: where, and what did not fit first."""

    node: str
    module: str
    reason: str


def find_regions(graph: fx.Graph) -> tuple[list[Region], list[NearMiss]]:
    """Every attention of a graph in program order, and what looked like one."""
    regions: list[Region] = []
    misses: list[tuple[fx.Node, NearMiss]] = []
    for node in graph.nodes:
        product = node
        try:
            if canonical(node) == "attention":
                regions.append(fused_attention(node))
            elif is_flex_attention(node):
                regions.append(flex_attention(node))
            elif (weights := normalised_weights(node)) is not None:
                found = contraction_after(node)
                if found is not None:
                    product = found[0]
                    regions.append(written_out_attention(weights, *found))
            elif not canonical(node) and node.op.startswith("call") and "attention" in spelled(node).lower():
                raise NearMissError(f"{spelled(node)} is an attention call this does not read")
        except (NearMissError, MismatchError) as error:
            misses.append((product, NearMiss(node.name, module_path(node), str(error))))
        except _UNREAD as error:
            reason = f"an operator is called in a way that is not read ({type(error).__name__}: {error})"
            misses.append((product, NearMiss(node.name, module_path(node), reason)))
    taken = {node for region in regions for node in interior(region)}
    for node in graph.nodes:
        if node not in taken and (region := _unnormalised(node)) is not None:
            regions.append(region)
            taken |= set(interior(region))
    # A normaliser may also be a part of an attention that was found: positions that are mixed into its map, a feature map of its keys.
    left = [miss for product, miss in misses if product not in taken]
    return sorted(regions, key=lambda region: region.core), left


def _unnormalised(node: fx.Node) -> Region | None:
    """An attention without a softmax that ends at the node; two contractions in a row need not be one, and are no near miss."""
    try:
        return linear_attention(node) or quadratic_attention(node)
    except (NearMissError, MismatchError, *_UNREAD):
        return None


def interior(region: Region) -> Iterator[fx.Node]:
    """The nodes from the operands (exclusive) to the output (inclusive), in reverse order of need."""
    stop = {operand.node for operand in region.operands().values()}
    stack, seen = [region.output], {region.output}
    while stack:
        node = stack.pop()
        yield node
        # What else a FlexAttention call takes are its block lists, which are made of its mask function again.
        for source in () if is_flex_attention(node) else node.all_input_nodes:
            if source not in stop and source not in seen:
                seen.add(source)
                stack.append(source)
