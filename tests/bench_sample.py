"""Measures the prompts obeyed and the seconds per clip of each sampler on the shipped weights, as a table.

`python tests/bench_sample.py [--prompts 48]` counts CPU seconds of one core, so that other programs do not matter; with
decoding, without loading.  48 prompts take ten minutes."""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from reader import Judge  # noqa: E402
from sample import SAMPLERS  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", nargs="?", default="assets/tiny")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| sampler |" + "".join(f" {steps} steps |" for steps in args.steps))
    print("| --- |" + " --- |" * len(args.steps))
    judge = Judge(args.ckpt)
    for sampler in args.samplers:
        print(f"| {sampler} |", end="", flush=True)
        for steps in args.steps:
            judge.settings.update(sampler=sampler, steps=steps)
            start = time.process_time()
            scores, _ = judge.prompts(args.prompts)
            seconds = (time.process_time() - start) / args.prompts
            print(f" {scores['all']:.0%}, {seconds:.2f} s |", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
