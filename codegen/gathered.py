"""Blocks of queries with the keys that were chosen for them, gathered: operands, positions, and sums back to where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from codegen.block_choice import BlockPlan, ChoiceTerm, block_plan, choice_term
from codegen.gathered_visit import GatheredVisit
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import B, H
from rewrite.ir.operations import Attend

# Elements gathered, or scores, at a time: 4 MiB in float32, which stay in a core's own cache until they are multiplied.
GATHERED_AT_A_TIME = 1 << 20


class _Chosen(NamedTuple):
    """ids: numbers of the chosen blocks of keys [groups, blocks of queries, k], increasing. taken: False where fewer were chosen.

    taken is None where as many were chosen everywhere.
    """

    ids: torch.Tensor
    taken: torch.Tensor | None


def _chosen(choice: torch.Tensor, most: int, name: str) -> _Chosen:
    """choice [groups, blocks of queries, blocks of keys]. Raises `RewriteError` for a broken promise; on the CPU, where asking is free."""
    is_chosen = choice != 0
    ids = is_chosen.to(torch.int8).topk(min(most, choice.shape[-1]), sorted=False).indices.sort(-1).values
    if choice.device.type != "cpu":
        return _Chosen(ids, is_chosen.gather(-1, ids))
    counts = is_chosen.sum(-1)
    if counts.numel() and int(counts.max()) > most:
        raise RewriteError(f"{name} chooses {int(counts.max())} blocks of keys for one block of queries, and at most {most} were promised")
    return _Chosen(ids, None if bool((counts == ids.shape[-1]).all()) else is_chosen.gather(-1, ids))


class Gathered:
    """The small attentions of one call, by which the keys that a choice leaves out are never touched.

    plan: what is known before the data; its `everywhere` is left to be visited otherwise.
    """

    def __init__(self, term: ChoiceTerm, plan: BlockPlan, query: torch.Tensor, key: torch.Tensor, choice: torch.Tensor) -> None:
        """query [B, H, Nq, D], key [B, Hkv, Nk, D]; choice: with the axes it is read at."""
        self.term, self.plan, self.device = term, plan, query.device
        self.batch, self.heads, self.n_queries, self.width = query.shape
        self.key_heads, self.n_keys = key.shape[1], key.shape[2]
        lead = [choice.shape[term.indices.index(axis)] if axis in term.indices[:-2] else 1 for axis in (B, H)]
        self.by_head = lead[1] > 1
        groups = self.batch * self.heads if self.by_head else self.batch
        spread = choice.reshape(*lead, *choice.shape[-2:]).expand(self.batch, self.heads if self.by_head else 1, -1, -1)
        self.chosen = _chosen(spread.reshape(groups, *choice.shape[-2:])[:, plan.blocks], term.most, term.name)
        group = torch.arange(groups, device=self.device)
        self._batch_of = group // (groups // self.batch)
        self._head_of = group % self.heads if self.by_head else torch.zeros_like(group)
        shared = self.heads // self.key_heads
        self._key_group = self._batch_of * self.key_heads + self._head_of // shared if self.by_head else group

    @property
    def pairs_per_unit(self) -> int:
        """Scores, or elements of gathered keys and values where these are more, of one small attention."""
        keys = len(self.plan.common) + self.chosen.ids.shape[-1] * self.plan.columns.shape[1]
        return (1 if self.by_head else self.heads) * keys * max(self.plan.rows.shape[1], 2 * self.width)

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, heads, N, D] as a table [entries, heads or 1, D], one entry per position and group, whose last two axes are one in memory."""
        _, heads, _, width = tensor.shape
        if self.by_head:
            return tensor.reshape(-1, width).unsqueeze(1)
        return tensor.transpose(1, 2).reshape(-1, heads * width).view(-1, heads, width)

    def tensor_of(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows_of`, for the shape of `like`."""
        batch, heads, length, _ = like.shape
        if self.by_head:
            return rows.view(batch, heads, length, rows.shape[2])
        return rows.view(batch, length, heads, rows.shape[2]).transpose(1, 2)

    def visits(self) -> Iterator[GatheredVisit]:
        """All blocks of queries that the plan gathers keys for, as many at a time as `GATHERED_AT_A_TIME` allows."""
        n_blocks = len(self.plan.blocks)
        units = torch.arange(len(self._batch_of) * n_blocks, device=self.device)
        for part in torch.split(units, max(1, GATHERED_AT_A_TIME // max(1, self.pairs_per_unit))):
            yield self._visit(part // n_blocks, part % n_blocks)

    def _visit(self, group: torch.Tensor, block: torch.Tensor) -> GatheredVisit:
        plan, ids = self.plan, self.chosen.ids[group, block]
        rows, count = plan.rows[block], len(block)
        columns = torch.cat([plan.common.expand(count, -1), plan.columns[ids].flatten(1)], 1)
        taken = None
        if self.chosen.taken is not None or plan.column_taken is not None:
            own = torch.ones_like(ids, dtype=torch.bool) if self.chosen.taken is None else self.chosen.taken[group, block]
            slots = own[..., None].expand(-1, -1, plan.columns.shape[1])
            slots = slots if plan.column_taken is None else slots & plan.column_taken[ids]
            taken = torch.cat([torch.ones(count, len(plan.common), dtype=torch.bool, device=self.device), slots.flatten(1)], 1)
        head = self._head_of[group].view(-1, 1, 1, 1) if self.by_head else torch.arange(self.heads, device=self.device).view(1, -1, 1, 1)
        values: dict[str, Any] = {
            "b": self._batch_of[group].view(-1, 1, 1, 1),
            "h": head,
            "i": rows[:, None, :, None],
            "j": columns[:, None, None],
            "Nq": self.n_queries,
            "Nk": self.n_keys,
        }
        return GatheredVisit(
            values,
            rows + (group * self.n_queries)[:, None],
            columns + (self._key_group[group] * self.n_keys)[:, None],
            None if taken is None else taken[:, None, None],
            None if plan.row_taken is None else plan.row_taken[block][:, None, :, None],
        )


def gathered(attend: Attend, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Gathered | None:
    """The call's small attentions; None where the operation chooses no blocks, or every pair has to be looked at, or that costs less."""
    term = choice_term(attend)
    if term is None or 0 in query.shape or 0 in key.shape:
        return None
    choice = tensors[term.name]
    plan = block_plan(term, (query.shape[2], key.shape[2]), (choice.shape[-2], choice.shape[-1]), query.device)
    return None if plan is None else Gathered(term, plan, query, key, choice)
