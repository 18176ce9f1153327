"""Conversion of sampling parameters and deltas from and to messages of trunk.proto."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.delta import Delta
from engine.params import SamplingParams
from engine.sequence import TokenLogprobs
from protos.trunk_pb2 import Alternatives, Sampling, TrunkDelta

_INT32 = (1 << 31) - 1


def sampling_message(params: SamplingParams) -> Sampling:
    """Sampling parameters, whose token ids are in the vocabulary, as a message."""
    return Sampling(
        max_tokens=min(params.max_tokens, _INT32),
        min_tokens=min(params.min_tokens, _INT32),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, _INT32),
        min_p=params.min_p,
        seed=None if params.seed is None else str(params.seed),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def sampling_params(message: Sampling) -> SamplingParams:
    """Sampling parameters from a message.

    Raises:
        ConfigError: A value is out of its range.
    """
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=int(message.seed) if message.HasField("seed") else None,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs,
    )


def delta_message(deltas: Sequence[Delta]) -> TrunkDelta:
    """Several consecutive deltas of one request as one message."""
    last = deltas[-1]
    message = TrunkDelta(
        text="".join([delta.text for delta in deltas]),
        finish_reason=last.finish_reason or "",
        error=last.error or "",
        own=last.own,
        cached=last.cached,
        version=last.version,
    )
    for delta in deltas:
        message.tokens.extend(delta.tokens)
        if delta.logprobs:
            message.logprobs.extend(_alternatives(delta.logprobs))
        if delta.prompt_logprobs:
            message.prompt_logprobs.extend(_alternatives(delta.prompt_logprobs))
    return message


def delta_of(message: TrunkDelta) -> Delta:
    """A delta from a message."""
    return Delta(
        text=message.text,
        tokens=list(message.tokens),
        logprobs=_logprobs(message.logprobs) if message.logprobs else [],
        prompt_logprobs=_logprobs(message.prompt_logprobs) if message.prompt_logprobs else [],
        finish_reason=message.finish_reason or None,
        error=message.error or None,
        own=message.own,
        cached=message.cached,
        version=message.version,
    )


def _alternatives(logprobs: Iterable[TokenLogprobs]) -> list[Alternatives]:
    return [
        Alternatives(token=at.token, top_ids=[t for t, _ in at.best], top=[value for _, value in at.best])
        for at in logprobs
    ]


def _logprobs(messages: Iterable[Alternatives]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token=at.token, best=list(zip(at.top_ids, at.top, strict=True))) for at in messages]


__all__ = ["delta_message", "delta_of", "sampling_message", "sampling_params"]
