"""Puts versions of the weights onto the expert hosts: assemble beside the old, publish, drop the old."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from actors.coordinator.host_roster import HostRoster
from actors.coordinator.transfer_plan import TransferPlan, assemblies
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.transfer_orders import Assembly
from errors import RaymoeError, is_loss

_DRAIN_SECONDS = 5.0  # for requests under way on a host that is retired


class VersionInstaller:
    """Commands the hosts to hold the experts of a version. One thread at a time may call.

    Args:
        roster: The hosts.
        layers: Model layer index of each row of a placement.
        reloadable: Whether experts that no host holds can be read again from the version's directory. True in
            serving; False in training, where the experts have changed since.
    """

    def __init__(self, roster: HostRoster, layers: Sequence[int], *, reloadable: bool) -> None:
        self._roster, self._published = roster, roster.published
        self._layers, self._reloadable = layers, reloadable

    def placed(self) -> set[str]:
        """Hosts that the version in use is placed on."""
        current = self._published.current
        return set() if current is None else set(current.placement.sites)

    def assemble(
        self, plans: Sequence[TransferPlan], step: int | None, what: str = "assemble its experts"
    ) -> None:
        """Have all hosts assemble their parts of these versions; after a failure all drop their parts.

        Args:
            step: In training, the step that the experts' state is for.
            what: The action, for error messages.

        Raises:
            RaymoeError: A host failed.
        """
        members = self._roster.hosts()
        infos = {id: info for id, (info, _) in members.items()}
        orders = [assemblies(plan, infos, self._layers, step) for plan in plans]

        def obey(id: str) -> None:
            for order in orders:
                members[id][1].assemble(order[id])

        try:
            self._roster.commands.on_all(members, what, obey)
        except RaymoeError:
            self._drop_unpublished(step)
            raise

    def publish(self, versions: Sequence[PlacedWeights]) -> None:
        """Make these versions the only published ones; hosts drop all others, and empty ones may leave."""
        if not self._reloadable:
            versions = [replace(version, directory=None) for version in versions]
        self._published.publish(versions, self._roster.infos())
        self.retain([version.epoch for version in versions])
        self._drain(set(self._roster.leaving()) - self.placed())
        self._roster.record_holders(self.placed())

    def retain(self, epochs: Sequence[int]) -> None:
        """Have hosts drop all other epochs; the failure detector deals with hosts that do not answer."""
        members = self._roster.hosts()

        def retain(id: str) -> None:
            try:
                members[id][1].retain(*epochs)
            except RaymoeError as error:
                if not is_loss(error):
                    raise
                members[id][1].retain(*epochs)  # only the reply may have been lost

        with suppress(RaymoeError):
            self._roster.commands.on_all(members, "drop experts", retain)

    def _drop_unpublished(self, step: int | None) -> None:
        """Return the hosts to the published versions; hosts that joined for the failed one hold nothing."""
        live, members = self._published.live, self._roster.hosts()

        def hold_nothing(id: str) -> None:
            for version in live:
                members[id][1].assemble(Assembly(epoch=version.epoch, experts={}, step=step))

        if live:
            with suppress(RaymoeError):
                self._roster.commands.on_all(members.keys() - self.placed(), "hold nothing", hold_nothing)
            self.retain([version.epoch for version in live])

    def _drain(self, leaving: Iterable[str]) -> None:
        """Wait until retired hosts have answered the requests under way."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        hosts = self._roster.hosts()
        for id in leaving:
            with suppress(RaymoeError):
                while id in hosts and hosts[id][1].stats().in_flight and time.monotonic() < deadline:
                    time.sleep(0.005)


__all__ = ["VersionInstaller"]
