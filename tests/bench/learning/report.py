"""Tables and pictures."""

from tests.bench.learning.results import Results


def write(results: Results) -> None:
    """Not there yet."""
