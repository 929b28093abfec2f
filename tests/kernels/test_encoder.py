"""The native layers of an encoder beside the same in float64: ragged texts, every kind of change, odd widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.kernels.changes import Change, Matrices, change_of
from adapterhub_lite.kernels.encoder import (
    Embedding,
    Encoder,
    LayerParts,
    Sizes,
    TallLinear,
    Texts,
    blocks,
    has_encoder,
    tall_linear,
)
from adapterhub_lite.kernels.forward import Batch

native = pytest.mark.skipif(not has_encoder(), reason="no native encoder on this machine")

HEADS, DIM = 3, 16
HIDDEN = HEADS * DIM
LENGTHS = [5, 1, 17, 40, 8, 3, 130, 16]
OWNERS = [0, 0, 1, 1, -1, 2, 2, 3]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Drawn:
    """Random weights of an encoder, and adapters of every kind."""

    def __init__(self, inner: int = 100, layers: int = 2, act: str = "gelu") -> None:
        self.generator = torch.Generator().manual_seed(inner + layers)
        self.hidden, self.heads, self.inner, self.act = HIDDEN, HEADS, inner, act
        shapes = [(self.hidden, self.hidden)] * 4 + [(inner, self.hidden), (self.hidden, inner)]
        self.weights = [[(self.draw(*s) * s[1] ** -0.5, self.draw(s[0])) for s in shapes] for _ in range(layers)]
        self.norms = [
            [(1 + self.draw(self.hidden) / 4, self.draw(self.hidden)) for _ in range(2)] for _ in range(layers)
        ]
        self.adapters = [self.adapter(kind) for kind in range(4)]
        self.table = (Change * (4 * layers * 4))(*(change_of(one) for adapter in self.adapters for one in adapter))

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def adapter(self, kind: int) -> list[Matrices | None]:
        """0: rank 16 everywhere; 1: ranks that fill no register; 2: gains, biases and scales; 3: some layers only."""
        h, i = self.hidden, self.inner
        found: list[Matrices | None] = []
        for n_in, outs, scaled in ((h, (h, h, h), False), (h, (h,), True), (h, (i,), False), (i, (h,), True)) * len(
            self.weights
        ):
            ranks = [(16, 16, 16), (3, 17, 33), (0, 0, 0), (0, 5, 0)][kind][: len(outs)]
            none = (None,) * len(outs)
            if kind == 3 and len(outs) == 1:
                found.append(None)
                continue
            ups = tuple(self.draw(r, o) * 0.1 if r else None for r, o in zip(ranks, outs, strict=True))
            vectors = tuple(self.draw(o) * 0.3 for o in outs) if kind == 2 else none
            biases = tuple(self.draw(o) for o in outs) if kind == 2 else none
            scale = 1 + self.draw(n_in) / 4 if kind == 2 and scaled else None
            found.append(Matrices(self.draw(n_in, sum(ranks)) * n_in**-0.5, ups, vectors, biases, scale))
        return found

    def native(self) -> Encoder:
        sizes = Sizes(self.hidden, self.heads, DIM, self.inner, 1e-5, DIM**-0.5, self.act)

        def linear(pair: tuple[torch.Tensor, torch.Tensor]) -> TallLinear:
            return tall_linear(*pair)

        layers = zip(self.weights, self.norms, strict=True)
        return Encoder(sizes, [LayerParts(*map(linear, weights), *norms) for weights, norms in layers])

    def batch(self) -> Batch:
        return Batch((), self.table, 66, True)

    def expected(self, x: torch.Tensor, owner: int) -> torch.Tensor:
        """One text [tokens, hidden] in float64."""
        x = x.double()
        for layer, (weights, norms) in enumerate(zip(self.weights, self.norms, strict=True)):
            changes = self.adapters[owner][4 * layer : 4 * layer + 4] if owner >= 0 else [None] * 4
            q, k, v = product(x, weights[:3], changes[0])
            heads = (t.view(len(x), self.heads, DIM).transpose(0, 1) for t in (q, k, v))
            seen = F.scaled_dot_product_attention(*heads).transpose(0, 1).reshape(len(x), -1)
            x = norm(x + product(seen, weights[3:4], changes[1])[0], norms[0])
            (up,) = product(x, weights[4:5], changes[2])
            up = F.gelu(up) if self.act == "gelu" else up.relu()
            x = norm(x + product(up, weights[5:], changes[3])[0], norms[1])
        return x


def norm(x: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], parts[0].double(), parts[1].double(), 1e-5)


def product(
    x: torch.Tensor, weights: Sequence[tuple[torch.Tensor, torch.Tensor]], change: Matrices | None
) -> list[torch.Tensor]:
    if change is None:
        return [F.linear(x, w.double(), b.double()) for w, b in weights]
    x = x if change.scale is None else x * change.scale.double()
    low, found, first = x @ change.down.double(), [], 0
    for (w, b), up, gain, bias in zip(weights, change.ups, change.gains, change.biases, strict=True):
        y = x @ w.double().t()
        y = y if gain is None else y + y * gain.double()
        y = y + b.double() + (0 if bias is None else bias.double())
        if up is not None:
            y = y + low[:, first : first + len(up)] @ up.double()
            first += len(up)
        found.append(y)
    return found


@dataclass(frozen=True)
class Run:
    """Some texts through both."""

    drawn: Drawn
    lengths: Sequence[int]
    owners: Sequence[int]

    def check(self, read: Sequence[tuple[int, int]], bound: float = 2e-5) -> torch.Tensor:
        xs = [self.drawn.draw(length, self.drawn.hidden) for length in self.lengths]
        found = self.drawn.native()(Texts(self.lengths, read, self.owners, torch.cat(xs)), self.drawn.batch())
        pairs = zip(xs, self.owners, read, strict=True)
        expected = torch.cat([self.drawn.expected(x, own)[at : at + n] for x, own, (at, n) in pairs])
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
        return found


@native
@pytest.mark.parametrize(
    ("inner", "layers", "act"), [(100, 2, "gelu"), (48, 1, "relu"), (500, 3, "gelu"), (7, 2, "relu")]
)
def test_it_is_the_encoder_in_float64(threads: int, inner: int, layers: int, act: str) -> None:
    run = Run(Drawn(inner, layers, act), LENGTHS, OWNERS)
    run.check([(0, 1)] * len(LENGTHS))
    run.check([(0, length) for length in LENGTHS])
    run.check([(length // 2, length - length // 2) for length in LENGTHS])


@native
def test_many_texts_and_one_alone(threads: int) -> None:
    drawn = Drawn()
    many = [1 + 7 * i % 50 for i in range(60)]
    Run(drawn, many, [i // 15 - 1 for i in range(60)]).check([(0, 1)] * 60)
    Run(drawn, [300], [1]).check([(0, 300)])
    Run(drawn, [1], [-1]).check([(0, 1)])


@native
def test_texts_of_which_nothing_is_read(threads: int) -> None:
    """Blocks of them: some beside texts that are read, and all there are."""
    drawn = Drawn()
    Run(drawn, [200, 5, 130, 40], [0, 1, 2, -1]).check([(0, 0), (0, 0), (0, 0), (3, 30)])
    Run(drawn, [60] * 12, [-1] * 12).check([(0, 0)] * 6 + [(0, 2)] * 6)
    assert Run(drawn, [7], [1]).check([(0, 0)]).shape == (0, HIDDEN)


@native
def test_gelu_is_that_of_erf() -> None:
    """Of values from -12 to 12, with nothing else beside it: no attention, both products a factor for each value."""
    drawn, eye = Drawn(HIDDEN, 1), torch.eye(HIDDEN)
    zero, none = torch.zeros(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    drawn.weights = [[*drawn.weights[0][:3], (none, zero), (4 * eye, zero), (eye, zero)]]
    drawn.norms = [[(torch.ones(HIDDEN), zero), (torch.ones(HIDDEN), zero)]]
    Run(drawn, [120] * 10, [-1] * 10).check([(0, 120)] * 10, 1e-6)


@native
def test_a_texts_bits_do_not_depend_on_its_neighbours(threads: int) -> None:
    drawn = Drawn(500, 3)
    encoder, batch = drawn.native(), drawn.batch()
    xs = [drawn.draw(length, drawn.hidden) for length in LENGTHS]
    read = [(0, 1 + length // 2) for length in LENGTHS]
    found = encoder(Texts(LENGTHS, read, OWNERS, torch.cat(xs)), batch).split([n for _, n in read])
    for i, x in enumerate(xs):
        alone = encoder(Texts([len(x)], [read[i]], [OWNERS[i]], x), batch)
        assert torch.equal(alone, found[i]), i
    order = list(range(len(xs)))[::-1] * 5  # and where threads take blocks of their own
    some = Texts([LENGTHS[i] for i in order], [read[i] for i in order], [OWNERS[i] for i in order],
                 torch.cat([xs[i] for i in order]))  # fmt: skip
    assert not blocks(some.lengths, threads)[1]
    for i, one in zip(order, encoder(some, batch).split([read[i][1] for i in order]), strict=True):
        assert torch.equal(one, found[i]), i


@native
def test_a_texts_poison_stays_with_it(threads: int) -> None:
    drawn = Drawn()
    xs = [drawn.draw(length, drawn.hidden) for length in LENGTHS]
    xs[3][7] = float("nan")
    read = [(0, 1)] * len(xs)
    found = drawn.native()(Texts(LENGTHS, read, OWNERS, torch.cat(xs)), drawn.batch())
    assert [bool(row.isfinite().all()) for row in found] == [i != 3 for i in range(len(xs))]


@native
@pytest.mark.parametrize("kinds", [True, False])
def test_it_embeds_words(kinds: bool) -> None:
    drawn = Drawn()
    plain = drawn.native()
    words, positions, kind = drawn.draw(30, HIDDEN), drawn.draw(50, HIDDEN), drawn.draw(HIDDEN) if kinds else None
    weights = 1 + drawn.draw(HIDDEN) / 4, drawn.draw(HIDDEN)
    encoder = Encoder(plain._sizes, plain._kept[0], Embedding(words, kind, positions, weights))
    ids, places = [i * 7 % 30 for i in range(sum(LENGTHS))], [i % 50 for i in range(sum(LENGTHS))]
    x = words[ids] + positions[places] if kind is None else words[ids] + kind + positions[places]
    x = F.layer_norm(x, (HIDDEN,), *weights, 1e-5)
    read = [(0, length) for length in LENGTHS]
    given = plain(Texts(LENGTHS, read, OWNERS, x), drawn.batch())
    found = encoder(Texts(LENGTHS, read, OWNERS, (ids, places)), drawn.batch())
    torch.testing.assert_close(found, given, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder(Texts(LENGTHS, read, OWNERS, x), drawn.batch()), given)


@pytest.mark.parametrize("threads_", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[1], [500], LENGTHS, [30] * 64, [1] * 1000, [400, 1, 1], [20] * 30 + [512]])
def test_blocks_are_all_texts_in_order(lengths: list[int], threads_: int) -> None:
    cuts, together = blocks(lengths, threads_)
    assert (cuts[0], cuts[-1]) == (0, len(lengths))
    assert all(first < end for first, end in pairwise(cuts))
    begin = [0, *accumulate(lengths)]
    most = 128 * (threads_ if together else 1)
    assert all(end - first == 1 or begin[end] - begin[first] <= most for first, end in pairwise(cuts))
    if not together and threads_ > 1:
        assert len(cuts) > 2 * threads_  # enough that all threads end together
