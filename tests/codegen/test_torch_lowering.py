"""The torch lowering against the float64 reference: outputs, every gradient, memory."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import pytest
import sympy
import torch
from attention_forms import Shape, operands
from budget import expected, expected_lse, output_budget
from sympy.logic.boolalg import Boolean
from test_interpreter import ANY_SIZE, DTYPES, NEIGHBOURHOODS, NOT_STREAMED, STREAMED
from torch.utils._python_dispatch import TorchDispatchMode

from codegen import torch_streaming
from codegen.operator import attend, attend_op
from codegen.torch_backward import attend_gradients
from codegen.torch_streaming import Held, attend_forward, blockwise_visits, output_like
from rewrite.ir import Attend, I, J, RewriteError, semantics

FORMS: dict[str, tuple[Attend, Shape]] = {
    **{name: (build(), Shape()) for name, build in ANY_SIZE.items()},
    **{name: (form, Shape(n_queries=n, n_keys=n)) for name, (form, n) in NEIGHBOURHOODS.items()},
    "more queries than keys": (forms.causal(), Shape(n_queries=53, n_keys=37)),
    "as many queries as keys": (forms.causal(), Shape(n_queries=300, n_keys=300)),
    "padded": (forms.padded(), Shape(n_queries=43, n_keys=43)),
    "padded, with sinks": (replace(forms.padded(), sink=forms.sinks("h").sink), Shape(n_queries=43, n_keys=43)),
    "one token": (forms.causal(), Shape(1, 2, 1, 1, 1)),
    "one query": (forms.grouped(), Shape(n_queries=1)),
    "wide values": (forms.biased("hij"), Shape(value_dim=24)),
    "narrow values": (forms.plain(), Shape(head_dim=72, value_dim=8)),
}
# Beyond softmax attention.
UNUSUAL: dict[str, tuple[Attend, Shape]] = {name: (build(), Shape()) for name, build in {**STREAMED, **NOT_STREAMED}.items()}
UNUSUAL["guarded table, few keys"] = (forms.guarded_table(), Shape(n_keys=5))
ALL_FORMS = {**FORMS, **UNUSUAL}
with_and_without_broadcast = [(form, broadcast) for form in ALL_FORMS for broadcast in (False, True)]
forms_and_broadcast = pytest.mark.parametrize(("form", "broadcast"), with_and_without_broadcast)


def run(operation: Attend, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return attend(operation, values["query"], values["key"], values["value"], values)


@pytest.mark.parametrize("form", [*FORMS, *STREAMED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output(form: str, dtype: torch.dtype) -> None:
    operation, shape = ALL_FORMS[form]
    values = operands(operation, shape, dtype)
    out = run(operation, values)
    assert out.dtype == dtype
    assert ((out.double() - expected(operation, values)).abs() <= output_budget(operation, values, dtype)).all()


@pytest.mark.parametrize("form", UNUSUAL)
def test_unusual_output_in_double(form: str) -> None:
    operation, shape = UNUSUAL[form]
    values = operands(operation, shape, torch.float64)
    reference = expected(operation, values)
    # Sums of at most Nk products, of heads mixed twice, normalised twice.
    budget = torch.finfo(torch.float64).eps * 64 * shape.n_keys * max(1.0, float(reference.abs().max()))
    assert (run(operation, values) - reference).abs().max() <= budget


@pytest.mark.parametrize("form", ALL_FORMS)
def test_every_entry_is_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results start as NaN; a mask may leave queries without a visit."""
    monkeypatch.setattr(torch_streaming, "output_like", lambda *given: tuple(made.fill_(torch.nan) for made in output_like(*given)))
    operation, shape = ALL_FORMS[form]
    values = operands(operation, shape)
    named = {name: values[name] for name in operation.tensors()}
    out, lse = attend_forward(operation, values["query"], values["key"], values["value"], named)
    assert not out.isnan().any()
    assert not lse.isnan().any()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_log_sum_exp(form: str) -> None:
    operation, shape = ALL_FORMS[form]
    values = operands(operation, shape, torch.float64)
    tensors = [values[name] for name in operation.tensors()]
    lse = attend_op(values["query"], values["key"], values["value"], tensors, operation.to_json())[1]
    reference = expected_lse(operation, values)
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert ((lse - reference)[finite].abs() <= torch.finfo(torch.float32).eps * reference[finite].abs()).all()


@forms_and_broadcast
def test_gradients(form: str, broadcast: bool) -> None:
    operation, shape = ALL_FORMS[form]
    values = operands(operation, shape, torch.float64, broadcast=broadcast)
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    reference = semantics.attend(operation, values)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(reference, list(leaves.values()), received, allow_unused=True)
    found = torch.autograd.grad(run(operation, values), list(leaves.values()), received, allow_unused=True)
    # Each gradient is a sum of at most B H Nq (or Nk) D products of these magnitudes, and a few divisions by masses.
    largest = max(1.0, *(float(leaf.detach().abs().max()) for leaf in leaves.values()))
    terms = max(shape.n_queries, shape.n_keys) * max(shape.head_dim, shape.value_dim) * shape.batch * shape.heads
    budget = torch.finfo(torch.float64).eps * terms * largest**2 * float(received.abs().max())
    for name, left, right in zip(leaves, wanted, found, strict=True):
        assert right is not None, name
        assert (right - (0 if left is None else left)).abs().max() <= budget, name


@pytest.mark.parametrize("form", ALL_FORMS)
def test_gradients_have_the_operands_dtype(form: str) -> None:
    """Numbers in an expression are doubles, which must not decide what a block is computed in."""
    operation, shape = ALL_FORMS[form]
    values = operands(operation, shape, torch.bfloat16)
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    found = torch.autograd.grad(run(operation, values).sum(), list(leaves.values()), allow_unused=True)
    assert all(gradient is None or gradient.dtype == leaf.dtype for gradient, leaf in zip(found, leaves.values(), strict=True))


@pytest.mark.parametrize("operation", [forms.biased("hij"), forms.sinks("bhi"), forms.linear(), forms.talking_heads()])
def test_gradient_of_the_log_sum_exp(operation: Attend) -> None:
    values = operands(operation, Shape(), torch.float64)
    leaves = [value.requires_grad_() for name, value in values.items() if name in {"query", "key", "t", "bias", "before", "before_bias"}]
    tensors = [values[name] for name in operation.tensors()]
    lse = attend_op(values["query"], values["key"], values["value"], tensors, operation.to_json())[1]
    found = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0.0).sum(), leaves)
    reference = expected_lse(operation, values)
    wanted = torch.autograd.grad(reference.masked_fill(reference == -torch.inf, 0.0).sum(), leaves)
    for left, right in zip(found, wanted, strict=True):
        # lse is given in float32, and its gradient comes back so.
        assert (left - right).abs().max() <= torch.finfo(torch.float64).eps * 2**14 * max(1.0, float(right.abs().max()))


SPLIT = (forms.decomposed_position(), forms.sigmoid(), forms.grouped(), forms.grouped_by_head(), forms.talking_heads())


@pytest.mark.parametrize("operation", [*SPLIT, forms.rectified_or_scaled(), replace(forms.softcap(), mask=forms.masked("bhij").mask)])
def test_some_maps_at_a_time(operation: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on how many batch rows and heads are computed together."""
    values = operands(operation, Shape(batch=3, heads=4, key_heads=2), torch.float64)
    leaves = [value.requires_grad_() for value in values.values() if value.is_floating_point()]
    received = torch.randn(3, 4, 37, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for held, parts in ((torch_streaming.HELD, 1), (Held(2 * 16 * 53, 256, 1), 3 if operation.mixes else 6)):
        monkeypatch.setattr(torch_streaming, "HELD", held)
        visited = blockwise_visits(operation, values["query"], values["key"], values)
        assert len({str(visit.planes) for visit in visited}) == parts
        out = run(operation, values)
        found.append([out, *torch.autograd.grad(out, leaves, received, allow_unused=True)])
    for left, right in zip(*found, strict=True):
        assert left is right is None or (left - right).abs().max() <= 1e-12 * max(1.0, float(left.detach().abs().max()))


def test_gradients_are_finite_where_a_sum_is_zero() -> None:
    operation = forms.rectified()
    values = operands(operation, Shape(), torch.float64)
    values["query"].zero_()
    for name in ("query", "key", "value"):
        values[name].requires_grad_()
    out = run(operation, values)
    out.sum().backward()
    assert (out == 0).all()
    assert all((values[name].grad == 0).all() for name in ("query", "key", "value"))


def test_no_gradient_is_nan_where_a_group_has_no_keys() -> None:
    operation = forms.grouped()
    values = operands(operation, Shape(), torch.float64)
    values["member"].zero_()
    for name in ("query", "key", "value", "count"):
        values[name].requires_grad_()
    run(operation, values).sum().backward()
    assert all(values[name].grad.isfinite().all() for name in ("query", "key", "value", "count"))


@pytest.mark.parametrize("operation", [forms.neighbourhood_2d(6, 7, 3, 2, 1), forms.relative_table(), forms.everything()])
def test_backward_is_deterministic(operation: Attend) -> None:
    values = operands(operation, Shape(n_queries=43, n_keys=43))
    received = torch.ones(2, 4, 43, 16), torch.zeros(2, 4, 43)
    wanted = [name for name in operation.tensors() if values[name].is_floating_point()]
    runs = [attend_gradients(operation, received, (values["query"], values["key"], values["value"]), values, wanted) for _ in range(2)]
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // max(1, made.element_size()))
        return result


@pytest.mark.parametrize(
    "operation",
    [
        *(forms.plain(), forms.causal(), forms.neighbourhood_1d(2048, 65), forms.grouped(), forms.softcap()),
        *(forms.sinks("h"), forms.decomposed_position(64), forms.relative_table(), forms.linear(), forms.gated("h")),
        *(replace(forms.talking_heads(), score=forms.plain().score, mask=forms.causal().mask), forms.renormalised()),
    ],
)
def test_no_map_is_made(operation: Attend) -> None:
    n = 2048
    shape = Shape(1, 2, 2, n, n, 16, 16)
    values = operands(operation, shape)
    named = {name: values[name] for name in operation.tensors()}
    with Largest() as forward:
        attend_forward(operation, values["query"], values["key"], values["value"], named)
    with Largest() as backward:
        received = torch.ones(1, 2, n, 16), torch.zeros(1, 2, n)
        wanted = [name for name in named if named[name].is_floating_point()]
        attend_gradients(operation, received, (values["query"], values["key"], values["value"]), named, wanted)
    # 256 queries at a time, times keys and heads; 512 for a bias that torch's fused attention is given.
    assert forward.elements <= 512 * n * 2 < n * n
    assert backward.elements <= 256 * n * 2


class Calls(TorchDispatchMode):
    """Whether torch's fused attention was asked for a causal one, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.causal: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.causal.append(args[4:5] == (True,))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [forms.causal().mask, sympy.And(J <= I, I - J < 50), forms.padded().mask])
def test_a_causal_attention_is_one_call(mask: Boolean) -> None:
    """torch skips what is later by itself, at sizes where the mask says no more than that, whether or not keys are hidden besides."""
    operation = replace(forms.plain(), mask=mask)
    for n, once in ((43, True), (60, not mask.has(50))):
        values = operands(operation, Shape(n_queries=n, n_keys=n))
        with Calls() as calls:
            attend_forward(operation, values["query"], values["key"], values["value"], values)
        assert (calls.causal == [True]) == once


def test_operands_that_do_not_fit_are_refused() -> None:
    operation = forms.biased("hij")
    values = operands(operation, Shape())
    with pytest.raises(RewriteError, match="bias"):
        run(operation, {**values, "bias": values["bias"][:, :5]})
    with pytest.raises(RewriteError, match="not given"):
        attend(operation, values["query"], values["key"], values["value"], {})
    with pytest.raises(RewriteError, match="one dtype"):
        run(operation, {**values, "key": values["key"].double()})
    with pytest.raises(RewriteError, match="multiple of Hkv"):
        run(operation, {**values, "query": values["query"][:, :3]})
    mixed = forms.talking_heads()
    with pytest.raises(RewriteError, match=r"before is \[4, 1\].*heads=4, heads=4"):
        run(mixed, {**operands(mixed, Shape()), "before": torch.ones(4, 1)})
    read = forms.decomposed_position()
    with pytest.raises(RewriteError, match=r"rel_h is .*any, read at floor"):
        run(read, {**operands(read, Shape()), "rel_h": torch.ones(4, 37, 8)})
