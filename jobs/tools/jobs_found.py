"""The jobs that a command has found, and the choice of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Final

from actors.rpc.admin_client import AdminClient
from errors import ConfigError, RaymoeError, ResourceError

HERE: Final = "on this machine"
"""Where jobs are looked for without an address."""

_DESCRIBE_SECONDS, _LISTED_SECONDS = 30.0, 3.0  # for the job that is asked for, and for one of a list


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """A job as its operators see it.

    Attributes:
        coordinator: Address of its coordinator, `grpc:HOST:PORT`; empty if it has none.
        id, name: What it is called; empty if it did not answer when it was looked for.
        cluster: Address of its Ray cluster.
        doing: What it does, in a few words.
    """

    coordinator: str
    id: str = ""
    name: str = ""
    cluster: str = ""
    doing: str = ""

    @property
    def label(self) -> str:
        """Its name, its id and its Ray cluster."""
        if not self.id:
            return f"the job at {self.coordinator.removeprefix('grpc:')}"
        id = f"{self.id}, " if self.id != self.cluster else ""
        return f"{self.name or 'the job'} ({id}Ray cluster {self.cluster})"

    @property
    def trains(self) -> bool:
        """Whether it is known to train a model."""
        return self.doing.startswith("trains")

    def to_dict(self) -> dict[str, str]:
        """What identifies it, as JSON objects have it."""
        values = asdict(self)
        return {name: values[name] for name in ("id", "name", "cluster", "coordinator")}


@dataclass(frozen=True, slots=True)
class JobsFound:
    """The jobs of one place.

    Attributes:
        jobs: Jobs whose coordinator answers, and known jobs whose coordinator does not.
        where: Where they were looked for, as the end of a sentence.
        silent: Names of coordinators' actors that do not answer; nothing is known of their jobs.
    """

    jobs: Sequence[RunningJob]
    where: str
    silent: Sequence[str] = ()

    @property
    def note(self) -> str:
        """A line on coordinators of unknown jobs; empty if there are none."""
        if not self.silent:
            return ""
        return (
            f"{len(self.silent)} coordinator{'s' * (len(self.silent) > 1)} {self.where} did not answer, so "
            f"other jobs may run there: {', '.join(self.silent)}"
        )

    def chosen(self, wanted: str | None) -> RunningJob:
        """The only job, or the one of this name or id.

        Raises:
            ConfigError: There is no such job, or more than one; the error lists them.
            ResourceError: There is none at all.
        """
        if not self.jobs:
            raise ResourceError(
                f"no raymoe job with a coordinator runs {self.where}; `--address` names another Ray cluster, "
                f"`--coordinator HOST:PORT` a job{self._unknown()}"
            )
        if wanted is None:
            if len(self.jobs) == 1:
                return self.jobs[0]
            raise ConfigError(
                f"{len(self.jobs)} jobs run {self.where}; say which with --job NAME or ID{self._listed()}"
            )
        found = [job for job in self.jobs if wanted in (job.id, job.name)]
        if not found:
            raise ConfigError(
                f"--job {wanted}: no job of this name or id runs {self.where}{self._unknown()}"
                f"{self._listed()}"
            )
        if len(found) > 1:
            raise ConfigError(
                f"--job {wanted}: {len(found)} jobs of this name run {self.where}; give the id"
                f"{JobsFound(found, self.where)._listed()}"
            )
        return found[0]

    def _unknown(self) -> str:
        return f". {self.note}" if self.note else ""

    def _listed(self) -> str:
        """The jobs, each on a line of its own."""
        rows = [
            (
                *(job.name or "?", job.id or "?", job.doing),
                *(job.coordinator.removeprefix("grpc:") or "none", job.cluster),
            )
            for job in self.jobs
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "".join(
            f"\n  {name:<{widths[0]}}  {id:<{widths[1]}}  {doing:<{widths[2]}}  coordinator {at}  "
            f"Ray cluster {cluster or '?'}"
            for name, id, doing, at, cluster in rows
        )


def described(coordinator: str, known: RunningJob | None = None) -> RunningJob:
    """The job of a coordinator, as the coordinator describes it.

    Args:
        coordinator: Its address.
        known: The job expected at this address; returned if its coordinator does not answer.

    Raises:
        RaymoeError: The coordinator does not answer, and nothing is known of its job.
    """
    timeout = _DESCRIBE_SECONDS if known is None else _LISTED_SECONDS
    with closing(AdminClient(coordinator, timeout=timeout)) as client:
        try:
            found = RunningJob(coordinator=coordinator, **client.describe())
        except RaymoeError:
            if known is None:
                raise
            return known
    # Another job may listen at the port of one that is about to end.
    return found if known is None or known.id in ("", found.id) else known


__all__ = ["JobsFound", "RunningJob", "described"]
