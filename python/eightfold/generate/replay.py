"""Work that is asked for again and again with other data: replayed as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

_MOST = 64  # graphs kept: one for each length of a prompt, among others


class Replay:
    """Runs functions of no argument whose tensors stay at their addresses, each known by a key: with `graphs` the
    first call of a key as it is, which makes what must not be made while capturing; the second captures it; from then
    on it is replayed. The function of a key always does the same work. device: where its tensors are, which need not be
    the current one."""

    def __init__(self, graphs: bool, device: torch.device):
        self._graphs = graphs
        self._stream = torch.cuda.Stream(device) if graphs else None
        self.forget()

    def forget(self) -> None:
        """Lets the graphs go: addresses have changed. Those to come share another pool, as one whose graphs are all
        gone cannot be used again."""
        self._captured: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        if not self._graphs or key not in self._captured:
            function()
            self._keep(key, None)
            return
        if self._captured[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                function()
            self._keep(key, graph)
        self._captured.move_to_end(key)
        self._captured[key].replay()

    def _keep(self, key: Hashable, graph: torch.cuda.CUDAGraph | None) -> None:
        self._captured[key] = graph
        if len(self._captured) > _MOST:
            self._captured.popitem(last=False)
