"""Starts a language model with attention that looks for tokens that say the same words, and copies what it finds.

A small model takes long to find this by itself, from answers alone; once it is there, the rest is learned quickly. Keys begin as the
queries are, so that alike tokens attend to each other, and each layer's output projection as the values' transposed, so that what is read
is what stood there (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers").
"""

from __future__ import annotations

import torch
from torch import nn

# Of the queries and keys: the score of a token with one of which half is the same word is about 4, at width 128 and 4 heads of 32.
SCALE = 0.105
# How much of what is read a layer adds to the stream.
COPIED = 0.5


@torch.no_grad()
def start_alike(attentions: list[nn.Module]) -> None:
    """attentions: modules with the linear layers q_proj, k_proj, v_proj and o_proj, with as many key heads as query heads."""
    for attention in attentions:
        nn.init.normal_(attention.q_proj.weight, std=SCALE)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(COPIED * attention.v_proj.weight.T)
