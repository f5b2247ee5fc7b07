"""`kata test`: isolated runs; what has no result is red, and why is said."""

import json
import sys
import textwrap
import time

import pytest

from harness import runner

RUN = """
import json
from harness import catalog, runner
result = runner.run_kata(catalog.find("01"), {impls!r}, timeout={timeout})
print(json.dumps([result.ok, result.rungs, result.reason, len(result.reds)]))
"""
SCALE = """import os, subprocess, time
def scale(x, *, factor=2):
    {body}
def total(values):
    return sum(values)
"""


def run(checkout, *impls, timeout=60):
    """[ok, rungs, reason, number of reds] of kata 01."""
    done = checkout.python("-c", RUN.format(impls=impls, timeout=timeout))
    assert done.code == 0, done
    return json.loads(done.out)


def scale(body):
    return SCALE.format(body=body)


def test_results_per_rung(checkout):
    ok, rungs, reason, reds = run(checkout)
    assert (ok, reason, reds) == (False, "", 4) and set(rungs.values()) == {"failed"}
    checkout.scale.write_text(scale("return x * factor"))
    ok, rungs, reason, reds = run(checkout)
    assert (ok, reason, reds) == (False, "", 1)
    assert [name for name, outcome in rungs.items() if outcome == "failed"] == [
        "test_refuses_infinity"
    ]
    assert run(checkout, "reference")[0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os._exit(0)", "ended early, in test_doubles"),
        ("os._exit(1)", "ended early, in test_doubles"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV, in test_doubles"),
        ("time.sleep(600)", "longer than 5 s, in test_doubles"),
    ],
    ids=["exit 0", "exit 1", "segfault", "hang"],
)
def test_no_result_is_red_with_the_reason(checkout, body, says):
    checkout.scale.write_text(scale(body))
    ok, rungs, reason, _ = run(checkout, timeout=5 if "sleep" in body else 60)
    assert not ok and says in reason, reason
    assert len(rungs) == 4 and set(rungs.values()) == {"failed"}


def test_what_a_test_prints_does_not_fill_the_disk(checkout):
    """pytest captures it in a file, which may grow to a limit."""
    checkout.scale.write_text(scale("[os.write(2, b'y' * 100_000) for _ in iter(int, 1)]"))
    ok, rungs, reason, _ = run(checkout)
    assert not ok and rungs["test_doubles"] == "failed"
    assert reason == "", "it ended by the limit, not by the timeout"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("while True: print('y' * 1000)", "it printed more than 1 MB"),
        ("import time; print(1, flush=True); time.sleep(600)", "it took longer than 2 s"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise SystemExit(7)", "exit code 7"),
        ("print(1)", ""),
    ],
)
def test_a_child(tmp_path, code, says):
    child = runner.Child([sys.executable, "-c", code], tmp_path / "results", memory=False)
    reason = child.wait(2 if "sleep" in code else 60)
    assert says in reason and bool(says) == bool(reason)
    assert len(child.output()) <= runner.OUTPUT_LIMIT


def test_processes_left_behind_are_ended(checkout):
    marker = checkout.root / "alive"
    checkout.scale.write_text(
        scale(f"subprocess.Popen(['sh', '-c', 'sleep 3; touch {marker}']); return 1")
    )
    run(checkout)
    time.sleep(4)
    assert not marker.exists()


def test_a_rung_is_all_its_cases(checkout):
    checkout.spec.write_text(
        textwrap.dedent(
            """
            import pytest
            from harness.spec import assert_equal, learner, rung

            models = learner("models.scale")

            @rung(hint="")
            @pytest.mark.parametrize("x", [1, 2, 3])
            def test_cases(x):
                assert_equal(models.scale(x), 2 * x)

            @rung(hint="")
            def test_skipped():
                pytest.skip("never green")
            """
        )
    )
    checkout.scale.write_text(scale("return 2 * x if x != 2 else 5"))
    ok, rungs, reason, _ = run(checkout)
    assert rungs == {"test_cases": "failed", "test_skipped": "failed"}
    checkout.scale.write_text(scale("return 2 * x"))
    ok, rungs, reason, _ = run(checkout)
    assert not ok and rungs == {"test_cases": "passed", "test_skipped": "failed"}


def test_a_kata_without_rungs_or_that_cannot_be_collected_is_red(checkout):
    checkout.spec.write_text("x = 1\n")
    assert not run(checkout)[0]
    checkout.spec.write_text("import nonsense\n\n@rung(hint='')\ndef test_a(): pass\n")
    ok, rungs, reason, _ = run(checkout)
    assert (ok, rungs) == (False, {"test_a": "failed"}) and "exit code 2" in reason


# --- the command ----------------------------------------------------------------------------------


def test_kata_test_records_the_learners_own_runs_only(checkout):
    done = checkout.kata("test", "1", "--impl", "reference")
    assert done.code == 0 and "4/4 rungs" in done.out, done
    assert not (checkout.root / ".kata/record.json").exists()
    done = checkout.kata("test")
    assert done.code == 1 and "write scale in" in done.out, done
    checkout.solve()
    done = checkout.kata("test", "01")
    assert done.code == 0 and "passing" in done.out, done
    table = json.loads((checkout.root / ".kata/record.json").read_text())["katas"]
    assert set(table["01_scale"]["rungs"].values()) == {"passed"}
    assert set(table["02_shift"]["rungs"].values()) == {"failed"}


def test_usage(checkout):
    assert checkout.kata("test", "77").code == 2
    done = checkout.kata("test", "--impl", "nowhere")
    assert done.code == 2 and "there is no folder" in done.err, done
