"""Noncausal and causal, self- and cross-attention: each pass is applied to each of the four patterns, or declined with a reason.

The patterns are those of Zhang et al. 2023, "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling". Three are in one BART;
no model of the corpus has causal cross-attention, which is one of BART's cross-attentions with a mask.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewrite import Pass, Program, Site, available_passes, parse_pass
from rewrite.ir import NK, NQ, I, J
from tests.models.architectures import transformers_model
from tests.models.test_passes_on_models import recognised_sites

LAYERS = 2
bart = transformers_model(
    "BartModel", "BartConfig", d_model=32, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, max_position_embeddings=64,
)  # fmt: skip
CROSS = "it is cross-attention, the pass is for self-attention"
NO_GRID, NO_IMAGE = "its tokens lie on no grid that was found", "no visual tokens were found among its keys"
ALIKE = {"noncausal cross": CROSS, "causal cross": CROSS}
EVERYWHERE = {"noncausal self": "", "causal self": "", **ALIKE}

# Pass -> pattern -> the reason why it is declined, empty where it is applied.
PATTERNS: dict[str, dict[str, str]] = {
    "agent(tokens=4)": {"noncausal self": "", "causal self": "the method is defined for non-causal attention", **ALIKE},
    "calibrate(layers=None)": {"noncausal self": "it is not causal", "causal self": "", **ALIKE},
    "composite": {"noncausal self": NO_IMAGE, "causal self": NO_IMAGE, **ALIKE},
    "grid": {"noncausal self": NO_GRID, "causal self": "the method is defined for non-causal attention", **ALIKE},
    "halo": {"noncausal self": NO_GRID, "causal self": "the method is defined for non-causal attention", **ALIKE},
    "head_reinforce": {"noncausal self": NO_IMAGE, "causal self": NO_IMAGE, **ALIKE},
    "modality_mutual": {"noncausal self": "it is not causal", "causal self": NO_IMAGE, **ALIKE},
    "neighborhood(window=5)": EVERYWHERE,
    "relu_attention": EVERYWHERE,
    "routed": {"noncausal self": NO_GRID, "causal self": "the method is defined for non-causal attention", **ALIKE},
    "sigmoid": EVERYWHERE,
    "sink_redistribution": {"noncausal self": "it is not causal", "causal self": NO_IMAGE, **ALIKE},
    "sparsifiner": {"noncausal self": "", "causal self": "the method is defined for non-causal attention", **ALIKE},
    "temperature": EVERYWHERE,
    "token_exit(layer=1)": {"noncausal self": NO_IMAGE, "causal self": NO_IMAGE, **ALIKE},
    "window(window=4)": EVERYWHERE,
}


@pytest.fixture(scope="module")
def sites() -> dict[str, Site]:
    """One site of each pattern."""
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    found = recognised_sites(bart("sdpa"), {"input_ids": ids, "decoder_input_ids": ids[:, :8]})
    assert len(found) == 3 * LAYERS
    kinds = {f"{'causal' if site.causal else 'noncausal'} {site.kind}": site for site in found}
    assert kinds.keys() == {"noncausal self", "causal self", "noncausal cross"}
    cross = kinds["noncausal cross"]
    masked = cross.with_operations(replace(cross.attend, mask=J <= I + NK - NQ))
    assert masked.causal
    return {**kinds, "causal cross": masked}


@pytest.mark.parametrize("text", PATTERNS)
def test_each_pattern_is_rewritten_or_declined(sites: dict[str, Site], text: str) -> None:
    one: Pass = parse_pass(text)
    assert PATTERNS[text].keys() == sites.keys()
    for pattern, reason in PATTERNS[text].items():
        program = one.apply(Program((sites[pattern],)))
        declined = [why for _, _, why in program.declined]
        assert bool(program.touched) == (reason == ""), pattern
        assert (program.sites != (sites[pattern],)) == (reason == ""), pattern
        assert [reason in why for why in declined] == [True] * (reason != ""), (pattern, declined)


def test_the_passes_not_listed_say_something_of_each_pattern(sites: dict[str, Site]) -> None:
    listed = {parse_pass(text).name for text in PATTERNS}
    for cls in available_passes():
        if cls.name not in listed:
            for pattern, site in sites.items():
                program = cls().apply(Program((site,)))
                assert bool(program.touched) != bool(program.declined), (cls.name, pattern)
