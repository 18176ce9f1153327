"""Where a served model listens in a pod: the front, Serve's proxy behind it, and what reaches them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from jobs.serving.ports import ListenAddress
from support.chart import CHART, HELMS, Manifest, helm, manifests, pods, refusal, render

pytestmark = pytest.mark.chart

SERVE = ("--set", "serve.checkpoint=/checkpoints/demo")


def made(*more: str, version: str = "helm4") -> list[Manifest]:
    return manifests(helm(version, "template", "demo", CHART, *SERVE, *more).stdout)


def serve_config(objects: list[Manifest]) -> dict[str, Any]:
    (service,) = (one for one in objects if one["kind"] == "RayService")
    return dict(yaml.safe_load(service["spec"]["serveConfigV2"]))


def ports(pod: Manifest) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in pod["spec"]["containers"][0]["ports"]}


def let_in(objects: list[Manifest], name: str, peer: str) -> set[int]:
    """Ports of a NetworkPolicy for the peers that have this word in them."""
    (policy,) = (one for one in objects if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == name)
    rules = [rule for rule in policy["spec"]["ingress"] if peer in str(rule.get("from"))]
    return {port["port"] for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_front_has_the_port_of_clients(version: str, host: str) -> None:
    objects = made("--set", f"listenHost={host}", version=version)
    config = serve_config(objects)
    listen = ListenAddress.from_dict(config["applications"][0]["args"]["listen"])
    assert (listen.host, listen.port, listen.grpc_port) == (host, 8000, None)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8001}, "only the front reaches it"
    known = ports(pods(objects)["head"])
    assert known["serve"] == listen.port, "which KubeRay asks for the proxy's health"
    assert known["serve-metrics"] == listen.metrics_port == 8002
    assert 8001 not in known.values()
    for name in ("trunk", "expert"):
        assert not {"serve", "serve-metrics", "grpc"} & set(ports(pods(objects)[name]))


@pytest.mark.parametrize("version", HELMS)
def test_grpc_has_a_port_of_its_own(version: str) -> None:
    more = (
        "--set",
        "serve.grpcPort=9000",
        "--set",
        "networkPolicy.serveFrom[0].podSelector.matchLabels.a=client",
    )
    objects = made(*more, version=version)
    (application,) = serve_config(objects)["applications"]
    assert application["args"]["listen"]["grpc_port"] == 9000
    assert ports(pods(objects)["head"])["grpc"] == 9000
    (service,) = (one for one in objects if one["kind"] == "RayService")
    found = {one["name"]: one for one in service["spec"]["serveService"]["spec"]["ports"]}
    assert found["grpc"] == {
        "name": "grpc",
        "port": 9000,
        "targetPort": "grpc",
        "appProtocol": "kubernetes.io/h2c",
    }
    assert let_in(objects, "demo-raymoe-head", "client") == {8000, 9000}


def test_prometheus_needs_no_key_and_reaches_metrics_alone() -> None:
    objects = render("helm4", "serve-full")
    (monitor,) = (one for one in objects if one["kind"] == "PodMonitor")
    asked = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    assert asked == {"metrics", "dash-metrics", "as-metrics", "serve-metrics"}
    assert not any("authorization" in one for one in monitor["spec"]["podMetricsEndpoints"])
    head = ports(pods(objects)["head"])
    reached = let_in(objects, "demo-raymoe", "monitoring") | let_in(objects, "demo-raymoe-head", "monitoring")
    assert reached == {head[name] for name in asked}


def test_what_prometheus_reads_is_there_in_every_mode() -> None:
    for values in ("cluster", "train", "serve-fixed"):
        file = CHART / "ci" / f"{values}.yaml"
        more = ("--values", file, "--set", "monitoring.podMonitor.enabled=true")
        objects = manifests(helm("helm4", "template", "demo", CHART, *more).stdout)
        (monitor,) = (one for one in objects if one["kind"] == "PodMonitor")
        asked = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
        assert asked <= set(ports(pods(objects)["head"])), values
        assert ("serve-metrics" in asked) is (values == "serve-fixed")
        assert ("as-metrics" in asked) is (values != "serve-fixed"), "its values have no autoscaler"


def test_a_port_with_another_use_is_refused() -> None:
    why = "serve.grpcPort is 8265, which the head has another use for"
    assert why in refusal("helm4", SERVE[1], "serve.grpcPort=8265")
