"""Training and evaluation losses: the papers' equations, packed documents, weights of the balance losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigError
from model.balance import auxiliary_loss, sequence_balance_loss
from model.balance_loss import BalanceWeights
from model.block import Pass
from model.causal_lm import CausalLM
from model.config import BalanceConfig, DeviceWeights
from model.losses.cross_entropy import IGNORE
from model.losses.training_losses import count_targets, drafts, evaluation_loss, targets_of
from model.mtp import MTPModule, draft_acceptance
from model.routing import affinity
from model.routing_trace import Trace
from support.small_losses import gradients, loss_of, model_of, tokens_of

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_mtp_equations() -> None:
    """Eq. 21-25 of arXiv 2412.19437 one row at a time, the released order of the projection's halves."""
    model, depth, length = model_of(), 2, 7
    trunk, config = model.trunk, model.config
    tokens = tokens_of(2, length + 1 + depth)
    total = torch.zeros((), dtype=torch.float64)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    for row in tokens:
        start = trunk.start(row[None, :length], experts=model.experts)
        h = trunk.run(row[None, :length], start).normed[0]
        total = total + F.cross_entropy(h @ trunk.lm_head.weight.t(), row[1 : length + 1], reduction="sum")
        for k in range(1, depth + 1):
            module = trunk.model.layers[config.num_hidden_layers + k - 1]
            assert isinstance(module, MTPModule)
            inputs = []
            for i in range(length):  # eq. 21: h'_i^k = M_k [RMSNorm(h_i^{k-1}); RMSNorm(Emb(t_{i+k}))]
                embedded = naive_norm(trunk.model.embed_tokens.weight[row[i + k]], module.enorm.weight)
                hidden = naive_norm(h[i], module.hnorm.weight)
                inputs.append(module.eh_proj.weight @ torch.cat((embedded, hidden)))
            # eq. 22: h^k = TRM_k(h'^k), and the norm that belongs to the head
            out, _ = module(torch.stack(inputs)[None], start)
            h = naive_norm(out[0], module.shared_head.norm.weight)
            # eq. 23, 24: P_{i+k+1} = OutHead(h_i^k), L_k = CrossEntropy(P, t_{i+k+1})
            for i in range(length):
                sums[k - 1] = sums[k - 1] - F.log_softmax(trunk.lm_head.weight @ h[i], 0)[row[i + k + 1]]
    expected = (total + 0.3 / depth * sum(sums)) / (2 * length)  # eq. 25
    losses = loss_of(model, tokens, n_targets=2 * length)
    torch.testing.assert_close(losses.main_sum, total.detach(), **CLOSE)
    torch.testing.assert_close(torch.stack(losses.mtp_sums), torch.stack(sums).detach(), **CLOSE)
    torch.testing.assert_close(losses.total, expected, **CLOSE)
    names = [name for name, _ in model.named_parameters()]
    plain = torch.autograd.grad(expected, list(model.parameters()))
    ours = gradients(model, losses)
    for name, gradient in zip(names, plain, strict=True):
        torch.testing.assert_close(ours[name], gradient, **CLOSE, msg=name)


def test_parallel_modules_are_independent() -> None:
    """Gloeckle et al.: each module is a block on the trunk's last hidden state and reads no later token."""
    model = model_of(mtp_mode="parallel")
    tokens = tokens_of(2, 10)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    through, outs = _run(model, tokens)
    _, others = _run(model, changed)
    for got, other in zip(outs, others, strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=0)
    last = model.trunk.run(tokens[:, :7], through).last
    for k, layer in enumerate(model.config.mtp_layers):
        module = model.trunk.model.layers[layer]
        assert isinstance(module, MTPModule)
        assert not hasattr(module, "eh_proj")
        expected = naive_norm(module(last, through)[0], module.shared_head.norm.weight)
        torch.testing.assert_close(outs[k], expected, **CLOSE)
    losses = loss_of(model, tokens)
    for k in range(2):
        logits = outs[k] @ model.trunk.lm_head.weight.t()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, k + 2 : k + 9].flatten(), reduction="sum")
        torch.testing.assert_close(losses.mtp_sums[k], nll.detach(), **CLOSE)


def _run(model: CausalLM, tokens: Tensor) -> tuple[Pass, list[Tensor]]:
    length = tokens.shape[1] - 3
    through = model.trunk.start(tokens[:, :length], experts=model.experts)
    hidden = model.trunk.run(tokens[:, :length], through)
    return through, [out for out, _ in drafts(model.trunk, tokens, None, hidden, through)]


@pytest.mark.parametrize("mode", ["chain", "parallel"])
def test_packed_documents_lose_what_they_lose_alone(mode: str) -> None:
    model = model_of(mtp_mode=mode)
    documents = [tokens_of(n) for n in (6, 9, 4)]
    row = torch.cat([*documents, torch.zeros(5, dtype=torch.int64)])[None]
    segments = torch.tensor([[0] * 6 + [1] * 9 + [2] * 4 + [-1] * 5], dtype=torch.int32)
    packed = loss_of(model, row, segments)
    main, mtp = 0.0, [0.0, 0.0]
    for document in documents:
        # Two tokens of padding give every module its T positions without adding a target.
        alone = torch.cat((document, torch.zeros(2, dtype=torch.int64)))[None]
        padding = torch.tensor([[0] * len(document) + [-1] * 2], dtype=torch.int32)
        losses = loss_of(model, alone, padding)
        main += losses.main_sum.item()
        mtp = [a + b.item() for a, b in zip(mtp, losses.mtp_sums, strict=True)]
    assert packed.main_sum.item() == pytest.approx(main, rel=1e-9)
    assert [s.item() for s in packed.mtp_sums] == pytest.approx(mtp, rel=1e-9)
    assert count_targets(row, segments, depth=2) == 5 + 8 + 3


def test_one_document_a_row_needs_no_segments() -> None:
    model, tokens = model_of(), tokens_of(2, 11)
    balance = BalanceWeights(sequence=0.5)
    plain, trace = loss_of(model, tokens, balance=balance), Trace()
    masked = loss_of(model, tokens, torch.zeros(2, 11, dtype=torch.int32), balance=balance, trace=trace)
    torch.testing.assert_close(plain.total, masked.total, **CLOSE)
    assert {int(load.sum()) for load in trace.loads.values()} == {2 * 8 * 2}


def test_targets_stop_at_borders() -> None:
    tokens = torch.arange(8)[None]
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]], dtype=torch.int32)
    x = IGNORE
    assert targets_of(tokens, segments, length=6, ahead=1).tolist() == [[1, 2, x, 4, x, x]]
    assert targets_of(tokens, segments, length=6, ahead=2).tolist() == [[2, x, x, x, x, x]]
    assert targets_of(tokens, None, length=6, ahead=2).tolist() == [[2, 3, 4, 5, 6, 7]]


def test_balance_losses() -> None:
    """Balance losses are weighted, per row, and summed over all MoE layers with MTP; `bias` adds none."""
    model, tokens = model_of(), tokens_of(3, 10)

    def balance_of(**weights: Any) -> float:
        return loss_of(model, tokens, balance=BalanceWeights(**weights)).balance.item()

    assert balance_of(strategy="bias") == balance_of(strategy="none") == 0
    assert balance_of(strategy="bias", sequence=0.5) == pytest.approx(0.5 * balance_of(sequence=1.0))
    both = balance_of(strategy="auxiliary", auxiliary=0.1, sequence=0.5)
    assert both == pytest.approx(
        balance_of(strategy="auxiliary", auxiliary=0.1) + balance_of(strategy="none", sequence=0.5)
    )
    zero = DeviceWeights(expert=0, device=0, communication=0)
    parts = [
        balance_of(strategy="device", device=zero.model_copy(update={name: 1.0}))
        for name in ("expert", "device", "communication")
    ]
    weights = DeviceWeights(expert=1.0, device=2.0, communication=3.0)
    assert balance_of(strategy="device", device=weights) == pytest.approx(
        parts[0] + 2 * parts[1] + 3 * parts[2]
    )
    # One layer of a model with one MoE layer, by hand.
    single = model_of(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    block, trace = single.trunk.model.layers[0], Trace()
    seen: list[Tensor] = []
    handle = block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weighted = BalanceWeights(strategy="auxiliary", auxiliary=0.3, sequence=0.7)
    losses = loss_of(single, tokens, balance=weighted, trace=trace)
    handle.remove()
    scores = affinity(seen[0].flatten(0, 1), block.mlp.gate.weight)
    expected = 0.3 * auxiliary_loss(scores, trace.routes[0]) + 0.7 * sequence_balance_loss(
        scores.view(3, 9, -1), top_k=2
    )
    assert losses.balance.item() == pytest.approx(3 * expected.item(), rel=1e-12)


def test_balance_weights_follow_their_schedules() -> None:
    config = BalanceConfig.model_validate(
        {"strategy": "auxiliary", "sequence_weight": [{"step": 0, "value": 1.0}, {"step": 5, "value": 0.0}]}
    )
    assert [BalanceWeights.at(config, step).sequence for step in (0, 4, 5)] == [1.0, 1.0, 0.0]
    assert BalanceWeights.at(config, 0).auxiliary == 0.001


def test_float64_is_float64_throughout() -> None:
    model, tokens = model_of(), tokens_of(1, 9)
    narrow = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16):
                    narrow.append(str(func))
            return out

    with Watch():
        loss_of(model, tokens, balance=BalanceWeights(sequence=1.0)).total.backward()
    # The bias is float32; nothing is computed in it.
    assert set(narrow) <= {"aten.detach.default", "aten.alias.default", "aten.view.default"}, set(narrow)


def test_evaluation() -> None:
    model, tokens = model_of(), tokens_of(3, 12)
    segments = torch.tensor([[0] * 12, [0] * 7 + [1] * 5, [0] * 4 + [-1] * 8], dtype=torch.int32)
    result = evaluation_loss(model.trunk, tokens, segments, experts=model.experts)
    losses = loss_of(model, tokens, segments)
    assert result.nll == pytest.approx(losses.main_sum.item())
    assert result.n_targets == count_targets(tokens, segments, depth=2)
    _, outs = _run(model, tokens[:1])
    logits = [model.trunk.logits(out).argmax(-1) for out in outs]
    main = model(tokens[:1, :9]).argmax(-1)
    single = evaluation_loss(model.trunk, tokens[:1], None, experts=model.experts)
    for k in (1, 2):
        hits = sum(int(main[0, i + k] == logits[k - 1][0, i]) for i in range(9 - k))
        assert (single.accepted[k - 1], single.drafted[k - 1]) == (hits, 9 - k)


def test_draft_acceptance() -> None:
    main = torch.tensor([[1, 2, 3, 4]])
    draft = torch.tensor([[2, 9, 4, 7]])
    assert draft_acceptance(main, draft, depth=1) == (2, 3)
    assert draft_acceptance(main, draft, depth=2) == (0, 2)
    assert draft_acceptance(main, draft, depth=4) == (0, 0)
    valid = torch.tensor([[True, True, False, True]])
    assert draft_acceptance(main, draft, depth=1, valid=valid) == (1, 2)


def test_rows_too_short() -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        loss_of(model_of(), tokens_of(1, 3))
