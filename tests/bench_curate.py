"""What curating costs, and how it compares.  One thread, process CPU time, of three turns the fastest.

    python tests/bench_curate.py speed FILE     decoding, cuts, flow, checks, writing: ms a frame, times real time
    python tests/bench_curate.py cuts FOLDER    PySceneDetect's AdaptiveDetector (pip install "scenedetect<0.7"
                                                opencv-python-headless) on the clips whose cuts are known: F1, time
    python tests/bench_curate.py flow FOLDER    OpenCV's Farneback on 20 pairs of frames: correlation, time
"""
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import numpy as np  # noqa: E402
import torch  # noqa: E402

import curate  # noqa: E402
from test_curate import CUTS, DISSOLVES, hits  # noqa: E402

SIDE = 192  # of frames for cuts alone; the 320 that flow needs cost 0.1 ms more
# clip, first frame of a pair, two frames apart, within a shot
PAIRS = [("bbb_multishot_720p24_audio.mp4", (30, 160, 524, 900)), ("bbb_singleshot_720p25_audio.mp4", (10, 107)),
         ("bbb_action_720p24.mp4", (20, 189, 293, 576, 602, 820)), ("city_cc0_720x405_mpeg2.mpg", (22, 84)),
         ("bbb_titles_text_720p24.mp4", (100, 429)), ("bbb_credits_text_720p24.mp4", (300,)),
         ("derived_bbb_portrait_406x720.mp4", (99,)), ("concert_multicam_176x144_vp9_60s.webm", (348, 625))]


def timed(function, *args):
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def drain(frames):
    return sum(1 for _ in frames)


def transitions(path, side=320):
    cuts, times = curate.Cuts(), []
    for seconds, frames, _ in curate.small_frames(path, side, 96 if side == SIDE else 24):
        cuts.add(frames)
        times.append(seconds)
    return [first for first, _ in cuts.end()], np.concatenate(times)


def write(path, m):
    clips, _ = curate.split(m.transitions, m.times)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(a, b, Path(folder, f"{a}.mp4"), None) for a, b in clips]
        return sum(row["num_frames"] for row in curate.write_clips(path, wanted, m.times))


def speed(path):
    steps, m = {}, curate.measure(path)
    moves_of = curate.moves_of
    for _ in range(3):
        seconds = {"probe": timed(curate.probe, path)[0], "decode": timed(drain, curate.decoded(path, True))[0],
                   "and shrink": timed(drain, curate.small_frames(path))[0], "and cut": timed(transitions, path)[0],
                   "all": timed(curate.measure, path)[0]}
        curate.moves_of = lambda pairs: []
        seconds["all but flow"] = timed(curate.measure, path)[0]
        curate.moves_of = moves_of
        seconds["write clips"], written = timed(write, path, m)
        steps = {name: min(value, steps.get(name, 9e9)) for name, value in seconds.items()}
    T, length = len(m.times), m.times[-1] - m.times[0]
    parts = {"probe": steps["probe"], "decode": steps["decode"], "shrink": steps["and shrink"] - steps["decode"],
             "cut": steps["and cut"] - steps["and shrink"], "checks": steps["all but flow"] - steps["and cut"],
             "flow": steps["all"] - steps["all but flow"], "probe and all of it": steps["probe"] + steps["all"],
             f"decode and write clips ({written} frames)": steps["write clips"]}
    print(f"{path}: {T} frames, {length:.1f} s\n{'':34} ms a frame   times real time on one core")
    for name, value in parts.items():
        print(f"{name:34} {1e3 * value / T:10.2f} {length / value:12.1f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")


def cuts(folder):
    import cv2
    from scenedetect import AdaptiveDetector, SceneManager, open_video
    os.environ["OPENCV_FFMPEG_THREADS"] = "1"
    cv2.setNumThreads(1)

    def theirs(path):
        manager = SceneManager()
        manager.add_detector(AdaptiveDetector())
        manager.detect_scenes(open_video(str(path)))
        return [start.get_frames() for start, _ in manager.get_scene_list()[1:]]

    totals = np.zeros((2, 3))  # hit, extra, CPU seconds
    true = frames = 0
    for name in CUTS:
        path, best, times = Path(folder, name), np.full(2, 9e9), None
        for _ in range(3):
            seconds, (own, times) = timed(transitions, path, SIDE)
            other, found = timed(theirs, path)
            best = np.minimum(best, (seconds, other))
        own, found = ([t for t in one if "titles" not in name or t > 54] for one in (own, found))  # opens from black
        rows = [(*hits(name, one, times), value) for one, value in zip((own, found), best)]
        totals, frames = totals + rows, frames + len(times)
        true += len(CUTS[name]) + len(DISSOLVES.get(name, ()))
        print(f"{name:42} {best[1] / best[0]:5.2f} times as fast; hits, extra: {rows[0][:2]}, theirs {rows[1][:2]}")
    for who, (hit, extra, seconds) in zip(("ours", "PySceneDetect"), totals):
        print(f"{who:14} F1 {2 * hit / (true + hit + extra):.3f} of {true} transitions: {hit:.0f} found, {extra:.0f} "
              f"extra; {1e3 * seconds / frames:.2f} ms of CPU a frame")
    print(f"all: {totals[1, 2] / totals[0, 2]:.2f} times as fast")


def flow(folder):
    import cv2
    cv2.setNumThreads(1)
    cpu, means = np.zeros(3), []
    for name, firsts in PAIRS:
        small = np.concatenate([curate.grey(frames).byte() for _, frames, _ in curate.small_frames(Path(folder, name))])
        for first in firsts:
            pair = small[[first, first + 2]]
            one, eight = ([torch.from_numpy(x)[None].repeat(n, 1, 1) for x in pair] for n in (1, 8))
            best = np.full(3, 9e9)
            for _ in range(3):
                seconds = [timed(cv2.calcOpticalFlowFarneback, *pair, None, 0.5, 4, 15, 3, 5, 1.2, 0),
                           timed(curate.flow, *one), timed(curate.flow, *eight)]
                best = np.minimum(best, [seconds[0][0], seconds[1][0], seconds[2][0] / 8])
            cpu += best / sum(len(firsts) for _, firsts in PAIRS)
            means.append((np.linalg.norm(seconds[0][1], axis=2).mean(), seconds[1][1].norm(dim=1).mean().item()))
            print(f"{name:42} {first:4}  Farneback {means[-1][0]:6.2f}  ours {means[-1][1]:6.2f} pixels")
    print(f"correlation {np.corrcoef(np.array(means).T)[0, 1]:.3f}; CPU ms a pair: Farneback {1e3 * cpu[0]:.1f}, ours "
          f"{1e3 * cpu[1]:.1f}, ours eight at once {1e3 * cpu[2]:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"speed": speed, "cuts": cuts, "flow": flow}[sys.argv[1]](sys.argv[2])
