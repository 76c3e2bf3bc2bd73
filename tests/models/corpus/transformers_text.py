"""Text models of transformers, as carriers of forms that no picture model of the table has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_parts import EAGER, LLAMA, SPECIAL, SPREAD, made, texts, tokens

TEXT: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 200,
    "max_position_embeddings": 64, **SPECIAL, **SPREAD,
}  # fmt: skip
# As GPT-2 and its kin name them.
GPT: dict[str, Any] = {"vocab_size": 200, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4, **SPECIAL, **SPREAD}
BLOOM: dict[str, Any] = {"vocab_size": 200, "hidden_size": 128, "n_layer": 2, "n_head": 4, **SPECIAL, **SPREAD}
FALCON: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    **SPECIAL, **SPREAD,
}  # fmt: skip
MPT: dict[str, Any] = {"vocab_size": 200, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2, **SPREAD}
T5: dict[str, Any] = {
    "vocab_size": 200, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
XLNET: dict[str, Any] = {"vocab_size": 200, "d_model": 128, "n_layer": 2, "n_head": 4, "d_inner": 256, **SPREAD, **SPECIAL}
THREE = {**LLAMA, "num_hidden_layers": 3, "head_dim": 32, "sliding_window": 8}
ENCODED = texts(24)
PROMPTED = texts(24, left=True)


def whole(module: str, count: int = 2, causal: bool = False, per_call: int = 1) -> tuple[Sites, ...]:
    """Sites over the whole text of 24 tokens."""
    return (Sites(count, module, 24, 24, 4, causal=causal, per_call=per_call),)


def translated(batch: int) -> Mapping[str, Any]:
    return {**tokens(batch, 24, 4), "decoder_input_ids": tokens(batch, 12)["input_ids"]}


TEXTS: tuple[Entry, ...] = (
    Entry(
        "bert", made("BertModel", "BertConfig", **TEXT), ENCODED, whole("BertSelfAttention"),
        forms=("padding", "boolean mask", "plain"), core=True,
    ),
    Entry(
        "bert-maps", made("BertModel", "BertConfig", **TEXT), texts(24, output_attentions=True), whole("BertSelfAttention"), EAGER,
        ("map escapes", "padding", "additive mask"), core=True, note="asked for its maps, a model has to be eager",
    ),
    Entry(
        "mpnet", made("MPNetModel", "MPNetConfig", **TEXT), ENCODED, whole("MPNetSelfAttention"), EAGER,
        ("relative position table", "padding", "additive mask"),
    ),
    Entry(
        "squeezebert", made("SqueezeBertModel", "SqueezeBertConfig", embedding_size=128, **TEXT), ENCODED,
        whole("SqueezeBertSelfAttention"), EAGER, ("padding", "additive mask"), note="channels before tokens",
    ),
    Entry(
        "deberta-v2", made("DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"],
            max_relative_positions=20, **TEXT),
        ENCODED, whole("DisentangledSelfAttention"), EAGER, ("decomposed relative position", "padding", "boolean mask"),
        note="scores of contents with positions, and of positions with contents, are gathered and added; batch and heads are one axis",
    ),
    Entry(
        "xlnet", made("XLNetModel", "XLNetConfig", **XLNET), ENCODED, whole("XLNetRelativeAttention"), EAGER,
        ("einsum", "decomposed relative position", "padding"), core=True,
        note="scores with relative positions are shifted by a view and added; a mask of 1e30 is subtracted",
    ),
    Entry(
        "t5", made("T5Model", "T5Config", **T5), translated, (
            Sites(2, "T5Attention", 24, 24, 4), Sites(2, "T5Attention", 12, 12, 4, causal=True),
            Sites(2, "T5Attention", 12, 24, 4, "cross"),
        ), forms=("relative position table", "causal", "padding", "cross-attention", "additive mask"), core=True,
        note="scores are not scaled",
    ),
    Entry("gpt2", made("GPT2LMHeadModel", "GPT2Config", **GPT), PROMPTED, whole("GPT2Attention", causal=True),
        forms=("causal", "padding", "fused qkv")),
    Entry(
        "gpt-bigcode", made("GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_inner=256, **GPT), PROMPTED,
        whole("GPTBigCodeAttention", causal=True), forms=("causal", "padding", "multi-query", "fused qkv"),
    ),
    Entry(
        "falcon", made("FalconForCausalLM", "FalconConfig", **FALCON), PROMPTED, whole("FalconAttention", causal=True),
        forms=("causal", "padding", "multi-query", "fused qkv", "rotary"), core=True,
    ),
    Entry(
        "llama-flex", made("LlamaForCausalLM", "LlamaConfig", **LLAMA), PROMPTED, whole("LlamaAttention", causal=True),
        ("flex_attention",), ("flex_attention", "causal", "padding", "grouped-query", "rotary"),
        breaks="whether anything is padded is asked of the mask's values (masking_utils.fast_all) before the block mask is made",
        note="outside a capture the library compiles mask and attention by itself, for a quarter of a minute",
    ),
    Entry(
        "mistral", made("MistralForCausalLM", "MistralConfig", **{**LLAMA, "sliding_window": 8}), PROMPTED,
        whole("MistralAttention", causal=True), forms=("sliding window", "causal", "padding", "grouped-query", "rotary"), core=True,
    ),
    Entry(
        "qwen3", made("Qwen3ForCausalLM", "Qwen3Config", head_dim=32, **LLAMA), PROMPTED, whole("Qwen3Attention", causal=True),
        forms=("qk-norm", "causal", "padding", "grouped-query", "rotary"), core=True,
    ),
    Entry(
        "gemma2", made("Gemma2ForCausalLM", "Gemma2Config", query_pre_attn_scalar=32, **THREE), PROMPTED,
        whole("Gemma2Attention", 3, causal=True), EAGER,
        ("sliding window", "causal", "padding", "grouped-query", "rotary", "float32 upcast"),
        note="scores are capped by a hyperbolic tangent; every second layer sees all",
    ),
    Entry(
        "gpt-oss", made("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2, **THREE), PROMPTED,
        whole("GptOssAttention", 3, causal=True), EAGER, ("sink logits", "sliding window", "causal", "padding", "grouped-query", "rotary"),
        core=True, note="a learnt logit a head is a 25th column of the softmax and then cut off; every second layer sees all",
    ),
    Entry(
        "bloom", made("BloomForCausalLM", "BloomConfig", **BLOOM), PROMPTED, whole("BloomAttention", causal=True), EAGER,
        ("ALiBi", "baddbmm", "causal", "padding", "fused qkv", "float32 upcast"), core=True,
    ),
    Entry(
        "mpt", made("MptForCausalLM", "MptConfig", **MPT), PROMPTED, whole("MptAttention", causal=True), EAGER,
        ("ALiBi", "causal", "padding", "fused qkv"),
    ),
    Entry(
        "diffllama", made("DiffLlamaForCausalLM", "DiffLlamaConfig", **LLAMA), PROMPTED,
        whole("DiffLlamaAttention", 4, causal=True, per_call=2), forms=("causal", "padding", "grouped-query", "rotary"),
        note="the same map is computed twice, for either half of the values; heads are then subtracted pair by pair",
    ),
)  # fmt: skip
