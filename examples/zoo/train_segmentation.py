"""Train the segmentation model: the classifier's tower under a DPT neck and head, which say the kind of every pixel.

    python -m examples.zoo.train_segmentation

The tower is the classifier that ships, and is left as it is; neck and head are trained.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..torchvision_or_not import let_transformers_import
from .dense import BACKGROUND, pixel_kinds
from .names import KINDS
from .pixels import pixel_values
from .publish import WEIGHTS, publish
from .scenes import SIZE, render, scene
from .score import figures
from .tasks import at_pixels, segmentation
from .train_classifier import BACKGROUND_WEIGHT, classifier, trained_tower
from .training import Recipe, train
from .training_attention import use_map

RECIPE = Recipe(steps=500, batch=32, rate=3e-3, seed=3)
# Scenes from this number on: the tower was trained on those before.
FIRST = 20_000_000
# Where the tower's names are other ones in a DPT.
NAMES = (
    (r"vit\.layers\.", "dpt.encoder.layer."),
    (r"^vit\.", "dpt."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def segmenter() -> nn.Module:
    """DPTForSemanticSegmentation over the classifier's ViT, with a narrow neck: feature maps of its last four layers."""
    let_transformers_import()
    from transformers import DPTConfig, DPTForSemanticSegmentation

    tower = classifier().config
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "layer_norm_eps")
    labels = ("background", *KINDS)
    config = DPTConfig(
        **{name: getattr(tower, name) for name in shared}, backbone_out_indices=[2, 3, 4, 5], reassemble_factors=[2, 1, 1, 0.5],
        neck_hidden_sizes=[16, 24, 32, 48], fusion_hidden_size=24, use_auxiliary_head=False, semantic_classifier_dropout=0.0,
        initializer_range=0.1,  # near sqrt(2 / (9 * fusion_hidden_size)), for convolutions without norms
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    return DPTForSemanticSegmentation(config)


def renamed(name: str) -> str:
    """The name in a DPT of a parameter of ViTForImageClassification."""
    for pattern, other in NAMES:
        name = re.sub(pattern, other, name)
    return name


def batch(recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, SIZE, SIZE] and the kind of every pixel [B, SIZE, SIZE]."""
    scenes = [scene("train", FIRST + step * recipe.batch + number) for number in range(recipe.batch)]
    rendered = [render(one) for one in scenes]
    kinds = np.stack([pixel_kinds(*pair) for pair in zip(scenes, rendered, strict=True)])
    return pixel_values([one.image for one in rendered]), torch.from_numpy(kinds)


def loss(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    pixels, kinds = given
    logits = at_pixels(model(pixel_values=pixels).logits.float(), SIZE)
    something = kinds != BACKGROUND
    weight = torch.where(something, 1.0, BACKGROUND_WEIGHT)
    each = functional.cross_entropy(logits.movedim(-1, 1), kinds, reduction="none")
    right = logits.argmax(-1) == kinds
    return (each * weight).sum() / weight.sum(), {
        "pixels": right.float().mean().item(),
        "of things": right[something].float().mean().item(),
    }


def main() -> None:
    torch.set_num_threads(1)  # the order of sums, and so every figure, depends on the number of threads
    torch.manual_seed(RECIPE.seed)
    model = segmenter()
    tower = {renamed(f"vit.{name}"): value for name, value in trained_tower().items()}
    missing = [name for name in model.dpt.state_dict() if f"dpt.{name}" not in tower]
    assert not missing, missing
    model.load_state_dict(tower, strict=False)
    model.dpt.requires_grad_(False)
    use_map(model)
    train(model, RECIPE, lambda step: batch(RECIPE, step), loss, "segmentation")
    told = {
        "title": "Segmentation of scenes",
        "what": f"`DPTForSemanticSegmentation`: the classifier's ViT under a DPT neck and head; the background or one of "
        f"{len(KINDS)} kinds for every pixel.",
        "command": "python -m examples.zoo.train_segmentation",
    }
    publish("segmentation", model, {"segmentation": RECIPE}, {**told, "figures": "to be measured"}, SIZE, "DPTImageProcessor")
    measured = figures({"segmentation": segmentation}, WEIGHTS / "segmentation", 500)
    publish("segmentation", model, {"segmentation": RECIPE}, {**told, "figures": measured}, SIZE, "DPTImageProcessor")


if __name__ == "__main__":
    main()
