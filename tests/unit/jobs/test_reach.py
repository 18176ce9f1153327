"""Whether the hosts of a job may talk to each other in plain text."""

from __future__ import annotations

import socket
import warnings
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.rpc.control_server import ControlServer
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


@pytest.mark.parametrize(
    ("interface", "own", "expected"),
    [
        ("node", "fd00::5", "[fd00::5]"),
        ("::1", "192.0.2.0", "[::1]"),
        ("[::1]", "192.0.2.0", "[::1]"),
        ("localhost", "fd00::5", "localhost"),
        (None, "fd00::5", "127.0.0.1"),
    ],
)
def test_an_ipv6_address_has_brackets_before_a_port(
    monkeypatch: pytest.MonkeyPatch, interface: str | None, own: str, expected: str
) -> None:
    monkeypatch.delenv(tls.VARIABLE, raising=False)
    util = SimpleNamespace(get_node_ip_address=lambda: own)
    monkeypatch.setattr(remote, "ray", SimpleNamespace(util=util))
    assert remote.listening_address(interface) == expected


@pytest.mark.parametrize("interface", ["::1", "127.0.0.1"])
def test_a_server_listens_on_ipv6_as_on_ipv4(interface: str) -> None:
    if interface == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    host = remote.listening_address(interface)
    with closing(ControlServer(lambda server: None, host=host)) as server:
        kind, _, target = server.address.partition(":")
        bare, _, port = target.rpartition(":")
        assert (kind, bare) == ("grpc", host)
        with socket.create_connection((interface, int(port)), timeout=10):
            pass


def test_an_address_of_another_machine_names_the_field() -> None:
    with pytest.raises(ResourceError, match=r"cannot listen on 192\.0\.2\.1:0; cluster\.interface") as caught:
        ControlServer(lambda server: None, host="192.0.2.1")
    assert "GRPC_VERBOSITY" not in str(caught.value)
