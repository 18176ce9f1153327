"""Values of pods that Kubernetes or KubeRay would refuse, and the words of their refusal."""

from __future__ import annotations

import json

from support.refused_values.of_sizes_and_names import SERVE, TRAIN


def beside(name: str = "a", **more: object) -> str:
    """A list of one container, as JSON."""
    return json.dumps([{"name": name, "image": "b", **more}])


REFUSED = [
    (
        (*SERVE, "head.podSpec.tolerations:=[]"),
        "head.podSpec.tolerations is the chart's own field: set head.tolerations instead",
    ),
    ((*SERVE, "tests.podSpec.volumes:=[]"), "set tests.extraVolumes instead"),
    ((*TRAIN, "train.submitter.podSpec.securityContext:={}"), "set train.submitter.podSecurityContext"),
    ((*SERVE, "head.podSpec.restartPolicy=Always"), "head.podSpec.restartPolicy follows from autoscaling"),
    (
        (*SERVE, "workerGroups.trunk.podSpec.terminationGracePeriodSeconds=5"),
        "set workerGroups.trunk.terminationGracePeriodSeconds instead",
    ),
    ((*SERVE, "podDefaults.containerSpec.image=a"), "head.containerSpec.image is the chart's own field"),
    ((*SERVE, "head.containerSpec.volumeMounts:=[]"), "set head.extraVolumeMounts instead"),
    ((*SERVE, "head.containerSpec.name=a"), "head.containerSpec.name is that by which KubeRay"),
    ((*SERVE, "head.groupSpec.rayStartParams.a=b"), "set head.rayStartParams instead"),
    ((*SERVE, "workerGroups.trunk.groupSpec.replicas=2"), "set workerGroups.trunk.replicas instead"),
    ((*SERVE, "workerGroups.trunk.groupSpec.groupName=a"), "groupName is the group's name in workerGroups"),
    ((*SERVE, "workerGroups.trunk.groupSpec.suspend=true"), "is not taken by KubeRay with its autoscaler"),
    ((*SERVE, "autoscaling.options.image=a"), "set autoscaling.image instead"),
    ((*SERVE, "autoscaling.options.version=v1"), "autoscaling.options.version is v2"),
    (
        (*SERVE, 'autoscaling.extraVolumeMounts:=[{"name": "a", "mountPath": "/a"}]'),
        "autoscaling.extraVolumeMounts names a, and the pod has no such volume: add it to head.extraVolumes",
    ),
    (
        (*SERVE, 'autoscaling.extraVolumeMounts:=[{"name": "home", "mountPath": "/tmp"}]'),
        "autoscaling.extraVolumeMounts has the path /tmp",
    ),
    (
        (*SERVE, 'head.extraVolumeMounts:=[{"name": "a", "mountPath": "/a"}]'),
        "head.extraVolumeMounts names a, and the pod has no such volume",
    ),
    (
        (*SERVE, 'head.extraVolumes:=[{"name": "a"}, {"name": "a"}]'),
        "head.extraVolumes has the name a, which another volume of the pod has",
    ),
    ((*TRAIN, 'train.submitter.extraVolumes:=[{"name": "scratch"}]'), "submitter.extraVolumes has the name"),
    (
        (*SERVE, 'head.extraEnv:=[{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]'),
        "head.extraEnv sets A twice",
    ),
    (
        (*SERVE, 'workerGroups.trunk.resources:={"claims": [{"name": "a"}]}'),
        "trunk.resources.claims has the name a and the pod has no such claim",
    ),
    (
        (*SERVE, f"head.extraContainers:={beside('autoscaler')}"),
        "head.extraContainers has the name autoscaler, which another container of the pod has",
    ),
    (
        (*SERVE, f"tests.initContainers:={beside()}", f"tests.extraContainers:={beside()}"),
        "tests.extraContainers has the name a, which another container of the pod has",
    ),
    (
        (*SERVE, f"head.initContainers:={beside(volumeMounts=[{'name': 'v', 'mountPath': '/v'}])}"),
        "head.initContainers: a mounts v, and the pod has no such volume",
    ),
    ((*SERVE, "tests.resources.limits.cpu=50m"), "tests.resources.limits.cpu (50m) is less than requests"),
    ((*SERVE, r"tests.podLabels.a b=c"), "tests.podLabels has the key"),
    (
        (*TRAIN, r"train.submitter.podLabels.app\.kubernetes\.io/component=a"),
        "train.submitter sets the label app.kubernetes.io/component",
    ),
]

UNFIT = [
    ("head.podSpec.containers:=[]", "head.podSpec"),
    ("head.podSpec.hostNetworks=true", "head.podSpec"),
    ("head.containerSpec.livenessProbe.httpGet.ports=1", "httpGet"),
    ('podDefaults.tolerations:=[{"keys": "a"}]', "podDefaults.tolerations.0"),
    ('workerGroups.trunk.initContainers:=[{"image": "a"}]', "initContainers.0"),
    ("head.affinity.nodeAfinity.a=b", "head.affinity"),
    ("autoscaling.options.idle=1", "autoscaling.options"),
    ("clusterSpec.headServiceAnnotation.a=b", "clusterSpec"),
    ("clusterSpec.workerGroupSpecs:=[]", "clusterSpec"),
    ("workerGroups.trunk.groupSpec.template:={}", "groupSpec"),
]
"""What KubeRay's schema does not have is named."""

TAKEN = [
    (*SERVE, "tests.podSpec.terminationGracePeriodSeconds=5", "head.podSpec.priority=5"),
    (*SERVE, "head.env.HOME=/a", "head.env.NUMBA_CACHE_DIR=/a", "podDefaults.env.RAY_USAGE_STATS_ENABLED=on"),
    (*SERVE, 'autoscaling.extraVolumeMounts:=[{"name": "shared-memory", "mountPath": "/dev/shm"}]'),
    (*SERVE, "autoscaling.enabled=false", "workerGroups.trunk.groupSpec.suspend=true"),
    (*TRAIN, "train.submissionMode=HTTPMode", "train.submitter.podSpec.volumes:=[]"),
    (*SERVE, "podDefaults.extraVolumes[0].name=a", "head.extraVolumes[0].name=b"),
]

__all__ = ["REFUSED", "TAKEN", "UNFIT"]
