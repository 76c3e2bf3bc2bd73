"""What each pass that leaves tokens out does, as rules for the original model's own graphs (`tests.models.masked_graphs`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rewrite import Site
from tests.models.corpus.entry import Entry
from tests.models.corpus.survey import survey
from tests.models.corpus.transformers_parts import PICTURE
from tests.models.masked_graphs import Masked
from tests.models.oracles import Rule, best, cls_row


@dataclass
class Prompts:
    """The calls of a model with visual tokens."""

    entry: Entry
    inputs: dict[str, Any]

    @property
    def visual(self) -> torch.Tensor:
        return torch.as_tensor(self.inputs["input_ids"] == PICTURE)

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in survey(self.entry, self.entry.implementations[0], 2).sites}

    @property
    def tower(self) -> Site:
        """The attention of a vision tower that visual tokens went through last."""
        name = next(site.pictured for site in self.sites.values() if site.pictured)
        return self.sites[name]

    def masked(self) -> Masked:
        length = self.visual.shape[1]
        return Masked(lambda site: site.kind == "self" and site.dims["Nq"] == site.dims["Nk"] == length)


# Gives an oracle the rules of a pass.
Install = Callable[[Masked, Prompts], None]


def share(count: int, keep: float) -> int:
    """Half a token counts."""
    return math.floor(keep * count + 0.5)


def by_last_query(visual: torch.Tensor) -> Rule:
    """FastV's and PyramidDrop's rule: half of the visual tokens of each row."""
    half = share(int(visual[0].sum()), 0.5)
    return lambda weights, alive: (alive & ~visual) | best(weights[:, :, -1].mean(1), alive & visual, half)


def fastv(masked: Masked, prompts: Prompts) -> None:
    masked.behind[0] = by_last_query(prompts.visual)


def pyramid(masked: Masked, prompts: Prompts) -> None:
    masked.before[1] = by_last_query(prompts.visual)


def static_exit(masked: Masked, prompts: Prompts) -> None:
    masked.before[1] = lambda weights, alive: alive & ~prompts.visual


def relevances(weights: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B]: what the last query gives to all visual tokens together."""
    return (weights[:, :, -1].mean(1) * visual).sum(1)


def relevance_between_rows(prompts: Prompts) -> float:
    """What lies between the relevances of the two rows, so that the image of one of them leaves."""
    probe, seen = prompts.masked(), [torch.tensor(0.5)]
    if not any(site.layout.visual for site in prompts.sites.values()):
        return 0.5

    def note(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        seen.append(relevances(weights, prompts.visual))
        return alive

    probe.behind[0] = note
    probe.run(prompts.entry.build(prompts.entry.implementations[0]), prompts.inputs)
    return round(float(seen[-1].mean()), 6)


def relevance_exit(masked: Masked, prompts: Prompts) -> None:
    visual, below = prompts.visual, relevance_between_rows(prompts)
    masked.behind[0] = lambda weights, alive: alive & ~(visual & (relevances(weights, visual) < below)[:, None])


def diverse(masked: Masked, prompts: Prompts) -> None:
    visual = prompts.visual

    def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        left = alive & ~visual
        assert masked.entered is not None
        for row, tokens in enumerate(masked.entered):
            places = visual[row].nonzero().flatten()
            unit = torch.nn.functional.normalize(tokens[places], dim=-1)
            apart = (1 - unit @ unit.mT).fill_diagonal_(math.inf)
            chosen = [int(apart.amin(1).argmax())]
            while len(chosen) < share(len(places), 0.5):
                nearest = apart[:, chosen].amin(1)
                nearest[chosen] = -math.inf
                chosen.append(int(nearest.argmax()))
            left[row, places[chosen]] = True
        return left

    masked.before[0] = rule


def of_site(found: dict[str, Any], name: str) -> Any:
    """By name; behind a graph break paths are shorter."""
    return next(one for path, one in found.items() if name.endswith(path))


def patches_stay(masked: Masked, prompts: Prompts, chosen: Callable[[], torch.Tensor]) -> None:
    """Of the patches of pictures those stay that are `chosen`, bool [pictures, P]."""
    visual = prompts.visual
    masked.before[0] = lambda weights, alive: alive & ~torch.zeros_like(visual).masked_scatter(visual, ~chosen())


def best_half(score: torch.Tensor) -> torch.Tensor:
    return best(score, torch.ones_like(score, dtype=torch.bool), share(score.shape[1], 0.5))


def cls_prune(masked: Masked, prompts: Prompts) -> None:
    tower = prompts.tower
    patches_stay(masked, prompts, lambda: best_half(of_site(masked.weights, tower.name)[:, :, 0, tower.layout.prefix :].mean(1)))


def hired(masked: Masked, prompts: Prompts) -> None:
    """Pictures that stand alone: as above, but rounded down."""
    cls_prune(masked, prompts)


def cls_ensemble(masked: Masked, prompts: Prompts) -> None:
    tower = prompts.tower
    names = [site.name for site in prompts.sites.values() if site.stack == tower.stack and site.layer <= tower.layer]

    def chosen() -> torch.Tensor:
        return best_half(sum(of_site(masked.weights, name)[:, :, 0, tower.layout.prefix :].mean(1) for name in names))

    patches_stay(masked, prompts, chosen)


def outlier_tokens(masked: Masked, prompts: Prompts) -> None:
    tower = prompts.tower

    def chosen() -> torch.Tensor:
        query, key = (of_site(masked.operands, tower.name)[name].transpose(1, 2).flatten(2) for name in ("query", "key"))
        scores = query[:, :1] @ key.mT * query.shape[2] ** -0.5
        return best_half(scores.softmax(-1)[:, 0, tower.layout.prefix :])

    patches_stay(masked, prompts, chosen)


def dominant_contextual(masked: Masked, prompts: Prompts) -> None:
    """Of P patches 0.4 stay, 0.2 take in the others."""
    tower = prompts.tower
    prefix, left = tower.layout.prefix, list[torch.Tensor]()

    def merged(features: torch.Tensor) -> torch.Tensor:
        weights, key = of_site(masked.weights, tower.name), of_site(masked.operands, tower.name)["key"]
        score = (weights[:, :, 0] if prefix else weights.sum(2)).sum(1)[:, prefix:]
        patches = score.shape[1]
        stay, made = torch.zeros_like(score, dtype=torch.bool), features.clone()
        for picture in range(len(score)):
            ranked = sorted(range(patches), key=lambda patch: -float(score[picture, patch]))
            dominant, others = ranked[: share(patches, 0.4)], sorted(ranked[share(patches, 0.4) :])
            number = share(patches, 0.2)
            targets = others[:: max(1, len(others) // number)][:number]
            unit = torch.nn.functional.normalize(key[picture].mean(0), dim=-1)[prefix:]
            into: dict[int, list[int]] = {target: [target] for target in targets}
            for patch in others:
                if patch not in targets:
                    into[max(targets, key=lambda target: float(unit[patch] @ unit[target]))].append(patch)
            for target, members in into.items():
                made[picture, prefix + target] = features[picture, [prefix + member for member in members]].mean(0)
            stay[picture, dominant + targets] = True
        left.append(stay)
        return made

    masked.remade[tower.name, "behind"] = merged
    patches_stay(masked, prompts, lambda: left[-1])


def matryoshka(masked: Masked, prompts: Prompts) -> None:
    """2 x 2 cells."""
    tower = prompts.tower
    assert tower.layout.grid is not None
    height, width = tower.layout.grid
    high, wide = height // 2, width // 2
    first = torch.zeros(height, width, dtype=torch.bool)
    first[::high, ::wide] = True

    def pooled(patches: torch.Tensor) -> torch.Tensor:
        grid = patches.unflatten(1, (height, width)).clone()
        grid[:, ::high, ::wide] = grid.unflatten(1, (2, high)).unflatten(3, (2, wide)).mean((2, 4))
        return grid.flatten(1, 2)

    masked.remade[tower.name, "patches"] = pooled
    pictures = int(prompts.visual.sum()) // (height * width)
    patches_stay(masked, prompts, lambda: first.flatten().expand(pictures, -1))


# Name -> the pass, and its rules. Models of the corpus have two layers.
VISUAL: dict[str, tuple[str, Install]] = {
    "fastv": ("fastv(layer=1)", fastv),
    "pyramid": ("pyramid(layers=(1,))", pyramid),
    "static_exit": ("token_exit(layer=1)", static_exit),
    "relevance_exit": ("token_exit(relevance={})", relevance_exit),
    "diverse": ("diverse(keep=0.5)", diverse),
    "cls_prune": ("cls_prune(keep=0.5)", cls_prune),
    "hired": ("hired(keep=0.5)", hired),
    "cls_ensemble": ("cls_ensemble(keep=0.5)", cls_ensemble),
    "outlier_tokens": ("outlier_tokens(keep=0.5)", outlier_tokens),
    "dominant_contextual": ("dominant_contextual(dominant=0.4, contextual=0.2)", dominant_contextual),
    "matryoshka": ("matryoshka(tokens=4)", matryoshka),
}


def setting(one: str, prompts: Prompts) -> str:
    """A pass on visual tokens as it is asked for."""
    text = VISUAL[one][0]
    return text.format(relevance_between_rows(prompts)) if "{}" in text else text


# Passes on the patches of a vision transformer, and what begins in each stack of layers.
PATCHES: dict[str, str] = {
    "evit": "evit(keep=0.6, layers=(0,), fuse=False)",
    "evit_fused": "evit(keep=0.6, layers=(0,))",
    "merge": "merge(r=3, layers=(0,))",
    "fuse": "fuse(r=3, layers=(0, 1))",
}


def of_patches(one: str, of: Callable[[Site], bool]) -> Masked:
    """The oracle of a pass on the patches of the sites that are in its stacks."""

    def begin(oracle: Masked, site: Site) -> None:
        oracle.prefix, oracle.suffix = site.layout.prefix, site.layout.suffix
        if one.startswith("evit"):
            oracle.behind[0] = cls_row(0.6, oracle.prefix, oracle.suffix)

    merges, fuses = ({0: 3} if one == "merge" else {}), ({0: 3, 1: 3} if one == "fuse" else {})
    return Masked(of, merges=merges, fuses=fuses, fused=one == "evit_fused", begin=begin)
