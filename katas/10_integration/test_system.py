"""Kata 10, the whole system: yours and the reference side by side, on data without test rows.

On generated data. MovieLens and what only a GPU can tell are run by `kata gate`, which says what it
could not run.
"""

import functools

from harness import settings, system
from harness.spec import after_the_others, fail, rung


@functools.cache
def verdict(data="synthetic"):
    """What harness/system.py finds; the processes it starts know no test row."""
    after_the_others()
    return system.verdict(system.installed(), data=data, device=settings.device())


def hold(names, data="synthetic"):
    """Fail with the first finding of these names that is bad."""
    found = verdict(data)
    reds = [finding for finding in found.reds if finding.name in names]
    if reds:
        more = [("besides", finding.says) for finding in reds[1:3]]
        fail(
            came_back=reds[0].says,
            expected="what the reference gives, within what chance explains",
            call=f"run(...) on {data}, seeds {', '.join(map(str, found.seeds))}",
            more=[*more, ("which part", "kata culprit swaps your parts in turn and says")],
        )
    if not any(finding.name in names for finding in found.findings):
        fail(
            came_back="nothing: an earlier rung says why",
            expected="figures that can be compared",
            call=f"run(...) on {data}",
        )


@rung(
    hint="Run it without the harness: ./kata run says which part failed, and where.", seconds=900
)
def test_the_system_runs_and_its_lists_are_honest():
    """In a process without test rows it gives lists of unseen items, and serves what it ranked."""
    reds = [f for f in verdict().reds if "rule" in f.detail or "error" in f.detail]
    if reds:
        fail(
            came_back=reds[0].says,
            expected="lists that can be judged",
            call="run(...) on synthetic",
            more=[("which part", "kata culprit swaps your parts in turn and says")],
        )


@rung(hint="A system that ranks no better than the popular items has learned nothing.", seconds=900)
def test_the_system_beats_popular_items():
    """NDCG@10 of the final lists is above that of popular items, for 95 % sure."""
    hold(["popularity"])


@rung(hint="Which stage loses it: the recall of retrieval, or the order of the final lists?",
      seconds=900)
def test_the_system_keeps_up_with_the_reference():
    """Retrieval, ranking and cold start are no worse than the reference's, chance aside."""
    hold(list(system.FIGURES))


@rung(hint="Is there a loop over rows, a copy of a whole table, something made anew each time?",
      seconds=900)
def test_nothing_costs_half_as_much_again_as_the_reference():
    """Training, evaluation, text encoding and service take at most 1.5 times the CPU time."""
    hold([f"speed_{name}" for name in (*system.WORK, system.SERVICE)])


@rung(hint="Count what happens in a step that could happen once an epoch.", seconds=900)
def test_a_training_step_has_no_needless_operations_or_waits():
    """At most 3 times the reference's operations, and no further wait in each step of the loop."""
    hold(["launches", "syncs"])
