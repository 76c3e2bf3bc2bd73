"""Weights with which every attention of an untrained model reaches the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SMALL = 0.1
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Replace, in place and always alike, what a fresh model holds constant, and give its linear maps unit gain; return the model.

    An untrained model can carry an attention that does nothing: under a layer scale of 1e-5, behind a gate of zero, with a position table
    of zeros. Zeros become normal with a deviation of 0.2. Any other constant is multiplied by factors between 0.5 and 1.5, and counts as
    one if it was small, so that a layer scale is seen and a logit scale keeps its magnitude. Of a single number only a zero is replaced:
    it is a gate, and any other is a setting. Norms stay as they are, but for a weight of zero or nearly, which is a layer scale by another
    name (residual branches that start closed).

    Weights of a deviation of 0.02 leave every map uniform to within rounding. With unit gain, a deviation of one over the root of the
    number of inputs, scores of normalised tokens deviate by about one.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            constant = float(parameter.flatten()[0])
            is_gate = abs(constant) < SMALL and (parameter.numel() == 1 or is_norm or constant != 0)
            if (is_norm and not (name == "weight" and is_gate)) or (parameter.numel() == 1 and constant) or (parameter != constant).any():
                continue
            if constant == 0 and not is_gate:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_((1.0 if is_gate else constant) * (0.5 + torch.rand(parameter.shape, generator=generator)))
        if isinstance(module, LINEAR) and not is_norm and module.weight.numel() > 1:
            module.weight.div_(module.weight.square().mean().sqrt() * module.weight[0].numel() ** 0.5)
    return model


@torch.no_grad()
def settle(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Let the batch norms take their statistics from one batch; return the model, in eval mode.

    Batch norms that have seen no data normalise nothing, and a signal grows or dies by orders of magnitude before an attention sees it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    # Also drops what a forward in eval mode caches of the weights.
    return model.eval()
