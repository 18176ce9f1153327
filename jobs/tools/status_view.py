"""A job's status on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.console import counted

_SHOWN_EVENTS = 12


def shown(status: Mapping[str, Any]) -> Group:
    """A job's status as tables for the terminal."""
    events = Table(box=None, pad_edge=False, show_header=False)
    for event in status["events"][-_SHOWN_EVENTS:]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        events.add_row(at, event["kind"], event["text"])
    return Group(*map(Text, summary_lines(status)), Text(""), _hosts(status), Text(""), events)


def summary_lines(status: Mapping[str, Any]) -> list[str]:
    """What the job is, does and consists of, as sentences."""
    job = status["job"]
    called = f"{job['name']} ({job['id']})" if job["id"] else "the job"
    if status["mode"] == "serve":
        does = f"serves the weights {status['weights'] or '?'}, after {counted(status['reloads'], 'reload')}"
    else:
        does = f"trains, at step {status['step']:,} of {status['steps']:,}, {status['steps_to_go']:,} to go"
        if status["attempt"]:
            does += f", interrupted {counted(status['attempt'], 'time')}"
    lines = [
        f"{called} {does}",
        f"epoch {status['epoch']}, {len(status['hosts'])} of {status['wanted']} expert hosts, "
        f"{status['replicas_min']} to {status['replicas_max']} replicas of an expert",
    ]
    if job["cluster"]:
        lines[1] += f"; Ray cluster {job['cluster']}"
    return lines + ([status["lacking"]] if status["lacking"] else [])


def watch(ask: Callable[[], dict[str, Any]], *, every: float = 1.0) -> None:
    """Show a job's status until Ctrl-C."""
    with Live(shown(ask()), console=Console(highlight=False), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(shown(ask()), refresh=True)
        except KeyboardInterrupt:
            return


def _hosts(status: Mapping[str, Any]) -> Table:
    hosts = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "state", "node", "pid", "experts", "in flight", "rows", "channel"):
        hosts.add_column(
            column, justify="right" if column in ("pid", "experts", "in flight", "rows") else "left"
        )
    for host in status["hosts"]:
        state = host["state"] if host["answers"] else f"{host['state']}, silent"
        hosts.add_row(
            host["id"],
            state,
            host["node"][:8],
            str(host["pid"]),
            str(host["experts"]),
            str(host["in_flight"]),
            f"{host['rows']:,}",
            host["channel"],
        )
    return hosts


__all__ = ["shown", "summary_lines", "watch"]
