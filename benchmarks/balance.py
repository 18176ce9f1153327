"""Compares balance strategies: `python -m benchmarks.balance --json`.

Every strategy starts from the same weights, whose gates are skewed (the centroids of a quarter of the experts
are several times as long as the others', so that these experts win most tokens), sees the same text in the
same order, and is evaluated on the same held-out documents. As in arXiv 2408.15664, the results are MaxVio
and the loss that balance costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.config.presets import preset
from jobs.config.run_config import RunConfig
from jobs.console import Progress
from jobs.data.source_files import find_files
from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from jobs.training.train import train
from model.checkpoints.pretrained import RandomSource, write_index, write_model_config, write_shard

STRATEGIES = ("none", "auxiliary", "bias")
_SKEW = 6.0
_SAMPLED = 4  # every so many files of the corpus teach the tokenizer
_LAST = 50  # steps that MaxVio is averaged over


def write_skewed(config: RunConfig, directory: Path) -> None:
    """Write random weights, with a quarter of the experts favoured, and a tokenizer, for Hugging Face."""
    model = config.model
    source = RandomSource(model, config.training.seed)
    tensors = source.trunk()
    favoured = model.n_routed_experts // 4
    for layer in model.moe_layers:
        tensors[f"model.layers.{layer}.mlp.gate.weight"][:favoured] *= _SKEW
        for expert in range(model.n_routed_experts):
            w13, w2 = source.expert(layer, expert)
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"] = w13.chunk(2)
            tensors[f"{name}.down_proj.weight"] = w2
    write_shard(directory / "model-1.safetensors", tensors)
    write_model_config(directory, model)
    write_index(directory)
    sample = find_files(None)[::_SAMPLED]
    texts = [Path(file.path).read_text(encoding="utf-8", errors="ignore") for file in sample]
    save_tokenizer(*train_tokenizer(texts, model.vocab_size), directory)


def run(strategy: str, *, steps: int, seed: int, weights: Path, output: Path, hosts: int) -> dict[str, Any]:
    """Train with one strategy; return MaxVio over the last steps, and the loss on all held-out documents."""
    values = preset("demo").to_dict()
    values["training"] |= {"steps": steps, "seed": seed, "eval_interval": 0, "tensorboard": False}
    values["balance"]["strategy"] = strategy
    values["checkpoint"]["interval"] = 0
    values["cluster"]["expert_hosts"] = hosts
    config = RunConfig.from_dict(values)
    if not (weights / "config.json").exists():
        write_skewed(config, weights)
    with Progress(steps) as progress:
        progress.note(f"training.seed: {seed}  balance.strategy: {strategy}")
        result = train(config, output=output, init=weights, progress=progress)
    lines = read_metrics(output / METRICS_FILE)
    last = lines[-_LAST:]
    return {
        "max_violation_first": lines[0]["max_violation_mean"],
        "max_violation": sum(line["max_violation_mean"] for line in last) / len(last),
        "validation_loss": result["validation_loss"],
        "bits_per_byte": result["bits_per_byte"],
    }


def compare(*, strategies: Sequence[str], steps: int, seeds: int, hosts: int) -> dict[str, Any]:
    """Means over seeds 0, 1, … for each strategy, and the difference in loss with its error."""
    results: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in strategies}
    with tempfile.TemporaryDirectory(prefix="raymoe-balance-") as directory:
        for seed in range(seeds):
            base = Path(directory) / str(seed)
            (base / "weights").mkdir(parents=True)
            for strategy in strategies:
                results[strategy].append(
                    run(
                        strategy,
                        steps=steps,
                        seed=seed,
                        weights=base / "weights",
                        output=base / strategy,
                        hosts=hosts,
                    )
                )
    means = {
        strategy: {name: statistics.mean(one[name] for one in runs) for name in runs[0]}
        for strategy, runs in results.items()
    }
    summary: dict[str, Any] = {"steps": steps, "seeds": seeds, "strategies": means}
    if {"bias", "none"} <= set(strategies):
        summary["bias_over_none"] = means["bias"]["max_violation"] / means["none"]["max_violation"]
    if {"bias", "auxiliary"} <= set(strategies):
        differences = [
            bias["validation_loss"] - auxiliary["validation_loss"]
            for bias, auxiliary in zip(results["bias"], results["auxiliary"], strict=True)
        ]
        summary["bias_minus_auxiliary_loss"] = statistics.mean(differences)
        summary["differences"] = differences
        if seeds > 1:
            summary["standard_error"] = statistics.stdev(differences) / len(differences) ** 0.5
    return summary


def main() -> None:
    """Print a table, or with --json one object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each strategy, with seeds 0, 1, …")
    parser.add_argument("--hosts", type=int, default=0, help="expert hosts; 0 keeps experts in process")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="repeatable; all by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    strategies = arguments.strategy or STRATEGIES
    summary = compare(
        strategies=strategies, steps=arguments.steps, seeds=arguments.seeds, hosts=arguments.hosts
    )
    if arguments.json:
        print(json.dumps(summary))
        return
    for strategy, result in summary["strategies"].items():
        print(f"{strategy:<10} " + "  ".join(f"{name} {value:.3f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
