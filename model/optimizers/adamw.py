"""AdamW over flat buffers: one pass over memory per step, however many tensors there are.

Tensors of one dtype and device that decay alike lie one after the other in one flat buffer, and so do their
gradients and both moments. Each tensor becomes a view of the buffer, so that a step, clearing the gradients
and a norm are each one call over contiguous memory.

Half-precision tensors have float32 *values* beside them, like their gradients and moments: a step moves the
values and rounds them into the tensors. Small steps would be lost in bfloat16, which has 8 bits of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import CheckpointError, ProtocolError

_ALIGNMENT = 64  # bytes; every tensor starts on a cache line
_NORM_CHUNK = 1 << 16  # elements; a chunk's float64 copy stays in the cache


def decays_by_shape(name: str, tensor: Tensor) -> bool:
    """Whether a tensor decays: matrices do, norms and other vectors do not."""
    return tensor.ndim >= 2


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the values, gradients and moments of tensors of type `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWRule:
    """Coefficients of AdamW, for tensors that decay alike.

    Attributes:
        beta1, beta2, epsilon: as in AdamW.
        decay: decoupled weight decay.
    """

    beta1: float
    beta2: float
    epsilon: float
    decay: float


def fused_step(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    *,
    lr: float,
    rule: AdamWRule,
    scale: float,
) -> None:
    """AdamW step with gradients times `scale`, in place, on tensors of one dtype and device.

    Args:
        step: scalar float32, the number of steps including this one.
    """
    divisor = None
    if scale != 1.0:
        if values[0].dtype == torch.float64:
            # The kernel's own scaling rounds to float32.
            torch._foreach_mul_(gradients, scale)
        else:
            divisor = torch.full((), 1.0 / scale, dtype=torch.float32, device=values[0].device)
    torch._fused_adamw_(
        values,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(values),
        lr=lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.decay,
        eps=rule.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=None,
    )


def squared_sum(tensor: Tensor) -> float:
    """Sum of a tensor's squares, in float64."""
    parts = [torch.dot(wide, wide) for wide in map(Tensor.double, torch.split(tensor.flatten(), _NORM_CHUNK))]
    return float(torch.stack(parts).sum()) if parts else 0.0


def flat_offsets(counts: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Offsets of tensors with `counts` elements in a flat buffer, and its length; in elements."""
    unit = _ALIGNMENT // itemsize
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += -(-count // unit) * unit
    return offsets, total


@dataclass(slots=True)
class _ParameterGroup:
    """Flat buffers [total] of tensors of one dtype and device that decay alike.

    Attributes:
        rule: the coefficients of their steps.
        rounded: what half-precision tensors are views of; None where tensors are views of `value`.
        state: [3, total], value and moments in one piece.
        step: scalar float32, number of steps.
    """

    rule: AdamWRule
    rounded: Tensor | None
    value: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    state: Tensor
    step: Tensor


class AdamW:
    """`torch.optim.AdamW(fused=True)` for named tensors that it moves into flat buffers.

    On construction each tensor's `.data` becomes a view of the flat buffer, and the `.grad` of those that
    require one a view of the flat gradient buffer (autograd then adds into it in place). Clear gradients with
    `zero_grad()`, and never set them to None. Call `round_values` after writing to the values of
    half-precision tensors.

    Args:
        tensors: (name, tensor) pairs, parameters or plain tensors, with unique names.
        beta1, beta2, epsilon: Coefficients of AdamW.
        weight_decay: Decoupled weight decay of the tensors that `decays` selects.
        decays: Whether a tensor of this name decays.

    Attributes:
        gradients: Views of the flat gradient buffer by name, in the order of `tensors`.
        step_count: Number of steps taken.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        decays: Callable[[str, Tensor], bool] = decays_by_shape,
    ) -> None:
        self._tensors = dict(tensors)
        self._groups: list[_ParameterGroup] = []
        self.gradients: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.step_count = 0
        members: dict[tuple[torch.dtype, torch.device, bool], list[str]] = {}
        for name, tensor in self._tensors.items():
            members.setdefault((tensor.dtype, tensor.device, decays(name, tensor)), []).append(name)
        for (_, _, decayed), names in members.items():
            rule = AdamWRule(
                beta1=beta1, beta2=beta2, epsilon=epsilon, decay=weight_decay if decayed else 0.0
            )
            self._groups.append(self._flatten(names, rule))
        self.gradients = {name: self.gradients[name] for name in self._tensors}
        self._values = {name: self._values[name] for name in self._tensors}
        self._moments = {name: self._moments[name] for name in self._tensors}

    @torch.no_grad()
    def _flatten(self, names: list[str], rule: AdamWRule) -> _ParameterGroup:
        first = self._tensors[names[0]]
        dtype, device = value_dtype(first.dtype), first.device
        offsets, total = flat_offsets([self._tensors[name].numel() for name in names], dtype.itemsize)
        # Zero padding stays zero under AdamW: it has no gradient, no moment and nothing to decay.
        flat = torch.zeros(4, total, dtype=dtype, device=device)
        # The gradient first: the state that a snapshot keeps lies in one piece behind it.
        gradient, value, exp_avg, exp_avg_sq = flat.unbind(0)
        rounded = None if dtype == first.dtype else torch.zeros(total, dtype=first.dtype, device=device)
        step = torch.zeros((), dtype=torch.float32, device=device)
        for name, offset in zip(names, offsets, strict=True):
            tensor = self._tensors[name]
            place = slice(offset, offset + tensor.numel())

            def view(buffer: Tensor, place: slice = place, shape: torch.Size = tensor.shape) -> Tensor:
                return buffer[place].view(shape)

            self._values[name] = view(value)
            self._values[name].copy_(tensor.detach())
            self.gradients[name] = view(gradient)
            self._moments[name] = (view(exp_avg), view(exp_avg_sq))
            tensor.data = view(value if rounded is None else rounded)
            if tensor.requires_grad:
                tensor.grad_dtype = dtype
                tensor.grad = self.gradients[name]
        group = _ParameterGroup(rule, rounded, value, gradient, exp_avg, exp_avg_sq, flat[1:], step)
        _round(group)
        return group

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """One AdamW step with gradients times `scale` (the clip factor, > 0).

        The gradients are left in an unspecified scale: call `zero_grad` before the next accumulation.

        Raises:
            ProtocolError: A tensor's `.grad` was replaced or dropped.
        """
        self._check_attached()
        self.step_count += 1
        for group in self._groups:
            group.step.fill_(self.step_count)
            fused_step(
                [group.value],
                [group.gradient],
                [group.exp_avg],
                [group.exp_avg_sq],
                group.step,
                lr=lr,
                rule=group.rule,
                scale=scale,
            )
            _round(group)

    @torch.no_grad()
    def round_values(self) -> None:
        """Round the values into the half-precision tensors, after the values were written to."""
        for group in self._groups:
            _round(group)

    @torch.no_grad()
    def reset(self, step: int) -> None:
        """Set moments and gradients to zero, and the number of steps to `step`."""
        self.step_count = step
        for group in self._groups:
            group.gradient.zero_()
            group.exp_avg.zero_()
            group.exp_avg_sq.zero_()

    def zero_grad(self) -> None:
        """Clear all gradients, in place."""
        for group in self._groups:
            group.gradient.zero_()

    def squared_norm(self) -> float:
        """Sum of the squared gradients, accumulated in float64 so that it adds up over any partition."""
        return sum(squared_sum(group.gradient) for group in self._groups)

    def gradient_buffers(self) -> list[Tensor]:
        """Flat gradient buffers, which data-parallel workers sum in place."""
        return [group.gradient for group in self._groups]

    def state_buffers(self) -> list[Tensor]:
        """Live views of values and both moments as they lie in memory, [3, total] each, for fast copies."""
        return [group.state for group in self._groups]

    def values(self) -> dict[str, Tensor]:
        """Live views of the values by name, in the tensors' shapes; float32 for half-precision tensors."""
        return dict(self._values)

    @torch.no_grad()
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Copy values in and round them into the tensors; other names are ignored.

        Raises:
            CheckpointError: A value is missing, or of another shape.
        """
        for name, mine in self._values.items():
            other = values.get(name)
            if other is None or other.shape != mine.shape:
                found = "missing" if other is None else f"of shape {list(other.shape)}"
                raise CheckpointError(f"{name} is {found}, the model needs {list(mine.shape)}")
            mine.copy_(other)
        self.round_values()

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Live views of (exp_avg, exp_avg_sq) by name, in the tensors' shapes."""
        return dict(self._moments)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, tuple[Tensor, Tensor]], *, step: int) -> None:
        """Copy in the moments of a checkpoint, and the number of steps that they come from.

        Raises:
            CheckpointError: A tensor is missing, unknown, or of another shape.
        """
        if moments.keys() != self._moments.keys():
            odd = ", ".join(sorted(moments.keys() ^ self._moments.keys())[:3])
            raise CheckpointError(f"optimizer state and model name different tensors ({odd}, …): not its own")
        for name, loaded in moments.items():
            for kind, mine, other in zip(("exp_avg", "exp_avg_sq"), self._moments[name], loaded, strict=True):
                if mine.shape != other.shape:
                    raise CheckpointError(
                        f"{kind} of {name} has shape {list(other.shape)}, the model needs {list(mine.shape)}"
                    )
                mine.copy_(other)
        self.step_count = step

    def _check_attached(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.requires_grad and (
                tensor.grad is None or tensor.grad.data_ptr() != self.gradients[name].data_ptr()
            ):
                raise ProtocolError(
                    f"the gradient of {name} is no longer in the optimizer's buffer: "
                    "clear gradients with AdamW.zero_grad, not with set_to_none"
                )


def _round(group: _ParameterGroup) -> None:
    if group.rounded is not None:
        group.rounded.copy_(group.value)


__all__ = [
    "AdamW",
    "AdamWRule",
    "decays_by_shape",
    "flat_offsets",
    "fused_step",
    "squared_sum",
    "value_dtype",
]
