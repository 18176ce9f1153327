"""A copy in a host's memory: the experts of a host, or named tensors of a worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from actors.host.expert_layers import LayerCopy
from actors.messages.tensor_stream import heading_frame, tensor_frames
from actors.messages.transfer_codec import blob_to, stored_to
from actors.messages.transfer_orders import EXPERTS, Blob, StoredCopy
from errors import ProtocolError
from model.config import ModelConfig


@dataclass(slots=True, eq=False)
class StateCopy:
    """A copy of the experts of a host, or of a blob.

    Attributes:
        kind: `experts`, or the name of the blob.
        owner: Id of the host whose experts these are, or the name of the blob.
        step: Step that the state is for.
        epoch: Epoch in which the experts were copied; -1 for a blob.
        layers: The experts, by layer.
        tensors: The tensors of a blob.
        note: Text stored with a blob.
        complete: Whether all tensors have been filled.
        gone: Whether the copy has been dropped and its memory may be reused.
        pushes: Buddy -> outcome of sending the copy: "" for success, an error text, or None while under way.
    """

    kind: str
    owner: str
    step: int
    epoch: int
    layers: dict[int, LayerCopy]
    tensors: dict[str, Tensor]
    note: str = ""
    complete: bool = field(default=False, init=False)
    gone: bool = field(default=False, init=False)
    pushes: dict[str, str | None] = field(default_factory=dict, init=False)

    def check(self) -> None:
        """Check that the copy has not been dropped.

        Raises:
            ProtocolError: it has been dropped, and its memory may hold a newer copy.
        """
        if self.gone:
            raise ProtocolError(f"the {self.kind} of {self.owner} at step {self.step} are kept no more")

    def stored(self) -> StoredCopy:
        """Description of the copy."""
        return StoredCopy(
            kind=self.kind,
            owner=self.owner,
            step=self.step,
            epoch=self.epoch,
            experts={layer: copy.experts for layer, copy in self.layers.items()},
            pushed=tuple(buddy for buddy, error in self.pushes.items() if error == ""),
            failed={buddy: error for buddy, error in self.pushes.items() if error},
        )

    def memory(self) -> list[Tensor]:
        """All tensors, in the order of the stream."""
        return [*(copy.flat for copy in self.layers.values()), *self.tensors.values()]

    def frames(self) -> Iterator[bytes]:
        """The copy as a stream for `SnapshotStore.store` of another host."""
        if self.kind == EXPERTS:
            yield heading_frame(stored_to(self.stored()))
        else:
            yield heading_frame(
                blob_to(Blob(name=self.owner, step=self.step, tensors=self.tensors, note=self.note))
            )
        yield from tensor_frames(self.memory(), self.check)


def check_experts(config: ModelConfig, experts: Mapping[int, Sequence[int]]) -> None:
    """Check that the model has these experts.

    Raises:
        ProtocolError: a layer has no experts, an expert is unknown, or an expert occurs twice.
    """
    for layer, ids in experts.items():
        known: Sequence[int] = range(config.n_routed_experts)
        if layer not in config.moe_layers or len(set(ids)) != len(ids) or any(id not in known for id in ids):
            raise ProtocolError(
                f"layer {layer} has no experts {list(ids)[:8]}…, or not twice: the model has "
                f"{config.n_routed_experts} in each of the layers {list(config.moe_layers)}"
            )


__all__ = ["StateCopy", "check_experts"]
