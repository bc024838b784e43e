"""`python -m endoreward_fast` is the `endoreward` command."""

from .command.cli import main

if __name__ == "__main__":
    main()
