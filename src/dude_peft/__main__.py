"""The command `dude`, also as `python -m dude_peft`: nothing is imported before a Ctrl-C ends it with its line."""

import sys


def main() -> None:
    """Entry point of the console script; `dude_peft.cli.main` is the command."""
    try:
        from dude_peft.cli import main as command
    except KeyboardInterrupt:
        print("dude: error[interrupted]: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
