"""Building modules for the shapes of their parameters, without memory and without first values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Within the context, modules are built on torch's meta device, and no normal values are drawn for them.

    Drawing them there has no effect, but loads torch's compiler, which takes 1 to 2 s of CPU.
    """
    with torch.device("meta"), _WithoutNormalValues():
        yield


class _WithoutNormalValues(TorchFunctionMode):
    """Leaves out `normal_`, and returns the tensor that it is given."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.init.normal_ or func is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


__all__ = ["meta_device"]
