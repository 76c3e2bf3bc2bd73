"""Token operations into a graph: what a choice reads, the choice, and the stream cut to the tokens that stay.

What follows from a cut is the surgery's (`rewrite.tokens.surgery`), for which every cut is a seed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.operations import Parameter
from rewrite.ir.program import Program
from rewrite.ir.selection import ROUTER, Drawn, Exit, Handed, Merge, Pooled, Received, Routed, Select, TokenOperation, first_layer
from rewrite.lower.cursor import Cursor, Number, behind_inputs
from rewrite.lower.fusing import attention_of, fuse_tokens
from rewrite.lower.left import Left
from rewrite.lower.merging import Merged, merge_tokens
from rewrite.lower.patches import every_patch, left_of_patches
from rewrite.lower.pictures import Stay, handed_on, made_beside, patches_that_stay, pooled, replace_features, tower_output
from rewrite.lower.present import PresentKeys
from rewrite.lower.relaid import handed_anew, laid_anew
from rewrite.lower.residual import beside_layers
from rewrite.lower.rows import every_token_of_rows, left_by_row
from rewrite.lower.scores import Scores, rule_of
from rewrite.lower.stacks import Stacks, of_patches
from rewrite.lower.stand_ins import StandIns
from rewrite.recognise.operators import hinted_shape, value_of
from rewrite.recognise.sites import Found, Recognition
from rewrite.tokens import choose, merging
from rewrite.tokens.chosen import GIVEN
from rewrite.tokens.gather import gather_tokens, kept_positions, places_of_present
from rewrite.tokens.placement import Selection


class Selections:
    """The token operations of one program, put into one graph.

    Made before sites are lowered. seeds, streams, whole: what `push_selections` is given. kept: by node of positions, how many there are at
    the traced shapes. gone: by name of a site, how many tokens of each row it does not see. seen: by name of a site, what it sees of them.
    routed: by name of a site, what the router in front of its layer is given.
    """

    def __init__(
        self,
        graph: fx.Graph,
        recognition: Recognition,
        program: Program,
        visual: Callable[[Found], fx.Node],
        parameter: Callable[[str, Parameter], fx.Node],
        data_sizes: bool,
        present: PresentKeys,
    ) -> None:
        self.graph, self.recognition, self.program = graph, recognition, program
        self.stacks = Stacks(recognition, program)
        self.visual, self.parameter, self.data_sizes = visual, parameter, data_sizes
        self.seeds: dict[fx.Node, dict[int, Selection]] = {}
        self.whole: dict[fx.Node, str] = {}
        self.kept: dict[fx.Node, int] = {}
        self.gone: dict[str, int] = {}
        self.seen: dict[str, Selection] = {}
        self.routed: dict[str, fx.Node] = {}
        self.results: dict[str, fx.Node] = {}
        self.sizes = StandIns(graph, merging.no_log_size)
        self.present = present.new
        self.scores = Scores(graph, recognition, program, present)
        self._cut: dict[fx.Node, fx.Node] = {}
        asked = [one for stack in self.stacks.numbers() for one in self.stacks.operations(stack)]
        self._places = {one: self.stacks.place(one) for one in asked}
        self.streams = frozenset(node for stack in self.stacks.numbers() for node in self.stacks.streams_behind(stack))
        fused = {one.stack for one in asked if isinstance(one, Merge)}
        self._beside = {stack: beside_layers(graph, self.stacks.entries(stack)) for stack in fused}
        asked += program.choices
        towers = ((one, recognition.by_name(one.contextual.site)) for one in asked if isinstance(one, Select) and one.contextual)
        self._tower_outputs = {one: tower_output(read, one.by) for one, read in towers}

    def run(self) -> None:
        """Cut every stack where tokens leave it."""
        for stack in self.stacks.numbers():
            if any(isinstance(one, Merge) for one in self.stacks.operations(stack)):
                self._merge(stack)
                continue
            left: Left | None = None
            for one in self.stacks.operations(stack):
                assert not isinstance(one, Merge)
                entry, stream = self._places[one]
                left = self._leave(one, entry, stream, left or self._every_token(entry, stream, one))
                whole = hinted_shape(stream)[1]
                self._note(one, whole - left.hints[0], self.seeds[self._cut[stream]][1])
        self.sizes.put()
        self.present.put()

    def _note(self, one: TokenOperation, gone: int, left: Selection) -> None:
        """What the sites behind an operation see."""
        # In the layer in front of which tokens are fused, queries and keys are still those of all.
        first = one.layer + 1 if isinstance(one, Merge) else first_layer(one)
        behind = [found.site.name for found in self.stacks.entries(one.stack) if found.site.layer >= first]
        self.gone.update(dict.fromkeys(behind, gone))
        self.seen.update(dict.fromkeys(behind, left))

    def _every_token(self, entry: Found, stream: fx.Node, one: TokenOperation) -> Left:
        """Where no token has left yet."""
        if isinstance(one, Select) and one.candidates == "patches":
            return every_patch(stream)
        merge = entry.merge
        assert merge is not None
        if one.stack in self.program.by_row:
            return every_token_of_rows(entry, merge, stream, self.visual(entry))
        if merge.source is None:
            raise NotApplicableError(
                f"{entry.site.name}: how many visual tokens there are cannot be read off the shapes at {merge.node.name}; "
                f"{one.by} needs the number to be fixed"
            )
        at = Cursor(self.graph, behind_inputs(self.graph, max(stream, merge.source)))
        visual, length = at.call(choose.visual_per_row, (stream, merge.source)), at.call_method("size", (stream, 1))
        batch, tokens, _ = hinted_shape(stream)
        count = math.prod(hinted_shape(merge.source)[:-1]) // batch
        return Left(None, length, length, visual, visual, (tokens, count, count))

    def _merge(self, stack: int) -> None:
        """Merge tokens of one stack, layer by layer."""
        left: Merged | None = None
        for one in self.stacks.operations(stack):
            entry, stream = self._places[one]
            if not isinstance(one, Merge):
                raise NotApplicableError(f"{entry.site.name}: tokens are merged in its stack, of which {one.by} would have to choose some")
            users = [user for user in stream.users if user.op != "output" and user not in self.sizes.nodes.values()]
            if one.criteria is not None:
                # Tokens are fused for the layer alone: what else reads the stream in front of it has what the layer before gave.
                users = [user for user in users if user not in self._beside[stack]]
            at = Cursor(self.graph, behind_inputs(self.graph, stream if one.criteria else max(stream, entry.region.key.node)))
            all_there = left is None
            if left is None:
                left = Merged(None, at.call_method("size", (stream, 1)), None, hinted_shape(stream)[1])
            if one.criteria is None:
                cut, left, short = merge_tokens(one, entry, stream, left, self.stacks.entries(stack), self.sizes, at)
            else:
                cut, left, short = self._fuse(one, entry, stream, left)
            cut.meta.update({key: stream.meta[key] for key in ("example_value", "nn_module_stack") if key in stream.meta})
            for user in users:
                user.replace_input_with(stream, cut)
            assert left.selection is not None
            self.seeds.update({node: dict(axes) for node, axes in short.items()})
            if all_there:
                self.whole[cut] = one.by
            self.kept[left.selection.positions] = left.hint
            self._note(one, hinted_shape(stream)[1] - left.hint, left.selection)

    def _fuse(
        self, one: Merge, entry: Found, stream: fx.Node, left: Merged
    ) -> tuple[fx.Node, Merged, Mapping[fx.Node, Mapping[int, Selection]]]:
        site = next(site for site in self.program.sites if site.name == one.site)
        result = self.results[one.site]
        call = attention_of(result, one.by)
        copies = self.scores.copied([node for node in call.args[:2] if isinstance(node, fx.Node)], entry, stream, stream, one)
        return fuse_tokens(one, site, entry, result, stream, copies, left, self.stacks.entries(one.stack), self.sizes)

    def _leave(self, one: Exit | Select, entry: Found, stream: fx.Node, left: Left) -> Left:
        """Cut the residual stream to the tokens that stay."""
        all_there = left.positions is None
        users = [
            user for user in stream.users if user.op != "output" and user not in left.nodes and user not in self.present.nodes.values()
        ]
        current = self._cut.get(stream, stream)
        if current is not stream:
            users = list(current.users)
        rule = rule_of(one)
        score = self.scores.of(one, rule, current, stream, left.kept) if isinstance(rule, Received) else None
        if isinstance(rule, Drawn):
            there = current if left.positions is None else left.positions
            score = Cursor(self.graph, behind_inputs(self.graph, there)).call(choose.drawn, (there, rule.seed))
        needed = [node for node in (current, score, *left.nodes) if node is not None]
        if isinstance(one, Exit) or one.candidates == "visual":
            needed.append(self.visual(entry))
        at = Cursor(self.graph, behind_inputs(self.graph, max(needed)))
        stays: fx.Node | None = None
        if isinstance(one, Select) and one.candidates == "patches":
            chosen, stays, left = left_of_patches(one, entry, left, current, score, self.data_sizes, at)
        else:
            chosen, left = self._visual(one, entry, left, current, score, at)
        if isinstance(one, Select) and one.fuse and stays is not None:
            cut = at.call(choose.fused_of_mass, (current, chosen, stays, score, entry.site.layout.suffix))
        elif isinstance(one, Select) and one.fuse:
            cut = at.call(choose.fused_tokens, (current, chosen, score, entry.site.layout.suffix))
        else:
            cut = at.call(gather_tokens, (current, chosen, 1))
        cut.meta["example_value"] = value_of(stream)
        cut.meta["nn_module_stack"] = stream.meta.get("nn_module_stack")
        for user in users:
            user.replace_input_with(current, cut)
        self._cut[stream] = cut
        if all_there:
            self.whole[cut] = one.by
        assert left.positions is not None
        self.seeds.pop(current, None)
        selection = Selection(left.positions, left.length, left.kept, left.fused)
        if of_patches(one):
            source = current if stream in self.streams else None
            selection = replace(selection, prefix=entry.site.layout.prefix, suffix=entry.site.layout.suffix, source=source)
        if left.present is not None:
            places = at.call(places_of_present, (left.positions, left.present, left.length))
            selection = replace(selection, present=left.present, places=places)
            self._tell_present(one, at.call_method("clone", (left.present,)), selection)
        self.seeds[cut] = {1: selection}
        self.kept[left.positions] = left.hints[0]
        return left

    def _tell_present(self, one: TokenOperation, present: fx.Node, selection: Selection) -> None:
        """Tell the sites behind a choice which of their keys are no padding."""
        stand_ins = self.present.nodes
        readers = [found.site.name for found in self.stacks.entries(one.stack) if found.site.layer >= first_layer(one)]
        readers = [name for name in readers if name in stand_ins]
        if readers:
            present.meta["example_value"] = value_of(stand_ins[readers[0]])
            self.present.values.update(dict.fromkeys(readers, present))
            self.scores.told[one.stack] = present
            self.seeds[present] = {1: selection}

    def _visual(
        self, one: Exit | Select, entry: Found, left: Left, current: fx.Node, score: fx.Node | None, at: Cursor
    ) -> tuple[fx.Node, Left]:
        """Places of the text and of the visual tokens that stay among the tokens of `current`, and what is left then."""
        tokens, present, every = left.hints
        mask = self.visual(entry)
        stay = self._stay(one, entry, score, at) if isinstance(one, Select) else None
        if stay is not None and left.positions is not None:
            raise NotApplicableError(f"{one.by} scores the patches of whole pictures, and some had left before: use it alone")
        if stay is not None and stay.relaid and not self.data_sizes:
            raise NotApplicableError(
                f"{entry.site.name}: the patches that {one.by} chooses among are laid out anew before they are visual tokens, so that the "
                "data say how many stay, which needs backend='eager'"
            )
        if one.stack in self.program.by_row:
            return left_by_row(one, left, mask, current, score, stay, lambda visual: self._routed(one, entry, visual, current, at), at)
        if left.positions is not None:
            mask = at.call(gather_tokens, (mask, left.positions, 1))
        number: Number
        if isinstance(one, Exit):
            number, hint, leaves = 0, 0, mask
        elif stay is not None:
            share = stay.share
            number = at.combine(operator.floordiv, at.combine(operator.mul, share.numerator, left.visual), share.denominator)
            hint = share.numerator * present // share.denominator
            leaves = at.call(choose.visual_leaving_by_picture, (mask, stay.mask))
        else:
            number = at.call(choose.number_kept, (left.visual, left.every, one.count.keep, one.count.rounding, one.count.of == "all"))
            hint = one.count.number(present, every)
            if score is None:
                leaves = at.call(choose.visual_leaving_spread, (mask, current, number, left.visual))
            else:
                leaves = at.call(choose.visual_leaving, (mask, score, number))
        kept = at.combine(operator.add, at.combine(operator.sub, left.kept, left.visual), number)
        chosen = at.call(kept_positions, (leaves, kept))
        positions = chosen if left.positions is None else at.call(choose.composed_positions, (left.positions, chosen))
        return chosen, Left(positions, left.length, kept, number, left.every, (tokens - present + hint, hint, every))

    def _routed(self, one: Exit | Select, entry: Found, visual: fx.Node, current: fx.Node, at: Cursor) -> fx.Node:
        """bool [B]: what the router in front of a layer says; visual: bool [B, N], which tokens of `current` are visual."""
        assert isinstance(one, Exit)
        assert isinstance(one.when, Routed)
        shapes = zip(ROUTER, ((one.when.width, 2 * hinted_shape(current)[2]), (2, one.when.width), (1,)), strict=True)
        added = [self.parameter(f"{entry.site.name}.{name}", Parameter(name, shape, trainable=False)) for name, shape in shapes]
        features = at.call(choose.routed_features, (visual, current))
        self.routed[entry.site.name] = features
        return at.call(choose.routed_to_leave, (features, *added))

    def _stay(self, one: Select, entry: Found, score: fx.Node | None, at: Cursor) -> Stay | None:
        """Which patches of pictures stay, and the text made of them; None where the language model scores its own tokens."""
        if isinstance(one.rule, Handed) and entry.anew is not None:
            return handed_anew(entry.anew, at)
        if isinstance(one.rule, Handed):
            given = [node.meta[GIVEN] for node in entry.given]
            for node, one_of_them in zip(entry.given, given, strict=True):
                if one_of_them.made is not None:
                    node.replace_all_uses_with(one_of_them.made, delete_user_cb=lambda user: user.op != "output")
            return handed_on(given, at)
        pictures = self.scores.tower(one)
        if pictures is None or pictures.patches is None:
            return None
        stay = self._chosen(one, pictures, score, at)
        replace_features(stay, pictures.patches)
        return stay if entry.anew is None else laid_anew(entry.anew, stay, at)

    def _chosen(self, one: Select, read: Found, score: fx.Node | None, at: Cursor) -> Stay:
        if isinstance(one.rule, Pooled):
            return pooled(one.rule, read, at)
        assert score is not None
        early = self.scores.by_patches(one, one.crops.early, read) if one.crops is not None else None
        if early is not None:
            at.last = max(at.last, early)
        return patches_that_stay(one, read, score, early, self._tower_outputs.get(one), at)

    def choose(self, one: Select) -> tuple[Found, Stay, fx.Node | None]:
        """Which patches stay in a later graph: the tower's site whose results they are, and what these are to be there, if another."""
        assert isinstance(one.rule, Received | Pooled)
        read = self.recognition.by_name(one.rule.site if isinstance(one.rule, Pooled) else one.rule.sites[-1])
        assert read.patches is not None
        score = self.scores.by_patches(one, one.rule, read) if isinstance(one.rule, Received) else None
        at = Cursor(self.graph, read.patches if score is None else max(score, read.patches))
        stay = self._chosen(one, read, score, at)
        return read, stay, made_beside(stay, read.patches, at)
