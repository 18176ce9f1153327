"""Client of a coordinator over gRPC, for workers, routers and fleets.

An error of the coordinator is raised with its own class and names the coordinator; when its process is gone,
a `ChannelError` is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from actors.messages.control_codec import host_from, host_to, table_from, tensor_from
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport
from actors.rpc.control_server import control_channel, raising
from cluster.events import Event
from cluster.membership import Orders
from cluster.topology import HostInfo, RoutingTable
from protos import coordinator_pb2, coordinator_pb2_grpc

_SLACK = 10.0  # seconds that a call may take beyond the time that the coordinator waits


class CoordinatorClient:
    """Client of a `Coordinator` and of its `TrainingSteps`, with their methods.

    Args:
        address: Address of the coordinator actor, `grpc:HOST:PORT`.
        timeout: Seconds for one call, except for calls that wait for other workers or hosts.
    """

    def __init__(self, address: str, *, timeout: float | None = 60.0) -> None:
        self._peer = f"the coordinator ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)

    def register_host(self, info: HostInfo) -> None:
        """Add a host; a repeat does nothing."""
        request = coordinator_pb2.RegisterHostRequest(host=host_to(info))
        with raising(self._peer):
            self._stub.RegisterHost(request, timeout=self._timeout)

    def place_experts(self) -> None:
        """Place all experts on the hosts that have registered; a repeat does nothing."""
        with raising(self._peer):
            self._stub.PlaceExperts(coordinator_pb2.PlaceExpertsRequest())

    def table(self, weights: str | None = None, timeout: float = 0.0) -> RoutingTable:
        """The routing table of these weights (None: those in use), once every expert has a host."""
        table = self._table(-1, weights, timeout)
        assert table is not None  # a coordinator without a table raises
        return table

    def table_after(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        """The newest routing table once its serial differs from `serial`; None after `timeout` seconds."""
        return self._table(serial, weights, timeout)

    def suspect(self, host: str, why: str) -> None:
        """Have the coordinator check a host that cannot be reached."""
        with raising(self._peer):
            self._stub.Suspect(coordinator_pb2.SuspectRequest(host=host, why=why), timeout=self._timeout)

    def record(self, event: Event) -> None:
        """Add an event to those of the job; a repeat does nothing."""
        request = coordinator_pb2.RecordEventRequest(at=event.at, kind=event.kind, text=event.text)
        with raising(self._peer):
            self._stub.RecordEvent(request, timeout=self._timeout)

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str], lacking: str = ""
    ) -> tuple[Orders, int, CoordinatorState]:
        """Hosts to start and to stop, the number of hosts wanted, and the coordinator's state.

        Args:
            starting: Hosts that were started and have not registered yet.
            failed: Host id -> why it did not start, or how it ended.
            stopped: Hosts that were ended as ordered.
            lacking: What the cluster lacks for hosts that wait to be started; empty if nothing is known.
        """
        request = coordinator_pb2.OrdersRequest(
            starting=starting, failed=dict(failed), stopped=stopped, lacking=lacking
        )
        with raising(self._peer):
            reply = self._stub.Orders(request, timeout=self._timeout)
        orders = Orders(start=reply.start, stop=tuple(reply.stop), cancel=reply.cancel)
        return orders, int(reply.wanted), CoordinatorState.from_json(reply.state)

    def join(self, rank: int, workers: int, attempt: int, why: str) -> Resume:
        """Add a worker, when its process begins or after it gave up a step; waits until the run is running.

        Args:
            rank: Rank of the worker.
            workers: Workers of the run.
            attempt: The attempt that the worker was part of; -1 for a new process.
            why: Why it gave up; empty for a new process.
        """
        request = coordinator_pb2.JoinRequest(rank=rank, workers=workers, attempt=attempt, why=why)
        with raising(self._peer):
            reply = self._stub.Join(request)
        return Resume(
            attempt=reply.attempt,
            step=reply.step,
            trunk=tuple(host_from(host) for host in reply.trunk),
            directory=reply.directory if reply.HasField("directory") else None,
        )

    def report(self, report: StepReport) -> StepDecision:
        """End a step: waits until every worker has reported it; all get the same decision."""
        with raising(self._peer):
            return StepDecision.from_message(self._stub.ReportStep(report.to_message()))

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """Metrics of the committed steps after `since_step`, oldest first; only the latest are kept."""
        request = coordinator_pb2.GetMetricsRequest(since_step=since_step)
        with raising(self._peer):
            reply = self._stub.GetMetrics(request, timeout=self._timeout)
        return [StepMetrics.from_message(step) for step in reply.steps]

    def request_stop(self) -> int:
        """Stop, with a checkpoint, at the end of the current step; returns that step."""
        with raising(self._peer):
            reply = self._stub.RequestStop(coordinator_pb2.RequestStopRequest(), timeout=self._timeout)
            return int(reply.step)

    def fail(self, text: str) -> None:
        """End the run: every waiting and every later call raises an error with this text."""
        with raising(self._peer):
            self._stub.Fail(coordinator_pb2.FailRequest(text=text), timeout=self._timeout)

    def save(self, directory: str, step: int) -> list[str]:
        """Have all hosts write their part of the checkpoint after `step` steps; returns the files' names."""
        request = coordinator_pb2.SaveHostsRequest(directory=directory, step=step)
        with raising(self._peer):
            return list(self._stub.SaveHosts(request).files)

    def load(self, directory: str, name: str) -> int:
        """Have every host load other weights beside those in use; returns their epoch."""
        request = coordinator_pb2.LoadWeightsRequest(directory=directory, name=name)
        with raising(self._peer):
            return int(self._stub.LoadWeights(request).epoch)

    def publish(self, epoch: int) -> None:
        """Publish the weights that were loaded last, beside the published ones."""
        request = coordinator_pb2.PublishWeightsRequest(epoch=epoch)
        with raising(self._peer):
            self._stub.PublishWeights(request, timeout=self._timeout)

    def retire(self, keep: str = "") -> None:
        """Drop all weights but those of this name; empty keeps those that were published last."""
        request = coordinator_pb2.RetireWeightsRequest(keep=keep)
        with raising(self._peer):
            self._stub.RetireWeights(request, timeout=self._timeout)

    def bias(self) -> Tensor:
        """`[L, E]` float32, the gates' bias of the current step."""
        with raising(self._peer):
            reply = self._stub.GetBias(coordinator_pb2.GetBiasRequest(), timeout=self._timeout)
        return tensor_from(reply.bias)

    @property
    def failure(self) -> str | None:
        """What ended the run; None before its end."""
        with raising(self._peer):
            reply = self._stub.GetFailure(coordinator_pb2.GetFailureRequest(), timeout=self._timeout)
        return reply.failure if reply.HasField("failure") else None

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()

    def _table(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        request = coordinator_pb2.GetRoutingTableRequest(
            known_serial=serial, weights=weights or "", timeout=timeout
        )
        with raising(self._peer):
            reply = self._stub.GetRoutingTable(request, timeout=timeout + _SLACK)
        return table_from(reply.table) if reply.HasField("table") else None


__all__ = ["CoordinatorClient"]
