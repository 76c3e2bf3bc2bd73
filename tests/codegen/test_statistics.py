"""Statistics of attention maps against the map itself in float64: values, gradients, memory, refusals."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import attention_forms as forms
import interpreted
import pytest
import sympy
import torch
from attention_forms import Shape, operands
from budget import in_double, score_error, weight_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from codegen import emit, statistic, torch_statistics
from codegen.given_kernel import summed
from codegen.kernel import Form
from codegen.operator import attend_op
from codegen.received_kernel import LSE
from codegen.statistic_kernels import has_triton_statistic
from codegen.torch_statistics import IN_ONE_BUFFER, softmax_score, statistic_forward, statistic_visits
from codegen.torch_streaming import Held
from rewrite.ir import Attend, I, J, RewriteError, W, tensor
from rewrite.ir.semantics import read_statistic
from rewrite.ir.statistic import ENTROPY, Statistic

FORMS: dict[str, Attend] = {
    "plain": forms.plain(),
    "causal": forms.causal(),
    "biased": forms.biased("hij"),
    "masked": forms.masked("bij"),
    "empty rows": forms.empty_rows(),
    "sinks": forms.sinks("h"),
    "sinks and empty rows": forms.sinks_and_empty_rows(),
    "softcap": forms.softcap(),
    "grouped": forms.grouped(),
    "decomposed position": forms.decomposed_position(),
    "rectified": forms.rectified(),
    "gated": forms.gated("hj"),
    "talking heads": forms.talking_heads(),
}
TERMS: dict[str, dict[str, Any]] = {
    "received": {},
    "received from some": {"term": W * tensor("chosen", "bi")},
    "mean over the queries that see the key": {"term": W / (I - J + 100)},
    "first row": {"rows": (0, 1)},
    "last row": {"rows": (-1, None)},
    "some rows": {"rows": (5, 30)},
    "text to visual": {"term": W * tensor("chosen", "bi") * tensor("chosen_keys", "bj")},
    "mass": {"over": "keys", "term": W * tensor("chosen_keys", "bj")},
    "entropy": {"over": "keys", "term": ENTROPY},
    "entropy of some": {"over": "keys", "term": ENTROPY, "rows": (3, 20)},
}
# As ENTROPY in float64, and with a gradient that autograd does not lose where a weight is zero.
DIFFERENTIABLE_ENTROPY = sympy.Piecewise((-W * sympy.log(sympy.Max(W, sympy.Float(1e-300))), W >= 0), (sympy.Integer(0), True))
NORMALISED_OTHERWISE = {"softcap", "grouped", "rectified", "gated", "talking heads"}
each_form = pytest.mark.parametrize("form", FORMS)
each_term = pytest.mark.parametrize("term", TERMS)


def example(form: str, term: str, dtype: torch.dtype, shape: Shape) -> tuple[Statistic, dict[str, torch.Tensor]]:
    made = Statistic("result", FORMS[form], **TERMS[term])
    values = operands(made.attend, shape, dtype)
    generator = torch.Generator().manual_seed(3)
    values["chosen"] = torch.rand(shape.batch, shape.n_queries, generator=generator, dtype=torch.float64).to(dtype)
    values["chosen_keys"] = torch.rand(shape.batch, shape.n_keys, generator=generator, dtype=torch.float64).to(dtype)
    return made, values


def lse_of(made: Statistic, values: dict[str, torch.Tensor]) -> torch.Tensor:
    tensors = [values[name] for name in made.attend.tensors()]
    return attend_op(values["query"], values["key"], values["value"], tensors, made.attend.to_json())[1]


@each_form
@each_term
def test_values_and_gradients_in_double(form: str, term: str) -> None:
    shape = Shape()
    made, values = example(form, term, torch.float64, shape)
    leaves = {name: values[name].requires_grad_() for name in ("query", "key", *made.tensors()) if values[name].is_floating_point()}
    found = statistic(made, values["query"], values["key"], values)
    wanted = read_statistic(replace(made, term=DIFFERENTIABLE_ENTROPY) if made.term == ENTROPY else made, values)
    rounding = 64 * max(shape.n_queries, shape.n_keys) * torch.finfo(torch.float64).eps
    assert found.shape == wanted.shape
    assert (found - wanted).detach().abs().max() <= rounding * max(1.0, float(wanted.detach().abs().max()))
    received = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(wanted, list(leaves.values()), received, allow_unused=True)
    ours = torch.autograd.grad(found, list(leaves.values()), received, allow_unused=True)
    largest = max(1.0, *(float(gradient.abs().max()) for gradient in theirs if gradient is not None))
    for name, left, right in zip(leaves, theirs, ours, strict=True):
        assert right is not None, name
        # Two sums over tokens and channels, of heads that were mixed.
        assert (right - (0 if left is None else left)).abs().max() <= rounding * shape.head_dim * shape.heads * largest, name


# In double all forms are compared; `weight_error` has no bound for mixed heads in low precision.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "talking heads"])
@pytest.mark.parametrize("term", ["received", "received from some", "last row", "mass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_with_the_log_sum_exp(form: str, term: str, dtype: torch.dtype) -> None:
    made, values = example(form, term, dtype, Shape())
    found = statistic(made, values["query"], values["key"], values, lse_of(made, values))
    wanted = read_statistic(made, in_double(values))
    assert found.dtype == torch.float32
    counted = replace(made, term=sympy.Abs(made.term))
    error = weight_error(made.attend, values) + 4 * torch.finfo(torch.float32).eps
    error = error[:, :, range(error.shape[2])[slice(*made.rows)]] if made.rows else error
    budget = error.sum(2 if made.over == "queries" else 3) + 64 * torch.finfo(torch.float32).eps * read_statistic(
        counted, in_double(values)
    )
    assert ((found - wanted).abs() <= budget).all()
    assert (softmax_score(made) is not None) == (form not in NORMALISED_OTHERWISE)


SIGNED = W * (tensor("chosen", "bi") - 0.5)
BY_KERNEL: dict[str, dict[str, Any]] = {
    "received": {},
    "received from some": TERMS["received from some"],
    "signed": {"term": SIGNED},
    "first row": TERMS["first row"],
    "last row": TERMS["last row"],
    "some rows": TERMS["some rows"],
}
EXCHANGED = ("plain", "causal", "biased", "masked", "empty rows", "sinks", "decomposed position")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


@pytest.mark.parametrize(("form", "term"), [(form, "received") for form in EXCHANGED] + [("causal", term) for term in BY_KERNEL][1:])
def test_received_by_the_kernel(interpreter: ProcessPoolExecutor, form: str, term: str) -> None:
    """Queries and keys exchanged, in Triton's interpreter."""
    made, values = example(form, "received", torch.float32, Shape(n_queries=37, n_keys=53))
    made = replace(made, **BY_KERNEL[term])
    assert has_triton_statistic(made) is None
    given = [values[name] for name in ("query", "key", *made.tensors())]
    found = interpreter.submit(interpreted.run_statistic, made.to_json(), given, lse_of(made, values)).result()
    wanted = read_statistic(made, in_double(values))
    assert not found.isnan().any()
    # Two log-sum-exps, each off as the scores are.
    counted = read_statistic(replace(made, term=sympy.Abs(made.term)), in_double(values))
    assert ((found - wanted).abs() <= 4 * score_error(made.attend, values) * counted + torch.finfo(torch.float32).tiny).all()


BY_SUMS = [
    ("plain", "mass"), ("biased", "entropy"), ("causal", "entropy of some"), ("masked", "mass"), ("empty rows", "entropy"),
    ("sinks", "mass"), ("softcap", "entropy"), ("gated", "mass"), ("causal", "mass of the last row"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "term"), BY_SUMS)
@pytest.mark.parametrize("n_queries", [1, 37])
def test_given_by_the_kernel(interpreter: ProcessPoolExecutor, form: str, term: str, n_queries: int) -> None:
    """Sums over keys, the log-sum-exp handed over or found; of one query, the blocks of keys shared out as in decoding."""
    made, values = example(form, term.removesuffix(" of the last row"), torch.float32, Shape(1, 4, 2, n_queries, 53))
    made = replace(made, rows=(-1, None)) if term.endswith("last row") else made
    assert has_triton_statistic(made) is None
    given = [values[name] for name in ("query", "key", *made.tensors())]
    lse = None if n_queries == 1 else lse_of(made, values)
    found = interpreter.submit(interpreted.run_statistic, made.to_json(), given, lse, 3 if n_queries == 1 else 0).result()
    wanted = read_statistic(made, in_double(values))
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    # The log-sum-exp and the score are off; a logarithm of a weight is off as these are.
    terms = sympy.Abs(made.term) + 2 * sympy.Abs(W) if "entropy" in term else sympy.Abs(made.term)
    counted = read_statistic(replace(made, term=terms), in_double(values))
    assert ((found - wanted).abs() <= 4 * score_error(made.attend, values) * counted + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("form", ["grouped", "rectified", "talking heads"])
def test_what_no_kernel_gives_is_said(form: str) -> None:
    assert has_triton_statistic(Statistic("result", FORMS[form])) == "its weights are not the exponentials of scores that are linear in qk"
    assert "not expressions in a score" in str(has_triton_statistic(Statistic("result", FORMS[form], "keys")))
    assert "not w times a weight" in str(has_triton_statistic(Statistic("result", forms.plain(), term=W**2)))
    assert "the mask hides" in str(has_triton_statistic(Statistic("result", forms.causal(), "keys", term=W + 1)))


@pytest.mark.parametrize("form", ["whole", "split"])
def test_sums_over_keys_compile_without_spills(form: Form) -> None:
    kernel = emit(summed(Statistic("result", forms.biased("hij"), "keys", ENTROPY)), values=False)
    assert kernel.compile("sm_80", torch.bfloat16, 128, tensor_dtypes={LSE: torch.float32}, form=form).spills == 0


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 2),
    shared=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    n_queries=sizes,
    n_keys=sizes,
    head_dim=st.sampled_from([8, 17, 64, 256]),
    form=st.sampled_from(["plain", "causal", "masked", "empty rows", "sinks", "grouped"]),
    term=st.sampled_from(["received", "first row", "last row", "mass", "entropy"]),
)
def test_any_shape(batch: int, shared: int, key_heads: int, n_queries: int, n_keys: int, head_dim: int, form: str, term: str) -> None:
    shape = Shape(batch, shared * key_heads, key_heads, n_queries, n_keys, head_dim, 8)
    made, values = example(form, term, torch.float64, shape)
    found, wanted = statistic(made, values["query"], values["key"], values), read_statistic(made, values)
    assert not found.isnan().any()
    assert (found - wanted).abs().max() <= 1024 * torch.finfo(torch.float64).eps * max(1.0, float(wanted.abs().max()))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("term", ["received", "mass", "last row", "entropy"])
def test_memory_is_linear_in_tokens(term: str) -> None:
    """Four times the tokens: a map would be sixteen times as large."""
    largest = []
    for tokens in (2048, 8192):
        made, values = example("causal", term, torch.float32, Shape(1, 2, 2, tokens, tokens, 16, 16))
        named = {name: values[name] for name in made.tensors()}
        # What is made once for a mask and a size is not the call's.
        deque(statistic_visits(made, values["query"], values["key"], named, IN_ONE_BUFFER), maxlen=0)
        with Largest() as mode:
            statistic_forward(made, values["query"], values["key"], named)
        largest.append(mode.elements)
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize("form", ["causal", "masked", "empty rows", "sinks", "biased"])
@pytest.mark.parametrize("term", ["received", "received from some", "mass"])
def test_some_of_the_scores_at_a_time(form: str, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries and two maps in one buffer give what all at once gives."""
    made, values = example(form, term, torch.float64, Shape(batch=3, heads=4, key_heads=2))
    wanted = read_statistic(made, values)
    monkeypatch.setattr(torch_statistics, "IN_ONE_BUFFER", Held(2 * 16 * 53, 16, 1))
    found = statistic(made, values["query"], values["key"], values)
    assert (found - wanted).abs().max() <= 1024 * torch.finfo(torch.float64).eps * max(1.0, float(wanted.abs().max()))


def test_compiles_whole_and_exports() -> None:
    made, values = example("causal", "received", torch.float32, Shape())
    text = made.to_json()

    class Reads(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return statistic(text, query, key, {}) * 2

    query, key = values["query"], values["key"]
    wanted = Reads()(query, key)
    assert torch.allclose(torch.compile(Reads(), backend="aot_eager", fullgraph=True)(query, key), wanted)
    assert torch.allclose(torch.export.export(Reads(), (query, key)).module()(query, key), wanted)


def test_json_round_trip() -> None:
    for form in FORMS.values():
        for term in TERMS.values():
            made = Statistic("statistic", Attend.from_json(form.to_json()), **term)
            assert Statistic.from_json(made.to_json()) == made


def test_refusals() -> None:
    made, values = example("plain", "received from some", torch.float32, Shape())
    with pytest.raises(RewriteError, match="chosen, which were not given"):
        statistic(made, values["query"], values["key"], {})
    with pytest.raises(RewriteError, match=r"chosen is \[2, 3\]; its axes are \[b=2, i=37\]"):
        statistic(made, values["query"], values["key"], {"chosen": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="the weight w, and not in qk"):
        Statistic("result", forms.plain(), term=tensor("bias", "bj"))
    with pytest.raises(ValueError, match="give the second read a name of its own"):
        Statistic("result", forms.biased("hij"), term=W * tensor("bias", "bj"))
