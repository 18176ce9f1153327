"""Cuts the soak into parts of about the same length."""

from __future__ import annotations

MINUTES = {
    "test_any_request": 2.0,
    "test_autoscaler": 2.0,
    "test_bench_serve_command": 2.5,
    "test_busy_machine": 7.0,
    "test_evals": 2.0,
    "test_generate": 5.0,
    "test_grpc_fuzz": 1.0,
    "test_hostile_checkpoints": 16.0,
    "test_leaving": 1.0,
    "test_lost_hosts": 20.0,
    "test_lost_trunks": 28.0,
    "test_memory": 5.0,
    "test_node_loss": 22.0,
    "test_rehearsal": 4.0,
    "test_reload": 3.5,
    "test_serve_elastic": 1.5,
    "test_serve_everywhere": 11.0,
    "test_serve_front": 2.0,
    "test_serve_killed": 1.5,
    "test_serve_soak": 12.0,
    "test_strangers_grpc": 3.0,
    "test_strangers_http": 4.0,
    "test_tls_end_to_end": 2.0,
    "test_train": 3.0,
    "test_train_elastic": 9.0,
    "test_training_invariance": 4.0,
}
"""Minutes that the tests marked `soak` of each module take on 2 cores, to about a minute."""


def soak_part(module: str, parts: int) -> int:
    """The part, from 1 on, that a module of `MINUTES` belongs to.

    Modules go to the part that is shortest so far, the longest module first.
    """
    length = [0.0] * parts
    for name in sorted(MINUTES, key=lambda name: (-MINUTES[name], name)):
        part = length.index(min(length))
        length[part] += MINUTES[name]
        if name == module:
            return part + 1
    raise KeyError(f"{module} is not in MINUTES of {__name__}; add how long its soak takes")


__all__ = ["MINUTES", "soak_part"]
