"""Request bodies, with the names and limits of OpenAI's interface and vLLM's additions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from engine.params import MAX_LOGPROBS, MAX_STOPS, SamplingParams
from jobs.api.neutral_values import CHAT, COMPLETION, MESSAGE, STREAM, Neutral, without_neutral

_INT64 = (1 << 63) - 1

# Names of the branches of unions: parts of the locations in pydantic's errors, which clients are not told.
_TEXT, _LIST, _IDS, _ID_LISTS = BRANCHES = ("(text)", "(list)", "(ids)", "(id lists)")


def _no_bool(value: Any) -> Any:
    """Refuse true and false, which Python counts among the numbers."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _without_nulls(values: Any) -> Any:
    """An object without its nulls, which are defaults."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None}


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
# Strict, and so checked without a call of Python for each of what may be millions.
Token = Annotated[int, Field(strict=True, ge=0)]
Tokens = Annotated[
    list[Token], Field(fail_fast=True)
]  # an error for each of a million values would take a gigabyte


def _branch_of_text(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _LIST if isinstance(value, list) else None


def _branch_of_prompt(value: Any) -> str | None:
    """The kind of a prompt, by its first item."""
    if not isinstance(value, list):
        return _branch_of_text(value)
    first = value[0] if value else ""
    if isinstance(first, str):
        return _LIST
    return _ID_LISTS if isinstance(first, list) else _IDS


def _by(branch: Any, kinds: str) -> Discriminator:
    return Discriminator(branch, custom_error_type="wrong_type", custom_error_message=f"must be {kinds}")


Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[
    Annotated[Stop, Tag(_TEXT)] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag(_LIST)],
    _by(_branch_of_text, "a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[list[str], Field(fail_fast=True), Tag(_LIST)]
    | Annotated[Tokens, Tag(_IDS)]
    | Annotated[list[Tokens], Field(fail_fast=True), Tag(_ID_LISTS)],
    _by(_branch_of_prompt, "a string, a list of strings, a list of token ids, or a list of such lists"),
]


class _Body(BaseModel):
    """A JSON object. Nulls and neutral values count as left out; other unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return without_neutral(values, cls.neutral)


class StreamOptions(_Body):
    """Options of a streamed response."""

    neutral = STREAM

    include_usage: bool = False


class _Generation(_Body):
    """Fields that both kinds of request share."""

    model: str | None = None
    n: Annotated[Integer, Field(ge=1, le=64)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Integer, Field(ge=-1)] = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    seed: Annotated[Integer, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[Number, Field(ge=-100, le=100)]] | None,
        BeforeValidator(_without_nulls),
    ] = None
    stop: Stops | None = None
    stop_token_ids: Tokens | None = None
    min_tokens: Annotated[Integer, Field(ge=0)] = 0
    ignore_eos: bool = False
    user: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true; leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int, index: int, logprobs: int | None, echo: bool) -> SamplingParams:
        """The sampling parameters of choice number `index`.

        Raises:
            ConfigError: Values contradict each other.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + index,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
        )


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


class CompletionRequest(_Generation):
    """`POST /v1/completions`."""

    neutral = COMPLETION

    prompt: Prompt
    max_tokens: Annotated[Integer, Field(ge=0)] = 16
    logprobs: Annotated[
        Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None, BeforeValidator(_false_is_none)
    ] = None
    echo: bool = False
    best_of: Annotated[Integer, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of ({self.best_of}) must equal n ({self.n}); nothing is ranked")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which needs echo; ask for one token at least")
        if isinstance(self.prompt, list) and not self.prompt:
            raise ValueError("prompt is an empty list; give one prompt at least")
        return self


class TextPart(BaseModel):
    """One content part of a message; `text` is the only accepted type."""

    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value != "text":
            raise ValueError(f"a part of the type {value!r} cannot be read; this model reads text alone")
        return value


Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[TextPart], Field(fail_fast=True), Tag(_LIST)],
    _by(_branch_of_text, "a string or a list of parts"),
]


class Message(_Body):
    """One message of a conversation; fields beside these are for the chat template."""

    model_config = ConfigDict(extra="allow")
    neutral = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message as a dictionary for chat templates."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        values = {**self.model_dump(exclude_none=True), "content": content or ""}
        if content is None and "tool_calls" in values:
            del values["content"]  # as transformers has it, where templates ask whether there is any
        return values


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    neutral = CHAT

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


__all__ = ["BRANCHES", "ChatRequest", "CompletionRequest", "Message", "StreamOptions", "TextPart"]
