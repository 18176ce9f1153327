"""What fails for one request ends that request with an error that says what, and no other."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.delta import Delta
from engine.params import SamplingParams
from engine.sampling import likeliest_if_finite, log_probabilities
from engine.text import Detokenizer
from errors import DataError
from support.api_server import Served

MARKED = 0.123
"""A penalty by which a test finds the request that is to fail."""


class Panic(BaseException):
    """An error like those of the tokenizers library's own failures, which are no Exception."""


class Hearing:
    """Receives the deltas of one request."""

    def __init__(self, served: Served, name: str, **params: Any) -> None:
        self._deltas: queue.Queue[Delta] = queue.Queue()
        made = SamplingParams(**{"max_tokens": 30, "temperature": 0.0, "ignore_eos": True, **params})
        served.service.submit(name, [5, 6, len(name)], made, self.hear).result(30)

    def hear(self, delta: Delta) -> None:
        self._deltas.put(delta)

    def all(self) -> list[Delta]:
        found = [self._deltas.get(timeout=30)]
        while found[-1].finish_reason is None and found[-1].error is None:
            found.append(self._deltas.get(timeout=30))
        return found


class FailingHearing(Hearing):
    """A listener that raises an error at its second delta, and takes the rest."""

    _heard = 0

    def hear(self, delta: Delta) -> None:
        self._heard += 1
        if self._heard == 2:
            raise RuntimeError("the loop is closed")
        super().hear(delta)


def failing(served: Served, patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let a step of requests that have the marked penalty raise an error, in the function `name`."""
    module, _, attribute = name.rpartition(".")
    whole = getattr(__import__(module, fromlist=[attribute]), attribute)

    def fails(logits: Any, params: Any, *rest: Any) -> Any:
        if getattr(params, "presence_penalty", None) == MARKED and (
            name != "engine.acceptance.adjusted" or rest[1]
        ):
            raise error
        return whole(logits, params, *rest)

    patch.setattr(name, fails)


def undecodable(served: Served, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the decoding of the third request's text raise an error, after its first tokens."""
    begin, texts = Detokenizer.begin, 0

    def failing_third(self: Detokenizer, **options: Any) -> Any:
        nonlocal texts
        texts += 1
        text = begin(self, **options)
        if texts == 3:
            fed, taken = text.feed, 0

            def feed(token: int) -> str:
                nonlocal taken
                taken += 1
                if taken == 4:
                    raise error
                return fed(token)

            text.feed = feed  # type: ignore[method-assign]
        return text

    patch.setattr(Detokenizer, "begin", failing_third)


CASES: dict[str, tuple[Callable[[Served, pytest.MonkeyPatch], None], str]] = {
    "decoding": (lambda s, p: undecodable(s, p, DataError("no such character")), "no such character"),
    "a panic in decoding": (lambda s, p: undecodable(s, p, Panic("out of bounds")), "Panic: out of bounds"),
    "penalties": (
        lambda s, p: failing(s, p, "engine.acceptance.adjusted", IndexError("7 is out of range")),
        "IndexError: 7 is out of range",
    ),
    "the choice of a token": (
        lambda s, p: failing(s, p, "engine.acceptance.choose", ValueError("no distribution")),
        "ValueError: no distribution",
    ),
}


@pytest.mark.parametrize("case", [*CASES, "its listener"])
def test_a_failure_ends_the_request_that_it_is_of_and_no_other(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()
    try:
        alone = [Hearing(served, name).all() for name in ("a", "bbb")]
        expected = [[token for delta in deltas for token in delta.tokens] for deltas in alone]
        said = "RuntimeError: the loop is closed"
        if case in CASES:
            arrange, said = CASES[case]
            arrange(served, monkeypatch)
        busy = served.service.call(lambda: None)
        busy.result(30)
        beside = [Hearing(served, name) for name in ("a", "bbb")]
        kind = FailingHearing if case == "its listener" else Hearing
        faulty = kind(served, "faulty", presence_penalty=MARKED, logprobs=1)
        assert said in str(faulty.all()[-1].error)
        for hearing, tokens in zip(beside, expected, strict=True):
            deltas = hearing.all()
            assert [token for delta in deltas for token in delta.tokens] == tokens
            assert deltas[-1].finish_reason == "length"
        assert served.complete(max_tokens=3).status_code == 200
        served.service.call(lambda: None).result(30)
        assert served.engine.pool.held == 0
        assert not served.engine.has_work
    finally:
        served.service.close()


def test_logits_that_are_not_finite_are_an_error_of_their_row() -> None:
    logits = torch.randn(5, 9)
    logits[1, 3] = float("nan")
    logits[2, 4] = float("inf")
    logits[3] = float("-inf")
    found = likeliest_if_finite(logits)
    assert [one is None for one in found] == [False, True, True, True, False]
    assert found[0] == int(logits[0].argmax())
    for row in (1, 2, 3):
        with pytest.raises(DataError, match="not finite"):
            log_probabilities(logits[row], 0, 2)
    assert log_probabilities(logits[0], 0, 2)[0] == pytest.approx(float(logits[0].log_softmax(-1)[0]))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}], ids=str)
def test_a_model_whose_logits_are_not_finite_gives_an_error_and_no_token(params: dict[str, Any]) -> None:
    served = Served()
    try:
        with torch.no_grad():
            served.engine._runner.weights.head[7] = float("nan")
        served.service.call(lambda: None).result(30)
        last = Hearing(served, "one", **params).all()[-1]
        assert "not finite" in str(last.error)
    finally:
        served.service.close()
