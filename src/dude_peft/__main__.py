"""`python -m dude_peft` is the command `dude`."""

from dude_peft.cli import main

if __name__ == "__main__":
    main()
