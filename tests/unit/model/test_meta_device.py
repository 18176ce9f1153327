"""Modules on the meta device: shapes as of real ones, and no compiler of torch is loaded for them."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import nn

from model.checkpoints.meta_device import meta_device
from model.config import ModelConfig
from model.transformer import Transformer
from support.small_config import SMALL

SMALL_MODEL = ModelConfig.model_validate(SMALL)

_BUILD = """
import sys
from model.checkpoints.expected_tensors import trunk_shapes
from model.config import ModelConfig
from support.small_config import SMALL
assert trunk_shapes(ModelConfig.model_validate(SMALL))
assert "torch._dynamo" not in sys.modules
"""


def test_shapes_and_types_are_those_of_a_real_model() -> None:
    with meta_device():
        shapes = Transformer(SMALL_MODEL, dtype=torch.bfloat16)
    real = Transformer(SMALL_MODEL, dtype=torch.bfloat16)
    told = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in shapes.state_dict().items()} == told
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())


def test_modules_are_initialised_again_after_the_context() -> None:
    with meta_device():
        nn.Embedding(3, 4)
    assert nn.Embedding(3, 4).weight.abs().sum() > 0
    assert torch.zeros(1).device.type == "cpu"


def test_reading_shapes_does_not_load_the_compiler() -> None:
    paths = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", _BUILD], check=True, timeout=120, env={**os.environ, "PYTHONPATH": paths}
    )
