"""Templates that loop, grow, fail or end their process harm the one conversation that they render."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from errors import DataError, QueueFull, ResourceError
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.chat.rendering_process import RenderLimits
from support.waiting import wait_until

LIMITS = RenderLimits(cpu_seconds=0.15, memory=64 << 20, characters=1000)
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    FOREVER: "more than 0.15 s of CPU time",
    "{{ lipsum(n=10000000) }}": "more than 0.15 s of CPU time",
    "{{ (messages|length + 9) ** 99999999 % 7 }}": "more than 0.15 s of CPU time",
    "{{ messages[0].content * 999999999 }}": "more than 64 MiB of memory",
    "{{ messages[0].content * 1001 }}": "more than 1000 characters",
    "{% for i in range(99999) %}{{ lipsum }}{% endfor %}": "more than 1000 characters",
    "{{ range(999999999) | list }}": "OverflowError",
    "{{ 1 / (messages|length - 1) }}": "ZeroDivisionError",
    "{% for call in messages[0].tool_calls %}{% endfor %}": "'int' object is not iterable",
    "{{ messages[0].nothing.at_all }}": "has no attribute 'nothing'",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ namespace(_x=1) }}": "_x",
    "{{ messages.append(1) }}": "unsafe",
    "{{ raise_exception('no\\n such role' ~ 'é' * 9999) }}": "no such roleééé",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ messages | tojson(indent=messages) }}": "TypeError",
}


def message(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, "tool_calls": 5}]


def workers() -> set[psutil.Process]:
    """The processes that this one renders in; other tests may have some as well."""
    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended meanwhile
            if "rendering_worker" in " ".join(child.cmdline()):
                found.add(child)
    return found


def play(source: str, scene: Callable[[ChatRenderer], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        renderer = ChatRenderer(ChatTemplate(source=source), **{"limits": LIMITS, **options})
        try:
            await scene(renderer)
        finally:
            renderer.close()

    asyncio.run(run())


def test_what_a_hostile_template_does_is_an_error_of_one_line() -> None:
    """All in one template, chosen by the message, so that one process is used until one of them ends it."""
    branches = "".join(
        f"{{% if messages[0].name == '{index}' %}}{source}{{% endif %}}"
        for index, source in enumerate(HOSTILE)
    )

    async def scene(renderer: ChatRenderer) -> None:
        await renderer.start()
        for index, expected in enumerate(HOSTILE.values()):
            with pytest.raises(DataError, match="chat template cannot render these messages") as caught:
                await renderer.render([{**message("x")[0], "name": str(index)}])
            assert expected in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 600
            assert await renderer.render([{"content": "ab"}]) == "ab"

    play(branches + "{{ messages[0].content if not messages[0].name }}", scene)


def test_others_are_rendered_meanwhile_and_a_process_that_was_ended_is_replaced() -> None:
    others = workers()
    source = "{% if messages[0].content == 'loop' %}" + FOREVER + "{% endif %}{{ messages[0].content }}"

    async def scene(renderer: ChatRenderer) -> None:
        await renderer.start()
        looping = asyncio.create_task(renderer.render(message("loop")))
        assert await renderer.render(message("hi")) == "hi"
        assert not looping.done()
        with pytest.raises(DataError, match="CPU time"):
            await looping
        texts = [f"text {index}" for index in range(20)]
        assert await asyncio.gather(*(renderer.render(message(text)) for text in texts)) == texts
        assert 1 <= len(workers() - others) <= 2

    play(source, scene, limits=RenderLimits(cpu_seconds=0.5))
    wait_until(lambda: workers() <= others)  # one that was being started ends as soon as it has


def test_a_process_that_died_while_idle_fails_no_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    others = workers()

    async def scene(renderer: ChatRenderer) -> None:
        await renderer.start()
        for process in workers() - others:
            process.kill()
            process.wait(30)
        assert await renderer.render(message("hi")) == "hi"
        for process in workers() - others:
            process.kill()
            process.wait(30)
        monkeypatch.setattr("jobs.chat.chat_renderer.RenderingProcess", _cannot_start)
        with pytest.raises(ResourceError, match="no memory"):
            await renderer.render(message("hi"))

    play("{{ messages[0].content }}", scene)


def _cannot_start(*_: object) -> None:
    raise DataError("no memory for a process")


def test_a_cancelled_conversation_is_dropped_and_no_one_gets_its_text() -> None:
    async def scene(renderer: ChatRenderer) -> None:
        await renderer.start()
        given_up = [asyncio.create_task(renderer.render(message(f"old {index}"))) for index in range(9)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        assert await renderer.render(message("new")) == "new"
        assert all(task.cancelled() for task in given_up)

    play("{{ messages[0].content }}", scene)


def test_no_more_conversations_wait_than_may() -> None:
    async def scene(renderer: ChatRenderer) -> None:
        await renderer.start()
        waiting = [asyncio.create_task(renderer.render(message(str(index)))) for index in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="3 conversations wait"):
            await renderer.render(message("more"))
        assert await asyncio.gather(*waiting) == ["0", "1", "2", "3", "4"]

    play("{{ messages[0].content }}", scene, waiting=3)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ broken", "line 1"),
        ("a\n{% break %}", "break"),
        ("{{ 9 ** 99999999 % 7 }}", "CPU time"),  # Jinja computes constants when it reads a template
        ("{% for m in messages %}", "endfor"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused_at_the_start(source: str, expected: str) -> None:
    others = workers()

    async def scene(renderer: ChatRenderer) -> None:
        with pytest.raises(DataError, match="the chat template cannot be read") as caught:
            await renderer.start()
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    play(source, scene)
    wait_until(lambda: workers() <= others)  # one that was being started ends as soon as it has
