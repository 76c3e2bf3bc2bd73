"""Train the classifier: a ViT of 196 patches that says which kind the largest thing of a scene is.

    python -m examples.zoo.train_classifier

While it trains, linear heads on its patches also learn which kind, colour and texture each patch shows, without which the patches of
small things would learn little; they are not part of the model that is shipped, but the language model that reads the patches and the
segmentation model profit from them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..torchvision_or_not import let_transformers_import
from .dense import GRID, PATCH, patch_labels
from .local_start import start_locally
from .names import COLOURS, KINDS, TEXTURES
from .pixels import pixel_values
from .publish import WEIGHTS, publish
from .scenes import SIZE, render, scene
from .score import figures
from .tasks import classification
from .training import Recipe, train
from .training_attention import use_map

RECIPE = Recipe(steps=1800, batch=64, rate=2.5e-3)
# Of the loss of a patch that shows the background: most do.
BACKGROUND_WEIGHT = 0.15


class Supervised(nn.Module):
    """The classifier with the heads on its patches."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.model = classifier
        self.dense_head = nn.Linear(classifier.config.hidden_size, sum(one + 1 for one in SIZES))


SIZES = (len(KINDS), len(COLOURS), len(TEXTURES))


def classifier() -> nn.Module:
    """ViTForImageClassification: 6 layers of width 128, a CLS token and 14 x 14 patches of 8 pixels."""
    let_transformers_import()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        initializer_range=0.06,  # near 0.7 / sqrt(hidden_size): the 0.02 of wide models makes a narrow one slow to start
        id2label=dict(enumerate(KINDS)), label2id={kind: number for number, kind in enumerate(KINDS)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    attentions = [(layer.attention.q_proj, layer.attention.k_proj) for layer in model.vit.layers]
    start_locally(model.vit.embeddings.position_embeddings, (GRID, GRID), attentions)
    return model


def trained_tower() -> dict[str, torch.Tensor]:
    """The weights of the ViT of the classifier that ships, by their names in a ViTModel."""
    let_transformers_import()
    from transformers import ViTForImageClassification

    trained = ViTForImageClassification.from_pretrained(WEIGHTS / "classifier", dtype=torch.float32)
    return trained.vit.state_dict()


def batch(recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, SIZE, SIZE], the kind of the largest thing [B], and the labels of patches [B, 3, patches]."""
    scenes = [scene("train", step * recipe.batch + number) for number in range(recipe.batch)]
    rendered = [render(one) for one in scenes]
    labels = np.stack([patch_labels(*pair) for pair in zip(scenes, rendered, strict=True)])
    kinds = torch.tensor([KINDS.index(one.main.kind) for one in scenes])
    return pixel_values([one.image for one in rendered]), kinds, torch.from_numpy(labels).flatten(2)


def loss(model: Supervised, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    pixels, kinds, patches = given
    tokens = model.model.vit(pixel_values=pixels).last_hidden_state
    logits = model.model.classifier(tokens[:, 0]).float()
    total = functional.cross_entropy(logits, kinds)
    shown = {"accuracy": (logits.argmax(-1) == kinds).float().mean().item()}
    something = patches[:, 0] > 0
    weight = torch.where(something, 1.0, BACKGROUND_WEIGHT)
    for name, scores, labels in zip(
        ("kind", "colour", "texture"),
        model.dense_head(tokens[:, 1:]).float().split([one + 1 for one in SIZES], -1),
        patches.unbind(1),
        strict=True,
    ):
        each = functional.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
        total = total + (each * weight).sum() / weight.sum()
        shown[f"patch {name}"] = ((scores.argmax(-1) == labels) & something).sum().item() / something.sum().item()
    return total, shown


def main() -> None:
    torch.set_num_threads(1)  # the order of sums, and so every figure, depends on the number of threads
    torch.manual_seed(RECIPE.seed)
    model = Supervised(classifier())
    use_map(model.model)
    train(model, RECIPE, lambda step: batch(RECIPE, step), loss, "classifier")
    told = {
        "title": "Classifier of scenes",
        "what": f"`ViTForImageClassification`: which of {len(KINDS)} kinds the largest thing is. {GRID**2} patches and a CLS token.",
        "command": "python -m examples.zoo.train_classifier",
    }
    publish("classifier", model.model, {"classifier": RECIPE}, {**told, "figures": "to be measured"}, SIZE, "ViTImageProcessor")
    measured = figures({"classification": classification}, WEIGHTS / "classifier", 2000)
    publish("classifier", model.model, {"classifier": RECIPE}, {**told, "figures": measured}, SIZE, "ViTImageProcessor")


if __name__ == "__main__":
    main()
