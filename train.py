"""Run one job: ``composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]``."""

import sys

from llmprune.errors import UserError


def main(arguments: list[str]) -> int:
    """Train as the YAML says; 0 = done, 2 = a mistake of the user's, told in one line."""
    if not arguments:
        print("usage: composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]", file=sys.stderr)
        return 2
    try:
        if arguments[0] in ("-h", "--help"):
            from llmprune.config import describe

            print(f"composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]\n\n{describe()}")
            return 0
        from llmprune.config import load_config
        from llmprune.training import train

        train(load_config(arguments[0], arguments[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
