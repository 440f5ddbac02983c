"""Tests data.py: its table and buckets against Open-Sora 1.1's, its windows against a plain sequential decode.

Slow tests start reading processes and kill them, damage a hundred files, and read the real clips that the environment
variable NANOSORA_CLIPS names a folder of.
"""
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from threading import Barrier

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    ASPECT,
    PIXELS,
    BadClips,
    BucketSampler,
    ClipDataset,
    Fault,
    UnreadableClip,
    batches,
    read_meta,
    read_window,
    slot_generator,
)
from model import STDiTConfig

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/d_buckets.json").read_text())
ASPECT_GOLDEN = json.loads((ROOT / "tests/golden/d_aspect_ratios.json").read_text())
HEADER = "path,text,num_frames,height,width,fps\n"
ROW = "a.mp4,x,8,8,8,8\n"
# What version 1 drew for test_data's tables: later versions must draw the same.
HELD_OUT = [3, 6, 7, 9, 12, 14, 25, 29]
PLANS = {   # step: (bucket, clips, the first three stand-ins of the first and of the second clip)
    0: (("144p", 1, "1.00"), [119, 186, 32, 34, 217, 150], [[217, 119, 150], [119, 43, 119]]),
    7: (("144p", 16, "0.56"), [298, 135, 128, 134, 240, 47, 143, 197], [[240, 135, 47], [273, 131, 143]]),
    70: (("240p", 16, "1.00"), [288, 84, 127, 122], [[122, 132, 247], [127, 91, 288]]),
}
SLOT_SEEDS = [4211875963264813783, 5570611059630696022]
WINDOWS = [5, 0, 20, 21]
FIXED_WINDOWS = [12, 18]


@dataclass(frozen=True)
class Settings:
    """The fields of Config that data.py reads."""
    buckets: dict
    frame_interval: int = 1
    model: STDiTConfig = STDiTConfig()
    holdout: float = 0.0
    windows: int = 0
    num_workers: int = 0
    read_timeout: float = 60.0
    world: int = 1
    seed: int = 0

    def cost(self, bucket):
        """Returns (tokens, FLOP) of one clip of a bucket."""
        return bucket.num_frames, bucket.num_frames * bucket.height * bucket.width


def write_text(path: Path, content: str) -> str:
    """Writes a file exactly as given, its line ends included, and returns its name."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode())
    return str(path)


def table_of(folder: Path, rows, fps=24.0):
    """Opens a meta.csv with a row i.mp4 for each i-th (num_frames, height, width) of rows."""
    lines = [f"{i}.mp4,clip {i},{t},{h},{w},{fps}\n" for i, (t, h, w) in enumerate(np.asarray(rows).tolist())]
    return read_meta(write_text(folder / "meta.csv", HEADER + "".join(lines)))


def buckets_of(meta, settings, epoch=0, validation=False) -> list:
    """Returns each clip's bucket in an epoch, or None where it has none."""
    numbered = data.bucket_list(settings.buckets)
    found = data.assign(meta, settings, epoch, validation).buckets.tolist()
    return [None if number == data.NO_BUCKET else numbered[number] for number in found]


# ---- meta.csv ----

def paths_of(meta) -> list[str]:
    return [meta.path(clip) for clip in range(len(meta))]


def texts_of(meta) -> list[str]:
    return [meta.text(clip) for clip in range(len(meta))]


def test_rows_come_back_as_written(tmp_path):
    file = write_text(tmp_path / "meta.csv", HEADER + 'a.mp4,"a dog, running",17,240,426,29.97\nb.png,,1,512,500.0,\n')
    meta = read_meta(file)
    assert paths_of(meta) == [str(tmp_path / "a.mp4"), str(tmp_path / "b.png")]
    assert texts_of(meta) == ["a dog, running", ""]
    assert meta["num_frames"].tolist() == [17, 1]
    assert meta["height"].tolist() == [240, 512]
    assert meta["width"].tolist() == [426, 500]
    assert meta["fps"].tolist() == [np.float32(29.97), 120], "an image's fps is Open-Sora's 120"


def test_several_tables_are_one_in_the_order_given(tmp_path):
    file = write_text(tmp_path / "meta.csv", HEADER + "a.mp4,x,8,8,8,8\nb.mp4,y,8,8,8,8\n")
    more = write_text(tmp_path / "more.csv", HEADER + "/c.mp4,z,2,3,4,5\n")
    both = read_meta(str(tmp_path / "m*.csv"))
    assert texts_of(both) == ["x", "y", "z"]
    assert both.path(2) == "/c.mp4", "an absolute path stays as it is"
    assert both.where(2) == f"{more} row 2"
    turned = read_meta([more, str(tmp_path / "*.csv"), file])
    assert texts_of(turned) == ["z", "x", "y"], "each file once"


@pytest.mark.parametrize("content, named", [
    ("path,text,num_frames,height,width\n", "meta.csv.* fps"),
    ("", "meta.csv.* path, text"),
    (HEADER, "meta.csv has no rows"),
    (HEADER + "\n\n", "meta.csv has no rows"),
    (HEADER + "a,x,8,8,8,8\nb,x,many,8,8,8\n", "meta.csv row 3: num_frames='many'"),
    (HEADER + "a,x,8,8.5,8,8\n", "row 2: height='8.5'"),
    (HEADER + "a,x,8,8,8,\n", "row 2: fps=''"),
    (HEADER + "a,x,8,8,8,0\n", "row 2: fps='0'"),
    (HEADER + "a,x,8,-8,8,8\n", "row 2: height='-8'"),
    (HEADER + "a,x,8,8,nan,8\n", "row 2: width='nan'"),
    (HEADER + "a,x,8,8,inf,8\n", "row 2: width='inf'"),
    (HEADER + "a,x,8,8,8,8\n\nb,x,8,8\n", "row 4: 4 fields"),
    (HEADER + "a,x,8,8,8,8\nb,a dog, running,8,8,8,8\n", "row 3: 7 fields"),
    (HEADER + '"a","two\nlines",8,8,8,8\nb,"x,8,8,8,8\nc,"y",8,8,8,8\n', "meta.csv row 3: "),
    (HEADER + 'a,x,8,8,8,8\nb,"x,8,8,8,8\nc,y,8,8,8,8\n', "meta.csv row 3: "),
    (HEADER + 'a,x,8,8,8,8\nb,"x,8,8,8,8\n' + ROW * 10_000, "meta.csv row 3: "),
    (HEADER.encode() + b"a,x,8,8,8,8\nb,caf\xe9,8,8,8,8\n", "meta.csv row 3: .*0xe9.*UTF-8"),
])
def test_a_mistake_in_a_table_is_named(tmp_path, content, named):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "meta.csv").write_bytes(content)
    with pytest.raises(ValueError, match=named):
        read_meta(str(tmp_path / "meta.csv"))
    assert os.listdir(tmp_path) == ["meta.csv"], "nothing half-written stays"


@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere*.csv"])
def test_a_missing_table_is_named(name):
    """With what a new user needs: the flag, the columns, the script that makes one, and what to try without data."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\*?.csv.*path,text.*--data.*curate.py.*configs/tiny.py"):
        read_meta(name)


@pytest.mark.parametrize("header", [HEADER, '"path","text","num_frames","height","width","fps"\r\n'])
def test_a_byte_order_mark_is_no_letter(tmp_path, header):
    meta = read_meta(write_text(tmp_path / "meta.csv", "\ufeff" + header + ROW))
    assert meta.path(0) == str(tmp_path / "a.mp4")
    assert meta.text(0) == "x"


@pytest.mark.parametrize("line_end, quoting", [("\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL)])
def test_nasty_rows_read_as_python_reads_them(tmp_path, line_end, quoting):
    """Quotes, commas, line ends and rare letters in texts, paths and other columns; blank lines between the rows."""
    draw = random.Random(line_end)
    pieces = ["a", "dog", " ", ",", '"', '""', "\n", "\r\n", "é", "犬", "😀", "'", ";", "\\", "\t", "1", "\u2028"]
    out = io.StringIO()
    writer = csv.writer(out, quoting=quoting, lineterminator=line_end)
    writer.writerow(["", "id", "text", "width", "path", "fps", "height", "note", "num_frames"])
    for i in range(700):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        note = "".join(draw.choices(pieces, k=draw.randrange(12)))
        path = "".join(draw.choices(pieces, k=3)).strip("\r\n") + f"{i}.mp4"
        fps = f"{draw.uniform(1, 60):.3f}"
        height = float(draw.randint(1, 99))
        writer.writerow([i, i, text, draw.randint(1, 99), path, fps, height, note, draw.randint(2, 99)])
        if i % 50 == 7:
            out.write(line_end)
    content = out.getvalue()
    if quoting == csv.QUOTE_ALL:
        content = "\ufeff" + content.rstrip("\r\n")
    file = write_text(tmp_path / "meta.csv", content)

    with open(file, newline="", encoding="utf-8-sig") as f:
        expected = list(csv.DictReader(f))
    with open(file, newline="", encoding="utf-8-sig") as f:
        places = [number for number, row in enumerate(csv.reader(f), start=1) if row]
    meta = read_meta(file)
    assert texts_of(meta) == [row["text"] for row in expected]
    assert paths_of(meta) == [str(tmp_path / row["path"]) for row in expected]
    for name in ("num_frames", "height", "width", "fps"):
        assert meta[name].tolist() == [np.float32(row[name]) for row in expected]
    assert [meta.where(clip) for clip in range(700)] == [f"{file} row {number}" for number in places[1:]]
    assert places[-1] > 701, "blank lines count as rows, as a spreadsheet counts"


def test_numbers_as_programs_write_them(tmp_path):
    images = "0.png,x,1,8,8,nan\n1.png,x,1.0,8,8,\n2.png,x,1,8,8,25\n" '3.png,x,"1",8,8,-\n4.png,x,1,8,8,0\n'
    meta = read_meta(write_text(tmp_path / "meta.csv", HEADER + 'a.mp4,x,"24",240.0, 426 ,2.4e1\n' + images))
    assert [meta[name][0] for name in ("num_frames", "height", "width", "fps")] == [24, 240, 426, 24]
    assert meta["num_frames"][1:].tolist() == [1] * 5
    assert meta["fps"][1:].tolist() == [120] * 5


def test_other_columns_may_stand_in_any_place(tmp_path):
    plain = write_text(tmp_path / "plain.csv", HEADER + ROW)
    scored = write_text(tmp_path / "scored.csv", "match,path,text,num_frames,height,width,fps,aes\n"
                        "0.5,b.mp4,x,8,8,8,8,4.5\n,c.mp4,x,8,8,8,8,none\n-2,d.mp4,x,8,8,8,8,nan\n")
    meta = read_meta([plain, scored])
    assert paths_of(meta) == [str(tmp_path / f"{name}.mp4") for name in "abcd"]
    assert meta["fps"].tolist() == [8] * 4


def test_a_path_is_trained_on_once(tmp_path):
    """A path counts from the folder of its csv; of two rows with one path the first is used."""
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo"), "two paths whose checksum is the same"
    settings = Settings({"144p": {16: (1.0, 1)}})

    def write(path, names):
        return write_text(path, HEADER + "".join(f"{name},x,20,144,256,24\n" for name in names))

    def used(files):
        return [bucket is not None for bucket in buckets_of(read_meta(files), settings)]
    outer = write(tmp_path / "top.csv", ["plumless", "buckeroo", "in/a.mp4", '"plumless"', "b.mp4", "buckeroo"])
    inner = write(tmp_path / "in" / "inner.csv", ["a.mp4", "b.mp4", str(tmp_path / "b.mp4"), "c.mp4", "c.mp4"])
    outer_used = [True, True, True, False, True, False]
    assert used(outer) == outer_used
    assert used(inner) == [True, True, True, True, False]
    assert used([outer, inner]) == outer_used + [False, True, False, True, False]
    many = write_text(tmp_path / "many.csv", HEADER + "a.mp4,x,20,144,256,24\n" * 1500 + "b.mp4,x,20,144,256,24\n")
    assert np.flatnonzero(used(many)).tolist() == [0, 1500]


def test_a_changed_table_is_read_again(tmp_path):
    file = write_text(tmp_path / "meta.csv", HEADER + "a.mp4,x,8,8,8,8\n")
    other = write_text(tmp_path / "other.csv", HEADER + "b.mp4,y,8,8,8,8\n")

    def rows(files):
        meta = read_meta(files)
        return list(zip(texts_of(meta), meta["num_frames"].tolist()))
    for _ in range(2):
        assert rows(file) == [("x", 8)]
        assert rows([file, other]) == [("x", 8), ("y", 8)]
    before = os.stat(file).st_mtime_ns
    write_text(tmp_path / "meta.csv", HEADER + "a.mp4,z,9,8,8,8\n")
    os.utime(file, ns=(before, before + 1_000_000))      # the same size, a little later
    assert rows(file) == [("z", 9)]
    assert rows([file, other]) == [("z", 9), ("y", 8)]
    before = os.stat(other).st_mtime_ns
    write_text(tmp_path / "other.csv", HEADER + "b.mp4,y,9,8,8,8\nc.mp4,w,7,8,8,8\n")
    os.utime(other, ns=(before, before))                 # the same time, but longer
    assert rows([file, other]) == [("z", 9), ("y", 9), ("w", 7)]


@pytest.mark.parametrize("left", [0, 1, 64, 4000, 11_999, -1])
def test_a_file_beside_the_table_that_is_cut_short_is_made_again(tmp_path, left):
    """left: the bytes that a crash left of each file that read_meta wrote; -1: all but the last."""
    file = write_text(tmp_path / "meta.csv", HEADER + "".join(f"{i}.mp4,x,{i + 1},8,8,8\n" for i in range(300)))
    read_meta(file)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "meta.csv"]
    assert written
    for path in written:
        path.write_bytes(path.read_bytes()[:left])
    again = read_meta(file)
    assert again["num_frames"].tolist() == list(range(1, 301))
    assert again.path(299) == str(tmp_path / "299.mp4")


def test_half_a_table_is_made_again(tmp_path):
    """A crash of the machine may leave the folder without one of its files."""
    file = write_text(tmp_path / "meta.csv", HEADER + ROW)
    folder = read_meta(file).folder
    (folder / "rows.npy").unlink()
    assert read_meta(file).text(0) == "x"
    assert read_meta(file).folder == folder


def test_several_may_open_a_table_at_once(tmp_path):
    file = write_text(tmp_path / "meta.csv", HEADER + "".join(f"{i}.mp4,x,{i + 1},8,8,8\n" for i in range(3000)))
    all_here = Barrier(4, timeout=60)

    def open_it(_):
        all_here.wait()
        return read_meta(file)
    with ThreadPoolExecutor(4) as pool:
        for meta in pool.map(open_it, range(4)):
            assert meta["num_frames"].tolist() == list(range(1, 3001))
            assert meta.path(2999) == str(tmp_path / "2999.mp4")
    read_meta(file)
    assert not list(tmp_path.glob("*.part"))


def test_a_table_in_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    file = write_text(here / "meta.csv", HEADER + ROW)
    real_mkdir = os.mkdir

    def refuse(path, *args, **options):
        if Path(path).parent == here:
            raise PermissionError(13, "Permission denied", str(path))
        return real_mkdir(path, *args, **options)
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    meta = read_meta(file)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "meta.csv" in error
    assert meta.path(0) == str(here / "a.mp4")
    assert os.listdir(here) == ["meta.csv"]
    assert read_meta(file).text(0) == "x"
    assert pickle.loads(pickle.dumps(meta)).text(0) == "x"
    assert not capsys.readouterr().err, "it is found again where it was written"


def test_a_table_pickles_small(tmp_path):
    """A worker that is spawned gets names, not rows, and never another table than its parent's."""
    file = write_text(tmp_path / "meta.csv", HEADER + "".join(f"{i}.mp4,x,{i + 1},8,8,8\n" for i in range(1000)))
    meta = read_meta(file)
    pickled = pickle.dumps(meta)
    again = pickle.loads(pickled)
    assert len(pickled) < 1000
    assert again["num_frames"].tolist() == list(range(1, 1001))
    assert again.path(999) == meta.path(999)
    write_text(tmp_path / "meta.csv", HEADER + ROW)
    assert len(pickle.loads(pickled)) == 1000


# ---- buckets ----

def test_sizes_and_their_order_are_upstreams():
    for level, (pixels, rows) in ASPECT_GOLDEN["tables"].items():
        assert PIXELS[level] == pixels
        assert [[key, list(size)] for key, size in ASPECT[level].items()] == rows


def test_the_nearest_aspect_ratio_is_upstreams(tmp_path):
    """Sizes are enlarged by whole numbers, which leaves their ratio, until they have enough pixels."""
    for level in ASPECT_GOLDEN["tables"]:
        cases = [case for case in ASPECT_GOLDEN["closest"] if case[2] == level]
        rows = []
        for height, width, *_ in cases:
            factor = math.ceil((PIXELS[level] / (height * width)) ** 0.5)
            rows.append((1, factor * height, factor * width))
        if cases:
            found = buckets_of(table_of(tmp_path / level, rows), Settings({level: {1: (1.0, 1)}}))
            assert [bucket.ar for bucket in found] == [key for *_, key in cases], level


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_buckets_are_upstreams(tmp_path, stage):
    """Each clip stands 150 times in the table: its golden bucket is its only one, or one that some of them drew."""
    table = {}
    for level, row in GOLDEN["configs"][stage].items():
        table[level] = {int(num_frames): tuple(values) for num_frames, values in row.items()}
    sizes = np.array(GOLDEN["sizes"])
    num_certain = 0
    for interval in (1, 2, 3):
        chosen = np.flatnonzero(sizes[:, 3] == interval)
        num_frames = sizes[chosen, 0]
        num_frames = num_frames - (num_frames > 2)      # upstream asks for one frame more than the bucket's
        rows = np.stack([num_frames, sizes[chosen, 1], sizes[chosen, 2]], axis=1)
        meta = table_of(tmp_path / str(interval), rows.repeat(150, axis=0))
        found = buckets_of(meta, Settings(table, interval))
        for i, row in enumerate(chosen):
            drawn = set(found[150 * i:150 * i + 150])
            golden = GOLDEN["rows"][stage][row]
            expected = tuple(golden) if golden else None
            assert expected in {bucket and tuple(bucket) for bucket in drawn}, sizes[row]
            num_certain += len(drawn) == 1
    assert num_certain > 50


def test_just_enough_frames_and_pixels_are_enough(tmp_path):
    settings = Settings({"144p": {16: (1.0, 1)}}, frame_interval=3)
    found = buckets_of(table_of(tmp_path / "a", [(48, 144, 256), (47, 144, 256)]), settings)
    assert [bucket is not None for bucket in found] == [True, False]
    least = 0.8 * PIXELS["720p"]        # of the resolution's pixels, as Open-Sora 1.1
    assert least == 720 * 1024
    found = buckets_of(table_of(tmp_path / "b", [(1, 720, 1024), (1, 720, 1023)]), Settings({"720p": {1: (1.0, 1)}}))
    assert [bucket is not None for bucket in found] == [True, False]


def test_a_clip_gets_the_longest_bucket_that_it_fills(tmp_path):
    meta = table_of(tmp_path, [(15, 144, 256), (16, 144, 256), (31, 144, 256), (32, 144, 256), (999, 144, 256)])
    found = buckets_of(meta, Settings({"144p": {1: (1.0, 1), 32: (1.0, 1), 16: (1.0, 1)}}))
    assert [bucket and bucket.num_frames for bucket in found] == [None, 16, 16, 32, 32]


def test_the_table_says_why_a_clip_is_left_out(tmp_path):
    rows = [(64, 100, 100), (1, 500, 500), (8, 500, 500), (20, 500, 500)] + [(40, 500, 500)] * 40
    table_of(tmp_path, rows)
    with open(tmp_path / "meta.csv", "a") as f:
        f.write("5.mp4,again,40,500,500,24\n")
    meta = read_meta(str(tmp_path / "meta.csv"))
    settings = Settings({"240p": {16: (0.0, None)}, "144p": {32: (1.0, 1)}})
    table = BucketSampler(meta, settings).table()
    assert "40 of 45 clips" in table
    for line in ("1 .*too small.*/0.mp4", "1 .*no bucket of its kind.*/1.mp4", "1 .*too short.*/2.mp4",
                 "1 .*keep draw.*/3.mp4", "1 .*earlier row.*/5.mp4"):
        assert re.search(line, table), line
    table = BucketSampler(meta, replace(settings, holdout=0.3)).table()
    num_held_out = int(re.search(r"(\d+) .*held out", table)[1])
    assert 3 < num_held_out < 25


def test_the_table_counts_batches_and_compute(tmp_path):
    settings = Settings({"144p": {1: (1.0, 3), 16: (1.0, 2)}}, world=2)
    meta = table_of(tmp_path, [(1, 144, 256)] * 14 + [(16, 144, 256)] * 9)
    images, videos = BucketSampler(meta, settings).table().splitlines()[1:3]
    # 14 images are 2 batches of 3 on each of 2 GPUs, and 2 are left over
    assert {"144p", "1", "14", "3", "2", f"{12 / (12 + 8 * 16):.1%}"} <= set(images.split())
    # 9 videos are 2 batches of 2 on each of 2 GPUs, and 1 is left over; 2 videos have 32 tokens
    assert {"144p", "16", "9", "2", "1", "32", f"{128 / 140:.1%}"} <= set(videos.split())


def test_the_compute_of_very_many_clips_does_not_overflow(tmp_path):
    class Dear(Settings):
        def cost(self, bucket):
            return 9, 10 ** 18 * bucket.num_frames
    meta = table_of(tmp_path, [(128, 240, 426)] * 10 + [(16, 144, 256)] * 10)
    settings = Dear({"240p": {128: (1.0, 2)}, "144p": {16: (1.0, 2)}})
    with warnings.catch_warnings(action="error"):
        table = BucketSampler(meta, settings).table()
    assert [line.split()[-1] for line in table.splitlines()[1:3]] == ["88.9%", "11.1%"]


def test_keep_draws_have_their_probability_and_are_independent(tmp_path):
    n = 15_000
    settings = Settings({"240p": {16: (0.3, 1)}, "144p": {16: (0.5, 1)}}, seed=7)
    meta = table_of(tmp_path, [(32, 480, 854)] * n)
    levels = []
    for epoch in (0, 1):
        found = buckets_of(meta, settings, epoch)
        levels.append(np.array([bucket.resolution if bucket else "" for bucket in found]))
    first, second = levels
    sigma = 0.5 * n ** -0.5     # at most, of a share of n draws
    for drawn in (first, second):
        assert (drawn == "240p").mean() == pytest.approx(0.3, abs=3 * sigma)
        assert (drawn == "144p").mean() == pytest.approx(0.7 * 0.5, abs=3 * sigma)
    assert ((first == "240p") & (second == "240p")).mean() == pytest.approx(0.3 * 0.3, abs=3 * sigma)
    assert ((first == "240p") & (second == "144p")).mean() == pytest.approx(0.3 * 0.35, abs=3 * sigma)


def test_what_some_epoch_may_draw_is_known_beforehand(tmp_path):
    """The cache is written for these clips and buckets."""
    table = {"240p": {16: (0.3, 1)}, "144p": {1: (1.0, 1), 16: (0.5, 1)}, "64": {1: (1.0, 1), 16: (1.0, 1)}}
    settings = Settings(table)
    meta = table_of(tmp_path, [(32, 240, 426), (32, 144, 256), (1, 240, 426), (8, 240, 426)])
    drawn = set()
    for epoch in range(30):
        drawn |= {(bucket, clip) for clip, bucket in enumerate(buckets_of(meta, settings, epoch)) if bucket}
    numbered = data.bucket_list(settings.buckets)
    known = set()
    for number, clips in data.reachable(meta, settings).items():
        known |= {(numbered[number], clip) for clip in clips.tolist()}
    assert known == drawn
    assert len(drawn) == 3 + 2 + 1, "of the first video, the second and the image, which 144p always keeps"


def test_a_share_is_held_out_by_path(tmp_path):
    settings = Settings({"144p": {16: (1.0, 1)}}, holdout=0.1)
    meta = table_of(tmp_path, [(32, 144, 256)] * 3000)

    def held(meta, settings=settings):
        return {meta.path(i) for i, bucket in enumerate(buckets_of(meta, settings)) if bucket is None}
    whole = held(meta)
    assert abs(len(whole) - 300) < 66
    assert held(meta, replace(settings, seed=5)) == whole
    validation = buckets_of(meta, replace(settings, seed=5), epoch=3, validation=True)
    assert {meta.path(i) for i, bucket in enumerate(validation) if bucket} == whole
    lines = (tmp_path / "meta.csv").read_text().splitlines()
    write_text(tmp_path / "meta.csv", "\n".join([lines[0], *lines[:0:-2]]))     # every second row, from the last
    fewer = read_meta(str(tmp_path / "meta.csv"))
    assert len(fewer) == 1500
    assert held(fewer) == whole & set(paths_of(fewer))


def test_the_same_clips_are_held_out_in_every_version(tmp_path):
    """A model that has been trained must not be validated on what it has seen."""
    found = buckets_of(table_of(tmp_path, [(32, 144, 256)] * 30), Settings({"144p": {16: (1.0, 1)}}, holdout=0.3))
    assert [i for i, bucket in enumerate(found) if bucket is None] == HELD_OUT


# ---- the sampler ----

BUCKETS = {"240p": {16: (0.5, 2)}, "144p": {1: (1.0, 3), 16: (1.0, 4)}}
SETTINGS = Settings(BUCKETS, world=2, seed=3)


@pytest.fixture(scope="module")
def some_meta(tmp_path_factory):
    """A table of 300 clips of several kinds; those with 8 frames are too short."""
    rng = np.random.default_rng(0)
    columns = [rng.choice(values, 300) for values in ([1, 8, 16, 40], [240, 480], [426, 320])]
    return table_of(tmp_path_factory.mktemp("some"), np.stack(columns, axis=1))


def drawn(sampler, step) -> tuple:
    """Returns a step's bucket and its clips with those that would stand in for them."""
    plan = sampler.plan(step)
    return plan.bucket, plan.clips.tolist()


def test_a_plan_is_a_function_of_seed_and_step(some_meta):
    forward = BucketSampler(some_meta, SETTINGS)
    steps = [drawn(forward, step) for step in range(90)]        # several epochs
    for step in (75, 0, 41):
        assert drawn(BucketSampler(some_meta, SETTINGS), step) == steps[step]
        assert drawn(forward, step) == steps[step]
    reordered = {level: dict(reversed(BUCKETS[level].items())) for level in reversed(BUCKETS)}
    assert drawn(BucketSampler(some_meta, replace(SETTINGS, buckets=reordered)), 5) == steps[5]
    assert drawn(BucketSampler(some_meta, replace(SETTINGS, seed=4)), 5) != steps[5]


def test_plans_are_the_same_in_every_version(some_meta):
    """A run that is resumed by a later version sees the clips, and the stand-ins, that it would have seen."""
    sampler = BucketSampler(some_meta, SETTINGS)
    for step, (bucket, clips, standins) in PLANS.items():
        plan = sampler.plan(step)
        assert tuple(plan.bucket) == bucket
        assert plan.clips[:, 0].tolist() == clips
        assert plan.clips[:2, 1:4].tolist() == standins


def test_an_epoch_has_full_batches_of_one_bucket_and_no_clip_twice(some_meta):
    """Clips left over keep their bucket in the next epoch, whatever its draws say."""
    sampler = BucketSampler(some_meta, SETTINGS)
    inherited = {}
    step = 0
    for epoch in range(3):
        expected = dict(enumerate(buckets_of(some_meta, SETTINGS, epoch))) | inherited
        expected = {clip: bucket for clip, bucket in expected.items() if bucket}
        num_clips = {}
        for bucket in expected.values():
            num_clips[bucket] = num_clips.get(bucket, 0) + 1
        num_batches = {bucket: n // sampler.batch_size(bucket) for bucket, n in num_clips.items()}
        seen = []
        for _ in range(sum(num_batches.values())):
            bucket, clips = drawn(sampler, step)
            clips = [candidates[0] for candidates in clips]
            assert len(clips) == sampler.batch_size(bucket)
            assert {expected[clip] for clip in clips} == {bucket}
            num_batches[bucket] -= 1
            seen += clips
            step += 1
        assert not any(num_batches.values())
        assert len(set(seen)) == len(seen) > 0
        inherited = {clip: bucket for clip, bucket in expected.items() if clip not in seen}
        assert inherited


def test_what_is_left_over_comes_first_in_the_next_epoch(tmp_path):
    sampler = BucketSampler(table_of(tmp_path, [(16, 144, 256)] * 19), Settings({"144p": {16: (1.0, 4)}}))
    epochs = []
    for epoch in range(5):      # of 4 batches, and 3 clips are left over
        plans = [sampler.plan(4 * epoch + i) for i in range(4)]
        epochs.append(set(np.concatenate([plan.clips[:, 0] for plan in plans]).tolist()))
    for before, after in zip(epochs, epochs[1:]):
        assert len(before) == 16
        assert set(range(19)) - before < after


def test_a_rare_bucket_fills_up_over_epochs(tmp_path):
    """Each epoch keeps about 6 of 30 clips for batches of 8."""
    settings = Settings({"240p": {16: (0.2, 8)}, "144p": {16: (1.0, 8)}})
    sampler = BucketSampler(table_of(tmp_path, [(16, 240, 426)] * 30), settings)
    plans = [sampler.plan(step) for step in range(30)]
    rare = [set(plan.clips[:, 0].tolist()) for plan in plans if plan.bucket.resolution == "240p"]
    assert len(rare) > 3
    assert all(len(clips) == 8 for clips in rare)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_slots(some_meta, world):
    sampler = BucketSampler(some_meta, SETTINGS)
    for step in range(12):
        whole = sampler.plan(step)
        assert whole.slots == list(range(sampler.batch_size(whole.bucket)))
        for rank in range(world):
            part = sampler.plan(step, rank, world)
            assert part.bucket == whole.bucket
            assert part.slots == whole.slots[rank::world]
            assert np.array_equal(part.clips, whole.clips[rank::world]), "the stand-ins too"


def test_more_gpus_than_clips_in_a_batch_is_an_error(tmp_path):
    sampler = BucketSampler(table_of(tmp_path, [(16, 144, 256)] * 4), Settings({"144p": {16: (1.0, 2)}}))
    with pytest.raises(ValueError, match="2 clips .* 4 GPUs"):
        sampler.plan(0, 0, 4)


def test_images_and_videos_interleave(some_meta):
    sampler = BucketSampler(some_meta, SETTINGS)
    kinds = [sampler.plan(step).bucket.num_frames == 1 for step in range(20)]      # of one epoch
    assert 3 < sum(kinds) < 17
    assert sum(a != b for a, b in zip(kinds, kinds[1:])) > 4


def test_nothing_to_train_on_says_why(tmp_path):
    with pytest.raises(ValueError, match="no clip fits any bucket(.|\n)*2 .*too small.*/0.mp4"):
        BucketSampler(table_of(tmp_path / "a", [(16, 10, 10)] * 2), Settings(BUCKETS))
    with pytest.raises(ValueError, match="no bucket has the clips of one batch"):
        BucketSampler(table_of(tmp_path / "b", [(16, 144, 256)] * 3), Settings(BUCKETS))


def test_a_slots_stream_differs_by_each_of_its_keys():
    def draw(*key):
        return float(torch.rand((), generator=slot_generator(*key)))
    keys = [(0, 5, 3, "noise"), (1, 5, 3, "noise"), (0, 6, 3, "noise"), (0, 5, 4, "noise"), (0, 3, 5, "noise"),
            (0, 5, 3, "t")]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])
    assert [slot_generator(*key).initial_seed() for key in keys[:2]] == SLOT_SEEDS, "as in every version"


def test_the_streams_of_many_slots_are_together_normal():
    numbers = []
    for step in range(25):
        for slot in range(40):
            numbers.append(torch.randn((), generator=slot_generator(0, step, slot, "noise")))
    numbers = torch.stack(numbers)
    assert abs(numbers.mean()) < 4 / 1000 ** 0.5
    assert abs(numbers.std() - 1) < 4 / 2000 ** 0.5


# ---- reading ----

X264 = {"sc_threshold": "0", "preset": "veryfast"}      # no key frames but those of the GOP
MPEG = {"sc_threshold": "1000000000"}
CODINGS = [     # file, codec, height, width, pixel format, options
    ("a.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "3"}),
    ("gop48.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "48", "bf": "8", "x264-params": "b-pyramid=normal:ref=4"}),
    ("one_key.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "250", "bf": "3", "x264-params": "b-pyramid=strict"}),
    ("flat.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "10", "bf": "2", "x264-params": "b-pyramid=none"}),
    ("no_b.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "7", "bf": "0"}),
    ("open.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    ("open.ts", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "5", "x264-params": "open-gop=1"}),
    ("fields.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "3", "x264-params": "tff=1"}),
    ("no_key.mp4", "libx264", 64, 96, "yuv420p", X264 | {"g": "15", "bf": "2", "x264-params": "intra-refresh=1"}),
    ("a.ts", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "3"}),      # a seek there ends too late
    ("a.mkv", "libx264", 64, 96, "yuv420p", X264 | {"g": "12", "bf": "3"}),     # times in whole milliseconds
    ("444.mov", "libx264", 63, 95, "yuv444p", X264 | {"g": "12", "bf": "3"}),
    ("10bit.mp4", "libx264", 64, 96, "yuv420p10le", X264 | {"g": "12", "bf": "3"}),
    ("a265.mp4", "libx265", 64, 96, "yuv420p", {"preset": "ultrafast", "x265-params": "keyint=12:log-level=0"}),
    ("layers.mp4", "libx265", 64, 96, "yuv420p10le", {"x265-params": "keyint=12:temporal-layers=3:log-level=0"}),
    ("a.mpg", "mpeg2video", 64, 96, "yuv420p", MPEG | {"g": "12", "bf": "2"}),
    ("b.mpg", "mpeg1video", 64, 96, "yuv420p", MPEG | {"g": "12", "bf": "2"}),
    ("a.avi", "mpeg4", 64, 96, "yuv420p", MPEG | {"g": "10", "bf": "2"}),
    ("b.mov", "mpeg4", 64, 96, "yuv420p", MPEG | {"g": "30", "bf": "2"}),
    ("vp9.webm", "libvpx-vp9", 63, 95, "yuv420p", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    ("hidden.webm", "libvpx-vp9", 64, 96, "yuv420p", {"g": "30", "cpu-used": "8", "auto-alt-ref": "1"}),
    ("vp8.webm", "libvpx", 64, 96, "yuv420p", {"g": "12", "deadline": "realtime"}),
    ("av1.mp4", "libsvtav1", 64, 96, "yuv420p", {"g": "12", "preset": "12"}),
    ("prores.mov", "prores_ks", 64, 96, "yuv422p10le", {}),
    ("a.gif", "gif", 64, 96, "rgb8", {}),
]


def bar_frames(num_frames, height, width):
    """Makes frames that all differ: a bar that moves on a ground that brightens, and a noisy corner."""
    rng = np.random.default_rng(num_frames)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = 3 * i % 256
        frame[2 * i % height:][:6, : width // 2] = (255, 0, 0)
        frame[:8, -8:] = rng.integers(0, 256, (8, 8, 3))
    return frames


def numbered_frames(num_frames, height, width):
    """Makes grey frames of which each carries its own number, see number_of."""
    levels = np.arange(num_frames) * 4 + 20
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).astype(np.uint8)


def number_of(frame) -> int:
    """Returns the number that a frame of numbered_frames carries."""
    return round((np.asarray(frame, float).mean() - 20) / 4)


def encode(path, frames, codec="libx264", rotation=0, pixel_aspect=1, container=None, pix_fmt="yuv420p", rate=24,
           times=None, **options):
    """Encodes uint8 frames [T H W 3]; times: when each is shown, in 1/rate seconds; options: the codec's."""
    num_frames, height, width, _ = frames.shape
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.codec_context.thread_count = 1       # the same bytes whatever the machine
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames[i], format="rgb24")
            frame.pts = i if times is None else int(times[i])
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def mux(path, *sources, title=""):
    """Writes the packets of all sources as one stream, that of the first."""
    with av.open(str(path), "w") as out:
        out.metadata["title"] = title
        for source in sources:
            with av.open(str(source)) as container:
                if not out.streams:
                    stream = out.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)


def decode_all(path) -> np.ndarray:
    """Returns the frames of a file, decoded by PyAV one after the other."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read(path, *args) -> np.ndarray:
    return read_window(str(path), *args)[0].numpy()


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A function that returns the file of a coding, of 40 frames, and these; each is encoded once."""
    folder = tmp_path_factory.mktemp("coded")
    made = {}

    def get(name):
        if name not in made:
            _, codec, height, width, pix_fmt, options = next(row for row in CODINGS if row[0] == name)
            if codec not in av.codecs_available:
                pytest.skip(f"this build of PyAV has no {codec}")
            encode(folder / name, bar_frames(40, height, width), codec, pix_fmt=pix_fmt, **options)
            made[name] = folder / name, decode_all(folder / name)
        return made[name]
    os.environ["SVT_LOG"] = "0"     # else libsvtav1 prints
    yield get
    del os.environ["SVT_LOG"]


@pytest.mark.parametrize("name", [row[0] for row in CODINGS])
def test_windows_equal_a_sequential_decode(coded, name):
    path, frames = coded(name)
    assert frames.shape[0] == 40
    assert not any(np.array_equal(a, b) for a, b in zip(frames, frames[1:]))
    draw = random.Random(name)
    for num_frames, stride in ((1, 1), (8, 1), (4, 7), (10, 3)):
        start = draw.randrange(40 - (num_frames - 1) * stride)
        if num_frames == 1:
            start = 20      # of no_key.mp4 this needs frames from before the nearest that says it is a key frame
        expected = frames[start::stride][:num_frames]
        assert np.array_equal(read(path, num_frames, stride, start), expected), (num_frames, stride, start)
    with pytest.raises(UnreadableClip, match=f"{name}: has 40 frames, expected 8 at stride 3 from 19"):
        read_window(str(path), 8, 3, 19)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a265.mp4", "a.mpg"])
def test_a_window_costs_less_than_its_file(coded, name):
    """From the key frame before the window, at most 12 frames earlier, to its last frame."""
    path, _ = coded(name)
    assert read_window(str(path))[1] == 40
    assert read_window(str(path), 1, 1, 0)[1] == 1
    assert read_window(str(path), 1, 1, 39)[1] <= 12
    for start in (5, 17):
        dense = read_window(str(path), 22, 1, start)[1]
        assert 22 <= dense <= 22 + 12


def test_windows_reach_every_start_and_the_middle(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, numbered_frames(20, 32, 48))

    def numbers(*args):
        return [number_of(frame) for frame in read(path, *args)]
    starts = set()
    for seed in range(40):
        window = numbers(4, 5, None, torch.Generator().manual_seed(seed))
        assert window == list(range(window[0], window[0] + 16, 5))
        starts.add(window[0])
    assert starts == {0, 1, 2, 3, 4}, "20 frames, of which the window spans 16"
    assert numbers(4, 5) == [2, 7, 12, 17]
    assert numbers(5, 4) == [1, 5, 9, 13, 17], "it spans 17: 1 before, 2 after"
    assert numbers(20) == numbers() == list(range(20))
    assert numbers(None, 3, 4) == [4, 7, 10, 13, 16, 19]
    with pytest.raises(UnreadableClip, match="a.mp4: has 20 frames, expected 21"):
        read_window(str(path), 21, generator=torch.Generator())


def read_numbers(path, frames, times, **options):
    """Encodes frames shown at the times, and returns the numbers of those that read_window gives."""
    encode(path, frames, times=times, **options)
    return [number_of(frame) for frame in read(path)]


@pytest.mark.parametrize("rate, container", [(24, "mp4"), (Fraction(24000, 1001), "mkv"), (60, "mkv"), (30, "mkv")])
def test_a_constant_rate_gives_each_frame_once(tmp_path, rate, container):
    """Also where up to three frames are missing, mostly at the end, and where .mkv rounds times to milliseconds."""
    for num_frames, gaps in ((1, ()), (2, ()), (3, ()), (16, (5,)), (16, (1, 15)), (16, (15, 15, 15)), (40, ())):
        moments = np.arange(num_frames)
        for gap in gaps:
            moments[gap:] += 1
        numbers = read_numbers(tmp_path / f"a.{container}", numbered_frames(num_frames, 16, 16), moments, rate=rate)
        assert numbers == list(range(num_frames)), gaps


def test_a_variable_rate_gives_what_a_viewer_sees(tmp_path):
    """At 9 moments spread evenly over the clip, the frames nearest to each; the same in 8 drawn clips."""
    times = [0, 1, 2, 3, 20, 21, 22, 23, 24]
    assert read_numbers(tmp_path / "a.mp4", numbered_frames(9, 16, 16), times) == [0, 3, 3, 3, 4, 4, 4, 5, 8]
    rng = np.random.default_rng(0)
    for trial in range(8):
        gaps = rng.choice([1, 1, 2, 5], 40)
        if trial % 2:       # from 30 to 25 frames a second, or back
            gaps = rng.permutation([5, 6]).repeat(20)
        times = gaps.cumsum()
        moments = np.linspace(times[0], times[-1], 40)
        nearest = np.abs(times - moments[:, None]).argmin(1)
        assert read_numbers(tmp_path / "a.mp4", numbered_frames(40, 16, 16), times) == nearest.tolist()


def test_windows_of_a_variable_rate(tmp_path):
    times = np.cumsum([1, 1, 2, 1, 4, 1, 1, 9, 1, 2] * 4)
    encode(tmp_path / "a.mp4", bar_frames(40, 64, 96), times=times, **X264, g="12", bf="3")
    frames = decode_all(tmp_path / "a.mp4")
    moments = np.linspace(times[0], times[-1], 40)
    seen = frames[np.abs(times - moments[:, None]).argmin(1)]
    assert len(np.unique(seen, axis=0)) < 40, "some stand there twice"
    for start in range(0, 40 - 21, 3):
        assert np.array_equal(read(tmp_path / "a.mp4", 8, 3, start), seen[start::3][:8])


def test_a_rotated_clip_is_read_as_it_is_shown(tmp_path):
    frames = bar_frames(3, 64, 96)
    encode(tmp_path / "plain.mp4", frames)
    plain = read(tmp_path / "plain.mp4")
    for rotation in (90, 180, -90):
        encode(tmp_path / "turned.mp4", frames, rotation=rotation)
        assert np.array_equal(read(tmp_path / "turned.mp4"), np.rot90(plain, rotation // 90, (1, 2)))


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_pixels_that_are_not_square_become_so(tmp_path, name, codec):
    encode(tmp_path / name, bar_frames(8, 72, 96), codec, pixel_aspect=Fraction(4, 3))
    assert read(tmp_path / name).shape == (8, 72, 128, 3)


def test_an_animated_image_is_reported(tmp_path, capsys):
    """Only its first frame is used."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for name in ("moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, lossless=True)
        assert read_window(tmp_path / name)[0].shape == (1, 8, 8, 3)
        assert f"{name}: is animated" in capsys.readouterr().err
    frames[0].save(tmp_path / "still.png")
    read_window(tmp_path / "still.png")
    assert capsys.readouterr().err == ""


def test_images(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", 1), rgb[None])
    assert np.array_equal(read(tmp_path / "a.png", 1, 3, None, torch.Generator()), rgb[None])
    assert np.array_equal(data.read_image(str(tmp_path / "a.png")), rgb)
    with pytest.raises(UnreadableClip, match="a.png: has 1 frames, expected 2"):
        read_window(str(tmp_path / "a.png"), 2, 3)


@pytest.mark.parametrize("name, options", [
    ("a.jpg", {"quality": 100, "subsampling": 0}), ("a.webp", {"lossless": True})])
def test_an_image_is_turned_as_its_exif_entry_says(tmp_path, name, options):
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    for orientation, turned in ((6, np.rot90(rgb, -1)), (8, np.rot90(rgb)), (3, rgb[::-1, ::-1]), (2, rgb[:, ::-1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rgb).save(tmp_path / name, exif=exif, **options)
        ours = read(tmp_path / name)[0]
        assert ours.shape == turned.shape
        assert np.abs(ours.astype(int) - turned).mean() < 2, orientation


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA"])
def test_an_image_of_another_mode_becomes_rgb(tmp_path, mode):
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    if mode in ("P", "RGBA"):
        image = Image.fromarray(rgb).convert(mode)
        expected = np.array(image.convert("RGB"))
    else:
        grey = rgb[..., 0]
        image = Image.fromarray(grey if mode == "L" else grey.astype(np.uint16) * 257)
        expected = rgb[..., [0, 0, 0]]
    image.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png")[0], expected)


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("mpeg4", "mp4"), ("libvpx-vp9", "webm")])
def test_a_truncated_file_gives_whole_frames_or_an_error(tmp_path, codec, suffix):
    """Never a black, damaged or repeated frame.  The header of the .mp4 stands first, and counts the frames."""
    path = tmp_path / f"a.{suffix}"
    cut = tmp_path / f"cut.{suffix}"
    header_first = {"movflags": "faststart"} if suffix == "mp4" else {}
    encode(path, bar_frames(40, 64, 96), codec, container=header_first, g="12")
    frames = decode_all(path)
    content = path.read_bytes()
    for share in (0.03, 0.3, 0.6, 0.75, 0.9):
        cut.write_bytes(content[:int(share * len(content))])
        message = "cut.mp4: is cut off .* of 40 frames" if suffix == "mp4" and share > 0.5 else f"cut.{suffix}: "
        with pytest.raises(UnreadableClip, match=message):
            read_window(str(cut), 40)
        if suffix == "webm" and share > 0.5:
            assert np.array_equal(read(cut, 10, 1, 3), frames[3:13])
    cut.write_bytes(content[len(content) // 2:])
    with pytest.raises(UnreadableClip, match=f"cut.{suffix}: "):
        read_window(str(cut), 1)


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "libx264", X264 | {"g": "12", "bf": "3"}), ("a.mov", "mpeg2video", MPEG | {"g": "12", "bf": "2"})])
def test_a_damaged_frame_is_never_shown(tmp_path, name, codec, options):
    """Neither are those that refer to it; windows that do not need it are as they were."""
    path = tmp_path / name
    encode(path, bar_frames(48, 64, 96), codec, **options)
    frames = decode_all(path)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size, packet.pts) for packet in container.demux(video=0) if packet.size]
    num_trials = 0
    num_faults = 0
    for place, size, shown_at in packets[12:22:2]:      # of the GOP that shows frames 12 to 23
        damaged = bytearray(content)
        damaged[place + size // 2:place + size // 2 + 4] = b"\xd5\x3a\xd5\x3a"
        path.write_bytes(damaged)
        with av.open(str(path)) as container:
            if not any(frame.is_corrupt and frame.pts == shown_at for frame in container.decode(video=0)):
                continue        # nobody can see it, as in a third of all cases
        num_trials += 1
        for start in range(6, 42):
            try:
                assert np.array_equal(read(path, 1, 1, start)[0], frames[start]), (place, start)
            except UnreadableClip as error:
                num_faults += 1
                assert 9 <= start < 24
                assert path.name in str(error)
    assert num_trials > 1
    assert num_trials < num_faults < 14 * num_trials


def test_a_hole_that_the_demuxer_alone_sees_is_an_error(tmp_path):
    encode(tmp_path / "b.ts", bar_frames(60, 64, 96), **X264, g="12", bf="3")
    content = (tmp_path / "b.ts").read_bytes()
    blocks = [content[i:i + 188] for i in range(0, len(content), 188)]
    inner = [block for block in blocks if block[1:3] == b"\1\0"]    # of stream 0x100, not the first of a frame
    blocks.remove(inner[-3])
    (tmp_path / "b.ts").write_bytes(b"".join(blocks))
    encode(tmp_path / "a.avi", bar_frames(60, 64, 96), "libvpx", g="12")
    content = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content[:len(content) * 2 // 3])
    for name in ("b.ts", "a.avi"):
        with pytest.raises(UnreadableClip, match=f"{name}: is cut off or has missing packets, [2-6][0-9] of . frames"):
            read_window(str(tmp_path / name), 8)


def test_a_clip_trimmed_by_an_edit_list_is_read_as_players_show_it(tmp_path):
    """A player shows 20 of these 61 frames; the header's 61 are no reason to call the file cut off."""
    path = tmp_path / "a.mp4"
    encode(path, bar_frames(61, 64, 96), **X264, g="12", bf="3")
    frames = decode_all(path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12     # duration in milliseconds, then the first moment in the stream's 12288ths
    first = int.from_bytes(content[entry + 4:entry + 8], "big")
    content[entry:entry + 8] = round(20 * 1000 / 24).to_bytes(4, "big") + (first + 15 * 512).to_bytes(4, "big")
    path.write_bytes(content)
    assert np.array_equal(read(path), frames[15:35])
    assert np.array_equal(read(path, 4, 3, 7), frames[22:34:3])


def test_frames_that_an_avi_holds_are_no_hole(tmp_path):
    """They are counted in its header and have no packets."""
    times = np.cumsum([1, 1, 3, 1, 1] * 6)
    encode(tmp_path / "a.avi", bar_frames(30, 64, 96), "mpeg4", times=times)
    frames = decode_all(tmp_path / "a.avi")
    times[0] = 0        # the first is held from the beginning
    moments = np.linspace(0, times[-1], 30)
    assert np.array_equal(read(tmp_path / "a.avi"), frames[np.abs(times - moments[:, None]).argmin(1)])


@pytest.mark.parametrize("name", ["a.avi", "a.h264"])
def test_without_times_the_order_of_decoding_is_right(tmp_path, name):
    """A stream alone has no times; an .avi has none, and those that FFmpeg makes up for H.264's B-frames are wrong."""
    frames = bar_frames(61, 64, 96)
    encode(tmp_path / name, frames, **X264, g="12", bf="3")
    encode(tmp_path / "a.mp4", frames, **X264, g="12", bf="3")
    expected = decode_all(tmp_path / "a.mp4")
    for num_frames, stride, start in ((61, 1, 0), (4, 3, 13), (1, 1, 60)):
        window = read(tmp_path / name, num_frames, stride, start)
        assert np.array_equal(window, expected[start::stride][:num_frames])


# ---- what real files did to version 1 ----

def with_display_matrix(path, a, b, c, d):
    """Changes the display matrix of a .mp4: a player shows the pixel (x, y) at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(upright, content.index(b"tkhd"))
    content[place:place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0),
    (0, -1, -1, 0)])
def test_a_clip_is_turned_and_mirrored_as_its_matrix_says(tmp_path, a, b, c, d):
    encode(tmp_path / "a.mp4", bar_frames(3, 32, 48))
    stored = read(tmp_path / "a.mp4")
    with_display_matrix(tmp_path / "a.mp4", a, b, c, d)
    shown = read(tmp_path / "a.mp4")
    height, width = shown.shape[1:3]
    assert (height, width) == ((32, 48) if a else (48, 32))
    left = 0 if a + c > 0 else width - 1        # a mirrored axis begins at the far side
    top = 0 if b + d > 0 else height - 1
    for x, y in ((0, 0), (47, 0), (0, 31), (5, 9), (40, 20)):
        assert np.array_equal(shown[:, top + b * x + d * y, left + a * x + c * y], stored[:, y, x]), (x, y)


def test_each_window_of_a_clip_with_a_palette_has_its_colours(tmp_path):
    """The palette comes with the first packet; a decoder that is emptied before a window forgets it."""
    palette = np.random.default_rng(0).integers(0, 256, (256, 4)).astype(np.uint8)
    palette[:, 0] = 255
    places = np.random.default_rng(1).integers(0, 256, (12, 16, 24)).astype(np.uint8)
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("rawvideo", rate=24)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "pal8"
        for i, indices in enumerate(places):
            frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frames = decode_all(tmp_path / "a.avi")
    assert frames.std() > 30
    assert np.array_equal(read(tmp_path / "a.avi", 3, 2, 5), frames[5:10:2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_of_an_image_are_white(tmp_path, mode):
    """Their hidden colour is never seen."""
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:, :10] = (255, 0, 255, 0)
    rgba[:, 10:20] = (0, 0, 0, 128)
    rgba[:, 20:] = (10, 10, 10, 255)
    image = Image.fromarray(rgba)
    if mode == "P":
        image = image.quantize(8)
    image.convert(mode).save(tmp_path / "a.png")
    frame = read(tmp_path / "a.png")[0].astype(int)
    assert (frame[:, :10] == 255).all()
    assert np.abs(frame[:, 10:20] - 127).max() <= 3
    assert np.abs(frame[:, 20:] - 10).max() <= 1


def test_transparent_pixels_of_a_video_are_white(tmp_path):
    rgba = np.zeros((3, 16, 32, 4), np.uint8)
    rgba[:, :, :16] = (255, 0, 255, 0)
    rgba[:, :, 16:] = (10, 20, 30, 255)
    with av.open(str(tmp_path / "a.mov"), "w") as out:
        stream = out.add_stream("qtrle", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "argb"
        for i, frame in enumerate(rgba):
            frame = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format="argb")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frames = read(tmp_path / "a.mov")
    assert (frames[:, :, :16] == 255).all()
    assert (frames[:, :, 16:] == (10, 20, 30)).all()


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    encode(tmp_path / "Trip: day 1.mp4", bar_frames(5, 32, 48))
    write_text(tmp_path / "meta.csv", HEADER + "Trip: day 1.mp4,x,5,32,48,24\n")
    monkeypatch.chdir(tmp_path)
    assert len(read(read_meta("meta.csv").path(0))) == 5
    data.write_video("Trip: day 2.mp4", bar_frames(5, 32, 48))
    assert len(read("Trip: day 2.mp4")) == 5


def test_a_caption_may_be_long(tmp_path):
    text = "a very long film, told scene by scene; " * 4000
    meta = read_meta(write_text(tmp_path / "meta.csv", HEADER + f'a.mp4,"{text}",8,8,8,8\n' + ROW))
    assert meta.text(0) == text
    assert meta.text(1) == "x"


def test_of_two_recordings_in_one_file_the_first_is_used(tmp_path, capsys):
    """Its times start again in the middle; that the rest is not used is reported."""
    encode(tmp_path / "a.ts", bar_frames(48, 32, 48), **X264, g="12", bf="2")
    once = read(tmp_path / "a.ts")
    content = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(content + content)
    window = read(tmp_path / "a.ts", 8, 3, 10)
    assert np.array_equal(window, once[10:][::3][:8])
    assert "a.ts" in capsys.readouterr().err
    with pytest.raises(UnreadableClip, match="a.ts: has 4[0-9] frames, expected 60"):
        read_window(str(tmp_path / "a.ts"), 60)


def test_where_the_table_and_a_file_differ_the_file_is_right(tmp_path, capsys):
    encode(tmp_path / "fast.mp4", bar_frames(20, 144, 256), rate=30)
    encode(tmp_path / "small.mp4", bar_frames(20, 36, 64))
    write_text(tmp_path / "meta.csv", HEADER + "fast.mp4,fast,20,144,256,24\nsmall.mp4,small,20,144,256,24\n")
    meta = read_meta(str(tmp_path / "meta.csv"))
    settings = Settings({"144p": {16: (1.0, 1)}}, holdout=0.0)
    found = take(meta, settings, 0, 2)
    assert [batch["text"] for batch in found] == [["fast"], ["fast"]]
    assert [batch["fps"].tolist() for batch in found] == [[30.0], [30.0]]
    (fault,) = {(Path(fault.path).name, fault.reason.split(": ")[1]) for fault in faults_of(found)}
    assert fault[0] == "small.mp4" and "36x64" in fault[1]
    reported = capsys.readouterr().err
    assert re.search("fast.mp4.* 30 .* 24 ", reported)
    assert re.search("small.mp4.* 36x64.* 144x256", reported)


def test_music_with_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / "cover.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=8000)
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        out.mux(audio.encode(silence))
        out.mux(audio.encode())
        out.mux(cover.encode(av.VideoFrame.from_ndarray(bar_frames(1, 32, 48)[0], format="rgb24")))
        out.mux(cover.encode())
    with pytest.raises(UnreadableClip, match="cover.mp4: .*cover"):
        read_window(str(tmp_path / "cover.mp4"))


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory) -> Path:
    """A folder of files that no clip can be read from."""
    folder = tmp_path_factory.mktemp("unreadable")
    (folder / "empty.mp4").touch()
    (folder / "empty.jpg").touch()
    (folder / "folder.mp4").mkdir()
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    Image.new("RGB", (64, 48)).save(folder / "short.png")
    (folder / "short.png").write_bytes((folder / "short.png").read_bytes()[:-40])
    Image.new("1", (8, 8)).save(folder / "huge.bmp")
    content = bytearray((folder / "huge.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", 20_000, 20_000)     # width and height
    (folder / "huge.bmp").write_bytes(content)
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(4000))
    encode(folder / "tall.webm", bar_frames(5, 96, 64), "libvpx")
    encode(folder / "wide.webm", bar_frames(5, 64, 96), "libvpx", times=range(5, 10))
    mux(folder / "two.mkv", folder / "tall.webm", folder / "wide.webm")
    encode(folder / "a.mp4", bar_frames(5, 64, 96), pixel_aspect=2)
    content = (folder / "a.mp4").read_bytes()
    (folder / "flat.mp4").write_bytes(content.replace(b"pasp\0\0\0\2\0\0\0\1", b"pasp\0\0\0\1\0\0\x27\x10"))
    (folder / "new.mp4").write_bytes(content.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    return folder


@pytest.mark.parametrize("name, reason", [
    ("gone.mp4", "no such file"), ("gone.png", "no such file"), ("empty.mp4", "Invalid data"), ("bad.png", "."),
    ("short.png", "."), ("huge.bmp", "exceeds limit"), ("empty.jpg", "cannot identify"),
    ("sound.wav", "no video stream"), ("new.mp4", "no video stream of a known codec"),
    ("two.mkv", "several sizes"), ("flat.mp4", "1/10000"),
    ("folder.mp4", ".")])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(unreadable, name, reason):
    with pytest.raises(UnreadableClip, match=f"{name}: .*{reason}"):
        read_window(str(unreadable / name))


def test_a_frame_of_more_than_64_megapixels_is_an_error(tmp_path):
    """A damaged header with such a size would take all memory."""
    for name, width in (("small.mov", 64), ("large.mov", 8400)):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("png", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, 8192, "monob"
            frame = av.VideoFrame(width, 8192, "monob")
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            frame.pts = 0
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
    assert read(tmp_path / "small.mov").shape == (1, 8192, 64, 3)
    with pytest.raises(UnreadableClip, match="large.mov: "):
        read_window(str(tmp_path / "large.mov"))


def test_a_title_in_no_known_alphabet_does_no_harm(tmp_path):
    encode(tmp_path / "a.mkv", bar_frames(5, 64, 96))
    mux(tmp_path / "b.mkv", tmp_path / "a.mkv", title="TITLE")
    (tmp_path / "b.mkv").write_bytes((tmp_path / "b.mkv").read_bytes().replace(b"TITLE", b"T\xffTLE"))
    assert len(read(tmp_path / "b.mkv")) == 5


def damage(content: bytes, draw: random.Random) -> bytes:
    """Returns the content cut short, with a piece cut out, zeroed, inserted or moved, or with some bits or bytes
    changed, in some cases those of its ends."""
    content = bytearray(content)
    kind = draw.choice(("cut off", "cut out", "zeroed", "inserted", "moved", "ends", "bits", "bits"))
    start = draw.randrange(len(content))
    size = draw.choice((1, 16, 188, 1000))
    piece = content[start:start + size]
    if kind == "cut off":
        return bytes(content[:start])
    if kind in ("cut out", "moved"):
        del content[start:start + size]
    if kind == "zeroed":
        content[start:start + size] = bytes(len(piece))
    if kind in ("inserted", "moved"):
        place = draw.randrange(len(content))
        content[place:place] = piece
    if kind not in ("ends", "bits"):
        return bytes(content)
    for _ in range(draw.choice((1, 2, 8, 32))):
        if kind == "ends":
            content[draw.randrange(-500, 500) % len(content)] = draw.choice((0, 255, draw.randrange(256)))
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def can_be_read(path, num_frames) -> bool:
    """Returns whether read_window gives all frames, or UnreadableClip; any other error fails the test."""
    started = time.monotonic()
    try:
        video, _ = read_window(str(path), num_frames, 3, None, torch.Generator())
        assert video.dtype == torch.uint8
        assert len(video) == num_frames
        return True
    except UnreadableClip as error:
        assert str(path) in str(error)
        return False
    finally:
        assert time.monotonic() - started < 10


TRIALS = [8, pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_trials", TRIALS)
@pytest.mark.parametrize("name, codec, container", [
    ("a.mp4", "libx264", {}), ("b.mp4", "libx264", {"movflags": "faststart"}), ("c.mov", "mpeg4", {}),
    ("d.webm", "libvpx", {"fflags": "+bitexact"}), ("e.mpg", "mpeg2video", {})])
def test_a_damaged_video_is_read_or_is_an_error_of_ours(tmp_path, name, codec, container, num_trials):
    encode(tmp_path / name, bar_frames(24, 48, 64), codec, container=container, g="8")
    content = (tmp_path / name).read_bytes()
    draw = random.Random(name)
    outcomes = []
    for _ in range(num_trials):
        (tmp_path / name).write_bytes(damage(content, draw))
        outcomes.append(can_be_read(tmp_path / name, 6))
    assert not all(outcomes)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_trials", [40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_damaged_image_is_read_or_is_an_error_of_ours(tmp_path, name, num_trials):
    """Pillow raises seven types of errors."""
    exif = Image.Exif()
    exif[0x0112] = 6        # turned by 90 degrees
    exif[0x011A] = 72.5     # dots per inch
    Image.new("RGB", (32, 24), "red").save(tmp_path / name, exif=exif)
    content = (tmp_path / name).read_bytes()
    draw = random.Random(name)
    outcomes = []
    for _ in range(num_trials):
        (tmp_path / name).write_bytes(damage(content, draw))
        outcomes.append(can_be_read(tmp_path / name, 1))
    assert not all(outcomes)


# ---- real clips ----

REAL = os.environ.get("NANOSORA_CLIPS", "")
REAL_NAMES = sorted(path.name for path in Path(REAL).glob("*.*") if path.suffix != ".md") if REAL else ["none.mp4"]
needs_real_clips = pytest.mark.skipif(not REAL, reason="NANOSORA_CLIPS names no folder of real clips")


@pytest.mark.slow
@needs_real_clips
@pytest.mark.parametrize("name", [name for name in REAL_NAMES if not name.startswith("corrupt")])
def test_windows_of_real_clips_equal_a_sequential_decode(name):
    """The number of frames, their size as displayed, and what they show."""
    path = Path(REAL) / name
    draw = random.Random(name)
    with av.open(str(path)) as container:
        times = sorted(packet.pts for packet in container.demux(video=0) if packet.size and not packet.is_discard)
    n = len(times)
    grid = np.arange(n)
    if "vfr" in name:
        moments = np.linspace(times[0], times[-1], n)
        grid = np.abs(np.array(times) - moments[:, None]).argmin(1)
        assert len(set(grid)) < n - 20
    windows = [(8, 3, 0), (8, 3, n - 22), (8, 3, None), (1, 1, draw.randrange(n)), (5, 7, draw.randrange(n - 28))]
    expected = []       # the numbers of each window's frames
    for num_frames, stride, start in windows:
        middle = (n - 22) // 2
        expected.append(grid[middle if start is None else start:][::stride][:num_frames].tolist())
    wanted = set(sum(expected, []))
    kept = {}
    with av.open(str(path)) as container:
        aspect = container.streams.video[0].sample_aspect_ratio or 1
        for i, frame in enumerate(container.decode(video=0)):
            assert frame.pts == times[i]
            if i in wanted:
                kept[i] = frame.to_ndarray(format="rgb24", width=round(frame.width * aspect), height=frame.height)
    assert i == n - 1
    for window, numbers in zip(windows, expected):
        assert np.array_equal(read(path, *window), [kept[number] for number in numbers]), window
    height, width = kept[0].shape[:2]
    assert f"{width}x{height}" in name or ("portrait" in name) == (height > width)
    with pytest.raises(UnreadableClip, match=f"{name}: has {n} frames"):
        read_window(str(path), 8, 3, n - 21)


@pytest.mark.slow
@needs_real_clips
@pytest.mark.parametrize("name", [name for name in REAL_NAMES if name.startswith("corrupt")])
def test_real_damaged_clips_are_errors(name):
    with pytest.raises(UnreadableClip, match=f"{name}: "):
        read_window(str(Path(REAL) / name))
    if name.endswith("midgop.mpg"):     # 55 frames are whole, the last is not
        with pytest.raises(UnreadableClip, match="has 56 frames, expected 190"):
            read_window(str(Path(REAL) / name), 190)
        whole = Path(REAL) / "city_cc0_720x405_mpeg2.mpg"
        assert np.array_equal(read(Path(REAL) / name, 16, 3, 9), read(whole, 16, 3, 9))
        with pytest.raises(UnreadableClip, match="damaged"):
            read_window(str(Path(REAL) / name), 16, 3, 10)


# ---- batches ----

CLIPS = Settings({"240p": {16: (0.5, 1)}, "144p": {1: (1.0, 2), 16: (1.0, 2)}}, world=2, seed=1)


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """The table of a folder of clips and images; broken.mp4 cannot be read, short.mp4 has fewer frames than it says."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i, (num_frames, height, width) in enumerate([(20, 144, 256), (34, 160, 256), (49, 240, 426)] * 4):
        encode(folder / f"{i}.mp4", bar_frames(num_frames, height, width), g="10", bf="2", preset="ultrafast")
        rows.append(f"{i}.mp4,clip {i},{num_frames},{height},{width},24")
    for i in range(4):
        Image.fromarray(np.full((150, 260, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,image {i},1,150,260,")
    (folder / "broken.mp4").write_bytes(b"not a video at all" * 100)
    encode(folder / "short.mp4", bar_frames(12, 144, 256), preset="ultrafast")
    rows += ["broken.mp4,broken,20,144,256,24", "short.mp4,short,64,144,256,24"]
    return read_meta(write_text(folder / "meta.csv", HEADER + "\n".join(rows) + "\n"))


def take(meta, settings, first=0, last=8, validation=False, **options) -> list[dict]:
    """Returns the batches of steps first .. last - 1."""
    sampler = BucketSampler(meta, settings, validation)
    return list(batches(sampler, ClipDataset(meta, settings, validation), first, last, **options))


@pytest.fixture(scope="module")
def eight(meta) -> list[dict]:
    """The batches of the first eight steps."""
    return take(meta, CLIPS)


def same(batch: dict, other: dict) -> bool:
    """Returns whether two batches are equal in all but the time that they took."""
    if batch.keys() != other.keys():
        return False
    for name in batch.keys() - {"waited"}:
        if isinstance(batch[name], torch.Tensor):
            if not torch.equal(batch[name], other[name]):
                return False
        elif batch[name] != other[name]:
            return False
    return True


def all_same(some: list[dict], others: list[dict]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


def faults_of(some: list[dict]) -> list[Fault]:
    return [fault for batch in some for fault in batch["faults"]]


def resized(frame, height, width) -> np.ndarray:
    """Returns Pillow's resize of a frame until it covers height x width, and the middle of that."""
    H, W, _ = frame.shape
    scale = max(height / H, width / W)
    new_height = max(height, round(H * scale))
    new_width = max(width, round(W * scale))
    large = np.asarray(Image.fromarray(frame).resize((new_width, new_height), Image.BILINEAR))
    top = (new_height - height) // 2
    left = (new_width - width) // 2
    return large[top:top + height, left:left + width]


def furthest(frame, other) -> int:
    """Returns by how many levels two pictures differ at most."""
    return int(np.abs(np.asarray(frame, int) - np.asarray(other, int)).max())


def test_a_batch_holds_its_clips_and_what_the_model_is_conditioned_on(meta, eight):
    for batch in eight:
        bucket = batch["bucket"]
        size = len(batch["text"])
        assert size == 2 * CLIPS.buckets[bucket.resolution][bucket.num_frames][1]
        assert batch["video"].shape == (size, bucket.num_frames, bucket.height, bucket.width, 3)
        assert batch["video"].dtype == torch.uint8
        assert batch["decoded"] >= size * bucket.num_frames
        assert batch["slots"].tolist() == list(range(size))
        assert batch["waited"] > 0
        for name in ("height", "width", "num_frames"):
            assert batch[name].tolist() == [getattr(bucket, name)] * size
        assert batch["ar"].tolist() == pytest.approx([bucket.width / bucket.height] * size), "as Open-Sora trains"
        assert batch["fps"].tolist() == [120.0 if bucket.num_frames == 1 else 24.0] * size
        for video, text in zip(batch["video"].numpy(), batch["text"]):
            frames = read(meta.path(texts_of(meta).index(text)))
            shown = [resized(frame, bucket.height, bucket.width) for frame in frames]
            starts = range(len(frames) - bucket.num_frames + 1)
            assert any(furthest(video[0], shown[i]) <= 1 and furthest(video[-1], shown[i + len(video) - 1]) <= 1
                       for i in starts), f"{text} is not a window of its file"


def test_frames_are_resized_and_the_middle_is_cut_out(tmp_path):
    """Never off by a pixel, whatever the size: at most one level away from what Pillow gives."""
    sizes = [(144, 256), (144, 300), (288, 512), (131, 227), (300, 311), (433, 1000), (1001, 433), (58, 72), (72, 74),
             (66, 96), (64, 52), (2, 1800), (1800, 2), (47, 2001), (6, 620)]
    rng = np.random.default_rng(0)
    images = []
    rows = []
    for i, (height, width) in enumerate(sizes):
        images.append(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i},1,{height},{width},\n")
    meta = read_meta(write_text(tmp_path / "meta.csv", HEADER + "".join(rows)))
    seen = set()
    for batch in take(meta, Settings({"144p": {1: (1.0, 1)}, "64": {1: (1.0, 1)}}), 0, len(sizes)):
        number = int(batch["text"][0])
        bucket = batch["bucket"]
        assert furthest(batch["video"][0, 0], resized(images[number], bucket.height, bucket.width)) <= 1, sizes[number]
        seen.add(number)
    assert seen == set(range(len(sizes)))


def test_batches_do_not_depend_on_resuming(meta, eight):
    state = torch.get_rng_state()
    assert all_same(eight[5:], take(meta, CLIPS, 5))
    assert {Path(fault.path).name for fault in faults_of(eight)} == {"broken.mp4", "short.mp4"}
    assert torch.equal(state, torch.get_rng_state()), "the global stream is left alone"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_the_same_global_batch(meta, world):
    settings = Settings({"144p": {1: (1.0, 2), 16: (1.0, 2)}}, world=2, seed=1)
    whole = take(meta, settings, 0, 3)
    for rank in range(world):
        for batch, part in zip(whole, take(meta, settings, 0, 3, rank=rank, world=world), strict=True):
            assert torch.equal(part["video"], batch["video"][rank::world])
            assert part["text"] == batch["text"][rank::world]
            assert part["slots"].tolist() == batch["slots"][rank::world].tolist()
            assert part["fps"].tolist() == batch["fps"][rank::world].tolist()


def test_the_model_is_conditioned_on_the_fps_of_the_frames_taken(meta):
    settings = Settings({"144p": {1: (1.0, 1), 8: (1.0, 2)}}, frame_interval=2)
    for as_released, fps in ((False, 12.0), (True, 24.0)):      # as released: that of the file
        fps_of = {}
        for batch in take(meta, replace(settings, model=STDiTConfig(as_released=as_released)), 0, 6):
            fps_of[batch["bucket"].num_frames] = batch["fps"][0].item()
        assert fps_of == {1: 120.0, 8: fps}


@pytest.fixture(scope="module")
def numbered_meta(tmp_path_factory):
    """The table of one clip of 49 frames that carry their own number."""
    folder = tmp_path_factory.mktemp("numbered")
    encode(folder / "0.mp4", numbered_frames(49, 144, 256), preset="ultrafast")
    return table_of(folder, [(49, 144, 256)])


def numbers_drawn(meta, settings, num_steps, validation=False) -> list[list[int]]:
    """Returns the numbers of the frames that each step draws from the one clip of a table."""
    found = []
    for batch in take(meta, settings, 0, num_steps, validation):
        found.append([number_of(frame) for frame in batch["video"][0]])
    return found


def test_windows_are_drawn_again_for_each_step(numbered_meta):
    settings = Settings({"144p": {8: (1.0, 1)}}, frame_interval=3, seed=1)
    windows = numbers_drawn(numbered_meta, settings, 12)
    for window in windows:
        assert window == list(range(window[0], window[0] + 24, 3))
    assert len({window[0] for window in windows}) > 7
    assert numbers_drawn(numbered_meta, replace(settings, seed=2), 12) != windows
    assert [window[0] for window in windows[:4]] == WINDOWS, "as in every version"


def test_windows_may_be_fixed_for_each_clip(numbered_meta):
    settings = Settings({"144p": {8: (1.0, 1)}}, windows=3, seed=1)
    starts = []
    for seed in (1, 9):
        windows = numbers_drawn(numbered_meta, replace(settings, seed=seed), 16)
        starts.append({window[0] for window in windows})
    assert starts[0] == starts[1]
    assert 1 < len(starts[0]) <= 3
    assert sorted(starts[0]) == FIXED_WINDOWS, "as in every version: the cache holds them"


def test_the_windows_of_validation_are_in_the_middle(numbered_meta):
    settings = Settings({"144p": {8: (1.0, 1)}}, frame_interval=3, holdout=1.0)
    for window in numbers_drawn(numbered_meta, settings, 2, validation=True):
        assert window == list(range(13, 13 + 24, 3)), "it spans 22 of 49 frames"


def test_an_unreadable_clip_is_replaced_listed_once_and_the_same_when_resumed(meta, eight, tmp_path):
    """Also by a run that was killed while it wrote the list, and if the files have been mended meanwhile."""
    faults = faults_of(eight)
    file = tmp_path / "run/bad_clips.csv"
    bad = BadClips(file, 0.5)
    bad.add(faults[:1], 8)
    bad.add(faults[1:], 8)
    with open(file, newline="") as f:
        listed = list(csv.DictReader(f))
    assert {row["path"] for row in listed} == {fault.path for fault in faults}
    for row, fault in zip(listed, faults):
        assert (int(row["step"]), int(row["slot"]), int(row["attempt"])) == fault[:3]
        assert row["reason"] == fault.reason

    with open(file, "a") as f:
        f.write("12,4,0,half a li")
    again = BadClips(file, 0.5)
    mended = tmp_path / "mended"
    mended.mkdir()
    for path in Path(meta.path(0)).parent.iterdir():
        if "broken" in path.name or "short" in path.name:
            (mended / path.name).symlink_to(meta.path(3))
        elif path.suffix in (".mp4", ".png"):
            (mended / path.name).symlink_to(path)
    write_text(mended / "meta.csv", (Path(meta.path(0)).parent / "meta.csv").read_text())
    mended_meta = read_meta(str(mended / "meta.csv"))
    resumed = take(mended_meta, CLIPS, known=again.known)
    for batch, other in zip(eight, resumed, strict=True):
        assert torch.equal(batch["video"], other["video"])
        assert batch["text"] == other["text"]
    assert not faults_of(take(mended_meta, CLIPS))
    again.add(faults_of(resumed), 8)
    assert len(file.read_text().splitlines()) == 1 + len(faults)


def test_too_many_unreadable_clips_stop_training(tmp_path):
    """Of fewer than 200, a handful says nothing of all."""
    bad = BadClips(tmp_path / "bad_clips.csv", 0.05)
    faults = [Fault(0, i, 0, f"{i}.mp4", "no such file") for i in range(11)]
    bad.add(faults[:9], 100)
    bad.add(faults[9:10], 100)      # 10 of 210 are less than 5%
    with pytest.raises(ValueError, match="11 of 211 clips(.|\n)*bad_clips.csv(.|\n)*max_bad"):
        bad.add(faults[10:], 0)
    assert len((tmp_path / "bad_clips.csv").read_text().splitlines()) == 12


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bucket_of_which_no_clip_can_be_read_is_an_error(tmp_path, num_workers):
    meta = table_of(tmp_path, [(20, 144, 256)] * 4)
    settings = Settings({"144p": {16: (1.0, 2)}}, num_workers=num_workers)
    with pytest.raises(ValueError, match="step 0: none of .*144p(.|\n)*/[0-3].mp4: no such file"):
        take(meta, settings, 0, 1)


def make_trouble(monkeypatch, path, trouble):
    """Lets something happen wherever the file of that path is read, in a forked process too."""
    read_it = data.read_clip

    def read_clip(name, *args):
        if name == path:
            trouble()
        return read_it(name, *args)
    monkeypatch.setattr(data, "read_clip", read_clip)


def hang():
    time.sleep(1000)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def have_a_bug():
    raise KeyError("a bug")


@pytest.fixture
def troubled_clip(meta) -> int:
    """A clip of step 1."""
    return int(BucketSampler(meta, CLIPS).plan(1).clips[0, 0])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bug_is_an_error_and_not_an_unreadable_clip(meta, troubled_clip, monkeypatch, capfd, num_workers):
    make_trouble(monkeypatch, meta.path(troubled_clip), have_a_bug)
    with pytest.raises((KeyError, ValueError)) as error:
        take(meta, replace(CLIPS, num_workers=num_workers))
    assert "a bug" in str(error.value) + capfd.readouterr().err


# ---- reading processes ----

@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_workers(meta, eight, num_workers):
    settings = replace(CLIPS, num_workers=num_workers)
    assert all_same(eight, take(meta, settings))
    assert all_same(eight[5:], take(meta, settings, 5))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("trouble", [hang, die])
def test_a_worker_that_hangs_or_dies_once_changes_no_batch(meta, eight, troubled_clip, tmp_path, monkeypatch, capfd,
                                                           trouble, num_workers):
    def trouble_once():
        if not (tmp_path / "happened").exists():
            (tmp_path / "happened").touch()
            trouble()
    make_trouble(monkeypatch, meta.path(troubled_clip), trouble_once)
    assert all_same(eight, take(meta, replace(CLIPS, num_workers=num_workers, read_timeout=3)))
    assert meta.path(troubled_clip) in capfd.readouterr().err


@pytest.mark.slow
def test_a_worker_may_die_while_a_step_is_trained(meta, eight, capfd):
    settings = replace(CLIPS, num_workers=2)
    made = batches(BucketSampler(meta, settings), ClipDataset(meta, settings), 0, 8)
    found = [next(made)]
    for process in multiprocessing.active_children():
        process.kill()
    time.sleep(2)                           # a step, after which the next plan goes to processes that are gone
    assert all_same(eight, [*found, *made])
    assert "step 1: a reading process died" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [hang, die])
def test_a_clip_that_always_kills_its_worker_stops_the_run_and_is_named(meta, troubled_clip, monkeypatch, trouble):
    make_trouble(monkeypatch, meta.path(troubled_clip), trouble)
    with pytest.raises(ValueError, match=f"step 1: .*{re.escape(meta.path(troubled_clip))}"):
        take(meta, replace(CLIPS, num_workers=1, read_timeout=2))


@pytest.mark.slow
def test_signals_to_the_whole_group_do_not_end_the_workers(meta, eight):
    """A scheduler signals all processes of a job; the workers are needed until their parent has finished its step."""
    settings = replace(CLIPS, num_workers=2)
    made = batches(BucketSampler(meta, settings), ClipDataset(meta, settings), 0, 8)
    found = [next(made)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    assert all_same(eight, [*found, *made])
    for process in multiprocessing.active_children():       # they were killed, which takes a moment
        process.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])     # what Linux, other systems, Python 3.14 use
def test_workers_end_with_their_parent(meta, tmp_path, method):
    """Also when it is killed."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing
import sys
import time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from dataclasses import replace
from test_data import CLIPS, BucketSampler, ClipDataset, batches, read_meta

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    meta = read_meta({str(Path(meta.path(0)).parent / "meta.csv")!r})
    settings = replace(CLIPS, num_workers=2)
    for batch in batches(BucketSampler(meta, settings), ClipDataset(meta, settings), 0, 8):
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        time.sleep(100)
""")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    for _ in range(150):
        if not any(is_alive(pid) for pid in workers):
            break
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def spawned():
    """Starts processes as on macOS and Windows, where all that they get is pickled."""
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(method, force=True)


def first_batches(meta, settings):
    """Returns three batches, the seconds until the first came, and the most memory in MB that a worker has for itself.

    A worker shares the pages of a mapped file; those that it wrote itself, such as a copy of a table, are Anonymous."""
    started = time.monotonic()
    made = batches(BucketSampler(meta, settings), ClipDataset(meta, settings), 0, 3)
    first = next(made)
    seconds = time.monotonic() - started
    own = [0.0]
    for process in multiprocessing.active_children():
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        own.append(int(re.search(r"Anonymous: +(\d+) kB", rollup)[1]) / 1000)
    return [first, *made], seconds, max(own)


@pytest.mark.slow
def test_spawned_workers_share_a_table_of_a_million_rows(meta, tmp_path, spawned):
    """They start about as fast as over 1,000 rows, in about as much memory, and read what a single process reads."""
    settings = Settings({"144p": {16: (1.0, 2)}}, world=2, seed=1)
    results = []
    for num_rows in (1_000, 1_000_000):
        folder = tmp_path / str(num_rows)
        lines = [f"{i}.mp4,clip {i} of a table that is very long,34,160,256,24\n" for i in range(num_rows)]
        file = write_text(folder / "meta.csv", HEADER + "".join(lines))
        del lines
        table = read_meta(file)
        assert len(table) == num_rows
        sampler = BucketSampler(table, settings)
        for step in range(3):       # only the clips that these steps read exist
            for clip in sampler.plan(step).clips[:, 0].tolist():
                Path(table.path(clip)).symlink_to(meta.path((0, 1, 2, 4)[clip % 4]))
        started = time.monotonic()
        table = read_meta(file)
        assert time.monotonic() - started < 5, "it is opened again, not read again"
        assert len(pickle.dumps((table, ClipDataset(table, settings)))) < 10_000
        expected, _, _ = first_batches(table, settings)
        made, seconds, megabytes = first_batches(table, replace(settings, num_workers=2))
        assert not faults_of(expected)
        assert all_same(expected, made)
        results.append((seconds, megabytes))
    (few_seconds, few_megabytes), (many_seconds, many_megabytes) = results
    assert few_megabytes > 10, "the memory of the workers was not found"
    assert many_megabytes - few_megabytes < 25, "of the 40 MB that the rows take alone"
    assert many_seconds - few_seconds < 10


# ---- writing ----

def test_pixels_become_the_models_range_and_come_back():
    frames = np.arange(256 * 3).reshape(1, 16, 16, 3).astype(np.uint8)
    video = data.to_video(frames)
    assert video.shape == (3, 1, 16, 16)
    assert (video.min(), video.max()) == (-1, 1)
    assert np.array_equal(data.to_uint8(video), frames)
    assert data.to_uint8(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1)).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_written_video_has_its_frames_in_order(tmp_path, name):
    data.write_video(tmp_path / "new folder" / name, numbered_frames(11, 32, 48), fps=10)
    assert os.listdir(tmp_path / "new folder") == [name]
    frames = read(tmp_path / "new folder" / name)
    assert [number_of(frame) for frame in frames] == list(range(11))
    assert np.abs(frames[5].astype(int) - (20 + 4 * 5)).max() <= 2
    with av.open(str(tmp_path / "new folder" / name)) as container:
        assert container.streams.video[0].average_rate == 10


def test_a_contact_sheet_has_the_frames_in_reading_order(tmp_path):
    """Eight a row, each enlarged to 128 pixels and followed by a white rule of 2; places without a frame are white."""
    data.write_video(tmp_path / "a.png", numbered_frames(11, 4, 6))
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 130, 8 * 194, 3)
    for place in range(16):
        row, column = divmod(place, 8)
        cell = sheet[130 * row:130 * row + 130, 194 * column:194 * column + 194]
        level = 20 + 4 * place if place < 11 else 255
        assert (cell[:128, :192] == level).all(), place
        assert (cell[128:] == 255).all()
        assert (cell[:, 192:] == 255).all()


def test_a_contact_sheet_keeps_the_pixels(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 200, 160, 3)).astype(np.uint8)
    data.write_video(tmp_path / "a.png", frames)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(sheet[:200, 162:322], frames[1])
    data.write_video(tmp_path / "one.png", frames[:1])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), frames[0]), "one frame stands alone"


def test_a_folder_of_frames_has_those_of_the_last_time_alone(tmp_path):
    frames = bar_frames(8, 32, 48)
    for n in (8, 5):
        data.write_video(tmp_path / "frames", frames[:n])
    assert os.listdir(tmp_path) == ["frames"]
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert np.array_equal(pictures, frames[:5])


def test_odd_sizes_are_padded(tmp_path):
    data.write_video(tmp_path / "odd.mp4", np.zeros((3, 33, 31, 3), np.uint8), 24)
    assert read(tmp_path / "odd.mp4").shape == (3, 34, 32, 3)


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    write_text(tmp_path / "precious" / "thesis.txt", "years of work")
    with pytest.raises(ValueError, match="precious.*thesis.txt"):
        data.write_video(tmp_path / "precious", bar_frames(3, 32, 48))
    assert os.listdir(tmp_path / "precious") == ["thesis.txt"]


@pytest.mark.parametrize("name, frames, named", [
    ("a.mp4", np.zeros((2, 8, 8, 3), np.float32), r"a.mp4.*float32 \[2, 8, 8, 3\]"),
    ("a.mp4", np.zeros((0, 8, 8, 3), np.uint8), r"a.mp4.*uint8 \[0, 8, 8, 3\]"),
    ("a.mp4", np.zeros((8, 8, 3), np.uint8), r"a.mp4.*uint8 \[8, 8, 3\]"),
    ("a.avi", np.zeros((2, 8, 8, 3), np.uint8), "a.avi.*'.avi'")])
def test_what_cannot_be_written_is_named(tmp_path, name, frames, named):
    with pytest.raises(ValueError, match=named):
        data.write_video(tmp_path / name, frames)
    assert not os.listdir(tmp_path)


@pytest.fixture
def crash_at_the_end(monkeypatch):
    """Lets whoever gives a finished file its name fail, as a crash just before that would."""
    def crash(*args, **options):
        raise KeyboardInterrupt
    for name in ("replace", "rename", "link"):
        monkeypatch.setattr(os, name, crash)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_crash_leaves_the_old_video_whole(tmp_path, request, name):
    data.write_video(tmp_path / name, numbered_frames(5, 32, 48))
    before = (tmp_path / name).read_bytes()
    request.getfixturevalue("crash_at_the_end")
    with pytest.raises(KeyboardInterrupt):
        data.write_video(tmp_path / name, numbered_frames(9, 32, 48))
    assert (tmp_path / name).read_bytes() == before


def test_a_file_appears_whole_or_not_at_all(tmp_path, request):
    file = tmp_path / "note.txt"
    with data.atomic_write(file) as part:
        part.write_text("first")
    assert file.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), data.atomic_write(file) as part:
        part.write_text("half")
        assert file.read_text() == "first"
        raise KeyboardInterrupt
    request.getfixturevalue("crash_at_the_end")
    with pytest.raises(KeyboardInterrupt), data.atomic_write(file) as part:
        part.write_text("all of it")
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["note.txt"], "nothing stays beside it"


# ---- python data.py META CONFIG ----

@pytest.fixture
def tiny_table(tmp_path) -> Path:
    table_of(tmp_path, [(8, 64, 64)] * 70 + [(8, 64, 96)] * 5 + [(1, 64, 64)] * 3)
    return tmp_path / "meta.csv"


def test_the_script_shows_which_clips_train(run_script, tiny_table):
    ended = run_script("data", tiny_table, "configs/tiny.py", "--holdout=0")
    assert ended.status == 0
    assert re.search("64 x 8 .* 75 ", ended.out)
    assert re.search("64 x 1 .* 3 ", ended.out)
    assert not ended.err


@pytest.mark.parametrize("args, named", [
    (["none.csv", "configs/tiny.py"], "none.csv"),
    (["META"], "CONFIG"),
    (["META", "configs/tny.py"], "configs/tny.py"),
    (["META", "configs/tiny.py", "--sede=1"], "sede"),
    (["META", "configs/tiny.py", "--holdout=1.0"], "held out"),
    (["META", "configs/stage1.py"], "too small")])
def test_a_mistake_on_the_command_line_is_one_error(run_script, tiny_table, args, named):
    ended = run_script("data", *[str(tiny_table) if arg == "META" else arg for arg in args])
    assert ended.status == 2
    assert "error: " in ended.err
    assert named in ended.err
    assert "Traceback" not in ended.err


def test_an_error_with_its_traceback(run_script):
    with pytest.raises(FileNotFoundError, match="none.csv"):
        run_script("data", "none.csv", "configs/tiny.py", "--debug")


@pytest.mark.slow
def test_the_script_starts(tiny_table):
    command = [sys.executable, "data.py", tiny_table, "configs/tiny.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert "64 x 8" in ended.stdout
    assert not ended.stderr
