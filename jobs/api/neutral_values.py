"""Parameters of OpenAI's and vLLM's interfaces that have no effect here, and their neutral values.

A neutral value asks for what happens anyway, so it is accepted. Any other value of such a parameter would
change the answer and is refused. A null is always neutral.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Neutral = Callable[[Any], bool]


def _one_of(*values: Any) -> Neutral:
    """Accept these values, of the same type."""
    return lambda given: any(type(given) is type(value) and given == value for value in values)


def _of_type(*types: type) -> Neutral:
    """Accept every value of these types."""
    return lambda given: type(given) in types


def _is_plain_text(given: Any) -> bool:
    return isinstance(given, dict) and given.get("type") == "text"


_nothing: Neutral = _one_of()
_false, _true = _one_of(False), _one_of(True)
_text, _switch, _object = _of_type(str), _of_type(bool), _of_type(dict)

SHARED: Mapping[str, Neutral] = {
    # What is stored or accounted for elsewhere than in the answer.
    "metadata": _object,
    "store": _switch,
    "service_tier": _text,
    "safety_identifier": _text,
    "prompt_cache_key": _text,
    "prompt_cache_retention": _text,
    "prompt_cache_options": _object,
    # What vLLM adds.
    "use_beam_search": _false,
    "length_penalty": _one_of(1, 1.0),
    "include_stop_str_in_output": _false,
    "skip_special_tokens": _true,
    "spaces_between_special_tokens": _true,
    "truncate_prompt_tokens": _nothing,
    "prompt_logprobs": _nothing,
    "allowed_token_ids": _nothing,
    "bad_words": _one_of([]),
    "logits_processors": _one_of([]),
    "response_format": _is_plain_text,
    "structured_outputs": _nothing,
    "guided_json": _nothing,
    "guided_regex": _nothing,
    "guided_choice": _nothing,
    "guided_grammar": _nothing,
    "priority": _one_of(0),
    "request_id": _nothing,
    "return_token_ids": _false,
    "return_tokens_as_token_ids": _false,
    "cache_salt": _nothing,
    "kv_transfer_params": _nothing,
    "vllm_xargs": _one_of({}),
}

_OF_COMPLETIONS: Mapping[str, Neutral] = {
    "suffix": _one_of(""),
    "prompt_embeds": _nothing,
}

_OF_CHATS: Mapping[str, Neutral] = {
    "tools": _one_of([]),
    "tool_choice": _one_of("none", "auto"),
    "parallel_tool_calls": _switch,
    "functions": _one_of([]),
    "function_call": _one_of("none", "auto"),
    "modalities": _one_of(["text"]),
    "audio": _nothing,
    "prediction": _object,  # speeds an answer up and does not change it
    "reasoning_effort": _one_of("none"),
    "verbosity": _one_of("medium"),
    "web_search_options": _nothing,
    "add_generation_prompt": _true,
    "continue_final_message": _false,
    "chat_template": _nothing,
    "chat_template_kwargs": _one_of({}),
    "documents": _one_of([]),
    "include_reasoning": _true,
    "mm_processor_kwargs": _one_of({}),
}

# Clients send the defaults of one kind of request with the other kind, too.
_OF_BOTH: Mapping[str, Neutral] = {**SHARED, **_OF_COMPLETIONS, **_OF_CHATS}

COMPLETION: Mapping[str, Neutral] = {
    **_OF_BOTH,
    "add_special_tokens": _true,
    "top_logprobs": _one_of(0),
}

CHAT: Mapping[str, Neutral] = {
    **_OF_BOTH,
    "add_special_tokens": _false,
    "best_of": _one_of(1),
    "echo": _false,
}

STREAM: Mapping[str, Neutral] = {
    "continuous_usage_stats": _false,
    "include_obfuscation": _switch,  # pads chunks against listeners; the text is the same
}

MESSAGE: Mapping[str, Neutral] = {
    "tool_calls": _one_of([]),
    "annotations": _one_of([]),
}

KNOWN = frozenset({*COMPLETION, *CHAT, *STREAM})
"""Names of parameters that only neutral values are accepted of."""


def without_neutral(values: Any, neutral: Mapping[str, Neutral]) -> Any:
    """The fields of a JSON object that are neither null nor neutral; what is no object is left as it is."""
    if not isinstance(values, dict):
        return values
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (name in neutral and neutral[name](value))
    }


__all__ = [
    "CHAT",
    "COMPLETION",
    "KNOWN",
    "MESSAGE",
    "STREAM",
    "Neutral",
    "without_neutral",
]
