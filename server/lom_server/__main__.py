"""`lom-serve`, also `python -m lom_server`: where an extra is not installed, says which one instead of a traceback."""

import sys


def main() -> None:
    """Runs the program."""
    try:
        from lom_server.main import main as program
    except ModuleNotFoundError as error:
        sys.exit(f"lom-serve: {error.name} is missing: pip install 'lom[server]'")
    program()


if __name__ == "__main__":
    main()
