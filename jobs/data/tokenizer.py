"""Byte-level BPE tokenizers: trained on a sample or loaded, and saved for transformers' AutoTokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from errors import ConfigError, DataError
from jobs.config.run_config import SMALLEST_VOCABULARY

END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in common tokenizers.
_KNOWN_ENDS = (END_OF_TEXT, "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "</s>", "<eos>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tuple[Tokenizer, int]:
    """Train a tokenizer of at most `vocab_size` tokens; the same texts give the same tokenizer.

    Returns:
        The tokenizer, and the id of its end-of-text token.

    Raises:
        ConfigError: `vocab_size` is too small for the 256 bytes and the end of text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is too small for a byte-level tokenizer; "
            f"use at least {SMALLEST_VOCABULARY}, or give data.tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, tokenizer.get_vocab()[END_OF_TEXT]


def load_tokenizer(path: Path, vocab_size: int) -> tuple[Tokenizer, int]:
    """Load a tokenizer.json, or the one in a folder.

    Returns:
        The tokenizer, and the id of its end-of-text token.

    Raises:
        DataError: There is none, or it cannot be read.
        ConfigError: It has more tokens than the model, or no end-of-text token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"data.tokenizer: {file} does not exist; give a tokenizer.json or a folder with one")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: {error}") from None
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if highest > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is smaller than the {highest} tokens of {file}; "
            f"set model.vocab_size={highest}"
        )
    return tokenizer, _end_of_text(tokenizer, file)


def save_tokenizer(tokenizer: Tokenizer, end_of_text: int, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into a folder."""
    directory.mkdir(parents=True, exist_ok=True)
    end = tokenizer.id_to_token(end_of_text)
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": None,
        "unk_token": None,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    _write_json(directory / "tokenizer_config.json", described)
    _write_json(directory / "special_tokens_map.json", {"eos_token": end, "pad_token": end})


def _end_of_text(tokenizer: Tokenizer, file: Path) -> int:
    for name in _end_names(file):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ConfigError(
        f"data.tokenizer: {file} has no end-of-text token; it needs one of {', '.join(_KNOWN_ENDS)}, "
        "or an eos_token in a tokenizer_config.json beside it"
    )


def _end_names(file: Path) -> tuple[str, ...]:
    """Possible names of the end-of-text token, first that of a tokenizer_config.json in the same folder."""
    beside = file.parent / "tokenizer_config.json"
    if not beside.is_file():
        return _KNOWN_ENDS
    try:
        named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError):
        raise DataError(f"data.tokenizer: {beside} is not a JSON object; repair or remove it") from None
    if isinstance(named, dict):  # an AddedToken in JSON
        named = named.get("content")
    return (named, *_KNOWN_ENDS) if isinstance(named, str) else _KNOWN_ENDS


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["END_OF_TEXT", "load_tokenizer", "save_tokenizer", "train_tokenizer"]
