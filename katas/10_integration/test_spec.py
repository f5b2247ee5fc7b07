"""Kata 10, the whole recommender: what `pipeline.py` must do, in the small."""

import contextlib
import dataclasses
import functools
import inspect
import sys
import tempfile
import types
from unittest.mock import patch

import numpy as np
import torch

from harness import encoders, evaluator
from harness.spec import (
    assert_close,
    assert_equal,
    assert_scalar,
    beside,
    check,
    device,
    learner,
    rung,
)

pipeline = learner("pipeline")
losses = learner("training.losses")
synthetic = learner("data.synthetic")
splits = learner("data.splits")
candidates = learner("data.candidates")
features = learner("data.features")
sequences = learner("models.sequence")
ranking_losses = learner("models.ranking")
compiled = learner("inference.compiled")
stand_ins = beside(__file__, "stand_ins")
pairs, next_item, replaced = stand_ins.pairs, stand_ins.next_item, stand_ins.replaced

FIT = {"epochs": 3, "batch_size": 256, "lr": 0.01, "warmup": 0.1, "max_grad_norm": 1.0}
CONFIG = {
    "text": {"encoder": None},
    "retrieval": {
        "dim": 24,
        "hidden_dims": [20],
        "dropout": 0.1,
        "max_history": 7,
        "temperature": 0.1,
        "loss": "in_batch",
        "log_q": True,
        "mask_accidental_hits": True,
        "user_features": ["history", "age", "user_id"],
        "user_buckets": 30,
        "item_features": ["item_id", "genres"],
        "select_epochs": False,
        "list_length": 25,
        "chunk_size": 64,
        "fit": FIT,
    },
    "ranking": {
        "targets_per_user": 4,
        "candidates": 25,
        "text_dim": 5,
        "loss": "listwise",
        "embedding_dim": 6,
        "num_cross_layers": 1,
        "rank": None,
        "hidden_dims": [12],
        "dropout": 0.0,
        "structure": "parallel",
        "features": {"l2": 20.0, "decay": 0.8, "max_history": 9, "half_life_days": 14.0},
        "fit": {**FIT, "batch_size": 32},
    },
    "cold_start": {
        "fraction": 0.25,
        "item_features": ["text", "genres"],
        "max_history": 9,
        "epochs": 2,
        "factors": 5,
        "ridge": 1.0,
        "weights": {"text": 1.0, "tower": 0.5, "projection": 0.5, "regression": 0.5},
    },
    "index": {"kind": "flat"},
    "compile": {"measure": False},
}


@functools.cache
def world():
    """A small data set and its split."""
    dataset = synthetic.generate(seed=3, users=90, items=130)
    return dataset, splits.leave_last_one_out(dataset)


def silent(stage, tag, value, step):
    """A log that nobody reads."""


def whole(dataset, split, config=CONFIG):
    """One run of the whole pipeline."""
    return pipeline.run(dataset, split, config, seed=1, device=device(), log=silent)


def outcome():
    """The run that several rungs look at."""
    return watched_run()[0]


def known_rows():
    """All rows before the test, by user and time."""
    dataset, split = world()
    rows = np.concatenate([split.train, split.validation])
    return rows[np.argsort(dataset.user[rows], kind="stable")]


def retrieval_data(rows):
    """The columns of retrieval for some rows."""
    return pipeline.RetrievalData(world()[0], rows, CONFIG["retrieval"], device())


def vectors(count, width, seed=0):
    """Random vectors of length one, in float32."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1).to(device())


ATTENTION = CONFIG["retrieval"] | stand_ins.ATTENTION


class Rows(torch.nn.Module):
    """A vector for each item, for a tower; the state of a place is its item's."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(rows)

    def forward(self, batch):
        return self.rows[batch["item_id"] if "item_id" in batch else batch["history"][:, 0]]

    def states(self, history):
        return self.rows[history]


class Places(torch.nn.Module):
    """In place of an attention model: two tables, and how it was asked for."""

    def __init__(self, given):
        super().__init__()
        self.given, count, width = given, given["num_rows"], given["dim"]
        self.user_tower, self.item_tower = (Rows(vectors(count, width, seed)) for seed in (1, 2))
        self.log_temperature = torch.nn.Parameter(torch.tensor(given["temperature"]).log())

    @property
    def temperature(self):
        return self.log_temperature.exp()


@contextlib.contextmanager
def attention():
    """Kata 11 is there, in small."""
    asked = inspect.signature(sequences.SequenceModel)

    def model(*args, **options):
        return Places(asked.bind(*args, **options).arguments)

    with replaced(sequences, training_pairs=pairs, next_item_loss=next_item, SequenceModel=model):
        yield


@rung(hint="Which rows may a count know? Only those that were handed over.")
def test_statistics_know_only_the_rows_they_are_given():
    """The sampling probabilities are the smoothed shares of the given rows, of no others."""
    dataset, split = world()
    data = retrieval_data(split.train)
    counts = np.bincount(dataset.item[split.train], minlength=dataset.num_items) + 1.0
    assert_close(data.log_q, torch.tensor(np.log(counts / counts.sum())), dtype=torch.float32)


@rung(hint="The history of an example is what lay before its target; the target is not in it.")
def test_an_example_is_the_user_before_the_target():
    """Every example has a target and, most recent first, the items its user had before it."""
    dataset, split = world()
    data = retrieval_data(split.train)
    index = torch.arange(len(data.positions), device=device())
    batch = data.example_batch(index)
    history, target = batch["history"].cpu().numpy(), batch["target"].cpu().numpy()
    user, item = dataset.user[split.train], dataset.item[split.train]
    first = np.searchsorted(user, user)
    places = [p for p in range(len(user)) if p > first[p]]
    assert_equal(len(target), len(places), what="number of examples")
    order = np.lexsort((data.positions.cpu().numpy(),))
    for row, place in list(zip(order, places, strict=True))[::37]:
        before = item[first[place] : place][::-1][:7] + 1
        assert_equal(int(target[row]), int(item[place]), what=f"target of example {row}")
        padded = [*before.tolist(), *[0] * (7 - len(before))]
        assert_equal(history[row].tolist(), padded, what=f"history of example {row}")


@rung(hint="`requests_after_all`, then `user_batch`: what is known of a user at that moment?")
def test_a_request_is_the_user_as_they_are_now():
    """After all rows: at the time of the last one, with the most recent items as the history."""
    dataset, split = world()
    data = retrieval_data(split.train)
    asked = pipeline.requests_after_all(dataset, data)
    assert_equal(asked.user.tolist(), list(range(dataset.num_users)), what="users")
    last = [dataset.time[split.train][dataset.user[split.train] == u].max() for u in range(90)]
    assert_close(asked.time.cpu(), torch.tensor(np.array(last)), what="time of each request")
    longer = asked.history(asked.user, 12)
    batch = data.user_batch(asked.user, longer)
    assert_close(batch["history"], longer[:, :7], what="history, cut at max_history=7")
    for name in ("age", "user_id"):
        assert_close(batch[name], data.users[name], what=f"column {name}")


@rung(hint="The configuration names the features of each tower, the text among them.")
def test_the_towers_read_the_features_that_are_configured():
    """Another value of any configured feature is another vector; others are not asked for."""
    dataset, split = world()
    options = CONFIG["retrieval"] | {"item_features": ["item_id", "genres", "text"]}
    text = vectors(dataset.num_items, 4)
    data = pipeline.RetrievalData(dataset, split.train, options, device(), text)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, options).to(device()).eval()
    asked = pipeline.requests_after_all(dataset, data)
    users = data.user_batch(asked.user, asked.history(asked.user, 7))
    items = data.item_batch(torch.arange(dataset.num_items, device=device()))
    sides = (("user", model.user_tower, users), ("item", model.item_tower, items))
    for side, tower, batch in sides:
        call, given = f"model.{side}_tower(data.{side}_batch(...))", options[f"{side}_features"]
        for name in given:
            check(name in batch, f"a column {name}", came_back=sorted(batch), call=call)
        for name in batch:
            with torch.no_grad():
                moved = (tower(batch | {name: batch[name].roll(1, 0)}) - tower(batch)).abs().max()
            if name in given:
                wanted = f"another {side} vector with another {name}"
                check(moved > 1e-4, wanted, came_back=f"{moved:.2g} apart", call=call)
            else:
                wanted = f"the same {side} vector with another {name}: only {given} are configured"
                check(moved < 1e-6, wanted, came_back=f"{moved:.2g} apart", call=call)


@rung(hint="An optimizer changes whatever requires a gradient.")
def test_the_temperature_is_learned_or_left_alone():
    """With learn_temperature=False training leaves the temperature, and only it, as it was."""
    data = retrieval_data(world()[1].train)
    for learned in (True, False):
        options = CONFIG["retrieval"] | {"learn_temperature": learned}
        start = pipeline.build_retrieval(data, options).temperature.item()
        assert_scalar(start, 0.1, rtol=1e-4, what="temperature before training")
        model, _ = pipeline.train_retrieval(data, options, seed=1, device=device(), epochs=1)
        end = model.temperature.item()
        what = f"temperature after training with learn_temperature={learned}"
        if learned:
            check(abs(end - start) > 1e-4, "another one than 0.1", came_back=end, what=what)
        else:
            assert_scalar(end, start, rtol=1e-6, what=what)
            towers = [*model.user_tower.parameters(), *model.item_tower.parameters()]
            check(all(p.requires_grad for p in towers), "towers that are trained",
                  came_back="parameters of towers that do not require a gradient")


@rung(hint="Which items are negatives of a row, and how likely was each to become one?")
def test_the_loss_knows_how_likely_an_item_was():
    """log Q of the rows, and the same item masked, where the configuration asks for it."""
    _, split = world()
    data = retrieval_data(split.train)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, CONFIG["retrieval"]).to(device()).eval()
    batch = data.example_batch(torch.arange(0, 400, 3, device=device()))
    target = batch["target"]
    with torch.no_grad():
        user, item = model(batch, data.item_batch(target))
        for log_q, mask in ((True, True), (True, False), (False, True)):
            config = CONFIG["retrieval"] | {"log_q": log_q, "mask_accidental_hits": mask}
            found = pipeline.retrieval_loss(data, config)(model, batch)
            wanted = losses.in_batch_softmax_loss(
                user,
                item,
                temperature=model.temperature,
                item_ids=target if mask else None,
                log_q=data.log_q[target] if log_q else None,
            )
            what = f"loss with log_q={log_q}, mask_accidental_hits={mask}"
            assert_scalar(found, float(wanted), rtol=1e-4, what=what)


@rung(hint="`loss: full` has no negatives to draw: which items does it compare with?")
def test_the_full_loss_compares_with_the_whole_catalogue():
    """With loss="full" the target is compared with all items, at the model's temperature."""
    data = retrieval_data(world()[1].train)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, CONFIG["retrieval"]).to(device()).eval()
    batch = data.example_batch(torch.arange(0, 400, 3, device=device()))
    with torch.no_grad():
        found = pipeline.retrieval_loss(data, CONFIG["retrieval"] | {"loss": "full"})(model, batch)
        user, items = model(batch, data.items)
        scores = (user @ items.T / model.temperature).double()
        wanted = torch.nn.functional.cross_entropy(scores, batch["target"])
    call = "retrieval_loss(data, config | {'loss': 'full'})(model, batch)"
    assert_scalar(found, float(wanted), rtol=1e-4, call=call, what="loss")


@rung(hint="An id row that no example ever trained is noise: give such an item row 0.")
def test_an_item_without_rows_has_no_id():
    """An item that the rows do not hold is described by its content, its id is padding."""
    dataset, split = world()
    rows = split.train[dataset.item[split.train] != 5]
    ids = retrieval_data(rows).items["item_id"]
    assert_equal(int(ids[5]), 0, what="id column of an item without rows")
    trained = np.unique(dataset.item[rows])[:3]
    assert_equal(ids[torch.tensor(trained)].tolist(), (trained + 1).tolist(), what="other ids")


@rung(hint="`Sequences.windows` gives items in a row: how many make max_history pairs?")
def test_with_attention_an_example_is_a_window():
    """With the attention tower: a history, and at each of its places the item that came next."""
    dataset, split = world()
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        ends = data.positions.cpu().numpy()
        batch = data.example_batch(torch.arange(len(ends), device=device()))
    for name in ("history", "target"):
        assert_equal(list(batch[name].shape), [len(ends), 7], what=f"shape of {name}")
    for row in range(0, len(ends), 19):
        history, target = (batch[name][row].tolist() for name in ("history", "target"))
        user = dataset.user[split.train][ends[row]]
        mine = (dataset.item[split.train][dataset.user[split.train] == user][::-1] + 1).tolist()
        known = [item for item in history if item]
        where = mine.index(known[0])
        assert_equal(known, mine[where : where + len(known)], what=f"history of example {row}")
        wanted = mine[where - 1 : where - 1 + len(known)] + [0] * (7 - len(known))
        assert_equal(target, wanted, what=f"targets of example {row}, history {history}")


@rung(hint="Full: every item is compared. Sampled: draw `sampled` items by `log_q`, once a batch.")
def test_with_attention_every_place_learns():
    """The next item's loss at every place, over all items or over a sample drawn by log_q."""
    dataset, split = world()
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        batch = data.example_batch(torch.arange(9, device=device()))
        batch["target"][batch["target"] == 8] = 9
        model = Places({"num_rows": dataset.num_items + 1, "dim": 6, "temperature": 0.3})
        with torch.no_grad():
            model.user_tower.rows[:, 0], model.item_tower.rows[8, 0] = 1.0, 6.0
        model = model.to(device())
        data.log_q = torch.full((dataset.num_items,), -18.0, device=device())
        data.log_q[7] = 0.0  # so that a sample is 300 times the item 7
        for sampled, log_q in ((0, True), (300, False), (300, True)):
            own = {**ATTENTION["attention"], "sampled": sampled}
            options = ATTENTION | {"log_q": log_q, "attention": own}
            torch.manual_seed(0)
            found = pipeline.retrieval_loss(data, options)(model, batch).detach()
            wanted = next_item(
                model.user_tower.states(batch["history"]), batch["target"],
                model.item_tower(data.items), temperature=0.3,
                sample=torch.full((300,), 7, device=device()) if sampled else None,
                log_q=data.log_q if sampled and log_q else None,
            )
            what = f"loss with sampled={sampled}, log_q={log_q}"
            assert_scalar(found, wanted.item(), rtol=1e-4, what=what)


@rung(hint="A window of max_history places holds that many targets.")
def test_with_attention_the_model_is_another_one():
    """Attention has a model of its own, and batches that hold as many targets as without it."""
    dataset, split = world()
    sizes = []
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        plain = data.example_batch

        def example_batch(index):
            sizes.append(len(index))
            return plain(index)

        data.example_batch = example_batch
        model, _ = pipeline.train_retrieval(data, ATTENTION, seed=1, device=device(), epochs=1)
    check(isinstance(model, Places), "a SequenceModel", came_back=type(model).__name__)
    given = {name: model.given[name] for name in model.given if name != "item_features"}
    wanted = {"num_rows": dataset.num_items + 1, "dim": 24, "num_blocks": 1, "num_heads": 2}
    wanted |= {"hidden_dims": [20], "dropout": 0.1, "max_history": 7, "temperature": 0.1}
    assert_equal(dict(sorted(given.items())), dict(sorted(wanted.items())), what="its arguments")
    assert_equal(max(sizes), 256 // 7, what="windows of a batch, with batch_size=256")


@rung(hint="How many of a user's rows may be held out, and which?")
def test_the_ranker_learns_from_each_users_last_rows():
    """Of each user the last rows are held out, at most `count` and at most a third of them."""
    dataset, split = world()
    user = dataset.user[split.train]
    for count in (4, 40):
        before, places = pipeline.split_off_last(dataset, split.train, count)
        for who in (0, 17, 89):
            mine = np.flatnonzero(user == who)
            held = min(count, len(mine) // 3)
            wanted = mine[len(mine) - held :].tolist()
            what = f"places of user {who} with count={count}"
            assert_equal(sorted(set(places.tolist()) & set(mine.tolist())), wanted, what=what)
        assert_equal(len(before) + len(places), len(split.train), what="rows before and places")
        rest = np.delete(split.train, places).tolist()
        assert_equal(sorted(before.tolist()), sorted(rest), what="rows before")


@rung(
    hint="What have all the texts in common, and how many items does a history hold?",
    seconds=300,
)
def test_text_is_centred_and_padding_has_none(tmp_path):
    """Text vectors are centred and of unit length; a profile is the mean over the items there."""
    dataset, _ = world()
    config = {"encoder": str(encoders.TINY), "cache": str(tmp_path)}
    text = pipeline.text_vectors(dataset, config, device())
    assert_equal(len(text), dataset.num_items, what="number of text vectors")
    assert_close(text.norm(dim=1), torch.ones(len(text)), rtol=1e-4, what="lengths")
    likeness = float((text @ text.T).mean())
    check(abs(likeness) < 0.1, "no part common to all texts: a mean cosine near 0",
          came_back=f"{likeness:.2f}")
    vectors = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device())
    history = torch.tensor([[3, 6, 0, 0], [2, 0, 0, 0], [5, 1, 4, 2]], device=device())
    wanted = torch.stack([vectors[[2, 5]].mean(0), vectors[1], vectors[[4, 0, 3, 1]].mean(0)])
    found = pipeline.text_profile(vectors, history)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5, what="profiles")


@rung(hint="A singular value decomposition; then one factor for all vectors.")
def test_the_rankers_text_is_its_principal_components():
    """The directions in which texts differ most, scaled to squared lengths of 1 in the mean."""
    text = vectors(40, 7) * torch.linspace(0.5, 2.0, 7, device=device())
    text = text - text.mean(0)
    found = pipeline.reduced(text, 3)
    left, values, _ = torch.linalg.svd(text.cpu().double(), full_matrices=False)
    wanted = left[:, :3] * values[:3]
    wanted = wanted / wanted.square().sum(1).mean().sqrt()
    assert_equal(list(found.shape), [40, 3], what="shape")
    assert_scalar(found.square().sum(1).mean(), 1.0, rtol=1e-4, what="mean of squared lengths")
    products = (found @ found.T).cpu()  # a direction may be turned around
    assert_close(products, (wanted @ wanted.T).float(), atol=1e-4, what="products of all pairs")


def proposals(text=None, positive=None):
    """What the ranker learns from: 90 requests with 6 candidates, some of the last ones missing."""
    dataset, split = world()
    data = retrieval_data(split.train)
    asked = pipeline.requests_after_all(dataset, data)
    draw = torch.Generator().manual_seed(4)
    items = torch.rand(90, dataset.num_items, generator=draw).argsort(1)[:, :6]
    items[::4, 1], items[::3, 5] = 0, -1
    scores = torch.rand(90, 6, generator=draw).sort(descending=True)[0]
    statistics = candidates.CandidateFeatures(
        dataset, split.train, device=device(), **CONFIG["ranking"]["features"]
    )
    items, scores = items.to(device()), scores.to(device())
    chosen = None if positive is None else items[:, positive]
    found = pipeline.RankingData(
        asked, items, scores, statistics, text=text, positive=chosen, chunk_size=40
    )
    return found, items, scores, asked.history(asked.user, 9)


def log_was_told(said, wanted, call):
    """Each figure of `wanted`, tag -> values of the epochs, as (tag, value, epoch)."""
    said = sorted(said, key=lambda each: (each[0], each[2]))
    epochs = [(tag, epoch + 1) for tag in sorted(wanted) for epoch in range(len(wanted[tag]))]
    told = [(tag, epoch) for tag, _, epoch in said]
    assert_equal(told, epochs, call=call, what="tags and epochs that the log was told")
    figures = [value for tag in sorted(wanted) for value in wanted[tag]]
    assert_equal([value for _, value, _ in said], figures, call=call, what="values in the log")


def holds_column(columns, wanted, what):
    """Some column of `columns` (..., F) holds the values of `wanted` (...)."""
    call = "RankingData(requests, items, scores, statistics, text=text).dense"
    far = (columns - wanted[..., None]).abs().flatten(0, -2).amax(0).min()
    check(far < 1e-4, f"a column that holds {what}", call=call,
          came_back=f"none: the nearest is {far:.2g} off")


@rung(hint="Numbers of a pair: statistics, stage one's score and place, likeness of texts.")
def test_the_ranker_knows_pairs_by_their_numbers():
    """Statistics, score and place of each candidate, and its text's product with the profile."""
    text = vectors(world()[0].num_items, 5)
    data, items, scores, history = proposals(text=text)
    assert_close(data.items, items, what="candidates")
    profile = pipeline.text_profile(text, history)
    assert_close(data.profile, profile, rtol=1e-4, atol=1e-5, what="profiles")
    there = items >= 0
    match = torch.einsum("rcw,rw->rc", text[items.clamp(min=0)], profile)
    holds_column(data.dense[there], match[there], "the product of profile and candidate's text")
    holds_column(data.dense[there], scores[there], "the score of stage one")
    place = (data.dense[:1] - data.dense).abs().amax((0, 1)) < 1e-6
    rises = (data.dense[0].diff(dim=0) > 0).all(0) | (data.dense[0].diff(dim=0) < 0).all(0)
    check((place & rises).any(), "a column that says the place, the same for all requests",
          came_back="none")
    check(data.dense.isfinite().all(), "finite numbers, without a candidate too",
          came_back=data.dense)


@rung(hint="A ranker that never saw the words knows two films with the same counts as one.")
def test_the_ranker_reads_the_texts():
    """With text, each candidate's vector and the profile are columns that move the logits."""
    text = vectors(world()[0].num_items, 5)
    data, items, _, _ = proposals(text=text, positive=2)
    ranker, _ = pipeline.train_ranker(data, CONFIG["ranking"], seed=1)
    index = torch.tensor([3, 40, 12], device=device())
    batch = ranker.columns(data, index)
    wanted = {
        "the candidate's text": text[items[index].clamp(min=0)].view(18, 5),
        "the profile": data.profile[index].repeat_interleave(6, dim=0),
    }
    there = (items[index] >= 0).flatten()
    for what, column in wanted.items():
        names = [n for n, c in batch.items() if c.shape == column.shape
                 and torch.allclose(c[there], column[there], atol=1e-5)]
        check(names, f"a column that holds {what}", came_back=sorted(batch))
        with torch.no_grad():
            other = batch | {names[0]: batch[names[0]].roll(1, 1)}
            moved = (ranker.model(other) - ranker.model(batch)).abs().max()
        check(moved > 1e-5, f"other logits with another {names[0]}", came_back=moved)


@rung(hint="Which logit does a place without a candidate get? Item 0 is an item.")
def test_only_a_missing_candidate_has_no_logit():
    """Logits are finite for all candidates, and minus infinity where there is none (-1)."""
    data, items, _, _ = proposals()
    ranker, _ = pipeline.train_ranker(proposals(positive=2)[0], CONFIG["ranking"], seed=1)
    logits = ranker(data)
    assert_equal(list(logits.shape), [90, 6], what="shape of the logits")
    assert_close(logits.isneginf(), items < 0, what="which logits are minus infinity")
    check(logits[items >= 0].isfinite().all(), "finite logits", came_back=logits)


@rung(hint="A rate of next to nothing: the loss of the first epoch is that of the logits.")
def test_the_rankers_loss_is_the_one_configured():
    """A list and its positive, or each candidate for itself; the log is told of each epoch."""
    data, *_ = proposals(positive=2)
    data.items = data.items.clamp(min=0)  # no list with a hole
    still = {**FIT, "lr": 1e-30, "batch_size": 99}
    for loss in ("listwise", "binary"):
        options, said = CONFIG["ranking"] | {"loss": loss, "fit": still}, []
        ranker, result = pipeline.train_ranker(
            data, options, seed=1, log=lambda *given, said=said: said.append(given)
        )
        logits = ranker(data)
        if loss == "binary":
            wanted = ranking_losses.binary_loss(logits.flatten(), data.labels.flatten())
        else:
            wanted = ranking_losses.listwise_loss(logits, data.labels)
        call, what = "train_ranker(data, config, seed=1, log=log)", f"loss with loss={loss!r}"
        assert_scalar(result.losses[0], float(wanted), rtol=1e-3, call=call, what=what)
        log_was_told(said, {"loss": result.losses}, call)


@rung(hint="A logit belongs to a user and an item, whoever else is asked for.")
def test_the_ranker_reads_numbers_on_the_scale_it_was_trained_on():
    """Dense features are standardised with the ranker's own mean and deviation."""
    draw = torch.Generator().manual_seed(0)
    sizes = (5, 3, 4), (4,), (4,)
    dense, mean, std = (torch.rand(size, generator=draw).to(device()) for size in sizes)
    items = torch.arange(15, device=device()).view(5, 3)
    data = types.SimpleNamespace(dense=dense, items=items, text=None, profile=None)
    found = pipeline.Ranker(None, mean, std).columns(data, torch.tensor([4, 1], device=device()))
    wanted = ((dense[[4, 1]] - mean) / std).view(6, 4)
    assert_close(found["dense"], wanted, rtol=1e-4, atol=1e-5, what="dense columns")


@rung(hint="Score all items, leave out what lies before the request, then cut at k.")
def test_retrieval_ranks_the_whole_catalogue_without_what_was_seen():
    """Retrieval gives the best unseen items of all, as scoring every pair by hand does."""
    dataset, _ = world()
    rows = known_rows()
    data = retrieval_data(rows)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, CONFIG["retrieval"]).to(device()).eval()
    asked = pipeline.requests_after_all(dataset, data)
    sizes = []
    model.user_tower.register_forward_hook(lambda tower, args, out: sizes.append(len(out)))
    items, scores = pipeline.retrieve(model, data, asked, k=9, chunk_size=16)
    check(max(sizes, default=0) <= 16, "at most 16 requests encoded at a time",
          came_back=f"{sizes} requests")
    with torch.no_grad():
        everyone = torch.arange(dataset.num_users, device=device())
        users = model.user_tower(data.user_batch(everyone, asked.history(everyone, 7)))
        full = (users @ model.item_tower(data.items).T).cpu().numpy()
    full[dataset.user[rows], dataset.item[rows]] = -np.inf
    best = -np.sort(-full, axis=1)[:, :9]
    assert_close(scores.cpu(), torch.tensor(best), rtol=1e-4, atol=1e-5, what="scores")
    there = np.take_along_axis(full, items.cpu().numpy(), 1)
    assert_close(torch.tensor(there), torch.tensor(best), rtol=1e-4, atol=1e-5, what="items")


@rung(hint="`run` says in its docstring what it returns.")
def test_run_returns_lists_that_can_be_judged():
    """Both stages give every user a list: known items, none twice, none seen, best first."""
    dataset, _ = world()
    rows = known_rows()
    seen = evaluator.seen_offsets(dataset.user[rows], dataset.item[rows], dataset.num_users)
    for stage in ("retrieval", "final"):
        lists = outcome()[stage]
        try:
            evaluator.check_lists(
                lists["items"],
                lists["scores"],
                num_users=dataset.num_users,
                num_items=dataset.num_items,
                seen=seen,
                length=25,
            )
        except evaluator.InvalidLists as error:
            check(False, "lists that can be judged", came_back=f"{stage}: {error}")


@rung(hint="The second stage reorders what the first proposed; it adds and loses nothing.")
def test_the_ranker_reorders_the_candidates():
    """The final list holds the candidates of retrieval in the order of the ranker's logits."""
    retrieval, ranking, final = (outcome()[part] for part in ("retrieval", "ranking", "final"))
    assert_equal(
        np.sort(final["items"], 1).tolist(),
        np.sort(retrieval["items"], 1).tolist(),
        what="items of the final lists",
    )
    _, logits = evaluator.reorder(retrieval["items"], ranking["logits"])
    assert_close(torch.tensor(final["scores"]), torch.tensor(logits), what="final scores")
    place = np.argsort(retrieval["items"], axis=1, kind="stable")
    back = np.argsort(np.argsort(final["items"], axis=1, kind="stable"), axis=1)
    own = np.take_along_axis(np.take_along_axis(ranking["logits"], place, 1), back, 1)
    assert_close(torch.tensor(final["scores"]), torch.tensor(own), what="logits of those items")


@rung(
    hint="Whatever is fitted or selected, counts included, is fitted without the test rows.",
    seconds=300,
)
def test_the_test_rows_are_never_read():
    """Another test set changes nothing: neither lists nor scores nor training."""
    dataset, split = world()
    other = dataclasses.replace(split, test=split.test[:0])
    shuffled = dataset.item.copy()
    shuffled[split.test] = np.random.default_rng(0).permutation(dataset.item[split.test])
    later = dataset.time.copy()
    later[split.test] += 50 * 86400
    changed = whole(dataclasses.replace(dataset, item=shuffled, time=later), other)
    for stage in ("retrieval", "final"):
        found, wanted = changed[stage]["items"], outcome()[stage]["items"]
        assert_equal(found.tolist(), wanted.tolist(), what=f"{stage} lists")


@dataclasses.dataclass
class Seen:
    """What a run trained on which rows, in order."""

    features: list = dataclasses.field(default_factory=list)  # rows behind each computed statistic
    retrieval: list = dataclasses.field(default_factory=list)  # rows of each trained model
    ranker: tuple | None = None  # its data; how many of each were there before it


@contextlib.contextmanager
def watched():
    """Notes what retrieval and the ranker are trained on, and the statistics that are asked."""
    made, seen = {}, Seen()
    features, columns = candidates.CandidateFeatures, pipeline.RetrievalData
    plain_init, plain_call, plain_columns = features.__init__, features.__call__, columns.__init__
    plain_retrieval, plain_ranker = pipeline.train_retrieval, pipeline.train_ranker
    module = sys.modules[plain_ranker.__module__]

    def init(self, dataset, rows, *args, **options):
        made[id(self)] = self, np.asarray(rows)  # kept, so that no id is used again
        return plain_init(self, dataset, rows, *args, **options)

    def call(self, *args, **options):
        seen.features.append(made[id(self)][1])
        return plain_call(self, *args, **options)

    def columns_init(self, dataset, rows, *args, **options):
        made[id(self)] = self, np.asarray(rows)
        return plain_columns(self, dataset, rows, *args, **options)

    def train_retrieval(data, *args, **options):
        seen.retrieval.append(made[id(data)][1])
        return plain_retrieval(data, *args, **options)

    def train_ranker(data, *args, **options):
        seen.ranker = data, len(seen.features), len(seen.retrieval)
        return plain_ranker(data, *args, **options)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (features, "__init__", init), (features, "__call__", call),
            (columns, "__init__", columns_init),
            (module, "train_retrieval", train_retrieval), (module, "train_ranker", train_ranker),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield seen


@functools.cache
def watched_run():
    """The run of `outcome`, and what was trained on which rows in it."""
    with watched() as seen:
        result = whole(*world())
    return result, seen


def training():
    """What `run` trained on which rows."""
    _, seen = watched_run()
    check(seen.ranker, "train_ranker is called", came_back="run did not call it")
    return seen


def held_out():
    """The rows that are the ranker's targets: of each user the last 4, at most a third."""
    dataset, _ = world()
    rows = known_rows()
    user = dataset.user[rows]
    total = np.bincount(user)
    place = np.arange(len(rows)) - np.searchsorted(user, user)
    return rows[place >= (total - np.minimum(4, total // 3))[user]]


@rung(hint="Which rows hold the answers to what the ranker is trained on? Who has counted them?")
def test_the_rankers_statistics_do_not_know_its_targets():
    """The statistics that the ranker is trained on come from rows without any of its targets."""
    seen = training()
    asked = seen.features[: seen.ranker[1]]
    check(asked, "candidate features from CandidateFeatures", came_back="none were computed")
    for rows in asked:
        known = int(np.isin(held_out(), rows).sum())
        check(
            known == 0,
            "statistics of the rows before the targets",
            came_back=f"statistics that hold {known} of the {len(held_out())} targets",
        )


@rung(hint="Random items are far too easy: what else did retrieval propose for that request?")
def test_the_ranker_is_trained_on_what_retrieval_proposes():
    """Its negatives are near the positive: unseen candidates of retrieval, each list with one."""
    dataset, _ = world()
    data, _, _ = training().ranker
    labels = data.labels.cpu()
    items = data.items.cpu()
    assert_equal(list(items.shape[1:]), [25], what="candidates of a request")
    assert_close(labels.sum(1), torch.ones(len(labels)), what="positives of each list")
    targets = dataset.item[held_out()]
    chosen = items[labels.bool()].numpy()
    check(np.isin(chosen, targets).all(), "positives among the held-out items", came_back=chosen)
    # of 130 items any 25 would hold a target in a fifth of the cases; retrieval does better
    share = len(items) / len(targets)
    check(share > 0.3, "lists that hold the target more often than by chance, above 0.3",
          came_back=f"{share:.2f} of {len(targets)} requests")
    check(share < 0.95, "no list for a request whose target retrieval did not propose",
          came_back=f"lists for {share:.2f} of {len(targets)} requests")


@rung(hint="Whose scores will the ranker read in the end: of a model that knows the answer?")
def test_the_rankers_candidates_come_from_a_model_without_its_targets():
    """Before the ranker, retrieval is trained on the rows before the ranker's targets."""
    seen = training()
    known = [int(np.isin(held_out(), rows).sum()) for rows in seen.retrieval[: seen.ranker[2]]]
    check(
        0 in known,
        "a retrieval model, trained before the ranker on rows without its targets",
        came_back=f"models that were trained on {known} of the {len(held_out())} targets",
    )


@rung(hint="Everybody's latest rows are worth most: who has not learned from them yet?")
def test_everything_is_fitted_again_on_all_rows():
    """What is ranked in the end comes from retrieval and statistics of all known rows."""
    seen = training()
    everything = sorted(known_rows().tolist())
    for name, rows in (("retrieval", seen.retrieval), ("statistics", seen.features)):
        sizes = [len(each) for each in rows]
        check(
            any(sorted(each.tolist()) == everything for each in rows),
            f"{name} fitted on all {len(everything)} known rows",
            came_back=f"{name} fitted on {sizes} rows",
        )


@rung(
    hint="Selection is a kind of training: which rows may it see?",
    seconds=300,
)
def test_epochs_are_selected_on_validation_alone():
    """With select_epochs another test set changes nothing, and another validation set may."""
    dataset, split = world()
    chosen = CONFIG | {"retrieval": CONFIG["retrieval"] | {"select_epochs": True}}
    without = dataclasses.replace(split, test=split.test[:0])
    one, other = whole(dataset, split, chosen), whole(dataset, without, chosen)
    metrics = [float(each) for each in one["retrieval"]["metrics"]]
    assert_equal([float(each) for each in other["retrieval"]["metrics"]], metrics, what="metrics")
    best = int(np.argmax(metrics)) + 1
    assert_equal(one["retrieval"]["epochs"], best, what=f"epochs, of metrics {metrics}")


@rung(hint="A hundred random items are easy to beat. Who else competes with the target?")
def test_selection_ranks_the_whole_catalogue():
    """The validation metric is the NDCG@10 of full ranking, seen items left out."""
    dataset, split = world()
    data = retrieval_data(split.train)
    asked = pipeline.requests_after_all(dataset, data)
    users = torch.as_tensor(dataset.user[split.validation], device=device())
    targets = torch.as_tensor(dataset.item[split.validation], device=device())
    model, result = pipeline.train_retrieval(
        data,
        CONFIG["retrieval"],
        seed=5,
        device=device(),
        epochs=2,
        validation=(asked.of(users), targets),
    )
    items, scores = pipeline.retrieve(model, data, asked.of(users), k=10, chunk_size=64)
    ranks = evaluator.target_ranks(items.cpu().numpy(), scores.cpu().numpy(),
                                   dataset.item[split.validation])
    ndcg = float(evaluator.per_user(ranks, "ndcg", 10).mean())
    assert_scalar(max(result.metrics), ndcg, rtol=1e-4, what="the best validation metric")


@rung(hint="`fit` calls `on_epoch` with all that the log is to be told.")
def test_the_log_is_told_of_each_epoch():
    """The loss of each epoch, from 1, and with a validation its NDCG@10; without a log, nobody."""
    dataset, split = world()
    data = retrieval_data(split.train)
    asked = pipeline.requests_after_all(dataset, data)
    users, targets = (torch.as_tensor(column[split.validation], device=device())
                      for column in (dataset.user, dataset.item))
    for validation in (None, (asked.of(users), targets)):
        said = []
        _, result = pipeline.train_retrieval(
            data, CONFIG["retrieval"], seed=5, device=device(), epochs=2,
            validation=validation, log=lambda *given, said=said: said.append(given),
        )
        wanted = {"loss": result.losses, "validation_ndcg@10": result.metrics}
        log_was_told(said, wanted, "train_retrieval(data, config, ..., validation=..., log=log)")


@rung(
    hint="One map from raw ids to rows, for training, test and service.",
    seconds=300,
)
def test_raw_ids_are_kept_apart_from_rows():
    """With other raw ids, in the same order, the same films are recommended to the same people."""
    dataset, split = world()
    other = dataclasses.replace(
        dataset, user_ids=dataset.user_ids * 3 + 7, item_ids=dataset.item_ids * 11 + 5
    )
    config = CONFIG | {
        "retrieval": CONFIG["retrieval"] | {"user_features": ["history", "age"]}
    }
    plain, renamed = whole(dataset, split, config), whole(other, split, config)
    lists = plain["final"]["items"], renamed["final"]["items"]
    assert_equal(lists[1].tolist(), lists[0].tolist(), what="final lists")
    answer = renamed["recommender"].recommend_batch(other.user_ids[:2].tolist(), [3, 3])
    found = [[item for item, *_ in each] for each in answer]
    assert_equal(found, other.item_ids[lists[0][:2, :3]].tolist(), what="raw ids served")


@rung(
    hint="Two runs with one seed must agree; which source of chance is not seeded?",
    seconds=300,
)
def test_a_seed_is_a_run():
    """The same seed gives the same lists, another one other lists."""
    again = whole(*world())
    assert_equal(
        again["final"]["items"].tolist(), outcome()["final"]["items"].tolist(), what="final lists"
    )
    other = pipeline.run(*world(), CONFIG, seed=2, device=device(), log=silent)
    same = np.array_equal(other["final"]["items"], again["final"]["items"])
    check(not same, "other lists with another seed", came_back="the same lists with seeds 1 and 2")


@rung(hint="Serve the same model, the same statistics and the same moment that were judged.")
def test_what_is_served_is_what_was_judged():
    """The recommender answers every user with the head of their final list."""
    dataset, _ = world()
    recommender = outcome()["recommender"]
    answers = recommender.recommend_batch(dataset.user_ids[::7].tolist(), [5] * 13)
    found = [[item for item, *_ in answer] for answer in answers]
    wanted = dataset.item_ids[outcome()["final"]["items"][::7, :5]].tolist()
    assert_equal(found, wanted, what="items served")


@rung(hint="Lists that were ranked can be looked up; whatever else comes has to be ranked.")
def test_the_service_ranks_other_lists_too():
    """What is served ranks known lists, shorter ones and other items as the final lists were."""
    dataset = synthetic.generate(seed=5, users=20, items=40)
    split = splits.leave_last_one_out(dataset)
    signature, served = inspect.signature(pipeline.build_recommender), {}

    def build_recommender(*args, **options):
        served.update(signature.bind(*args, **options).arguments)
        return plain(*args, **options)

    plain, module = pipeline.build_recommender, sys.modules[pipeline.run.__module__]
    with tempfile.TemporaryDirectory() as cache:
        config = CONFIG | {"text": {"encoder": str(encoders.TINY), "cache": cache}}
        with patch.object(module, "build_recommender", build_recommender):
            result = whole(dataset, split, config)
    rank, users = served["ranker"], np.arange(3, 9)
    items, scores = (result["retrieval"][name][3:9] for name in ("items", "scores"))
    logits = torch.tensor(result["ranking"]["logits"][3:9])
    found = rank(users, items, scores)
    assert_close(torch.as_tensor(found), logits, rtol=1e-3, atol=1e-4, what="lists that are known")
    found = rank(users, items[:, :4], scores[:, :4].astype(np.float64))
    wanted = logits[:, :4]
    assert_close(torch.as_tensor(found).float(), wanted, rtol=1e-3, atol=1e-4, what="shorter lists")
    other = items.copy()
    other[2, 1] = np.setdiff1d(np.arange(40), items[2])[0]
    found = torch.as_tensor(rank(users, other, scores)).float()
    same = torch.ones(logits.shape, dtype=torch.bool)
    same[2, 1] = False
    assert_close(found[same], logits[same], rtol=1e-3, atol=1e-4, what="candidates that stayed")
    moved = float((found - logits)[2, 1].abs())
    check(moved > 1e-4, "another logit for the one new item", came_back=found[2, 1])


@rung(hint="Exact search is the measure: what does the index find of it?")
def test_the_index_says_how_exact_it_is():
    """Its kind, its recall against exact search, and the time of a query."""
    index = outcome()["index"]
    wanted = ["cpu_ms_per_query", "kind", "recall_vs_exact@10"]
    assert_equal(sorted(index), wanted, what="figures of the index")
    assert_scalar(index["recall_vs_exact@10"], 1.0, what="recall of an exact index")
    check(index["kind"] and isinstance(index["kind"], str), "a kind, in words", came_back=index)
    spent = index["cpu_ms_per_query"]
    check(0 <= spent < 100, "milliseconds of a query", came_back=spent)


@rung(hint="Three sizes tell whether a graph is made for each; a failure is a result, too.")
def test_compiling_is_measured():
    """Graphs for three sizes, the gain over eager, and the reason where the compiler fails."""
    data, *_ = proposals(positive=2)
    ranker, _ = pipeline.train_ranker(data, CONFIG["ranking"], seed=1)
    seen = {"counted": [], "compiled": 0}

    def count_graphs(function, inputs, **options):
        seen["counted"] += [len(function(*each)) // 6 for each in inputs]
        return types.SimpleNamespace(graphs=2, graph_breaks=1, recompiles=0, reasons=())

    def compile_model(model, **options):
        def run(*args):
            seen["compiled"] += 1
            return model(*args)

        return run

    def warm_up(function, inputs, **options):
        for each in inputs:
            function(*each)
        return 0.5

    def benchmark(functions, **options):
        found = {}
        for name, function in functions.items():
            before, _ = seen["compiled"], function()
            median = 3.0 if seen["compiled"] == before else 2.0
            found[name] = types.SimpleNamespace(median=median, low=1.0, high=9.0, first=7.0)
        return found

    def broken(function, inputs, **options):
        raise RuntimeError("no compiler\nfound anywhere")

    fakes = {"count_graphs": count_graphs, "compile_model": compile_model,
             "benchmark": benchmark}
    with replaced(compiled, **fakes, warm_up=warm_up):
        found = pipeline.measure_compile(ranker, data)
    wanted = {"compile_seconds": 0.5, "graph_breaks": 1, "graphs": 2, "speedup": 1.5}
    assert_equal(dict(sorted(found.items())), wanted, what="eager 3 s, compiled 2 s")
    assert_equal(len(set(seen["counted"])), 3, what="sizes that graphs were counted for")
    with replaced(compiled, **fakes, warm_up=broken):
        found = pipeline.measure_compile(ranker, data)
    said = {name: found.get(name) for name in ("graph_breaks", "graphs", "speedup")}
    wanted = {"graph_breaks": 1, "graphs": 2, "speedup": None}
    assert_equal(said, wanted, what="a compiler that fails")
    check("no compiler" in str(found.get("reason")), "the reason, in words", came_back=found)


@rung(
    hint="Which items are cold, and what may be known of them? Their text and genres only.",
    seconds=300,
)
def test_cold_items_are_recommended_from_content_alone(tmp_path):
    """Every user gets the best cold items; without a text encoder there is no cold start."""
    dataset, _ = world()

    def cold(data, encoder, without=None):
        own = CONFIG["cold_start"]
        weights = {name: weight for name, weight in own["weights"].items() if name != without}
        config = CONFIG | {"text": {"encoder": encoder, "cache": str(tmp_path)}}
        config["cold_start"] = own | {"weights": weights}
        return pipeline.run_cold_start(data, config, seed=2, device=device(), log=silent)

    assert_equal(cold(dataset, None), None, what="cold start without an encoder")
    items = splits.item_cold_start(dataset, fraction=0.25, seed=2).cold_items
    found = cold(dataset, str(encoders.TINY))
    rows = np.isin(dataset.item, items)  # whoever rated the cold items must not matter
    user = dataset.user.copy()
    user[rows] = user[rows][::-1]
    again = cold(dataclasses.replace(dataset, user=user), str(encoders.TINY))
    check(
        found["items"].shape == (dataset.num_users, 10) and np.isin(found["items"], items).all(),
        f"10 of the {len(items)} cold items for each of {dataset.num_users} users",
        came_back=found["items"],
    )
    check((np.diff(found["scores"], axis=1) <= 0).all(), "best first", came_back=found["scores"])
    assert_equal(again["items"].tolist(), found["items"].tolist(), what="lists of other raters")
    for part in CONFIG["cold_start"]["weights"]:
        less = cold(dataset, str(encoders.TINY), without=part)
        same = np.array_equal(less["items"], found["items"])
        check(not same, f"other lists without the part {part}", came_back="the same lists")


@rung(
    hint="One matrix of users and items for each part, and its deviation along the items.",
    seconds=300,
)
def test_cold_scores_are_a_weighted_sum(tmp_path):
    """Each part has unit deviation over a user's items and counts by its weight; all are finite."""
    dataset, _ = world()
    split = splits.item_cold_start(dataset, fraction=0.25, seed=2)
    keep = np.ones(len(dataset.user), dtype=bool)
    keep[split.train[dataset.user[split.train] == 0]] = False  # nothing is left of user 0
    rows = {name: getattr(dataset, name)[keep] for name in ("user", "item", "rating", "time")}
    dataset = dataclasses.replace(dataset, **rows)
    split = splits.item_cold_start(dataset, fraction=0.25, seed=2)
    config = CONFIG | {"text": {"encoder": str(encoders.TINY), "cache": str(tmp_path)}}
    config["cold_start"] = CONFIG["cold_start"] | {
        "weights": {"text": 1.5, "tower": 0.0, "regression": 0.5}
    }
    found = pipeline.run_cold_start(dataset, config, seed=2, device=device(), log=silent)
    chose = torch.zeros(dataset.num_users, dataset.num_items, dtype=torch.float64)
    chose[dataset.user[split.train], dataset.item[split.train]] = 1.0
    text = torch.tensor(found["text"]).double()
    content_vectors = features.content_vectors
    content = torch.tensor(content_vectors(dataset, found["text"])).double()
    warm = chose.any(0)
    x = content - content[warm].mean(0)
    gram = x[warm].T @ x[warm] + torch.eye(x.shape[1])
    parts = chose @ text @ text.T, chose @ x @ torch.linalg.inv(gram) @ x.T
    total = sum(w * part / part.std(1, keepdim=True).clamp(min=1e-9)
                for w, part in zip((1.5, 0.5), parts, strict=True))
    best = total[:, split.cold_items].sort(1, descending=True)[0][:, :10]
    assert_close(torch.tensor(found["scores"][0]), torch.zeros(10), what="user with no row left")
    assert_close(torch.tensor(found["scores"]), best.float(), rtol=1e-2, atol=1e-2, what="scores")
    listed = chose.gather(1, torch.tensor(found["all_items"])).sum()
    assert_equal(list(found["all_items"].shape), [dataset.num_users, 10], what="shape of all_items")
    assert_equal(int(listed), 0, what="items in all_items that their user had chosen")


@rung(
    hint="Nothing was learned: look at the loss, at log Q, and at what the ranker is fed.",
    seconds=300,
)
def test_it_beats_popularity():
    """On data with planted tastes and sequences the final lists beat the popular items."""
    dataset, split = world()
    config = CONFIG | {"retrieval": CONFIG["retrieval"] | {"fit": FIT | {"epochs": 12}}}
    result = whole(dataset, split, config)
    rows = known_rows()
    seen = evaluator.seen_offsets(dataset.user[rows], dataset.item[rows], dataset.num_users)
    popular = evaluator.popularity_lists(dataset.item[rows], dataset.num_items, seen, 25)
    user, target = dataset.user[split.test], dataset.item[split.test]

    def ndcg(items, scores):
        ranks = evaluator.target_ranks(items[user], scores[user], target)
        return float(evaluator.per_user(ranks, "ndcg", 10).mean())

    final, floor = ndcg(result["final"]["items"], result["final"]["scores"]), ndcg(*popular)
    check(final > floor, f"NDCG@10 above popularity's, {floor:.3f}", came_back=f"{final:.3f}")
