"""Raw videos to a training set: cuts them into clips, measures and captions the clips, and keeps the good ones.

In    a folder of videos and images, and captions if there are any
Out   DIR/clips/, DIR/clips.csv (every clip with its numbers, and why it was dropped), DIR/meta.csv (the clips that are
      kept, for data.py) and DIR/report.html (look at it before you train)

    python curate.py run videos/ --out data/mine                          everything that needs no network
    python curate.py run videos/ --out data/mine --with aesthetic,ocr,caption,match
    torchrun --nproc-per-node 8 curate.py run videos/ --out data/mine --with aesthetic,ocr,caption,match
    python curate.py filter data/mine --min-flow=5 --max-shake=none       other rules; nothing is measured again
    python curate.py motion clips/meta.csv                                one step, on a table of your own

The steps are those of Open-Sora 1.1 (docs/data_processing.md there), after Stable Video Diffusion (arXiv 2311.15127):
cut turns source files into clip files; motion, appearance, aesthetic, ocr, caption and match read clips and add columns
to their table; dedup, filter and report go from table to table.  If a run is killed, the same command continues it.
"""
import argparse
import base64
import csv
import errno
import html
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing, suppress
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from data import (COLUMNS, IMAGES, NEW_START, UnreadableClip, assign, atomic_write, bucket_table, displayed_width,
                  end_with_parent, one_line_errors, opened, orientation, positive_int, read_csv, read_image, read_meta,
                  read_number, read_window, short_hash)
from vae import from_pretrained, hugging_face, load_net


# ---------------------------------------------------------------- source files
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
          ".3gp", ".ogv", ".gif")


def find_files(folder, out):
    """Returns (the videos and images in a folder and its subfolders, the other files and the linked folders), sorted.

    Hidden files and the folder `out` are left out.  A file in place of a folder is searched alone."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder, expected one with videos or images")
    if folder.is_file():
        return [folder], []
    found = []
    others = []
    for place, folders, names in os.walk(folder, onerror=report_folder):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name).resolve() != out]
        others += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if is_utf8(path) and name.lower().endswith(VIDEOS + IMAGES):
                found.append(path)
            else:
                others.append(path)
    return sorted(found), sorted(others)


def report_folder(error):
    print(f"a folder is left out: {error}", file=sys.stderr)


def is_utf8(path):
    """Returns whether a path can be written into a table."""
    return str(path).encode(errors="ignore").decode() == str(path)


def is_image(path):
    return str(path).lower().endswith(IMAGES)


def list_files(options):
    """Returns a row for each video and image: path (relative to options.folder), source and text."""
    found, others = find_files(options.what, options.folder)
    others = [path for path in others if path.suffix != ".txt"]
    if not found:
        raise ValueError(f"{options.what}: has no video or image among {len(others)} files, expected "
                         f"{' '.join(VIDEOS + IMAGES)}")
    if others and RANK == 0:
        print(f"{len(others)} files are left out (not a video or an image, a link to a folder, or a name that is not "
              f"UTF-8), such as {str(others[0])!a}")
    captions = read_captions(options.captions)
    rows = []
    for path in found:
        name = os.path.relpath(path, options.folder)
        text = captions.pop(os.path.relpath(path, options.what), None)
        if text is None:
            text = captions.pop(path.name, None)
        if text is None:
            text = read_text_file(path.with_suffix(".txt"))
        rows.append({"path": name, "source": name, "text": text})
    if captions and RANK == 0:
        print(f"{options.captions}: {len(captions)} captions name no file in {options.what}, such as that of "
              f"{next(iter(captions))}")
    return rows


def read_captions(table):
    """Returns {path: text} of a csv with these columns; {} for None."""
    if not table:
        return {}
    return {row["path"]: row["text"] for _, row in read_csv(table, ("path", "text"))}


def read_text_file(path):
    """Returns the text of a file in one line, "" if there is no file.  Raises ValueError for an unknown encoding."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))       # as Windows' Notepad marks it
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path}: the encoding of this caption is unknown, expected UTF-8 - save it as UTF-8")
    return " ".join(text.split())


# ---------------------------------------------------------------- decoding
def whole_packets(path, stream):
    """Yields the packets up to the first damaged one, then None, which makes the decoder give what it holds back."""
    num_packets = 0
    num_expected = len(stream.index_entries) if "mp4" in stream.container.format.name else 0    # by its header
    is_damaged = False
    for packet in stream.container.demux(stream):
        if packet.is_corrupt:
            is_damaged = True
            break
        if packet.size:
            num_packets += 1
            yield packet
    yield None
    if is_damaged:
        raise UnreadableClip(f"{path}: packet {num_packets} is damaged")
    if num_packets < num_expected:
        raise UnreadableClip(f"{path}: is cut off, it has {num_packets} of {num_expected} packets")


def decode(path, fast=False):
    """Yields (seconds, av.VideoFrame, stream) of each frame, in the order in which the decoder gives them.

    Frames without a time have nan seconds.  Raises UnreadableClip at the first damage; the frames before it can be
    used.  fast: without H.264's deblocking, which takes a third of the time and is not seen in small pictures."""
    count = 0
    latest = -math.inf
    kind = None
    with opened(path) as stream:
        tick = float(stream.time_base)
        if fast:
            stream.codec_context.options |= {"skip_loop_filter": "all"}
        for packet in whole_packets(path, stream):
            for frame in stream.codec_context.decode(packet):
                if frame.is_corrupt and not count:
                    continue                # a broadcast may begin before its first key frame
                seconds = math.nan if frame.pts is None else frame.pts * tick
                if frame.is_corrupt:
                    raise UnreadableClip(f"{path}: frame {count} is damaged")
                if seconds < latest - NEW_START:
                    raise UnreadableClip(f"{path}: times start again at frame {count}, as where recordings are joined")
                kind = kind or (frame.width, frame.height, frame.format.name)
                if kind != (frame.width, frame.height, frame.format.name):
                    raise UnreadableClip(f"{path}: frame {count} has another size or format than the first one")
                latest = max(latest, seconds)
                count += 1
                yield seconds, frame, stream
    if not count:
        raise UnreadableClip(f"{path}: has no frames")


class Shrink:
    """Makes small pictures of the frames of one video as they are displayed, no side longer than `side`."""

    def __init__(self, path, side, grey=False):
        self.path = path
        self.side = side
        self.format = "gray" if grey else "rgb24"
        self.size = None
        self.reformatters = VideoReformatter(), VideoReformatter()      # kept, as they remember their conversion

    def __call__(self, frame, stream):
        """Returns uint8 [h w 3], or grey [h w]."""
        if self.size is None:                                           # `decode` gives frames of one kind
            width = displayed_width(self.path, frame, stream)
            scale = min(1, self.side / max(width, frame.height))
            self.size = max(1, round(scale * width)), max(1, round(scale * frame.height))
            self.orientation = orientation(frame)
        # Shrinking and converting in one step takes twice the time.
        small = self.reformatters[0].reformat(frame, *self.size, "yuv420p", interpolation="AREA", threads=1)
        picture = self.reformatters[1].reformat(small, format=self.format, threads=1).to_ndarray()
        transposed, down, right = self.orientation
        if transposed:
            picture = picture.swapaxes(0, 1)
        return picture[::down, ::right]


def frame_times(seconds, rate):
    """Returns the times [T] of frames in seconds, ascending from 0.

    Where a time is missing or not after the one before, as in raw streams and in old .avi files, only the order of the
    frames is known, and they are spaced evenly at `rate` frames a second."""
    seconds = np.array(seconds)
    if np.isfinite(seconds).all() and (np.diff(seconds) > 0).all():
        return seconds - seconds[0]
    return np.arange(len(seconds)) / float(rate)


def constant_rate(times, guess):
    """Returns the frame rate of ascending times [T] in seconds as a Fraction, or None if it varies.

    One gap in fifty may be odd, as where streams were joined.  The container's guess is taken if it fits to 1%, as it
    knows 30000/1001 where times are rounded to milliseconds."""
    gaps = np.diff(times)
    if len(gaps) == 0:
        return Fraction(guess)
    gap = np.median(gaps)
    is_usual = np.abs(gaps - gap) <= 0.05 * gap + 0.0015        # Matroska's times are whole milliseconds
    if np.mean(is_usual) < 0.98:
        return None
    rate = 1 / gaps[is_usual].mean()
    if abs(guess / rate - 1) < 0.01:
        rate = guess
    return Fraction(rate).limit_denominator(1001)


# ---------------------------------------------------------------- cuts
# Changes are relative to the spread of the pictures: the mean distance of a pixel's colour from the picture's mean
# colour.  Between two unrelated pictures the change is about 1, whether the footage is dark, bright or pale.  How far
# each threshold can go before a labelled transition is lost or a false one is found stands in assets/results.md.
CUT_SIDE = 40           # pixels of the longer side of the frames in which transitions are looked for
MIN_CHANGE = 0.4        # mean change of a hard cut, relative to the spread
MIN_SHARE = 0.45        # of the pixels that change by CHANGED or more: subtitles and a hand change fewer
CHANGED = 0.25          # of a pixel, relative to the spread
SAME_PICTURE = 0.975    # correlation of one picture with itself in another light; two landscapes may have 0.94
RATIO = 3.0             # change at a cut over that of the frames around it, as PySceneDetect's AdaptiveDetector has it
AROUND = 2              # drawings to each side that count for RATIO; animation shows each up to three times
HELD = 0.01             # a smaller change is a drawing shown again
FLASH = 6               # frames: what looks as before after so many was a flash
BACK = 0.3              # share of the change: frames this near to each other look the same
SWEEP = 12              # frames: cuts this near without a calm frame between are one, such as an object passing by
BUSY = 0.25             # change of a frame that is not calm
BLANK = 0.1             # contrast of a picture of one colour, relative to the highest within REACH
REACH = 64              # frames over which a fade, and the rest of a dissolve around a window, may extend
DISSOLVES = (12, 24, 48)        # frames of the windows in which mixtures are looked for; longer dissolves look linear
MIN_MIXED = 0.25        # score of a mixture
MAX_ALIKE = 0.6         # correlation of the two pictures of a dissolve; a moment later in one shot it is higher


def find_transitions(thumbs):
    """Returns the transitions (end of a shot, begin of the next) of small frames, pixels uint8 [T P 3], ascending; both
    are the same frame for a hard cut."""
    changes, spread, contrast = measure_pictures(thumbs)                # [T]
    relative = changes / np.maximum(spread, np.roll(spread, 1))
    found = fades(thumbs, contrast)
    found += dissolves(changes, thumbs, spread, found)
    found += [(t, t) for t in hard_cuts(changes, relative, thumbs, spread)]
    return join_near(sorted(found), relative >= BUSY)


def measure_pictures(thumbs):
    """Returns three measures [T] of pictures uint8 [T P 3], in grey levels: the mean change from the picture before;
    the spread, plus half a level for noise; and the contrast, the distance of the 1% that are farthest from the
    mean."""
    changes = []
    spread = []
    contrast = []
    last = thumbs[:1]
    for part in np.array_split(thumbs, len(thumbs) // 256 + 1):         # bounds the memory
        x = part.astype(np.float32)
        changes.append(np.abs(np.diff(x, axis=0, prepend=last)).mean((1, 2)))
        distance = np.abs(x - x.mean(1, keepdims=True)).mean(2)         # [t P]
        spread.append(distance.mean(1) + 0.5)
        num_farthest = max(1, distance.shape[1] // 100)
        contrast.append(np.partition(distance, -num_farthest, 1)[:, -num_farthest:].mean(1))
        last = x[-1:]
    return np.concatenate(changes), np.concatenate(spread), np.concatenate(contrast)


def join_near(transitions, is_busy):
    """Joins transitions that overlap, and those less than SWEEP apart if all frames between are busy [T]."""
    joined = []
    for first, end in transitions:
        previous_end = joined[-1][1] if joined else -SWEEP
        is_near = first - previous_end < SWEEP and is_busy[previous_end:first].all()
        if first <= previous_end or is_near:
            joined[-1] = joined[-1][0], max(end, previous_end)
        else:
            joined.append((first, end))
    return joined


def hard_cuts(changes, relative, thumbs, spread):
    """Returns the first frames of new shots: where the picture changes much more than around it, most of it does, and
    it stays changed.  changes [T] in grey levels and relative [T] are of frame t from t - 1; thumbs [T P 3]."""
    cuts = []
    for t in np.flatnonzero(relative >= MIN_CHANGE):
        before = [c for c in changes[max(1, t - 6):t] if c > HELD * spread[t]][-AROUND:]
        after = [c for c in changes[t + 1:t + 7] if c > HELD * spread[t]][:AROUND]
        if changes[t] < RATIO * np.median([*before, *after] or [0]):
            continue
        old = thumbs[max(0, t - FLASH):t].astype(np.float32)
        new = thumbs[t:t + FLASH].astype(np.float32)
        if share_changed(old[-1], new[0], max(spread[t - 1], spread[t])) < MIN_SHARE:
            continue
        if correlation(old[-1:], new[:1])[0] > SAME_PICTURE:
            continue
        distance = np.abs(old[:, None] - new).mean((2, 3))              # [FLASH FLASH]
        if distance.min() > BACK * distance[-1, 0]:
            cuts.append(int(t))
    return cuts


def share_changed(a, b, spread):
    """Returns the share of pixels [P 3] that differ clearly between two pictures."""
    return (np.abs(a - b).mean(1) > CHANGED * spread).mean()


def correlation(a, b):
    """Returns the correlation [n] of the pixels of pictures [n P 3], each colour less its mean."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return (a * b).sum((1, 2)) / np.maximum(norm, 1e-6)


def fades(thumbs, contrast):
    """Returns (first frame that fades, first frame that no longer does) of fades to and from one colour."""
    padded = np.pad(contrast, REACH, mode="edge")
    highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1).max(1)
    is_blank = contrast < BLANK * highest
    edges = np.flatnonzero(np.diff(np.pad(is_blank.astype(int), 1)))
    found = []
    for begin, end in edges.reshape(-1, 2).tolist():                    # runs of blank frames
        down = ramp_length(thumbs[begin::-1], contrast[begin::-1])
        up = ramp_length(thumbs[end - 1:], contrast[end - 1:])
        if down or up:
            found.append((begin - max(0, down - 1), end + max(0, up - 1)))
    return found


def ramp_length(thumbs, contrast):
    """Returns over how many frames a picture fades in from the blank first one of these, 0 if it does not.

    The contrast then rises evenly, whatever moves; where an object comes before a plain wall, it jumps.  And most of
    the picture must come, unlike a title on black."""
    length = 0
    while length + 1 < min(len(contrast), 2 * REACH):
        slope = (contrast[length] - contrast[0]) / max(1, length)
        rise = contrast[length + 1:length + 4] - contrast[length]       # of three, as a frame may be shown twice
        if length and (rise < 0.3 * slope * np.arange(1, len(rise) + 1)).all():
            break
        length += 1
    is_even = np.diff(contrast[:length + 1]).max(initial=0) < 0.22 * (contrast[length] - contrast[0])
    comes = np.abs(thumbs[length].astype(np.float32) - thumbs[0]).mean(1) > BLANK * contrast[length]
    if length < 4 or not is_even or comes.mean() < MIN_SHARE:
        return 0
    return length


def mixing(thumbs, starts, length, spread):
    """Scores how much the frames from s to s + length, s in starts [n], look like a mixture of the first and the last.

    In a dissolve each pixel goes straight from one picture to another that is unlike it; where things move, pixels go
    elsewhere in between.  Returns (score [n], is_sure [n]).  score: the share of the changed pixels that are on the way
    at 1/4, 1/2 and 3/4, less half the correlation of both pictures; -1 where there is no mixture.  is_sure: the middle
    has lost the variance that a mixture loses (Alattar 1993), unlike a pan over something out of focus."""
    start = thumbs[starts].astype(np.float32)                           # [n P 3]
    end = thumbs[starts + length].astype(np.float32)
    way = end - start
    norm = (way * way).sum((1, 2)) + 1e-6
    level = np.maximum(spread[starts], spread[starts + length])
    is_changed = np.abs(way) > CHANGED * level[:, None, None] + 0.5
    is_straight = is_changed.copy()
    is_linear = np.ones(len(starts), bool)
    for quarter in (1, 2, 3):
        moved = thumbs[starts + quarter * length // 4] - start
        alpha = (moved * way).sum((1, 2)) / norm                        # how far the whole picture is
        off = np.abs(moved - alpha[:, None, None] * way)
        is_straight &= off < 0.35 * np.abs(way) + 0.5                   # half a level of rounding, for dark footage
        is_linear &= np.abs(alpha - quarter / 4) < 0.13
    alike = correlation(start, end)
    score = is_straight.sum((1, 2)) / np.maximum(is_changed.sum((1, 2)), 1) - np.maximum(alike, 0) / 2
    is_mixture = is_linear & (alike < MAX_ALIKE) & (is_changed.mean((1, 2)) > MIN_SHARE)
    # The mean of two pictures has a quarter of var(way) less variance than they have; half of that is asked for.
    variance = (start.var((1, 2)) + end.var((1, 2))) / 2
    middle = thumbs[starts + length // 2].astype(np.float32)
    is_sure = variance - middle.var((1, 2)) > way.var((1, 2)) / 8
    return np.where(is_mixture, score, -1), is_sure


def dissolves(changes, thumbs, spread, known):
    """Returns (first mixed frame, first clean frame) of dissolves that do not overlap the known transitions."""
    windows = []
    for length in DISSOLVES:
        starts = np.arange(0, len(thumbs) - length, length // 3)
        for part in np.array_split(starts, len(starts) // 256 + 1):     # bounds the memory
            scores, is_sure = mixing(thumbs, part, length, spread)
            windows += [(scores[i], part[i], length, is_sure[i]) for i in np.flatnonzero(scores > MIN_MIXED)]
    found = []
    for _, start, length, is_sure in sorted(windows, reverse=True):     # the best first
        first, end, is_steady = mixed_frames(thumbs, start, length)
        overlaps = any(first <= b and a <= end for a, b in [*known, *found])
        if first >= end or overlaps or not is_steady:
            continue
        # If the frames around change as much as the mixture does, then it is a pan.
        before = changes[max(1, first - 8):first]
        after = changes[end + 1:end + 9]
        calmest = min((np.median(part) for part in (before, after) if len(part)), default=math.inf)
        if is_sure or calmest < 0.4 * np.median(changes[first:end]):
            found.append((first, end))
    return found


def mixed_frames(thumbs, start, length):
    """Returns (first mixed frame, first clean frame, whether none goes back) of the dissolve in a window."""
    way = thumbs[start + length].astype(np.float32) - thumbs[start]
    low = max(0, start - REACH)
    near = thumbs[low:start + length + REACH + 1]
    along = np.einsum("tpc,pc->t", near, way) / (way * way).sum()
    steps = np.diff(along) * length                                     # about 1 within the dissolve, 0 outside
    moves = np.pad(steps > 0.3, 1)
    moves = moves[1:-1] | moves[:-2] & moves[2:]                        # a frame shown twice is no end
    stops = np.flatnonzero(~moves)
    middle = start - low + length // 2
    first = max(stops[stops < middle], default=-1) + 2
    end = min(stops[stops >= middle], default=len(moves))
    within = steps[start - low:start - low + length]
    return int(low + first), int(low + end), within.min() > -1          # a strobe goes there and back


def split_shots(transitions, times, min_seconds=2.0, max_seconds=16.0):
    """Returns (clips, shots that are too short), lists of (first frame, frame after the last), without transitions.

    A shot over max_seconds is divided evenly.  times [T] in seconds.  At 24 frames a second and Open-Sora 1.1's
    interval of 3, 2 s fill its shortest bucket of videos, 16 frames, and 16 s its longest, 128."""
    clips = []
    too_short = []
    ends = frame_ends(times)
    gap = ends[-1] - times[-1]
    bounds = [0, *itertools.chain(*transitions), len(times)]
    for start, stop in zip(bounds[::2], bounds[1::2]):
        seconds = ends[stop] - ends[start]
        if start < stop and seconds < min_seconds - gap / 2:
            too_short.append((start, stop))
        elif start < stop:
            num_pieces = math.ceil(seconds / max_seconds - 1e-6)
            edges = np.linspace(ends[start], ends[stop], num_pieces + 1)[1:-1]
            inner = np.searchsorted(ends + gap / 2, edges).tolist()
            clips += itertools.pairwise([start, *inner, stop])
    return clips, too_short


def frame_ends(times):
    """Returns when each frame begins and when the last one ends, [T + 1] seconds."""
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return np.append(times, times[-1] + gap)


# ---------------------------------------------------------------- black bars
BAR = 24                # grey levels that black bars stay under; black is 0, or 16 where its range is not known
SAMPLE_EVERY = 24       # frames


def lit_share(picture):
    """Returns the share of each row [h] and of each column [w] of a grey picture [h w] that is not black."""
    lit = picture > BAR
    return lit.mean(1).astype(np.float16), lit.mean(0).astype(np.float16)


def find_bars(samples):
    """Returns the black rows above and below and columns left and right, [4], of samples of `lit_share`.

    A bar ends in a straight edge: most of the first lines after it are lit in some frame, unlike in titles on black and
    in night skies.  Frames too dark to tell give 0, and so do bars over a third (2.39:1 in 4:3 leaves 22%)."""
    rows = np.stack([row for row, _ in samples])
    columns = np.stack([column for _, column in samples])
    return np.array([bar_width(rows), bar_width(rows[:, ::-1]), bar_width(columns), bar_width(columns[:, ::-1])])


def bar_width(lines):
    """Returns the width of the bar at the first lines of [samples lines]."""
    brightest = np.quantile(lines.astype(np.float32), 0.98, 0)          # one sample in fifty may be broken
    width = int((brightest < 0.02).cumprod().sum())
    edge = lines[:, width:width + 1 + lines.shape[1] // 50]             # it may be soft
    if width > lines.shape[1] // 3 or edge.max(initial=0) <= 0.5:
        return 0
    return width


def picture_box(bars, height, width):
    """Returns the box (top, left, height, width) without bars [4], even, one or two pixels inside of the edges."""
    top, bottom, left, right = (2 * math.ceil((bar + 1) / 2) if bar else 0 for bar in bars)
    return top, left, (height - top - bottom) // 2 * 2, (width - left - right) // 2 * 2


# ---------------------------------------------------------------- writing clips
GOP = 16                # frames between key frames: what training has to decode before its window
MAX_SIDE = 720          # pixels of the short side: the recipe's largest bucket is 720p
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}   # mbtree: see data.write_mp4


class Clip(NamedTuple):
    """A clip to be cut out of a video."""
    start: int          # its first frame
    stop: int           # the frame after its last
    file: Path          # .mp4
    box: tuple          # (top, left, height, width) of the displayed frame


def write_clips(path, clips, times):
    """Decodes a video once and writes clips, ascending; yields the columns of each.  times [T] of all frames."""
    frames = decode(path)
    position = 0
    for clip in clips:
        clip.file.parent.mkdir(parents=True, exist_ok=True)
        own = itertools.islice(frames, clip.start - position, clip.stop - position)
        yield write_clip(clip, own, times[clip.start:clip.stop])
        position = clip.stop


def write_clip(clip, frames, times):
    """Writes frames of `decode` as H.264, upright, with square pixels; returns the columns of the clip.

    A constant frame rate is kept; with a variable one each frame keeps its time."""
    _, first, source = next(frames)
    rate = constant_rate(times, source.guessed_rate or 24)
    graph = display_filter(clip, first, source)
    with atomic_write(clip.file) as part, av.open(str(part), "w", format="mp4",
                                                  options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate or 24, options=ENCODER)
        stream.codec_context.gop_size = GOP
        stream.codec_context.time_base = 1 / rate if rate else Fraction(1, 90000)
        count = 0
        for _, frame, _ in itertools.chain([(0, first, source)], frames):
            graph.push(frame)
            shown = graph.pull()
            if count == 0:
                stream.width = shown.width
                stream.height = shown.height
                stream.pix_fmt = "yuv420p"
                stream.codec_context.color_range = int(shown.color_range)
                if "rgb" not in frame.format.name and "gbr" not in frame.format.name:
                    stream.codec_context.colorspace = int(frame.colorspace)     # the filter does not pass it on
            shown.pts = count if rate else round((times[count] - times[0]) * 90000)
            shown.time_base = stream.codec_context.time_base
            shown.pict_type = PictureType.NONE      # otherwise x264 makes a key frame wherever the source has one
            container.mux(stream.encode(shown))
            count += 1
        container.mux(stream.encode())
        if count != len(times):
            raise UnreadableClip(f"{clip.file}: {count} frames were decoded, expected {len(times)}")
    fps = float(rate) if rate else (count - 1) / (times[-1] - times[0])
    return {"height": shown.height, "width": shown.width, "fps": fps}


def display_filter(clip, frame, source):
    """Returns a filter graph from decoded frames to 4:2:0 as displayed: square pixels, upright, cut to the clip's box,
    its short side at most MAX_SIDE, both sides even."""
    displayed = displayed_width(clip.file, frame, source)
    transposed, down, right = orientation(frame)
    scale = min(1, MAX_SIDE / min(clip.box[2:]))
    top, left, height, width = (round(n * scale) for n in clip.box)
    steps = [("scale", f"{round(displayed * scale)}:{round(frame.height * scale)}:flags=area")]
    if transposed:
        steps.append(("transpose", "cclock_flip"))
    if down < 0:
        steps.append(("vflip", None))
    if right < 0:
        steps.append(("hflip", None))
    steps += [("format", "yuv420p"), ("crop", f"{width // 2 * 2}:{height // 2 * 2}:{left}:{top}:exact=1"),
              ("setsar", "1")]
    graph = av.filter.Graph()
    begin = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=source.time_base)
    filters = [graph.add(name, text) for name, text in steps]
    graph.link_nodes(begin, *filters, graph.add("buffersink")).configure()
    return graph


# ---------------------------------------------------------------- cut: a source file to its clips
TOO_SHORT = "too short a shot"


class Scan(NamedTuple):
    """What one decode of a video gives."""
    times: np.ndarray       # [T] seconds from the first frame on
    transitions: list       # (end of a shot, begin of the next)
    samples: list           # (frame number, lit_share)
    height: int             # as displayed
    width: int
    damage: str             # why the frames after the last one cannot be used, or ""


def scan(path):
    """Decodes a video once, small, up to its first damage.  Raises UnreadableClip if no frame can be used."""
    thumbs = bytearray()                            # many small arrays would take more memory
    shrink = Shrink(path, CUT_SIDE)
    sample = Shrink(path, 1 << 20, grey=True)       # in full size
    seconds = []
    samples = []
    damage = ""
    try:
        for time, frame, stream in decode(path, fast=True):
            thumbs += shrink(frame, stream).tobytes()
            if len(seconds) % SAMPLE_EVERY == 0:
                rate = stream.guessed_rate or 24
                picture = sample(frame, stream)
                samples.append((len(seconds), lit_share(picture)))
            seconds.append(time)
    except UnreadableClip as error:
        if not seconds:
            raise
        damage = str(error)
    thumbs = np.frombuffer(thumbs, np.uint8).reshape(len(seconds), -1, 3)
    return Scan(frame_times(seconds, rate), find_transitions(thumbs), samples, *picture.shape, damage)


def cut(row, options):
    """Cuts a source file into clip files.  Returns {"clips": the rows of its clips, and of what gives none and why}."""
    # Places count from what holds both the sources and the clips, so that no two sources have the same one.
    common = os.path.commonpath([os.path.abspath(options.what), options.folder])
    place = Path("clips", os.path.relpath(row["path"], common))
    if is_image(row["path"]):
        clips = [copy_image(row["path"], options.folder, place)]
    else:
        clips = cut_video(row["path"], options, place)
    return {"clips": [rounded(clip) for clip in clips]}


def copy_image(path, folder, place):
    """Copies an image to its place and returns its columns."""
    height, width, _ = read_image(path).shape
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / place) as part:
        shutil.copyfile(path, part)
    return {"path": place.as_posix(), "num_frames": 1, "height": height, "width": width, "fps": "",
            "start_seconds": 0.0, "seconds": 0.0}


def cut_video(path, options, place):
    """Writes the clips of a video into the folder `place`; returns their columns, and those of what gives no clip."""
    video = scan(path)
    spans, too_short = split_shots(video.transitions, video.times, options.min_seconds, options.max_seconds)
    bars = find_bars([lit for _, lit in video.samples])
    clips = []
    for start, stop in spans:
        own = [lit for frame, lit in video.samples if start <= frame < stop]
        # A dark clip shows no edges, so the bars of the whole video count as well.
        own_bars = np.maximum(bars, find_bars(own)) if own else bars
        box = picture_box(own_bars, video.height, video.width)
        if min(box[2:]) < 2:
            raise UnreadableClip(f"{path}: is {video.height}x{video.width}, H.264 needs two rows and columns or more")
        clips.append(Clip(start, stop, options.folder / place / f"{start:06d}-{stop:06d}.mp4", box))
    rows = []
    for clip, columns in zip(clips, write_clips(path, clips, video.times)):
        file = clip.file.relative_to(options.folder).as_posix()
        rows.append({"path": file} | columns | span_columns(clip.start, clip.stop, video.times))
    for start, stop in too_short:
        rows.append({"path": "", "error": TOO_SHORT} | span_columns(start, stop, video.times))
    if video.damage:
        rows.append({"path": "", "error": f"{video.damage}; only the {len(video.times)} frames before are used"})
    return rows


def span_columns(start, stop, times):
    ends = frame_ends(times)
    return {"num_frames": stop - start, "start_seconds": ends[start], "seconds": ends[stop] - ends[start]}


def rounded(columns):
    """Returns columns as they go into a csv: floats with 4 digits after the point, nan as ""."""
    cells = {}
    for name, value in columns.items():
        if isinstance(value, (float, np.floating)):
            value = "" if math.isnan(value) else round(float(value), 4)
        cells[name] = value
    return cells


# ---------------------------------------------------------------- flow
WARPS = (1, 2, 2, 2, 3)     # per level, finest first; each level halves, so 20 pixels are 1.25 at the coarsest
CELL = 4                    # pixels per unknown
SWEEPS = 15                 # of the solver
SMOOTH = 0.1                # weight of the neighbours' mean against one fully textured cell
GRADIENT = 3.0              # grey levels per pixel: below it an edge is no better than noise
OUTLIER = 10.0              # grey levels: a pixel that stays this different counts half


def flow(a, b):
    """Returns the optical flow [N 2 h w], (right, down) in pixels, of grey pictures [N h w] in 0..255: what a shows at
    p, b shows at p + flow.

    Combined local-global flow (Bruhn, Weickert and Schnörr, IJCV 61(3), 2005, eq. 9): the windowed products of Lucas
    and Kanade (1981) hold where there is texture, Horn and Schunck's (1981) smoothness fills the rest, coarse to fine
    with warping.  Each pixel's equation is divided by its gradient (Zimmer et al., IJCV 93(3), 2011) and by a Cauchy
    weight of its misfit.  Each picture is taken less its local mean, so a change of light is no motion.  Holds for
    motion up to 20 pixels.  Raises ValueError for sides under 32."""
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < 32:
        raise ValueError(f"flow needs two batches [N h w], h and w at least 32, got {[*a.shape]} and {[*b.shape]}")
    pyramid = [(smooth(a[:, None].float()), smooth(b[:, None].float()))]
    while len(pyramid) < len(WARPS) and min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(smooth(x), 2, ceil_mode=True) for x in pyramid[-1]))
    u = torch.zeros(len(a), 2, *pyramid[-1][0].shape[-2:])      # as if from a coarser level; cut to size below
    for (a, b), num_warps in reversed(list(zip(pyramid, WARPS))):
        h, w = a.shape[-2:]
        a = a - local_mean(a)
        b = b - local_mean(b)
        u = 2 * F.interpolate(u, scale_factor=2, mode="bilinear")[..., :-(-h // CELL), :-(-w // CELL)]
        for _ in range(num_warps):
            u = refine(a, b, u)
    return per_pixel(u, h, w)


def replicate(x, n=1):
    return F.pad(x, (n, n, n, n), mode="replicate")


def smooth(x):
    """Applies the binomial filter (1, 2, 1) / 4 along both sides of [... h w]."""
    x = replicate(x)
    x = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1], alpha=2)
    return (x[..., :-2, :] + x[..., 2:, :]).add_(x[..., 1:-1, :], alpha=2).mul_(1 / 16)


def local_mean(x):
    """Returns the mean of 7 x 7 pixels."""
    return F.avg_pool2d(F.avg_pool2d(replicate(x, 3), (1, 7), 1), (7, 1), 1)


def gradient(x):
    """Returns central differences of [N 1 h w], to the right and down."""
    x = replicate(x)
    return (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2


def per_pixel(u, h, w):
    """Returns [N 2 cells] as [N 2 h w]; a cell may reach over the edge."""
    return F.interpolate(u, scale_factor=CELL, mode="bilinear")[..., :h, :w]


def refine(a, b, u):
    """Warps b [N 1 h w] by the flow u [N 2 cells], then returns the new flow: Jacobi sweeps over CLG's equations."""
    h, w = a.shape[-2:]
    field = per_pixel(u, h, w)
    x = torch.arange(w) + field[:, 0]
    y = torch.arange(h)[:, None] + field[:, 1]
    is_inside = ((x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1))[:, None]
    place = torch.stack((x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1), -1)
    warped = F.grid_sample(b, place, padding_mode="border", align_corners=True)
    ax, ay = gradient(a)
    bx, by = gradient(warped)
    gx = (ax + bx) / 2
    gy = (ay + by) / 2
    gt = warped - a
    weight = is_inside / ((gx * gx + gy * gy + GRADIENT ** 2) * (1 + (gt / OUTLIER) ** 2))
    wx = weight * gx
    wy = weight * gy
    products = torch.cat((wx * gx, wx * gy, wy * gy, wx * gt, wy * gt), 1)
    products = smooth(smooth(F.avg_pool2d(products, CELL, ceil_mode=True)))
    xx, xy, yy, xt, yt = products.unbind(1)                             # [N cells]

    # (J + SMOOTH) u = J u0 - (xt, yt) + SMOOTH * mean of the neighbours' u, a 2 x 2 system in each cell.
    determinant = (xx + SMOOTH) * (yy + SMOOTH) - xy * xy
    diagonal = torch.stack((yy + SMOOTH, xx + SMOOTH), 1) / determinant[:, None]
    off_diagonal = (-xy / determinant)[:, None]
    data_term = torch.stack((xx * u[:, 0] + xy * u[:, 1] - xt, xy * u[:, 0] + yy * u[:, 1] - yt), 1)
    for _ in range(SWEEPS):
        right = data_term + SMOOTH * F.avg_pool2d(replicate(u), 3, 1)
        u = diagonal * right + off_diagonal * right.flip(1)
    return u


# ---------------------------------------------------------------- motion: flow, shake, camera
MOTION_SIDE = 320       # pixels of the longer side; speeds are in pixels per second at this size
PAIR_GAP = 1 / 25       # seconds between the frames of a pair, at least
TRIPLE_EVERY = 13 / 24  # seconds; not a multiple of 1/12 or 1/8, so that drawings held for 2 or 3 frames do not beat
STATIC = 3.0            # speed of the camera below which it stands still
AGAINST = (0.5, 0.15)   # pixels, and share of the local camera motion, by which a pixel may differ and still follow it
REPEAT = 0.6            # grey levels, mean of any 16 x 16 block: a held picture changes by 0.5, quiet film by 0.7
MOTION_COLUMNS = ("flow", "shake", "cmotion", "against")
MOVES = (("pan right", "pan left"), ("tilt down", "tilt up"), ("zoom in", "zoom out"), ("roll", "roll"))


def read_grey(path):
    """Returns (seconds [T], uint8 [T h w]) of all frames of a clip or an image, as displayed, no side over MOTION_SIDE.

    16 seconds take 22 MB."""
    if is_image(path):
        image = Image.fromarray(read_image(path)).convert("L")
        image.thumbnail((MOTION_SIDE, MOTION_SIDE), Image.Resampling.BOX)
        return np.zeros(1), np.array(image)[None]
    shrink = Shrink(path, MOTION_SIDE, grey=True)
    seconds = []
    pictures = []
    for time, frame, stream in decode(path, fast=True):
        seconds.append(time)
        pictures.append(shrink(frame, stream))
        rate = stream.guessed_rate or 24
    return frame_times(seconds, rate), np.stack(pictures)


def repeats(pictures):
    """Returns bool [T-1]: whether a grey picture [T h w] shows what the one before does; no block of it may change."""
    same = []
    for before, after in itertools.pairwise(pictures):
        change = torch.from_numpy(after.astype(np.float32) - before)
        limit = REPEAT * np.clip(after.std() / 20, 0.4, 1)              # pale and dark footage changes less
        same.append(F.avg_pool2d(change[None], 16, ceil_mode=True).abs().max().item() < limit)
    return np.array(same, bool)


def describe_motion(times, pictures):
    """Returns MOTION_COLUMNS of grey pictures uint8 [T h w] at times [T]; empty for under three frames or 32 pixels.

    flow: the mean speed of the pixels.  shake: how much the camera's motion changes from one pair of frames to the
    next, the median over triples.  cmotion: `name_motion`.  against: the share of pixels that move otherwise.  shake
    and cmotion leave out pairs that show one picture twice, as animation does."""
    triples = choose_triples(times)                                     # [n 3]
    if len(triples) == 0 or min(pictures.shape[1:]) < 32:
        return dict.fromkeys(MOTION_COLUMNS, "")
    moves = []
    for part in np.split(triples, range(4, len(triples), 4)):           # eight pairs at once take half the time
        a = torch.from_numpy(pictures[part[:, :2]]).flatten(0, 1)
        b = torch.from_numpy(pictures[part[:, 1:]]).flatten(0, 1)
        moves.append(camera_motion(flow(a, b), np.diff(times[part]).ravel()))
    moves = np.concatenate(moves).reshape(-1, 2, 6)                     # [n 2 6]
    is_new = np.stack([~repeats(pictures[triple]) for triple in triples])       # [n 2]
    camera = moves[..., 1:5]
    changes = np.linalg.norm(camera[:, 1] - camera[:, 0], axis=1)[is_new.all(1)]
    return {"flow": moves[..., 0].mean(), "shake": np.median(changes) if len(changes) else 0.0,
            "cmotion": name_motion(moves[is_new]), "against": moves[..., 5].mean()}


def choose_triples(times):
    """Returns numbers [n 3] of frames PAIR_GAP apart, every TRIPLE_EVERY seconds; times [T]."""
    starts = np.arange(0, times[-1], TRIPLE_EVERY)
    triples = [np.searchsorted(times, starts - 0.001)]
    for _ in range(2):
        later = times[triples[-1]] + PAIR_GAP - 0.001
        triples.append(np.searchsorted(times[:-1], later))              # the last frame where there is no other
    first, second, third = triples
    return np.stack(triples, 1)[(first < second) & (second < third)]


def camera_motion(field, seconds):
    """Returns [n 6] of `flow` [n 2 h w] of pairs that are seconds [n] apart: the mean length of the flow; the camera's
    motion to the right, down, zooming in and rolling; the share of pixels that move otherwise.

    The first five are in pixels per second at MOTION_SIDE, zoom and roll as rms over the frame.  Medians give the
    shift, growth and turning that most pixels share, then those of the pixels that follow: a person who fills a third
    of the frame changes none of them."""
    h, w = field.shape[-2:]
    # One pixel of 36: flow has one unknown for 16.
    y, x = torch.meshgrid(torch.arange(2, h, 6) - (h - 1) / 2, torch.arange(2, w, 6) - (w - 1) / 2, indexing="ij")
    u, v = field[:, :, 2::6, 2::6].unbind(1)                            # [n h' w']
    radius = x * x + y * y
    is_far = radius > min(h, w) ** 2 / 16                               # near the middle growth is small against noise
    grow = torch.zeros(len(field), 1, 1)
    turn = torch.zeros(len(field), 1, 1)
    follows = torch.ones(u.shape, dtype=torch.bool)
    for _ in range(4):
        right = median(u - grow * x + turn * y, follows)
        down = median(v - grow * y - turn * x, follows)
        grow = median(((u - right) * x + (v - down) * y) / radius, follows & is_far)
        turn = median(((v - down) * x - (u - right) * y) / radius, follows & is_far)
        shared = torch.stack((right + grow * x - turn * y, down + grow * y + turn * x), 1)
        rest = torch.stack((u, v), 1) - shared
        follows = rest.norm(dim=1) <= AGAINST[0] + AGAINST[1] * shared.norm(dim=1)
    against = 1 - follows.float().mean((1, 2))
    speed = field.norm(dim=1).mean((1, 2))
    rms = math.sqrt((h * h + w * w) / 12)                               # distance from the middle
    # The camera moves opposite to the picture.
    motion = torch.stack((speed, -right.flatten(), -down.flatten(), rms * grow.flatten(), -rms * turn.flatten()), 1)
    scale = MOTION_SIDE / max(h, w) / np.asarray(seconds)[:, None]
    return np.column_stack([motion.numpy() * scale, against.numpy()])


def median(x, where):
    """Returns the median [n 1 1] of the marked values of x [n h w]; 0 where none is marked."""
    marked = x.masked_fill(~where, math.nan).flatten(1)
    return marked.nanmedian(1).values.nan_to_num()[:, None, None]


def name_motion(moves):
    """Returns the name of the camera's motion from `camera_motion` of pairs [n 6], in their order: static, pan, tilt,
    zoom or roll with its direction, or shake.

    Medians over the pairs, so that a flash does no harm.  Returns "" where in most pairs most pixels follow no camera
    motion, and where directions take turns (right, then left)."""
    camera = moves[moves[:, 5] <= 0.5, 1:5]                             # [m 4]
    if len(moves) == 0:
        return "static"
    if 2 * len(camera) < len(moves):
        return ""
    length = np.median(np.linalg.norm(camera, axis=1))
    if length < STATIC:
        return "static"
    # Where pairs are unrelated, the changes are sqrt(2) times as long as the motion.
    if len(camera) > 2 and np.median(np.linalg.norm(np.diff(camera, axis=0), axis=1)) > length:
        return "shake"
    middle = np.median(camera, 0)
    if np.linalg.norm(middle) < length / 2:
        return ""
    axis = np.abs(middle).argmax()
    return MOVES[axis][int(middle[axis] < 0)]


# ---------------------------------------------------------------- appearance
APPEARANCE_COLUMNS = ("brightness", "sharpness", "repeats", "held", "phash")
NO_HASH = "0" * 16
FLAT = 8.0              # rms of the 64 coefficients of a hash: shots have 60 or more, black with noise has 1


def describe_appearance(times, pictures):
    """Returns APPEARANCE_COLUMNS of grey pictures uint8 [T h w] at times [T].

    brightness: mean luma, 0..1.  sharpness: median variance of the Laplacian at MOTION_SIDE, in grey levels squared
    (Pech-Pacheco et al., ICPR 2000, LAPV); shots have 100 to 5000, after a box blur of 9 pixels 1 to 20.  repeats: the
    share of frames that show what the one before does.  held: seconds of the longest run of these.  phash: the hashes
    of the first, middle and last frame."""
    is_repeated = repeats(pictures)
    changed = np.concatenate([[0], np.flatnonzero(~is_repeated) + 1, [len(times)]])     # first frame of each drawing
    held = times[changed[1:] - 1] - times[changed[:-1]]
    ends_and_middle = pictures[[0, len(pictures) // 2, -1]]
    return {"brightness": pictures.mean() / 255, "sharpness": np.median([sharpness(one) for one in pictures[::6]]),
            "repeats": is_repeated.mean() if len(is_repeated) else 0.0, "held": held.max(),
            "phash": "".join(perceptual_hash(one) for one in ends_and_middle)}


def measure_motion(row, options):
    return describe_motion(*read_grey(row["path"]))


def measure_appearance(row, options):
    return describe_appearance(*read_grey(row["path"]))


def measure_both(row, options):
    """Returns the columns of motion and appearance with one decode."""
    times, pictures = read_grey(row["path"])
    return describe_motion(times, pictures) | describe_appearance(times, pictures)


def sharpness(picture):
    """Returns the variance of the Laplacian of a picture uint8 [h w]."""
    x = np.pad(picture.astype(np.float32), 1, mode="edge")
    laplacian = x[1:-1, :-2] + x[1:-1, 2:] + x[:-2, 1:-1] + x[2:, 1:-1] - 4 * x[1:-1, 1:-1]
    return laplacian.var()


def perceptual_hash(picture):
    """Returns 16 hex digits of a grey picture uint8 [h w]; NO_HASH for a flat one, where noise would decide.

    DCT hash (Zauner 2010, sec. 3.2.1): 32 x 32 luma, whether each of 8 x 8 low frequencies is above their median."""
    small = Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX)
    k, x = np.mgrid[1:9, :32]
    dct = np.cos(np.pi * k * (2 * x + 1) / 64) / 4                      # [8 32], orthonormal
    coefficients = (dct @ np.asarray(small, np.float32) @ dct.T).ravel()
    if np.sqrt((coefficients ** 2).mean()) < FLAT:
        return NO_HASH
    return np.packbits(coefficients > np.median(coefficients)).tobytes().hex()


# ---------------------------------------------------------------- networks: workers read frames, a device looks at them
def num_frames(row):
    """Returns how many frames a row of a table says that its clip has; raises ValueError if it does not."""
    count = read_number(str(row.get("num_frames", "")))
    if not 1 <= count < math.inf:
        raise ValueError(f"{row['path']}: its num_frames is {row.get('num_frames', '')!r}, expected how many it has")
    return int(count)


def read_frames(row, numbers):
    """Returns frames uint8 [H W 3] of a clip by number, each decoded from the key frame before it."""
    return [read_window(row["path"], 1, start=k)[0][0].numpy() for k in numbers]


def read_ends_and_middle(row):
    """Returns the first, middle and last frame; an image's only frame is all three."""
    last = num_frames(row) - 1
    return read_frames(row, sorted({0, last // 2, last}))


def resize(frame, height, width):
    return np.array(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BILINEAR))


def fit(frames, side, multiple=1):
    """Returns frames uint8 [n h w 3] whose longer side is at most `side`, both sides rounded to multiples."""
    scale = min(1, side / max(frames[0].shape[:2]))
    height, width = (max(multiple, round(n * scale / multiple) * multiple) for n in frames[0].shape[:2])
    return np.stack([resize(frame, height, width) for frame in frames])


def load_frozen(cls, name, device, half=torch.float16):
    """Returns a frozen network, by its class in transformers and a folder or hub name; on a GPU in half precision."""
    _, transformers = hugging_face()
    dtype = torch.float32 if device == "cpu" else half
    return load_net(getattr(transformers, cls), name, dtype=dtype).to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------- CLIP: aesthetic score, match of text and picture
HEAD_LAYERS = (0, 2, 4, 6, 7)   # linear layers of LAION's file; between them dropout and no activation: "linearMSE"



@lru_cache
def clip_processor(name):
    """Returns transformers' preprocessing for a CLIP, as openai/clip-vit-large-patch14 has it."""
    _, transformers = hugging_face()
    size = from_pretrained(transformers.CLIPConfig, name).vision_config.image_size
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def clip_pixels(frames, name):
    """Returns frames uint8 [H W 3] as CLIP takes them, fp32 [n 3 size size]."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    return clip_processor(name)(images, return_tensors="np")["pixel_values"]


def image_features(clip, pixels):
    """Returns unit vectors [N C], fp32, of pixels [N 3 size size]."""
    pixels = torch.from_numpy(pixels).to(clip.device, clip.dtype)
    return F.normalize(clip.get_image_features(pixels).pooler_output.float(), dim=-1)


def prepare_aesthetic(row, options):
    return clip_pixels(read_ends_and_middle(row), options.clip_model)


def load_aesthetic(options):
    """Returns a function that scores clips: LAION's aesthetic predictor, on unit features of CLIP ViT-L/14."""
    path = options.aesthetic_head
    if not Path(path or "").is_file():
        raise FileNotFoundError(f"--aesthetic-head {path!r} is not a file: get sac+logos+ava1-l14-linearMSE.pth from "
                                "https://github.com/christophschuhmann/improved-aesthetic-predictor")
    clip = load_frozen("CLIPModel", options.clip_model, options.device)
    head = load_head(path, clip.config.projection_dim, options.device)
    return partial(score_aesthetic, clip, head)


def load_head(path, width, device):
    """Returns the aesthetic head of a file as a Module that takes features of `width`; raises ValueError if it is
    something else."""
    wanted = f"expected the tensors layers.0.weight to layers.7.bias of LAION's head for features of width {width}"
    try:
        state = torch.load(path, "cpu", weights_only=True)
        shapes = [state[f"layers.{i}.weight"].shape for i in HEAD_LAYERS]
        head = torch.nn.Sequential(*[torch.nn.Linear(fan_in, fan_out) for fan_out, fan_in in shapes])
        tensors = {f"{place}.{kind}": state[f"layers.{i}.{kind}"]
                   for place, i in enumerate(HEAD_LAYERS) for kind in ("weight", "bias")}
        head.load_state_dict(tensors)
    except Exception as error:          # of whatever a file may hold in place of the head
        raise ValueError(f"the aesthetic head {path} cannot be used, {wanted}: {one_line(error)}") from error
    if shapes[0][1] != width:
        raise ValueError(f"the aesthetic head {path} takes features of width {shapes[0][1]}, {wanted} - it belongs to "
                         "openai/clip-vit-large-patch14")
    return head.to(device).requires_grad_(False)


def score_aesthetic(clip, head, rows, pixels):
    """Returns aes, 1 to 10, mean over the frames of a clip; features: their mean direction, fp16 in base64."""
    features = image_features(clip, np.concatenate(pixels))
    counts = [len(frames) for frames in pixels]
    columns = []
    for scores, own in zip(head(features).split(counts), features.split(counts)):
        mean = F.normalize(own.mean(0), dim=0).cpu().numpy().astype("<f2")
        columns.append({"aes": scores.mean().item(), "features": base64.b64encode(mean.tobytes()).decode()})
    return columns


def prepare_match(row, options):
    """Returns the pixels of the middle frame, or None if the clip has no text to match."""
    if not row["text"]:
        return None
    return clip_pixels(read_frames(row, [(num_frames(row) - 1) // 2]), options.clip_model)


def load_match(options):
    clip = load_frozen("CLIPModel", options.clip_model, options.device)
    _, transformers = hugging_face()
    tokenizer = from_pretrained(transformers.AutoTokenizer, options.clip_model)
    return partial(score_match, clip, tokenizer)


def score_match(clip, tokenizer, rows, pixels):
    """Returns match, 100 times the cosine of text and middle frame, "" without a text.  Words beyond CLIP's 77 tokens
    do not count."""
    columns = [{"match": ""} for _ in rows]
    places = [i for i, one in enumerate(pixels) if one is not None]
    if not places:
        return columns
    tokens = tokenizer([rows[i]["text"] for i in places], padding=True, truncation=True, return_tensors="pt",
                       max_length=clip.config.text_config.max_position_embeddings).to(clip.device)
    texts = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
    images = image_features(clip, np.concatenate([pixels[i] for i in places]))
    for i, cosine in zip(places, (texts * images).sum(-1).tolist()):
        columns[i]["match"] = 100 * cosine
    return columns


# ---------------------------------------------------------------- text on screen
OCR_SIDE = 960          # of PP-OCR's own preprocessing
OCR_SMALL = 480         # pixels of the longer side, up to which a frame is looked at enlarged as well, others shrunk
OCR_AT_ONCE = 8         # frames
OCR_MEAN = (0.485, 0.456, 0.406)        # in this order for B G R, as the detector was trained
OCR_STD = (0.229, 0.224, 0.225)
IS_TEXT = 0.3           # probability (DB, arXiv 1911.08947)


def prepare_ocr(row, options):
    return fit(read_ends_and_middle(row), OCR_SIDE, 32)


def load_ocr(options):
    return partial(measure_text, load_frozen("AutoModelForObjectDetection", options.ocr_model, options.device))


def measure_text(net, rows, clips):
    """Returns text_area, the share of the picture that is text, of each clip's frame with most text."""
    columns = []
    for frames in clips:
        areas = [(text_probability(net, part) > IS_TEXT).float().mean((1, 2))
                 for part in torch.from_numpy(frames).split(OCR_AT_ONCE)]
        columns.append({"text_area": torch.cat(areas).max().item()})
    return columns


def text_probability(net, frames):
    """Returns [N h w] of uint8 [N h w 3] by PP-OCR's detector; where it sees text, the least of three looks.

    Text stays text as a negative and at another size; patches of fur, petals and lit windows, up to 0.2 of the picture,
    which the detector takes for text on a tenth of the frames without text, do not."""
    x = rearrange(frames.to(net.device).float().flip(-1) / 255, "n h w c -> n c h w")       # B G R
    text = detect_text(net, x)
    some = (text.amax((1, 2)) > IS_TEXT).nonzero()[:, 0]
    if not len(some):
        return text
    size = x.shape[2:]
    scale = 0.5 if max(size) > OCR_SMALL else 2
    other_size = [max(1, round(n * scale / 32)) * 32 for n in size]
    other = detect_text(net, F.interpolate(x[some], other_size, mode="bilinear", antialias=True))
    other = F.interpolate(other[:, None], size, mode="bilinear")[:, 0]
    negative = detect_text(net, 1 - x[some])
    text[some] = torch.minimum(text[some], torch.minimum(negative, other))
    return text


def detect_text(net, x):
    """Returns the probability of text [N h w] of B G R pictures [N 3 h w] in 0..1."""
    mean = x.new_tensor(OCR_MEAN)[:, None, None]
    std = x.new_tensor(OCR_STD)[:, None, None]
    return net(((x - mean) / std).to(net.dtype)).last_hidden_state[:, 0].float()


# ---------------------------------------------------------------- captions
CAPTION_SIDE = 640      # pixels: more than most captioners look at; bounds the tokens of those that take any size
CAPTION_FRAMES = 4      # each the middle of its part; with LLaVA-1.5's 576 tokens they leave room in its 4,096
PROMPT = ("These are frames of one video, in order. Describe the video in one paragraph: who or what is seen, what "
          "happens, the place, the light and the style. Do not speak of frames, images or a video, and do not guess "
          "what is not seen.")
PREFIX = re.compile(r"""(?: (?:sure|certainly|here\ is)\b[^:.!]*[:.!]\s* )?
    (?: (?:in\ )?(?:this|the|these)\ (?:short\ |four\ )?(?:video|image|clip|footage|scene|frame)s?(?:\ clip)?
        (?: [,:]\s*(?:we\ (?:can\ )?see\ )? | \ (?:show|capture|feature|depict|present|portray|display)s?\s
          | \ (?:begins|starts|opens)\ with\s | \ (?:is|are)\ (?:of\ )?(?=an?\ |the\ ) ))?""", re.I | re.X)
REFUSAL = re.compile(r"\W*(?:(?:i['’]m|i am) (?:sorry|unable|not able|afraid)|sorry\b|i apologi|unfortunately,? i\b|"
                     r"as an ai\b|i (?:cannot|can['’]t|can not|could not|don['’]t|do not|am)\b)", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


def prepare_caption(row, options):
    count = num_frames(row)
    numbers = {(2 * k + 1) * count // (2 * CAPTION_FRAMES) for k in range(CAPTION_FRAMES)}
    return fit(read_frames(row, sorted(numbers)), CAPTION_SIDE)


def load_caption(options):
    _, transformers = hugging_face()
    try:
        processor = from_pretrained(transformers.AutoProcessor, options.captioner)
    except (ImportError, ValueError) as error:
        raise ValueError(f"the processor of captioner {options.captioner!r} cannot be built here: "
                         f"{one_line(error)}") from error
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"captioner {options.captioner!r} has no chat template, expected one that follows "
                         "instructions")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"                         # so that the answer follows the prompt at once
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    net = load_frozen("AutoModelForImageTextToText", options.captioner, options.device, torch.bfloat16)
    return partial(write_captions, partial(ask, net, processor, options))


def write_captions(ask, rows, clips):
    """Returns text: the model's answer, cleaned, with the camera's motion in Open-Sora 1.2's form."""
    columns = []
    refusals = []
    for row, (answer, has_ended) in zip(rows, ask(clips)):
        if REFUSAL.match(answer):
            refusals.append(answer)
        text = clean_answer(answer, has_ended)
        if text and row.get("cmotion"):
            text = f"{text} camera motion: {row['cmotion']}."
        columns.append({"text": text})
    if refusals:
        print(f"{len(refusals)} of {len(rows)} clips get no caption, as the model answered {refusals[0][:80]!r}",
              file=sys.stderr)
    return columns


def ask(net, processor, options, clips):
    """Returns [(the model's answer about a clip, whether the model ended it)]; clips: frames uint8 [n h w 3] each."""
    question = {"type": "text", "text": options.prompt}
    prompts = []
    images = []
    for frames in clips:
        content = [{"type": "image"}] * len(frames) + [question]
        message = {"role": "user", "content": content}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
        images.append([Image.fromarray(frame) for frame in frames])
    bos = processor.tokenizer.bos_token                     # most templates have it
    has_bos = bool(bos) and prompts[0].startswith(bos)
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt", add_special_tokens=not has_bos)
    tokens = net.generate(**inputs.to(net.device, net.dtype), do_sample=False, max_new_tokens=options.max_new_tokens,
                          pad_token_id=processor.tokenizer.pad_token_id)[:, inputs.input_ids.shape[1]:]
    ends = torch.as_tensor(net.generation_config.eos_token_id or -1, device=tokens.device)
    answers = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return list(zip(answers, torch.isin(tokens, ends).any(1).tolist()))


def clean_answer(text, has_ended=True):
    """Returns a caption without words about the video and without a last sentence that was cut off; "" if it is a
    refusal."""
    if REFUSAL.match(text):
        return ""
    text = " ".join(text.split())
    text = text[PREFIX.match(text).end():]
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if ends and not has_ended:
        text = text[:ends[-1]]
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- steps
class Step(NamedTuple):
    """What a step does with a row of a table, whose row["path"] can be opened.

    prepare(row, options) runs in worker processes.  Without `load` it returns the columns.  With it, load(options)
    returns a function of (rows, what prepare returned for each) that runs on the device and returns their columns."""
    writes: tuple               # columns
    prepare: Callable
    load: Callable | None = None
    batch: int = 1              # rows that the device sees at once
    reads: tuple = ()           # columns of a row, besides its path, on which the result depends
    settings: tuple = ()        # options on which the result depends


STEPS = {
    "cut": Step(("clips",), cut, settings=("min_seconds", "max_seconds")),
    "motion": Step(MOTION_COLUMNS, measure_motion),
    "appearance": Step(APPEARANCE_COLUMNS, measure_appearance),
    "measure": Step(MOTION_COLUMNS + APPEARANCE_COLUMNS, measure_both),
    "aesthetic": Step(("aes", "features"), prepare_aesthetic, load_aesthetic, 64, ("num_frames",),
                      ("clip_model", "aesthetic_head")),
    "ocr": Step(("text_area",), prepare_ocr, load_ocr, 16, ("num_frames",), ("ocr_model",)),
    "caption": Step(("text",), prepare_caption, load_caption, 16, ("num_frames", "cmotion"),    # 37,000 tokens
                    ("captioner", "prompt", "max_new_tokens")),
    "match": Step(("match",), prepare_match, load_match, 64, ("num_frames", "text"), ("clip_model",)),
}
NETWORKS = ("aesthetic", "ocr", "caption", "match")     # in this order, as a match needs a caption


# ---------------------------------------------------------------- results that outlive a run
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RESULTS_VERSION = 4     # raise it when a step is to give other results


class Results:
    """What a step has found: a folder with a file of JSON lines for each rank, {"key": ..., "columns": {...}}, or
    "error" in place of the columns.  Other settings make another folder."""

    def __init__(self, name, options):
        self.step = STEPS[name]
        self.options = options
        settings = [getattr(options, setting) for setting in self.step.settings]
        self.folder = options.folder / "parts" / f"{name}-{short_hash(RESULTS_VERSION, settings)[:8]}"
        self.records = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_bytes().splitlines():
                self.remember(line)

    def remember(self, line):
        try:
            record = json.loads(line)
        except ValueError:                              # half a line: its process was killed
            return
        if "columns" in record or "columns" not in self.records.get(record["key"], {}):
            self.records[record["key"]] = record        # a row that failed may have succeeded when it was tried again

    def key(self, row):
        """Returns a name for a row and the file that it stands for, as it is now."""
        try:
            stat = os.stat(self.options.folder / row["path"])
            file = stat.st_size, stat.st_mtime_ns
        except OSError:
            file = None
        return short_hash(row["path"], file, [str(row.get(column, "")) for column in self.step.reads])

    def columns_of(self, row):
        """Returns the columns of a row, {"error": why there are none}, or None if nobody has tried yet."""
        record = self.records.get(self.key(row))
        if record is None:
            return None
        return record.get("columns", {"error": record.get("error")})

    def add(self, key, columns, error):
        """Appends what was found for a row, or why nothing was."""
        record = {"key": key, "error": error} if error else {"key": key, "columns": rounded(columns)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank{RANK}.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":               # half a line
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")


def can_be_read(row):
    return bool(row["path"]) and not row.get("error")


def run_step(name, rows, options):
    """Runs a step on this rank's rows that have no result yet, or only an error."""
    step = STEPS[name]
    results = Results(name, options)
    todo = []
    for row in filter(can_be_read, rows):
        key = results.key(row)
        if "columns" not in results.records.get(key, {}):
            todo.append(row | {"key": key})             # of the file as it is before it is read
    if not todo:
        return
    work = step.load(options) if step.load else None
    errors = []
    with (tqdm(desc=name, total=len(todo), smoothing=0.05, disable=RANK > 0) as bar,
          closing(in_parallel(partial(attempt, step.prepare, options), todo, options.workers)) as prepared):
        while batch := list(itertools.islice(prepared, step.batch)):
            rows = [row for row, _, error in batch if not error]
            columns = [data for _, data, error in batch if not error]
            if work and rows:
                columns = work(rows, columns)
            for row, found in zip(rows, columns):
                results.add(row["key"], found, "")
            for row, _, error in batch:
                if error:
                    results.add(row["key"], {}, error)
                    errors.append(error)
            bar.update(len(batch))
    if errors and name != "cut":                        # those of cut stand in the table
        print(f"{name}: {len(errors)} clips could not be read, such as {errors[0]}", file=sys.stderr)


def with_columns(rows, name, options):
    """Returns (rows with the columns that a step has found, or with its error; how many have no result yet)."""
    results = Results(name, options)
    extended = []
    num_missing = 0
    for row in rows:
        columns = results.columns_of(row) if can_be_read(row) else {}
        num_missing += columns is None
        extended.append(row | (columns or {}))
    return extended, num_missing


# ---------------------------------------------------------------- worker processes
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)       # the output's fault, which ends the run


def attempt(prepare, options, row):
    """Returns (what prepare returns for a row, ""), or (None, why it failed).  Raises only errors of the output."""
    path = os.path.normpath(options.folder / row["path"])
    try:
        return prepare(row | {"path": path}, options), ""
    except Exception as error:          # damaged files make libraries raise anything; it is that file's error
        if getattr(error, "errno", None) in OUTPUT_ERRORS:
            raise OSError(error.errno, one_line(error)) from None
        reason = one_line(error)
        return None, reason if path in reason else f"{path}: {reason}"


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def in_parallel(work, rows, num_workers):
    """Yields (row, *work(row)) in the order in which rows get done, by worker processes.

    Each process has one row at a time.  So if one dies while this process lives (a decoder crashes, memory runs out),
    its row is known: it is tried once more, and then an error is yielded."""
    waiting = deque(rows)
    deaths = Counter()
    running = {}                        # connection to a process: (the process, its row)
    processes = []
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                connection, process = start_worker(work)
                processes.append(process)
                running[connection] = process, waiting.popleft()
                connection.send(running[connection][1])
            for connection in multiprocessing.connection.wait(list(running)):
                process, row = running.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    deaths[row["path"]] += 1
                    if deaths[row["path"]] == 1:
                        waiting.append(row)
                    else:
                        yield row, None, (f"{row['path']}: the process that read it died twice (exit code "
                                          f"{process.exitcode}): a fault of the decoder, or too little memory")
                    continue
                if isinstance(outcome, OSError):
                    raise outcome
                following = waiting.popleft() if waiting else None
                if following:
                    running[connection] = process, following
                with suppress(ConnectionError):         # if it has just died, that is seen above
                    connection.send(following)          # None ends the process
                yield row, *outcome
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_worker(work):
    """Returns (a connection, the process at its other end, which answers each row with work(row))."""
    connection, other_end = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(other_end, work))
    process.start()
    other_end.close()
    return connection, process


def serve(connection, work):
    """Answers rows until None comes.

    Signals of a terminal or a scheduler are for the parent; this process ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while row := connection.recv():
        try:
            outcome = work(row)
        except OSError as error:                        # of the output
            outcome = error
        connection.send(outcome)


# ---------------------------------------------------------------- tables
TABLE = (*COLUMNS, "aes", *MOTION_COLUMNS, *APPEARANCE_COLUMNS, "text_area", "match", "source", "start_seconds",
         "seconds", "error", "duplicate_of", "dropped")
ALWAYS = (*COLUMNS, "source", "start_seconds", "seconds", "error", "duplicate_of", "dropped")


def read_table(path, needed=("path",)):
    """Returns the rows of a csv, [{column: text}]; raises ValueError or FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such table, expected one that `curate.py run VIDEOS --out DIR` makes")
    rows = [row for _, row in read_csv(path, needed)]
    if not rows:
        raise ValueError(f"{path} has no rows, expected one per clip")
    return rows


def write_table(path, rows, columns):
    """Writes rows as csv, with these columns."""
    # Two ranks that end at the same moment may both write the table, which is the same.
    own = path.with_name(f".{path.name}.rank{RANK}")
    with atomic_write(own) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    own.replace(path)


def collect(files, steps, options):
    """Returns (the rows of all clips that were cut from files, with the columns of the steps, and rows with an error
    for what gives no clip; how many results are missing)."""
    files, num_missing = with_columns(files, "cut", options)
    rows = []
    for file in files:
        if file.get("error"):
            rows.append({"path": "", "source": file["source"], "error": file["error"]})
        for clip in file.get("clips", ()):
            rows.append({"source": file["source"], "text": file["text"]} | clip)
    for name in steps:
        rows, missing = with_columns(rows, name, options)
        num_missing += missing
    return rows, num_missing


# ---------------------------------------------------------------- duplicates
HASH_BITS = 192         # 3 frames of 64
MAX_DIFFERENT = 18      # bits between copies: H.264 crf 23 changes up to 8, 2% cropped 16; other shots 46 or more
HASH_ALIKE = 1 - 2 * (MAX_DIFFERENT + 0.5) / HASH_BITS      # the product of two hash_vectors
FEATURE_ALIKE = 0.98    # cosine of CLIP ViT-L/14, of upstream's tools/scoring/deduplicate


def hash_vectors(hashes):
    """Returns hashes of clips as float16 [N 192] of length 1: products are 1 - 2 * (different bits) / 192.

    Where there is no hash, or two of its three frames are flat, the vector is 0, which is like nothing."""
    vectors = np.zeros((len(hashes), HASH_BITS), np.float16)
    for vector, digits in zip(vectors, hashes):
        if digits and digits.count(NO_HASH) < 2:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
            vector[:] = (2.0 * bits - 1) / math.sqrt(HASH_BITS)
    return vectors


def feature_vectors(texts):
    """Returns the column `features` as float16 [N D] of length 1, 0 for ""."""
    known = [np.frombuffer(base64.b64decode(text), np.float16) for text in texts if text]
    vectors = np.zeros((len(texts), len(known[0])), np.float16)
    vectors[[bool(text) for text in texts]] = known
    return vectors


def duplicates(vectors, threshold, order, device="cpu", block=1024):
    """Returns for each of vectors [N D] of length 1 the index of the one that it repeats, or -1: int64 [N].

    In `order` [N], the best first, each is kept unless its product with a kept one reaches the threshold; it then
    repeats the first of those.  So no two kept ones are alike, and a chain of small changes does not become one clip.
    All pairs are compared, so the time grows with the square of N."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    x = torch.as_tensor(vectors).to(device, dtype)
    order = np.asarray(order)
    repeated = np.full(len(x), -1)
    kept = np.zeros(0, np.int64)
    for block_order in np.split(order, range(block, len(order), block)):
        candidates = np.concatenate([kept, block_order])
        is_alike = (x[block_order] @ x[candidates].T >= threshold).cpu().numpy()
        is_kept = np.arange(len(candidates)) < len(kept)
        for row, i in enumerate(block_order):
            originals = np.flatnonzero(is_alike[row] & is_kept)
            if len(originals):
                repeated[i] = candidates[originals[0]]
            else:
                is_kept[len(kept) + row] = True
        kept = candidates[is_kept]
    return repeated


def find_duplicates(rows, rules, device):
    """Returns for each row the path of the better clip that it repeats, or "".  Better is what breaks no rule, then has
    a text, a higher aesthetic score, more rows of pixels and more frames."""
    quality = []
    for row in rows:
        breaks_rule = bool(verdict(row | {"duplicate_of": ""}, rules))
        numbers = [-np.nan_to_num(number(row.get(name))) for name in ("num_frames", "height", "aes")]
        quality.append([*numbers, not row.get("text"), breaks_rule])
    order = np.lexsort(np.array(quality, float).T)
    found = duplicates(hash_vectors([row.get("phash") for row in rows]), HASH_ALIKE, order, device)
    features = [row.get("features") for row in rows]
    if any(features):
        found = np.maximum(found, duplicates(feature_vectors(features), FEATURE_ALIKE, order, device))
    return [rows[i]["path"] if i >= 0 else "" for i in found]


# ---------------------------------------------------------------- rules
class Rule(NamedTuple):
    """What a column must keep to; limit None: the rule is off."""
    name: str               # of its flag: min_... or max_...
    column: str
    limit: float | None

    def __str__(self):
        return f"{self.name} {self.limit:g}"

    @property
    def is_minimum(self):
        return self.name.startswith("min")

    def breaks(self, value):
        return value < self.limit if self.is_minimum else value > self.limit


# Open-Sora names one threshold, that of aes (docs/data_processing.md).  The others were set on real footage (animation,
# a concert, a city) and on made clips; what they lose and keep stands in assets/results.md.
RULES = (
    Rule("min_aesthetic", "aes", 5.0),          # Open-Sora's --aesmin 5; a first stage may take 4.5 (docs/report_03.md)
    Rule("min_match", "match", 20.0),           # cosine x 100
    Rule("max_text_area", "text_area", 0.005),  # share of the picture: titles 0.009 to 0.06, without text under 0.001
    Rule("min_brightness", "brightness", 0.03),     # 0 to 1: the darkest shot of a concert 0.04, black 0.014
    Rule("min_sharpness", "sharpness", 20.0),   # shots have 150 to 5000, blurred over 9 pixels 1 to 20
    Rule("min_flow", "flow", 0.5),              # pixels per second; a held picture has 0.04
    Rule("max_flow", "flow", 400.0),            # pixels per second: the picture is crossed in less than a second
    Rule("max_shake", "shake", 60.0),           # pixels per second: a walking camera 10, hand-held 45, jitter of 2% 90
    Rule("max_repeats", "repeats", 0.7),        # share: drawn at 12 of 24 fps 0.5, at 8 of 24 0.67, a held picture 1
    Rule("max_held", "held", 2.0),              # seconds
    Rule("min_height", "height", None),         # buckets leave out what is too small for them
)
MOTION_RULES = ("flow", "shake", "repeats", "held")     # columns that an image does not have to keep to


def flag_limit(text):
    """Returns the limit of a rule's flag: a number, or None for "none"."""
    if text.lower() == "none":
        return None
    limit = number(text)
    if not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"expected a number, or none to switch the rule off, got {text!r}")
    return limit


def rules_of(options):
    """Returns the rules that are on."""
    rules = [rule._replace(limit=getattr(options, rule.name)) for rule in RULES]
    return [rule for rule in rules if rule.limit is not None]


def number(value):
    """Returns a cell of a table as a float, nan if it is no number."""
    return read_number(str(value))


def faults(row, rules):
    """Returns [(what drops a row, why)]: the one fault that no rule can mend, or all rules that it breaks."""
    if error := row.get("error"):
        return [("too short" if error == TOO_SHORT else "unreadable", error)]
    if row.get("duplicate_of"):
        return [("duplicate", f"duplicate of {row['duplicate_of']}")]
    found = []
    is_still = number(row.get("num_frames")) == 1
    for rule in rules:
        if rule.column not in row or (is_still and rule.column in MOTION_RULES):
            continue
        value = number(row[rule.column])
        if math.isnan(value):
            found.append((rule, f"no {rule.column}"))
        elif rule.breaks(value):
            sign = "<" if rule.is_minimum else ">"
            shown = f"{value:.4g}" if rule.breaks(float(f"{value:.4g}")) else repr(value)   # never "5 < 5"
            found.append((rule, f"{rule.column} {shown} {sign} {rule}"))
    return found


def verdict(row, rules):
    """Returns why a row is dropped, "" if it is kept."""
    found = faults(row, rules)
    return found[0][1] if found else ""


def tally(rows, rules):
    """Returns a table as text: how many clips each fault drops, in the order in which they are looked at."""
    dropped = Counter()
    alone = Counter()
    examples = {}
    for row in rows:
        found = faults(row, rules)
        alone.update(what for what, _ in found)
        if found:
            what, why = found[0]
            name = row["path"] or row.get("source", "?")
            dropped[what] += 1
            examples.setdefault(what, " ".join((why if Path(name).name in why else f"{name}: {why}").split()))
    left = len(rows)
    lines = [("rule", "kept", "dropped", "alone", "example")]
    for what in ("unreadable", "too short", "duplicate", *rules):
        left -= dropped[what]
        if isinstance(what, Rule) and not any(what.column in row for row in rows):
            lines.append((str(what), "not measured", "", "", ""))
        else:
            lines.append((str(what), left, dropped[what], alone[what], examples.get(what, "")))
    table = [f"{a:<20} {b:>12} {c:>9} {d:>9}  {e}".rstrip() for a, b, c, d, e in lines]
    table.append("A clip is dropped by the first rule that it breaks.  alone: what a rule would drop by itself.")
    return "\n".join(table)


# ---------------------------------------------------------------- report
STYLE = """:root{color-scheme:light dark;font:14px system-ui}body{margin:2em auto;max-width:1200px}
pre{white-space:pre-wrap}.row{display:flex;flex-wrap:wrap;gap:1em}
figure{margin:0;max-width:352px;overflow-wrap:anywhere}img{max-width:100%}.drop{color:#d9772b}"""
MAX_LISTED = 1000       # rows of the last table


def pick(values, rule, shown):
    """Returns {title: [rows]}: the worst, those nearest to the limit on both sides, the best, at most three each.

    Rows that are shown already are left out, so no clip leads several sections; and so is "best" where many share the
    best value, as where nothing has text."""
    badness = -values if rule.is_minimum else values                    # nan comes last
    order = [i for i in np.argsort(-badness, kind="stable") if np.isfinite(values[i]) and i not in shown]
    broken = [i for i in order if rule.breaks(values[i])]
    kept = order[len(broken):]
    best = kept[3:][-3:][::-1]
    if best and np.count_nonzero(values == values[best[0]]) > 3:
        best = []
    titles = {"worst": broken[:-3][:3], "just dropped": broken[-3:][::-1], "just kept": kept[:3], "best": best}
    return {title: rows for title, rows in titles.items() if rows}


def figure(row, rules, folder):
    """Returns the HTML of a clip: a strip of three frames or why there is none, its path, its verdict or numbers."""
    name = html.escape(row["path"])
    try:
        last = num_frames(row) - 1
        key_frames = sorted({k // GOP * GOP for k in (0, last // 2, last)})     # decoded in a tenth of the time
        frames = read_frames({"path": os.path.normpath(folder / row["path"])}, key_frames)
        height, width = frames[0].shape[:2]
        strip = np.concatenate([resize(frame, 64, max(1, round(64 * width / height))) for frame in frames], 1)
        Image.fromarray(strip).save(buffer := io.BytesIO(), "JPEG", quality=70)
        content = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="frames of {name}" height="64" src="data:image/jpeg;base64,{content}">'
    except (ValueError, OSError) as error:
        picture = html.escape(str(error))
    why = html.escape(verdict(row, rules))
    return f'<figure>{picture}<br>{name}<br><span class="drop">{why}</span></figure>'


def write_report(rows, rules, path):
    """Writes one .html file that needs no other: what is dropped and why, clips to look at for each rule, pairs of
    duplicates, and a list of everything that is dropped."""
    kept = [row for row in rows if not verdict(row, rules)]
    hours = sum(np.nan_to_num(number(row.get("seconds"))) for row in kept) / 3600
    parts = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Clips</title><style>{STYLE}</style>'
             f"</head><body><h1>{len(kept):,} of {len(rows):,} clips kept, {hours:,.2f} hours</h1>"
             f"<pre>{html.escape(tally(rows, rules))}</pre>"]
    shown = set()
    for rule in rules:
        values = np.array([number(row.get(rule.column)) for row in rows])
        num_broken = int(rule.breaks(values).sum())
        if np.isfinite(values).any():
            low, middle, high = np.nanquantile(values, (0, 0.5, 1))
            parts.append(f"<h2>{rule}</h2><p>drops {num_broken:,} clips; the smallest {rule.column} is {low:.4g}, the "
                         f"median {middle:.4g}, the largest {high:.4g}</p>")
        for title, chosen in pick(values, rule, shown).items():
            shown.update(chosen)
            figures = [f"<div><b>{values[i]:.4g}</b>{figure(rows[i], rules, path.parent)}</div>" for i in chosen]
            parts.append(f'<h3>{title}</h3><div class="row">{"".join(figures)}</div>')
    parts.append("<h2>duplicates, each with the clip that is kept</h2>")
    rows_of = {row["path"]: row for row in rows}
    for row in [row for row in rows if row.get("duplicate_of") and row["duplicate_of"] in rows_of][:6]:
        pair = figure(row, rules, path.parent) + figure(rows_of[row["duplicate_of"]], rules, path.parent)
        parts.append(f'<div class="row">{pair}</div>')
    parts.append(f"<h2>what is dropped (the first {MAX_LISTED:,}; clips.csv has all)</h2><table>")
    for row in [row for row in rows if verdict(row, rules)][:MAX_LISTED]:
        name = row["path"] or f"{row.get('source', '?')} from {row.get('start_seconds') or 0} s"
        parts.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(verdict(row, rules))}</td></tr>")
    parts.append("</table></body></html>")
    with atomic_write(path) as part:
        part.write_text("\n".join(parts), "utf-8", "backslashreplace")


# ---------------------------------------------------------------- commands
def run(options):
    """Cuts a folder of videos, measures the clips, chooses among them.  The rank that ends last writes the tables."""
    files = list_files(options)
    own_files = files[RANK::WORLD]
    (options.folder / "parts").mkdir(parents=True, exist_ok=True)
    run_step("cut", own_files, options)
    wanted = []
    if options.command == "run":
        wanted = ["measure", *(name for name in NETWORKS if name in options.networks)]
    done = []
    for name in wanted:
        rows, _ = collect(own_files, done, options)
        try:
            run_step(name, rows, options)
            done.append(name)
        except (ValueError, FileNotFoundError) as error:
            if name not in NETWORKS:
                raise
            print(f"{name} is not done: {error}", file=sys.stderr)
    rows, num_missing = collect(files, done, options)
    if num_missing:
        print(f"rank {RANK} of {WORLD} is done; the rank that ends last writes the tables, {num_missing} results are "
              "missing")
        return
    columns = [name for name in (*TABLE, "features") if name in ALWAYS or any(name in row for row in rows)]
    choose(rows, columns, options, dedup=options.command == "run" and not options.no_dedup)
    if options.command == "run":
        report(options)


def choose(rows, columns, options, dedup):
    """Finds duplicates, applies the rules, writes the table and meta.csv; prints what is kept and why others are not."""
    rules = rules_of(options)
    table = options.table
    if dedup:
        for row, original in zip(rows, find_duplicates(rows, rules, options.device)):
            row["duplicate_of"] = original
    for row in rows:
        row["dropped"] = verdict(row, rules)
    kept = [row for row in rows if not row["dropped"]]
    columns = list(dict.fromkeys([*columns, "duplicate_of", "dropped"]))
    write_table(table, rows, columns)
    print_unreadable(rows)
    print(tally(rows, rules))
    print(f"{table}: {len(rows)} clips, {len(kept)} kept")
    if not kept:
        raise ValueError(f"no clip is kept; the first is dropped for: {rows[0]['dropped']} - the table above counts "
                         "the reasons")
    meta = table.with_name("meta.csv" if table.name == "clips.csv" else f"{table.stem}-kept.csv")
    write_table(meta, kept, [name for name in columns if name not in ("error", "duplicate_of", "dropped", "features")])
    num_silent = sum(not row.get("text") for row in kept)
    print(f"{meta}: {len(kept)} clips" + (f", {num_silent} of them without a caption" if num_silent else ""))
    if options.config:
        meta = read_meta(str(meta))
        print(bucket_table(meta, options.config, assign(meta, options.config, 0)))


def print_unreadable(rows):
    """Prints which files cannot be used, or not as a whole."""
    broken = [row["error"] for row in rows if row.get("error") and row["error"] != TOO_SHORT]
    for error in broken[:10]:
        print(f"unreadable: {error}")
    if len(broken) > 10:
        print(f"unreadable: and {len(broken) - 10} more")


def add_columns(options):
    """Runs a step on a table and adds its columns."""
    name = options.command
    step = STEPS[name]
    needed = [column for column in ("num_frames", "text") if column in step.reads]
    rows = read_table(options.table, ("path", *needed))
    columns = list(dict.fromkeys([*rows[0], *step.writes, "error"]))
    run_step(name, rows[RANK::WORLD], options)
    rows, num_missing = with_columns(rows, name, options)
    if num_missing:
        print(f"rank {RANK} of {WORLD} is done; the rank that ends last writes {options.table}")
        return
    write_table(options.table, rows, columns)
    print(f"{options.table}: {', '.join(step.writes)}; `python curate.py filter {options.what}` chooses by them")


def report(options):
    path = options.table.with_name("report.html")
    write_report(read_table(options.table), rules_of(options), path)
    print(path)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, usage="python curate.py COMMAND WHAT [--flag=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("run", *STEPS, "dedup", "filter", "report"), metavar="COMMAND",
                        help=f"run, {', '.join(STEPS)}, dedup, filter or report")
    parser.add_argument("what", metavar="WHAT", help="a folder of videos (run, cut), or the DIR or a table of clips")
    making = parser.add_argument_group("run and cut")
    making.add_argument("--out", type=Path, metavar="DIR", help="the folder for clips and tables")
    making.add_argument("--with", dest="networks", type=network_names, default=[], metavar="STEPS",
                        help=f"networks that run uses: {','.join(NETWORKS)}")
    making.add_argument("--captions", metavar="CSV", help="captions of the videos, columns path,text; without it "
                        "that of beach.mp4 is read from beach.txt")
    making.add_argument("--min-seconds", type=float, default=2.0, help="of a clip (default: %(default)s)")
    making.add_argument("--max-seconds", type=float, default=16.0, help="of a clip: longer shots are divided (default: "
                        "%(default)s)")
    making.add_argument("--no-dedup", action="store_true", help="keep near-duplicates")
    parser.add_argument("--config", help="of run and filter: print into which of its buckets the clips go")
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parser.add_argument("--workers", type=positive_int, default=cores, help="processes (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    networks = parser.add_argument_group("networks, by folder or name on the hub")
    networks.add_argument("--clip-model", default="openai/clip-vit-large-patch14", help="(default: %(default)s)")
    networks.add_argument("--aesthetic-head", metavar="FILE", help="sac+logos+ava1-l14-linearMSE.pth")
    networks.add_argument("--ocr-model", default="PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
                          help="(default: %(default)s)")
    networks.add_argument("--captioner", default="llava-hf/llava-v1.6-mistral-7b-hf", help="(default: %(default)s)")
    networks.add_argument("--prompt", default=PROMPT, help="the question to the captioner")
    # As many as the model reads (STDiTConfig.model_max_length); T5 has other tokens, but about as many.
    networks.add_argument("--max-new-tokens", type=positive_int, default=200, help="(default: %(default)s)")
    limits = parser.add_argument_group("rules: a number, or none to switch one off")
    for rule in RULES:
        default = "none" if rule.limit is None else f"{rule.limit:g}"
        limits.add_argument("--" + rule.name.replace("_", "-"), type=flag_limit, default=rule.limit, metavar="NUMBER",
                            help=f"{rule.name[:3]}imum of {rule.column} (default: {default})")
    if not argv:
        parser.print_help()
        parser.exit(2)
    return parser.parse_args(argv)


def network_names(text):
    names = [name for name in text.split(",") if name]
    unknown = set(names) - set(NETWORKS)
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(NETWORKS)}, got {','.join(sorted(unknown))}")
    return names


def complete(options):
    """Checks the options and adds table, folder and device."""
    what = Path(options.what)
    makes_clips = options.command in ("run", "cut")
    if makes_clips and not options.out:
        raise ValueError(f"{options.command} needs --out DIR, the folder for clips and tables")
    if makes_clips and what.resolve() in (options.out.resolve(), options.out.resolve() / "clips"):
        raise ValueError(f"--out {options.out} is where the videos are, so the next run would cut its clips: give "
                         f"another folder, such as {what / 'curated'}")
    if not 0 <= options.min_seconds <= options.max_seconds or not 0 < options.max_seconds < math.inf:
        raise ValueError(f"--min-seconds {options.min_seconds:g} --max-seconds {options.max_seconds:g}: expected the "
                         "length of the shortest and of the longest clip, above 0")
    if makes_clips:
        options.table = options.out / "clips.csv"
    else:
        options.table = what if what.suffix == ".csv" else what / "clips.csv"
    options.folder = Path(os.path.abspath(options.table.parent))
    options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main(argv=None):
    options = parse_args(sys.argv[1:] if argv is None else argv)
    with one_line_errors(options.debug, "; the same command continues"):
        complete(options)
        if options.config:
            import configs
            options.config = configs.load(options.config)
        if options.command in ("run", "cut"):
            run(options)
        elif options.command in STEPS:
            add_columns(options)
        elif options.command == "report":
            report(options)
        else:
            rows = read_table(options.table)
            choose(rows, list(rows[0]), options, dedup=options.command == "dedup")


if __name__ == "__main__":
    main()
