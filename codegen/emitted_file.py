"""The emitted file: a header that states the equation, the kernel, and a function that launches it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import sympy

from codegen.kernel_reads import gathers
from codegen.masks import split_mask
from codegen.split_kernel import SplitKernel
from codegen.streaming import StreamingKernel, reason_against
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import TOTAL, W, tensors_in
from rewrite.ir.operations import Attend
from rewrite.ir.site import is_causal_term


def kernel_name(attend: Attend, values: bool = True) -> str:
    """A name that says what the kernel computes, such as ``attend_causal_biased_grouped``; values: as of a `StreamingKernel`."""
    static, dynamic = split_mask(attend.mask)
    terms = static.args if isinstance(static, sympy.And) else (static,)
    causal = any(is_causal_term(term) for term in terms)
    masked = dynamic != sympy.true or any(term != sympy.true and not is_causal_term(term) for term in terms)
    parts = {
        "linear": attend.normaliser == "sum",
        "unnormalised": attend.normaliser == "none",
        "causal": causal,
        "masked": masked,
        "biased": bool(tensors_in(attend.score)),
        "sinks": attend.sink is not None,
        "gated": attend.weight != W,
        "grouped": attend.groups is not None,
    }
    return "_".join(["attend" if values else "row_sums", *(part for part, present in parts.items() if present)])


def facts_of(attend: Attend, sites: tuple[str, ...], passes: tuple[str, ...]) -> dict[str, str]:
    """What an emitted file says of its operation: a word -> what it stands for."""
    groups = attend.groups
    facts = {"score": str(attend.score), "visible": "every pair" if attend.mask == sympy.true else str(attend.mask)}
    facts |= {} if attend.sink is None else {"sink": f"{attend.sink}, the logit of a key without a value"}
    facts |= {} if attend.denominator == TOTAL else {"the sum": f"{attend.denominator} in its place, total being the sum"}
    facts |= {} if attend.weight == W else {"counts": f"{attend.weight}, w being the normalised weight"}
    if groups is not None:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(groups.names))
        facts["g"] = f"{groups.membership}[{','.join(map(str, groups.read))}] -> {names}"
        facts |= {f"weight {name}": str(weight) for name, weight in zip(groups.names, groups.weights, strict=True)}
    return facts | {"sites": ", ".join(sites) or "unnamed", "passes": ", ".join(passes) or "none"}


def docstring(title: str, equations: Sequence[str], facts: Mapping[str, str]) -> list[str]:
    """The docstring of an emitted module."""
    lines = [f'"""{title}', "", *(f"    {equation}" for equation in equations), ""]
    width = max(map(len, facts))
    for fact, text in facts.items():
        lead = f"    {fact:<{width}}  "
        # Names come from a model: what would end or escape the docstring is taken out.
        said = text.replace("\\", "/").replace('"', "'")
        lines += textwrap.wrap(said, 120, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False)
    return [*lines, "", "Emitted by attention-rewrite; stored by content hash, so change a copy and not this file.", '"""', ""]


def _header(kernel: StreamingKernel, sites: tuple[str, ...], passes: tuple[str, ...]) -> list[str]:
    """The module docstring: equation, sites, passes."""
    attend, facts = kernel.attend, facts_of(kernel.attend, sites, passes)
    if not kernel.values:
        title = f"{kernel.name}: rows of scores, summed over blocks of keys."
        summed = "log(sum_j exp({}))" if attend.normaliser == "softmax" else "sum_j {}"
        return docstring(title, [f"lse[b,h,i] = {summed.format('score over visible keys[i,j]')}"], facts)
    weight = "" if attend.groups is None else "weight[g(j)] * "
    normaliser = {"softmax": "softmax_j", "sum": "divided_by_its_sum_j", "none": ""}[attend.normaliser]
    normalised = f"{normaliser}(score over visible keys{'' if attend.sink is None else ' and the sink'})[i,j]"
    normalised = normalised if attend.weight == W else f"counts({normalised})"
    equation = f"out[b,h,i,:] = sum_j {weight}{normalised} * value[b,h',j,:]"
    return docstring(f"{kernel.name}: attention streamed over blocks of keys.", [equation], facts)


def _imports(kernel: StreamingKernel, split: SplitKernel) -> list[str]:
    always = ["broadcast_strides", "capability", "check_launch", "dot_precision", "power_of_two", "tile_for"]
    needed = sorted([*kernel.listed.maker(), *split.makers(), *always])
    wrapped = textwrap.wrap(", ".join(needed) + ",", 120, initial_indent="    ", subsequent_indent="    ")
    return ["import triton", "import triton.language as tl", "from codegen.launching import (", *wrapped, ")", "", ""]


def _launch(kernel: StreamingKernel, split: SplitKernel) -> list[str]:
    ids = kernel.reads.ids
    said = ", ".join(f"{name} [{', '.join(map(str, indices))}]" for name, indices in kernel.reads.tensors.items()) or "none"
    unpack = [f"    {', '.join(ids.values())}{',' if len(ids) == 1 else ''} = tensors"] if ids else []
    operands = list(kernel.strides("query", "key", "value"))
    results = list(kernel.strides("out", "lse"))
    shapes = {
        "query": "query [B, H, Nq, D]", "key": "key [B, Hkv, Nk, D]", "value": "value [B, Hkv, Nk, Dv]",
        "out": "out [B, H, Nq, Dv]", "lse": "lse [B, H, Nq] float32",
    }  # fmt: skip
    gathered = ", gathers=True" if gathers(kernel.attend) else ""
    width, widths, lengths = ("DV", ", DV", ", value.shape[3]") if kernel.values else ("D", "", "")
    return [
        *([*kernel.listed.predicate, "", ""] if kernel.listed else []),
        f"def launch({', '.join([*operands, 'tensors', *results])}, tile=None{', units=None' if split.possible else ''}):",
        '    """Run the kernel.',
        "",
        f"    {', '.join(shapes[name] for name in operands)} -> {', '.join(shapes[name] for name in results)}.",
        *textwrap.wrap(
            f"tensors, in this order, axes b, h, i, j of that size or 1, others of any: {said}.",
            130,
            initial_indent="    ",
            subsequent_indent="    ",
        ),
        "    tile: a codegen.tiles.Tile; by default the one for the head dim and the device.",
        *(["    units: programs that share the key blocks of all tiles; by default as many as pay, if any do."] if split.possible else []),
        '    """',
        f"    check_launch({', '.join(operands)})",
        f"    (B, H, Nq, D), Nk{widths} = query.shape, key.shape[2]{lengths}",
        *unpack,
        f"    tile = tile or tile_for(D, {width}, query.element_size(), capability(query.device), n_queries=Nq{gathered})",
        "    tiles = triton.cdiv(Nq, tile.block_q) * B * H",
        *(split.launch() if split.possible else []),
        *kernel.listed.made("tile", kernel.reads, values=kernel.values),
        f"    {kernel.name}[(tiles,)](",
        f"        {', '.join([*operands, *results, *kernel.listed.operands, *ids.values()])},",
        f"        {', '.join(f'*{operand}.stride()[:3]' for operand in [*operands, *results])},",
        *kernel.reads.given(),
        f"        {', '.join(['H', 'Nq', 'Nk', *kernel.listed.sizes])},",
        *kernel.constants(),
        "    )",
    ]


def streaming_source(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = (), values: bool = True) -> str:
    """The text of a Python file with the Triton kernels for `attend` and their `launch` function; values: as of a `StreamingKernel`.

    Raises `RewriteError` where the operation does not stream, or its score, mask or a weight has no Triton form.
    """
    reason = reason_against(attend)
    if reason is not None:
        raise RewriteError(f"the attention has no Triton form: {reason}")
    unknown = {str(s) for s in attend.score.free_symbols | attend.mask.free_symbols if str(s).startswith("mass_")}
    if unknown:
        raise RewriteError(f"{', '.join(sorted(unknown))} can be read by group weights only, not by a score or a mask")
    kernel = StreamingKernel(attend, kernel_name(attend, values), values)
    split = SplitKernel(kernel)
    header, imports = _header(kernel, sites, passes), _imports(kernel, split)
    forms = [*kernel.lines(), "", "", *([*split.lines(), "", ""] if split.possible else [])]
    return "\n".join([*header, *imports, *forms, *_launch(kernel, split), ""])
