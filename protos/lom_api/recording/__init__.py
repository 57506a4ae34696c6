"""Recordings of served traffic: written beside the answers, kept through a crash, finished into Minari datasets.

What client and server both write and read: the spool, an append-only file that a process leaves behind however it ends
(`spool`), the queue and the thread that feed it (`recorder`), and the dataset that comes of it (`dataset`). Only the
last one needs h5py, and imports it when it is called.
"""

from lom_api.recording.dataset import MissingH5pyError, RecordingError, finish_recordings, read_recording, require_h5py
from lom_api.recording.recorder import Recorder
from lom_api.recording.spool import Golden, Layout, Step

__all__ = [
    "Golden",
    "Layout",
    "MissingH5pyError",
    "Recorder",
    "RecordingError",
    "Step",
    "finish_recordings",
    "read_recording",
    "require_h5py",
]
