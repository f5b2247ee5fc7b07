"""`kata bench --ratings`: nothing known of the future, features and figures as defined."""

import argparse
import dataclasses
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.bench import ratings
from harness.errors import UsageError
from recsys.data.features import content_vectors
from recsys.data.ratings import DECAYS, PROTOCOLS, rating_table, shrunk_means
from recsys.data.splits import global_time
from recsys.data.synthetic import generate

BLOCKS = 4
NOISE, CONTENT_NOISE = 0.25, 1.0


@pytest.fixture(scope="module")
def dataset():
    """A few users, whose ratings come by pages: rows that share a second."""
    full = generate(seed=2, users=14, items=20)
    return dataclasses.replace(full, time=full.time // 20_000 * 20_000)


@pytest.fixture(scope="module", params=PROTOCOLS)
def table(request, dataset):
    content = content_vectors(dataset, None)
    made = rating_table(dataset, protocol=request.param, blocks=BLOCKS, content=content, factors=4)
    return request.param, made


def known_of(dataset, protocol, table, place):
    """Places of the rows that the row at ``place`` knows, straight from the protocol's words."""
    time = dataset.time[table.rows]
    first = np.flatnonzero(table.block == table.block[place])[0]
    moment = time[place] if protocol == "online" else time[first]
    return np.flatnonzero(time < moment)


def test_rows_share_seconds(dataset):
    """Otherwise the tests below would not see rows of one second know each other."""
    assert len(np.unique(dataset.time)) < 0.7 * len(dataset.time)


def test_no_row_of_the_present_or_future_is_used(dataset, table):
    protocol, made = table
    time = dataset.time[made.rows]
    content = content_vectors(dataset, None)
    starts = np.flatnonzero(np.diff(made.block)) + 1
    for cut in [*np.quantile(time, [0.3, 0.85]).astype(int), *time[starts[1:]]]:
        rating = np.where(dataset.time >= cut, 6 - dataset.rating, dataset.rating)
        other = rating_table(
            dataclasses.replace(dataset, rating=rating.astype(np.float32)),
            protocol=protocol, blocks=BLOCKS, content=content, factors=4,
        )  # fmt: skip
        same = time <= cut if cut in time else time < cut
        np.testing.assert_array_equal(made.features[same], other.features[same])
        changed = (made.features != other.features).any(1)
        first = time[made.block == made.block[-1]][0]
        assert changed[time > first].any() == (protocol == "online" or cut < first)


def test_frozen_is_one_state_a_block(dataset):
    """What is known of a user is the same for all of their rows in a block."""
    made = rating_table(dataset, protocol="frozen", blocks=BLOCKS, factors=4)
    live = rating_table(dataset, protocol="online", blocks=BLOCKS, factors=4)
    last = made.block == made.block[-1]
    for user in np.unique(made.user[last]):
        rows = last & (made.user == user)
        assert len(np.unique(made.column("user_like")[rows])) == 1
        assert len(np.unique(made.column("user_count")[rows])) == 1
    assert any(
        len(np.unique(live.column("user_like")[last & (live.user == user)])) > 1
        for user in np.unique(live.user[last])
    )


def brute_force(dataset, protocol, table):
    """Every feature of every row by loops over what it knows: (n,) each, by name."""
    n = len(table.rows)
    user, item, time = (x[table.rows] for x in (dataset.user, dataset.item, dataset.time))
    values = {"like": table.like, "stars": dataset.rating[table.rows].astype(float)}
    start = {"like": 0.5, "stars": 3.5}
    content = content_vectors(dataset, None)

    def mean(places, value, base, weight):
        return (sum(value[p] for p in places) + weight * base) / (len(places) + weight)

    surprise, leaning, left = ({k: np.zeros(n) for k in values} for _ in range(3))
    for name, value in values.items():
        for p in range(n):
            before = [q for q in range(n) if time[q] < time[p]]
            level = mean(before, value, start[name], 5)
            own = mean([q for q in before if item[q] == item[p]], value, level, 5)
            surprise[name][p] = value[p] - own
            mine = [q for q in before if user[q] == user[p]]
            leaning[name][p] = mean(mine, surprise[name], 0, 5)
            left[name][p] = surprise[name][p] - leaning[name][p]
    out = {name: np.zeros(n) for name in table.names}
    for p in range(n):
        known = known_of(dataset, protocol, table, p)
        of_item = [q for q in known if item[q] == item[p]]
        mine = [q for q in known if user[q] == user[p]]
        first = np.flatnonzero(table.block == table.block[p])[0]
        out["user_count"][p], out["item_count"][p] = np.log1p(len(mine)), np.log1p(len(of_item))
        out["user_new"][p] = not mine
        year = dataset.years[item[p]]
        out["year"][p] = (year - 1990) / 10 if year else 0
        for name, value in values.items():
            level = mean(known, value, start[name], 5)
            out[f"level_{name}"][p] = level - start[name]
            out[f"item_{name}"][p] = mean(of_item, value, level, 5) - start[name]
            out[f"item_fair_{name}"][p] = (
                mean(of_item, value - leaning[name], level, 5) - start[name]
            )
            out[f"user_{name}"][p] = mean(mine, surprise[name], 0, 5)
            out[f"user_plain_{name}"][p] = mean(mine, value, level, 5) - start[name]
            out[f"means_{name}"][p] = out[f"item_{name}"][p] + out[f"user_{name}"][p]
            for group, code in dataset.user_features.items():
                alike = [q for q in known if code[user[q]] == code[user[p]]]
                out[f"{group}_{name}"][p] = mean(alike, surprise[name], 0, 50)
                alike = [q for q in alike if item[q] == item[p]]
                out[f"{group}_item_{name}"][p] = mean(alike, left[name], 0, 5)
            # what goes together, from the rows before the block
            items, covariance = dataset.num_items, {}
            who = [{user[q]: q for q in range(first) if item[q] == i} for i in range(items)]
            both = np.array([[len(a.keys() & b.keys()) for b in who] for a in who])
            covariance = np.array([
                [sum(left[name][a[u]] * left[name][b[u]] for u in a.keys() & b.keys()) for b in who]
                for a in who
            ]) / (both + 10)  # fmt: skip
            if not mine:
                continue
            mean_own = sum(surprise[name][q] for q in mine) / (len(mine) + 5)
            own = np.array([surprise[name][q] - mean_own for q in mine])
            old = item[mine]
            spread = np.sqrt(np.diag(covariance)).clip(1e-3)
            like = np.maximum(covariance / np.outer(spread, spread), 0) * (1 - np.eye(items))
            norm = np.sqrt(np.diag(both)).clip(1)
            overlap = both / np.outer(norm, norm) * (1 - np.eye(items))
            weight = like[old, item[p]]
            out[f"neighbours_{name}"][p] = weight @ own / (weight.sum() + 0.5)
            out[f"overlap_{name}"][p] = overlap[old, item[p]] @ own
            size, vector = np.linalg.eigh(covariance)
            basis = vector[:, -4:] * np.sqrt(size[-4:].clip(0))
            scale = np.mean(left[name][:first] ** 2) if first else 1.0
            ridge = NOISE * scale / 0.2 * np.eye(4)
            said = np.linalg.solve(basis[old].T @ basis[old] + ridge, basis[old].T @ own)
            out[f"factors_{name}"][p] = basis[item[p]] @ said
            if name == "like":
                out["neighbours_weight"][p] = np.log1p(weight.sum())
                out["overlap"][p] = overlap[old, item[p]].sum()
                ridge = CONTENT_NOISE * np.eye(content.shape[1])
                x = content[old]
                out["content_like"][p] = content[item[p]] @ np.linalg.solve(
                    x.T @ x + ridge, x.T @ own
                )
        if mine:  # they stand in the order of time, rows of one second as in the file
            out["last_like"][p] = surprise["like"][mine[-1]]
            out["gap"][p] = np.log1p(time[p] - time[mine[-1]])
            for decay in DECAYS:
                weight = decay ** np.arange(len(mine))[::-1]
                out[f"recent_{decay}"][p] = weight @ surprise["like"][mine] / (weight.sum() + 1)
    return out


def test_features_equal_a_loop(dataset, table):
    protocol, made = table
    expected = brute_force(dataset, protocol, made)
    assert set(expected) == set(made.names)
    for name in made.names:
        np.testing.assert_allclose(
            made.column(name), expected[name], rtol=2e-3, atol=2e-4, err_msg=name
        )


def test_shrunk_means_equal_a_loop(dataset, table):
    protocol, made = table
    guess = shrunk_means(dataset, protocol=protocol, blocks=BLOCKS, item_prior=3, user_prior=7)
    time = dataset.time[made.rows]

    def item_mean(known, item):
        level = (made.like[known].sum() + 0.5) / (len(known) + 1)
        rows = known[made.item[known] == item]
        return (made.like[rows].sum() + 3 * level) / (len(rows) + 3)

    for p in range(0, len(time), 7):
        known = known_of(dataset, protocol, made, p)
        mine = known[made.user[known] == made.user[p]]
        beyond = sum(
            made.like[q] - item_mean(np.flatnonzero(time < time[q]), made.item[q]) for q in mine
        )
        value = item_mean(known, made.item[p]) + beyond / (len(mine) + 7)
        assert guess[p] == pytest.approx(np.clip(value, 0.02, 0.98), abs=1e-9)


def test_an_unknown_protocol_is_refused(dataset):
    with pytest.raises(ValueError, match="frozen, online"):
        rating_table(dataset, protocol="live", blocks=3)


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guesses():
    rng = np.random.default_rng(0)
    p = rng.random(300).round(2)  # some are tied
    return p, (rng.random(300) < p).astype(float)


def test_auc_is_scikit_learns(guesses):
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = guesses
    assert ratings.auc(p, y) == pytest.approx(sklearn.roc_auc_score(y, p), abs=1e-12)
    assert ratings.log_losses(p, y).mean() == pytest.approx(
        sklearn.log_loss(y, p.clip(1e-7, 1 - 1e-7)), abs=1e-9
    )


def test_auc_is_the_katas(guesses, reference):
    p, y = guesses
    metrics = import_module("recsys.evaluation.metrics")
    theirs = metrics.auc(torch.from_numpy(p), torch.from_numpy(y))
    assert ratings.auc(p, y) == pytest.approx(theirs, abs=1e-9)


def test_resampled_auc_is_that_of_repeated_rows(guesses):
    p, y = guesses
    weight = ratings.resamples(np.arange(300) // 5, rounds=4)
    assert (weight.reshape(4, 60, 5) == weight.reshape(4, 60, 5)[:, :, :1]).all()  # whole users
    assert (weight.sum(1) == 300).all()
    for row, value in zip(weight, ratings.auc(p, y, weight), strict=True):
        again = np.repeat(np.arange(300), row)
        assert value == pytest.approx(ratings.auc(p[again], y[again]), abs=1e-12)


def test_calibration_error_is_its_formula(guesses):
    p, y = guesses
    total = 0.0
    for low in range(10):
        inside = [(a, b) for a, b in zip(p, y, strict=True) if min(int(a * 10), 9) == low]
        total += abs(sum(a - b for a, b in inside))
    assert ratings.calibration_error(p, y) == pytest.approx(total / 300, abs=1e-12)
    assert ratings.calibration_error(y, y) == 0


# --- the benchmark --------------------------------------------------------------------------------


QUICK = [
    "text.encoder=none", "grid.epochs=[1, 2]", "grid.lr=[0.003]", "grid.weight_decay=[0.01]",
    "grid.dropout=[0.1]", "features.factors=4", "blocks={frozen: 10, online: 10}",
]  # fmt: skip


def test_the_split_is_by_time_and_the_test_is_not_fitted(reference):
    dataset = generate(seed=2, users=40, items=30)
    config = ratings.run.load_config(ratings.CONFIG, ratings.CONFIG, QUICK)[1]
    split = global_time(dataset, **config["split"])
    content = content_vectors(dataset, None)
    bench = ratings.Trial(dataset, split, config, "frozen", text=None, content=content)
    time = dataset.time[bench.table.rows]
    assert time[bench.train].max() < time[bench.validation].min()
    assert time[bench.validation].max() < time[bench.test].min()
    assert bench.train.min() >= 0.1 * len(time)  # the oldest rows know next to nothing
    # flipped test labels change no guess, flipped training labels do
    method = next(m for m in ratings.METHODS if m.name == ratings.OURS)
    settings = {"epochs": 1, "lr": 0.003, "weight_decay": 0.01, "dropout": 0.1}

    def guess(flipped):
        bench.table.like[flipped] = 1 - bench.table.like[flipped]
        made = bench.final(method, settings, 1)
        bench.table.like[flipped] = 1 - bench.table.like[flipped]
        return made

    plain = guess([])
    np.testing.assert_array_equal(plain, guess(bench.test))
    assert (plain != guess(bench.validation)).any()
    with pytest.raises(UsageError, match="7 blocks"):
        config["blocks"] = {"frozen": 7}
        ratings.Trial(dataset, split, config, "frozen", text=None, content=content)


def tiny_folder(folder):
    """A data set as files."""
    folder.mkdir(parents=True)
    d = generate(seed=2, users=40, items=30)
    rows = [f"{u + 1},{i + 1},{r},{t}" for u, i, r, t in
            zip(d.user, d.item, d.rating, d.time, strict=True)]  # fmt: skip
    movies = [f"{i + 1},Film {i} ({1980 + i}),Drama" for i in range(d.num_items)]
    for name, head, lines in (
        ("ratings", "userId,movieId,rating,timestamp", rows),
        ("movies", "movieId,title,genres", movies),
    ):
        (folder / f"{name}.csv").write_text("\n".join([head, *lines, ""]))
    return folder


def test_the_command_writes_its_record(reference, tmp_path, monkeypatch, capsys):
    kept = [m for m in ratings.METHODS if m.name in ("linear", ratings.OURS)]
    absent = dataclasses.replace(kept[0], name="absent", package="no-such-package")
    monkeypatch.setattr(ratings, "METHODS", (*kept, absent))
    monkeypatch.setattr(ratings, "ROUNDS", 50)
    data, out = tiny_folder(tmp_path / "some" / "tiny"), tmp_path / "new" / "record.md"
    args = argparse.Namespace(
        impl=["reference"], data=str(data), config=None, set=QUICK, seeds=2, out=str(out)
    )
    assert ratings.main(args) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    for word in ("## tiny, frozen", "## tiny, online", "| linear |", "| DCN |",
                 "shrunk means", "2 seeds", "Not installed, so not measured: no-such-package",
                 "![reliability](record.png)"):  # fmt: skip
        assert word in text
    assert str(Path.cwd()) not in text and "some/" not in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
