"""The notes that helm prints after an install: warnings, and the command that submits a job."""

from __future__ import annotations

import re

import pytest

from support.chart import CHART, helm

pytestmark = pytest.mark.chart

SERVE = ("serve.checkpoint=/checkpoints/demo",)
NO_TLS, NO_POLICY, NO_TOKEN = "tls.enabled=false", "networkPolicy.enabled=false", "auth.enabled=false"
KEYS = "serve.apiKeys.existingSecret=a"


def notes(*settings: str) -> str:
    """The notes as helm 4 prints them; helm 3 needs an API server for this."""
    given = [part for setting in settings for part in ("--set", setting)]
    told = helm("helm4", "install", "demo", CHART, "--dry-run=client", *given).stdout
    return told.partition("\nNOTES:\n")[2]


@pytest.mark.parametrize(
    ("settings", "warned_of"),
    [
        ((), []),
        ((NO_TLS,), ["tls.enabled is false"]),
        ((NO_POLICY,), ["networkPolicy.enabled is false"]),
        ((NO_TOKEN,), ["auth.enabled is false"]),
        (
            (NO_TLS, NO_POLICY, NO_TOKEN),
            ["auth.enabled is false", "tls.enabled is false", "networkPolicy.enabled is false"],
        ),
    ],
)
def test_each_protection_that_is_off_has_its_warning(settings: tuple[str, ...], warned_of: list[str]) -> None:
    assert re.findall(r"WARNING: ([^:]*):", notes(*SERVE, *settings)) == warned_of


def test_the_warnings_say_who_can_do_what() -> None:
    assert "raymoe's own ports" not in notes(*SERVE, NO_POLICY), "they ask for a certificate"
    assert "NetworkPolicies alone keep others away" in notes(*SERVE, NO_TLS)
    assert "any client that reaches them may use them" in notes(*SERVE, NO_TLS, NO_POLICY)
    assert "and send requests" in notes(*SERVE, NO_POLICY)
    assert "and send requests" not in notes(*SERVE, NO_POLICY, KEYS)
    assert "and send requests" not in notes("mode=train", NO_POLICY)


@pytest.mark.parametrize("more", [(), ("workerGroups.expert.enabled=false",)])
def test_without_tls_a_job_has_to_say_where_hosts_listen(more: tuple[str, ...]) -> None:
    assert "cluster.interface" not in notes("mode=cluster", *more)
    command = notes("mode=cluster", NO_TLS, *more).partition("ray job submit")[2].partition("\n\n")[0]
    assert command.endswith("--set cluster.interface=node")
    assert all(line.endswith("\\") for line in command.splitlines()[:-1])


def test_what_a_restricted_namespace_refuses_is_said() -> None:
    assert "WARNING: train.submissionMode is SidecarMode" in notes(
        "mode=train", "train.submissionMode=SidecarMode"
    )
    assert "SidecarMode" not in notes("mode=train")
