"""From a graph to a program: regions, verified and placed in the model, as sites of the IR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from rewrite.ir.operations import Body
from rewrite.ir.program import Program
from rewrite.ir.site import Site, TokenLayout
from rewrite.recognise.composites import expand_composites
from rewrite.recognise.fixed_caches import CacheWrite, own_writes
from rewrite.recognise.functional import forwarded_writes
from rewrite.recognise.masks import hides_later
from rewrite.recognise.open_masks import drop_open_masks
from rewrite.recognise.operators import hinted_shape, module_path
from rewrite.recognise.pictured import given_pictures, pictures_of, tower_of
from rewrite.recognise.region import Region
from rewrite.recognise.regions import NearMiss, find_regions
from rewrite.recognise.relaid import LaidAnew, Relaying
from rewrite.recognise.streams import cache_entries, reaches, residual_stream, self_source
from rewrite.recognise.verify import structure, verify
from rewrite.recognise.writes import overwritten, remaining_writes
from rewrite.tokens import layout as tokens
from rewrite.tokens.chosen import GIVEN, Lost
from rewrite.tokens.layout import TokenLayouts
from rewrite.tokens.placement import is_tensor
from rewrite.tokens.visual import VisualMerge, visual_merges


@dataclass
class Found:
    """What recognition knows of one site beside the IR: the graph's nodes.

    patches: [pictures, P, C], where a site is the last that the visual tokens of a text went through in a vision tower: those tokens, or
    what becomes of them in a later graph. results: where that is so, which of the graph's outputs have which picture; None for all.
    given: of a text, the inputs that hold the patches, where a pass chose among these in an earlier graph. anew: of a text, how its visual
    tokens were laid out of patches, where they are not these one by one. relaid: of a tower, the graph's results likewise. writes: of its
    keys into a KV cache of fixed length.
    """

    site: Site
    region: Region
    stream: fx.Node | None = None
    projected: fx.Node | None = None
    merge: VisualMerge | None = None
    cache: tuple[fx.Node, ...] = ()
    patches: fx.Node | None = None
    results: tuple[tuple[int, int | None], ...] = ()
    given: tuple[fx.Node, ...] = ()
    anew: LaidAnew | None = None
    relaid: tuple[tuple[int, LaidAnew], ...] = ()
    writes: tuple[CacheWrite, ...] = ()


@dataclass
class Recognition:
    """The sites of a graph, and what was not recognised.

    relaid: which of the graph's results patches were laid out to that an earlier graph chose among, or were computed of them.
    """

    found: list[Found] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    relaid: list[tuple[int, LaidAnew | Lost]] = field(default_factory=list)

    @property
    def program(self) -> Program:
        return Program(tuple(entry.site for entry in self.found))

    def by_name(self, name: str) -> Found:
        return next(entry for entry in self.found if entry.site.name == name)


def recognise(
    graph: fx.Graph,
    inputs: Mapping[fx.Node, Any],
    qualify: Callable[[str], str] = lambda path: path,
    has_visual_cache: Callable[[fx.Node], bool] = lambda node: False,
    proofs: dict[str, str | None] | None = None,
) -> Recognition:
    """Every attention of a graph, proved.

    inputs: what the graph was traced with, by placeholder. qualify: module path in the graph -> qualified name in the model.
    has_visual_cache: whether a KV cache entry is known to hold visual tokens. proofs: results of earlier verifications, by structure.
    """
    proofs = {} if proofs is None else proofs
    composed = [NearMiss(node.name, module_path(node), reason) for node, reason in expand_composites(graph, proofs)]
    forwarded_writes(graph)
    drop_open_masks(graph)
    regions, found = find_regions(graph)
    told = {miss.node for miss in composed}
    missed = (*composed, *(miss for miss in found if miss.node not in told))
    writes = remaining_writes(graph)
    misses = [replace(miss, module=qualify(miss.module)) for miss in missed]
    recognition = Recognition(misses=misses)
    taken: Counter[str] = Counter()
    merges = visual_merges(graph)
    layouts = TokenLayouts(graph)
    stacks = _Stacks()
    for region in regions:
        path = qualify(module_path(region.core))
        written = overwritten(region, writes)
        if written is not None:
            misses.append(NearMiss(region.core.name, path, written))
            continue
        key = structure(region)
        if key not in proofs:
            proofs[key] = verify(region)
        if proofs[key] is not None:
            misses.append(NearMiss(region.core.name, path, f"its IR was not confirmed: {proofs[key]}"))
            continue
        taken[path] += 1
        name = path if taken[path] == 1 else f"{path}:{taken[path]}"
        recognition.found.append(_place(region, name, inputs, merges, stacks, layouts, has_visual_cache))
    depth = Counter(entry.site.stack for entry in recognition.found)
    named = [(entry.site.name, entry.region) for entry in recognition.found]
    towers = {merge.node: tower_of(merge.source, named, layouts) for merge in merges}
    relaying = Relaying(graph, named, layouts)
    for name, patches in filter(None, towers.values()):
        recognition.by_name(name).patches = patches
    for entry in recognition.found:
        tower = towers[entry.merge.node] if entry.merge is not None else None
        entry.site = replace(entry.site, depth=depth[entry.site.stack], pictured=tower[0] if tower else None)
        if entry.merge is None or tower is not None:
            continue
        entry.given = given_pictures(entry.merge.source)
        if entry.given:
            choice = entry.given[0].meta[GIVEN].choice
            entry.site = replace(entry.site, pictured=choice.site, chosen=choice.by)
        elif entry.merge.source is not None:
            _pictured_anew(entry, relaying.of(entry.merge.source), recognition)
    if not any(entry.patches for entry in recognition.found):
        _leaving_pictures(graph, recognition, relaying)
    return recognition


def _pictured_anew(entry: Found, found: LaidAnew | Lost | None, recognition: Recognition) -> None:
    """Note how the visual tokens of a text were laid out of patches."""
    if not isinstance(found, LaidAnew):
        entry.site = replace(entry.site, unpictured=None if found is None else found.reason)
        return
    choice = found.choice
    if choice is not None and choice.remakes:
        told = f"{choice.by} makes new features of patches, which have no place where these are laid out anew; use a pass that keeps some"
        entry.site = replace(entry.site, unpictured=told)
        return
    entry.anew = found
    entry.site = replace(entry.site, pictured=found.tower, chosen=None if choice is None else choice.by, relaid=True)
    if choice is None:
        recognition.by_name(found.tower).patches = found.sources[0]


def _leaving_pictures(graph: fx.Graph, recognition: Recognition, relaying: Relaying) -> None:
    """Note where the patches of pictures leave a graph: of each tower, those that went through most of its layers."""
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    towers: dict[fx.Node, str] = {}
    parts: dict[fx.Node, list[tuple[int, int | None]]] = {}
    relaid: dict[fx.Node, list[tuple[int, LaidAnew]]] = {}
    for index, result in enumerate(results if isinstance(results, tuple | list) else ()):
        found = relaying.of(result) if isinstance(result, fx.Node) and is_tensor(result) and result.op != "placeholder" else None
        if found is not None and found.choice is not None and (isinstance(found, LaidAnew) or not recognition.found):
            recognition.relaid.append((index, found))
        if not isinstance(found, LaidAnew) or found.choice is not None:
            continue
        patches = found.sources[0]
        towers[patches] = found.tower
        whole, picture = pictures_of(result)
        if whole is patches:
            parts.setdefault(patches, []).append((index, picture))
        else:
            relaid.setdefault(patches, []).append((index, found))
    deepest: dict[int, Found] = {}
    for patches, name in towers.items():
        entry = recognition.by_name(name)
        before = deepest.get(entry.site.stack)
        if before is None or before.patches is None or (before.site.layer, before.patches) < (entry.site.layer, patches):
            deepest[entry.site.stack] = entry
            entry.patches, entry.results, entry.relaid = patches, tuple(parts.get(patches, ())), tuple(relaid.get(patches, ()))
    for entry in deepest.values():
        entry.site = replace(entry.site, leaves=True, relaid=not entry.results)


class _Stacks:
    """Numbers the stacks: sites whose residual streams follow from one another."""

    def __init__(self) -> None:
        self.streams: dict[fx.Node, int] = {}
        self.layers: Counter[int] = Counter()
        self.merges: dict[int, VisualMerge] = {}
        self.count = 0

    def place(self, stream: fx.Node | None, merges: list[VisualMerge]) -> tuple[int, int, VisualMerge | None]:
        """(stack, layer, visual merge) of a site with the given residual stream."""
        previous = None if stream is None else (stream if stream in self.streams else reaches(stream, set(self.streams)))
        if previous is None:
            number = self.count
            self.count += 1
            nodes = {merge.node: merge for merge in merges}
            if stream is not None:
                merge = nodes.get(stream) or nodes.get(reaches(stream, set(nodes)) or stream)
                if merge is not None:
                    self.merges[number] = merge
        else:
            number = self.streams[previous]
        if stream is not None:
            self.streams[stream] = number
        layer = self.layers[number]
        self.layers[number] += 1
        return number, layer, self.merges.get(number)


def _place(
    region: Region,
    name: str,
    inputs: Mapping[fx.Node, Any],
    merges: list[VisualMerge],
    stacks: _Stacks,
    layouts: TokenLayouts,
    has_visual_cache: Callable[[fx.Node], bool],
) -> Found:
    source = self_source(region)
    stream = residual_stream(source) if source is not None and len(hinted_shape(source)) == 3 else None
    stack, layer, merge = stacks.place(stream, merges)
    cache = tuple(cache_entries(region.key.node) + cache_entries(region.value.node))
    writes, reads_fixed = own_writes(region.key.node)
    cache += tuple(write.cache for write in writes if reads_fixed and write.cache.op == "placeholder")
    visual = merge is not None or any(has_visual_cache(entry) for entry in cache)
    dims = dict(region.sizes)
    operands = list(region.operands())
    if stream is not None and len(hinted_shape(stream)) == 3 and hinted_shape(stream)[1] == dims["Nq"]:
        operands.append("hidden")
        dims["C"] = hinted_shape(stream)[2]
        if visual:
            operands.append("visual")
    projected = source if source is not None and hinted_shape(source)[:-1] == (dims["B"], dims["Nq"]) else None
    if projected is not None:
        operands.append("input")
        dims["Cin"] = hinted_shape(projected)[-1]
    lies = layouts.of_operand(region.query.node, region.query.layout.steps(), axis=2)
    keys_lie = layouts.of_operand(region.key.node, region.key.layout.steps(), axis=2)
    site = Site(
        name=name,
        layer=layer,
        depth=0,
        stack=stack,
        kind="channel" if region.channels else "cross" if source is None else "self",
        body=Body((region.attend,)),
        dims=dims,
        layout=_site_layout(lies, keys_lie, visual),
        operands=tuple(operands),
        cached=bool(cache) or reads_fixed,
        fixed=bool(writes),
        dropout=region.dropout,
        map_read=bool(region.map_readers),
        hides_later=hides_later(region, inputs),
    )
    return Found(site, region, stream, projected, merge, cache, writes=tuple(writes))


def _site_layout(lies: tokens.TokenLayout | None, keys_lie: tokens.TokenLayout | None, visual: bool) -> TokenLayout:
    if lies is None:
        return TokenLayout(visual=visual)
    whole = keys_lie is not None and keys_lie.window is None and keys_lie.raster and not keys_lie.prefix and not keys_lie.suffix
    key_grid = keys_lie.grid if keys_lie is not None and whole and keys_lie.grid != lies.grid else None
    return TokenLayout(lies.grid, lies.prefix, visual, lies.window, lies.partition, lies.shifted, lies.suffix, lies.raster, key_grid)
