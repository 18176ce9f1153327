"""Values of labels, Service, routes, monitoring and job that cannot work, and the words of their refusal."""

from __future__ import annotations

from support.refused_values.of_sizes_and_names import SERVE, TRAIN

QUEUE = r"labels.kueue\.x-k8s\.io/queue-name=research"
FIXED = "autoscaling.enabled=false"
RULES = 'train.deletionStrategy:={"deletionRules": [{"policy": "%s", "condition": {"jobStatus": "FAILED"}}]}'
BOTH = 'train.deletionStrategy:={"onSuccess": {"policy": "%s"}, "onFailure": {"policy": "DeleteCluster"}}'
KEEP = "train.shutdownAfterJobFinishes=false"
MONITOR = (*SERVE, "monitoring.podMonitor.enabled=true")

REFUSED = [
    (
        (*SERVE, r"commonLabels.app\.kubernetes\.io/name=a"),
        "commonLabels sets the label app.kubernetes.io/name",
    ),
    ((*SERVE, r"commonLabels.ray\.io/cluster=a"), "commonLabels sets the label ray.io/cluster"),
    (
        (*SERVE, "commonLabels.team=a b"),
        'commonLabels.team is "a b", which is no value of a Kubernetes label',
    ),
    ((*SERVE, "commonLabels.a b=c"), 'commonLabels has the key "a b", which is no name'),
    ((*SERVE, r"serve.labels.app\.kubernetes\.io/instance=a"), "serve.labels sets the label"),
    ((*SERVE, "serve.service.labels.team=a b"), 'serve.service.labels.team is "a b"'),
    ((*SERVE, "monitoring.dashboard.labels.team=a b"), 'monitoring.dashboard.labels.team is "a b"'),
    ((*SERVE, "listenHost=127.0.0.1"), 'listenHost is "127.0.0.1", the loopback'),
    ((*SERVE, "listenHost=::1"), 'listenHost is "::1", the loopback'),
    ((*SERVE, "serve.service.nodePort=30000"), "serve.service.nodePort is for the types NodePort and"),
    ((*SERVE, "serve.service.externalTrafficPolicy=Local"), "externalTrafficPolicy is for the types"),
    ((*SERVE, "serve.service.loadBalancerClass=a"), "loadBalancerClass is for the type LoadBalancer"),
    (
        (*SERVE, "serve.service.type=NodePort", "serve.service.loadBalancerSourceRanges[0]=10.0.0.0/8"),
        "loadBalancerSourceRanges is for the type LoadBalancer, and the type is NodePort",
    ),
    ((*SERVE, "httpRoute.enabled=true"), "httpRoute.parentRefs is empty"),
    ((*TRAIN, "httpRoute.enabled=true"), "httpRoute.enabled is for mode serve"),
    ((*MONITOR, "monitoring.podMonitor.authorization.type=Bearer"), "authorization.credentials is missing"),
    ((*MONITOR, "monitoring.podMonitor.scrapeTimeout=1m"), "scrapeTimeout (1m) is more than interval (15s)"),
    ((*TRAIN, f"train.{QUEUE}"), "takes pods of a fixed number: set autoscaling.enabled to false"),
    ((*SERVE, f"serve.{QUEUE}"), "takes pods of a fixed number: set autoscaling.enabled to false"),
    (("mode=cluster", r"commonLabels.kueue\.x-k8s\.io/queue-name=a"), "takes pods of a fixed number"),
    ((*TRAIN, FIXED, f"train.{QUEUE}", KEEP), "which needs train.shutdownAfterJobFinishes"),
    (
        (*TRAIN, FIXED, f"train.{QUEUE}", *(f"workerGroups.g{number}.role=other" for number in range(6))),
        "which takes 7 worker groups, and workerGroups has 8",
    ),
    ((*TRAIN, RULES % "DeleteCluster"), "and so does train.shutdownAfterJobFinishes"),
    ((*TRAIN, KEEP, RULES % "DeleteWorkers"), "DeleteWorkers, which needs a cluster without autoscaler"),
    ((*TRAIN, BOTH % "DeleteNone"), "DeleteNone, and train.shutdownAfterJobFinishes is true"),
    ((*TRAIN, "train.deletionStrategy.onSuccess.policy=DeleteSelf"), "has one of onSuccess and onFailure"),
    (
        (*TRAIN, KEEP, RULES % "DeleteSelf", "train.deletionStrategy.onSuccess.policy=DeleteSelf"),
        "has deletionRules beside onSuccess or onFailure",
    ),
    (
        (*TRAIN, "train.submissionMode=SidecarMode", "jobSpec.submitterConfig.backoffLimit=1"),
        "jobSpec.submitterConfig is for a submitter with a pod of its own",
    ),
]

TAKEN = [
    (*TRAIN, FIXED, f"train.{QUEUE}"),
    (*TRAIN, f"train.{QUEUE}", r'train.annotations.kueue\.x-k8s\.io/elastic-job:="true"'),
    (*TRAIN, BOTH % "DeleteSelf"),
    (*TRAIN, KEEP, FIXED, RULES % "DeleteWorkers"),
    (*MONITOR, "monitoring.podMonitor.scrapeTimeout=15000ms"),
    (*SERVE, "serve.service.type=NodePort", "serve.service.nodePort=30000"),
    (*SERVE, "listenHost=::"),
]

UNFIT = [
    ("serve.managedBy=me", "serve.managedBy"),
    ("serviceSpec.excludeHeadPodFromServeSvc=true", "serviceSpec"),
    ("jobSpec.clusterSelector.a=b", "jobSpec"),
    ("networkPolicy.apiServer.cidrs[0]=10.0.0.1", "networkPolicy.apiServer.cidrs"),
    ("networkPolicy.apiServer.cidrs:=[]", "networkPolicy.apiServer.cidrs"),
    ("serve.service.ipFamilies[0]=IPv5", "serve.service.ipFamilies"),
    ("ingress.paths[0]=v1", "ingress.paths"),
    ("httpRoute.pathPrefix=raymoe", "httpRoute.pathPrefix"),
]
"""Values that the schema refuses, and the name by which it does."""

__all__ = ["REFUSED", "TAKEN", "UNFIT"]
