"""A tiny model, and `raymoe serve` in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import save_pretrained
from model.config import ModelConfig

PROMPT = "the cat sat on"
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=512,
    num_nextn_predict_layers=1,
)

KEY = "a-key-of-the-tests-of-serve"
"""The API key that the clients of these tests send."""

_DIGEST = hashlib.sha256(KEY.encode()).hexdigest()

ONE_REPLICA: dict[str, object] = {"cluster.expert_hosts": 2, "serving.api_keys": f'["sha256:{_DIGEST}"]'}
"""Settings of the server that tests of a single replica of the trunk share."""

TWO_REPLICAS: dict[str, object] = {
    "serving.replicas": 2,
    "serving.cpus_per_replica": 0.5,
    "cluster.expert_hosts": 3,
    "cluster.replicas": 2,
    "cluster.dead_after": 2.0,
}
"""Settings of the server that tests of lost replicas, lost hosts and reloads share."""


def tiny_model(seed: int = 0, **changes: object) -> CausalLM:
    """A random model in float64, so that rounding decides no tie between tokens."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(**{**CONFIG.model_dump(), **changes}), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def tiny_tokenizer(text: str = "the cat sat on the mat and the hat") -> tuple[Tokenizer, int]:
    return train_tokenizer([text] * 4, 290)


def save_model(model: CausalLM, directory: Path) -> Path:
    """Save a model with a tokenizer."""
    save_pretrained(model, directory)
    save_tokenizer(*tiny_tokenizer(), directory)
    return directory


def greedy(model: CausalLM, prompt: str, count: int) -> list[int]:
    """Tokens after the prompt by a full forward pass for each."""
    tokenizer, _ = tiny_tokenizer()
    ids: list[int] = tokenizer.encode(prompt).ids
    known, start = tokenizer.get_vocab_size(), len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :known].argmax()))
    return ids[start:]


@dataclass(frozen=True)
class ServeProcess:
    """A running `raymoe serve`."""

    url: str
    grpc: str | None
    ray: str
    coordinator: str
    process: subprocess.Popen[str]
    model: CausalLM
    directory: Path
    client: OpenAI
    log: Path

    @property
    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def greedy(self, count: int) -> list[int]:
        """Tokens after the prompt by a full forward pass for each."""
        return greedy(self.model, PROMPT, count)

    def metrics(self) -> list[str]:
        """Lines of `/metrics`."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return lines

    def gauges(self) -> dict[str, float]:
        """Gauges of requests and pages in use, of every replica."""
        lines = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        found = {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(tuple(f"raymoe_{name}{{" for name in names))
        }
        assert found
        return found

    def hosts(self) -> list[psutil.Process]:
        """The processes of the server's expert hosts."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "ExpertHost" in " ".join(child.cmdline())
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(directory: Path, log: Path, *options: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start the command; return the process, and the addresses that it prints."""
    errors = log.open("w")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.cli", "serve", str(directory), "--json"),
            *("--port", str(free_port()), "--set", "cluster.expert_hosts=2", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        start_new_session=True,
    )
    errors.close()
    assert process.stdout is not None
    with process.stdout as told:
        line = told.readline()
    if not line:
        process.wait(60)
        pytest.fail(log.read_text())
    return process, json.loads(line)


@contextmanager
def running(model: CausalLM, directory: Path, log: Path, *options: str) -> Iterator[ServeProcess]:
    """A running server; at the end it is told to stop, and must leave no process."""
    process, at = start(directory, log, *options)
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        with OpenAI(base_url=f"{at['url']}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            yield ServeProcess(
                at["url"], at["grpc"], at["ray"], at["coordinator"], process, model, directory, client, log
            )
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
        raise
    os.killpg(process.pid, signal.SIGTERM)  # to the process group, as service managers do
    assert process.wait(90) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


class SharedServer:
    """A running `raymoe serve` that is kept as long as tests ask for one with the same settings.

    Attributes:
        folder: Directory for the next server's model and log.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self._settings: dict[str, object] | None = None
        self._server: ServeProcess | None = None
        self._closing = ExitStack()

    def with_settings(self, settings: dict[str, object], *, grpc: bool = False) -> ServeProcess:
        """A server of `tiny_model()` with these settings; a server with other settings is stopped first."""
        wanted = {**settings, "grpc": grpc}
        if self._server is None or self._settings != wanted or self._server.process.poll() is not None:
            self.close()
            options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
            if grpc:
                options += ["--grpc-port", str(free_port())]
            model = tiny_model()
            directory = save_model(model, Path(tempfile.mkdtemp(dir=self.folder)) / "tiny")
            log = directory.with_name("serve.log")
            self._server = self._closing.enter_context(running(model, directory, log, *options))
            self._settings = wanted
        return self._server

    def close(self) -> None:
        """Tell the server to stop, and check that nothing is left of it."""
        self._server = self._settings = None
        self._closing.close()
