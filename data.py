"""From meta.csv to batches: the index, buckets, the sampler, decoding, reading ahead; writing video.

    python data.py meta.csv configs/stage1.py              prints which clips train in which bucket, and why others not

in    meta.csv with columns path,text,num_frames,height,width,fps and the files it names (mp4, mov, webm, png, jpg ...)
out   per step a dict: video uint8 [B T H W 3], text, and height, width, num_frames, fps, ar [B] as the network is told

In an epoch a clip belongs to at most one bucket (resolution, frames, aspect ratio); a global batch is drawn from one.
Clips, windows and, by slot_generator, noise, t and masks are pure functions of seed and step.  Sizes and the bucket
rule are those of Open-Sora 1.1 (arXiv 2412.20404).
"""
import os
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): Ctrl-C shows no traceback of a half-done import
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")    # see kernels.py
import argparse
import csv
import difflib
import glob
import hashlib
import itertools
import math
import multiprocessing
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
import uuid
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import av.subtitles.stream  # noqa: F401    writing video would import it in its midst: a module of Cython swallows a
import numpy as np             # Ctrl-C that comes while it is imported
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from einops import rearrange, repeat
from PIL import Image, ImageOps
from tqdm import tqdm


# ---- sizes: a resolution is a number of pixels and, for each aspect ratio height / width, a size of about as many ----

# Open-Sora 1.1's sizes, height x width; those of "256" are PixArt-alpha's.  Some are off their ratio by a few pixels.
WIDE = """
ratio  144p     240p     360p     480p      720p      1080p      4k
0.38   117x312  196x522  294x784  392x1046  588x1568  882x2352   1764x4704
0.43   125x291  210x490  314x732  420x980   628x1466  942x2198   1886x4400
0.48   133x277  222x462  332x692  444x925   666x1388  998x2080   1996x4158
0.50   135x270  226x452  340x680  452x904   678x1356  1018x2036  2036x4072
0.53   139x262  232x438  350x662  466x880   698x1318  1048x1980  2096x3960
0.54   141x260  236x436  352x652  470x870   706x1306  1058x1958  2118x3918
0.56   144x256  240x426  360x640  480x854   720x1280  1080x1920  2160x3840
0.62   151x241  252x404  380x608  506x810   758x1212  1138x1820  2276x3642
0.67   156x234  262x393  392x588  522x784   784x1176  1176x1764  2352x3528
0.75   166x221  276x368  416x554  554x738   832x1110  1248x1664  2494x3326
1.00   192x192  320x320  480x480  640x640   960x960   1440x1440  2880x2880
1.33   221x165  370x278  554x416  740x555   1108x832  1662x1246  3326x2494
1.50   235x156  392x262  588x392  784x522   1176x784  1764x1176  3528x2352
1.78   256x144  426x240  640x360  854x480   1280x720  1920x1080  3840x2160
1.89   263x139  440x232  660x350  880x466   1320x698  1980x1048  3958x2096
2.00   271x135  452x226  678x340  906x454   1358x680  2036x1018  4072x2036
2.08   277x132  462x222  692x332  924x444   1386x666  2078x998   4156x1994
"""
SQUARE = """
128x512 128x496 128x480 128x464 144x448 144x432 144x416 160x400 160x384 176x368 176x352 176x336 192x336 192x320
208x304 208x288 224x288 224x272 240x272 240x256 256x256 256x240 272x240 272x224 288x224 288x208 304x208 320x192
336x192 352x176 368x176 384x160 400x160 416x144 432x144 448x144 464x128 480x128 496x128 512x128
"""


def aspect_tables() -> dict[str, dict[str, tuple[int, int]]]:
    """resolution -> ratio -> (height, width).  Of two ratios equally near, the first listed is taken; upstream lists
    4k's 0.62 before its 0.56."""
    size = lambda text: tuple(map(int, text.split("x")))
    (_, *levels), *rows = (line.split() for line in WIDE.strip().splitlines())
    tables = {level: {row[0]: size(row[i]) for row in rows} for i, level in enumerate(levels, start=1)}
    tables["4k"] = dict(sorted(tables["4k"].items(), key=lambda item: 0.55 if item[0] == "0.62" else float(item[0])))
    for level, scale in (("256", 1), ("512", 2), ("1024", 4)):
        tables[level] = {str(round(h / w, 2)): (scale * h, scale * w) for h, w in map(size, SQUARE.split())}
    return tables | {"32": {"1.00": (32, 32), "0.67": (32, 48)}}  # "32": assets/shapes.py


ASPECT = aspect_tables()
USUAL = ("0.56", "1.0", "1.00")  # 16:9, or square where there is none: what gives a resolution its number of pixels
PIXELS = {level: next(math.prod(t[ar]) for ar in USUAL if ar in t) for level, t in ASPECT.items()}


class Bucket(NamedTuple):
    """What the clips of one batch share."""
    resolution: str
    num_frames: int
    ar: str  # key of ASPECT[resolution]

    height = property(lambda self: ASPECT[self.resolution][self.ar][0])
    width = property(lambda self: ASPECT[self.resolution][self.ar][1])


# ---- meta.csv ----

COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
SCORES = ("aes", "flow", "ocr", "match")  # columns that curate.py adds; training reads none of them
IMAGE_FPS = 120.0  # what the network is told for an image (upstream's IMG_FPS)
INDEX_VERSION = 2  # to be raised when the same csv is to give other rows
INDEX_BATCH = 512  # rows made at once: 65,536 take three times as long, their objects leave the processor's cache
# 40 bytes: the csv's bytes start .. start + size are the row; key, the crc32 of the path as it stands there; repeated,
# whether an earlier row has the same path.
ROW = np.dtype([("start", "i8"), ("size", "i4"), ("row", "i4"), ("num_frames", "i4"), ("height", "i4"), ("width", "i4"),
                ("fps", "f4"), ("key", "u4"), ("file", "u2"), ("repeated", "?")], align=True)


class Meta:
    """The rows of one or several meta.csv in their order: an index and the files' own bytes, all memory-mapped.

    meta[name] is an array [N] of ROW's field of that name; of an image num_frames is 1.
    Forked workers share it; a pickle holds names only, and a spawned worker maps the same pages.
    """
    def __init__(self, files: tuple[str, ...], key: str, rows: np.ndarray):
        self.files, self.key, self.rows = files, key, rows
        self.headers = [read_header(file) for file in files]
        self.contents = [np.memmap(file, mode="r").view(np.ndarray) for file in files]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[name]

    def __reduce__(self):
        return read_meta, (self.files, self.key)

    def field(self, clip: int, name: str) -> str:
        row = self.rows[clip]
        line = self.contents[row["file"]][row["start"]:row["start"] + row["size"]].tobytes().decode()
        return next(csv.reader([line]))[self.headers[row["file"]].index(name)]

    def text(self, clip: int) -> str:
        return self.field(clip, "text")

    def path(self, clip: int) -> str:
        """Counts from the folder of its csv."""
        return str(Path(self.files[self.rows[clip]["file"]]).parent / self.field(clip, "path"))

    def where(self, clip: int) -> str:
        """As "meta.csv row 17"; the header is row 1, as a spreadsheet counts."""
        return f"{self.files[self.rows[clip]['file']]} row {self.rows[clip]['row']}"


def read_meta(pattern: str | list[str] | tuple[str, ...], key: str | None = None) -> Meta:
    """Opens a meta.csv, all files of a glob (sorted), or several of either; each file once.

    The first time it writes an index beside the first of them, or where the system keeps temporary files; it holds
    until a file's size or time changes.  key: what the index depended on in the process that pickled this Meta.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = {os.path.abspath(file): file for one in patterns for file in sorted(glob.glob(one)) or [one]}
    files = tuple(found.values())
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"no file {file} - `python -m assets.shapes DIR` makes one for an example set")
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in found]
    now = hashlib.sha256(repr((INDEX_VERSION, ROW, stats)).encode()).hexdigest()
    if key not in (None, now):
        raise ValueError(f"{', '.join(files)}: written to while in use, expected it as it was - start again")
    index = Path(f"{files[0]}.{zlib.crc32(repr(list(found)).encode()):08x}.index")
    elsewhere = Path(tempfile.gettempdir()) / index.name
    for place in (index, elsewhere):
        if meta := open_index(files, now, place):
            return meta
    try:
        return build_index(files, now, index)
    except OSError as error:
        print(f"{index} cannot be written, it becomes {elsewhere}: {error}", file=sys.stderr)
        return build_index(files, now, elsewhere)


def open_index(files: tuple[str, ...], key: str, index: Path) -> Meta | None:
    """None when there is no whole index of these files as they now are: rows of ROW, then the key."""
    if not index.is_file() or not index.stat().st_size:
        return None
    content = np.memmap(index, mode="r")
    if content[-len(key):].tobytes() != key.encode():
        return None
    return Meta(files, key, content[:-len(key)].view(ROW).view(np.ndarray))


def build_index(files: tuple[str, ...], key: str, index: Path) -> Meta:
    """Writes under a name of its own and renames that: several processes may build, and none sees half an index."""
    part, size, hashes = index.with_name(f"{index.name}.{uuid.uuid4().hex}.part"), sum(map(os.path.getsize, files)), []
    try:
        with open(part, "wb") as f:
            with tqdm(desc=f"indexing {files[0]}", total=size, unit="B", unit_scale=True, disable=size < 1e8) as bar:
                for number, file in enumerate(files):
                    for rows, of_paths in read_rows(file):
                        rows["file"] = number
                        f.write(rows.tobytes())
                        hashes.append(of_paths)
                        bar.update(int(rows["size"].sum()))
            if not hashes:
                raise ValueError(f"{', '.join(files)} has no rows, expected one per clip - `python -m assets.shapes "
                                 "DIR` makes an example")
            f.flush()
            hashes = np.concatenate(hashes)  # of 12 M different paths two have the same with a probability of 4e-6
            repeated = np.ones(len(hashes), bool)
            repeated[np.unique(hashes, return_index=True)[1]] = False
            np.memmap(part, ROW, "r+")["repeated"] = repeated
            f.write(key.encode())
        part.replace(index)
    finally:
        part.unlink(missing_ok=True)
    return open_index(files, key, index)


def read_header(file: str) -> list[str]:
    names = next(read_records(file), [[]])[-1]
    if missing := [column for column in COLUMNS if column not in names]:
        raise ValueError(f"{file} lacks column {', '.join(missing)}: expected {','.join(COLUMNS)}, got "
                         f"{','.join(names) or 'nothing'} - `python -m assets.shapes DIR` makes one")
    return names


def read_records(file: str):
    """Yields (row, offset in bytes, size in bytes, fields) of the header, row 1, and of every row that is not blank."""
    with open(file, "rb") as f:
        start = end = 3 * (f.read(3) == b"\xef\xbb\xbf")  # the byte order mark that spreadsheets write
        f.seek(start)

        def lines():
            nonlocal end
            for line in f:
                end += len(line)  # f.tell() per row would take a third longer
                yield line.decode()
        row = width = 0
        try:
            for row, fields in enumerate(csv.reader(lines(), strict=True), start=1):  # strict: a quote has to close
                width = width or len(fields)
                if fields and len(fields) != width:
                    raise ValueError(f"{file} row {row}: {len(fields)} fields, expected {width} as in the header")
                if fields:
                    yield row, start, end - start, fields
                start = end
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} row {row + 1}: {error}, expected csv in UTF-8 - correct the row") from None


def read_rows(file: str):
    """Yields some rows of the index, and hashes of their paths joined with the file's folder (both [n])."""
    folder, names = os.path.join(os.path.abspath(Path(file).parent), ""), read_header(file)
    records = itertools.islice(read_records(file), 1, None)
    while batch := list(itertools.islice(records, INDEX_BATCH)):
        numbers, starts, sizes, fields = zip(*batch)
        column, rows = dict(zip(names, zip(*fields))), np.zeros(len(batch), ROW)
        rows["row"], rows["start"], rows["size"] = numbers, starts, sizes
        for name in ("num_frames", "height", "width", "fps"):
            values = np.array([read_number(text) for text in column[name]])
            if name == "fps":
                values[rows["num_frames"] == 1] = IMAGE_FPS  # an image's own is empty or nan
            good = (values > 0) & (values < 1e9) & ((name == "fps") | (values == np.floor(values)))
            if not good.all():
                bad, kind = np.argmin(good), "number" if name == "fps" else "whole number"
                raise ValueError(f"{file} row {numbers[bad]}: {name}={column[name][bad]!r}, expected a {kind} above 0 "
                                 "- correct or drop the row")
            rows[name] = values
        rows["key"] = [zlib.crc32(path.encode()) for path in column["path"]]
        yield rows, np.array([hash(path if os.path.isabs(path) else folder + path) for path in column["path"]])


def read_number(text: str) -> float:
    try:
        return float(text or "nan")  # a column of empty scores would raise 12 M times
    except ValueError:
        return np.nan


# ---- chance: every draw is a hash of what it is for, so any rank, worker or resumed run draws the same ----

def mix(*keys) -> np.ndarray:
    """uint64 hash of words, integers and integer arrays, broadcast: splitmix64's finaliser (Steele et al. 2014)."""
    h = np.zeros(1, np.uint64)
    for key in keys:
        key = zlib.crc32(key.encode()) if isinstance(key, str) else key
        h = (h ^ np.asarray(key).astype(np.uint64)) + 0x9E3779B97F4A7C15
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB
        h = h ^ (h >> 31)
    return h


def uniform(*keys) -> np.ndarray:
    return (mix(*keys) >> 11) * 2.0**-53  # 53 bits in [0, 1)


def slot_generator(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """The random stream of one sample of one step for one purpose ("window", "noise", ...)."""
    return torch.Generator().manual_seed(int(mix(seed, step, slot, purpose)[0] >> 1))


# ---- buckets ----

CHUNK = 1 << 18  # clips looked at together, by hand: bounds the memory for 12 million
REASONS = ("too small", "no bucket of its kind", "too short", "keep draw",  # why a clip is left out, least far first
           "its path stands in an earlier row", "held out for validation")
TOO_SMALL, NO_KIND, TOO_SHORT, KEEP_DRAW, REPEATED, HELD_OUT = range(len(REASONS))


def bucket_list(buckets: dict) -> list[Bucket]:
    """All buckets of a config's table, largest resolution first; their order numbers them."""
    levels = sorted(buckets, key=PIXELS.get, reverse=True)
    return [Bucket(level, t, ar) for level in levels for t in sorted(buckets[level]) for ar in ASPECT[level]]


def nearest_aspect(level: str, height, width) -> np.ndarray:
    """Index of the nearest key of ASPECT[level], for arrays of heights and widths."""
    ratios = np.array([float(key) for key in ASPECT[level]])
    return np.abs(ratios - (np.asarray(height) / np.asarray(width))[..., None]).argmin(-1)


def stride(fps, config) -> np.ndarray:
    """Of how many source frames one is taken: config.frame_interval, or what comes nearest to config.target_fps."""
    if config.target_fps:
        return np.maximum(1, np.rint(np.asarray(fps) / config.target_fps)).astype(int)
    return np.full(np.shape(fps), config.frame_interval)


def offers(rows: np.ndarray, config):
    """Yields (resolution, length [n]) for clips, the largest resolution first, by Open-Sora 1.1's rule.

    length: the most frames of a bucket there that the clip fills (an image: 1); or minus the reason why there is none.
    A clip needs 0.8 of the resolution's pixels and num_frames * stride frames (upstream: one more)."""
    is_image, strides = rows["num_frames"] == 1, stride(rows["fps"], config)
    area = rows["height"].astype(np.int64) * rows["width"]
    for level in sorted(config.buckets, key=PIXELS.get, reverse=True):
        lengths = sorted(config.buckets[level])
        length = np.where(np.where(is_image, 1 in lengths, lengths[-1] > 1), -TOO_SHORT, -NO_KIND)
        for t in lengths:  # ascending: the largest that fits stays
            length[is_image if t == 1 else ~is_image & (rows["num_frames"] >= t * strides)] = t
        yield level, np.where(area >= 0.8 * PIXELS[level], length, -TOO_SMALL)


def entries(meta, config, epoch: int | None, validation: bool):
    """Yields (clips, the numbers of their buckets) by the draws of an epoch; None: for all that some epoch may draw.

    First come all clips, with -1 - reason why they will be in none, if they will: one that gets a bucket comes again.
    A clip that loses the keep draw of a resolution's bucket goes on to the next smaller resolution.  The share that it
    belongs to, training or validation, hangs on its path alone, not on its row or a seed."""
    first_of = {}  # (resolution, frames) -> the number of its first aspect
    for number, bucket in enumerate(bucket_list(config.buckets)):
        first_of.setdefault(bucket[:2], number)
    for start in range(0, len(meta), CHUNK):
        rows = meta.rows[start:start + CHUNK]
        levels = list(offers(rows, config))
        reason = np.max([np.where(length > 0, KEEP_DRAW, -length) for _, length in levels], axis=0)
        reason[(uniform(rows["key"], "validation") < config.holdout) != validation] = HELD_OUT
        reason[rows["repeated"]] = REPEATED
        yield np.arange(start, start + len(rows)), -1 - reason
        waiting = reason < REPEATED  # for a bucket
        for level, length in levels:
            for t, (keep, _) in config.buckets[level].items():
                clips = np.flatnonzero(waiting & (length == t))
                draws = 0 if epoch is None else uniform(config.seed, epoch, start + clips, f"{level} {t}")
                clips = clips[np.broadcast_to(draws < keep, clips.shape)]
                aspects = nearest_aspect(level, rows["height"][clips], rows["width"][clips])
                yield start + clips, first_of[level, t] + aspects
                waiting[clips] = epoch is None and keep < 1  # in another epoch it may be lost here, and go on


def assign(meta, config, epoch: int, validation: bool = False) -> np.ndarray:
    """Each clip's number in bucket_list(config.buckets), or -1 - reason of why it has none: int16 [N]."""
    found = np.empty(len(meta), np.int16)
    for clips, numbers in entries(meta, config, epoch, validation):
        found[clips] = numbers
    return found


def reachable(meta, config) -> dict[int, np.ndarray]:
    """Bucket number -> ids of all clips that it can get in some epoch, ascending."""
    clips_of = defaultdict(list)
    for clips, numbers in entries(meta, config, None, False):
        for number in np.unique(numbers[numbers >= 0]).tolist():
            clips_of[number].append(clips[numbers == number].astype(np.int32))
    return {number: np.concatenate(parts) for number, parts in sorted(clips_of.items())}


def bucket_table(meta, config, found: np.ndarray, validation: bool = False) -> str:
    """What `assign` made of the clips: a line per resolution and length, then what is left out, and why."""
    kinds, numbered, starved = defaultdict(Counter), bucket_list(config.buckets), 0
    numbers, counts = np.unique(found[found >= 0], return_counts=True)
    for number, clips in zip(numbers.tolist(), counts.tolist()):  # Python's int: numpy's cannot hold a million's FLOP
        bucket = numbered[number]
        size = config.buckets[bucket.resolution][bucket.num_frames][1] * config.world
        batches, rest = divmod(clips, size)
        tokens, flop = config.cost(bucket)
        kinds[bucket[:2]].update(aspects=1, clips=clips, batches=batches, rest=rest, tokens=clips * tokens,
                                 flop=batches * size * flop)
        starved += not batches
    total = sum(row["flop"] for row in kinds.values()) or 1
    lines = ["      bucket  aspects      clips  clips/GPU   batches  left over  tokens/GPU  compute"]
    for (level, t), row in kinds.items():
        size = config.buckets[level][t][1]
        lines.append(f"{level:>6} x {t:<3} {row['aspects']:8} {row['clips']:10} {size:10} {row['batches']:9} "
                     f"{row['rest']:10} {row['tokens'] / row['clips'] * size:11,.0f} {row['flop'] / total:8.1%}")
    lines.append(f"{(found >= 0).sum()} of {len(meta)} clips are in a bucket; a batch is clips/GPU * {config.world} "
                 "clips of one aspect, clips left over come first in the next epoch")
    if starved:
        lines.append(f"{starved} aspects have fewer clips than one batch: these train only if later epochs draw more")
    for reason, why in enumerate(REASONS):
        clips = np.flatnonzero(found == -1 - reason)
        if len(clips):
            why = "not held out" if validation and reason == HELD_OUT else why
            first, row = clips[0], meta.rows[clips[0]]
            lines.append(f"{len(clips)} left out: {why}, as {meta.where(first)}: {meta.path(first)} "
                         f"({row['num_frames']} frames, {row['height']}x{row['width']}, {row['fps']:g} fps)")
    return "\n".join(lines)


# ---- the sampler ----

MAX_TRIES = 20  # clips tried for one slot before training stops; where 5% cannot be read (max_bad), one time in 1e26


class Plan(NamedTuple):
    """What one rank reads for one step."""
    step: int
    bucket: Bucket
    slots: list[int]    # places in the global batch: every world-th
    clips: np.ndarray   # int [slots MAX_TRIES]: each slot's clip, then those that take its place if it cannot be read


class Epoch(NamedTuple):
    """Batch i is of bucket buckets[i]: its clips are pools[buckets[i]][starts[i]:][:size]."""
    buckets: np.ndarray  # [batches]
    starts: np.ndarray   # [batches]
    pools: dict          # a bucket's number -> its clips, int32, at random


class BucketSampler:
    """Which clips step n trains on: a pure function of (config.seed, n), whatever the ranks, workers or restarts.

    An epoch is all full global batches (clips per GPU * config.world) of all buckets, shuffled; no clip is in it twice.
    Clips that a bucket has left over come first in the same bucket of the next epoch.
    """
    def __init__(self, meta, config, validation: bool = False):
        self.meta, self.config, self.validation = meta, config, validation
        self.numbered = bucket_list(config.buckets)
        self.starts = [0]  # the first step of each epoch so far: they differ in length, as their keep draws do
        self.left_over = [(np.zeros(0, int), np.zeros(0, int))]  # and what it inherits: clips, their buckets' numbers
        self.epoch = lru_cache(1)(self.make_epoch)  # one after the other, as each inherits; any earlier one again
        if not len(self.epoch(0).starts):
            why = "no bucket has the clips of one batch" if self.epoch(0).pools else "no clip fits any bucket"
            raise ValueError(f"{why}:\n{self.table()}")

    def table(self) -> str:
        """Of epoch 0."""
        found = assign(self.meta, self.config, 0, self.validation)
        return bucket_table(self.meta, self.config, found, self.validation)

    def make_epoch(self, number: int) -> Epoch:
        found = assign(self.meta, self.config, number, self.validation)
        inherited, their_buckets = self.left_over[number]
        found[inherited] = their_buckets  # whatever the draws of this epoch say
        clips = np.flatnonzero(found >= 0).astype(np.int32)
        order = mix(self.config.seed, number, clips, "clips")
        order[np.isin(clips, inherited)] = 0
        clips = clips[np.lexsort((order, found[clips]))]  # by bucket; in each the inherited, then the others at random
        numbers, firsts = np.unique(found[clips], return_index=True)
        pools = dict(zip(numbers.tolist(), np.split(clips, firsts[1:])))

        starts, buckets, rest = ([np.zeros(0, int)] for _ in range(3))  # to be joined, also where there is no bucket
        for bucket, pool in pools.items():
            size = self.batch_size(self.numbered[bucket])
            full = len(pool) // size * size
            starts.append(np.arange(0, full, size))
            buckets.append(np.full(full // size, bucket))
            rest.append(pool[full:])
        starts, buckets, rest = map(np.concatenate, (starts, buckets, rest))
        if len(self.starts) == number + 1:
            self.starts.append(self.starts[-1] + len(starts))
            self.left_over.append((rest, found[rest]))
        shuffled = np.argsort(mix(self.config.seed, number, np.arange(len(starts)), "batches"))
        return Epoch(buckets[shuffled], starts[shuffled], pools)

    def batch_size(self, bucket: Bucket) -> int:
        """Clips of a global batch."""
        return self.config.buckets[bucket.resolution][bucket.num_frames][1] * self.config.world

    def plan(self, step: int, rank: int = 0, world: int = 1) -> Plan:
        while step >= self.starts[-1]:
            self.epoch(len(self.starts) - 1)
        number = bisect_right(self.starts, step) - 1
        epoch, i = self.epoch(number), step - self.starts[number]
        bucket, pool = self.numbered[epoch.buckets[i]], epoch.pools[int(epoch.buckets[i])]
        if (size := self.batch_size(bucket)) < world:
            raise ValueError(f"a global batch of {size} clips cannot feed {world} GPUs: make it larger")
        mine = np.arange(rank, size, world)
        others = mix(self.config.seed, step, mine[:, None], np.arange(1, MAX_TRIES), "stand-in") % len(pool)
        return Plan(step, bucket, mine.tolist(), np.column_stack([pool[epoch.starts[i] + mine], pool[others]]))


# ---- reading ----

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SKIPPING = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")  # decoders that leave out one frame and no other
MAX_PIXELS = 2 ** 26  # of a frame, twice 8K: more is a damaged header, and would take all memory


class UnreadableClip(ValueError):
    """The message says which file, why, and how many frames there were."""


def read_window(path: str, num_frames: int | None = None, stride: int = 1, start: int | None = None,
                generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
    """(uint8 [T H W 3] as displayed, number of frames decoded): moments start, start + stride, ... of `even_grid`.

    start None = drawn with generator, or the middle without; num_frames None = as many as there are.
    """
    if not Path(path).is_file():
        raise UnreadableClip(f"{path}: no such file")
    if path.lower().endswith(IMAGES):
        choose(path, [0], num_frames, stride, start, generator)
        return torch.from_numpy(read_image(path))[None], 1
    packets = []
    with opened(path, packets, skip_frame="all") as stream:  # else opening decodes a frame, to learn what we do not ask
        packets += (packet for packet in stream.container.demux(stream) if packet.size)
        wanted = choose(path, frame_times(path, stream, packets), num_frames, stride, start, generator)
        return decode(path, stream, packets, wanted)


@contextmanager
def opened(path, found: list, **options):
    """The video stream of a file, decoded by one thread; FFmpeg's errors become UnreadableClip, which counts `found`.

    options: FFmpeg's, for opening.  stream.container is open as long as this context is."""
    limit = {"max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(str(path), options=limit | options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise UnreadableClip(f"{path}: has no video stream of a known codec")
            stream.codec_context.options, stream.codec_context.thread_count = limit, 1  # workers are the parallelism
            yield stream
    except (av.FFmpegError, OSError) as error:
        raise UnreadableClip(f"{path}: {error.strerror}, {len(found)} frames found") from error


def length_and_rate(path: str) -> tuple[int, Fraction | None]:
    """(frames, as read_window counts them; how many a second, if known) of a clip; the first alone is decoded."""
    read_window(path, 1, start=0)  # raises where there is none
    if path.lower().endswith(IMAGES):
        return 1, None
    with opened(path, []) as stream:
        packets = [packet for packet in stream.container.demux(stream) if packet.size]
        return len(frame_times(path, stream, packets)), stream.average_rate


def read_image(path: str) -> np.ndarray:
    """[H W 3], turned as its EXIF entry says.  The errors caught are those that fuzzing saw."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at white, not scale them
                image = image.point(lambda level: level / 256, "L")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableClip(f"{path}: {error}") from error


def frame_times(path: str, stream: av.VideoStream, packets: list[av.Packet]) -> list[int]:
    """When each frame is shown, ascending, in the stream's time base."""
    expected = len(stream.index_entries) if "mp4" in stream.container.format.name else 0  # what its edit list leaves
    if len(packets) < expected or any(packet.is_corrupt for packet in packets):
        raise UnreadableClip(f"{path}: is cut off or holed, has {len(packets)} of {expected or '?'} frames")
    if any(packet.pts is None for packet in packets):
        raise UnreadableClip(f"{path}: of {len(packets)} frames some have no time, `ffmpeg -fflags +genpts` gives it")
    return sorted({packet.pts for packet in packets if not packet.is_discard})


def choose(path: str, times: list[int], num_frames, stride, start, generator) -> list[int]:
    """The times of the window's frames, ascending."""
    num_frames = num_frames or max(1, math.ceil((len(times) - (start or 0)) / stride))
    if start is None:
        starts = max(1, len(times) - (num_frames - 1) * stride)  # where a window can begin
        start = (starts - 1) // 2 if generator is None else int(torch.randint(starts, (), generator=generator))
    if start + (num_frames - 1) * stride >= len(times):
        raise UnreadableClip(f"{path}: has {len(times)} frames, expected {num_frames} at stride {stride} from {start}")
    return [times[i] for i in even_grid(np.array(times))[start::stride][:num_frames]]


def even_grid(times: np.ndarray) -> np.ndarray:
    """Of n frames the nearest in time to each of n moments, spread evenly from the first to the last: int [n].

    A constant rate gives each frame once, also where up to three are missing, mostly at the end of a stream copy: a
    grid that spread this gap over the clip would leave out frames elsewhere, and show the last one twice.
    """
    n, since, gaps = len(times), times[1:] - times[0], np.diff(times)
    if n == 1:
        return np.zeros(1, int)
    ticks = np.rint(gaps / np.median(gaps)).cumsum()  # if the rate is constant, the tick of each frame but the first
    interval = since[-1] / ticks[-1]  # more exact than the median: containers round times
    if ticks[-1] <= n - 1 + 3 and (np.abs(since - ticks * interval) <= interval / 2).all():
        return np.arange(n)
    halfway = since - gaps / 2  # from the frame before
    return np.searchsorted(halfway, np.linspace(0, since[-1], n))


def decode(path: str, stream: av.VideoStream, packets: list[av.Packet], wanted: list[int]):
    """(uint8 [T H W 3] as shown at the times `wanted`, which ascend; number of frames the decoder gave to get them)."""
    context, reformatter, shown = stream.codec_context, VideoReformatter(), set(wanted)
    last = max(i for i, packet in enumerate(packets) if packet.pts in shown)
    key = max((i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= wanted[0]), default=0)
    for first, skip in ((key, context.name in SKIPPING), (0, False)):  # again in full, as `key` may need those before
        context.flush_buffers()
        frames, given = {}, []
        for packet in [*packets[first:last + 1], None]:  # None: give what is held back
            if packet:
                context.skip_frame = "NONREF" if skip and packet.pts not in shown else "DEFAULT"
            for frame in context.decode(packet):
                given.append(None if frame.is_corrupt else frame.pts)
                if given[-1] in shown:
                    width, turns = displayed(path, frame, stream)
                    rgb = reformatter.reformat(frame, width, frame.height, "rgb24", threads=1)
                    frames[frame.pts] = np.rot90(rgb.to_ndarray(), turns)
        whole = None not in given and given == sorted(given) and len(frames) == len(shown)
        if whole and len({frame.shape for frame in frames.values()}) == 1:
            return torch.from_numpy(np.stack([frames[time] for time in wanted])), len(given)
    raise UnreadableClip(f"{path}: has damaged frames, an order that is not that of their times, or several sizes: "
                         f"of {len(packets)} frames {len(given)} were decoded, {given.count(None)} of them damaged")


def displayed(path, frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """(its width in square pixels, the quarter turns counter-clockwise that it then needs)."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1  # of MPEG-TS the second knows
    width = round(frame.width * aspect)
    if not 0 < width * frame.height <= MAX_PIXELS:
        raise UnreadableClip(f"{path}: its pixels are {aspect} times as wide as high")
    return width, round(frame.rotation / 90) % 4


def resize_crop(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [T H W 3] -> uint8 [T height width 3]: shrunk or grown until it covers, the middle cut out."""
    _, H, W, _ = video.shape
    scale = max(height / H, width / W)
    size = max(height, round(H * scale)), max(width, round(W * scale))
    if size != (H, W):  # in uint8: a seventeenth of float's time, at most one level off
        x = F.interpolate(rearrange(video, "t h w c -> t c h w"), size, mode="bilinear", antialias=True)
        video = rearrange(x, "t c h w -> t h w c")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, top:top + height, left:left + width].contiguous()


def to_video(frames):
    """uint8, or float in 0..255, [... T H W 3] -> float [... 3 T H W] in -1..1."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "... t h w c -> ... c t h w").contiguous()


def to_uint8(video):
    """[3 T H W] in -1..1 -> uint8 [T H W 3] numpy."""
    return rearrange(((video.float().clamp(-1, 1) + 1) * 127.5).round().byte(), "c t h w -> t h w c").cpu().numpy()


# ---- batches ----

class ClipDataset:
    """Reads clips from their files; vae.CachedClips does the same from a cache.

    Windows are drawn anew at each use; or config.windows of them are fixed for each clip; for validation they are the
    middle ones."""
    def __init__(self, meta, config, validation: bool = False):
        self.meta, self.config, self.validation = meta, config, validation

    def read(self, clip: int, bucket: Bucket, step: int, slot: int) -> dict:
        """{"video": uint8 [T H W 3], "text", "decoded": how many frames that took}; raises UnreadableClip."""
        row, config = self.meta.rows[clip], self.config
        if self.validation:
            generator = None
        elif config.windows:
            generator = window_generator(row["key"], window_number(config, bucket, step, slot))
        else:
            generator = slot_generator(config.seed, step, slot, "window")
        interval = int(stride(row["fps"], config))
        frames, decoded = read_window(self.meta.path(clip), bucket.num_frames, interval, None, generator)
        return {"video": resize_crop(frames, bucket.height, bucket.width), "text": self.meta.text(clip),
                "decoded": decoded}


def window_number(config, bucket: Bucket, step: int, slot: int) -> int:
    """Which of a clip's fixed windows a slot takes; an image has one."""
    return 0 if bucket.num_frames == 1 else int(mix(config.seed, step, slot, "window")[0] % config.windows)


def window_generator(key: int, window: int) -> torch.Generator:
    """The random stream that places a fixed window; key: meta's, a hash of the clip's path."""
    return slot_generator(0, key, window, "fixed window")


class Fault(NamedTuple):
    """A clip that could not be read: a line of bad_clips.csv."""
    step: int
    slot: int
    attempt: int  # 0 the slot's own clip, then its stand-ins
    path: str
    reason: str


def fill(dataset, plan: Plan, known: dict, note=lambda slot, attempt: None) -> dict:
    """A plan's batch, as numpy: what dataset.read gives, stacked, what the network is told, and how that came about.

    An attempt in `known` {(step, slot, attempt): reason} is not made again.  note(slot, attempt) goes before each."""
    clips, read, faults = [], [], []
    for slot, candidates in zip(plan.slots, plan.clips):
        for attempt, clip in enumerate(candidates):
            try:
                if reason := known.get((plan.step, slot, attempt)):
                    raise UnreadableClip(reason)
                note(slot, attempt)
                read.append(dataset.read(clip, plan.bucket, plan.step, slot))
                clips.append(clip)
                break
            except UnreadableClip as error:
                faults.append(Fault(plan.step, slot, attempt, dataset.meta.path(clip), str(error)))
        else:
            raise ValueError(f"step {plan.step}: none of {MAX_TRIES} clips drawn from {tuple(plan.bucket)} can be "
                             "read:\n  " + "\n  ".join(fault.reason for fault in faults))
    columns = {name: [item[name] for item in read] for name in read[0]}
    batch = {name: torch.stack(of).numpy() if torch.is_tensor(of[0]) else of for name, of in columns.items()}
    return batch | told(dataset, plan.bucket, clips) | {
        "decoded": sum(batch["decoded"]), "slots": np.array(plan.slots), "bucket": plan.bucket, "faults": faults}


def told(dataset, bucket: Bucket, clips: list[int]) -> dict[str, np.ndarray]:
    """What the network is told beside the caption, [B] fp32 each.

    ar is width / height, as upstream trains (its samplers say the inverse); fps that of the frames taken, or with
    config.raw_fps that of the file, as upstream."""
    fps = dataset.meta.rows["fps"][clips]
    if bucket.num_frames > 1 and not dataset.config.raw_fps:
        fps = fps / stride(fps, dataset.config)
    values = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames,
              "ar": bucket.width / bucket.height, "fps": fps}
    return {name: np.full(len(clips), value, np.float32) for name, value in values.items()}


def batches(sampler: BucketSampler, dataset, first: int, last: int, rank: int = 0, world: int = 1, known=None):
    """Yields this rank's batches of steps first .. last - 1, read ahead by config.num_workers processes.

    "waited" in a batch: seconds until it was there.  known: as for `fill`."""
    plans, known = (sampler.plan(step, rank, world) for step in range(first, last)), known or {}
    made = read_parallel(dataset, plans, known) if dataset.config.num_workers else (
        fill(dataset, plan, known) for plan in plans)
    start = time.perf_counter()
    for batch in made:
        batch = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}
        yield batch | {"waited": time.perf_counter() - start}
        start = time.perf_counter()


def read_parallel(dataset, plans, known: dict):
    """Yields the batches of plans in their order; each reader is given two plans at a time: it never waits for one, and
    holds one batch that nobody has asked for yet."""
    readers, ahead = [Reader(dataset, known) for _ in range(dataset.config.num_workers)], deque()
    try:
        for i, plan in enumerate(plans):
            ahead.append(readers[i % len(readers)])
            ahead[-1].give(plan)
            if len(ahead) == 2 * len(readers):
                yield ahead.popleft().take()
        while ahead:
            yield ahead.popleft().take()
    finally:
        for reader in readers:
            reader.process.kill()
            reader.process.join()


class Reader:
    """A process that reads batches ahead.  One that hangs on a clip or dies of it is replaced, the clip a fault.

    (A DataLoader's worker that dies ends the training.)  Batches come through a pipe as numpy, not through shared
    memory, as tensors would: of that a container has 64 MB."""
    def __init__(self, dataset, known: dict):
        self.dataset, self.known, self.plans = dataset, dict(known), deque()
        self.start()

    def start(self):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=read_ahead, args=(self.dataset, theirs), daemon=True)
        self.process.start()
        theirs.close()
        for plan in self.plans:
            self.pipe.send((plan, self.known))

    def give(self, plan: Plan):
        self.plans.append(plan)
        with suppress(ConnectionError):  # dead: `take` will notice, and `start` give it again
            self.pipe.send((plan, self.known))

    def take(self) -> dict:
        """The batch of the oldest plan given."""
        at, timeout = None, self.dataset.config.read_timeout
        while True:
            try:
                message = self.pipe.recv() if self.pipe.poll(timeout) else None
            except (EOFError, ConnectionError):
                self.process.join(timeout)  # it died, or is about to
                message = None
            if isinstance(message, ValueError):
                raise message
            if isinstance(message, dict):
                self.plans.popleft()
                return message
            if message is None:
                self.replace(at)
            at = message

    def replace(self, at: tuple[int, int] | None):
        """Starts another process, which passes the clip over that this one tried: at = (slot, attempt)."""
        status, plan, timeout = self.process.exitcode, self.plans[0], self.dataset.config.read_timeout
        self.process.kill()
        if at is None or status in (0, 1):  # 1: an error in Python; a crash is a signal, on Windows a large number
            raise ValueError(f"step {plan.step}: a reading process ended with status {status}, see above" if status else
                             f"step {plan.step}: a reading process did not start within {timeout} s")
        path = self.dataset.meta.path(plan.clips[plan.slots.index(at[0])][at[1]])
        reason = f"took more than {timeout} s" if status is None else "ended its reader with " + (
            f"signal {-status}" if status < 0 else f"status {status:#x}")
        self.known[plan.step, *at] = f"{path}: {reason}"
        self.start()


def read_ahead(dataset, pipe):
    """A reader's life: (plan, known) comes in; (slot, attempt) of each clip tried goes out, then the batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            pipe.send(fill(dataset, *pipe.recv(), lambda *at: pipe.send(at)))
        except EOFError:
            return
        except ValueError as error:
            pipe.send(error)


def end_with_parent():
    """Ends this process when its parent is gone: a killed one does not say so, and a pipe's other end may have been
    inherited by the next reader.  (os.getppid() stays what it was on Windows, and is another's under a fork server.)"""
    multiprocessing.parent_process().join()
    os._exit(1)


class BadClips:
    """<run>/bad_clips.csv, a line per fault.  known: what it held at the start, so that a resumed run does the same."""
    def __init__(self, path, max_share: float, writes: bool = True):
        self.path, self.max_share, self.writes, self.tried, self.faults = Path(path), max_share, writes, 0, 0
        content = self.path.read_text("utf-8") if self.path.is_file() else ""
        lines = content[:content.rfind("\n") + 1]  # without the one that a killed run has left half
        if writes and lines != content:
            os.truncate(self.path, len(lines.encode()))
        self.known = {(int(row["step"]), int(row["slot"]), int(row["attempt"])): row["reason"]
                      for row in csv.DictReader(lines.splitlines())}

    def add(self, faults: list[Fault], num_clips: int):
        """faults of all ranks since the last call, beside num_clips that were read; raises when they are too many."""
        self.tried, self.faults = self.tried + num_clips + len(faults), self.faults + len(faults)
        new = [fault for fault in sorted(faults) if fault[:3] not in self.known]
        self.known |= {fault[:3]: fault.reason for fault in new}
        if new and self.writes:
            print(f"{self.faults} of {self.tried} clips could not be read, see {self.path}: {new[-1].reason}",
                  file=sys.stderr)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                lines = [(*fault[:4], " ".join(fault.reason.split())) for fault in new]
                csv.writer(f, lineterminator="\n").writerows(lines if f.tell() else [Fault._fields, *lines])
        # after 200, chosen by hand: of fewer, a handful of bad ones says nothing of all
        if self.tried >= 200 and self.faults > self.max_share * self.tried:
            raise ValueError(f"{self.faults} of {self.tried} clips could not be read, more than max_bad="
                             f"{self.max_share:g} of them: mend or drop those in {self.path}, or raise max_bad")


# ---- writing ----

@contextmanager
def whole(path):
    """A path to write to; then on the disk before it has its name, so that what has it is whole after a power cut.
    What fails, or is stopped, leaves nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_video(path, frames, fps=24):
    """Writes frames uint8 [T H W 3] as .mp4 (H.264), .gif, .png (a contact sheet, at most 8 frames a row), or for a
    name without suffix a folder of 00000.png, 00001.png, ...

    Written beside its place and renamed, so that a file that is there is whole.
    """
    path, frames = Path(path), np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be uint8 [T H W 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    if path.suffix not in (".mp4", ".gif", ".png", ""):
        raise ValueError(f"{path}: video is written as .mp4, .gif, .png (a contact sheet) or, without a suffix, as a "
                         f"folder of frames, not as {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")        # not `whole`: a folder, or a name that must end so
    if path.suffix == ".png":
        Image.fromarray(contact_sheet(frames)).save(part)
    elif path.suffix == ".gif":
        first, *rest = [Image.fromarray(f) for f in enlarge(frames)]
        first.save(part, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    elif path.suffix == ".mp4":
        write_mp4(part, frames, fps)
    else:
        for folder in (part, path):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(part / f"{i:05d}.png")
    part.replace(path)


def write_mp4(path, frames, fps):
    _, H, W, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), "edge")  # 4:2:0 needs even sides
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        # without mbtree: x264's macroblock tree gives other bytes from run to run on frames of a few blocks
        options = {"crf": "12", "preset": "fast", "x264-params": "mbtree=0"}  # crf by hand: what is judged is the model
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        for frame in tqdm(frames, f"writing {path.name}", unit="frame", leave=False, disable=len(frames) < 200):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())


def enlarge(frames):
    """[T H W 3] with pixels repeated up to a short side of at most 128 (by hand): the shapes world's would be a
    thumbnail's."""
    k = max(1, 128 // min(frames.shape[1:3]))
    return repeat(frames, "t h w c -> t (h k1) (w k2) c", k1=k, k2=k)


def contact_sheet(frames, per_row=8):
    """uint8 [T H W 3] -> one picture [H' W' 3], frames in reading order with a white rule of 2 pixels after each; a
    single frame as it is, since it may be given to sample.py."""
    if len(frames) == 1:
        return enlarge(frames)[0]
    missing = -len(frames) % per_row if len(frames) > per_row else 0  # in the last row: white
    frames = np.pad(enlarge(frames), ((0, missing), (0, 2), (0, 2), (0, 0)), constant_values=255)
    return rearrange(frames, "(r c) h w ch -> (r h) (c w) ch", c=min(per_row, len(frames)))


# ---- the command line ----

def main(argv=None):
    parser = Parser(description=__doc__, usage="python data.py META CONFIG [--FIELD=VALUE ...]")
    parser.add_argument("what", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args, overrides = parser.parse_known_args(argv)
    with one_line_errors(args.debug):
        if len(args.what) != 2:
            raise ValueError(f"{' '.join(args.what + overrides)}: expected META CONFIG, as in data/shapes/meta.csv "
                             "configs/tiny.py; `python -m assets.shapes data/shapes` renders an example")
        import configs
        meta, config = args.what
        config = configs.load(config, overrides)
        print(BucketSampler(read_meta(meta), config).table())


class Parser(argparse.ArgumentParser):
    """argparse's, for the command lines of all files that import this one: a docstring is shown as it stands, and an
    error is one line.  A flag that there is not is named before all else: of `sample.py --promt "a dog"` argparse would
    say that --prompt is missing."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def parse_args(self, words=None, namespace=None):
        for word in sys.argv[1:] if words is None else words:
            flag, known = word.split("=")[0], self._option_string_actions
            if re.fullmatch(r"--\w[\w-]*", flag) and flag not in known:
                close = difflib.get_close_matches(flag, known, n=1)
                self.error(f"there is no {flag}, {f'did you mean {close[0]}?' if close else '--help shows what is'}")
        return super().parse_args(words, namespace)

    def error(self, message):
        sys.exit(fail(message))


def count(text):
    """The type of a flag that tells how many."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


@contextmanager
def one_line_errors(debug, stopped=""):
    """Around what a script does.  What its user can mend ends it with one line and status 2, or with --debug with the
    traceback; Ctrl-C with status 130 and, behind "stopped", what `stopped` says of a second start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError) as error:
        if debug:
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one shows no traceback of the end
        if not int(os.environ.get("RANK", 0)):
            print(f"\nstopped{stopped}", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def fail(error):
    """The end of a main(): one line on stderr; returns the exit status 2."""
    if rank := int(os.environ.get("RANK", 0)):
        time.sleep(10)      # mostly all ranks fail alike: rank 0 says so, and torchrun ends the others
    print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    from data import main; main()
