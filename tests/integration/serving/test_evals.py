"""lm-eval's scores of a served model equal those of the same weights in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands.serve import ServeProcess, running, save_model, tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
SENTENCES = ["the cat sat on the mat", "the hat sat", "a cat and a hat", "on the mat and the hat the cat sat"]
LONGEST = 128


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    # As many rows as tokens: transformers scores rows without a token, the server does not.
    model = tiny_model(vocab_size=tiny_tokenizer()[0].get_vocab_size())
    directory = save_model(model, tmp_path_factory.mktemp("served") / "tiny")
    with running(model, directory, tmp_path_factory.mktemp("log") / "serve.log") as server:
        yield server


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two tasks, one scored by log probability and one generative, and their documents."""
    directory = tmp_path_factory.mktemp("tasks")
    documents = []
    for number, sentence in enumerate(SENTENCES * 3):
        words = sentence.split()
        cut = 1 + number % (len(words) - 1)  # between words: lm-eval wants a token for each side
        rest = " " + " ".join(words[cut:])
        choices = [rest, " the hat", " zebra"]
        documents.append({"question": " ".join(words[:cut]), "choices": choices, "answer": number % 3})
    (directory / "documents.json").write_text("\n".join(map(json.dumps, documents)))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "documents.json")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    going_on = {
        "task": "going_on",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["zz"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choosing, going_on):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return directory


def evaluate(model: str, arguments: str, tasks: Path, output: Path) -> tuple[Any, dict[str, list[Any]]]:
    """Run lm-eval's command; return its scores and the samples of each task."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments),
            *("--tasks", "choosing,going_on", "--include_path", str(tasks), "--batch_size", "1"),
            *("--output_path", str(output), "--log_samples"),
        ],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(output / "home"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    samples = {
        task: [
            json.loads(line)
            for file in output.rglob(f"samples_{task}_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in ("choosing", "going_on")
    }
    return json.loads(results.read_text())["results"], samples


def test_scores_and_samples_are_those_of_transformers(
    server: ServeProcess, tasks: Path, tmp_path: Path
) -> None:
    served, ours = evaluate(
        "local-completions",
        f"model=tiny,base_url={server.url}/v1/completions,tokenizer={server.directory},"
        f"tokenizer_backend=huggingface,num_concurrent=4,max_length={LONGEST}",
        tasks,
        tmp_path / "served",
    )
    reference, theirs = evaluate(
        "hf",
        # Its cache of logits confuses documents whose context is another's context with continuation.
        f"pretrained={server.directory},tokenizer={server.directory},dtype=float64,"
        f"experts_implementation=eager,max_length={LONGEST},logits_cache=False",
        tasks,
        tmp_path / "reference",
    )
    for task, metrics in (("choosing", ("acc,none", "acc_norm,none")), ("going_on", ("exact_match,none",))):
        assert len(ours[task]) == len(theirs[task]) == 3 * len(SENTENCES)
        for metric in metrics:
            assert served[task][metric] == reference[task][metric]
        by_document = {sample["doc_id"]: sample["resps"] for sample in theirs[task]}
        for sample in ours[task]:
            expected = by_document[sample["doc_id"]]
            if task == "going_on":
                assert sample["resps"] == expected
                assert len(sample["resps"][0][0]) > 10
                continue
            for (mine,), (other,) in zip(sample["resps"], expected, strict=True):
                assert float(mine[0]) == pytest.approx(float(other[0]), abs=1e-3)
                assert mine[1] == other[1]
