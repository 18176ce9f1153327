"""Times decoding with and without MTP drafts, which alternate from prompt to prompt."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.expert_lanes import expert_lanes
from cluster.config import ClusterConfig
from engine.engine import Engine
from engine.params import SamplingParams
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from errors import ConfigError, DataError
from jobs.checkpoints.loaded_model import LoadedModel, load_model
from jobs.tools.evaluate import documents_of
from model.experts.protocols import Experts

_PROMPT: Final = 64
_TOKENS: Final = 128
_HOSTS: Final = 2
_ARRANGEMENTS: Final = ("in_process", "shm", "grpc")


def bench_drafts(
    checkpoint: Path,
    data: str | None = None,
    *,
    prompts: int,
    temperature: float,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Continue the beginnings of documents at batch 1, with and without drafts in turns.

    Args:
        checkpoint: A checkpoint with MTP modules.
        data: Documents; None takes those that the checkpoint's run held out.
        prompts: Number of documents.
        temperature: Sampling temperature; 0 is greedy.
        note: Called with a description of each measurement.

    Returns:
        For experts in process and on 2 hosts by shared memory and by gRPC: tokens per second plain, with
        drafts always, and with drafts while the engine finds that they save time (medians over the prompts),
        their ratios to plain, and the acceptance of each module's drafts.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: It has no MTP modules.
        DataError: There are no such documents.
    """
    load = os.getloadavg()[0]
    model = load_model(checkpoint)
    config = model.transformer.config
    if not config.num_nextn_predict_layers:
        raise ConfigError(
            f"{checkpoint} has no MTP modules, so that nothing drafts; choose another checkpoint"
        )
    note("reading documents")
    starts = _beginnings(model, documents_of(model.directory, data, note=note), prompts)
    result: dict[str, Any] = {}
    for name in _ARRANGEMENTS:
        note(f"measuring with experts {'in process' if name == 'in_process' else 'on 2 hosts by ' + name}")
        with ExitStack() as stack:
            experts: Experts = model.experts
            on_step: Callable[[int], None] | None = None
            if name != "in_process":
                cluster = ClusterConfig.model_validate({"expert_hosts": _HOSTS, "channel": name})
                lanes = stack.enter_context(expert_lanes(config, cluster, directory=model.directory))
                experts, on_step = lanes, lanes.begin
            result[name] = _measure(model, experts, on_step, starts, temperature)
    result["prompts"] = len(starts)
    result["tokens"] = _TOKENS
    result["temperature"] = temperature
    result["load_before"] = load
    return result


def _measure(
    model: LoadedModel,
    experts: Experts,
    on_step: Callable[[int], None] | None,
    starts: Sequence[Sequence[int]],
    temperature: float,
) -> dict[str, Any]:
    weights = TrunkWeights.of(model.transformer)
    room = 2 * (_PROMPT + _TOKENS)
    engines = {
        name: Engine(
            weights,
            experts,
            EngineSettings(cache_tokens=room, prefix_caching=False, **settings),
            vocabulary=model.tokenizer.get_vocab_size(),
            on_step=on_step,
        )
        for name, settings in _ENGINES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn, start in enumerate([starts[0], *starts]):  # the first one warms up
        for name, engine in engines.items():
            params = SamplingParams(max_tokens=_TOKENS, temperature=temperature, seed=turn, ignore_eos=True)
            engine.add(str(turn), start, params)
            engine.step()
            began = time.perf_counter()
            while engine.has_work:
                engine.step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    stats = engines["drafts"].stats
    found: dict[str, Any] = {
        f"{name}_tokens_per_second": statistics.median((_TOKENS - 1) / s for s in values)
        for name, values in seconds.items()
    }
    for name in ("drafts", "paced"):
        found[f"{name}_over_plain"] = statistics.median(
            plain / other for plain, other in zip(seconds["plain"], seconds[name], strict=True)
        )
    found["acceptance"] = [stats.accepted[at] / stats.proposed[at] for at in sorted(stats.proposed)]
    return found


def _beginnings(model: LoadedModel, texts: Sequence[str], prompts: int) -> list[list[int]]:
    """The first tokens of documents that are longer than prompt and answer."""
    found: list[list[int]] = []
    for ids in model.text.documents([text[: 40 * _PROMPT] for text in texts]):
        if len(ids) > _PROMPT + _TOKENS:
            found.append(ids[:_PROMPT])
        if len(found) == prompts:
            break
    if not found:
        raise DataError(f"no document has more than {_PROMPT + _TOKENS} tokens; give longer ones with --data")
    return found


_ENGINES: Final[dict[str, dict[str, Any]]] = {
    "plain": {"drafts": 0},
    "drafts": {"pace_drafts": False},
    "paced": {},
}

__all__ = ["bench_drafts"]
