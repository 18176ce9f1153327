"""Tokenizers: a byte-level BPE trained on a sample, and those of models, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from errors import ConfigError, DataError, brief, shown
from jobs.config.hub_names import hub_hint
from jobs.config.run_config import SMALLEST_VOCABULARY
from jobs.data.carried_files import (
    GENERATION_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    TOKENIZER_GUARD,
    CarriedFiles,
    as_json,
    read_object,
)
from jobs.data.special_tokens import special_tokens
from jobs.data.tokenizer_process import check_tokenizer, encode_once, unencodable

END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in common tokenizers.
_KNOWN_ENDS = (END_OF_TEXT, "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "</s>", "<eos>")
_ROLES = ("bos", "eos", "pad")
_BATCH = 64  # documents
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer, and the tokens that the files beside it give a role.

    Attributes:
        tokenizer: Encodes and decodes; a special token that is spelled in a text becomes that token.
        end_of_text: Id of the token after each document.
        ends: Ids of all tokens that end a generated text: the tokenizer's, and those of config.json and
            generation_config.json.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id` as the tokenizer's files have them.
    """

    tokenizer: Tokenizer
    end_of_text: int
    ends: frozenset[int]
    ids: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Number of ids: one more than the highest; not all need to have a token."""
        return highest_id(self.tokenizer) + 1

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue, with those that the post-processor adds.

        An empty one becomes the end-of-text token, which precedes every document.

        Raises:
            DataError: The tokenizer cannot encode it, or takes too long.
        """
        return encode_once(self.tokenizer, text) or [self.end_of_text]

    def documents(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Tokens of each document, as `encode_documents` makes them."""
        encoder = document_tokenizer(self.tokenizer.to_str())
        for start in range(0, len(texts), _BATCH):
            yield from encode_documents(encoder, texts[start : start + _BATCH], self.end_of_text)


def document_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in a text of tokenizer.json, for documents: special tokens in them are plain text."""
    tokenizer = _uncut(Tokenizer.from_str(text))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], end_of_text: int) -> list[list[int]]:
    """Tokens of each document, begun as the post-processor says, without the end-of-text token.

    Args:
        tokenizer: From `document_tokenizer`.
        texts: The documents.
        end_of_text: Id of the token that the packing of documents appends.

    Raises:
        DataError: The tokenizer cannot encode one of them.
    """
    documents = []
    try:
        encoded = tokenizer.encode_batch_fast(list(texts))
    except BaseException as error:
        raise unencodable(error) from None
    for one in encoded:
        ids: list[int] = one.ids
        ended = ids[-1:] == [end_of_text] and one.special_tokens_mask[-1]  # by the post-processor
        documents.append(ids[:-1] if ended else ids)
    return documents


def opening_length(tokenizer: Tokenizer) -> int:
    """Number of tokens that the post-processor puts before every text (BOS)."""
    added: list[int] = tokenizer.encode("a").special_tokens_mask
    return next((at for at, one in enumerate(added) if not one), len(added))


def highest_id(tokenizer: Tokenizer) -> int:
    """The highest id of a token; -1 without tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


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


def load_tokenizer(path: Path, vocab_size: int) -> ModelTokenizer:
    """Load a tokenizer.json, or the one in a folder, with the roles that the files beside it give tokens.

    Truncation and padding that tokenizer.json may ask for are left out, as transformers does.

    Raises:
        DataError: There is none, or it or a file beside it cannot be read or takes too much time or memory.
        ConfigError: It has more tokens than the model, or no end-of-text token.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        described = TOKENIZER_GUARD.read(file)
    except FileNotFoundError:
        raise DataError(
            f"data.tokenizer: {file} does not exist; give a tokenizer.json or a folder with one"
            f"{hub_hint(path)}"
        ) from None
    try:
        check_tokenizer(described)
    except DataError as error:
        raise DataError(
            f"data.tokenizer: {file} is not a tokenizer.json that can be used: {shown(str(error), 300)}; "
            "give another one"
        ) from None
    tokenizer = _uncut(Tokenizer.from_buffer(described))
    highest = highest_id(tokenizer) + 1
    if highest > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is smaller than the {highest} tokens of {file}; "
            f"set model.vocab_size={highest}"
        )
    ids = _declared_ids(tokenizer, file.parent)
    declared = [ids["eos_token_id"], *_generation_ends(file.parent)]
    ends = [end for end in declared if end is not None] or _known_ends(tokenizer)[:1]
    if not ends:
        raise ConfigError(
            f"data.tokenizer: {file} has no end-of-text token; it needs one of {', '.join(_KNOWN_ENDS)}, "
            "or an eos_token in a tokenizer_config.json beside it"
        )
    return ModelTokenizer(
        tokenizer=tokenizer,
        end_of_text=ends[0],
        ends=frozenset(ends),
        ids={**ids, "eos_token_id": ends[0]},
    )


def save_tokenizer(tokenizer: Tokenizer, end_of_text: int, directory: Path) -> None:
    """Write a trained tokenizer's files into a folder, in the format of transformers."""
    directory.mkdir(parents=True, exist_ok=True)
    trained_files(tokenizer, end_of_text).write(directory)


def trained_files(tokenizer: Tokenizer, end_of_text: int) -> CarriedFiles:
    """The files of a trained tokenizer, with its ids for config.json."""
    end = tokenizer.id_to_token(end_of_text)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": None,
        "unk_token": None,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return CarriedFiles(
        files={
            TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": as_json(described),
            "special_tokens_map.json": as_json({"eos_token": end, "pad_token": end}),
        },
        config={"bos_token_id": None, "eos_token_id": end_of_text, "pad_token_id": end_of_text},
    )


def tokenizer_files(path: Path, text: ModelTokenizer) -> CarriedFiles:
    """The files of a tokenizer that was loaded from a path, with its ids for config.json."""
    found = CarriedFiles.of_tokenizer(path if path.is_dir() else path.parent)
    own = {} if path.is_dir() else {TOKENIZER_FILE: TOKENIZER_GUARD.read(path)}
    return CarriedFiles(files={**found.files, **own}, config=text.ids)


def _known_ends(tokenizer: Tokenizer) -> list[int]:
    return [found for found in map(tokenizer.token_to_id, _KNOWN_ENDS) if found is not None]


def _uncut(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _declared_ids(tokenizer: Tokenizer, folder: Path) -> dict[str, int | None]:
    """Ids of the tokens that the files beside a tokenizer.json name; None where they name none."""
    named = special_tokens(folder)
    ids: dict[str, int | None] = {}
    for role in _ROLES:
        name = named.get(f"{role}_token")
        ids[f"{role}_token_id"] = None if name is None else tokenizer.token_to_id(name)
    return ids


def _generation_ends(folder: Path) -> list[int]:
    """Ids of end tokens in config.json and generation_config.json, in their order.

    Raises:
        DataError: One is not a number.
    """
    ends: list[int] = []
    for name in (MODEL_FILE, GENERATION_FILE):
        given: Any = read_object(folder / name).get("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if any(isinstance(one, bool) or not isinstance(one, int) or one > _LARGEST_ID for one in listed):
            raise DataError(
                f"{folder / name}: eos_token_id is {brief(given)}; write a token's id, a list of ids, or null"
            )
        ends += [one for one in listed if one >= 0]
    return ends


__all__ = [
    "END_OF_TEXT",
    "ModelTokenizer",
    "document_tokenizer",
    "encode_documents",
    "highest_id",
    "load_tokenizer",
    "opening_length",
    "save_tokenizer",
    "tokenizer_files",
    "train_tokenizer",
    "trained_files",
]
