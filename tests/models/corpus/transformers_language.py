"""Language models of transformers that read the patches of pictures among their tokens, in one forward over the whole prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_parts import LLAMA, PICTURE, SPREAD, Inputs, made, prompts, seeded

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
    "image_size": 56, "patch_size": 14, **SPREAD,
}  # fmt: skip
SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model", "num_hidden_layers": 2, "vision_use_head": False}
TEXT: dict[str, Any] = {"model_type": "llama", **LLAMA}
QWEN: dict[str, Any] = {"model_type": "qwen2", **LLAMA}
TOKEN = {"image_token_id": PICTURE}
INDEX = {"image_token_index": PICTURE}
GRID = {**TOKEN, "video_token_id": 198, "vision_start_token_id": 197, "vision_end_token_id": 196}
# Rotary sections over time, height and width of a head of 32 dimensions.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}


def pictured(visual: int, *shape: int, name: str = "pixel_values", **more: Any) -> Inputs:
    """Prompts with `visual` tokens of a picture of `shape`."""
    return lambda batch: {**prompts(batch, visual), name: seeded(batch, *(shape or (3, 56, 56))), **more}


def sized(visual: int, height: int, width: int, *crops: int) -> Inputs:
    """Prompts with pictures that come with their size."""

    def make(batch: int) -> Mapping[str, Any]:
        pixels = seeded(batch, *crops, 3, 56, 56) if crops else seeded(batch, 3, height, width)
        return {**prompts(batch, visual), "pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * batch)}

    return make


def packed(patch: int, merged: int = 16) -> Inputs:
    """Pictures as one sequence of patches: 8 x 8 patches of the first row's, 4 x 16 of the others'."""

    def make(batch: int) -> Mapping[str, Any]:
        grid = torch.tensor([[1, 8, 8]] + [[1, 4, 16]] * (batch - 1))
        made = prompts(batch, merged)
        return {
            **made, "pixel_values": seeded(batch, 64, 3 * 2 * patch * patch).flatten(0, 1), "image_grid_thw": grid,
            "mm_token_type_ids": (made["input_ids"] == PICTURE).int(),
        }  # fmt: skip

    return make


def gemma(batch: int) -> Mapping[str, Any]:
    """To Gemma 3 a token type of 1 is a picture's, whose tokens all see each other."""
    made = prompts(batch, 16)
    return {**made, "pixel_values": seeded(batch, 3, 56, 56), "token_type_ids": (made["input_ids"] == PICTURE).long()}


def paligemma(batch: int) -> Mapping[str, Any]:
    """To PaliGemma a token type of 0 is the prompt's, pictures and text, whose tokens all see each other."""
    made = prompts(batch, 16)
    return {**made, "pixel_values": seeded(batch, 3, 56, 56), "token_type_ids": torch.zeros_like(made["input_ids"])}


def read(module: str, visual: int, length: int | None = None, count: int = 2, causal: bool = True) -> Sites:
    """The language model's sites over prompts with `visual` tokens of pictures."""
    length = length or 14 + visual
    return Sites(count, module, length, length, 4, causal=causal, visual=visual)


def seen(module: str, side: int, prefix: int = 0, count: int = 2) -> Sites:
    """The vision encoder's sites over side x side patches."""
    return Sites(count, module, side * side + prefix, side * side + prefix, 4, grid=(side, side), prefix=prefix)


def sequences(module: str) -> Sites:
    """The vision encoder's sites over the patches of two pictures; each picture is a problem of its own, split off by the module."""
    return Sites(4, module, 64, 64, 4, per_call=2)


CLIP_SEEN = seen("CLIPAttention", 4, 1, 3)
MISTRAL = {**TEXT, "model_type": "mistral", "head_dim": 32}
PIXTRAL = {**CLIP, "model_type": "pixtral", "image_size": 112, "num_hidden_layers": 2}
VISION = {key: value for key, value in CLIP.items() if key != "model_type"} | {"num_hidden_layers": 2}
FINE = {**VISION, "patch_size": 7}
BLOCKS = {"depth": 2, "num_heads": 4, "patch_size": 8, **SPREAD}
MERGED = {**BLOCKS, "hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 128}
QWEN_VL = {**LLAMA, **MROPE}
GEMMA = {**LLAMA, "num_key_value_heads": 1, "head_dim": 32, "model_type": "gemma"}
GEMMA3 = {
    **LLAMA, "num_hidden_layers": 3, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
# Said of a capture with scalar outputs and dynamic output shapes on; off, each of these models is 8 to 39 graphs.
SIZES = "sizes of the pictures are read by .tolist() or .item(); then the library's output_capturing wrapper breaks, at a mapping proxy"
LENGTHS = "capture raises: lengths of the pictures, read by .tolist() to split them off, are guarded on; without the two settings it breaks"
WINDOWED = "capture raises: lengths of the windows, read by .tolist(), are guarded on (vision_utils.py:182); without the settings it breaks"
SPLIT = "pictures are split off and attend one after another, so the sites are as many as the batch has pictures"
DECODER = ("causal", "padding", "grouped-query", "rotary")

LANGUAGE: tuple[Entry, ...] = (
    Entry(
        "llava", made("LlavaForConditionalGeneration", "LlavaConfig", text_config=TEXT, vision_config=CLIP, image_seq_length=16, **INDEX),
        pictured(16), (CLIP_SEEN, read("LlamaAttention", 16)), forms=("plain", *DECODER), core=True,
        note="the last layer of the vision encoder runs and is not used, as in every LLaVA",
    ),
    Entry(
        "pixtral", made("LlavaForConditionalGeneration", "LlavaConfig", text_config=MISTRAL, vision_config=PIXTRAL, vision_feature_layer=-1,
            vision_feature_select_strategy="full", **INDEX),
        sized(24, 56, 84), (Sites(2, "PixtralAttention", 48, 48, 4), read("MistralAttention", 24)),
        forms=("packed sequences", "additive mask", *DECODER), note="two pictures of 4 x 6 patches are one sequence under a block mask",
        breaks=SIZES + "; eager attention makes it one graph",
    ),
    Entry(
        "mistral3", made("Mistral3ForConditionalGeneration", "Mistral3Config", text_config=MISTRAL, vision_config=PIXTRAL,
            spatial_merge_size=2, **INDEX),
        sized(6, 56, 84), (Sites(2, "PixtralAttention", 48, 48, 4), read("MistralAttention", 6)),
        forms=("packed sequences", "additive mask", *DECODER),
        breaks=SIZES,
    ),
    Entry(
        "llava-next", made("LlavaNextForConditionalGeneration", "LlavaNextConfig", text_config=TEXT, vision_config=CLIP,
            image_grid_pinpoints=[[56, 112]], image_seq_length=16, **INDEX),
        sized(52, 56, 112, 3), (CLIP_SEEN, read("LlamaAttention", 52)), forms=("plain", *DECODER),
        note="a picture is three crops; four of its tokens end a line",
        breaks=SIZES,
    ),
    Entry(
        "llava-onevision", made("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", text_config=QWEN, vision_config=SIGLIP,
            image_grid_pinpoints=[[56, 112]], video_token_index=198, **INDEX),
        sized(52, 56, 112, 3), (seen("SiglipAttention", 4), read("Qwen2Attention", 52)), forms=("plain", *DECODER),
        breaks=SIZES,
    ),
    Entry(
        "video-llava", made("VideoLlavaForConditionalGeneration", "VideoLlavaConfig", text_config=TEXT, vision_config=CLIP,
            video_token_index=PICTURE, image_token_index=198, image_seq_length=16, video_seq_length=68),
        pictured(68, 4, 3, 56, 56, name="pixel_values_videos"), (CLIP_SEEN, read("LlamaAttention", 68)), forms=("plain", *DECODER),
        note="four frames, CLS tokens included",
    ),
    Entry(
        "vipllava", made("VipLlavaForConditionalGeneration", "VipLlavaConfig", text_config=TEXT, vision_config=CLIP,
            vision_feature_layer=[-2, -3], image_seq_length=16, **INDEX),
        pictured(16), (CLIP_SEEN, read("LlamaAttention", 16)), forms=("plain", *DECODER),
    ),
    Entry(
        "qwen2-vl", made("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", text_config=QWEN_VL,
            vision_config={**BLOCKS, "embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2}, **GRID),
        packed(8), (sequences("VisionAttention"), read("Qwen2VLAttention", 16)),
        forms=("packed sequences", "fused qkv", *DECODER), core=True, note=SPLIT,
        alone=4, breaks=LENGTHS,
    ),
    Entry(
        "qwen2.5-vl", made("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", text_config=QWEN_VL,
            vision_config={**MERGED, "window_size": 32, "fullatt_block_indexes": [1]}, **GRID),
        packed(8), (
            Sites(8, "Qwen2_5_VLVisionAttention", 16, 16, 4, window=(4, 4), per_call=8),
            Sites(2, "Qwen2_5_VLVisionAttention", 64, 64, 4, per_call=2), read("Qwen2_5_VLAttention", 16),
        ), forms=("packed sequences", "window partition", "fused qkv", *DECODER), note="patches lie window by window; " + SPLIT,
        alone=7, breaks=WINDOWED,
    ),
    Entry(
        "qwen3-vl", made("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", text_config={**QWEN_VL, "head_dim": 32},
            vision_config={**MERGED, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}, **GRID),
        packed(8), (sequences("Qwen3VLVisionAttention"), read("Qwen3VLTextAttention", 16)),
        forms=("packed sequences", "fused qkv", "qk-norm", *DECODER), note=SPLIT,
        alone=4, breaks=LENGTHS,
    ),
    Entry(
        "glm4v", made("Glm4vForConditionalGeneration", "Glm4vConfig", text_config=QWEN_VL, vision_config={**MERGED, "image_size": 64},
            image_start_token_id=197, image_end_token_id=196, video_start_token_id=195, video_end_token_id=194, video_token_id=198,
            **TOKEN),
        packed(8), (sequences("Glm4vVisionAttention"), read("Glm4vTextAttention", 16)),
        forms=("packed sequences", "fused qkv", *DECODER), note=SPLIT,
        alone=4, breaks=LENGTHS,
    ),
    Entry(
        "internvl", made("InternVLForConditionalGeneration", "InternVLConfig", text_config=QWEN,
            vision_config={**VISION, "image_size": [112, 112], "patch_size": [14, 14]}, image_seq_length=16, **TOKEN),
        pictured(16, 3, 112, 112), (seen("InternVLVisionAttention", 8, 1), read("Qwen2Attention", 16)), forms=("plain", *DECODER),
    ),
    Entry(
        "paligemma", made("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", text_config=GEMMA, vision_config=SIGLIP,
            projection_dim=128, hidden_size=128, **INDEX),
        paligemma, (seen("SiglipAttention", 4), read("GemmaAttention", 16, causal=False)),
        forms=("plain", "padding", "multi-query", "rotary"), note="the whole prompt sees itself",
    ),
    Entry(
        "gemma3", made("Gemma3ForConditionalGeneration", "Gemma3Config", text_config=GEMMA3, vision_config=SIGLIP, mm_tokens_per_image=16,
            boi_token_index=197, eoi_token_index=196, **INDEX, **SPREAD),
        gemma, (seen("SiglipAttention", 4), read("Gemma3Attention", 16, count=3, causal=False)),
        forms=("plain", "sliding window", "padding", "grouped-query", "qk-norm", "rotary"),
        note="text sees backwards, a picture sees all of itself; two layers of three slide",
    ),
    Entry(
        "idefics3", made("Idefics3ForConditionalGeneration", "Idefics3Config", text_config=TEXT, vision_config=FINE, **TOKEN),
        pictured(16, 1, 3, 56, 56), (seen("Idefics3VisionAttention", 8), read("LlamaAttention", 16)), forms=("plain", *DECODER),
    ),
    Entry(
        "smolvlm", made("SmolVLMForConditionalGeneration", "SmolVLMConfig", text_config=TEXT, vision_config=FINE, **TOKEN),
        pictured(16, 1, 3, 56, 56), (seen("SmolVLMVisionAttention", 8), read("LlamaAttention", 16)), forms=("plain", *DECODER),
    ),
)  # fmt: skip
