"""Times training and decoding with and without overlap of the trunk's and the experts' computation.

Trunk and expert hosts run on separate cores, as they run on separate devices in a cluster, and the
configuration gives both about the same work. Without overlap one waits while the other computes. All
contenders keep running and alternate; ratios are taken within a round, and medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import psutil
import torch

from actors.process_heap import freeze_heap
from benchmarks.contenders import Build, Contender, Step
from errors import ConfigError, ResourceError
from jobs.config.presets import bench_20m
from jobs.config.run_config import RunConfig
from jobs.fleet.expert_hosts import check_transport

CHANNELS: Final = ("auto", "shm", "collective", "grpc")
_HOSTS: Final = 2
_WIDTH: Final = 256  # of an expert: twice that of bench-20m, so that experts weigh about as much as the trunk
_PROMPT: Final = 8
_TOKENS: Final = 8
_OVERLAP_FROM: Final = 32


def bench_overlap(*, channel: str, rounds: int, sequences: int = 2048) -> dict[str, Any]:
    """Time training steps and decoding, with and without overlap.

    Args:
        channel: The kind of channel, as `cluster.channel`.
        rounds: Number of rounds, in which the contenders alternate.
        sequences: Sequences decoded at the same time.

    Returns:
        For training and for decode: seconds of a step with and without overlap, their ratio, and the weight
        of the experts (their hosts' CPU seconds over the trunk's, without overlap). With a weight w the ratio
        is at best (1 + w) / max(1, w).

    Raises:
        ConfigError: The channel does not reach another process.
        ResourceError: The machine has only one core.
        RaymoeError: A contender failed, with its error text.
    """
    if channel not in CHANNELS:
        raise ConfigError(f"--channel {channel!r} is none of {', '.join(CHANNELS)}")
    config = _config(channel)
    check_transport(config.cluster)
    _cores()
    load = os.getloadavg()[0]
    turns: dict[str, list[float]] = {}
    works: dict[str, Callable[..., AbstractContextManager[Step]]] = {
        "training": training,
        "decode": partial(decode, sequences=sequences),
    }
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for work, build in works.items():
            for name, overlap in (("off", False), ("on", True)):
                made: Build = partial(build, overlap=overlap)
                contenders[f"{work}_{name}"] = stack.enter_context(Contender(f"{work} {name}", made, config))
        for contender in contenders.values():
            contender.steps(2)
        for _ in range(rounds):
            for name, contender in contenders.items():
                turns.setdefault(name, []).append(statistics.median(contender.steps(2)))
    for work, build in works.items():
        with Contender(f"{work} weight", partial(build, overlap=False, weigh=True), config) as contender:
            turns[f"{work}_weight"] = contender.steps(3)[1:]
    return {
        **{work: _figures(turns, work) for work in ("training", "decode")},
        "channel": channel,
        "rounds": rounds,
        "hosts": _HOSTS,
        "sequences": sequences,
        "load_before": load,
    }


def _figures(turns: dict[str, list[float]], work: str) -> dict[str, float]:
    off, on = turns[f"{work}_off"], turns[f"{work}_on"]
    return {
        "off_seconds": statistics.median(off),
        "on_seconds": statistics.median(on),
        "speedup": statistics.median(a / b for a, b in zip(off, on, strict=True)),
        "experts_over_trunk": statistics.median(turns[f"{work}_weight"]),
    }


def _cores() -> tuple[list[int], list[int]]:
    """The cores of the trunk, and those of the hosts."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ResourceError("overlap takes two cores at least, one for the trunk and one for the hosts")
    return cores[: len(cores) // 2], cores[len(cores) // 2 :]


def _config(channel: str) -> RunConfig:
    values = bench_20m().to_dict()
    values["model"] |= {"moe_intermediate_size": _WIDTH, "num_nextn_predict_layers": 0}
    values["training"] |= {"workers": 1, "warmup_steps": 0, "steps": 1 << 30}
    values["cluster"] |= {"expert_hosts": _HOSTS, "channel": channel, "threads_per_host": 1}
    return RunConfig.from_dict(values)


@contextmanager
def training(config: RunConfig, *, overlap: bool, weigh: bool = False) -> Iterator[Step]:
    """A training step; without overlap one microbatch at a time."""
    from benchmarks.training_steps import ours

    mine, theirs = _cores()
    os.sched_setaffinity(0, mine)
    values = config.to_dict()
    values["training"] |= {
        "threads": len(mine),
        "microbatches_in_flight": 2 if overlap else 1,
        "computing_at_once": 1,
    }
    with ours(RunConfig.from_dict(values), host_cores=theirs) as step:
        measured = _weight if weigh else _seconds
        yield lambda: measured(step)


@contextmanager
def decode(config: RunConfig, *, sequences: int, overlap: bool, weigh: bool = False) -> Iterator[Step]:
    """Decoding steps; without overlap a step is not halved."""
    from benchmarks.expert_lanes import expert_lanes
    from engine.engine import Engine
    from engine.params import SamplingParams
    from engine.settings import EngineSettings
    from engine.weights import TrunkWeights
    from model.checkpoints.sources import RandomSource
    from model.transformer import Transformer

    mine, theirs = _cores()
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(len(mine))
    model, seed = config.model, config.training.seed
    trunk = Transformer(model).eval()
    trunk.load_state_dict(RandomSource(model, seed).trunk())
    settings = EngineSettings(
        cache_tokens=sequences * 2 * (_PROMPT + _TOKENS),
        prefix_caching=False,
        max_batch_tokens=sequences * _PROMPT,
        max_sequences=sequences,
        overlap_from=_OVERLAP_FROM if overlap else None,
    )
    with expert_lanes(model, config.cluster, seed=seed, cores=theirs) as lanes:
        engine = Engine(TrunkWeights.of(trunk), lanes, settings, on_step=lanes.begin)
        freeze_heap()  # as replicas do
        params = SamplingParams(max_tokens=_TOKENS + 1, temperature=0.0)
        generator = torch.Generator().manual_seed(seed)

        def decode_all() -> None:
            while engine.has_work:
                engine.step()

        def step() -> float:
            """Generate `_TOKENS` tokens for each sequence; the time excludes reading the prompts."""
            prompts = torch.randint(model.vocab_size, (sequences, _PROMPT), generator=generator)
            for index, tokens in enumerate(prompts.tolist()):
                engine.add(str(index), tokens, params)
            engine.step()
            return (_weight if weigh else _seconds)(decode_all)

        yield step


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _weight(work: Callable[[], object]) -> float:
    """CPU seconds of the child processes, which are the hosts, over those of this process."""
    hosts = psutil.Process().children()

    def spent() -> float:
        return sum(times.user + times.system for times in (host.cpu_times() for host in hosts))

    theirs, mine = spent(), time.process_time()
    work()
    return (spent() - theirs) / (time.process_time() - mine)


__all__ = ["bench_overlap", "decode", "training"]
