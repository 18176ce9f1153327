"""An expert host: a shard of the routed experts of all MoE layers, with gradients and moments in training.

Steps are 0-based. A host that has committed steps 0 … s-1 is at step s: it holds the weights that step
s computes with. A request of step s+1 that comes while s is being committed waits until its layer has
been; every other step is refused. Without an optimizer (serving) the host looks at no step, and may
hold several versions of its weights, by epoch: routers change from one to another at different times.
"""

from __future__ import annotations

from time import perf_counter

from torch import Tensor

from actors.host.expert_layers import Layer
from actors.host.expert_versions import Version
from actors.host.host_state import HostState
from actors.host.request_payload import local_experts, payload
from actors.messages.host_control import HostStats
from channels.base import Phase, Request, RequestId
from channels.shm.mailbox import HostMailbox
from errors import ProtocolError, RaymoeError, StaleEpoch
from kernels.experts import mix_experts
from model.device_copies import to_cpu
from model.experts.grouped_swiglu import experts_backward, experts_forward


class ExpertHost(HostState):
    """Answers routers' requests, and the coordinator's prepare and commit; takes what `HostState` takes.

    All methods may be called from several threads at once.
    """

    def answer(self, box: HostMailbox) -> None:
        """Answer a request in a mailbox; what cannot be is refused, and comes again to `handle`."""
        epoch, index = box.call
        version = self._versions.held.get(epoch)
        layer = None if version is None else version.layers.get(index)
        fits = box.width == self.config.hidden_size and box.dtype == self._numpy_dtype
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
        """Answer one request of a router; see `channels.base` for the payloads.

        Raises:
            StaleEpoch: the request was routed with an epoch that the host does not hold.
            ProtocolError: an expert of another host, a step that is not current, a malformed payload, or
                a BACKWARD without its FORWARD.
        """
        self._meter.begin()
        try:
            return self._handle(request)
        finally:
            self._meter.end()

    def _handle(self, request: Request) -> tuple[Tensor, ...]:
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
                f"expert host {self.id} has no experts of layer {id.layer}, only of {sorted(version.layers)}"
            )
        self._await_step(version, layer, id)
        work = self._backward if id.phase is Phase.BACKWARD else self._forward
        if self._timeline is None:
            return work(version, layer, request)
        name, track = f"{id.phase.name.lower()} {id.layer}", f"{id.router}, microbatch {id.microbatch}"
        with self._timeline.span(id.step, name, track=track, rows=request.tensors[0].shape[0]):
            return work(version, layer, request)

    def prepare(self, step: int, epoch: int | None = None) -> float:
        """First half of a commit: seal the step's gradients and return the sum of their squares (float64).

        Those of experts that others hold too are summed over the holders, all of which have sealed them, and
        counted by one.

        Args:
            epoch: that whoever asks believes current; None for whichever is.

        Raises:
            ProtocolError: the host is at another step or epoch.
            ChannelError: another holder of its experts is lost.
        """
        version = self._seal(step, epoch)
        # Without the lock: a holder that hangs shall keep nobody else waiting.
        if version.shares is not None:
            version.shares.gather(version.layers, step)
            return version.shares.squared_norm(version.layers)
        optimizers = (layer.optimizer for layer in version.layers.values())
        return sum((one.squared_norm() for one in optimizers if one is not None), 0.0)

    def seal(self, step: int, epoch: int | None = None) -> None:
        """Take no more gradients of a step, so that other holders of experts can fetch them.

        Raises:
            ProtocolError: the host is at another step or epoch.
        """
        self._seal(step, epoch)

    def _seal(self, step: int, epoch: int | None) -> Version:
        with self._committing:
            version = self._versions.at(epoch)
            self._versions.check(version, step)
            version.sealed = True
            return version

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        """Second half: AdamW with gradients times `scale`; layer by layer, each usable at once.

        A repeat of the last commit does nothing. Activations that were never used are dropped.

        Raises:
            ProtocolError: the step is neither the prepared one nor the last committed one, or the epoch is
                not the current one: whoever asks is of an attempt that is over.
        """
        changed = self._versions.changed
        with self._committing:
            version = self._versions.at(epoch)
            if step == version.step - 1:
                return
            self._versions.check(version, step)
            shares = version.shares
            if not version.sealed or not (shares is None or shares.has(step)):
                raise ProtocolError(f"commit of step {step} on expert host {self.id} without a prepare")
            version.moving = True
            try:
                version.ledger.clear()
                for index, layer in version.layers.items():
                    if layer.optimizer is not None:
                        if shares is not None:
                            shares.apply(index, layer)
                        layer.optimizer.step(learning_rate, scale)
                        layer.optimizer.zero_grad()
                    with changed:
                        layer.step = step + 1
                        changed.notify_all()
            except Exception as error:
                # A part of the layers may have moved: nothing that this host holds is of one version now.
                with changed:
                    version.failure = f"expert host {self.id} failed in the commit of step {step}: {error}"
                    changed.notify_all()
                raise
            with changed:
                version.step, version.sealed, version.moving = step + 1, False, False
                changed.notify_all()
            if self._timeline is not None:
                self._timeline.done(step)

    def loads(self) -> Tensor:
        """[L, E] int64, pairs of forward passes since the host began, rows by `ModelConfig.moe_layers`."""
        return self._meter.loads()

    def stats(self) -> HostStats:
        """Counters; cheap, at any time."""
        versions = self._versions
        current = versions.current
        kept = [version.ledger.kept() for version in versions.held.values()]
        requests, rows, busy = self._meter.read()
        shards = [layer.shard for layer in current.layers.values()]
        return HostStats(
            id=self.id,
            step=current.step,
            epoch=current.epoch,
            kept=sum(n for n, _ in kept),
            kept_bytes=sum(size for _, size in kept),
            parameters=sum(shard.w13.numel() + shard.w2.numel() for shard in shards),
            rows=rows,
            requests=requests,
            busy_seconds=busy,
            in_flight=self._meter.in_flight,
            epochs=tuple(versions.held),
            experts={index: len(layer.experts) for index, layer in current.layers.items()},
            failed_pushes=self._memory.failed_pushes(),
        )

    def _forward(self, version: Version, layer: Layer, request: Request) -> tuple[Tensor, ...]:
        id = request.id
        rows, _, _, gate = payload(request, 4, self._device)
        if rows.dtype != self.dtype or rows.ndim != 2 or rows.shape[1] != self.config.hidden_size:
            raise ProtocolError(
                f"expert host {self.id} takes rows [n, {self.config.hidden_size}] of {self.dtype}, "
                f"not {list(rows.shape)} of {rows.dtype}"
            )
        keep = id.phase is Phase.FORWARD
        if keep and layer.optimizer is None:
            raise ProtocolError(f"expert host {self.id} holds no optimizer: it answers INFER, not FORWARD")
        row_ptr, local = local_experts(self.id, layer, request)
        started = perf_counter()
        partial, saved = experts_forward(layer.shard, rows, row_ptr, local, gate, keep=keep)
        if saved is not None:
            version.ledger.keep(id, saved)
        reply = self._answered(request, partial)
        seconds = perf_counter() - started
        self._meter.forward(id.phase, rows.shape[0], seconds, id.layer, layer, local.numpy())
        return reply

    def _backward(self, version: Version, layer: Layer, request: Request) -> tuple[Tensor, ...]:
        (d_partial,) = payload(request, 1, self._device)
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
                call.reply = self._answered(request, *experts_backward(layer.shard, saved, d_partial))
                self._meter.backward(d_partial.shape[0], perf_counter() - started)
            except BaseException as error:
                call.error = f"{type(error).__name__}: {error}"
                raise
            finally:
                call.finish()
        return call.wait(self._commit_timeout)

    def _answered(self, request: Request, *made: Tensor) -> tuple[Tensor, ...]:
        """A reply on the device that the request's rows came on."""
        return made if request.tensors[0].device == self._device else to_cpu(*made)

    def _await_step(self, version: Version, layer: Layer, id: RequestId) -> None:
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
                    f"{self.id} is at step {layer.step}"
                )

    def _stale(self, id: RequestId) -> StaleEpoch:
        return StaleEpoch(
            f"expert host {self.id} is at placement epoch {self.epoch}, the request of router "
            f"{id.router!r} at {id.epoch}: fetch the routing table and send again",
            epoch=self.epoch,
        )


__all__ = ["ExpertHost"]
