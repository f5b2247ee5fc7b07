"""--impl: the traps that swapping implementations has fallen into, one test each."""

import os
import re
import sys
import textwrap

import pytest

from harness import overlay
from harness.errors import UsageError
from harness.overlay import Root

WRONG = """
def scale(x, *, factor=2):
    return x + factor

def total(values):
    return 0
"""
RIGHT = """
def scale(x, *, factor=2):
    if factor == float("inf"):
        raise ValueError("factor")
    return x * factor

def total(values):
    return sum(values)
"""


def passed(run):
    """Numbers of passed and failed tests in pytest's last line."""
    last = run.out.strip().splitlines()[-1]
    count = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed)", last)}
    return count.get("passed", 0), count.get("failed", 0)


# --- the ways to call it --------------------------------------------------------------------------


def test_src_is_the_default(checkout):
    assert passed(checkout.pytest("katas/01_scale")) == (0, 4)
    checkout.solve()
    assert passed(checkout.pytest("katas/01_scale")) == (4, 0)


def test_reference(checkout):
    run = checkout.pytest("katas", "--impl", "reference")
    assert (run.code, passed(run)) == (0, (5, 0)), run


def test_with_a_space_and_with_an_equals_sign(checkout):
    layer = checkout.layer("right", RIGHT)
    for given in (["--impl", layer], [f"--impl={layer}"]):
        run = checkout.pytest(*given, "katas/01_scale")
        assert (run.code, passed(run)) == (0, (4, 0)), run


def test_a_path_in_another_project_does_not_bring_its_settings(checkout):
    """`--impl PATH katas` looks like two folders of tests; PATH may lie in a project of its own."""
    layer = checkout.layer("other/impl", RIGHT)
    (layer.parent / "tox.ini").write_text("[pytest]\naddopts = --nonsense-option\n")
    run = checkout.pytest(f"--impl={layer}", "katas/01_scale")
    assert passed(run) == (4, 0), run
    (layer.parent / "tox.ini").write_text("[pytest]\npython_functions = nothing\n")
    run = checkout.pytest("--impl", layer, "katas/01_scale")
    assert passed(run) == (4, 0), run


def test_from_another_directory(checkout):
    checkout.layer("right", RIGHT)
    run = checkout.pytest(
        checkout.root / "katas/01_scale", "--impl", "right", cwd=checkout.root.parent
    )
    assert (run.code, passed(run)) == (0, (4, 0)), run
    run = checkout.pytest("01_scale", "--impl=../../right", cwd=checkout.root / "katas")
    assert (run.code, passed(run)) == (0, (4, 0)), run


def test_a_folder_called_like_a_name_does_not_shadow_it(checkout):
    (checkout.root / "reference").mkdir()
    assert passed(checkout.pytest("--impl", "reference", "katas/01_scale")) == (4, 0)


def test_quiet(checkout):
    layer = checkout.layer("right", RIGHT)
    run = checkout.pytest("-q", "katas/01_scale", "--impl", layer)
    assert (run.code, passed(run)) == (0, (4, 0)), run


def test_two_workers(checkout):
    checkout.layer("right", RIGHT)
    run = checkout.pytest("-p", "xdist", "-n", "2", "katas/01_scale", "--impl", "../right")
    assert (run.code, passed(run)) == (0, (4, 0)), run
    run = checkout.pytest("-p", "xdist", "-n", "2", "katas/01_scale")
    assert (run.code, passed(run)) == (1, (0, 4)), run


def test_by_node_id(checkout):
    layer = checkout.layer("right", RIGHT)
    node = "katas/01_scale/test_spec.py::test_total"
    for order in ([node, "--impl", layer], ["--impl", layer, node]):
        run = checkout.pytest(*order)
        assert (run.code, passed(run)) == (0, (1, 0)), run


def test_from_the_environment(checkout):
    run = checkout.pytest("katas/01_scale", KATA_IMPL="reference")
    assert passed(run) == (4, 0), run
    wrong = checkout.layer("wrong", WRONG)
    run = checkout.pytest("katas/01_scale", "--impl", wrong, KATA_IMPL="reference")
    assert passed(run) == (0, 4), "the option wins over the environment"


def test_the_first_wins_and_src_is_last(checkout):
    wrong, right = checkout.layer("wrong", WRONG), checkout.layer("right", RIGHT)
    checkout.solve()
    for first, second, expected in ((wrong, right, (0, 4)), (right, wrong, (4, 0))):
        run = checkout.pytest("katas/01_scale", "--impl", first, "--impl", second)
        assert passed(run) == expected, run
    other = checkout.layer("unrelated", "", file="models/unrelated.py")
    assert passed(checkout.pytest("katas/01_scale", "--impl", other)) == (4, 0)


def test_mine_fills_the_gaps_with_the_reference(checkout):
    assert passed(checkout.pytest("katas", "--impl", "mine")) == (5, 0)
    checkout.scale.write_text(WRONG)  # written, so it counts, and kata 02 runs on it
    run = checkout.pytest("katas", "--impl", "mine")
    assert passed(run) == (0, 5), run
    checkout.scale.unlink()
    assert passed(checkout.pytest("katas", "--impl", "mine")) == (5, 0)


def test_wrong_paths_are_usage_errors(checkout):
    run = checkout.pytest("katas", "--impl", "nowhere")
    assert run.code == 4 and "there is no folder" in run.err and "recsys" in run.err, run
    (checkout.root / "empty").mkdir()
    run = checkout.pytest("katas", "--impl", "empty")
    assert run.code == 4 and "has no folder `recsys`" in run.err, run
    with pytest.raises(UsageError, match=r"did you mean .*src\?"):
        overlay.resolve(["recsys"], checkout.root / "src")


# --- the traps ------------------------------------------------------------------------------------


def test_an_edit_within_a_second_counts(checkout):
    """A .pyc with the same time and size as the edited source is not used."""
    checkout.scale.write_text(RIGHT)
    stamp = checkout.scale.stat().st_mtime
    compiled = checkout.python("-c", "import recsys.models.scale", PYTHONPATH="src")
    assert compiled.code == 0 and list(checkout.scale.parent.glob("__pycache__/scale*.pyc"))
    edited = RIGHT.replace("x * factor", "x - factor")
    assert len(edited) == len(RIGHT)
    checkout.scale.write_text(edited)
    os.utime(checkout.scale, (stamp, stamp))
    # without the harness, Python runs the old code: the trap is there
    code = "import recsys.models.scale as m; print(m.scale(5))"
    assert checkout.python("-c", code, PYTHONPATH="src").out == "10\n"
    run = checkout.pytest("katas/01_scale")
    assert passed(run) == (2, 2), run


def test_a_run_leaves_no_pyc_behind(checkout):
    checkout.solve()
    checkout.pytest("katas")
    found = [file for part in ("src", "katas") for file in (checkout.root / part).rglob("*.pyc")]
    assert not found


@pytest.mark.parametrize("place", ["src/recsys", "src/recsys/models"])
def test_a_planted_init_is_ignored(checkout, place):
    (checkout.root / place / "__init__.py").write_text("raise RuntimeError('planted')\n")
    right = checkout.layer("right", RIGHT)
    run = checkout.pytest("katas/01_scale", "--impl", right)
    assert passed(run) == (4, 0), run
    (right / "recsys/__init__.py").write_text("raise RuntimeError('planted')\n")
    assert passed(checkout.pytest("katas/01_scale", "--impl", right)) == (4, 0)


def test_two_runs_in_one_process_do_not_share_modules(checkout):
    """A wrong implementation must not pass from the cache, nor an edited spec stay as it was."""
    wrong = checkout.layer("wrong", WRONG)
    script = f"""
        import pathlib, pytest
        node = "katas/01_scale/test_spec.py"
        codes = [int(pytest.main([node, "-q", "--impl", impl])) for impl in
                 ("reference", {str(wrong)!r}, "reference")]
        spec = pathlib.Path(node)
        spec.write_text(spec.read_text().replace("42", "43"))
        codes.append(int(pytest.main([node, "-q", "--impl", "reference"])))
        print("codes", codes)
    """
    run = checkout.python("-c", textwrap.dedent(script), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "codes [0, 1, 0, 1]" in run.out, run


def test_a_module_from_the_wrong_root_is_found_out(checkout):
    """A module that somebody else put into sys.modules is not tested as the learner's."""
    right = checkout.layer("right", RIGHT)
    checkout.spec.write_text(
        checkout.spec.read_text()
        + textwrap.dedent(
            f"""
            def test_planted():
                import importlib.util, sys
                spec = importlib.util.spec_from_file_location(
                    "recsys.models.scale", {str(right / "recsys/models/scale.py")!r})
                module = importlib.util.module_from_spec(spec)
                sys.modules["recsys.models.scale"] = module
                spec.loader.exec_module(module)
                assert models.total([1]) == 1
            """
        )
    )
    run = checkout.pytest("katas/01_scale", "-k", "planted", "--impl", "reference")
    assert run.code == 1 and "was loaded from" in run.out, run


def test_spawned_children_see_the_same_roots(checkout):
    checkout.spec.write_text(
        checkout.spec.read_text()
        + textwrap.dedent(
            """
            def test_children():
                import multiprocessing, subprocess, sys
                code = "from recsys.models.scale import total; print(total([1, 2]))"
                child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                assert child.stdout == "3\\n", child.stderr
                context = multiprocessing.get_context("spawn")
                with context.Pool(1) as pool:
                    assert pool.apply(models.total, ([1, 2],)) == 3
            """
        )
    )
    node = "katas/01_scale/test_spec.py::test_children"
    run = checkout.pytest(node, "--impl", "reference")
    assert run.code == 0, run
    assert checkout.pytest(node).code == 1, "src is a stub"


def test_the_order_is_that_of_the_spec_and_repeatable(checkout):
    folder = checkout.root / "katas/01_scale"
    for name in ("test_cost.py", "test_properties.py", "test_bench.py"):
        text = checkout.spec.read_text().replace("def test_", f"def test_{name[5]}_")
        (folder / name).write_text(text)
    runs = [checkout.pytest("katas/01_scale", "--collect-only", "-q").out for _ in range(2)]
    found, again = ([line for line in run.splitlines() if "::" in line] for run in runs)
    assert found == again
    files = dict.fromkeys(line.partition("::")[0].rpartition("/")[2] for line in found)
    assert list(files) == ["test_spec.py", "test_properties.py", "test_cost.py", "test_bench.py"]
    spec = [line for line in found if "test_spec" in line]
    assert [line.partition("::")[2] for line in spec] == [
        "test_doubles",
        "test_factor",
        "test_refuses_infinity",
        "test_total",
    ]


def test_a_syntax_error_costs_no_test_ids(checkout):
    checkout.scale.write_text("def scale(:\n")
    run = checkout.pytest("katas/01_scale")
    assert (run.code, passed(run)) == (1, (0, 4)), run


def test_learner_code_used_at_import_of_a_spec_is_refused(checkout):
    checkout.spec.write_text(checkout.spec.read_text() + "\nscale = models.scale\n")
    run = checkout.pytest("katas/01_scale", "--impl", "reference")
    assert run.code == 2 and "use it inside a test" in run.out, run


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture
def clean():
    """The overlay as it was, afterwards."""
    before = overlay.installed() if overlay.is_installed() else None
    yield
    overlay.uninstall()
    overlay.purge()
    if before is not None:
        overlay.install(before)


def test_install_and_uninstall_leave_nothing(clean, tmp_path):
    overlay.uninstall()
    before = list(sys.path), list(sys.meta_path), dict(os.environ)
    overlay.install([Root("one", tmp_path)])
    assert str(tmp_path) == sys.path[0] == os.environ["PYTHONPATH"].split(os.pathsep)[0]
    overlay.install([Root("two", tmp_path / "two")])
    assert str(tmp_path) not in sys.path
    overlay.uninstall()
    assert (sys.path, sys.meta_path, dict(os.environ)) == before


def test_who(checkout):
    code = (
        "from harness import overlay; "
        "overlay.install(overlay.resolve(%r, '.')); print(overlay.who())"
    )
    right = checkout.layer("right", RIGHT)

    def who(*impls):
        return eval(checkout.python("-c", code % (impls,)).out)

    assert who() == {"models/scale.py": "stub", "models/shift.py": "stub"}
    assert who("mine") == {"models/scale.py": "reference", "models/shift.py": "reference"}
    checkout.solve()
    assert who("mine") == {"models/scale.py": "yours", "models/shift.py": "reference"}
    assert who(str(right)) == {"models/scale.py": str(right), "models/shift.py": "stub"}


def test_using_leaves_things_as_they_were(clean, tmp_path):
    """Also where what it is used for raises; what was in force before is in force again."""
    overlay.install([Root("before", tmp_path)])
    with pytest.raises(KeyError), overlay.using([Root("meanwhile", tmp_path / "two")]):
        assert [root.name for root in overlay.installed()] == ["meanwhile"]
        raise KeyError
    assert [root.name for root in overlay.installed()] == ["before"]
    overlay.uninstall()
    import recsys.data.errors as errors

    with overlay.using([Root("meanwhile", tmp_path)]):
        assert overlay.is_installed() and "recsys.data.errors" not in sys.modules
    assert not overlay.is_installed()
    assert sys.modules["recsys.data.errors"] is errors
