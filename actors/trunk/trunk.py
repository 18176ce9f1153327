"""The trunk of one data-parallel worker: microbatches in flight, gradients, its share of a step.

A worker runs several microbatches at once, each on a thread (a lane) of its own: while the tokens of
one are away at the expert hosts, another computes. Gradients of all lanes add up, are summed over the
workers (`actors.trunk.parameters`), and wait for the coordinator's decision.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from actors.messages.steps import StepDecision, StepReport
from actors.messages.timeline import Timeline
from actors.router.connections import LaneCounters
from actors.router.deferred_loss import ZeroExperts
from actors.router.lane_turns import Turns
from actors.trunk.parameters import Reducer, SingleWorker, TrunkParameters
from actors.trunk.step_inputs import Microbatch, StepInputs
from errors import Interrupted, RaymoeError, gives_way
from model.experts.protocols import Experts
from model.losses.training_losses import Evaluation, Losses, LossWeights, evaluation_loss, training_loss
from model.optimizers.adamw import value_dtype
from model.trace import Trace
from model.transfer import to_device
from model.transformer import Transformer

T = TypeVar("T")


class ExpertsInProcess(Protocol):
    """Experts that live in the worker itself, replicated in each worker (`cluster.expert_hosts: 0`)."""

    def gradients(self) -> Sequence[Tensor]: ...

    def prepare(self, step: int) -> float: ...

    def commit(self, step: int, learning_rate: float, scale: float) -> None: ...


class StepLane(Experts, Protocol):
    """The routed experts as one lane reaches them; see `actors.router.lane.Lane`."""

    @property
    def counters(self) -> LaneCounters: ...

    def begin(self, step: int, microbatch: int) -> None: ...

    def abandon(self) -> None: ...

    def raise_deferred(self) -> None: ...


@dataclass(slots=True)
class _Sums:
    """What a worker's microbatches of one step add up to."""

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
        rank: of this worker, from 0.
        workers: that there are.
        parameters: of the trunk.
        lanes: one for each microbatch in flight; enduring ones where passes take all workers.
        reducer: sums over the workers.
        experts: the experts in this process, if that is where they are.
        turns: of the lanes; None: they share the cores.
        timeline: records when lanes compute.
        recompute: recompute activations in the backward pass.
    """

    def __init__(
        self,
        *,
        rank: int,
        workers: int = 1,
        parameters: TrunkParameters,
        lanes: Sequence[StepLane],
        reducer: Reducer | None = None,
        experts: ExpertsInProcess | None = None,
        turns: Turns | None = None,
        timeline: Timeline | None = None,
        recompute: bool = False,
    ) -> None:
        self._rank, self._workers = rank, workers
        self.attempt = 0  # of the run, see `actors.coordinator.training_steps`
        self._parameters = parameters
        self._model = parameters.model
        self._lanes = tuple(lanes)
        self._reducer = reducer or SingleWorker()
        self._experts = experts
        self._turns, self._timeline, self._recompute = turns, timeline, recompute
        self._layers = self._model.config.moe_layers
        self._device = self._model.lm_head.weight.device
        # A thread of its own for each lane, for ever: channels and thread pools stay warm.
        self._threads = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"lane-{i}") for i in range(len(lanes))
        ]

    @property
    def model(self) -> Transformer:
        """The trunk."""
        return self._model

    @property
    def parameters(self) -> TrunkParameters:
        """The trunk's parameters as this worker has them."""
        return self._parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as a checkpoint holds them."""
        return value_dtype(self._model.lm_head.weight.dtype)

    @property
    def experts(self) -> ExpertsInProcess | None:
        """The experts of this process, if they are here."""
        return self._experts

    def run(self, inputs: StepInputs) -> StepReport:
        """Forward and backward of this worker's microbatches, summed over the workers.

        Returns:
            The report for the coordinator; the gradients wait for `apply`.

        Raises:
            ChannelError: a host is out of reach.
            Interrupted: it is for another worker.
            WorkersLost: another worker is gone.
        """
        self.meet()
        start = time.perf_counter()
        shape = (len(self._layers), self._model.config.n_routed_experts)
        sums = _Sums(loads=torch.zeros(shape, dtype=torch.int64))
        before = self._counted()
        loss: RaymoeError | None = None
        try:
            work = partial(self._train, inputs)
            for losses, loads in self._over_lanes(inputs.step, inputs.microbatches, work):
                sums.add(losses, loads, self._layers)
            self._keep_up(inputs.passes - len(inputs.microbatches), partial(self._train_nothing, inputs))
        except RaymoeError as error:
            if not gives_way(error):
                raise
            loss = error
        self.agree(loss)
        after = self._counted()
        with self._span(inputs.step, "sum gradients"):
            squared = self._parameters.sum_gradients(
                () if self._experts is None else self._experts.gradients()
            )
        positions = -1 - self._model.config.num_nextn_predict_layers
        return StepReport(
            worker=self._rank,
            step=inputs.step,
            loads=sums.loads,
            trunk_squared_norm=squared,
            local_expert_squared_norm=self._experts.prepare(inputs.step) if self._experts else 0.0,
            main_sum=sums.main,
            mtp_sum=sums.mtp,
            balance_sum=sums.balance,
            # Counts of the global batch, so one worker's say is enough.
            n_targets=inputs.n_targets if self._rank == 0 else 0,
            n_rows=inputs.n_rows if self._rank == 0 else 0,
            tokens=sum(m.tokens[:, :positions].numel() for m in inputs.microbatches),
            seconds=time.perf_counter() - start,
            tokens_routed=after.tokens - before.tokens,
            rows_sent=after.rows - before.rows,
            bytes=after.bytes - before.bytes,
        )

    def evaluate(
        self, step: int, microbatches: Sequence[Microbatch], *, passes: int = 0
    ) -> tuple[list[Evaluation], Tensor]:
        """Judge this worker's share of the held-out rows; `meet` before, and `agree` after it.

        Args:
            passes: microbatches of the worker that has most, see `StepInputs`.

        Returns:
            One evaluation per microbatch, and the loads `[L, E]` that they would have made.
        """
        results = self._over_lanes(step, microbatches, self._judge)
        self._keep_up(passes - len(microbatches), self._judge_nothing)
        loads = torch.zeros(len(self._layers), self._model.config.n_routed_experts, dtype=torch.int64)
        for _, traced in results:
            for at, layer in enumerate(self._layers):
                loads[at] += traced[layer].cpu()
        return [evaluation for evaluation, _ in results], loads

    def apply(self, decision: StepDecision) -> None:
        """Apply the step that all parts of the model take together, then move the gates' bias."""
        with self._span(decision.step, "apply"):
            if self._experts is not None:
                self._experts.commit(decision.step, decision.learning_rate, decision.scale)
            self._parameters.step(decision.learning_rate, decision.scale)
            self._model.set_bias(decision.bias)
        if self._timeline is not None:
            self._timeline.done(decision.step)

    def close(self) -> None:
        """End the lanes' threads."""
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    def meet(self) -> None:
        """Before what takes all workers: they are all here, of one attempt. Where each works alone: nothing.

        Raises:
            Interrupted: see `agree`.
        """
        if self._parameters.together:
            self.agree()

    def agree(self, loss: RaymoeError | None = None) -> None:
        """All workers come here before they sum something up: whoever has given up says so.

        They are all of one attempt when this returns, since sums of different ones must not meet.

        Args:
            loss: why this one has given up.

        Raises:
            RaymoeError: the loss.
            Interrupted: another worker has given up, or the run has begun again.
        """
        while True:
            said = torch.zeros(self._workers, 2, dtype=torch.int64)
            said[self._rank] = torch.tensor([self.attempt, loss is not None])
            self._reducer.all_reduce([said])
            if loss is not None:
                raise loss
            newest = int(said[:, 0].max())
            if self.attempt < newest or (said[:, 1].any() and bool((said[:, 0] == newest).all())):
                raise Interrupted("another worker has lost an expert host")
            if bool((said[:, 0] == newest).all()):
                return

    def _counted(self) -> LaneCounters:
        total = LaneCounters()
        for lane in self._lanes:
            total.tokens += lane.counters.tokens
            total.rows += lane.counters.rows
            total.bytes += lane.counters.bytes
        return total

    def _over_lanes(
        self, step: int, microbatches: Sequence[Microbatch], work: Callable[[StepLane, Microbatch], T]
    ) -> list[T]:
        """Do the work of all microbatches, as many at once as there are lanes; results in their order.

        Raises:
            The first error of a lane; by then no lane is at work any more.
        """
        # What is waiting goes to whichever lane is free; after an error nobody takes more.
        waiting = deque(enumerate(microbatches))
        results: list[T | None] = [None] * len(microbatches)

        def serve(lane: StepLane) -> None:
            while waiting:
                try:
                    at, microbatch = waiting.popleft()
                except IndexError:
                    return
                with self._turns.taken() if self._turns is not None else nullcontext():
                    try:
                        lane.begin(step, microbatch.index)
                        results[at] = work(lane, microbatch)
                    except BaseException:
                        waiting.clear()
                        lane.abandon()
                        raise

        futures = [
            thread.submit(serve, lane) for thread, lane in zip(self._threads, self._lanes, strict=True)
        ]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return cast("list[T]", results)

    def _train(
        self, inputs: StepInputs, lane: StepLane, microbatch: Microbatch
    ) -> tuple[Losses, dict[int, Tensor]]:
        trace = Trace()
        with self._parameters.passing():
            with self._span(inputs.step, "forward", microbatch=microbatch.index):
                losses = self._loss(inputs, *self._here(microbatch), lane, trace)
            with self._span(inputs.step, "backward", microbatch=microbatch.index):
                _backward(losses.total)
        return losses, trace.loads

    def _here(self, microbatch: Microbatch) -> tuple[Tensor, Tensor | None]:
        """Its tokens and segments, where the trunk is."""
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

    def _judge(self, lane: StepLane, microbatch: Microbatch) -> tuple[Evaluation, dict[int, Tensor]]:
        trace = Trace()
        return self._evaluation(*self._here(microbatch), lane, trace), trace.loads

    @torch.no_grad()
    def _evaluation(
        self, tokens: Tensor, segments: Tensor | None, experts: Experts, trace: Trace
    ) -> Evaluation:
        work = partial(evaluation_loss, self._model, tokens, segments, experts=experts, trace=trace)
        with self._parameters.passing():
            return self._parameters.forward(work, lambda _: None)

    def _keep_up(self, missing: int, work: Callable[[], object]) -> None:
        """Make the passes that other workers make and this one has no rows for, then raise what was lost."""
        if self._parameters.together:
            for _ in range(missing):
                self._threads[0].submit(work).result()
        for lane in self._lanes:
            lane.raise_deferred()

    def _train_nothing(self, inputs: StepInputs) -> None:
        """A pass whose gradients are zeros."""
        with self._parameters.passing():
            losses = self._loss(inputs, self._nothing, None, ZeroExperts(), Trace())
            _backward(losses.total * 0.0)

    def _judge_nothing(self) -> None:
        self._evaluation(self._nothing, None, ZeroExperts(), Trace())

    @property
    def _nothing(self) -> Tensor:
        """A row of as few tokens as there can be."""
        length = 2 + self._model.config.num_nextn_predict_layers
        return torch.zeros(1, length, dtype=torch.int64, device=self._device)


def _backward(loss: Tensor) -> None:
    """In this thread alone: the nodes of a GPU would all be another one's, where a lane that waits for its
    tokens stands in the way of those that compute."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()  # type: ignore[no-untyped-call]


__all__ = [
    "ExpertsInProcess",
    "StepLane",
    "TrunkWorker",
]
