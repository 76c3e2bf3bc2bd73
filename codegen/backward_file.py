"""The emitted file of a backward pass: a header that states the gradients, two kernels, and a function that launches both."""

from __future__ import annotations

import textwrap

from codegen.backward_block import BackwardBlock, crowding, reached, reason_against_gradient
from codegen.backward_keys import KeysKernel
from codegen.backward_queries import QueriesKernel
from codegen.backward_text import indented
from codegen.emitted_file import docstring, facts_of, kernel_name
from codegen.streaming import reason_against
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import W, letters
from rewrite.ir.operations import Attend


def backward_name(attend: Attend) -> str:
    """A name that says whose gradients these are, such as ``attend_backward_causal_biased``."""
    return kernel_name(attend).replace("attend", "attend_backward", 1)


def reason_against_backward(attend: Attend, wanted: tuple[str, ...] | None = None) -> str | None:
    """Why an operation has no backward kernels, in words, or None.

    wanted: the tensors whose gradients are asked for; every tensor that arithmetic reads if None.
    """
    reason = reason_against(attend)
    for name in attend.tensors() if wanted is None else wanted:
        if reason is None and reached(attend, name):
            reason = reason_against_gradient(attend, name)
    return reason


_OF_GROUPS = (
    "mass_g[i]     = sum of w[i,j] over the keys of group g",
    "factor        = weight[g(j)], of the masses",
    "offset[g]     = sum_f (sum of w * d_weight over the keys of group f) * d weight[f] / d mass_g",
)


def _equations(attend: Attend) -> list[str]:
    """What the two kernels compute, with the names that they use."""
    weight = {"softmax": "exp(score - lse)[i,j]", "sum": "score[i,j] * share[i]", "none": "score[i,j]"}[attend.normaliser]
    factor = "" if attend.weight == W and attend.groups is None else "factor * "
    groups = [] if attend.groups is None else ["", *_OF_GROUPS]
    offset = "" if attend.groups is None else " + offset[g(j)]"
    d_score = {
        "softmax": f"w * ({factor}d_weight{offset} - delta[i])",
        "sum": f"{factor}d_weight * share[i] - delta[i]",
        "none": f"{factor}d_weight",
    }[attend.normaliser]
    counted = "sum_j w * (factor * d_weight + offset[g(j)])"
    delta = {
        "softmax": [f"delta[i]      = {'d_out[i,:] . out[i,:]' if attend.groups is None else counted} - d_lse[i]"],
        "sum": [
            "delta[i]      = d_out[i,:] . out[i,:] * share[i] * (slope of the denominator)[i] - d_lse[i] / total[i]",
            "share[i]      = 1 / denominator[i]",
        ],
        "none": [],
    }[attend.normaliser]
    return [
        f"w[i,j]        = {weight}, zero where the mask hides j",
        "d_weight[i,j] = d_out[i,:] . value[j,:]",
        *delta,
        f"d_score[i,j]  = {d_score}",
        f"d_value[j,:]  = sum_i {factor}w[i,j] * d_out[i,:]",
        "d_query[i,:]  = sum_j d_score[i,j] * slope[i,j] * key[j,:]",
        "d_key[j,:]    = sum_i d_score[i,j] * slope[i,j] * query[i,:], over the heads that share the key's",
        *groups,
    ]


def _header(name: str, block: BackwardBlock, sites: tuple[str, ...], passes: tuple[str, ...]) -> list[str]:
    attend = block.attend
    facts = {"slope": f"{block.slope}, the derivative of the score by qk"}
    facts |= {} if attend.weight == W else {"factor": str(block.factor)}
    facts |= facts_of(attend, sites, passes)
    title = f"{name}: gradients of attention, its weights recomputed block by block."
    return docstring(title, _equations(attend), facts)


def _call(kernel: QueriesKernel | KeysKernel, tile: str, grid: str, given: dict[str, str], numbers: list[str]) -> list[str]:
    """The launch of one kernel. given: what an operand is given where that is not its name. numbers: lines of further arguments."""
    operands = ", ".join(given.get(operand, operand) for operand in kernel.operands())
    strides = ", ".join(f"*{operand}.stride()[:3]" for operand in kernel.strided())
    return [
        f"    {kernel.name}[({grid},)](",
        *textwrap.wrap(f"{operands},", 130, initial_indent=" " * 8, subsequent_indent=" " * 8),
        f"        {strides},",
        *kernel.reads.given(),
        *(f"        {line}," for line in numbers if line),
        "        HEADS_PER_KEY=H // key.shape[1], D=D, DV=DV, BLOCK_D=power_of_two(D), BLOCK_DV=power_of_two(DV),",
        f"        BLOCK_Q={tile}.block_q, BLOCK_K={tile}.block_k, PRECISION=dot_precision(query.dtype),",
        f"        num_warps={tile}.warps, num_stages={tile}.stages,",
        "    )",
    ]


def _calls(queries: QueriesKernel, keys: KeysKernel) -> list[str]:
    """The launches of both kernels, and the block lists they walk."""
    gradients = queries.block.gradients
    places = {name: place for place, name in enumerate(queries.reads.ids)}
    given = {gradient: f"sums[{places[name]}].buffer" for name, gradient in gradients.items()}
    ways = {name: f"{gradient}_by=sums[{places[name]}].way" for name, gradient in gradients.items()}
    by_pair = [f"sums[{places[name]}]" for name in gradients if queries.by_pair(name)]
    every = [f"{gradient}.{what}" for gradient in by_pair for what in ("stride_i", "every_b", "every_h")]
    rows, columns = "triton.cdiv(Nq, tiles.queries.block_q)", "triton.cdiv(Nk, tiles.keys.block_k)"
    sizes = ", ".join(["H", "Nq", "Nk", *(["*turn"] if queries.takes_turns else []), *queries.listed.sizes])
    numbers = [", ".join(every), sizes, ", ".join(ways.values())]
    if queries.takes_turns:
        grid = f"{rows} * triton.cdiv(H - turn[3], turn[1]) * triton.cdiv(B - turn[2], turn[0])"
        launches = ["    for turn in sums.turns():", *indented(_call(queries, "tiles.queries", grid, given, numbers))]
    else:
        launches = _call(queries, "tiles.queries", f"{rows} * H * B", given, numbers)
    own = [", ".join(["H", "Nq", "Nk", *keys.listed.sizes]), ", ".join(ways[name] for name in keys.gradients)]
    return [
        *queries.listed.made("tiles.queries", queries.reads),
        *launches,
        *keys.listed.made("tiles.keys", keys.reads, transposed=True),
        *_call(keys, "tiles.keys", f"{columns} * B * key.shape[1]", given, own),
    ]


def _launch(queries: QueriesKernel, keys: KeysKernel) -> list[str]:
    attend, ids = queries.attend, queries.reads.ids
    tensors = attend.tensors()
    said = ", ".join(f"{name} [{', '.join(map(str, indices))}]" for name, indices in tensors.items()) or "none"
    read_at = tuple(letters(indices) if name in queries.block.gradients else None for name, indices in tensors.items())
    return [
        *queries.listed.predicate,
        f"READ_AT = {read_at!r}  # the axes of each tensor; None: its gradient is not given",
        "",
        "",
        "def launch(query, key, value, tensors, out, lse, d_out, d_lse, d_query, d_key, d_value, wanted=(), tiles=None):",
        '    """Run both kernels; returns the gradients of the tensors at the positions in `wanted`, in this order.',
        "",
        "    query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]; out [B, H, Nq, Dv] and lse [B, H, Nq] as forward gave",
        "    them, with their gradients d_out and d_lse -> d_query, d_key, d_value, contiguous, shaped as query, key and value.",
        *textwrap.wrap(
            f"tensors, in this order, axes b, h, i, j of that size or 1, others of any: {said}.",
            130,
            initial_indent="    ",
            subsequent_indent="    ",
        ),
        "    tiles: a codegen.tiles.BackwardTiles; by default those for the head dim and the device.",
        '    """',
        "    check_launch(query, key, value)",
        "    check_gradients(out, d_out, (d_query, d_key, d_value))",
        "    (B, H, Nq, D), Nk, DV = query.shape, key.shape[2], value.shape[3]",
        *([f"    {', '.join(ids.values())}{',' if len(ids) == 1 else ''} = tensors"] if ids else []),
        f"    tiles = tiles or backward_tiles(D, DV, query.element_size(), {crowding(attend)!r}, capability(query.device))",
        *(["    lse, d_lse = lse.contiguous(), d_lse.contiguous()"] if attend.normaliser != "none" else []),
        f"    sums = GradientSums((query, key, value), tensors, READ_AT, wanted, visits_all={not queries.listed})",
        *(f"    row_{fact} = torch.empty(B, H, Nq, dtype=torch.float32, device=query.device)" for fact in queries.row_facts),
        *_calls(queries, keys),
        "    return sums.results()",
    ]


def backward_source(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = ()) -> str:
    """The text of a Python file with the two backward kernels for `attend` and their `launch` function.

    Tensors whose gradient the kernels do not give (`codegen.backward_block.reason_against_gradient`) are read like any other.
    Raises `RewriteError` where the operation has no backward kernels, or an expression or its slope has no Triton form.
    """
    reason = reason_against_backward(attend, ())
    if reason is not None:
        raise RewriteError(f"the gradients of the attention have no Triton form: {reason}")
    name = backward_name(attend)
    queries, keys = QueriesKernel(attend, f"{name}_queries"), KeysKernel(attend, f"{name}_keys")
    strides = ["broadcast_strides"] if queries.reads.ids else []
    needed = [
        "GradientSums",
        "backward_tiles",
        *queries.listed.maker(),
        "capability",
        *strides,
        "check_gradients",
        "check_launch",
        "dot_precision",
        "power_of_two",
    ]
    imports = ["import torch", "import triton", "import triton.language as tl", "from codegen.backward_launching import ("]
    imports += [*(f"    {name}," for name in [*needed, "power_of_two", *keys.listed.maker(transposed=True)]), ")"]
    header = _header(name, queries.block, sites, passes)
    return "\n".join([*header, *imports, "", "", *queries.lines(), "", "", *keys.lines(), "", "", *_launch(queries, keys), ""])
