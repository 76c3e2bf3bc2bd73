"""Encoders of pictures and videos of transformers: one stream, no text."""

from __future__ import annotations

from typing import Any

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.transformers_parts import EAGER, SPREAD, images, made, video, windows

# Two layers of four heads of 32 dimensions; 56 pixels in patches of 8 are a grid of 7 x 7.
WIDTH: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **SPREAD}
DINO: dict[str, Any] = {**WIDTH, "image_size": 56, "patch_size": 8}
VIT: dict[str, Any] = {**DINO, "intermediate_size": 256}
VIVIT = {key: value for key, value in VIT.items() if key != "patch_size"}
# Four stages of 32 x 32 to 4 x 4 tokens of 128 pixels.
PYRAMID: dict[str, Any] = {"hidden_sizes": (32, 64, 96, 128), "num_attention_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 2), **SPREAD}
SHIFTED: dict[str, Any] = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4), **SPREAD}


def vit(module: str, prefix: int = 1, count: int = 2, side: int = 7, more: int = 0) -> tuple[Sites, ...]:
    """The sites of an encoder that attends to the whole picture; more: tokens after the grid."""
    length = prefix + side * side + more
    return (Sites(count, module, length, length, 4, grid=(side, side), prefix=prefix),)


def pyramid(module: str, keys: int, last: int = 0) -> tuple[Sites, ...]:
    """Four stages that attend to `keys` pooled tokens; last: CLS tokens before the last stage's grid, which is not pooled further."""
    stages = ((1, 1, 32, 0), (1, 2, 16, 0), (1, 3, 8, 0), (2, 4, 4, last))
    return tuple(
        Sites(count, module, side * side + prefix, keys + prefix, heads, grid=(side, side), prefix=prefix)
        for count, heads, side, prefix in stages
    )


def unfolded(module: str, heads: int, kind: Any) -> tuple[Sites, ...]:
    """The stages of a MobileViT: of every patch of 2 x 2 pixels the like-placed ones attend to each other."""
    sides = ((2, 8), (4, 4), (3, 2))
    return tuple(
        Sites(count, module, side * side, side * side, heads, kind, grid=(2 * side, 2 * side), window=(side, side)) for count, side in sides
    )


DILATED = "the window is dilated: every second pixel of the grid, of rows and of columns"

VISION: tuple[Entry, ...] = (
    Entry("vit", made("ViTForImageClassification", "ViTConfig", **VIT), images(56), vit("ViTAttention"), forms=("plain",)),
    Entry("deit", made("DeiTModel", "DeiTConfig", **VIT), images(56), vit("DeiTAttention", 2), forms=("plain",)),
    Entry("ijepa", made("IJepaModel", "IJepaConfig", **VIT), images(56), vit("IJepaAttention", 0), forms=("plain",)),
    Entry(
        "yolos", made("YolosForObjectDetection", "YolosConfig", **{**VIT, "image_size": [56, 56]}, num_detection_tokens=10),
        images(56), vit("YolosSelfAttention", more=10), forms=("plain",), note="ten detection tokens follow the grid",
    ),
    Entry(
        "beit", made("BeitModel", "BeitConfig", use_relative_position_bias=True, **VIT), images(56), vit("BeitAttention"),
        forms=("relative position table", "additive mask"),
    ),
    Entry(
        "data2vec-vision", made("Data2VecVisionModel", "Data2VecVisionConfig", use_shared_relative_position_bias=True, **VIT),
        images(56), vit("Data2VecVisionAttention"), forms=("relative position table", "additive mask"),
        note="Data2VecVisionAttention wraps another class for each implementation",
    ),
    Entry(
        "swin", made("SwinModel", "SwinConfig", image_size=112, **SHIFTED), images(112), windows("SwinAttention", 28, 7, (2, 2, 2)),
        forms=("window partition", "shifted windows", "relative position table", "additive mask"), core=True,
        note="the second layer of the first two stages is shifted; the last stage is one window",
    ),
    Entry(
        "swinv2", made("Swinv2Model", "Swinv2Config", image_size=128, window_size=8, **SHIFTED), images(128),
        windows("Swinv2SelfAttention", 32, 8, (2, 2, 2)), EAGER,
        ("window partition", "shifted windows", "cosine", "log-spaced position", "additive mask"), core=True,
    ),
    Entry("dinov2", made("Dinov2Model", "Dinov2Config", **DINO), images(56), vit("Dinov2Attention"), forms=("plain",)),
    Entry(
        "dinov2-registers", made("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINO),
        images(56), vit("Dinov2WithRegistersAttention", 5), forms=("plain",),
    ),
    Entry(
        "dinov3-vit", made("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, intermediate_size=256, **DINO),
        images(56), vit("DINOv3ViTAttention", 5), forms=("rotary",),
    ),
    Entry(
        "segformer", made("SegformerForSemanticSegmentation", "SegformerConfig", decoder_hidden_size=32, **PYRAMID),
        images(128), pyramid("SegformerAttention", 16), forms=("reduced keys", "float32 upcast"), core=True,
    ),
    Entry(
        "glpn", made("GLPNForDepthEstimation", "GLPNConfig", decoder_hidden_size=32, **PYRAMID), images(128),
        pyramid("GLPNEfficientSelfAttention", 16), EAGER, ("reduced keys",),
    ),
    Entry(
        "pvt", made("PvtForImageClassification", "PvtConfig", image_size=128, **PYRAMID), images(128),
        pyramid("PvtEfficientSelfAttention", 16, 1), EAGER, ("reduced keys",),
    ),
    Entry(
        "pvt-v2", made("PvtV2ForImageClassification", "PvtV2Config", image_size=128, **PYRAMID), images(128),
        pyramid("PvtV2SelfAttention", 16), EAGER, ("reduced keys",),
    ),
    Entry(
        "pvt-v2-linear", made("PvtV2ForImageClassification", "PvtV2Config", image_size=128, linear_attention=True, **PYRAMID),
        images(128), pyramid("PvtV2SelfAttention", 49), EAGER, ("reduced keys",),
        note="linear in name only: a softmax over keys pooled to 7 x 7, more of them than the last stage has queries",
    ),
    Entry(
        "dpt", made("DPTForDepthEstimation", "DPTConfig", backbone_out_indices=(0, 1, 2, 3), neck_hidden_sizes=(16, 24, 32, 48),
            fusion_hidden_size=32, **{**VIT, "num_hidden_layers": 4, "image_size": 64}),
        images(64), vit("DPTSelfAttention", count=4, side=8), forms=("plain",),
    ),
    Entry(
        "vitdet", made("VitDetModel", "VitDetConfig", window_block_indices=(0,), window_size=7, use_relative_position_embeddings=True,
            **{**DINO, "image_size": 112, "pretrain_image_size": 112}),
        images(112), (
            Sites(1, "VitDetAttention", 49, 49, 4, grid=(14, 14), window=(7, 7)),
            Sites(1, "VitDetAttention", 196, 196, 4, grid=(14, 14)),
        ), EAGER, ("window partition", "decomposed relative position"),
    ),
    Entry(
        "hiera", made("HieraModel", "HieraConfig", image_size=(128, 128), embed_dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8),
            masked_unit_size=(8, 8), **SPREAD),
        images(128), (
            Sites(1, "HieraMaskUnitAttention", 64, 64, 1, grid=(32, 32), window=(8, 8)),
            Sites(1, "HieraMaskUnitAttention", 16, 64, 2, grid=(16, 16), window=(4, 4)),
            Sites(1, "HieraMaskUnitAttention", 16, 16, 2, grid=(16, 16), window=(4, 4)),
            Sites(1, "HieraMaskUnitAttention", 4, 16, 4, grid=(8, 8), window=(2, 2)),
            Sites(1, "HieraMaskUnitAttention", 64, 64, 4, grid=(8, 8)),
            Sites(1, "HieraMaskUnitAttention", 16, 64, 8, grid=(4, 4)),
        ), EAGER, ("pooled queries", "window partition", "fused qkv"),
        note="where a stage begins the queries are a maximum over 2 x 2; tokens lie unit by unit, not row by row",
    ),
    Entry(
        "cvt", made("CvtForImageClassification", "CvtConfig", embed_dim=(32, 64, 96), num_heads=(1, 2, 3), depth=(1, 2, 3), **SPREAD),
        images(128), (
            Sites(1, "CvtSelfAttention", 1024, 256, 1, grid=(32, 32)),
            Sites(2, "CvtSelfAttention", 256, 64, 2, grid=(16, 16)),
            Sites(3, "CvtSelfAttention", 65, 17, 3, grid=(8, 8), prefix=1),
        ), EAGER, ("reduced keys", "einsum"), note="scaled by the width of all heads, not of one",
    ),
    Entry(
        "levit", made("LevitForImageClassification", "LevitConfig", image_size=128, hidden_sizes=(64, 96, 128),
            num_attention_heads=(2, 3, 4), depths=(2, 2, 2), key_dim=(16, 16, 16), **SPREAD),
        images(128), (
            Sites(2, "LevitAttention", 64, 64, 2, grid=(8, 8)), Sites(1, "LevitAttentionSubsample", 16, 64, 4, grid=(4, 4)),
            Sites(2, "LevitAttention", 16, 16, 3, grid=(4, 4)), Sites(1, "LevitAttentionSubsample", 4, 16, 6, grid=(2, 2)),
            Sites(2, "LevitAttention", 4, 4, 4, grid=(2, 2)),
        ), EAGER, ("pooled queries", "relative position table", "fused qkv"),
        note="values are twice as wide as keys, four times where queries are subsampled; the first call keeps the table in a cache",
    ),
    Entry(
        "mobilevit", made("MobileViTModel", "MobileViTConfig", image_size=128, hidden_sizes=(128, 128, 128),
            neck_hidden_sizes=(8, 16, 24, 32, 48, 64, 96), **SPREAD),
        images(128), unfolded("MobileViTSelfAttention", 4, "self"), EAGER, ("grid partition",), note=DILATED,
    ),
    Entry(
        "mobilevitv2", made("MobileViTV2Model", "MobileViTV2Config", image_size=128, width_multiplier=0.25, **SPREAD), images(128),
        (), EAGER, ("none",), none="one softmax score a token weighs a sum of the keys, which gates every value: no query meets a key",
    ),
    Entry(
        "videomae", made("VideoMAEModel", "VideoMAEConfig", num_frames=4, **VIT), video(4, 56),
        (Sites(2, "VideoMAESelfAttention", 98, 98, 4, grid=(2, 7, 7)),), forms=("plain",),
    ),
    Entry(
        "timesformer", made("TimesformerModel", "TimesformerConfig", num_frames=4, **VIT), video(4, 56), (
            Sites(2, "TimesformerSelfAttention", 4, 4, 4, grid=(4, 7, 7), window=(4, 1, 1)),
            Sites(2, "TimesformerSelfAttention", 50, 50, 4, grid=(4, 7, 7), prefix=1, window=(1, 7, 7)),
        ), EAGER, ("divided space-time", "axial", "fused qkv"), core=True,
    ),
    Entry(
        "vivit", made("VivitModel", "VivitConfig", num_frames=4, tubelet_size=(2, 8, 8), **VIVIT), video(4, 56),
        (Sites(2, "VivitAttention", 99, 99, 4, grid=(2, 7, 7), prefix=1),), forms=("plain",),
    ),
    Entry(
        "vjepa2", made("VJEPA2Model", "VJEPA2Config", crop_size=64, frames_per_clip=4, pred_hidden_size=96, pred_num_attention_heads=3,
            pred_num_hidden_layers=1, **WIDTH),
        video(4, 64, "pixel_values_videos"), (
            Sites(2, "VJEPA2RopeAttention", 32, 32, 4, grid=(2, 4, 4)), Sites(1, "VJEPA2RopeAttention", 64, 64, 3),
        ), forms=("rotary",), note="the predictor's stream holds every place twice, as context and as target, sorted by place",
    ),
    Entry(
        "convnextv2", made("ConvNextV2Model", "ConvNextV2Config", hidden_sizes=(16, 32, 48, 64), depths=(1, 1, 1, 1)), images(64),
        implementations=EAGER, forms=("none",), none="convolutions only", core=True,
    ),
    Entry(
        "resnet", made("ResNetModel", "ResNetConfig", embedding_size=16, hidden_sizes=(32, 64, 64, 64), depths=(1, 1, 1, 1)), images(64),
        implementations=EAGER, forms=("none",), none="convolutions only",
    ),
    Entry(
        "focalnet", made("FocalNetModel", "FocalNetConfig", image_size=64, embed_dim=32, depths=(1, 1, 1, 1)), images(64),
        implementations=EAGER, forms=("none",), none="focal modulation: gated sums of convolutions",
    ),
    Entry(
        "poolformer", made("PoolFormerModel", "PoolFormerConfig", hidden_sizes=(16, 32, 48, 64), depths=(1, 1, 1, 1)), images(64),
        implementations=EAGER, forms=("none",), none="tokens are mixed by average pooling",
    ),
)  # fmt: skip
