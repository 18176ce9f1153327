"""One MoE layer's call of inference over channels: rerouted when a host is lost, as hosts keep nothing of it.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from actors.router.call_context import CallContext, CallKey
from actors.router.exchange import Exchange
from actors.router.host_map import HostMap
from actors.router.reroute import Reroute
from channels.base import Phase
from errors import StaleEpoch


class InferenceCall:
    """A `Pending` whose rows [N, D] are in flight.

    Args:
        rows: Rows on any device.
        idx, gates: Experts and gates [N, K], in CPU memory.
        host_map: A map with a host for every expert of idx.
        reroute: The search that led to this map; None if it took none.
    """

    def __init__(
        self,
        context: CallContext,
        layer: int,
        rows: Tensor,
        idx: Tensor,
        gates: Tensor,
        host_map: HostMap,
        reroute: Reroute | None,
    ) -> None:
        self._context, self._layer, self._idx = context, layer, idx
        self._sent: tuple[Tensor, Tensor] | None = (rows, gates)  # to send again until the replies are there
        self._reroute = reroute or Reroute(context.routing, layer, idx)
        self._exchange = Exchange(context, layer, idx, self._reroute)
        self.key: CallKey = (context.step, context.microbatch, layer)
        context.open_calls.add(self)
        self._send(host_map)

    def combine(self) -> Tensor:
        """Wait for the hosts' partial sums and add them up: [N, D]."""
        while True:
            try:
                replies = self._exchange.collect()
                other = self._reroute.next_map()
                if other is None:
                    break
            except StaleEpoch as error:
                other = self._context.routing.replan(error, self._exchange.host_map, step=None)
            # A newer map may lack hosts that this call needs.
            self._send(other if other.covers(self._layer, self._idx) else self._reroute.begin())
        self._sent = None
        self._context.open_calls.over(self)
        return self._exchange.combine(replies)

    def abandon(self) -> None:
        self._exchange.drain()

    def _send(self, host_map: HostMap) -> None:
        assert self._sent is not None
        self._reroute.sending(host_map)
        self._exchange.send(host_map, Phase.INFER, *self._sent, self._context.shifts.next())


__all__ = ["InferenceCall"]
