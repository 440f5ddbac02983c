"""The scripts as the README starts them, one after the other; and what SIGTERM to all processes of a run does."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from assets.shapes import write_shapes
from data import read_window, write_video
from test_assets import pan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SMALL_MODEL = ["--model.depth=2", "--model.hidden_size=48", "--model.num_heads=2", "--prompts=()"]


def python(*words):
    """Runs one of the README's commands to its end; returns what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def rows(out):
    """Returns what does not depend on a clock of each line of the log of a run."""
    found = []
    for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append([row[name] for name in ("step", "loss", "grad_norm", "lr")])
    return np.array(found)


def test_from_videos_to_a_sample(tmp_path):
    """Curates, trains from pixels in two processes, samples from what was trained."""
    (tmp_path / "videos").mkdir()
    for seed in range(3):
        shots = np.concatenate([pan(seed, 60), pan(seed + 10, 60)])
        write_video(tmp_path / "videos" / f"{seed}.mp4", shots)
    python("curate.py", "run", tmp_path / "videos", "--out", tmp_path / "data", "--workers", 1)
    meta = tmp_path / "data/meta.csv"
    assert len(meta.read_text(encoding="utf-8").splitlines()) == 1 + 6, "two shots of each video"

    python(*TORCHRUN, "train.py", "configs/tiny.py", f"--data={meta}", "--cache=", "--num_workers=1", "--steps=3",
           "--buckets={'64': {8: (1.0, 2)}}", f"--out={tmp_path / 'run'}", *SMALL_MODEL)
    assert np.isfinite(rows(tmp_path / "run")).all()

    python("sample.py", "--ckpt", tmp_path / "run", "--prompt", "hills", "--steps", 3, "--out", tmp_path / "samples")
    (video,) = (tmp_path / "samples").glob("*.mp4")
    frames, _ = read_window(str(video))
    assert len(frames) == 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with clips and a run of 100 steps: (the words of the command without --out, the rows of its log)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_shapes(folder / "clips", num_clips=32)
    command = ["train.py", "configs/tiny.py", f"--data={folder / 'clips/meta.csv'}", "--cache=", "--num_workers=2",
               "--buckets={'64': {8: (1.0, 4)}}", "--steps=100", "--save_every=1000", *SMALL_MODEL]
    python(*command, f"--out={folder / 'run'}")
    return command, rows(folder / "run")


def processes_of(out):
    """Returns the numbers of the processes that work on a run: its name stands in their command, also a reader's.

    torchrun's workers are sessions of their own, so a session or a group does not tell."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
        except OSError:                                                     # ended just now
            continue
        if f"--out={out}" in words:
            found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one-process", "two-processes"])
def test_sigterm_to_all_processes_saves_and_stops(undisturbed, tmp_path, launcher):
    """As a batch system stops a job: a process gets it with its readers; torchrun passes it on to its workers."""
    command, log = undisturbed
    out = tmp_path / "run"
    words = [sys.executable, *launcher, *command, f"--out={out}"]
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen(words, cwd=ROOT, env=ENV, stdout=printed, stderr=printed, start_new_session=True)
    wait_for_training(process, out / "log.jsonl", tmp_path / "printed")
    assert len(processes_of(out)) == (1 + 2 * 3 if launcher else 3), "torchrun, and each process with two readers"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=120)
    text = (tmp_path / "printed").read_text()
    assert process.returncode != 0, text
    if not launcher:                                                        # torchrun prints one of its own
        assert "Traceback" not in text

    for _ in range(50):
        if not processes_of(out):
            break
        time.sleep(0.2)
    assert processes_of(out) == [], "a process stayed behind"

    saved = sorted(out.glob("step-*"))
    assert saved, f"no checkpoint was written\n{text}"
    assert rows(out)[-1, 0] == int(saved[-1].name.removeprefix("step-")) < 80
    python(*launcher, *command, f"--out={out}")
    last = rows(out)[-1]                                       # averages over the last ten steps
    np.testing.assert_allclose(last, log[-1], rtol=1e-5)


def wait_for_training(process, log, printed):
    """Waits until some steps have been taken: the log has a line."""
    for _ in range(1200):
        assert process.poll() is None, printed.read_text()
        if log.is_file() and log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no step in two minutes\n{printed.read_text()}")
