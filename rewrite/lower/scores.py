"""What a choice of tokens reads: attention that is received in their stack, or in the vision tower whose patches they were."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.operations import Statistic
from rewrite.ir.program import Program
from rewrite.ir.selection import PRESENT, Drawn, Exit, Handed, Irrelevant, Pooled, Received, Select, Spread, TokenOperation
from rewrite.lower.cursor import Cursor, Number, behind_inputs
from rewrite.lower.lowering import lower_operand, lower_statistic, traced
from rewrite.lower.present import PresentKeys
from rewrite.recognise.sites import Found, Recognition
from rewrite.tokens import choose, rules


class Scores:
    """The scores of one program's choices, put into one graph.

    told: by stack, which of the tokens that are left now are no padding, bool [B, K]; none where no token left, or rows keep as many.
    """

    def __init__(self, graph: fx.Graph, recognition: Recognition, program: Program, present: PresentKeys) -> None:
        self.graph, self.recognition, self.program, self.present = graph, recognition, program, present
        self.told: dict[int, fx.Node] = {}

    def tower(self, one: Exit | Select) -> Found | None:
        """The site of a vision tower that scores visual tokens as the patches they were; None where the language model's own do."""
        rule = rule_of(one)
        if isinstance(rule, Pooled):
            return self.recognition.by_name(rule.site)
        read = self.recognition.by_name(rule.sites[-1]) if isinstance(rule, Received) else None
        return read if read is not None and read.site.stack != one.stack else None

    def of(self, one: Exit | Select, rule: Received, current: fx.Node, stream: fx.Node, tokens: Number) -> fx.Node:
        """[B, tokens of `current`], as many as `tokens` says, or [pictures, tokens of a vision tower] where that scores."""
        pictures = self.tower(one)
        if pictures is not None:
            return self.by_patches(one, rule, pictures)
        received = [self._received(one, name, rule, current, stream) for name in rule.sites]
        after = [*received, *([tokens] if isinstance(tokens, fx.Node) else [])]
        with self.graph.inserting_after(behind_inputs(self.graph, max(after))):
            return self.graph.call_function(choose.attention_received, (received, tokens))

    def by_patches(self, one: Exit | Select, rule: Received, tower: Found) -> fx.Node:
        """[pictures, tokens of the tower]."""
        received = [self._received(one, name, rule) for name in rule.sites]
        with self.graph.inserting_after(max(received)):
            return self.graph.call_function(choose.attention_received, (received, tower.site.dims["Nk"]))

    def _received(
        self, one: Exit | Select, name: str, rule: Received, current: fx.Node | None = None, stream: fx.Node | None = None
    ) -> fx.Node:
        """[B, H, Nk]: what the keys of one site receive from the queries that the rule reads."""
        entry = self.recognition.by_name(name)
        site = next(site for site in self.program.sites if site.name == name)
        attends = site.body.attends()
        foreign = {*(attends[0].tensors() if attends else ())} - entry.region.operands().keys() - {PRESENT}
        if len(site.body.operations) != 1 or not attends or foreign:
            by = ", ".join(by for by in self.program.passes_of(site) if by != one.by)
            raise NotApplicableError(f"{one.by} reads the attention of {name}, which {by or 'its model'} makes more than one attention of")
        if rule.joined:
            operands = [operand.node for name, operand in entry.region.operands().items() if name in ("query", "key")]
            at = Cursor(self.graph, behind_inputs(self.graph, max(operands)))
            query, key = (lower_operand(at, entry.region, name) for name in ("query", "key"))
            return at.call(choose.received_as_one_head, (query, key, *rule.rows))
        statistic = Statistic("received", attends[0], "queries", rows=rule.rows)
        ahead = isinstance(one, Select) and one.place == "before" and site.stack == one.stack and site.layer == one.layer
        copied: dict[fx.Node, fx.Node] = {}
        given = {PRESENT: self.present.operands[name]} if PRESENT in statistic.tensors() else {}
        if ahead and stream is not None and current is not None:
            copied = self._ahead(entry, stream, current, one)
            given = {PRESENT: self._there(entry, stream)} if given else {}
        return lower_statistic(self.graph, statistic, entry.region, copied, given)

    def _there(self, entry: Found, stream: fx.Node) -> fx.Node:
        """bool [B, Nk]: which keys of a layer are no padding before tokens leave in front of it."""
        now = self.told.get(entry.site.stack)
        if now is None:
            with self.graph.inserting_after(behind_inputs(self.graph, stream)):
                now = traced(self.graph.call_function(choose.every_token_present, (stream,)))
        return self.present.joined(entry, now)

    def _ahead(self, entry: Found, stream: fx.Node, current: fx.Node, one: Exit | Select) -> dict[fx.Node, fx.Node]:
        """Copies, right behind the stream, of what makes a layer's queries and keys: they see the tokens that leave in front of it."""
        operands = [operand.node for name, operand in entry.region.operands().items() if name != "value"]
        return self.copied(operands, entry, stream, current, one)

    def copied(
        self, wanted: Sequence[fx.Node], entry: Found, stream: fx.Node, current: fx.Node, one: TokenOperation
    ) -> dict[fx.Node, fx.Node]:
        """Copies of what makes the `wanted` nodes of the stream, right behind `current`, which they read in its place."""
        needed, stack = set(wanted), list(wanted)
        while stack:
            for previous in stack.pop().all_input_nodes:
                if previous not in needed and previous > stream:
                    needed.add(previous)
                    stack.append(previous)
        copies = {stream: current}
        at = Cursor(self.graph, behind_inputs(self.graph, current))
        for node in sorted(node for node in needed if node > stream):
            if rules.in_place(node) or rules.name_of(node) == "setitem":
                raise NotApplicableError(f"{one.by} reads the attention of {entry.site.name} ahead of it, and {node.name} writes there")
            copies[node] = at.copy(node, copies)
        return copies


def rule_of(one: Exit | Select) -> Received | Spread | Drawn | Handed | Pooled | None:
    """What decides which tokens leave; None where nothing does."""
    if isinstance(one, Select):
        return one.rule
    return one.when.rule if isinstance(one.when, Irrelevant) else None
