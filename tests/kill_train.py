"""Kills a training run 20 times at random moments, then lets it end: python tests/kill_train.py [20]

Every line of the log that does not depend on a clock, and the final weights, have to be those of the undisturbed run.
"""
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets.shapes import write_shapes  # noqa: E402
from test_train import checkpoints, rows, same_weights, start, tiny_config, weights  # noqa: E402


def main(kills):
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder, "clips"), num_clips=60)
        undisturbed = tiny_config("--steps=300", "--save_every=5", f"--data={folder}/clips/meta.csv",
                                  f"--cache={folder}/cache", f"--out={folder}/undisturbed")
        killed = replace(undisturbed, out=f"{folder}/killed")
        begin = time.monotonic()
        finish(undisturbed)
        alone = time.monotonic() - begin
        reached = []
        while len(reached) < kills:
            try:
                finish(killed, timeout=random.uniform(0.1, 0.5) * alone)    # then subprocess.run kills it: SIGKILL
            except subprocess.TimeoutExpired:
                reached.append((checkpoints(killed) or ["none"])[-1])
            else:
                compare(killed, undisturbed)
                shutil.rmtree(killed.out)                                   # the next kills are of another run
        finish(killed)
        compare(killed, undisturbed)
    print(f"{kills} kills with these last checkpoints: {reached}\nevery log line and weight is equal to the last bit")


def finish(config, **more):
    done = start(config, **more)
    assert done.returncode == 0, done.stderr


def compare(ours, theirs):
    assert rows(ours) == rows(theirs), "another log"
    assert same_weights(weights(ours), weights(theirs)), "other weights"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
