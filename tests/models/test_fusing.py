"""Multi-criteria fusion on whole models, against the method written out with its map, one picture at a time."""

from __future__ import annotations

from typing import Any

import torch

from rewrite import rewrite
from tests.models.architectures import BY_NAME, rewritten, same_gradients
from tests.models.oracles import groups_of

EPS = torch.finfo(torch.float32).eps


def by_hand(model: Any, images: torch.Tensor, r: int, layers: tuple[int, ...]) -> torch.Tensor:
    embedded = model._pos_embed(model.patch_embed(images))
    rows = []
    for picture in embedded:
        x, sizes = picture, torch.ones(len(picture))
        for number, block in enumerate(model.blocks):
            heads = block.attn.num_heads

            def projected(tokens: torch.Tensor, block: Any = block, heads: int = heads) -> Any:
                return block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3).unbind(0)

            q, k, v = projected(x)
            weights = (q @ k.mT * q.shape[-1] ** -0.5 + sizes.log()).softmax(-1)
            if number in layers:
                a = weights.mean((0, 1))
                together = groups_of(x.detach(), a.detach(), sizes, r, model.num_prefix_tokens)
                omega = a * sizes
                x = torch.stack([(omega[g, None] * x[g]).sum(0) / omega[g].sum() for g in together])
                weights = torch.stack([weights[..., g].sum(-1) for g in together], -1)
                weights = torch.stack([(omega[g, None] * weights[:, g]).sum(1) / omega[g].sum() for g in together], 1)
                sizes = torch.stack([sizes[g].sum() for g in together])
                v = projected(x)[2]
            x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        rows.append(x[: model.num_prefix_tokens])
    return model.forward_head(model.norm(torch.stack(rows)))  # type: ignore[no-any-return]


def test_a_timm_model_and_its_gradients() -> None:
    """Fused tokens are fused again: 60 of 197 in front of the second layer, and of those that are left in front of the third."""
    architecture = BY_NAME["timm-vit-b-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    expected = by_hand(model, inputs["x"], 60, (1, 2))
    expected.square().sum().backward()
    changed = rewrite(architecture.build("sdpa"), ["fuse(r=60)"], example_inputs=inputs)
    actual = changed(**inputs)
    actual.square().sum().backward()
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    same_gradients(changed, model)
    with torch.no_grad():
        assert (architecture.build("sdpa")(**inputs) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_tokens_beside_cls_stay_in_front() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=3).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = by_hand(model, x, 81, (0, 1, 2))
        actual = rewritten(model, ["fuse(r=81, layers=(0, 1, 2))"], {"x": x})(x)
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
