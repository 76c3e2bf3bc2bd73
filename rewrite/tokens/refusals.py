"""What cannot follow tokens that leave, as errors that name the place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.operations import Attend, Statistic
from rewrite.ir.selection import PRESENT
from rewrite.tokens import rules
from rewrite.tokens.flow import Flow, Label
from rewrite.tokens.placement import Selection, module_path


def refuse(node: fx.Node, reason: str, advice: str) -> NoReturn:
    """Raise the error that says why tokens cannot be dropped before `node`, and what to do."""
    where = f"node {node.name} ({rules.name_of(node) or node.op}) in {module_path(node)}"
    raise NotApplicableError(f"tokens cannot be dropped before {where}: {reason}; {advice}")


def refuse_other_results(
    node: fx.Node, flow: Flow, selected: Mapping[Label, Selection], restored: set[Label], batch: Label | None, live: bool
) -> None:
    """Refuse what would compute something else on fewer tokens, or on zeros; live: an output is made of it."""
    computed = flow.reduced | flow.normalised | flow.contracted
    if flow.reduced & selected.keys():
        refuse(node, "it computes over the tokens, of which some were dropped", "select after it, or in a model that does not pool")
    if computed & restored:
        refuse(node, "it computes over tokens, of which the dropped ones were put back as zeros", "select after it")
    padded = any(selected[label].present is not None for label in computed & selected.keys())
    if padded and live and PRESENT not in reads(node):
        refuse(node, "it computes over the tokens, of which rows kept different numbers", "select without mass=")
    if batch in computed:
        refuse(node, "it computes over the batch, whose rows kept different tokens", "select after it")
    if restored & selected.keys():
        refuse(node, "it combines selected tokens with tokens that were put back as zeros", "select after it")
    if rules.name_of(node) == "scaled_dot_product_attention" and rules.argument(node, 5, "is_causal", default=False):
        query, key = selected.get("n"), selected.get("m")
        if (query and query.positions) is not (key and key.positions):
            advice = "pass the causal mask as attn_mask, so that it can be gathered"
            refuse(node, "is_causal=True with queries and keys of different selections", advice)


def reads(node: fx.Node) -> Collection[str]:
    """The tensors that an attention of the IR, or a statistic of one, reads."""
    kinds: dict[str, type[Attend] | type[Statistic]] = {"attend": Attend, "attention_statistic": Statistic}
    kind = kinds.get(rules.name_of(node))
    return () if kind is None else kind.from_json(str(node.args[-1])).tensors()
