"""A model in training mode that computes the same at every call: what random numbers would change is switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def without_chance(model: nn.Module) -> nn.Module:
    """Put the model, in place, into training mode without dropout of any kind and with batch norms that keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        _drop_nothing(vars(module))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        if config is not None:
            _drop_nothing_in(config)
    return model


def _drop_nothing_in(config: Any) -> None:
    if not hasattr(config, "__dict__"):
        return
    _drop_nothing(vars(config))
    for part in vars(config).values():
        if type(part).__name__.endswith("Config"):
            _drop_nothing_in(part)


def _drop_nothing(settings: dict[str, Any]) -> None:
    """Every rate that is called a drop, or a probability of masking, becomes zero."""
    for name, value in settings.items():
        if isinstance(value, float) and ("drop" in name or "mask_time_prob" in name):
            settings[name] = 0.0


def tensors(result: Any) -> Iterator[Tensor]:
    """The floating tensors of a model's result in order; what is no tensor, sequence or mapping (a cache) is left out."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from tensors(value)


def real_rows(output: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """An output without its rows of padding, which attend to nothing or are attended to by nobody: what they hold is nobody's."""
    for name, mask in inputs.items():
        if name.endswith("attention_mask") and isinstance(mask, Tensor) and mask.ndim == 2 and output.shape[:2] == mask.shape:
            return output[mask.bool()]
    return output


def backward(outputs: list[Tensor]) -> None:
    """Gradients of one random weighting of all outputs."""
    total: Tensor | int = 0
    for place, output in enumerate(outputs):
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(place))
            total = total + (output * weights).sum()
    torch.autograd.backward(total)
