"""Figures of data.py, for the README: what 12.3 million clips cost, and what a window of 16 frames costs.

    python tests/bench_data.py index [12300000]     builds and reopens the index, draws two epochs, forks 8 readers
    python tests/bench_data.py decode               windows of a 30 s clip against decoding all of it, and decord's
    python tests/bench_data.py batches META CONFIG [--FIELD=VALUE ...]     clips and frames read a second
"""
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import torch

try:
    import decord
except ImportError:
    decord = None

sys.path.insert(0, str(Path(__file__).parents[1]))
import configs  # noqa: E402
from data import BucketSampler, ClipDataset, assign, batches, one_line_errors, read_meta, read_window  # noqa: E402

WORKERS = 8


# ---- the index ----


def write_rows(path: Path, count: int):
    """100,000 rows of random lengths and numbers, over and over, each time with other digits in their paths."""
    rng = np.random.default_rng(0)
    digits, lines, at = b"00000000", [], 0
    places = np.empty(min(count, 100_000), np.int64)
    for i in range(len(places)):
        height, width = ((720, 1280), (1080, 1920), (240, 426))[i % 3]
        words = " ".join(["a dog runs", "on green grass", "at dusk", "and stops"][: rng.integers(1, 5)] * 2)
        line = (f'clips/part-{i % 1000:03d}/video-{digits.decode()}.mp4,"{words}, seen from far away in the evening",'
                f"{rng.integers(16, 900)},{height},{width},29.97\n").encode()
        places[i], at = at + line.index(digits), at + len(line)
        lines.append(line)
    block = np.frombuffer(b"".join(lines), np.uint8).copy()
    with open(path, "wb") as f:
        f.write(b"path,text,num_frames,height,width,fps\n")
        for first in range(0, count, len(places)):
            ids = np.arange(first, first + len(places))
            block[places[:, None] + np.arange(8)] = ids[:, None] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")
            left = count - first
            f.write(block if left >= len(places) else block[: sum(map(len, lines[:left]))])


def resident() -> tuple[int, int]:
    """(private, shared) bytes of this process; zeros where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except FileNotFoundError:
        return 0, 0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return tuple(1024 * (kib[f"{kind}_Clean"] + kib[f"{kind}_Dirty"]) for kind in ("Private", "Shared"))


def work(meta, seed: int, barrier, results):
    """A worker's reads, then what it holds alone, while all others still hold theirs."""
    before = resident()
    assert meta["num_frames"].sum(dtype=np.int64) > len(meta)
    for clip in np.random.default_rng(seed).integers(0, len(meta), 1000):
        assert meta.path(clip) and meta.text(clip)
    barrier.wait()
    results.put(np.subtract(resident(), before))
    barrier.wait()


def index(count: int):
    fresh = resident()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meta.csv"
        write_rows(path, count)
        print(f"{count} rows of {path.stat().st_size / count:.0f} bytes")
        start = time.perf_counter()
        read_meta(str(path))
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"build {seconds:.1f} s, peak {peak / 2**(30 if sys.platform == 'darwin' else 20):.2f} GiB")
        start = time.perf_counter()
        meta = read_meta(str(path))
        assert len(meta) == count and not meta["repeated"].any()
        print(f"reopen {time.perf_counter() - start:.3f} s, index {meta.rows.itemsize} bytes per row")

        config = configs.load("configs/stage1.py")
        for epoch in (0, 1):
            start = time.perf_counter()
            found = assign(meta, config, epoch).buckets
            print(f"buckets of epoch {epoch}: {time.perf_counter() - start:.1f} s, {(found >= 0).mean():.0%} in one")
        del found
        start = time.perf_counter()
        sampler = BucketSampler(meta, config)
        print(f"the sampler's epoch 0, {sampler.starts[1]} batches: {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        for step in range(1000):
            sampler.plan(step, 3, 64)
        print(f"a rank's plan of a step: {time.perf_counter() - start:.2f} ms")
        private, shared = np.subtract(resident(), fresh) / count
        print(f"resident: {private:.1f} private + {shared:.1f} shared bytes per row, text pages included")

        fork = multiprocessing.get_context("fork")
        barrier, results = fork.Barrier(WORKERS), fork.SimpleQueue()
        workers = [fork.Process(target=work, args=(meta, i, barrier, results)) for i in range(WORKERS)]
        for worker in workers:
            worker.start()
        private, _ = np.sum([results.get() for _ in workers], 0)
        for worker in workers:
            worker.join()
        print(f"{WORKERS} forked workers: {private / count:.2f} private bytes per row, all together")


# ---- decoding ----

def make(path, **options):
    """30 s of 1280x720 at 24 fps: a noisy ground that pans, a patch of noise that moves against it, and film grain."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (12, 60, 3)).repeat(120, 0).repeat(120, 1) + rng.normal(0, 8, (1440, 7200, 3))
    patch = rng.integers(0, 256, (20, 30, 3)).repeat(10, 0).repeat(10, 1)
    grain = rng.normal(0, 3, (7, 720, 1280, 1))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for i in range(720):
            frame = ground[i:i + 720, 4 * i:4 * i + 1280] + grain[i % 7]
            frame[i % 500:][:200, 900 - 3 * i % 900:][:, :300] = patch
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), "rgb24")))
        out.mux(stream.encode())


def everything(path, start):
    """Decodes and converts all frames, and keeps those of the window."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = enumerate(frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0))
        return np.stack([frame for i, frame in frames if i in range(start, start + 46, 3)])


def ours(path, start):
    return read_window(str(path), 16, 3, start)[0]


def decords(path, start):
    return decord.VideoReader(str(path), num_threads=1).get_batch(list(range(start, start + 46, 3))).asnumpy()


def seconds(function, *args):
    begin = time.process_time()
    function(*args)
    return time.process_time() - begin


def compare(name, path, windows=50):
    with av.open(str(path)) as container:
        num_frames = container.streams.video[0].frames
    starts = torch.randint(num_frames - 45, (windows,), generator=torch.Generator().manual_seed(0)).tolist()
    functions = [ours, everything] + [decords] * (decord is not None)
    times = {function: [] for function in functions}
    for i, start in enumerate(starts):
        for function in functions:
            if function is not everything or i % 10 == 0:  # the same at any start, and slow
                times[function].append(seconds(function, path, start))
    mine, all_, *rest = (statistics.median(times[function]) for function in functions)
    line = f"{name:>24}: ours {1e3 * mine:6.1f} ms, everything {1e3 * all_:6.0f} ms = {all_ / mine:5.1f} x"
    print(line + (f", decord {1e3 * rest[0]:6.1f} ms, ours / decord {mine / rest[0]:.2f}" if rest else ""), flush=True)


def decode():
    torch.set_num_threads(1)
    print("median process CPU time of 50 windows of 16 frames at stride 3, 1280x720")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("GOP 48", {"g": "48"}), ("GOP 250, x264's default", {})):
            make(Path(folder) / "a.mp4", **options)
            compare(name, Path(folder) / "a.mp4")
    if "NANOSORA_CLIPS" in os.environ:
        compare("bbb_action_720p24.mp4", Path(os.environ["NANOSORA_CLIPS"]) / "bbb_action_720p24.mp4")


# ---- whole batches, as training reads them ----

def read_batches(meta, config, seconds=20):
    """Prints how fast batches are read, with nothing else to do: clips/s, frames/s by bucket and in all."""
    rows, reasons, start = defaultdict(Counter), {}, time.perf_counter()
    for batch in batches(BucketSampler(meta, config), ClipDataset(meta, config), 0, config.steps):
        clips, bucket = len(batch["slots"]), batch["bucket"]
        rows[bucket[:2]].update(batches=1, clips=clips, frames=clips * bucket.num_frames, decoded=batch["decoded"],
                                seconds=batch["waited"])
        reasons |= {fault.path: fault.reason for fault in batch["faults"]}
        if time.perf_counter() - start > seconds:
            break
    print("      bucket  batches  clips  frames  decoded  seconds  clips/s  decoded/s")
    rows["in", "all"] = sum(rows.values(), Counter())
    for (level, t), row in rows.items():
        print(f"{level:>6} x {t:<3} {row['batches']:8} {row['clips']:6} {row['frames']:7} {row['decoded']:8} "
              f"{row['seconds']:8.1f} {row['clips'] / row['seconds']:8.1f} {row['decoded'] / row['seconds']:10.1f}")
    print(f"{config.num_workers} reading processes; {len(reasons)} clips could not be read")
    print("".join(f"  {reason}\n" for reason in reasons.values()), end="")


if __name__ == "__main__":
    if sys.argv[1:2] == ["index"]:
        index(int(sys.argv[2]) if len(sys.argv) > 2 else 12_300_000)
    elif sys.argv[1:2] == ["decode"]:
        decode()
    elif sys.argv[1:2] == ["batches"] and len(sys.argv) > 3:
        with one_line_errors(debug=False):
            read_batches(read_meta(sys.argv[2]), configs.load(sys.argv[3], sys.argv[4:]))
    else:
        sys.exit(__doc__)
