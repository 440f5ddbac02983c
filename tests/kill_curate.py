"""Kills a curating run 20 times at random moments, then lets it end: python tests/kill_curate.py FOLDER [20]

All tables and every clip have to be those of the undisturbed run, to the byte, and no item may be done twice.
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
    """Relative path -> bytes, of all but the results, which name the moments."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "parts" not in path.parts}


def results(folder):
    """When each item was done; those that failed are tried again by each run."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("parts/*/*/*.json")
            if "error" not in json.loads(path.read_bytes())}


def main(videos, kills):
    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
               "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "curate.py", "run", videos, "--out"]
        start = time.monotonic()
        subprocess.run([*command, f"{folder}/undisturbed"], check=True, **options)
        alone, killed, whole = time.monotonic() - start, 0, 0
        out, known = Path(folder, "killed0"), {}
        while killed < kills:
            process = subprocess.Popen([*command, str(out)], **options)
            try:
                process.wait(random.uniform(0.1, 0.6) * alone)
                compare(folder, out, known)
                whole += 1
                out, known = Path(folder, f"killed{whole}"), {}  # the next kills are of another run
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed, found = killed + 1, results(out)
                assert found.items() >= known.items(), "something was done twice"
                known = found
                print(f"kill {killed}: {len(known)} results, {len(list(out.rglob('*.mp4')))} clips", flush=True)
        subprocess.run([*command, str(out)], check=True, **options)
        compare(folder, out, known)
    print(f"{kills} kills, {whole + 1} runs: tables and clips are those of the undisturbed run ({alone:.0f} s)")


def compare(folder, out, known):
    one, two = (written(path) for path in (Path(folder, "undisturbed"), out))
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    differ = [path for path in one if one[path] != two[path]]
    assert not differ, f"differ: {differ}"
    assert results(out).items() >= known.items(), "something was done twice"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
