"""Time and memory of a training step of each bucket: the loop of train.py on random latents, nothing read or written.

    python tests/bench_train.py configs/tiny.py [--field=value ...]                     also under torchrun
    python tests/bench_train.py configs/tiny.py --profile trace.json                    a trace for Perfetto
"""
import argparse
import gc
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon; before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402

import configs  # noqa: E402
import train  # noqa: E402
from configs.plan import GPUS  # noqa: E402
from data import Bucket, one_line_errors  # noqa: E402
from inputs import example_inputs  # noqa: E402
from kernels import start_processes, use  # noqa: E402
from sample import usual_aspect  # noqa: E402


def stopwatch(config, plain=False):
    """(place, measure): measure(kind, clips, steps=10) -> (seconds, GiB) of a step of the loop on random latents of one
    (resolution, frames), `clips` for each rank or group; (inf, None) where memory does not do."""
    place = start_processes(config.shard, config.sp)
    place.say(use(place.device, plain))
    config = replace(config, out=os.devnull, world=place.num_data_ranks)          # no folder, so no log
    run = train.make_run(config, place)

    def measure(kind, clips, steps=10):
        nonlocal run
        alone = replace(config, buckets={kind[0]: {kind[1]: (1.0, clips)}})
        try:
            return time_steps(run._replace(config=alone), Bucket(*kind, usual_aspect(kind[0])), steps)
        except torch.OutOfMemoryError:
            run = None                          # what FSDP holds half way is not to be used
        gc.collect()                            # out here: within, the error's traceback still held it
        run = train.make_run(config, place)
        return math.inf, None

    return place, measure


def time_steps(run, bucket, steps):
    """(seconds, peak GiB or None) of a step, of so many of them, after two for warming up."""
    batch = synthetic(run, bucket)
    for count in (2, steps):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for number in range(count):
            train.train_step(run, number, dict(batch))
    return (time.perf_counter() - start) / steps, train.peak_gib()


def synthetic(run, bucket):
    """A rank's batch as from the cache, of random latents and captions of half the tokens; the same for a group."""
    model, share, shares = run.config.model, run.place.data_rank, run.place.num_data_ranks
    B, L = run.config.buckets[bucket.resolution][bucket.num_frames][1], model.model_max_length
    torch.manual_seed(share)
    told = example_inputs(model, B, bucket.num_frames, bucket.height // 8, bucket.width // 8, L)
    return told | {"mean": told["x"], "std": torch.ones_like(told["x"]),
                   "y_mask": (torch.arange(L) < L // 2).expand(B, -1), "slots": torch.arange(share, B * shares, shares),
                   "bucket": bucket, "faults": [], "decoded": 0, "waited": 0}


def bench(config, trace=None, plain=False):
    """Times a step of each bucket.  trace: a file for three steps of the last bucket, as torch's profiler sees them."""
    place, measure = stopwatch(config, plain)
    name, peak = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU", peak_flops()
    place.say(f"{place.world} x {name}, {config.dtype}, checkpointing {config.checkpointing}, compile {config.compile},"
              f" accumulation {config.accumulation}, sp {config.sp}\n"
              "      bucket      clips  s/step  tokens/s/GPU  TFLOP/s/GPU    MFU  peak GiB")
    for (level, t), clips in config.trained.items():
        seconds, gib = measure((level, t), clips)
        if seconds == math.inf:
            place.say(f"{level:>6} x {t:<3} {clips:10}  out of memory")
            continue
        tokens, flop = (n * clips / config.sp / seconds for n in config.cost(Bucket(level, t, usual_aspect(level))))
        place.say(f"{level:>6} x {t:<3} {clips:10} {seconds:7.3f} {tokens:13,.0f} {flop / 1e12:12.2f} "
                  f"{f'{flop / peak:.1%}' if peak else '-':>6} {f'{gib:.1f}' if gib else '-':>9}")
    if trace:
        with torch.profiler.profile() as profile:
            measure((level, t), clips, steps=3)
        if place.rank == 0:
            Path(trace).parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(trace)
        place.say(profile.key_averages().table(sort_by=f"self_{place.device.type}_time_total", row_limit=12,
                                               max_name_column_width=40))


def peak_flops():
    """Returns the FLOP/s of this GPU by its data sheet, None if configs.plan does not know it."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((gpu.flops for known, gpu in GPUS.items() if known in name), None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python tests/bench_train.py CONFIG [options] [--field=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("--profile", metavar="FILE", help="writes a trace of three steps of the last bucket")
    parser.add_argument("--plain", action="store_true", help="each op as PyTorch has it")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args, overrides = parser.parse_known_args(argv)
    with one_line_errors(args.debug):
        bench(configs.load(args.config, overrides), args.profile, args.plain)


if __name__ == "__main__":
    main()
