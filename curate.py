"""Raw videos -> a training set: probe, cut, measure, score, caption, choose; on any number of machines.

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
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from data import (COLUMNS, IMAGES, MAX_PIXELS, SCORES, UnreadableClip, assign, bucket_table, end_with, fail, read_image,
                  read_meta, read_number, read_window, whole)
from vae import from_pretrained  # before transformers, which it tells that our kernels.py is not the package

from transformers import (AutoModelForImageTextToText, AutoModelForObjectDetection, AutoProcessor, AutoTokenizer,
                          CLIPConfig, CLIPModel, PerceiverForOpticalFlow)


# ---- probe ----

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
          ".3gp", ".ogv", ".gif")


def find_files(folder, out=None) -> tuple[list[Path], list[Path]]:
    """(videos and images, all other files) in and under folder, sorted; hidden ones and those in `out` are left out.
    A file: itself."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder - give one with videos or images")
    found, other = [], []
    for place, folders, names in os.walk(folder) if folder.is_dir() else [(folder.parent, [], [folder.name])]:
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name) != out]
        for name in names:
            if not name.startswith("."):
                path = Path(place, name)
                is_utf8 = str(path).encode(errors="ignore").decode() == str(path)
                (found if is_utf8 and name.lower().endswith(VIDEOS + IMAGES) else other).append(path)
    return sorted(found), sorted(other)


def file_hash(path) -> str:
    """Of the size and the first and last 64 KiB: takes a millisecond whatever the size."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(1 << 16)
        f.seek(max(0, size - (1 << 16)))
        return hashlib.sha256(b"%d " % size + head + f.read(1 << 16)).hexdigest()[:16]


def probe(path) -> dict:
    """The columns that opening a file tells; height and width as displayed, rotation counter-clockwise in degrees.

    num_frames is the number of packets with different times, after the container's edit list, without decoding
    them (counted = "packets"), or 1 for an image ("decoded"); cutting decodes and corrects it.
    Raises UnreadableClip or OSError.
    """
    is_image = str(path).lower().endswith(IMAGES)
    found = {"kind": "image" if is_image else "video", "hash": file_hash(path)}
    return found | (probe_image(path) if is_image else probe_video(path))


def probe_image(path) -> dict:
    height, width, _ = read_image(str(path)).shape
    return {"num_frames": 1, "counted": "decoded", "fps": "", "height": height, "width": width, "rotation": 0,
            "seconds": 0.0, "codec": Path(path).suffix[1:].lower()}


def probe_video(path) -> dict:
    times, packets = set(), 0
    try:
        with av.open(str(path), options={"max_pixels": str(MAX_PIXELS)}, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            expected = len(stream.index_entries) if stream and "mp4" in container.format.name else 0
            for packet in container.demux(stream) if stream else ():
                packets += packet.size > 0
                if packet.size and not packet.is_discard:
                    times.add(packets if packet.pts is None else packet.pts * stream.time_base)
            if packets < expected:
                raise UnreadableClip(f"{path}: is cut off, has {packets} of {expected} frames")
    except av.FFmpegError as error:
        raise UnreadableClip(f"{path}: {error.strerror}, {packets} frames found") from error
    frames = decoded(path)  # held: without it the container closes, and asking its stream crashes
    _, frame, stream = next(frames)
    width, height, turns = displayed(path, frame, stream)
    rate = constant_rate(np.array(sorted(map(float, times))), stream.guessed_rate)
    seconds = float(max(times) - min(times)) if times else 0.0
    fps = float(rate or max(1, len(times) - 1) / max(seconds, 0.001))
    return {"num_frames": len(times), "counted": "packets", "fps": round(fps, 4), "height": height, "width": width,
            "rotation": 90 * turns, "seconds": round(seconds + 1 / fps, 3), "codec": stream.codec_context.name}


def displayed(path, frame, stream) -> tuple[int, int, int]:
    """(width, height in square pixels and turned, quarter turns counter-clockwise that the frame needs)."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    width, height, turns = round(frame.width * aspect), frame.height, round(frame.rotation / 90) % 4
    if not 0 < width * height <= MAX_PIXELS:
        raise UnreadableClip(f"{path}: its pixels are {aspect} times as wide as high")
    return (height, width, turns) if turns % 2 else (width, height, turns)


def constant_rate(times: np.ndarray, guess=None) -> Fraction | None:
    """Frames a second of ascending times [T] in seconds, None when they vary; up to 2% of the gaps may be odd, as
    where stream copies were joined.  A guess, of the container, is taken if it fits."""
    gaps = np.diff(times)
    gap = np.median(gaps) if len(gaps) else 0.0
    if gap <= 0:
        return Fraction(guess or 24) if len(times) == 1 else None
    if (np.abs(gaps - gap) > 0.05 * gap + 0.0015).mean() > 0.02:  # Matroska's times are whole milliseconds
        return None
    usual = gaps[np.abs(gaps - gap) <= 0.05 * gap + 0.0015].mean()
    return Fraction(guess if guess and abs(usual * guess - 1) < 0.01 else 1 / usual).limit_denominator(1001)


# ---- decoding ----

def decoded(path, fast=False):
    """Yields (seconds, av.VideoFrame, its stream) of every frame, as the decoder gives them.

    fast leaves out H.264's deblocking: a third of the time, and nothing that is seen at a quarter of the size.
    """
    count, seconds, last = 0, 0.0, -math.inf
    options = {"max_pixels": str(MAX_PIXELS)} | ({"skip_loop_filter": "all"} if fast else {})
    try:
        with av.open(str(path), options={"max_pixels": str(MAX_PIXELS)}, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise UnreadableClip(f"{path}: has no video stream of a known codec")
            stream.codec_context.options, stream.codec_context.thread_count = options, 1  # workers are the parallelism
            gap = float(1 / (stream.guessed_rate or 24))
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise UnreadableClip(f"{path}: frame {count} is damaged")
                seconds = seconds + gap if frame.pts is None else float(frame.pts * stream.time_base)
                if seconds <= last:
                    raise UnreadableClip(f"{path}: frame {count} is due at {seconds:g} s, the one before at {last:g}")
                yield seconds, frame, stream
                count, last = count + 1, seconds
    except (av.FFmpegError, OSError) as error:
        raise UnreadableClip(f"{path}: {error.strerror} after {count} frames") from error
    if not count:
        raise UnreadableClip(f"{path}: has no frames")


def small_frames(path, side=320, chunk=24):
    """Yields (seconds [T], uint8 [T h w 3], grey [1 H w]) of all frames as displayed, `chunk` at a time, no side over
    `side`; the last is the first of them with all the rows that were coded, not turned.  An image is one frame."""
    if str(path).lower().endswith(IMAGES):
        image = Image.fromarray(read_image(str(path)))
        rows = np.array(image.resize((min(side, image.width), image.height), Image.Resampling.BOX).convert("L"))
        image.thumbnail((side, side), Image.Resampling.BOX)
        yield np.zeros(1), np.array(image)[None], rows[None]
        return
    shrink, recolor, frames, times, size = VideoReformatter(), VideoReformatter(), [], [], None
    for seconds, frame, stream in decoded(path, fast=True):
        if size is None:
            width, height, turns = displayed(path, frame, stream)
            scale = min(1, side / max(width, height))
            size = [max(1, round(scale * n)) for n in ((height, width) if turns % 2 else (width, height))]
        if not frames:
            rows = shrink.reformat(frame, min(side, frame.width), frame.height, "gray", interpolation="AREA", threads=1)
            rows = rows.to_ndarray()[None]
        small = shrink.reformat(frame, *size, "yuv420p", interpolation="AREA", threads=1)  # in one step: twice the time
        frames.append(np.rot90(recolor.reformat(small, format="rgb24", threads=1).to_ndarray(), turns))
        times.append(seconds)
        if len(frames) == chunk:
            yield np.array(times), np.stack(frames), rows
            frames, times = [], []
    if frames:
        yield np.array(times), np.stack(frames), rows


# ---- cut ----

RATIO, WINDOW = 3.0, 2  # threshold and frames to each side of PySceneDetect's AdaptiveDetector, which upstream runs
MIN_CHANGE = 8.0  # of `change`, the original's 15; the clips' cuts have 13.5 or more and RATIO 4.1 or more, others 2.3
FLASH = 6  # frames: what looks as before after so many was a flash
DISSOLVES = (12, 16, 24, 32, 48)  # frames over which a mixture is looked for; a longer one looks as linear within
MIN_MIXED = 0.25  # of `mixing`: the clips' one dissolve has 0.32, motion up to 0.16
BLOCK, HALO = 2048, 160  # frames searched at once, and those beside them that are looked at again


def hsv(frames):
    """uint8 [T h w 3] -> hue in half degrees, chroma, value (float32 [T h w], 0..255), of at most 80 pixels a side."""
    k = -(-max(frames.shape[1:3]) // 80)
    r, g, b = np.moveaxis(frames[:, ::k, ::k], -1, 0).astype(np.float32, order="C")
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    sector = np.where(value == r, g - b, np.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    return 30 * sector / np.maximum(chroma, 1), chroma, value


def change(one, two):
    """How much each pair of frames differs, [T]: mean over pixels and over hue, chroma, value.  one, two: of `hsv`.

    The content value of PySceneDetect's AdaptiveDetector (scenedetect 0.6.7, Castellano), but the hue's circle closes
    and weighs as much as there is colour, and chroma stands for saturation: on dark footage both are noise, which
    gives the original 17 false cuts in the concert clip.
    """
    hue = np.abs(one[0] - two[0])
    hue = np.minimum(hue, 180 - hue) * (np.minimum(one[1], two[1]) / 255)
    return (hue + np.abs(one[1] - two[1]) + np.abs(one[2] - two[2])).mean((1, 2)) / 3


def thumbnails(frames):
    """uint8 [T h w 3] -> uint8 [T P]: about 40 x 22 pixels, each the mean of 2 x 2 of those `hsv` sees."""
    k = -(-max(frames.shape[1:3]) // 80)
    x = frames[:, ::k, ::k]
    x = x[:, :x.shape[1] // 2 * 2 or None, :x.shape[2] // 2 * 2 or None].astype(np.uint16)
    return ((x[:, ::2, ::2] + x[:, 1::2, 1::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2]) // 4).astype(np.uint8).reshape(
        len(frames), -1)


def moving(changes):
    """Those that are not of a frame shown twice, as animation at 8 or 12 frames a second has."""
    return changes[changes > 0.3]


def hard_cuts(changes, thumbs) -> list[int]:
    """First frames of new shots: where the change is RATIO times the median of those around it, and
    lasts.  The original's mean is drawn up by fast motion right after a cut.

    changes [T]: changes[t] between frame t - 1 and t; thumbs float [T P].
    """
    cuts = []
    for t in np.flatnonzero(changes >= MIN_CHANGE):
        near = [*moving(changes[max(1, t - 6):t])[-WINDOW:], *moving(changes[t + 1:t + 7])[:WINDOW]]
        if changes[t] < RATIO * np.median(near or [0]):
            continue
        before, after = thumbs[max(0, t - FLASH):t, None], thumbs[t:t + FLASH]
        apart = np.abs(before - after).mean(-1)  # [FLASH FLASH]
        if apart.min() > 0.3 * apart[-1, 0]:  # no frame before looks like one after
            cuts.append(int(t))
    return cuts


def mixing(thumbs, length: int):
    """How much frames s .. s + length look like a mixture of the first and the last: (s [n], score [n], sure [n]).

    In a dissolve every pixel goes straight from one picture to another that is unlike it; where things move, pixels go
    elsewhere in between.  score: the share of the changed pixels that are on the way at 1/4, 1/2, 3/4, less half the
    correlation of both pictures; a plain picture, as in a fade, has none.  sure: the middle has lost the contrast that
    a mixture loses (Alattar 1993), which a pan over something out of focus, else as straight, does not.
    """
    starts = np.arange(0, len(thumbs) - length, length // 3)
    starts = starts[np.abs(thumbs[starts + length] - thumbs[starts]).mean(1) > 12]
    s, e = thumbs[starts], thumbs[starts + length]
    way = e - s
    apart, norm, linear = np.abs(way), np.einsum("tp,tp->t", way, way) + 1e-6, np.ones(len(s), bool)
    changed = apart > 10
    straight = changed.copy()
    for quarter in (1, 2, 3):
        middle = thumbs[starts + quarter * length // 4] - s
        alpha = np.einsum("tp,tp->t", middle, way) / norm
        straight &= np.abs(middle - alpha[:, None] * way) < 0.35 * apart
        linear &= np.abs(alpha - quarter / 4) < 0.13
    a, b, m, d = (x.var(1) for x in (s, e, thumbs[starts + length // 2], way))
    alike = np.where(np.minimum(a, b) < 64, 0, (a + b - d) / 2 / np.sqrt(np.maximum(a * b, 1)))
    score = straight.sum(1) / np.maximum(changed.sum(1), 1) - np.maximum(alike, 0) / 2
    sure = ((a + b) / 2 - m > d / 8) | (d < 64)
    return starts, np.where(linear & (alike < 0.8), score, -1), sure


def mixed(thumbs, changes) -> list[tuple[int, int]]:
    """(first mixed frame, first clean frame) of dissolves and fades; thumbs float32 [T P], changes [T] as above."""
    windows, found = [], []
    for length in DISSOLVES:
        windows += [(score, s, length, sure) for s, score, sure in zip(*mixing(thumbs, length)) if score > MIN_MIXED]
    for _, s, length, sure in sorted(windows, reverse=True):
        way = thumbs[s + length] - thumbs[s]
        low, high = max(0, s - 64), min(len(thumbs), s + length + 65)
        step = np.diff(thumbs[low:high] @ way) / (way @ way) * length  # about 1 within, 0 outside
        moves = np.pad(step > 0.3, 1)
        moves = moves[1:-1] | moves[:-2] & moves[2:]  # a frame shown twice is no end
        first = last = s - low + length // 2
        while first > 0 and moves[first - 1]:
            first -= 1
        while last < len(moves) and moves[last]:
            last += 1
        first, end = int(low + first + 1), int(low + last)
        if first >= end or any(first <= b and a <= end for a, b in found):
            continue
        around = [x.mean() for x in (changes[max(1, first - 8):first], changes[end + 1:end + 9]) if len(x)]
        if sure or around and min(around) < 0.4 * changes[first:end].mean():  # else it goes on as it was: a pan
            found.append((first, end))
    return found


class Cuts:
    """Takes the small frames of a video, run after run, and gives its transitions; holds BLOCK + 2 HALO thumbnails."""
    def __init__(self):
        self.last, self.start, self.changes, self.thumbs, self.found = None, 0, np.zeros(1), None, []

    def add(self, frames):
        """frames: the next uint8 [T h w 3]."""
        now = hsv(frames)
        two = now if self.last is None else [np.concatenate([a, b]) for a, b in zip(self.last, now)]
        self.changes = np.append(self.changes, change([x[:-1] for x in two], [x[1:] for x in two]))
        self.last, new = [x[-1:] for x in now], thumbnails(frames)
        self.thumbs = new if self.thumbs is None else np.concatenate([self.thumbs, new])
        if len(self.thumbs) >= BLOCK + 2 * HALO:
            self.search(BLOCK + HALO)

    def search(self, upto: int):
        """Looks for what begins in the frames held, before `upto` of them, and keeps HALO before that."""
        thumbs, lead = self.thumbs.astype(np.float32), HALO if self.start else 0
        events = [(t, t) for t in hard_cuts(self.changes, thumbs)] + mixed(thumbs, self.changes)
        self.found += [(self.start + a, self.start + b) for a, b in events if lead <= a < upto]
        busy = self.changes >= MIN_CHANGE
        self.found = joined(self.found, self.start, busy)
        keep = max(0, upto - HALO)
        self.start, self.thumbs, self.changes = self.start + keep, self.thumbs[keep:], self.changes[keep:]

    def end(self) -> list[tuple[int, int]]:
        """Transitions (end of a shot, begin of the next), ascending: the same frame for a hard cut."""
        if self.thumbs is not None:
            self.search(len(self.thumbs))
        return self.found


def joined(events, start: int, busy) -> list[tuple[int, int]]:
    """Events that overlap, or hard cuts within half a second with no quiet frame between, become one: an object that
    sweeps over the picture.  busy [T]: of frame start + t, whether it differs much from the one before."""
    out = []
    for a, b in sorted(events):
        close = out and a - out[-1][1] < 12 and out[-1][1] >= start and busy[out[-1][1] - start:a - start].all()
        if out and (a <= out[-1][1] or close):
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return out


def split(transitions, times, min_seconds=2.0, max_seconds=16.0):
    """(clips, too short): both lists of (first frame, frame after the last).

    Transitions' own frames are in neither; a shot over max_seconds is divided evenly.  times [T] in seconds.
    """
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

LEVELS = 5        # each halves: 20 pixels are 1.25 at the coarsest, where the first linear step still holds
CELL = 4          # pixels per unknown
WARPS = 1, 2, 2, 2, 3  # per level, finest first; a second one at full size wins 0.01 pixel and takes a third more time
SWEEPS = 15       # 8: a tenth worse, 30: nothing better
SMOOTH = 0.1      # weight of the neighbours' mean against one fully textured cell
GRADIENT = 3.0    # grey levels per pixel: below it an edge is no better than grain
OUTLIER = 10.0    # grey levels: a pixel that stays this different counts half


def grey(frames) -> torch.Tensor:
    """uint8 [T h w 3] -> float [T h w], BT.601 luma in 0..255."""
    return torch.as_tensor(np.ascontiguousarray(frames)).float() @ torch.tensor([0.299, 0.587, 0.114])


def smooth(x, width=3):
    """Binomial of 3, or box of another width, over [... h w]; the edge repeats."""
    x = F.pad(x, (width // 2,) * 4, mode="replicate")
    if width == 3:
        x = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1], alpha=2)
        return (x[..., :-2, :] + x[..., 2:, :]).add_(x[..., 1:-1, :], alpha=2).mul_(1 / 16)
    return F.avg_pool2d(F.avg_pool2d(x, (1, width), 1), (width, 1), 1)


def gradient(x):
    """Central differences of [N 1 h w], to the right and down."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2


def warp(b, field):
    """b [N 1 h w] read at p + field(p), field [N 2 h w]; and 1.0 where that lies inside, [N 1 h w]."""
    h, w = b.shape[-2:]
    x, y = torch.arange(w) + field[:, 0], torch.arange(h)[:, None] + field[:, 1]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    place = torch.stack((x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1), -1)
    return F.grid_sample(b, place, padding_mode="border", align_corners=True), inside[:, None].float()


def spread(u, h, w):
    """[N 2 cells] -> [N 2 h w]; a cell may reach over the edge."""
    return F.interpolate(u, scale_factor=CELL, mode="bilinear")[..., :h, :w]


def flow(a, b) -> torch.Tensor:
    """Optical flow [N 2 h w], (right, down) in pixels, of grey [N h w] in 0..255: a(p) shows what b(p + flow) shows.

    Combined local-global flow (Bruhn, Weickert and Schnoerr, IJCV 61(3), 2005, eq. 9): the windowed products of
    Lucas and Kanade (1981) hold where there is texture, Horn and Schunck's (1981) smoothness fills the rest, coarse
    to fine with warping.  Each pixel's equation is divided by its gradient (Zimmer et al., IJCV 93(3), 2011) and by
    a Cauchy weight of its misfit.  Levels of a Laplacian pyramid: light that changes is no motion.  Up to 20 pixels
    at 320 wide: mean end-point error 0.12 pixel, 0.2 with noise of 2 grey levels on both frames.
    Raises ValueError on unlike shapes and below 32 pixels.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < 32:
        raise ValueError(f"flow needs two batches [N h w], h and w at least 32, got {[*a.shape]} and {[*b.shape]}")
    pyramid = [(smooth(a[:, None].float()), smooth(b[:, None].float()))]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(smooth(x), 2, ceil_mode=True) for x in pyramid[-1]))
    u = torch.zeros(len(a), 2, *pyramid[-1][0].shape[-2:])  # as from a coarser level; cut to size below
    for (a, b), warps in reversed(list(zip(pyramid, WARPS))):
        h, w = a.shape[-2:]
        a, b = a - smooth(a, 7), b - smooth(b, 7)
        u = 2 * F.interpolate(u, scale_factor=2, mode="bilinear")[..., :-(-h // CELL), :-(-w // CELL)]
        for _ in range(warps):
            u = refine(a, b, u)
    return spread(u, h, w)


def refine(a, b, u):
    """One warp of b by the flow u [N 2 cells], then Jacobi sweeps over the linear equations of CLG for the new flow."""
    warped, inside = warp(b, spread(u, *a.shape[-2:]))
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
        u = known + solve(F.avg_pool2d(F.pad(u, (1, 1, 1, 1), mode="replicate"), 3, 1))
    return u


# ---- camera motion ----

GAP_SECONDS, PAIRS_PER_SECOND = 1 / 12, 4  # between the two frames of a pair; of one clip
STATIC = 3.0      # rms over the frame, pixels per second: a walker before a plain wall gives up to 2.5
AGAINST = 0.5, 0.15  # pixels, and share of the local camera motion, by which a pixel may differ and still follow it
CAUCHY = 0.1      # pixels; at 0.5 a walker before a plain wall drags the camera along three times as much
MOTIONS = (("pan right", "pan left"), ("tilt down", "tilt up"), ("zoom in", "zoom out"), ("roll", "roll"))


def similarity(field):
    """The camera's part of flow [N 2 h w]: about the frame's middle, f(z) = shift + turn z with z = x + iy.

    Returns shift [N] and turn [N], complex, real(turn) growth and imag(turn) turning per pair, and the share of
    pixels [N] that move otherwise.  RANSAC (Fischler and Bolles, CACM 24(6), 1981) over 96 fixed pairs of points
    finds the motion that most pixels share, Cauchy-weighted least squares (Huber, Robust Statistics, 1981, ch. 7)
    make it exact: a person who fills a third of the frame changes neither.
    """
    h, w = field.shape[-2:]
    y, x = torch.meshgrid(torch.arange(2, h, 6) - (h - 1) / 2, torch.arange(2, w, 6) - (w - 1) / 2, indexing="ij")
    z = torch.complex(x, y).flatten()  # [P]
    f = rearrange(torch.complex(field[:, 0], field[:, 1])[:, 2::6, 2::6], "n h w -> n (h w)")
    i, j = torch.randint(len(z), (2, 400), generator=torch.Generator().manual_seed(0))
    far = ((z[i] - z[j]).abs() > min(h, w) / 3).nonzero()[:96, 0]  # close points would tell growth from noise
    i, j = i[far], j[far]
    turn = (f[:, i] - f[:, j]) / (z[i] - z[j])  # [N K]
    shift = f[:, i] - turn * z[i]
    count = torch.stack([follows(f, z, s[:, None], t[:, None]).float().mean(1) for s, t in zip(shift.T, turn.T)])
    best = count.argmax(0, keepdim=True)  # [1 N]
    shift, turn = shift.T.gather(0, best).T, turn.T.gather(0, best).T  # [N 1]
    for _ in range(8):
        weight = 1 / (1 + ((f - shift - turn * z).abs() / CAUCHY) ** 2)
        weight = weight / weight.sum(1, keepdim=True)
        zm, fm = (weight * z).sum(1, keepdim=True), (weight * f).sum(1, keepdim=True)
        turn = (weight * (z - zm).conj() * (f - fm)).sum(1, keepdim=True)
        turn = turn / (weight * (z - zm).abs() ** 2).sum(1, keepdim=True)
        shift = fm - turn * zm
    return shift[:, 0], turn[:, 0], 1 - follows(f, z, shift, turn).float().mean(1)


def follows(f, z, shift, turn):
    motion = shift + turn * z
    return (f - motion).abs() < AGAINST[0] + AGAINST[1] * motion.abs()


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
    sure = rows[rows[:, 5] <= 0.5, 1:5]  # [M 4]
    middle, length = np.median(sure, 0) if len(sure) else np.zeros(4), lambda x: np.median(np.linalg.norm(x, axis=1))
    k = int(np.abs(middle).argmax())
    if 2 * len(sure) < len(rows):
        cmotion = ""
    elif length(sure) < STATIC:
        cmotion = "static"
    elif len(sure) > 2 and length(np.diff(sure, axis=0)) > length(sure):  # sqrt(2) of it where pairs are unrelated
        cmotion = "shake"
    else:
        cmotion = MOTIONS[k][int(middle[k] < 0)] if np.linalg.norm(middle) > length(sure) / 2 else ""
    return {"flow": float(rows[:, 0].mean()), "against": float(rows[:, 5].mean()), "cmotion": cmotion}


# ---- checks: grey frames [T h w] in 0..255, longer side 320 ----

REPEAT = 0.6      # grey levels, mean over any 16 x 16 block
UNIFORM = 4.0     # grey levels, standard deviation of a frame
BAR = 24.0        # grey levels that black bars stay under; black is 0, or 16 where the range is mistaken
COMB = 12.0       # grey levels by which a row sticks out from both neighbours


def brightness(g):
    """[T] mean luma, 0..1."""
    return reduce(g, "t h w -> t", "mean") / 255


def contrast(g):
    """[T] standard deviation of luma, 0..0.5 (half of the frame black, half white)."""
    return spread_of(g).clamp(min=0).sqrt() / 255


def spread_of(x):
    """[T] variance of [T h w]; torch's own takes four times as long."""
    return x.square().mean((1, 2)) - x.mean((1, 2)).square()


def sharpness(g):
    """[T] variance of the Laplacian, grey levels squared (Pech-Pacheco et al., ICPR 2000, LAPV): low where blurred.

    Only comparable at one size, here a longer side of 320; smaller videos are not enlarged and look sharper.
    Shots of real clips have 100 to 5000, after a box blur of 9 pixels 1 to 20: reject below 20.
    """
    lap = g[:, 1:-1, :-2] + g[:, 1:-1, 2:] + g[:, :-2, 1:-1] + g[:, 2:, 1:-1] - 4 * g[:, 1:-1, 1:-1]
    return spread_of(lap)


def uniform(contrasts):
    """bool [T] of `contrast`: one colour all over, such as black."""
    return contrasts * 255 < UNIFORM


def repeats(g):
    """bool [T-1]: the frame shows what the one before it does.  No block may change: a mouth that moves is enough."""
    return reduce(F.avg_pool2d((g[1:] - g[:-1])[:, None], 16, ceil_mode=True).abs(), "t 1 h w -> t", "max") < REPEAT


def longest(flags) -> int:
    """The longest run of True: of repeats, a held picture; many short ones are a low frame rate in a high one."""
    return max((len(run) for run in "".join("01"[int(f)] for f in flags).split("0")), default=0)


def lit_share(g):
    """Of a grey frame [h w] the share of each row, and of each column, that is no black, in 1/255: bytes [h], [w]."""
    lit = 255 * (g > BAR).float()
    return tuple(bytes(lit.mean(axis).round().byte().tolist()) for axis in (1, 0))


def bars(rows, columns) -> np.ndarray:
    """Black rows above and below, columns left and right, that hold over T frames: [4].

    rows [T h], columns [T w] in 1/255: `lit_share`.  A bar ends in a straight edge: most of the first line after it is
    lit in some frame, which titles on black and night skies are not; frames too dark for that give 0.
    """
    return np.array([edge(rows), edge(rows[:, ::-1]), edge(columns), edge(columns[:, ::-1])])


def edge(lit) -> int:
    """Dark lines of [T h] before the first lit one; 0 when no straight edge ends them or over a third is dark."""
    spots = np.quantile(lit, 0.98, 0) / 255  # [h] share of the line in a bright frame; one in fifty may be broken
    dark = int((spots < 0.02).cumprod().sum())
    return dark if 0 < dark <= lit.shape[1] // 3 and lit[:, dark:dark + 3].max() > 127 else 0


def crop(bar, small, height, width) -> tuple[int, int, int, int]:
    """The box without bars, (top, left, height, width) in pixels of the full frame: even, a small row inside the edge.

    bar: from `bars` on frames of size small = (h, w).
    """
    h, w = small
    sides = zip(bar, (height / h, height / h, width / w, width / w))
    top, bottom, left, right = (2 * math.ceil((n + 0.5) * scale / 2) if n else 0 for n, scale in sides)
    return top, left, (height - top - bottom) // 2 * 2, (width - left - right) // 2 * 2


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


# ---- one decode for cuts, motion and checks ----

class Measured(NamedTuple):
    """What `measure` keeps of T frames: some 200 bytes of each and 4 KB of a few.  A frame is named by its number."""
    times: np.ndarray    # [T] seconds
    transitions: list    # (end of a shot, begin of the next)
    looks: np.ndarray    # [T 4] brightness, contrast, sharpness, whether it repeats the frame before
    moves: np.ndarray    # [pairs 8] first frame, second frame, and what `motion` says
    woven: np.ndarray    # [frames 2] frame, combs
    lit: list            # (frame, `lit_share` of its rows [h], of its columns [w], perceptual hash)


def measure(path) -> Measured:
    """Decodes a video (or an image: one frame) once, small, and holds a second of it.

    What stays is in lists of numbers: small arrays would lie among the freed large ones, and 10 minutes of video would
    take another GiB."""
    cuts, times, looks, moves, woven, samples = Cuts(), [], [], [], [], []
    count, last, quarter, starts, pairs = 0, None, -1, [], []
    for seconds, frames, coded in small_frames(path):
        cuts.add(frames)
        g = grey(frames)
        same = repeats(torch.cat((g[:1] if last is None else last, g)))
        looks += torch.stack((brightness(g), contrast(g), sharpness(g), same.float()), 1).tolist()
        woven.append((count, combs(torch.from_numpy(coded).float()).item()))
        quarters = np.floor((seconds - (times or seconds)[0]) * PAIRS_PER_SECOND + 1e-3)
        for i in np.flatnonzero(np.diff(quarters, prepend=quarter)):
            samples.append((count + int(i), *lit_share(g[i]), perceptual_hash(g[i])))
            starts.append((count + int(i), seconds[i], g[i]))
        while starts and (j := np.searchsorted(seconds, starts[0][1] + GAP_SECONDS - 0.001)) < len(seconds):
            first, since, a = starts.pop(0)
            pairs.append((first, count + j, a, g[j], seconds[j] - since))
        if len(pairs) >= 8:
            moves += moves_of(pairs)
            pairs = []
        count, last, quarter = count + len(g), g[-1:], quarters[-1]
        times += seconds.tolist()
    moves += moves_of(pairs)
    return Measured(np.array(times), cuts.end(), np.array(looks), np.array(moves).reshape(-1, 8), np.array(woven),
                    samples)


def moves_of(pairs) -> list:
    """[pairs 8]; nothing where a side has under 32 pixels."""
    if not pairs or min(pairs[0][2].shape) < 32:
        return []
    first, second, a, b, gap = zip(*pairs)
    return np.column_stack((first, second, motion(flow(torch.stack(a), torch.stack(b)), gap))).tolist()


def describe(m: Measured, first: int, end: int) -> dict:
    """The columns of a clip of frames first .. end - 1."""
    looks, same = m.looks[first:end], m.looks[first + 1:end, 3]
    seconds = m.times[end - 1] - m.times[first]
    moves = m.moves[(m.moves[:, 0] >= first) & (m.moves[:, 1] < end)]
    woven = m.woven[(m.woven[:, 0] >= first) & (m.woven[:, 0] < end), 1]
    hashes = [sample[3] for sample in m.lit if first <= sample[0] < end] or [m.lit[0][3]]
    return camera(moves[:, 2:]) | {
        "brightness": looks[:, 0].mean(), "contrast": looks[:, 1].mean(), "sharpness": np.median(looks[:, 2]),
        "uniform": uniform(looks[:, 1]).mean(), "repeats": same.mean() if len(same) else 0.0,
        "held": longest(same) / max(1, len(same)) * seconds, "combs": woven.max(initial=0.0),
        "phash": joint_hash(hashes)}


def box_of(m: Measured, first: int, end: int, height: int, width: int):
    """(top, left, height, width) that letterbox bars leave of a clip's frames, in pixels as displayed.

    Bars of the whole video count, too: a dark clip of its own shows no edge.
    """
    found = []
    for lit in ([sample for sample in m.lit if first <= sample[0] < end], m.lit):
        _, rows, columns, _ = zip(*lit or m.lit[:1])
        found.append(bars(*(np.array([[*line] for line in lines]) for lines in (rows, columns))))
    return crop(np.maximum(*found), (len(rows[0]), len(columns[0])), height, width)


def rounded(columns: dict) -> dict:
    """Floats to 4 digits after the point, nan to "", as they go into a csv."""
    return {name: value if not isinstance(value, (float, np.floating)) else
            "" if math.isnan(value) else round(float(value), 4) for name, value in columns.items()}


# ---- writing clips ----

GOP = 16  # frames between key frames: what training has to decode beyond its window
MAX_SIDE = 720  # of the short side


def write_clips(path, clips, times):
    """Decodes path once, writes clips (first frame, frame after the last, file .mp4, box), ascending; yields columns.

    box: (top, left, height, width) to cut out of the frame as displayed, or None for all of it.

    times [T] in seconds, of all frames of path.
    """
    frames, at = decoded(path), 0
    for start, end, out, box in clips:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{out.stem}.*.part.mp4"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield write_clip(out, itertools.islice(frames, start - at, end - at), np.asarray(times[start:end]), box)
        at = end


def write_clip(out, frames, times, box=None) -> dict:
    """Writes frames, as `decoded` yields them, as H.264 as displayed; under another name first, so out is whole.

    A constant frame rate is kept; of a variable one each frame's own time.
    """
    part, count, graph = out.with_name(f".{out.stem}.{os.getpid()}.part.mp4"), 0, None
    try:
        with av.open(str(part), "w", options={"movflags": "faststart"}) as container:
            for seconds, frame, source in frames:
                if graph is None:
                    rate = constant_rate(times, source.guessed_rate)
                    graph, shape = as_displayed(out, frame, source, box), (frame.width, frame.height, frame.format.name)
                    options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
                    stream = container.add_stream("libx264", rate=rate or 24, options=options)
                    stream.codec_context.gop_size = GOP
                    stream.codec_context.time_base = 1 / rate if rate else Fraction(1, 90000)
                if shape != (frame.width, frame.height, frame.format.name):
                    raise UnreadableClip(f"{out}: its source changes the size of its frames")
                graph.push(frame)
                small = graph.pull()
                if not count:
                    stream.width, stream.height, stream.pix_fmt = small.width, small.height, "yuv420p"
                    for tag in ("colorspace", "color_range"):
                        setattr(stream.codec_context, tag, int(getattr(small, tag)))
                small.pts, small.time_base = count, stream.codec_context.time_base
                if not rate:
                    small.pts = round((seconds - times[0]) * 90000)
                small.pict_type = PictureType.NONE  # else x264 makes a key frame wherever the source had one
                container.mux(stream.encode(small))
                count += 1
            if count:
                container.mux(stream.encode())
        columns = probe(part) if count else {"num_frames": 0}
        if not count == columns["num_frames"] == len(times):
            raise UnreadableClip(f"{out}: {columns['num_frames']} frames written, expected {len(times)}")
        part.replace(out)
        return columns
    finally:
        part.unlink(missing_ok=True)


def as_displayed(path, frame, source, box=None) -> av.filter.Graph:
    """A filter to 4:2:0 with square pixels, turned, cut to box, its short side at most MAX_SIDE, both sides even."""
    width, height, turns = displayed(path, frame, source)
    box = box or (0, 0, height, width)
    scale = min(1, MAX_SIDE / min(box[2:]))
    size = [round(n * scale) for n in ((height, width) if turns % 2 else (width, height))]
    top, left, height, width = (round(n * scale) for n in box)
    turn = [("transpose", "cclock")] * (turns % 2) + [("hflip", ""), ("vflip", "")] * (turns > 1)
    steps = [("scale", "{}:{}:flags=area".format(*size)), *turn, ("format", "yuv420p"),
             ("crop", f"{width // 2 * 2}:{height // 2 * 2}:{left}:{top}:exact=1"), ("setsar", "1")]
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=source.time_base),
             *(graph.add(name, text) if text else graph.add(name) for name, text in steps), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


# ---- frames, in workers ----

def read_frames(row, places) -> list[np.ndarray]:
    """Frames [H W 3] of a clip by number, each decoded from the key frame before it, at most 15 frames back."""
    return [read_window(row["path"], 1, start=i)[0][0].numpy() for i in places]


def ends_and_middle(row) -> list[int]:
    """First, middle and last; an image's only frame is all three."""
    last = int(row["num_frames"]) - 1
    return sorted({0, last // 2, last})


def resized(frame, height: int, width: int, filter=Image.Resampling.BILINEAR) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), filter))


def net_of(cls, name, device, half=torch.float16):
    """A frozen network by folder or hub name; half precision on a GPU."""
    dtype = half if torch.device(device).type == "cuda" else torch.float32
    return from_pretrained(cls, name, dtype=dtype).to(device).eval().requires_grad_(False)


# ---- CLIP: aesthetic score, match of text and picture ----

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
HEAD_LAYERS = 0, 2, 4, 6, 7  # linear; between them dropout, and no activation: "linearMSE"


@lru_cache
def clip_size(name) -> int:
    return from_pretrained(CLIPConfig, name).vision_config.image_size


def clip_pixels(frame, size: int) -> np.ndarray:
    """uint8 [size size 3]: the short side bicubically to `size`, the middle cut out, as CLIP's own preprocessing."""
    h, w = frame.shape[:2]
    h, w = size * h // min(h, w), size * w // min(h, w)
    top, left = (h - size) // 2, (w - size) // 2
    return resized(frame, h, w, Image.Resampling.BICUBIC)[top:top + size, left:left + size]


def prepare_aesthetic(row, options):
    """uint8 [n size size 3], n = 3, fewer for an image."""
    size = clip_size(options.clip_model)
    return np.stack([clip_pixels(frame, size) for frame in read_frames(row, ends_and_middle(row))])


def image_features(clip, frames):
    """Unit vectors [N C], fp32, of uint8 [N size size 3]."""
    x = torch.as_tensor(frames).to(clip.device).float() / 255
    x = (x - x.new_tensor(CLIP_MEAN)) / x.new_tensor(CLIP_STD)
    x = clip.get_image_features(rearrange(x, "n h w c -> n c h w").to(clip.dtype)).pooler_output
    return F.normalize(x.float(), dim=-1)


def load_head(path, width: int, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (weight, bias) of LAION's aesthetic predictor, sac+logos+ava1-l14-linearMSE.pth or .safetensors."""
    if not Path(path or "").is_file():
        raise FileNotFoundError(f"the aesthetic head {path!r} is not a file: get sac+logos+ava1-l14-linearMSE.pth from "
                                f"{HEAD_URL} and name it with --aesthetic-head")
    try:
        state = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        layers = [tuple(state[f"layers.{i}.{kind}"].float().to(device) for kind in ("weight", "bias"))
                  for i in HEAD_LAYERS]
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the aesthetic head {path} holds no tensors layers.0.weight ... layers.7.bias: {reason}") \
            from error
    if layers[0][0].shape[1] != width:
        raise ValueError(f"the aesthetic head {path} takes features of width {layers[0][0].shape[1]}, the CLIP model "
                         f"gives {width}: LAION's head goes with openai/clip-vit-large-patch14")
    return layers


def load_aesthetic(options, device):
    clip = net_of(CLIPModel, options.clip_model, device)
    return partial(aesthetic, clip, load_head(options.aesthetic_head, clip.config.projection_dim, device))


@torch.inference_mode()
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
    """uint8 [size size 3] of the middle frame; None where there is no text to match."""
    if not row["text"]:
        return None
    frame, = read_frames(row, [(int(row["num_frames"]) - 1) // 2])
    return clip_pixels(frame, clip_size(options.clip_model))


def load_match(options, device):
    clip = net_of(CLIPModel, options.clip_model, device)
    return partial(match, clip, from_pretrained(AutoTokenizer, options.clip_model))


@torch.inference_mode()
def match(clip, tokenizer, rows, prepared):
    """100 cos(text, middle frame); "" without a text.  Words beyond CLIP's 77 tokens do not count."""
    texts = [row["text"] for row, frame in zip(rows, prepared) if frame is not None]
    if not texts:
        return [{"match": ""} for _ in rows]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                       max_length=clip.config.text_config.max_position_embeddings).to(clip.device)
    text = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
    image = image_features(clip, np.stack([frame for frame in prepared if frame is not None]))
    scores = iter((100 * (text * image).sum(-1)).tolist())
    return [{"match": "" if frame is None else next(scores)} for frame in prepared]


# ---- text detection ----

OCR_SIDE = 960    # of PP-OCR's own preprocessing
OCR_SMALL = 480   # pixels of the longer side; a smaller frame is looked at enlarged as well, a larger one shrunk
OCR_AT_ONCE = 8   # frames
OCR_MEAN, OCR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # in this order for B G R, as it was trained
TEXT, BOX, UNCLIP, MIN_SIDE = 0.3, 0.6, 1.5, 3  # DB's thresholds of pixel and box, its growth; PP-OCR's least side


def prepare_ocr(row, options):
    return ocr_frames(read_frames(row, ends_and_middle(row)))


def ocr_frames(frames) -> np.ndarray:
    """uint8 [n h w 3]: longer side at most OCR_SIDE, both rounded to multiples of 32."""
    scale = min(1, OCR_SIDE / max(frames[0].shape[:2]))
    return np.stack([resized(f, *(max(32, round(n * scale / 32) * 32) for n in f.shape[:2])) for f in frames])


def load_ocr(options, device):
    return partial(ocr, net_of(AutoModelForObjectDetection, options.ocr_model, device))


@torch.inference_mode()
def ocr(net, rows, prepared):
    """text_area, share of the picture, and ocr, number of boxes, of each clip's frame with most text."""
    sizes, columns = defaultdict(list), [None] * len(rows)
    for i, frames in enumerate(prepared):
        sizes[frames.shape[1:]].append(i)
    for members in sizes.values():
        parts = torch.as_tensor(np.concatenate([prepared[i] for i in members])).split(OCR_AT_ONCE)
        found = [text for part in parts for text in text_boxes(text_probability(net, part))]
        for i in members:
            mine, found = found[:len(prepared[i])], found[len(prepared[i]):]
            columns[i] = dict(zip(("text_area", "ocr"), max(mine)))
    return columns


def text_probability(net, frames):
    """[N h w] of uint8 [N h w 3], by PP-OCR's detector; where it sees text, the least of three looks.

    Text stays text as a negative and at another size; the patches of fur, petals and lit windows, up to 0.2 of the
    picture, that the small detector takes for text on a tenth of textless frames, do not.
    """
    x = rearrange(frames.to(net.device).float().flip(-1) / 255, "n h w c -> n c h w")
    text = detect(net, x)
    some = (text.amax((1, 2)) > TEXT).nonzero()[:, 0]
    if len(some):
        h, w = size = x.shape[2:]
        scale = 0.5 if max(size) > OCR_SMALL else 2
        sides = [max(1, round(n * scale / 32)) * 32 for n in size]
        other = F.interpolate(x[some], sides, mode="bilinear", antialias=True)
        other = F.interpolate(detect(net, other)[:, None], (h, w), mode="bilinear")[:, 0]
        text[some] = torch.minimum(text[some], torch.minimum(detect(net, 1 - x[some]), other))
    return text


def detect(net, x):
    """The network's probability [N h w] for x [N 3 h w], B G R in 0..1."""
    mean, std = (x.new_tensor(values)[:, None, None] for values in (OCR_MEAN, OCR_STD))
    return net(((x - mean) / std).to(net.dtype)).last_hidden_state[:, 0].float()


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

CAPTION_SIDE = 640     # more than most captioners look at; bounds the tokens of those that take any size
CAPTIONS_AT_ONCE = 16  # clips; at 4 frames of LLaVA-1.5's 576 tokens 37,000 tokens
# of the clip, each the middle of its part: 2 to 16 s make a frame every 0.5 to 4 s, and four of LLaVA-1.5's 576 tokens
# leave room for the answer in its 4,096; upstream shows three
CAPTION_FRAMES = 4
PROMPT = ("These are frames of one video, in order. Describe the video in one paragraph: who or what is seen, what "
          "happens, the place, the light and the style. Do not speak of frames, images or a video, and do not guess "
          "what is not seen.")
KINDS = r"(?:video|image|clip|footage|scene|frame|picture|photo(?:graph)?|sequence|animation|film)s?"
PREFIX = re.compile(rf"""
    (?: (?:sure|certainly|of\ course|here\ is)\b[^:.!]*[:.!]\s* )?
    (?: in\ (?:this|the|these)\ (?:short\ |given\ |provided\ )?{KINDS}(?:\ {KINDS})?[,:]\s*(?:we\ (?:can\ )?see\ )?
      | (?:this|the|these)\ (?:short\ |given\ |provided\ |four\ |three\ )?{KINDS}(?:\ {KINDS})?\ (?:
            (?:show|showcase|capture|feature|depict|present|portray|display|illustrate)s?\ (?:us\ )?
          | (?:begins|starts|opens)\ with\  | (?:is|are)\ (?:of\ |about\ |showing\ )?(?=an?\ |the\ ) )
      | (?:this|it)\ is\ an?\ (?:short\ )?{KINDS}(?:\ {KINDS})?\ (?:of|showing|that\ shows|depicting)\  )?
    """, re.IGNORECASE | re.VERBOSE)
REFUSAL = re.compile(r"\W*(?:(?:i['’]m|i am) (?:sorry|unable|not able|afraid)|sorry\b|i apologi|unfortunately,? i\b|"
                     r"as an ai\b|i (?:cannot|can['’]t|can not|could not|don['’]t|do not|am)\b)", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")  # its end


def prepare_caption(row, options):
    """uint8 [n h w 3], longer side at most CAPTION_SIDE, n = options.caption_frames or what there is."""
    count, n = int(row["num_frames"]), options.caption_frames
    frames = read_frames(row, sorted({(2 * k + 1) * count // (2 * n) for k in range(n)}))
    h, w = frames[0].shape[:2]
    scale = min(1, CAPTION_SIDE / max(h, w))
    return np.stack([resized(frame, max(1, round(h * scale)), max(1, round(w * scale))) for frame in frames])


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
    return Captioner(net, processor, options.prompt, options.max_new_tokens)


class Captioner:
    """refused: how often the model said that it cannot, of how many seen."""

    def __init__(self, net, processor, prompt, max_new_tokens):
        self.net, self.processor, self.max_new_tokens, self.refused, self.seen = net, processor, max_new_tokens, 0, 0
        self.prompt = prompt

    def __call__(self, rows, prepared):
        texts = []
        for i in range(0, len(rows), CAPTIONS_AT_ONCE):
            texts += self.write(prepared[i:i + CAPTIONS_AT_ONCE])
        self.seen += len(rows)
        return [{"text": self.finish(row, *text)} for row, text in zip(rows, texts)]

    @torch.inference_mode()
    def write(self, clips) -> list[tuple[str, bool]]:
        """The model's words about clips, each uint8 [n h w 3], and whether they end where the model ended them."""
        prompts = [self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * len(frames) + [{"type": "text", "text": self.prompt}]}],
            add_generation_prompt=True) for frames in clips]
        bos = self.processor.tokenizer.bos_token  # of most templates a part
        inputs = self.processor(text=prompts, images=[[Image.fromarray(f) for f in frames] for frames in clips],
                                padding=True, return_tensors="pt",
                                add_special_tokens=not (bos and prompts[0].startswith(bos)))
        inputs = inputs.to(self.net.device, self.net.dtype)
        out = self.net.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens,
                                pad_token_id=self.processor.tokenizer.pad_token_id)
        out = out[:, inputs.input_ids.shape[1]:]
        ends = torch.as_tensor(self.net.generation_config.eos_token_id or -1, device=out.device)
        return list(zip(self.processor.tokenizer.batch_decode(out, skip_special_tokens=True),
                        torch.isin(out, ends).any(1).tolist()))

    def finish(self, row, text, ended):
        """The caption, cleaned, with the camera's motion in Open-Sora 1.2's form; "" for a refusal."""
        if REFUSAL.match(text):
            self.refused += 1
            if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                print(f"{row['path']}: no caption, the model said {text[:80]!r}; {self.refused} of {self.seen} so far",
                      file=sys.stderr)
            return ""
        text = clean(text, ended)
        return f"{text} camera motion: {row['cmotion']}." if text and row.get("cmotion") else text


def clean(text, ended=True) -> str:
    """Without words about the video, and without a last sentence that the limit of tokens cut off."""
    text = " ".join(text.split())
    text = text[PREFIX.match(text).end():]
    stops = [stop.end() for stop in SENTENCE.finditer(text)]
    text = text if ended or not stops else text[:stops[-1]]
    return text[:1].upper() + text[1:]


# ---- flow by a network ----

PERCEIVER_SIDE = 496    # the longer of the published one's train_size
PERCEIVER_SCALE = 20.0  # it was trained on flow / 20 (DeepMind's optical_flow.ipynb, FLOW_SCALE_FACTOR)
PAIRS_AT_ONCE = 4       # an attention of 2,048 latents to 182,528 pixels: 0.75 GB a pair in fp16


def prepare_flow(row, options):
    """(uint8 [P 2 h w 3], seconds [P] between the two) for a network, without one the columns."""
    if not options.flow_model:
        return measured(row, FLOW)
    times, frames, _ = zip(*small_frames(row["path"], PERCEIVER_SIDE))
    times, frames = np.concatenate(times), np.concatenate(frames)
    a = np.searchsorted(times, np.arange(times[0], times[-1], 1 / PAIRS_PER_SECOND) - 1e-6)
    b = np.searchsorted(times, times[a] + GAP_SECONDS - 1e-6)
    a, b = a[b < len(times)], b[b < len(times)]
    return frames[np.stack((a, b), 1)], times[b] - times[a]


def load_flow(options, device):
    if not options.flow_model:
        return lambda rows, prepared: prepared
    return partial(perceiver_motion, net_of(PerceiverForOpticalFlow, options.flow_model, device))


def perceiver_motion(net, rows, prepared):
    """flow, against and cmotion by a network's field in place of curate's own."""
    columns = []
    for pairs, seconds in prepared:
        parts = [slice(i, i + PAIRS_AT_ONCE) for i in range(0, len(pairs), PAIRS_AT_ONCE)]
        found = [motion(perceiver_flow(net, pairs[part]), seconds[part]) for part in parts]
        columns.append(camera(np.concatenate(found) if found else np.zeros((0, 6))))
    return columns


@torch.inference_mode()
def perceiver_flow(net, pairs):
    """Flow [P 2 h' w'], (right, down) in its pixels, longer side 320, fp32 on the CPU, of uint8 [P 2 h w 3]."""
    h, w = pairs.shape[2:4]
    H, W = net.config.train_size
    x = rearrange(torch.as_tensor(pairs).to(net.device).float() / 127.5 - 1, "p t h w c -> (p t) c h w")
    x = F.interpolate(x, (H, W), mode="bilinear", antialias=True)
    x = rearrange(F.unfold(x, 3, padding=1), "(p t) (c k) (H W) -> p t (k c) H W", t=2, c=3, H=H)  # TensorFlow's order
    field = rearrange(net(x.to(net.dtype)).logits.float(), "p H W xy -> p xy H W") * PERCEIVER_SCALE
    h, w = (max(32, round(n * 320 / max(h, w))) for n in (h, w))
    return (F.interpolate(field, (h, w), mode="bilinear", antialias=True)
            * field.new_tensor((w / W, h / H))[:, None, None]).cpu()


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
    batch: int = 1      # rows that work sees at once


FLOW = "flow", "cmotion", "against"
TOO_SHORT = "too short a shot"
CHECKS = "brightness", "contrast", "sharpness", "uniform", "repeats", "held", "combs", "phash"


def cut_file(row: dict, options) -> dict:
    """Probes, measures and cuts a file, writes its clips: the columns of the file, and "clips", the rows of these."""
    path, file = row["path"], probe(row["path"])
    m, still = measure(path), file["kind"] == "image"
    clips, short = ([(0, 1)], []) if still else split(m.transitions, m.times, options.min_seconds, options.max_seconds)
    place, rows, wanted = place_of(row["source"]), [], []
    for a, b in clips:
        name = place if still else place / f"{a:06d}-{b:06d}.mp4"
        box = (0, 0, file["height"], file["width"]) if still else box_of(m, a, b, file["height"], file["width"])
        wanted.append((a, b, options.folder / name, box))
        rows.append(describe(m, a, b) | {"path": name.as_posix(), "height": box[2], "width": box[3],
                                         "fps": file["fps"]})
    if not options.dry_run:
        written = [copied(path, options.folder / place, file)] if still else write_clips(path, wanted, m.times)
        rows = [row | {name: own[name] for name in ("height", "width", "fps")} for row, own in zip(rows, written)]
    rows += [{"path": "", "error": TOO_SHORT} for _ in short]
    ends = np.append(m.times, m.times[-1] + file["seconds"] / max(1, file["num_frames"])) - m.times[0]
    for clip, (a, b) in zip(rows, clips + short):
        clip |= {"source": row["source"], "num_frames": b - a, "start_seconds": ends[a], "seconds": ends[b] - ends[a]}
    return file | {"num_frames": len(m.times), "counted": "decoded", "clips": [rounded(clip) for clip in rows]}


def place_of(source: str) -> Path:
    """Where clips of a file go: "../videos/a.mp4" -> clips/videos/a.mp4, for an image its copy."""
    source = Path(source)
    return Path("clips", *(part for part in source.parts if part not in ("..", source.anchor)))


def copied(path, out: Path, columns: dict) -> dict:
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        shutil.copyfile(path, part)
    return columns


def probe_file(row: dict, options) -> dict:
    return probe(row["path"])


def measured(row: dict, columns) -> dict:
    """Those columns of a clip that its frames tell."""
    m = measure(row["path"])
    found = describe(m, 0, len(m.times))
    return {name: found[name] for name in columns}


def checks_of(row: dict, options) -> dict:
    return measured(row, CHECKS)


STEPS = {
    "probe": Step(("path", "bytes", "modified"), (), probe_file, None, ("num_frames", "height", "width", "fps")),
    "cut": Step(("source", "bytes", "modified"), ("min_seconds", "max_seconds", "dry_run"), cut_file),
    "flow": Step(("path",), ("flow_model",), prepare_flow, load_flow, FLOW),
    "checks": Step(("path",), (), checks_of, None, CHECKS),
    "aesthetic": Step(("path", "num_frames"), ("clip_model", "aesthetic_head"), prepare_aesthetic, load_aesthetic,
                      ("aes",), 64),
    "ocr": Step(("path", "num_frames"), ("ocr_model",), prepare_ocr, load_ocr, ("ocr", "text_area"), 16),
    "caption": Step(("path", "num_frames", "cmotion"), ("captioner", "prompt", "caption_frames", "max_new_tokens"),
                    prepare_caption, load_caption, ("text",), 16),
    "match": Step(("path", "num_frames", "text"), ("clip_model",), prepare_match, load_match, ("match",), 64),
}
NETWORKS = "flow", "aesthetic", "ocr", "caption", "match"  # in this order: a match needs a caption
CLIP_COLUMNS = (*COLUMNS, *FLOW, *CHECKS, "source", "start_seconds", "seconds", "error", "duplicate_of", "dropped")
FILE_COLUMNS = ("path", "kind", "error", "num_frames", "counted", "fps", "height", "width", "rotation",
                "seconds", "codec", "hash", "bytes", "clips")


# ---- work: items spread over ranks and processes, results that outlive them ----

RESULTS_VERSION = 1  # to be raised when a step is to give other results


class Results:
    """What is known of one step: folder/*.jsonl, a line per item, each process its own file, so that none waits.

    A line is written when its item is done: killed, a process loses what it held, and half a line is no line.  Another
    setting is another folder; an item that failed is tried again by the next run.
    """
    def __init__(self, name: str, options):
        self.step = STEPS[name]
        settings = repr([RESULTS_VERSION, *(getattr(options, field) for field in self.step.settings)])
        self.folder = options.folder / "parts" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        self.places, self.failed, self.read, self.out, self.synced = {}, set(), {}, None, 0.0
        self.refresh()

    def key(self, row: dict) -> str:
        reads = json.dumps([str(row.get(column, "")) for column in self.step.reads])
        return hashlib.sha256(reads.encode()).hexdigest()[:16]

    def refresh(self):
        """Reads on where it stopped: what other processes have added is known from now on."""
        self.looked = time.monotonic()
        for file in sorted(self.folder.glob("*.jsonl")):        # by the time of their begin: a later word replaces one
            with open(file, "rb") as f:
                at = f.seek(self.read.get(file, 0))
                for line in f:
                    if not line.endswith(b"\n"):
                        break
                    record = json.loads(line)
                    self.places[record["key"]] = file, at
                    (self.failed.add if record.get("error") else self.failed.discard)(record["key"])
                    at += len(line)
                self.read[file] = at

    def get(self, row: dict) -> dict | None:
        place = self.places.get(self.key(row))
        if place is None:
            return None
        with open(place[0], "rb") as f:
            f.seek(place[1])
            return json.loads(f.readline())

    def add(self, row: dict, record: dict):
        if self.out is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.out = open(self.folder / f"{time.time_ns()}-{rank()}-{os.getpid()}.jsonl", "a")
        self.out.write(json.dumps({"key": self.key(row)} | record) + "\n")
        self.out.flush()
        if time.monotonic() - self.synced > 10:     # seconds that a power cut may take
            os.fsync(self.out.fileno())
            self.synced = time.monotonic()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_mine(row: dict) -> bool:
    """Whether this rank works on a row: all clips of a file go to the rank that cuts it."""
    name = row.get("source") or row["path"]
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % world() == rank()


def start_worker(parent: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process, which ends this one
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
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

    `ahead` rows are under way in options.workers processes.  When one of these dies, its pool does, too: then what was
    under way is tried one by one, each in a process of its own, and what kills that is told.
    """
    rows = iter(rows)
    while True:
        pool, pending = new_pool(options.workers), {}
        try:
            while True:
                more = itertools.islice(rows, ahead - len(pending))
                pending |= {pool.submit(attempt, prepare, row, options): row for row in more}
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending[future], *future.result()
                    del pending[future]
        except BrokenProcessPool:
            pass
        finally:
            end_pool(pool)
        for row in pending.values():
            one = new_pool(1)
            try:
                yield row, *one.submit(attempt, prepare, row, options).result()
            except BrokenProcessPool:
                yield row, None, f"{row['path']}: ended its process: a fault of the decoder, or too little memory"
            finally:
                end_pool(one)


def new_pool(workers: int):
    return ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))


def end_pool(pool):
    """At once: what is under way is lost."""
    for process in multiprocessing.active_children():
        process.kill()
    pool.shutdown(cancel_futures=True)


def do(name: str, rows, options) -> Results:
    """Does a step for those of this rank's rows that have no result yet; paths count from options.folder."""
    step, rows = STEPS[name], [row for row in rows if is_mine(row)]
    results = Results(name, options)
    todo = [row for row in rows if (key := results.key(row)) not in results.places or key in results.failed]
    work = step.load(options, options.device) if todo and step.load else None
    made = in_parallel(step.prepare, todo, options, 2 * (options.workers + step.batch))
    with tqdm(desc=name, total=len(rows) * world(), initial=len(results.places) - len(results.failed), smoothing=0.05,
              disable=rank() > 0 or not todo) as bar:  # of all ranks, which have about as many rows each
        while batch := list(itertools.islice(made, step.batch)):
            good = [(row, data) for row, data, error in batch if not error]
            columns = iter(work(*zip(*good)) if work and good else [data for _, data in good])
            for row, _, error in batch:
                results.add(row, {"error": error} if error else {"columns": rounded(next(columns))})
            if time.monotonic() - results.looked > 2:
                results.refresh()
                bar.update(len(results.places) - bar.n)
        results.refresh()
        bar.update(len(results.places) - bar.n)
    if results.failed and rank() == 0 and step.load:
        failed = [row for row in rows if results.key(row) in results.failed]
        print(f"{name}: {len(failed)} clips could not be read, such as {results.get(failed[0])['error']}")
    return results


def wait_for(results: Results, rows):
    """Until other ranks, too, have done their rows."""
    results.refresh()
    missing = {key for key in map(results.key, rows) if key not in results.places}
    with tqdm(desc=f"{results.folder.name}, other ranks", total=len(missing), disable=not missing) as bar:
        while missing:
            time.sleep(1)
            results.refresh()
            bar.update(len(missing) - len(missing := missing - results.places.keys()))


# ---- tables ----

TABLE = (*COLUMNS, *SCORES, "cmotion", "against", "text_area", *CHECKS, "source", "start_seconds", "seconds", "error",
         "duplicate_of", "dropped")  # the columns of clips.csv and meta.csv, in this order, as far as there are


def read_table(path):
    """Yields the rows of a csv."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such table - `python curate.py run VIDEOS --out DIR` makes one")
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, restval="")
        if "path" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: has columns {','.join(reader.fieldnames or ())}, expected one called path")
        yield from reader


def header_of(table) -> list[str]:
    for row in read_table(table):
        return list(row)
    raise ValueError(f"{table}: has no rows, expected one per clip")


def write_table(path: Path, rows, columns):
    """`columns` in the order of TABLE, then others."""
    columns = [name for name in TABLE if name in columns] + [name for name in columns if name not in TABLE]
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def listed(options) -> list[dict]:
    """A row for every video and image of a folder; paths count from options.folder."""
    found, other = find_files(options.what, options.folder)
    if not found:
        raise ValueError(f"{options.what}: has no video or image among {len(other)} files, expected "
                         f"{' '.join(VIDEOS + IMAGES)}")
    if rank() == 0 and (other := [path for path in other if path.suffix != ".txt"]):
        print(f"{len(other)} files are left alone, no video, no image or no name in UTF-8, such as {str(other[0])!a}")
    captions = {row["path"]: row["text"] for row in read_table(options.captions)} if options.captions else {}
    rows = []
    for path in found:
        name, beside = os.path.relpath(path, options.folder), path.with_suffix(".txt")
        with suppress(FileNotFoundError):  # one may vanish
            stat = os.stat(path)
            text = captions.pop(os.path.relpath(path, options.what), None) or captions.pop(path.name, None)
            if text is None and beside.is_file():
                text = " ".join(beside.read_text(encoding="utf-8", errors="replace").split())
            rows.append({"path": name, "source": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns,
                         "text": text or ""})
    if captions and rank() == 0:
        print(f"{options.captions}: {len(captions)} captions are of no file here, such as of {next(iter(captions))}")
    return rows


def with_results(rows, done):
    """Rows with the columns that steps have found, or an error where they could not read them."""
    for row in rows:
        for results in done:
            record = results.get(row) or {}
            row = row | record.get("columns", record)
        yield row


def can_be_read(row: dict) -> bool:
    return bool(row["path"]) and not row.get("error")


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
    """Of `perceptual_hash`, to float16 [N 192] of length 1: their product is 1 - 2 (bits that differ) / 192.  "": 0."""
    known = np.array([bool(h) for h in hashes])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, HASH_BITS // 8), axis=1)
    vectors = np.zeros((len(hashes), HASH_BITS), np.float16)
    vectors[known] = (2 * bits.astype(np.float16) - 1) / np.float16(math.sqrt(HASH_BITS))
    return vectors


def feature_vectors(texts: list[str]) -> np.ndarray:
    """The column `features`, base64 of float16, to [N D].  "": 0, which is like nothing."""
    known = np.array([bool(text) for text in texts])
    rows = np.stack([np.frombuffer(base64.b64decode(text), np.float16) for text in texts if text] or [np.zeros(1)])
    vectors = np.zeros((len(texts), rows.shape[1]), np.float16)
    vectors[known] = rows[:known.sum()]
    return vectors


def duplicates(vectors, threshold: float, order, device="cpu", block=4096, wide=65536) -> np.ndarray:
    """For each of vectors [N D] of length 1 the index of the one it repeats, or -1: int64 [N].

    In `order` [N], the best first, each is kept unless its product with one kept before reaches the threshold; it then
    repeats the first of those.  So no two kept are alike, and a chain of small changes does not become one clip.
    All pairs are looked at: 10 million x 192 are 2e16 operations, about 2 minutes on an H100 by its bandwidth (not
    measured), which then holds N x D in fp16, 4 GB, and block x wide products.  2 cores: 40,000 in 6 s.
    """
    vectors, order = torch.as_tensor(vectors), np.asarray(order)
    kind = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    kept, kept_index = torch.empty(vectors.shape, dtype=kind, device=device), np.empty(len(order), np.int64)
    repeats, count = np.full(len(order), -1), 0
    for begin in range(0, len(order), block):
        rows = order[begin:begin + block]
        x, first = vectors[rows].to(device, kind), np.full(len(rows), -1)
        for start in range(0, count, wide):
            alike = x @ kept[start:min(start + wide, count)].T
            for i in (alike.amax(1) >= threshold).cpu().numpy().nonzero()[0]:
                if first[i] < 0:
                    first[i] = kept_index[start + (alike[i] >= threshold).nonzero()[0, 0].item()]
        near = (x @ x.T >= threshold).tril(-1).cpu().numpy()
        for i in np.flatnonzero(near.any(1) & (first < 0)):  # ascending, so those before it are decided
            before = np.flatnonzero(near[i] & (first < 0))
            first[i] = rows[before[0]] if len(before) else -1
        new = np.flatnonzero(first < 0)
        kept[count:count + len(new)], kept_index[count:count + len(new)] = x[new], rows[new]
        repeats[rows], count = first, count + len(new)
    return repeats


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

@dataclass(frozen=True)
class Rules:
    """A clip is kept if its columns are within all of these; None = off.  min_flow is about the column flow.

    Upstream names one threshold, of aes (docs/data_processing.md); its tools/datasets/datautil.py has --matchmin and
    --flowmin without a number.  Where ours is another measure the numbers are from 49 clips of real footage: animation,
    a concert, a city.
    """
    min_aesthetic: float | None = 5.0   # upstream's --aesmin 5; for a first stage it takes 4.5 (docs/report_03.md)
    min_match: float | None = 20.0      # cosine x 100; upstream names none, ports of its pipeline --matchmin 20
    max_text_area: float | None = 0.02  # share of the picture: titles 0.02 to 0.1, textless 0; upstream counts boxes
    min_flow: float | None = 0.5        # px/s: a held picture 0.04, with noise of 2 levels 1.0; quietest shots 1.0, 1.6
    max_flow: float | None = None       # px/s: half of all over 12, the wildest 71 and no worse to look at
    max_repeats: float | None = 0.7     # share: drawn at 12 of 24 fps 0.5, at 8 of 24 0.67, a held picture 1
    max_held: float | None = 2.0        # seconds: an animated shot 1.5, a held picture all of its 3
    max_uniform: float | None = 0.1     # share: a shot from black 0.04, black 1
    min_brightness: float | None = 0.03  # 0 to 1: the darkest shot of a concert 0.04, black 0.014
    min_sharpness: float | None = 20.0  # shots have 150 to 5000, blurred over 9 pixels 1 to 20
    max_combs: float | None = 0.01      # share: progressive clips have up to 0.007
    min_height: float | None = None     # the buckets leave out what is too small for them


COLUMN = {"aesthetic": "aes"}  # of a rule, where it is not the rule's name
MOVES = ("flow", "repeats", "held", "combs", "seconds")  # what an image has not


class Rule(NamedTuple):
    name: str
    column: str
    limit: float

    def __str__(self):
        return f"{self.name} {self.limit:g}"

    def breaks(self, value):
        return value < self.limit if self.name.startswith("min") else value > self.limit


@lru_cache
def in_force(rules: Rules) -> list[Rule]:
    names = [(f.name, f.name[4:]) for f in fields(rules) if getattr(rules, f.name) is not None]
    return [Rule(name, COLUMN.get(about, about), getattr(rules, name)) for name, about in names]


def add_flags(parser):
    """--min-flow=0.5 ... for each field of Rules; --min-flow=none switches it off."""
    for f in fields(Rules):
        default = "none" if f.default is None else f"{f.default:g}"
        parser.add_argument("--" + f.name.replace("_", "-"), type=flag_limit, default=f.default, metavar="NUMBER",
                            help=f"{f.name[:3]}imum of {COLUMN.get(f.name[4:], f.name[4:])} (default: {default})")


def flag_limit(text: str) -> float | None:
    if text.lower() == "none":
        return None
    if not math.isfinite(number(text)):
        raise argparse.ArgumentTypeError(f"expected a number, or none to switch the rule off, got {text!r}")
    return number(text)


def from_flags(options) -> Rules:
    return Rules(**{f.name: getattr(options, f.name) for f in fields(Rules)})


def number(value) -> float:
    return read_number(str(value))  # nan for what is none, also ""


def standing(row) -> tuple[str, str] | None:
    """(kind, reason) of what no rule can mend."""
    if row.get("error"):
        return "too short" if row["error"] == TOO_SHORT else "unreadable", row["error"]
    return ("duplicate", f"duplicate of {row['duplicate_of']}") if row.get("duplicate_of") else None


def broken(row, rules: Rules) -> Iterator[tuple[Rule, str]]:
    """(rule, reason) of the rules that a row breaks, in their order."""
    still = number(row.get("num_frames")) == 1
    for rule in in_force(rules):
        if rule.column not in row or still and rule.column in MOVES:
            continue
        value = number(row[rule.column])
        if math.isnan(value):
            yield rule, f"no {rule.column}"
        elif rule.breaks(value):
            shown = f"{value:.4g}" if rule.breaks(float(f"{value:.4g}")) else repr(value)
            yield rule, f"{rule.column} {shown} {'<' if rule.name[:3] == 'min' else '>'} {rule}"


def verdict(row, rules: Rules) -> str:
    """Why a row is dropped, "" if it is not: what no rule can mend, else the first rule that it breaks."""
    found = standing(row)
    return found[1] if found else next((why for _, why in broken(row, rules)), "")


class Tally:
    """Counts rows by the first thing that drops them, and by all (`alone`)."""
    LEGEND = "A clip is dropped by the first rule that it breaks; alone: what the rule would drop without the others."

    def __init__(self, rules: Rules):
        self.rules, self.total, self.kept, self.measured, self.example = rules, 0, 0, set(), {}
        names = ["unreadable", "too short", "duplicate", *(rule.name for rule in in_force(rules))]
        self.dropped, self.alone = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def add(self, row) -> str:
        """`verdict` of the row."""
        self.total += 1
        self.measured.update(row)
        found = standing(row)
        found = [found] if found else [(rule.name, why) for rule, why in broken(row, self.rules)]
        for name, _ in found:
            self.alone[name] += 1
        if not found:
            self.kept += 1
            return ""
        name, why = found[0]
        self.dropped[name] += 1
        self.example.setdefault(name, f"{row['path'] or row['source']}: {why}")
        return why

    def lines(self) -> Iterator[tuple[str, str, str, str, str]]:
        """(rule, kept, dropped, alone, example), kept being what is left after it."""
        left, rules = self.total, {rule.name: rule for rule in in_force(self.rules)}
        for name, dropped in self.dropped.items():
            left -= dropped
            if name in rules and rules[name].column not in self.measured:
                yield str(rules[name]), "not measured", "", "", ""
            else:
                example = " ".join(self.example.get(name, "").split())
                yield str(rules.get(name, name)), f"{left}", f"{dropped}", f"{self.alone[name]}", example

    def __str__(self):
        table = [("rule", "kept", "dropped", "alone", "example"), *self.lines()]
        text = "".join(f"{a:<20} {b:>12} {c:>9} {d:>9}  {e}".rstrip() + "\n" for a, b, c, d, e in table)
        return f"{text}{self.LEGEND}\n{self.total} clips, {self.kept} kept"


# ---- report ----

STYLE = """:root{--page:#f6f6f4;--card:#fff;--ink:#20242b;--soft:#667080;--line:#e3e3df;--kept:#2f74c0;--drop:#d9772b}
@media(prefers-color-scheme:dark){
:root{--page:#15171b;--card:#1e2127;--ink:#e7e7e4;--soft:#9aa1ac;--line:#343841;--kept:#5d9fe6;--drop:#e8a05c}}
body{margin:0 auto;max-width:1200px;padding:24px;background:var(--page);color:var(--ink);font:14px/1.45 system-ui}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:14px 0}
h1,h2{margin:0 0 8px}h3,figcaption,p,th,text{color:var(--soft);fill:var(--soft);font-size:13px}
.row{display:flex;flex-wrap:wrap;gap:12px 24px}figure{margin:0;max-width:352px;overflow-wrap:anywhere}
img{max-width:100%;border-radius:4px}table{border-collapse:collapse}th{text-align:left}
td,th{padding:4px 16px 4px 0;border-bottom:1px solid var(--line);white-space:nowrap}td:last-child{white-space:normal}
svg{display:block;width:100%;max-width:720px}.kept{fill:var(--kept)}.drop{fill:var(--drop);color:var(--drop)}
line{stroke:var(--ink);stroke-dasharray:4 3}"""
SPREAD = ("flow", "sharpness")  # columns on a logarithmic axis


def histogram(values, rule: Rule) -> str:
    """SVG of values float32 [N], those that the rule drops on those that it keeps; heights are roots of counts."""
    scale = (lambda v: np.log10(np.maximum(v, 0.01))) if rule.column in SPREAD else np.asarray
    x, limit, drop = scale(values), float(scale(rule.limit)), rule.breaks(values)
    low, high = min(limit, np.percentile(x, 0.5)), max(limit, np.percentile(x, 99.5))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    every, dropped = (np.histogram(np.clip(part, low, high), 48, (low, high))[0] for part in (x, x[drop]))
    every, kept = (100 * np.sqrt(n / every.max()) for n in (every, every - dropped))
    bars = "".join(f'<rect class="{kind}" x="{20 + 12.5 * i:g}" width="11.5" y="{122 - b:.1f}" height="{b - a:.1f}"/>'
                   for kind, foot, head in (("kept", 0 * kept, kept), ("drop", kept, every))
                   for i, (a, b) in enumerate(zip(foot, head)) if b > a)
    place = lambda v: round(20 + 600 * (float(v) - low) / (high - low), 1)
    ends = np.array([low, (low + high) / 2, high])
    marks = "".join(f'<text x="{place(v)}" y="138" text-anchor="middle">{mark:.3g}</text>'
                    for v, mark in zip(ends, 10 ** ends if rule.column in SPREAD else ends))
    says = (f"{rule.column} of {len(values):,} clips, {drop.sum():,} of them dropped: {values.min():.4g} to "
            f"{values.max():.4g}, median {np.median(values):.4g}")
    return (f'<p>{says}</p><svg viewBox="0 0 640 142" role="img" aria-label="Histogram of {says}">{bars}{marks}'
            f'<line x1="{place(limit)}" x2="{place(limit)}" y1="10" y2="124"/></svg>')


def picks(values, rule: Rule) -> dict[str, list[int]]:
    """Rows to look at, none twice: the worst, those nearest to the limit on both sides, the best."""
    known = np.flatnonzero(np.isfinite(values))
    sign = 1 if rule.name.startswith("min") else -1
    order = known[np.argsort(sign * values[known], kind="stable")]  # worst first
    edge = int(rule.breaks(values[order]).sum())
    rows = {"worst": order[:max(0, edge - 3)][:3], "just dropped": order[max(0, edge - 3):edge][::-1],
            "just kept": order[edge:edge + 3], "best": order[edge + 3:][-3:][::-1]}
    return {title: found.tolist() for title, found in rows.items() if len(found)}


def figure(row, frames_of) -> str:
    """A strip of the frames that frames_of(row) gives, uint8 [T h w 3], or why there is none; its path and verdict."""
    name = html.escape(row["path"])
    try:
        frames = np.concatenate([resized(frame, 64, max(1, round(64 * frame.shape[1] / frame.shape[0])))
                                 for frame in frames_of(row)], axis=1)
        Image.fromarray(frames).save(buffer := io.BytesIO(), "JPEG", quality=70)
        picture = (f'<img alt="frames of {name}" width="{frames.shape[1]}" height="64" src="data:image/jpeg;base64,'
                   f'{base64.b64encode(buffer.getvalue()).decode()}">')
    except (UnreadableClip, OSError) as error:
        picture = html.escape(str(error))
    why = html.escape(row["dropped"])
    return f'<figure>{picture}<figcaption>{name}<br><span class="drop">{why}</span></figcaption></figure>'


def write_report(rows: Callable[[], Iterable[dict]], rules: Rules, path: Path, frames_of: Callable[[dict], Iterable]):
    """Writes one .html file that needs nothing else: what is dropped and why, then of each rule the histogram and clips
    to look at.  rows() is gone through twice; a row takes 4 bytes of memory a rule."""
    tally, hours, values = Tally(rules), 0.0, {rule: array("f") for rule in in_force(rules)}
    for row in rows():
        hours += 0 if tally.add(row) else (number(row.get("seconds")) or 0) / 3600
        for rule, column in values.items():
            column.append(number(row.get(rule.column)))
    values = {rule: found for rule, column in values.items()
              if np.isfinite(found := np.frombuffer(column, np.float32)).any()}
    chosen = {rule: picks(found, rule) for rule, found in values.items()}
    wanted = {i for titles in chosen.values() for found in titles.values() for i in found}
    shown = {i: figure(row | {"dropped": verdict(row, rules)}, frames_of)
             for i, row in enumerate(rows()) if i in wanted}
    table = "".join(f"<tr><td>{'<td>'.join(map(html.escape, line))}</tr>" for line in tally.lines())
    with whole(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Clips</title><style>{STYLE}</style>'
                f"</head><body><h1>{tally.kept:,} of {tally.total:,} clips kept, {hours:,.2f} hours</h1><section>"
                "<table><tr><th>rule<th>kept<th>dropped<th>alone<th>example</tr>"
                f"{table}</table><p>{Tally.LEGEND}</p></section>")
        for rule, titles in chosen.items():
            f.write(f"<section><h2>{rule}</h2>{histogram(values[rule][np.isfinite(values[rule])], rule)}")
            for title, found in titles.items():
                figures = "".join(f"<div><b>{values[rule][i]:.4g}</b>{shown[i]}</div>" for i in found)
                f.write(f'<h3>{title}</h3><div class="row">{figures}</div>')
            f.write("</section>")
        f.write("</body></html>")


# ---- commands ----

def start(options):
    """run, cut and probe: a folder of videos to files.csv, clips.csv and meta.csv."""
    files = listed(options)
    first = do("probe" if options.command == "probe" else "cut", files, options)
    done, asked = [], []
    for name in NETWORKS if options.command == "run" else ():
        done.append(Results(name, options))  # also of an earlier run
        if name in options.also:
            mine = clip_rows((row for row in files if is_mine(row)), first)
            try:
                done[-1] = do(name, filter(can_be_read, with_results(mine, done[:-1])), options)
                asked.append(done[-1])
            except (ValueError, FileNotFoundError) as error:
                print(f"{name} is not done: {error}", file=sys.stderr)
    if rank():
        return
    wait_for(first, files)
    for i, results in enumerate(done):  # in their order: what one reads another has found
        mine = filter(can_be_read, with_results(clip_rows(files, first), done[:i])) if results in asked else ()
        wait_for(results, mine)
    write_table(options.folder / "files.csv", (
        row | {"clips": sum(bool(clip["path"]) for clip in row.get("clips", ()))}
        for row in with_results(files, [first])), FILE_COLUMNS)
    tell_files(options.folder / "files.csv")
    if options.command != "probe":
        columns = {*CLIP_COLUMNS, *(name for results in done if results.places for name in results.step.writes)}
        choose(lambda: with_results(clip_rows(files, first), done), columns, options)


def tell_files(path):
    count, seconds, broken = 0, 0.0, []
    for row in read_table(path):
        count, seconds = count + 1, seconds + float(row["seconds"] or 0)
        broken += [row["error"]] if row["error"] else []
    print(f"{path}: {count} files, {seconds / 3600:.2f} hours, {len(broken)} cannot be read",
          *broken[:10], *[f"and {len(broken) - 10} more"] * (len(broken) > 10), sep="\n  ")


def choose(rows, columns, options):
    """Finds duplicates, applies the rules; writes clips.csv and meta.csv, says what is kept and why the rest is not.
    rows() gives all rows, again and again."""
    tally, table = Tally(from_flags(options)), options.table
    meta = table.with_name("meta.csv" if table.name == "clips.csv" else f"{table.stem}-kept.csv")
    if not options.no_dedup:
        found = find_duplicates(rows(), tally.rules, options.device)
        rows = lambda rows=rows: (row | {"duplicate_of": of} for row, of in zip(rows(), found))
    columns = dict.fromkeys((*columns, "duplicate_of", "dropped"))
    write_table(table, (row | {"dropped": tally.add(row)} for row in rows()), columns)
    print(tally)
    if not tally.kept:
        raise ValueError("no clip is kept: the table says by which rule; --min-... or --max-...=none switches one off")
    if options.dry_run:
        return
    kept = [name for name in columns if name not in ("error", "duplicate_of", "dropped")]
    write_table(meta, (row for row in read_table(table) if not row["dropped"]), kept)
    silent = sum(not row.get("text") for row in read_table(meta))
    print(f"{meta}: {tally.kept} clips" + f", {silent} of them without a caption" * (silent > 0))
    if options.config:
        meta = read_meta(str(meta))
        print(bucket_table(meta, options.config, assign(meta, options.config, 0)))


def add_columns(options):
    """flow, checks and what needs a network: adds columns to a table."""
    table, step = options.table, STEPS[options.command]
    header = header_of(table)
    if missing := {"num_frames", "text"} & set(step.reads) - set(header):
        raise ValueError(f"{table}: has no column {' or '.join(missing)}, which {options.command} reads - `python "
                         f"curate.py {'probe' if 'num_frames' in missing else 'caption'} {options.what}` adds it")
    rows = lambda: (row for row in read_table(table) if can_be_read(row) or row["path"] and options.command == "probe")
    results = do(options.command, rows(), options)
    if rank() == 0:
        wait_for(results, rows())
        write_table(table, with_results(read_table(table), [results]), (*header, *step.writes, "error"))
        print(f"{table}: {', '.join(step.writes)}; `python curate.py filter {options.what}` chooses by them")


def frames_under(folder: Path):
    """What gives the first, middle and last frame of a row."""
    return lambda row: read_frames(row | {"path": str(folder / row["path"])}, ends_and_middle(row))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", *STEPS, "dedup", "filter", "report"))
    parser.add_argument("what", help="a folder of videos (run, probe, cut), or the DIR or table that they made")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of run, probe, cut: where all is written")
    parser.add_argument("--with", dest="also", default="", metavar="STEPS", help=f"of run: {','.join(NETWORKS)}")
    parser.add_argument("--captions", metavar="CSV", help="columns path,text: captions of the videos; without, a .txt "
                        "beside a video is its caption")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="of a clip (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=16.0, help="of a clip: longer shots are divided (default: "
                        "%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="measures and writes clips.csv, but no clips")
    parser.add_argument("--no-dedup", action="store_true", help="leaves out the search for near-duplicates")
    parser.add_argument("--config", help="of run and filter: which of its buckets the clips go to")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: all cores)")
    networks = parser.add_argument_group("networks: folders or names on the hub")
    networks.add_argument("--clip-model", default="openai/clip-vit-large-patch14", help="(default: %(default)s)")
    networks.add_argument("--aesthetic-head", metavar="FILE", help="sac+logos+ava1-l14-linearMSE.pth")
    networks.add_argument("--ocr-model", default="PaddlePaddle/PP-OCRv5_mobile_det_safetensors")
    networks.add_argument("--captioner", default="llava-hf/llava-v1.6-mistral-7b-hf", help="(default: %(default)s)")
    networks.add_argument("--prompt", default=PROMPT)
    networks.add_argument("--caption-frames", type=int, default=CAPTION_FRAMES)
    networks.add_argument("--max-new-tokens", type=int, default=200)
    networks.add_argument("--flow-model", metavar="NAME", help="such as deepmind/optical-flow-perceiver")
    add_flags(parser.add_argument_group("rules: a number, or none"))
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser.parse_args()


def resolve(options):
    """Fills in what the command line leaves open."""
    options.also = tuple(filter(None, options.also.split(",")))
    if wrong := set(options.also) - set(NETWORKS):
        raise ValueError(f"--with {','.join(wrong)}: expected some of {','.join(NETWORKS)}")
    what = Path(options.what)
    options.starts = options.command in ("run", "cut") or options.command == "probe" and what.suffix != ".csv"
    if options.starts and not options.out:
        raise ValueError(f"{options.command}: expected --out DIR, where clips and tables are written")
    options.table = what if what.suffix == ".csv" else (options.out if options.starts else what) / "clips.csv"
    options.folder = options.table.parent.absolute()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    options.workers = options.workers or max(1, os.cpu_count() // local)
    options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return options


def main():
    options = parse_args()
    try:
        resolve(options)
        if options.config:
            import configs
            options.config = configs.load(options.config)
        if options.starts:
            start(options)
        elif options.command in STEPS:
            add_columns(options)
        elif options.command == "report":
            path = options.table.with_name("report.html")
            write_report(lambda: read_table(options.table), from_flags(options), path, frames_under(options.folder))
            print(path)
        else:
            options.no_dedup = options.command == "filter"
            choose(lambda: read_table(options.table), header_of(options.table), options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    from curate import main; main()
