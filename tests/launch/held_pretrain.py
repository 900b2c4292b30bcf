"""A training whose fourth step waits, so that something can happen to it.

    HELD=folder python tests/launch/held_pretrain.py pretrain_atum.py --config ...

The rank writes HELD/rank-N when it gets there, and goes on when HELD/go exists, or when it has had a signal. The file
has the CPUs that the rank may use, and the GPUs that it was given.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEP = 4


def place() -> dict[str, Any]:
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    return {"cpus": sorted(os.sched_getaffinity(0)), "gpus": gpus, "local_rank": os.environ["LOCAL_RANK"]}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from megatron_atum.training.engine import Engine
    from megatron_atum.training.requests import Requests

    held = Path(os.environ["HELD"])
    forward_backward, take = Engine.forward_backward, Requests._take
    steps: list[None] = []

    def holding(self: Engine, batches: Any) -> Any:
        steps.append(None)
        if len(steps) == STEP:
            (held / f"rank-{os.environ['RANK']}").write_text(json.dumps(place()))
            while not (held / "go").exists():
                time.sleep(0.05)
        return forward_backward(self, batches)

    def going_on(self: Requests, number: int) -> None:
        take(self, number)
        (held / "go").touch()

    Engine.forward_backward, Requests._take = holding, going_on  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
