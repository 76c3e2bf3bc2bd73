"""Identifiers for what a kernel reads: names of tensors and groups come from a model's graph, and must not meet the kernel's own."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

_SKELETON_NAMES = """
    query key value tensors out lse starts blocks b h i j B H Nq Nk D DV BLOCK_D BLOCK_DV BLOCK_Q BLOCK_K HEADS_PER_KEY PRECISION CHECKED
    tl triton block_list broadcast_strides check_launch dot_precision power_of_two tile_for STATIC_MASK launch tile
    program block first rows columns lanes value_lanes in_rows in_width in_value_width in_keys query_rows key_rows value_rows out_rows
    query_tile key_tile value_tile lse_tile begin end slot start qk score new_max row_max row_sum shift weight rescale factor group
    normaliser accumulator sink peak total share
    d_out d_lse d_query d_key d_value row_delta row_share wanted tiles sums delta counted d_sink d_dot d_score d_weight d_normalised
    d_out_rows d_query_rows d_key_rows d_value_rows d_lse_rows lse_rows d_out_tile out_tile d_query_tile d_key_tile d_value_tile
    query_head key_head value_head d_out_head hk row keys turn heads turn_b turn_h TURNS_B TURNS_H member inside cells shared
    unit units low high first_tile last_tile first_unit last_unit key_blocks origin run owners longest total row_parts parts facts
    own part part_tile part_row_max part_row_sum part_scale list_owners partial_results units_for
    capability offset of_group again change GradientSums backward_tiles transposed_block_list torch READ_AT
    tile_list transposed_tile_list LISTED_MASK own_starts per_b per_h
    states sums state chunk chunks base place before decay seen feature entries own state_head state_place state_heads key_heads part size
    CHUNK FEATURES HEADS_PER_STATE STATES_PER_KEY SIZE BLOCK CARRIED state_tile device_chunk piece_of_keys
    key_order query_order begins ends chunk_begins slots places head_states head_sums left goes_on previous last_key head
    intervals mask_sides pairs PAIRED_MASK
    state_0 state_1 state_2 state_3 state_4 state_5 state_6 state_7 sum_0 sum_1 sum_2 sum_3 sum_4 sum_5 sum_6 sum_7
"""

# The names that the skeleton uses itself.
RESERVED = frozenset(_SKELETON_NAMES.split())


def identifiers(names: Iterable[str]) -> dict[str, str]:
    """name -> a Python identifier for it: unique, no keyword, none of `RESERVED`, and the name itself wherever it can be."""
    taken = set(RESERVED)
    chosen: dict[str, str] = {}
    for name in names:
        base = re.sub(r"\W", "_", name)
        if not base or base[0].isdigit() or keyword.iskeyword(base):
            base = f"t_{base}"
        identifier, number = base, 2
        while identifier in taken:
            identifier, number = f"{base}_{number}", number + 1
        taken.add(identifier)
        chosen[name] = identifier
    return chosen
