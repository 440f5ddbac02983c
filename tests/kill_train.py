"""Kills a training run 20 times at random moments, then lets it end: python tests/kill_train.py [20]

Every line of the log that does not tell a clock, and the final weights, have to be those of the undisturbed run.
"""
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import configs  # noqa: E402
from assets.shapes import write_shapes  # noqa: E402
from test_train import ARGS, ROOT, rows, start, weights  # noqa: E402


def main(kills):
    with tempfile.TemporaryDirectory() as folder:
        paths = {"data": "clips/meta.csv", "cache": "cache", "out": "undisturbed"}
        args = [*ARGS, "--steps=300", "--save_every=5", *(f"--{name}={folder}/{path}" for name, path in paths.items())]
        undisturbed = configs.load(ROOT / "configs/tiny.py", args)
        killed = replace(undisturbed, out=f"{folder}/killed")
        write_shapes(Path(folder, "clips"), num_clips=60)
        begin = time.monotonic()
        finish(undisturbed)
        alone, reached = time.monotonic() - begin, []
        while len(reached) < kills:
            try:
                finish(killed, timeout=random.uniform(0.1, 0.5) * alone)    # then subprocess.run kills it: SIGKILL
            except subprocess.TimeoutExpired:
                latest = Path(killed.out, "latest")
                reached.append(int(latest.read_text()[5:]) if latest.is_file() else 0)
            else:
                compare(killed, undisturbed)
                shutil.rmtree(killed.out)                                   # the next kills are of another run
        finish(killed)
        compare(killed, undisturbed)
    print(f"{kills} kills with these last checkpoints: {reached}\nevery log line and weight is equal to the last bit")


def finish(config, **more):
    done = start(config, "run", **more)
    assert done.returncode == 0, done.stderr


def compare(ours, theirs):
    assert rows(ours) == rows(theirs), "another log"
    assert all(torch.equal(value, weights(ours)[name]) for name, value in weights(theirs).items()), "other weights"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
