"""Calls of gRPC from outside, by the Gateway API."""

from __future__ import annotations

import pytest

from support.chart import HELMS, clusters, refusal, render

pytestmark = pytest.mark.chart

SERVE = ("serve.checkpoint=/a", "grpcRoute.enabled=true")


@pytest.mark.parametrize("version", HELMS)
def test_it_leads_to_the_port_of_the_service(version: str) -> None:
    objects = render(version, "serve-outside")
    (route,) = (one for one in objects if one["kind"] == "GRPCRoute")
    (service,) = (one for one in objects if one["kind"] == "RayService")
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend["name"] == f"{service['metadata']['name']}-serve-svc"
    ports = {port["port"]: port for port in service["spec"]["serveService"]["spec"]["ports"]}
    assert ports[backend["port"]]["appProtocol"] == "kubernetes.io/h2c"
    (cluster,) = clusters(objects)
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    opened = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert opened[ports[backend["port"]]["targetPort"]] == 9000
    assert route["spec"]["hostnames"] == ["grpc.raymoe.example"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (SERVE, "grpcRoute.parentRefs is empty: name the Gateway"),
        (
            (*SERVE, "grpcRoute.parentRefs[0].name=a"),
            "grpcRoute.enabled needs a port of gRPC: set serve.grpcPort",
        ),
        (("mode=train", "grpcRoute.enabled=true"), "grpcRoute.enabled is for mode serve"),
        (("serve.checkpoint=/a", "grpcRoute.labels.a=*"), 'grpcRoute.labels.a is "*", which is no value'),
    ],
)
def test_what_leads_nowhere_is_refused(settings: tuple[str, ...], why: str) -> None:
    assert why in refusal("helm4", *settings)
