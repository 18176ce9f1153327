"""Tokenizers of strangers: tried in a process with limits, and kept there if they may take long."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models

from errors import DataError
from jobs.api.text_encoder import TextEncoder
from jobs.confined.confined_process import ProcessLimits
from jobs.data import tokenizer_process
from jobs.data.tokenizer import encode_documents, load_tokenizer
from jobs.data.tokenizer_bounds import check_decoder, encodes_linearly
from jobs.data.tokenizer_process import check_tokenizer, encode_once
from support.foreign_model import write_foreign_files
from support.hostile_tokenizers import (
    BACKTRACKING,
    DOUBLING,
    TOKENIZERS,
    UNKNOWN_EXPRESSION,
    described,
    replaced,
    split,
)
from support.tokenizers import decoder_kinds

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

_MIB = 1 << 20
LIMITS = ProcessLimits(cpu_seconds=2.0, seconds=200.0, memory=256 * _MIB)
"""Limits under which those that grow for ever end soon; the others need a fraction of these."""

DEEPSEEK = [
    split(r"\p{N}{1,3}"),
    split("[一-龥\u3040-ゟ\u30a0-ヿ]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]
"""The pre-tokenizers in DeepSeek-V3's tokenizer.json."""


def _of(**parts: Any) -> Tokenizer:
    return Tokenizer.from_buffer(described(**parts))


def _chain(name: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_process, "tokenizer_limits", lambda size: LIMITS)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_costs_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS[name])
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path, 300)
    line = str(caught.value)
    assert line.startswith(
        f"data.tokenizer: {tmp_path / 'tokenizer.json'} is not a tokenizer.json that can be"
    )
    assert line.isprintable()
    assert len(line) < len(str(tmp_path)) + 500
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    assert used < 2 * LIMITS.cpu_seconds + 5
    assert not [child for child in psutil.Process().children() if "tokenizer_worker" in str(child.cmdline())]


def test_one_that_does_not_know_some_characters_passes() -> None:
    """The texts that it cannot encode are errors of their requests."""
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        encode_once(words, "b")
    check_tokenizer(words.to_str().encode())


def test_others_pass_and_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_foreign_files(tmp_path)
    load_tokenizer(tmp_path, 512)
    monkeypatch.setattr(tokenizer_process, "TokenizerProcess", None)
    load_tokenizer(tmp_path, 512)
    with pytest.raises(TypeError, match="NoneType"):
        check_tokenizer(described())


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": _chain("pretokenizers", DEEPSEEK)},
        {"normalizer": _chain("normalizers", [{"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁")])},
        {"normalizer": {"type": "NFC"}, "decoder": {"type": "Fuse"}},
        {"normalizer": _chain("normalizers", DOUBLING[:3])},
    ],
    ids=["DeepSeek-V3", "Llama", "NFC", "8 times longer"],
)
def test_known_parts_take_linear_time(parts: dict[str, Any]) -> None:
    assert encodes_linearly(_of(**parts))


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split(BACKTRACKING)},
        {"pre_tokenizer": _chain("pretokenizers", [*DEEPSEEK, split("a|b")])},
        {"pre_tokenizer": UNKNOWN_EXPRESSION},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": BACKTRACKING}, "content": ""}},
        {"normalizer": _chain("normalizers", DOUBLING[:4])},
        {"normalizer": replaced("猫", "猫" * 9)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 65}},
    ],
)
def test_others_may_take_longer(parts: dict[str, Any]) -> None:
    assert not encodes_linearly(_of(**parts))


def test_models_that_try_every_substring_may_take_longer() -> None:
    assert not encodes_linearly(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    assert not encodes_linearly(Tokenizer(models.Unigram([("a", 0.0)], 0, False)))


def test_decoders_of_published_tokenizers_are_let_through() -> None:
    for tokenizer in decoder_kinds().values():
        check_decoder(tokenizer)


def test_a_text_that_takes_too_long_ends_its_process_alone() -> None:
    tokenizer = _of(pre_tokenizer=split(BACKTRACKING))
    assert encode_once(tokenizer, "abab") == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"^the tokenizer cannot encode the text \(.*; check the tokenizer"):
        encode_once(tokenizer, "a" * 60 + "b")


def test_a_panic_of_the_library_is_an_error_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no `Exception`, so it would end the event loop."""
    tokenizer = _of(pre_tokenizer=split(BACKTRACKING))
    for module in ("jobs.api.text_encoder", "jobs.data.tokenizer_process"):
        monkeypatch.setattr(f"{module}.encodes_linearly", lambda _: True)
    hostile = "a" * 60 + "b"
    with pytest.raises(DataError, match=r"the tokenizer cannot encode the text \(Onig"):
        encode_once(tokenizer, hostile)
    with pytest.raises(DataError, match=r"the tokenizer cannot encode the text \(Onig"):
        encode_documents(tokenizer, [hostile], 2)

    async def scene() -> None:
        encoder = TextEncoder(tokenizer, waiting=8)
        for text in (hostile, "b" * 10_000 + hostile):
            with pytest.raises(DataError, match=r"the tokenizer cannot encode the text \(Onig"):
                await encoder.encode(text, add_special_tokens=True)
        assert await encoder.encode("ab", add_special_tokens=True) == [0, 1]

    asyncio.run(scene())


def test_other_requests_are_answered_while_a_text_takes_long() -> None:
    """Expressions that backtrack hold neither the event loop nor the threads of others."""
    doubling = Tokenizer.from_buffer(described(normalizer=_chain("normalizers", DOUBLING)))

    async def scene() -> None:
        encoder = TextEncoder(doubling, waiting=8)
        assert encoder.confined
        try:
            both = (encoder.encode("b", add_special_tokens=True) for _ in range(2))
            assert await asyncio.gather(*both) == [[1], [1]]  # both processes have begun
            stuck = asyncio.create_task(encoder.encode("a", add_special_tokens=True))
            assert await encoder.encode("b" * 100, add_special_tokens=True) == [1] * 100
            assert not stuck.done()
            with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
                await stuck
            assert await encoder.encode("bb", add_special_tokens=True) == [1, 1]
        finally:
            encoder.close()

    asyncio.run(scene())


def test_a_known_tokenizer_is_used_in_this_process() -> None:
    plain = _of()

    async def scene() -> None:
        encoder = TextEncoder(plain, waiting=8)
        assert not encoder.confined
        for size in (3, 20_000):
            assert await encoder.encode("a" * size, add_special_tokens=True) == [0] * size
        encoder.close()

    asyncio.run(scene())


def test_confined_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    write_foreign_files(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "x{9}"}, "content": ""}
    )
    tokenizer = Tokenizer.from_str(json.dumps(values))
    assert not encodes_linearly(tokenizer)
    for text in ("", "def the cat", "é 🙂</s>", "x" * 50):
        assert encode_once(tokenizer, text) == tokenizer.encode(text).ids
