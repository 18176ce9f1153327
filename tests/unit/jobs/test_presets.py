"""The presets have the sizes that their summaries state."""

from __future__ import annotations

import pytest

from errors import ConfigError
from jobs.config.presets import preset, summary
from model.optimizers.schedule import value_at


def test_bench_20m_has_20m_parameters_and_5m_active() -> None:
    counts = summary(preset("bench-20m"))
    assert round(counts["total_parameters"] / 1e6) == 20
    assert 5.0e6 < counts["active_parameters"] < 5.2e6


def test_deepseek_v3_has_671b_parameters_without_its_mtp_module_and_37b_active() -> None:
    model = preset("deepseek-v3").model
    assert model.model_copy(update={"num_nextn_predict_layers": 0}).total_parameters() == pytest.approx(
        671e9, rel=1e-3
    )
    assert model.active_parameters() == pytest.approx(37e9, rel=0.02)
    assert model.moe_layers == tuple(range(3, 62))


def test_deepseek_v3_changes_its_rates_where_the_paper_does() -> None:
    config = preset("deepseek-v3")
    tokens = config.training.batch_size * config.training.sequence_length
    for schedule, change, before, after in (
        (config.balance.update_rate, 14.3e12, 1e-3, 0.0),
        (config.mtp.weight, 10e12, 0.3, 0.1),
    ):
        assert value_at(schedule, int(change / tokens) - 1) == before
        assert value_at(schedule, int(change / tokens) + 1) == after


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_small_presets_route_under_node_limits_and_predict_ahead(name: str) -> None:
    model = preset(name).model
    assert model.num_nextn_predict_layers == 1
    assert model.topk_group < model.n_group
    assert model.total_parameters() < 10e6


def test_an_unknown_preset_is_answered_with_a_guess() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny"):
        preset("tny")
