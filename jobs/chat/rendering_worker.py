"""The process that renders a chat template, which is a program that others have written."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from jobs.chat.template_environment import compile_template, render
from jobs.confined.confined_worker import Answer, answer_lines


def main() -> None:
    """Answer lists of messages by prompts; the settings are `{"source", "special", "characters"}`."""
    answer_lines(_begin, _told)


def _begin(settings: Any, _: bytes) -> Answer:
    template = compile_template(settings["source"])
    return lambda messages: render(template, messages, settings["special"], characters=settings["characters"])


def _told(error: BaseException) -> str:
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


__all__ = ["main"]
