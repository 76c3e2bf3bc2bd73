"""Detectors and segmenters of transformers: queries for objects attend to a feature map.

Multi-scale deformable attention is not a site: it weighs values sampled at predicted places, and no query meets a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_parts import SPECIAL, SPREAD, images, made, seeded, tokens, windows

DETECTOR: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 20, "init_std": 0.1,
}  # fmt: skip
# Four tiny stages; the last feature map of a picture of 128 pixels is 4 x 4.
RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "out_features": ["stage4"],
}  # fmt: skip
SCALES = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
SWIN: dict[str, Any] = {
    "model_type": "swin", "image_size": 128, "embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4,
}  # fmt: skip
RT_DETR: dict[str, Any] = {
    "encoder_hidden_dim": 64, "encoder_in_channels": [32, 48, 64], "decoder_in_channels": [64, 64, 64], "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_layers": 2, "d_model": 64, "num_queries": 20,
    **SPREAD,
}  # fmt: skip
MASKED: dict[str, Any] = {
    "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 128, "encoder_layers": 2, "decoder_layers": 4,
    "num_attention_heads": 2, "dim_feedforward": 128, "num_queries": 20, "init_std": 0.1,
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 200,
    "max_position_embeddings": 40, **SPECIAL, **SPREAD,
}  # fmt: skip
GROUNDED = {**SWIN, "image_size": 112, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 7, "out_indices": [2, 3]}
NO_DEFORMABLE = "deformable attention is not counted"


def objects(encoder: str, self_attention: str, cross: str) -> tuple[Sites, ...]:
    """An encoder over 4 x 4 tokens and a decoder of twenty objects."""
    return (
        Sites(2, encoder, 16, 16, 2, grid=(4, 4)), Sites(2, self_attention, 20, 20, 2), Sites(2, cross, 20, 16, 2, "cross"),
    )  # fmt: skip


def phrases(batch: int) -> Mapping[str, Any]:
    """Two phrases a text, each closed by the token that BERT's tokenizer ends one with: a token sees its own phrase only."""
    texts = tokens(batch, 16, 4)
    texts["input_ids"][:, 0] = 101
    texts["input_ids"][:, [6, 11]] = 102
    return {**texts, "pixel_values": seeded(batch, 3, 112, 112)}


DETECTION: tuple[Entry, ...] = (
    Entry(
        "detr", made("DetrForObjectDetection", "DetrConfig", backbone_config=RESNET, **DETECTOR), images(128),
        objects("DetrSelfAttention", "DetrSelfAttention", "DetrCrossAttention"), forms=("plain", "cross-attention"),
        note="positions are added to queries and keys, not to values",
    ),
    Entry(
        "conditional-detr", made("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", backbone_config=RESNET, **DETECTOR),
        images(128),
        objects("ConditionalDetrSelfAttention", "ConditionalDetrDecoderSelfAttention", "ConditionalDetrDecoderCrossAttention"),
        forms=("cross-attention",), note="where objects see the picture, queries and keys are twice as wide as values",
    ),
    Entry(
        "deformable-detr", made("DeformableDetrForObjectDetection", "DeformableDetrConfig", backbone_config=SCALES, num_feature_levels=3,
            **DETECTOR),
        images(128), (Sites(2, "DeformableDetrSelfAttention", 20, 20, 2),), forms=("plain",), note=NO_DEFORMABLE,
    ),
    Entry(
        "rt-detr", made("RTDetrForObjectDetection", "RTDetrConfig",
            backbone_config={**SCALES, "model_type": "rt_detr_resnet", "layer_type": "basic"}, **RT_DETR),
        images(128), (Sites(1, "RTDetrSelfAttention", 16, 16, 2, grid=(4, 4)), Sites(2, "RTDetrSelfAttention", 20, 20, 2)),
        forms=("plain",), note=NO_DEFORMABLE,
    ),
    Entry(
        "grounding-dino", made("GroundingDinoForObjectDetection", "GroundingDinoConfig", backbone_config=GROUNDED, text_config=BERT,
            num_feature_levels=3, max_text_len=16, **DETECTOR),
        phrases, (
            *windows("SwinAttention", 28, 7, (2, 2, 2)), Sites(2, "BertSelfAttention", 16, 16, 4),
            Sites(2, "GroundingDinoBiMultiHeadAttention", 261, 16, 1, "cross", per_call=2),
            Sites(2, "GroundingDinoBiMultiHeadAttention", 16, 261, 1, "cross", per_call=2, visual=261),
            Sites(2, "GroundingDinoMultiheadAttention", 16, 16, 1), Sites(2, "GroundingDinoMultiheadAttention", 20, 20, 2),
            Sites(2, "GroundingDinoMultiheadAttention", 20, 16, 2, "cross"),
        ), forms=("window partition", "shifted windows", "cross-attention", "boolean mask", "softmax not last"),
        note="one score matrix serves picture to text and, transposed, text to picture, less its maximum and clamped; the backbone shifts "
        "even where the window is the grid; " + NO_DEFORMABLE,
    ),
    Entry(
        "maskformer", made("MaskFormerForInstanceSegmentation", "MaskFormerConfig", backbone_config=SWIN,
            decoder_config={"model_type": "detr", **DETECTOR}, fpn_feature_size=64, mask_feature_size=64),
        images(128), (
            *windows("MaskFormerSwinSelfAttention", 32, 4, (1, 1, 1, 1)), Sites(2, "MaskFormerDetrSelfAttention", 20, 20, 2),
            Sites(2, "MaskFormerDetrCrossAttention", 20, 16, 2, "cross"),
        ), forms=("window partition", "relative position table", "cross-attention"), note="its own Swin has no SDPA, its decoder has",
    ),
    Entry(
        "mask2former", made("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig",
            backbone_config={**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]}, **MASKED),
        images(128), (
            *windows("SwinAttention", 32, 4, (1, 1, 1, 1)), Sites(3, "Mask2FormerAttention", 20, 20, 2),
            *(Sites(1, "MultiheadAttention", 20, side * side, 2, "cross") for side in (4, 8, 16)),
        ), forms=("window partition", "cross-attention", "boolean mask", "MultiheadAttention"),
        note="objects see where the layer before segmented them; SDPA in the backbone only; " + NO_DEFORMABLE,
    ),
)  # fmt: skip
