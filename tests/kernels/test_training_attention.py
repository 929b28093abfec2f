"""Native attention of packed rows beside float64 torch, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from adapterhub_lite.kernels import training
from adapterhub_lite.training.dropout import keep_mask

pytestmark = pytest.mark.skipif(not training.available(), reason="no native library here")


@pytest.fixture(autouse=True, params=[1, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, and so many that long spans are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """Rows as (queries, context keys, first context line or -1 for lines of their own before the row's keys)."""

    spans: tuple[tuple[int, int, int], ...]
    heads: int = 3
    kv_heads: int = 1
    dim: int = 32
    causal: bool = True
    window: int = 0
    p: float = 0.0
    gaps: int = 3  # numbers between neighbouring lines, and lines between neighbouring spans


def table(case: Case) -> tuple[torch.Tensor, int, int]:
    """Spans, query lines, key lines; queries lie in another order than keys."""
    found, key = [], case.gaps
    for queries, before, context in case.spans:
        own = key + (before if context < 0 else 0)
        found.append([0, queries, own, key if context < 0 else context, before])
        key = own + queries + case.gaps
    query = 0
    for span in reversed(found):
        span[0] = query
        query += span[1] + case.gaps
    return torch.tensor(found, dtype=torch.int64).view(-1, 5), query, key


def lines(count: int, width: int, gaps: int, parts: int = 1) -> list[torch.Tensor]:
    """Columns of wider lines."""
    wide = torch.randn(count, (width + gaps) * parts)
    return [wide[:, i * (width + gaps) : i * (width + gaps) + width] for i in range(parts)]


class Data:
    """Random tensors of a case, and what float64 torch makes of them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.spans, queries, keys = table(case)
        self.q, self.grad = lines(queries, case.heads * case.dim, case.gaps, 2)
        self.k, self.v = lines(keys, case.kv_heads * case.dim, case.gaps, 2)
        self.keys, self.tokens = torch.randint(2**62, (queries,)), torch.randint(900, (queries,))
        self.dropout = training.Dropout(self.keys, self.tokens, 7, case.p) if case.p else None
        self.rest = (case.heads, case.kv_heads, case.dim, 0.3, case.causal, case.window, self.dropout)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.q.shape[0]
        out, log_sum = torch.full((count, self.q.shape[1]), 7.0), torch.full((count, self.case.heads), 7.0)
        training.attend(self.q, self.k, self.v, out, log_sum, self.spans, *self.rest)
        return out, log_sum

    def backward(self, out: torch.Tensor, log_sum: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grads = [torch.full_like(x, 7.0) for x in (self.q, self.k, self.v)]
        training.attend_back(
            self.q, self.k, self.v, out, log_sum, self.grad, *grads, self.spans, *self.rest
        )  # fmt: skip
        return tuple(grads)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        case = self.case
        q, k, v = (x.double().requires_grad_() for x in (self.q, self.k, self.v))
        out = torch.full((q.shape[0], q.shape[1]), 7.0, dtype=torch.float64)
        log_sum = torch.full((q.shape[0], case.heads), 7.0, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for first, count, own, context, before in self.spans.tolist():
            seen = torch.cat([torch.arange(context, context + before), torch.arange(own, own + count)])
            group = case.heads // case.kv_heads
            queries = q[first : first + count].view(count, case.heads, -1)
            mine, values = (x[seen].view(len(seen), case.kv_heads, -1).repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", queries, mine) * 0.3
            distance = before + torch.arange(count)[:, None] - torch.arange(len(seen))
            if case.causal:
                scores = scores.masked_fill(distance < 0, -torch.inf)
            if case.window:
                scores = scores.masked_fill(distance >= case.window, -torch.inf)
            weights = scores.softmax(-1)
            if case.p:
                one = slice(first, first + count)
                kept = keep_mask(self.keys[one], self.tokens[one], 7, len(seen) * case.heads, case.p)
                weights = weights * kept.view(count, len(seen), case.heads).permute(2, 0, 1) / (1 - case.p)
            result = torch.einsum("hqk,khd->qhd", weights, values).reshape(count, -1)
            out[first : first + count] = result.detach()
            log_sum[first : first + count] = scores.detach().logsumexp(-1).t()
            total = total + (result * self.grad[first : first + count]).sum()
        total.backward()
        return out, log_sum, tuple(x.grad for x in (q, k, v) if x.grad is not None)


LONG = ((150, 0, 0), (1, 0, 0), (70, 0, 0))
CASES = {
    "one token": Case(((1, 0, 0),)),
    "lengths around a strip and a block": Case(
        tuple((n, 0, 0) for n in (2, 5, 6, 7, 15, 16, 17, 47, 48, 49, 64, 65, 97))
    ),
    "a long row": Case(((700, 0, 0),), heads=4, kv_heads=2, dim=64),
    "no groups": Case(LONG, heads=4, kv_heads=4, dim=64),
    "a group larger than a chunk": Case(((50, 0, 0), (3, 0, 0)), heads=19, kv_heads=1, dim=16),
    "two groups": Case(LONG, heads=20, kv_heads=2, dim=16),
    "all see all": Case(LONG, causal=False, dim=64),
    "wide heads": Case(((70, 0, 0), (5, 9, -1)), dim=256),
    "odd heads": Case(((70, 0, 0), (20, 30, -1)), dim=80),
    "prefixes of their own": Case(((5, 30, -1), (60, 16, -1), (1, 1, -1), (90, 65, -1))),
    "prefixes, all see all": Case(((5, 30, -1), (60, 16, -1)), causal=False),
    "a shared beginning": Case(((80, 0, 0), (9, 80, 3), (1, 80, 3), (100, 80, 3), (30, 17, 3), (7, 5, 70))),
    "a window": Case(((150, 0, 0), (5, 0, 0), (64, 0, 0)), window=7),
    "a window of one": Case(((70, 0, 0),), window=1),
    "a window beyond a block": Case(((300, 0, 0),), window=100, dim=16),
    "a window over a shared beginning": Case(((80, 0, 0), (90, 80, 3), (5, 80, 3)), window=20),
    "a window that is never full": Case(LONG, window=1000),
    "dropout": Case(LONG, p=0.3, heads=4, kv_heads=2),
    "dropout, all see all": Case(LONG, p=0.5, causal=False),
    "dropout over prefixes": Case(((5, 30, -1), (60, 16, -1)), p=0.1),
    "dense lines": Case(LONG, gaps=0),
    "nothing": Case(()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_and_its_gradients(case: Case) -> None:
    data = Data(case)
    out, log_sum = data.forward()
    grads = data.backward(out, log_sum)
    if not case.spans:
        assert all(bool((x == 7).all()) for x in grads)
        return
    expected, sums, slopes = data.expected()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sum.double(), sums, rtol=1e-5, atol=1e-5)
    used = torch.zeros(len(data.q), dtype=torch.bool)
    for first, count, *_ in data.spans.tolist():
        used[first : first + count] = True
    slopes = (torch.where(used[:, None], slopes[0], 7.0), slopes[1] + 7, slopes[2] + 7)
    for found, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(found.double(), slope, rtol=1e-5, atol=2e-5 * max(1.0, slope.abs().max().item() / 7))
    again, _ = data.forward()
    assert torch.equal(again, out)
    for one, other in zip(grads, data.backward(out, log_sum), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name", ["a long row", "a shared beginning", "dropout", "a window beyond a block", "two groups"]
)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    data = Data(CASES[name])
    results = []
    for count in (1, 2, 3, 16):
        torch.set_num_threads(count)
        out, log_sum = data.forward()
        results.append((out, log_sum, *data.backward(out, log_sum)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_a_row_is_the_same_beside_others() -> None:
    """Bit for bit: neither its place nor its neighbours change the order of a sum."""
    data = Data(CASES["dropout"])
    out, log_sum = data.forward()
    grads = data.backward(out, log_sum)
    alone = Data(CASES["dropout"])
    for name in ("q", "k", "v", "grad", "keys", "tokens"):
        setattr(alone, name, getattr(data, name))
    alone.dropout, alone.rest, alone.spans = data.dropout, data.rest, data.spans[2:]
    out_alone, log_sum_alone = alone.forward()
    grads_alone = alone.backward(out_alone, log_sum_alone)
    first, count, own = data.spans[2, :3].tolist()
    assert torch.equal(out_alone[first : first + count], out[first : first + count])
    assert torch.equal(grads_alone[0][first : first + count], grads[0][first : first + count])
    for one, two in zip(grads_alone[1:], grads[1:], strict=True):
        assert torch.equal(one[own : own + count], two[own : own + count])


def test_large_scores_and_what_is_no_number() -> None:
    data = Data(Case(((150, 0, 0), (20, 0, 0))))
    data.q.mul_(300)
    out, log_sum = data.forward()
    expected, sums, _ = data.expected()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_sum.double(), sums, rtol=1e-5, atol=1e-3)
    first, count, own = data.spans[0, :3].tolist()
    data.k[own + 70, 3] = float("nan")
    out, _ = data.forward()
    assert not out[first : first + 70].isnan().any()
    assert out[first + 70 : first + count].isnan().all()


SPOILT = {
    "a query too many": (0, 1, 1000),
    "a negative query": (0, 0, -1),
    "no queries": (0, 1, 0),
    "an own key too many": (0, 2, 10**6),
    "a context that is not there": (0, 4, 10**6),
    "a negative context": (0, 4, -1),
    "a query of two spans": (1, 0, None),
    "an own key of two spans": (1, 2, None),
    "a number that overflows": (0, 3, 2**63 - 1),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spans_that_lead_outside_are_refused(name: str) -> None:
    data = Data(CASES["prefixes of their own"])
    row, column, value = SPOILT[name]
    data.spans[row, column] = data.spans[0, column] if value is None else value
    with pytest.raises(ValueError, match="span lies outside"):
        data.forward()


def test_what_is_not_what_it_should_be_is_refused() -> None:
    data = Data(Case(LONG))
    for change in ({"heads": 4}, {"dim": 40}, {"kv_heads": 2}, {"causal": False, "window": 3}, {"window": -1}):
        other = Data(Case(LONG))
        case = replace(other.case, **change)  # type: ignore[arg-type]
        other.rest = (case.heads, case.kv_heads, case.dim, 0.3, case.causal, case.window, None)
        with pytest.raises(ValueError, match=r"should be|cannot share"):
            other.forward()
    for name, wrong in (("q", data.q.double()), ("k", data.k.t()), ("v", data.v[:-1]), ("spans", data.spans.int())):
        other = Data(Case(LONG))
        setattr(other, name, wrong)
        with pytest.raises(ValueError, match="should be"):
            other.forward()
