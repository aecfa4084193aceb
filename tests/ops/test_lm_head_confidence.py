"""The head's token and its probability: against float64 softmax of the same logits, a row's bits, draws, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import fp8_gemm, gemm, lm_head_confidence, quantize, sample
from eightfold.ops.confidence import QuantizedTensor

op = torch.ops.eightfold.lm_head_confidence
TOLERANCE = {"cpu": 2e-6, "cuda": 1e-5}  # of a confidence, relative
KINDS = ["bfloat16", "float32", "fp8"]
SHAPES = [(1, 16, 16), (3, 48, 144), (31, 1040, 64), (65, 2064, 272), (130, 640, 400), (300, 144, 32)]
LARGE = [(8, 126464, 48), (8, 152064, 32)]


def case(rows, vocabulary, size, kind, device):
    if kind == "float32" and device.type == "cuda":
        pytest.skip("float32 is for CPUs")
    hidden = torch.randn(rows, size) * torch.empty(rows, 1).uniform_(0.5, 3)
    weight = torch.randn(vocabulary, size) / size**0.5
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    hidden, weight = (t.to(dtype).to(device) for t in (hidden, weight))
    return (quantize(hidden, (1, 128)), quantize(weight, (128, 128))) if kind == "fp8" else (hidden, weight)


def logits_of(hidden, weight):
    """Of the library's products, whose bits the op's logits have."""
    if isinstance(hidden, QuantizedTensor):
        return fp8_gemm(hidden, weight, out_dtype=torch.float32)
    return gemm(hidden, weight)


def exact(logits, forbidden=()):
    logits = logits.double().cpu()
    logits[:, list(forbidden)] = -torch.inf
    return logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)


def check(found, ids, confidence, device):
    assert found[0].dtype == torch.int64
    assert found[1].dtype == torch.float32
    wrong = (found[0].cpu() != ids).nonzero().flatten()
    assert len(wrong) == 0, f"ids of rows {wrong.tolist()}: {found[0].cpu()[wrong].tolist()}, not {ids[wrong].tolist()}"
    error = ((found[1].cpu().double() - confidence) / confidence).abs()
    assert error.max() < TOLERANCE[device.type], (
        f"confidence of row {int(error.argmax())} is off by {float(error.max()):.2g}"
    )


def operands(hidden, weight):
    """As torch.ops takes them."""
    if isinstance(hidden, QuantizedTensor):
        return hidden.codes, hidden.scales, weight.codes, weight.scales
    return hidden, None, weight, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_against_float64(shape, kind, device):
    hidden, weight = case(*shape, kind, device)
    logits = logits_of(hidden, weight)
    check(lm_head_confidence(hidden, weight), *exact(logits), device)
    likely = logits.float().mean(dim=0).topk(2).indices.tolist()
    forbidden = [*likely, int(logits[0].argmax()), 0, shape[1] - 1]
    found = lm_head_confidence(hidden, weight, forbidden=torch.tensor(forbidden, device=device))
    check(found, *exact(logits, forbidden), device)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, device):
    hidden, weight = case(5, 9008, 144, kind, device)
    arguments = (None, torch.tensor([3, 9007], device=device))
    expected = reference.lm_head_confidence(*operands(hidden, weight), *arguments)
    assert torch.equal(op(*operands(hidden, weight), *arguments)[0], expected[0])
    assert torch.allclose(
        op(*operands(hidden, weight), *arguments)[1], expected[1], rtol=1e-3 if device.type == "cuda" else 1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_the_lowest_id(kind, device):
    """Each group of equal columns lies in several tiles, lanes and, on CUDA, blocks."""
    vocabulary = 4112
    hidden, weight = case(40, vocabulary, 128, kind, device)
    if kind == "fp8":
        hidden, weight = hidden.dequantize(torch.float32), weight.dequantize(torch.float32)
    top = 3 * hidden.float().cpu()[:8]  # the likeliest of the first rows
    weight = weight.float().cpu()
    places = {row: sorted({int(p) for p in torch.randint(0, vocabulary, (6,))}) for row in range(8)}
    taken = set()
    for row, columns in places.items():
        places[row] = [p for p in columns if p not in taken]
        taken |= set(columns)
        weight[places[row]] = top[row]
    hidden = hidden.float().cpu()
    hidden[20] = 0.0  # all are equal
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    hidden, weight = (t.to(dtype).to(device).contiguous() for t in (hidden, weight))
    if kind == "fp8":
        hidden, weight = quantize(hidden, (1, 128)), quantize(weight, (128, 128))
    logits = logits_of(hidden, weight).cpu()
    found = lm_head_confidence(hidden, weight)
    ids, confidence = exact(logits)
    first = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits])
    assert torch.equal(ids, first)
    check(found, ids, confidence, device)
    if kind != "fp8":  # whose scales differ between blocks of the vocabulary
        assert found[0][:8].tolist() == [places[row][0] for row in range(8)]
    assert int(found[0][20]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [144, 5008])
def test_a_row_has_the_same_bits_in_any_company(vocabulary, kind, device):
    rows = 530
    source, weight = case(rows, vocabulary, 272, "bfloat16" if kind == "fp8" else kind, device)
    if kind == "fp8":
        weight = quantize(weight, (128, 128))

    def rows_of(at):
        return quantize(source[at], (1, 128)) if kind == "fp8" else source[at]

    draws = {
        "temperatures": torch.rand(rows, device=device).mul(2).round() / 2,
        "seeds": torch.arange(rows, device=device),
        "positions": torch.arange(rows, device=device) * 3,
    }
    whole = [lm_head_confidence(rows_of(slice(None)), weight, **options) for options in ({}, draws)]
    threads = torch.get_num_threads()
    try:
        for count, start, m in (
            (1, 529, 1),
            (2, 0, 33),
            (2, 7, 64),
            (1, 100, 65),
            (2, 3, 128),
            (2, 11, 129),
            (1, 40, 256),
            (2, 5, 257),
        ):
            torch.set_num_threads(count)
            at = slice(start, start + m)
            part = rows_of(at)
            for options, expected in zip(({}, {k: v[at] for k, v in draws.items()}), whole, strict=True):
                found = lm_head_confidence(part, weight, **options)
                assert torch.equal(found[0], expected[0][at]), f"ids of {m} rows from {start}"
                assert torch.equal(found[1], expected[1][at]), f"confidence of {m} rows from {start}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [5, 40, 130, 260])
def test_rows_that_are_not_active(rows, kind, device):
    hidden, weight = case(rows, 1040, 144, kind, device)
    ids, confidence = lm_head_confidence(hidden, weight)
    every, few, last = (torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(3))
    every[:], last[rows - 1] = True, True
    few[torch.randperm(rows)[: rows // 4]] = True
    for active in (every, few, last, ~last, ~every):
        found = lm_head_confidence(hidden, weight, active=active)
        assert torch.equal(found[0], ids.where(active, -1))
        assert torch.equal(found[1], confidence.where(active, -torch.inf))


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_draws(kind, device):
    """The reference's tokens; confidence is that of the token without noise and without temperature."""
    rows, vocabulary = 70, 2064
    hidden, weight = case(rows, vocabulary, 144, kind, device)
    temperatures = torch.empty(rows).uniform_(0.3, 2).to(device)
    temperatures[::5] = 0
    temperatures[1] = 1e-31
    seeds = torch.randint(-(2**62), 2**62, (rows,)).to(device)
    positions = torch.randint(0, 2**33, (rows,)).to(device)
    forbidden = torch.tensor([5, 700, 2063], device=device)
    rest = (None, forbidden, temperatures, seeds, positions)
    ids, confidence = op(*operands(hidden, weight), *rest)
    logits = logits_of(hidden, weight).double()
    logits[:, forbidden] = -torch.inf
    noise = reference.sampling.gumbel(seeds, positions, vocabulary)
    drawn = (logits / temperatures[:, None] + noise).argmax(dim=1)
    expected = torch.where(temperatures < 1e-30, logits.argmax(dim=1), drawn)
    assert torch.equal(ids, expected)
    probability = logits.softmax(dim=1).gather(1, ids[:, None])[:, 0]
    assert ((confidence - probability) / probability).abs().max() < TOLERANCE[device.type]
    assert len(set(ids.tolist())) > rows // 4
    assert torch.equal(reference.lm_head_confidence(*operands(hidden, weight), *rest)[0], ids)


def test_draws_are_those_of_sample(device):
    hidden, weight = case(64, 1040, 64, "bfloat16", device)
    seeds = torch.arange(64, device=device)
    ones = torch.ones(64, device=device)
    ids, _ = lm_head_confidence(hidden, weight, temperatures=ones, seeds=seeds, positions=seeds + 9)
    assert torch.equal(ids, sample(gemm(hidden, weight), seeds, seeds + 9))


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_rows_without_probabilities(kind, device):
    hidden, weight = case(40, 2064, 32, kind, device)
    weight[:, 0] = weight[:, 1] = 0
    for place, value in ((2000, torch.nan), (77, torch.inf), (5, -torch.inf)):
        weight[place, 0] = value  # times hidden[:, 0]
    hidden[:, 0] = 0  # inf * 0 is NaN: of every row
    assert lm_head_confidence(hidden, weight)[0].tolist() == [-1] * 40
    hidden[:, 0] = 1
    forbidden = torch.tensor([2000, 77], device=device)
    for ids in (forbidden, forbidden[:1], forbidden[1:]):
        found = lm_head_confidence(hidden, weight, forbidden=ids)
        if len(ids) == 2:
            check(found, *exact(gemm(hidden, weight), ids.tolist()), device)
        else:
            assert found[0].tolist() == [-1] * 40
            assert found[1].isnan().all()
    hidden[3, 0] = torch.nan  # one row only
    found = lm_head_confidence(hidden, weight, forbidden=forbidden)
    assert (found[0] == -1).nonzero().flatten().tolist() == [3]
    assert found[1].isnan().nonzero().flatten().tolist() == [3]
    weight[:, 0] = -torch.inf
    hidden[3, 0] = 1
    for function in (op, reference.lm_head_confidence):
        found = function(hidden, None, weight, None)
        assert found[0].tolist() == [-1] * 40
        assert found[1].isnan().all()


def test_impossible_temperatures(device):
    hidden, weight = case(6, 144, 32, "bfloat16", device)
    temperatures = torch.tensor([0.0, -1.0, torch.nan, torch.inf, 1.0, -0.0], device=device)
    seeds = torch.arange(6, device=device)
    for function in (op, reference.lm_head_confidence):
        ids, confidence = function(hidden, None, weight, None, None, None, temperatures, seeds, seeds)
        assert (ids < 0).tolist() == [False, True, True, True, False, False]
        assert confidence.isnan().tolist() == [False, True, True, True, False, False]


def test_confidence_of_the_certain_is_one(device):
    weight = torch.zeros(2048, 32, dtype=torch.bfloat16, device=device)
    weight[1234, 0] = 64
    hidden = torch.zeros(7, 32, dtype=torch.bfloat16, device=device)
    hidden[:, 0] = torch.tensor([0.0, 0.5, 1, 2, 100, 1000, 10000], device=device).bfloat16()
    ids, confidence = lm_head_confidence(hidden, weight)
    assert ids.tolist() == [0, *[1234] * 6]
    assert (confidence <= 1).all()
    assert (confidence[2:] == 1).all()
    assert abs(float(confidence[0]) * 2048 - 1) < 1e-5


def test_empty(device):
    for hidden, weight in (case(0, 48, 32, kind, device) for kind in ("bfloat16", "fp8")):
        ids, confidence = lm_head_confidence(hidden, weight)
        assert ids.shape == confidence.shape == (0,)


# opcheck's test_schema computes with the inputs, which torch cannot do in FP8; and it clones them densely, which drops
# the padding of the scales of other numbers of rows.
@pytest.mark.parametrize(
    ("kind", "checks"), [("bfloat16", ()), ("fp8", ("test_faketensor", "test_aot_dispatch_dynamic"))]
)
def test_torch_citizen(kind, checks, device):
    hidden, weight = case(4, 144, 48, kind, device)
    checks = {"test_utils": checks} if checks else {}
    torch.library.opcheck(op.default, operands(hidden, weight), **checks)
    active = torch.tensor([True, False, True, True], device=device)
    forbidden, seeds = torch.tensor([7], device=device), torch.arange(4, device=device)
    torch.library.opcheck(
        op.default, (*operands(hidden, weight), active, forbidden, active.float(), seeds, seeds), **checks
    )
    compiled = torch.compile(lambda h: lm_head_confidence(h, weight, active=active), fullgraph=True)
    for found, expected in zip(compiled(hidden), lm_head_confidence(hidden, weight, active=active), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_cuda_graph(kind):
    device = torch.device("cuda")
    hidden, weight = case(300, 2064, 272, kind, device)
    active = torch.rand(300, device=device) < 0.5
    lm_head_confidence(hidden, weight, active=active)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lm_head_confidence(hidden, weight, active=active)
    active.copy_(~active)
    graph.replay()
    for a, b in zip(found, lm_head_confidence(hidden, weight, active=active), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize("rows", [32, 256])
def test_logits_are_never_in_memory(rows, kind):
    vocabulary = 126464
    hidden, weight = case(rows, vocabulary, 256, kind, torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lm_head_confidence(hidden, weight)
    used = torch.cuda.max_memory_allocated() - before
    assert used < rows * vocabulary * 4 / 10, f"{used} bytes beside {rows * vocabulary * 4} of logits"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize(("rows", "vocabulary", "size"), [(32, 126464, 4096), (128, 152064, 3584), (256, 152064, 3584)])
def test_model_sizes(rows, vocabulary, size, kind):
    device = torch.device("cuda")
    hidden, weight = case(rows, vocabulary, size, kind, device)
    check(lm_head_confidence(hidden, weight), *exact(logits_of(hidden, weight)), device)


@pytest.mark.gpu
def test_cuda_passes_over_ids_that_are_no_tokens():
    hidden, weight = case(5, 144, 48, "bfloat16", torch.device("cuda"))
    odd = torch.tensor([-1, 144, 150, 2**40, -(2**40)], device="cuda")
    for a, b in zip(lm_head_confidence(hidden, weight, forbidden=odd), lm_head_confidence(hidden, weight), strict=True):
        assert torch.equal(a, b)


def plain(**change):
    options = {"hidden": torch.zeros(4, 32).bfloat16(), "weight": torch.zeros(48, 32).bfloat16(), **change}
    return lm_head_confidence(options.pop("hidden"), options.pop("weight"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(32).bfloat16()}, r"hidden must have 2 dimensions, got shape \[32\]"),
        ({"hidden": torch.zeros(4, 32).half()}, "hidden must be bfloat16 or float32, got float16"),
        ({"hidden": torch.zeros(4, 32)}, "weight must have the dtype of hidden, float32, got bfloat16"),
        ({"hidden": torch.zeros(4, 40).bfloat16()}, "hidden and weight must have the same second dimension"),
        ({"weight": torch.zeros(50, 32).bfloat16()}, "weight must have a multiple of 8 rows"),
        ({"weight": torch.zeros(0, 32).bfloat16()}, r"weight must have from 1 to 4194304 rows, got shape \[0, 32\]"),
        ({"weight": torch.zeros(32, 48).bfloat16().t()}, "weight must have stride 1 in its last dimension"),
        ({"active": torch.ones(4)}, "active must be bool, got float32"),
        ({"active": torch.ones(5).bool()}, r"active must have shape \[4\], got \[5\]"),
        ({"forbidden": torch.zeros(1)}, "forbidden must be int64, got float32"),
        ({"forbidden": torch.arange(48)}, "forbidden must have fewer ids than the vocabulary, 48, got 48"),
        ({"forbidden": torch.tensor([48])}, "forbidden ids must be from 0 to 47, got 48"),
        ({"forbidden": torch.tensor([-1])}, "forbidden ids must be from 0 to 47, got -1"),
        ({"temperatures": torch.zeros(4)}, "temperatures, seeds and positions come together"),
        (
            {"temperatures": torch.zeros(4), "seeds": torch.arange(4), "positions": torch.arange(4).int()},
            "positions must be int64, got int32",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match="lm_head_confidence: " + message):
        plain(**change)


def test_errors_of_quantized_operands():
    hidden, weight = case(4, 48, 32, "fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="must both be tensors, or both be quantized"):
        lm_head_confidence(hidden, torch.zeros(48, 32).bfloat16())
    with pytest.raises(ValueError, match=r"groups of hidden and weight must be \(1, 128\) and \(128, 128\)"):
        lm_head_confidence(hidden, quantize(torch.zeros(48, 32), (1, 128)))
    with pytest.raises(RuntimeError, match="lm_head_confidence: hidden_scales and weight_scales come together"):
        op(hidden.codes, hidden.scales, weight.codes, None)
    with pytest.raises(RuntimeError, match="lm_head_confidence: weight_scales must have shape"):
        op(hidden.codes, hidden.scales, weight.codes, torch.zeros(2, 1))
