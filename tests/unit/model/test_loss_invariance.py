"""Recompute and the division of a batch into parts change no loss, gradient, route or load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.balance_loss import BalanceWeights
from model.causal_lm import CausalLM
from model.experts.protocols import Pending
from model.losses.training_losses import LossWeights, count_targets, route, training_loss
from model.routing_trace import Trace, batch_routing, routing_counts
from support.small_losses import NO_BALANCE, gradients, loss_of, model_of, tokens_of


def documents_and_padding() -> Tensor:
    """Segments [4, 10]: two documents in the first row, padding in the last."""
    segments = torch.zeros(4, 10, dtype=torch.int32)
    segments[0, 4:] = 1
    segments[3, 6:] = -1
    return segments


@pytest.mark.parametrize("strategy", ["bias", "auxiliary", "device"])
def test_recompute_changes_nothing(strategy: Any) -> None:
    """Recompute changes no loss, gradient, route or load, and counts nothing twice."""
    model = model_of()
    tokens = tokens_of(2, 12)
    segments = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [-1] * 3], dtype=torch.int32)
    balance = BalanceWeights(strategy=strategy, sequence=0.2, auxiliary=0.3)
    results = []
    for recompute in (False, True):
        trace = Trace()
        losses = loss_of(model, tokens, segments, trace=trace, balance=balance, recompute=recompute)
        results.append((losses, gradients(model, losses), trace))
    (plain, plain_grads, plain_trace), (again, again_grads, again_trace) = results
    torch.testing.assert_close(plain.total, again.total, rtol=0, atol=0)
    assert plain.balance.item() == again.balance.item() > 0
    assert plain_grads.keys() == again_grads.keys()
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(again_grads[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    assert list(again_trace.loads) == list(plain_trace.loads) == list(model.config.moe_layers)
    for layer, load in plain_trace.loads.items():
        assert torch.equal(again_trace.loads[layer], load)
        assert torch.equal(again_trace.routes[layer], plain_trace.routes[layer])
    counted = int((segments[:, :9] >= 0).sum())
    assert int(again_trace.loads[1].sum()) == counted * model.config.num_experts_per_tok


class Counting:
    """Experts that record the modes under which they are called."""

    def __init__(self, model: CausalLM) -> None:
        self.inner = model.experts
        self.calls: list[tuple[int, bool]] = []

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        self.calls.append((layer, torch.is_grad_enabled()))
        return self.inner.dispatch(layer, rows, idx, gates)


def test_recompute_calls_the_experts_once_without_and_once_with_gradients() -> None:
    model = model_of()
    experts = Counting(model)
    losses = training_loss(
        model.trunk,
        tokens_of(1, 9),
        None,
        experts=experts,
        trace=Trace(),
        weights=LossWeights(n_targets=6, n_rows=1, balance=NO_BALANCE, mtp=0.3),
        recompute=True,
    )
    layers = model.config.moe_layers
    assert experts.calls == [(layer, False) for layer in layers]
    losses.total.backward()
    assert experts.calls[len(layers) :] == [(layer, True) for layer in reversed(layers)]


def test_a_given_route_is_taken_and_not_counted() -> None:
    model, tokens = model_of(num_nextn_predict_layers=0), tokens_of(1, 6)
    route = torch.tensor([[6, 7]]).expand(6, 2)
    trace = Trace(routes={1: route})
    with torch.no_grad():
        model.trunk(tokens, experts=model.experts, trace=trace)
    assert torch.equal(trace.routes[1], route)
    assert list(trace.loads) == [2]


def test_microbatches_and_workers_add_up() -> None:
    """With the global batch's counts, losses and gradients of the parts are those of the whole."""
    model, tokens = model_of(), tokens_of(4, 10)
    segments = documents_and_padding()
    counts: dict[str, Any] = {
        "n_targets": count_targets(tokens, segments, depth=2),
        "n_rows": 4,
        "balance": BalanceWeights(sequence=0.4),
    }
    whole = loss_of(model, tokens, segments, **counts)
    expected = gradients(model, whole)
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        losses = loss_of(model, tokens[part], segments[part], **counts)
        losses.total.backward()
        total += losses.total.item()
    assert total == pytest.approx(whole.total.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("strategy", ["auxiliary", "device"])
def test_losses_of_the_load_add_up_by_the_routing_of_the_batch(strategy: str) -> None:
    """`route` records what the passes of all parts have to know; modules of MTP count fewer tokens."""
    model, tokens = model_of(), tokens_of(4, 10)
    segments = documents_and_padding()
    counts: dict[str, Any] = {
        "n_targets": count_targets(tokens, segments, depth=2),
        "n_rows": 4,
        "balance": BalanceWeights(strategy=strategy, auxiliary=0.5),  # type: ignore[arg-type]
    }
    trace = Trace()
    whole = loss_of(model, tokens, segments, trace=trace, **counts)
    expected = gradients(model, whole)
    model.zero_grad()
    parts, traces = [slice(0, 1), slice(1, 4)], [Trace(), Trace()]
    for part, one in zip(parts, traces, strict=True):
        route(model.trunk, tokens[part], segments[part], experts=model.experts, trace=one)
    assert torch.equal(routing_counts(traces, model.config), routing_counts([trace], model.config))
    batch = batch_routing(
        routing_counts(traces, model.config), model.config, n_rows=4, device=torch.device("cpu")
    )
    balance = 0.0
    for part, one in zip(parts, traces, strict=True):
        one.batch = batch
        losses = loss_of(model, tokens[part], segments[part], trace=one, **counts)
        losses.total.backward()
        balance += losses.balance.item()
    assert balance == pytest.approx(whole.balance.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
