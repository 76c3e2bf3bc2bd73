"""Models of transformers with two streams: pictures and texts, objects and pictures, prompts and pictures, latents and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_parts import EAGER, SPECIAL, SPREAD, Inputs, images, made, seeded, tokens

WIDTH: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, **SPREAD}
TEXT: dict[str, Any] = {**WIDTH, "vocab_size": 200, "max_position_embeddings": 40, **SPECIAL}
SIGLIP_TEXT = {**TEXT, "projection_size": 128}
LXMERT = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
PICTURE: dict[str, Any] = {**WIDTH, "image_size": 56, "patch_size": 8}
SEEN = (7, 7)


def towers(module: str, causal: bool = True) -> tuple[Sites, ...]:
    """A picture encoder of 7 x 7 tokens and CLS, and a text encoder of 16 tokens, of one class."""
    return (Sites(2, module, 50, 50, 4, grid=SEEN, prefix=1), Sites(2, module, 16, 16, 4, causal=causal))


def pair(length: int = 16, size: int = 56, frames: tuple[int, ...] = ()) -> Inputs:
    """Texts that end with the token a CLIP pools at, and pictures."""
    return lambda batch: {**tokens(batch, length, 4, end=2), "pixel_values": seeded(batch, *frames, 3, size, size)}


def regions(features: str, **others: Any) -> Inputs:
    """Texts and ten regions of a picture, as features of an object detector."""
    return lambda batch: {**tokens(batch, 16, 4), features: seeded(batch, 10, 48), **{name: make(batch) for name, make in others.items()}}


def siglip2(batch: int) -> Mapping[str, Any]:
    """Pictures of 6 x 8 and, from the second row, of 5 x 7 patches, padded to 48."""
    mask = torch.ones(batch, 48, dtype=torch.long)
    mask[1:, 35:] = 0
    shapes = torch.tensor([[6, 8]] + [[5, 7]] * (batch - 1))
    return {**tokens(batch, 16, 4), "pixel_values": seeded(batch, 48, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def speech(batch: int) -> Mapping[str, Any]:
    mask = torch.ones(batch, 4000, dtype=torch.long)
    mask[1:, 3000:] = 0
    return {"input_values": seeded(batch, 4000), "attention_mask": mask}


def pointed(size: int) -> Inputs:
    """Pictures with two points to segment at."""
    return lambda batch: {
        "pixel_values": seeded(batch, 3, size, size), "input_points": torch.tensor([[[[20.0, 30.0], [60.0, 50.0]]]] * batch),
    }  # fmt: skip


def masked(module: str, tokens: int, side: int) -> tuple[Sites, ...]:
    """SAM's decoder: two layers of self-attention, tokens to picture and picture to tokens; at last tokens to picture again."""
    return (
        Sites(2, module, tokens, tokens, 2), Sites(3, module, tokens, side * side, 2, "cross"),
        Sites(2, module, side * side, tokens, 2, "cross", grid=(side, side)),
    )  # fmt: skip


CLIP = made("CLIPModel", "CLIPConfig", text_config=TEXT, vision_config=PICTURE, projection_dim=64)
CLIPSEG = made(
    "CLIPSegForImageSegmentation", "CLIPSegConfig", text_config=TEXT, vision_config=PICTURE, projection_dim=64, extract_layers=[0, 1],
    reduce_dim=64, decoder_num_attention_heads=2, decoder_intermediate_size=128,
)  # fmt: skip
SIGLIP2_VISION = {**WIDTH, "patch_size": 8, "num_patches": 49}
ALIGN_VISION = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 64}
BRIDGE_VISION = {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 56, "patch_size": 8}
XCLIP_VISION = {**PICTURE, "mit_hidden_size": 64, "mit_num_attention_heads": 2, "mit_intermediate_size": 128, "num_frames": 4}
GROUP_VISION = {**PICTURE, "depths": [1, 1, 1], "num_group_tokens": [16, 8, 0], "num_output_groups": [16, 8, 0]}
DECODER: dict[str, Any] = {"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 2, "iou_head_hidden_dim": 64}
PROMPTS: dict[str, Any] = {"hidden_size": 64, "mask_input_channels": 8}
SAM_VISION = {
    **PICTURE, "image_size": 112, "output_channels": 64, "num_pos_feats": 32, "window_size": 7, "global_attn_indexes": [1], "mlp_dim": 256,
}  # fmt: skip
SAM2_BACKBONE = {
    "model_type": "sam2_hiera_det_model", "image_size": [128, 128], "hidden_size": 32, "num_attention_heads": 1,
    "blocks_per_stage": [1, 2, 2, 1], "embed_dim_per_stage": [32, 64, 128, 256], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [4], "window_positional_embedding_background_size": [4, 4],
    "query_stride": [2, 2], **SPREAD,
}  # fmt: skip
SAM2_VISION = {
    "backbone_config": SAM2_BACKBONE, "backbone_channel_list": [256, 128, 64, 32],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 64,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": 200, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "num_mel_bins": 40, "max_source_positions": 50, "max_target_positions": 40,
    "init_std": 0.1, "decoder_start_token_id": 1, **SPECIAL,
}  # fmt: skip

DUAL: tuple[Entry, ...] = (
    Entry("clip", CLIP, pair(), towers("CLIPAttention"), forms=("plain", "causal", "padding", "boolean mask")),
    Entry(
        "clip-vision", made("CLIPVisionModel", "CLIPVisionConfig", **PICTURE), images(56),
        (Sites(2, "CLIPAttention", 50, 50, 4, grid=SEEN, prefix=1),), forms=("plain",),
    ),
    Entry(
        "siglip", made("SiglipModel", "SiglipConfig", text_config=SIGLIP_TEXT, vision_config=PICTURE), pair(), (
            Sites(2, "SiglipAttention", 49, 49, 4, grid=SEEN), Sites(2, "SiglipAttention", 16, 16, 4),
            Sites(1, "MultiheadAttention", 1, 49, 4, "cross"),
        ), forms=("plain", "padding", "boolean mask", "cross-attention", "MultiheadAttention"), core=True,
        note="a learnt query pools the picture",
    ),
    Entry(
        "siglip2", made("Siglip2Model", "Siglip2Config", text_config=SIGLIP_TEXT, vision_config=SIGLIP2_VISION), siglip2, (
            Sites(2, "Siglip2Attention", 48, 48, 4), Sites(2, "Siglip2Attention", 16, 16, 4),
            Sites(1, "MultiheadAttention", 1, 48, 4, "cross"),
        ), forms=("padding", "boolean mask", "cross-attention", "MultiheadAttention"), note="pictures of several shapes, padded",
    ),
    Entry(
        "align", made("AlignModel", "AlignConfig", text_config=TEXT, vision_config=ALIGN_VISION, projection_dim=80), pair(size=64),
        (Sites(2, "AlignTextSelfAttention", 16, 16, 4),), EAGER, ("padding", "additive mask"), note="pictures go through an EfficientNet",
    ),
    Entry(
        "flava", made("FlavaModel", "FlavaConfig", image_config=PICTURE, text_config=TEXT, multimodal_config=WIDTH, hidden_size=128,
            projection_dim=64),
        pair(), (*towers("FlavaSelfAttention", causal=False), Sites(2, "FlavaSelfAttention", 67, 67, 4)), EAGER,
        ("padding", "additive mask"),
    ),
    Entry(
        "vilt", made("ViltModel", "ViltConfig", **TEXT, image_size=56, patch_size=8), pair(), (Sites(2, "ViltSelfAttention", 66, 66, 4),),
        EAGER, ("padding", "additive mask"), note="one stream of text, CLS and patches",
        breaks="patches are chosen by nonzero, unique and multinomial over the pixel mask",
    ),
    Entry(
        "lxmert", made("LxmertModel", "LxmertConfig", **LXMERT, l_layers=2, r_layers=1, x_layers=2, visual_feat_dim=48),
        regions("visual_feats", visual_pos=lambda batch: seeded(batch, 10, 4)), (
            Sites(4, "LxmertAttention", 16, 16, 4), Sites(3, "LxmertAttention", 10, 10, 4),
            Sites(2, "LxmertAttention", 16, 10, 4, "cross"), Sites(2, "LxmertAttention", 10, 16, 4, "cross"),
        ), EAGER, ("cross-attention", "padding", "additive mask"),
    ),
    Entry(
        "visual-bert", made("VisualBertModel", "VisualBertConfig", visual_embedding_dim=48, **TEXT),
        regions("visual_embeds", visual_attention_mask=lambda batch: torch.ones(batch, 10),
            visual_token_type_ids=lambda batch: torch.ones(batch, 10, dtype=torch.long)),
        (Sites(2, "VisualBertSelfAttention", 26, 26, 4),), EAGER, ("padding", "additive mask"),
    ),
    Entry(
        "blip", made("BlipForImageTextRetrieval", "BlipConfig", text_config={**TEXT, "encoder_hidden_size": 128}, vision_config=PICTURE,
            image_text_hidden_size=64),
        pair(), (
            Sites(2, "BlipAttention", 50, 50, 4, grid=SEEN, prefix=1), Sites(2, "BlipTextSelfAttention", 16, 16, 4),
            Sites(2, "BlipTextSelfAttention", 16, 50, 4, "cross", visual=50),
        ), EAGER, ("cross-attention", "padding", "fused qkv"),
    ),
    Entry(
        "bridgetower", made("BridgeTowerModel", "BridgeTowerConfig", hidden_size=128, num_attention_heads=4, num_hidden_layers=2,
            text_config=TEXT, vision_config=BRIDGE_VISION),
        pair(), (
            Sites(2, "MultiheadAttention", 50, 50, 2, grid=SEEN, prefix=1), Sites(4, "BridgeTowerSelfAttention", 16, 16, 4),
            Sites(2, "BridgeTowerSelfAttention", 50, 50, 4, grid=SEEN, prefix=1),
            Sites(2, "BridgeTowerCrossAttention", 16, 50, 4, "cross", visual=50),
            Sites(2, "BridgeTowerCrossAttention", 50, 16, 4, "cross", grid=SEEN, prefix=1),
        ), EAGER, ("MultiheadAttention", "cross-attention", "padding"), note="the vision encoder's heads are 64 wide, whatever its config",
    ),
    Entry(
        "owlv2", made("Owlv2ForObjectDetection", "Owlv2Config", text_config=TEXT, vision_config=PICTURE, projection_dim=128), pair(),
        towers("Owlv2Attention"), forms=("causal", "padding"),
    ),
    Entry(
        "clipseg", CLIPSEG, pair(), (*towers("CLIPSegAttention"), Sites(2, "CLIPSegAttention", 50, 50, 2, grid=SEEN, prefix=1)),
        forms=("causal", "padding"),
    ),
    Entry(
        "x-clip", made("XCLIPModel", "XCLIPConfig", text_config=TEXT, vision_config=XCLIP_VISION, projection_dim=64,
            prompt_num_attention_heads=2),
        pair(frames=(4,)), (
            Sites(2, "XCLIPAttention", 4, 4, 4), Sites(2, "XCLIPAttention", 51, 51, 4, grid=SEEN, prefix=1),
            Sites(1, "XCLIPAttention", 4, 4, 2), Sites(2, "XCLIPAttention", 16, 16, 4, causal=True),
            Sites(2, "XCLIPCrossAttention", 2, 49, 2, "cross", visual=49),
        ), forms=("causal", "padding", "cross-attention", "divided space-time"),
        note="a message token follows the grid; messages attend over the four frames; each video sees every text of the batch",
    ),
    Entry(
        "groupvit", made("GroupViTModel", "GroupViTConfig", text_config=TEXT, vision_config=GROUP_VISION, projection_dim=64,
            projection_intermediate_dim=64),
        pair(), (
            Sites(1, "GroupViTAttention", 65, 65, 4, grid=(7, 7)),
            Sites(1, "GroupViTAttention", 24, 24, 4), Sites(1, "GroupViTAttention", 8, 8, 4),
            Sites(1, "GroupViTAttention", 16, 49, 4, "cross"), Sites(1, "GroupViTAttention", 8, 16, 4, "cross"),
            Sites(1, "GroupViTAssignAttention", 16, 49, 1, "cross"), Sites(1, "GroupViTAssignAttention", 8, 16, 1, "cross"),
            Sites(2, "GroupViTAttention", 16, 16, 4, causal=True),
        ), EAGER, ("softmax not last", "cross-attention", "baddbmm", "map escapes"),
        note="the assignment is a softmax over the queries, made one-hot, then divided by its sum over the keys; its soft map is an output",
    ),
    Entry(
        "sam", made("SamModel", "SamConfig", vision_config=SAM_VISION, mask_decoder_config=DECODER,
            prompt_encoder_config={**PROMPTS, "image_size": 112, "patch_size": 8}),
        pointed(112), (
            Sites(1, "SamVisionLayer", 49, 49, 4, grid=(14, 14), window=(7, 7)), Sites(1, "SamVisionLayer", 196, 196, 4, grid=(14, 14)),
            *masked("SamAttention", 8, 14),
        ), forms=("decomposed relative position", "window partition", "cross-attention", "fused qkv"), core=True,
        note="SamVisionLayer holds SamVisionSdpaAttention or SamVisionAttention",
    ),
    Entry(
        "sam2", made("Sam2Model", "Sam2Config", vision_config=SAM2_VISION, mask_decoder_config=DECODER,
            prompt_encoder_config={**PROMPTS, "image_size": 128, "patch_size": 16}),
        pointed(128), (
            Sites(1, "Sam2MultiScaleAttention", 64, 64, 1, grid=(32, 32), window=(8, 8)),
            Sites(1, "Sam2MultiScaleAttention", 16, 64, 2, grid=(16, 16), window=(4, 4)),
            Sites(1, "Sam2MultiScaleAttention", 16, 16, 2, grid=(16, 16), window=(4, 4)),
            Sites(1, "Sam2MultiScaleAttention", 4, 16, 4, grid=(8, 8), window=(2, 2)),
            Sites(1, "Sam2MultiScaleAttention", 64, 64, 4, grid=(8, 8)),
            Sites(1, "Sam2MultiScaleAttention", 4, 16, 8, grid=(4, 4), window=(2, 2)),
            *masked("Sam2Attention", 9, 8),
        ), forms=("pooled queries", "window partition", "cross-attention"),
        note="Sam2MultiScaleAttention also takes a softmax over the heads of every token and drops it: no site",
    ),
    Entry(
        "perceiver", made("PerceiverModel", "PerceiverConfig", num_latents=24, d_latents=128, d_model=64, num_blocks=2,
            num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=2, **SPREAD),
        lambda batch: {"inputs": seeded(batch, 49, 64)}, (
            Sites(1, "PerceiverSelfAttention", 24, 49, 2, "cross"), Sites(4, "PerceiverSelfAttention", 24, 24, 4),
        ), EAGER, ("cross-attention",), core=True, note="the blocks share their weights",
    ),
    Entry(
        "whisper", made("WhisperModel", "WhisperConfig", **WHISPER),
        lambda batch: {"input_features": seeded(batch, 40, 100), "decoder_input_ids": tokens(batch, 16)["input_ids"]}, (
            Sites(2, "WhisperAttention", 50, 50, 4), Sites(2, "WhisperAttention", 16, 16, 4, causal=True),
            Sites(2, "WhisperAttention", 16, 50, 4, "cross"),
        ), forms=("causal", "cross-attention"), note="queries are scaled before, the scale is 1",
    ),
    Entry(
        "ast", made("ASTModel", "ASTConfig", **WIDTH, max_length=96, num_mel_bins=64),
        lambda batch: {"input_values": seeded(batch, 96, 64)},
        (Sites(2, "ASTAttention", 47, 47, 4, grid=(5, 9), prefix=2),), forms=("plain",), note="the picture is a spectrogram",
    ),
    Entry(
        "wav2vec2", made("Wav2Vec2Model", "Wav2Vec2Config", **WIDTH, conv_dim=[32, 32, 32], conv_stride=[5, 4, 4], conv_kernel=[10, 8, 8],
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
        speech, (Sites(2, "Wav2Vec2Attention", 48, 48, 4),), forms=("padding", "boolean mask"),
    ),
)  # fmt: skip
