"""Every model of the corpus, recognised whole and lowered as it is: `make test` runs the core, `make test-corpus` all of it.

A case is a model with one implementation of its attention. What is true of it stands in the tables of `tests.models.corpus`, which are
read off the models' source. Exceptions stand with their reasons in `tests.models.corpus.exceptions`; a test fails where one is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import NoAttentionError, Pass, Site, rewrite
from rewrite.ir.program import Program
from tests.models.corpus.accounting import inside, normalises, unaccounted
from tests.models.corpus.cases import BY_NAME, CORE, ENTRIES, EVERYTHING, Case, cases, name_of
from tests.models.corpus.entry import Entry
from tests.models.corpus.exceptions import GRADIENTS, LAYOUTS, MISSED, MOST_MISSED
from tests.models.corpus.forms import FORMS
from tests.models.corpus.layouts import layout_differences
from tests.models.corpus.survey import Survey, size_differences, survey
from tests.models.corpus.training import backward, real_rows, tensors, without_chance
from tests.models.corpus.truth import count_calls, expected_calls

EPSILON = torch.finfo(torch.float32).eps


@dataclass
class Subject:
    """A case and what was seen of it, by batch."""

    entry: Entry
    implementation: str
    seen: dict[int, Survey] = field(default_factory=dict)

    @property
    def nothing_found(self) -> bool:
        """Whether every site of the model is known to be missed: there is nothing to rewrite, and that is an error."""
        return MISSED.get(self.entry.name, (0, ""))[0] == self.entry.truth

    def at(self, batch: int) -> Survey:
        if batch not in self.seen:
            self.seen[batch] = survey(self.entry, self.implementation, batch)
        return self.seen[batch]


def each_case(which: list[Case]) -> Any:
    """Parameters that keep what is seen of a case for all tests of a class, and all of them in one worker."""
    marked = [pytest.param(case, id=name_of(case), marks=pytest.mark.xdist_group(case[0].name)) for case in which]
    return pytest.mark.parametrize("subject", marked, indirect=True, scope="class")


@pytest.fixture(scope="class")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield Subject(*request.param)
    torch._dynamo.reset()


@each_case(cases())
class TestReading:
    """What is found in a model."""

    def test_the_table_states_the_calls_of_the_untouched_model(self, subject: Subject) -> None:
        entry = subject.entry
        assert bool(entry.sites) != bool(entry.none)
        assert all(group.module or group.because for group in entry.sites)
        assert count_calls(entry, entry.build(subject.implementation), entry.inputs(2)) == expected_calls(entry)

    @pytest.mark.parametrize("batch", [2, 1])
    def test_every_attention_is_recognised_and_proved(self, subject: Subject, batch: int) -> None:
        seen = subject.at(batch)
        missed, reason = MISSED.get(subject.entry.name, (0, ""))
        assert len(seen.found) == subject.entry.truth_at(batch) - missed, (reason, [miss.reason for miss in seen.misses])

    def test_sizes_are_those_of_the_table(self, subject: Subject) -> None:
        assert size_differences(subject.entry, subject.at(2).found, 2) == []

    def test_every_softmax_is_in_a_region_or_a_near_miss(self, subject: Subject) -> None:
        for reading in subject.at(2).readings:
            regions = [found.region for found in reading.recognition.found]
            nodes = [inside(region.output, (operand.node for operand in region.operands().values())) for region in regions]
            assert list(unaccounted(reading.module.graph, nodes, (miss.node for miss in reading.recognition.misses))) == []
            assert all(miss.reason for miss in reading.recognition.misses)
            # Composite calls are taken apart before they are read; none may get lost on the way.
            before, after = (sum(map(normalises, module.graph.nodes)) for module in (reading.captured, reading.module))
            assert after >= before

    def test_tokens_lie_as_the_table_says(self, subject: Subject) -> None:
        differences = layout_differences(subject.entry, subject.at(2).whole)
        assert bool(differences) == (subject.entry.name in LAYOUTS), differences


def described(site: Site) -> tuple[str, ...]:
    """What is said of a site whatever sizes it is traced with."""
    attend = site.attend
    parts = (attend, attend.score, attend.mask, attend.weight, attend.normaliser)
    return (*map(str, parts), site.kind, *sorted(site.dims), type(site.layout.grid).__name__)


# Its code takes Inductor a minute to compile each time it is run, for nothing that tests/recognise does not show of it.
SLOW = "llama-flex"
FAST = [case for case in cases() if EVERYTHING or case[0].name != SLOW]


@each_case([case for case in FAST if case[0] in CORE])
class TestSymbolicSizes:
    """A batch size, and for texts a length, that the graph does not fix."""

    def test_the_same_is_read_with_symbolic_sizes(self, subject: Subject) -> None:
        fixed = subject.at(2)
        symbolic = survey(subject.entry, subject.implementation, 2, symbolic=True)
        assert symbolic.symbols
        # What is read from data is a symbol behind a break, however the sizes of the inputs are treated.
        assert subject.entry.breaks or not fixed.symbols
        assert sorted(map(described, symbolic.sites)) == sorted(map(described, fixed.sites)), [miss.reason for miss in symbolic.misses]


@dataclass(frozen=True)
class AsItIs(Pass):
    """Rewrites every site to what it is already, under another name, so that our operators compute it.

    It is not registered, so that what is tested of every registered pass leaves it out.
    """

    name = "as_it_is"
    family = "sparsify"
    paper = "none; a test"
    formula = "a' = a"

    def apply(self, program: Program) -> Program:
        """Every site, whatever its form."""
        for site in program.sites:
            program = program.with_site(site.with_operations(replace(site.attend, result="rebuilt")), str(self))
        return program


def rebuilt(model: nn.Module, subject: Subject) -> nn.Module:
    """The model with every site lowered as it was read, through the public entry."""
    changed = rewrite(model, [AsItIs()], example_inputs=dict(subject.entry.inputs(2)))
    assert changed.rewrite_report.sites
    assert changed.rewrite_report.counts()["rewritten"] == len(changed.rewrite_report.sites)
    return changed


Results = dict[str, torch.Tensor]


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> Results:
    """What the model returns, rows of padding left out."""
    with torch.no_grad():
        return {str(place): real_rows(output, inputs) for place, output in enumerate(tensors(model(**copy.deepcopy(inputs))))}


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> Results:
    """The gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(0)
    backward([real_rows(output, inputs) for output in tensors(model(**copy.deepcopy(inputs)))])
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(subject: Subject, model: nn.Module, changed: nn.Module, results: Callable[[nn.Module, dict[str, Any]], Results]) -> None:
    """The changed model's results are the model's own, within what float32 sums over tokens and layers leave.

    The budget is in units of the largest number there is, since some numbers are sums that cancel. A model that is farther than that from
    its own results in float64 (an argmax or a maximum that rounding decides) is compared with those: the changed one must be no farther
    from them than twice what the model is.
    """
    inputs = dict(subject.entry.inputs(2))
    expected, actual = results(model, inputs), results(changed, inputs)
    assert expected.keys() == actual.keys()
    budget = 256 * subject.entry.truth * EPSILON * _largest(expected)
    error = _largest({name: actual[name] - value for name, value in expected.items()})
    if error > budget:
        exact = results(copy.deepcopy(model).double(), {name: _doubled(value) for name, value in inputs.items()})
        own = _largest({name: value - exact[name] for name, value in expected.items()})
        theirs = _largest({name: value - exact[name] for name, value in actual.items()})
        assert theirs <= max(budget, 2 * own), f"{theirs:.3g} from float64, the model itself {own:.3g}; the budget is {budget:.3g}"


def _largest(results: Results) -> float:
    return max(float(value.abs().max()) for value in results.values() if value.numel())


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@each_case([case for case in FAST if case[0].truth])
class TestIdentity:
    """Every site computed by our own operators instead of the model's code."""

    def test_outputs_are_the_models_own(self, subject: Subject) -> None:
        if not (EVERYTHING or subject.nothing_found or subject.entry.name in GRADIENTS):
            pytest.skip("compared where gradients are")
        model = subject.entry.build(subject.implementation)
        if subject.nothing_found:
            with pytest.raises(NoAttentionError), torch.no_grad():
                rebuilt(model, subject)
            return
        with torch.no_grad():
            compare(subject, model, rebuilt(model, subject), outputs_of)

    def test_gradients_are_the_models_own(self, subject: Subject) -> None:
        if subject.nothing_found:
            return
        if subject.entry.name in GRADIENTS:
            model = without_chance(subject.entry.build(subject.implementation))
            with pytest.raises(NotImplementedError):
                gradients_of(model, dict(subject.entry.inputs(2)))
            return
        model = without_chance(subject.entry.build(subject.implementation))
        changed = rebuilt(model, subject)
        compare(subject, model, changed, gradients_of)
        compare(subject, model, changed, outputs_of)


class TestCorpus:
    """The tables themselves."""

    def test_names_are_unique(self) -> None:
        assert len(BY_NAME) == len(ENTRIES)

    def test_every_form_that_a_model_has_is_one_that_make_test_runs(self) -> None:
        carried = {form for entry in ENTRIES for form in entry.forms}
        assert carried <= set(FORMS)
        assert carried == {form for entry in CORE for form in entry.forms}

    def test_few_sites_are_missed(self) -> None:
        assert MISSED.keys() | LAYOUTS.keys() | GRADIENTS.keys() <= BY_NAME.keys()
        assert sum(count for count, _ in MISSED.values()) <= MOST_MISSED * sum(entry.truth for entry in ENTRIES)
