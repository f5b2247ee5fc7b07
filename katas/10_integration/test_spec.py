"""Kata 10, the whole recommender: what `pipeline.py` must do, in the small."""

import contextlib
import dataclasses
import functools
import sys
import types
from unittest.mock import patch

import numpy as np
import torch

from harness import encoders, evaluator
from harness.spec import assert_close, assert_equal, assert_scalar, check, device, learner, rung

pipeline = learner("pipeline")
losses = learner("training.losses")
synthetic = learner("data.synthetic")
splits = learner("data.splits")
candidates = learner("data.candidates")

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
        "fraction": 0.2,
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


@rung(hint="An id row that no example ever trained is noise: give such an item row 0.")
def test_an_item_without_rows_has_no_id():
    """An item that the rows do not hold is described by its content, its id is padding."""
    dataset, split = world()
    rows = split.train[dataset.item[split.train] != 5]
    ids = retrieval_data(rows).items["item_id"]
    assert_equal(int(ids[5]), 0, what="id column of an item without rows")
    trained = np.unique(dataset.item[rows])[:3]
    assert_equal(ids[torch.tensor(trained)].tolist(), (trained + 1).tolist(), what="other ids")


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
    items, scores = pipeline.retrieve(model, data, asked, k=9, chunk_size=16)
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
    items = splits.item_cold_start(dataset, fraction=0.2, seed=2).cold_items
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
