"""The forms of attention that the corpus holds, in the field's words; each must be carried by at least one entry of the core."""

from __future__ import annotations

FORMS: tuple[str, ...] = (
    "plain", "additive mask", "boolean mask", "causal", "sliding window", "padding", "packed sequences", "relative position table",
    "decomposed relative position", "log-spaced position", "ALiBi", "cosine", "talking heads", "sink logits", "cross-attention",
    "grouped-query", "multi-query", "window partition", "shifted windows", "grid partition", "cross-covariance", "linear attention",
    "reduced keys", "pooled queries", "axial", "divided space-time", "class attention", "gated positional", "softmax not last",
    "float32 upcast", "dropout", "map escapes", "einsum", "baddbmm", "flex_attention", "MultiheadAttention", "fused qkv", "qk-norm",
    "rotary", "halo", "none",
)  # fmt: skip
