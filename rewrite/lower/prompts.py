"""A prompt that goes into empty caches of fixed length: its attention reads the prompt's own keys in the place of the caches.

    cache.index_copy_(2, [0 .. N-1], new);  softmax(q cache^T + mask) cache  ->  softmax(q new^T + mask[..., :N]) new

The places behind the prompt hold nothing yet, and the mask hides them: that is checked when the graph runs. The graph is then that of a
cache that grows, with a write beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from rewrite.ir.errors import ModelCallError
from rewrite.lower.lowering import traced
from rewrite.recognise.fixed_caches import CacheWrite
from rewrite.recognise.operators import value_of
from rewrite.tokens import rules
from rewrite.tokens.edits import insert_call, set_argument
from rewrite.tokens.flow import Flow, Label, Operand, Path, axis_flow
from rewrite.tokens.placement import expression, shape_of

# An additive mask hides a key where it adds this or less.
_HIDDEN = -1e4


@dataclass
class _Shortened:
    """What becomes of a graph.

    cut: nodes of which an axis has the prompt's tokens and not the caches' places. masked: scores in which the others are hidden.
    weights: the softmax of such. parts: what takes the prompt's places out of a cache itself. masks, sizes: operands that have all
    places, and lengths that are written out, with the write that tells how many there are.
    """

    cut: dict[fx.Node, tuple[int, CacheWrite]] = field(default_factory=dict)
    masked: set[fx.Node] = field(default_factory=set)
    weights: set[fx.Node] = field(default_factory=set)
    parts: dict[fx.Node, CacheWrite] = field(default_factory=dict)
    masks: list[tuple[fx.Node, Path, fx.Node, CacheWrite]] = field(default_factory=list)
    sizes: list[tuple[fx.Node, Path, CacheWrite]] = field(default_factory=list)


def read_new_keys(graph: fx.Graph, writes: Sequence[CacheWrite]) -> bool:
    """Make the attention of a prompt read its own keys and values; False, and nothing changed, where something else reads the caches."""
    shortened = _analysed(graph, writes)
    if shortened is None:
        return False
    for part, write in shortened.parts.items():
        part.replace_all_uses_with(write.new)
    for write in writes:
        for user in _readers(write):
            user.replace_input_with(write.cache, write.new)
            user.replace_input_with(write.node, write.new)
    lengths: dict[fx.Node, int | fx.Node] = {}
    for reader, path, write in shortened.sizes:
        set_argument(reader, path, _length(write, lengths))
    masks: dict[fx.Node, fx.Node] = {}
    for reader, path, mask, write in sorted(shortened.masks, key=lambda one: one[0]):
        if mask not in masks:
            length = _length(write, lengths)
            with graph.inserting_before(reader):
                masks[mask] = traced(insert_call(reader, torch.ops.rewrite.mask_of_prompt.default, (mask, length)))
        set_argument(reader, path, masks[mask])
    for node in shortened.cut:
        traced(node)
    return True


def _readers(write: CacheWrite) -> list[fx.Node]:
    """What reads a cache behind its write; the graph's outputs, and writes, go on as they are."""
    users = dict.fromkeys([*write.cache.users, *write.node.users])
    return [user for user in users if write.node < user and user.op != "output"]


def _analysed(graph: fx.Graph, writes: Sequence[CacheWrite]) -> _Shortened | None:
    """What changes where caches are read at the prompt's places alone; None where that cannot be followed."""
    found = _Shortened()
    reads = {user: write for write in writes for user in _readers(write)}
    caches = {node: write for write in writes for node in (write.cache, write.node)}
    for node in graph.nodes:
        if node not in reads and not any(source in found.cut for source in node.all_input_nodes):
            continue
        if node in reads and _takes_prompt(node, reads[node]):
            found.parts[node] = reads[node]
            continue
        flow = axis_flow(node) if node.op != "output" else None
        if flow is None or not _follow(node, flow, caches if node in reads else {}, found):
            return None
    return found


def _takes_prompt(node: fx.Node, write: CacheWrite) -> bool:
    """Whether a node is cache[:, :, :N] with the prompt's N."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 3 or not all(isinstance(entry, slice) for entry in index):
        return False
    others = all(entry == slice(None) for axis, entry in enumerate(index) if axis != 2)
    return others and index[2].start in (None, 0) and index[2].step in (None, 1) and expression(index[2].stop) == shape_of(write.new)[2]


def _follow(node: fx.Node, flow: Flow, caches: dict[fx.Node, CacheWrite], found: _Shortened) -> bool:
    """Note what becomes of one operator; False where it would compute something else."""
    labels: dict[Label, CacheWrite] = {}
    for operand in flow.operands:
        axis, write = (2, caches[operand.node]) if operand.node in caches else found.cut.get(operand.node, (None, None))
        if axis is not None and write is not None:
            labels[_label(operand, axis)] = write
    if len(labels) != 1:
        return False
    ((label, write),) = labels.items()
    if label in flow.reduced or flow.joined is not None or any(label in group.ins for group in flow.groups):
        return False
    hides = any(operand.node in found.masked for operand in flow.operands)
    weighs = any(operand.node in found.weights for operand in flow.operands)
    for operand in flow.operands:
        axes = [axis for axis, size in enumerate(shape_of(operand.node)) if size != 1 and _label(operand, axis) == label]
        if operand.node in caches or operand.node in found.cut or not axes:
            continue
        if not _is_mask(node, operand) or axes != [len(shape_of(operand.node)) - 1]:
            return False
        found.masks.append((node, operand.path, operand.node, write))
        hides = True
    if label in flow.normalised and not hides:
        return False
    if label in flow.contracted and not weighs and label not in flow.normalised:
        return False
    found.sizes += [(node, path, write) for path, of in flow.sizes.items() if of == label]
    if label in flow.output:
        found.cut[node] = flow.output.index(label), write
        if weighs or label in flow.normalised:
            found.weights.add(node)
        elif hides:
            found.masked.add(node)
    return label in flow.output or label in flow.contracted


def _is_mask(node: fx.Node, operand: Operand) -> bool:
    """Whether an operand hides keys from an attention, by itself or added to the scores."""
    fused = rules.name_of(node) == "scaled_dot_product_attention"
    return fused or (rules.name_of(node) == "add" and value_of(operand.node).is_floating_point())


def _label(operand: Operand, axis: int) -> Label:
    return operand.labels[len(operand.labels) - len(shape_of(operand.node)) + axis]


def _length(write: CacheWrite, lengths: dict[fx.Node, int | fx.Node]) -> int | fx.Node:
    """How many tokens the prompt has: a number, or a node right behind the new keys."""
    if write.new not in lengths:
        size = value_of(write.new).shape[2]
        if not isinstance(size, int):
            with write.new.graph.inserting_after(write.new):
                size = insert_call(write.new, "size", (write.new, 2), traced=size)
        lengths[write.new] = size
    return lengths[write.new]


@torch.library.custom_op("rewrite::mask_of_prompt", mutates_args=())
def _mask_of_prompt(mask: Tensor, length: int) -> Tensor:
    """mask[..., :length] of an attention mask whose other keys are all hidden.

    Raises `ModelCallError` where it shows one of these.
    """
    behind = mask[..., length:]
    seen = behind if mask.dtype == torch.bool else behind > _HIDDEN
    if bool(seen.any()):
        raise ModelCallError(
            f"the attention mask of a prompt of {length} tokens shows places behind it in a KV cache of fixed length, which hold nothing "
            "yet: give a mask that hides them, or use a cache that grows with the tokens"
        )
    return mask[..., :length].contiguous()


@_mask_of_prompt.register_fake
def _(mask: Tensor, length: int) -> Tensor:
    return mask.new_empty((*mask.shape[:-1], length))
