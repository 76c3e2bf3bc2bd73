"""Sites of linear attention whose state takes the place of keys and values in the KV cache.

A prompt's graph returns each such site's state beside its outputs, a later graph takes it, and what it reads of keys and values is the new
tokens' (`codegen.recurrence`). Whether a site is one must come out the same for every graph: it is decided from its operation and from how
the entry lies in the graph. What depends on the values of a mask is decided when the call runs: it keeps the keys where they are needed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

import codegen
from rewrite.ir.errors import ModelCallError
from rewrite.ir.operations import Attend, PlainOperation
from rewrite.ir.site import Site
from rewrite.lower import functions
from rewrite.recognise.operators import argument, canonical, shape_of, value_of
from rewrite.recognise.sites import Found
from rewrite.recognise.writes import writes

if TYPE_CHECKING:
    from rewrite.lower.program import ProgramLowering


class StateCaches:
    """The sites of one graph that keep a state. kept: their names. declined: by name of another that has a state form, the reason."""

    def __init__(self, work: ProgramLowering) -> None:
        self.work, self.graph = work, work.graph
        self.kept: list[str] = []
        self.declined: dict[str, str] = {}

    def run(self, changed: list[tuple[Found, Site]]) -> None:
        """Replace the attention of every such site. Raises `ModelCallError` where a cache holds a state that the graph has no use for."""
        work = self.work
        found = [(entry, site, attend) for entry, site in changed if (attend := _recurrent_operation(site)) is not None]
        if work.program.token_operations() or any(note.positions is not None for note in work.notes.values()):
            self.declined = {site.name: "tokens leave in front of some layers" for _, site, _ in found}
            found = []
        if found:
            # What the regions needed is gone: what still reads keys is what will.
            self.graph.eliminate_dead_code(is_impure_node=writes)
        for entry, site, attend in found:
            reason = self._replace(entry, attend)
            if reason is None:
                self.kept.append(site.name)
            elif reason:
                self.declined[site.name] = reason
        self._require_taken()

    def _replace(self, entry: Found, attend: Attend) -> str | None:
        """None where the site now keeps a state; why not, in words; or "" where it begins no cache without gradients."""
        outputs = self._outputs(entry)
        state = self._state(entry)
        if state is None and (entry.cache or not all(outputs)):
            return ""
        dims = entry.site.dims
        if entry.site.kind != "self" or (state is None and dims["Nq"] != dims["Nk"]):
            return "its keys are not those of the call's own tokens"
        if not self.work.allowed.notes:
            return "torch.compile(backend='rewrite') has no place for it"
        key, value = entry.region.key.node, entry.region.value.node
        new = [_appended(node, self.work.placeholders if state is not None else None) for node in (key, value)]
        call = self._call(key, value, attend)
        if call is None or new[0] is None or new[1] is None:
            return "its keys and values are read elsewhere, or were not joined to those of the cache alone"
        own = value_of(new[0])
        one_query = type(own.shape[2]) is int and own.shape[2] == 1
        reason = codegen.without_recurrence(attend, one_query, state is None, own.device.type)
        if reason is not None:
            return reason
        if state is None and torch.is_grad_enabled():
            return ""  # a loss may reach the keys
        with self.graph.inserting_before(call):
            both = self.graph.call_function(torch.ops.rewrite.attend_state.default, (*call.args[:4], list(state or ()), call.args[4]))
            parts = [self.graph.call_function(operator.getitem, (both, place)) for place in range(4)]
        for user in list(call.users):
            assert user.args[1] == 0
            user.replace_all_uses_with(parts[0])
            self.graph.erase_node(user)
        self.graph.erase_node(call)
        if state is not None:
            for joined, part in ((key, new[0]), (value, new[1])):
                joined.replace_all_uses_with(part)
                self.graph.erase_node(joined)
        indices = tuple(index for each in outputs for index in each)
        if indices:
            self.work.returns({"state": parts[1], "seen": parts[2], "held": parts[3]}, indices)
        return None

    def _outputs(self, entry: Found) -> list[list[int]]:
        """Where the graph returns the keys, and the values."""
        results = list(self.work.output.args[0])
        return [
            [index for index, result in enumerate(results) if result is operand.node] for operand in (entry.region.key, entry.region.value)
        ]

    def _state(self, entry: Found) -> tuple[fx.Node, fx.Node] | None:
        """The state and what it holds, where the site's cache has one."""
        for cached in entry.cache:
            index = self.work.placeholders.index(cached)
            note = self.work.notes.get(index)
            if note is not None and note.state is not None:
                return self.work.taken("state", index), self.work.taken("seen", index)
        return None

    def _call(self, key: fx.Node, value: fx.Node, attend: Attend) -> fx.Node | None:
        """The attention that alone reads a site's keys and values, token by token."""
        found: set[fx.Node] = set()
        for node in (key, value):
            stack = [node]
            while stack:
                for user in stack.pop().users:
                    if user.target is torch.ops.rewrite.attend.default and user.args[4] == attend.to_json():
                        found.add(user)
                    elif user.target is functions.token_by_token or canonical(user) == "cast":
                        stack.append(user)
                    elif user.op != "output":
                        return None
        call = found.pop() if len(found) == 1 else None
        readers = [] if call is None else list(call.users)
        return call if all(user.target is operator.getitem and user.args[1] == 0 for user in readers) else None

    def _require_taken(self) -> None:
        for index, note in self.work.notes.items():
            reader = next(iter(self.work.placeholders[index].users), None) if note.state is not None else None
            if reader is not None:
                told = next(iter(self.declined.items()), ("", "its keys are read by something else"))
                raise ModelCallError(
                    f"{told[0] or reader.name}: the KV cache holds a state in the place of keys, which this call cannot go on from "
                    f"({told[1]}): start again from the prompt, or call the model with use_cache=False"
                )


def _recurrent_operation(site: Site) -> Attend | None:
    """The one attention of a site whose other operations work token by token, where it has a state that can be kept."""
    attends = [operation for operation in site.body.operations if isinstance(operation, Attend)]
    others = [operation for operation in site.body.operations if not isinstance(operation, Attend)]
    if len(attends) != 1 or not all(isinstance(each, PlainOperation) and each.token_by_token for each in others):
        return None
    return None if isinstance(codegen.recurrent(attends[0]), str) else attends[0]


def _appended(node: fx.Node, placeholders: list[fx.Node] | None) -> fx.Node | None:
    """What a cache's ``cat([past, new], -2)`` puts behind the past: a placeholder, or without `placeholders` an empty tensor."""
    parts: object = argument(node, "tensors", node.args[0] if node.args else ()) if canonical(node) == "cat" else ()
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(part, fx.Node) for part in parts):
        return None
    past, new = parts
    shape, axis = shape_of(node), argument(node, "dim", 0)
    if shape is None or len(shape) != 4 or axis not in (-2, 2):
        return None
    if placeholders is None:
        return new if 0 in (shape_of(past) or ()) else None
    return new if past in placeholders else None


def declined_words(declined: Mapping[str, str]) -> list[str]:
    """Notes for a report, of sites that keep keys where a state could stand for them."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in declined.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: the KV cache keeps keys and values, no state: {reason}" for reason, names in by_reason.items()]
