"""timm's plain vision transformers: one token stream, one grid; and how a row of the timm tables is written.

The widths and head counts are the real ones, the depth is cut to what shows every kind of block. Sites are read off timm 1.0.31's source.
A window equal to its grid is said where the source partitions into that one window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.weights import settle, stir

EAGER = ("eager",)


def tokens(count: int, module: str, grid: int, heads: int, prefix: int = 0, **facts: Any) -> Sites:
    """Every token of a square grid, and of the tokens before it, attends to every other."""
    length = prefix + grid**2
    return Sites(count, module, length, length, heads, grid=(grid, grid), prefix=prefix, **facts)


def windows(count: int, module: str, grid: int, window: int, heads: int, **facts: Any) -> Sites:
    """Square windows of a square grid, each attending to itself."""
    return Sites(count, module, window**2, window**2, heads, grid=(grid, grid), window=(window, window), **facts)


def strided(count: int, module: str, grid: int, side: int, heads: int) -> Sites:
    """Parts of side x side tokens that lie apart by a stride, each attending to itself: not windows, since none is a local part."""
    return Sites(count, module, side**2, side**2, heads, grid=(grid, grid))


def reduced(count: int, module: str, grid: int, keys: int, heads: int, prefix: int = 0, **facts: Any) -> Sites:
    """The tokens of a square grid attend to keys of another number: a coarser grid, or a finer one where the queries are pooled."""
    return Sites(count, module, prefix + grid**2, prefix + keys**2, heads, grid=(grid, grid), prefix=prefix, **facts)


def single(count: int, module: str, keys: int, heads: int, **facts: Any) -> Sites:
    """One query, a class token or a learned one."""
    return Sites(count, module, 1, keys, heads, **facts)


def channels(count: int, module: str, width: int, heads: int) -> Sites:
    """The channels of each head attend to each other."""
    return Sites(count, module, width, width, heads, kind="channels")


def images(height: int, width: int) -> Callable[[int], Mapping[str, Any]]:
    return lambda batch: {"x": torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))}


def timm_entry(
    name: str, *sites: Sites, size: int | tuple[int, int] = 224, label: str = "", inputs: Callable[[int], Mapping[str, Any]] | None = None,
    implementations: tuple[str, ...] = ("sdpa", "eager"), forms: tuple[str, ...] = (), none: str = "", core: bool = False, breaks: str = "",
    note: str = "", **options: Any,
) -> Entry:  # fmt: skip
    """A row: timm's name (label, where one name makes two rows), the sites, the side of the input, and the options of create_model."""

    def build(implementation: str) -> nn.Module:
        import timm

        torch.manual_seed(0)
        model = stir(timm.create_model(name, pretrained=False, **options).eval())
        switches = [module for module in model.modules() if hasattr(module, "fused_attn")]
        for module in switches:
            module.fused_attn = False
        settle(model, make(4))
        for module in switches:
            module.fused_attn = implementation == "sdpa"
        return model

    height, width = (size, size) if isinstance(size, int) else size
    make = inputs or images(height, width)
    return Entry(label or name, build, make, sites, implementations, forms, none, core=core, breaks=breaks, note=note)


def padded_patches(batch: int) -> Mapping[str, Any]:
    """NaFlexViT's own input: patches of pictures of 8 x 6 and of fewer rows by turns, padded to one length."""
    rows, columns = 8, 6
    coordinates = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).reshape(1, -1, 2)
    kept = torch.tensor([rows - 2 * (item % 2) for item in range(batch)])
    valid = coordinates[..., 0] < kept[:, None]
    patches = torch.randn(batch, rows * columns, 3 * 16**2, generator=torch.Generator().manual_seed(1))
    return {"x": patches, "patch_coord": coordinates * valid[..., None], "patch_valid": valid}


SIGLIP_POOL = "the head pools by one learned query"

PLAIN: tuple[Entry, ...] = (
    timm_entry("deit_tiny_patch16_224", tokens(2, "Attention", 14, 3, 1), depth=2, forms=("plain", "fused qkv"), core=True),
    timm_entry("deit_tiny_distilled_patch16_224", tokens(2, "Attention", 14, 3, 2), depth=2, forms=("plain", "fused qkv")),
    timm_entry("deit3_small_patch16_224", tokens(2, "Attention", 14, 6, 1), depth=2, forms=("plain", "fused qkv")),
    timm_entry("vit_tiny_patch16_224", tokens(2, "Attention", 14, 3, 1), depth=2, forms=("plain", "fused qkv")),
    timm_entry(
        "vit_tiny_patch16_224", tokens(2, "Attention", 14, 3, 1), label="vit_tiny_patch16_224, qk_norm", depth=2, qk_norm=True,
        forms=("fused qkv", "qk-norm"), note="no plain timm ViT sets qk_norm; it is an option of the source",
    ),
    timm_entry("flexivit_small", tokens(2, "Attention", 15, 6, 1), size=240, depth=2, forms=("plain", "fused qkv")),
    timm_entry("vit_medium_patch16_reg4_gap_256", tokens(2, "Attention", 16, 8, 4), size=256, depth=2, forms=("plain", "fused qkv")),
    timm_entry(
        "vit_small_patch14_reg4_dinov2", tokens(2, "Attention", 16, 6, 5), depth=2, img_size=224, forms=("plain", "fused qkv"),
        note="a class token and four registers",
    ),
    timm_entry("vit_base_patch16_rpn_224", tokens(2, "Attention", 14, 12), depth=2, forms=("plain", "fused qkv")),
    timm_entry(
        "vit_small_patch16_18x2_224", tokens(4, "Attention", 14, 6, 1), depth=2, forms=("plain", "fused qkv"),
        note="two attentions side by side in each block",
    ),
    timm_entry(
        "vit_base_patch16_xp_224", tokens(2, "ParallelScalingBlock", 14, 12, 1), depth=2, forms=("fused qkv", "qk-norm"),
        note="query, key, value and the feed-forward's first layer come from one projection",
    ),
    timm_entry(
        "vit_dwee_patch16_reg1_gap_256", tokens(4, "DiffAttention", 16, 4, 1, per_call=2), label="vit_dwee_patch16_reg1_gap_256, sdpa",
        size=256, depth=2, implementations=("sdpa",), forms=("fused qkv",),
        note="two fused attentions over the same values, subtracted after the product",
    ),
    timm_entry(
        "vit_dwee_patch16_reg1_gap_256", tokens(2, "DiffAttention", 16, 8, 1), label="vit_dwee_patch16_reg1_gap_256, eager",
        size=256, depth=2, implementations=EAGER, forms=("fused qkv",),
        note="one softmax over eight maps; their difference in pairs, four maps, meets the values of four heads of twice the width",
    ),
    timm_entry(
        "vit_base_patch16_siglip_224", tokens(2, "Attention", 14, 12), single(1, "AttentionPoolLatent", 196, 12, kind="cross"), depth=2,
        forms=("fused qkv", "cross-attention", "pooled queries"), note=SIGLIP_POOL,
    ),
    timm_entry(
        "vit_so150m_patch16_reg4_map_256", tokens(2, "Attention", 16, 14, 4), single(1, "AttentionPoolLatent", 256, 14, kind="cross"),
        size=256, depth=2, forms=("fused qkv", "cross-attention", "pooled queries"), note=SIGLIP_POOL + ", which sees no register",
    ),
    timm_entry("aimv2_large_patch14_224", tokens(2, "Attention", 16, 8), depth=2, forms=("plain", "fused qkv")),
    timm_entry(
        "beit3_base_patch16_224", tokens(2, "Attention", 14, 12, 1), depth=2, forms=("plain", "fused qkv"), note="normalised before proj"
    ),
    timm_entry(
        "vit_base_mci_224", tokens(2, "Attention", 14, 12, 1), depth=2, forms=("plain", "fused qkv"), note="patches from convolutions"
    ),
    timm_entry(
        "vit_small_r26_s32_224", tokens(2, "Attention", 7, 6, 1), depth=2, forms=("plain", "fused qkv"), note="patches from a ResNet"
    ),
    timm_entry("vitamin_small_224", tokens(14, "Attention", 14, 6), forms=("plain", "fused qkv"), note="after two stages of convolutions"),
)  # fmt: skip

POSITIONS: tuple[Entry, ...] = (
    timm_entry(
        "beit_base_patch16_224", tokens(2, "Attention", 14, 12, 1), depth=2, forms=("relative position table", "fused qkv"), core=True,
        note="the table has three more rows, to, from and between class tokens",
    ),
    timm_entry("beitv2_base_patch16_224", tokens(2, "Attention", 14, 12, 1), depth=2, forms=("relative position table", "fused qkv")),
    timm_entry(
        "vit_relpos_small_patch16_224", tokens(2, "RelPosAttention", 14, 6), depth=2, forms=("log-spaced position", "fused qkv"),
        note="bias from a small network of log-spaced offsets",
    ),
    timm_entry(
        "vit_srelpos_small_patch16_224", tokens(2, "RelPosAttention", 14, 6), depth=2, forms=("log-spaced position", "fused qkv"),
        note="one bias for all blocks",
    ),
    timm_entry(
        "vit_relpos_base_patch16_cls_224", tokens(2, "RelPosAttention", 14, 12, 1), depth=2, forms=("log-spaced position", "fused qkv"),
        note="the class token's bias is zero padding",
    ),
    timm_entry(
        "samvit_base_patch16", windows(2, "Attention", 20, 14, 12), tokens(1, "Attention", 20, 12), size=320, img_size=320, depth=3,
        forms=("decomposed relative position", "window partition", "fused qkv"), core=True,
        note="the grid is padded to 28 x 28 for the windows, as the real 64 x 64 is to 70 x 70; batch and heads are one axis",
    ),
    timm_entry("vit_small_patch16_dinov3", tokens(2, "EvaAttention", 16, 6, 5), size=256, depth=2, forms=("rotary", "fused qkv")),
    timm_entry("vit_tiny_patch16_dinov3_qkvb", tokens(2, "EvaAttention", 16, 3, 5), size=256, depth=2, forms=("rotary", "fused qkv")),
    timm_entry("vit_small_patch16_lingbot", tokens(2, "EvaAttention", 16, 6, 5), size=256, depth=2, forms=("rotary", "fused qkv")),
    timm_entry("eva02_tiny_patch14_224", tokens(2, "EvaAttention", 16, 3, 1), depth=2, forms=("rotary", "fused qkv"), core=True),
    timm_entry("eva02_base_patch16_clip_224", tokens(2, "EvaAttention", 14, 12, 1), depth=2, forms=("rotary",), note="q, k, v apart"),
    timm_entry(
        "vit_medium_patch16_rope_reg1_gap_256", tokens(2, "EvaAttention", 16, 8, 1), size=256, depth=2, forms=("rotary", "fused qkv")
    ),
    timm_entry("vit_small_patch16_rope_224", tokens(2, "AttentionRope", 14, 6, 1), depth=2, forms=("rotary", "fused qkv")),
    timm_entry("vit_small_patch16_rope_ape_224", tokens(2, "AttentionRope", 14, 6, 1), depth=2, forms=("rotary", "fused qkv")),
    timm_entry(
        "vit_small_patch16_rope_mixed_224", tokens(2, "AttentionRope", 14, 6, 1), depth=2, forms=("rotary", "fused qkv"),
        note="each head of each block learns its rotation's frequencies",
    ),
    timm_entry(
        "vit_pe_core_tiny_patch16_384", tokens(2, "AttentionRope", 14, 3, 1), single(1, "AttentionPoolLatent", 197, 8, kind="cross"),
        depth=2, img_size=224, forms=("rotary", "fused qkv", "cross-attention", "pooled queries"), note=SIGLIP_POOL,
    ),
    timm_entry(
        "vit_large_patch16_sapiens2", Sites(3, "AttentionRope", 9 + 16 * 12, 9 + 16 * 12, 16, grid=(16, 12), prefix=9), size=(256, 192),
        depth=3, num_kv_heads=(16, 8, 16), forms=("grouped-query", "rotary", "qk-norm"),
        note="the first and last blocks have all 16 key heads, those between have 8, repeated before the product",
    ),
    timm_entry("gemma4_vit_167m", tokens(2, "Gemma4Attention", 14, 12), depth=2, forms=("rotary", "qk-norm"), note="unscaled scores"),
    timm_entry("qwen3_vit_88m", tokens(2, "AttentionRope", 14, 12), depth=2, forms=("rotary", "fused qkv")),
    timm_entry("deepseek_vit_412m", tokens(2, "AttentionRope", 16, 16), depth=2, forms=("rotary", "fused qkv")),
    timm_entry(
        "naflexvit_base_patch16_map", tokens(2, "Attention", 14, 12, 1), single(1, "AttentionPoolLatent", 196, 12, kind="cross"), depth=2,
        forms=("fused qkv", "cross-attention", "pooled queries"), note=SIGLIP_POOL + ", which sees no register",
    ),
    timm_entry(
        "naflexvit_base_patch16_map", Sites(2, "Attention", 49, 49, 12, prefix=1), single(1, "AttentionPoolLatent", 48, 12, kind="cross"),
        label="naflexvit_base_patch16_map, padded", inputs=padded_patches, depth=2,
        forms=("padding", "additive mask", "fused qkv", "pooled queries"),
        breaks="timm runs the positions of padded patches outside the graph, under torch.compiler.disable",
        note="pictures of several shapes in one batch, so no grid; the mask is the dtype's minimum, not -inf: a padded query sees all keys",
    ),
)  # fmt: skip

SEVERAL_STREAMS: tuple[Entry, ...] = (
    timm_entry(
        "cait_xxs24_224", tokens(2, "TalkingHeadAttn", 14, 4), single(2, "ClassAttn", 197, 4), depth=2,
        forms=("talking heads", "class attention"), core=True, note="heads are mixed before and after the softmax, which has no fused form",
    ),
    timm_entry(
        "xcit_nano_12_p16_224", channels(2, "XCA", 32, 4), single(2, "ClassAttn", 197, 4), depth=2,
        forms=("cross-covariance", "cosine", "class attention"), core=True, note="query and key channels of unit length, a learned scale",
    ),
    timm_entry(
        "xcit_tiny_12_p8_224", channels(2, "XCA", 48, 4), single(2, "ClassAttn", 785, 4), depth=2,
        forms=("cross-covariance", "cosine", "class attention"),
    ),
    timm_entry(
        "convit_tiny", tokens(2, "GPSA", 14, 4), tokens(1, "MHSA", 14, 4, 1), depth=3, local_up_to_layer=2, implementations=EAGER,
        forms=("gated positional",), core=True,
        note="two softmaxes, of scores and of positions, mixed by a gate into the map; the first forward stores the offsets in a buffer",
    ),
    timm_entry(
        "crossvit_9_240", tokens(2, "Attention", 20, 4, 1), tokens(4, "Attention", 14, 4, 1),
        single(2, "CrossAttention", 197, 4, kind="cross"), single(2, "CrossAttention", 401, 4, kind="cross"), size=240,
        depth=((1, 2, 0),) * 2, forms=("cross-attention", "class attention"), core=True,
        note="each branch's class token attends to itself and the other branch's patches; CrossAttention has no fused form",
    ),
    timm_entry(
        "crossvit_9_dagger_240", tokens(2, "Attention", 20, 4, 1), tokens(4, "Attention", 14, 4, 1),
        single(2, "CrossAttention", 197, 4, kind="cross"), single(2, "CrossAttention", 401, 4, kind="cross"), size=240,
        depth=((1, 2, 0),) * 2, forms=("cross-attention", "class attention"),
    ),
    timm_entry(
        "tnt_s_patch16_224", windows(2, "Attention", 56, 4, 4), tokens(2, "Attention", 14, 6, 1), depth=2, implementations=EAGER,
        forms=("window partition",), note="4 x 4 pixel tokens attend within each patch, then the patches",
    ),
    timm_entry(
        "pit_ti_224", tokens(1, "Attention", 27, 2, 1), tokens(2, "Attention", 14, 4, 1), tokens(1, "Attention", 7, 8, 1), depth=(1, 2, 1),
        forms=("plain", "fused qkv"),
    ),
    timm_entry(
        "pit_ti_distilled_224", tokens(1, "Attention", 27, 2, 2), tokens(2, "Attention", 14, 4, 2), tokens(1, "Attention", 7, 8, 2),
        depth=(1, 2, 1), forms=("plain", "fused qkv"),
    ),
    timm_entry(
        "volo_d1_224", tokens(14, "Attention", 14, 12), single(2, "ClassAttention", 197, 12), forms=("plain", "class attention"),
        note="not sites: the four OutlookAttention, whose scores are a linear map of one token; ClassAttention has no fused form",
    ),
)  # fmt: skip

VISION_TRANSFORMERS = PLAIN + POSITIONS + SEVERAL_STREAMS
