"""The language model's tokens: one for each word that questions and answers are made of, in a tokenizer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..torchvision_or_not import let_transformers_import
from .dense import PATCH
from .questions import WORDS

PAD, BEGIN, END, IMAGE, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
VOCABULARY = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}


def tokenizer() -> Any:
    """A fast tokenizer over words; capitals and "?" behind a word are understood, and "<s>" is put in front."""
    let_transformers_import()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ?")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, VOCABULARY[BEGIN])])
    named = {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN, "additional_special_tokens": [IMAGE]}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", model_max_length=512, **named)


def save_processor(folder: Path) -> None:
    """What AutoTokenizer and AutoProcessor of transformers need in the folder, beside preprocessor_config.json.

    AutoProcessor needs a torchvision that imports, as transformers' own image processors do; `pixels.pixel_values` is the same.
    """
    tokenizer().save_pretrained(folder)
    told = {"processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": PATCH, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(told, indent=2) + "\n")
