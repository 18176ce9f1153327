"""Ray's object store fits into /dev/shm in all pods, by Ray's own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray._common.utils
import ray._private.utils
from ray._private.services import determine_plasma_store_config

from support.chart import CHART, SETS, clusters, helm, manifests, refusal, render

pytestmark = pytest.mark.chart

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}
SERVE = "serve.checkpoint=/checkpoints/demo"


def in_bytes(quantity: str) -> int:
    """Bytes of a Kubernetes quantity with a whole number."""
    unit = quantity.lstrip("0123456789")
    return int(quantity.removesuffix(unit)) * UNITS.get(unit, 1)


def stores(objects: list[dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    """Bytes of the object store, of /dev/shm and of memory, by the name of the group."""
    found = {}
    (cluster,) = clusters(objects)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        (shared,) = (one["emptyDir"] for one in spec["volumes"] if one["name"] == "shared-memory")
        assert shared["medium"] == "Memory"
        (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "shared-memory")
        assert mount["mountPath"] == "/dev/shm"
        store = int(group["rayStartParams"]["object-store-memory"])
        limit = spec["containers"][0]["resources"]["limits"]["memory"]
        found[group.get("groupName", "head")] = store, in_bytes(shared["sizeLimit"]), in_bytes(limit)
    return found


def put_where(store: int, shared: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Ray puts an object store, in a pod with so much shared memory."""
    monkeypatch.setattr(ray._private.utils, "get_shared_memory_bytes", lambda: shared)
    monkeypatch.setattr(ray._common.utils, "get_system_memory", lambda: memory)
    return str(determine_plasma_store_config(store, "/tmp")[0])


@pytest.mark.parametrize("values", SETS)
def test_every_pod_has_its_object_store_in_shared_memory(
    values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (store, shared, memory) in stores(render("helm4", values)).items():
        assert put_where(store, shared, memory, monkeypatch) == "/dev/shm", name
        assert shared - store >= shared // 10, f"{name}: others keep things in /dev/shm too"
        assert put_where(shared + 1, shared, memory, monkeypatch) == "/tmp", "what the chart refuses"


def test_it_follows_the_size_of_the_shared_memory(tmp_path: Path) -> None:
    settings = [
        "head.sharedMemory=4G",
        "workerDefaults.sharedMemory=2Gi",
        "workerGroups.expert.sharedMemory=400Mi",
    ]
    settings.append("workerGroups.trunk.rayStartParams.object-store-memory=2147483648")
    given = [part for setting in settings[:3] for part in ("--set", setting)]
    given += ["--set-string", settings[3]]
    found = stores(manifests(helm("helm4", "template", "demo", CHART, "--set", SERVE, *given).stdout))
    assert found["head"][:2] == (3_200_000_000, 4_000_000_000)
    assert found["expert"][:2] == (335_544_320, 419_430_400)
    assert found["trunk"][:2] == (2_147_483_648, 2_147_483_648), "all of it may be asked for"


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (
            "head.rayStartParams.object-store-memory=2147483649",
            "head.rayStartParams.object-store-memory (2147483649) is more than head.sharedMemory (2Gi)",
        ),
        (
            "workerDefaults.rayStartParams.object-store-memory=1073741825",
            "workerGroups.expert.rayStartParams.object-store-memory (1073741825) is more than",
        ),
        (
            "workerGroups.trunk.rayStartParams.object-store-memory=1Gi",
            'object-store-memory is "1Gi" and has to be a number of bytes, such as "858993459"',
        ),
        ("workerGroups.trunk.rayStartParams.object-store-memory=78643199", "is less than the 78643200 bytes"),
        ("workerGroups.expert.sharedMemory=93Mi", "set 94Mi or more"),
        ("head.sharedMemory=9Gi", "head.sharedMemory (9Gi) is more than resources.limits.memory (8Gi)"),
    ],
)
def test_one_that_does_not_fit_is_refused(setting: str, why: str) -> None:
    name, _, value = setting.partition("=")
    assert why in refusal("helm4", SERVE, f'{name}:="{value}"')


@pytest.mark.parametrize(
    "setting",
    [
        "workerGroups.expert.sharedMemory=94Mi",
        "head.sharedMemory=8Gi",
        "workerGroups.trunk.rayStartParams.object-store-memory=78643200",
    ],
)
def test_one_that_just_fits_is_taken(setting: str) -> None:
    name, _, value = setting.partition("=")
    assert refusal("helm4", SERVE, f'{name}:="{value}"') == ""
