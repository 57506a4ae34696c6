"""`python -m lom_api.recording DIR`: makes datasets of the recordings that were not finished."""

import os
import sys
from pathlib import Path

from lom_api.recording.dataset import DAMAGED, FAILED, MissingH5pyError, RecordingError, require_h5py, write_datasets

_WRONG_USE = 2


def main() -> int:
    """Prints the datasets that it made; 0, `FAILED`, `DAMAGED`, or 2 where it was asked wrongly."""
    if len(sys.argv) != 2:
        return _complain("usage: python -m lom_api.recording DIR", _WRONG_USE)
    os.nice(19)  # a robot may be served meanwhile
    try:
        require_h5py()
        for path in write_datasets(Path(sys.argv[1])):
            print(path, flush=True)
    except MissingH5pyError as error:
        return _complain(str(error), _WRONG_USE)
    except RecordingError as error:
        return _complain(str(error), DAMAGED)
    except OSError as error:
        return _complain(f"the recording could not be finished: {error}", FAILED)
    return 0


def _complain(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
