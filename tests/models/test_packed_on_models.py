"""Several sequences packed into one row of a language model: what its mask hides is left out, and each sequence gets what it gets alone."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaModel

from rewrite import kernels, rewrite

LENGTH, SHORT = 160, 37
CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, use_cache=False
)


def test_packed_sequences_are_those_of_a_batch() -> None:
    torch.manual_seed(0)
    model = LlamaModel(CONFIG).eval()
    ids = torch.randint(0, 50, (2, LENGTH))
    row = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(LENGTH).repeat(2)[None], "use_cache": False}
    found = rewrite(model, ["temperature(value=2.0)"], row)
    assert "tile_list" in kernels(found)[0].source
    with torch.no_grad():
        packed = found(**row).last_hidden_state.view(2, LENGTH, -1)
        alone = found(input_ids=ids, use_cache=False).last_hidden_state
        # Other lengths, in the same graph: up to where the second sequence begins now, all is as it was.
        positions = torch.cat([torch.arange(SHORT), torch.arange(2 * LENGTH - SHORT)])[None]
        uneven = found(**{**row, "position_ids": positions}).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    before, after = (packed.flatten(0, 1) - uneven).abs().split((SHORT, 2 * LENGTH - SHORT))
    assert before.max() < 1e-4
    assert after.amax(1).min() > 1e-3
