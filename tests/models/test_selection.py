"""Selections on whole models: what is computed is the original's, with the dropped tokens masked out of every later attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rewrite import cached_tokens, parse_pass, rewrite
from rewrite.engine import Known, Rewriter
from tests.models.architectures import BY_NAME, call, llava, llava_inputs, rewritten, same_gradients, two_pictures_a_row
from tests.models.oracles import Rule, Survivors, attention_replaced_by, best, cls_row
from tests.models.test_llava import GREEDY, visual_of

EPS = torch.finfo(torch.float32).eps


# Not in layer 0: the CLS token of an untrained model is zero, and looks at all patches alike.
@pytest.mark.parametrize(("name", "prefix", "implementation"), [("deit-s-384", 2, "eager"), ("clip-vision-224", 1, "sdpa")])
def test_patches_leave_an_encoder(name: str, prefix: int, implementation: str) -> None:
    architecture = BY_NAME[name]
    inputs = {entry: torch.cat([tensor, 1 - tensor.flip(-1)])[:2] for entry, tensor in architecture.inputs().items()}
    changed = rewritten(architecture.build(implementation), ["evit(keep=0.6, layers=(1, 2), fuse=False)"], inputs)
    oracle = Survivors(tuple(range(architecture.sites)), behind=dict.fromkeys((1, 2), cls_row(0.6, prefix)))
    with attention_replaced_by(oracle):
        expected = call(architecture.build("sdpa"), inputs)
    assert oracle.alive is not None
    assert not torch.equal(*oracle.alive)  # rows kept different tokens
    for actual, wanted in zip(call(changed, inputs), expected, strict=True):
        assert actual.shape == wanted.shape
        left = oracle.alive if actual.ndim == 3 else torch.ones(len(actual), dtype=torch.bool)
        assert (actual - wanted)[left].abs().max() <= 256 * architecture.sites * EPS * wanted[left].abs().max()


def by_hand(model: Any, x: torch.Tensor, keep: float, layers: tuple[int, ...]) -> torch.Tensor:
    """EViT as its equations say, on a timm vision transformer, one picture at a time."""
    x = model._pos_embed(model.patch_embed(x))
    for number, block in enumerate(model.blocks):
        (batch, tokens, width), heads = x.shape, block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        if number in layers:
            score, rows = weights[:, :, 0, 1:].mean(1), []
            for row in range(batch):
                stay = score[row].topk(math.ceil(keep * (tokens - 1))).indices
                leave = [place for place in range(tokens - 1) if place not in stay.tolist()]
                fused = (score[row, leave, None] * x[row, 1:][leave]).sum(0, keepdim=True)
                rows.append(torch.cat([x[row, :1], x[row, 1:][stay], fused]))
            x = torch.stack(rows)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def test_fused_tokens_and_gradients() -> None:
    """Gradients go through the tokens, and through the attention that weights the fused ones."""
    architecture = BY_NAME["timm-vit-b-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    expected = by_hand(model, inputs["x"], 0.5, (0, 1))
    expected.square().sum().backward()
    changed = rewrite(architecture.build("sdpa"), ["evit(keep=0.5, layers=(0, 1))"], example_inputs=inputs)
    actual = changed(**inputs)
    actual.square().sum().backward()
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    same_gradients(changed, model)


# Liang et al. 2022, README of the authors' code: DeiT-S with fusing.
PUBLISHED = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}


def test_the_published_multiply_adds() -> None:
    """One capture, rewritten for every setting."""
    architecture = BY_NAME["timm-deit-s-224"]
    picture = architecture.inputs()["x"][:1]
    captured: list[tuple[torch.fx.GraphModule, Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        captured.append((module, inputs))
        return module.forward

    with torch.no_grad():
        torch.compile(architecture.build("sdpa"), backend=backend, fullgraph=True)(picture)
        ((module, inputs),) = captured
        proofs: dict[str, str | None] = {}
        for keep, published in PUBLISHED.items():
            record = Rewriter((parse_pass(f"evit(keep={keep})"),), proofs=proofs).rewrite(module, inputs, Known()).record
            assert round(record.after.multiply_adds / 1e9, 1) == published


def last_query_keeps(visual: torch.Tensor, count: int) -> Rule:
    return lambda weights, alive: (alive & ~visual) | best(weights[:, :, -1].mean(1), alive & visual, count)


def pictures_keep(oracle: Survivors, layers: tuple[int, ...], visual: torch.Tensor, count: int) -> Rule:
    """The CLS rows of a vision tower's layers choose `count` of the 16 patches of every picture."""

    def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        score = sum(oracle.weights[layer][:, :, 0, 1:].mean(1) for layer in layers)
        chosen = best(score, torch.ones_like(score, dtype=torch.bool), count)
        return alive & ~visual.masked_scatter(visual, ~chosen)

    return rule


def spread_keeps(model: Any, visual: torch.Tensor, count: int) -> Rule:
    """Greedy k-centre over what enters the first layer, by its definition."""
    entered: list[torch.Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, given, named: entered.append((given or (named["hidden_states"],))[0]), with_kwargs=True)

    def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        left = alive & ~visual
        for row, tokens in enumerate(entered[0]):
            places = visual[row].nonzero().flatten().tolist()
            apart = {(a, b): 1 - float(torch.cosine_similarity(tokens[a], tokens[b], dim=0)) for a in places for b in places}
            chosen = [max(places, key=lambda a: min(apart[a, b] for b in places if b != a))]
            while len(chosen) < count:
                chosen.append(max((a for a in places if a not in chosen), key=lambda a: min(apart[a, b] for b in chosen)))
            left[row, chosen] = True
        return left

    return rule


def same_on_what_is_left(actual: Any, expected: Any, oracle: Survivors, real: torch.Tensor) -> None:
    assert oracle.alive is not None
    left = oracle.alive & real
    assert actual.logits.shape == expected.logits.shape
    assert (actual.logits - expected.logits)[left].abs().max() <= 1e3 * EPS * expected.logits[left].abs().max()
    assert torch.count_nonzero(actual.logits[~oracle.alive]) == 0
    assert cached_tokens(actual.past_key_values) == [int(oracle.seen[layer][0].sum()) for layer in range(4)]


# A LLaVA's first three attentions are its vision tower's; the features are what its second layer gives.
TEXT = (3, 4, 5, 6)


def test_by_picture_and_then_by_the_text_with_two_pictures_a_row() -> None:
    inputs = two_pictures_a_row()
    visual = visual_of(inputs)
    assert visual.sum(1).tolist() == [32, 32]
    changed = rewritten(llava("eager"), ["cls_prune(keep=0.5)", "fastv(layer=2, drop=0.6)"], inputs)
    oracle = Survivors(TEXT, behind={1: last_query_keeps(visual, round(0.4 * 16))})
    oracle.before[0] = pictures_keep(oracle, (1,), visual, 8)
    with torch.no_grad(), attention_replaced_by(oracle):
        expected = llava("sdpa")(**inputs)
    with torch.no_grad():
        same_on_what_is_left(changed(**inputs), expected, oracle, inputs["attention_mask"].bool())


def test_by_several_layers_of_the_tower_in_training() -> None:
    model, inputs = llava("sdpa").train(), llava_inputs()
    visual = visual_of(inputs)
    oracle = Survivors(TEXT)
    oracle.before[0] = pictures_keep(oracle, (0, 1), visual, 4)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    # What a visual token or padding predicts is nobody's answer: the tokens may have left.
    labels[:, 1:][visual[:, :-1] | (inputs["attention_mask"][:, :-1] == 0)] = -100
    changed = rewrite(llava("sdpa").train(), ["cls_ensemble"], example_inputs={**inputs, "labels": labels})
    loss = changed(**inputs, labels=labels).loss
    loss.backward()
    with attention_replaced_by(oracle):
        expected = model(**inputs, labels=labels).loss
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same_gradients(changed, model)


def test_in_stages_token_for_token_in_generate() -> None:
    """Three lengths of caches, all chosen in one prompt; a prompt without pictures is left alone."""
    model, inputs = llava("sdpa"), llava_inputs()
    visual, plain = visual_of(inputs), llava("sdpa")
    changed = rewritten(llava("sdpa"), ["diverse(keep=12)", "pyramid(layers=(1, 3))"], inputs)
    oracle = Survivors(TEXT, before={1: last_query_keeps(visual, 8), 3: last_query_keeps(visual, 4)})
    oracle.before[0] = spread_keeps(plain, visual, 12)
    with attention_replaced_by(oracle):
        expected = plain.generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY), expected)
    text_only = {name: inputs[name][:, -8:] for name in ("input_ids", "attention_mask")}
    assert torch.equal(changed.generate(**text_only, **GREEDY), model.generate(**text_only, **GREEDY))
