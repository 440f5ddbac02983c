"""Raw videos -> a training set: cut, measure, write clips, score, caption, choose; on any number of machines.

in    a folder of videos and images
out   DIR/files.csv (every file found), DIR/clips/, DIR/clips.csv (every clip: numbers, and why it was dropped), and
      DIR/meta.csv (the clips kept), which data.py reads

    python curate.py run videos/ --out data/mine                          all that needs no network
    python curate.py run videos/ --out data/mine --with aesthetic,ocr,caption,match       also under torchrun
    python curate.py filter data/mine --min-flow=5 --min-aesthetic=none   other rules; nothing is measured again
    python curate.py report data/mine                                     data/mine/report.html: look before you train

Killed at any moment, the same command goes on and does nothing twice.  The steps and their order are those of Open-Sora
1.1 (docs/data_processing.md there), after Stable Video Diffusion (arXiv 2311.15127).
"""
# The file goes as a video does: files found and decoded small, where the cuts are, optical flow and the camera's motion
# from it, checks of single frames; `measure`, all of these in one decode; clips written.  Then the networks that look
# at clips: CLIP, text on screen, captions.  Then the steps: what each reads and writes (`STEPS`), how processes and
# ranks share them (`do`), tables, duplicates, rules, the report, the command line.  In a hurry: `cut_file` is what
# becomes of one video, `start` is a whole run.
import os
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): Ctrl-C shows no traceback of a half-done import
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon, for a busy machine
import argparse
import base64
import csv
import errno
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import pickle
import re
import shutil
import sys
import threading
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import suppress
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
from einops import rearrange, reduce
from PIL import Image
from tqdm import tqdm

from data import (COLUMNS, IMAGES, SCORES, UnreadableClip, assign, atomic_write, bucket_table, displayed_width,
                  end_with_parent, one_line_errors, opened, orientation, read_csv, read_image, read_meta, read_number,
                  read_window)
from vae import from_pretrained, hugging_face, load_net

hugging_face()      # before transformers, to which our kernels.py must not look like the package of that name
from transformers import (AutoModelForImageTextToText, AutoModelForObjectDetection, AutoProcessor, AutoTokenizer,
                          CLIPConfig, CLIPModel)


# ---- files ----

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
          ".3gp", ".ogv", ".gif")


def find_files(folder, out=None) -> tuple[list[Path], list[Path]]:
    """(videos and images, all else: other files, folders that are links) in and under folder, sorted; hidden ones and
    those in `out` are left out.  A file: itself."""
    folder, out = Path(folder), out and Path(out).resolve()
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder - give one with videos or images")
    found, other = [], []
    tell = lambda error: print(f"a folder is left out: {error}", file=sys.stderr)
    places = os.walk(folder, onerror=tell) if folder.is_dir() else [(folder.parent, [], [folder.name])]
    for place, folders, names in places:
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name).resolve() != out]
        other += [path for name in folders if (path := Path(place, name)).is_symlink()]  # walk does not go into these
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            is_utf8 = str(path).encode(errors="ignore").decode() == str(path)  # as the tables are
            (found if is_utf8 and path.name.lower().endswith(VIDEOS + IMAGES) else other).append(path)
    return sorted(found), sorted(other)


def probe(path) -> dict:
    """The columns that opening a file tells; height and width as displayed, rotation counter-clockwise in degrees.

    num_frames is the number of packets with different times, after the container's edit list, or 1 for an image: of
    them only one is decoded.  Raises UnreadableClip or OSError.
    """
    with open(path, "rb") as f:  # the hash is of the size and the first and last 64 KiB: a millisecond for any size
        size, head = os.fstat(f.fileno()).st_size, f.read(1 << 16)
        f.seek(max(0, size - (1 << 16)))
        columns = {"hash": hashlib.sha256(b"%d " % size + head + f.read(1 << 16)).hexdigest()[:16]}
    if str(path).lower().endswith(IMAGES):
        height, width, _ = read_image(str(path)).shape
        return columns | {"kind": "image", "num_frames": 1, "fps": "", "height": height, "width": width, "rotation": 0,
                          "seconds": 0.0, "codec": Path(path).suffix[1:].lower()}
    packets, times = [], set()
    with opened(path) as stream:
        expected = len(stream.index_entries) if "mp4" in stream.container.format.name else 0  # by its header
        for packet in stream.container.demux(stream):
            if packet.size:
                packets.append(packet.pts)
                if not packet.is_discard:
                    times.add(len(packets) if packet.pts is None else packet.pts * stream.time_base)
        if len(packets) < expected:
            raise UnreadableClip(f"{path}: is cut off, has {len(packets)} of {expected} frames")
    frames = decoded(path)  # opened anew, at its begin; held: without it the container closes, and its stream crashes
    _, frame, stream = next(frames)
    width, (transposed, down, right) = displayed_width(path, frame, stream), orientation(frame)
    height, width = (width, frame.height) if transposed else (frame.height, width)
    turns = {(False, 1, 1): 0, (True, -1, 1): 1, (False, -1, -1): 2, (True, 1, -1): 3}.get((transposed, down, right), 0)
    rate = constant_rate(np.array(sorted(map(float, times))), stream.guessed_rate)
    seconds = float(max(times) - min(times)) if times else 0.0
    fps = float(rate or max(1, len(times) - 1) / max(seconds, 0.001))
    return columns | {"kind": "video", "num_frames": len(times), "fps": round(fps, 4), "height": height, "width": width,
                      "rotation": 90 * turns, "seconds": round(seconds + 1 / fps, 3),
                      "codec": stream.codec_context.name}


def constant_rate(times: np.ndarray, guess=None) -> Fraction | None:
    """Frames a second of ascending times [T] in seconds, None when they vary; up to 2% of the gaps may be odd, as
    where stream copies were joined.  A guess, of the container, is taken if it fits to 1%: it knows 30000/1001 where
    the times are rounded.  Both shares are chosen by hand; a rate that is off by 1% is a frame in 4 s at 24."""
    gaps = np.diff(times)
    gap = np.median(gaps) if len(gaps) else 0.0
    if gap <= 0:
        return Fraction(guess or 24) if len(times) == 1 else None
    usual = np.abs(gaps - gap) <= 0.05 * gap + 0.0015  # Matroska's times are whole milliseconds
    if (~usual).mean() > 0.02:
        return None
    gap = gaps[usual].mean()
    return Fraction(guess if guess and abs(gap * guess - 1) < 0.01 else 1 / gap).limit_denominator(1001)


# ---- decoding ----

def decoded(path, fast=False):
    """Yields (seconds, av.VideoFrame, its stream) of every frame, as the decoder gives them.

    fast leaves out H.264's deblocking: a third of the time, and nothing that is seen at a quarter of the size.
    A frame that is damaged, or is due before the one in front of it, ends it with UnreadableClip.
    """
    times, seconds = [], 0.0
    with opened(path) as stream:
        if fast:
            stream.codec_context.options |= {"skip_loop_filter": "all"}
        gap = float(1 / (stream.guessed_rate or 24))
        for frame in stream.container.decode(stream):
            if frame.is_corrupt:
                raise UnreadableClip(f"{path}: frame {len(times)} is damaged")
            seconds = seconds + gap if frame.pts is None else float(frame.pts * stream.time_base)
            if times and seconds <= times[-1]:
                raise UnreadableClip(f"{path}: frame {len(times)} is due at {seconds:g} s, the one before at "
                                     f"{times[-1]:g}")
            times.append(seconds)
            yield seconds, frame, stream
    if not times:
        raise UnreadableClip(f"{path}: has no frames")


def small_frames(path, side=320, chunk=24):
    """Yields (seconds [T], uint8 [T h w 3], grey [1 H w]) of all frames as displayed, `chunk` at a time, no side over
    `side`; the last is the first of them with all the rows that were coded, not turned: `combs` looks at rows.  An
    image is one frame.  320 is what flow is tuned at (`flow`); 24 frames of that are 4 MB."""
    if str(path).lower().endswith(IMAGES):
        image = Image.fromarray(read_image(str(path)))
        rows = np.array(image.resize((min(side, image.width), image.height), Image.Resampling.BOX).convert("L"))
        image.thumbnail((side, side), Image.Resampling.BOX)
        yield np.zeros(1), np.array(image)[None], rows[None]
        return
    shrink, recolor, frames, times, size = VideoReformatter(), VideoReformatter(), [], [], None
    for seconds, frame, stream in decoded(path, fast=True):
        if size is None:
            width, (transposed, down, right) = displayed_width(path, frame, stream), orientation(frame)
            scale = min(1, side / max(width, frame.height))
            size = [max(1, round(scale * n)) for n in (width, frame.height)]
        if not frames:
            rows = shrink.reformat(frame, min(side, frame.width), frame.height, "gray", interpolation="AREA", threads=1)
            rows = rows.to_ndarray()[None]
        small = shrink.reformat(frame, *size, "yuv420p", interpolation="AREA", threads=1)  # in one step: twice the time
        picture = recolor.reformat(small, format="rgb24", threads=1).to_ndarray()
        frames.append((picture.transpose(1, 0, 2) if transposed else picture)[::down, ::right])
        times.append(seconds)
        if len(frames) == chunk:
            yield np.array(times), np.stack(frames), rows
            frames, times = [], []
    if frames:
        yield np.array(times), np.stack(frames), rows


# ---- cut ----

# The numbers of this part are chosen by hand on 44 known transitions of 11 clips, and on made ones (the tests).  In
# brackets how far a number can go, alone, before one of them is lost or another found, as far as was tried.
RATIO, WINDOW = 3.0, 2  # threshold and frames to each side of PySceneDetect's AdaptiveDetector, which upstream runs
MIN_CHANGE = 8.0  # of `change`, the original's 15 [6..12]; the clips' cuts have 13.5 or more, others 2.3 at RATIO 3
HELD = 0.3  # of `change`: less is a drawing shown again, as animation does twice or thrice [0.05..0.5; 1: two lost]
FLASH = 6  # frames: what looks as before after so many was a flash [5..12]
BACK = 0.3  # of the change over a cut: frames this near show what was before [0.2: a flash cuts, 0.4: cuts are lost]
SWEEP = 12  # frames, half a second: cuts that near with no quiet frame between are one, an object that sweeps by [8..]
# Frames over which a mixture is looked for; a longer one looks as linear within.  Of 15 dissolves of 72 and more frames
# made of real shots 48 finds four that 24 does not, and 16 and 32 find no other
DISSOLVES = (12, 24, 48)
MIN_MIXED = 0.25  # of `mixing` [0.15..0.3]: the clips' one dissolve has 0.32, motion up to 0.16
OVERLAY = 12.0  # grey levels, mean: less is no other picture, but a title that fades in over a plain sky [0..24]
REACH = 64  # frames that a dissolve may begin before, and end after, a window [32: some ends are missed]
AT_ONCE = 256  # windows: some 20 MB


class Cuts:
    """Takes the small frames of a video, run after run, and gives its transitions; holds a KB of each frame."""
    def __init__(self):
        self.last, self.changes, self.thumbs = None, [0.0], bytearray()  # small arrays would scatter: see `measure`

    def add(self, frames):
        """frames: the next uint8 [T h w 3]."""
        step = -(-max(frames.shape[1:3]) // 80)
        frames = frames[:, ::step, ::step]  # at most 80 pixels a side
        self.changes += change(frames if self.last is None else np.concatenate([self.last, frames])).tolist()
        self.last = frames[-1:].copy()
        for axis in (1, 2):  # of one row or column there is no mean of two
            frames = frames.repeat(2, axis) if frames.shape[axis] == 1 else frames
        x = frames[:, :frames.shape[1] // 2 * 2, :frames.shape[2] // 2 * 2].astype(np.uint16)
        x = (x[:, ::2, ::2] + x[:, 1::2, 1::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2]) // 4
        self.thumbs += x.astype(np.uint8).tobytes()

    def end(self) -> list[tuple[int, int]]:
        """Transitions (end of a shot, begin of the next), ascending: the same frame for a hard cut.

        Those that overlap are one, and so are those that a sweep (SWEEP) makes.
        """
        changes = np.array(self.changes)  # [T], the first 0
        thumbs = np.frombuffer(self.thumbs, np.uint8).reshape(len(changes), -1)  # [T P]
        transitions, busy = [], changes >= MIN_CHANGE
        for first, end in sorted([(t, t) for t in hard_cuts(changes, thumbs)] + mixed(changes, thumbs)):
            before = transitions[-1][1] if transitions else -math.inf
            if first <= before or first - before < SWEEP and busy[before:first].all():
                transitions[-1] = transitions[-1][0], max(end, before)
            else:
                transitions.append((first, end))
        return transitions


def change(frames):
    """How much each but the first of uint8 [T h w 3] differs from the one before: mean over pixels and over hue (half
    degrees), chroma, value.

    The content value of PySceneDetect's AdaptiveDetector (scenedetect 0.6.7, Castellano), but the hue's circle closes
    and weighs as much as there is colour, and chroma stands for saturation: on dark footage both are noise, which
    gives the original 17 false cuts in the concert clip.
    """
    r, g, b = np.moveaxis(frames, -1, 0).astype(np.float32, order="C")
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    sector = np.where(value == r, g - b, np.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue, *others = (np.abs(np.diff(x, axis=0)) for x in (30 * sector / np.maximum(chroma, 1), chroma, value))
    hue = np.minimum(hue, 180 - hue) * (np.minimum(chroma[:-1], chroma[1:]) / 255)
    return (hue + others[0] + others[1]).mean((1, 2)) / 3


def hard_cuts(changes, thumbs) -> list[int]:
    """First frames of new shots: where the change is RATIO times the median of those around it, and lasts.  The
    original's mean is drawn up by fast motion right after a cut.  changes [T]: changes[t] between frame t - 1 and t;
    thumbs uint8 [T P]: about 40 x 22 pixels of each."""
    cuts = []
    for t in np.flatnonzero(changes >= MIN_CHANGE):
        before, after = changes[max(1, t - 6):t], changes[t + 1:t + 7]  # WINDOW drawings, each shown thrice
        near = [*before[before > HELD][-WINDOW:], *after[after > HELD][:WINDOW]]
        if changes[t] < RATIO * np.median(near or [0]):
            continue
        old, new = (thumbs[max(0, a):a + FLASH].astype(np.float32) for a in (t - FLASH, t))
        apart = np.abs(old[:, None] - new).mean(-1)  # [FLASH FLASH]
        if apart.min() > BACK * apart[-1, 0]:  # no frame before looks like one after
            cuts.append(int(t))
    return cuts


def mixing(thumbs, starts, length: int):
    """How much frames s .. s + length, s in starts [n], look like a mixture of the first and the last: (score [n], sure
    [n]).

    In a dissolve every pixel goes straight from one picture to another that is unlike it; where things move, pixels go
    elsewhere in between.  score: the share of the changed pixels that are on the way at 1/4, 1/2, 3/4, less half the
    correlation of both pictures; a plain picture, as in a fade, has none.  sure: the middle has lost the contrast that
    a mixture loses (Alattar 1993), which a pan over something out of focus, else as straight, does not.
    """
    s, e = (thumbs[i].astype(np.float32) for i in (starts, starts + length))
    way = e - s
    apart, norm, linear = np.abs(way), np.einsum("tp,tp->t", way, way) + 1e-6, np.ones(len(s), bool)
    changed = apart > 10  # grey levels [5; 15 puts the ends of a dissolve over a pan 5 frames off]
    straight = changed.copy()
    for quarter in (1, 2, 3):
        middle = thumbs[starts + quarter * length // 4] - s
        alpha = np.einsum("tp,tp->t", middle, way) / norm  # how far the whole picture is
        straight &= np.abs(middle - alpha[:, None] * way) < 0.35 * apart  # [0.3, 0.4: ends 4 frames off; 0.5: false]
        linear &= np.abs(alpha - quarter / 4) < 0.13  # [0.1 loses the clips' dissolve, 0.2 finds a false one]
    a, b, m, d = (x.var(1) for x in (s, e, thumbs[starts + length // 2].astype(np.float32), way))
    plain = np.minimum(a, b) < 64  # a standard deviation of 8 grey levels [16..256]
    alike = np.where(plain, 0, (a + b - d) / 2 / np.sqrt(np.maximum(a * b, 1)))  # correlation
    # Less half of it [all loses the clips' dissolve, a quarter finds a false one]; none at 0.8 [0.4; 0.9: titles]
    score = straight.sum(1) / np.maximum(changed.sum(1), 1) - np.maximum(alike, 0) / 2
    # The mean of two pictures has d / 4 less variance than they: half of that is asked [/ 6; / 4: lost, / 12: light]
    sure = (a + b) / 2 - m > d / 8
    return np.where(linear & (alike < 0.8), score, -1), sure


def mixed(changes, thumbs) -> list[tuple[int, int]]:
    """(first mixed frame, first clean frame) of dissolves and fades; changes [T], thumbs uint8 [T P] as above."""
    windows, found = [], []
    for length in DISSOLVES:
        starts = np.arange(0, len(thumbs) - length, length // 3)
        for part in np.array_split(starts, len(starts) // AT_ONCE + 1):
            part = part[np.abs(thumbs[part + length].astype(np.float32) - thumbs[part]).mean(1) > OVERLAY]
            scores = zip(*mixing(thumbs, part, length))
            windows += [(score, s, length, sure) for s, (score, sure) in zip(part, scores) if score > MIN_MIXED]
    for _, s, length, sure in sorted(windows, reverse=True):  # the surest first, those that overlap it fall
        way = thumbs[s + length].astype(np.float32) - thumbs[s]
        low, high = max(0, s - REACH), min(len(thumbs), s + length + REACH + 1)
        step = np.diff(thumbs[low:high] @ way) / (way @ way) * length  # along the way: about 1 within, 0 outside
        moves = np.pad(step > 0.3, 1)  # [0.2, 0.4: an end 6 or 2 frames off]
        moves = moves[1:-1] | moves[:-2] & moves[2:]  # a frame shown twice is no end
        still, middle = np.flatnonzero(~moves), s - low + length // 2
        first = int(low + max(still[still < middle], default=-1) + 2)
        end = int(low + min(still[still >= middle], default=len(moves)))
        if first >= end or any(first <= b and a <= end for a, b in found):
            continue
        around = [x.mean() for x in (changes[max(1, first - 8):first], changes[end + 1:end + 9]) if len(x)]
        # Else it goes on as it was: a pan [0.2; 0 loses the clips' dissolve, 0.6 finds flashes]
        if sure or around and min(around) < 0.4 * changes[first:end].mean():
            found.append((first, end))
    return found


def split(transitions, times, min_seconds=2.0, max_seconds=16.0):
    """(clips, too short): both lists of (first frame, frame after the last), without the frames of transitions; a shot
    over max_seconds is divided evenly.  times [T] in seconds.

    At 24 frames a second and Open-Sora 1.1's interval of 3, 2 s fill its shortest bucket of videos, 16 frames, and 16 s
    its longest, 128."""
    clips, short = [], []
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    ends = np.append(times, times[-1] + gap)  # when the frame before is over
    for start, end in zip([0, *(b for _, b in transitions)], [*(a for a, _ in transitions), len(times)]):
        seconds = ends[end] - ends[start]
        if start < end and seconds < min_seconds - gap / 2:
            short.append((start, end))
        elif start < end:
            pieces = math.ceil(seconds / max_seconds - 1e-6)
            edges = np.searchsorted(ends + gap / 2, np.linspace(ends[start], ends[end], pieces + 1)).tolist()
            clips += itertools.pairwise([start, *edges[1:-1], end])
    return clips, short


# ---- flow ----

# Per level, finest first; each halves: 20 pixels are 1.25 at the coarsest, where the first linear step still holds.  A
# second one at full size wins 0.01 pixel and takes a third more time
WARPS = 1, 2, 2, 2, 3
# By hand on known moves of real frames, without noise and with 2 grey levels of it: mean error 0.13 and 0.20 pixel
CELL = 4          # pixels per unknown: 2 errs by 0.22 and 0.37, 8 by 0.16 and 0.20
SWEEPS = 15       # 8: a tenth worse, 30: a tenth better without noise, nothing with it
SMOOTH = 0.1      # weight of the neighbours' mean against one fully textured cell; 0.3: 0.18 and 0.22
GRADIENT = 3.0    # grey levels per pixel: below it an edge is no better than grain; 1: 0.11 and 0.25, 6: 0.19 and 0.23
OUTLIER = 10.0    # grey levels: a pixel that stays this different counts half; 5 and 20 err no more


def grey(frames) -> torch.Tensor:
    """uint8 [T h w 3] -> float [T h w], BT.601 luma in 0..255."""
    return torch.as_tensor(np.ascontiguousarray(frames)).float() @ torch.tensor([0.299, 0.587, 0.114])


def padded(x, n=1):
    return F.pad(x, (n,) * 4, mode="replicate")


def smooth(x):
    """Binomial of 3 over [... h w]; the edge repeats."""
    x = padded(x)
    x = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1], alpha=2)
    return (x[..., :-2, :] + x[..., 2:, :]).add_(x[..., 1:-1, :], alpha=2).mul_(1 / 16)


def gradient(x):
    """Central differences of [N 1 h w], to the right and down."""
    x = padded(x)
    return (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2


def flow(a, b) -> torch.Tensor:
    """Optical flow [N 2 h w], (right, down) in pixels, of grey [N h w] in 0..255: a(p) shows what b(p + flow) shows.

    Combined local-global flow (Bruhn, Weickert and Schnoerr, IJCV 61(3), 2005, eq. 9): the windowed products of
    Lucas and Kanade (1981) hold where there is texture, Horn and Schunck's (1981) smoothness fills the rest, coarse
    to fine with warping.  Each pixel's equation is divided by its gradient (Zimmer et al., IJCV 93(3), 2011) and by
    a Cauchy weight of its misfit.  Levels of a Laplacian pyramid: light that changes is no motion.  Up to 20 pixels
    at 320 wide: mean end-point error 0.12 pixel, 0.2 with noise of 2 grey levels on both frames.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < 32:
        raise ValueError(f"flow needs two batches [N h w], h and w at least 32, got {[*a.shape]} and {[*b.shape]}")
    pyramid = [(smooth(a[:, None].float()), smooth(b[:, None].float()))]
    while len(pyramid) < len(WARPS) and min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(smooth(x), 2, ceil_mode=True) for x in pyramid[-1]))
    u = torch.zeros(len(a), 2, *pyramid[-1][0].shape[-2:])  # as from a coarser level; cut to size below
    for pair, warps in reversed(list(zip(pyramid, WARPS))):
        h, w = pair[0].shape[-2:]
        # Less the mean of 7 x 7: without it the error is half, until the light changes (by hand, as above)
        a, b = (x - F.avg_pool2d(F.avg_pool2d(padded(x, 3), (1, 7), 1), (7, 1), 1) for x in pair)
        u = 2 * F.interpolate(u, scale_factor=2, mode="bilinear")[..., :-(-h // CELL), :-(-w // CELL)]
        for _ in range(warps):
            u = refine(a, b, u)
    return per_pixel(u, h, w)


def per_pixel(u, h, w):
    """[N 2 cells] -> [N 2 h w]; a cell may reach over the edge."""
    return F.interpolate(u, scale_factor=CELL, mode="bilinear")[..., :h, :w]


def refine(a, b, u):
    """One warp of b by the flow u [N 2 cells], then Jacobi sweeps over the linear equations of CLG for the new flow."""
    h, w = a.shape[-2:]
    field = per_pixel(u, h, w)
    x, y = torch.arange(w) + field[:, 0], torch.arange(h)[:, None] + field[:, 1]
    inside = ((x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1))[:, None].float()
    place = torch.stack((x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1), -1)
    warped = F.grid_sample(b, place, padding_mode="border", align_corners=True)
    (ax, ay), (bx, by), misfit = gradient(a), gradient(warped), warped - a
    gx, gy = (ax + bx) / 2, (ay + by) / 2
    weight = inside / ((gx * gx + gy * gy + GRADIENT ** 2) * (1 + (misfit / OUTLIER) ** 2))
    wx, wy = weight * gx, weight * gy
    J = F.avg_pool2d(torch.cat((wx * gx, wx * gy, wy * gy, wx * misfit, wy * misfit), 1), CELL, ceil_mode=True)
    xx, xy, yy, xt, yt = smooth(smooth(J)).unbind(1)  # [N cells]
    det = (xx + SMOOTH) * (yy + SMOOTH) - xy * xy
    inv = torch.stack((yy + SMOOTH, xx + SMOOTH), 1) / det[:, None], (-xy / det)[:, None]  # diagonal, off-diagonal
    solve = lambda v: inv[0] * v + inv[1] * v.flip(1)
    known = solve(torch.stack((xx * u[:, 0] + xy * u[:, 1] - xt, xy * u[:, 0] + yy * u[:, 1] - yt), 1))
    inv = SMOOTH * inv[0], SMOOTH * inv[1]
    for _ in range(SWEEPS):
        u = known + solve(F.avg_pool2d(padded(u), 3, 1))
    return u


# ---- camera motion ----

# Between the two frames of a pair, and pairs of a clip, by hand: flow reaches 20 pixels (`flow`), in 1/12 s a camera
# that crosses the frame in 1.3 s; more pairs a second cost in proportion, and flow is half of the time
GAP_SECONDS, PAIRS_PER_SECOND = 1 / 12, 4
STATIC = 3.0      # rms over the frame, pixels per second: a walker before a plain wall gives up to 2.5
# Pixels, and share of the local camera motion, by which a pixel may differ and still follow it; by hand: flow errs by
# 0.1 to 0.2 pixel; 0.25 pixel names 10 of the clips' 49 shots otherwise, twice of either one or two
AGAINST = 0.5, 0.15
CAUCHY = 0.1      # pixels; at 0.5 a walker before a plain wall drags the camera along three times as much
GUESSES = 96      # pairs of points: 48 name one of 49 shots otherwise, 192 none, in twice the time
REFITS = 8        # 2 name two shots otherwise, 4 and 16 one
MOTIONS = (("pan right", "pan left"), ("tilt down", "tilt up"), ("zoom in", "zoom out"), ("roll", "roll"))


def similarity(field):
    """The camera's part of flow [N 2 h w]: about the frame's middle, f(z) = shift + turn z with z = x + iy.

    Returns shift [N] and turn [N], complex, real(turn) growth and imag(turn) turning per pair, and the share of
    pixels [N] that move otherwise.  RANSAC (Fischler and Bolles, CACM 24(6), 1981) over GUESSES fixed pairs of points
    finds the motion that most pixels share, Cauchy-weighted least squares (Huber, Robust Statistics, 1981, ch. 7)
    make it exact: a person who fills a third of the frame changes neither.
    """
    h, w = field.shape[-2:]
    # One pixel of 36, since flow has one unknown for 16; every fourth row and column take twice the time
    y, x = torch.meshgrid(torch.arange(2, h, 6) - (h - 1) / 2, torch.arange(2, w, 6) - (w - 1) / 2, indexing="ij")
    z = torch.complex(x, y).flatten()  # [P]
    f = rearrange(torch.complex(field[:, 0], field[:, 1])[:, 2::6, 2::6], "n h w -> n (h w)")

    def following(shift, turn):
        motion = shift + turn * z
        return ((f - motion).abs() < AGAINST[0] + AGAINST[1] * motion.abs()).float().mean(1)

    i, j = torch.randint(len(z), (2, 400), generator=torch.Generator().manual_seed(0))  # over half are far enough
    far = ((z[i] - z[j]).abs() > min(h, w) / 3).nonzero()[:GUESSES, 0]  # close points would tell growth from noise
    i, j = i[far], j[far]
    turn = (f[:, i] - f[:, j]) / (z[i] - z[j])  # [N K]
    shift = f[:, i] - turn * z[i]
    count = torch.stack([following(s[:, None], t[:, None]) for s, t in zip(shift.T, turn.T)])
    best = count.argmax(0)[:, None]  # [N 1]
    shift, turn = shift.gather(1, best), turn.gather(1, best)
    for _ in range(REFITS):
        weight = 1 / (1 + ((f - shift - turn * z).abs() / CAUCHY) ** 2)
        weight = weight / weight.sum(1, keepdim=True)
        zm, fm = (weight * z).sum(1, keepdim=True), (weight * f).sum(1, keepdim=True)
        turn = (weight * (z - zm).conj() * (f - fm)).sum(1, keepdim=True)
        turn = turn / (weight * (z - zm).abs() ** 2).sum(1, keepdim=True)
        shift = fm - turn * zm
    return shift[:, 0], turn[:, 0], 1 - following(shift, turn)


def motion(field, seconds) -> np.ndarray:
    """`flow` of pairs [N 2 h w], seconds [N] apart -> [N 6]: speed, right, down, zoom in, roll, share against.

    speed: the mean length of the flow.  The next four: of the camera, that is, opposite to the picture's; zoom and
    roll as rms over the frame.  All five in pixels per second at a longer side of 320.
    """
    shift, turn, against = similarity(field)
    h, w = field.shape[2:]
    turn = turn * math.sqrt((h * h + w * w) / 12)  # rms distance from the middle
    speed = torch.hypot(field[:, 0], field[:, 1]).mean((1, 2))
    numbers = torch.stack((speed, -shift.real, -shift.imag, turn.real, -turn.imag), 1)
    rate = 320 / max(h, w) / torch.as_tensor(seconds, dtype=torch.float32)
    return torch.cat((numbers * rate[:, None], against[:, None]), 1).numpy()


def camera(rows) -> dict:
    """`motion` of the pairs of one clip, in order, [N 6] -> the columns flow (mean speed), against and cmotion.

    cmotion, by medians over the pairs, so that a cut or a flash that came along does no harm: static; pan, tilt, zoom
    or roll, the largest; shake when the motion changes from pair to pair by more than its length; "" when in most
    pairs most pixels follow no camera motion, or when directions take turns (right, then left): a caption then says
    nothing.
    """
    if len(rows) == 0:
        return {"flow": math.nan, "against": math.nan, "cmotion": ""}
    sure = rows[rows[:, 5] <= 0.5, 1:5]  # [M 4]; most pixels follow: 0.7 names the clips' shots the same, 0.3 loses 14
    middle, length = np.median(sure, 0) if len(sure) else np.zeros(4), lambda x: np.median(np.linalg.norm(x, axis=1))
    k = int(np.abs(middle).argmax())
    if 2 * len(sure) < len(rows):
        cmotion = ""
    elif length(sure) < STATIC:
        cmotion = "static"
    elif len(sure) > 2 and length(np.diff(sure, axis=0)) > length(sure):  # sqrt(2) of it where pairs are unrelated
        cmotion = "shake"
    elif np.linalg.norm(middle) > length(sure) / 2:  # by hand: directions that take turns leave next to nothing
        cmotion = MOTIONS[k][int(middle[k] < 0)]
    else:
        cmotion = ""
    return {"flow": float(rows[:, 0].mean()), "against": float(rows[:, 5].mean()), "cmotion": cmotion}


# ---- checks: grey frames [T h w] in 0..255, longer side 320 ----

REPEAT = 0.6      # grey levels, mean over any 16 x 16 block: a held picture has 0.2, one of 300 film frames 0.6
UNIFORM = 4.0     # grey levels, standard deviation of a frame: one colour all over, such as black; shots 19 and more
BAR = 24.0        # grey levels that black bars stay under; black is 0, or 16 where the range is mistaken
COMB = 12.0       # grey levels by which a row sticks out from both neighbours; by hand: 6 sees no more where nothing is


def looks(g):
    """[T 3]: brightness, the mean luma, 0..1; contrast, its standard deviation, 0..0.5 (half black, half white); and
    sharpness, the variance of the Laplacian, grey levels squared (Pech-Pacheco et al., ICPR 2000, LAPV), which compares
    at one size only.  Shots of real clips have 100 to 5000, after a box blur of 9 pixels 1 to 20."""
    variance = lambda x: x.square().mean((1, 2)) - x.mean((1, 2)).square()  # torch's own takes four times as long
    lap = g[:, 1:-1, :-2] + g[:, 1:-1, 2:] + g[:, :-2, 1:-1] + g[:, 2:, 1:-1] - 4 * g[:, 1:-1, 1:-1]
    return torch.stack((g.mean((1, 2)) / 255, variance(g).clamp(min=0).sqrt() / 255, variance(lap)), 1)


def repeats(g):
    """bool [T-1]: the frame shows what the one before it does.  No block may change: a mouth that moves is enough."""
    return reduce(F.avg_pool2d((g[1:] - g[:-1])[:, None], 16, ceil_mode=True).abs(), "t 1 h w -> t", "max") < REPEAT


def longest(flags) -> int:
    """The longest run of True: of repeats, a held picture; many short ones are a low frame rate in a high one."""
    return max((len(run) for run in "".join("01"[int(f)] for f in flags).split("0")), default=0)


def combs(g):
    """[T] share of pixels that stand out from the rows above and below but not from those beyond: two fields woven.

    Needs the rows as coded: frames at full height, before any scaling (the width may be scaled); three or four per
    clip that move are enough.  Fine level stripes comb, too: columns that do so as much are taken off.  Progressive
    clips have at most 0.007 (skyscrapers), woven ones 0.005 to 0.09 where they move: call the largest over 0.01 so.
    """
    def share(x):
        up, here, down = x[:, 1:-3], x[:, 2:-2], x[:, 3:-1]
        out = torch.minimum((here - up) * (here - down).sign(), (here - down) * (here - up).sign())
        alike = torch.maximum((here - x[:, :-4]).abs(), (here - x[:, 4:]).abs())
        return reduce(((out > COMB) & (alike < out / 2)).float(), "t h w -> t", "mean")
    return (share(g) - share(rearrange(g, "t h w -> t w h"))).clamp(min=0)


def lit_share(g):
    """Of a grey frame [h w] the share of each row, and of each column, that is no black, in 1/255: bytes [h], [w]."""
    lit = 255 * (g > BAR).float()
    return tuple(bytes(lit.mean(axis).round().byte().tolist()) for axis in (1, 0))


def bars(lit) -> np.ndarray:
    """Black rows above and below, columns left and right, that hold over frames of `lit_share`: [4].

    A bar ends in a straight edge: most of the first line after it is lit in some frame, which titles on black and night
    skies are not; frames too dark for that give 0, and so do those of which it would be over a third (2.39:1 in 4:3
    leaves 22%).  The numbers are by hand; of the clips' letterboxed one 0.05 for 0.02 takes a row of the picture along.
    """
    def edge(lines):
        spots = np.quantile(lines, 0.98, 0) / 255  # share of the line in a bright frame; one in fifty may be broken
        dark = int((spots < 0.02).cumprod().sum())  # lines from the side on with under 2% lit
        most_lit = lines[:, dark:dark + 3].max(initial=0) > 127  # over half of 255; the edge is soft: in three lines
        return dark if 0 < dark <= lines.shape[1] // 3 and most_lit else 0
    rows, columns = (np.frombuffer(b"".join(lines), np.uint8).reshape(len(lines), -1) for lines in zip(*lit))
    return np.array([edge(rows), edge(rows[:, ::-1]), edge(columns), edge(columns[:, ::-1])])


def crop(bar, small, height, width) -> tuple[int, int, int, int]:
    """The box without bars, (top, left, height, width) in pixels of the full frame: even, a small row inside the edge.

    bar: from `bars` on frames of size small = (h, w).
    """
    h, w = small
    sides = zip(bar, (height / h, height / h, width / w, width / w))
    top, bottom, left, right = (2 * math.ceil((n + 0.5) * scale / 2) if n else 0 for n, scale in sides)
    return top, left, (height - top - bottom) // 2 * 2, (width - left - right) // 2 * 2


# ---- one decode for cuts, motion and checks ----

class Measured(NamedTuple):
    """What `measure` keeps of T frames: a KB of each and 4 KB of a few.  A frame is named by its number."""
    times: np.ndarray    # [T] seconds
    transitions: list    # (end of a shot, begin of the next)
    looks: np.ndarray    # [T 4] brightness, contrast, sharpness, whether it repeats the frame before
    moves: np.ndarray    # [pairs 8] first frame, second frame, and what `motion` says
    woven: np.ndarray    # [frames 2] frame, combs
    samples: list        # (frame, `lit_share`, perceptual hash)
    bars: np.ndarray     # [4] of all samples


def measure(path) -> Measured:
    """Decodes a video (or an image: one frame) once, small, and holds a second of it.

    What stays is in lists of numbers: small arrays would lie among the freed large ones, and 10 minutes of video would
    take another GiB."""
    cuts, times, seen, moves, woven, samples = Cuts(), [], [], [], [], []
    count, last, quarter, starts, pairs = 0, None, -1, [], []
    for seconds, frames, coded in small_frames(path):
        cuts.add(frames)
        g = grey(frames)
        same = repeats(torch.cat((g[:1] if last is None else last, g)))
        seen += torch.cat((looks(g), same[:, None].float()), 1).tolist()
        woven.append((count, combs(torch.from_numpy(coded).float()).item()))
        quarters = np.floor((seconds - (times or seconds)[0]) * PAIRS_PER_SECOND + 1e-3)
        for i in np.flatnonzero(np.diff(quarters, prepend=quarter)):  # the first frame of each: a sample, and a pair's
            samples.append((count + int(i), lit_share(g[i]), perceptual_hash(g[i])))
            starts.append((count + int(i), seconds[i], g[i]))
        while starts and (j := np.searchsorted(seconds, starts[0][1] + GAP_SECONDS - 0.001)) < len(seconds):
            first, since, a = starts.pop(0)  # the pair's second frame may come with a later run of frames
            pairs.append((first, count + j, a, g[j], seconds[j] - since))
        if len(pairs) >= 8:  # at once they cost less (tests/bench_curate.py flow)
            moves += moves_of(pairs)
            pairs = []
        count, last, quarter = count + len(g), g[-1:], quarters[-1]
        times += seconds.tolist()
    moves += moves_of(pairs)
    return Measured(np.array(times), cuts.end(), np.array(seen), np.array(moves).reshape(-1, 8), np.array(woven),
                    samples, bars([lit for _, lit, _ in samples]))


def moves_of(pairs) -> list:
    """[pairs 8]; nothing where a side has under 32 pixels."""
    if not pairs or min(pairs[0][2].shape) < 32:
        return []
    first, second, a, b, gap = zip(*pairs)
    return np.column_stack((first, second, motion(flow(torch.stack(a), torch.stack(b)), gap))).tolist()


def describe(m: Measured, first: int, end: int) -> dict:
    """The columns of a clip of frames first .. end - 1, and its `bars`."""
    seen, same = m.looks[first:end], m.looks[first + 1:end, 3]
    moves = m.moves[(m.moves[:, 0] >= first) & (m.moves[:, 1] < end)]
    woven = m.woven[(m.woven[:, 0] >= first) & (m.woven[:, 0] < end), 1]
    _, lit, hashes = zip(*[sample for sample in m.samples if first <= sample[0] < end] or m.samples[:1])
    return camera(moves[:, 2:]) | {
        "brightness": seen[:, 0].mean(), "contrast": seen[:, 1].mean(), "sharpness": np.median(seen[:, 2]),
        "uniform": (seen[:, 1] * 255 < UNIFORM).mean(), "repeats": same.mean() if len(same) else 0.0,
        "held": longest(same) / max(1, len(same)) * (m.times[end - 1] - m.times[first]),
        "combs": woven.max(initial=0.0), "phash": joint_hash(hashes),
        "bars": np.maximum(bars(lit), m.bars)}  # of the whole video, too: a dark clip of its own shows no edge


# ---- writing clips ----

# By hand.  crf 18 is what FFmpeg's guide to H.264 calls visually lossless or nearly so
GOP = 16  # frames between key frames: what training has to decode beyond its window
MAX_SIDE = 720  # pixels of the short side; the recipe's largest bucket is 720p


def write_clips(path, clips, times):
    """Decodes path once, writes clips (first frame, frame after the last, file .mp4, box), ascending; yields columns.
    box: (top, left, height, width) to cut out of the frame as displayed, or None; times [T]: seconds of all frames."""
    frames, at = decoded(path), 0
    for start, end, out, box in clips:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{out.stem}.*.part.mp4"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield write_clip(out, itertools.islice(frames, start - at, end - at), np.asarray(times[start:end]), box)
        at = end


def write_clip(out, frames, times, box=None) -> dict:
    """Writes frames, as `decoded` yields them, as H.264 as displayed; under another name first, so out is whole.
    A constant frame rate is kept; of a variable one each frame's own time."""
    part, count, first = out.with_name(f".{out.stem}.{os.getpid()}.part.mp4"), 0, next(frames, None)
    if first is None:
        raise UnreadableClip(f"{out}: 0 frames written, expected {len(times)}")
    _, frame, source = first
    rate, graph = constant_rate(times, source.guessed_rate), as_displayed(out, frame, source, box)
    shape = frame.width, frame.height, frame.format.name
    try:
        with av.open(str(part), "w", options={"movflags": "faststart"}) as container:
            options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=rate or 24, options=options)
            stream.codec_context.gop_size = GOP
            stream.codec_context.time_base = 1 / rate if rate else Fraction(1, 90000)
            for seconds, frame, _ in itertools.chain([first], frames):
                if shape != (frame.width, frame.height, frame.format.name):
                    raise UnreadableClip(f"{out}: its source changes the size of its frames")
                graph.push(frame)
                small = graph.pull()
                if not count:
                    stream.width, stream.height, stream.pix_fmt = small.width, small.height, "yuv420p"
                    stream.codec_context.color_range = int(small.color_range)
                    if "rgb" not in frame.format.name and "gbr" not in frame.format.name:
                        stream.codec_context.colorspace = int(frame.colorspace)     # the filter does not pass it on
                small.pts = count if rate else round((seconds - times[0]) * 90000)
                small.time_base = stream.codec_context.time_base
                small.pict_type = PictureType.NONE  # else x264 makes a key frame wherever the source had one
                container.mux(stream.encode(small))
                count += 1
            container.mux(stream.encode())
        columns = probe(part)
        if not count == columns["num_frames"] == len(times):
            raise UnreadableClip(f"{out}: {columns['num_frames']} frames written, expected {len(times)}")
        part.replace(out)
        return columns
    finally:
        part.unlink(missing_ok=True)


def as_displayed(path, frame, source, box=None) -> av.filter.Graph:
    """A filter to 4:2:0 with square pixels, turned, cut to box, its short side at most MAX_SIDE, both sides even."""
    width, (transposed, down, right) = displayed_width(path, frame, source), orientation(frame)
    box = box or (0, 0, *((width, frame.height) if transposed else (frame.height, width)))
    scale = min(1, MAX_SIDE / min(box[2:]))
    size = [round(n * scale) for n in (width, frame.height)]
    top, left, height, width = (round(n * scale) for n in box)
    turn = [("transpose", "cclock_flip")] * transposed + [("vflip", None)] * (down < 0)
    turn += [("hflip", None)] * (right < 0)
    steps = [("scale", "{}:{}:flags=area".format(*size)), *turn, ("format", "yuv420p"),
             ("crop", f"{width // 2 * 2}:{height // 2 * 2}:{left}:{top}:exact=1"), ("setsar", "1")]
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=source.time_base),
             *(graph.add(name, text) for name, text in steps), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


# ---- networks: frames by workers, numbers by a device; prepare_X, load_X, X of a step are told at `Step` ----

def num_frames(row) -> int:
    count = number(row.get("num_frames"))
    if not 1 <= count < math.inf:
        raise ValueError(f"{row['path']}: its num_frames is {row.get('num_frames', '')!r}, expected how many it has")
    return int(count)


def read_frames(row, places) -> list[np.ndarray]:
    """Frames [H W 3] of a clip by number, each decoded from the key frame before it, at most 15 frames back."""
    return [read_window(row["path"], 1, start=i)[0][0].numpy() for i in places]


def ends_and_middle(row) -> list[np.ndarray]:
    """The first, middle and last frame; an image's only frame is all three."""
    last = num_frames(row) - 1
    return read_frames(row, sorted({0, last // 2, last}))


def resized(frame, height: int, width: int, filter=Image.Resampling.BILINEAR) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), filter))


def fitted(frames, side: int, multiple: int = 1) -> np.ndarray:
    """uint8 [n h w 3]: the longer side at most `side`, both sides rounded to multiples."""
    scale = min(1, side / max(frames[0].shape[:2]))
    return np.stack([resized(frame, *(max(multiple, round(n * scale / multiple) * multiple) for n in frame.shape[:2]))
                     for frame in frames])


def net_of(cls, name, device, half=torch.float16):
    """A frozen network by folder or hub name; half precision on a GPU."""
    dtype = half if torch.device(device).type == "cuda" else torch.float32
    return load_net(cls, name, dtype=dtype).to(device).eval().requires_grad_(False)


# ---- CLIP: aesthetic score, match of text and picture ----

# Of openai/clip-vit-large-patch14's preprocessor_config.json
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_LAYERS = 0, 2, 4, 6, 7  # of LAION's file: linear; between them dropout, and no activation: "linearMSE"


@lru_cache
def clip_size(name) -> int:
    return from_pretrained(CLIPConfig, name).vision_config.image_size


def clip_pixels(frame, name) -> np.ndarray:
    """uint8 [size size 3]: the short side bicubically to `size`, the middle cut out, as CLIP's own preprocessing."""
    (h, w), size = frame.shape[:2], clip_size(name)
    h, w = size * h // min(h, w), size * w // min(h, w)
    top, left = (h - size) // 2, (w - size) // 2
    return resized(frame, h, w, Image.Resampling.BICUBIC)[top:top + size, left:left + size]


def image_features(clip, frames):
    """Unit vectors [N C], fp32, of uint8 [N size size 3]."""
    x = torch.as_tensor(frames).to(clip.device).float() / 255
    x = (x - x.new_tensor(CLIP_MEAN)) / x.new_tensor(CLIP_STD)
    x = clip.get_image_features(rearrange(x, "n h w c -> n c h w").to(clip.dtype)).pooler_output
    return F.normalize(x.float(), dim=-1)


def prepare_aesthetic(row, options):
    return np.stack([clip_pixels(frame, options.clip_model) for frame in ends_and_middle(row)])


def load_aesthetic(options, device):
    """The head is LAION's aesthetic predictor, on unit features of CLIP ViT-L/14."""
    clip, path = net_of(CLIPModel, options.clip_model, device), options.aesthetic_head
    if not Path(path or "").is_file():
        raise FileNotFoundError(f"--aesthetic-head {path!r} is no file: get sac+logos+ava1-l14-linearMSE.pth from "
                                "https://github.com/christophschuhmann/improved-aesthetic-predictor")
    try:
        state = torch.load(path, device, weights_only=True)
        head = [[state[f"layers.{i}.{kind}"].float() for kind in ("weight", "bias")] for i in HEAD_LAYERS]
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"the aesthetic head {path} holds no tensors layers.0.weight ... layers.7.bias") from error
    if (takes := head[0][0].shape[1]) != clip.config.projection_dim:
        raise ValueError(f"the aesthetic head {path} takes features of width {takes}, the CLIP model gives "
                         f"{clip.config.projection_dim}: LAION's head goes with openai/clip-vit-large-patch14")
    return partial(aesthetic, clip, head)


def aesthetic(clip, head, rows, prepared):
    """aes 1..10, mean over the frames; features: the frames' mean direction, unit length, fp16 in base64."""
    features = score = image_features(clip, np.concatenate(prepared))
    for weight, bias in head:
        score = F.linear(score, weight, bias)
    counts = [len(frames) for frames in prepared]
    means = [F.normalize(part.mean(0), dim=0).cpu().numpy().astype("<f2") for part in features.split(counts)]
    return [{"aes": float(part.mean()), "features": base64.b64encode(mean.tobytes()).decode()}
            for part, mean in zip(score.split(counts), means)]


def prepare_match(row, options):
    """uint8 [size size 3] of the middle frame; of one colour where there is no text to match."""
    places = [(num_frames(row) - 1) // 2]
    frame, = read_frames(row, places) if row["text"] else np.zeros((1, 8, 8, 3), np.uint8)
    return clip_pixels(frame, options.clip_model)


def load_match(options, device):
    clip = net_of(CLIPModel, options.clip_model, device)
    return partial(match, clip, from_pretrained(AutoTokenizer, options.clip_model))


def match(clip, tokenizer, rows, prepared):
    """100 cos(text, middle frame); "" without a text.  Words beyond CLIP's 77 tokens do not count."""
    texts = [row["text"] for row in rows]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                       max_length=clip.config.text_config.max_position_embeddings).to(clip.device)
    features = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
    scores = (100 * (features * image_features(clip, np.stack(prepared))).sum(-1)).tolist()
    return [{"match": score if text else ""} for text, score in zip(texts, scores)]


# ---- text detection ----

OCR_SIDE = 960    # of PP-OCR's own preprocessing
OCR_SMALL = 480   # pixels of the longer side, by hand; up to it a frame is looked at enlarged as well, others shrunk
OCR_AT_ONCE = 8   # frames, by hand
OCR_MEAN, OCR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # in this order for B G R, as it was trained
TEXT, BOX, UNCLIP, MIN_SIDE = 0.3, 0.6, 1.5, 3  # DB's thresholds of pixel and box, its growth; PP-OCR's least side


def prepare_ocr(row, options):
    return fitted(ends_and_middle(row), OCR_SIDE, 32)


def load_ocr(options, device):
    return partial(ocr, net_of(AutoModelForObjectDetection, options.ocr_model, device))


def ocr(net, rows, prepared):
    """text_area, share of the picture, and ocr, number of boxes, of each clip's frame with most text."""
    sizes, columns = defaultdict(list), [None] * len(rows)
    for i, frames in enumerate(prepared):
        sizes[frames.shape[1:]].append(i)
    for members in sizes.values():
        parts = torch.as_tensor(np.concatenate([prepared[i] for i in members])).split(OCR_AT_ONCE)
        found = iter([text for part in parts for text in text_boxes(text_probability(net, part))])
        for i in members:
            columns[i] = dict(zip(("text_area", "ocr"), max(itertools.islice(found, len(prepared[i])))))
    return columns


def text_probability(net, frames):
    """[N h w] of uint8 [N h w 3], by PP-OCR's detector; where it sees text, the least of three looks.

    Text stays text as a negative and at another size; the patches of fur, petals and lit windows, up to 0.2 of the
    picture, that the small detector takes for text on a tenth of textless frames, do not.
    """
    x = rearrange(frames.to(net.device).float().flip(-1) / 255, "n h w c -> n c h w")  # B G R
    mean, std = (x.new_tensor(values)[:, None, None] for values in (OCR_MEAN, OCR_STD))
    detect = lambda x: net(((x - mean) / std).to(net.dtype)).last_hidden_state[:, 0].float()
    text = detect(x)
    some = (text.amax((1, 2)) > TEXT).nonzero()[:, 0]
    if len(some):
        size = x.shape[2:]
        scale = 0.5 if max(size) > OCR_SMALL else 2
        sides = [max(1, round(n * scale / 32)) * 32 for n in size]
        other = F.interpolate(x[some], sides, mode="bilinear", antialias=True)
        other = F.interpolate(detect(other)[:, None], size, mode="bilinear")[:, 0]
        text[some] = torch.minimum(text[some], torch.minimum(detect(1 - x[some]), other))
    return text


def text_boxes(probability) -> list[tuple[float, int]]:
    """(share of the picture, number) of the boxes of text in each of probability [N h w].

    DB (arXiv 1911.08947, 3.5): pixels over TEXT that touch are one shrunk text; where its mean is over BOX, its
    rectangle of sides a, b grows by UNCLIP * area / perimeter on each side.  The rectangle, at any angle, is that of
    the pixels' second moments: a side of n pixels has variance (n^2 - 1) / 12.
    """
    N, h, w = probability.shape
    label = components(probability > TEXT)
    n, y, x = (label >= 0).nonzero(as_tuple=True)
    _, box = torch.unique(n * h * w + label[n, y, x], return_inverse=True)
    count = torch.bincount(box).double()
    mean = lambda values: torch.bincount(box, values.double()) / count
    mx, my, score = mean(x), mean(y), mean(probability[n, y, x])
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    middle, spread = (xx + yy) / 2, ((xx - yy) ** 2 / 4 + xy * xy).sqrt()
    a, b = ((12 * (middle + s).clamp(min=0) + 1).sqrt() for s in (spread, -spread))
    grown = UNCLIP * a * b / (a + b)  # on both sides together
    good = (score > BOX) & (b >= MIN_SIDE)
    image = torch.zeros_like(count, dtype=torch.long).scatter_(0, box, n)
    area = torch.bincount(image, good * (a + grown) * (b + grown), N) / (h * w)
    return list(zip(area.clamp(max=1).tolist(), torch.bincount(image, good, N).long().tolist()))


def components(mask):
    """Connected components, of 8 neighbours, of bool [N h w]: the largest flat index of each, -1 outside, long [N h w].

    Labels spread to neighbours and then follow their own labels, which doubles their reach each time.
    """
    N, h, w = mask.shape
    outside = ~rearrange(mask, "n h w -> n (h w)")
    label = torch.arange(h * w, device=mask.device).repeat(N, 1).masked_fill(outside, -1)
    while True:
        near = rearrange(label.float(), "n (h w) -> n 1 h w", h=h)  # exact below 2^24 pixels
        new = rearrange(F.max_pool2d(near, 3, 1, 1), "n 1 h w -> n (h w)").long().masked_fill(outside, -1)
        for _ in range(2):
            new = new.gather(1, new.clamp(min=0)).masked_fill(outside, -1)
        if torch.equal(new, label):
            return rearrange(label, "n (h w) -> n h w", h=h)
        label = new


# ---- captions ----

CAPTION_SIDE = 640  # by hand: more than most captioners look at; bounds the tokens of those that take any size
# Each the middle of its part: of 2 to 16 s one every 0.5 to 4 s; four of LLaVA-1.5's 576 tokens leave room for the
# answer in its 4,096; upstream shows three
CAPTION_FRAMES = 4
PROMPT = ("These are frames of one video, in order. Describe the video in one paragraph: who or what is seen, what "
          "happens, the place, the light and the style. Do not speak of frames, images or a video, and do not guess "
          "what is not seen.")
PREFIX = re.compile(r"""(?: (?:sure|certainly|here\ is)\b[^:.!]*[:.!]\s* )?
    (?: (?:in\ )?(?:this|the|these)\ (?:short\ |four\ )?(?:video|image|clip|footage|scene|frame)s?(?:\ clip)?
        (?: [,:]\s*(?:we\ (?:can\ )?see\ )? | \ (?:show|capture|feature|depict|present|portray|display)s?\s
          | \ (?:begins|starts|opens)\ with\s | \ (?:is|are)\ (?:of\ )?(?=an?\ |the\ ) ))?""", re.I | re.X)
REFUSAL = re.compile(r"\W*(?:(?:i['’]m|i am) (?:sorry|unable|not able|afraid)|sorry\b|i apologi|unfortunately,? i\b|"
                     r"as an ai\b|i (?:cannot|can['’]t|can not|could not|don['’]t|do not|am)\b)", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")  # its end


def prepare_caption(row, options):
    count = num_frames(row)
    places = {(2 * k + 1) * count // (2 * CAPTION_FRAMES) for k in range(CAPTION_FRAMES)}
    return fitted(read_frames(row, sorted(places)), CAPTION_SIDE)


def load_caption(options, device):
    try:
        processor = from_pretrained(AutoProcessor, options.captioner)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processor of captioner {options.captioner!r} cannot be built here: {reason}") from error
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"captioner {options.captioner!r} has no chat template: take one tuned to follow instructions")
    processor.tokenizer.padding_side = "left"  # what is written follows the prompt at once
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    net = net_of(AutoModelForImageTextToText, options.captioner, device, torch.bfloat16)
    return partial(caption, partial(answers, net, processor, options.prompt, options.max_new_tokens))


def caption(answers, rows, prepared):
    """text: what `answers` says of the frames, cleaned, with the camera's motion in Open-Sora 1.2's form."""
    said = answers(prepared)
    if refused := [text for text, _ in said if REFUSAL.match(text)]:
        print(f"{len(refused)} of {len(rows)} clips get no caption, the model said {refused[0][:80]!r}",
              file=sys.stderr)
    texts = [clean(*answer) for answer in said]
    return [{"text": f"{text} camera motion: {row['cmotion']}." if text and row.get("cmotion") else text}
            for row, text in zip(rows, texts)]


def answers(net, processor, prompt, max_new_tokens, clips) -> list[tuple[str, bool]]:
    """The model's words about clips, each uint8 [n h w 3], and whether they end where the model ended them."""
    question = {"type": "text", "text": prompt}
    prompts = [processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * len(frames) + [question]}], add_generation_prompt=True)
        for frames in clips]
    bos = processor.tokenizer.bos_token  # of most templates a part
    inputs = processor(text=prompts, images=[[Image.fromarray(f) for f in frames] for frames in clips], padding=True,
                       return_tensors="pt", add_special_tokens=not (bos and prompts[0].startswith(bos)))
    out = net.generate(**inputs.to(net.device, net.dtype), do_sample=False, max_new_tokens=max_new_tokens,
                       pad_token_id=processor.tokenizer.pad_token_id)[:, inputs.input_ids.shape[1]:]
    ends = torch.as_tensor(net.generation_config.eos_token_id or -1, device=out.device)
    return list(zip(processor.tokenizer.batch_decode(out, skip_special_tokens=True),
                    torch.isin(out, ends).any(1).tolist()))


def clean(text, ended=True) -> str:
    """Without words about the video, and without a last sentence that the limit of tokens cut off; "" for a refusal."""
    if REFUSAL.match(text):
        return ""
    text = " ".join(text.split())
    text = text[PREFIX.match(text).end():]
    stops = [stop.end() for stop in SENTENCE.finditer(text)]
    text = text if ended or not stops else text[:stops[-1]]
    return text[:1].upper() + text[1:]


# ---- the steps ----

class Step(NamedTuple):
    """What measures rows: prepare(row, options) -> data, by CPU workers; load(options, device) -> work on the device,
    work(rows, datas) -> columns of each.  Without load the data is the columns.

    row["path"] can be opened; a ValueError or OSError of prepare becomes the row's error.
    """
    reads: tuple        # columns of a row that the result depends on
    settings: tuple     # options that it depends on
    prepare: Callable
    load: Callable | None = None
    writes: tuple = ()  # columns
    batch: int = 1      # rows that work sees at once; by hand


TOO_SHORT = "too short a shot"
FLOW = "flow", "cmotion", "against"
CHECKS = "brightness", "contrast", "sharpness", "uniform", "repeats", "held", "combs", "phash"


def cut_file(row: dict, options) -> dict:
    """Probes, measures and cuts a file, writes its clips: the columns of the file, and "clips", the rows of these."""
    path, file = row["path"], probe(row["path"])
    m, still, (height, width) = measure(path), file["kind"] == "image", (file["height"], file["width"])
    clips, short = ([(0, 1)], []) if still else split(m.transitions, m.times, options.min_seconds, options.max_seconds)
    # Counted from what holds the videos and the folder, so that no two have one place
    place = Path("clips", os.path.relpath(path, os.path.commonpath([os.path.abspath(options.what), options.folder])))
    rows, wanted, small = [], [], [len(lit) for lit in m.samples[0][1]]
    for a, b in clips:  # in frames
        clip, name = describe(m, a, b), place if still else place / f"{a:06d}-{b:06d}.mp4"
        bar = clip.pop("bars")
        box = (0, 0, height, width) if still else crop(bar, small, height, width)
        wanted.append((a, b, options.folder / name, box))
        rows.append(clip | {"path": name.as_posix(), "height": box[2], "width": box[3], "fps": file["fps"]})
    if still and not options.dry_run:
        (options.folder / place).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.folder / place) as part:
            shutil.copyfile(path, part)
    elif not options.dry_run:
        for clip, own in zip(rows, write_clips(path, wanted, m.times)):
            clip |= {name: own[name] for name in ("height", "width", "fps")}
    rows += [{"path": "", "error": TOO_SHORT} for _ in short]
    ends = np.append(m.times, m.times[-1] + file["seconds"] / max(1, file["num_frames"])) - m.times[0]
    for clip, (a, b) in zip(rows, clips + short):
        clip |= {"source": row["source"], "num_frames": b - a, "start_seconds": ends[a], "seconds": ends[b] - ends[a]}
    return file | {"num_frames": len(m.times), "clips": [rounded(clip) for clip in rows]}


def rounded(columns: dict) -> dict:
    """Floats to 4 digits after the point, nan to "", as they go into a csv."""
    def cell(value):
        if not isinstance(value, (float, np.floating)):
            return value
        return "" if math.isnan(value) else round(float(value), 4)
    return {name: cell(value) for name, value in columns.items()}


def measure_clip(columns, row: dict, options) -> dict:
    m = measure(row["path"])
    found = describe(m, 0, len(m.times))
    return {name: found[name] for name in columns}


STEPS = {
    "cut": Step(("source", "bytes", "modified"), ("min_seconds", "max_seconds", "dry_run"), cut_file),
    "flow": Step(("path",), (), partial(measure_clip, FLOW), None, FLOW),
    "checks": Step(("path",), (), partial(measure_clip, CHECKS), None, CHECKS),
    "aesthetic": Step(("path", "num_frames"), ("clip_model", "aesthetic_head"), prepare_aesthetic, load_aesthetic,
                      ("aes",), 64),
    "ocr": Step(("path", "num_frames"), ("ocr_model",), prepare_ocr, load_ocr, ("ocr", "text_area"), 16),
    "caption": Step(("path", "num_frames", "cmotion"), ("captioner", "prompt", "max_new_tokens"), prepare_caption,
                    load_caption, ("text",), 16),  # 4 frames of LLaVA-1.5's 576 tokens each: 37,000
    "match": Step(("path", "num_frames", "text"), ("clip_model",), prepare_match, load_match, ("match",), 64),
}
NETWORKS = "aesthetic", "ocr", "caption", "match"  # in this order: a match needs a caption


# ---- work: items spread over ranks and processes, results that outlive them ----

RESULTS_VERSION = 3  # to be raised when a step is to give other results


class Results:
    """What is known of one step, a small file per item: {"columns": {...}}, or {"error": why not}, which the next run
    tries again.  Another setting is another folder.  patient: `get` waits for what another rank has yet to do."""
    patient = False

    def __init__(self, name: str, options):
        self.step = STEPS[name]
        settings = repr([RESULTS_VERSION, *(getattr(options, field) for field in self.step.settings)])
        self.folder = options.folder / "parts" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def file(self, row: dict) -> Path:
        reads = json.dumps([str(row.get(column, "")) for column in self.step.reads])
        key = hashlib.sha256(reads.encode()).hexdigest()[:16]
        return self.folder / key[:2] / f"{key}.json"

    def get(self, row: dict) -> dict:
        while True:
            with suppress(FileNotFoundError, json.JSONDecodeError):  # the latter after a power cut
                return json.loads(self.file(row).read_bytes())
            if not self.patient:
                return {}
            time.sleep(1)

    def add(self, row: dict, record: dict):
        file = self.file(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(record), "utf-8")
        part.replace(file)


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def can_be_read(row: dict) -> bool:
    return bool(row["path"]) and not row.get("error")


def is_mine(row: dict) -> bool:
    """Whether this rank works on a row: all clips of a file go to the rank that cuts it."""
    return int(hashlib.sha256((row.get("source") or row["path"]).encode()).hexdigest()[:8], 16) % WORLD == RANK


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process, which ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def attempt(prepare, row, options):
    try:
        return prepare(row | {"path": os.path.normpath(options.folder / row["path"])}, options), ""
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise  # the disk is full: no fault of the row
        return None, " ".join(str(error).split())


def in_parallel(prepare, rows, options, ahead: int):
    """Yields (row, prepare(row, options), "") or (row, None, the reason why not) in the order in which they get done.

    `ahead` rows are under way in options.workers processes.  When one of these dies (a decoder that crashes, memory
    that runs out), its pool does, too, and does not say whose fault it was: then what was under way is tried one by
    one, and what kills its process again is told.
    """
    rows, suspects = deque(rows), deque()
    while queue := suspects or rows:
        workers, limit = (1, 1) if queue is suspects else (options.workers, ahead)
        pool, pending = ProcessPoolExecutor(workers, initializer=start_worker), {}
        try:
            while queue or pending:
                while queue and len(pending) < limit:
                    future = pool.submit(attempt, prepare, queue[0], options)
                    pending[future] = queue.popleft()
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending[future], *future.result()
                    del pending[future]
        except BrokenExecutor:
            if queue is rows:
                suspects += pending.values()
                continue
            for row in pending.values():
                yield row, None, f"{row['path']}: ended its process: a fault of the decoder, or too little memory"
        finally:
            for process in multiprocessing.active_children():  # at once: what is under way is lost
                process.kill()
            pool.shutdown(cancel_futures=True)


def do(name: str, rows, options) -> Results:
    """Does a step for those of this rank's rows that have no result yet; paths count from options.folder."""
    step, results, failed = STEPS[name], Results(name, options), []
    todo = [row for row in rows if is_mine(row) and can_be_read(row) and "columns" not in results.get(row)]
    work = step.load(options, options.device) if todo and step.load else None
    # The workers decode the next batch while the device works on one; results come a batch at a time
    made = in_parallel(step.prepare, todo, options, 2 * (options.workers + step.batch))
    with tqdm(desc=name, total=len(todo), smoothing=0.05, disable=RANK > 0 or not todo) as bar:
        while batch := list(itertools.islice(made, step.batch)):
            good = [(row, data) for row, data, error in batch if not error]
            columns = iter(work(*zip(*good)) if work and good else [data for _, data in good])
            for row, _, error in batch:
                results.add(row, {"error": error} if error else {"columns": rounded(next(columns))})
                failed += [error] * bool(error)
            bar.update(len(batch))
    if failed and RANK == 0 and name != "cut":  # of which files.csv tells
        print(f"{name}: {len(failed)} clips could not be read, such as {failed[0]}")
    results.patient = True
    return results


# ---- tables ----

TABLE = (*COLUMNS, *SCORES, "cmotion", "against", "text_area", *CHECKS, "source", "start_seconds", "seconds", "error",
         "duplicate_of", "dropped")  # the columns of clips.csv and meta.csv, in this order, as far as there are
FILES = ("path", "kind", "error", *COLUMNS[2:], "rotation", "seconds", "codec", "hash", "bytes", "clips")


def read_table(path, needed=("path",)):
    """Yields the rows of a csv."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such table - `python curate.py run VIDEOS --out DIR` makes one")
    for _, row in read_csv(path, needed):
        yield row


def header_of(table, needed=("path",)) -> list[str]:
    for row in read_table(table, needed):
        return list(row)
    raise ValueError(f"{table}: has no rows, expected one per clip")


def write_table(path: Path, rows, columns):
    """`columns` in the order of TABLE, then others."""
    columns = [name for name in TABLE if name in columns] + [name for name in columns if name not in TABLE]
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def listed(options) -> list[dict]:
    """A row for every video and image of a folder; paths count from options.folder."""
    found, other = find_files(options.what, options.folder)
    if not found:
        raise ValueError(f"{options.what}: has no video or image among {len(other)} files, expected "
                         f"{' '.join(VIDEOS + IMAGES)}")
    if RANK == 0 and (other := [path for path in other if path.suffix != ".txt"]):
        print(f"{len(other)} files are left alone, no video, no image, a link to a folder or no name in UTF-8, such as "
              f"{str(other[0])!a}")
    told = read_table(options.captions, ("path", "text")) if options.captions else ()
    captions, rows = {row["path"]: row["text"] for row in told}, []
    for path in found:
        name, beside = os.path.relpath(path, options.folder), path.with_suffix(".txt")
        with suppress(FileNotFoundError):  # one may vanish
            stat = os.stat(path)
            text = captions.pop(os.path.relpath(path, options.what), None) or captions.pop(path.name, None)
            if text is None and beside.is_file():
                text = " ".join(beside.read_text(encoding="utf-8", errors="replace").split())
            rows.append({"path": name, "source": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns,
                         "text": text or ""})
    if captions and RANK == 0:
        print(f"{options.captions}: {len(captions)} captions are of no file here, such as of {next(iter(captions))}")
    return rows


def with_results(rows, done):
    """Rows with the columns that steps have found, or an error where they could not read them."""
    for row in rows:
        for results in done:
            record = results.get(row) if can_be_read(row) else {}
            row = row | record.get("columns", record)
        yield row


def clip_rows(files, cut: Results):
    """Yields the rows of clips, and one with an error for each file and each shot that gave none."""
    for file in with_results(files, [cut]):
        for clip in file.get("clips", ()):
            yield {"text": file["text"]} | clip
        if file.get("error"):
            yield {"path": "", "source": file["source"], "error": file["error"]}


# ---- dedup ----

HASH_BITS = 192  # 3 keyframes of 64
FLAT = 8.0  # rms of the 64 coefficients: shots have 60 or more, black with noise of 5 grey levels has 1
# At most 18 of 192 bits may differ.  Of 49 clips of 2 s and more: H.264 crf 23 up to 8 bits, crf 35 26 (47 clips are
# found), half size and crf 28 24 (47), 10% brighter 14, noise of 5 levels 6, 2% cropped 16, 5% cropped 32 (29), 10%
# cropped 52 (2), mirrored none.  Different shots: 46 or more, the median pair 96; of shorter ones a drummer whom one
# fixed camera sees twice has 20.
HASH_ALIKE = 1 - 2 * 18.5 / HASH_BITS
FEATURE_ALIKE = 0.98  # cosine of CLIP ViT-L/14: upstream's tools/scoring/deduplicate; not measured here


def perceptual_hash(g) -> str:
    """Grey frame [h w] -> 16 hex digits; "" for a flat one, of which noise would decide.

    DCT hash (Zauner 2010, sec. 3.2.1): 32 x 32 luma, whether each of 8 x 8 low frequencies is above their median.
    """
    small = Image.fromarray(g.byte().numpy()).resize((32, 32), Image.Resampling.BOX)
    k, x = np.mgrid[1:9, :32]
    dct = np.cos(np.pi * k * (2 * x + 1) / 64) / 4  # [8 32], orthonormal
    c = (dct @ np.asarray(small, np.float32) @ dct.T).ravel()
    return np.packbits(c > np.median(c)).tobytes().hex() if np.sqrt((c ** 2).mean()) > FLAT else ""


def joint_hash(hashes: list[str]) -> str:
    """48 hex digits of the first, middle and last frame; with two flat ones there is nothing to compare: ""."""
    three = [hashes[0], hashes[len(hashes) // 2], hashes[-1]]
    return "" if three.count("") > 1 else "".join(part or 16 * "0" for part in three)


def hash_vectors(hashes: list[str]) -> np.ndarray:
    """Of `joint_hash`, to float16 [N 192] of length 1: their product is 1 - 2 (bits that differ) / 192."""
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, HASH_BITS // 8)
    return spread(hashes, (np.unpackbits(packed, axis=1) * np.float16(2) - 1) / np.float16(math.sqrt(HASH_BITS)))


def feature_vectors(texts: list[str]) -> np.ndarray:
    """The column `features`, base64 of float16 of length 1, to [N D]."""
    return spread(texts, np.stack([np.frombuffer(base64.b64decode(text), np.float16) for text in texts if text]))


def spread(texts, known) -> np.ndarray:
    """Vectors of the texts that are not "", [M D], to float16 [N D] of all; "" has 0, which is like nothing."""
    vectors = np.zeros((len(texts), known.shape[1]), np.float16)
    vectors[[bool(text) for text in texts]] = known
    return vectors


def duplicates(vectors, threshold: float, order, device="cpu", block=4096, wide=65536) -> np.ndarray:
    """For each of vectors [N D] of length 1 the index of the one it repeats, or -1: int64 [N].

    In `order` [N], the best first, each is kept unless its product with one kept before reaches the threshold; it then
    repeats the first of those.  So no two kept are alike, and a chain of small changes does not become one clip.
    All pairs are looked at: 10 million x 192 are 2e16 operations, about 2 minutes on an H100 by its bandwidth (not
    measured), which then holds N x D in fp16, 4 GB, and block x wide products, 0.5 GB.  2 cores, in fp32: 40,000 in
    6 s.  block and wide are by hand: of a block all products of its own are looked at, on the CPU.
    """
    order, kind = np.asarray(order), torch.float32 if torch.device(device).type == "cpu" else torch.float16
    x = torch.as_tensor(vectors)[order].to(device, kind)  # one that repeats another becomes 0, which is like nothing
    repeats = np.full(len(x), -1)
    for begin in range(0, len(x), block):
        new, first = x[begin:begin + block], repeats[begin:begin + block]
        for start in range(0, begin, wide):
            alike = new @ x[start:min(start + wide, begin)].T
            for i in (alike.amax(1) >= threshold).cpu().numpy().nonzero()[0]:
                if first[i] < 0:
                    first[i] = start + (alike[i] >= threshold).nonzero()[0, 0].item()
        near = (new @ new.T >= threshold).tril(-1).cpu().numpy()
        for i in np.flatnonzero(near.any(1) & (first < 0)):  # ascending, so those before it are decided
            before = np.flatnonzero(near[i] & (first < 0))
            first[i] = begin + before[0] if len(before) else -1
        new[torch.as_tensor(first >= 0, device=device)] = 0
    found = np.empty_like(repeats)
    found[order] = np.where(repeats < 0, -1, order[repeats])
    return found


def find_duplicates(rows, rules, device) -> list[str]:
    """Of each row the path of the better one that it repeats, or "": breaking no rule, captioned, larger, longer."""
    paths, hashes, features, order = [], [], [], []
    for row in rows:
        paths.append(row["path"])
        hashes.append(row.get("phash", ""))
        features.append(row.get("features", ""))
        order.append([*(-number(row.get(name)) for name in ("num_frames", "height", "aes")), not row.get("text"),
                      bool(verdict(row | {"duplicate_of": ""}, rules))])
    order = np.lexsort(np.nan_to_num(np.array(order).reshape(-1, 5)).T)
    found = duplicates(hash_vectors(hashes), HASH_ALIKE, order, device)
    if any(features):
        found = np.maximum(found, duplicates(feature_vectors(features), FEATURE_ALIKE, order, device))
    return [paths[i] if i >= 0 else "" for i in found]


# ---- rules ----

class Rule(NamedTuple):
    """What a column must keep to; limit None: off."""
    name: str  # of its flag
    column: str
    limit: float | None

    def __str__(self):
        return f"{self.name} {self.limit:g}"

    sign = property(lambda self: "<" if self.name.startswith("min") else ">")  # value to limit where it is broken

    def breaks(self, value):
        return value < self.limit if self.sign == "<" else value > self.limit


# Upstream names one threshold, of aes (docs/data_processing.md); its tools/datasets/datautil.py has --matchmin and
# --flowmin without a number.  Where ours is another measure the numbers are from 49 clips of real footage: animation,
# a concert, a city.
RULES = (
    Rule("min_aesthetic", "aes", 5.0),    # upstream's --aesmin 5; for a first stage it takes 4.5 (docs/report_03.md)
    Rule("min_match", "match", 20.0),     # cosine x 100; upstream names none, ports of its pipeline --matchmin 20
    Rule("max_text_area", "text_area", 0.02),  # share: titles 0.02 to 0.1, textless 0; upstream counts boxes
    Rule("min_flow", "flow", 0.5),        # px/s: a held picture 0.04, noisy 1.0; quietest shots 1.0, 1.6
    Rule("max_flow", "flow", None),       # px/s: half of all over 12, the wildest 71 and no worse to look at
    Rule("max_repeats", "repeats", 0.7),  # share: drawn at 12 of 24 fps 0.5, at 8 of 24 0.67, a held picture 1
    Rule("max_held", "held", 2.0),        # seconds: an animated shot 1.5, a held picture all of its 3
    Rule("max_uniform", "uniform", 0.1),  # share: a shot from black 0.04, black 1
    Rule("min_brightness", "brightness", 0.03),  # 0 to 1: the darkest shot of a concert 0.04, black 0.014
    Rule("min_sharpness", "sharpness", 20.0),    # shots have 150 to 5000, blurred over 9 pixels 1 to 20
    Rule("max_combs", "combs", 0.01),     # share: progressive clips have up to 0.007
    Rule("min_height", "height", None),   # the buckets leave out what is too small for them
)
MOVES = ("flow", "repeats", "held", "combs")  # what an image has not


def flag_limit(text: str) -> float | None:
    limit = None if text.lower() == "none" else number(text)
    if limit is not None and not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"expected a number, or none to switch the rule off, got {text!r}")
    return limit


def rules_of(options) -> list[Rule]:
    """Those in force."""
    rules = [rule._replace(limit=getattr(options, rule.name)) for rule in RULES]
    return [rule for rule in rules if rule.limit is not None]


def number(value) -> float:
    return read_number(str(value))  # nan for what is none, also ""


def faults(row, rules):
    """Yields (what drops a row, why): one that no rule can mend, or all rules that it breaks, in their order."""
    if error := row.get("error"):
        yield "too short" if error == TOO_SHORT else "unreadable", error
    elif row.get("duplicate_of"):
        yield "duplicate", f"duplicate of {row['duplicate_of']}"
    else:
        still = number(row.get("num_frames")) == 1
        for rule in rules:
            if rule.column not in row or still and rule.column in MOVES:
                continue
            value = number(row[rule.column])
            if math.isnan(value):
                yield rule, f"no {rule.column}"
            elif rule.breaks(value):
                shown = f"{value:.4g}" if rule.breaks(float(f"{value:.4g}")) else repr(value)  # else it says "5 < 5"
                yield rule, f"{rule.column} {shown} {rule.sign} {rule}"


def verdict(row, rules) -> str:
    """Why a row is dropped, "" if it is not."""
    return next((why for _, why in faults(row, rules)), "")


class Tally:
    """Counts rows by the first thing that drops them, and by all (`alone`)."""
    def __init__(self, rules):
        self.rules, self.total, self.kept, self.measured = rules, 0, 0, set()
        self.dropped, self.alone, self.example = Counter(), Counter(), {}

    def add(self, row) -> str:
        """`verdict` of the row."""
        found = list(faults(row, self.rules))
        self.total, self.kept = self.total + 1, self.kept + (not found)
        self.measured.update(row)
        self.alone.update(what for what, _ in found)
        if not found:
            return ""
        what, why = found[0]
        self.dropped[what] += 1
        self.example.setdefault(what, " ".join(f"{row['path'] or row.get('source', '?')}: {why}".split()))
        return why

    def __str__(self):
        left, lines = self.total, [("rule", "kept", "dropped", "alone", "example")]
        for what in ("unreadable", "too short", "duplicate", *self.rules):
            left -= self.dropped[what]
            counts = left, self.dropped[what], self.alone[what], self.example.get(what, "")
            known = not isinstance(what, Rule) or what.column in self.measured
            lines.append((str(what), *(counts if known else ("not measured", "", "", ""))))
        text = "".join(f"{a:<20} {b:>12} {c:>9} {d:>9}  {e}".rstrip() + "\n" for a, b, c, d, e in lines)
        return (f"{text}A clip is dropped by the first rule that it breaks; alone: what the rule would drop without "
                f"the others.\n{self.total} clips, {self.kept} kept")


# ---- report ----

STYLE = """:root{color-scheme:light dark;font:14px system-ui}body{margin:2em auto;max-width:1200px}
pre{white-space:pre-wrap}.row{display:flex;flex-wrap:wrap;gap:1em}
figure{margin:0;max-width:352px;overflow-wrap:anywhere}img{max-width:100%}.drop{color:#d9772b}"""


def picks(values, rule: Rule) -> dict[str, list[int]]:
    """Rows to look at, none twice: the worst, those nearest to the limit on both sides, the best."""
    known = np.flatnonzero(np.isfinite(values))
    sign = 1 if rule.sign == "<" else -1
    order = known[np.argsort(sign * values[known], kind="stable")]  # worst first
    edge = int(rule.breaks(values[order]).sum())
    rows = {"worst": order[:max(0, edge - 3)][:3], "just dropped": order[max(0, edge - 3):edge][::-1],
            "just kept": order[edge:edge + 3], "best": order[edge + 3:][-3:][::-1]}
    return {title: found.tolist() for title, found in rows.items() if len(found)}


def figure(row, why: str, frames_of) -> str:
    """A strip of the frames that frames_of(row) gives, uint8 [T h w 3], or why there is none; its path and verdict."""
    name = html.escape(row["path"])
    try:
        frames = np.concatenate([resized(frame, 64, max(1, round(64 * frame.shape[1] / frame.shape[0])))
                                 for frame in frames_of(row)], axis=1)
        Image.fromarray(frames).save(buffer := io.BytesIO(), "JPEG", quality=70)
        picture = (f'<img alt="frames of {name}" width="{frames.shape[1]}" height="64" src="data:image/jpeg;base64,'
                   f'{base64.b64encode(buffer.getvalue()).decode()}">')
    except (ValueError, OSError) as error:
        picture = html.escape(str(error))
    return f'<figure>{picture}<br>{name}<br><span class="drop">{html.escape(why)}</span></figure>'


def write_report(rows, rules, path: Path, frames_of):
    """Writes one .html file that needs nothing else: what is dropped and why, then of each rule the values and clips
    to look at.  rows() is gone through twice, as the clips to show are known after all; a row takes 4 bytes a rule."""
    tally, hours, values = Tally(rules), 0.0, {rule: array("f") for rule in rules}
    for row in rows():
        seconds = number(row.get("seconds"))
        hours += 0 if tally.add(row) or math.isnan(seconds) else seconds / 3600
        for rule, column in values.items():
            column.append(number(row.get(rule.column)))
    values = {rule: np.frombuffer(column, np.float32) for rule, column in values.items()}
    chosen = {rule: picks(column, rule) for rule, column in values.items() if np.isfinite(column).any()}
    wanted = {i for titles in chosen.values() for found in titles.values() for i in found}
    shown = {i: figure(row, verdict(row, rules), frames_of) for i, row in enumerate(rows()) if i in wanted}
    with atomic_write(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Clips</title><style>{STYLE}</style>'
                f"</head><body><h1>{tally.kept:,} of {tally.total:,} clips kept"
                f"{f', {hours:,.2f} hours' if hours else ''}</h1>"
                f"<pre>{html.escape(str(tally))}</pre>")
        for rule, titles in chosen.items():
            known = values[rule][np.isfinite(values[rule])]
            spread = ", ".join(f"{value:.4g}" for value in np.quantile(known, np.linspace(0, 1, 11)))
            f.write(f"<h2>{rule}</h2><p>{rule.column} of {len(known):,} clips, {rule.breaks(known).sum():,} of them "
                    f"dropped; the least, each tenth, and the largest: {spread}</p>")
            for title, found in titles.items():
                figures = "".join(f"<div><b>{values[rule][i]:.4g}</b>{shown[i]}</div>" for i in found)
                f.write(f'<h3>{title}</h3><div class="row">{figures}</div>')
        f.write("</body></html>")


# ---- commands ----

def start(options):
    """run and cut: a folder of videos to files.csv, clips.csv and meta.csv."""
    files = listed(options)
    mine = [row for row in files if is_mine(row)]  # another rank's clips are not known yet: asking for them would wait
    cut, done = do("cut", mine, options), []
    rows = lambda files=files: with_results(clip_rows(files, cut), done)  # of the clips, by all steps done so far
    for name in NETWORKS:
        found = Results(name, options)  # also of an earlier run
        if name in options.also:
            try:
                found = do(name, rows(mine), options)
            except (ValueError, FileNotFoundError) as error:
                print(f"{name} is not done: {error}", file=sys.stderr)
        done.append(found)
    if RANK:
        return
    files_csv = options.folder / "files.csv"
    table = [row | {"clips": sum(bool(clip["path"]) for clip in row.get("clips", ()))}
             for row in with_results(files, [cut])]
    write_table(files_csv, table, FILES)
    hours, broken = sum(row.get("seconds", 0) for row in table) / 3600, [r["error"] for r in table if "error" in r]
    print(f"{files_csv}: {len(table)} files, {hours:.2f} hours, {len(broken)} cannot be read",
          *broken[:10], *[f"and {len(broken) - 10} more"] * (len(broken) > 10), sep="\n  ")
    absent = {name for found in done if not found.folder.exists() for name in found.step.writes} - {"text"}
    choose(rows, [name for name in TABLE if name not in absent], options)


def choose(rows, columns, options):
    """Finds duplicates, applies the rules; writes clips.csv and meta.csv, says what is kept and why the rest is not.
    rows() gives all rows, again and again."""
    tally, table = Tally(rules_of(options)), options.table
    meta = table.with_name("meta.csv" if table.name == "clips.csv" else f"{table.stem}-kept.csv")  # of one's own
    if not options.no_dedup:
        found = find_duplicates(rows(), tally.rules, options.device)
        rows = lambda rows=rows: (row | {"duplicate_of": of} for row, of in zip(rows(), found))
    columns = dict.fromkeys((*columns, "duplicate_of", "dropped"))
    write_table(table, (row | {"dropped": tally.add(row)} for row in rows()), columns)
    print(tally)
    if not tally.kept:
        raise ValueError("no clip is kept: the table says by which rule; --min-... or --max-...=none switches one off")
    if options.dry_run:
        print(f"{table}: where each clip begins (start_seconds) and what it measures; no clip is written")
        return
    kept = [name for name in columns if name not in ("error", "duplicate_of", "dropped")]
    write_table(meta, (row for row in read_table(table) if not row["dropped"]), kept)
    silent = sum(not row.get("text") for row in read_table(meta))
    print(f"{meta}: {tally.kept} clips" + f", {silent} of them without a caption" * (silent > 0))
    if not (first := options.folder / next(read_table(meta))["path"]).is_file():
        print(f"{meta}: there is no {first} - after --dry-run, run without it", file=sys.stderr)
    if options.config:
        meta = read_meta(str(meta))
        print(bucket_table(meta, options.config, assign(meta, options.config, 0)))


def add_columns(options):
    """A step on a table: adds its columns."""
    table, step = options.table, STEPS[options.command]
    header = header_of(table, [name for name in ("path", "num_frames", "text") if name in step.reads])
    results = do(options.command, read_table(table), options)
    if RANK == 0:
        write_table(table, with_results(read_table(table), [results]), (*header, *step.writes, "error"))
        print(f"{table}: {', '.join(step.writes)}; `python curate.py filter {options.what}` chooses by them")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="python curate.py COMMAND WHAT [--flag=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("run", *STEPS, "dedup", "filter", "report"))
    parser.add_argument("what", help="a folder of videos (run, cut), or the DIR or table that they made")
    making = parser.add_argument_group("run and cut")
    making.add_argument("--out", type=Path, metavar="DIR", help="where all is written")
    making.add_argument("--with", dest="also", type=lambda text: text.split(","), default=[], metavar="STEPS",
                        help=f"of run: {','.join(NETWORKS)}")
    making.add_argument("--captions", metavar="CSV", help="columns path,text: captions of the videos; without, a .txt "
                        "beside a video is its caption")
    making.add_argument("--min-seconds", type=float, default=2.0, help="of a clip (default: %(default)s)")
    making.add_argument("--max-seconds", type=float, default=16.0, help="of a clip: longer shots are divided (default: "
                        "%(default)s)")
    making.add_argument("--dry-run", action="store_true", help="measures and writes clips.csv, but no clips")
    making.add_argument("--no-dedup", action="store_true", help="leaves out the search for near-duplicates")
    parser.add_argument("--config", help="of run, filter: tells which of its buckets the clips go to")
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    networks = parser.add_argument_group("networks: folders or names on the hub")
    networks.add_argument("--clip-model", default="openai/clip-vit-large-patch14", help="(default: %(default)s)")
    networks.add_argument("--aesthetic-head", metavar="FILE", help="sac+logos+ava1-l14-linearMSE.pth")
    networks.add_argument("--ocr-model", default="PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
                          help="(default: %(default)s)")
    networks.add_argument("--captioner", default="llava-hf/llava-v1.6-mistral-7b-hf", help="(default: %(default)s)")
    networks.add_argument("--prompt", default=PROMPT, help="what the captioner is asked")
    # As many as the model reads (STDiTConfig.model_max_length); T5 counts other pieces, but about as many.
    networks.add_argument("--max-new-tokens", type=int, default=200, help="of a caption (default: %(default)s)")
    limits = parser.add_argument_group("rules: a number, or none to switch one off")
    for rule in RULES:
        limits.add_argument("--" + rule.name.replace("_", "-"), type=flag_limit, default=rule.limit, metavar="NUMBER",
                            help=f"{rule.name[:3]}imum of {rule.column} (default: {rule.limit or 'none'})")
    return parser.parse_args(argv)


def resolve(options):
    """Fills in what the command line leaves open."""
    what, options.starts = Path(options.what), options.command in ("run", "cut")
    if wrong := set(options.also) - {*NETWORKS, ""}:
        raise ValueError(f"--with {','.join(wrong)}: expected some of {','.join(NETWORKS)}")
    if options.starts and not options.out:
        raise ValueError(f"{options.command}: expected --out DIR, where clips and tables are written")
    if options.starts and what.resolve() in (options.out.resolve(), options.out.resolve() / "clips"):
        raise ValueError(f"--out {options.out}: is where the videos are, and the next run would cut its clips - "
                         f"give another folder, such as {what / 'curated'}")
    if not 0 <= options.min_seconds <= options.max_seconds or not options.max_seconds:
        raise ValueError(f"--min-seconds {options.min_seconds:g} --max-seconds {options.max_seconds:g}: expected the "
                         "shortest clip and the longest, over 0")
    options.table = what if what.suffix == ".csv" else (options.out if options.starts else what) / "clips.csv"
    options.folder = Path(os.path.abspath(options.table.parent))
    options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main(argv=None):
    options = parse_args(argv)
    with one_line_errors(options.debug, "; the same command goes on where it was"):
        resolve(options)
        if options.config:
            import configs
            options.config = configs.load(options.config)
        if options.starts:
            start(options)
        elif options.command in STEPS:
            add_columns(options)
        elif options.command == "report":
            frames_of = lambda row: ends_and_middle(row | {"path": str(options.folder / row["path"])})
            path = options.table.with_name("report.html")
            write_report(lambda: read_table(options.table), rules_of(options), path, frames_of)
            print(path)
        else:
            options.no_dedup = options.command == "filter"
            choose(lambda: read_table(options.table), header_of(options.table), options)


if __name__ == "__main__":
    from curate import main; main()
