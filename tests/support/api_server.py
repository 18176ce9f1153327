"""The OpenAI interface over an engine in this process, with a client."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer

from engine.engine import Engine
from engine.service import EngineService
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from jobs.api import build_api
from jobs.api.api_keys import ApiKeys
from jobs.api.backend import Backend, Limits
from jobs.api.serving_metrics import ExpertFigures, ServingMetrics
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.data.tokenizer import train_tokenizer
from model.causal_lm import CausalLM
from model.config import ModelConfig

PROMPT = "the cat sat on"


class Served:
    """An interface over an engine in this process, and an HTTP client of it."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        keys: Sequence[str] = (),
        tokenizer: tuple[Tokenizer, int] | None = None,
        dtype: torch.dtype = torch.float32,
        settings: EngineSettings | None = None,
    ) -> None:
        made = tokenizer or train_tokenizer(["the cat sat on the mat and the hat"] * 4, 290)
        self.tokenizer, end = made
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=max(300, self.tokenizer.get_vocab_size() + 10),
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            num_nextn_predict_layers=1,
        )
        model = CausalLM(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
        self.engine = Engine(
            TrunkWeights.of(model.trunk),
            model.experts,
            settings or EngineSettings(cache_tokens=1024),
            end_of_text=[end],
            vocabulary=self.tokenizer.get_vocab_size(),
        )
        self.service = EngineService(self.engine, self.tokenizer, version="v1")
        self.unwell: str | None = None
        self.backend = Backend(
            model="tiny",
            version=lambda: self.service.version,
            service=self.service,
            tokenizer=self.tokenizer,
            chat=ChatRenderer(ChatTemplate()),
            longest=self.engine.longest,
            end_of_text=end,
            limits=limits or Limits(),
            keys=ApiKeys(keys),
            health=self.health,
            experts=self.experts,
            metrics=ServingMetrics("tiny"),
        )
        self.client = TestClient(build_api(lambda: self.backend), raise_server_exceptions=False)

    async def health(self) -> str | None:
        return self.unwell

    async def experts(self) -> ExpertFigures:
        return ExpertFigures(wanted=3, hosts=2, replicas=1, in_flight=5, balancedness=None)

    def complete(self, **body: Any) -> Any:
        return self.client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, **body})

    def chat(self, **body: Any) -> Any:
        messages = [{"role": "user", "content": "the cat"}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **body})


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
