"""`fit_exit`: the routers of `token_exit` learn from the model itself where its visual tokens may leave (DyVTE).

Wu et al. 2025: for each sample a layer is drawn, and the model runs as it is and without visual tokens from that layer on. They
may leave there where the answer stays the same: a router's label is 1 where more than `agreement` of the likeliest tokens are the same
and the loss is less than `excess` times that of the whole model. Routers are trained by the cross-entropy, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from rewrite.dry_run import evaluation_mode
from rewrite.entry import session_of
from rewrite.ir.errors import FittingError
from rewrite.ir.selection import ROUTER
from rewrite.kept import kept_tokens

ModuleType = TypeVar("ModuleType", bound=nn.Module)
IGNORED = -100  # the label of tokens that no loss counts, as everywhere in PyTorch


def fit_exit(
    rewritten: ModuleType,
    loader: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    seed: int = 0,
    learning_rate: float = 6e-5,
    agreement: float = 0.99,
    excess: float = 1.03,
) -> ModuleType:
    """Train the routers of ``token_exit(router=...)``, and nothing else, and return the model. `save` and `load` keep them.

    rewritten: what `rewrite()` returned. loader: batches, mappings of the model's arguments with `labels` [B, N] among them (-100 where
    nothing is to be predicted), gone through as often as it takes. steps: of Adam, one batch and one layer each; seed: decides the layers.
    learning_rate, agreement, excess: the authors'. The result has `logits` [B, N, V].

    Raises `FittingError` for a model without such routers, batches without labels, or an empty loader.
    """
    session = session_of(rewritten)
    sites = [] if session is None else sorted({name.rpartition(".")[0] for name in session.added if name.rpartition(".")[2] in ROUTER})
    if session is None or not sites:
        raise FittingError("there is nothing to train: fit_exit() takes a model rewritten with token_exit(router=2048)")
    routers = {site: [session.parameter(f"{site}.{name}") for name in ROUTER] for site in sites}
    trained = [parameter for up, down, _ in routers.values() for parameter in (up, down)]
    before = [(parameter, parameter.requires_grad) for parameter in trained]
    random, optimiser, done = torch.Generator().manual_seed(seed), torch.optim.Adam(trained, learning_rate), 0
    with evaluation_mode(rewritten), torch.random.fork_rng():
        _start(routers, random)
        try:
            for parameter, _ in before:
                parameter.requires_grad_(True)
            while done < steps:
                begun = done
                for batch in loader:
                    if done < steps:
                        site = sites[int(torch.randint(len(sites), (), generator=random))]
                        _step(rewritten, batch, site, routers, optimiser, agreement, excess)
                        done += 1
                if done == begun:
                    raise FittingError("the loader is empty")
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None
            for _, _, margin in routers.values():
                margin.data.zero_()
    return rewritten


def _start(routers: Mapping[str, list[torch.Tensor]], random: torch.Generator) -> None:
    """Routers that were not trained are zero, from where no gradient leads away: the first layer as of `nn.Linear`."""
    for up, _, _ in routers.values():
        if not up.any():
            bound = 1 / math.sqrt(up.shape[1])
            up.data.copy_((2 * torch.rand(up.shape, generator=random) - 1) * bound)


def _step(
    model: nn.Module, batch: Mapping[str, Any], site: str, routers: Mapping[str, list[torch.Tensor]], optimiser: torch.optim.Optimizer,
    agreement: float, excess: float,
) -> None:  # fmt: skip
    if "labels" not in batch:
        raise FittingError(
            "a batch has no labels, which say whether the answer without visual tokens is as good; give them, -100 elsewhere"
        )
    session = session_of(model)
    assert session is not None
    for _, _, margin in routers.values():
        margin.data.fill_(-math.inf)
    with torch.no_grad():
        features: dict[str, torch.Tensor] = {}
        session.routed.append(features)
        try:
            whole = model(**batch)
        finally:
            session.routed.pop()
        routers[site][2].data.fill_(math.inf)
        with kept_tokens(model) as kept:
            short = model(**batch)
    left = kept[site].mask
    labels = batch["labels"][:, 1:].masked_fill(~left[:, :-1], IGNORED)
    counted = labels != IGNORED
    losses = [_losses(result.logits, labels) for result in (whole, short)]
    same = whole.logits[:, :-1].argmax(-1) == short.logits[:, :-1].argmax(-1)
    share = (same & counted).sum(1) / counted.sum(1).clamp(min=1)
    may = (share > agreement) & (losses[1] < excess * losses[0])
    up, down, _ = routers[site]
    told = functional.linear(functional.gelu(functional.linear(features[site].to(up), up)), down)
    loss = functional.cross_entropy(told.float(), may.long())
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B]: the mean loss of each row, from logits [B, N, V] and labels [B, N - 1] of the tokens behind."""
    each = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
