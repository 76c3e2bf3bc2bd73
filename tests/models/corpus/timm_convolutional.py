"""timm's convolutional networks with attention in some stages, and those without: what a recogniser must leave alone."""

from __future__ import annotations

from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.timm_vision_transformers import EAGER, channels, reduced, strided, timm_entry, tokens, windows


def linear(*levels: tuple[int, int, int], module: str) -> tuple[Sites, ...]:
    """Linear attention over square grids, (count, grid, heads) by level."""
    return tuple(tokens(count, module, grid, heads, kind="linear") for count, grid, heads in levels)


def halo(count: int, grid: int, block: int, keys: int) -> Sites:
    """Blocks that attend to themselves and a margin, zeros beyond the picture's edge."""
    return Sites(count, "HaloAttn", block**2, keys**2, 8, grid=(grid, grid), window=(block, block))


def without(name: str, reason: str, size: int = 224, core: bool = False, note: str = "") -> Entry:
    """A model without attention."""
    return timm_entry(name, size=size, none=reason, implementations=EAGER, forms=("none",), core=core, note=note)


HALO_STRIDE = "one block per stage start strides its queries: 4 x 4 of them to a block of 8 x 8 keys and its margin"
CACHED = "the gathered bias is cached by the first forward"

MOBILE: tuple[Entry, ...] = (
    timm_entry(
        "efficientformer_l1", tokens(2, "Attention", 7, 8), depths=(1, 1, 1, 2), num_vit=2, implementations=EAGER,
        forms=("relative position table", "fused qkv"), note=CACHED,
    ),
    timm_entry(
        "efficientformerv2_s0", tokens(4, "Attention2d", 7, 8), reduced(1, "Attention2dDownsample", 7, 14, 8), depths=(1, 1, 3, 3),
        implementations=EAGER, forms=("talking heads", "relative position table", "pooled queries"),
        note="two of the four attend on a grid strided from 14 x 14 and upsample; only Attention2d mixes heads; " + CACHED,
    ),
    timm_entry(
        "edgenext_xx_small", *(channels(1, "CrossCovarianceAttn", width, 4) for width in (12, 22, 42)), size=256, implementations=EAGER,
        forms=("cross-covariance", "cosine", "fused qkv"),
    ),
    timm_entry(
        "mobilevit_xxs", strided(2, "Attention", 32, 16, 4), strided(4, "Attention", 16, 8, 4), strided(3, "Attention", 8, 4, 4), size=256,
        forms=("plain", "grid partition", "fused qkv"), note="pixels at one place of every 2 x 2 patch attend to each other",
    ),
    timm_entry(
        "mobilenetv4_hybrid_medium", reduced(4, "MultiQueryAttention2d", 14, 7, 4), tokens(4, "MultiQueryAttention2d", 7, 4),
        forms=("multi-query", "reduced keys"), core=True, note="one key head and one value head, broadcast to four of queries",
    ),
    timm_entry(
        "mobilenetv5_base", tokens(6, "MultiQueryAttention2d", 16, 8), tokens(7, "MultiQueryAttention2d", 8, 16), size=256,
        forms=("multi-query",),
    ),
    timm_entry(
        "efficientvit_b0", *linear((2, 14, 8), (2, 7, 16), module="LiteMLA"), implementations=EAGER,
        forms=("linear attention", "float32 upcast"), core=True,
        note="rectified queries and keys; the normaliser is a column of ones among the values; half the heads see convolved projections",
    ),
    timm_entry(
        "efficientvit_l1", *linear((2, 7, 32), module="LiteMLA"), depths=(1, 1, 1, 1, 2), implementations=EAGER,
        forms=("linear attention", "float32 upcast"),
    ),
    timm_entry(
        "efficientvit_m0", windows(4, "CascadedGroupAttention", 14, 7, 1, per_call=4),
        tokens(8, "CascadedGroupAttention", 7, 1, per_call=4), tokens(12, "CascadedGroupAttention", 4, 1, per_call=4),
        implementations=EAGER, forms=("relative position table", "window partition"),
        note="four heads one after another, each one's input the sum of its part and the last one's output; " + CACHED,
    ),
    timm_entry(
        "shvit_s1", tokens(4, "SHSA", 7, 1), tokens(5, "SHSA", 4, 1), implementations=EAGER, forms=("plain",),
        note="one head over a fifth of the channels; values are wider than queries",
    ),
    timm_entry(
        "fastvit_sa12", tokens(2, "Attention", 8, 16), size=256, forms=("plain", "fused qkv"), note="attention in the last stage only"
    ),
    timm_entry("fastvit_mci0", tokens(2, "Attention", 8, 16), size=256, forms=("plain", "fused qkv")),
    timm_entry(
        "iformer_t", tokens(3, "SHMA", 14, 1), tokens(2, "SHMA", 7, 1), forms=("plain",),
        note="one head; the values pass a sigmoid, as does the output's gate",
    ),
    timm_entry(
        "lowformer_b0", tokens(3, "ConvAttention", 7, 2), tokens(4, "ConvAttention", 7, 4), forms=("plain", "fused qkv"),
        note="attends on a grid strided from 14 x 14 in its third stage, and upsamples by a transposed convolution",
    ),
    timm_entry(
        "cpubone_b0_bfrobust", tokens(3, "ConvAttention", 7, 2), tokens(4, "ConvAttention", 7, 4), forms=("plain", "fused qkv"),
        note="as lowformer_b0",
    ),
    # csatv2 is left out: the queries and keys of its SpatialTransformerBlock are (batch, tokens) matrices, so that the pictures of a batch
    # attend to each other, and at a batch of one it has no attention there.
)  # fmt: skip

RESIDUAL: tuple[Entry, ...] = (
    timm_entry(
        "halonet26t", halo(1, 16, 8, 12), halo(1, 8, 4, 12), halo(1, 8, 8, 12), size=256, implementations=EAGER,
        forms=("halo", "decomposed relative position"), core=True, note=HALO_STRIDE,
    ),
    timm_entry(
        "sehalonet33ts", halo(1, 32, 8, 14), halo(1, 16, 8, 14), halo(1, 8, 4, 14), halo(1, 8, 8, 14), size=256, implementations=EAGER,
        forms=("halo", "decomposed relative position"), note=HALO_STRIDE + "; squeeze-and-excitation is a gate, not a site",
    ),
    timm_entry(
        "haloregnetz_b", halo(4, 14, 7, 11), halo(1, 7, 7, 11), implementations=EAGER, forms=("halo", "decomposed relative position"),
        note="its stride is a pooling after attention",
    ),
    timm_entry(
        "botnet26t_256", tokens(2, "BottleneckAttn", 16, 4), tokens(1, "BottleneckAttn", 8, 4), size=256, implementations=EAGER,
        forms=("decomposed relative position", "fused qkv"),
    ),
    timm_entry(
        "lambda_resnet26t", *linear((2, 16, 4), (1, 8, 4), module="LambdaLayer"), size=256, implementations=EAGER,
        forms=("linear attention", "multi-query"), note="a softmax of the keys over tokens; a convolution of the values is a second map",
    ),
    timm_entry(
        "lambda_resnet26rpt_256", *linear((2, 16, 4), (1, 8, 4), module="LambdaLayer"), size=256, implementations=EAGER,
        forms=("linear attention", "multi-query"), note="a table of offsets makes a second map of tokens to tokens, without a softmax",
    ),
    timm_entry(
        "lamhalobotnet50ts_256", *linear((2, 32, 4), module="LambdaLayer"), halo(3, 16, 8, 14), tokens(1, "BottleneckAttn", 8, 4), size=256,
        implementations=EAGER, forms=("linear attention", "halo", "decomposed relative position"),
    ),
    timm_entry(
        "resnet50_clip", tokens(1, "AttentionPool2d", 7, 32, 1), forms=("plain", "fused qkv"),
        note="the head attends over the mean and the grid, and keeps the mean's row: every query is computed, one is used",
    ),
)  # fmt: skip

CONVOLUTIONS = "convolutions"
GATED = "convolutions and squeeze-and-excitation, whose gate comes from a mean"

NONE: tuple[Entry, ...] = (
    without("convnext_atto", CONVOLUTIONS, core=True),
    without("focalnet_tiny_srf", "modulation: convolved contexts gated and summed, multiplied by a query"),
    without("poolformer_s12", "tokens are mixed by pooling"),
    without("mixer_s16_224", "tokens are mixed by a learned matrix"),
    without("resmlp_12_224", "tokens are mixed by a learned matrix"),
    without("gmlp_ti16_224", "tokens are mixed by a learned matrix, then gate"),
    without("convmixer_768_32", CONVOLUTIONS, size=96),
    without("sequencer2d_s", "tokens are mixed by recurrent networks over rows and columns"),
    without("resnet18", CONVOLUTIONS),
    without("resnest14d", "split attention: a softmax over two branches, of scores from one mean"),
    without("skresnet18", "selective kernels: a softmax over two branches, of scores from one mean"),
    without("gcresnet50t", "global context: a softmax over positions, of one map of scores, and no queries"),
    without("bat_resnext26ts", "bilinear transform: two maps normalised by their sums, each predicted from one pooled input", size=256),
    without("mobilevitv2_050", "separable attention: a softmax over positions, of one score per position, and no queries", size=256),
    without("swiftformer_xs", "additive attention: a learned vector scores the queries, whose weighted sum multiplies every key"),
    without("efficientvim_m1", "state-space mixer: a softmax over positions, of one input, weights a state that is read out linearly"),
    without("mambaout_femto", "gated convolutions"),
    without("starnet_s1", "a product of two projections of the same token"),
    without("inception_next_atto", CONVOLUTIONS),
    without("rdnet_tiny", GATED),
    without("repvit_m0_9", GATED),
    without("regnety_002", GATED),
    without("efficientnet_b0", GATED),
    without("ghostnetv2_100", "convolutions; its decoupled attention is a gate from convolutions along rows and columns"),
    without("hgnetv2_b0", CONVOLUTIONS),
    without("mobileone_s0", CONVOLUTIONS),
    without("fasternet_t0", "convolutions over part of the channels"),
)

CONVOLUTIONAL = MOBILE + RESIDUAL + NONE
