"""An expert host: a shard of the routed experts of all MoE layers, with gradients and moments in training.

Steps are 0-based. A host that has committed steps 0 … s-1 is at step s: it holds the weights that step
s computes with. A request of step s+1 that comes while s is being committed waits until its layer has
been; every other step is refused. Without an optimizer (serving) the host looks at no step, and may
hold several versions of its weights, by epoch: routers change from one to another at different times.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.expert_state import MomentSource, Pair, save_experts
from actors.ledger import Ledger
from actors.steps import HostStats, OptimizerSettings
from channels.base import Phase, Request, RequestId
from channels.mailbox import HostBox
from errors import ProtocolError, RaymoeError, StaleEpoch
from kernels.decode import mix_experts
from kernels.dispatch import FOREIGN, MALFORMED, localize
from model.config import ModelConfig
from model.experts import ExpertShard, experts_backward, experts_forward
from model.optimizer import AdamW
from model.sources import WeightSource


@dataclass(slots=True)
class _Layer:
    """One layer's experts on this host.

    Attributes:
        experts: global ids; position in the tuple = index in the shard.
        local_of: [E] int32, global id -> index in the shard, -1 for experts of other hosts; a NumPy array.
        step: steps committed.
    """

    experts: tuple[int, ...]
    local_of: npt.NDArray[np.int32]
    shard: ExpertShard
    optimizer: AdamW | None
    step: int


Layers = dict[int, _Layer]


class ExpertHost:
    """Answers routers' requests, and the coordinator's prepare, commit, save, load and retain.

    All methods may be called from several threads at once.

    Args:
        host_id: name of the host.
        config: the model.
        experts: model layer index -> ids of the experts that this host owns.
        source: where the weights come from.
        open_source: opens a directory with other weights for `load`; None refuses that.
        optimizer: settings of AdamW; None for a host that only infers.
        moments: where the optimizer's moments come from; None starts with zeros.
        dtype: of weights, rows and replies.
        threads: sets torch's threads, of the whole process; None leaves them alone.
        epoch: placement epoch.
        step: steps that the weights have behind them.
        device: where weights live.
        commit_timeout: seconds that a request of the next step waits for the commit.

    Raises:
        CheckpointError: from the source.
    """

    def __init__(
        self,
        host_id: str,
        config: ModelConfig,
        experts: Mapping[int, Sequence[int]],
        source: WeightSource,
        *,
        open_source: Callable[[str], WeightSource] | None = None,
        optimizer: OptimizerSettings | None = None,
        moments: MomentSource | None = None,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        epoch: int = 0,
        step: int = 0,
        device: torch.device | str = "cpu",
        commit_timeout: float = 120.0,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.id = host_id
        self.config = config
        self.dtype = dtype
        self._open_source = open_source
        self._device = torch.device(device)
        compiled = self._device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self._numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype if compiled else None
        self._commit_timeout = commit_timeout
        self._ledger = Ledger()
        self._committing = threading.Lock()
        self._loading = threading.Lock()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._step = step
        self._sealed = False
        self._counts: Counter[str] = Counter()
        self._layers: Layers = {
            layer: self._load(layer, tuple(experts[layer]), source, optimizer, moments)
            for layer in sorted(experts)
            if experts[layer]
        }
        # Replaced, never changed: requests read it while another thread loads or drops weights.
        self._held: dict[int, Layers] = {epoch: self._layers}
        self._directories: dict[int, str] = {}

    def answer(self, box: HostBox) -> None:
        """Answer a request in a mailbox; what cannot be is refused, and comes again to `handle`."""
        epoch, index = box.call
        layer = self._held.get(epoch, {}).get(index)
        fits = box.width == self.config.hidden_size and box.dtype == self._numpy_dtype
        if layer is None or layer.optimizer is not None or not fits:
            box.reply(answered=False)
            return
        n, pairs = box.accept(layer.local_of)
        if n:
            parts = box.box
            partial = parts.partial[:n]
            partial[:] = 0
            mix_experts(
                parts.rows[:n],
                box.row_ptr[: n + 1],
                box.expert[:pairs],
                parts.gate[:pairs],
                layer.shard.w13.numpy(),
                layer.shard.w2.numpy(),
                partial,
            )
        box.reply(answered=n > 0)
        self._count(Phase.INFER, n)

    @property
    def step(self) -> int:
        """Steps committed: the step that the weights are for."""
        return self._step

    @property
    def epoch(self) -> int:
        """Of the weights that the host began with or was last told to retain."""
        return next(iter(self._held))

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        """The same weights under another placement."""
        self._held = {epoch: self._layers}

    @property
    def epochs(self) -> tuple[int, ...]:
        """All that requests are answered of."""
        return tuple(self._held)

    def handle(self, request: Request) -> tuple[Tensor, ...]:
        """Answer one request of a router; see `channels.base` for the payloads.

        Raises:
            StaleEpoch: the request was routed with an epoch that the host does not hold.
            ProtocolError: an expert of another host, a step that is not current, a malformed payload, or
                a BACKWARD without its FORWARD.
        """
        id = request.id
        if id.phase is Phase.RELEASE:
            self._ledger.release(id)
            return ()
        layers = self._held.get(id.epoch)
        if layers is None:
            raise StaleEpoch(
                f"expert host {self.id} is at placement epoch {self.epoch}, the request of router "
                f"{id.router!r} at {id.epoch}: fetch the routing table and send again",
                epoch=self.epoch,
            )
        layer = layers.get(id.layer)
        if layer is None:
            raise ProtocolError(
                f"expert host {self.id} has no experts of layer {id.layer}, only of {sorted(self._layers)}"
            )
        self._await_step(layer, id)
        if id.phase is Phase.BACKWARD:
            return self._backward(layer, request)
        return self._forward(layer, request)

    def prepare(self, step: int) -> float:
        """First half of a commit: seal the step's gradients and return the sum of their squares (float64).

        Raises:
            ProtocolError: the host is at another step.
        """
        with self._committing:
            self._check(step)
            self._sealed = True
            return sum(
                layer.optimizer.squared_norm()
                for layer in self._layers.values()
                if layer.optimizer is not None
            )

    def commit(self, step: int, learning_rate: float, scale: float) -> None:
        """Second half: AdamW with gradients times `scale`; layer by layer, each usable at once.

        A repeat of the last commit does nothing. Activations that were never used are dropped.

        Raises:
            ProtocolError: the step is neither the prepared one nor the last committed one.
        """
        with self._committing:
            if step == self._step - 1:
                return
            self._check(step)
            if not self._sealed:
                raise ProtocolError(f"commit of step {step} on expert host {self.id} without a prepare")
            try:
                self._ledger.clear()
                for layer in self._layers.values():
                    if layer.optimizer is not None:
                        layer.optimizer.step(learning_rate, scale)
                        layer.optimizer.zero_grad()
                    with self._changed:
                        layer.step = step + 1
                        self._changed.notify_all()
            except Exception as error:
                # A part of the layers may have moved: nothing that this host holds is of one version now.
                with self._changed:
                    self._failure = f"expert host {self.id} failed in the commit of step {step}: {error}"
                    self._changed.notify_all()
                raise
            self._sealed = False
            self._step = step + 1

    def load(self, epoch: int, directory: str) -> None:
        """Load the same experts' weights of another checkpoint beside those in use, for requests of `epoch`.

        A repeat does nothing. Requests are answered meanwhile.

        Raises:
            RaymoeError: from `open_source`.
            CheckpointError: the directory's weights are missing, damaged or of another shape.
            ProtocolError: the host trains, or holds other weights under this epoch.
        """
        with self._loading:
            if self._directories.get(epoch) == directory:
                return
            if self._open_source is None or epoch in self._held:
                why = (
                    "takes no other weights" if self._open_source is None else f"holds epoch {epoch} already"
                )
                raise ProtocolError(f"expert host {self.id} {why}; it was asked to load {directory}")
            source = self._open_source(directory)
            layers = {
                index: self._load(index, layer.experts, source, None, None)
                for index, layer in self._layers.items()
            }
            self._held = {**self._held, epoch: layers}
            self._directories[epoch] = directory

    def retain(self, epoch: int) -> None:
        """Drop the weights of every other epoch. Requests under way end with those that they began with.

        Raises:
            ProtocolError: the host does not hold this epoch.
        """
        with self._loading:
            if epoch not in self._held:
                raise ProtocolError(f"expert host {self.id} holds epochs {self.epochs}, not {epoch}")
            self._layers = self._held[epoch]
            self._held = {epoch: self._layers}
            self._directories = {e: d for e, d in self._directories.items() if e == epoch}

    def gradients(self) -> list[Tensor]:
        """The gradient buffers, flat, for workers that hold the experts themselves and all-reduce them."""
        return [
            buffer
            for layer in self._layers.values()
            if layer.optimizer is not None
            for buffer in layer.optimizer.gradient_buffers()
        ]

    def weights(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Every expert of this host: layer, id, w13 [2I, D] and w2 [D, I] as live views."""
        for index, layer in self._layers.items():
            for at, expert in enumerate(layer.experts):
                yield index, expert, layer.shard.w13[at], layer.shard.w2[at]

    def moments(self) -> Iterator[tuple[int, int, Pair, Pair]]:
        """Every expert's layer, id and (exp_avg, exp_avg_sq) of w13 and w2, live views; none in serving."""
        for index, layer in self._layers.items():
            if layer.optimizer is not None:
                one, two = (layer.optimizer.moments()[name] for name in ("w13", "w2"))
                for at, expert in enumerate(layer.experts):
                    yield index, expert, (one[0][at], one[1][at]), (two[0][at], two[1][at])

    def save(self, directory: str) -> list[str]:
        """Write own weights and moments into a checkpoint; the names of the files (see `expert_state`).

        Raises:
            CheckpointError: the directory cannot be written to.
        """
        with self._committing:
            return save_experts(Path(directory), self.id, self.weights(), self.moments())

    def stats(self) -> HostStats:
        """Counters; cheap, at any time."""
        kept, kept_bytes = self._ledger.kept()
        shards = [layer.shard for layer in self._layers.values()]
        with self._changed:
            counts = dict(self._counts)
        return HostStats(
            id=self.id,
            step=self._step,
            epoch=self.epoch,
            kept=kept,
            kept_bytes=kept_bytes,
            parameters=sum(shard.w13.numel() + shard.w2.numel() for shard in shards),
            rows=counts.pop("rows", 0),
            requests=counts,
        )

    def _forward(self, layer: _Layer, request: Request) -> tuple[Tensor, ...]:
        rows, _, _, gate = self._payload(request, 4)
        if rows.dtype != self.dtype or rows.ndim != 2 or rows.shape[1] != self.config.hidden_size:
            raise ProtocolError(
                f"expert host {self.id} takes rows [n, {self.config.hidden_size}] of {self.dtype}, "
                f"not {list(rows.shape)} of {rows.dtype}"
            )
        keep = request.id.phase is Phase.FORWARD
        if keep and layer.optimizer is None:
            raise ProtocolError(f"expert host {self.id} holds no optimizer: it answers INFER, not FORWARD")
        row_ptr, local = self._local(layer, request)
        partial, saved = experts_forward(layer.shard, rows, row_ptr, local, gate, keep=keep)
        if saved is not None:
            self._ledger.keep(request.id, saved)
        self._count(request.id.phase, rows.shape[0])
        return (partial,)

    def _backward(self, layer: _Layer, request: Request) -> tuple[Tensor, ...]:
        (d_partial,) = self._payload(request, 1)
        call, saved = self._ledger.begin_backward(request.id)
        if saved is not None:
            try:
                if self._sealed:
                    raise ProtocolError(f"step {request.id.step} is sealed: its gradients have been counted")
                if d_partial.shape != saved.rows.shape:
                    raise ProtocolError(
                        f"d_partial is {list(d_partial.shape)}, the rows were {list(saved.rows.shape)}"
                    )
                call.reply = experts_backward(layer.shard, saved, d_partial)
                self._count(request.id.phase, d_partial.shape[0])
            except BaseException as error:
                call.error = f"{type(error).__name__}: {error}"
                raise
            finally:
                call.finish()
        return call.wait(self._commit_timeout)

    def _await_step(self, layer: _Layer, id: RequestId) -> None:
        if layer.optimizer is None or (id.step == layer.step and self._failure is None):
            return
        with self._changed:
            if id.step == layer.step + 1:
                self._changed.wait_for(
                    lambda: layer.step >= id.step or self._failure is not None, self._commit_timeout
                )
            if self._failure is not None:
                raise RaymoeError(self._failure)
            if id.step != layer.step:
                raise ProtocolError(
                    f"router {id.router!r} asks for step {id.step} of layer {id.layer}, but expert host "
                    f"{self.id} is at step {layer.step}"
                )

    def _check(self, step: int) -> None:
        if self._failure is not None:
            raise RaymoeError(self._failure)
        if step != self._step:
            raise ProtocolError(f"expert host {self.id} is at step {self._step}, not at step {step}")

    def _local(self, layer: _Layer, request: Request) -> tuple[Tensor, Tensor]:
        """row_ptr [n + 1], and the request's experts as indices into the shard [nnz]; both int32.

        What a peer sent is checked here, and copied: it may still write to memory that it shares.
        """
        rows, row_ptr, expert, gate = request.tensors
        row_ptr = row_ptr.clone()
        whole = row_ptr.numel() == rows.shape[0] + 1 and expert.numel() == gate.numel()
        flat = row_ptr.ndim == expert.ndim == gate.ndim == 1
        integers = row_ptr.dtype == expert.dtype == torch.int32
        local = torch.empty_like(expert)
        found = MALFORMED
        if whole and flat and integers:
            found = localize(row_ptr.numpy(), expert.numpy(), layer.local_of, local.numpy())
        if found == MALFORMED:
            raise ProtocolError(
                f"{rows.shape[0]} rows came with row_ptr {list(row_ptr.shape)} up to "
                f"{row_ptr.flatten()[-1:].tolist()}, experts {list(expert.shape)} and gates "
                f"{list(gate.shape)}; row_ptr rises from 0 to the number of pairs"
            )
        if found == FOREIGN:
            here = set(layer.experts)
            foreign = sorted(set(expert.tolist()) - here)[:8]
            raise ProtocolError(
                f"expert host {self.id} does not hold experts {foreign} of layer {request.id.layer}; it "
                f"holds {len(here)}: {sorted(here)[:8]}…"
            )
        return row_ptr.to(self._device), local.to(self._device)

    def _payload(self, request: Request, n: int) -> tuple[Tensor, ...]:
        if len(request.tensors) != n:
            raise ProtocolError(
                f"{request.id.phase.name} carries {len(request.tensors)} tensors instead of {n}"
            )
        if self._device.type == "cpu":
            return request.tensors
        return tuple(tensor.to(self._device) for tensor in request.tensors)

    def _count(self, phase: Phase, rows: int) -> None:
        with self._changed:
            self._counts[phase.name] += 1
            self._counts["rows"] += rows

    def _load(
        self,
        layer: int,
        experts: tuple[int, ...],
        source: WeightSource,
        settings: OptimizerSettings | None,
        moments: MomentSource | None,
    ) -> _Layer:
        wide, hidden = self.config.moe_intermediate_size, self.config.hidden_size
        w13 = torch.empty(len(experts), 2 * wide, hidden, dtype=self.dtype, device=self._device)
        w2 = torch.empty(len(experts), hidden, wide, dtype=self.dtype, device=self._device)
        local_of = np.full(self.config.n_routed_experts, -1, np.int32)
        for at, expert in enumerate(experts):
            one, two = source.expert(layer, expert)
            w13[at].copy_(one)
            w2[at].copy_(two)
            local_of[expert] = at
        shard = ExpertShard(w13, w2)
        optimizer = None
        if settings is not None:
            optimizer = AdamW(
                [("w13", shard.w13), ("w2", shard.w2)],
                beta1=settings.beta1,
                beta2=settings.beta2,
                epsilon=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
            optimizer.step_count = self._step
            if moments is not None:
                _load_moments(optimizer, [moments.moments(layer, expert) for expert in experts])
            shard.d_w13, shard.d_w2 = optimizer.gradients["w13"], optimizer.gradients["w2"]
        return _Layer(experts, local_of, shard, optimizer, self._step)


def _load_moments(optimizer: AdamW, loaded: Sequence[tuple[Pair, Pair]]) -> None:
    """Fill a layer's moments, expert by expert."""
    mine = optimizer.moments()
    optimizer.load_moments(
        {
            name: (
                torch.stack([pairs[at][0] for pairs in loaded]),
                torch.stack([pairs[at][1] for pairs in loaded]),
            )
            for at, name in enumerate(mine)
        },
        step=optimizer.step_count,
    )


__all__ = ["ExpertHost"]
