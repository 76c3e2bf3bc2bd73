"""What was found, what was changed, what was left alone and why, and what it costs."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

import codegen
from rewrite.breaks import Break
from rewrite.cost import Cost, GraphCost, node_itemsize, original_cost, rewritten_cost
from rewrite.engine import Record
from rewrite.ir.operations import Attend
from rewrite.ir.selection import Select
from rewrite.ir.site import Site
from rewrite.lower.recurrence import declined_words
from rewrite.prediction import Prediction, around_sites, as_it_was, is_materialised, predicted
from rewrite.recognise.sites import Found

# Columns of the table that are numbers.
_NUMBERS = frozenset({"heads", "head dim", "multiply-adds", "predicted", "measured"})

Status = Literal["rewritten", "kept", "declined"]


@dataclass(frozen=True)
class Measured:
    """Seconds of one site, or of a whole model, before and after, as measured."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.after / self.before


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    status: "rewritten" by the passes named, "declined" where every pass that was asked for left it alone (the reasons are in `reason`),
    "kept" where no pass was asked for. cost_before, cost_after: closed forms with `.multiply_adds` and `.bytes` at the traced shapes.
    cut: what a graph break hid from it, in words. predicted: seconds as predicted, of rewritten sites. measured: as measured, where asked.
    """

    qualified_name: str
    kind: str
    causal: bool
    heads: int
    kv_heads: int
    tokens: int
    key_tokens: int
    head_dim: int
    token_layout: str
    status: Status
    reason: str
    passes: tuple[str, ...]
    cost_before: Cost
    cost_after: Cost
    cut: str = ""
    predicted: Prediction | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class TokenReport:
    """Where tokens were found: patch grids (grid, prefix tokens, how), and places where visual tokens join a text."""

    what: str
    grid: tuple[int, ...] | None
    prefix: int
    visual: bool
    how: str


@dataclass(frozen=True)
class NearMissReport:
    """Something that looks like attention and was left alone, with the first thing that did not fit."""

    module: str
    node: str
    reason: str


@dataclass(frozen=True)
class Fitted:
    """What `rewrite.fit` came to.

    sites: by site, the first and the last loss of fitting site by site. site_losses: of each of these steps, the mean over sites.
    losses: of each step end to end. A site's loss is a relative error (1 for an output of zeros) or a distance of maps, as its pass says.
    """

    sites: dict[str, tuple[float, float]]
    site_losses: tuple[float, ...]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        stages = ((f"{len(self.sites)} sites, each by itself,", self.site_losses), ("the model end to end", self.losses))
        return "; ".join(f"{what} in {len(each)} steps, loss {each[0]:.4g} → {each[-1]:.4g}" for what, each in stages if each)


@dataclass
class Report:
    """Everything `rewrite` knows of a model. Print it for a table; `to_dict()` gives plain data.

    predicted: seconds of the whole model at the traced shapes, every operator that tokens run through among them; None where nothing was
    asked for. measured: as measured, where asked.
    """

    passes: tuple[str, ...]
    sites: list[SiteReport] = field(default_factory=list)
    tokens: list[TokenReport] = field(default_factory=list)
    near_misses: list[NearMissReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    total_before: GraphCost = field(default_factory=GraphCost)
    total_after: GraphCost = field(default_factory=GraphCost)
    graphs: int = 0
    breaks: list[Break] = field(default_factory=list)
    fitting: Fitted | None = None
    predicted: Prediction | None = None
    measured: Measured | None = None

    def add(self, record: Record) -> None:
        """Take in what happened to one more graph."""
        self.graphs += not record.again
        changed = {site.name: site for site in record.program.sites}
        self.total_before += record.before
        self.total_after += record.after
        for entry in record.recognition.found:
            before, after = site_costs(entry, changed[entry.site.name], record)
            if entry.site.name in record.lowered:
                self.total_after += GraphCost(after.multiply_adds, after.bytes)
            self.sites.append(self._site(entry, changed[entry.site.name], record, before, after))
        if self.passes and record.place is not None:
            seconds = whole_graph(record)
            self.predicted = seconds if self.predicted is None else self.predicted + seconds
        self._take_notes(record)
        self._tokens(record)
        self.near_misses += [NearMissReport(miss.module, miss.node, miss.reason) for miss in record.misses]

    def _take_notes(self, record: Record) -> None:
        """Say which rewritten sites have no Triton form, forward or backward, and why (they run in torch operators on a GPU too), and what
        is known only when the model runs."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for site in record.program.sites:
            for operation in site.body.operations if site.name in record.lowered else ():
                reason, told = codegen.reason_without_kernel(operation), "run"
                if reason is None and isinstance(operation, Attend):
                    reason, told = codegen.reason_without_backward(operation, site.dims), "find their gradients"
                if reason is not None:
                    reasons.setdefault((told, reason), []).append(site.name)
        notes = (
            f"{', '.join(dict.fromkeys(names))} {told} in torch operators on every device, without a kernel: {why}"
            for (told, why), names in reasons.items()
        )
        open_ = dict.fromkeys(one.by for one in record.program.exits if one.when is not None)
        decided = (f"{by}: the data decide in each call whether tokens leave, and costs are told as if none did" for by in open_)
        padded = dict.fromkeys(one.by for one in record.program.selections if isinstance(one, Select) and one.count.mass is not None)
        fewer = (f"{by}: the data decide in each call how many tokens stay in each row, and costs are told for the most" for by in padded)
        self.notes += [note for note in (*notes, *decided, *fewer, *declined_words(record.keys_kept)) if note not in self.notes]

    def _site(self, entry: Found, changed: Site, record: Record, before: Cost, after: Cost) -> SiteReport:
        site, cut = entry.site, record.cut.get(entry.site.name, "")
        passes = record.program.passes_of(site)
        reasons = [f"{by}: {reason}" for name, by, reason in record.program.declined if name == site.name]
        status: Status = "rewritten" if passes else ("declined" if reasons else "kept")
        return SiteReport(
            qualified_name=site.name, kind="unknown" if cut and entry.stream is None else site.kind, causal=site.causal,
            heads=site.dims["H"], kv_heads=site.dims["Hkv"],
            tokens=site.dims["Nq"], key_tokens=site.dims["Nk"], head_dim=site.dims["D"], token_layout=str(site.layout), status=status,
            reason="; ".join(reasons), passes=passes, cost_before=before, cost_after=after,
            cut=cut, predicted=predicted(entry, left_of(changed, record)) if site.name in record.lowered else None,
        )  # fmt: skip

    def _tokens(self, record: Record) -> None:
        for patch in record.patches:
            self.tokens.append(
                TokenReport("patches", tuple(patch.grid), patch.prefix, False, f"convolution {patch.conv.name} with kernel equal to stride")
            )
        merges = {entry.merge.node: entry.merge for entry in record.recognition.found if entry.merge is not None}
        for node in merges:
            self.tokens.append(TokenReport("visual positions", None, 0, True, f"vision features put into the text at {node.name}"))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (numbers, text, lists and dictionaries)."""
        sites = []
        for site in self.sites:
            plain = {item.name: getattr(site, item.name) for item in dataclasses.fields(site) if not item.name.startswith("cost")}
            for moment, cost in (("before", site.cost_before), ("after", site.cost_after)):
                plain[f"cost_{moment}"] = {
                    "multiply_adds": cost.multiply_adds,
                    "bytes": cost.bytes,
                    "multiply_adds_formula": str(cost.multiply_adds_formula),
                    "bytes_formula": str(cost.bytes_formula),
                }
            plain |= {
                kind: None if (each := getattr(site, kind)) is None else dataclasses.asdict(each) for kind in ("predicted", "measured")
            }
            sites.append({**plain, "passes": list(site.passes)})
        return {
            "passes": list(self.passes),
            "graphs": self.graphs,
            "breaks": [dataclasses.asdict(one) for one in self.breaks],
            "sites": sites,
            "tokens": [dataclasses.asdict(token) for token in self.tokens],
            "near_misses": [dataclasses.asdict(miss) for miss in self.near_misses],
            "notes": list(self.notes),
            "fitting": None if self.fitting is None else dataclasses.asdict(self.fitting),
            **{kind: None if (each := getattr(self, kind)) is None else dataclasses.asdict(each) for kind in ("predicted", "measured")},
            "total_before": dataclasses.asdict(self.total_before),
            "total_after": dataclasses.asdict(self.total_after),
        }

    def counts(self) -> dict[str, int]:
        """How many sites have each status."""
        statuses = [site.status for site in self.sites]
        return {status: statuses.count(status) for status in ("rewritten", "kept", "declined")}

    def _cut(self) -> dict[str, list[str]]:
        """What breaks hid: each once, with the sites it is hidden from."""
        names: dict[str, list[str]] = {}
        for site in self.sites:
            if site.cut:
                names.setdefault(site.cut, []).append(site.qualified_name)
        return names

    def _times(self) -> list[str]:
        """Which ratios of times there are, of after over before: headings, and fields of a site."""
        return [kind for kind in ("predicted", "measured") if any(getattr(site, kind) is not None for site in self.sites)]

    def table(self) -> Table:
        """The sites as a rich table."""
        table = Table(title=f"Attention sites ({', '.join(self.passes) or 'no passes'})", title_justify="left")
        for heading in ("site", "kind", "heads", "tokens", "head dim", "layout", "status", "multiply-adds", *self._times(), "reason"):
            table.add_column(heading, overflow="fold", justify="right" if heading in _NUMBERS else "left")
        for site in self.sites:
            kind = f"{site.kind}, causal" if site.causal else site.kind
            heads = str(site.heads) if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
            tokens = str(site.tokens) if site.tokens == site.key_tokens else f"{site.tokens} x {site.key_tokens}"
            cost = _count(site.cost_before.multiply_adds)
            if site.cost_after.multiply_adds != site.cost_before.multiply_adds:
                cost += f" → {_count(site.cost_after.multiply_adds)}"
            told = site.reason if site.status != "rewritten" else ", ".join(site.passes)
            times = ["" if (each := getattr(site, kind_)) is None else f"{each.ratio:.2f}x" for kind_ in self._times()]
            table.add_row(site.qualified_name, kind, heads, tokens, str(site.head_dim), site.token_layout, site.status, cost, *times, told)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        for token in self.tokens:
            where = f"grid {'x'.join(map(str, token.grid))}, {token.prefix} prefix tokens" if token.grid else token.what
            yield f"tokens: {where} ({token.how})"
        if self.breaks:
            yield f"captured as {self.graphs} graphs, for {len(self.breaks)} breaks:"
        for one in self.breaks:
            yield f"break: {one}"
        for told, names in self._cut().items():
            yield f"cut off: {', '.join(names)}: {told}"
        for miss in self.near_misses:
            yield f"near miss: {miss.module or miss.node} ({miss.node}): {miss.reason}"
        for note in self.notes:
            yield f"note: {note}"
        if self.fitting is not None:
            yield f"fitted: {self.fitting}"
        before, after = self.total_before, self.total_after
        fewer = after.multiply_adds and after.multiply_adds != before.multiply_adds
        ratio = f", {before.multiply_adds / after.multiply_adds:.2f}x fewer" if fewer else ""
        yield (
            f"whole model: {_count(before.multiply_adds)} → {_count(after.multiply_adds)} multiply-adds{ratio}; "
            + ", ".join(f"{count} {status}" for status, count in self.counts().items() if count)
        )
        for kind in ("predicted", "measured"):
            each = getattr(self, kind)
            if each is not None:
                told = f"{each.before * 1e3:.3g} → {each.after * 1e3:.3g} ms, {each.before / each.after:.2f}x as fast"
                yield f"whole model as {kind}: {told}"

    def __str__(self) -> str:
        # Wide enough that the table of a report written to a file does not fold its numbers.
        console = Console(file=io.StringIO(), width=160)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()


def site_costs(entry: Found, site: Site, record: Record) -> tuple[Cost, Cost]:
    """A site's cost as the model has it and as the passes left it; tokens that left the stack count in neither queries nor keys."""
    itemsize = node_itemsize(entry.region.output)
    materialised = is_materialised(entry.region.core)
    before = original_cost(entry.site, itemsize, materialised)
    left = left_of(site, record)
    return before, rewritten_cost(left, itemsize) if site.name in record.lowered else original_cost(left, itemsize, materialised)


def whole_graph(record: Record) -> Prediction:
    """The time of one graph as predicted: its sites, and every other operator."""
    assert record.place is not None
    changed = {site.name: site for site in record.program.sites}
    total = around_sites(record.operators, *record.place)
    for entry in record.recognition.found:
        seconds = predicted if entry.site.name in record.lowered else as_it_was
        total += seconds(entry, left_of(changed[entry.site.name], record))
    return total


def left_of(site: Site, record: Record) -> Site:
    """The site with the tokens that are left of it."""
    gone = record.gone.get(site.name, 0)
    return dataclasses.replace(site, dims={**site.dims, "Nq": site.dims["Nq"] - gone, "Nk": site.dims["Nk"] - gone})


def _count(number: int) -> str:
    """A count with a unit: 1.25 G."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
