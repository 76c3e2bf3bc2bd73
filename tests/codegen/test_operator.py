"""The registered operator: its contract with PyTorch, torch.compile, autocast, the FLOP counter."""

from __future__ import annotations

import attention_forms as forms
import pytest
import torch
from attention_forms import Shape, operands
from torch.utils.flop_counter import FlopCounterMode

from codegen import attend, visible_pairs
from codegen.operator import _attend_cuda
from rewrite.ir import NK, NQ, Attend, I, J, semantics

FORMS = {
    "plain": forms.plain(),
    "biased": forms.biased("hij"),
    "neighbourhood": forms.neighbourhood_2d(7, 7, 3, 1, 1),
    "grouped": forms.grouped(),
    "everything": forms.everything(),
}
SHAPE = Shape(n_queries=50, n_keys=50)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(form: str, gradient: bool) -> None:
    operation = FORMS[form]
    # In double, so that what differs in the last bits does not count: mixed heads multiply it.
    values = operands(operation, SHAPE, torch.float64)
    for value in values.values():
        value.requires_grad_(gradient and value.is_floating_point())
    tensors = [values[name] for name in operation.tensors()]
    found = torch.library.opcheck(torch.ops.rewrite.attend, (values["query"], values["key"], values["value"], tensors, operation.to_json()))
    assert set(found.values()) == {"SUCCESS"}


def test_without_a_triton_form_a_gpu_runs_the_torch_lowering() -> None:
    """What the CUDA implementation does, on tensors that are not there: it asks for no kernel."""
    operation = forms.talking_heads()
    values = operands(operation, SHAPE)
    given = (values["query"], values["key"], values["value"], [values[name] for name in operation.tensors()], operation.to_json())
    for found, wanted in zip(_attend_cuda(*given), torch.ops.rewrite.attend(*given), strict=True):
        assert torch.equal(found, wanted)


def test_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    operation = forms.grouped()
    torch._dynamo.reset()

    text, names = operation.to_json(), tuple(operation.tensors())

    def model(values: dict[str, torch.Tensor]) -> torch.Tensor:
        # As a rewritten graph calls it.
        tensors = [values[name] for name in names]
        return torch.ops.rewrite.attend(values["query"] * 2, values["key"], values["value"], tensors, text)[0].sin()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor")
    for shape in (SHAPE, Shape(n_queries=31, n_keys=45)):
        values = operands(operation, shape)
        values["query"].requires_grad_()
        eager, fused = model(values), compiled(values)
        wanted, found = (torch.autograd.grad(result.sum(), values["query"])[0] for result in (eager, fused))
        # The operator is the same call; what surrounds it is one multiplication and one sine.
        assert (eager - fused).abs().max() <= 4 * torch.finfo(torch.float32).eps
        assert (wanted - found).abs().max() <= 16 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_autocast_casts_query_key_and_value_alone() -> None:
    operation = forms.biased("hij")
    values = operands(operation, SHAPE)
    values["query"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(operation, values["query"], values["key"].bfloat16(), values["value"], values)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert values["query"].grad is not None
    assert values["query"].grad.dtype == torch.float32


@pytest.mark.parametrize("form", [*list(FORMS.values())[:4], forms.causal(), forms.masked("bij"), forms.neighbourhood_1d(50, 7, 2)])
def test_flops_are_those_of_the_visible_pairs(form: Attend) -> None:
    values = operands(form, SHAPE)
    for name in ("query", "key", "value"):
        values[name].requires_grad_()
    static = form.tensors().get("mask") is None
    seen = semantics.evaluate_expression(form.mask, semantics.positions(50, 50, torch.device("cpu"))) if static else True
    pairs = int(torch.as_tensor(seen).expand(1, 1, 50, 50).sum())
    assert visible_pairs(form.mask, 50, 50) == pairs
    with FlopCounterMode(display=False) as counter:
        attend(form, values["query"], values["key"], values["value"], values).sum().backward()
    forward = 2 * 2 * 4 * pairs * (16 + 16)
    found = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert found == {"rewrite.attend": forward, "rewrite.attend_backward": forward * 5 // 2}


def test_visible_pairs_of_a_causal_mask() -> None:
    assert visible_pairs(J <= I + (NK - NQ), 1000, 1000) == 1000 * 1001 // 2
    assert visible_pairs(J <= I + (NK - NQ), 3, 5) == 3 + 4 + 5
