"""The backward kernels in Triton's interpreter against float64 autograd of the reference, and compiled ahead of time."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import attention_forms as forms
import interpreted
import pytest
import sympy
import torch
from attention_forms import Shape, operands
from gradient_budget import GradientBudget, reference_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_interpreter import ANY_SIZE, DTYPES, NEIGHBOURHOODS, STREAMED

from codegen import emit_backward, has_triton_backward
from codegen.backward_kernel import backward_kernel_for
from codegen.backward_sums import GradientSums
from codegen.operator import _attend_backward_cuda
from codegen.torch_backward import attend_gradients
from codegen.torch_streaming import attend_forward
from rewrite.ir import QK, Attend, Groups, RewriteError, W, mass, tensor


def learned_groups() -> Attend:
    """Groups whose weights are learned, per head and per query, some of them of the masses."""
    first, second = (mass(name) for name in forms.NAMES[:2])
    weights = (tensor("t", "h"), 1 + tensor("u", "bhi") * first / (first + second), sympy.Integer(0), second**2)
    return replace(forms.empty_rows(), groups=Groups("member", forms.NAMES, weights))


FORMS: dict[str, Attend] = {name: build() for name, build in {**ANY_SIZE, **STREAMED}.items() if has_triton_backward(build()) is None} | {
    "bias bj": forms.biased("bj"),
    "bias bhi": forms.biased("bhi"),
    "gate hj": forms.gated("hj"),
    "two biases": replace(forms.biased("hij"), score=QK / 8 + tensor("bias", "hij") + tensor("more", "bij") * tensor("t", "h")),
    "lengths of queries and keys": replace(
        forms.plain(), score=QK * tensor("t", "h") / sympy.sqrt((1 + tensor("n", "bhi") ** 2) * (1 + tensor("m", "bhj") ** 2))
    ),
    "log of sizes": replace(forms.causal(), score=QK / 8 + sympy.log(1 + tensor("size", "bj") ** 2)),
    "grouped by tensors": learned_groups(),
    "bias and sink": replace(forms.sinks("h"), score=QK / 8 + tensor("t", "h") * tensor("bias", "hij")),
}

few = settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

# One case per form, in turn; hypothesis draws others. Each: the shape, the dtype, whether tensors are the same for every batch and head.
CASES = (
    (Shape(2, 4, 2, 37, 19, 16, 24), torch.float32, False),
    (Shape(2, 2, 1, 19, 37, 40, 40), torch.float32, True),
    (Shape(1, 2, 2, 33, 48, 8, 8), torch.bfloat16, False),
    (Shape(3, 2, 1, 17, 17, 80, 16), torch.float32, False),
    (Shape(1, 4, 2, 19, 37, 64, 64), torch.float16, True),
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def shapes() -> st.SearchStrategy[Shape]:
    def build(batch: int, heads: tuple[int, int], size: tuple[int, int], widths: tuple[int, int]) -> Shape:
        return Shape(batch, *heads, *size, *widths)

    heads = st.sampled_from([(2, 2), (2, 1), (4, 2)])
    sizes = st.sampled_from([(1, 1), (17, 17), (1, 37), (37, 19), (19, 37), (33, 48)])
    widths = st.sampled_from([(8, 8), (16, 24), (40, 40), (64, 64), (80, 16), (128, 128)])
    return st.builds(build, st.integers(1, 3), heads, sizes, widths)


def gradients_of(
    interpreter: ProcessPoolExecutor, attend: Attend, values: dict[str, torch.Tensor], received: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    names = list(attend.tensors())
    given = [values[name] for name in ("query", "key", "value", *names)]
    wanted = [place for place, name in enumerate(names) if values[name].is_floating_point()]
    found = interpreter.submit(interpreted.run_backward, attend.to_json(), given, received, wanted, (16, 16)).result()
    return dict(zip(["query", "key", "value", *(names[place] for place in wanted)], found, strict=True))


# Two float32 computations of one gradient, the sums in another order; the kernels' tanh is made of a sigmoid and loses a few bits.
BESIDE_THE_LOWERING = 32


def check(interpreter: ProcessPoolExecutor, attend: Attend, shape: Shape, dtype: torch.dtype, broadcast: bool) -> None:
    values = operands(attend, shape, dtype, broadcast=broadcast)
    size = (shape.batch, shape.heads, shape.n_queries)
    d_out = torch.randn(*size, shape.value_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = gradients_of(interpreter, attend, values, (d_out, torch.zeros(size)))
    reference, budget = reference_gradients(attend, values, d_out), GradientBudget(attend, values, d_out, dtype)
    assert reference.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.dtype == values[name].dtype
        assert gradient.shape == values[name].shape
        assert gradient.is_contiguous()
        assert gradient.isfinite().all(), name
        excess = (gradient.double() - reference[name]).abs() - budget.of(name)
        assert float(excess.max()) <= 0, name
    # Where every query sees one key, or one query is all there is, gradients cancel to rounding errors.
    if dtype == torch.float32 and min(shape.n_queries, shape.n_keys) > 1:
        named = {name: values[name] for name in attend.tensors()}
        wanted = [name for name in found if name in named]
        qkv = (values["query"], values["key"], values["value"])
        lowered = attend_gradients(attend, (d_out, torch.zeros(size)), qkv, named, wanted)
        for (name, gradient), other in zip(found.items(), lowered, strict=True):
            allowed = (other.double() - reference[name]).norm() + torch.finfo(dtype).eps * reference[name].norm()
            assert (gradient.double() - reference[name]).norm() <= BESIDE_THE_LOWERING * allowed, name


@pytest.mark.parametrize(("form", "case"), [(form, CASES[place % len(CASES)]) for place, form in enumerate(FORMS)])
def test_form(interpreter: ProcessPoolExecutor, form: str, case: tuple[Shape, torch.dtype, bool]) -> None:
    check(interpreter, FORMS[form], *case)


@few
@given(form=st.sampled_from(list(FORMS)), shape=shapes(), dtype=st.sampled_from(DTYPES), broadcast=st.booleans())
def test_any_form_at_any_shape(interpreter: ProcessPoolExecutor, form: str, shape: Shape, dtype: torch.dtype, broadcast: bool) -> None:
    check(interpreter, FORMS[form], shape, dtype, broadcast)


@pytest.mark.parametrize("form", list(NEIGHBOURHOODS)[1::2])
def test_neighbourhood(interpreter: ProcessPoolExecutor, form: str) -> None:
    attend, n = NEIGHBOURHOODS[form]
    check(interpreter, attend, Shape(1, 2, 1, n, n, 16, 16), torch.float32, False)


@pytest.mark.parametrize("axes", ["hij", "bhij"])
def test_what_batches_and_heads_share_is_summed_in_turns(interpreter: ProcessPoolExecutor, axes: str) -> None:
    """Narrow heads and many tokens: one copy of the bias per batch and head would take more memory than it may."""
    attend, shape = forms.biased(axes), Shape(5, 2, 1, 40, 40, 4, 4)
    sums = turns(attend, operands(attend, shape))
    assert (sums.turns_b > 1) == ("b" not in axes)
    assert sums.turns_b * sums.turns_h > 1 or axes == "bhij"
    assert sums[0].buffer.numel() <= max(8 * sums[0].operand.numel(), 3 * 5 * 2 * 40 * 4)
    check(interpreter, attend, shape, torch.float32, False)


def test_heads_too_are_summed_in_turns(interpreter: ProcessPoolExecutor) -> None:
    attend, shape = forms.biased("bij"), Shape(1, 7, 7, 40, 33, 4, 4)
    assert turns(attend, operands(attend, shape)).turns_h in (2, 4)
    check(interpreter, attend, shape, torch.float32, False)


def turns(attend: Attend, values: dict[str, torch.Tensor]) -> GradientSums:
    read_at = ["".join(map(str, indices)) for indices in attend.tensors().values()]
    tensors = [values[name] for name in attend.tensors()]
    return GradientSums((values["query"], values["key"], values["value"]), tensors, read_at, [0], visits_all=True)


@pytest.mark.parametrize("operation", [forms.biased("hij"), forms.sinks("bhi"), forms.linear()])
def test_gradient_of_the_log_sum_exp(interpreter: ProcessPoolExecutor, operation: Attend) -> None:
    shape = Shape(2, 4, 2, 19, 37, 16, 16)
    values = operands(operation, shape)
    d_out = torch.randn(2, 4, 19, 16, generator=torch.Generator().manual_seed(1))
    d_lse = torch.randn(2, 4, 19, generator=torch.Generator().manual_seed(2))
    found = gradients_of(interpreter, operation, values, (d_out, d_lse))
    doubled = {name: value.double() for name, value in values.items()}
    wanted = [name for name in found if name in operation.tensors()]
    qkv = (doubled["query"], doubled["key"], doubled["value"])
    reference = attend_gradients(operation, (d_out.double(), d_lse.double()), qkv, doubled, wanted)
    budget = GradientBudget(operation, values, d_out.abs() + d_lse.abs()[..., None], torch.float32)
    for (name, gradient), other in zip(found.items(), reference, strict=True):
        assert float(((gradient.double() - other).abs() - budget.of(name)).max()) <= 0, name


def test_kernels_are_deterministic(interpreter: ProcessPoolExecutor) -> None:
    operation = FORMS["two biases"]
    values = operands(operation, Shape(2, 2, 1, 19, 37, 8, 8))
    received = torch.randn(2, 2, 19, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 2, 19)
    first, second = (gradients_of(interpreter, operation, values, received) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_operands_may_lie_as_models_have_them(interpreter: ProcessPoolExecutor) -> None:
    """[B, N, H, D] behind [B, H, N, D], a gradient that is one number everywhere, a bias that is expanded."""
    operation = forms.biased("bhij")
    values = operands(operation, Shape(2, 4, 2, 19, 37, 16, 16))
    for name in ("query", "key", "value"):
        values[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)
    values["bias"] = values["bias"][:1, :, :1].expand(2, -1, 19, -1)
    d_out = torch.ones(2, 1, 19, 16).expand(2, 4, 19, 16)
    found = gradients_of(interpreter, operation, values, (d_out, torch.zeros(()).expand(2, 4, 19)))
    reference, budget = reference_gradients(operation, values, d_out), GradientBudget(operation, values, d_out, torch.float32)
    for name, gradient in found.items():
        assert float(((gradient.double() - reference[name]).abs() - budget.of(name)).max()) <= 0, name


@pytest.mark.parametrize(
    ("operation", "wanted", "reason"),
    [
        (forms.decomposed_position(), None, r"rel_h\[b, h, i, floor\(j/7\)\].*no fixed order"),
        (forms.decomposed_position(), ("rel_h", "rel_w"), "no fixed order"),
        (forms.talking_heads(), None, "mixes heads"),
        (forms.renormalised(), (), "normalised again"),
        (replace(forms.plain(), score=sympy.floor(tensor("bias", "hij")) + QK), None, "cannot pass floor"),
    ],
)
def test_what_has_no_backward_kernels_says_why(operation: Attend, wanted: tuple[str, ...] | None, reason: str) -> None:
    said = has_triton_backward(operation, wanted)
    assert said is not None
    assert re.search(reason, said)


def test_a_tensor_nobody_wants_the_gradient_of_may_be_read_anywhere(interpreter: ProcessPoolExecutor) -> None:
    operation = forms.decomposed_position()
    assert has_triton_backward(operation, ()) is None
    values = operands(operation, Shape(1, 2, 1, 19, 37))
    given = [values[name] for name in ("query", "key", "value", *operation.tensors())]
    d_out = torch.randn(1, 2, 19, 16, generator=torch.Generator().manual_seed(1))
    received = d_out, torch.zeros(1, 2, 19)
    found = interpreter.submit(interpreted.run_backward, operation.to_json(), given, received, [], (16, 16)).result()
    reference, budget = reference_gradients(operation, values, d_out), GradientBudget(operation, values, d_out, torch.float32)
    for name, gradient in zip(("query", "key", "value"), found, strict=True):
        assert float(((gradient.double() - reference[name]).abs() - budget.of(name)).max()) <= 0, name
    with pytest.raises(RewriteError, match="do not give"):
        interpreter.submit(interpreted.run_backward, operation.to_json(), given, received, [0], (16, 16)).result()


def test_without_backward_kernels_a_gpu_runs_the_torch_lowering() -> None:
    """What the CUDA implementation does, on tensors that are not there: it asks for no kernel."""
    operation = forms.talking_heads()
    values = operands(operation, Shape())
    named = {name: values[name] for name in operation.tensors()}
    qkv = (values["query"], values["key"], values["value"])
    out, lse = attend_forward(operation, *qkv, named)
    received = torch.ones_like(out), torch.zeros_like(lse)
    found = _attend_backward_cuda(*received, out, lse, [*qkv, *named.values()], [0], operation.to_json())
    wanted = attend_gradients(operation, received, qkv, named, [next(iter(named))])
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))


def test_the_file_reads_and_imports_on_its_own() -> None:
    kernel = emit_backward(replace(forms.sinks("h"), weight=W * tensor("gate", "h")), ("layers.0",), ("pass(x=1)",))
    assert kernel.name == "attend_backward_causal_sinks_gated"
    assert kernel.path.stem.startswith(f"{kernel.name}_")
    assert backward_kernel_for(kernel.attend_json) is kernel
    for said in ("layers.0", "pass(x=1)", "d_query[i,:]", "t[h], the logit of a key without a value", f"def {kernel.name}_keys("):
        assert said in kernel.source
    assert max(map(len, kernel.source.splitlines()[:40])) <= 140
    assert "launch" in runpy.run_path(str(kernel.path))


def test_names_from_a_model_do_not_meet_the_kernels_own() -> None:
    names = ("query", "delta", "x", "d_x", "sums", "turn")
    kernel = emit_backward(replace(forms.plain(), score=sympy.Add(QK, *(tensor(name, "hij") for name in names))))
    arguments = re.search(rf"def {kernel.name}_queries\((.*?)\n\):", kernel.source, re.DOTALL)
    assert arguments is not None
    found = re.findall(r"(\w+)(?:: tl.constexpr)?,", arguments[1])
    assert len(found) == len(set(found))
    compile(kernel.source, "kernel", "exec")


@pytest.mark.parametrize(("form", "head_dim"), [("causal", 128), ("bias hij", 64)])
def test_nothing_spills(form: str, head_dim: int) -> None:
    compiled = emit_backward(FORMS[form]).compile("sm_90", torch.bfloat16, head_dim)
    assert compiled.keys() == {"queries", "keys"}
    for kernel in compiled.values():
        assert 0 < kernel.registers <= 255
        assert kernel.spills == 0
        # What sm_90 gives a program.
        assert 0 < kernel.shared_memory <= 227 * 1024
        assert "wgmma" in kernel.ptx


@pytest.mark.parametrize("form", ["bias and sink", "grouped"])
def test_other_forms_compile(form: str) -> None:
    for kernel in emit_backward(FORMS[form]).compile("sm_80", torch.float16, 80, value_dim=96).values():
        assert 0 < kernel.registers <= 255
        # What sm_86 and sm_89 give, which take the same tiles.
        assert 0 < kernel.shared_memory <= 99 * 1024
