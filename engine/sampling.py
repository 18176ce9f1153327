"""From logits to the next token: pure functions, the randomness coming in as a number.

A token is a function of the logits, of the request's history and of one uniform number per position. So a
request with a seed gives the same tokens however the engine batches it, and a draft is verified by drawing
the token that plain decoding would draw and comparing: for a draft that is one token and no distribution,
this is rejection sampling (Leviathan et al., arXiv 2211.17192), which accepts with the probability p(draft)
and otherwise leaves the rest of p, and the output is that of plain decoding token for token.

V is the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.params import SamplingParams

_LARGEST = 1e30


def adjusted(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    ends: Collection[int],
) -> Tensor:
    """Logits [V] after penalties, biases and the tokens that may not end the text yet.

    Args:
        prompt, output: the request's tokens so far.
        ends: tokens that would end it.
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
    # A penalty near zero overflows, or makes 0 / 0. One request's parameters must not stop the others.
    logits = logits.nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)
    if len(output) < params.min_tokens and 0 < len(ends) < len(logits):  # if all end it, nothing else is left
        logits[torch.tensor(list(ends), device=logits.device)] = float("-inf")
    return logits


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [V] that a token is drawn from, float64: temperature, then top_k, top_p and min_p.

    Greedy parameters put everything on the likeliest token, the first one on a tie.
    """
    if params.greedy:
        out = torch.zeros_like(logits, dtype=torch.float64)
        out[logits.argmax()] = 1.0
        return out
    logits = logits.double() / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        # By rank and not by value, so that exactly top_k stay.
        kept = logits.sort(descending=True, stable=True).indices[: params.top_k]
        logits = torch.full_like(logits, float("-inf")).scatter_(0, kept, logits[kept])
    weights = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        sorted_weights, order = weights.sort(descending=True, stable=True)
        # A token stays while those before it have less than top_p together: the first always does.
        dropped = sorted_weights.cumsum(0) - sorted_weights >= params.top_p
        dropped[0] = False
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter_(0, order, dropped), 0.0)
    if params.min_p:
        weights = weights.masked_fill(weights < params.min_p * weights.max(), 0.0)
    return weights / weights.sum()


def choose(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """The token that a uniform number of [0, 1) draws from logits [V]."""
    if params.greedy:
        return int(logits.argmax())
    cumulative = probabilities(logits, params).cumsum(0)
    # The sum may round to less than one; what lies beyond it is the last token that can be drawn.
    at = torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True)
    return min(int(at), int(torch.searchsorted(cumulative, float(cumulative[-1]))))


def likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits [N, V]; of equals the first."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        found: list[int] = logits.numpy().argmax(-1).tolist()  # an eighth of the time that torch takes
        return found
    return logits.argmax(-1).tolist()


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of a token under logits [V], and the `count` likeliest ones with theirs, best first."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    best = logs.topk(min(count, logs.shape[-1]))
    return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


__all__ = ["adjusted", "choose", "likeliest", "log_probabilities", "probabilities"]
