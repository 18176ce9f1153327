from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.host.checkpoint_part import SavedMoments
from cluster.placement import plan_placement
from cluster.topology import experts_held
from errors import CheckpointError
from support.moving_cluster import CheckpointSource
from support.tiny_cluster import CONFIG, LAYERS, SETTINGS, TinyCluster, tokens


def train(cluster: TinyCluster, step: int) -> None:
    rows, idx, gates = tokens(12, seed=step, grad=True)
    lane = cluster.lane(step)
    for layer in LAYERS:
        lane.dispatch(layer, rows, idx, gates).combine().square().sum().backward()
    cluster.commit(step)


def test_another_placement_goes_on_from_the_files_to_the_bit(tmp_path: Path) -> None:
    two = TinyCluster(2)
    for step in range(2):
        train(two, step)
    files = [name for host in two.hosts for name in host.save(str(tmp_path))]
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    three = TinyCluster(3, step=2)
    holders = plan_placement(len(LAYERS), CONFIG.n_routed_experts, CONFIG.n_group, 3)
    three.hosts[:] = [
        ExpertHost(
            f"host-{index}",
            CONFIG,
            InitialExperts(
                source=CheckpointSource(tmp_path),
                experts=experts_held(holders, LAYERS, index),
                moments=SavedMoments(tmp_path),
                step=2,
            ),
            settings=HostSettings(optimizer=SETTINGS, dtype=torch.float64),
        )
        for index in range(3)
    ]
    for server, host in zip(three.servers, three.hosts, strict=True):
        server.handler = host.handle
    for layer in LAYERS:
        assert all(torch.equal(a, b) for a, b in zip(two.weights(layer), three.weights(layer), strict=True))
    for cluster in (two, three):
        train(cluster, 2)
    for layer in LAYERS:
        for a, b in zip(two.weights(layer), three.weights(layer), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_host_writes_only_its_own_experts_and_no_moments_in_serving(tmp_path: Path) -> None:
    host = TinyCluster(4, train=False).hosts[2]
    (name,) = host.save(str(tmp_path))
    names = set(load_file(tmp_path / name))
    assert len(names) == len(LAYERS) * 2 * 3
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in names


def test_missing_moments_name_the_tensor(tmp_path: Path) -> None:
    TinyCluster(2).hosts[0].save(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.7\.gate_proj\.weight\.exp_avg"):
        SavedMoments(tmp_path).moments(1, 7)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "optimizer-host-0.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"optimizer-host-0\.safetensors"):
        SavedMoments(tmp_path)
