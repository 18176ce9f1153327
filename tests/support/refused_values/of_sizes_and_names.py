"""Values that KubeRay's operator would refuse, or that cannot work, and the words of their refusal."""

from __future__ import annotations

SERVE = ("serve.checkpoint=/checkpoints/demo",)
TRAIN = ("mode=train",)
CLUSTER = ("mode=cluster",)
FIXED = (*CLUSTER, "autoscaling.enabled=false")
MANAGED = (*SERVE, "tls.certManager.enabled=true")
NO_TLS = (*SERVE, "tls.enabled=false")
NO_CHECKPOINTS = (*SERVE, "checkpoints.enabled=false")
NO_TRUNK = (*SERVE, "workerGroups.trunk.enabled=false")
SCALED = "serve.config.serving.autoscaling"
CPUS = "serve.config.serving.cpus_per_replica"
HALF = (
    *SERVE,
    "workerGroups.trunk.maxReplicas=1",
    'workerGroups.trunk.resources:={"requests": {"cpu": "500m"}}',
)
LONG = "a" * 48

GPU_TRAIN = (*TRAIN, "train.config.training.gpus_per_worker=1")
GPU_HOSTS = "train.config.cluster.gpus_per_host=1"
GPU = '={"limits": {"nvidia.com/gpu": 1}}'

REFUSED = [
    (
        GPU_TRAIN,
        "train.config.training.gpus_per_worker (1) asks for more GPUs than the groups but for experts",
    ),
    ((*SERVE, "serve.config.serving.gpus_per_replica:=0.5"), "gpus_per_replica (0.5) asks for more GPUs"),
    (
        (*TRAIN, GPU_HOSTS),
        "gpus_per_host (1) x workerGroups.expert.hostsPerPod (1) is more than the GPUs of a pod (0)",
    ),
    (
        (*TRAIN, GPU_HOSTS, f"workerGroups.expert.resources:{GPU}", "workerGroups.expert.hostsPerPod=2"),
        "hostsPerPod (2) is more than the GPUs of a pod (1)",
    ),
    ((), "serve.checkpoint is missing"),
    ((*SERVE, f"fullnameOverride={LONG}"), "has 48 characters and a RayService may have 47"),
    ((*TRAIN, f"fullnameOverride={LONG}"), "has 48 characters and a RayJob may have 47"),
    ((*CLUSTER, f"fullnameOverride={LONG}aaaaaa"), "has 54 characters and a RayCluster may have 53"),
    ((*SERVE, "fullnameOverride=1st"), "has to begin with a letter"),
    ((*SERVE, "tls.enabled=false", "tls.existingSecret=a"), "switch TLS on, or remove the secret's name"),
    (
        (*SERVE, "tls.certManager.enabled=true", "tls.existingSecret=a"),
        "tls.existingSecret and tls.certManager are both set",
    ),
    ((*SERVE, "tls.certManager.issuerRef.name=a"), "switch it on, or remove the issuer"),
    ((*NO_TLS, "tls.certManager.enabled=true"), "switch TLS on, or cert-manager off"),
    ((*MANAGED, "tls.certManager.issuerRef.kind=Issuer"), "tls.certManager.issuerRef.name is missing"),
    ((*MANAGED, "tls.certManager.duration=90d"), 'tls.certManager.duration is "90d" and has to be'),
    ((*MANAGED, "tls.certManager.duration=59m"), 'tls.certManager.duration is "59m" and has to be'),
    ((*MANAGED, "tls.certManager.duration=-2160h"), 'tls.certManager.duration is "-2160h" and has to be'),
    ((*MANAGED, "tls.certManager.renewBefore=soon"), 'tls.certManager.renewBefore is "soon" and has to be'),
    (
        (*MANAGED, "tls.certManager.renewBefore=2160h"),
        "renewBefore (2160h) is not less than duration (2160h)",
    ),
    (
        (*MANAGED, "tls.certManager.duration=719h60m"),
        "renewBefore (720h) is not less than duration (719h60m)",
    ),
    ((*SERVE, "rayVersion=2.51.1"), "auth.enabled needs Ray 2.52 or later"),
    ((*SERVE, "rayVersion=2.52.0"), "which Ray 2.53 and later has"),
    ((*SERVE, "workerGroups.expert.minReplicas=9"), "minReplicas (9) is more than maxReplicas (8)"),
    ((*SERVE, "workerGroups.expert.replicas=3"), "replicas is the autoscaler's to set"),
    ((*FIXED, "workerGroups.expert.replicas=9"), "is not between minReplicas (2) and maxReplicas (8)"),
    ((*FIXED, "workerGroups.expert.idleTimeoutSeconds=9"), "idleTimeoutSeconds needs the autoscaler"),
    ((*FIXED, "workerGroups.expert.priority=9"), "priority needs the autoscaler"),
    (
        (*CLUSTER, "workerGroups.expert.priority=9", "rayVersion=2.55.0"),
        "priority needs Ray 2.56 or later",
    ),
    ((*SERVE, "head.rayStartParams.num-cpus=two"), "contradicts the group's resources"),
    ((*SERVE, "workerGroups.trunk.rayStartParams.resources=some"), "contradicts the group's resources"),
    ((*SERVE, "workerGroups.trunk.rayStartParams.labels=a"), "set workerGroups.trunk.rayLabels"),
    ((*SERVE, "head.rayStartParams.redis-password=a"), "set clusterSpec.gcsFaultToleranceOptions"),
    ((*SERVE, "head.env.RAY_REDIS_ADDRESS=a"), "which KubeRay refuses"),
    ((*SERVE, "head.extraEnv[0].name=REDIS_USERNAME"), "which KubeRay refuses"),
    ((*SERVE, "head.env.RAY_enable_autoscaler_v2=yes"), "the chart or KubeRay sets"),
    ((*SERVE, "workerGroups.expert.env.RAY_AUTH_TOKEN=a"), "the chart or KubeRay sets"),
    ((*SERVE, "workerGroups.trunk.env.RAYMOE_TLS_DIR=/a"), "workerGroups.trunk.env sets RAYMOE_TLS_DIR"),
    ((*SERVE, "head.extraEnv[0].name=RAYMOE_TLS_DIR"), "head.env sets RAYMOE_TLS_DIR"),
    (
        (*SERVE, "head.resources.requests.memory=9Gi"),
        "head.resources.limits.memory (8Gi) is less than requests.memory (9Gi)",
    ),
    (
        (*SERVE, "workerDefaults.resources.limits.cpu=1900m"),
        "workerGroups.expert.resources.limits.cpu (1900m) is less than requests.cpu (2)",
    ),
    ((*SERVE, "autoscaling.resources.limits.memory=0.1Gi"), "autoscaling.resources.limits.memory (0.1Gi)"),
    ((*TRAIN, "train.submitter.resources.limits.cpu:=0.4"), "train.submitter.resources.limits.cpu (0.4)"),
    ((*SERVE, "workerGroups.trunk.extraVolumes[0].name=tls"), "trunk.extraVolumes has the name tls"),
    ((*TRAIN, "head.extraVolumes[0].name=job"), "head.extraVolumes has the name job"),
    (
        (*SERVE, 'head.extraVolumeMounts:=[{"name": "a", "mountPath": "/tmp/"}]'),
        "head.extraVolumeMounts has the path /tmp/",
    ),
    (
        (*SERVE, 'workerDefaults.extraVolumeMounts:=[{"name": "a", "mountPath": "/checkpoints"}]'),
        "workerGroups.expert.extraVolumeMounts has the path /checkpoints",
    ),
    ((*SERVE, "head.rayLabels.a b=c"), "no name of a Kubernetes label"),
    ((*SERVE, "head.rayLabels.a=b c"), "no value of a Kubernetes label"),
    ((*SERVE, r"head.podLabels.ray\.io/serve=no"), "by which the chart or KubeRay finds its pods"),
    ((*SERVE, "workerGroups.Mine.role=other"), "a group's name has to begin with a letter"),
    ((*SERVE, "workerGroups.head.role=other"), "be none of head"),
    ((*SERVE, "workerGroups.trunk.hostsPerPod=2"), "hostsPerPod is for expert groups"),
    ((*SERVE, "workerGroups.trunk.rayResources.raymoe_expert_host=a"), "set those"),
    ((*SERVE, "workerGroups.trunk.drainSeconds=180"), "leaves no time after drainSeconds (180)"),
    ((*SERVE, "workerGroups.expert.minAvailable=3"), "no pod could ever be evicted"),
    ((*SERVE, "clusterSpec.rayVersion=2.60.1"), "is the chart's own field: set rayVersion instead"),
    ((*SERVE, "clusterSpec.upgradeStrategy.type=None"), "is the chart's own field"),
    ((*SERVE, "clusterSpec.networkPolicy.mode=DenyAll"), "feature gate RayClusterNetworkPolicy"),
    ((*SERVE, "clusterSpec.tlsOptions.enabled=true"), "feature gate RayClusterMTLS"),
    ((*SERVE, "clusterSpec.historyServerOptions:={}"), "feature gate RayClusterHistoryServer"),
    (
        (*SERVE, "clusterSpec.gcsFaultToleranceOptions.backend=rocksdb"),
        "feature gate GCSFaultToleranceEmbeddedStorage",
    ),
    (
        (
            *SERVE,
            "kuberay.featureGates[0]=GCSFaultToleranceEmbeddedStorage",
            "clusterSpec.gcsFaultToleranceOptions.backend=rocksdb",
            "clusterSpec.gcsFaultToleranceOptions.redisAddress=a",
        ),
        "belongs to the backend redis and the backend is rocksdb",
    ),
    (
        (
            *SERVE,
            "clusterSpec.gcsFaultToleranceOptions.redisAddress=a",
            "clusterSpec.gcsFaultToleranceOptions.storage.size=1Gi",
        ),
        "belongs to the backend rocksdb and the backend is redis",
    ),
    ((*SERVE, "clusterSpec.gcsFaultToleranceOptions.backend=redis"), "redisAddress is missing"),
    ((*TRAIN, "ingress.enabled=true"), "ingress.enabled is for mode serve"),
    ((*TRAIN, "monitoring.dashboard.enabled=true"), "is for mode serve"),
    ((*CLUSTER, "monitoring.prometheusRule.enabled=true"), "is for mode serve"),
    ((*TRAIN, "train.suspend=true", "train.shutdownAfterJobFinishes=false"), "train.suspend needs"),
    ((*TRAIN, "train.config.training.workers=4"), "asks for 4 CPUs"),
    (NO_TRUNK, "cpus_per_replica is 1 and no pod of the groups but for experts has as many CPUs"),
    ((*SERVE, f"{CPUS}:=2.5"), "cpus_per_replica is 2.5 and no pod of the groups but for experts"),
    (
        (*SERVE, "serve.config.serving.replicas=9"),
        "serving.replicas (9) is more than the groups but for experts",
    ),
    ((*SERVE, f"{SCALED}.max_replicas=9"), "autoscaling.max_replicas (9) is more than the groups but for"),
    ((*SERVE, f"{SCALED}.max_replicas=5", f"{CPUS}:=1.5"), "(4, with cpus_per_replica 1.5)"),
    ((*HALF, "serve.config.serving.replicas=11", f"{CPUS}:=0.1"), "(10, with cpus_per_replica 0.1)"),
    (
        (*SERVE, "autoscaling.enabled=false", "serve.config.serving.replicas=3"),
        "raise their replicas or resources",
    ),
    ((*SERVE, f"{SCALED}.min_replicas=2"), "min_replicas (2) is more than max_replicas (1)"),
    (
        (*SERVE, f"{SCALED}.min_replicas=3", f"{SCALED}.max_replicas=2"),
        "serve.config.serving.autoscaling.min_replicas (3) is more than max_replicas (2)",
    ),
    (
        (*SERVE, "serve.config.cluster.autoscaling.min_hosts=5"),
        "serve.config.cluster.autoscaling.min_hosts (5) is more than max_hosts (4)",
    ),
    (
        (*TRAIN, "train.config.cluster.autoscaling.min_hosts=5"),
        "train.config.cluster.autoscaling.min_hosts (5) is more than max_hosts (4)",
    ),
    (("serve.checkpoint=demo",), 'serve.checkpoint is "demo", which is no absolute path'),
    (("serve.checkpoint=gs://models/demo",), 'serve.checkpoint is "gs://models/demo", which is no absolute'),
    (
        (*SERVE, "serve.config.cluster.expert_hosts=9"),
        "is more than the expert groups ever have room for (8)",
    ),
    (
        (*SERVE, "serve.config.cluster.autoscaling.max_hosts=9"),
        "autoscaling.max_hosts (9) is more than the expert groups ever have room for (8)",
    ),
    ((*SERVE, "serve.config.cluster.interface=127.0.0.1"), "is the loopback"),
    ((*SERVE, "serve.config.cluster.interface=localhost"), "interface is the loopback"),
    (
        (*SERVE, "serve.config.serving.front.tls_certificate=/tls/tls.crt"),
        "serve.config.serving.front.tls_certificate has no place in a pod",
    ),
    (
        (
            *SERVE,
            "checkpoints.existingClaim=a",
            "checkpoints.volume.nfs.path=/",
            "checkpoints.volume.nfs.server=a",
        ),
        "are both set",
    ),
    ((*NO_CHECKPOINTS, "checkpoints.existingClaim=a"), "checkpoints.existingClaim is set and"),
    (
        (*NO_CHECKPOINTS, "checkpoints.volume.nfs.path=/", "checkpoints.volume.nfs.server=a"),
        "checkpoints.volume is set and",
    ),
    ((*SERVE, "checkpoints.mountPath=/tmp"), "checkpoints.mountPath is /tmp, where the pods have something"),
    ((*SERVE, "checkpoints.mountPath=/etc/raymoe-tls/"), "checkpoints.mountPath is /etc/raymoe-tls/, where"),
    ((*TRAIN, "checkpoints.mountPath=/etc/raymoe"), "checkpoints.mountPath is /etc/raymoe, where"),
    ((*SERVE, "checkpoints.mountPath=/"), "checkpoints.mountPath is /, where"),
    ((*SERVE, "auth.enabled=false", "auth.existingSecret=a"), "auth.existingSecret is set and"),
    ((*TRAIN, "checkpoints.enabled=false"), "nothing would be left of the run"),
    (
        (*SERVE, "serviceAccount.create=false", "serviceAccount.name=a", "serviceAccount.annotations.a=b"),
        "are for the one that the chart makes",
    ),
]

UNFIT = [
    ("tls.days=0", "tls.days"),
    ("tls.days=36501", "tls.days"),
    (
        'tls.certManager:={"enabled": true, "issuerRef": {"name": "a", "sort": "Issuer"}}',
        "tls.certManager.issuerRef",
    ),
    ("serve.config.serving.front.header_bytes=1", "front.header_bytes"),
    ("serve.config.serving.front.body_memory=1", "front.body_memory"),
    ("head.minAvailable=-1", "head.minAvailable"),
    ("head.minAvailable=2", "head.minAvailable"),
    ("checkpoints.mountPath=models", "checkpoints.mountPath"),
    ("checkpoints.mountPath=/a:b", "checkpoints.mountPath"),
    ("checkpoints.volume.nsf.path=/", "checkpoints.volume"),
    ('checkpoints.volume:={"nfs": {}, "csi": {}}', "checkpoints.volume"),
    ("image.repository=", "image.repository"),
]
"""Values that the schema refuses, and the name by which it does."""

TAKEN = [
    (*MANAGED, "tls.certManager.duration=1h0m0s", "tls.certManager.renewBefore=5.5m"),
    (*MANAGED, "tls.certManager.duration=null", "tls.certManager.renewBefore=null"),
    (*MANAGED, "tls.certManager.issuerRef.name=a", "tls.certManager.issuerRef.group=example.com"),
    (*NO_TLS, "head.extraVolumes[0].name=tls", "checkpoints.mountPath=/etc/raymoe-tls"),
    (*NO_CHECKPOINTS, "head.extraVolumes[0].name=checkpoints"),
    (*SERVE, "head.extraVolumes[0].name=job", "checkpoints.mountPath=/tmp/models"),
    (*TRAIN, "workerGroups.trunk.extraVolumes[0].name=job"),
    (*SERVE, "head.minAvailable=0", "tls.days=36500"),
    (*SERVE, "head.resources.limits=null", "workerDefaults.resources.requests=null"),
    (*SERVE, "head.resources.limits.memory=6144Mi", "head.resources.limits.cpu=2000m"),
    (*FIXED, "autoscaling.resources.limits.memory=1Mi", "train.submitter.resources.limits.cpu=1m"),
    (*NO_TRUNK, f"{CPUS}=0"),
    (*NO_TRUNK, "workerGroups.mine.role=other"),
    (*SERVE, "serve.config.serving.replicas=8"),
    (*SERVE, f"{SCALED}.min_replicas=0", f"{SCALED}.max_replicas=8"),
    (*SERVE, f"{SCALED}:={{}}", "serve.config.serving.replicas=99"),
    (*SERVE, "serve.config.serving.replicas=16", f"{CPUS}:=0.5"),
    (*HALF, "serve.config.serving.replicas=10", f"{CPUS}:=0.1"),  # Ray counts half a CPU as one
    (
        *SERVE,
        "autoscaling.enabled=false",
        'workerGroups.trunk.resources:={"limits": {"memory": "8Gi"}}',  # then Ray counts the node's CPUs
        "serve.config.serving.replicas=99",
    ),
    (*SERVE, "serve.config.cluster.autoscaling.min_hosts=5", "serve.config.cluster.autoscaling.max_hosts=8"),
    (*TRAIN, "train.config.training.workers=4", "train.config.training.cpus_per_worker=0"),
    (*SERVE, "tls.enabled=false", "workerGroups.trunk.env.RAYMOE_TLS_DIR=/etc/own"),
]
"""What is next to a refusal, and works."""

__all__ = ["CLUSTER", "FIXED", "LONG", "REFUSED", "SERVE", "TAKEN", "TRAIN", "UNFIT"]
