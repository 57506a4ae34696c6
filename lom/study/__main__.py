"""`lom-study`, also `python -m lom.study`: where an extra is not installed, says which one instead of a traceback."""

import sys


def main() -> None:
    """Runs the program."""
    try:
        from lom.study.main import main as program
    except ModuleNotFoundError as error:
        sys.exit(f"lom-study: {error.name} is missing: pip install 'lom[study]'")
    program()


if __name__ == "__main__":
    main()
