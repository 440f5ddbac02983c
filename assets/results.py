"""The measured numbers in one place: tables in results/summary.md, and outputs of COMMANDS and others in results/*.txt.

    python assets/results.py run block     runs that of COMMANDS, stores its output: results/cpu-block.txt
    python assets/results.py               writes assets/results.md from all that is stored
"""
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from itertools import groupby
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "assets" / "results"
COMMANDS = {
    "kernels": "python tests/bench_kernels.py", "block": "python tests/bench_model.py",
    "tiny": "python tests/bench_train.py configs/tiny.py",
    "sample": 'python sample.py --prompt "a red circle moves right" --out samples/timed --overwrite',
    "samplers": "python tests/bench_sample.py",
} | {f"stage{n}-{form}": f"python tests/bench_train.py configs/stage{n}.py{flag}"
     for n in (1, 2, 3) for form, flag in (("fast", ""), ("plain", " --plain"))}
# Passes over [N C] of memory-bound kernels, as kernels.py derives them; <.., 1> is a backward, the last 0 but one of
# qk_norm_rope attention in space.  time_attention is not one: its arithmetic takes longer than its 4 and 7 passes.
PASSES = {"modulate_forward<bf16, 1152>": 2, "modulate_backward<bf16, 1152>": 3, "gated_residual<bf16, 1152, 0>": 3,
          "gated_residual<bf16, 1152, 1>": 3, "qk_norm_rope<bf16, 72, 0, 0>": 4, "qk_norm_rope<bf16, 72, 0, 1>": 8}
# The kernels of two kinds of work in a profile, by name: NVIDIA's products; PyTorch's attention by cuDNN, and our own.
KINDS = {"matrix products": r"nvjet_|void cublasLt::", "attention": r"cudnn_|void cudnn::|void time_attention<"}
REST = "what lies between"


def said(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:         # there is no such command
        return ""


def machine():
    """Processor, cores, GPUs, torch, how busy others kept it; and a short name of the device."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.is_file() else "")
    cpu = found[1] if found else said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    gpus = said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    load = f"; load {os.getloadavg()[0]:.1f} before it" if hasattr(os, "getloadavg") else ""
    short = re.search(r"\w*\d\S*|$", gpus[0])[0].lower() or "gpu" if gpus else "cpu"               # h100
    gpus = f"{len(gpus)} x {gpus[0]}; " if gpus else ""
    cores = f"{os.environ.get('OMP_NUM_THREADS') or os.cpu_count()} of {os.cpu_count()} cores"
    return f"{gpus}{cpu}, {cores}; torch {version('torch')}{load}", short


def run(name):
    place, device = machine()
    changed = said("git", "status", "--porcelain", "--", ".", ":!assets/results", ":!assets/results.md")
    commit = (said("git", "rev-parse", "--short", "HEAD") or "unknown") + ", with changes" * bool(changed)
    done = subprocess.run([sys.executable, *shlex.split(COMMANDS[name])[1:]], cwd=ROOT, stdout=subprocess.PIPE,
                          encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    if done.returncode:
        sys.exit(f"{COMMANDS[name]}: exit status {done.returncode}, nothing stored")
    private = [f"{folder}{os.sep}" for folder in (ROOT, Path.home(), sys.prefix)] + [platform.node() or "localhost"]
    output = re.sub("|".join(map(re.escape, private)), "", done.stdout.strip("\n"))
    header = f"command: {COMMANDS[name]}\nmachine: {place}\ncommit: {commit}\ndate: {date.today()}\n\n"
    (STORE / f"{device}-{name}.txt").write_text(f"{header}{output}\n", encoding="utf-8")


def table(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def cells(lines):
    """Rows of aligned columns: a cut is where the body has two blanks or more and no line has a letter."""
    wide = [line.ljust(max(map(len, lines))) for line in lines]
    blanks = lambda rows: "".join("x" if "".join(column).strip() else " " for column in zip(*rows))
    cuts = [0]
    for gap in re.finditer(r"(?<=x) {2,}", blanks(wide[1:])):       # the widest blank there, or one flush with the body
        free = [(len(m[0]), m.start() == 0, m.end()) for m in re.finditer(" +", blanks(wide)[gap.start():gap.end()])]
        cuts += [gap.start() + max(free)[2]] if free else []
    return [[line[a:b].strip() for a, b in zip(cuts, [*cuts[1:], None])] for line in wide]


def markdown(output):
    """Lines of three or more aligned columns become tables, tables stay, all others are code."""
    aligned, parts = lambda line: line[0] == "|" or bool(re.search(r"\S  .*\S  +\S", line)), []
    for tabular, (*lines,) in groupby(filter(str.strip, output.splitlines()), aligned):
        lines = ["```", *lines, "```"] if not tabular or len(lines) == 1 else lines
        parts.append("\n".join(lines) if lines[0][0] in "`|" else table(cells(lines)))
    return "\n\n".join(parts)


def bandwidth(profile, copied):
    """What the memory-bound kernels of a profiled block move in a second, beside a copy's GB/s."""
    tokens = prod(map(int, re.search(r"block (\d+)x(\d+)x(\d+)", profile).groups()))
    rows = [["kernel", "ms a launch", "passes", "GB/s", "of copying"]]
    for name, passes in PASSES.items():
        took, launches = map(float, re.search(rf"([\d.]+) ms +(\d+)x void {re.escape(name)}", profile).groups())
        rate = passes * tokens * 1152 * 2 / (took / launches) / 1e6                             # bf16: 2 bytes
        rows.append([f"`{name}`", f"{took / launches:.3f}", f"{passes}", f"{rate:,.0f}", f"{rate / copied:.0%}"])
    return table(rows)


def gpu_time(stored):
    """(what was profiled, on what, {kind of work: ms a block}) of a stored profile, its header and output.

    Kernels too short for a row of their own are in the total alone, so the rest is what KINDS leave of that."""
    torch_and_card = re.search(r"^machine: \d+ x (.+?),.*; (torch \S+)$", stored, re.M).groups()
    clips, frames, tokens = re.search(r"^block (\d+)x(\d+)x(\d+)", stored, re.M).groups()
    total = float(re.search(r"^ *total GPU ([\d.]+) ms$", stored, re.M)[1])
    rows = re.findall(r"^ *([\d.]+) ms +\d+x (.+)$", stored, re.M)
    took = {kind: sum(float(ms) for ms, name in rows if re.match(names, name)) for kind, names in KINDS.items()}
    return (f"a block of XL/2, {clips} clips of {frames} frames of {tokens} tokens, forward and backward",
            f"GPU time of its kernels, bf16, {', '.join(torch_and_card)}", took | {REST: total - sum(took.values())})


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "run" and sys.argv[2] in COMMANDS:
        return run(sys.argv[2])
    if len(sys.argv) > 1:
        sys.exit(f"usage: python assets/results.py [run {'|'.join(COMMANDS)}]")
    stored = {path.stem: path.read_text(encoding="utf-8").split("\n\n", 1) for path in sorted(STORE.glob("*.txt"))}
    text = ["# Measured", "Written by `python assets/results.py` from the tables and outputs in [results](results).",
            (STORE / "summary.md").read_text(encoding="utf-8").strip()]
    for name, (header, output) in stored.items():
        origin = re.sub("^command: (.*)", r"command: `\1`", header).replace("\n", "\n- ")
        text += [f"## {name}", f"- {origin}", markdown(output)]
        if name == "h100-profile-fast":
            copied = float(re.search(r"copy (\d+) GB/s", stored["h100-torch"][1])[1])
            text += ["Its memory-bound kernels, by the passes over [N C] that each makes:", bandwidth(output, copied)]
    (ROOT / "assets" / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
