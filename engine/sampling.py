"""Pure functions that draw the next token from logits.

Randomness is an argument: a token is a function of the logits, of the request's tokens so far and of one
uniform number for each position. So a request with a seed gets the same tokens however the engine batches it.
A draft is verified by drawing the token that plain decoding would draw and comparing: for a draft that is a
single token and not a distribution, this is rejection sampling (Leviathan et al., arXiv 2211.17192), which
accepts with probability p(draft) and otherwise samples from the rest of p. The output equals that of plain
decoding token for token.

V is the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.params import SamplingParams
from errors import DataError

_LARGEST = 1e30


def adjusted(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    ends: Collection[int],
) -> Tensor:
    """Logits [V] after penalties and biases, without tokens that must not end the text yet.

    Args:
        logits: [V].
        params: Parameters of the request.
        prompt: Tokens of the prompt.
        output: Tokens generated so far.
        ends: Tokens that end the text.
    """
    if not params.adjusts_logits:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), dtype=torch.int64, device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        said = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[said] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=logits.device)
        logits[tokens] += torch.tensor(
            list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device
        )
    # A penalty near zero overflows or gives 0 / 0; one request's parameters must not stop other requests.
    logits = logits.nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)
    known = [token for token in ends if token < len(logits)]
    if len(output) < params.min_tokens and 0 < len(known) < len(logits):  # not if every token ends the text
        logits[torch.tensor(known, device=logits.device)] = float("-inf")
    return logits


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [V] that a token is drawn from, in float64: temperature, then top_k, top_p and min_p.

    With greedy parameters the likeliest token has probability 1, on a tie the first one.
    """
    if params.greedy:
        out = torch.zeros_like(logits, dtype=torch.float64)
        out[logits.argmax()] = 1.0
        return out
    logits = logits.double() / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        # By rank and not by value, so that exactly top_k tokens remain.
        kept = logits.sort(descending=True, stable=True).indices[: params.top_k]
        logits = torch.full_like(logits, float("-inf")).scatter_(0, kept, logits[kept])
    weights = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        sorted_weights, order = weights.sort(descending=True, stable=True)
        # A token remains if the tokens before it have less than top_p together; the first always remains.
        dropped = sorted_weights.cumsum(0) - sorted_weights >= params.top_p
        dropped[0] = False
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter_(0, order, dropped), 0.0)
    if params.min_p:
        weights = weights.masked_fill(weights < params.min_p * weights.max(), 0.0)
    return weights / weights.sum()


def choose(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """The token drawn from logits [V] with a uniform number in [0, 1)."""
    if params.greedy:
        return int(logits.argmax())
    cumulative = probabilities(logits, params).cumsum(0)
    # The sum may round to less than one; beyond it, the last token with a probability is drawn.
    at = torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True)
    return min(int(at), int(torch.searchsorted(cumulative, float(cumulative[-1]))))


def likeliest_if_finite(logits: Tensor) -> list[int | None]:
    """The likeliest token of each row of logits [N, V], as of `likeliest`; None where a logit is not finite.

    An undefined number counts as the highest, so the likeliest token's logit tells.
    """
    best = likeliest(logits)
    if logits.device.type == "cpu":
        values = logits.numpy()
        return [token if math.isfinite(values[row, token]) else None for row, token in enumerate(best)]
    finite = logits.amax(-1).isfinite().tolist()
    return [token if good else None for token, good in zip(best, finite, strict=True)]


def likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits [N, V]; on a tie the first."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        found: list[int] = logits.numpy().argmax(-1).tolist()  # eight times faster than torch's argmax
        return found
    return logits.argmax(-1).tolist()


def not_finite() -> DataError:
    """The error for logits that no token can be chosen by."""
    return DataError(
        "the model's logits for this text are not finite numbers; check its weights and its dtype"
    )


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of a token under logits [V], and those of the `count` likeliest tokens, best first.

    Raises:
        DataError: The logits are not finite.
    """
    logs = torch.log_softmax(logits.double(), dim=-1)
    if not math.isfinite(logs[token]):
        raise not_finite()
    best = logs.topk(min(count, logs.shape[-1]))
    return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


__all__ = [
    "adjusted",
    "choose",
    "likeliest",
    "likeliest_if_finite",
    "log_probabilities",
    "not_finite",
    "probabilities",
]
