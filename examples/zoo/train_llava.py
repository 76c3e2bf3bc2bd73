"""Train the model that answers questions: the classifier's tower, a projector and a LLaMA of 8 layers, as a LLaVA.

    python -m examples.zoo.train_llava

The tower is the classifier that ships. First the projector learns to say the words of what each patch shows, as LLaVA's first stage aligns
it with captions; then projector and language model learn to answer, and to go on with short statements, without which they would not begin
to look for what a question names (`statements.py`); last the tower learns with them, slowly. Each step packs the statements and questions
of each scene into one sequence in which every one sees the picture and itself alone, at the positions that it has when it stands alone:
what is trained is one question in a prompt, at the cost of the picture once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..torchvision_or_not import let_transformers_import
from .alike_start import start_alike
from .dense import GRID, patch_owners
from .names import COLOURS, KINDS, PLACES, TEXTURES
from .pixels import pixel_values
from .publish import WEIGHTS, publish
from .questions import questions
from .scenes import SIZE, Rendered, Scene, render, scene
from .score import figures
from .statements import statements
from .tasks import answering, existence
from .train_classifier import BACKGROUND_WEIGHT, classifier, trained_tower
from .training import Recipe, train
from .training_attention import use_map
from .words import BEGIN, END, IMAGE, PAD, VOCABULARY, save_processor

ALIGNMENT = Recipe(steps=300, batch=16, rate=4e-3, decay=0.02, seed=4)
ANSWERS = Recipe(steps=1900, batch=16, rate=3e-3, decay=0.02, seed=1)
TOGETHER = Recipe(steps=800, batch=16, rate=3e-4, decay=0.02, seed=5)
QUESTIONS = 16
# Scenes of a stage are those from its seed times this number on; the tower was trained on those before.
SCENES_OF_A_STAGE = 10_000_000
# What the patches of a thing say: in each group one word, or none where they show the background.
SAID = {"kind": KINDS, "colour": tuple(COLOURS), "texture": TEXTURES, "place": tuple(place for row in PLACES for place in row)}
VISUAL = GRID**2
PROMPT = 1 + VISUAL


def llava() -> nn.Module:
    """LlavaForConditionalGeneration: the classifier's ViT, and a LLaMA of 8 layers of width 128 over its patches."""
    let_transformers_import()
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = classifier().vit.config
    special = {"bos_token_id": VOCABULARY[BEGIN], "eos_token_id": VOCABULARY[END], "pad_token_id": VOCABULARY[PAD]}
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=288, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.06, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},  # most dimensions turn little over 200 tokens
        **special,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=VOCABULARY[IMAGE], image_seq_length=VISUAL,
        vision_feature_layer=-1, vision_feature_select_strategy="default", **special,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # As large as projected patches are: what smaller words say is lost in the first layer's output.
        model.get_input_embeddings().weight.normal_()
        # What is copied to the end is what is said.
        model.lm_head.weight.copy_(0.1 * model.get_input_embeddings().weight)
    start_alike([layer.self_attn for layer in model.model.language_model.layers])
    return model


def aligned(recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, H, W], and the word that each patch says in each group [B, groups, patches], 0 for none."""
    scenes = [scene("train", recipe.seed * SCENES_OF_A_STAGE + step * recipe.batch + number) for number in range(recipe.batch)]
    rendered = [render(one) for one in scenes]
    words = np.stack([words_of_patches(*pair) for pair in zip(scenes, rendered, strict=True)])
    return pixel_values([one.image for one in rendered]), torch.from_numpy(words)


def words_of_patches(shown: Scene, rendered: Rendered) -> np.ndarray:
    """[groups, patches] int64: 0 for the background, and 1 more than the word's number in SAID."""
    table = [[words.index(getattr(thing, group)) + 1 for thing in shown.things] + [0] for group, words in SAID.items()]
    return np.array(table)[:, patch_owners(rendered, len(shown.things)).flatten()]


def alignment_loss(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Of a patch's projection, compared with the embeddings of each group's words and, for none, of padding."""
    pixels, patches = given
    features = projected(model, pixels).float()
    embeddings = model.get_input_embeddings().weight
    something = patches[:, 0] > 0
    weight = torch.where(something, 1.0, BACKGROUND_WEIGHT)
    # As long as words, or what patches say would drown what words do.
    total, shown = 0.01 * (features.norm(dim=-1) - embeddings.norm(dim=-1).mean()).square().mean(), {}
    for (group, words), labels in zip(SAID.items(), patches.unbind(1), strict=True):
        rows = embeddings[[VOCABULARY[word] for word in (PAD, *words)]]
        logits = features @ rows.T * embeddings.shape[-1] ** -0.5
        each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        total = total + (each * weight).sum() / weight.sum()
        shown[f"patch {group}"] = ((logits.argmax(-1) == labels) & something).sum().item() / something.sum().item()
    return total, shown


def projected(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The visual tokens [B, patches, C] of pictures."""
    tokens = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return model.model.multi_modal_projector(tokens)


@dataclass(frozen=True)
class Packed:
    """pixels [B, 3, H, W]; ids, positions and targets [B, L], a target -100 where there is none; seen [B, 1, L, L], added to scores."""

    pixels: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    seen: torch.Tensor


def packed(recipe: Recipe, step: int) -> Packed:
    scenes = [scene("train", recipe.seed * SCENES_OF_A_STAGE + step * recipe.batch + number) for number in range(recipe.batch)]
    rows = []
    for shown in scenes:
        ids, positions, targets, block = (
            [VOCABULARY[BEGIN]] + [VOCABULARY[IMAGE]] * VISUAL,
            list(range(PROMPT)),
            [-100] * PROMPT,
            [0] * PROMPT,
        )
        asked = questions(shown, QUESTIONS)
        said = [(statement.words, statement.told) for statement in statements(shown, asked)]
        said += [((*question.text.split(), question.answer, END), len(question.text.split())) for question in asked]
        for number, (text, told) in enumerate(said, 1):
            words = [VOCABULARY[word] for word in text]
            ids += words[:-1]
            targets += [-100] * (told - 1) + words[told:]
            positions += range(PROMPT, PROMPT + len(words) - 1)
            block += [number] * (len(words) - 1)
        rows.append((ids, positions, targets, block))
    longest = max(len(row[0]) for row in rows)
    fill = (VOCABULARY[PAD], 0, -100, -1)
    ids, positions, targets, block = (
        torch.tensor([row[which] + [fill[which]] * (longest - len(row[which])) for row in rows]) for which in range(4)
    )
    own = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    seen = torch.where(own & torch.ones(longest, longest, dtype=torch.bool).tril(), 0.0, torch.finfo(torch.bfloat16).min)
    return Packed(pixel_values([render(one).image for one in scenes]), ids, positions, targets, seen[:, None].to(torch.bfloat16))


def loss(model: nn.Module, given: Packed) -> tuple[torch.Tensor, dict[str, float]]:
    features = projected(model, given.pixels)
    words = model.get_input_embeddings()(given.ids[:, PROMPT:])
    begin = model.get_input_embeddings()(given.ids[:, :1])
    stream = torch.cat([begin, features.to(words.dtype), words], 1)
    hidden = model.model.language_model(
        inputs_embeds=stream, attention_mask=given.seen, position_ids=given.positions, use_cache=False
    ).last_hidden_state
    wanted = given.targets != -100
    logits, targets = model.lm_head(hidden[wanted]).float(), given.targets[wanted]
    right = logits.argmax(-1) == targets
    ends = targets == VOCABULARY[END]
    answers = ends.roll(-1)
    shown = {"answers": right[answers].float().mean().item(), "statements": right[~answers & ~ends].float().mean().item()}
    return functional.cross_entropy(logits, targets), shown


def main() -> None:
    torch.set_num_threads(1)  # the order of sums, and so every figure, depends on the number of threads
    torch.manual_seed(ANSWERS.seed)
    model = llava()
    tower, words = model.model.vision_tower, model.get_input_embeddings()
    loaded = tower.load_state_dict(trained_tower(), strict=False)
    assert all(name.startswith("pooler.") for name in loaded.missing_keys), loaded
    use_map(model)
    tower.requires_grad_(False)
    words.requires_grad_(False)
    train(model, ALIGNMENT, lambda step: aligned(ALIGNMENT, step), alignment_loss, "llava_alignment")
    words.requires_grad_(True)
    train(model, ANSWERS, lambda step: packed(ANSWERS, step), loss, "llava_answers")
    tower.requires_grad_(True)
    tower.pooler.requires_grad_(False)
    train(model, TOGETHER, lambda step: packed(TOGETHER, step), loss, "llava")
    stages = {"llava_alignment": ALIGNMENT, "llava_answers": ANSWERS, "llava": TOGETHER}
    told = {
        "title": "Answers to questions about scenes",
        "what": f"`LlavaForConditionalGeneration`: the classifier's ViT ({VISUAL} visual tokens) and a LLaMA of 8 layers. A prompt is one "
        "question, `<image> is there a red circle?`, answered by one word.",
        "command": "python -m examples.zoo.train_llava",
    }
    publish("llava", model, stages, {**told, "figures": "to be measured"}, SIZE, "ViTImageProcessor")
    save_processor(WEIGHTS / "llava")
    measured = figures({"questions": answering, "existence": existence}, WEIGHTS / "llava", 2000)
    publish("llava", model, stages, {**told, "figures": measured}, SIZE, "ViTImageProcessor")


if __name__ == "__main__":
    main()
