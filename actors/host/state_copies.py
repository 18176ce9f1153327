"""Copies of a host's state, and of tensors that workers leave with it, in memory and as streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from actors.host.expert_layers import LayerCopy
from actors.messages.tensor_stream import frames, head
from actors.messages.transfer_codec import blob_to, stored_to
from actors.messages.transfer_orders import EXPERTS, Blob, Stored
from errors import ProtocolError
from model.config import ModelConfig


@dataclass(slots=True, eq=False)
class Copy:
    """One entry: the experts of a host, or a blob.

    Attributes:
        layers: copies of a host's experts.
        tensors: of a blob.
        note: of a blob.
        complete: it is all there.
        gone: its memory is another's, or nobody's.
        pushes: buddy -> what became of it: "" is well, None not yet.
    """

    kind: str
    of: str
    step: int
    epoch: int
    layers: dict[int, LayerCopy]
    tensors: dict[str, Tensor]
    note: str = ""
    complete: bool = False
    gone: bool = False
    pushes: dict[str, str | None] = field(default_factory=dict)

    def check(self) -> None:
        """Raises when what has been read or written since is another's.

        Raises:
            ProtocolError: a newer one has taken its place.
        """
        if self.gone:
            raise ProtocolError(f"the {self.kind} of {self.of} at step {self.step} are kept no more")

    def stored(self) -> Stored:
        """What it is, for others."""
        return Stored(
            kind=self.kind,
            of=self.of,
            step=self.step,
            epoch=self.epoch,
            experts={layer: copy.experts for layer, copy in self.layers.items()},
            pushed=tuple(buddy for buddy, error in self.pushes.items() if error == ""),
            failed={buddy: error for buddy, error in self.pushes.items() if error},
        )

    def memory(self) -> list[Tensor]:
        """Everything that it holds, in the order of its stream."""
        return [*(copy.flat for copy in self.layers.values()), *self.tensors.values()]

    def frames(self) -> Iterator[bytes]:
        """The stream that another host's `Memory.store` takes."""
        if self.kind == EXPERTS:
            yield head(stored_to(self.stored()))
        else:
            yield head(blob_to(Blob(name=self.of, step=self.step, tensors=self.tensors, note=self.note)))
        yield from frames(self.memory(), self.check)


def check_experts(config: ModelConfig, experts: Mapping[int, Sequence[int]]) -> None:
    """Whether a model has such experts.

    Raises:
        ProtocolError: a layer without any, an unknown expert, or one that comes twice.
    """
    for layer, ids in experts.items():
        known: Sequence[int] = range(config.n_routed_experts)
        if layer not in config.moe_layers or len(set(ids)) != len(ids) or any(id not in known for id in ids):
            raise ProtocolError(
                f"layer {layer} has no experts {list(ids)[:8]}…, or not twice: the model has "
                f"{config.n_routed_experts} in each of the layers {list(config.moe_layers)}"
            )


__all__ = ["Copy", "check_experts"]
