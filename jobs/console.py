"""Output of commands: progress and notes on stderr, results on stdout, errors as one line each."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from errors import RaymoeError

_P = ParamSpec("_P")
_R = TypeVar("_R")

INTERRUPTED: Final = 130
"""Exit code of a command that Ctrl-C ended, by convention of shells."""

_PLAIN_SECONDS = 5.0  # between progress lines without a terminal


class Progress:
    """The progress of a run: a bar on a terminal, otherwise a line every few seconds.

    Args:
        total: Number of steps of the whole run.
        console: Where to print; by default stderr.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._total = total
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._done = 0
        self._shown = -math.inf
        self._bars: Bars | None = None
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
                transient=False,
            )
            self._task = self._bars.add_task("", total=total)
            self._bars.start()

    def update(
        self, step: int, *, loss: float, tokens_per_second: float, max_violation: float, note: str = ""
    ) -> None:
        """Show the state of the run.

        Args:
            step: Number of steps done.
            loss: Loss of the last step, nats per token.
            tokens_per_second: Training speed over all workers.
            max_violation: MaxVio, averaged over the layers; 0 is perfect balance.
            note: Additional text, such as a validation loss.
        """
        self._done = step
        self._first = self._first or (step, self._clock())
        words = f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  MaxVio {max_violation:.2f}"
        words += f"  {note}" if note else ""
        left = self.seconds_left()
        if left is not None:
            words += f"  {_duration(left)} left"
        if self._bars is not None:
            self._bars.update(self._task, completed=step, description=words)
            return
        now = self._clock()
        if now - self._shown >= _PLAIN_SECONDS or step >= self._total:
            self._shown = now
            self._line(f"step {step}/{self._total}  {words}")

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self._line(text)

    def seconds_left(self) -> float | None:
        """Estimated remaining seconds, from the speed since the first update; None before the second."""
        if self._first is None or self._done <= self._first[0]:
            return None
        step, start = self._first
        return (self._clock() - start) / (self._done - step) * (self._total - self._done)

    def close(self) -> None:
        """Stop updating, and leave the last state on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say(text: str) -> None:
    """Print a line on stderr, for a command without a `Progress`."""
    print(text, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 file`, `1,200 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def own_error(error: BaseException) -> RaymoeError | None:
    """The `RaymoeError` inside the exceptions that Ray wraps around an error of a task or actor."""
    inner: BaseException | None = error
    for _ in range(16):
        if inner is None:
            break
        # Ray's substitute for a task's error inherits from ours, with a traceback as its text.
        if isinstance(inner, RaymoeError) and not hasattr(inner, "as_instanceof_cause"):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return None


def surfaced(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Print a command's `RaymoeError` as one line per problem, and exit with its exit code.

    With the command's `debug` it is raised, with its traceback. Ctrl-C exits with 130.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            own = own_error(error)
            if own is None or kwargs.get("debug"):
                raise
            for line in str(own).splitlines() or [type(own).__name__]:
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(own.exit_code) from None

    return run


def finish(compute: Callable[[], Mapping[str, Any]], *, as_json: bool) -> None:
    """Run a command's body and print its result as aligned lines, or as one JSON object alone on stdout."""
    if not as_json:
        result = compute()
        width = max((len(name) for name in result), default=0)
        for name, value in result.items():
            print(f"{name.replace('_', ' '):<{width}}  {_words(value)}")
        return
    with _stdout_to_stderr():
        result = compute()
    print(json.dumps(_finite(result), allow_nan=False), flush=True)


@contextmanager
def announcing() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that prints JSON objects on stdout; all other output goes to stderr."""
    with _stdout_to_stderr() as real:

        def announce(result: Mapping[str, Any]) -> None:
            line = json.dumps(_finite(result), allow_nan=False) + "\n"
            if real is None:
                print(line, end="", flush=True)
            else:
                os.write(real, line.encode())

        yield announce


@contextmanager
def _stdout_to_stderr() -> Iterator[int | None]:
    """Redirect stdout of libraries and subprocesses to stderr; yield the descriptor of the real stdout."""
    with redirect_stdout(sys.stderr):
        if sys.__stdout__ is None or sys.__stdout__.closed:
            yield None
            return
        sys.__stdout__.flush()
        kept = os.dup(1)
        try:
            os.dup2(2, 1)
            yield kept
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_words(inner) for inner in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{str(name).replace('_', ' ')} {_words(inner)}" for name, inner in value.items())
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


__all__ = ["INTERRUPTED", "Progress", "announcing", "counted", "finish", "own_error", "say", "surfaced"]
