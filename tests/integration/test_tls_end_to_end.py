"""Training and serving with mutual TLS between all processes; callers without a certificate are refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from channels.grpc import tls
from jobs.tools.certs import make_certificates
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from support.commands.serve import PROMPT, running, save_model, tiny_model, tiny_tokenizer
from support.commands.train import finish, start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_certificates(tmp_path / "tls", days=1, ca_days=1)
    monkeypatch.setenv(tls.VARIABLE, str(tmp_path / "tls"))
    return tmp_path / "tls"


def status(coordinator: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "status", "--coordinator", coordinator]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_model_is_served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    directory = save_model(model, tmp_path / "tiny")
    options = ("--set", "cluster.channel=grpc", "--set", "serving.replicas=2")
    with running(model, directory, tmp_path / "serve.log", *options) as server:

        def text() -> str:
            answer = server.client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        tokenizer, _ = tiny_tokenizer()
        assert text() == tokenizer.decode(server.greedy(20))
        assert status(server.coordinator).returncode == 0
        with monkeypatch.context() as without:
            without.delenv(tls.VARIABLE)
            refused = status(server.coordinator)
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        # A new certificate, and a host that is started with it.
        make_certificates(folder, days=1, ca_days=1)
        for host in server.hosts():
            host.kill()
        assert text() == tokenizer.decode(server.greedy(20))


def test_a_model_is_trained(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    for i, begin in enumerate(range(0, len(text), 8000)):
        (corpus / f"{i:02}.txt").write_text(text[begin : begin + 8000], encoding="utf-8")
    output = tmp_path / "run"
    finish(start(corpus, output, training__steps=12, training__workers=2, cluster__channel="grpc"))
    assert len(read_metrics(output / METRICS_FILE)) == 12
