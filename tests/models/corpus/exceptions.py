"""What is known not to be recognised, and why: the tests hold recognition to everything else, docs/coverage.md lists it."""

from __future__ import annotations

from collections.abc import Mapping

from tests.models.corpus.entry import Entry

# Most of all sites that may be missed.
MOST_MISSED = 0.02

# name -> sites that are missed, and why, in words that go on from "because".
MISSED: Mapping[str, tuple[int, str]] = {
    "grounding-dino": (4, "scores are clamped after their global maximum is subtracted"),
    "vit_dwee_patch16_reg1_gap_256, eager": (2, "each map is the difference of two, of another number of heads than the values have"),
    "groupvit": (2, "each token is assigned to one group, by a hard one-hot of its scores and no softmax"),
}

# Models whose pictures attend one after another: every site of the picture's is there once for each row of the batch, and the tables are
# written for a batch of two. Their texts are causal, their pictures are not.
PER_PICTURE = frozenset({"qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm4v"})

# name -> why its tokens are not found to lie as its table says.
LAYOUTS: Mapping[str, str] = {
    "qwen2.5-vl": "the grid of its pictures is read from data, so that nothing is known of the windows on it",
}

# name -> why its gradients are not compared.
GRADIENTS: Mapping[str, str] = {"llama-flex": "FlexAttention has no backward on the CPU"}


def expected_sites(entry: Entry, batch: int) -> int:
    """How many sites recognition is held to find."""
    apart = sum(group.count for group in entry.sites if not group.causal) if entry.name in PER_PICTURE else 0
    return entry.truth - apart + apart * batch // 2 - MISSED.get(entry.name, (0, ""))[0]
