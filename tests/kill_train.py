"""Kills a training run 20 times at random moments, then lets it end: python tests/kill_train.py [20]

Every line of the log that does not tell a clock, and the final weights, have to be those of the undisturbed run.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import write_shapes  # noqa: E402

CLOCKS = ("clips_per_s", "tokens_per_s", "tflop_per_s", "decoded_per_s", "data_wait", "save_wait")
ARGS = ["--model.depth=2", "--model.hidden_size=48", "--model.num_heads=2", "--prompts=()", "--steps=300",
        "--buckets={'32': {1: (1.0, 8), 8: (1.0, 4)}}", "--save_every=5"]


def command(folder, out):
    return [sys.executable, "train.py", "configs/tiny.py", *ARGS, f"--data={folder}/clips/meta.csv",
            f"--cache={folder}/cache", f"--out={folder}/{out}"]


def rows(folder, out):
    lines = map(json.loads, Path(folder, out, "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def main(kills):
    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
               "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder, "clips"), num_clips=60)
        start = time.monotonic()
        subprocess.run(command(folder, "undisturbed"), check=True, **options)
        alone, killed, reached = time.monotonic() - start, 0, []
        while killed < kills:
            process = subprocess.Popen(command(folder, "killed"), **options)
            try:
                status = process.wait(random.uniform(0.1, 0.5) * alone)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                latest = Path(folder, "killed/latest")
                reached.append(int(latest.read_text()[5:]) if latest.is_file() else 0)
            else:
                assert status == 0, f"exit status {status}"
                compare(folder)
                shutil.rmtree(Path(folder, "killed"))       # the next kills are of another run
        subprocess.run(command(folder, "killed"), check=True, **options)
        compare(folder)
    print(f"{kills} kills with these last checkpoints: {reached}\nevery log line and weight is equal to the last bit")


def compare(folder):
    ours, theirs = (load_file(Path(folder, out, "model.safetensors")) for out in ("killed", "undisturbed"))
    assert rows(folder, "killed") == rows(folder, "undisturbed"), "another log"
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "other weights"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
