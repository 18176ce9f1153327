"""The versions of its experts that an expert host holds, one for each placement epoch.

A version is the experts of one epoch together with their step, their request ledger and their gradient sums.
One version is the current one: optimizer steps are committed to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from actors.host.checkpoint_part import Pair
from actors.host.expert_layers import ExpertLayers
from actors.host.gradient_sums import GradientSums
from actors.host.request_ledger import RequestLedger
from actors.messages.transfer_orders import Assembly
from errors import ProtocolError, RaymoeError


@dataclass(slots=True, eq=False)
class HostedVersion:
    """The experts of one epoch and everything that belongs to their current step.

    Each version has its own ledger, so a late request of one epoch cannot affect another epoch.

    Attributes:
        step: Number of steps committed, which is the step that the weights are for.
        order: The order that the version was assembled by; None for the experts that the host started with.
        sums: Gradient sums over other holders of the same experts; None in serving.
        ledger: The requests of the current step.
        sealed: Whether the gradients of the current step have been counted, so that no more are accepted.
        moving: Whether a commit is changing the weights.
        gone: Whether the host has dropped the version.
        failure: Error text of a commit that failed and left layers at different steps.
    """

    epoch: int
    layers: ExpertLayers
    step: int
    order: Assembly | None = None
    sums: GradientSums | None = None
    ledger: RequestLedger = field(default_factory=RequestLedger, init=False)
    sealed: bool = field(default=False, init=False)
    moving: bool = field(default=False, init=False)
    gone: bool = field(default=False, init=False)
    failure: str | None = field(default=None, init=False)

    @property
    def shared_sums(self) -> GradientSums | None:
        """The gradient sums, or None where no expert of the version has another holder."""
        return self.sums if self.sums else None

    def speaks_for(self, layer: int, expert: int) -> bool:
        """Whether this host is the primary holder, which counts the expert and writes it to checkpoints."""
        sums = self.shared_sums
        return sums is None or sums.speaks_for(layer, expert)

    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers of all layers; none in serving."""
        return [
            buffer
            for layer in self.layers.values()
            if layer.optimizer is not None
            for buffer in layer.optimizer.gradient_buffers()
        ]

    def weights(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Every expert's layer, id, w13 [2I, D] and w2 [D, I], as live views."""
        for index, layer in self.layers.items():
            for expert in layer.experts:
                w13, w2 = layer.parts(expert, moments=False)
                yield index, expert, w13, w2

    def moments(self) -> Iterator[tuple[int, int, Pair, Pair]]:
        """Every expert's layer, id and (exp_avg, exp_avg_sq) of w13 and w2, live views; none in serving."""
        for index, layer in self.layers.items():
            if layer.optimizer is not None:
                one, two = (layer.optimizer.moments()[name] for name in ("w13", "w2"))
                for at, expert in enumerate(layer.experts):
                    yield index, expert, (one[0][at], one[1][at]), (two[0][at], two[1][at])


class HostedVersions:
    """All versions that requests are answered with.

    Attributes:
        held: The versions by epoch. The mapping is replaced and never changed, because requests read it while
            another thread adds or drops a version.
        current: The version that the host started with or was last told to retain; commits apply to it.
        changed: Notified at every step, every failure and every change of `held`.
        commit_lock: Held while a step is sealed or committed, while the current version is exchanged, and
            while the state of a step is copied or saved.
    """

    def __init__(self, host_id: str, first: HostedVersion) -> None:
        self._id = host_id
        self.changed = threading.Condition()
        self.commit_lock = threading.Lock()
        self.current = first
        self.held = {first.epoch: first}

    def at(self, epoch: int | None) -> HostedVersion:
        """The current version, whose epoch must be `epoch` unless that is None.

        Raises:
            ProtocolError: the current version has another epoch.
        """
        current = self.current
        if epoch is not None and epoch != current.epoch:
            raise ProtocolError(f"expert host {self._id} trains in epoch {current.epoch}, not in {epoch}")
        return current

    def has(self, order: Assembly) -> bool:
        """Whether an assembly order has been carried out already.

        Raises:
            ProtocolError: the host holds a different version under the order's epoch.
        """
        known = self.held.get(order.epoch)
        # A host that started without experts holds no version.
        if known is None or (known.order is None and not known.layers):
            return False
        if known.order != order:
            raise ProtocolError(
                f"expert host {self._id} holds epoch {order.epoch} already, and was asked to put it together "
                "otherwise; give another epoch"
            )
        return True

    def add(self, version: HostedVersion) -> None:
        """Answer requests of another version, too."""
        with self.changed:
            self.held = {**self.held, version.epoch: version}

    def retain(self, epochs: Sequence[int], *, on_switch: Callable[[], None]) -> None:
        """Drop every version except these, the last of which becomes the current one.

        Requests under way complete with the version that they started with. Commits and copies of state wait
        until this returns.

        Args:
            on_switch: Called when another version has become the current one.

        Raises:
            ProtocolError: a version is not held.
        """
        if set(epochs) <= set(self.held):
            for epoch, version in self.held.items():
                if epoch not in epochs and version.sums is not None:
                    version.sums.close()
        with self.commit_lock:
            before = self.current
            self._keep_only(epochs)
            if self.current is not before:
                on_switch()

    def _keep_only(self, epochs: Sequence[int]) -> None:
        with self.changed:
            missing = [epoch for epoch in epochs if epoch not in self.held]
            if missing or not epochs:
                raise ProtocolError(f"expert host {self._id} holds epochs {tuple(self.held)}, not {missing}")
            kept = {epoch: self.held[epoch] for epoch in epochs}
            for version in (self.current, *self.held.values()):
                version.gone = version not in kept.values()
            self.current, self.held = kept[epochs[-1]], kept
            self.changed.notify_all()

    def rename(self, epoch: int) -> None:
        """Keep the current version alone, under another epoch."""
        with self.changed:
            self.current.epoch = epoch
            self.held = {epoch: self.current}

    def close(self) -> None:
        """Close the connections to other holders."""
        for version in self.held.values():
            if version.sums is not None:
                version.sums.close()

    def await_commit(self, version: HostedVersion, step: int, timeout: float) -> None:
        """Wait until the commit that leads to `step` is done, and check that the version is at `step`.

        Raises:
            ProtocolError: the version is at another step.
            RaymoeError: a commit of it failed.
        """
        with self.changed:
            if step == version.step + 1 and version.sealed:
                self.changed.wait_for(
                    lambda: version.step >= step or version.gone or version.failure is not None, timeout
                )
        self.check(version, step)

    def check(self, version: HostedVersion, step: int) -> None:
        """Check that the version is at `step` and that no commit is changing it.

        When the check succeeds before and after a read, everything read in between belongs to this step.

        Raises:
            ProtocolError: the version is at another step, or a commit is under way.
            RaymoeError: a commit of it failed.
        """
        if version.failure is not None:
            raise RaymoeError(version.failure)
        if version.step != step or version.moving:
            at = f"commits step {version.step}" if version.moving else f"is at step {version.step}"
            raise ProtocolError(f"expert host {self._id} {at}, not at step {step}")

    def check_sealed(self, version: HostedVersion, step: int) -> None:
        """Check that the gradients of `step` are complete in this version.

        Raises:
            ProtocolError: they are not, or the version has been dropped.
            RaymoeError: a commit of it failed.
        """
        self.check(version, step)
        if not version.sealed or version.gone:
            raise ProtocolError(f"expert host {self._id} has not sealed the gradients of step {step}")


__all__ = ["HostedVersion", "HostedVersions"]
