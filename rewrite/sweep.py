"""Which heads of a model gain from a method: each alone, measured offline on samples of a task.

The calibration of attention (Yu et al. 2024, ICML, arXiv 2406.15765) finds its heads so; any pass that takes `heads` can be asked.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import track
from rich.table import Table
from torch import fx, nn

from rewrite.compiled import CompiledGraph
from rewrite.dry_run import call_original, copied, evaluation_mode, untouched
from rewrite.engine import Record, Rewriter
from rewrite.entry import session_of
from rewrite.ir.errors import NotApplicableError, PassError, RewriteError
from rewrite.ir.passes import Pass
from rewrite.ir.program import Program
from rewrite.ir.registry import available_passes, parse_pass, pass_class
from rewrite.lower.interface import Allowed
from rewrite.names import Names
from rewrite.runner import Runner, running
from rewrite.session import Session

Head = tuple[int, int]
Builder = Callable[[tuple[Head, ...]], Pass]
Score = Callable[[Any, Any], torch.Tensor | float]


@dataclass(frozen=True)
class HeadSweep:
    """What `sweep_heads` measured. Print it for a table.

    method: name of the pass. baseline: mean score of the model as it is. scores: by (layer, head), the mean score with the pass on that
    head alone. samples: how many values each mean is of. margin: what a head must gain to be kept. setting: the pass on the heads that are
    kept, for a pass list; None where no head is.
    """

    method: str
    baseline: float
    scores: Mapping[Head, float]
    samples: int
    margin: float
    setting: Pass | None

    @property
    def kept(self) -> tuple[Head, ...]:
        """The heads whose score exceeds the baseline by more than the margin, in order."""
        return _gaining(self.scores, self.baseline, self.margin)

    def table(self) -> Table:
        """A row for each layer: the heads that are kept, and what each head gains over the baseline."""
        table = Table(title=f"{self.method}, one head at a time", title_justify="left")
        for heading in ("layer", "kept", "gain of each head"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "layer" else "left")
        for layer, heads in itertools.groupby(sorted(self.scores), lambda one: one[0]):
            gains = "  ".join(f"{head}: {self.scores[layer, head] - self.baseline:+.4g}" for _, head in heads)
            table.add_row(str(layer), ", ".join(str(head) for of, head in self.kept if of == layer), gains)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        yield f"baseline {self.baseline:.6g} over {self.samples} samples"
        yield f"{len(self.kept)} of {len(self.scores)} heads kept, which gain more than {self.margin:g}"
        if self.setting is not None:
            yield f"setting: {self.setting}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()


def sweep_heads(
    model: nn.Module,
    method: str | Pass | Callable[..., Pass],
    loader: Iterable[Any],
    score: Score,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
    margin: float = 0.0,
    progress: bool = True,
) -> HeadSweep:
    """Measure the model as it is and with the pass on each head alone; keep the heads that score higher.

    method: a pass that takes `heads`, pairs (layer, head): its name, text or object without them (``"calibrate(beta=0.2)"``), its class, or
    any callable that makes a pass of ``heads=``. loader: the samples or batches, each a tuple of positional or a mapping of keyword
    arguments of `forward`, on the model's device. It is gone through once for each head, always from the same random state; an iterator,
    which can be gone through once only, is read into memory. score: called as ``score(output, inputs)`` with what the model returned
    and the loader's entry; higher is better. A tensor counts as one value per element (one per row of a batch, say), a number as one;
    what is compared is the mean of the values. layers, heads: which heads to measure, of those that the pass rewrites for the first
    entry; by default all. margin: a head is kept where its score exceeds the baseline by more. A rewritten layer rounds differently
    in all its heads: a score that is no count of right answers wants a margin above that. progress: a bar on standard error.

    The model runs in evaluation mode without gradients, and is left as it was: modes, parameters, buffers, and torch's random state.
    It runs heads + 1 times over the loader. It is captured once and not per head; what each head costs beside the runs is its own
    rewriting of the captured graphs, whose proofs are shared: some tenths of a second for a dozen layers, in proportion to them.

    Raises `PassError` for a pass that is unknown or takes no such heads, `NotApplicableError` where the pass rewrites none of the heads
    asked for, `RewriteError` for a loader without samples, one that gives another number of values later, or a score that is not finite,
    `TypeError` for other arguments that are not as above.
    """
    build = _builder(method)
    name = _probe(build, method)
    if not isinstance(model, nn.Module):
        raise TypeError(f"sweep_heads() takes an nn.Module, not {type(model).__name__}")
    if any(session_of(module) is not None for module in model.modules()):
        raise RewriteError("this model, or a part of it, is rewritten already; sweep the heads of the original")
    if not math.isfinite(margin):
        raise RewriteError(f"margin={margin!r} is out of range; it must be finite")
    with evaluation_mode(model), torch.no_grad(), untouched(model):
        samples = list(loader) if iter(loader) is loader else loader
        with torch.random.fork_rng():
            example = next(iter(samples), None)
        if example is None:
            raise RewriteError("the loader gives no samples; a sweep needs some to measure the heads by")
        session = _Sweeping(model, (), "eager")
        session.prepare(*_arguments(example))
        rewritten = _rewritten_by(build, session.programs, layers, heads, name)
        baseline = _values(model, lambda arguments, keywords: call_original(model, arguments, keywords), samples, score)
        graphs, scores = _Graphs(session), {}
        for head in track(rewritten, f"{name}, one head at a time", console=Console(stderr=True), disable=not progress):
            graphs.use(build((head,)), rewritten[head])
            values = _values(model, graphs.run, samples, score)
            if len(values) != len(baseline):
                raise RewriteError(
                    f"the loader's entries gave {len(baseline)} values for the model as it is, and {len(values)} with {build((head,))}; "
                    "give a loader that has the same samples every time"
                )
            scores[head] = _mean(values)
    before = _mean(baseline)
    kept = _gaining(scores, before, margin)
    return HeadSweep(name, before, scores, len(baseline), float(margin), build(kept) if kept else None)


# The pass


def _builder(method: Any) -> Builder:
    """The pass as a function of its heads; `PassError` where it has no such parameter."""
    if isinstance(method, str):
        method = pass_class(method.strip()) if method.strip().isidentifier() else parse_pass(method)
    of: Any = method if isinstance(method, type) else type(method)
    if not issubclass(of, Pass):
        if not callable(method):
            raise PassError(f"{method!r} is neither a pass nor its name, and no function that makes a pass of heads")
        return lambda heads: method(heads=heads)
    default = {one.name: one.default for one in of.parameters()}
    if "heads" not in default:
        known = ", ".join(one.name for one in available_passes() if any(each.name == "heads" for each in one.parameters()))
        raise PassError(f"{of.name} takes no heads, so there is nothing to sweep; passes that do: {known or 'none'}")
    if not isinstance(method, Pass):
        return lambda heads: of(heads=heads)
    given: Any = method
    if given.heads != default["heads"]:
        raise PassError(f"{method} lists heads already, and a sweep is to find them; leave them out, or give sweep_heads() heads=")
    return lambda heads: dataclasses.replace(given, heads=heads)


def _probe(build: Builder, method: Any) -> str:
    """The name of the pass that is built; `PassError` where heads do not make one, or one that adds parameters."""
    try:
        built = build(((0, 0),))
    except TypeError as error:
        raise PassError(f"{method!r} makes no pass of heads=((0, 0),): {error}") from error
    if not isinstance(built, Pass):
        raise PassError(f"{method!r} makes a {type(built).__name__} of heads=((0, 0),), and no pass")
    if built.adds_parameters():
        raise PassError(f"{built} adds parameters to the model, which would have to be trained before a head is measured")
    return built.name


def _rewritten_by(
    build: Builder, programs: Sequence[Program], layers: Sequence[int] | None, heads: Sequence[Head] | None, name: str
) -> dict[Head, frozenset[str]]:
    """The names of the sites that each head's pass rewrites, for every head that it rewrites any for, in order."""
    there = {(site.layer, head) for program in programs for site in program.sites for head in range(site.dims["H"])}
    wanted = there if heads is None else {(layer, head) for layer, head in heads}
    wanted = {head for head in wanted if layers is None or head[0] in layers}
    found, reasons = {}, dict[str, list[str]]()
    for head in sorted(wanted & there):
        after = [build((head,)).apply(program) for program in programs]
        names = frozenset(site for program in after for site, _ in program.touched)
        if names:
            found[head] = names
        for site, _, reason in (each for program in after for each in program.declined):
            reasons.setdefault(reason, []).append(site)
    missing = sorted(wanted - set(found)) if heads is not None else []
    if missing or not found:
        told = "; ".join(f"{', '.join(dict.fromkeys(sites))}: {reason}" for reason, sites in reasons.items())
        which = f"heads {', '.join(map(str, missing))}" if missing else "any head" if layers is None else f"any head of the layers {layers}"
        raise NotApplicableError(f"{name} does not rewrite {which} of the {len(there)} there are: {told or 'there are no such heads'}")
    return found


# The model


@dataclass(eq=False)
class _Sweeping(Session):
    """A session without passes of its own, which keeps the programs that were recognised."""

    programs: list[Program] = field(default_factory=list)
    _told: object = None

    def record(self, record: Record) -> None:
        super().record(record)
        if self.prepared:
            return
        # A capture that is made once more starts a new report.
        if self._told is not self.report:
            self._told, self.programs = self.report, []
        self.programs.append(record.program)


class _Graphs(Runner):
    """Runs a model by graphs that are captured once and rewritten anew for every setting."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, session.root, "", inner="eager")
        self.passes: tuple[Pass, ...] = ()
        self.graphs: list[CompiledGraph] = []
        # The same function with another backend: what torch.compile is given compiled it takes the function of.
        self.compiled = torch.compile(self.compiled, backend=self._captured)

    def _captured(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        session = self.session
        rewriter = Rewriter(self.passes, Names(session.root, ""), session.proofs, Allowed(added=session.added), session.depths)
        self.graphs.append(CompiledGraph(graph_module, rewriter, "eager", running, session.record))
        return self.graphs[-1]

    def use(self, setting: Pass, sites: frozenset[str]) -> None:
        """Rewrite by this pass from now on. sites: the names of those that it rewrites, which later captures are held to."""
        self.passes = (setting,)
        for graph in self.graphs:
            graph.rewriter.passes = self.passes
            graph.variants.clear()
        reports = self.session.report.sites
        promised = [dataclasses.replace(site, passes=(str(setting),) * (site.qualified_name in sites)) for site in reports]
        self.session.report = dataclasses.replace(self.session.report, sites=promised)


# The score


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(f"a loader's entry is a tuple or a mapping of keyword arguments, not {type(inputs).__name__}")


def _values(model: nn.Module, run: Callable[[tuple[Any, ...], dict[str, Any]], Any], samples: Iterable[Any], score: Score) -> list[float]:
    """The score's values over all samples, from the buffers and the random state that the sweep began with."""
    values: list[float] = []
    with untouched(model):
        for number, inputs in enumerate(samples):
            value = score(run(*copied(_arguments(inputs))), inputs)
            if not isinstance(value, torch.Tensor | numbers.Real):
                raise TypeError(f"score returns a number or a tensor of one per sample, not {type(value).__name__}")
            given = torch.as_tensor(value).double().flatten().tolist()
            if not given or not all(map(math.isfinite, given)):
                raise RewriteError(f"score gave {value} for entry {number} of the loader; it must be finite, and of one value at least")
            values += given
    return values


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _gaining(scores: Mapping[Head, float], baseline: float, margin: float) -> tuple[Head, ...]:
    return tuple(sorted(head for head, score in scores.items() if score - baseline > margin))
