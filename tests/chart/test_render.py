"""Renders of every value set by both versions of helm, compared with golden renders and schemas."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from jobs.config.config_file import load_config
from jobs.serving.config import ServeConfig
from jobs.serving.ports import ListenAddress
from support.chart import (
    CHART,
    HELMS,
    KUBE,
    NO_KUBE,
    ROOT,
    SETS,
    TOOLS,
    clusters,
    golden,
    helm,
    manifests,
    pods,
    render,
)

pytestmark = [
    pytest.mark.chart,
    # KubeRay's schemas are opened by a script that leaves its files to the interpreter.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray Serve, as it is imported
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CHECKS = TOOLS / "checks" / "bin"
OTHERS = ("ray.io/", "monitoring.coreos.com/")


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("values", SETS)
def test_lint(version: str, values: str) -> None:
    helm(version, "lint", "--strict", CHART, "--values", CHART / "ci" / f"{values}.yaml")


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("values", SETS)
def test_golden(version: str, values: str) -> None:
    expected = list(yaml.load_all(golden(values).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    assert render(version, values) == expected, "run python tests/support/chart.py and look at what changed"


def test_no_golden_render_is_left_over() -> None:
    assert sorted(file.stem for file in golden("serve").parent.iterdir()) == SETS


@pytest.fixture(scope="module")
def schemas() -> Any:
    """Validators of KubeRay's custom resources."""
    if not KUBE.is_dir():
        pytest.skip(NO_KUBE)
    spec = importlib.util.spec_from_file_location("kuberay_crds", KUBE / "kuberay_crds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def validators(schemas: Any) -> Any:
    return schemas.load()


@pytest.mark.parametrize("values", SETS)
def test_ray_resources_are_as_kuberay_has_them(values: str, schemas: Any, validators: Any) -> None:
    rays = [one for one in render("helm4", values) if one["apiVersion"].startswith("ray.io/")]
    assert len(rays) == 1
    for one in rays:
        validator = validators[(one["apiVersion"], one["kind"])]
        problems = list(validator.iter_errors(schemas.apply(validator.schema, one)))
        assert not problems, [f"{list(at.absolute_path)}: {at.message[:200]}" for at in problems]


def test_core_objects_are_as_kubernetes_has_them(tmp_path: Path) -> None:
    files = []
    for values in SETS:
        objects = render("helm4", values)
        core = [one for one in objects if not one["apiVersion"].startswith(OTHERS)]
        files.append(tmp_path / f"{values}.yaml")
        files[-1].write_text(yaml.safe_dump_all([*core, *pods(objects).values()]), encoding="utf-8")
    command = [str(CHECKS / "kubernetes-validate"), "--strict", "-k", "1.37", *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("values", SETS)
def test_groups_are_what_raymoe_counts_on(values: str) -> None:
    objects = render("helm4", values)
    (cluster,) = clusters(objects)
    scales = cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["resources"] == {"CPU": "0"}
    for group in cluster["workerGroupSpecs"]:
        assert ("replicas" in group) is not scales
        pod = group["template"]["spec"]
        ports = {port["name"] for port in pod["containers"][0]["ports"]}
        assert "serve" not in ports, "the Service would send requests to a pod without a proxy"
        if "raymoe_expert_host" in group.get("resources", {}):
            assert group["resources"]["CPU"] == "0"
    for name, pod in pods(objects).items():
        wants = name == "head" and scales
        assert pod["spec"]["automountServiceAccountToken"] is wants


def test_the_configuration_of_every_value_set_is_one_of_raymoe() -> None:
    from ray.serve.schema import ServeDeploySchema  # warns as it is imported

    for values in SETS:
        for one in render("helm4", values):
            if one["kind"] == "RayService":
                (application,) = ServeDeploySchema.model_validate(
                    yaml.safe_load(one["spec"]["serveConfigV2"])
                ).model_dump()["applications"]
                arguments = application["args"]
                assert arguments.pop("checkpoint")
                assert ListenAddress.from_dict(arguments.pop("listen")).metrics_port == 8002
                config = ServeConfig.from_dict(arguments)
                assert config.cluster.cpus_per_host == 0 or config.cluster.expert_hosts == 0
            if one["kind"] == "ConfigMap" and "train.sh" in one.get("data", {}):
                script = one["data"]["train.sh"]
                words = shlex.split(script.partition("set -- \\\n")[2].partition("--json")[0])
                sets = [word for word in words if word not in ("--set", "\n")]
                name = script.partition("--preset ")[2].split()[0]
                assert load_config(preset_name=name, overrides=sets).cluster.start_timeout == 1800


@pytest.mark.parametrize("values", SETS)
def test_the_autoscaler_knows_what_groups_offer(values: str) -> None:
    (cluster,) = clusters(render("helm4", values))
    if not cluster["enableInTreeAutoscaling"]:
        return
    resource = {"metadata": {"name": "demo", "namespace": "moe"}, "spec": cluster}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types.pop("headgroup")["resources"]["CPU"] == 0
    assert len(types) == len(cluster["workerGroupSpecs"])
    for group in cluster["workerGroupSpecs"]:
        known = types[group["groupName"]]
        offers = known["resources"]
        least, most = (group[name] * group.get("numOfHosts", 1) for name in ("minReplicas", "maxReplicas"))
        assert (known["min_workers"], known["max_workers"]) == (least, most)
        if group["groupName"].startswith("expert"):
            assert offers["CPU"] == 0 and offers["raymoe_expert_host"] >= 1
        else:
            assert offers["CPU"] >= 1 and "raymoe_expert_host" not in offers


@pytest.mark.parametrize("more", [(), ("--set-string", "workerGroups.trunk.rayResources.fast_disk=1")])
def test_a_part_of_a_cpu_counts_as_a_whole_one(more: tuple[str, ...]) -> None:
    setting = 'workerGroups.trunk.resources={"requests": {"cpu": "1500m"}}'
    text = helm("helm4", "template", "demo", CHART, "--set", "mode=cluster", "--set-json", setting, *more)
    (cluster,) = clusters(manifests(text.stdout))
    resource = {"metadata": {"name": "demo", "namespace": "moe"}, "spec": cluster}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["trunk"]["resources"]["CPU"] == 2, (
        "as KubeRay has it, and as the chart checks replicas against"
    )


def test_nothing_names_this_repository_or_a_registry() -> None:
    for file in [*CHART.rglob("*.yaml"), *CHART.rglob("*.tpl"), ROOT / "docs" / "kubernetes.md"]:
        text = file.read_text(encoding="utf-8")
        assert "docker.io" not in text and "ghcr.io" not in text and "quay.io" not in text, file
