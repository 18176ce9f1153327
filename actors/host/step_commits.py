"""A host's part in the commit of an optimizer step: seal its gradients, report their norm, apply AdamW.

The coordinator decides the clip factor and the learning rate in between. Every call may be retried: the host
applies each step once.
"""

from __future__ import annotations

from actors.host.hosted_versions import HostedVersion, HostedVersions
from actors.messages.timeline import Timeline
from errors import ProtocolError


class StepCommits:
    """Commits the steps of the current version.

    Args:
        host: Id of the host, for error messages.
        versions: The experts, by epoch.
        timeline: Records each committed step.
    """

    def __init__(self, host: str, versions: HostedVersions, timeline: Timeline | None) -> None:
        self._host = host
        self._versions = versions
        self._timeline = timeline

    def seal(self, step: int, epoch: int | None) -> HostedVersion:
        """Accept no more gradients of a step, so that other holders of experts can fetch them.

        Raises:
            ProtocolError: the host is at another step or epoch.
        """
        with self._versions.commit_lock:
            version = self._versions.at(epoch)
            self._versions.check(version, step)
            version.sealed = True
            return version

    def prepare(self, step: int, epoch: int | None) -> float:
        """Seal the gradients of a step and return the sum of their squares, in float64.

        Gradients of experts with several holders are summed over the holders, all of which have sealed them;
        one holder counts the sum.

        Args:
            epoch: The epoch that the caller believes current; None accepts any.

        Raises:
            ProtocolError: the host is at another step or epoch.
            ChannelError: another holder of its experts is lost.
        """
        version = self.seal(step, epoch)
        # Without the lock: a holder that hangs must not block other calls.
        sums = version.shared_sums
        if sums is not None:
            sums.gather(version.layers, step)
            return sums.squared_norm(version.layers)
        optimizers = (layer.optimizer for layer in version.layers.values())
        return sum((one.squared_norm() for one in optimizers if one is not None), 0.0)

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None) -> None:
        """Apply AdamW with the gradients times `scale`, layer by layer; each layer is usable at once.

        A retry of the last commit does nothing. Activations that no BACKWARD used are dropped.

        Raises:
            ProtocolError: the step is neither the prepared one nor the last committed one, or the epoch is
                not the current one because the caller belongs to an earlier attempt.
        """
        with self._versions.commit_lock:
            version = self._versions.at(epoch)
            if step == version.step - 1:
                return
            self._versions.check(version, step)
            sums = version.shared_sums
            if not version.sealed or not (sums is None or sums.has(step)):
                raise ProtocolError(f"commit of step {step} on expert host {self._host} without a prepare")
            self._apply(version, learning_rate, scale)
            if self._timeline is not None:
                self._timeline.done(step)

    def _apply(self, version: HostedVersion, learning_rate: float, scale: float) -> None:
        changed, step, sums = self._versions.changed, version.step, version.shared_sums
        version.moving = True
        try:
            version.ledger.clear()
            for index, layer in version.layers.items():
                if layer.optimizer is not None:
                    if sums is not None:
                        sums.apply(index, layer)
                    layer.optimizer.step(learning_rate, scale)
                    layer.optimizer.zero_grad()
                with changed:
                    layer.step = step + 1
                    changed.notify_all()
        except Exception as error:
            # Some layers may have moved and others not: the version belongs to no single step any more.
            with changed:
                version.failure = f"expert host {self._host} failed in the commit of step {step}: {error}"
                changed.notify_all()
            raise
        with changed:
            version.step, version.sealed, version.moving = step + 1, False, False
            changed.notify_all()


__all__ = ["StepCommits"]
