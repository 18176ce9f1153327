"""The thread that helps with long contexts ends with its engine."""

from __future__ import annotations

import threading

import numpy as np

from engine.few_rows.assistant import _assist, _end
from kernels.team import Desk


class EndsWhenCleared(threading.Event):
    """An event at which the engine ends just as the assistant begins to sleep."""

    def __init__(self, ended: threading.Event) -> None:
        super().__init__()
        self._over = ended

    def clear(self) -> None:
        _end(self, self._over)
        super().clear()


def test_an_assistant_that_falls_asleep_as_its_engine_ends_ends_too() -> None:
    desk = Desk.of(rows=1, heads=2, width=6, latent=4, pages=1, dtype=np.float64)
    ended = threading.Event()
    work = (desk, np.zeros((1, 4, 6)), 4, EndsWhenCleared(ended), ended)
    thread = threading.Thread(target=_assist, args=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
