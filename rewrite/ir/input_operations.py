"""What depends on the tokens that queries and keys were projected from: a kernel for each picture, and a gate for each token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rewrite.ir.plain_operations import Axes, PlainOperation

KERNEL_SIZE = 3


@dataclass(frozen=True)
class DynamicConv(PlainOperation):
    """A depthwise 3 x 3 convolution of tokens as an image, by a kernel that a small network makes of the mean input (InLine attention).

    source [B, H, prefix + h*w, D], input [B, N, C] with C = H * D, down [C, C/H], down_bias [C], up [9 C, C/H], up_bias [9 C]: two linear
    layers, each in H groups of channels, with GELU between. result as source; rows of prefix tokens are zero, though part of the mean.
    """

    operands: ClassVar[tuple[str, ...]] = ("source", "input", "down", "down_bias", "up", "up_bias")

    source: str
    input: str
    down: str
    down_bias: str
    up: str
    up_bias: str
    grid: tuple[int, int]
    prefix: int = 0

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source = tensors["source"]
        batch, heads, _, width = source.shape
        # 1 x 1 convolutions over a sequence of one: linear layers in groups.
        mean = tensors["input"].mean(1)[..., None]
        hidden = functional.gelu(functional.conv1d(mean, tensors["down"][..., None], tensors["down_bias"], groups=heads))
        kernel = functional.conv1d(hidden, tensors["up"][..., None], tensors["up_bias"], groups=heads)
        kernel = kernel.reshape(-1, 1, KERNEL_SIZE, KERNEL_SIZE).to(source.dtype)
        image = source[:, :, self.prefix :].transpose(-2, -1).reshape(1, -1, *self.grid)
        convolved = functional.conv2d(image, kernel, padding=KERNEL_SIZE // 2, groups=batch * heads * width)
        rows = convolved.reshape(batch, heads, width, -1).transpose(-2, -1)
        return functional.pad(rows, (0, 0, self.prefix, 0))

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["source"]

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, _, width = given["source"]
        taps = KERNEL_SIZE**2
        return heads * width * (math.prod(self.grid) * taps + width * (1 + taps))


@dataclass(frozen=True)
class Gate(PlainOperation):
    """Each token's output times a linear map of its input: source [B, H, N, D] * (input [B, N, C] weight^T + bias).

    weight [H*D, C], bias [H*D].
    """

    operands: ClassVar[tuple[str, ...]] = ("source", "input", "weight", "bias")

    source: str
    input: str
    weight: str
    bias: str

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source = tensors["source"]
        gates = functional.linear(tensors["input"], tensors["weight"], tensors["bias"])
        return source * gates.reshape(*gates.shape[:2], source.shape[1], -1).transpose(1, 2).to(source.dtype)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["source"]

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, tokens, width = given["source"]
        return tokens * heads * width * given["input"].width
