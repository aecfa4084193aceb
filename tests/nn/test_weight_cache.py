"""WeightCache.settled: products read codes early in CUDA graphs alone, and only those from before the graph."""

import pytest
import torch

from eightfold.nn import ServedCodes, WeightCache
from eightfold.nn import functional as fused
from eightfold.ops import quantize


def test_nothing_is_settled_outside_of_a_graph(device):
    weight, cache, served = torch.nn.Parameter(torch.randn(128, 128, device=device)), WeightCache(), ServedCodes()
    assert not cache.settled
    cache.codes(weight)
    codes = quantize(weight.detach(), (128, 128))
    served.put(weight, codes.codes, codes.scales)
    assert not cache.settled
    assert not served.settled


@pytest.mark.gpu
def test_codes_from_before_a_graph_are_settled_in_it():
    old, new = (torch.nn.Parameter(torch.randn(256, 128, device="cuda")) for _ in range(2))
    caches = WeightCache(), WeightCache()
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    caches[0].codes(old)
    found = []
    with torch.no_grad():
        expected = [fused.fp8_linear(x, weight) for weight in (old, new)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [
                fused.fp8_linear(x, weight, cache=cache) for weight, cache in zip((old, new), caches, strict=True)
            ]
            found += [cache.settled for cache in caches]
        graph.replay()
    assert found == [True, False]
    assert all(map(torch.equal, results, expected))
