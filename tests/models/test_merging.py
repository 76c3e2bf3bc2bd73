"""Token merging on whole models, against the method written out on the models' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rewrite import NotApplicableError, PassError, parse_pass, rewrite
from rewrite.engine import Known, Rewriter
from rewrite.report import site_costs
from tests.models.architectures import BY_NAME, IMAGE_TOKEN, llava, llava_inputs, rewritten, same_gradients

EPS = torch.finfo(torch.float32).eps


class Tokens:
    """One picture's tokens, each with its size and the places of the patches that it stands for, in the published order."""

    def __init__(self, count: int, prefix: int) -> None:
        self.prefix, self.sizes, self.members = prefix, [1] * count, [[place] for place in range(count)]

    def merge(self, x: torch.Tensor, key: torch.Tensor, r: int) -> torch.Tensor:
        """x [N, C] after the r most alike pairs by key [H, N, D] were merged, pair by pair."""
        metric = key.detach().mean(0)
        count = len(x)
        pairs = []
        for a in range(0, count, 2):
            others = [b for b in range(1, count, 2) if b >= self.prefix]
            if a >= self.prefix:
                alike = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in others]
                pairs.append((max(alike), a, others[alike.index(max(alike))]))
        pairs = sorted(pairs, reverse=True)[: min(r, (count - self.prefix) // 2)]
        into = {a: b for _, a, b in pairs}
        order = [a for a in range(0, count, 2) if a not in into] + list(range(1, count, 2))
        order.sort(key=lambda place: place >= self.prefix)
        rows, sizes, members = [], [], []
        for place in order:
            together = [place, *(a for a, b in into.items() if b == place)]
            total = sum(self.sizes[each] for each in together)
            rows.append(sum(self.sizes[each] * x[each] for each in together) / total)
            sizes.append(total)
            members.append([patch for each in together for patch in self.members[each]])
        self.sizes, self.members = sizes, members
        return torch.stack(rows)

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """Each patch's place holds the token that it went into."""
        holder = {patch: row for row, patches in enumerate(self.members) for patch in patches}
        return torch.stack([x[holder[place]] for place in range(len(holder))])


def attended(tokens: Tokens, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, proportional: bool) -> torch.Tensor:
    """q, k, v [H, N, D] -> [N, H * D]."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if proportional:
        logits = logits + torch.tensor(tokens.sizes, dtype=logits.dtype).log()
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm layer, whichever library it is from."""

    first_norm: Callable[[torch.Tensor], torch.Tensor]
    projected: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]  # [N, C] -> q, k, v [H, N, D]
    out: Callable[[torch.Tensor], torch.Tensor]
    second_norm: Callable[[torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.Tensor], torch.Tensor]


def timm_layer(block: Any) -> Layer:
    def projected(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)  # type: ignore[no-any-return]

    return Layer(block.norm1, projected, block.attn.proj, block.norm2, block.mlp)


def transformers_layer(layer: Any) -> Layer:
    inner = layer.attention

    def projected(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = inner.num_attention_heads
        return tuple(one(x).unflatten(-1, (heads, -1)).transpose(0, 1) for one in (inner.q_proj, inner.k_proj, inner.v_proj))

    return Layer(layer.layernorm_before, projected, inner.o_proj, layer.layernorm_after, layer.mlp)


def by_hand(layers: list[Layer], embedded: torch.Tensor, prefix: int, r: int, proportional: bool = True) -> torch.Tensor:
    """What leaves the layers, one picture at a time, each patch's place holding the token that it went into."""
    rows = []
    for picture in embedded:
        tokens, x = Tokens(len(picture), prefix), picture
        for layer in layers:
            q, k, v = layer.projected(layer.first_norm(x))
            x = x + layer.out(attended(tokens, q, k, v, proportional))
            x = tokens.merge(x, k, r)
            x = x + layer.mlp(layer.second_norm(x))
        rows.append(tokens.restored(x))
    return torch.stack(rows)


def timm_by_hand(model: Any, images: torch.Tensor, r: int, proportional: bool = True) -> torch.Tensor:
    layers = [timm_layer(block) for block in model.blocks]
    x = by_hand(layers, model._pos_embed(model.patch_embed(images)), model.num_prefix_tokens, r, proportional)
    return model.forward_head(model.norm(x))  # type: ignore[no-any-return]


# 80 of 197 tokens in each of three layers: the last merges the half of those that are left, fewer.
@pytest.mark.parametrize(("r", "proportional"), [(80, True), (13, False)])
def test_a_timm_model_and_its_gradients(r: int, proportional: bool) -> None:
    architecture = BY_NAME["timm-vit-b-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    expected = timm_by_hand(model, inputs["x"], r, proportional)
    expected.square().sum().backward()
    changed = rewrite(architecture.build("sdpa"), [f"merge(r={r}, proportional={proportional})"], example_inputs=inputs)
    actual = changed(**inputs)
    actual.square().sum().backward()
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    same_gradients(changed, model)
    with torch.no_grad():
        other = timm_by_hand(model, inputs["x"], r, not proportional)
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_results_hold_what_their_tokens_went_into(implementation: str) -> None:
    architecture = BY_NAME["vit-b-224"]
    model, inputs = architecture.build("sdpa").vit, architecture.inputs()
    changed = rewritten(architecture.build(implementation).vit, ["merge(r=25, layers=(0, 1, 2))"], inputs)
    with torch.no_grad():
        layers = [transformers_layer(layer) for layer in model.layers]
        expected = model.layernorm(by_hand(layers, model.embeddings(inputs["pixel_values"]), 1, 25))
        actual = changed(**inputs).last_hidden_state
    assert actual.shape == (2, 197, 768)
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    assert len(torch.unique(actual[0], dim=0)) == 197 - 75


def test_no_token_beside_cls_is_merged() -> None:
    """A distillation token stands at an odd place, into which no other token may go."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=3).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = timm_by_hand(model, x, 40)
        actual = rewritten(copy.deepcopy(model), ["merge(r=40)"], {"x": x})(x)
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()


def test_the_published_multiply_adds() -> None:
    """Bolya et al. 2023, table 4: DeiT-S with r=13 is 2.7 G of 4.6."""
    architecture = BY_NAME["timm-deit-s-224"]
    captured: list[tuple[torch.fx.GraphModule, Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        captured.append((module, inputs))
        return module.forward

    with torch.no_grad():
        torch.compile(architecture.build("sdpa"), backend=backend, fullgraph=True)(architecture.inputs()["x"][:1])
        ((module, inputs),) = captured
        record = Rewriter((parse_pass("merge"),), proofs={}).rewrite(module, inputs, Known()).record
    # What passes made of a site is counted by site, and the rest of the model by its graph.
    sites = [site for site in record.program.sites if site.name in record.lowered]
    made = sum(site_costs(record.recognition.by_name(site.name), site, record)[1].multiply_adds for site in sites)
    assert (round(record.before.multiply_adds / 1e9, 1), round((record.after.multiply_adds + made) / 1e9, 1)) == (4.6, 2.7)
    assert [record.gone.get(site.name, 0) for site in record.program.sites] == [13 * layer for layer in range(12)]


def test_in_a_vision_tower_each_visual_token_is_what_its_patch_went_into() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    changed = rewritten(llava("sdpa"), ["merge(r=3, layers=(0, 1))"], inputs)
    tower, visual = model.model.vision_tower, inputs["input_ids"] == IMAGE_TOKEN

    def layer(block: Any) -> Layer:
        inner = block.self_attn

        def projected(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(one(x).unflatten(-1, (inner.num_heads, -1)).transpose(0, 1) for one in (inner.q_proj, inner.k_proj, inner.v_proj))

        return Layer(block.layer_norm1, projected, inner.out_proj, block.layer_norm2, block.mlp)

    with torch.no_grad():
        layers = [layer(block) for block in tower.encoder.layers[:2]]  # the features are what the second layer gives
        seen = by_hand(layers, tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"])), 1, 3)
        features = model.model.multi_modal_projector(seen[:, 1:])
        text = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(visual[..., None], features)
        expected = model(inputs_embeds=text, attention_mask=inputs["attention_mask"]).logits
        actual = changed(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= 1e3 * EPS * expected[real].abs().max()


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (["merge", "sigmoid"], "no place for the sizes of merged tokens"),
        (["merge", "evit"], "exclude each other"),
    ],
)
def test_what_does_not_go_together(passes: list[str], told: str) -> None:
    architecture = BY_NAME["timm-vit-b-224"]
    with pytest.raises((NotApplicableError, PassError), match=told):
        rewritten(architecture.build("sdpa"), passes, architecture.inputs())


def test_scores_of_merged_tokens_are_tempered_and_their_sizes_are_not() -> None:
    architecture = BY_NAME["timm-vit-b-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    changed = rewritten(architecture.build("sdpa"), ["temperature(value=2.0)", "merge"], inputs)
    with torch.no_grad():
        for block in model.blocks:
            width = block.attn.qkv.weight.shape[1]
            block.attn.qkv.weight[:width] /= 2
            block.attn.qkv.bias[:width] /= 2
        expected = timm_by_hand(model, inputs["x"], 13)
        actual = changed(**inputs)
    assert (actual - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
