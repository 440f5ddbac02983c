"""Kills a curating run 20 times at random moments, then lets it end: python tests/kill_curate.py FOLDER [20]

All tables and every clip have to be those of the undisturbed run, to the byte, and nothing that was finished may be
done again.
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def written(folder):
    """Relative path -> bytes, of everything but the results of the steps."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "parts" not in path.parts}


def results(folder):
    """Returns how often each row of each step has been finished: {(step, key): times}."""
    counts = {}
    for file in folder.glob("parts/*/*.jsonl"):
        for line in file.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:                      # half a line
                continue
            if "columns" in record:                 # what failed is tried again by each run
                name = file.parent.name, record["key"]
                counts[name] = counts.get(name, 0) + 1
    return counts


def check(folder, out):
    """Asserts that two folders are the same, and that nothing was done twice."""
    expected = written(folder)
    found = written(out)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    different = [str(path) for path in expected if expected[path] != found[path]]
    assert not different, f"these differ: {different}"
    assert set(results(out).values()) == {1}, "something was done twice"


def main(videos, num_kills):
    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
               "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "curate.py", "run", videos, "--out"]
        undisturbed = Path(folder, "undisturbed")
        start = time.monotonic()
        subprocess.run([*command, str(undisturbed)], check=True, **options)
        alone = time.monotonic() - start
        num_killed = 0
        num_runs = 0
        while num_killed < num_kills:
            out = Path(folder, f"killed{num_runs:04d}")         # as long as the other name: paths count from it
            num_runs += 1
            while True:
                process = subprocess.Popen([*command, str(out)], **options)
                try:
                    if num_killed == num_kills:
                        process.wait()
                    process.wait(random.uniform(0.1, 0.6) * alone)
                    assert process.returncode == 0
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    num_killed += 1
                    num_clips = len(list(out.rglob("*.mp4")))
                    print(f"kill {num_killed}: {len(results(out))} results, {num_clips} clips", flush=True)
            check(undisturbed, out)
    print(f"{num_kills} kills, {num_runs} runs: tables and clips are those of the undisturbed run ({alone:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
