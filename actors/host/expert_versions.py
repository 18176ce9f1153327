"""What an expert host holds, by epoch: versions of its experts, of which one is the current one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.host.expert_layers import Layers
from actors.host.gradient_sums import Summing
from actors.host.request_ledger import Ledger
from actors.messages.transfer_orders import Assembly
from errors import ProtocolError, RaymoeError


@dataclass(slots=True, eq=False)
class Version:
    """The experts of one epoch, with all that belongs to their current step.

    Each has a ledger of its own, so that a late request of one epoch leaves no trace in the next.

    Attributes:
        step: steps committed: the step that the weights are for.
        order: what it was put together by; None for what the host began with.
        sealed: the step's gradients have been counted.
        moving: a commit is changing the weights.
        gone: the host holds it no more.
        failure: why nothing in it is of one step now.
        summing: of gradients with other holders of the same experts.
    """

    epoch: int
    layers: Layers
    step: int
    order: Assembly | None = None
    ledger: Ledger = field(default_factory=Ledger)
    sealed: bool = False
    moving: bool = False
    gone: bool = False
    failure: str | None = None
    summing: Summing | None = None

    @property
    def shares(self) -> Summing | None:
        """Sums gradients over other holders; None where no expert has another one."""
        return self.summing if self.summing else None


class Versions:
    """All versions that requests are answered of.

    Attributes:
        held: by epoch. Replaced, never changed: requests read it while another thread adds or drops one.
        current: what the host began with or was last told to retain; commits go to it.
        changed: notified at every step, failure and change of `held`.
    """

    def __init__(self, host_id: str, first: Version) -> None:
        self._id = host_id
        self.changed = threading.Condition()
        self.current = first
        self.held = {first.epoch: first}

    def at(self, epoch: int | None) -> Version:
        """The current version, which has to be of this epoch unless None is given.

        Raises:
            ProtocolError: it is of another.
        """
        current = self.current
        if epoch is not None and epoch != current.epoch:
            raise ProtocolError(f"expert host {self._id} trains in epoch {current.epoch}, not in {epoch}")
        return current

    def has(self, order: Assembly) -> bool:
        """Whether an order has been carried out already.

        Raises:
            ProtocolError: something else is held under its epoch.
        """
        known = self.held.get(order.epoch)
        # A host that began without experts began with nothing that an epoch could name.
        if known is None or (known.order is None and not known.layers):
            return False
        if known.order != order:
            raise ProtocolError(
                f"expert host {self._id} holds epoch {order.epoch} already, and was asked to put it together "
                "otherwise; give another epoch"
            )
        return True

    def add(self, version: Version) -> None:
        """Answer requests of another version too."""
        with self.changed:
            self.held = {**self.held, version.epoch: version}

    def retain(self, *epochs: int) -> None:
        """Drop every version but these, the last of which becomes the current one.

        Raises:
            ProtocolError: one is not held.
        """
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
        """The current version under another epoch, and nothing else."""
        with self.changed:
            self.current.epoch = epoch
            self.held = {epoch: self.current}

    def check_sealed(self, version: Version, step: int) -> None:
        """Raises unless a version's gradients are complete, and those of this step.

        Raises:
            ProtocolError: they are not.
            RaymoeError: a commit of it failed.
        """
        self.check(version, step)
        if not version.sealed or version.gone:
            raise ProtocolError(f"expert host {self._id} has not sealed the gradients of step {step}")

    def close(self) -> None:
        """Hang up on other holders."""
        for version in self.held.values():
            if version.summing is not None:
                version.summing.close()

    def leave(self, epochs: Sequence[int]) -> None:
        """End what is under way for all epochs but these."""
        for epoch, version in self.held.items():
            if epoch not in epochs and version.summing is not None:
                version.summing.close()

    def settle(self, version: Version, step: int, timeout: float) -> None:
        """Wait for a commit that is under way; then the version has to be at `step`.

        Raises:
            ProtocolError: it is at another step.
            RaymoeError: a commit of it failed.
        """
        with self.changed:
            if step == version.step + 1 and version.sealed:
                self.changed.wait_for(
                    lambda: version.step >= step or version.gone or version.failure is not None, timeout
                )
        self.check(version, step)

    def check(self, version: Version, step: int) -> None:
        """Raises unless the version is at a step boundary; if so, all that was read since `settle` is of it.

        Raises:
            ProtocolError: it is at another step, or on its way to one.
            RaymoeError: a commit of it failed.
        """
        if version.failure is not None:
            raise RaymoeError(version.failure)
        if version.step != step or version.moving:
            at = f"commits step {version.step}" if version.moving else f"is at step {version.step}"
            raise ProtocolError(f"expert host {self._id} {at}, not at step {step}")


__all__ = ["Version", "Versions"]
