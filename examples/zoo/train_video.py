"""Train the video classifier: a ViViT of 4 x 7 x 7 tubelets that says what happens in a clip.

python -m examples.zoo.train_video
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..torchvision_or_not import let_transformers_import
from .dense import PATCH
from .local_start import start_locally
from .pixels import pixel_values
from .publish import WEIGHTS, publish
from .score import figures
from .tasks import events
from .training import Recipe, train
from .training_attention import use_map
from .videos import EVENTS, FRAMES, SIDE, clip, render_clip

RECIPE = Recipe(steps=1600, batch=64, rate=2.5e-3, seed=2)
TUBELET = (2, PATCH, PATCH)
GRID = (FRAMES // TUBELET[0], SIDE // PATCH, SIDE // PATCH)


def video_classifier() -> nn.Module:
    """VivitForVideoClassification: 4 layers of width 96, a CLS token and 196 tubelets of two frames of 8 x 8 pixels."""
    let_transformers_import()
    from transformers import VivitConfig, VivitForVideoClassification

    config = VivitConfig(
        image_size=SIDE, num_frames=FRAMES, tubelet_size=list(TUBELET), hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, initializer_range=0.06, id2label=dict(enumerate(EVENTS)),
        label2id={event: number for number, event in enumerate(EVENTS)},
    )  # fmt: skip
    model = VivitForVideoClassification(config)
    attentions = [(layer.attention.q_proj, layer.attention.k_proj) for layer in model.vivit.layers]
    start_locally(model.vivit.embeddings.position_embeddings, GRID, attentions)
    return model


def batch(recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [B, FRAMES, 3, SIDE, SIDE] and what happens in them [B]."""
    clips = [clip("train", step * recipe.batch + number) for number in range(recipe.batch)]
    return pixel_values([render_clip(one) for one in clips]), torch.tensor([EVENTS.index(one.event) for one in clips])


def loss(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    pixels, events_ = given
    logits = model(pixel_values=pixels).logits.float()
    return functional.cross_entropy(logits, events_), {"accuracy": (logits.argmax(-1) == events_).float().mean().item()}


def main() -> None:
    torch.set_num_threads(1)  # the order of sums, and so every figure, depends on the number of threads
    torch.manual_seed(RECIPE.seed)
    model = video_classifier()
    use_map(model)
    train(model, RECIPE, lambda step: batch(RECIPE, step), loss, "video")
    told = {
        "title": "Classifier of clips",
        "what": f"`VivitForVideoClassification`: which of {len(EVENTS)} things happens in {FRAMES} frames of {SIDE} x {SIDE} pixels.",
        "command": "python -m examples.zoo.train_video",
    }
    publish("video", model, {"video": RECIPE}, {**told, "figures": "to be measured"}, SIDE, "VivitImageProcessor")
    measured = figures({"events": events}, WEIGHTS / "video", 2000)
    publish("video", model, {"video": RECIPE}, {**told, "figures": measured}, SIDE, "VivitImageProcessor")


if __name__ == "__main__":
    main()
