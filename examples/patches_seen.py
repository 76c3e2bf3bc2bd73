"""Which patches of a picture the layers of a language model still see after passes that prune."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rewrite import kept_tokens


@torch.no_grad()
def patches_seen(rewritten: nn.Module, inputs: dict[str, torch.Tensor], grid: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(the share of the layers that see each patch of the first row's picture, which patches were merged or None), [grid, grid]."""
    with kept_tokens(rewritten) as kept:
        rewritten(**inputs)
    visual = inputs["input_ids"][0] == rewritten.config.image_token_id
    sites = [site.qualified_name for site in rewritten.rewrite_report.sites if "visual" in site.token_layout]
    masks = [kept[name].mask[0][visual] if name in kept else torch.ones(int(visual.sum()), dtype=torch.bool) for name in sites]
    merged = [one.holders for one in kept.values() if one.holders is not None]
    # The tower's tokens, of which the first is CLS.
    groups = merged[-1][0, -(grid**2) :].reshape(grid, grid).numpy() if merged else None
    return torch.stack(masks).float().mean(0).reshape(grid, grid).numpy(), groups
