"""`python -m bench.scoring.weigh JOB`: peak memory and scores of one arm in this process, as JSON on the last line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.harness.memory import RETURNING, risen_mib
from bench.scoring import rows as of
from bench.scoring.arms import Arm, Loaded, arms
from bench.scoring.measure import Watched, Weighed
from bench.scoring.rows import Row
from endoreward_fast import EndoRewardModel


@dataclass(frozen=True)
class Job:
    """What a process needs to load the model and the rows."""

    model: str
    dtype: str
    data: str
    prompts: int
    threads: int
    gguf: str | None

    def load(self) -> tuple[Loaded, list[Row]]:
        torch.set_num_threads(self.threads)
        scorer = EndoRewardModel.from_pretrained(self.model, dtype=self.dtype)
        rows = of.rm_bench(Path(self.data), self.prompts, scorer.tokenizer)
        return Loaded(scorer.model, scorer.tokenizer, self.gguf and Path(self.gguf)), rows

    def arms(self) -> dict[str, Arm]:
        return arms(self.dtype, self.gguf is not None)


def weigh(loaded: Loaded, arm: Arm, rows: Sequence[Row], size: int) -> Weighed:
    """Return by how many MiB resident memory rises at its peak while the arm scores rows, and the scores.

    The loaded model is not counted.
    """
    score = arm.load(loaded)
    score(sorted(rows, key=lambda row: row.tokens)[:2], size)  # starts threads, loads code, reads weights from a file
    watched = Watched(lambda: score(rows, size))
    return Weighed(risen_mib(watched), watched.found)


def in_a_process(job: Job, name: str, size: int) -> Weighed:
    """Return `weigh` of an arm in a fresh interpreter."""
    command = [sys.executable, "-m", "bench.scoring.weigh", json.dumps({"job": asdict(job), "arm": name, "size": size})]
    run = subprocess.run(
        command, env=dict(os.environ) | RETURNING, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    if run.returncode:
        raise RuntimeError(f"{name}: {' '.join(command)} failed:\n{run.stderr}")
    return Weighed(**json.loads(run.stdout.splitlines()[-1]))


def main(given: str) -> None:
    asked = json.loads(given)
    job = Job(**asked["job"])
    loaded, rows = job.load()
    print(json.dumps(weigh(loaded, job.arms()[asked["arm"]], rows, asked["size"])._asdict()))


if __name__ == "__main__":
    main(sys.argv[1])
