"""The small models of these tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PASSES = ["agent(tokens=9)"]
EPSILON = torch.finfo(torch.float32).eps


def deit(**options: Any) -> nn.Module:
    """A timm DeiT of two layers: 7x7 patches and a class token."""
    import timm

    torch.manual_seed(0)
    small = {"depth": 2, "img_size": 112, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", **{**small, **options}).eval()
    # Weights large enough that the attention matters to the output.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model


def vit(image_size: int = 112) -> nn.Module:
    """A transformers ViT of two layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=image_size, initializer_range=0.15
    )
    return transformers.ViTForImageClassification(config).eval()


def images(batch: int = 2, height: int = 112, width: int = 112, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, *inputs: Any, **keywords: Any) -> torch.Tensor:
    """The output without gradients: a tensor, or the logits."""
    with torch.no_grad():
        result = model(*inputs, **keywords)
    return result if isinstance(result, torch.Tensor) else result.logits


def close(actual: torch.Tensor, expected: torch.Tensor, units: float = 256, epsilon: float = EPSILON) -> bool:
    """Within so many units in the last place of the largest value."""
    return bool((actual.double() - expected.double()).abs().max() <= units * epsilon * expected.abs().max().double())
