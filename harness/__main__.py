"""`python -m harness ...` acts on the checkout it is called in, whichever one it comes from.

`./kata` names the checkout in KATA_ROOT. Otherwise it is looked for from the current directory
upwards; outside any checkout it is the one that this file lies in.
"""

import os
import sys


def checkout(start):
    """The nearest folder from `start` upwards that is a checkout of this repository, or None."""
    folder = os.path.abspath(start)
    while not os.path.isfile(os.path.join(folder, "harness", "__main__.py")):
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent
    return folder


def main():
    own = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    root = os.environ.pop("KATA_ROOT", None) or checkout(os.getcwd()) or own
    if os.path.realpath(root) != own:  # let that checkout's harness do it
        for name in [name for name in sys.modules if name.partition(".")[0] == "harness"]:
            del sys.modules[name]
        sys.path.insert(0, root)
    from harness.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
