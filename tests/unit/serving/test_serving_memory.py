"""The memory that serving needs, the memory there is, and the error when it is too little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.weights import TrunkWeights
from errors import ConfigError, ResourceError
from jobs.checkpoints import loaded_model as loading
from jobs.checkpoints import memory_need
from jobs.checkpoints.memory_need import MemoryNeed, check_memory, free_memory, loading_need, serving_need
from jobs.config.presets import preset
from jobs.serving.config import ServeConfig
from jobs.serving.memory_check import check_serving
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import save_pretrained
from model.transformer import Transformer

TINY = preset("tiny").model
GIB = 1 << 30


def test_the_parts_are_those_that_a_loaded_model_has() -> None:
    need = serving_need(TINY, torch.float32, cache_tokens=64)
    whole = CausalLM(TINY)
    experts = sum(
        w.numel() * w.element_size() for layer in TINY.moe_layers for w in whole.experts.weights(layer)
    )
    assert need.experts == experts
    trunk = TrunkWeights.of(whole.trunk)
    layers = TINY.num_hidden_layers + TINY.num_nextn_predict_layers
    assert need.cache == 64 * (TINY.kv_lora_rank + TINY.qk_rope_head_dim) * layers * 4
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in memory_need._tensors(trunk)
        if t.numel()
    }
    assert need.trunk == sum(kept.values())


def test_a_tied_head_counts_once() -> None:
    tied = TINY.model_copy(update={"tie_word_embeddings": True})
    table = TINY.vocab_size * TINY.hidden_size * 4
    apart, together = (serving_need(c, torch.float32, cache_tokens=0) for c in (TINY, tied))
    assert apart.trunk - together.trunk == table


def test_dtype_and_drafts_change_it() -> None:
    wide, narrow = (serving_need(TINY, d, cache_tokens=9) for d in (torch.float64, torch.float32))
    assert (wide.cache, wide.experts) == (2 * narrow.cache, 2 * narrow.experts)
    plain = serving_need(TINY, torch.float32, cache_tokens=9, modules=False)
    assert plain.trunk < narrow.trunk
    assert plain.cache == narrow.cache * TINY.num_hidden_layers // (TINY.num_hidden_layers + 1)


def test_loading_takes_all_parameters_and_no_less_than_a_model_has() -> None:
    need = loading_need(TINY, torch.float32)
    held = sum(p.numel() * 4 for p in Transformer(TINY).parameters())
    assert need.trunk <= held <= need.trunk * 1.01
    assert need.total == TINY.total_parameters() * 4


def test_hosts_share_the_experts_and_replicas_do_not() -> None:
    parts: dict[str, Any] = {"trunk": 10, "cache": 5, "experts": 100}
    assert MemoryNeed(**parts).total == 115
    assert MemoryNeed(**parts, replicas=3).total == 345
    assert MemoryNeed(**parts, replicas=3, hosts=2).total == 145


@pytest.mark.parametrize(
    ("settings", "free", "said"),
    [
        ({"serving": {"replicas": 2}}, 1.0, ["lower serving.replicas", "2 replicas", "on 2 hosts"]),
        (
            {"serving": {"replicas": 2}, "cluster": {"expert_hosts": 0}},
            1.0,
            ["cluster.expert_hosts=1", "in each"],
        ),
        ({"serving": {"cache_tokens": 10**9}}, 3000.0, ["lower serving.cache_tokens"]),
        ({"serving": {}}, 1.0, ["serving.dtype=bfloat16", "--address"]),
    ],
)
def test_what_is_too_large_is_refused_in_one_line(
    settings: dict[str, Any], free: float, said: list[str]
) -> None:
    config, model = ServeConfig.from_dict(settings), preset("deepseek-v3").model
    with pytest.raises(ResourceError) as caught:
        check_serving(config, model, torch.float32, free=int(free * GIB))
    text = str(caught.value)
    assert "\n" not in text
    assert f"{free:,.1f} GiB free" in text
    for part in said:
        assert part in text
    check_serving(config, model, torch.float32, free=10**15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's own
def test_autoscaling_needs_room_for_the_fewest_replicas() -> None:
    model = preset("bench-20m").model
    one = serving_need(model, torch.float32, cache_tokens=32768, hosts=2).total
    for fewest, fits in ((1, True), (2, False)):
        config = ServeConfig.from_dict(
            {"serving": {"autoscaling": {"min_replicas": fewest, "max_replicas": 8}}}
        )
        if fits:
            check_serving(config, model, torch.float32, free=one)
        else:
            with pytest.raises(ResourceError):
                check_serving(config, model, torch.float32, free=one)


def test_what_just_fits_is_not_refused() -> None:
    need = MemoryNeed(trunk=3, cache=2, experts=5)
    check_memory(need, advice="-", free=10)
    with pytest.raises(ResourceError, match="raise it"):
        check_memory(need, advice="raise it", free=9)


def test_a_model_for_one_process_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(CausalLM(TINY), tmp_path)
    monkeypatch.setattr(memory_need, "free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="use a machine with more"):
        loading.load_model(tmp_path)


class MachineFiles:
    """Files of /proc and /sys/fs/cgroup."""

    def __init__(self, directory: Path, membership: str) -> None:
        self.proc, self.cgroups = directory / "proc", directory / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(membership)
        self.cgroups.mkdir()

    def group(self, path: str, **files: str) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)

    @property
    def free(self) -> int:
        return free_memory(machine=1000, proc=self.proc, cgroups=self.cgroups)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    machine = MachineFiles(tmp_path, "0::/\n")
    assert machine.free == 1000
    machine.group("", memory__max="max\n", memory__current="700\n")
    assert machine.free == 1000
    machine.group("", memory__max="800\n")
    assert machine.free == 100
    # The page cache can be reclaimed.
    machine.group("", memory__stat="anon 5\nactive_file 50\ninactive_file 20\n")
    assert machine.free == 170
    machine.group("", memory__max="500\n")
    assert machine.free == 0


def test_the_limit_of_any_group_around_counts(tmp_path: Path) -> None:
    machine = MachineFiles(tmp_path, "0::/pods/mine\n")
    machine.group("pods/mine", memory__max="max\n", memory__current="10\n")
    machine.group("pods", memory__max="310\n", memory__current="10\n")
    assert machine.free == 300


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    machine = MachineFiles(tmp_path, "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n")
    files = {"memory__limit_in_bytes": "400\n", "memory__usage_in_bytes": "100\n"}
    # As a container sees it: its path is that of the machine around it, its group the root.
    machine.group("memory", **files, memory__stat="inactive_file 1\ntotal_inactive_file 30\n")
    assert machine.free == 330
    machine.group("memory/a/b", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__usage_in_bytes="1\n")
    assert machine.free == 330
    machine.group("memory/a", memory__limit_in_bytes="60\n", memory__usage_in_bytes="50\n")
    assert machine.free == 10


def test_this_machine_has_memory() -> None:
    assert free_memory() > 0


def test_a_page_larger_than_the_cache_is_refused() -> None:
    fits = {"cache_tokens": 16, "page_size": 16}
    assert ServeConfig.from_dict({"serving": fits}).serving.page_size == 16
    with pytest.raises(ConfigError, match=r"^serving\.page_size \(17\) is more than serving\.cache_tokens"):
        ServeConfig.from_dict({"serving": {**fits, "page_size": 17}})
