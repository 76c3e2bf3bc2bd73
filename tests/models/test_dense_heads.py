"""Heads that read every place of a grid, behind layers that some patches have left: each place has what its token left with.

Also on the corpus (test_selection_on_corpus.py): a head that reads every layer, and a detector's tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import NotApplicableError, kept_tokens, rewrite
from tests.models.architectures import rewritten, same_gradients

EPS = torch.finfo(torch.float32).eps
LAYERS, KEEP = (1, 2), 0.6


class Segmenter(nn.Module):
    """A convolution over the intermediate features of a vision transformer, as timm's users build one."""

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        import timm

        torch.manual_seed(0)
        shape: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
        self.backbone = timm.create_model("vit_tiny_patch16_224", **shape)
        with torch.no_grad():
            # The CLS token of an untrained model sees all patches alike.
            nn.init.normal_(self.backbone.cls_token)
        self.head = nn.Conv2d(3 * 32, 5, 3, padding=1)
        self.between = nn.Conv2d(32, 32, 3, padding=1, groups=32) if between else None
        if self.between is not None:
            self.backbone.blocks[2].mlp = OnGrid(self.between)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.backbone.forward_intermediates(x, indices=[0, 1, 3], intermediates_only=True)
        return self.head(torch.cat(features, 1))


class OnGrid(nn.Module):
    """A depthwise convolution over the patches, with CLS as it is."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        return torch.cat([x[:, :1], self.convolution(grid).flatten(2).transpose(1, 2)], 1)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, x: torch.Tensor, mass: float | None = None, fuse: bool = True) -> tuple[torch.Tensor, list[int]]:
    """EViT, one picture at a time; a patch that leaves stays on the grid as it is. And how many tokens each picture has in the end."""
    vit, rows, counts = model.backbone, [], []
    for picture in vit._pos_embed(vit.patch_embed(x)):
        grid, tokens, places, features = picture[1:], picture, list(range(64)), []
        for number, block in enumerate(vit.blocks):
            q, k, v = block.attn.qkv(block.norm1(tokens)).reshape(len(tokens), 3, 4, 8).permute(1, 2, 0, 3)
            weights = (q @ k.mT * 8**-0.5).softmax(-1)
            tokens = tokens + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            if number in LAYERS:
                score = weights[:, 0, 1:].mean(0)
                # Places of -1 are fused tokens.
                ranked, stay, reached = score.argsort(descending=True).tolist(), list[int](), 0.0
                for at in ranked[: math.ceil(KEEP * len(places))]:
                    if mass is None or not stay or reached < mass * score.sum().item():
                        stay.append(at)
                    reached += score[at].item()
                stay.sort()
                leave = [at for at in range(len(places)) if at not in stay]
                lost = [at for at in leave if places[at] >= 0]
                grid = grid.index_put((torch.tensor([places[at] for at in lost]),), tokens[1:][lost])
                fused = (score[leave, None] * tokens[1:][leave]).sum(0, keepdim=True)
                tokens = torch.cat([tokens[:1], tokens[1:][stay], *([fused] if fuse else [])])
                places = [places[at] for at in stay] + [-1] * fuse
            tokens = tokens + block.mlp(block.norm2(tokens))
            left = [at for at, place in enumerate(places) if place >= 0]
            grid = grid.index_put((torch.tensor([places[at] for at in left]),), tokens[1:][left])
            if number in (0, 1, 3):
                features.append(grid.T.reshape(32, 8, 8))
        rows.append(torch.cat(features))
        counts.append(len(tokens))
    return model.head(torch.stack(rows)), counts


def test_a_head_over_intermediate_features_with_gradients() -> None:
    """What left at one layer and at another, fused tokens that leave again, and gradients through what left."""
    model = Segmenter()
    expected, _ = by_hand(model, pictures())
    expected.square().sum().backward()
    changed = rewrite(Segmenter(), [f"evit(keep={KEEP}, layers={LAYERS})"], example_inputs={"x": pictures()})
    actual = changed(pictures())
    actual.square().sum().backward()
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    same_gradients(changed, model)


def test_layers_that_read_the_grid_between_attentions_are_refused() -> None:
    with pytest.raises(NotApplicableError, match="reads the grid, of which some tokens were dropped, between layers of attention"):
        rewritten(Segmenter(between=True), [f"evit(keep={KEEP}, layers={LAYERS}, fuse=False)"], {"x": pictures()})


@pytest.mark.parametrize("fuse", [True, False])
def test_rows_that_keep_different_numbers(fuse: bool) -> None:
    """By the share of the attention of CLS: each picture as alone, whatever the batch pads it to."""
    model, setting = Segmenter(), f"evit(keep={KEEP}, layers={LAYERS}, mass=0.5, fuse={fuse})"
    x = pictures()
    with torch.no_grad():
        # An untrained model looks at all patches about alike.
        for block in model.backbone.blocks:
            block.attn.qkv.weight.mul_(12)
    changed = rewrite(model, [setting], example_inputs={"x": x})
    expected, counts = by_hand(model, x, 0.5, fuse)
    assert counts[0] != counts[1]
    expected.square().sum().backward()
    with kept_tokens(changed) as kept:
        actual = changed(x)
    seen = kept["backbone.blocks.3.attn"]
    assert seen.positions.shape[1] == max(counts)
    assert fuse or (seen.positions < seen.length).sum(1).tolist() == counts
    actual.square().sum().backward()
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    same_gradients(changed, model)


def test_pooling_over_rows_of_different_numbers_is_refused() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4, reg_tokens=2, global_pool="map")
    with pytest.raises(NotApplicableError, match="attn_pool: it computes over the tokens, of which rows kept different numbers"):
        rewritten(model, ["evit(layers=(0,), mass=0.5)"], {"x": torch.randn(2, 3, 32, 32)})
