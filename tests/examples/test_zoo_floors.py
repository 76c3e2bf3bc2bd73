"""Pruning at random: as many tokens as asked for, others in each row, drawn evenly, the same every time; CLS stays."""

from __future__ import annotations

import pytest
import torch

import examples.zoo.floors  # noqa: F401  registers the passes
from rewrite import PassError, kept_tokens, parse_pass, rewrite
from tests.api import small


def test_random_patches() -> None:
    pictures = small.images(40)
    model = rewrite(small.vit(), ["random_patches(keep=0.5, layers=(0, 1))"], example_inputs={"pixel_values": pictures})
    state = torch.get_rng_state()
    outputs = []
    for _ in range(2):
        with kept_tokens(model) as kept:
            outputs.append(small.run(model, pixel_values=pictures))
    assert torch.equal(*outputs)
    assert torch.equal(torch.get_rng_state(), state)
    # What the second layer sees: CLS, and half of 49 patches, rounded up.
    (mask,) = (one.mask for one in kept.values())
    assert mask[:, 0].all()
    assert (mask[:, 1:].sum(1) == 25).all()
    assert len({tuple(row) for row in mask.tolist()}) == 40
    assert 0.2 < mask[:, 1:].float().mean(0).min() < mask[:, 1:].float().mean(0).max() < 0.8
    other = rewrite(small.vit(), ["random_patches(keep=0.5, layers=(0, 1), seed=1)"], example_inputs={"pixel_values": pictures})
    assert not torch.equal(small.run(other, pixel_values=pictures), outputs[0])


@pytest.mark.parametrize(
    "text", ["random_tokens(keep=0.0)", "random_tokens(layer=-1)", "random_patches(keep=1.5)", "random_patches(layers=())"]
)
def test_out_of_range(text: str) -> None:
    with pytest.raises(PassError):
        parse_pass(text)
