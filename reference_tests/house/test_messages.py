"""The one-screen message, as transcripts of a miniature checkout, and what it leaves intact."""

import re
import textwrap
import xml.etree.ElementTree as ElementTree

import pytest

SCALE = """def scale(x, *, factor=2):
    return {scale}


def total(values):
    return {total}
"""


def screen(run):
    """The output without the seconds, which differ."""
    assert "Traceback" not in run.out and not run.err, run
    *lines, last = run.out.strip("\n").splitlines()
    return [*lines, re.sub(r" in [\d.]+s.*", "", last).strip("= ")]


def written(scale="x * factor", total="sum(values)"):
    return SCALE.format(scale=scale, total=total)


def transcript(text):
    return textwrap.dedent(text).strip("\n").splitlines()


# --- transcripts ----------------------------------------------------------------------------------


def test_a_stub(checkout):
    assert screen(checkout.pytest("katas/01_scale")) == transcript(
        """
        ============================= test session starts ==============================
        collected 4 items

        katas/01_scale/test_spec.py FFFF                                         [100%]

        kata 01 Scale, rung 1 of 4: doubles
        The default factor is 2.

          not written  write scale in src/recsys/models/scale.py:6
          what it does  The value times the factor.

        +2 red, same cause
        +1 red, not written yet
        next: write it, then  pytest katas/01_scale   guide: kata guide 01
        4 failed
        """
    )


def test_a_wrong_value(checkout):
    checkout.scale.write_text(written(scale="x * 2"))
    assert screen(checkout.pytest("katas/01_scale", "-q")) == transcript(
        """
        .FF.                                                                     [100%]
        kata 01 Scale, rung 2 of 4: factor
        The factor multiplies.

          called       scale(5, factor=3)
          came back    10 (int)
          expected     15 (int)
          contract     src/recsys/models/scale.py:1 scale

        +1 red: refuses_infinity
        next: pytest katas/01_scale   guide: kata guide 01
        2 failed, 2 passed
        """
    )


def test_an_exception_in_the_learners_code(checkout):
    checkout.scale.write_text(written(total="values.sum()"))
    run = checkout.pytest("katas/01_scale", "-q", "-k", "total")
    assert screen(run)[1:-1] == transcript(
        """
        kata 01 Scale, rung 4 of 4: total
        The total counts every value.

          called       total([1, 2, 3])
          raised       AttributeError: 'list' object has no attribute 'sum'
          in           src/recsys/models/scale.py:6 total
                       return values.sum()

        next: pytest katas/01_scale   guide: kata guide 01
        """
    )


def test_a_syntax_error(checkout):
    checkout.scale.write_text("def scale(x):\n    return (x\n")
    assert screen(checkout.pytest("katas/01_scale", "-q"))[1:-1] == transcript(
        """
        kata 01 Scale, rung 1 of 4: doubles
        The default factor is 2.

          SyntaxError  '(' was never closed, in src/recsys/models/scale.py:2
                       return (x
                              ^

        +3 red, same cause
        next: pytest katas/01_scale   guide: kata guide 01
        """
    )


def test_an_import_error(checkout):
    checkout.scale.write_text("import math\nfrom math import nonsense\n")
    lines = screen(checkout.pytest("katas/01_scale", "-q"))[4:-1]
    assert lines[:2] == [
        "  import       src/recsys/models/scale.py cannot be imported",
        "  raised       ImportError: cannot import name 'nonsense' from 'math'",
    ]
    assert lines[-5:] == [
        "  in           src/recsys/models/scale.py:2",
        "               from math import nonsense",
        "",
        "+3 red, same cause",
        "next: pytest katas/01_scale   guide: kata guide 01",
    ]


def test_an_error_at_import_is_not_the_tests_fault(checkout):
    checkout.scale.write_text("LIMIT = undefined_name\n")
    lines = "\n".join(screen(checkout.pytest("katas/01_scale", "-q")))
    assert "cannot be imported" in lines and "src/recsys/models/scale.py:1" in lines
    assert "NameError: name 'undefined_name' is not defined" in lines


def test_an_endless_loop(checkout):
    checkout.scale.write_text(written(scale="[None for _ in iter(int, 1)]"))
    run = checkout.pytest("katas/01_scale", "-k", "doubles", KATA_RUNG_SECONDS="0.5")
    lines = "\n".join(screen(run))
    assert run.code == 1 and "TimeoutError: the rung took longer than 0.5 s" in lines, run
    assert "called       scale(21)" in lines and "src/recsys/models/scale.py:2" in lines


def test_a_missing_name_and_a_missing_file(checkout):
    checkout.scale.write_text("def total(values):\n    return sum(values)\n")
    lines = "\n".join(screen(checkout.pytest("katas/01_scale", "-q")))
    assert "src/recsys/models/scale.py has no `scale`" in lines
    checkout.scale.unlink()
    lines = "\n".join(screen(checkout.pytest("katas/01_scale", "-q")))
    assert "there is no src/recsys/models/scale.py" in lines and "kata reset 01" in lines
    assert "4 failed" in lines


def test_a_prerequisite_that_is_a_stub(checkout):
    solution = checkout.root / "reference_tests/solution/recsys/models/shift.py"
    (checkout.root / "src/recsys/models/shift.py").write_text(solution.read_text())
    assert screen(checkout.pytest("katas/02_shift", "-q"))[1:-1] == transcript(
        """
        kata 02 Shift, rung 1 of 1: shift
        Twice and one more.

          needs 01     kata 01 first: write scale in src/recsys/models/scale.py:6
          or           run with --impl mine: the reference stands in for what you did
                       not write

        next: write it, then  pytest katas/02_shift   guide: kata guide 02
        """
    )
    assert checkout.pytest("katas/02_shift", "--impl", "mine").code == 0


def test_a_stub_cannot_pass_as_a_refusal(checkout):
    """`expect_error` does not take the stub's own exception for an answer."""
    checkout.spec.write_text(
        "from harness.spec import expect_error, learner, rung\n\n"
        'models = learner("models.scale")\n\n\n'
        '@rung(hint="")\ndef test_any():\n    expect_error(lambda: models.scale(1), Exception)\n'
    )
    assert "not written" in checkout.pytest("katas/01_scale").out


def test_a_green_kata_and_the_board(checkout):
    """Plain pytest records nothing: who uses nothing else is told how the board gets to know."""
    checkout.solve()
    said = "kata 01 is green. next: kata test 01 puts it on the board"
    assert said in checkout.pytest("katas/01_scale").out
    for options in (["-k", "doubles"], ["--impl", "mine"]):
        assert "is green" not in checkout.pytest("katas/01_scale", *options).out
    spec = checkout.spec.read_text()
    checkout.spec.write_text(spec + "\n\ndef test_more():\n    assert False\n")
    for options in ([], ["--tb=long"]):
        assert "is green" not in checkout.pytest("katas/01_scale", *options).out


def test_several_katas_show_one(checkout):
    lines = screen(checkout.pytest("katas", "-q"))
    assert lines[1].startswith("kata 01 Scale, rung 1 of 4")
    assert "+1 red in other katas: 02 (1)" in lines and len(lines) <= 24


# --- one screen -----------------------------------------------------------------------------------

LONG = "x" * 3000
HORRORS = {
    "long error": written(scale=f"int('{LONG}')"),
    "long value": written(scale=f"'{LONG}'"),
    "long line": written(scale="1 / 0  # " + LONG),
    "long import": f"import {LONG}\n",
    "long syntax": "\n" * 500 + f"def scale(x): return ('{LONG}'\n",
    "recursion": written(scale="scale(x)"),
    "prints": written(scale="[print(line) for line in range(500)]"),
    "exit": "def scale(x, factor=2):\n    raise SystemExit(3)\n",
    "group": "def scale(x, factor=2):\n    raise ExceptionGroup('2', [KeyError(1), KeyError(2)])\n",
    "nothing": "",
}


@pytest.mark.parametrize("text", HORRORS.values(), ids=HORRORS)
def test_one_screen_without_frames(checkout, text):
    checkout.scale.write_text(text)
    run = checkout.pytest("katas/01_scale")
    lines = screen(run)
    assert run.code == 1 and " failed" in lines[-1], run
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, run
    assert not re.search(r"_pytest|pluggy|harness/|site-packages|def test_", run.out), run


# --- what stays as it was -------------------------------------------------------------------------


@pytest.mark.parametrize("option", [[], ["-q"], ["--tb=short"], ["-v"], ["-n", "2", "-p", "xdist"]])
def test_the_message_under_options(checkout, option):
    checkout.scale.write_text(written(scale="x * 2"))
    run = checkout.pytest("katas/01_scale", *option)
    assert run.code == 1 and "_____" not in run.out, run
    assert run.out.count("called       scale(5, factor=3)") == 1, run
    assert "+1 red: refuses_infinity" in run.out and "FAILED" not in run.out.split("kata 01")[1]


def test_from_elsewhere_and_by_node_id(checkout):
    node = f"{checkout.root}/katas/01_scale/test_spec.py::test_total"
    run = checkout.pytest(node, cwd=checkout.root.parent)
    assert run.code == 1 and "rung 4 of 4: total" in run.out, run
    assert "write total in src/recsys/models/scale.py:11" in run.out, run


@pytest.mark.parametrize("style", ["--tb=long", "--tb=native"])
def test_pytests_own_tracebacks_on_request(checkout, style):
    run = checkout.pytest("katas/01_scale", style)
    assert run.out.count("NotImplementedError: kata 01: write scale") >= 3, run
    assert "not written" not in run.out


def test_pdb_is_left_alone(checkout):
    run = checkout.pytest("katas/01_scale", "--pdb", "-x")
    assert "entering PDB" in run.out and "not written" not in run.out, run


def test_the_list_that_r_asks_for(checkout):
    run = checkout.pytest("katas/01_scale", "-rf")
    assert run.out.count("\nFAILED katas/01_scale/test_spec.py::test_") == 4, run
    assert run.out.count("write scale in") == 1


def test_junit_and_node_ids_are_intact(checkout):
    checkout.scale.write_text(written(scale="x * 2"))
    file = checkout.root / "junit.xml"
    checkout.pytest("katas/01_scale", f"--junitxml={file}")
    cases = ElementTree.parse(file).getroot().iter("testcase")
    found = {case.get("name"): case.find("failure") for case in cases}
    assert list(found) == ["test_doubles", "test_factor", "test_refuses_infinity", "test_total"]
    assert [name for name, failure in found.items() if failure is not None] == [
        "test_factor",
        "test_refuses_infinity",
    ]
    assert "scale(5, factor=3)" in found["test_factor"].text


def test_exit_codes_of_pytest(checkout):
    assert checkout.pytest("katas/01_scale").code == 1
    checkout.solve()
    assert checkout.pytest("katas/01_scale").code == 0
    assert checkout.pytest("katas/01_scale", "-k", "nothing").code == 5
    assert checkout.pytest("katas/09_none").code == 4


def test_other_tests_are_reported_as_ever(checkout):
    file = checkout.root / "reference_tests/test_other.py"
    file.write_text("def test_other():\n    one = 1\n    assert one == 2\n")
    run = checkout.pytest("reference_tests/test_other.py", "katas/01_scale")
    assert "_ test_other _" in run.out and "assert 1 == 2" in run.out, run
    assert run.out.count("FAILED ") == 1 and "not written" in run.out, run
    alone = checkout.pytest("reference_tests/test_other.py")
    assert "rootdir" in alone.out and "FAILED reference_tests/test_other.py" in alone.out


def test_devices(checkout):
    run = checkout.pytest("katas/01_scale", "--device", "gpu")
    assert run.code == 4 and "expected one of cpu, cuda, auto" in run.err, run
    assert checkout.pytest("katas/01_scale", "--impl=reference", KATA_DEVICE="auto").code == 0
    checkout.spec.write_text(
        checkout.spec.read_text()
        + "\n\ndef test_device():\n    from harness.spec import device\n"
        "    assert str(device()) == 'cpu'\n"
    )
    node = "katas/01_scale/test_spec.py::test_device"
    assert checkout.pytest(node, "--device=cpu").code == 0
    code = "import torch; print(torch.cuda.is_available())"
    if checkout.python("-c", code).out == "False\n":
        run = checkout.pytest(node, "--device", "cuda")
        assert run.code == 4 and "no CUDA device" in run.err, run
