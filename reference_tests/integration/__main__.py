"""What the integration kata's verdict rests on, measured.

    python -m reference_tests.integration margins   # writes fixtures/10_integration/margins.json
    python -m reference_tests.integration costs     # writes costs.json
    python -m reference_tests.integration table     # writes docs/integration.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from reference_tests.integration import costs, margins, table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reference_tests.integration")
    commands = parser.add_subparsers(required=True)
    for module in (margins, costs, table):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, description=module.__doc__)
        command.set_defaults(main=module.main)
        module.arguments(command)
    args = parser.parse_args(argv)
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
