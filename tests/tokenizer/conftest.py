"""Tokenizers to extend: one of the tokenizers library, saved by transformers, and the sentencepiece model of the goldens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.cli.conftest import console

__all__ = ["console", "fast", "slow"]

GOLDEN = Path(__file__).parents[1] / "golden" / "nemo" / "tokenizers"
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json: byte-level, 290 words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    assert tokenizer.get_vocab_size() == 290
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path / "fast")
    return tmp_path / "fast"


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A folder with a sentencepiece tokenizer.model alone, of 384 pieces."""
    folder = tmp_path / "slow"
    folder.mkdir()
    shutil.copy(GOLDEN / "input.model", folder / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **named}))
    return folder
