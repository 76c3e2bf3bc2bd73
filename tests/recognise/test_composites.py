"""Composite attention calls: taken apart into what they are made of, proved, and read; or left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import codegen  # noqa: F401  registers the attention operator that a lowered site calls
from rewrite.engine import copy_graph
from rewrite.lower.lowering import lower_site
from rewrite.recognise import composites
from rewrite.recognise.composites import expand_composites
from rewrite.recognise.functional import forwarded_writes
from rewrite.recognise.operators import canonical
from rewrite.recognise.sites import Recognition, recognise

B, N, M, C, H = 2, 6, 5, 16, 4


@dataclass
class Expanding:
    """A torch.compile backend that expands composites, recognises, and runs the graph with every site lowered as it was read."""

    lower: bool = True
    proofs: dict[str, str | None] = field(default_factory=dict)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    recognitions: list[Recognition] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        copied = copy_graph(module)
        forwarded_writes(copied.graph)
        self.left += [reason for _, reason in expand_composites(copied.graph, self.proofs)]
        copied.graph.lint()
        placeholders = [node for node in copied.graph.nodes if node.op == "placeholder"]
        recognition = recognise(copied.graph, dict(zip(placeholders, example_inputs, strict=True)))
        self.recognitions.append(recognition)
        self.graphs.append(copied)
        if self.lower:
            for entry in recognition.found:
                if not entry.region.map_readers:
                    lower_site(copied.graph, entry.site, entry.region, {})
        copied.graph.eliminate_dead_code()
        copied.graph.lint()
        copied.recompile()
        return copied.forward


def run(model: nn.Module, *inputs: Any, grad: bool = False, dynamic: bool = False, lower: bool = True) -> tuple[Any, Expanding]:
    backend = Expanding(lower)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        return torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs), backend


class Call(nn.Module):
    """A module called with the given options."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any] = lambda inner, *inputs: inner(*inputs)) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.inner, *inputs)


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(C, H, **({"batch_first": True} | options))


def itself(**options: Any) -> Callable[..., Any]:
    """Self-attention; tensors among the options are given as they are."""
    return lambda inner, x: inner(x, x, x, **options)


def directly(**options: Any) -> Callable[..., Any]:
    """The function that `nn.MultiheadAttention` calls, without what the module does first."""
    return lambda inner, x: functional.multi_head_attention_forward(
        x, x, x, C, H, inner.in_proj_weight, inner.in_proj_bias, None, None, False, 0.0,
        inner.out_proj.weight, inner.out_proj.bias, need_weights=False, **options,
    )[0]  # fmt: skip


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, N, C)))


later = torch.ones(N, N, dtype=torch.bool).triu(1)
padded = torch.arange(N) >= torch.tensor([[N], [N - 2]])
per_head = (torch.rand(B * H, N, N) < 0.3) & (torch.arange(N) > 0)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (x(),)
    keys: int = N
    text: str = ""

    def __str__(self) -> str:
        return self.name


def mha(
    name: str, call: Callable[..., Any], text: str = "", keys: int = N, inputs: Callable[[], Any] = lambda: (x(),), **options: Any
) -> Case:
    return Case(name, lambda: Call(attention(**options), call), inputs, keys, text)


QUIET = [
    mha("plain", itself(need_weights=False), "softmax(0.5*qk)"),
    mha("weights_unread", lambda inner, x: inner(x, x, x)[0], "softmax(0.5*qk)"),
    mha("sequence_first", itself(need_weights=False), batch_first=False, inputs=lambda: (x(N, B, C),)),
    mha("no_bias", itself(need_weights=False), bias=False),
    mha("unbatched", itself(need_weights=False), inputs=lambda: (x(N, C),)),
    mha("cross", lambda inner, q, k, v: inner(q, k, v, need_weights=False), keys=M, inputs=lambda: (x(), x(B, M, C), x(B, M, C))),
    mha("cross_same_key_value", lambda inner, q, k: inner(q, k, k, need_weights=False), keys=M, inputs=lambda: (x(), x(B, M, C))),
    mha(
        "other_widths",
        lambda inner, q, k, v: inner(q, k, v, need_weights=False),
        keys=M,
        inputs=lambda: (x(), x(B, M, 8), x(B, M, 12)),
        kdim=8,
        vdim=12,
    ),
    mha("bool_mask", itself(need_weights=False, attn_mask=later), "where="),
    mha("float_mask", itself(need_weights=False, attn_mask=torch.randn(N, N)), "bias0[i, j]"),
    mha("mask_per_head", itself(need_weights=False, attn_mask=per_head), "[b, h, i, j]"),
    mha("unbatched_mask_per_head", itself(need_weights=False, attn_mask=per_head[:H]), inputs=lambda: (x(N, C),)),
    mha("padding", itself(need_weights=False, key_padding_mask=padded), "where="),
    mha("float_padding", itself(need_weights=False, key_padding_mask=torch.randn(B, N)), "bias0[b, j]"),
    mha("mask_and_padding", itself(need_weights=False, attn_mask=later, key_padding_mask=padded), "where="),
    mha(
        "float_mask_bool_padding",
        directly(attn_mask=torch.randn(N, N), key_padding_mask=padded),
        batch_first=False,
        inputs=lambda: (x(N, B, C),),
    ),
    mha("causal_hint", itself(need_weights=False, attn_mask=later, is_causal=True), "where=j <= i"),
    mha("causal_hint_and_padding", itself(need_weights=False, attn_mask=later, is_causal=True, key_padding_mask=padded)),
    mha("bias_k", itself(need_weights=False), keys=N + 1, add_bias_kv=True),
    mha("bias_k_and_masks", itself(need_weights=False, attn_mask=later, key_padding_mask=padded), keys=N + 1, add_bias_kv=True),
    mha("zero_key", itself(need_weights=False), keys=N + 1, add_zero_attn=True),
    mha(
        "both_and_masks",
        itself(attn_mask=later, key_padding_mask=padded, need_weights=False),
        keys=N + 2,
        add_zero_attn=True,
        add_bias_kv=True,
    ),
]


def same(actual: Any, expected: Any) -> None:
    """Equal but for the order in which sums are rounded."""
    torch.testing.assert_close(actual, expected, rtol=64 * 1.2e-7, atol=(64 + C + N) * 1.2e-7)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", QUIET, ids=str)
def test_every_option_is_expanded_and_read(case: Case, dynamic: bool) -> None:
    model, inputs = case.make().eval(), case.inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, backend = run(model, *inputs, dynamic=dynamic)
    same(actual, expected)
    assert backend.left == []
    assert list(backend.proofs.values()) == [None]
    (recognition,) = backend.recognitions
    assert [miss.reason for miss in recognition.misses] == []
    (found,) = recognition.found
    assert found.site.name == ("" if case.name == "float_mask_bool_padding" else "inner")
    assert found.site.dims["H"] == H
    assert found.site.dims["Nk"] == case.keys
    assert case.text in str(found.site.body.operations[0])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("padding", [None, padded])
def test_weights_that_are_read_are_written_out(average: bool, batched: bool, padding: Tensor | None) -> None:
    options: dict[str, Any] = {"average_attn_weights": average, "attn_mask": later}
    if padding is not None:
        options["key_padding_mask"] = padding if batched else padding[1]
    model, given = Call(attention(), itself(**options)).eval(), x() if batched else x(N, C)
    with torch.no_grad():
        expected = model(given)
    actual, backend = run(model, given)
    same(actual, expected)
    assert backend.left == []
    (recognition,) = backend.recognitions
    assert "softmax" in [canonical(node) for node in backend.graphs[0].graph.nodes]
    (found,) = recognition.found
    assert found.site.map_read


def test_static_keys_and_values() -> None:
    def call(inner: nn.MultiheadAttention, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return directly(static_k=key, static_v=value)(inner, x)

    model, inputs = Call(attention(), call).eval(), (x(N, B, C), x(B * H, M, C // H), x(B * H, M, C // H))
    with torch.no_grad():
        expected = model(*inputs)
    actual, backend = run(model, *inputs)
    same(actual, expected)
    assert backend.left == []
    assert backend.recognitions[0].found[0].site.dims["Nk"] == M


def test_dropout_in_training_stays() -> None:
    model = Call(attention(dropout=0.25), itself(need_weights=False)).train()
    _, backend = run(model, x(), grad=True)
    assert backend.left == []
    assert backend.recognitions[0].found[0].site.dropout == 0.25
    model = Call(attention(dropout=0.25), itself()).train()
    actual, backend = run(model, x(), grad=True, lower=False)
    assert backend.left == []
    assert "dropout" in [canonical(node) for node in backend.graphs[0].graph.nodes]
    assert actual[1].shape == (B, N, N)


def test_gradients_pass() -> None:
    model, given = Call(attention(), itself(need_weights=False)).train(), x()
    model(given)[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    actual, backend = run(model, given, grad=True)
    actual[0].square().sum().backward()
    assert backend.left == []
    for name, parameter in model.named_parameters():
        same(parameter.grad, expected[name])


symbolic_sizes = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="Dynamo traces aten._transformer_encoder_layer_fwd under symbolic sizes from 2.12 on"
)
LAYERS = {
    "after": {},
    "first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "eps": {"layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize(
    ("options", "dynamic"),
    [*((options, False) for options in LAYERS.values()), pytest.param(LAYERS["after"], True, marks=symbolic_sizes)],
    ids=[*LAYERS, "dynamic"],
)
def test_encoder_layers(options: dict[str, Any], masks: str, dynamic: bool) -> None:
    given: dict[str, Any] = {}
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = padded
    if masks in ("causal", "both"):
        given["src_mask"] = later
    layer = nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True, **options)
    model, tokens = Call(layer, lambda inner, x: inner(x, **given)).eval(), x()
    expected = model(tokens).detach()
    actual, backend = run(model, tokens, dynamic=dynamic)
    same(actual, expected)
    assert backend.left == []
    (found,) = backend.recognitions[0].found
    # The name that the site has in training, where the call is another one.
    assert found.site.name == "inner.self_attn"
    assert ("where=" in str(found.site.body.operations[0])) is (masks != "none")
    _, training = run(model.train(), tokens, grad=True)
    assert [entry.site.name for entry in training.recognitions[0].found] == ["inner.self_attn"]


def test_equal_layers_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[fx.Node] = []
    prove = composites._prove
    monkeypatch.setattr(composites, "_prove", lambda node, *rest: proved.append(node) or prove(node, *rest))
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True), 3, enable_nested_tensor=False).eval()
    given = x()
    with torch.no_grad():
        expected = model(given)
    actual, backend = run(model, given)
    same(actual, expected)
    assert len(proved) == 1
    assert [entry.site.name for entry in backend.recognitions[0].found] == [f"layers.{place}.self_attn" for place in range(3)]
    assert [entry.site.layer for entry in backend.recognitions[0].found] == [0, 1, 2]


def native(inner: nn.MultiheadAttention, given: Tensor, mask: Tensor | None, kind: int | None, weights: bool, average: bool = True) -> Any:
    return torch._native_multi_head_attention(
        given, given, given, C, H, inner.in_proj_weight, inner.in_proj_bias, inner.out_proj.weight, inner.out_proj.bias,
        mask, weights, average, kind,
    )  # fmt: skip


@pytest.mark.parametrize(("mask", "kind"), [(None, None), (later, 0), (padded, 1), (per_head.view(B, H, N, N), 2), (later.float(), 0)])
@pytest.mark.parametrize("weights", ["unread", "averaged", "per head"])
def test_native_attention(mask: Tensor | None, kind: int | None, weights: str) -> None:
    def call(inner: nn.MultiheadAttention, given: Tensor) -> Any:
        results = native(inner, given, mask, kind, weights != "unread", weights == "averaged")
        return results[0] if weights == "unread" else results

    model, given = Call(attention(), call).eval(), x()
    with torch.no_grad():
        expected = model(given)
    actual, backend = run(model, given)
    same(actual, expected)
    assert backend.left == []
    assert len(backend.recognitions[0].found) == 1


def test_unknown_mask_is_left_alone_with_the_reason() -> None:
    model, given = Call(attention(), lambda inner, given: native(inner, given, later, None, False)[0]).eval(), x()
    kept: list[str] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        copied = copy_graph(module)
        before = str(copied.graph)
        kept.extend(reason for _, reason in expand_composites(copied.graph, {}))
        assert str(copied.graph) == before
        return lambda *arguments: (torch.zeros(B, N, C),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(given)
    (reason,) = kept
    assert "a kind that is not known" in reason


def test_a_form_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "gelu", lambda hidden: hidden * 1.0001)
    layer = nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True, activation="gelu").eval()
    monkeypatch.setattr(layer, "activation_relu_or_gelu", 2)
    given = x()
    with torch.no_grad():
        expected = layer(given)
    actual, backend = run(layer, given)
    same(actual, expected)
    (reason,) = backend.left
    assert "was not confirmed: the call and its operators differ by" in reason
    assert "_transformer_encoder_layer_fwd" in [getattr(node.target, "__name__", "") for node in backend.graphs[0].graph.nodes]
