"""The numbers and formulas in the guides: what they state is what the reference gives."""

import math
from fractions import Fraction

import pytest
import torch

from harness import catalog
from harness.guide import file_of

pytestmark = pytest.mark.usefixtures("reference")


def states(number, *texts):
    """Whether the guide says this, white space aside."""
    guide = " ".join(file_of(catalog.find(number)).read_text(encoding="utf-8").split())
    missing = [text for text in texts if " ".join(text.split()) not in guide]
    assert not missing, f"guide {number} no longer says {missing}: correct this test with it"


def test_01_bags():
    from recsys.models.embedding import EmbeddingTable

    states("01", "values 4 1 4 | | 6 0", "offsets 0 3 3", "(e4+e1+e4)/3, zeros, e6/1")
    table = EmbeddingTable(8, 4, padding_idx=0).double()
    values, offsets = torch.tensor([4, 1, 4, 6, 0]), torch.tensor([0, 3, 3])
    e = table.weight.detach()
    none = torch.zeros(4, dtype=e.dtype)
    total = torch.stack([e[4] + e[1] + e[4], none, e[6]])
    mean = torch.stack([(e[4] + e[1] + e[4]) / 3, none, e[6] / 1])
    torch.testing.assert_close(table.bag(values, offsets, mode="sum"), total)
    torch.testing.assert_close(table.bag(values, offsets, mode="mean"), mean)


def test_01_the_gradient_of_a_weighted_mean():
    from recsys.models.embedding import EmbeddingTable

    states("01", "`d mean / d w_i = (e_i - mean) / sum_i w_i`")
    table = EmbeddingTable(8, 4).double()
    weights = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([5, 1, 3])
    mean = table.bag(ids, torch.tensor([0]), weights=weights, mode="mean")[0]
    slopes = [torch.autograd.grad(x, weights, retain_graph=True)[0] for x in mean]
    expected = (table.weight[ids] - mean) / weights.sum()
    torch.testing.assert_close(torch.stack(slopes, 1), expected.detach(), check_dtype=False)


def test_03_log_q_by_hand():
    from recsys.training.losses import in_batch_softmax_loss

    states("03", "q = 0.5, 0.3, 0.2 give odds of 2, 3.33 and 5", "1.1665", "log 3 = 1.0986")
    zeros, q = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2]).double()
    assert [round(1 / x, 2) for x in q.tolist()] == [2, 3.33, 5]
    plain = in_batch_softmax_loss(zeros, zeros, temperature=0.1)
    corrected = in_batch_softmax_loss(zeros, zeros, temperature=0.1, log_q=q.log())
    assert (f"{plain:.4f}", f"{corrected:.4f}") == ("1.0986", "1.1665")


def test_03_who_leaves_the_race():
    """The table of ids 7 3 7 5: a dot is a pair whose score the loss does not see."""
    from recsys.training.losses import in_batch_softmax_loss

    rows = ["+ - . -", "- + - -", ". - + -", "- - - +"]
    states("03", *(f"user {row} {line}" for row, line in enumerate(rows)))
    eye = torch.eye(4, dtype=torch.float64, requires_grad=True)  # user i, so scores are item's
    item = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    loss = in_batch_softmax_loss(
        eye, item, temperature=1.0, item_ids=torch.tensor([7, 3, 7, 5])
    )
    (slope,) = torch.autograd.grad(loss, item)  # of item j at coordinate i: of score i, j
    seen = slope.T * 4
    drawn = [" ".join("." if x == 0 else "+" if x < 0 else "-" for x in row) for row in seen]
    assert drawn == rows
    kept = torch.where(seen == 0, -torch.inf, item.T)  # p - onehot, the gradient of the guide
    torch.testing.assert_close(seen, kept.softmax(1).detach() - torch.eye(4).double())


def test_04_one_coordinate():
    from recsys.models.cross import CrossLayer

    states("04", "state 2 -> 2 * 2 + 2 = 6 -> 2 * 6 + 6 = 18", "x x^2 + x x^3 + 2 x^2 + x")
    layer = CrossLayer(1)
    layer.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    x0 = torch.tensor([[2.0], [3.0]])
    first = layer(x0, x0)
    second = layer(x0, first)
    assert first.flatten().tolist() == [6, 3**2 + 3]
    assert second.flatten().tolist() == [18, 3**3 + 2 * 3**2 + 3]


def test_05_the_schedule():
    from recsys.training.loop import warmup_cosine

    factors = [warmup_cosine(step, warmup_steps=3, total_steps=8) for step in range(9)]
    shown = [f"{x:.3f}".lstrip("0") for x in factors]
    said = [".25", ".50", ".75", "1", ".905", ".655", ".345", ".095", "0"]
    states("05", " ".join(["factor", *said]), "`round(0.35 * 8) = 3` of them warm up")
    assert [float(x) for x in said] == [float(x) for x in shown]
    assert round(0.35 * 8) == 3 and 4 * math.ceil((11 // 2) / 3) == 8


def test_06_discounts_and_memory():
    states("06", "its discount is 1 at the first place, .63 at the second, .29 at the tenth")
    states("06", "6,040 users x 3,706 items are 90 MB, a million users x 100,000 items are 400 GB")
    assert [round(1 / math.log2(r + 1), 2) for r in (1, 2, 10)] == [1, 0.63, 0.29]
    assert round(6_040 * 3_706 * 4 / 1e6) == 90 and 1_000_000 * 100_000 * 4 / 1e9 == 400


def test_07_when_it_pays():
    from recsys.inference.compiled import pays_off

    states("07", "pays off if compile + calls * compiled < calls * eager")
    for compiled, calls in [(1, 39), (1, 40), (1, 41), (2, 10**9)]:
        pays = Fraction(40) + calls * compiled < calls * 2
        assert pays_off(2.0, float(compiled), 40.0, calls) is pays


def test_08_the_mean_and_the_projection():
    from recsys.models.text import TextProjection, pool

    states("08", "`sum_t m[t] h[t] / max(sum_t m[t], 1)`")
    states("08", "`sum_i w[i] |(y[i] - mean(y)) - (x[i] - mean(x)) A|^2 + ridge |A|^2`")
    hidden, mask = torch.randn(2, 3, 4).double(), torch.tensor([[1, 1, 0], [0, 0, 0]])
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(pool(hidden, mask, "mean").double(), mean, rtol=1e-5, atol=1e-6)
    x, y, w = torch.randn(9, 4).double(), torch.randn(9, 3).double(), torch.rand(9).double()
    fitted = TextProjection.fit(x, y, ridge=0.5, sample_weight=w)
    centre = [(each - (w[:, None] * each).sum(0) / w.sum()) for each in (x, y)]
    a = torch.linalg.solve(
        centre[0].T @ (w[:, None] * centre[0]) + 0.5 * torch.eye(4).double(),
        centre[0].T @ (w[:, None] * centre[1]),
    )
    expected = centre[0] @ a + (w[:, None] * y).sum(0) / w.sum()
    torch.testing.assert_close(fitted(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_09_candidates():
    states("09", "wanted = max(num_candidates, k)")
    states("09", "a sixteenth of the cells")
    from recsys.inference.serving import build_index

    vectors = torch.nn.functional.normalize(torch.randn(20_000, 4), dim=1).numpy()
    index = build_index(vectors, kind="ivf")
    assert index.nprobe == index.nlist // 16
