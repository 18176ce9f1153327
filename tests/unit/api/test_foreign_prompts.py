"""What the interface makes of requests to a model with BOS, several end tokens and defaults of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.delta import Delta, Listener
from engine.params import SamplingParams
from engine.sequence import TokenLogprobs
from jobs.api import build_api
from jobs.api.backend import Backend, Limits
from jobs.api.serving_metrics import ServingMetrics
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.data.tokenizer import load_tokenizer
from support.foreign_model import BOS, GENERATION, MODEL, TURN_END, write_foreign_files

transformers = pytest.importorskip("transformers")
MESSAGES = [{"role": "user", "content": "the cat"}]


class RecordingService:
    """Ends every request at once, and remembers it."""

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.params = SamplingParams()

    def submit(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        limit: int | None = None,
    ) -> asyncio.Future[None]:
        self.prompt, self.params = list(prompt), params
        told = [] if params.logprobs is None else [TokenLogprobs(token=-1.0, best=[])]
        before = told * (len(prompt) - 1) if params.prompt_logprobs else []
        listener(Delta(tokens=[TURN_END], logprobs=told, prompt_logprobs=before, finish_reason="stop"))
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def cancel(self, id: str) -> None:
        """Nothing is under way."""


async def _well() -> None:
    return None


class Recorded:
    """The interface of the model whose files are in a folder, over a recording service."""

    def __init__(self, folder: Path, *, defaults: GenerationDefaults, plain: bool = False) -> None:
        text = load_tokenizer(folder, MODEL.vocab_size)
        self.service = RecordingService()
        backend = Backend(
            model="foreign",
            version=lambda: "v1",
            service=self.service,
            tokenizer=text.tokenizer,
            chat=ChatRenderer(ChatTemplate() if plain else ChatTemplate.from_directory(folder)),
            longest=128,
            end_of_text=text.end_of_text,
            limits=Limits(),
            health=_well,
            metrics=ServingMetrics("foreign"),
            defaults=defaults,
        )
        self._client = TestClient(build_api(lambda: backend))

    def post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_foreign_files(folder)
    return folder


@pytest.mark.parametrize("text", ["the cat", "", "a</s>b<|im_end|> c", "<s>twice"])
def test_a_prompt_gets_the_tokens_that_the_post_processor_adds(folder: Path, text: str) -> None:
    served = Recorded(folder, defaults=GenerationDefaults())
    answer = served.post("completions", prompt=text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert served.service.prompt == theirs
    assert answer["usage"]["prompt_tokens"] == len(theirs)
    served.post("completions", prompt=theirs)
    assert served.service.prompt == theirs  # token ids are taken as they are


@pytest.mark.parametrize("prompt", ["the cat", [BOS, 300, 301]])
def test_an_echo_is_the_prompt_that_was_given(folder: Path, prompt: Any) -> None:
    """As vLLM has it: BOS is among the tokens, and not in the text of a prompt that came as text."""
    served = Recorded(folder, defaults=GenerationDefaults())
    answer = served.post("completions", prompt=prompt, echo=True, logprobs=0)["choices"][0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = theirs(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    assert answer["text"] == (prompt if isinstance(prompt, str) else theirs.decode(prompt))
    shown = answer["logprobs"]
    assert shown["tokens"][0] == "<s>"
    assert len(shown["text_offset"]) == len(tokens) + 1
    first = 0 if isinstance(prompt, str) else len("<s>")
    assert shown["text_offset"][:2] == [0, first]
    assert shown["text_offset"][-1] == len(answer["text"])


def test_the_echo_of_an_empty_prompt_is_empty(folder: Path) -> None:
    served = Recorded(folder, defaults=GenerationDefaults())
    for prompt in ([[]], [""]):
        answer = served.post("completions", prompt=prompt, echo=True, max_tokens=1)["choices"][0]
        assert served.service.prompt
        assert answer["text"] == ""


def test_a_conversation_has_bos_once(folder: Path) -> None:
    served = Recorded(folder, defaults=GenerationDefaults())
    served.post("chat/completions", messages=MESSAGES)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert served.service.prompt == expected
    assert expected.count(BOS) == 1
    without = Recorded(folder, defaults=GenerationDefaults(), plain=True)
    without.post("chat/completions", messages=MESSAGES)
    assert without.service.prompt == theirs("user: the cat\nassistant:")["input_ids"]
    assert without.service.prompt.count(BOS) == 1


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_a_request_does_not_set_is_the_default_of_the_model(folder: Path, path: str) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": "the"}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    served = Recorded(folder, defaults=GenerationDefaults.of(folder))
    served.post(path, **asked)
    params = served.service.params
    for name in names:
        assert getattr(params, name) == GENERATION.get(name, getattr(SamplingParams(), name)), name
    assert params.max_tokens == (7 if path.startswith("chat") else 16)
    served.post(path, **asked, temperature=1.0, top_p=1.0, top_k=None, max_tokens=11)
    params = served.service.params
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, 11)
    assert params.top_k == GENERATION["top_k"]  # null is the default


def test_defaults_can_be_left_out(folder: Path) -> None:
    served = Recorded(folder, defaults=GenerationDefaults.of(folder, "none"))
    served.post("completions", prompt="the", max_tokens=3)
    assert served.service.params == SamplingParams(max_tokens=3)
