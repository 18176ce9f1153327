"""Our logits and gradients against transformers' DeepseekV3 on the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import MtpCache

from model.balance_loss import BalanceWeights
from model.losses.training_losses import LossWeights, drafts, training_loss
from model.routing_trace import Trace
from support.reference_models import TOLERANCE, ours, random_tokens, their_modules, theirs, tiny

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"rope_interleave": False},
        {"q_lora_rank": None, "rope_interleave": False, "rope_scaling": YARN},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "mscale": 0.0}},
        {"rope_scaling": {**YARN, "mscale_all_dim": 0.0}},
        {"rope_scaling": {**YARN, "factor": 40.0, "original_max_position_embeddings": 64}},
        {"n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 2, "topk_group": 2},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 8, "topk_group": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"v_head_dim": 28},
        {"tie_word_embeddings": True},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"num_nextn_predict_layers": 2},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_logits(changes: dict[str, Any]) -> None:
    model = ours(tiny(**changes))
    tokens = random_tokens(model.config, 2, 40)
    with torch.no_grad():
        got, expected = model(tokens), theirs(model)(input_ids=tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("bias", "shift"), [(0.1, -3.0), (5.0, 0.0), (1.0, 100.0), (0.0, 0.0)])
def test_bias(bias: float, shift: float) -> None:
    """Negative biases, where a dropped group must not win with 0, and biases far above the affinities."""
    model = ours(tiny(), bias=bias, shift=shift)
    tokens = random_tokens(model.config, 2, 40)
    with torch.no_grad():
        got, expected = model(tokens), theirs(model)(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN, "q_lora_rank": None}], ids=str)
def test_mtp_logits(changes: dict[str, Any]) -> None:
    """Each module of the chain against transformers' MtpModel: after the final norm, embedding first."""
    depth, length = 3, 20
    model = ours(tiny(num_nextn_predict_layers=depth, **changes))
    tokens = random_tokens(model.config, 2, length + depth + 1)
    reference = theirs(model)
    modules = their_modules(model, reference)
    with torch.no_grad():
        through = model.trunk.start(tokens[:, :length], experts=model.experts)
        hidden = model.trunk.run(tokens[:, :length], through)
        got = [model.trunk.logits(d) for d, _ in drafts(model.trunk, tokens, None, hidden, through)]
        last = reference(input_ids=tokens[:, :length], output_hidden_states=True).hidden_states[-1]
        cache = MtpCache(config=reference.config.get_mtp_config())
        for k in range(depth):
            positions = torch.arange(k + 1, length + k + 1).unsqueeze(0)
            shifted = tokens[:, k + 1 : length + k + 1]
            last = modules.forward_layer(k, last, positions, cache, input_ids=shifted)
            torch.testing.assert_close(got[k], reference.lm_head(last), rtol=0, atol=TOLERANCE)


def test_gradients() -> None:
    """Gradients of every parameter, with the mean cross-entropy as the loss."""
    model = ours(tiny())
    tokens = random_tokens(model.config, 2, 33)
    reference = theirs(model)
    loss = reference(input_ids=tokens, labels=tokens).loss
    loss.backward()
    losses = training_loss(
        model.trunk,
        tokens,
        None,
        experts=model.experts,
        trace=Trace(),
        weights=LossWeights(n_targets=64, n_rows=2, balance=BalanceWeights(), mtp=0.3),
    )
    losses.total.backward()
    assert abs(losses.total.item() - loss.item()) < 1e-5
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for layer in model.config.moe_layers:
        w13, w2 = model.experts.weights(layer)
        prefix = f"model.layers.{layer}.mlp.experts."
        torch.testing.assert_close(w13.grad, expected[prefix + "gate_up_proj"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(w2.grad, expected[prefix + "down_proj"], rtol=1e-3, atol=1e-5)
