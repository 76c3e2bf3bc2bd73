"""What the shipped models look at: whether they have attention sinks, and how much of each layer goes to the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .tasks import answering, classification, events

WEIGHTS = Path(__file__).parent / "weights"
SAMPLES = 200
# A token that receives so many times the mean of all tokens is called a sink.
SINK = 20.0
# Tokens of the language model's prompt in front of the picture: "<s>".
BEFORE = 1


@torch.no_grad()
def write_attention(file: Path) -> None:
    """Everything that is measured, of the models that are there, as JSON."""
    made = {"classifier": classification, "video": events, "llava": answering}
    found = {}
    for name, task in made.items():
        if (WEIGHTS / name).is_dir():
            of = task(WEIGHTS / name, SAMPLES)
            of.model.set_attn_implementation("eager")  # the only one that says what its weights are
            maps = [
                part
                for batch in of.batches
                for part in _without_padding(
                    of.model(**batch.inputs, output_attentions=True).attentions, batch.inputs.get("attention_mask")
                )
            ]
            found[name] = {"tower" if name != "llava" else "language model": _layers(maps)}
            if name == "llava":
                found[name]["last word"] = _looks(maps, of.model.config.image_seq_length)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def _without_padding(layers: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, ...]]:
    """The maps [B, H, N, N] of a batch without the padding on the left of its rows: those with equally much of it together."""
    if mask is None:
        yield layers
        return
    padding = (mask == 0).sum(1)
    for count in padding.unique().tolist():
        yield tuple(one[padding == count][:, :, count:, count:] for one in layers)


def _layers(maps: list[tuple[torch.Tensor, ...]]) -> list[dict[str, Any]]:
    """For each layer: how many times the mean of all tokens the first one receives, and the one of all others that receives most; and in
    how many samples another than the first is a sink.

    maps: for each batch, of each layer [B, H, N, N]. Under a causal mask even attention gives the first of 200 tokens 6 times the mean.
    """
    rows = []
    for layer in zip(*maps, strict=True):
        times = [one.mean((1, 2)) * one.shape[-1] for one in layer]
        first = [one[:, 0] for one in times]
        greatest = [one[:, 1:].amax(-1) for one in times]
        sinks = [one > SINK for one in greatest]
        rows.append({
            "first token": round(float(torch.cat(first).mean()), 2),
            "greatest other": round(float(torch.cat(greatest).mean()), 2),
            "samples with another sink": round(float(torch.cat(sinks).float().mean()), 4),
        })  # fmt: skip
    return rows


def _looks(maps: list[tuple[torch.Tensor, ...]], visual: int) -> list[dict[str, float]]:
    """For each layer the shares of the last word's attention: on "<s>", the picture and the question."""
    rows = []
    for layer in zip(*maps, strict=True):
        last = [one[:, :, -1].mean(1) for one in layer]
        picture = slice(BEFORE, BEFORE + visual)
        shares = {
            "<s>": torch.cat([one[:, :BEFORE].sum(-1) for one in last]),
            "picture": torch.cat([one[:, picture].sum(-1) for one in last]),
            "question": torch.cat([one[:, BEFORE + visual :].sum(-1) for one in last]),
        }
        rows.append({name: round(float(share.mean()), 4) for name, share in shares.items()})
    return rows
