"""`kata hint`, `kata guide`, `kata solution`: what is shown, and when."""


def test_hints_follow_the_first_red_rung(checkout):
    first = checkout.kata("hint", "01")
    assert first.code == 0 and "rung 1 of 4: doubles" in first.out and "Multiply." in first.out
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x * factor\n")
    checkout.kata("test", "01")
    one = checkout.kata("hint", "01")
    assert "rung 3 of 4: refuses infinity" in one.out and "hint 1 of 2\n  Check it." in one.out
    two = checkout.kata("hint", "01")
    assert "hint 2 of 2\n  math.isfinite" in two.out and "last" not in two.out
    assert "That was the last one" in checkout.kata("hint", "01").out


def test_a_result_that_is_stale_is_said(checkout):
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x * factor\n")
    checkout.kata("test", "01")
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return factor * x\n")
    assert "changed since: kata test 01" in checkout.kata("hint", "01").out


def test_no_hint_for_what_passes(checkout):
    checkout.solve()
    checkout.kata("test", "01")
    assert "nothing to hint at" in checkout.kata("hint", "01").out


def test_a_broken_file_of_hints_begins_anew(checkout):
    checkout.kata("hint", "01")
    (checkout.root / ".kata/hints.json").write_text("{")
    done = checkout.kata("hint", "01")
    assert done.code == 0 and "hint 1 of 1" in done.out


def test_the_guide(checkout):
    missing = checkout.kata("guide", "01")
    assert missing.code == 2 and "there is no docs/guides/01-scale.md" in missing.err
    (checkout.root / "docs/guides").mkdir(parents=True)
    (checkout.root / "docs/guides/01-scale.md").write_text("# 01 Scale\n\n- one\n")
    assert checkout.kata("guide", "1").out == "# 01 Scale\n\n- one\n"
    (checkout.root / "docs/guides/00-overview.md").write_text("# 00 Overview\n")
    assert checkout.kata("guide", "00").out == checkout.kata("guide", "0").out == "# 00 Overview\n"


def test_the_solution_comes_after_the_kata(checkout):
    refused = checkout.kata("solution", "01")
    assert refused.code == 1 and "not started" in refused.out and "math" not in refused.out
    assert "return sum(values)" in checkout.kata("solution", "01", "--spoil").out
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x + factor\n")
    assert checkout.kata("solution", "01").code == 1
    checkout.solve()
    text = checkout.scale.read_text().replace("sum(values)", "sum(list(values))")
    checkout.scale.write_text(text)
    checkout.kata("test", "01")
    done = checkout.kata("solution", "01")
    assert done.code == 0
    assert "-    return sum(list(values))\n+    return sum(values)" in done.out, done


def test_the_solution_of_ones_own(checkout):
    checkout.solve()
    checkout.kata("test", "01")
    assert "is the reference's" in checkout.kata("solution", "01").out
