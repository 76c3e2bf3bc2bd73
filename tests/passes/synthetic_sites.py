"""Small sites of every kind that passes meet, with random operands and what a pass's reference is given for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch

from rewrite.ir import NK, NQ, QK, Attend, AttentionInputs, Body, Grouping, I, J, Program, ReceivedSinks, Site, TokenLayout, tensor
from rewrite.ir.semantics import evaluate_operation, evaluate_site

BATCH, WIDTH = 2, 4
SCALE = sympy.Rational(3, 10)
CAUSAL = J <= I + NK - NQ
# Wide enough that one massive channel exceeds 20 times the root mean square: at most sqrt(CHANNELS).
CHANNELS = 512
IMAGE = range(3, 15)
SINKS = (0, 5, 9)  # one text token, two of the image
SINK_CHANNEL = 7


def site(
    tokens: int,
    grid: tuple[int, ...] | None = None,
    prefix: int = 0,
    *,
    queries: int | None = None,
    heads: tuple[int, int] = (2, 2),
    mask: sympy.Basic = sympy.true,
    score: sympy.Expr = SCALE * QK,
    visual: bool = False,
    projected: bool = False,
    **facts: object,
) -> Site:
    """A site of `tokens` keys; `queries` (all by default) are the last of them. visual: an image lies at IMAGE, hidden states known.

    projected: what queries and keys were projected from is known, and the hidden states in front of it.
    """
    attend = Attend("output", "query", "key", "value", score=score, mask=mask)
    dims = {"B": BATCH, "H": heads[0], "Hkv": heads[1], "Nq": queries or tokens, "Nk": tokens, "D": WIDTH, "Dv": WIDTH}
    result = Site(
        name="blocks.3.attn",
        layer=3,
        depth=6,
        stack=0,
        kind="self",
        body=Body((attend,)),
        dims=dims
        | ({"C": CHANNELS if visual else WIDTH} if visual or projected else {})
        | ({"Cin": heads[0] * WIDTH} if projected else {}),
        layout=TokenLayout(grid, prefix, visual),
        operands=(
            "query",
            "key",
            "value",
            *attend.tensors(),
            *(("hidden", "visual") if visual else ()),
            *(("hidden", "input") if projected else ()),
        ),
        cached=queries is not None,
    )
    return replace(result, **facts)  # type: ignore[arg-type]


SITES: dict[str, Site] = {
    "grid": site(72, (8, 9), projected=True),
    "grid of even sides": site(98, (8, 12), 2, layer=2),
    "grid, CLS": site(73, (8, 9), 1, projected=True),
    "grid, CLS and registers": site(77, (8, 9), 5, projected=True),
    "grid, shared heads": site(73, (8, 9), 1, heads=(4, 2), projected=True),
    "grid, bias": site(72, (8, 9), score=SCALE * QK + tensor("bias", "hij")),
    "grid, mask": site(72, (8, 9), mask=sympy.Ne(tensor("padding", "bj"), 0)),
    "grid, other count": site(49, (8, 9)),
    "volume": site(72, (2, 4, 9)),
    "sequence": site(60),
    "sequence, prefix": site(62, prefix=2),
    "text": site(24, mask=CAUSAL),
    "text, prefix": site(24, prefix=2, mask=CAUSAL),
    "image and text": site(24, mask=CAUSAL, visual=True),
    "image and text, padded": site(24, mask=sympy.And(CAUSAL, sympy.Ne(tensor("padding", "bj"), 0)), visual=True),
    "image and text, shared heads": site(24, heads=(4, 2), mask=CAUSAL, visual=True),
    "image and text, layer 0": site(24, mask=CAUSAL, visual=True, layer=0),
    "image and text, last layer": site(24, mask=CAUSAL, visual=True, layer=5),
    "step of one": site(24, queries=1, visual=True),
    "step of four": site(24, queries=4, mask=CAUSAL, visual=True),
    "cache, not causal": site(24, queries=4),
    "cross": site(72, (8, 9), kind="cross"),
    "dropout": site(72, (8, 9), dropout=0.1),
    "map read": site(24, mask=CAUSAL, visual=True, map_read=True),
}


@dataclass(frozen=True)
class Example:
    """operands: what the recognised site reads. hidden [B, Nk, C], visual [B, Nk]: of every key. logits [B, H, Nq, Nk]."""

    site: Site
    operands: dict[str, torch.Tensor]
    hidden: torch.Tensor
    visual: torch.Tensor
    logits: torch.Tensor

    def output(self, program: Program, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """The program's one site by the reference semantics."""
        (changed,) = program.sites
        earlier = self.site.dims["Nk"] - self.site.dims["Nq"]
        groups = next((operation for operation in changed.body.operations if isinstance(operation, Grouping)), None)
        past = {"hidden": self.hidden[:, :earlier], "visual": self.visual[:, :earlier]}
        cached = None
        if isinstance(groups, ReceivedSinks) and earlier:
            # What the queries of the prompt attended to is not known here: it had no sinks.
            cached = torch.zeros(BATCH, self.site.dims["H"], earlier, dtype=torch.int32)
        elif groups is not None and earlier:
            evaluate_operation(groups, past)
            cached = past[groups.result]
        return evaluate_site(program, changed, {**self.operands, **parameters}, self.visual, cached)

    def inputs(self, parameters: dict[str, torch.Tensor]) -> AttentionInputs:
        """What a pass's reference is given."""
        repeat = self.site.dims["H"] // self.site.dims["Hkv"]
        key, value = (self.operands[name].repeat_interleave(repeat, dim=1) for name in ("key", "value"))
        return AttentionInputs(
            self.operands["query"], key, value, self.logits, self.site, self.hidden, self.visual, parameters, self.operands.get("input")
        )


def example(case: Site, seed: int = 0) -> Example:
    """Random operands in float64."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, queries, keys = (case.dims[name] for name in ("H", "Hkv", "Nq", "Nk"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    hidden = normal(BATCH, keys, case.dims.get("C", 1))
    visual = torch.zeros(BATCH, keys, dtype=torch.bool)
    if case.layout.visual:
        for row in range(BATCH):
            visual[row, [row + token for token in IMAGE]] = True
            hidden[row, [row + token for token in SINKS], SINK_CHANNEL] = 1e4
    tensors = {
        "query": 3 * normal(BATCH, heads, queries, WIDTH),
        "key": normal(BATCH, kv_heads, keys, WIDTH),
        "value": normal(BATCH, kv_heads, keys, WIDTH),
        "bias": normal(heads, queries, keys),
        "padding": (torch.arange(keys) >= torch.tensor([[1], [0]])).to(torch.int32),
        "hidden": hidden[:, keys - queries :],
        "visual": visual[:, keys - queries :],
        "input": normal(BATCH, queries, case.dims.get("Cin", 1)),
    }
    operands = {name: tensors[name] for name in case.operands}
    logits = float(SCALE) * tensors["query"] @ tensors["key"].repeat_interleave(heads // kv_heads, dim=1).transpose(-2, -1)
    if "bias" in operands:
        logits = logits + operands["bias"]
    if case.causal:
        logits = logits.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1), -torch.inf)
    if "padding" in operands:
        logits = logits.masked_fill(operands["padding"][:, None, None] == 0, -torch.inf)
    return Example(case, operands, hidden, visual, logits)


def random_parameters(changed: Site, seed: int = 1) -> dict[str, torch.Tensor]:
    """Values for the parameters that a pass added, none of them zero."""
    random = torch.Generator().manual_seed(seed)
    return {parameter.name: torch.randn(*parameter.shape, generator=random, dtype=torch.float64) for parameter in changed.body.parameters}
