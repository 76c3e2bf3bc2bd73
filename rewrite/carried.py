"""What one graph of a call hands to the later ones about an activation: which positions are visual, which layers lie behind it.

A graph break ends what analysis sees. What it found in front of the break is noted on the tensor that leaves the graph, and read where the
same tensor enters a later graph of the same call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.program import Program
from rewrite.ir.selection import first_layer
from rewrite.lower.cursor import Cursor, behind_inputs
from rewrite.lower.interface import Extra, Produced
from rewrite.lower.relaid import elements_handed
from rewrite.recognise.operators import hinted_shape, value_of
from rewrite.recognise.pictured import given_pictures
from rewrite.recognise.sites import Found, Recognition
from rewrite.recognise.streams import ancestors, is_parameter, reaches, same_tokens
from rewrite.tokens import choose
from rewrite.tokens.chosen import GIVEN, LOST, Chosen, Given, Held, Lost
from rewrite.tokens.visual import CARRIED, VisualMerge, visual_mask_node, visual_merges


@dataclass(frozen=True)
class Carried:
    """Known of an activation [B, N, C].

    visual: bool [B, N], the visual positions, and features: the vision features at them, of all rows together; None where there are none.
    layers: names of the sites of its stack so far. left: the passes by which tokens left its stack so far. chosen: of the patches
    [pictures, P, C] or [P, C], or of what they were laid out to, which ones a pass keeps.
    """

    visual: torch.Tensor | None = None
    features: torch.Tensor | None = None
    layers: tuple[str, ...] = ()
    chosen: Chosen | None = None
    left: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What a graph is rewritten by."""
        one = self.chosen
        chosen = None if one is None else (one.choice, one.made is not None, one.relaid, one.lost)
        return (self.visual is not None, self.layers, self.left, chosen)


@dataclass(frozen=True)
class Leaving:
    """What to carry of one of a graph's outputs: the merge whose visual tokens are in it, and the layers behind it.

    stack, until: of this graph the stack, and the first layer that is not behind it; None where they are all of earlier graphs. left: see
    `Carried`, of earlier graphs.
    """

    output: int
    merge: VisualMerge | None
    layers: tuple[str, ...]
    stack: int | None
    until: int
    left: tuple[str, ...]


@dataclass
class Handover:
    """Carried facts by the tensor they are known of, for one call. Tensors are held, so that none takes another's place.

    Pictures may enter a text in another call than that of their tower, as in `generate()`, and so may an encoder's result a decoder: what
    was chosen of them, and by what tokens left, is noted on the tensor.
    """

    by_tensor: dict[int, tuple[torch.Tensor, int, Carried]] = field(default_factory=dict)

    def write(self, tensor: torch.Tensor, known: Carried) -> None:
        self.by_tensor[id(tensor)] = (tensor, _version(tensor), known)
        if known.chosen is not None or known.left:
            setattr(tensor, _ATTRIBUTE, (_version(tensor), Carried(chosen=known.chosen, left=known.left)))

    def read(self, tensor: torch.Tensor) -> Carried | None:
        """What is known of a tensor; None where that is nothing, or it was written into since."""
        _, version, known = self.by_tensor.get(id(tensor), (None, *getattr(tensor, _ATTRIBUTE, (0, None))))
        return known if version == _version(tensor) else None


_ATTRIBUTE = "rewrite_carried"


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def receive(graph: fx.Graph, placeholders: Sequence[fx.Node], carried: Mapping[int, Carried]) -> list[Extra]:
    """Give a graph the visual positions of its inputs as inputs of their own, so that recognition sees a merge there; and choices."""
    extras: list[Extra] = []
    last = placeholders[-1] if placeholders else None
    for index, known in carried.items():
        if known.chosen is not None and known.chosen.lost is not None:
            placeholders[index].meta[LOST] = Lost(known.chosen.choice, known.chosen.lost)
        elif known.chosen is not None and last is not None:
            nodes: dict[str, fx.Node] = {}
            for kind, value in (("stay", known.chosen.stay), ("made", known.chosen.made)):
                if value is not None:
                    with graph.inserting_after(last):
                        last = nodes[kind] = graph.placeholder(f"rewrite_{kind}_{index}")
                    last.meta["example_value"] = value
                    extras.append(Extra(kind, index=index))
            placeholders[index].meta[GIVEN] = Given(known.chosen.choice, nodes["stay"], nodes.get("made"), known.chosen.relaid)
        if known.visual is None or known.features is None or last is None:
            continue
        given = placeholders[index]
        with graph.inserting_after(last):
            mask = graph.placeholder(f"rewrite_visual_{index}")
        with graph.inserting_after(mask):
            last = features = graph.placeholder(f"rewrite_features_{index}")
        mask.meta["example_value"], features.meta["example_value"] = known.visual, known.features
        given.meta[CARRIED] = VisualMerge(given, mask, features, given, given)
        extras += [Extra("visual", index=index), Extra("features", index=index)]
    return extras


def hand_over(graph: fx.Graph, left: Sequence[Leaving]) -> list[Produced]:
    """Make a graph return the visual positions of its outputs beside them."""
    produced: list[Produced] = []
    output = next(node for node in graph.nodes if node.op == "output")
    by_merge: dict[fx.Node, tuple[VisualMerge, list[int]]] = {}
    for one in left:
        if one.merge is not None:
            by_merge.setdefault(one.merge.node, (one.merge, []))[1].append(one.output)
    for merge, outputs in by_merge.values():
        produced += [Produced("visual", tuple(outputs)), Produced("features", tuple(outputs))]
        output.args = ((*output.args[0], visual_mask_node(graph, merge), merge.source),)
    return produced


def hand_on(graph: fx.Graph, recognition: Recognition) -> tuple[list[Produced], dict[int, Held]]:
    """Make a graph that lays patches out anew, or puts pictures together, return which elements of its results are of tokens that stay.

    Gives what is returned beside the results, and of which result it says what.
    """
    produced: list[Produced] = []
    held: dict[int, Held] = {}
    output = next(node for node in graph.nodes if node.op == "output")
    for index, found in recognition.relaid:
        assert found.choice is not None
        if isinstance(found, Lost):
            held[index] = Held(found.choice, lost=found.reason)
            continue
        at = Cursor(graph, behind_inputs(graph, found.node))
        given = [node.meta[GIVEN] for node in given_pictures(found.node)]
        if given:
            beside = {"stay": at.call(choose.all_handed, ([one.stay for one in given],))}
            if all(one.made is not None for one in given):
                beside["made"] = at.call(choose.all_made, ([one.made for one in given],))
            output.args = ((*output.args[0], *beside.values()),)
            produced += [Produced(kind, (index,)) for kind in beside]
            held[index] = Held(found.choice)
            continue
        mask = elements_handed(found, at)
        output.args = ((*output.args[0], mask),)
        produced.append(Produced("stay", (index,)))
        held[index] = Held(found.choice, relaid=True)
    return produced, held


def continue_stacks(recognition: Recognition, carried: Mapping[fx.Node, Carried], depths: dict[str, int]) -> None:
    """Count the layers of stacks that began in an earlier graph on from there.

    depths: how many layers the stack of a site has in all, by name; learned where a stack goes on in a later graph.
    """
    stacks: dict[int, list[Found]] = {}
    for entry in recognition.found:
        stacks.setdefault(entry.site.stack, []).append(entry)
    for entries in stacks.values():
        known = _before(entries[0], carried)
        before = () if known is None else known.layers
        names = (*before, *(entry.site.name for entry in entries))
        if before:
            depths.update(dict.fromkeys(names, len(names)))
        for entry in entries:
            depth = max(depths.get(entry.site.name, 0), len(names))
            entry.site = replace(entry.site, layer=len(before) + entry.site.layer, depth=depth)


def _before(first: Found, carried: Mapping[fx.Node, Carried]) -> Carried | None:
    """What is known of the activation that enters a stack's first layer in this graph, where an earlier graph made it."""
    stream = first.stream
    source = None if stream is None else (stream if stream in carried else reaches(stream, set(carried)))
    # Features that are put into a text are none of its stream, however wide they are.
    if source is None or stream is None or not same_tokens(hinted_shape(source), hinted_shape(stream)):
        return None
    return carried[source]


def require_all_or_none(program: Program, recognition: Recognition, carried: Mapping[fx.Node, Carried]) -> None:
    """Refuse where tokens left a stack in an earlier graph and all of them enter its layers in this one.

    What left comes back at the end of a graph; a pass has to take it out again in the next one, as those do that need not ask which.
    """
    firsts: dict[int, Found] = {}
    for entry in recognition.found:
        firsts.setdefault(entry.site.stack, entry)
    for stack, entry in firsts.items():
        known = _before(entry, carried)
        leaving = {one.by for one in program.token_operations(stack) if first_layer(one) <= entry.site.layer}
        left = set() if known is None or not known.layers else set(known.left) - leaving
        if left:
            raise NotApplicableError(
                f"{entry.site.name}: by {', '.join(sorted(left))} some tokens leave in front of an earlier layer, and between these layers "
                "the model is cut into graphs, so that it would be given all of them again: let tokens leave behind the last such break "
                "(explain(model) names them), or by a pass for which all visual tokens leave"
            )


def require_hidden(recognition: Recognition, carried: Mapping[fx.Node, Carried]) -> None:
    """Refuse attention to what an earlier graph gave, and tokens left: they came back where that graph ended, and would be seen.

    Within a graph they stay hidden from it.
    """
    left = {node: known.left for node, known in carried.items() if known.left}
    for entry in recognition.found if left else ():
        source = None if entry.site.kind == "self" else min(ancestors([entry.region.key.node]) & left.keys(), default=None)
        if source is not None:
            raise NotApplicableError(
                f"{entry.site.name} attends to what another part of the model gave in a call or graph of its own; tokens left there by "
                f"{', '.join(sorted(set(left[source])))}, and here they would be seen again: call the whole model at once, or leave that "
                "pass out"
            )


def leaving(graph: fx.Graph, recognition: Recognition, carried: Mapping[fx.Node, Carried]) -> list[Leaving]:
    """What is known of the activations that leave a graph."""
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    merges = {merge.node: merge for merge in visual_merges(graph) if merge.source is not None}
    streams = {entry.stream: entry for entry in recognition.found if entry.stream is not None}
    known: list[Leaving] = []
    for index, result in enumerate(results if isinstance(results, tuple | list) else ()):
        if not is_activation(result) or value_of(result).ndim != 3:
            continue
        merge = merges.get(result) or merges.get(reaches(result, set(merges)) or result)
        last = result if result in streams else reaches(result, set(streams))
        stack, until = None if last is None else streams[last].site.stack, 0
        if last is not None:
            # Behind the stream in front of a layer lies that layer too, unless it is that stream itself.
            until = streams[last].site.layer + (0 if last is result else 1)
            own = tuple(e.site.name for e in recognition.found if e.site.stack == stack and e.site.layer < until)
            before = _before(streams[last], carried)
        else:
            own, before = (), carried.get(result if result in carried else reaches(result, set(carried)) or result)
        layers, left = (before.layers + own, before.left) if before is not None else (own, ())
        if merge is not None or layers:
            known.append(Leaving(index, merge, layers, stack, until, left))
    return known


def is_activation(node: Any) -> bool:
    """Whether a node is a tensor of floating point numbers that is no parameter."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not is_parameter(node)


def missing(entry: Found, behind: Mapping[fx.Node, str]) -> str:
    """What a site cannot know because a graph break lies in front of it, in words; empty where it misses nothing.

    behind: inputs that earlier graphs made and nothing is known of -> the break in between.
    """
    if entry.stream is not None:
        source = entry.stream if entry.stream in behind else reaches(entry.stream, set(behind))
        return "" if source is None else f"grid, visual positions and earlier layers are not known behind the break at {behind[source]}"
    cut = [behind[node] for operand in _operands(entry) for node in _unprojected(operand) if node in behind]
    return f"self or cross, layer and token layout are not known behind the break at {cut[0]}" if cut else ""


def _operands(entry: Found) -> Sequence[fx.Node]:
    return [operand.node for operand in (entry.region.query, entry.region.key)]


def _unprojected(node: fx.Node) -> list[fx.Node]:
    """The inputs of a graph that a node is computed from without a parameter on the way."""
    found, stack, seen = list[fx.Node](), [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            found.append(current)
        previous = [one for one in current.all_input_nodes if isinstance(value_of(one), torch.Tensor)]
        if any(is_parameter(one) for one in previous):
            continue
        fresh = [one for one in previous if one not in seen]
        seen.update(fresh)
        stack += fresh
    return found
