"""timm's hierarchical transformers: stages of coarser and coarser grids, attended to in windows, in strided parts or with fewer keys."""

from __future__ import annotations

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.timm_vision_transformers import EAGER, channels, reduced, strided, timm_entry, tokens, windows

GRIDS = (56, 28, 14, 7)


def stages(count: int, module: str, window: int, heads: tuple[int, ...], grids: tuple[int, ...] = GRIDS) -> tuple[Sites, ...]:
    """The same windows in stages of several grids."""
    return tuple(windows(count, module, grid, window, number) for grid, number in zip(grids, heads, strict=True))


def reductions(module: str, heads: tuple[int, ...]) -> tuple[Sites, ...]:
    """One attention in each stage, whose keys are always 7 x 7."""
    return tuple(reduced(1, module, grid, 7, number) for grid, number in zip(GRIDS, heads, strict=True))


def block_and_grid(window: int, heads: tuple[int, ...], grids: tuple[int, ...]) -> tuple[Sites, ...]:
    """MaxViT: in each stage an attention in windows, and one in parts of tokens as far apart as the stage allows."""
    pairs = zip(grids, heads, strict=True)
    return tuple(
        site for grid, n in pairs for site in (windows(1, "AttentionCl", grid, window, n), strided(1, "AttentionCl", grid, window, n))
    )


def factorised(*levels: tuple[int, int]) -> tuple[Sites, ...]:
    """CoaT: linear attention over a class token and a grid, (count, grid) by level."""
    return tuple(tokens(count, "FactorAttnConvRelPosEnc", grid, 8, 1, kind="linear") for count, grid in levels)


def pooled_windows(module: str, grid: int, window: int, keys: int, heads: int) -> Sites:
    """A window's queries pooled 2 x 2, its keys not."""
    return Sites(1, module, window**2, keys**2, heads, grid=(grid, grid), window=(window, window))


PARTITION = "the second attention of each stage is over strided parts, so it has no window"
TABLE = ("relative position table", "window partition")
ONES = (1, 1, 1, 1)

WINDOWED: tuple[Entry, ...] = (
    timm_entry(
        "swin_tiny_patch4_window7_224", *stages(2, "WindowAttention", 7, (3, 6, 12, 24)), depths=(2, 2, 2, 2),
        forms=(*TABLE, "shifted windows", "additive mask", "fused qkv"), core=True,
        note="the second block of each stage shifts its windows, but in the last, whose grid is one window",
    ),
    timm_entry(
        "swin_s3_tiny_224", windows(2, "WindowAttention", 56, 7, 3), windows(2, "WindowAttention", 28, 7, 6),
        windows(2, "WindowAttention", 14, 14, 12), windows(2, "WindowAttention", 7, 7, 24), depths=(2, 2, 2, 2),
        forms=(*TABLE, "shifted windows", "additive mask", "fused qkv"),
    ),
    timm_entry(
        "swinv2_tiny_window8_256", *stages(2, "WindowAttention", 8, (3, 6, 12, 24), (64, 32, 16, 8)), size=256, depths=(2, 2, 2, 2),
        implementations=EAGER, forms=("cosine", "log-spaced position", "window partition", "shifted windows", "additive mask"), core=True,
        note="the logit scale is learned by head and clamped; its block normalises after attention, with a weight of zero in a fresh model",
    ),
    timm_entry(
        "swinv2_cr_tiny_ns_224", *stages(2, "WindowMultiHeadAttention", 7, (3, 6, 12, 24)), depths=(2, 2, 2, 2), implementations=EAGER,
        forms=("cosine", "log-spaced position", "window partition", "shifted windows", "additive mask"),
    ),
    timm_entry(
        "samvit_base_patch16_224", tokens(1, "Attention", 14, 12), windows(2, "Attention", 14, 14, 12), depth=3,
        forms=("decomposed relative position", "window partition", "fused qkv"), note="at this size a window is the grid",
    ),
    timm_entry(
        "nest_tiny_jx", windows(2, "Attention", 56, 14, 3), windows(2, "Attention", 28, 14, 6), windows(8, "Attention", 14, 14, 12),
        forms=("plain", "window partition", "fused qkv"), note="the windows are an axis of their own between heads and tokens",
    ),
    timm_entry(
        "gcvit_xxtiny", windows(1, "WindowAttentionGlobal", 56, 7, 2), windows(1, "WindowAttentionGlobal", 28, 7, 4),
        windows(3, "WindowAttentionGlobal", 14, 14, 8), windows(1, "WindowAttentionGlobal", 7, 7, 16),
        *(
            Sites(count, "WindowAttentionGlobal", side**2, side**2, heads, kind="cross", grid=(side, side))
            for count, side, heads in ((1, 7, 2), (1, 7, 4), (3, 14, 8), (1, 7, 16))
        ),
        implementations=EAGER, forms=(*TABLE, "cross-attention", "pooled queries"),
        note="every second block: the queries are one pooled picture, repeated for each window of keys",
    ),
    timm_entry(
        "tiny_vit_5m_224", windows(2, "Attention", 28, 7, 4), tokens(2, "Attention", 14, 5), tokens(1, "Attention", 7, 10),
        depths=(1, 2, 2, 1), forms=(*TABLE, "fused qkv"), note="the gathered bias is cached by the first forward",
    ),
    timm_entry(
        "davit_tiny", *stages(1, "WindowAttention", 7, (3, 6, 12, 24)),
        *(channels(1, "ChannelAttention", 32, heads) for heads in (3, 6, 12, 24)), depths=ONES,
        forms=("window partition", "cross-covariance", "fused qkv"),
        note="ChannelAttention: keys meet values in the softmax, the queries are what it weights; it has no fused form",
    ),
    timm_entry(
        "davit_base_fl", *stages(1, "WindowAttention", 12, (4, 8, 16, 32)),
        *(channels(1, "ChannelAttentionV2", 32, heads) for heads in (4, 8, 16, 32)), depths=ONES,
        forms=("window partition", "cross-covariance", "fused qkv"), note="the grids are padded to whole windows of 12",
    ),
    timm_entry(
        "sam2_hiera_tiny", windows(1, "MultiScaleAttention", 64, 8, 1), pooled_windows("MultiScaleAttention", 32, 4, 8, 2),
        windows(1, "MultiScaleAttention", 32, 4, 2), pooled_windows("MultiScaleAttention", 16, 2, 4, 4),
        windows(3, "MultiScaleAttention", 16, 14, 4), tokens(3, "MultiScaleAttention", 16, 4),
        pooled_windows("MultiScaleAttention", 8, 7, 14, 8), windows(1, "MultiScaleAttention", 8, 7, 8), size=256,
        forms=("window partition", "pooled queries", "fused qkv"), note="padded to windows where they do not divide the grid",
    ),
    timm_entry(
        "hiera_tiny_224", Sites(1, "MaskUnitAttention", 64, 64, 1, grid=(56, 56), window=(8, 8)),
        Sites(1, "MaskUnitAttention", 16, 64, 2, grid=(28, 28), window=(4, 4)),
        Sites(1, "MaskUnitAttention", 16, 16, 2, grid=(28, 28), window=(4, 4)),
        Sites(1, "MaskUnitAttention", 4, 16, 4, grid=(14, 14), window=(2, 2)), Sites(2, "MaskUnitAttention", 196, 196, 4, grid=(14, 14)),
        Sites(1, "MaskUnitAttention", 49, 196, 8, grid=(7, 7)), Sites(1, "MaskUnitAttention", 49, 49, 8, grid=(7, 7)), stages=(1, 2, 3, 2),
        forms=("window partition", "pooled queries", "fused qkv"),
        note="tokens are unrolled, each mask unit's at a stride, so that no stream is its grid row by row; queries are pooled by a maximum",
    ),
)  # fmt: skip

PARTITIONED: tuple[Entry, ...] = (
    timm_entry(
        "maxvit_pico_rw_256", *block_and_grid(8, (1, 2, 4, 8), (64, 32, 16, 8)), size=256, depths=ONES,
        forms=(*TABLE, "grid partition", "fused qkv"), core=True, note=PARTITION,
    ),
    timm_entry(
        "maxvit_tiny_tf_224", *block_and_grid(7, (2, 4, 8, 16), GRIDS), depths=ONES, forms=(*TABLE, "grid partition", "fused qkv"),
        note=PARTITION,
    ),
    timm_entry(
        "maxvit_rmlp_pico_rw_256", *block_and_grid(8, (1, 2, 4, 8), (64, 32, 16, 8)), size=256, depths=ONES,
        forms=("log-spaced position", "window partition", "grid partition", "fused qkv"), note=PARTITION,
    ),
    timm_entry(
        "maxvit_tiny_pm_256", *block_and_grid(8, (2, 4, 8, 16), (64, 32, 16, 8)), size=256, depths=ONES,
        forms=(*TABLE, "grid partition", "fused qkv"), note="windows and strided parts side by side",
    ),
    timm_entry(
        "maxxvit_rmlp_nano_rw_256", *block_and_grid(8, (2, 4, 8, 16), (64, 32, 16, 8)), size=256, depths=ONES,
        forms=("log-spaced position", "window partition", "grid partition", "fused qkv"), note=PARTITION,
    ),
    timm_entry(
        "maxxvitv2_nano_rw_256", *(strided(1, "AttentionCl", grid, 8, heads) for grid, heads in ((64, 3), (32, 6), (16, 12), (8, 24))),
        size=256, depths=ONES, forms=("relative position table", "grid partition", "fused qkv"), note="strided parts only",
    ),
    timm_entry(
        "coatnet_0_224", tokens(2, "Attention2d", 14, 12), tokens(1, "Attention2d", 7, 24), depths=(1, 1, 2, 1),
        forms=("relative position table", "fused qkv"), note="channels first",
    ),
    timm_entry(
        "coatnet_rmlp_nano_rw_224", tokens(1, "Attention2d", 14, 4), tokens(1, "Attention2d", 14, 8), tokens(1, "Attention2d", 7, 8),
        depths=(1, 1, 2, 1), forms=("log-spaced position", "fused qkv"), note="a stage's first block attends at the width before it",
    ),
)  # fmt: skip

FEWER_KEYS: tuple[Entry, ...] = (
    timm_entry("pvt_v2_b0", *reductions("Attention", (1, 2, 5, 8)), depths=ONES, forms=("plain", "reduced keys"), core=True),
    timm_entry(
        "pvt_v2_b2_li", *reductions("Attention", (1, 2, 5, 8)), depths=ONES, forms=("plain", "reduced keys"),
        note="linear in the name only: keys and values are pooled to 7 x 7, and the softmax is the usual one",
    ),
    timm_entry("twins_pcpvt_small", *reductions("GlobalSubSampleAttn", (1, 2, 5, 8)), depths=ONES, forms=("plain", "reduced keys")),
    timm_entry(
        "twins_svt_small", *stages(1, "LocallyGroupedAttn", 7, (2, 4, 8, 16)), *reductions("GlobalSubSampleAttn", (2, 4, 8, 16)),
        depths=(2, 2, 2, 2), forms=("plain", "window partition", "reduced keys"),
    ),
    timm_entry(
        "mvitv2_tiny", reduced(1, "MultiScaleAttention", 56, 14, 1), reduced(1, "MultiScaleAttention", 28, 28, 2),
        reduced(1, "MultiScaleAttention", 28, 14, 2), reduced(1, "MultiScaleAttention", 14, 28, 4), tokens(4, "MultiScaleAttention", 14, 4),
        reduced(1, "MultiScaleAttention", 7, 14, 8), tokens(1, "MultiScaleAttention", 7, 8), implementations=EAGER,
        forms=("decomposed relative position", "pooled queries", "reduced keys", "fused qkv"), core=True,
        note="the pooled queries are added to what they attend to",
    ),
    timm_entry(
        "mvitv2_base_cls", reduced(2, "MultiScaleAttention", 56, 14, 1, 1), reduced(1, "MultiScaleAttention", 28, 28, 2, 1),
        reduced(2, "MultiScaleAttention", 28, 14, 2, 1), reduced(1, "MultiScaleAttention", 14, 28, 4, 1),
        tokens(15, "MultiScaleAttention", 14, 4, 1), reduced(1, "MultiScaleAttention", 7, 14, 8, 1),
        tokens(2, "MultiScaleAttention", 7, 8, 1), implementations=EAGER,
        forms=("decomposed relative position", "pooled queries", "reduced keys", "fused qkv"), note="the bias leaves the class token out",
    ),
    timm_entry(
        "levit_128s", tokens(2, "Attention", 14, 4), reduced(1, "AttentionDownsample", 7, 14, 8), tokens(3, "Attention", 7, 6),
        reduced(1, "AttentionDownsample", 4, 7, 16), tokens(4, "Attention", 4, 8), implementations=EAGER,
        forms=("relative position table", "pooled queries"), core=True, note="the gathered bias is cached by the first forward",
    ),
    timm_entry(
        "levit_conv_128s", tokens(2, "Attention", 14, 4), reduced(1, "AttentionDownsample", 7, 14, 8), tokens(3, "Attention", 7, 6),
        reduced(1, "AttentionDownsample", 4, 7, 16), tokens(4, "Attention", 4, 8), implementations=EAGER,
        forms=("relative position table", "pooled queries"), note="channels first: values @ map transposed",
    ),
    timm_entry(
        "nextvit_small", reduced(1, "EfficientAttention", 28, 7, 6), reduced(2, "EfficientAttention", 14, 7, 12),
        tokens(1, "EfficientAttention", 7, 24), forms=("plain", "reduced keys"),
        note="keys are averaged over runs of the flattened grid; ConvAttention is a convolution",
    ),
    timm_entry("visformer_tiny", tokens(4, "Attention", 14, 3), tokens(4, "Attention", 7, 3), forms=("plain", "fused qkv")),
    timm_entry("caformer_s18", tokens(9, "Attention", 14, 10), tokens(3, "Attention", 7, 16), forms=("plain", "fused qkv")),
    timm_entry(
        "coat_lite_tiny", *factorised((2, 56), (2, 28), (2, 14), (2, 7)), implementations=EAGER, forms=("linear attention", "fused qkv"),
        note="a softmax of the keys over the tokens (not the last axis), then queries @ (keys @ values), and a convolution of the values",
    ),
    timm_entry(
        "coat_tiny", *factorised((1, 56), (2, 28), (2, 14), (2, 7)), serial_depths=ONES, parallel_depth=1, implementations=EAGER,
        forms=("linear attention", "fused qkv"), note="as coat_lite_tiny, then three levels side by side",
    ),
)  # fmt: skip

HIERARCHICAL = WINDOWED + PARTITIONED + FEWER_KEYS
