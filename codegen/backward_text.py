"""Pieces that both backward kernels are put together from: signatures, walks, and loads of what is walked over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codegen.kernel_reads import Owner
from codegen.walked_list import WalkedList


def indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    return [f"{'    ' * depth}{line}".rstrip() for line in lines]


def signature(
    name: str,
    operands: Sequence[str],
    strided: Mapping[str, str],
    tensors: Sequence[str],
    sizes: Sequence[str],
    ways: Sequence[str],
    listed: WalkedList,
) -> list[str]:
    """The head of a kernel. strided: operand -> its axes; tensors: lines of the other tensors' strides; ways: `..._by` constants."""
    unspecialised = ", ".join(f'"{size}"' for size in ("Nq", "Nk", *listed.sizes))
    return [
        f"@triton.jit(do_not_specialize=[{unspecialised}])",
        f"def {name}(",
        f"    {', '.join(operands)},",
        *(f"    {', '.join(f'{operand}_stride_{axis}' for axis in axes)}," for operand, axes in strided.items()),
        *tensors,
        f"    {', '.join([*sizes, *listed.sizes])},",
        *([f"    {', '.join(f'{way}: tl.constexpr' for way in ways)},"] if ways else []),
        "    HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,",
        "    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,",
        "):",
    ]


def walk(owner: Owner, listed: WalkedList, body: Sequence[str]) -> list[str]:
    """A walk over blocks of the other side: blocks seen in full, then blocks that the mask or the end cuts.

    listed: the block list that says which; without one all are walked over, and only the last can be cut.
    """
    count, size, place = ("Nk", "BLOCK_K", "start") if owner == "queries" else ("Nq", "BLOCK_Q", "first")
    if listed:
        found = f"{listed.start} + 2 * block + CHECKED"
        bounds = [f"begin, end = tl.load({found}), tl.load({found} + 1)"]
        begin = f"{place} = (tl.load(blocks + slot) * {size}).to(tl.int64)"
    else:
        bounds = [f"begin, end = 0, {count} // {size}", "if CHECKED:", f"    begin, end = {count} // {size}, tl.cdiv({count}, {size})"]
        begin = f"{place} = tl.full((), slot * {size}, tl.int64)"
    position = "j = start.to(tl.int32) + columns" if owner == "queries" else "i = first.to(tl.int32) + rows"
    what = "key" if owner == "queries" else "query"
    return [
        f"for CHECKED in tl.static_range(2):  # 0: {what} blocks seen in full; 1: those that the mask or the end cuts",
        *indented(bounds),
        "    for slot in tl.range(begin, end):",
        *indented([begin, position, *body], 2),
    ]


def walked_tile(name: str, inside: str, lanes: str, in_width: str, source: str, address: str) -> list[str]:
    """A load of what is walked over, [block, width]; only a cut block may lie beyond the end."""
    return [
        f"{name}_rows = {source} + {address} + {lanes}[None, :]",
        "if CHECKED:",
        f"    {name}_tile = tl.load({name}_rows, mask={inside}[:, None] & {in_width}[None, :], other=0.0)",
        "else:",
        f"    {name}_tile = tl.load({name}_rows, mask={in_width}[None, :], other=0.0)",
    ]


def _keys(name: str, lanes: str, in_width: str) -> list[str]:
    address = f"start * {name}_stride_j + columns[:, None] * {name}_stride_j"
    return walked_tile(name, "in_keys", lanes, in_width, f"{name}_head", address)


def _queries(name: str, lanes: str, in_width: str) -> list[str]:
    address = f"first * {name}_stride_i + rows[:, None] * {name}_stride_i"
    return walked_tile(name, "in_rows", lanes, in_width, f"{name}_head", address)


KEY_TILES = [
    "in_keys = columns >= 0",
    "if CHECKED:",
    "    in_keys = j < Nk",
    *_keys("key", "lanes", "in_width"),
    *_keys("value", "value_lanes", "in_value_width"),
]

QUERY_TILES = [
    "in_rows = rows >= 0",
    "if CHECKED:",
    "    in_rows = i < Nq",
    *_queries("query", "lanes", "in_width"),
    *_queries("d_out", "value_lanes", "in_value_width"),
]
