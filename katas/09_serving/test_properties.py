"""Any catalogue, any batch: what a plain loop over users and items would recommend (kata 09)."""

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from harness.spec import assert_equal, check, expect_error, learner, rung

serving = learner("inference.serving")


def expected(vectors, user, seen, k, num_candidates, score):
    """Items that a loop in float64 recommends to a user, as rows."""
    inner = vectors[0][user].astype(np.float64) @ vectors[1].T.astype(np.float64)
    order = [item for item in np.argsort(-inner).tolist() if item not in seen]
    candidates = order[: max(num_candidates, k)]
    if score is not None:
        candidates = [item for item in candidates if np.isfinite(score[user, item])]
        candidates.sort(key=lambda item: -score[user, item])
    return candidates[:k]


@settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # examples are small already
)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(2, 4)),
    num_candidates=st.integers(1, 15),
    batch=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 14)), min_size=1, max_size=6),
    ranked=st.booleans(),
)
def like_a_loop(seed, sizes, num_candidates, batch, ranked):
    num_users, num_items, dim = sizes
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal((n, dim)).astype(np.float32) for n in sizes[:2]]
    vectors = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
    seen = [rng.choice(num_items, rng.integers(num_items + 1), False) for _ in range(num_users)]
    score = rng.integers(-6, 6, (num_users, num_items)) / 4  # many ties: stage one breaks them
    score[rng.random(score.shape) < 0.1] = np.nan
    user_ids, item_ids = rng.permutation(40)[:num_users] + 1, rng.permutation(90)[:num_items]
    recommender = serving.Recommender(
        user_ids=user_ids,
        user_vectors=vectors[0],
        item_ids=item_ids,
        titles=[f"film {row}" for row in range(num_items)],
        index=serving.build_index(vectors[1]),
        seen=(np.concatenate(seen), np.cumsum([0, *map(len, seen)])),
        ranker=(lambda users, items, scores: score[users[:, None], items]) if ranked else None,
        num_candidates=num_candidates,
    )
    rows, ks = [user % num_users for user, _ in batch], [k for _, k in batch]
    call = f"recommend_batch of {len(batch)} users, ks={ks}, num_candidates={num_candidates}"
    users = user_ids[rows].tolist()
    answers = recommender.recommend_batch(users, ks)
    check(isinstance(answers, list) and len(answers) == len(batch), f"{len(batch)} lists",
          came_back=answers, call=call)  # fmt: skip
    for place, (row, k, answer) in enumerate(zip(rows, ks, answers, strict=True)):
        best = expected(vectors, row, seen[row].tolist(), k, num_candidates,
                        score if ranked else None)  # fmt: skip
        what = f"items at place {place}, for a user who has seen {len(seen[row])} of {num_items}"
        assert_equal([each[0] for each in answer], item_ids[best].tolist(), call=call, what=what)
        titles = [f"film {item}" for item in best]
        assert_equal([each[2] for each in answer], titles, call=call, what=f"titles of {what}")
        falls = [each[1] for each in answer]
        check(falls == sorted(falls, reverse=True), "falling scores", came_back=falls, call=call)


@rung(
    hints=[
        "A batch is a convenience of yours, the user must not notice it.",
        "How many candidates a user gets depends on their own k and seen items, not on the largest "
        "of the batch; and answers come back in the order of the questions.",
        "Look ids up in a dictionary: KeyError by itself. A k below 1 is a ValueError.",
    ]
)
def test_any_batch():
    """In any batch, in the order asked, each gets what they would alone; strangers are refused."""
    like_a_loop()
    recommender = serving.Recommender(
        user_ids=np.array([31, 7, 12]),
        user_vectors=np.eye(3, 4, dtype=np.float32),
        item_ids=np.array([9, 8]),
        titles=["film 0", "film 1"],
        index=serving.build_index(np.eye(2, 4, dtype=np.float32)),
        seen=(np.array([0]), np.array([0, 0, 0, 1])),
    )
    assert_equal(recommender.recommend_batch([], []), [], what="a batch of nobody")
    for stranger in (-1, 0, 8, 10**12):
        call = f"recommend_batch([31, {stranger}], [3, 3]), users 7, 12, 31"
        expect_error(lambda s=stranger: recommender.recommend_batch([31, s], [3, 3]), KeyError,
                     call=call)  # fmt: skip
    for wrong in ([3, 0], [3, -1], [3], [3, 3, 3]):
        call = f"recommend_batch([7, 31], {wrong})"
        expect_error(lambda w=wrong: recommender.recommend_batch([7, 31], w), ValueError,
                     call=call)  # fmt: skip
