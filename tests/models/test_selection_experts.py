"""Tokens leave a language model whose MLPs are mixtures of experts: those that are left alone are routed, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from rewrite import cached_tokens, rewrite
from rewrite.tokens.routed import routed_regions
from tests.models.architectures import IMAGE_TOKEN, llava, llava_inputs, rewritten, same_gradients
from tests.models.oracles import Survivors, attention_replaced_by, visual_masked_from
from tests.models.test_llava import GREEDY, visual_of
from tests.models.test_selection import TEXT, last_query_keeps, same_on_what_is_left

SHARED = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip


def mixture(kind: str) -> nn.Module:
    """`llava` with a language model of four experts to a layer, of which each token has two, or one."""
    import transformers

    text = {
        "mixtral": lambda: transformers.MixtralConfig(**SHARED, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
        "qwen3": lambda: transformers.Qwen3MoeConfig(
            **SHARED, intermediate_size=96, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=48, head_dim=16
        ),
    }[kind]()
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=llava("sdpa").config.vision_config, image_token_id=IMAGE_TOKEN, image_seq_length=16,
        initializer_range=0.15,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_tokens_that_left_are_not_routed(kind: str) -> None:
    """Logits, caches and greedy decoding are the original's with what left masked; the experts' products shrink with the tokens."""
    inputs = llava_inputs()
    visual = visual_of(inputs)
    changed = rewritten(mixture(kind), ["fastv(layer=2, drop=0.5)"], inputs)
    oracle = Survivors(TEXT, behind={1: last_query_keeps(visual, 8)})
    with torch.no_grad(), attention_replaced_by(oracle):
        expected = mixture(kind)(**inputs)
    with torch.no_grad():
        actual = changed(**inputs)
    same_on_what_is_left(actual, expected, oracle, inputs["attention_mask"].bool())
    assert cached_tokens(actual.past_key_values) == [30, 30, 22, 22]
    with attention_replaced_by(Survivors(TEXT, behind={1: last_query_keeps(visual, 8)})):
        words = mixture(kind).generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **GREEDY), words)
    before, after = changed.rewrite_report.total_before, changed.rewrite_report.total_after
    # Half of the layers work on 22 of 30 tokens: all of their products, not the attention's alone.
    dense = rewritten(llava("sdpa"), ["fastv(layer=2, drop=0.5)"], inputs).rewrite_report
    assert after.multiply_adds / before.multiply_adds == pytest.approx(
        dense.total_after.multiply_adds / dense.total_before.multiply_adds, abs=0.03
    )


def test_other_lengths_and_batches_than_it_was_rewritten_with() -> None:
    changed = rewritten(mixture("mixtral"), ["token_exit(layer=2)"], llava_inputs())
    for batch, length in ((3, 17), (2, 11), (1, 12)):
        inputs = llava_inputs(batch=batch, text=length)
        visual = visual_of(inputs)
        with torch.no_grad(), visual_masked_from(model := mixture("mixtral"), 2, visual):
            expected = model(**inputs).logits
        with torch.no_grad():
            actual = changed(**inputs).logits
        left = ~visual & inputs["attention_mask"].bool()
        assert (actual - expected)[left].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected[left].abs().max()


def test_gradients_of_experts() -> None:
    model, inputs = mixture("mixtral").train(), llava_inputs()
    visual = visual_of(inputs)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    labels[:, 1:][visual[:, :-1] | (inputs["attention_mask"][:, :-1] == 0)] = -100
    changed = rewrite(mixture("mixtral").train(), ["fastv(layer=2, drop=0.5)"], example_inputs={**inputs, "labels": labels})
    loss = changed(**inputs, labels=labels).loss
    loss.backward()
    with attention_replaced_by(Survivors(TEXT, behind={1: last_query_keeps(visual, 8)})):
        expected = model(**inputs, labels=labels).loss
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same_gradients(changed, model)


def routed(x: torch.Tensor, weights: torch.Tensor, leak: str) -> torch.Tensor:
    """One expert a token, its rows sorted and put back. They leak into each other by the mean, or where an expert is full."""
    ids = (x @ weights[0]).topk(1, -1).indices.reshape(-1)
    order = torch.sort(ids).indices
    rows = x[order]
    made = rows @ weights[1] * (ids[order] + 1)[:, None]
    if leak == "mean":
        made = made - made.mean(0, keepdim=True)
    if leak == "capacity":
        before = (ids[order][:, None] == ids[order]).tril(-1).sum(1)
        made = made * (before < 9)[:, None]
    return made[torch.argsort(order)].view(x.shape[0], 1, -1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", ["", "mean", "capacity"])
def test_a_region_is_one_whose_tokens_are_independent(leak: str, dtype: torch.dtype) -> None:
    """It is tried out: what computes over the tokens on the way is no region, however it looks."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(module)
        return module

    x, weights = torch.randn(10, 6, dtype=dtype), nn.Parameter(torch.randn(2, 6, 6, dtype=dtype))
    torch._dynamo.reset()
    torch.compile(routed, backend=backend, dynamic=False)(x, weights, leak)
    (graph,) = graphs
    found = routed_regions(graph.graph)
    assert [region.tokens for region in found] == ([] if leak else [10])
