"""The expert host: a process with a shard of the routed experts of all MoE layers.

Training stays correct when requests are retried and when a host dies:

- `request_ledger`: a retried FORWARD or BACKWARD changes nothing, so a router may send a request again after
  a connection was lost in the backward pass.
- `step_commits`: a retried commit changes nothing.
- `snapshot_replication`, `snapshot_store`: copies of each host's state in the memory of other hosts. When a
  host dies in a forward or backward pass, its activations are lost: the router's lane reports the loss
  (`actors.router.training_call`), and the coordinator brings all hosts back to the newest common snapshot
  (`actors.coordinator.recovery`).
"""

from __future__ import annotations

from actors.host.expert_host import ExpertHost
from actors.host.host_settings import HostResources, HostSettings, InitialExperts

__all__ = ["ExpertHost", "HostResources", "HostSettings", "InitialExperts"]
