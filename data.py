"""From meta.csv to batches: buckets, the sampler, decoding, the cache, writing video; and the shapes world.

in    meta.csv with columns path,text,num_frames,height,width,fps and the files it names (mp4, mov, webm, png, jpg ...)
out   per step a dict: video [B 3 T H W] in -1..1, text, and height, width, num_frames, fps, ar [B] as the network
      is told; from a cache that vae.py wrote, latents and embeddings in place of video and text

    python data.py shapes data/shapes                 renders clips of moving shapes: *.mp4, *.png and meta.csv
    python data.py meta.csv configs/stage1.py         prints which clips train in which bucket, and why others do not

In an epoch a clip belongs to at most one bucket (resolution, frames, aspect ratio); a global batch is drawn from one.
Which clips step n sees is a pure function of (seed, n); so are each clip's window and, by slot_generator, its noise,
t and mask.  Sizes and the bucket rule are those of Open-Sora 1.1 (arXiv 2412.20404).
"""
import argparse
import csv
import glob
import math
import sys
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageOps
from safetensors.torch import load_file
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
    """resolution -> ratio -> (height, width).  Of two ratios equally near, the first listed is taken."""
    def size(text):
        return tuple(map(int, text.split("x")))
    (_, *levels), *rows = (line.split() for line in WIDE.strip().splitlines())
    tables = {level: {row[0]: size(row[i]) for row in rows} for i, level in enumerate(levels, start=1)}
    tables["4k"] = dict(sorted(tables["4k"].items(), key=lambda item: 0.55 if item[0] == "0.62" else float(item[0])))
    for level, scale in (("256", 1), ("512", 2), ("1024", 4)):
        tables[level] = {str(round(h / w, 2)): (scale * h, scale * w) for h, w in map(size, SQUARE.split())}
    return tables | {"32": {"1.00": (32, 32), "0.67": (32, 48)}}  # "32": the shapes world


ASPECT = aspect_tables()
PIXELS = {level: int(np.prod(t["0.56"] if "0.56" in t else t.get("1.0", (32, 32)))) for level, t in ASPECT.items()}


class Bucket(NamedTuple):
    """What the clips of one batch share."""
    resolution: str
    num_frames: int
    ar: str  # key of ASPECT[resolution]

    @property
    def height(self) -> int:
        return ASPECT[self.resolution][self.ar][0]

    @property
    def width(self) -> int:
        return ASPECT[self.resolution][self.ar][1]


# ---- meta.csv ----

COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
IMAGE_FPS = 120.0  # what the network is told for an image (upstream's IMG_FPS)


@dataclass(frozen=True)
class Meta:
    """The rows of meta.csv, one array per column.  An image has num_frames 1."""
    paths: list[str]
    texts: list[str]
    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


def read_meta(pattern: str) -> Meta:
    """Reads meta.csv, or all files of a glob.  A path in it counts from the file's own folder."""
    files = sorted(glob.glob(pattern)) or [pattern]
    paths, texts, numbers, seen = [], [], [], {}
    for file in files:
        for where, row in read_rows(file):
            path = str(Path(file).parent / row["path"])
            if path in seen:
                raise ValueError(f"{where}: path {row['path']!r} is also in {seen[path]}, expected each clip once")
            seen[path] = where
            paths.append(path)
            texts.append(row["text"] or "")
            numbers.append([read_number(row, column, where) for column in COLUMNS[2:]])
    if not paths:
        raise ValueError(f"{pattern} has no rows, expected one per clip - `python data.py shapes DIR` makes an example")
    num_frames, height, width, fps = np.array(numbers).T
    return Meta(paths, texts, num_frames.astype(np.int64), height.astype(np.int64), width.astype(np.int64), fps)


def read_rows(file: str):
    """Yields ("meta.csv row 2", {column: text}); the header is row 1, as a spreadsheet counts."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file} - `python data.py shapes DIR` makes one for an example set of clips")
    with open(file, newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} lacks column {', '.join(missing)}: expected {','.join(COLUMNS)}, got "
                             f"{','.join(rows.fieldnames or ()) or 'nothing'} - `python data.py shapes DIR` makes one")
        yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, start=2))


def read_number(row: dict, column: str, where: str) -> float:
    if column == "fps" and row["num_frames"] in ("1", "1.0"):
        return IMAGE_FPS  # an image's own fps is empty or nan
    try:
        value = float(row[column] or "nan")
    except ValueError:
        value = float("nan")
    if not 0 < value < 1e9 or (column != "fps" and value % 1):
        kind = "number" if column == "fps" else "whole number"
        raise ValueError(f"{where}: {column}={row[column]!r}, expected a {kind} above 0 - correct or drop the row")
    return value


# ---- chance: every draw is a hash of what it is for, so any rank, worker or resumed run draws the same ----

def mix(*keys) -> np.ndarray:
    """uint64 hash of integers or integer arrays, broadcast: splitmix64's finaliser (Steele et al. 2014) per key."""
    h = np.zeros(1, np.uint64)
    for key in keys:
        h = (h ^ np.asarray(key).astype(np.uint64)) + 0x9E3779B97F4A7C15
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB
        h = h ^ (h >> 31)
    return h


def name_key(name: str) -> int:
    return zlib.crc32(name.encode())


def uniform(*keys) -> np.ndarray:
    return (mix(*keys) >> 11) * 2.0**-53  # 53 bits in [0, 1)


def slot_generator(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """The random stream of one sample of one step for one purpose ("window", "noise", ...)."""
    return torch.Generator().manual_seed(int(mix(seed, step, slot, name_key(purpose))[0] >> 1))


# ---- buckets ----

REASONS = ("too small", "no bucket of its kind", "too short", "keep draw")  # why a clip is left out, least far first
KEPT = -1


def bucket_list(buckets: dict) -> list[Bucket]:
    """All buckets of a config's table, largest resolution first; their order numbers them."""
    levels = sorted(buckets, key=PIXELS.get, reverse=True)
    return [Bucket(level, t, ar) for level in levels for t in sorted(buckets[level]) for ar in ASPECT[level]]


def nearest_aspect(level: str, height, width) -> np.ndarray:
    """Index of the nearest key of ASPECT[level], for arrays of heights and widths."""
    ratios = np.array([float(key) for key in ASPECT[level]])
    return np.abs(ratios - (np.asarray(height) / np.asarray(width))[..., None]).argmin(-1)


def assign(meta: Meta, buckets: dict, frame_interval: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Each clip's number in bucket_list(buckets), or -1, and the index of its REASONS, or KEPT.

    Open-Sora 1.1's rule: from the largest resolution down, a clip needs 0.8 of its pixels; of its frame counts only the
    largest that the clip fills (images: 1) is tried; a clip that loses the keep draw goes on to the next resolution.
    Ours: num_frames * frame_interval frames are enough (upstream wants one more), and the draws are hashes.
    """
    number = {}
    for i, bucket in enumerate(bucket_list(buckets)):
        number.setdefault(bucket[:2], i)
    found = np.full(len(meta), -1)
    reason = np.zeros(len(meta), np.int8)
    for level in sorted(buckets, key=PIXELS.get, reverse=True):
        rows = np.flatnonzero((found < 0) & (meta.height * meta.width >= 0.8 * PIXELS[level]))
        is_image = meta.num_frames[rows] == 1
        has_kind = np.where(is_image, 1 in buckets[level], max(buckets[level]) > 1)
        length = np.zeros(len(rows), int)
        for t in sorted(buckets[level]):  # ascending: the largest that fits stays
            length[is_image if t == 1 else ~is_image & (meta.num_frames[rows] >= t * frame_interval)] = t
        reason[rows] = np.maximum(reason[rows], np.where(length > 0, 3, np.where(has_kind, 2, 1)))
        for t, (keep, _) in buckets[level].items():
            kept = rows[length == t]
            kept = kept[uniform(seed, epoch, kept, name_key(f"{level} {t}")) < keep]
            found[kept] = number[level, t] + nearest_aspect(level, meta.height[kept], meta.width[kept])
            reason[kept] = KEPT
    return found, reason


def bucket_table(meta: Meta, buckets: dict, world: int, found: np.ndarray, reason: np.ndarray) -> str:
    """What `assign` made of the clips: a line per resolution and length, then what is left out, and why."""
    rows, starved, numbered = {}, 0, bucket_list(buckets)
    for number, clips in zip(*np.unique(found[found >= 0], return_counts=True)):
        size = buckets[numbered[number].resolution][numbered[number].num_frames][1] * world
        row = rows.setdefault(numbered[number][:2], np.zeros(4, int))
        row += 1, clips, clips // size, clips % size
        starved += clips < size
    lines = ["      bucket  aspects    clips  clips/GPU  batches  left over"]
    for (level, t), (aspects, clips, count, rest) in rows.items():
        lines.append(f"{level:>6} x {t:<3} {aspects:8} {clips:8} {buckets[level][t][1]:10} {count:8} {rest:10}")
    lines.append(f"{(found >= 0).sum()} of {len(meta)} clips are in a bucket; batch = clips/GPU * {world} of an aspect")
    if starved:
        lines.append(f"{starved} aspects have fewer clips than one batch: these clips are never trained on")
    for i, name in enumerate(REASONS):
        dropped = np.flatnonzero(reason == i)
        if len(dropped):
            first = dropped[0]
            lines.append(f"{len(dropped)} left out: {name}, as {meta.paths[first]} ({meta.num_frames[first]} frames, "
                         f"{meta.height[first]}x{meta.width[first]})")
    return "\n".join(lines)


class BucketSampler:
    """Which clips step n trains on: a pure function of (seed, n), whatever the ranks, workers or restarts.

    An epoch is all full global batches (clips per GPU * world) of all buckets, shuffled; no clip is in it twice.
    """
    def __init__(self, meta: Meta, buckets: dict, frame_interval: int = 1, world: int = 1, seed: int = 0):
        self.meta, self.buckets, self.frame_interval, self.world, self.seed = meta, buckets, frame_interval, world, seed
        self.numbered = bucket_list(buckets)
        self.starts = [0]  # first step of each epoch so far; epochs differ in length, their keep draws differ
        self.cached = None, None
        self.epoch(0)  # fails now rather than in a worker

    def table(self, epoch: int = 0) -> str:
        found, reason = assign(self.meta, self.buckets, self.frame_interval, self.seed, epoch)
        return bucket_table(self.meta, self.buckets, self.world, found, reason)

    def epoch(self, epoch: int) -> tuple[list[tuple[int, np.ndarray]], dict[int, np.ndarray]]:
        """Its batches [(bucket number, clip ids)], and all clip ids of each bucket."""
        if self.cached[0] == epoch:
            return self.cached[1]
        found, _ = assign(self.meta, self.buckets, self.frame_interval, self.seed, epoch)
        order = np.lexsort((mix(self.seed, epoch, np.arange(len(found)), name_key("clips")), found))
        order = order[found[order] >= 0]  # by bucket, shuffled within each
        parts = np.split(order, np.flatnonzero(np.diff(found[order])) + 1)
        pools = {int(found[ids[0]]): ids for ids in parts if len(ids)}
        batches = []
        for number, ids in pools.items():
            size = self.batch_size(self.numbered[number])
            batches += [(number, ids[i:i + size]) for i in range(0, len(ids) - size + 1, size)]
        if not batches:
            why = "no bucket has the clips of one batch" if pools else "no clip fits any bucket"
            raise ValueError(f"{why} (epoch {epoch}):\n{self.table(epoch)}")
        shuffled = np.argsort(mix(self.seed, epoch, np.arange(len(batches)), name_key("batches")))
        self.cached = epoch, ([batches[i] for i in shuffled], pools)
        return self.cached[1]

    def batch_size(self, bucket: Bucket) -> int:
        """Clips of a global batch."""
        return self.buckets[bucket.resolution][bucket.num_frames][1] * self.world

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step."""
        while step >= self.starts[-1]:
            self.starts.append(self.starts[-1] + len(self.epoch(len(self.starts) - 1)[0]))
        epoch = bisect_right(self.starts, step) - 1
        return epoch, step - self.starts[epoch]

    def batch(self, step: int) -> tuple[Bucket, list[int]]:
        """The bucket and the clip ids of step's global batch; a clip's place in the list is its slot."""
        epoch, i = self.locate(step)
        number, ids = self.epoch(epoch)[0][i]
        return self.numbered[number], ids.tolist()

    def stand_in(self, step: int, slot: int, attempt: int) -> int:
        """Another clip of the step's bucket, for a slot whose clip cannot be read."""
        epoch, i = self.locate(step)
        batches, pools = self.epoch(epoch)
        ids = pools[batches[i][0]]
        return int(ids[mix(self.seed, step, slot, attempt, name_key("stand-in"))[0] % len(ids)])


def slots(batch_size: int, rank: int, world: int) -> range:
    """The slots of a global batch that `rank` of `world` takes."""
    if batch_size < world:
        raise ValueError(f"a global batch of {batch_size} clips cannot feed {world} GPUs: make it larger")
    return range(rank, batch_size, world)


# ---- reading ----

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class UnreadableClip(ValueError):
    """The message says which file, why, and how many frames there were."""


def read_window(path: str, num_frames: int | None = None, frame_interval: int = 1, start: int | None = 0,
                generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 [T H W 3]: every frame_interval-th frame from `start` in order of presentation, as displayed.

    start None = drawn with generator; num_frames None = to the end.  Decodes from the key frame before the window only.
    """
    if not Path(path).is_file():
        raise UnreadableClip(f"{path}: no such file")
    try:
        if path.lower().endswith(IMAGES):
            times, wanted = [0], [0][:num_frames]
            frames = [np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))]
        else:
            times = frame_times(path)
            span = 1 if num_frames is None else (num_frames - 1) * frame_interval + 1
            if start is None:
                start = int(torch.randint(max(1, len(times) - span + 1), (), generator=generator))
            wanted = times[start:][::frame_interval][:num_frames]
            frames = decode(path, wanted) if wanted and len(wanted) == (num_frames or len(wanted)) else []
    except (av.FFmpegError, OSError, SyntaxError) as error:  # PIL reports a broken png as SyntaxError
        raise UnreadableClip(f"{path}: {error}") from error
    if not frames or len(frames) != (num_frames or len(wanted)):
        raise UnreadableClip(f"{path}: has {len(times)} frames and {len(frames)} could be read, expected "
                             f"{num_frames or 'one or more'} at interval {frame_interval} from frame {start}")
    return torch.from_numpy(np.stack(frames))


def frame_times(path: str) -> list[int]:
    """When each frame is shown, sorted, in the stream's time base.  Reads the file's packets, decodes nothing."""
    with av.open(path) as container:
        if not container.streams.video:
            raise UnreadableClip(f"{path}: has no video stream")
        expected = container.streams.video[0].frames  # 0 where the header does not tell
        packets = [(p.pts, p.size, p.is_discard, p.is_corrupt) for p in container.demux(video=0)]
    packets = packets[:-1]  # the last only tells the decoder to flush
    if len(packets) < expected or any(is_corrupt for *_, is_corrupt in packets):
        raise UnreadableClip(f"{path}: is cut off after {len(packets)} frames, its header says {expected or 'nothing'}")
    times = {pts for pts, size, is_discard, _ in packets if size and not is_discard}
    if None in times:
        raise UnreadableClip(f"{path}: has frames without a time, `ffmpeg -fflags +genpts -c copy` gives them one")
    return sorted(times)


def decode(path: str, wanted: list[int]) -> list[np.ndarray]:
    """The frames [H W 3] shown at the times `wanted`, which ascend; fewer where the file ends early."""
    for seek in (True, False):  # again without, where the seek ends behind the first frame (.ts files)
        frames = []
        with av.open(path) as container:
            stream = container.streams.video[0]
            if seek:
                container.seek(wanted[0], stream=stream)
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise UnreadableClip(f"{path}: the frame at {frame.time} s is damaged")
                if frame.pts in wanted:
                    frames.append(to_rgb(frame, stream.sample_aspect_ratio))
                if frame.pts >= wanted[-1]:
                    break
        if len(frames) == len(wanted):
            break
    return frames


def to_rgb(frame: av.VideoFrame, pixel_aspect) -> np.ndarray:
    """[H W 3] as displayed: pixels made square, then turned."""
    width = round(frame.width * (pixel_aspect or 1))
    rgb = frame.to_ndarray(format="rgb24", width=width, height=frame.height)
    return np.ascontiguousarray(np.rot90(rgb, k=round(frame.rotation / 90)))  # both counter-clockwise


def resize_crop(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [T H W 3] -> float [3 T height width] in [-1, 1]: shrunk or grown until it covers, the middle cut out."""
    _, H, W, _ = video.shape
    scale = max(height / H, width / W)
    size = max(height, round(H * scale)), max(width, round(W * scale))
    x = rearrange(video, "t h w c -> t c h w").float()
    if size != (H, W):
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return to_video(rearrange(x[:, :, top:top + height, left:left + width], "t c h w -> t h w c"))


def to_video(frames):
    """uint8, or float in 0..255, [T H W 3] -> float [3 T H W] in -1..1."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "t h w c -> c t h w").contiguous()


def to_uint8(video):
    """[3 T H W] in -1..1 -> uint8 [T H W 3] numpy."""
    return rearrange(((video.float().clamp(-1, 1) + 1) * 127.5).round().byte(), "c t h w -> t h w c").cpu().numpy()


# ---- batches ----

MAX_TRIES = 20  # clips tried for one slot before training stops


def told(sampler: BucketSampler, bucket: Bucket, clips: list[int]) -> dict[str, torch.Tensor]:
    """What the network is told beside the caption, [B] fp32 each.

    ar is width / height, as upstream trains (its samplers say the inverse); fps that of the frames taken.
    """
    meta, height, width = sampler.meta, bucket.height, bucket.width
    fps = [IMAGE_FPS if meta.num_frames[clip] == 1 else meta.fps[clip] / sampler.frame_interval for clip in clips]
    shared = {"height": height, "width": width, "num_frames": bucket.num_frames, "ar": width / height}
    return {name: torch.full((len(clips),), float(value)) for name, value in shared.items()} | {
        "fps": torch.tensor(fps, dtype=torch.float32)}


class ClipDataset(torch.utils.data.Dataset):
    """dataset[step] = this rank's part of the step's global batch.

    video [B 3 T H W] in [-1, 1]; text list; height, width, num_frames, fps, ar [B] fp32, as the network is told them;
    slots [B]: places in the global batch; bucket; skipped {path: reason} of clips that could not be read.
    """
    def __init__(self, sampler: BucketSampler, rank: int = 0, world: int = 1):
        self.sampler, self.rank, self.world = sampler, rank, world
        self.unreadable = {}  # path -> reason, filled by `batches`

    def __getitem__(self, step: int) -> dict:
        bucket, clips = self.sampler.batch(step)
        mine, skipped = slots(len(clips), self.rank, self.world), {}
        read = [self.read(step, slot, clips[slot], bucket, skipped) for slot in mine]
        videos, clips = zip(*read)
        return told(self.sampler, bucket, clips) | {
            "video": torch.stack(videos), "text": [self.sampler.meta.texts[clip] for clip in clips],
            "slots": torch.tensor(mine), "bucket": bucket, "skipped": skipped}

    def read(self, step: int, slot: int, clip: int, bucket: Bucket, skipped: dict) -> tuple[torch.Tensor, int]:
        """The slot's video and clip id; another of the bucket takes the place of an unreadable one, see `skipped`."""
        for attempt in range(MAX_TRIES):
            path = self.sampler.meta.paths[clip]
            try:
                generator = slot_generator(self.sampler.seed, step, slot, f"window {attempt}")
                video = read_window(path, bucket.num_frames, self.sampler.frame_interval, None, generator)
                return resize_crop(video, bucket.height, bucket.width), clip
            except UnreadableClip as error:
                skipped[path] = str(error)
            clip = self.sampler.stand_in(step, slot, attempt)
        raise ValueError(f"step {step}: none of {MAX_TRIES} clips drawn from {tuple(bucket)} can be read:\n  "
                         + "\n  ".join(skipped.values()))


class CachedClips(torch.utils.data.Dataset):
    """The batches of ClipDataset with what vae.write_cache wrote in place of video and text.

    mean, std [B C T h w] of the latents; y [B L C], y_mask [B L] of the captions.  Keeps all files in memory.
    """
    def __init__(self, sampler: BucketSampler, files: dict, rank: int = 0, world: int = 1):
        self.sampler, self.rank, self.world = sampler, rank, world
        self.unreadable = {}  # stays empty: write_cache named them
        self.latents = {bucket: load_file(file) for bucket, file in files.items() if bucket != "text"}
        self.rows = {bucket: {clip: row for row, clip in enumerate(tensors["clip"].tolist())}
                     for bucket, tensors in self.latents.items()}
        text = load_file(files["text"])
        self.caption = text["caption"]  # [clips]: a row of y and y_mask
        captions, L = text["y"].tensor_split(text["ends"][:-1]), int(text["max_length"])
        self.y = torch.stack([F.pad(tokens, (0, 0, 0, L - len(tokens))) for tokens in captions])  # [captions L C]
        self.y_mask = torch.arange(L) < torch.tensor([len(tokens) for tokens in captions])[:, None]

    def __getitem__(self, step: int) -> dict:
        bucket, clips = self.sampler.batch(step)
        mine = slots(len(clips), self.rank, self.world)
        clips = [self.present(step, slot, clips[slot], self.rows[bucket]) for slot in mine]
        rows = torch.tensor([self.rows[bucket][clip] for clip in clips])
        caption = self.caption[torch.tensor(clips)]
        latents = self.latents[bucket]
        return told(self.sampler, bucket, clips) | {
            "mean": latents["mean"][rows].float(), "std": latents["std"][rows].float(),
            "y": self.y[caption].float(), "y_mask": self.y_mask[caption],
            "slots": torch.tensor(mine), "bucket": bucket, "skipped": {}}

    def present(self, step: int, slot: int, clip: int, rows: dict) -> int:
        """The clip, or another of its bucket in place of one that has no latents, as it could not be read."""
        for attempt in range(MAX_TRIES):
            if clip in rows:
                return clip
            clip = self.sampler.stand_in(step, slot, attempt)
        raise ValueError(f"step {step}: the cache lacks {MAX_TRIES} clips drawn one after the other, delete its files")


def batches(dataset: ClipDataset | CachedClips, first: int, last: int, num_workers: int = 0):
    """Yields dataset[first] .. dataset[last - 1], read ahead by workers; fills dataset.unreadable."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(first, last), num_workers=num_workers,
                                         generator=torch.Generator())  # its own: the global stream stays as it was
    for batch in loader:
        for path, reason in batch.pop("skipped").items():
            if path not in dataset.unreadable:
                dataset.unreadable[path] = reason
                print(f"skipped, {len(dataset.unreadable)} so far: {reason}", file=sys.stderr)
        yield batch


# ---- writing video ----

def write_video(path, frames, fps=24):
    """Writes frames uint8 [T H W 3] as .mp4 (H.264), .gif or .png (a contact sheet, at most 8 frames a row).

    Written beside its place and renamed, so that a file that is there is whole.
    """
    path, frames = Path(path), np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be uint8 [T H W 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".png":
        Image.fromarray(contact_sheet(frames)).save(part)
    elif path.suffix == ".gif":
        first, *rest = [Image.fromarray(f) for f in enlarge(frames)]
        first.save(part, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    elif path.suffix == ".mp4":
        write_mp4(part, frames, fps)
    else:
        raise ValueError(f"{path}: video is written as .mp4, .gif or .png (a contact sheet), not {path.suffix!r}")
    part.replace(path)


def write_mp4(path, frames, fps):
    _, H, W, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), "edge")  # 4:2:0 needs even sides
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        # without mbtree: x264's macroblock tree gives other bytes from run to run on frames of a few blocks
        options = {"crf": "12", "preset": "fast", "x264-params": "mbtree=0"}
        stream = out.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = H + H % 2, W + W % 2, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())


def enlarge(frames):
    """[T H W 3] with pixels repeated up to a short side of at most 128: the shapes world's would be a thumbnail's."""
    k = max(1, 128 // min(frames.shape[1:3]))
    return repeat(frames, "t h w c -> t (h k1) (w k2) c", k1=k, k2=k)


def contact_sheet(frames, per_row=8):
    """uint8 [T H W 3] -> one picture [H' W' 3], frames in reading order with a white rule of 2 pixels after each."""
    missing = -len(frames) % per_row if len(frames) > per_row else 0  # in the last row: white
    frames = np.pad(enlarge(frames), ((0, missing), (0, 2), (0, 2), (0, 0)), constant_values=255)
    return rearrange(frames, "(r c) h w ch -> (r h) (c w) ch", c=min(per_row, len(frames)))


# ---- the shapes world ----

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 235), "yellow": (235, 210, 40),
          "purple": (160, 50, 200), "cyan": (50, 210, 220)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # (dx, dy): y grows downwards
BACKGROUNDS = ((16, 16, 20), (105, 105, 105))
SHAPES_FPS = 8


class Thing(NamedTuple):
    """One moving object: side is the root of its area in pixels, start and end are centres (x, y) in pixels."""
    color: str
    shape: str
    direction: str
    side: float
    start: tuple
    end: tuple


def held_out(color, shape, direction):
    """True for 12 of the 72 combinations, a colour for each shape and direction: for tests, never in the clips."""
    return (list(COLORS).index(color) + 2 * SHAPES.index(shape) + list(DIRECTIONS).index(direction)) % 6 == 0


def extent(shape, side):
    """(left, right, up, down): how far the shape reaches from its centre of mass, in pixels."""
    if shape == "circle":
        return (side / math.pi ** 0.5,) * 4
    if shape == "square":
        return (side / 2,) * 4
    edge = 2 * side / 3 ** 0.25  # equilateral: its area side^2 is sqrt(3)/4 edge^2
    return edge / 2, edge / 2, edge / 3 ** 0.5, edge / 12 ** 0.5


def coverage(shape, side, x, y, height, width):
    """How much of each pixel the shape centred at (x, y) covers, 0..1 [H W]: one minus the distance past its edge."""
    dy, dx = np.mgrid[:height, :width] + 0.5 - np.array([y, x])[:, None, None]
    if shape == "circle":
        outside = np.hypot(dx, dy) - side / math.pi ** 0.5
    elif shape == "square":
        outside = np.maximum(abs(dx), abs(dy)) - side / 2
    else:  # a triangle, its point upwards
        down = extent(shape, side)[3]
        outside = np.maximum(dy - down, (3 ** 0.5 * abs(dx) - dy) / 2 - down)
    return np.clip(0.5 - outside, 0, 1)


def random_thing(rng, color, shape, direction, height, width):
    """A thing that stays inside the frame and travels 0.55 to 1.0 of the way it has there."""
    side = rng.uniform(0.33, 0.42) * min(height, width)
    left, right, up, down = extent(shape, side)
    low, high = np.array([left, up]), np.array([width - right, height - down])
    axis, sign = (0, DIRECTIONS[direction][0]) if DIRECTIONS[direction][0] else (1, DIRECTIONS[direction][1])
    start = rng.uniform(low, high)
    travel = rng.uniform(0.55, 1.0) * (high - low)[axis]
    first = rng.uniform(low[axis], high[axis] - travel)
    end = start.copy()
    start[axis], end[axis] = (first, first + travel) if sign > 0 else (first + travel, first)
    return Thing(color, shape, direction, side, tuple(start), tuple(end))


def render(things, background, num_frames, height, width):
    """Things, later ones in front -> uint8 [T H W 3].  A still (one frame) shows the middle of the way."""
    frames = np.empty((num_frames, height, width, 3), np.float64)
    frames[:] = background
    for thing in things:
        for t, frame in enumerate(frames):
            u = t / (num_frames - 1) if num_frames > 1 else 0.5
            x, y = (1 - u) * np.array(thing.start) + u * np.array(thing.end)
            alpha = coverage(thing.shape, thing.side, x, y, height, width)[..., None]
            frame += alpha * (np.array(COLORS[thing.color]) - frame)
    return (frames + 0.5).astype(np.uint8)


def shapes_clip(seed, index, objects=1):
    """Clip `index` of the world `seed`, a pure function: (uint8 [T H W 3], caption, list of Thing).

    4 of 10 are stills, 4 have 8 frames, 2 have 16; a quarter is wide (32 x 48).  Held-out combinations do not occur.
    """
    rng = np.random.default_rng((seed, index))
    num_frames = int(rng.choice((1, 8, 16), p=(0.4, 0.4, 0.2)))
    height, width = (32, 48) if rng.random() < 0.25 else (32, 32)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    things = []
    while len(things) < objects:
        looks = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))
        if not held_out(*looks):
            things.append(random_thing(rng, *map(str, looks), height, width))
    caption = " and ".join(f"a {o.color} {o.shape}" + f" moves {o.direction}" * (num_frames > 1) for o in things)
    return render(things, background, num_frames, height, width), caption, things


def write_shapes(folder, num_clips=2000, seed=0, objects=1):
    """Renders the world into folder/*.mp4 and *.png (stills), and writes folder/meta.csv about them."""
    if num_clips < 1 or objects < 1:
        raise ValueError(f"--num-clips {num_clips} --objects {objects}: expected 1 or more of both")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(num_clips), desc=f"rendering {folder}", unit="clip"):
        frames, caption, _ = shapes_clip(seed, index, objects)
        T, H, W, _ = frames.shape
        name = f"{index:06d}" + (".mp4" if T > 1 else ".png")
        if T > 1:
            write_video(folder / name, frames, SHAPES_FPS)
        else:
            Image.fromarray(frames[0]).save(folder / name)
        rows.append((name, caption, T, H, W, SHAPES_FPS if T > 1 else IMAGE_FPS))
    with open(folder / ".meta.csv.part", "w", newline="") as f:
        csv.writer(f).writerows([COLUMNS, *rows])
    (folder / ".meta.csv.part").replace(folder / "meta.csv")
    print(f"{folder / 'meta.csv'}: {num_clips} clips")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help='"shapes", or a meta.csv')
    parser.add_argument("where", help="the folder to render into, or the config whose buckets the clips are to fill")
    parser.add_argument("--num-clips", type=int, default=2000, help="to render (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=1, help="things in a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args = parser.parse_args()
    try:
        if args.what == "shapes":
            write_shapes(args.where, args.num_clips, args.seed, args.objects)
        else:
            import configs
            config = configs.load(args.where)
            meta = read_meta(args.what)
            print(BucketSampler(meta, config.buckets, config.frame_interval, config.world, config.seed).table())
    except (ValueError, FileNotFoundError) as error:
        if args.debug:
            raise
        sys.exit(fail(error))


def fail(error):
    """The end of a main(): one line on stderr; returns the exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    from data import main; main()
