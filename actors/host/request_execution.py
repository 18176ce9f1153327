"""Requests of routers executed on a host's experts: INFER, FORWARD, BACKWARD and RELEASE.

Steps are 0-based. A version at step s has committed steps 0 … s-1 and holds the weights that step s computes
with. A request of step s+1 that arrives while step s is being committed waits until the commit has reached
its layer; requests of any other step are refused. A host without an optimizer (serving) ignores the step.
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from actors.host.expert_layers import ExpertLayer
from actors.host.host_settings import HostSettings
from actors.host.hosted_versions import HostedVersion, HostedVersions
from actors.host.usage_meter import UsageMeter
from actors.messages.timeline import Timeline
from channels.base import Phase, Request, RequestId
from channels.shm.mailbox import HostMailbox
from errors import ProtocolError, RaymoeError, StaleEpoch
from kernels.dispatch import FOREIGN, MALFORMED, localize
from kernels.experts import mix_experts
from model.config import ModelConfig
from model.device_copies import to_cpu, to_device
from model.experts.grouped_swiglu import experts_backward, experts_forward


class RequestExecutor:
    """Executes requests; several threads may call it at the same time.

    Args:
        host: Id of the host, for error messages.
        config: The model.
        settings: How the host computes.
        versions: The experts, by epoch.
        meter: Counts requests, rows and seconds.
        timeline: Records when the host computes.
    """

    def __init__(
        self,
        host: str,
        config: ModelConfig,
        settings: HostSettings,
        versions: HostedVersions,
        meter: UsageMeter,
        timeline: Timeline | None,
    ) -> None:
        self._host = host
        self._hidden_size = config.hidden_size
        self._dtype = settings.dtype
        self._device = torch.device(settings.device)
        self._commit_timeout = settings.commit_timeout
        self._versions = versions
        self._meter = meter
        self._timeline = timeline
        compiled = self._device.type == "cpu" and settings.dtype in (torch.float32, torch.float64)
        self._numpy_dtype = torch.empty(0, dtype=settings.dtype).numpy().dtype if compiled else None

    def answer(self, box: HostMailbox) -> None:
        """Answer an INFER request in a mailbox.

        A request that cannot be answered here is refused without a reason; the router sends it again over the
        channel, where `handle` refuses it with one.
        """
        epoch, index = box.call
        version = self._versions.held.get(epoch)
        layer = None if version is None else version.layers.get(index)
        fits = box.width == self._hidden_size and box.dtype == self._numpy_dtype
        if layer is None or layer.optimizer is not None or not fits:
            box.reply(answered=False)
            return
        self._meter.begin()
        started = perf_counter()
        n, n_pairs = box.accept(layer.local_of)
        if n:
            parts = box.box
            partial = parts.partial[:n]
            partial[:] = 0
            mix_experts(
                parts.rows[:n],
                box.row_ptr[: n + 1],
                box.expert[:n_pairs],
                parts.gate[:n_pairs],
                layer.shard.w13.numpy(),
                layer.shard.w2.numpy(),
                partial,
            )
        box.reply(answered=n > 0)
        self._meter.forward(Phase.INFER, n, perf_counter() - started, index, layer, box.expert[:n_pairs])
        self._meter.end()

    def handle(self, request: Request) -> tuple[Tensor, ...]:
        """Answer one request of a router; `channels.base` describes the payloads.

        Raises:
            StaleEpoch: the request was routed with an epoch that the host does not hold.
            ProtocolError: an expert of another host, a step that is not current, a malformed payload, or
                a BACKWARD without its FORWARD.
        """
        self._meter.begin()
        try:
            return self._execute(request)
        finally:
            self._meter.end()

    def _execute(self, request: Request) -> tuple[Tensor, ...]:
        id = request.id
        version = self._versions.held.get(id.epoch)
        if id.phase is Phase.RELEASE:
            if version is not None:
                version.ledger.release(id)
            return ()
        if version is None:
            raise self._stale(id)
        layer = version.layers.get(id.layer)
        if layer is None:
            raise ProtocolError(
                f"expert host {self._host} has no experts of layer {id.layer}, only of "
                f"{sorted(version.layers)}"
            )
        self._await_step(version, layer, id)
        work = self._backward if id.phase is Phase.BACKWARD else self._forward
        if self._timeline is None:
            return work(version, layer, request)
        name, track = f"{id.phase.name.lower()} {id.layer}", f"{id.router}, microbatch {id.microbatch}"
        with self._timeline.span(id.step, name, track=track, rows=request.tensors[0].shape[0]):
            return work(version, layer, request)

    def _forward(self, version: HostedVersion, layer: ExpertLayer, request: Request) -> tuple[Tensor, ...]:
        id = request.id
        rows, _, _, gate = _payload(request, 4, self._device)
        if rows.dtype != self._dtype or rows.ndim != 2 or rows.shape[1] != self._hidden_size:
            raise ProtocolError(
                f"expert host {self._host} takes rows [n, {self._hidden_size}] of {self._dtype}, "
                f"not {list(rows.shape)} of {rows.dtype}"
            )
        keep = id.phase is Phase.FORWARD
        if keep and layer.optimizer is None:
            raise ProtocolError(f"expert host {self._host} holds no optimizer: it answers INFER, not FORWARD")
        row_ptr, local = _local_experts(self._host, layer, request)
        started = perf_counter()
        partial, saved = experts_forward(layer.shard, rows, row_ptr, local, gate, keep=keep)
        if saved is not None:
            version.ledger.keep(id, saved)
        reply = self._on_device_of(request, partial)
        seconds = perf_counter() - started
        self._meter.forward(id.phase, rows.shape[0], seconds, id.layer, layer, local.numpy())
        return reply

    def _backward(self, version: HostedVersion, layer: ExpertLayer, request: Request) -> tuple[Tensor, ...]:
        """Apply a BACKWARD once; a retry of the request gets the reply of the first."""
        (d_partial,) = _payload(request, 1, self._device)
        call, saved = version.ledger.begin_backward(request.id)
        if saved is not None:
            try:
                if version.sealed:
                    raise ProtocolError(f"step {request.id.step} is sealed: its gradients have been counted")
                if d_partial.shape != saved.rows.shape:
                    raise ProtocolError(
                        f"d_partial is {list(d_partial.shape)}, the rows were {list(saved.rows.shape)}"
                    )
                started = perf_counter()
                call.reply = self._on_device_of(request, *experts_backward(layer.shard, saved, d_partial))
                self._meter.backward(d_partial.shape[0], perf_counter() - started)
            except BaseException as error:
                call.error = f"{type(error).__name__}: {error}"
                raise
            finally:
                call.finish()
        return call.wait(self._commit_timeout)

    def _on_device_of(self, request: Request, *made: Tensor) -> tuple[Tensor, ...]:
        """The reply's tensors, on the device that the request's rows came on."""
        return made if request.tensors[0].device == self._device else to_cpu(*made)

    def _await_step(self, version: HostedVersion, layer: ExpertLayer, id: RequestId) -> None:
        if layer.optimizer is None or (id.step == layer.step and version.failure is None):
            return
        changed = self._versions.changed
        with changed:
            if id.step == layer.step + 1:
                changed.wait_for(
                    lambda: layer.step >= id.step or version.gone or version.failure is not None,
                    self._commit_timeout,
                )
            if version.gone:
                raise self._stale(id)
            if version.failure is not None:
                raise RaymoeError(version.failure)
            if id.step != layer.step:
                raise ProtocolError(
                    f"router {id.router!r} asks for step {id.step} of layer {id.layer}, but expert host "
                    f"{self._host} is at step {layer.step}"
                )

    def _stale(self, id: RequestId) -> StaleEpoch:
        epoch = self._versions.current.epoch
        return StaleEpoch(
            f"expert host {self._host} is at placement epoch {epoch}, the request of router "
            f"{id.router!r} at {id.epoch}: fetch the routing table and send again",
            epoch=epoch,
        )


def _payload(request: Request, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """The request's tensors: floating-point ones on the host's device, indices on the CPU.

    Raises:
        ProtocolError: the request does not carry `n` tensors.
    """
    if len(request.tensors) != n:
        raise ProtocolError(f"{request.id.phase.name} carries {len(request.tensors)} tensors instead of {n}")
    if device.type == "cpu":
        return request.tensors
    return tuple(
        to_device(tensor, device) if tensor.is_floating_point() else tensor for tensor in request.tensors
    )


def _local_experts(host: str, layer: ExpertLayer, request: Request) -> tuple[Tensor, Tensor]:
    """The request's row_ptr [n + 1] and its experts as indices into the shard [nnz]; both int32, on the CPU.

    Both are copies, because the router could still write to the request's memory.

    Raises:
        ProtocolError: they are inconsistent, or name an expert that is not on this host.
    """
    rows, row_ptr, expert, gate = request.tensors
    row_ptr = row_ptr.clone()
    whole = row_ptr.numel() == rows.shape[0] + 1 and expert.numel() == gate.numel()
    flat = row_ptr.ndim == expert.ndim == gate.ndim == 1
    integers = row_ptr.dtype == expert.dtype == torch.int32
    local = torch.empty_like(expert)
    found = MALFORMED
    if whole and flat and integers:
        found = localize(row_ptr.numpy(), expert.numpy(), layer.local_of, local.numpy())
    if found == MALFORMED:
        raise ProtocolError(
            f"{rows.shape[0]} rows came with row_ptr {list(row_ptr.shape)} up to "
            f"{row_ptr.flatten()[-1:].tolist()}, experts {list(expert.shape)} and gates "
            f"{list(gate.shape)}; row_ptr rises from 0 to the number of pairs"
        )
    if found == FOREIGN:
        here = set(layer.experts)
        foreign = sorted(set(expert.tolist()) - here)[:8]
        raise ProtocolError(
            f"expert host {host} does not hold experts {foreign} of layer {request.id.layer}; it "
            f"holds {len(here)}: {sorted(here)[:8]}…"
        )
    return row_ptr, local


__all__ = ["RequestExecutor"]
