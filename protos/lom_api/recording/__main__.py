"""`python -m lom_api.recording DIR`: makes datasets of the recordings that were not finished."""

import os
import sys
from pathlib import Path

from lom_api.recording.dataset import RecordingError, finish_recordings


def main() -> int:
    """Prints the datasets that it made; 0, 1 where the disk or a spool would not, 2 where it was asked wrongly."""
    if len(sys.argv) != 2:
        print("usage: python -m lom_api.recording DIR", file=sys.stderr)
        return 2
    os.nice(19)  # a robot may be served meanwhile
    try:
        for path in finish_recordings(Path(sys.argv[1])):
            print(path, flush=True)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, RecordingError) as error:
        print(f"the recording could not be finished: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
