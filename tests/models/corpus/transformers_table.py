"""Every row of transformers."""

from __future__ import annotations

from tests.models.corpus.entry import Entry
from tests.models.corpus.transformers_bridged import BRIDGED
from tests.models.corpus.transformers_detection import DETECTION
from tests.models.corpus.transformers_dual import DUAL
from tests.models.corpus.transformers_language import LANGUAGE
from tests.models.corpus.transformers_text import TEXTS
from tests.models.corpus.transformers_vision import VISION

TRANSFORMERS: tuple[Entry, ...] = (*VISION, *DUAL, *DETECTION, *LANGUAGE, *BRIDGED, *TEXTS)
