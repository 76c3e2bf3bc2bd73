"""The emitted file of linear attention through its state: a header that states the equations, the kernels, and their launch."""

from __future__ import annotations

import json
import textwrap

import sympy

from codegen.emitted_file import docstring, facts_of, kernel_name
from codegen.interval_kernel import IntervalKernels
from codegen.kernel_reads import KernelReads
from codegen.state_features import StateFeatures
from codegen.state_kernel import StateKernels, offset_of
from rewrite.ir.expression import I, J, conjuncts, tensors_in, to_json
from rewrite.ir.operations import Attend


def state_kernels(attend: Attend, name: str) -> StateKernels:
    """The kernels for an operation. Raises `RewriteError` where it has no state form."""
    form = StateFeatures(attend, name).form
    is_interval = form.sorts_keys or (form.limit is not None and offset_of(form) is None)
    return (IntervalKernels if is_interval else StateKernels)(attend, name)


def _paired(attend: Attend) -> sympy.Basic:
    """The terms of the mask that compare a query with a key."""
    return sympy.And(*(term for term in conjuncts(attend.mask) if {I, J} <= term.free_symbols))


def _header(kernels: StateKernels, sites: tuple[str, ...], passes: tuple[str, ...]) -> list[str]:
    form = kernels.form
    features = " + ".join(f"({each.query}) ({each.key})" + (" qk" if each.dot else "") for each in form.features)
    own = "sum_{j of the chunk, seen} score[i,j] value[j,:]" if kernels.limited else ""
    before = "j before the chunk, of its segment" if form.segments else "j before the chunk"
    equations = [
        "sum_j score[i,j] value[j,:] = features[i,:] . state" + (f" + {own}" if own else ""),
        f"state = sum_{{{before}}} features[j,:] value[j,:]^T" if kernels.limited else "state = sum_j features[j,:] value[j,:]^T",
    ]
    facts = {"features": features}
    facts |= {"decay": f"exp(({form.rate}) (j - i - ({form.shift})))"} if kernels.decays else {}
    facts |= facts_of(kernels.attend, sites, passes)
    return docstring(f"{kernels.name}: linear attention through its state.", equations, facts)


def _launch(kernels: StateKernels) -> list[str]:
    form, reads = kernels.form, kernels.reads("queries")
    whole = KernelReads(kernels.attend)
    ids = whole.ids
    said = ", ".join(f"{name} [{', '.join(map(str, indices))}]" for name, indices in whole.tensors.items()) or "none"
    given = [f"        {', '.join(reads.ids.values())},"] if reads.ids else []
    orders = {kernel: "".join(f" {name}," for name in kernels.orders(kernel)) for kernel in ("states", "carry", "outputs")}
    is_interval, offset = isinstance(kernels, IntervalKernels), offset_of(form)
    dots = sum(feature.dot for feature in form.features)
    shape = "FEATURES=FEATURES, BLOCK_D=power_of_two(D), BLOCK_DV=tile.block_v"
    warps = "        num_warps=tile.warps, num_stages=tile.stages,"
    carried = [
        f"    for part, size in [(states, FEATURES * DV){', (sums, FEATURES)' if form.totals else ''}]:",
        f"        {kernels.name}_carry[(B * state_heads, triton.cdiv(size, CARRIED))](",
        f"            part,{orders['carry']}",
        *(f"    {line}" for line in given),
        *(f"    {line}" for line in reads.given()),
        "            H, Nq, Nk, chunks, HEADS_PER_STATE=H // state_heads, SIZE=size, CHUNK=chunk, BLOCK=CARRIED,",
        "        )",
    ]
    summed = [
        "    if chunks > 1:",
        f"        states, {'sums' if form.totals else '_'} = states.sum(2), {'sums.sum(2)' if form.totals else 'None'}",
    ]
    if is_interval:
        named = ", ".join(f"{name!r}: {ids[name]}" for name in tensors_in(_paired(kernels.attend)))
        places = [
            "    tiles = triton.cdiv(Nq, tile.block_q)",
            "    chunk = device_chunk(FEATURES, DV, tile)",
            "    chunks = triton.cdiv(Nk, chunk)",
            f"    pairs = intervals(mask_sides(PAIRED_MASK), {{{named}}}, query, key).for_rows(B)",
            "    key_order, _, query_order, begins, ends = pairs",
            "    chunk_begins = pairs.chunk_begins(chunk)",
        ]
    elif offset is not None:
        places = [
            f"    offset = {offset}",
            "    base = offset // tile.block_q * tile.block_q",
            "    tiles = triton.cdiv(Nq + offset - base, tile.block_q)",
            "    chunk = device_chunk(FEATURES, DV, tile)",
            "    chunks = triton.cdiv(max(Nk, Nq + offset, 1), chunk)",
        ]
    else:
        places = [
            "    offset, base, tiles = 0, 0, triton.cdiv(Nq, tile.block_q)",
            "    chunk = piece_of_keys(B * state_heads, Nk, tile, query.device)",
            "    chunks = triton.cdiv(Nk, chunk)",
        ]
    return [
        "def launch(query, key, value, tensors, out, lse, tile=None):",
        '    """Run the kernels.',
        "",
        "    query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv] -> out [B, H, Nq, Dv], lse [B, H, Nq] float32.",
        *textwrap.wrap(
            f"tensors, in this order, axes b, h, i, j of that size or 1, others of any: {said}.",
            130,
            initial_indent="    ",
            subsequent_indent="    ",
        ),
        "    tile: a codegen.state_tiles.StateTile; by default the one for the head dim.",
        '    """',
        "    check_launch(query, key, value)",
        "    (B, H, Nq, D), (_, key_heads, Nk, DV) = query.shape, value.shape",
        *([f"    {', '.join(ids.values())}{',' if len(ids) == 1 else ''} = tensors"] if ids else []),
        f"    tile = tile or state_tile(D, DV, query.element_size(){', intervals=True' if is_interval else ''})",
        f"    FEATURES, state_heads = {dots} * D + {len(form.features) - dots}, {'key_heads' if form.shares_keys else 'H'}",
        *places,
        "    columns = triton.cdiv(DV, tile.block_v)",
        "    states = torch.empty(B, state_heads, chunks, FEATURES, DV, dtype=torch.float32, device=query.device)",
        f"    sums = {'torch.empty(states.shape[:4], dtype=torch.float32, device=query.device)' if form.totals else 'states'}",
        f"    {kernels.name}_states[(chunks * state_heads * B, columns)](",
        f"        key, value, states, sums,{orders['states']}",
        *given,
        "        *key.stride()[:3], *value.stride()[:3],",
        *reads.given(),
        "        H, Nq, Nk, chunks,",
        "        HEADS_PER_STATE=H // state_heads, STATES_PER_KEY=state_heads // key_heads, D=D, DV=DV,",
        f"        {shape},",
        "        BLOCK_K=tile.block_k, CHUNK=chunk, PRECISION=dot_precision(query.dtype),",
        warps,
        "    )",
        *(carried if kernels.limited else summed),
        f"    {kernels.name}_outputs[(tiles * H * B, columns)](",
        f"        query, key, value, states, sums, out, lse,{orders['outputs']}",
        *given,
        "        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *lse.stride(),",
        *reads.given(),
        f"        H, Nq, Nk, {'chunks' if kernels.limited else '1'}, tiles,{'' if is_interval else ' base, offset,'}",
        "        HEADS_PER_KEY=H // key_heads, HEADS_PER_STATE=H // state_heads, D=D, DV=DV,",
        f"        {shape},",
        "        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, CHUNK=chunk, PRECISION=dot_precision(query.dtype),",
        warps,
        "    )",
    ]


def state_name(attend: Attend) -> str:
    """A name that says whose kernels these are, such as ``attend_state_linear_causal``."""
    return kernel_name(attend).replace("attend", "attend_state", 1)


def state_source(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = ()) -> str:
    """The text of a Python file with the kernels that compute `attend` through its state, and their `launch`.

    Raises `RewriteError` where the operation has no state form, or one that has no Triton form.
    """
    kernels = state_kernels(attend, state_name(attend))
    needed = ["broadcast_strides", "check_launch", "dot_precision", "power_of_two"]
    imports = ["import torch", "import triton", "import triton.language as tl"]
    paired = []
    if isinstance(kernels, IntervalKernels):
        imports += ["from codegen.intervals import intervals, mask_sides"]
        text = json.dumps(to_json(_paired(attend)))
        paired = [f"PAIRED_MASK = {text!r}  # what intervals are made from on the device, as JSON", "", ""]
    imports += [f"from codegen.launching import {', '.join(needed)}"]
    imports += [f"from codegen.state_tiles import {'CARRIED, device_chunk' if kernels.limited else 'piece_of_keys'}, state_tile"]
    carry = [*kernels.carry(), "", ""] if kernels.limited else []
    body = [*kernels.states(), "", "", *carry, *kernels.outputs(), "", "", *_launch(kernels)]
    return "\n".join([*_header(kernels, sites, passes), *imports, "", *(paired or [""]), *body, ""])
