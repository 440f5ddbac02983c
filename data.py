"""From meta.csv to batches: rows, buckets, the sampler, decoding, reading ahead; last, writing video.

    python data.py meta.csv configs/stage1.py       prints which clips train in which bucket, and why others do not

In    meta.csv with the columns path,text,num_frames,height,width,fps, and the files that it names (mp4, png, ...).
Out   for each step a dict: video uint8 [B T H W 3], text, and the conditioning values height, width, num_frames, fps
      and ar [B].

Sizes and the bucket rule are those of Open-Sora 1.1 (arXiv 2412.20404).  In an epoch a clip belongs to at most one
bucket (resolution, frames, aspect ratio), and a global batch is drawn from one bucket.  Which clips, windows, noises
and masks a step sees is a pure function of (seed, step, slot of the global batch), whatever the number of ranks, of
reading processes or of restarts.
"""
import argparse
import csv
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from einops import rearrange
from PIL import Image, ImageOps
from tqdm import tqdm


# ---------------------------------------------------------------- sizes
# A resolution is a number of pixels and, for each aspect ratio height / width, a size of about as many pixels.

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


def aspect_tables():
    """Returns {resolution: {ratio: (height, width)}}, ratios as text in the order in which ties are decided."""
    header, *rows = [line.split() for line in WIDE.strip().splitlines()]
    tables = {}
    for column, resolution in enumerate(header[1:], start=1):
        tables[resolution] = {row[0]: parse_size(row[column]) for row in rows}
    # Open-Sora lists 4k's 0.62 before its 0.56, and of two ratios that are equally near it takes the first one.
    ratios = sorted(tables["4k"], key=lambda ratio: 0.55 if ratio == "0.62" else float(ratio))
    tables["4k"] = {ratio: tables["4k"][ratio] for ratio in ratios}
    for resolution, scale in (("256", 1), ("512", 2), ("1024", 4)):
        tables[resolution] = {}
        for size in SQUARE.split():
            height, width = parse_size(size)
            tables[resolution][str(round(height / width, 2))] = (scale * height, scale * width)
    tables["64"] = {"1.00": (64, 64), "0.67": (64, 96)}         # assets/shapes.py
    return tables


def parse_size(text):
    """Returns (height, width) of a text such as "144x256"."""
    height, width = text.split("x")
    return int(height), int(width)


def num_pixels(table):
    """Returns the pixels that a resolution stands for: those of its 16:9, or of its square where it has no 16:9."""
    ratio = next(ratio for ratio in ("0.56", "1.0", "1.00") if ratio in table)
    height, width = table[ratio]
    return height * width


ASPECT = aspect_tables()
PIXELS = {resolution: num_pixels(table) for resolution, table in ASPECT.items()}


class Bucket(NamedTuple):
    """What the clips of one batch share."""
    resolution: str
    num_frames: int
    ar: str             # a key of ASPECT[resolution]

    @property
    def height(self):
        return ASPECT[self.resolution][self.ar][0]

    @property
    def width(self):
        return ASPECT[self.resolution][self.ar][1]


# ---------------------------------------------------------------- meta.csv
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
SCORES = ("aes", "flow", "ocr", "match")    # columns that curate.py adds; training reads none of them
IMAGE_FPS = 120.0       # the frame rate that the network is conditioned on for an image (Open-Sora's IMG_FPS)
TABLE_VERSION = 1       # raise it when the same csv files are to give another table
ROW = np.dtype([
    ("start", "i8"),        # where the path begins in the blob of texts; the caption follows it
    ("path_size", "i4"),    # bytes of the path
    ("text_size", "i4"),    # bytes of the caption
    ("file", "i4"),         # which of the csv files the row is from
    ("row", "i4"),          # its number there; the header is row 1, as a spreadsheet counts
    ("num_frames", "i4"),   # 1 for an image
    ("height", "i4"),       # pixels, as displayed
    ("width", "i4"),
    ("fps", "f4"),
    ("key", "u4"),          # crc32 of the path as it is written: for draws that must not depend on the row
    ("repeated", "?"),      # whether an earlier row names the same file
], align=True)

csv.field_size_limit(2 ** 31 - 1)           # the default refuses captions of over 131,072 characters


class Table:
    """The rows of one or several meta.csv in their order.  table["height"] is a column [N], by the names of ROW.

    Rows and texts are memory-mapped, so processes share them, and a pickle holds the names of the files only."""

    def __init__(self, files, folder):
        self.files = files
        self.folder = folder
        self.rows = np.load(folder / "rows.npy", mmap_mode="r")
        self.texts = np.load(folder / "texts.npy", mmap_mode="r")

    def __reduce__(self):
        return Table, (self.files, self.folder)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, name):
        return self.rows[name]

    @property
    def key(self):
        """Names the csv files with their sizes and times."""
        return self.folder.name

    def path(self, clip):
        """Returns the path of a clip; a relative one counts from the folder of its csv."""
        row = self.rows[clip]
        path = self.texts[row["start"]:][:row["path_size"]]
        return str(Path(self.files[row["file"]]).parent / path.tobytes().decode())

    def text(self, clip):
        """Returns the caption of a clip."""
        row = self.rows[clip]
        text = self.texts[row["start"] + row["path_size"]:][:row["text_size"]]
        return text.tobytes().decode()

    def where(self, clip):
        """Returns the place of a clip's row, as "meta.csv row 17"."""
        row = self.rows[clip]
        return f"{self.files[row['file']]} row {row['row']}"


def read_meta(pattern):
    """Returns the Table of a meta.csv, of all files that a glob finds (sorted), or of a list of either, each file once.

    Reading 12 million rows takes a minute, so the table is saved in a folder next to the first file, or where the
    system keeps temporary files, and opened from there while no csv changes its size or time.  Raises ValueError with
    the row and the column of what is wrong."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = {}
    for one in patterns:
        for file in sorted(glob.glob(one)) or [one]:
            found.setdefault(os.path.abspath(file), file)
    for file in found.values():
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no file {file}, expected a csv with the columns {','.join(COLUMNS)} (--data=PATH names another); "
                "`python curate.py run VIDEOS --out DIR` makes one of your videos, and configs/tiny.py is for a first "
                "try without any")
    files = tuple(found.values())
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in found]
    name = f"{Path(files[0]).name}.{short_hash(list(found))}."
    key = short_hash(TABLE_VERSION, ROW, stats)
    places = (Path(files[0]).parent, Path(tempfile.gettempdir()))
    for place in places:
        folder = place / f"{name}{key}.table"
        try:
            return Table(files, folder)
        except (OSError, ValueError, EOFError):     # not there; or half of it, after a crash of the machine
            shutil.rmtree(folder, ignore_errors=True)
    rows, texts = read_rows(files)
    for place in places:
        try:
            return Table(files, save_table(rows, texts, place, name, key))
        except OSError as error:
            print(f"{place} cannot be written, so the table of {files[0]} is not kept there: {error}", file=sys.stderr)
    raise OSError(f"the table of {files[0]} can be kept neither in {places[0]} nor in {places[1]}")


def save_table(rows, texts, place, name, key):
    """Writes a table as one folder and returns its path.  Several processes may do this at once: the first one wins."""
    folder = place / f"{name}{key}.table"
    part = Path(tempfile.mkdtemp(prefix=f".{name}", dir=place))
    try:
        for file, array_ in (("rows.npy", rows), ("texts.npy", texts)):
            with open(part / file, "wb") as f:
                np.save(f, array_)
                f.flush()
                os.fsync(f.fileno())
        part.chmod(0o755)                   # mkdtemp's folders are private
        if not folder.is_dir():
            part.rename(folder)
    except OSError:
        if not folder.is_dir():             # else another process has renamed its own meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in place.glob(f"{glob.escape(name)}*.table"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def read_rows(files):
    """Reads csv files into rows [N] of ROW and the blob of their texts, uint8."""
    texts = bytearray()
    paths = array("q")                      # hashes: that two of 12 million paths share one has a probability of 4e-6

    def rows():
        for number, file in enumerate(files):
            folder = os.path.abspath(Path(file).parent)
            for row, fields in read_csv(file, COLUMNS):
                if not fields["path"]:
                    raise ValueError(f"{file} row {row}: path='', expected the name of a file")
                path = fields["path"].encode()
                text = fields["text"].encode()
                num_frames = positive_number(fields, "num_frames", file, row, whole=True)
                height = positive_number(fields, "height", file, row, whole=True)
                width = positive_number(fields, "width", file, row, whole=True)
                fps = IMAGE_FPS if num_frames == 1 else positive_number(fields, "fps", file, row)
                start = len(texts)
                texts.extend(path)
                texts.extend(text)
                paths.append(hash(os.path.normpath(os.path.join(folder, fields["path"]))))
                key = zlib.crc32(path)
                yield start, len(path), len(text), number, row, num_frames, height, width, fps, key, False

    size = sum(os.path.getsize(file) for file in files)
    table = np.fromiter(tqdm(rows(), f"reading {files[0]}", unit="row", disable=size < 1e8), ROW)
    if not len(table):
        raise ValueError(f"{', '.join(files)} has no rows, expected one per clip")
    table["repeated"] = True
    first_of_each_path = np.unique(np.frombuffer(paths, np.int64), return_index=True)[1]
    table["repeated"][first_of_each_path] = False
    return table, np.frombuffer(texts, np.uint8)


def read_csv(file, needed=()):
    """Yields (row number, {column: text}) of each row of a csv file in UTF-8 that is not blank; the header is row 1.

    Raises ValueError, which names the row, for a missing column, another number of fields than the header's, a quote
    that is not closed, and other encodings."""
    row = 0
    with open(file, "rb") as f:
        reader = csv.reader(text_lines(f), strict=True)
        try:
            header = next(reader, [])
            missing = [column for column in needed if column not in header]
            if missing:
                raise ValueError(f"{file} lacks column {', '.join(missing)}: expected {','.join(needed)}, got "
                                 f"{','.join(header) or 'nothing'}")
            if len(set(header)) < len(header):
                raise ValueError(f"{file}: two columns have one name in {','.join(header)}")
            row = 1
            for row, fields in enumerate(reader, start=2):
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ValueError(f"{file} row {row}: {len(fields)} fields, expected {len(header)} as in the header "
                                     "- a text with commas or quotes stands in quotes")
                yield row, dict(zip(header, fields))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} row {row + 1}: {error}, expected csv in UTF-8 - correct the row") from None


def text_lines(f):
    """Yields the lines of a file as text, without the byte order mark that spreadsheets write before the first one."""
    for number, line in enumerate(f):
        text = line.decode()
        yield text.removeprefix("\ufeff") if number == 0 else text


def positive_number(fields, name, file, row, whole=False):
    """Returns a field of a row as a number above 0; raises ValueError, which names the place, if it is none."""
    value = read_number(fields[name])
    if not 1e-3 < value < 1e9 or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{file} row {row}: {name}={fields[name]!r}, expected a {kind} above 0 - correct or drop the "
                         "row")
    return value


def read_number(text):
    """Returns a text as a float, nan if it is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def short_hash(*values):
    """Returns 16 hexadecimal digits that name these values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- randomness
# Every draw is a hash of what it is for, so that any rank, worker or resumed run draws the same.

def hash_keys(*keys):
    """Returns a uint64 hash of words, integers and integer arrays, broadcast: splitmix64's finaliser (Steele et al.,
    2014)."""
    h = np.zeros(1, np.uint64)
    for key in keys:
        if isinstance(key, str):
            key = zlib.crc32(key.encode())
        h = (h ^ np.asarray(key).astype(np.uint64)) + 0x9E3779B97F4A7C15
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB
        h = h ^ (h >> 31)
    return h


def uniform(*keys):
    """Returns numbers in [0, 1), of 53 random bits each."""
    return (hash_keys(*keys) >> 11) * 2.0 ** -53


def slot_generator(seed, step, slot, purpose):
    """Returns the random stream of one clip of one step for one purpose ("window", "noise", ...)."""
    return torch.Generator().manual_seed(int(hash_keys(seed, step, slot, purpose)[0] >> 1))


# ---------------------------------------------------------------- buckets
CHUNK = 1 << 18         # rows that are assigned together: bounds the memory for 12 million
MIN_AREA = 0.8          # of a resolution's pixels, that a clip must have to train there


class LeftOut(IntEnum):
    """Why a clip has no bucket, in the order in which a clip meets the conditions."""
    TOO_SMALL = 0
    NO_BUCKET_OF_ITS_KIND = 1       # images where only videos are trained, or the other way round
    TOO_SHORT = 2
    KEEP_DRAW = 3
    REPEATED = 4                    # its path stands in an earlier row
    HELD_OUT = 5                    # for validation, or in validation for training

    @property
    def words(self):
        return ("too small", "no bucket of its kind", "too short", "keep draw", "its path stands in an earlier row",
                "held out for validation")[self]


NO_BUCKET = -1


def bucket_list(buckets):
    """Returns all buckets of a config's table, the largest resolution first; their order numbers them."""
    found = []
    for resolution in largest_first(buckets):
        for num_frames in sorted(buckets[resolution]):
            found += [Bucket(resolution, num_frames, ar) for ar in ASPECT[resolution]]
    return found


def largest_first(buckets):
    return sorted(buckets, key=PIXELS.get, reverse=True)


def nearest_aspect(resolution, height, width):
    """Returns which of ASPECT[resolution] is nearest to height / width [n]: int [n]."""
    ratios = np.array([float(ratio) for ratio in ASPECT[resolution]])
    return np.abs(ratios - (np.asarray(height) / np.asarray(width))[..., None]).argmin(-1)


def longest_fit(rows, lengths, frame_interval):
    """Returns for each row the most frames of `lengths` that it fills, an image 1; 0 if there is none: int [n].

    T frames need T * frame_interval frames of the source (Open-Sora: one more)."""
    is_image = rows["num_frames"] == 1
    longest = np.zeros(len(rows), int)
    for length in sorted(lengths):
        if length == 1:
            longest[is_image] = 1
        else:
            longest[~is_image & (rows["num_frames"] >= length * frame_interval)] = length
    return longest


class Offer(NamedTuple):
    """The rows that one (resolution, number of frames) of a config can take, whatever is drawn."""
    name: str           # "240p 16"
    keep: float         # the probability that it keeps one of them
    rows: np.ndarray    # places in the table, ascending
    buckets: np.ndarray     # the number of each row's bucket in bucket_list


def offers(table, config, validation):
    """Yields, CHUNK rows at a time: the place of the first row; the Offers to these rows, the largest resolution first;
    and why each row has no bucket if nobody keeps it, LeftOut [n]."""
    numbers = {}
    for number, bucket in enumerate(bucket_list(config.buckets)):
        numbers.setdefault(bucket[:2], number)              # of the first aspect ratio
    for first in range(0, len(table), CHUNK):
        rows = table.rows[first:first + CHUNK]
        area = rows["height"].astype(np.int64) * rows["width"]
        is_image = rows["num_frames"] == 1
        # Whether a clip is for training or validation depends only on its path, not on its row or the seed.
        is_held_out = (uniform(rows["key"], "validation") < config.holdout) != validation
        is_free = ~rows["repeated"] & ~is_held_out
        reasons = np.full(len(rows), LeftOut.TOO_SMALL)
        found = []
        for resolution in largest_first(config.buckets):
            lengths = config.buckets[resolution]
            longest = longest_fit(rows, lengths, config.frame_interval)
            is_large = area >= MIN_AREA * PIXELS[resolution]
            has_kind = np.where(is_image, 1 in lengths, max(lengths) > 1)
            missing = np.where(has_kind, LeftOut.TOO_SHORT, LeftOut.NO_BUCKET_OF_ITS_KIND)
            reason = np.where(longest > 0, LeftOut.KEEP_DRAW, missing)
            reasons = np.maximum(reasons, np.where(is_large, reason, LeftOut.TOO_SMALL))
            for num_frames, (keep, _) in lengths.items():
                fits = np.flatnonzero(is_free & is_large & (longest == num_frames))
                aspects = nearest_aspect(resolution, rows["height"][fits], rows["width"][fits])
                buckets = numbers[resolution, num_frames] + aspects
                found.append(Offer(f"{resolution} {num_frames}", keep, first + fits, buckets))
        reasons[is_held_out] = LeftOut.HELD_OUT
        reasons[rows["repeated"]] = LeftOut.REPEATED
        yield first, found, reasons


class Assignment(NamedTuple):
    """What became of the clips in an epoch."""
    buckets: np.ndarray     # int16 [N]: numbers in bucket_list, or NO_BUCKET
    reasons: np.ndarray     # uint8 [N]: LeftOut of those that have none


def assign(table, config, epoch, validation=False):
    """Returns the bucket that each clip trains in during an epoch, or why it has none.

    A clip goes to the largest resolution that it fills, there to the most frames that it has.  Such a bucket keeps it
    with a probability; where it does not, the clip moves on to the next smaller resolution."""
    buckets = np.full(len(table), NO_BUCKET, np.int16)
    reasons = np.zeros(len(table), np.uint8)
    for first, found, reason in offers(table, config, validation):
        reasons[first:first + len(reason)] = reason
        for offer in found:
            waits = buckets[offer.rows] == NO_BUCKET
            kept = waits & (uniform(config.seed, epoch, offer.rows, offer.name) < offer.keep)
            buckets[offer.rows[kept]] = offer.buckets[kept]
    return Assignment(buckets, reasons)


def reachable(table, config):
    """Returns {bucket number: all clips that it gets in some epoch, ascending}."""
    clips_of = defaultdict(list)
    for first, found, reason in offers(table, config, validation=False):
        waits = np.ones(len(reason), bool)
        for offer in found:
            if offer.keep == 0:
                continue
            here = waits[offer.rows - first]
            for number in np.unique(offer.buckets[here]).tolist():
                clips_of[number].append(offer.rows[here & (offer.buckets == number)])
            if offer.keep == 1:
                waits[offer.rows - first] = False           # it never gets to a smaller resolution
    return {number: np.concatenate(parts).astype(np.int32) for number, parts in sorted(clips_of.items())}


def bucket_table(table, config, assignment, validation=False):
    """Returns as text how many clips each resolution and length got, then how many have no bucket, and why."""
    kinds, starved = count_buckets(config, assignment.buckets)
    total_flop = sum(kind["flop"] for kind in kinds.values()) or 1
    lines = ["      bucket  aspects      clips  clips/GPU   batches  left over  tokens/GPU  compute"]
    for (resolution, num_frames), kind in kinds.items():
        clips_per_gpu = config.buckets[resolution][num_frames][1]
        tokens = kind["tokens"] / kind["clips"] * clips_per_gpu
        lines.append(f"{resolution:>6} x {num_frames:<3} {kind['aspects']:8} {kind['clips']:10} {clips_per_gpu:10} "
                     f"{kind['batches']:9} {kind['left over']:10} {tokens:11,.0f} {kind['flop'] / total_flop:8.1%}")
    num_assigned = np.count_nonzero(assignment.buckets != NO_BUCKET)
    lines.append(f"{num_assigned} of {len(table)} clips are in a bucket; a batch is clips/GPU * {config.world} clips "
                 "of one aspect ratio, and clips that are left over come first in the next epoch")
    if starved:
        lines.append(f"{starved} aspect ratios have fewer clips than a batch, which they get in later epochs")
    for reason in LeftOut:
        clips = np.flatnonzero((assignment.buckets == NO_BUCKET) & (assignment.reasons == reason))
        if len(clips):
            words = "not held out" if validation and reason == LeftOut.HELD_OUT else reason.words
            row = table.rows[clips[0]]
            lines.append(f"{len(clips)} left out: {words}, as {table.where(clips[0])}: {table.path(clips[0])} "
                         f"({row['num_frames']} frames, {row['height']}x{row['width']}, {row['fps']:g} fps)")
    return "\n".join(lines)


def count_buckets(config, buckets):
    """Returns {(resolution, frames): Counter of what it has} and how many buckets have less than a batch."""
    kinds = defaultdict(Counter)
    starved = 0
    numbered = bucket_list(config.buckets)
    numbers, counts = np.unique(buckets[buckets != NO_BUCKET], return_counts=True)
    for number, clips in zip(numbers.tolist(), counts.tolist()):    # Python's int: a million clips' FLOP need 80 bits
        bucket = numbered[number]
        size = global_batch_size(config, bucket)
        num_batches = clips // size
        tokens, flop = config.cost(bucket)
        kinds[bucket[:2]].update({
            "aspects": 1, "clips": clips, "batches": num_batches, "left over": clips - num_batches * size,
            "tokens": clips * tokens, "flop": num_batches * size * flop})
        starved += num_batches == 0
    return kinds, starved


def global_batch_size(config, bucket):
    """Returns the clips of a global batch: clips per GPU times the GPUs that the config counts on."""
    clips_per_gpu = config.buckets[bucket.resolution][bucket.num_frames][1]
    return clips_per_gpu * config.world


# ---------------------------------------------------------------- the sampler
MAX_TRIES = 20      # clips tried for one slot before training stops; where 5% cannot be read, one time in 1e26


class Plan(NamedTuple):
    """What one rank reads for one step."""
    step: int
    bucket: Bucket
    slots: list         # places in the global batch
    clips: np.ndarray   # int [slots MAX_TRIES]: each slot's clip, then those that take its place if it cannot be read


class Epoch(NamedTuple):
    """Batch i is of bucket buckets[i]; its clips are pools[buckets[i]][starts[i]:][:size]."""
    buckets: np.ndarray     # [batches]
    starts: np.ndarray      # [batches]
    pools: dict             # {bucket number: its clips in random order, int32}


class BucketSampler:
    """Which clips step n trains on: a pure function of (config.seed, n), whatever the ranks, workers or restarts.

    An epoch is all full global batches of all buckets, shuffled; no clip is in it twice.  Clips that fill no batch come
    first in the same bucket of the next epoch, so that buckets that are smaller than a batch train, too."""

    def __init__(self, table, config, validation=False):
        self.meta = table
        self.config = config
        self.validation = validation
        self.numbered = bucket_list(config.buckets)
        self.starts = [0]               # the first step of each epoch so far; keep draws make their lengths differ
        self.inherited = [(np.zeros(0, int), np.zeros(0, int))]     # for each epoch: clips left over, their buckets
        self.epoch = lru_cache(1)(self.make_epoch)
        if self.epoch(0).starts.size == 0:
            why = "no bucket has the clips of one batch" if self.epoch(0).pools else "no clip fits any bucket"
            raise ValueError(f"{why}:\n{self.table()}")

    def table(self):
        """Returns the table of epoch 0 as text."""
        assignment = assign(self.meta, self.config, 0, self.validation)
        return bucket_table(self.meta, self.config, assignment, self.validation)

    def make_epoch(self, number):
        """Returns an epoch; those before it must have been made, as it inherits what they have left over."""
        seed = self.config.seed
        inherited, their_buckets = self.inherited[number]
        buckets_of = assign(self.meta, self.config, number, self.validation).buckets
        buckets_of[inherited] = their_buckets               # whatever this epoch has drawn for them
        clips = np.flatnonzero(buckets_of != NO_BUCKET).astype(np.int32)
        order = hash_keys(seed, number, clips, "clips")
        order[np.isin(clips, inherited)] = 0                # first in their bucket
        clips = clips[np.lexsort((order, buckets_of[clips]))]
        numbers, firsts = np.unique(buckets_of[clips], return_index=True)
        pools = dict(zip(numbers.tolist(), np.split(clips, firsts[1:])))

        buckets = [np.zeros(0, int)]
        starts = [np.zeros(0, int)]
        left_over = [np.zeros(0, int)]
        for bucket, pool in pools.items():
            size = self.batch_size(self.numbered[bucket])
            num_batches = len(pool) // size
            buckets.append(np.full(num_batches, bucket))
            starts.append(np.arange(num_batches) * size)
            left_over.append(pool[num_batches * size:])
        buckets = np.concatenate(buckets)
        starts = np.concatenate(starts)
        left_over = np.concatenate(left_over)
        shuffled = np.argsort(hash_keys(seed, number, np.arange(len(starts)), "batches"))
        if number + 1 == len(self.starts):
            self.starts.append(self.starts[-1] + len(starts))
            self.inherited.append((left_over, buckets_of[left_over]))
        return Epoch(buckets[shuffled], starts[shuffled], pools)

    def batch_size(self, bucket):
        return global_batch_size(self.config, bucket)

    def plan(self, step, rank=0, world=1):
        """Returns what a data rank reads for a step: slots rank, rank + world, ... of the global batch."""
        while step >= self.starts[-1]:
            self.epoch(len(self.starts) - 1)
        number = bisect_right(self.starts, step) - 1
        epoch = self.epoch(number)
        batch = step - self.starts[number]
        bucket = self.numbered[epoch.buckets[batch]]
        pool = epoch.pools[int(epoch.buckets[batch])]
        size = self.batch_size(bucket)
        if size < world:
            raise ValueError(f"a global batch of {size} clips cannot feed {world} GPUs: make it larger")
        slots = np.arange(rank, size, world)
        tries = np.arange(1, MAX_TRIES)
        stand_ins = hash_keys(self.config.seed, step, slots[:, None], tries, "stand-in") % len(pool)
        clips = np.column_stack([pool[epoch.starts[batch] + slots], pool[stand_ins]])
        return Plan(step, bucket, slots.tolist(), clips)


# ---------------------------------------------------------------- reading a clip
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 2 ** 26    # of a frame, twice 8K: a header that says more is damaged, and its frame would take all memory
WHITE = 255             # transparent pixels are shown on white, as a browser shows them
SKIPPING = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")    # decoders that can leave out one frame and no other
NEW_START = 1.0         # seconds: where times step back by more, another recording begins


class UnreadableClip(ValueError):
    """A clip that cannot be used.  The message says which file and why."""


class Clip(NamedTuple):
    """A window of a clip."""
    frames: torch.Tensor    # uint8 [T H W 3], as a player shows them
    num_decoded: int        # frames that were decoded to get them
    fps: float | None       # of the file; None for an image


def read_window(path, num_frames=None, stride=1, start=None, generator=None):
    """Returns (uint8 [T H W 3], as a player shows it; how many frames were decoded for it).

    The frames are number start, start + stride, ... of the clip's frames at even times (`even_grid`).  start None:
    drawn with the generator, or without one the middle.  num_frames None: as many as there are.  Raises
    UnreadableClip."""
    clip = read_clip(path, num_frames, stride, start, generator)
    return clip.frames, clip.num_decoded


def read_clip(path, num_frames=None, stride=1, start=None, generator=None):
    """Returns the Clip of read_window's arguments."""
    path = str(path)
    if not os.path.isfile(path):
        what = "is a folder, expected a video or an image" if os.path.isdir(path) else "no such file"
        raise UnreadableClip(f"{path}: {what}")
    if path.lower().endswith(IMAGES):
        choose_frames(path, [0], num_frames, stride, start, generator)
        return Clip(torch.from_numpy(read_image(path))[None], 1, None)
    with opened(path, skip_frame="all") as stream:      # else opening decodes a frame, to learn what is not needed
        fps = float(stream.average_rate or stream.guessed_rate or 0) or None
        source = read_packets(path, stream)
        positions = choose_frames(path, source.times, num_frames, stride, start, generator)
        first = last_key_frame(source, positions[0])
        may_skip = stream.codec_context.name in SKIPPING and not source.in_order
        frames, num_decoded, problem = decode(path, stream, source, positions, first, may_skip)
    if problem and first > 0:           # that key frame may refer to frames before it
        frames, num_decoded, problem = decode_from_start(path, positions)
    if problem == STEPS_BACK:
        frames, num_decoded, problem = decode_from_start(path, positions, in_order=True)
    if problem:
        raise UnreadableClip(f"{path}: {problem}")
    if len({frame.shape for frame in frames}) > 1:
        raise UnreadableClip(f"{path}: has frames of several sizes")
    return Clip(torch.from_numpy(np.stack(frames)), num_decoded, fps)


@contextmanager
def opened(path, **options):
    """Opens a video and gives its stream, decoded by one thread, since the reading processes are the parallelism.

    Whatever the libraries raise in here is about the file and becomes an UnreadableClip.  options: FFmpeg's, for
    opening.  stream.container stays open as long as this context is."""
    limit = {"max_pixels": str(MAX_PIXELS)}
    try:
        # The path is made absolute because FFmpeg takes "Trip: day 1.mp4" for a protocol.
        with av.open(os.path.abspath(path), options=limit | options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise UnreadableClip(f"{path}: has no video stream of a known codec")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise UnreadableClip(f"{path}: has no video, only a cover picture")
            stream.codec_context.options = limit
            stream.codec_context.thread_count = 1
            yield stream
    except (UnreadableClip, MemoryError):
        raise
    except Exception as error:          # damaged files raise more than FFmpegError: IndexError, ZeroDivisionError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableClip(f"{path}: {reason}") from error


class Source(NamedTuple):
    """The packets of a video in the order of decoding, and its frames in the order in which they are shown."""
    packets: list
    times: list         # of each frame, ascending, in the stream's time base
    in_order: bool      # frames are known by the order in which the decoder gives them, not by their times


def read_packets(path, stream, in_order=False):
    """Returns the Source of an opened file."""
    packets = [packet for packet in stream.container.demux(stream) if packet.size]
    packets = cut_at_new_start(path, stream, packets)
    expected = len(stream.index_entries) if "mp4" in stream.container.format.name else 0    # by its header
    if len(packets) < expected or any(packet.is_corrupt for packet in packets):
        raise UnreadableClip(f"{path}: is cut off or has missing packets, {len(packets)} of {expected or '?'} frames")
    shown = [packet.pts for packet in packets if not packet.is_discard]
    if None in shown:
        return Source(packets, list(range(len(packets))), True)
    # An .avi holds no times of frames.  With B-frames, which are decoded in another order than they are shown, those
    # that FFmpeg works out may be wrong: for H.264, and where a packet holds two frames, as DivX packs them.
    guessed = "avi" in stream.container.format.name and stream.codec_context.has_b_frames
    return Source(packets, sorted(set(shown)), in_order or guessed)


def cut_at_new_start(path, stream, packets):
    """Returns the packets before the first whose time is more than NEW_START before another's, and reports the rest."""
    latest = None
    for i, packet in enumerate(packets):
        time_ = packet.pts if packet.dts is None else packet.dts
        if time_ is None:
            continue
        if latest is not None and (latest - time_) * stream.time_base > NEW_START:
            damaged = [number for number, before in enumerate(packets[:i]) if before.is_corrupt]
            end = min(damaged, default=i)           # where one recording was cut off, its last packets are damaged
            report(f"{path}: times start again; of {len(packets)} frames only the {end} before the damage are used")
            return packets[:end]
        latest = time_ if latest is None else max(latest, time_)
    return packets


REPORTED = set()


def report(message):
    """Prints what is worth knowing of a clip that is used all the same, once in each process."""
    if message not in REPORTED:
        REPORTED.add(message)
        print(message, file=sys.stderr)


def choose_frames(path, times, num_frames, stride, start, generator):
    """Returns which of a clip's frames a window shows, ascending; raises UnreadableClip if there are too few."""
    if num_frames is None:
        num_frames = max(1, math.ceil((len(times) - (start or 0)) / stride))
    span = (num_frames - 1) * stride
    if start is None:
        num_starts = max(1, len(times) - span)
        start = (num_starts - 1) // 2
        if generator is not None:
            start = int(torch.randint(num_starts, (), generator=generator))
    if start + span >= len(times):
        raise UnreadableClip(f"{path}: has {len(times)} frames, expected {num_frames} at stride {stride} from {start}")
    return even_grid(np.array(times))[start::stride][:num_frames].tolist()


def even_grid(times):
    """Returns for n moments, spread evenly from the first frame to the last, the frame nearest in time: int [n].

    A constant rate gives each frame once, even if up to three frames are missing, as at the end of a stream copy: a
    grid that spread this gap over the clip would leave out frames elsewhere and show the last one twice."""
    n = len(times)
    if n == 1:
        return np.zeros(1, int)
    since = times[1:] - times[0]
    gaps = np.diff(times)
    ticks = np.rint(gaps / np.median(gaps)).cumsum()    # if the rate is constant, the tick of each frame but the first
    interval = since[-1] / ticks[-1]                    # more exact than the median, as containers round times
    if ticks[-1] <= n - 1 + 3 and (np.abs(since - ticks * interval) <= interval / 2).all():
        return np.arange(n)
    halfway = since - gaps / 2                          # between a frame and the one before
    return np.searchsorted(halfway, np.linspace(0, since[-1], n))


def last_key_frame(source, position):
    """Returns the number of the packet from which a frame can be decoded: the last key frame that is not after it."""
    has_palette = source.packets[0].has_sidedata("palette")     # which comes with the first packet only
    if source.in_order or has_palette:
        return 0
    time_ = source.times[position]
    keys = [i for i, packet in enumerate(source.packets) if packet.is_keyframe and packet.pts <= time_]
    return max(keys, default=0)


STEPS_BACK = "the times of its frames step back"


def decode(path, stream, source, positions, first, may_skip):
    """Decodes from packet `first` on; returns (the frames at `positions`, uint8 [H W 3] each; how many frames the
    decoder gave; what is wrong, or None).  may_skip: leave out frames that are not wanted and that no other refers to,
    which saves a quarter of the time."""
    wanted = set(positions)
    position_of = {time_: position for position, time_ in enumerate(source.times)}
    last = len(source.packets) - 1
    if not source.in_order:
        last = max(i for i, packet in enumerate(source.packets) if position_of.get(packet.pts) in wanted)
    reformatter = VideoReformatter()        # kept, as it remembers how to convert one size and format
    pictures = {}
    times = []
    num_damaged = 0
    for packet in [*source.packets[first:last + 1], None]:      # None: the decoder gives what it holds back
        if may_skip and packet:
            is_wanted = position_of.get(packet.pts) in wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        for frame in stream.codec_context.decode(packet):
            position = len(times) if source.in_order else position_of.get(frame.pts)
            times.append(frame.pts)
            num_damaged += frame.is_corrupt
            if position in wanted:
                pictures[position] = to_picture(path, frame, stream, reformatter)
    if num_damaged:
        return None, len(times), f"{num_damaged} of the {len(times)} frames that were decoded are damaged"
    if not source.in_order and times != sorted(times):
        return None, len(times), STEPS_BACK
    if len(pictures) < len(wanted):
        return None, len(times), f"has damaged frames, {len(times)} of {len(source.packets)} were decoded"
    return [pictures[position] for position in positions], len(times), None


def decode_from_start(path, positions, in_order=False):
    """Opens a file again and returns what decode does from its first packet on."""
    with opened(path) as stream:
        return decode(path, stream, read_packets(path, stream, in_order), positions, 0, may_skip=False)


def to_picture(path, frame, stream, reformatter):
    """Returns a decoded frame as a player shows it, uint8 [H W 3]: with square pixels, upright, nothing transparent."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    width = displayed_width(path, frame, stream)
    picture = reformatter.reformat(frame, width, frame.height, "rgba" if has_alpha else "rgb24", threads=1)
    picture = picture.to_ndarray()
    if has_alpha:
        alpha = picture[..., 3:] / 255
        picture = (picture[..., :3] * alpha + WHITE * (1 - alpha) + 0.5).astype(np.uint8)
    transposed, down, right = orientation(frame)
    if transposed:
        picture = picture.transpose(1, 0, 2)
    return picture[::down, ::right]


def displayed_width(path, frame, stream):
    """Returns the width that a frame has with square pixels, before it is turned."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1    # MPEG-TS has the second
    width = round(frame.width * aspect)
    if not 0 < width * frame.height <= MAX_PIXELS:
        raise UnreadableClip(f"{path}: its pixels are {aspect} times as wide as high")
    return width


def orientation(frame):
    """Returns (transposed, down, right): whether rows and columns change places, then -1 where an axis is reversed.

    The display matrix sends the pixel (x, y) to (a x + c y, b x + d y).  a d - b c < 0 is a mirrored picture."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d, _, _, _, _ = struct.unpack("<9i", bytes(matrix))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, (-1 if d < 0 else 1), (-1 if a < 0 else 1)
    return True, (-1 if b < 0 else 1), (-1 if c < 0 else 1)


def length_and_rate(path):
    """Returns (the number of frames that read_window counts; frames per second, if known) of a clip."""
    path = str(path)
    fps = read_clip(path, 1, start=0).fps                       # raises if it cannot be read
    if path.lower().endswith(IMAGES):
        return 1, None
    with opened(path) as stream:
        return len(read_packets(path, stream).times), fps


def read_image(path):
    """Returns an image as a viewer shows it, uint8 [H W 3]: turned as its EXIF entry says, on white if transparent."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                report(f"{path}: is animated, and only its first frame is used; as a video it would give all")
            if image.mode.startswith("I;16"):                   # Pillow would cut 16 bits off at white, not scale them
                image = image.point(lambda level: level / 256, "L")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:          # Pillow raises seven types for damaged files, SyntaxError and struct.error too
        raise UnreadableClip(f"{path}: {str(error) or type(error).__name__}") from error


def resize_crop(video, height, width):
    """Returns uint8 [T H W 3] as uint8 [T height width 3]: scaled until it covers that, with the middle cut out."""
    _, H, W, _ = video.shape
    scale = max(height / H, width / W)
    size = max(height, round(H * scale)), max(width, round(W * scale))
    if size != (H, W):                  # in uint8: a seventeenth of float's time, and one level off at most
        x = rearrange(video, "t h w c -> t c h w")
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        video = rearrange(x, "t c h w -> t h w c")
    top = (size[0] - height) // 2
    left = (size[1] - width) // 2
    return video[:, top:top + height, left:left + width].contiguous()


def to_video(frames):
    """Returns uint8, or float in 0..255, [... T H W 3] as float [... 3 T H W] in -1..1."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "... t h w c -> ... c t h w").contiguous()


def to_uint8(video):
    """Returns [3 T H W] in -1..1 as uint8 [T H W 3], numpy."""
    levels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return rearrange(levels, "c t h w -> t h w c").cpu().numpy()


# ---------------------------------------------------------------- batches
class ClipDataset:
    """Reads clips from their files; vae.CachedClips does the same from a cache.

    A clip's window is drawn again for each use, or is one of config.windows that are fixed for the clip; for validation
    it is the middle one."""

    def __init__(self, meta, config, validation=False):
        self.meta = meta
        self.config = config
        self.validation = validation

    def read(self, clip, bucket, step, slot):
        """Returns {"video": uint8 [T H W 3], "text", "fps", "decoded": frames that took}; raises UnreadableClip."""
        if self.validation:
            generator = None
        elif self.config.windows:
            window = window_number(self.config, bucket, step, slot)
            generator = window_generator(self.meta["key"][clip], window)
        else:
            generator = slot_generator(self.config.seed, step, slot, "window")
        path = self.meta.path(clip)
        window = read_clip(path, bucket.num_frames, self.config.frame_interval, None, generator)
        _, height, width, _ = window.frames.shape
        fps = check_row(path, self.meta.rows[clip], height, width, window.fps, bucket)
        return {"video": resize_crop(window.frames, bucket.height, bucket.width), "text": self.meta.text(clip),
                "fps": fps, "decoded": window.num_decoded}


def check_row(path, row, height, width, file_fps, bucket):
    """Returns the frame rate of a clip.  Where meta.csv differs from the file, the file is right; that is reported.

    height, width, file_fps: of the file, which may not say a rate (None or 0).  Raises UnreadableClip."""
    if (height, width) != (row["height"], row["width"]):
        report(f"{path}: is {height}x{width}, not {row['height']}x{row['width']} as meta.csv has it")
        if height * width < MIN_AREA * PIXELS[bucket.resolution]:
            raise UnreadableClip(f"{path}: is {height}x{width}, too small for {bucket.resolution}; meta.csv has "
                                 f"{row['height']}x{row['width']}")
    fps = float(row["fps"])
    if bucket.num_frames > 1 and file_fps and abs(file_fps / fps - 1) > 0.05:
        report(f"{path}: has {file_fps:g} frames a second, not {fps:g} as meta.csv has it")
        fps = file_fps
    return fps


def window_number(config, bucket, step, slot):
    """Returns which of a clip's fixed windows a slot takes; an image has one."""
    if bucket.num_frames == 1:
        return 0
    return int(hash_keys(config.seed, step, slot, "window")[0] % config.windows)


def window_generator(key, window):
    """Returns the random stream that places a fixed window; key: the table's, a hash of the clip's path."""
    return slot_generator(0, key, window, "fixed window")


def conditioning(config, bucket, fps):
    """Returns what the network is conditioned on besides the caption, {name: fp32 [B]}; fps: of the files, [B].

    ar is width / height, as Open-Sora trains (its samplers give the inverse).  fps is the rate after
    frame_interval, or with as_released that of the file, as Open-Sora trains."""
    fps = np.array(fps, np.float32)
    if bucket.num_frames > 1 and not config.model.as_released:
        fps = fps / config.frame_interval
    values = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames,
              "ar": bucket.width / bucket.height, "fps": fps}
    return {name: np.full(len(fps), value, np.float32) for name, value in values.items()}


class Fault(NamedTuple):
    """A clip that could not be read: a line of bad_clips.csv."""
    step: int
    slot: int
    attempt: int        # 0 for the slot's own clip, then its stand-ins
    path: str
    reason: str


def read_batch(dataset, plan, known, note=lambda path: None):
    """Returns the batch of a plan, a dict of numpy arrays and lists.  A clip that cannot be read is replaced.

    known {(step, slot, attempt): reason} are faults of an earlier start, which are not tried again.  note(path) is
    called before a clip is opened."""
    items = []
    faults = []
    for slot, candidates in zip(plan.slots, plan.clips):
        for attempt, clip in enumerate(candidates):
            path = dataset.meta.path(clip)
            try:
                if (plan.step, slot, attempt) in known:
                    raise UnreadableClip(known[plan.step, slot, attempt])
                note(path)
                items.append(dataset.read(clip, plan.bucket, plan.step, slot))
                break
            except UnreadableClip as error:
                faults.append(Fault(plan.step, slot, attempt, path, str(error)))
        else:
            reasons = "\n  ".join(fault.reason for fault in faults)
            raise ValueError(f"step {plan.step}: none of {MAX_TRIES} clips drawn from {tuple(plan.bucket)} can be "
                             f"read:\n  {reasons}")
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = torch.stack(values).numpy() if torch.is_tensor(values[0]) else values
    batch |= conditioning(dataset.config, plan.bucket, batch["fps"])
    return batch | {"decoded": sum(batch["decoded"]), "slots": np.array(plan.slots), "bucket": plan.bucket,
                    "faults": faults}


MAX_DEATHS = 3      # reading processes that may die or hang in a run


def batches(sampler, dataset, first, last, rank=0, world=1, known=None):
    """Yields this data rank's batches of steps first .. last - 1, read ahead by config.num_workers processes.

    "waited" in a batch: the seconds until it had come.  known: as for read_batch.  A reading process that dies or hangs
    is reported with the clips that were being read, and reading starts again at the same step, as plans depend on
    nothing but the step; after MAX_DEATHS of them it is an error."""
    known = dict(known or {})
    step = first
    deaths = 0
    while step < last:
        plans = (sampler.plan(number, rank, world) for number in range(step, last))
        start = time.perf_counter()
        try:
            for batch in read_ahead(dataset, plans, known):
                batch = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                         for name, value in batch.items()}
                yield batch | {"waited": time.perf_counter() - start}
                step += 1
                start = time.perf_counter()
        except ReaderDied as error:
            deaths += 1
            message = f"step {step}: a reading process {error}"
            if deaths > MAX_DEATHS:
                raise ValueError(f"{message}; {deaths} have failed: fix or remove these clips") from None
            print(f"\n{message}; reading starts again", file=sys.stderr)


class ReaderDied(Exception):
    """A process of read_ahead died or hung.  The message says which clips were being read."""


def read_ahead(dataset, plans, known):
    """Yields the batches of plans in their order, each read by one of config.num_workers processes.

    Each process has two plans at a time, so it never waits for one.  Batches come as numpy through a pipe: torch's
    tensors would go through shared memory, of which a container has 64 MB."""
    num_workers = dataset.config.num_workers
    if not num_workers:
        for plan in plans:
            yield read_batch(dataset, plan, known)
        return
    processes = set()
    with tempfile.TemporaryDirectory() as journal:
        pool = ProcessPoolExecutor(num_workers, initializer=start_reader, initargs=(dataset, known, journal))
        ahead = deque()
        try:
            for plan in plans:
                others = set(multiprocessing.active_children())
                try:
                    ahead.append(pool.submit(read_plan, plan))      # which starts processes
                except BrokenExecutor:                              # one died while the step before was trained
                    raise reader_died("died", journal) from None
                processes |= set(multiprocessing.active_children()) - others
                if len(ahead) == 2 * num_workers:
                    yield batch_of(ahead.popleft(), dataset.config.read_timeout, journal)
            while ahead:
                yield batch_of(ahead.popleft(), dataset.config.read_timeout, journal)
        finally:
            for process in processes:
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def batch_of(future, timeout, journal):
    """Waits for a batch and returns it; raises what its process raised, or ReaderDied."""
    try:
        error = future.exception(timeout)
        problem = "died" if isinstance(error, BrokenExecutor) else None
    except TimeoutError:
        problem = "hung"
    if problem:
        raise reader_died(problem, journal)
    return future.result()


def reader_died(problem, journal):
    """Returns a ReaderDied that names the clips which stand in the files of the reading processes."""
    clips = ", ".join(file.read_text("utf-8") for file in Path(journal).glob("*"))
    return ReaderDied(f"{problem} while these were being read: {clips or 'none'}")


READER = {}         # of a reading process: what start_reader was given


def start_reader(dataset, known, journal):
    """Prepares a reading process.

    It outlives a Ctrl-C or a scheduler's SIGTERM to the whole job, so that its parent can finish the step; but it ends
    with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    READER.update(dataset=dataset, known=known, journal=journal)


def end_with_parent():
    """Ends this process when its parent is gone: a killed one does not say so."""
    multiprocessing.parent_process().join()
    os._exit(1)


def read_plan(plan):
    """Reads a batch in a reading process."""
    return read_batch(READER["dataset"], plan, READER["known"], note_clip)


def note_clip(path):
    """Writes into a file of this reading process what it is about to open."""
    Path(READER["journal"], str(os.getpid())).write_text(path, "utf-8")


class BadClips:
    """Keeps <run>/bad_clips.csv, a line for each Fault.

    known: what the file held at the start, so that a resumed run replaces the same clips."""

    def __init__(self, path, max_share, writes=True):
        self.path = Path(path)
        self.max_share = max_share
        self.writes = writes
        self.tried = 0
        self.faults = 0
        content = self.path.read_bytes() if self.path.is_file() else b""
        lines = content[:content.rfind(b"\n") + 1]      # without the half line that a killed run may have left
        if writes and lines != content:
            os.truncate(self.path, len(lines))
        self.known = {}
        for row in csv.DictReader(io.StringIO(lines.decode(), newline="")):
            self.known[int(row["step"]), int(row["slot"]), int(row["attempt"])] = row["reason"]

    def add(self, faults, num_clips):
        """Adds the faults of all ranks since the last call, when num_clips were read.

        Raises ValueError if there are too many."""
        self.faults += len(faults)
        self.tried += num_clips + len(faults)
        new = [fault for fault in sorted(faults) if fault[:3] not in self.known]
        for fault in new:
            self.known[fault[:3]] = fault.reason
        if new and self.writes:
            print(f"{self.faults} of {self.tried} clips could not be read, see {self.path}: {new[-1].reason}",
                  file=sys.stderr)
            self.write(new)
        # Of fewer than 200 (hand-tuned) a handful of bad ones says nothing about the rest.
        if self.tried >= 200 and self.faults > self.max_share * self.tried:
            raise ValueError(f"{self.faults} of {self.tried} clips could not be read, more than max_bad="
                             f"{self.max_share:g} of them: fix or drop those in {self.path}, or raise max_bad")

    def write(self, faults):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, lineterminator="\n")
            if not f.tell():
                writer.writerow(Fault._fields)
            for fault in faults:
                writer.writerow([*fault[:4], " ".join(fault.reason.split())])


# ---------------------------------------------------------------- writing
def write_video(path, frames, fps=24):
    """Writes frames uint8 [T H W 3] as .mp4 (H.264), .gif, .png (a contact sheet), or for a name without suffix as a
    folder of 00000.png, 00001.png, ...  Writes under a temporary name first, so a crash never leaves half a file."""
    path = Path(path)
    frames = np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be uint8 [T H W 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    check_no_other_files(path)
    if path.suffix not in (".mp4", ".gif", ".png", ""):
        raise ValueError(f"{path}: video is written as .mp4, .gif, .png (a contact sheet) or, without a suffix, as a "
                         f"folder of frames, not as {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".png":
        Image.fromarray(contact_sheet(frames)).save(part)
    elif path.suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in enlarge(frames, 256)]
        first.save(part, save_all=True, append_images=rest, duration=min(655350, round(1000 / fps)), loop=0)
    elif path.suffix == ".mp4":
        write_mp4(part, frames, fps)
    else:
        for folder in (part, path):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(part / f"{i:05d}.png")
    part.replace(path)


def check_no_other_files(path):
    """Raises ValueError if a path is a folder with files that are no frames of a video: writing would remove them."""
    for file in path.glob("*") if path.is_dir() else ():
        if not file.stem.isdecimal():
            raise ValueError(f"{path} is a folder with other files, such as {file.name}: choose a new name")


def write_mp4(path, frames, fps, pix_fmt="yuv420p"):
    """Writes frames uint8 [T H W 3] as H.264, which needs even sides: an odd one gets its last row or column twice.

    pix_fmt: "yuv420p" halves the resolution of colour and plays everywhere; "yuv444p" keeps it."""
    _, H, W, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), "edge")
    # crf 12 (hand-tuned): the model is to be judged, not the codec.  Without x264's macroblock tree, which gives other
    # bytes from run to run on frames of a few blocks.
    options = {"crf": "12", "preset": "fast", "x264-params": "mbtree=0"}
    with av.open(os.path.abspath(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = pix_fmt
        for frame in tqdm(frames, f"writing {path.name}", unit="frame", leave=False, disable=len(frames) < 200):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())


def enlarge(frames, side):
    """Returns uint8 [T H W 3], scaled up smoothly by the largest whole number that leaves the short side <= `side`."""
    factor = side // min(frames.shape[1:3])
    if factor < 2:
        return frames
    x = rearrange(torch.as_tensor(frames), "t h w c -> t c h w")
    x = F.interpolate(x, scale_factor=factor, mode="bicubic")
    return rearrange(x, "t c h w -> t h w c").numpy()


def contact_sheet(frames, per_row=8):
    """Returns one picture [H' W' 3] of uint8 [T H W 3]: frames in reading order, a white rule of 2 pixels after each.

    Small frames are enlarged.  A single frame has no rule, since it may be given to sample.py."""
    frames = enlarge(frames, 128)
    if len(frames) == 1:
        return frames[0]
    missing = -len(frames) % per_row if len(frames) > per_row else 0        # in the last row: white
    frames = np.pad(frames, ((0, missing), (0, 2), (0, 2), (0, 0)), constant_values=255)
    return rearrange(frames, "(r c) h w ch -> (r h) (c w) ch", c=min(per_row, len(frames)))


# ---------------------------------------------------------------- what all scripts share
@contextmanager
def atomic_write(path):
    """Yields a path to write to; then syncs it and renames it to `path`, so that a crash never leaves half a file."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def positive_int(text):
    """Returns the value of a flag that is a count; argparse reports the error."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


@contextmanager
def one_line_errors(debug=False, stopped=""):
    """Ends a script with one line and status 2 for an error that its user can fix, or with debug with the traceback;
    for Ctrl-C with status 130 and "stopped".  stopped: how to resume, appended to that."""
    rank = int(os.environ.get("RANK", 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError) as error:
        if debug:
            raise
        error.__traceback__ = None      # it holds what was being done: a reader of clips, say, which ends now
        if rank:
            time.sleep(10)      # mostly all ranks fail alike: rank 0 says so, and torchrun ends the others
        message = f"error: rank {rank}: {error}" if rank else f"error: {error}"
        print(message, file=sys.stderr)
        report_to_torchrun(message)
        sys.exit(2)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second one shows no traceback of the end
        if not rank:
            print(f"\nstopped{stopped}", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def report_to_torchrun(message):
    """Lets torchrun end its own report, which follows, with our message in place of a link."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}), encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python data.py META CONFIG [--field=value ...]", allow_abbrev=False)
    parser.add_argument("meta", metavar="META", help="a meta.csv, or a glob")
    parser.add_argument("config", metavar="CONFIG", help="configs/stage1.py, say; --field=value overrides its fields")
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    args, overrides = parser.parse_known_args(argv)
    with one_line_errors(args.debug):
        import configs
        config = configs.load(args.config, overrides)
        print(BucketSampler(read_meta(args.meta), config).table())


if __name__ == "__main__":
    main()
