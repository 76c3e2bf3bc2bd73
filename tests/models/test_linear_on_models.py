"""Linear attention on real models: `generate()` with a KV cache and a training step, against the original with attention by reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rewrite import AttentionInputs, parse_pass, rewrite
from tests.models.architectures import images, same_gradients, timm_model
from tests.models.oracles import attention_replaced_by, by_reference, plain
from tests.models.test_passes_on_models import agrees, recognised_sites

CAUSAL = ("lightning(scale='site', layers=(0,))", "hedgehog(features=8, window=4, layers=(1,))")
VISION = (
    "enhanced_linear(layers=(0,))",
    "inline_attention(local=True, layers=(1,))",
    "rala(learnable=True, layers=(2,))",
    "hedgehog(features=8, layers=(3,))",  # the last: of its tokens only the class token is read, and convolutions leave that alone
)


def drawn(model: nn.Module) -> Callable[[Any], dict[str, torch.Tensor]]:
    """Sets what passes added to random values; gives, for a site, its own by name."""
    added = {name: parameter for name, parameter in model.named_parameters() if name.startswith("rewrite_added.")}
    generator = torch.Generator().manual_seed(5)
    for parameter in added.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    def of(site: Any) -> dict[str, torch.Tensor]:
        lead = f"rewrite_added.{site.name}."
        return {name.removeprefix(lead): parameter for name, parameter in added.items() if name.startswith(lead)}

    return of


def llama() -> nn.Module:
    """Two layers of the real architecture, four heads that share two key heads."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_language_model_generates_and_trains() -> None:
    """Left-padded rows, grouped heads, prompt and decoding with a KV cache."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) >= torch.tensor([[0], [3]])).long()}
    model, oracle = llama(), llama()
    sites = recognised_sites(oracle, inputs)
    changed = rewrite(model, list(CAUSAL), example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(text,) for text in CAUSAL]
    parameters = drawn(changed)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        site, shape = sites[number % 2], logits.shape[:3]
        if number >= 2 and shape[1] == 2:  # heads that share a key head lie on the axis of queries in a decoding step
            key, value = (operand.repeat_interleave(shape[2], dim=1) for operand in (key, value))
            query, logits = (operand.flatten(1, 2).unsqueeze(2) for operand in (query, logits))
        known = AttentionInputs(query, key, value, logits, site, parameters=parameters(site))
        return parse_pass(CAUSAL[site.layer]).reference(known).reshape(*shape, -1)

    with attention_replaced_by(function):
        expected = oracle(**inputs).logits
    expected.square().mean().backward()
    actual = changed(**inputs).logits
    real, largest = inputs["attention_mask"].bool(), expected.abs().max()
    assert (actual - expected)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * largest
    assert (actual - model(**inputs).logits)[real].abs().max() > 1e-3 * largest
    actual.square().mean().backward()
    same_gradients(changed, oracle)
    added = [parameter.grad for name, parameter in changed.named_parameters() if name.startswith("rewrite_added.")]
    assert len(added) == 3
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in added)
    with attention_replaced_by(function):
        tokens = oracle.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(changed.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_a_vision_transformer_computes_and_trains() -> None:
    """Each layer by another method, with a class token."""
    inputs, layers = images(96, name="x")(), len(VISION)
    options = {"depth": layers, "num_classes": 8, "embed_dim": 96, "num_heads": 3, "img_size": 96}
    model = timm_model("deit_tiny_patch16_224", **options)("sdpa")
    changed = rewrite(model, list(VISION), example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(text,) for text in VISION]
    # What the attention of each layer is given, in the original.
    given: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda _, arguments, layer=layer: given.update({layer: arguments[0]}))
    known = {"parameters": drawn(changed), "input": lambda site: given[site.layer]}
    sites = recognised_sites(timm_model("deit_tiny_patch16_224", **options)("sdpa"), inputs)
    by_layer = [by_reference(parse_pass(text), sites, **known) for text in VISION]

    def function(*operands: Any) -> torch.Tensor:
        return by_layer[operands[-1] % layers](*operands)

    with attention_replaced_by(function):
        expected = model(**inputs)
    actual = changed(**inputs)
    agrees([actual], [expected], layers)
    expected.square().mean().backward()
    actual.square().mean().backward()
    same_gradients(changed, model)
    added = {name: parameter.grad for name, parameter in changed.named_parameters() if name.startswith("rewrite_added.")}
    assert len(added) == 1 + 2 + 4 + 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in added.values())


def test_tokens_are_merged_and_taken_apart_again() -> None:
    """A transformer of patches alone, as diffusion models have them; its agents come from the residual stream that the graph shows."""
    inputs, text = images(96, name="x")(), "agent_sd(ratio=0.4, agent_ratio=0.7, seed=2)"
    options = {"depth": 2, "num_classes": 8, "embed_dim": 96, "num_heads": 3, "img_size": 96, "class_token": False, "global_pool": "avg"}
    model = timm_model("deit_tiny_patch16_224", **options)("sdpa")
    sites = recognised_sites(model, inputs)
    changed = rewrite(model, [text], example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(text,)] * 2
    streams: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, arguments, layer=layer: streams.update({layer: arguments[0]}))
    with attention_replaced_by(by_reference(parse_pass(text), sites, hidden=lambda site: streams[site.layer])):
        expected = model(**inputs)
    actual = changed(**inputs)
    agrees([actual], [expected], 2)
    assert (actual - model(**inputs)).abs().max() > 1e-3 * expected.abs().max()
    expected.square().mean().backward()
    actual.square().mean().backward()
    same_gradients(changed, model)


def test_agents_beside_spatially_reduced_keys() -> None:
    """Keys of the first two stages lie on a grid of their own; values are resized to the queries' before they are convolved."""
    inputs, text = images(64, name="x")(), "agent(tokens=(9, 4), learnable=True, stacks=(0, 1))"
    model = timm_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=8)("sdpa")
    sites = recognised_sites(model, inputs)
    assert [(site.kind, site.stack, site.layout.grid, site.layout.key_grid) for site in sites] == [
        ("self", 0, (16, 16), (2, 2)), ("self", 1, (8, 8), (2, 2)), ("self", 2, (4, 4), (2, 2)), ("self", 3, (2, 2), None)
    ]  # fmt: skip
    changed = rewrite(model, [text], example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(text,), (text,), (), ()]
    by_agents = by_reference(parse_pass(text), sites, parameters=drawn(changed))

    def function(*operands: Any) -> torch.Tensor:
        return (by_agents if operands[-1] % 4 < 2 else plain)(*operands)

    with attention_replaced_by(function):
        expected = model(**inputs)
    actual = changed(**inputs)
    agrees([actual], [expected], 4)
    expected.square().mean().backward()
    actual.square().mean().backward()
    same_gradients(changed, model)


def test_the_stages_of_a_hierarchical_model_are_stacks_and_agents_take_the_place_of_its_relative_positions() -> None:
    """Windows as wide as the first stage's map; the second stage keeps its shifted windows."""
    inputs, text = images(64, name="x")(), "agent(tokens=(9, 4), learnable=True, drop_bias=True, stacks=(0,))"
    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 8, "img_size": 64}
    model, wide = (timm_model("swin_tiny_patch4_window7_224", window_size=window, **options)("sdpa") for window in (4, 16))
    model.layers[0] = wide.layers[0]
    sites = recognised_sites(model, inputs)
    assert [(site.stack, site.layer, site.depth) for site in sites] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    changed = rewrite(model, [text], example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(text,), (text,), (), ()]
    by_agents = by_reference(parse_pass(text), sites, parameters=drawn(changed))

    def function(*operands: Any) -> torch.Tensor:
        return (by_agents if operands[-1] % 4 < 2 else plain)(*operands)

    with attention_replaced_by(function):
        expected = model(**inputs)
    actual = changed(**inputs)
    agrees([actual], [expected], 4)
    expected.square().mean().backward()
    actual.square().mean().backward()
    same_gradients(changed, model)
