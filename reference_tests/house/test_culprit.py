"""Whom `kata culprit` blames, on systems that cost nothing: a mixture is red by decree."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from harness import catalog, culprit, system
from harness.culprit import Outcome
from harness.paths import REFERENCE, SRC
from harness.system import Finding

PARTS = ("02_tower", "03_contrastive_loss", "06_ndcg")


class Decreed(culprit.Trials):
    """Mixtures are red if they hold all katas of a group; `tried` is what was run."""

    def __init__(self, folder, groups):
        super().__init__(None, folder)
        self.groups, self.tried = groups, []

    def outcome(self, roots):
        folder, *rest = roots
        assert rest == [REFERENCE, SRC]
        held = {k.id for k in catalog.load() if (folder / "recsys" / next(iter(k.files))).is_file()}
        self.tried.append(held)
        reds = [red for group, red in self.groups.items() if set(group) <= held]
        return Outcome(reds)


def lower(z=-5.0, change=-0.18):
    return Finding("final", "worse", False, {"z": z, "change": change})


@pytest.fixture
def learner(tmp_path):
    """A root in which the parts of PARTS are the learner's, and one is the reference's text."""
    for kata in map(catalog.find, (*PARTS, "01_embedding_table")):
        for file in kata.files:
            text = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
            place = tmp_path / "mine/recsys" / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text + "# mine\n" * (kata.id in PARTS), encoding="utf-8")
    return [tmp_path / "mine", REFERENCE, SRC]


@pytest.fixture
def found(tmp_path, learner):
    def find(groups, **options):
        trials = Decreed(Path(tempfile.mkdtemp(dir=tmp_path)), groups)
        return culprit.find(trials, learner, **options), trials.tried

    return find


def test_nothing_is_wrong(found):
    report, tried = found({})
    assert report.lines() == ["Nothing to blame: the system is green."]
    assert tried == [set(PARTS)], "one run of the whole; the reference's text is no part"


def test_one_part_costs(found):
    report, tried = found({("03_contrastive_loss",): lower()})
    said = report.as_json()
    assert [c["kata"] for c in said["culprits"]] == ["03_contrastive_loss"]
    assert said["culprits"][0]["swapped_is_green"] is True
    assert said["fine"] == ["02_tower", "06_ndcg"] and said["together"] == []
    assert "03_contrastive_loss costs 18% NDCG@10 of the final lists; swapped" in said["lines"][1]
    assert len(tried) == len({frozenset(t) for t in tried}), "no mixture runs twice"


def test_swapping_only_those_that_are_red_takes_fewer_runs(found):
    groups = {("03_contrastive_loss",): lower()}
    (report, all_of_them), (quick, fewer) = found(groups), found(groups, both_ways=False)
    assert quick.as_json()["culprits"] == report.as_json()["culprits"]
    assert len(fewer) < len(all_of_them)


def test_two_fail_only_together(found):
    report, _ = found({("02_tower", "06_ndcg"): lower()})
    assert report.together == [("02_tower", "06_ndcg")]
    assert report.as_json()["culprits"] == [] and report.as_json()["fine"] == [PARTS[1]]
    assert "02_tower and 06_ndcg only fail together: each alone is fine." in report.lines()


def test_two_are_wrong_each_for_itself(found):
    """The worse one is named first; what no figure could be given for is the worst."""
    crash = Finding("runs", "TypeError: no", False, {"error": "TypeError", "said": "no"})
    report, _ = found({("02_tower",): lower(), ("06_ndcg",): crash})
    said = report.as_json()
    assert [c["kata"] for c in said["culprits"]] == ["06_ndcg", "02_tower"]
    assert [c["swapped_is_green"] for c in said["culprits"]] == [False, False]
    assert "swapped" not in " ".join(report.lines()), "with both swapped it is green"
    report, _ = found({("02_tower",): lower(z=-4.0), ("06_ndcg",): lower(z=-9.0)})
    assert [part.kata for part, _ in report.culprits] == ["06_ndcg", "02_tower"]


def test_three_that_only_fail_together_are_not_explained(found):
    report, _ = found({PARTS: lower()})
    assert report.lines()[1] == "No part alone and no two together explain it."


def test_one_is_to_blame_and_two_besides(found):
    report, _ = found({("03_contrastive_loss",): lower(), ("02_tower", "06_ndcg"): lower()})
    assert [part.kata for part, _ in report.culprits] == ["03_contrastive_loss"]
    assert any("With them swapped it still costs 18%" in line for line in report.lines())


@pytest.mark.parametrize(
    ("red", "says"),
    [
        (lower(), "costs 18% NDCG@10 of the final lists"),
        (Finding("logloss", "", False, {"z": -4.0, "change": 0.31}), "raises 31% log loss"),
        (Finding("speed_step", "", False, {"ratio": 3.14}), "makes step 3.1 times as slow"),
        (Finding("syncs", "", False), "has more waits for the device in a training step"),
        (Finding("popularity", "", False, {"gain": -0.1}), "ranks no better than popular items"),
        (Finding("seen", "seen items", False, {"rule": "seen"}), "breaks the run: seen items"),
    ],
)
def test_what_is_said_of_a_red_system(red, says):
    assert Outcome([red]).says.startswith(says)


def test_what_is_worst_is_said():
    other = Finding("popularity", "", False, {"gain": -0.1})
    slow = Finding("speed_step", "", False, {"ratio": 3.0})
    assert Outcome([other, slow, lower()]).says.startswith("costs 18%")
    wrong = Finding("served", "other items", False, {"rule": "served"})
    assert Outcome([lower(), wrong]).says == "breaks the run: other items"


def test_which_costs_are_compared_again():
    names = ("speed_service", "launches", "syncs", "final")
    assert culprit.costs_of([Finding(name, "", False) for name in names]) == ["service", "step"]
    assert culprit.costs_of([lower()]) == []


class Drawn(culprit.Trials):
    """A learner worse by some share of the margin of one run; `ran` has the seeds of its runs."""

    def __init__(self, folder, short):
        super().__init__(None, folder)
        margins = json.loads(system.MARGINS.read_text(encoding="utf-8"))
        self.users = 900
        self.gap = short * margins["z"] * margins["spread"]["retrieval"] / self.users**0.5
        self.ran = []

    def figures(self, roots, seed):
        found = {name: np.full(self.users, 0.5) for name in (*system.FIGURES, "popularity")}
        found["final"] = found["final"] + 0.1
        if roots[0] != REFERENCE:
            self.ran.append(seed)
            found["retrieval"] = found["retrieval"] - self.gap
        return found


@pytest.mark.parametrize(
    ("short", "red", "ran"),
    [(0.1, False, [0]), (0.5, False, [0, 1]), (0.8, True, [0, 1]), (1.2, True, [0])],
)
def test_in_doubt_a_part_runs_with_both_seeds_of_the_verdict(tmp_path, short, red, ran):
    """Over two runs chance explains less: what the verdict is red for, one run may not show."""
    trials = Drawn(tmp_path, short)
    assert [f.name for f in trials.outcome([tmp_path, SRC]).reds] == ["retrieval"] * red
    assert trials.ran == ran
