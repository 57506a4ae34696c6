"""`lom-export`, also `python -m lom_export`: where an extra is not installed, says which one instead of a traceback."""

import sys


def main() -> None:
    """Runs the program."""
    try:
        from lom_export.main import main as program
    except ModuleNotFoundError as error:
        sys.exit(f"lom-export: {error.name} is missing: pip install 'lom[export]'")
    program()


if __name__ == "__main__":
    main()
