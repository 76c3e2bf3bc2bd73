"""Every timm architecture of the corpus."""

from __future__ import annotations

from tests.models.corpus.entry import Entry
from tests.models.corpus.timm_convolutional import CONVOLUTIONAL
from tests.models.corpus.timm_hierarchical import HIERARCHICAL
from tests.models.corpus.timm_vision_transformers import VISION_TRANSFORMERS

TIMM: tuple[Entry, ...] = VISION_TRANSFORMERS + HIERARCHICAL + CONVOLUTIONAL
