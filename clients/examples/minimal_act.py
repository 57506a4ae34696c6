"""One observation in, one action out: `python minimal_act.py [grpc://HOST:PORT]`."""

import sys

import numpy as np

from lom_client import PolicyClient

with PolicyClient(sys.argv[1] if len(sys.argv) > 1 else "grpc://127.0.0.1:8001") as client:
    spec = client.get_spec(deadline_s=5.0)
    answer = client.act(np.zeros(spec.observation.width), deadline_s=0.5)
    print(f"action {answer.actions} from {answer.variant} in {answer.timings.round_trip_s * 1e6:.0f} µs")
