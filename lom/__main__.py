"""`lom-train`, also `python -m lom`: where an extra is not installed, says which one instead of a traceback."""

import sys


def main() -> None:
    """Runs the program."""
    try:
        from lom.train import main as program
    except ModuleNotFoundError as error:
        sys.exit(f"lom-train: {error.name} is missing: pip install 'lom[train]'")
    program()


if __name__ == "__main__":
    main()
