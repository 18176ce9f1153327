"""Client of a coordinator over gRPC, for the operators of a job. It needs neither Ray nor torch."""

from __future__ import annotations

import json
from typing import Any

from actors.rpc.control_server import control_channel, raising
from protos import admin_pb2, admin_pb2_grpc

_SLACK = 10.0  # seconds that a call may take beyond the time that the coordinator waits


class AdminClient:
    """Operates a running job: the Python interface of `raymoe status`, `scale` and `drain`.

    Args:
        address: Address of the job's coordinator, `grpc:HOST:PORT`, as `raymoe serve --json` and
            `raymoe train` print it.
        timeout: Seconds for a call that does not wait for a change.
    """

    def __init__(self, address: str, *, timeout: float = 30.0) -> None:
        self._peer = f"the coordinator ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)
        self._recorder, self._known = "", 0

    def status(self) -> dict[str, Any]:
        """State of the job, as `raymoe status --json` prints it."""
        with raising(self._peer):
            reply = self._stub.Status(admin_pb2.StatusOfJobRequest(), timeout=self._timeout)
        status: dict[str, Any] = json.loads(reply.status)
        return status

    def describe(self) -> dict[str, str]:
        """What the job is called and does: id, name, cluster (address of Ray's), doing. No host is asked."""
        with raising(self._peer):
            reply = self._stub.Describe(admin_pb2.DescribeJobRequest(), timeout=self._timeout)
        return {"id": reply.id, "name": reply.name, "cluster": reply.cluster, "doing": reply.doing}

    def events(self) -> list[dict[str, Any]]:
        """The events that this client has not seen, oldest first: `at` (Unix time), `kind`, `text`."""
        request = admin_pb2.EventsRequest(recorder=self._recorder, known=self._known)
        with raising(self._peer):
            reply = self._stub.Events(request, timeout=self._timeout)
        self._recorder, self._known = reply.recorder, reply.known
        return [{"at": one.at, "kind": one.kind, "text": one.text} for one in reply.events]

    def scale(self, hosts: int, *, timeout: float = 300.0, why: str = "") -> dict[str, Any]:
        """Change the number of expert hosts; returns when the change is done, or after `timeout` seconds.

        A change that is under way is given up for this one, unless this one is automatic.

        Args:
            hosts: The new number.
            timeout: Seconds to wait.
            why: Reason of an automatic change; empty when an operator asks for it.

        Returns:
            done (whether the change is done), hosts (wanted now), seconds (since the request), lacking (what
            the cluster lacks for it, as far as known).

        Raises:
            ChangeUnderWay: The change is automatic, and another one is under way.
            RaymoeError: The change is impossible, failed, or was given up for another one.
        """
        with raising(self._peer):
            request = admin_pb2.ScaleRequest(hosts=hosts, timeout=timeout, why=why)
            return _scaled(self._stub.Scale(request, timeout=timeout + _SLACK))

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        """Retire one host once its experts are elsewhere; waits and returns as `scale` does.

        When a scale takes the place of the drain, the host leaves nevertheless, and that is waited for.

        Args:
            host: Id of the host.
            replace: Start another host in its place; otherwise the job has one host less.
            timeout: Seconds to wait.
        """
        with raising(self._peer):
            request = admin_pb2.DrainRequest(host=host, replace=replace, timeout=timeout)
            return _scaled(self._stub.Drain(request, timeout=timeout + _SLACK))

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()


def _scaled(reply: admin_pb2.ScaleReply) -> dict[str, Any]:
    return {
        "done": reply.done,
        "hosts": reply.hosts,
        "seconds": round(reply.seconds, 3),
        "lacking": reply.lacking,
    }


__all__ = ["AdminClient"]
