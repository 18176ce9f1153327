"""Whether the hosts of a job may talk to each other in plain text."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from channels.grpc import tls
from errors import ResourceError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's use of deprecated names
    from actors import remote


def machines(count: int) -> SimpleNamespace:
    nodes = [{"NodeManagerAddress": f"192.0.2.{index}", "Alive": True} for index in range(count)]
    util = SimpleNamespace(get_node_ip_address=lambda: "192.0.2.0")
    return SimpleNamespace(nodes=lambda: nodes, util=util)


def test_several_machines_without_tls_are_refused_until_the_network_is_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(tls.VARIABLE, raising=False)
    monkeypatch.setattr(remote, "ray", machines(2))
    with pytest.raises(ResourceError, match="2 machines, and without TLS") as caught:
        remote.require_reach(None)
    assert "\n" not in str(caught.value) and "cluster.interface=node" in str(caught.value)
    remote.require_reach("node")
    monkeypatch.setattr(remote, "ray", machines(1))
    remote.require_reach(None)
    assert remote.listening_address(None) == "127.0.0.1"
    assert remote.listening_address("node") == "192.0.2.0"
