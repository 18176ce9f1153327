from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
import torch
from actors.process_heap import freeze_heap

class Node:
    pass

freeze_heap()
kept = gc.get_freeze_count()
before = len(gc.get_objects())
node = Node()
node.self = node
del node
print(kept > 10_000, before < 1_000, gc.collect() > 0)
"""


def test_what_a_process_is_built_of_is_left_out_of_collections_and_garbage_is_not() -> None:
    # A process of its own: what is frozen in this one would never be collected.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
