"""The trunk of one data-parallel worker: microbatches in flight, gradients, its share of a step.

A worker computes several microbatches at once, each in a lane of its own (`actors.trunk.lanes`): while the
tokens of one are away at the expert hosts, another computes. Gradients of all lanes add up, are summed over
the workers (`actors.trunk.parameters`), and are applied when the coordinator has decided the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from actors.messages.steps import StepDecision, StepReport
from actors.messages.timeline import Timeline
from actors.router.deferred_loss import ZeroExperts
from actors.trunk.agreement import WorkersAgreement
from actors.trunk.lanes import LaneThreads, StepLane
from actors.trunk.parameters import TrunkParameters
from actors.trunk.step_inputs import Microbatch, StepInputs
from errors import RaymoeError, gives_way
from model.device_copies import to_device
from model.experts.protocols import Experts
from model.losses.training_losses import (
    Evaluation,
    Losses,
    LossWeights,
    evaluation_loss,
    route,
    training_loss,
)
from model.optimizers.adamw import value_dtype
from model.routing_trace import Trace, batch_routing, routing_counts
from model.transformer import Transformer

T = TypeVar("T")


class ExpertsInProcess(Protocol):
    """Experts that live in the worker itself, replicated in each worker (`cluster.expert_hosts: 0`)."""

    def gradients(self) -> Sequence[Tensor]: ...

    def prepare(self, step: int) -> float: ...

    def commit(self, step: int, learning_rate: float, scale: float) -> None: ...


@dataclass(slots=True)
class _Sums:
    """Sums over a worker's microbatches of one step.

    Attributes:
        loads: [L, E], tokens of each expert.
        main, mtp, balance: Sums of losses.
    """

    loads: Tensor
    main: float = 0.0
    mtp: float = 0.0
    balance: float = 0.0

    def add(self, losses: Losses, loads: Mapping[int, Tensor], layers: Sequence[int]) -> None:
        self.main += float(losses.main_sum)
        self.mtp += float(sum(losses.mtp_sums)) / max(1, len(losses.mtp_sums))
        self.balance += float(losses.balance)
        for at, layer in enumerate(layers):
            self.loads[at] += loads[layer].cpu()


class TrunkWorker:
    """Runs the forward and backward passes of a worker's microbatches and applies the decided update.

    Args:
        agreement: Agreement with the other workers.
        parameters: Parameters of the trunk.
        lanes: The threads that compute microbatches.
        experts: The experts of this process, if they live here.
        timeline: Records when lanes compute; None records nothing.
        recompute: Whether the backward pass recomputes activations.

    Attributes:
        agreement: Agreement with the other workers.
    """

    def __init__(
        self,
        *,
        agreement: WorkersAgreement,
        parameters: TrunkParameters,
        lanes: LaneThreads,
        experts: ExpertsInProcess | None = None,
        timeline: Timeline | None = None,
        recompute: bool = False,
    ) -> None:
        self.agreement = agreement
        self._parameters = parameters
        self._model = parameters.model
        self._lanes = lanes
        self._experts = experts
        self._timeline, self._recompute = timeline, recompute
        self._layers = self._model.config.moe_layers
        self._device = self._model.lm_head.weight.device

    @property
    def model(self) -> Transformer:
        """The trunk that computes."""
        return self._model

    @property
    def parameters(self) -> TrunkParameters:
        """The trunk's parameters as this worker has them."""
        return self._parameters

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights in a checkpoint."""
        return value_dtype(self._model.lm_head.weight.dtype)

    @property
    def experts(self) -> ExpertsInProcess | None:
        """The experts of this process, if they live here."""
        return self._experts

    def run(self, inputs: StepInputs) -> StepReport:
        """Forward and backward passes of this worker's microbatches; gradients are summed over the workers.

        A balance loss that depends on the routing of the whole global batch takes a forward pass without
        gradients before them, unless one microbatch is the whole batch.

        Returns:
            The report for the coordinator; `apply` uses the gradients.

        Raises:
            ChannelError: A host cannot be reached.
            Interrupted: Another worker has lost a host.
            WorkersLost: Another worker is gone.
        """
        self.agreement.meet()
        start = time.perf_counter()
        shape = (len(self._layers), self._model.config.n_routed_experts)
        sums = _Sums(loads=torch.zeros(shape, dtype=torch.int64))
        before = self._lanes.counters()
        routed = self._routed(inputs)
        for losses, loads in self._agreed(
            inputs, partial(self._train, inputs, routed), partial(self._train_nothing, inputs)
        ):
            sums.add(losses, loads, self._layers)
        after = self._lanes.counters()
        with self._span(inputs.step, "sum gradients"):
            squared = self._parameters.sum_gradients(
                () if self._experts is None else self._experts.gradients()
            )
        positions = -1 - self._model.config.num_nextn_predict_layers
        return StepReport(
            worker=self.agreement.rank,
            step=inputs.step,
            loads=sums.loads,
            trunk_squared_norm=squared,
            local_expert_squared_norm=self._experts.prepare(inputs.step) if self._experts else 0.0,
            main_sum=sums.main,
            mtp_sum=sums.mtp,
            balance_sum=sums.balance,
            # Counts of the global batch, which the coordinator adds up: one worker reports them.
            n_targets=inputs.n_targets if self.agreement.rank == 0 else 0,
            n_rows=inputs.n_rows if self.agreement.rank == 0 else 0,
            tokens=sum(m.tokens[:, :positions].numel() for m in inputs.microbatches),
            seconds=time.perf_counter() - start,
            tokens_routed=after.tokens - before.tokens,
            rows_sent=after.rows - before.rows,
            bytes=after.bytes - before.bytes,
        )

    def evaluate(
        self, step: int, microbatches: Sequence[Microbatch], *, passes: int = 0
    ) -> tuple[list[Evaluation], Tensor]:
        """Evaluate this worker's share of the held-out rows; between `agreement.meet` and `agreement.agree`.

        Args:
            passes: Microbatches of the worker that has most, see `StepInputs`.

        Returns:
            One evaluation per microbatch, and the loads `[L, E]` of their tokens.
        """
        results = self._lanes.map(step, microbatches, self._evaluate)
        self._end_passes(passes - len(microbatches), self._evaluate_nothing)
        loads = torch.zeros(len(self._layers), self._model.config.n_routed_experts, dtype=torch.int64)
        for _, traced in results:
            for at, layer in enumerate(self._layers):
                loads[at] += traced[layer].cpu()
        return [evaluation for evaluation, _ in results], loads

    def apply(self, decision: StepDecision) -> None:
        """Apply the decided step to this worker's parameters, then update the gates' bias."""
        with self._span(decision.step, "apply"):
            if self._experts is not None:
                self._experts.commit(decision.step, decision.learning_rate, decision.scale)
            self._parameters.step(decision.learning_rate, decision.scale)
            self._model.set_bias(decision.bias)
        if self._timeline is not None:
            self._timeline.done(decision.step)

    def close(self) -> None:
        """End the lanes' threads."""
        self._lanes.close()

    def _agreed(
        self, inputs: StepInputs, work: Callable[[StepLane, Microbatch], T], nothing: Callable[[], object]
    ) -> list[T]:
        """Do some work for all microbatches of a step; no worker returns if one of them has lost a host.

        Args:
            nothing: Does the work for no rows, where passes take all workers.
        """
        results: list[T] = []
        loss: RaymoeError | None = None
        try:
            results = self._lanes.map(inputs.step, inputs.microbatches, work)
            self._end_passes(inputs.passes - len(inputs.microbatches), nothing)
        except RaymoeError as error:
            if not gives_way(error):
                raise
            loss = error
        self.agreement.agree(loss)
        return results

    def _routed(self, inputs: StepInputs) -> dict[int, Trace]:
        """Traces by microbatch, with the routing of the global batch; empty where no loss depends on that."""
        alone = self.agreement.workers == 1 and len(inputs.microbatches) == 1
        if alone or not inputs.balance.of_batch:
            return {}
        traces = self._agreed(inputs, partial(self._route, inputs), self._route_nothing)
        config = self._model.config
        counts = routing_counts(traces, config)
        self.agreement.sum(counts)
        batch = batch_routing(counts, config, n_rows=inputs.n_rows, device=self._device)
        for trace in traces:
            trace.batch = batch
        return {one.index: trace for one, trace in zip(inputs.microbatches, traces, strict=True)}

    def _route(self, inputs: StepInputs, lane: StepLane, microbatch: Microbatch) -> Trace:
        trace = Trace()
        with self._span(inputs.step, "route", microbatch=microbatch.index), self._parameters.passing():
            work = partial(route, self._model, *self._here(microbatch), experts=lane, trace=trace)
            self._without_gradients(work)
        return trace

    def _route_nothing(self) -> None:
        with self._parameters.passing():
            self._without_gradients(
                partial(route, self._model, self._nothing, None, experts=ZeroExperts(), trace=Trace())
            )

    @torch.no_grad()
    def _without_gradients(self, work: Callable[[], T]) -> T:
        return self._parameters.forward(work, lambda _: None)

    def _train(
        self, inputs: StepInputs, routed: Mapping[int, Trace], lane: StepLane, microbatch: Microbatch
    ) -> tuple[Losses, dict[int, Tensor]]:
        trace = routed.get(microbatch.index) or Trace()
        with self._parameters.passing():
            with self._span(inputs.step, "forward", microbatch=microbatch.index):
                losses = self._loss(inputs, *self._here(microbatch), lane, trace)
            with self._span(inputs.step, "backward", microbatch=microbatch.index):
                _backward(losses.total)
        return losses, trace.loads

    def _here(self, microbatch: Microbatch) -> tuple[Tensor, Tensor | None]:
        """Tokens and segments of a microbatch, on the trunk's device."""
        segments = microbatch.segments
        tokens = to_device(microbatch.tokens, self._device)
        return tokens, None if segments is None else to_device(segments, self._device)

    def _loss(
        self, inputs: StepInputs, tokens: Tensor, segments: Tensor | None, experts: Experts, trace: Trace
    ) -> Losses:
        work = partial(
            training_loss,
            self._model,
            tokens,
            segments,
            experts=experts,
            trace=trace,
            weights=LossWeights(
                n_targets=inputs.n_targets,
                n_rows=inputs.n_rows,
                balance=inputs.balance,
                mtp=inputs.mtp_weight,
            ),
            recompute=self._recompute,
        )
        return self._parameters.forward(work, lambda losses: losses.total)

    def _span(self, step: int, name: str, **details: int) -> AbstractContextManager[None]:
        timeline = self._timeline
        return nullcontext() if timeline is None else timeline.span(step, name, "", **details)

    def _evaluate(self, lane: StepLane, microbatch: Microbatch) -> tuple[Evaluation, dict[int, Tensor]]:
        trace = Trace()
        return self._evaluation(*self._here(microbatch), lane, trace), trace.loads

    def _evaluation(
        self, tokens: Tensor, segments: Tensor | None, experts: Experts, trace: Trace
    ) -> Evaluation:
        work = partial(evaluation_loss, self._model, tokens, segments, experts=experts, trace=trace)
        with self._parameters.passing():
            return self._without_gradients(work)

    def _end_passes(self, missing: int, work: Callable[[], object]) -> None:
        """Make the passes that only other workers have rows for, then raise deferred errors."""
        if self._parameters.together:
            for _ in range(missing):
                self._lanes.run_alone(work)
        self._lanes.raise_deferred()

    def _train_nothing(self, inputs: StepInputs) -> None:
        """A pass without rows, whose gradients are zeros."""
        with self._parameters.passing():
            losses = self._loss(inputs, self._nothing, None, ZeroExperts(), Trace())
            _backward(losses.total * 0.0)

    def _evaluate_nothing(self) -> None:
        self._evaluation(self._nothing, None, ZeroExperts(), Trace())

    @property
    def _nothing(self) -> Tensor:
        """The shortest row of tokens, [1, T]."""
        length = 2 + self._model.config.num_nextn_predict_layers
        return torch.zeros(1, length, dtype=torch.int64, device=self._device)


def _backward(loss: Tensor) -> None:
    """Run the backward pass in this thread alone.

    Autograd would run all nodes of a GPU in one thread of its own, where a lane that waits for its tokens
    would block those that compute.
    """
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()  # type: ignore[no-untyped-call]


__all__ = ["ExpertsInProcess", "TrunkWorker"]
