"""constraints.txt pins all that is installed, for each Python that is supported."""

from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.bootstrap import requirements
from harness.paths import ROOT

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def pins(python):
    """Package name -> its pin on a version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            found[canonicalize_name(pin.name)] = pin
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_exact_pin(python):
    pinned = pins(python)
    for text in requirements(str(ROOT)):
        dependency = Requirement(text)
        if dependency.marker and not dependency.marker.evaluate({"python_version": python}):
            continue
        (specifier,) = pinned[canonicalize_name(dependency.name)].specifier
        assert specifier.operator == "=="
        assert dependency.specifier.contains(specifier.version)


def test_torch_is_pinned():
    assert str(pins("3.12")["torch"].specifier) == "==2.13.0"


def test_what_the_dependencies_bring_along_is_pinned_too():
    environment = default_environment()
    pinned = pins(environment["python_version"])
    waiting = [(Requirement(text), "") for text in requirements(str(ROOT))]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in seen or name.startswith("nvidia-"):  # torch itself fixes those
            continue
        seen.add(name)
        assert name in pinned
        waiting += [(Requirement(text), "") for text in metadata.requires(name) or []]
    assert len(seen) > 30
