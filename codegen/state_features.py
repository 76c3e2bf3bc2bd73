"""Lines of the kernels that carry a state: how features of keys enter it, where it lies, and how features of queries read it.

Each term of a score has a state of its own in a program's registers, and its rows in memory: a row for each column of a key where the term
has a dot product, else one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean

from codegen.state_form import Feature, StateForm, state_form
from codegen.triton_printer import triton_text
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import conjuncts
from rewrite.ir.operations import Attend

# Every term has a state of its own in a program's registers, under a name that `codegen.names` reserves.
MOST_FEATURES = 8


@dataclass(frozen=True)
class StateFeatures:
    """The features of an operation. name: what the names of its kernels begin with."""

    attend: Attend
    name: str

    @cached_property
    def form(self) -> StateForm:
        form = state_form(self.attend)
        if isinstance(form, str):
            raise RewriteError(f"it has no state form: {form}")
        if len(form.features) > MOST_FEATURES:
            raise RewriteError(f"its score has {len(form.features)} terms, and a program holds the states of {MOST_FEATURES} at most")
        return form

    @cached_property
    def decays(self) -> bool:
        return bool(self.form.rate != 0)

    def rows_before(self, feature: int) -> str:
        """Where the rows of a feature begin in a state."""
        dots = sum(each.dot for each in self.form.features[:feature])
        return f"{dots} * D + {feature - dots}"

    @staticmethod
    def extent(feature: Feature) -> str:
        return "[BLOCK_D, BLOCK_DV]" if feature.dot else "[BLOCK_DV]"

    def summed(self, place: int, feature: Feature, names: dict[str, str]) -> list[str]:
        """One feature of a tile of keys, added to its state."""
        form = self.form
        plain = feature.key == 1 and form.value == 1 and form.seen_keys == sympy.true and not self.decays
        if feature.dot and plain:
            totals = [f"sum_{place} += tl.sum(key_tile.to(tl.float32), 0)"] if form.totals else []
            return [f"state_{place} = tl.dot(tl.trans(key_tile), value_tile, state_{place}, input_precision=PRECISION)", *totals]
        factor = triton_text(feature.key, names) + (" * decay" if self.decays else "")
        term = f"key_tile.to(tl.float32) * ({factor})" if feature.dot else f"{factor} + tl.zeros([BLOCK_K, 1], tl.float32)"
        values = "value_tile.to(tl.float32)"
        if form.value != 1:
            values = f"tl.where(seen, {values} * ({triton_text(form.value, names)}), 0.0)"
        lines = [f"feature = tl.where(seen, {term}, 0.0)"]
        if feature.dot:
            lines.append(f"state_{place} = tl.dot(tl.trans(feature), {values}, state_{place}, input_precision=PRECISION)")
        else:
            lines.append(f"state_{place} += tl.sum(feature * {values}, 0)")
        return [*lines, *([f"sum_{place} += tl.sum(feature, 0)"] if form.totals else [])]

    def _state_rows(self, place: int, feature: Feature) -> tuple[str, str]:
        """(address, mask) of a feature's part of a state."""
        rows = self.rows_before(place)
        if feature.dot:
            return f"states + ({rows} + lanes[:, None]) * DV + value_lanes[None, :]", "in_width[:, None] & in_value_width[None, :]"
        return f"states + ({rows}) * DV + value_lanes", "in_value_width"

    def _sum_rows(self, place: int, feature: Feature) -> tuple[str, str]:
        lanes = "lanes" if feature.dot else "tl.arange(0, 1)"
        return f"sums + {self.rows_before(place)} + {lanes}", "in_width" if feature.dot else "tl.arange(0, 1) < 1"

    def store_state(self, place: int, feature: Feature) -> list[str]:
        address, mask = self._state_rows(place, feature)
        return [f"    tl.store({address}, state_{place}, mask={mask})"]

    def store_sums(self, kinds: list[tuple[int, Feature]]) -> list[str]:
        if not self.form.totals:
            return []
        stores = [(place, *self._sum_rows(place, feature)) for place, feature in kinds]
        return [
            "    sums += program.to(tl.int64) * FEATURES",
            "    if tl.program_id(1) == 0:",
            *(f"        tl.store({address}, sum_{place}, mask={mask})" for place, address, mask in stores),
        ]

    def from_state(self, place: int, feature: Feature, names: dict[str, str]) -> list[str]:
        factor = triton_text(feature.query, names) + (" * decay" if self.decays else "")
        term = f"query_tile.to(tl.float32) * ({factor})" if feature.dot else f"{factor} + tl.zeros([BLOCK_Q, 1], tl.float32)"
        address, mask = self._state_rows(place, feature)
        totals, total_mask = self._sum_rows(place, feature)
        # In float32: a state outgrows float16.
        lines = [f"feature = tl.where(seen, {term}, 0.0)", f"state = tl.load({address}, mask={mask}, other=0.0)"]
        if feature.dot:
            lines.append("accumulator = tl.dot(feature, state, accumulator, input_precision=PRECISION)")
        else:
            lines.append("accumulator += feature * state[None, :]")
        if self.form.totals:
            lines.append(f"row_sum += tl.sum(feature * tl.load({totals}, mask={total_mask}, other=0.0)[None, :], 1)")
        return lines


def mask_terms(mask: Boolean, names: dict[str, str]) -> list[str]:
    """The text of each term of a mask."""
    return [] if mask == sympy.true else [triton_text(term, names) for term in conjuncts(mask)]
