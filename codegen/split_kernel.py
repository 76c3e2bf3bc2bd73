"""The split form of a streaming kernel: a walk whose programs share the key blocks of all tiles, and the join of what they leave.

Which blocks are whose is `codegen.split_keys`. The walk is the streaming kernel's, from tile to tile; the join adds sinks, divides and
weighs as that one does after its walk, once for each row.

Groups of keys are weighted in the join, when their masses are known: the walk keeps an accumulator for every weight that groups may have.
That reads keys and values once, which is what decoding waits for, where a second walk would read the keys twice; and tiles are low there
(`SMALLEST_BLOCK`; 32 queries spill), so that the accumulators fit the registers, as they do not in a kernel of whole tiles
(`codegen.group_walks`).
"""

from __future__ import annotations

from functools import cached_property

from codegen.backward_text import indented
from codegen.group_walks import add_masses, chosen, group_weights, shared_weights, zero_masses
from codegen.normaliser_lines import accumulate, end, gathered, merge, merge_accumulator, start
from codegen.split_keys import reason_against_split
from codegen.streaming import CONSTANTS, PLACE, SUM_CONSTANTS, VALUE_LANES, VALUE_TILE, StreamingKernel
from codegen.tiles import SMALLEST_BLOCK


class SplitKernel:
    """Two functions of an emitted file beside the whole kernel's: `<name>_split` and `<name>_join`."""

    def __init__(self, whole: StreamingKernel) -> None:
        self.whole, self.attend, self.reads = whole, whole.attend, whole.reads
        self.walk_name, self.join_name = f"{whole.name}_split", f"{whole.name}_join"

    @property
    def possible(self) -> bool:
        return reason_against_split(self.attend) is None

    @property
    def listed(self) -> bool:
        """Whether a list says which blocks a tile visits.

        How long a list is that is made on the device is not known when blocks are shared out. With the few queries of decoding it would
        hold every block anyway (`codegen.tile_list`).
        """
        return bool(self.whole.listed) and not self.whole.listed.by_tile

    @property
    def lists(self) -> list[str]:
        return ["starts", "blocks", "owners"] if self.listed else []

    def makers(self) -> list[str]:
        """Functions of `codegen.launching` that a launch calls."""
        return [*(["list_owners"] if self.listed else []), "partial_results", "units_for"] if self.possible else []

    @property
    def masses(self) -> list[str]:
        return [f"mass_{identifier}" for identifier in self.reads.group_ids.values()]

    @property
    def facts(self) -> list[str]:
        """What is kept of every row."""
        return [*gathered(self.attend, self.whole.values), *self.masses]

    @cached_property
    def accumulators(self) -> list[str]:
        if self.attend.groups is not None:
            return [f"accumulator_{index}" for index in range(len(shared_weights(self.attend.groups)))]
        return ["accumulator"] if self.whole.values else []

    @property
    def parts(self) -> list[str]:
        """The tensors of partial results."""
        return [*(["row_parts"] if self.facts else []), *(["parts"] if self.accumulators else [])]

    @property
    def sizes(self) -> list[str]:
        """What both are told besides the numbers of heads, queries and keys. run: key blocks of one head, where a list gives them."""
        return ["share", *(["run"] if self.listed else [])]

    def walk(self) -> list[str]:
        whole = self.whole
        strided = whole.strides("query", "key", "value")
        operands = [*strided, *self.parts, *self.lists]
        constants = CONSTANTS if whole.values else SUM_CONSTANTS
        return [
            *whole.signature(self.walk_name, operands, strided, ["Nq", "Nk", "total", *self.sizes], constants),
            "    # One program: its share of the key blocks of all tiles, which may begin and end within a tile.",
            "    unit = tl.program_id(0)",
            "    low, high = unit * share, tl.minimum(unit * share + share, total)",
            *whole.lanes(),
            *self._tiles(),
            "    for tile in tl.range(first_tile, last_tile + 1):",
            *indented([*PLACE, *self._origin(), "", *whole.queries(), "", *self._begin(), ""]),
            *indented(whole.loop(self._body(), _OWN, self.listed)),
            "",
            *indented(self._leave()),
        ]

    def _tiles(self) -> list[str]:
        if not self.listed:
            return ["    key_blocks = tl.cdiv(Nk, BLOCK_K)", "    first_tile, last_tile = low // key_blocks, (high - 1) // key_blocks"]
        owner = "({0} // run) * tl.cdiv(Nq, BLOCK_Q) + tl.load(owners + {0} % run)"
        return [f"    first_tile = {owner.format('low')}", f"    last_tile = {owner.format('(high - 1)')}"]

    def _origin(self) -> list[str]:
        """Where the block that the tile calls 0 lies in the run."""
        return [f"    origin = {'(tile // tl.cdiv(Nq, BLOCK_Q)) * run' if self.listed else 'tile * key_blocks'}"]

    def _begin(self) -> list[str]:
        accumulators = [f"    {each} = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)" for each in self.accumulators]
        return [*start(self.attend, self.whole.values), *zero_masses(self.reads), *accumulators]

    def _body(self) -> list[str]:
        """What is done with one block of keys."""
        whole, groups = self.whole, self.attend.groups
        if groups is None:
            online = self.attend.normaliser == "softmax"
            return [*whole.weights(), *([*VALUE_TILE, accumulate(online)] if whole.values else [])]
        lines = [*whole.weights(), *add_masses(groups, self.reads), *VALUE_TILE]
        for accumulator, (_, names) in zip(self.accumulators, shared_weights(groups), strict=True):
            lines += [f"own = tl.where({chosen(groups, names)}[None, :], weight, 0.0)", accumulate(True, accumulator, "own")]
        return lines

    def _leave(self) -> list[str]:
        return [
            *self._places(),
            *(f"    tl.store({fact_rows}, {fact}, mask=in_rows)" for fact, fact_rows in self._fact_rows()),
            *(f"    tl.store({part_rows}, {each}, mask=in_rows[:, None])" for each, part_rows in self._part_rows()),
        ]

    def _places(self) -> list[str]:
        """Where the facts and the accumulators of a program and a tile lie."""
        lanes = "rows[:, None] * BLOCK_DV + value_lanes[None, :]"
        facts = f"    facts = row_parts + (unit + tile).to(tl.int64) * ({len(self.facts)} * BLOCK_Q) + rows"
        part = f"    part = parts + (unit + tile).to(tl.int64) * ({len(self.accumulators)} * BLOCK_Q * BLOCK_DV) + {lanes}"
        return [*([facts] if self.facts else []), *([part] if self.accumulators else [])]

    def _fact_rows(self) -> list[tuple[str, str]]:
        return [(fact, f"facts + {index} * BLOCK_Q") for index, fact in enumerate(self.facts)]

    def _part_rows(self) -> list[tuple[str, str]]:
        return [(each, f"part + {index} * BLOCK_Q * BLOCK_DV") for index, each in enumerate(self.accumulators)]

    def join(self) -> list[str]:
        whole, values = self.whole, self.whole.values
        strided = whole.strides("out", "lse")
        operands = [*self.parts, *strided, *self.lists[:1]]
        constants = "    DV: tl.constexpr, BLOCK_DV: tl.constexpr, " if values else "    "
        return [
            *whole.signature(self.join_name, operands, strided, ["Nq", "Nk", *self.sizes], f"{constants}{_JOIN_CONSTANTS}"),
            "    # One program: what was left of one tile, in the order of the run.",
            "    tile = tl.program_id(0)",
            "    rows = tl.arange(0, BLOCK_Q)",
            *(VALUE_LANES if values else []),
            *PLACE,
            *([] if self.listed else ["    key_blocks = tl.cdiv(Nk, BLOCK_K)"]),
            *self._origin(),
            *(_LISTED_ENDS if self.listed else ["    low, high = origin, origin + key_blocks"]),
            "    first_unit = low // share",
            "    last_unit = tl.where(low < high, (high - 1) // share, first_unit - 1)  # a tile that sees no key is nobody's",
            "",
            *self._begin(),
            "    for unit in tl.range(first_unit, last_unit + 1):",
            *indented(self._places()),
            *(f"        part_{fact} = tl.load({fact_rows}, mask=in_rows, other=0.0)" for fact, fact_rows in self._fact_rows()),
            *indented(merge(self.attend, values, self.masses), 2),
            *indented([line for each, part_rows in self._part_rows() for line in self._joined(each, part_rows)], 2),
            "",
            *self._weighted(),
            *end(self.attend, self.reads, values),
            *whole.results(),
        ]

    def _joined(self, accumulator: str, part_rows: str) -> list[str]:
        load = f"part_tile = tl.load({part_rows}, mask=in_rows[:, None], other=0.0)"
        return [load, merge_accumulator(self.attend, accumulator, "part_tile")]

    def _weighted(self) -> list[str]:
        """The accumulators of groups in one, each weighted as its groups are."""
        if self.attend.groups is None:
            return []
        terms = (f"weight_{index}[:, None] * {each}" for index, each in enumerate(self.accumulators))
        return [*group_weights(self.attend.groups, self.reads), f"    accumulator = {' + '.join(terms)}"]

    def lines(self) -> list[str]:
        return [*self.walk(), "", "", *self.join()]

    def launch(self) -> list[str]:
        """Lines of `launch` that take the split form where it pays, and return."""
        whole, reads = self.whole, self.reads
        parts, lists, sizes = self.parts, self.lists, ", ".join(self.sizes)
        given, results = whole.strides("query", "key", "value"), whole.strides("out", "lse")
        made = {"row_parts": f"{len(self.facts)}, tile.block_q", "parts": f"{len(self.accumulators)}, tile.block_q, power_of_two(DV)"}
        limits = [f"tile.block_q <= {SMALLEST_BLOCK}"] if self.attend.groups is not None else []
        limits += ["Nq <= tile.block_q"] if whole.listed.by_tile else []
        few = f" if {' and '.join(limits)} else 0" if limits else ""
        tensors = [*reads.ids.values()]
        return [
            *(_LISTED_RUN if self.listed else _RUN),
            f"    units = units or (units_for(tiles, total, longest, query.device){few})",
            "    if units and total:",
            *([f"    {line}" for line in whole.listed.made("tile", reads)] if self.listed else []),
            "        share = triton.cdiv(total, units)",
            "        units = triton.cdiv(total, share)",
            *(f"        {each} = partial_results(units + tiles - 1, {made[each]}, device=query.device)" for each in parts),
            f"        {self.walk_name}[(units,)](",
            f"            {', '.join([*given, *parts, *lists, *tensors])},",
            f"            {', '.join(f'*{operand}.stride()[:3]' for operand in given)},",
            *indented(reads.given()),
            f"            H, Nq, Nk, total, {sizes},",
            *indented(whole.constants() if self.attend.groups is None else whole.constants(str(WARPS_OF_GROUPS))),
            "        )",
            f"        {self.join_name}[(tiles,)](",
            f"            {', '.join([*parts, *results, *lists[:1], *tensors])},",
            f"            {', '.join(f'*{operand}.stride()[:3]' for operand in results)},",
            *indented(reads.given()),
            f"            H, Nq, Nk, {sizes},",
            f"            {'DV=DV, BLOCK_DV=power_of_two(DV), ' if whole.values else ''}BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,",
            "            num_warps=tile.warps,",
            "        )",
            "        return",
        ]


_JOIN_CONSTANTS = "BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,"

# With the four that tiles of few queries have, the accumulators of groups spill on sm_90 at head dim 128.
WARPS_OF_GROUPS = 8

# A tile's own blocks, cut to the program's share.
_OWN = ["begin, end = tl.maximum(begin, low - origin), tl.minimum(end, high - origin)"]

_LISTED_ENDS = ["    low, high = origin + tl.load(starts + 2 * block), origin + tl.load(starts + 2 * block + 2)"]

_RUN = ["    longest = triton.cdiv(Nk, tile.block_k)", "    total = tiles * longest"]

_LISTED_RUN = [
    "    owners, longest = list_owners(STATIC_MASK, Nq, Nk, (tile.block_q, tile.block_k), query.device)",
    "    run = len(owners)",
    "    total = B * H * run",
]
