"""The tokenizer is lossless, deterministic, of the right size, and readable by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import ConfigError, DataError
from jobs.data.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, train_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(200)]
TOKENIZER, END = train_tokenizer(TEXTS, 320)


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if END_OF_TEXT not in text:
        assert END not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 320)[0].to_str() == TOKENIZER.to_str()


def test_it_has_the_size_that_was_asked_for_and_learns_words() -> None:
    assert TOKENIZER.get_vocab_size() == 320
    assert "Ġfunction" in TOKENIZER.get_vocab()


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(256\) is too small.*257"):
        train_tokenizer(TEXTS, 256)
    assert train_tokenizer(TEXTS, 257)[0].get_vocab_size() == 257


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(TOKENIZER, END, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'é'"
    assert theirs(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text).ids
    assert theirs.decode(TOKENIZER.encode(text).ids) == text
    assert theirs.eos_token_id == END


def test_a_saved_one_loads_from_its_folder_or_file(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZER, END, tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path, 320)
        assert loaded.tokenizer.to_str() == TOKENIZER.to_str()
        assert loaded.end_of_text == END


def test_one_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZER, END, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(319\).*set model\.vocab_size=320"):
        load_tokenizer(tmp_path, 319)


def test_the_end_of_text_may_have_any_name_that_is_declared(tmp_path: Path) -> None:
    words = json.loads(TOKENIZER.to_str().replace(END_OF_TEXT, "<the end>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<the end>"}}))
    assert load_tokenizer(tmp_path, 320).end_of_text == END


def test_a_missing_or_broken_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path, 320)
