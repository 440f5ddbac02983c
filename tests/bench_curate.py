"""What curating costs, and how it compares.  One thread, CPU time of the process, the fastest of three turns.

    python tests/bench_curate.py speed FILE     scanning for cuts, writing clips, measuring them: ms a frame
    python tests/bench_curate.py cuts FOLDER    PySceneDetect's AdaptiveDetector (pip install "scenedetect<0.7"
                                                opencv-python-headless) on the clips whose cuts are known: F1, time
    python tests/bench_curate.py thresholds FOLDER      F1 on the same clips where one threshold of cuts is changed
    python tests/bench_curate.py flow FOLDER    OpenCV's Farneback on 20 pairs of frames: correlation, time
    python tests/bench_curate.py shake FOLDER   shake and flow of real shots over which the view moves in known ways
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

# clip, first frame of a pair, two frames apart, within a shot
PAIRS = [("bbb_multishot_720p24_audio.mp4", (30, 160, 524, 900)), ("bbb_singleshot_720p25_audio.mp4", (10, 107)),
         ("bbb_action_720p24.mp4", (20, 189, 293, 576, 602, 820)), ("city_cc0_720x405_mpeg2.mpg", (22, 84)),
         ("bbb_titles_text_720p24.mp4", (100, 429)), ("bbb_credits_text_720p24.mp4", (300,)),
         ("derived_bbb_portrait_406x720.mp4", (99,)), ("concert_multicam_176x144_vp9_60s.webm", (348, 625))]


def timed(function, *args):
    """Returns (CPU seconds, what the function returns)."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def decode_all(path):
    return sum(1 for _ in curate.decode(path, fast=True))


def write_all(path, video, folder):
    """Writes the clips of a scanned video; returns their files."""
    spans, _ = curate.split_shots(video.transitions, video.times)
    box = (0, 0, video.height, video.width)
    clips = [curate.Clip(start, stop, Path(folder, f"{start}.mp4"), box) for start, stop in spans]
    assert len(list(curate.write_clips(path, clips, video.times))) == len(clips)
    return [clip.file for clip in clips]


def measure_all(measure, files):
    return [measure({"path": str(file)}, None) for file in files]


def speed(path):
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            turn = {}
            turn["decode alone"], _ = timed(decode_all, path)
            turn["cut: scan"], video = timed(curate.scan, path)
            turn["cut: write clips"], files = timed(write_all, path, video, folder)
            turn["measure"], _ = timed(measure_all, curate.measure_both, files)
            best = {name: min(seconds, best.get(name, seconds)) for name, seconds in turn.items()}
    num_frames = len(video.times)
    length = video.times[-1]
    best["all"] = sum(best.values()) - best["decode alone"]
    print(f"{path}: {num_frames} frames, {length:.1f} s\n{'':20} ms a frame   times real time on one core")
    for name, seconds in best.items():
        print(f"{name:20} {1e3 * seconds / num_frames:10.2f} {length / seconds:12.1f}")
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

    totals = {"ours": np.zeros(3), "PySceneDetect": np.zeros(3)}            # found, extra, CPU seconds
    num_true = 0
    num_frames = 0
    for name in CUTS:
        path = Path(folder, name)
        turns = [(*timed(curate.scan, path), *timed(theirs, path)) for _ in range(3)]
        _, video, _, found = turns[0]
        both = {"ours": [first for first, _ in video.transitions], "PySceneDetect": found}
        fastest = {"ours": min(turn[0] for turn in turns), "PySceneDetect": min(turn[2] for turn in turns)}
        words = []
        for who, transitions in both.items():
            kept = [t for t in transitions if "titles" not in name or t > 54]       # it opens from black
            hit, extra = hits(name, kept, video.times)
            totals[who] += (hit, extra, fastest[who])
            words.append(f"{who} {hit} found, {extra} extra")
        num_frames += len(video.times)
        num_true += len(CUTS[name]) + len(DISSOLVES.get(name, ()))
        print(f"{name:42} {fastest['PySceneDetect'] / fastest['ours']:5.2f} times as fast; {'; '.join(words)}")
    for who, (hit, extra, seconds) in totals.items():
        print(f"{who:14} F1 {2 * hit / (num_true + hit + extra):.3f} of {num_true} transitions: {hit:.0f} found, "
              f"{extra:.0f} extra; {1e3 * seconds / num_frames:.2f} ms of CPU a frame")
    print(f"all: {totals['PySceneDetect'][2] / totals['ours'][2]:.2f} times as fast")


THRESHOLDS = ("MIN_CHANGE", "MIN_SHARE", "CHANGED", "SAME_PICTURE", "RATIO", "BACK", "BUSY", "BLANK", "MIN_MIXED")


def thresholds(folder):
    thumbs = {}
    times = {}
    for name in CUTS:
        path = Path(folder, name)
        shrink = curate.Shrink(path, curate.CUT_SIDE)
        pixels = bytearray()
        seconds = []
        for second, frame, stream in curate.decode(path, fast=True):
            pixels += shrink(frame, stream).tobytes()
            seconds.append(second)
        thumbs[name] = np.frombuffer(pixels, np.uint8).reshape(len(seconds), -1, 3)
        times[name] = np.array(seconds) - seconds[0]
    print(f"chosen                {score(thumbs, times)}")
    for name in THRESHOLDS:
        chosen = getattr(curate, name)
        for factor in (0.5, 0.7, 0.85, 1.2, 1.4, 2):
            setattr(curate, name, chosen * factor)
            print(f"{name:13} {chosen * factor:7.3g} {score(thumbs, times)}")
        setattr(curate, name, chosen)


def score(thumbs, times):
    """Returns F1 on the labelled clips and how many transitions are found, as text."""
    num_true = num_hit = num_extra = 0
    for name, pixels in thumbs.items():
        found = [first for first, _ in curate.find_transitions(pixels)]
        found = [t for t in found if "titles" not in name or t > 54]                # it opens from black
        hit, extra = hits(name, found, times[name])
        num_true += len(CUTS[name]) + len(DISSOLVES.get(name, ()))
        num_hit += hit
        num_extra += extra
    f1 = 2 * num_hit / (num_true + num_hit + num_extra)
    return f"F1 {f1:.3f}: {num_hit} of {num_true} found, {num_extra} extra"


SHOTS = [("bbb_multishot_720p24_audio.mp4", 800), ("bbb_action_720p24.mp4", 200), ("city_cc0_720x405_mpeg2.mpg", 20),
         ("bbb_singleshot_720p25_audio.mp4", 10), ("concert_multicam_176x144_vp9_60s.webm", 1050)]


def views():
    """Returns {name: where the middle of the view is in each of 50 frames, [50 2], in shares of its width}."""
    t = np.arange(50) / 24
    rng = np.random.default_rng(0)
    walk = np.stack([0.009 * np.sin(np.pi * 2 * t), 0.015 * np.abs(np.sin(np.pi * 2 * t))], 1)
    hand = np.stack([np.convolve(rng.normal(size=100), np.hanning(12), "same")[25:75] for _ in range(2)], 1)
    found = {"still": np.zeros((50, 2)), "pan, a third a second": np.stack([t / 3 - 0.35, 0 * t], 1),
             "walking, 1.5%": walk, "hand-held, 2%": 0.02 * hand / hand.std()}
    for percent in (1, 2, 3, 4):
        found[f"jitter of {percent}% to each side"] = rng.uniform(-1, 1, (50, 2)) * percent / 100
    return found


def shake(folder):
    from PIL import Image
    for name, path in views().items():
        values = []
        for file, first in SHOTS:
            _, pictures = curate.read_grey(str(Path(folder, file)))
            height, width = pictures.shape[1:]
            shown = []
            for picture, (right, down) in zip(pictures[first:first + 50], path):
                left = width * (0.25 + right / 2)
                top = height * 0.25 + width * down / 2
                box = (left, top, left + width / 2, top + height / 2)
                shown.append(np.array(Image.fromarray(picture).resize((width, height), Image.BICUBIC, box)))
            columns = curate.describe_motion(np.arange(len(shown)) / 24, np.stack(shown))
            values.append(f"{columns['shake']:5.1f} {columns['flow']:5.1f}")
        print(f"{name:28} {'   '.join(values)}", flush=True)


def flow(folder):
    import cv2
    cv2.setNumThreads(1)
    seconds = np.zeros(2)
    means = []
    for name, firsts in PAIRS:
        _, pictures = curate.read_grey(str(Path(folder, name)))
        for first in firsts:
            a, b = pictures[first], pictures[first + 2]
            turns = [(timed(cv2.calcOpticalFlowFarneback, a, b, None, 0.5, 4, 15, 3, 5, 1.2, 0),
                      timed(curate.flow, torch.from_numpy(a)[None], torch.from_numpy(b)[None])) for _ in range(3)]
            seconds += [min(turn[i][0] for turn in turns) for i in range(2)]
            (_, theirs), (_, ours) = turns[0]
            means.append((np.linalg.norm(theirs, axis=2).mean(), ours.norm(dim=1).mean().item()))
            print(f"{name:42} {first:4}  Farneback {means[-1][0]:6.2f}  ours {means[-1][1]:6.2f} pixels")
    theirs, ours = 1e3 * seconds / len(means)
    print(f"correlation {np.corrcoef(np.array(means).T)[0, 1]:.3f}; CPU ms a pair: Farneback {theirs:.1f}, ours "
          f"{ours:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"speed": speed, "cuts": cuts, "thresholds": thresholds, "flow": flow, "shake": shake}[sys.argv[1]](sys.argv[2])
