"""Small real models, the graphs a compiler backend gets of them, and the oracle of a selection."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewrite.tokens.gather import kept_positions
from rewrite.tokens.surgery import Selection, insert_gather

with contextlib.suppress(RuntimeError):
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

IMAGE_TOKEN, VOCABULARY, LENGTH, VISUAL = 199, 200, 30, 16


@functools.cache
def vision_language_model(implementation: str) -> nn.Module:
    """A LLaVA of three decoder layers with grouped heads, of which the first call installed whatever the library installs."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, image_seq_length=VISUAL)
    config._attn_implementation = implementation
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        model(**inputs())
    return model  # type: ignore[no-any-return]


def inputs(padding: bool = True, batch: int = 2) -> dict[str, Tensor]:
    """A batch with the visual tokens at different places in each row, and left padding in the last."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 190, (batch, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, 5 + 2 * row : 5 + 2 * row + VISUAL] = IMAGE_TOKEN
    if padding:
        mask[-1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(batch, 3, 56, 56, generator=generator)}


# Dynamo before 2.12 cannot trace the model's masked_scatter with these settings; `rewrite()` then captures without them, in more graphs,
# which tests/models/test_llava.py runs.
whole_graphs = pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo traces the model in one graph from 2.12 on")


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], rewrite: Callable[[fx.GraphModule], None], dynamic: bool | None = None) -> Callable[..., Any]:
    """`function` compiled by a backend that rewrites each graph and runs it."""

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite(module)
        module.graph.lint()
        module.recompile()
        return module.forward

    return torch.compile(function, backend=backend, dynamic=dynamic)


def module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def residual_before(graph: fx.Graph, layer: int) -> fx.Node:
    """The residual stream that decoder layer `layer` reads."""
    inside = f"language_model.layers.{layer}"
    first = next(n for n in graph.nodes if n.op.startswith("call") and inside in module_of(n))
    return next(n for n in first.all_input_nodes if n.meta["example_value"].dim() == 3)


def drop_before(graph: fx.Graph, layer: int, mask: fx.Node, kept: int) -> tuple[fx.Node, Selection]:
    """Gather the tokens that `mask` does not mark at the input of a layer, for everything that reads it from there on."""
    stream = residual_before(graph, layer)
    with graph.inserting_after(mask):
        positions = graph.call_function(kept_positions, (mask, kept))
    selection = Selection(positions, stream.meta["example_value"].shape[1], kept)
    users = list(stream.users)
    short = insert_gather(graph, stream, 1, selection)
    for user in users:
        user.replace_input_with(stream, short)
    return short, selection


def cache_outputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """The graph's outputs that look like cache entries [B, heads, N, D]."""
    output = next(n for n in graph.nodes if n.op == "output")
    return frozenset(
        n for n in output.all_input_nodes if isinstance(n.meta.get("example_value"), Tensor) and n.meta["example_value"].dim() == 4
    )


@contextlib.contextmanager
def masked_from(model: Any, layer: int, dropped: Tensor) -> Iterator[None]:
    """The oracle: `dropped` [B, N] tokens are masked out of every attention of layers >= `layer`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask: Tensor = kwargs["attention_mask"]
        hide = torch.zeros(dropped.shape[0], 1, 1, mask.shape[-1], dtype=torch.bool)
        hide[..., : dropped.shape[1]] = dropped[:, None, None, :]
        value = mask & ~hide if mask.dtype == torch.bool else mask.masked_fill(hide, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": value}

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in list(model.model.language_model.layers)[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
