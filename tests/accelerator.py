"""A GPU that is not there: tensors without values, of a device that is not the CPU, with autograd and all.

Whatever mixes devices, or makes the CPU wait for a value, fails. torch's fake tensors know shapes, types and
devices; torch's hooks for a backend in Python let them be of a device that this build of torch lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration

DEVICE = "toy"


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Inside, tensors are without values; of the device that is given, or of the CPU."""
    _register()
    with FakeTensorMode():
        yield torch.device(DEVICE)


__all__ = ["accelerator"]
