"""Language models of transformers that see pictures through a resampler, cross-attention, a coder or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_language import DECODER, INDEX, MISTRAL, TEXT, TOKEN, VISION, pictured, read, seen
from tests.models.corpus.transformers_parts import EAGER, LLAMA, PICTURE, SPECIAL, SPREAD, made, prompts, seeded, tokens

RESAMPLER = {
    "hidden_size": 128, "resampler_n_latents": 8, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 32,
    "num_key_value_heads": 2,
}  # fmt: skip
MLLAMA_TEXT = {
    **LLAMA, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
MLLAMA_VISION = {
    "hidden_size": 128, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1, "intermediate_size": 256,
    "vision_output_dim": 256, "image_size": 56, "patch_size": 14, "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]], **SPREAD,
}  # fmt: skip
ARIA_TEXT = {**LLAMA, "moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 64}
JANUS_CODES = {
    "embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
    "num_patches": 4, "projection_dim": 128, "image_token_embed_dim": 128,
}  # fmt: skip
CODES = {
    "embed_dim": 32, "num_embeddings": 16, "latent_channels": 32, "resolution": 64, "base_channels": 32, "channel_multiplier": [1, 1, 2, 2],
    "num_res_blocks": 1,
}  # fmt: skip
# A picture's codes are tokens of the vocabulary, named by the letters that stand for their digits.
CODE_NAMES = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z": 100 + code for code in range(16)}
KOSMOS = {
    "vocab_size": 200, "max_position_embeddings": 128, "embed_dim": 128, "layers": 2, "ffn_dim": 256, "attention_heads": 4, "init_std": 0.1,
    **SPECIAL,
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256,
    "word_embed_proj_dim": 128, "max_position_embeddings": 64, "init_std": 0.1, **SPECIAL,
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 200,
    "encoder_hidden_size": 128, "cross_attention_frequency": 2, **SPREAD,
}  # fmt: skip
BART = {
    "model_type": "bart", "vocab_size": 200, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_position_embeddings": 64, "init_std": 0.1, **SPECIAL,
}  # fmt: skip
DAVIT = {
    "depths": [1, 1, 1, 1], "embed_dim": [32, 64, 96, 128], "num_heads": [1, 2, 3, 4], "num_groups": [1, 2, 3, 4], "window_size": 4,
    "projection_dim": 128, **SPREAD,
}  # fmt: skip
GIT = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 200,
    "max_position_embeddings": 64, **SPECIAL, **SPREAD,
}  # fmt: skip
DAVIT_STAGES = ((1, 32), (2, 16), (3, 8), (4, 4))  # heads, side of the grid


def mllama(batch: int) -> Mapping[str, Any]:
    """One picture of two tiles a row; the second row's text sees it from its sixth token on."""
    made = tokens(batch, 20, 3, left=True)
    seen = torch.ones(batch, 20, 1, 4, dtype=torch.long)
    seen[..., 2:] = 0
    seen[:, :5] = 0
    tiles = torch.tensor([[[1, 1, 0, 0]]] * batch)
    return {
        **made, "pixel_values": seeded(batch, 1, 4, 3, 56, 56), "aspect_ratio_ids": torch.full((batch, 1), 2),
        "aspect_ratio_mask": tiles, "cross_attention_mask": seen,
    }  # fmt: skip


def kosmos(batch: int) -> Mapping[str, Any]:
    made = prompts(batch, 8)
    return {**made, "pixel_values": seeded(batch, 3, 56, 56), "image_embeds_position_mask": (made["input_ids"] == PICTURE).long()}


def instructed(batch: int) -> Mapping[str, Any]:
    question = tokens(batch, 12, 4)
    return {
        **prompts(batch, 8), "pixel_values": seeded(batch, 3, 56, 56), "qformer_input_ids": question["input_ids"],
        "qformer_attention_mask": question["attention_mask"],
    }  # fmt: skip


def florence(batch: int) -> Mapping[str, Any]:
    made = prompts(batch, 17)
    return {**made, "pixel_values": seeded(batch, 3, 128, 128), "decoder_input_ids": tokens(batch, 12)["input_ids"]}


def captioned(batch: int) -> Mapping[str, Any]:
    return {**tokens(batch, 16, 3, left=True), "pixel_values": seeded(batch, 3, 56, 56)}


BRIDGED: tuple[Entry, ...] = (
    Entry(
        "idefics2", made("Idefics2ForConditionalGeneration", "Idefics2Config", text_config=MISTRAL, vision_config=VISION,
            perceiver_config=RESAMPLER, **TOKEN),
        pictured(8, 1, 3, 56, 56), (
            seen("Idefics2VisionAttention", 4), Sites(2, "Idefics2PerceiverAttention", 8, 24, 4, "cross"), read("MistralAttention", 8),
        ), forms=("plain", "cross-attention", *DECODER), note="the resampler's keys are the picture's 16 tokens and its own 8 latents",
    ),
    Entry(
        "mllama", made("MllamaForConditionalGeneration", "MllamaConfig", text_config=MLLAMA_TEXT, vision_config=MLLAMA_VISION, **INDEX),
        mllama, (
            Sites(3, "MllamaVisionAttention", 96, 96, 4), read("MllamaTextSelfAttention", 0, 20),
            Sites(1, "MllamaTextCrossAttention", 20, 68, 4, "cross", visual=68),
        ), forms=("cross-attention", "additive mask", "qk-norm", *DECODER),
        note="four tiles of 4 x 4 patches and CLS, padded to 24 tokens each, are one sequence; text sees them without the padding",
    ),
    Entry(
        "aria", made("AriaForConditionalGeneration", "AriaConfig", text_config=ARIA_TEXT,
            vision_config={**VISION, "model_type": "idefics3_vision"}, projector_patch_to_query_dict={16: 8}, **INDEX),
        pictured(8), (
            seen("Idefics3VisionAttention", 4), Sites(1, "MultiheadAttention", 8, 16, 4, "cross"), read("AriaTextAttention", 8),
        ), forms=("plain", "cross-attention", "MultiheadAttention", *DECODER),
    ),
    Entry(
        "janus", made("JanusForConditionalGeneration", "JanusConfig", text_config=TEXT, vq_config=JANUS_CODES,
            vision_config={**VISION, "projection_dim": 128, "num_image_tokens": 16}, **TOKEN),
        pictured(16), (seen("JanusVisionAttention", 4), read("LlamaAttention", 16)), forms=("plain", *DECODER),
        note="the picture coder, with convolutional attention, runs only to make pictures",
    ),
    Entry(
        "chameleon", made("ChameleonForConditionalGeneration", "ChameleonConfig", vocabulary_map={"<image>": PICTURE, **CODE_NAMES},
            vq_config=CODES, **LLAMA),
        pictured(64, 3, 64, 64), (
            Sites(1, "ChameleonVQVAEEncoderAttnBlock", 64, 64, 1, grid=(8, 8)), read("ChameleonAttention", 64),
        ), forms=("baddbmm", "qk-norm", *DECODER), note="the picture coder attends with convolutions for projections; its codes are tokens",
    ),
    Entry(
        "kosmos2", made("Kosmos2ForConditionalGeneration", "Kosmos2Config", text_config=KOSMOS, vision_config=VISION, latent_query_num=8),
        kosmos, (
            seen("Kosmos2VisionAttention", 4, 1), Sites(1, "KosmosTextAttention", 8, 25, 4, "cross"), read("KosmosTextAttention", 8),
        ), forms=("plain", "cross-attention", "causal", "padding", "additive mask"),
        note="the resampler's keys are the picture's 17 tokens and its own 8 latents",
    ),
    Entry(
        "blip-2", made("Blip2ForConditionalGeneration", "Blip2Config", text_config=OPT, vision_config=VISION, qformer_config=QFORMER,
            num_query_tokens=8, **INDEX),
        pictured(8), (
            seen("Blip2Attention", 4, 1), Sites(2, "Blip2QFormerMultiHeadAttention", 8, 8, 4),
            Sites(1, "Blip2QFormerMultiHeadAttention", 8, 17, 4, "cross"), read("OPTAttention", 8),
        ), forms=("plain", "cross-attention", "causal", "padding", "fused qkv"),
    ),
    Entry(
        "instructblip", made("InstructBlipForConditionalGeneration", "InstructBlipConfig", text_config=OPT, vision_config=VISION,
            qformer_config=QFORMER, num_query_tokens=8, **INDEX),
        instructed, (
            seen("InstructBlipAttention", 4, 1), Sites(2, "InstructBlipQFormerMultiHeadAttention", 20, 20, 4),
            Sites(1, "InstructBlipQFormerMultiHeadAttention", 8, 17, 4, "cross"), read("OPTAttention", 8),
        ), forms=("plain", "cross-attention", "causal", "padding", "fused qkv"),
    ),
    Entry(
        "florence-2", made("Florence2ForConditionalGeneration", "Florence2Config", text_config=BART, vision_config=DAVIT, **TOKEN),
        florence, (
            *(Sites(1, "Florence2VisionWindowAttention", 16, 16, heads, grid=(side, side), window=(4, 4)) for heads, side in DAVIT_STAGES),
            *(Sites(1, "Florence2VisionChannelAttention", 32, 32, heads, "channels") for heads, _ in DAVIT_STAGES),
            read("BartAttention", 17, causal=False), Sites(2, "BartAttention", 12, 12, 4, causal=True),
            Sites(2, "BartAttention", 12, 31, 4, "cross", visual=17),
        ), forms=("cross-covariance", "window partition", "fused qkv", "cross-attention", "causal", "padding"), core=True,
    ),
    Entry(
        "git", made("GitForCausalLM", "GitConfig", vision_config=VISION, **GIT), captioned,
        (seen("GitVisionAttention", 4, 1), read("GitSelfAttention", 17, 33, causal=False)), EAGER, ("plain", "padding", "additive mask"),
        note="the picture's tokens come first and all see each other, text sees them and backwards",
    ),
)  # fmt: skip
