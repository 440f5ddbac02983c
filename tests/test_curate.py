"""Tests of curate.py without networks: cuts, motion, duplicates, rules, and what a run makes of a folder of videos.

Most tests look at the tables and clips of one curated folder of small made-up videos (the fixture `curated`).  Real
clips with labelled cuts are slow tests; they need the environment variable NANOSORA_CLIPS, a folder.
"""
import base64
import contextlib
import csv
import errno
import html
import io
import itertools
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import curate
from data import read_meta, read_window

ROOT = Path(__file__).parents[1]
CLIPS = os.environ.get("NANOSORA_CLIPS")

# Seconds at which the first frame of a new shot is shown, counted from the first frame of the file.  Each was seen on
# a contact sheet of the frames around it.
CUTS = {
    "bbb_multishot_720p24_audio.mp4": [2.0, 5.125, 10.75, 12.625, 14.792, 16.875, 21.292, 31.083, 32.75, 41.083, 45.25,
                                       54.0, 59.292],
    # A log that swings through the picture fills it at 11 s, in derived_bbb_vfr at 6 s: one shot before and after.
    "bbb_action_720p24.mp4": [8.333, 10.875, 13.75, 46.708],
    "bbb_titles_text_720p24.mp4": [11.875, 15.75, 23.042],
    "city_cc0_720x405_mpeg2.mpg": [4.64],
    "concert_multicam_176x144_vp9_60s.webm": [7.625, 10.125, 15.208, 16.458, 20.208, 23.0, 29.417, 30.875, 36.0, 38.458,
                                              39.958, 42.667, 46.625, 48.417, 49.5, 54.167, 57.042, 59.667],
    "derived_bbb_portrait_406x720.mp4": [1.292],
    "derived_bbb_vfr_640x360.mp4": [3.333, 5.792, 8.667],
    "derived_bbb_frozen_640x360.mp4": [],
    "derived_city_portrait_228x405_yuv444.mp4": [],
    "bbb_singleshot_720p25_audio.mp4": [],
    "caminandes_title_text_960x540.mp4": [],
}
# Seconds of the first and of the last mixed frame.
DISSOLVES = {"concert_multicam_176x144_vp9_60s.webm": [(4.542, 5.417)]}


def footage(test):
    """Marks a test that needs the folder of real clips; these tests are slow."""
    needs_clips = pytest.mark.skipif(not CLIPS, reason="NANOSORA_CLIPS names no folder of clips")
    return pytest.mark.slow(needs_clips(test))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Makes torch use one thread, as curating processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- made-up footage ----

def shot(seed, num_frames, pan=1, size=(96, 128), soft=8):
    """Returns a soft cloud of colours over which the camera pans to the right: uint8 [T H W 3]."""
    height, width = size
    cloud = np.random.default_rng(seed).normal(size=(height + 2 * soft, width + num_frames * pan + 2 * soft, 3))
    for axis in (0, 1, 0, 1):
        total = np.cumsum(cloud, axis)
        length = total.shape[axis]
        cloud = np.take(total, range(soft, length), axis) - np.take(total, range(length - soft), axis)
    cloud = np.clip(128 + 50 * cloud / cloud.std(), 0, 255).astype(np.uint8)
    return np.stack([cloud[:height, t * pan:t * pan + width] for t in range(num_frames)])


def small_shot(seed, num_frames, pan=1):
    """Returns a shot of 45 x 80 pixels, in which the camera pans by a quarter of `pan` pixels a frame."""
    return shot(seed, num_frames, pan, (180, 320), 40)[:, ::4, ::4]


def mixture(first, second, alpha):
    """Returns uint8 frames [T H W 3] that show `second` with the share alpha [T] and `first` with the rest."""
    alpha = np.asarray(alpha)[:, None, None, None]
    return ((1 - alpha) * first + alpha * second).astype(np.uint8)


def dissolve(length, pan, around=60):
    """Returns `around` frames of a shot, `length` mixed frames, `around` frames of another shot."""
    alpha = np.clip((np.arange(2 * around + length) - around + 1) / (length + 1), 0, 1)
    return mixture(small_shot(3, len(alpha), pan), small_shot(4, len(alpha), pan), alpha)


def write(path, frames, rate=24, times=None, rotation=0, aspect=None, sound=False, scale=1, crf=12,
          gop=250, colorspace=None):
    """Writes frames [T H W 3] as H.264; times are in 1/90000 s, for a variable frame rate."""
    height, width = (int(side * scale) for side in frames.shape[1:3])
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        if colorspace:
            stream.codec_context.colorspace = colorspace
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90000)
        if sound:
            write_sound(out)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24").reformat(width, height)
            if times is not None:
                frame.pts = times[i]
                frame.time_base = Fraction(1, 90000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_sound(out):
    """Writes two seconds of silence."""
    stream = out.add_stream("aac", rate=16000)
    for start in range(0, 32000, 1000):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        frame.pts = start
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def read_all(path):
    """Returns all frames of a clip as float32 [T H W 3]."""
    return read_window(str(path))[0].numpy().astype(np.float32)


def luma(frames):
    """Returns the brightness [...] of pixels [... 3], 0 to 255."""
    return frames @ np.array([0.299, 0.587, 0.114])


def number_of(frame, frames):
    """Returns the number of the frame of `frames` [T H W 3] that is most like `frame`."""
    return int(np.abs(frames.astype(np.float32) - frame).mean((1, 2, 3)).argmin())


# ---- cuts of footage made from arrays ----

def small(frames):
    """Returns frames [T H W 3] as curate.py looks for cuts in them: small, pixels uint8 [T P 3]."""
    _, height, width, _ = frames.shape
    scale = min(1, curate.CUT_SIDE / max(height, width))
    size = max(1, round(scale * height)), max(1, round(scale * width))
    pictures = F.adaptive_avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size)
    return pictures.round().byte().flatten(2).transpose(1, 2).numpy()


def find_cuts(frames):
    """Returns the transitions of frames [T H W 3]: (end of a shot, begin of the next)."""
    return curate.find_transitions(small(frames))


@pytest.mark.parametrize("at", [1, 2, 37, 64, 65])
def test_a_hard_cut_is_found_to_the_frame(at):
    assert find_cuts(np.concatenate([shot(1, at), shot(2, 70)])) == [(at, at)]


def test_many_cuts_are_found():
    lengths = [30 + 11 * seed for seed in range(6)]
    frames = np.concatenate([shot(seed, length, size=(45, 80), soft=6) for seed, length in enumerate(lengths)])
    assert find_cuts(frames) == [(t, t) for t in np.cumsum(lengths)[:-1]]


@pytest.mark.parametrize("contrast", [0.3, 0.1, 0.06])
@pytest.mark.parametrize("level", [128, 20], ids=["grey", "dark"])
def test_cuts_between_pale_or_dark_shots_of_the_same_mean_colour_are_found(contrast, level):
    frames = np.concatenate([shot(1, 60), shot(2, 60)])
    pale = np.clip(level + contrast * (frames - 128.0), 0, 255).astype(np.uint8)
    assert find_cuts(pale) == [(60, 60)]


def test_a_cut_between_two_landscapes_that_are_much_alike_is_found():
    """Both have a bright sky above and dark hills below, as most landscapes do: their correlation is 0.9."""
    sky = np.linspace(220, 60, 96)[:, None, None]
    first, second = ((0.35 * (shot(seed, 60) - 128.0) + sky).clip(0, 255).astype(np.uint8) for seed in (1, 2))
    alike = curate.correlation(small(first)[-1:].astype(float), small(second)[:1].astype(float))[0]
    assert 0.85 < alike < curate.SAME_PICTURE
    assert find_cuts(np.concatenate([first, second])) == [(60, 60)]


@pytest.mark.parametrize("length, pan", [(12, 0), (20, 1), (40, 0), (60, 0)])
def test_a_dissolve_is_found(length, pan):
    (first, end), = find_cuts(dissolve(length, pan))
    off = 1 + 2 * pan
    assert abs(first - 60) <= off and abs(end - 60 - length) <= off, (first, end)


def test_a_dissolve_of_frames_that_are_shown_twice_is_found():
    assert find_cuts(np.repeat(dissolve(20, 0, around=30), 2, axis=0)) == [(60, 100)]


def test_transitions_far_into_a_long_video_are_where_they_are_alone():
    end = np.concatenate([dissolve(20, 1), dissolve(12, 0)[::-1]])
    alone = find_cuts(end)
    assert len(alone) == 3
    expected = [(1000, 1000)] + [(1000 + a, 1000 + b) for a, b in alone]
    assert find_cuts(np.concatenate([shot(9, 1000, size=(45, 80)), end])) == expected


@pytest.mark.parametrize("num_blank", [1, 8])
@pytest.mark.parametrize("length", [8, 16, 24, 40])
@pytest.mark.parametrize("level", [0, 255])
def test_a_fade_out_and_in_is_found_to_the_frame(level, length, num_blank):
    """60 frames are shown whole, `length` fade out, the last of these is blank, and after num_blank it fades in."""
    last_blank = 59 + length + num_blank - 1
    end = last_blank + length
    num_frames = end + 60
    shown = np.interp(np.arange(num_frames), [0, 59, 59 + length, last_blank, end, num_frames], [1, 1, 0, 0, 1, 1])
    frames = np.concatenate([small_shot(5, 60 + length), small_shot(6, num_frames - 60 - length)])
    (first, found_end), = find_cuts(mixture(np.full_like(frames, level), frames, shown))
    assert abs(first - 60) <= 1 and abs(found_end - end) <= 1


@pytest.mark.parametrize("lit", [[60], [60, 61, 62, 63], [60, 68, 76, 84]], ids=["one frame", "four frames", "strobe"])
def test_flashes_are_no_cuts(lit):
    for light in (4, 255):
        frames = shot(7, 120, soft=12)
        frames[lit] = 255 - (255 - frames[lit]) // light
        assert find_cuts(frames) == []


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 7, 8, 12])
def test_a_strobe_of_any_period_is_no_cut_and_no_dissolve(period):
    frames = shot(7, 150, soft=12).astype(np.float32)
    phase = np.arange(150) % period / period
    square = np.where(phase < 0.5, 1, 0.3)
    wave = 0.6 + 0.4 * np.sin(2 * np.pi * phase)
    for light in (square, wave):
        assert find_cuts((frames * light[:, None, None, None]).astype(np.uint8)) == []


def a_hand(num_frames, place_of):
    """Returns frames of a plain wall with a textured disc, 35% of the picture, whose middle is place_of(frame)."""
    rng = np.random.default_rng(0)
    height, width = 90, 160
    y, x = np.mgrid[:height, :width]
    skin = np.array([180, 120, 90]) + (shot(5, 1, size=(height, width), soft=5)[0] - 128.0) / 2
    frames = []
    for number in range(num_frames):
        wall = np.repeat(200 - 20 * y[..., None] / height, 3, 2)
        is_hand = ((x / width - place_of(number)) / 0.25) ** 2 + ((y / height - 0.5) / 0.45) ** 2 < 1
        picture = np.where(is_hand[..., None], skin, wall) + rng.normal(0, 2, (height, width, 1))
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(frames)


@pytest.mark.parametrize("duration", [4, 8, 16, 30])
def test_a_hand_that_comes_and_goes_before_a_plain_wall_is_no_transition(duration):
    def comes_and_goes(number):
        return np.interp(number, [50, 50 + duration, 100, 100 + duration], [1.3, 0.5, 0.5, -0.3])

    def passes(number):
        return np.interp(number, [50, 50 + duration], [-0.3, 1.3])
    assert find_cuts(a_hand(150, comes_and_goes)) == []
    assert find_cuts(a_hand(110, passes)) == []


@pytest.mark.parametrize("pan", [6, 15, 30, 60])
def test_a_whip_pan_is_no_cut(pan):
    whip = shot(8, 30, pan=pan, size=(90, 160), soft=10)
    assert find_cuts(np.concatenate([whip[:1].repeat(30, 0), whip, whip[-1:].repeat(30, 0)])) == []


def footage_without_cuts(name):
    """Returns frames of one shot in which much changes."""
    if name == "fast pan":
        return shot(8, 100, pan=6)
    if name == "8 drawings a second":
        return np.repeat(shot(9, 40, pan=5), 3, axis=0)
    if name == "light is turned up":
        light = np.interp(np.arange(150), [0, 50, 80, 150], [0.5, 0.5, 1, 1])
        return (shot(8, 150) * light[:, None, None, None]).astype(np.uint8)
    if name == "boxed subtitles":
        frames = shot(9, 100)
        for start in range(0, 100, 25):
            frames[start:start + 25, 76:90, 20:108] = 0
            frames[start:start + 25, 80:86, 24 + start // 5:104 - start // 5:2] = 255
        return frames
    sky = np.full((100, 96, 128, 3), 200.0)
    opacity = np.clip((np.arange(100) - 40) / 25, 0, 1)
    sky[:, 80:88, 20:108:2] -= 180 * opacity[:, None, None, None]
    return sky.astype(np.uint8)


@pytest.mark.parametrize("name", ["fast pan", "8 drawings a second", "light is turned up", "boxed subtitles",
                                  "a title over a sky"])
def test_motion_light_and_titles_are_no_cuts(name):
    assert find_cuts(footage_without_cuts(name)) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1)])
def test_pictures_of_one_pixel_or_row_have_no_cuts(size):
    for num_frames in (1, 60):
        assert find_cuts(np.full((num_frames, *size, 3), 99, np.uint8)) == []


def test_shots_are_split_into_clips_of_allowed_length():
    times = np.arange(24 * 60) / 24
    clips, short = curate.split_shots([(24, 24), (100, 130), (1000, 1000)], times, 2, 16)
    assert short == [(0, 24)]
    assert clips[0] == (24, 100) and clips[1][0] == 130 and clips[-1][1] == 1440
    lengths = [end - start for start, end in clips[1:]]
    assert len(lengths) == 3 + 2 and sum(lengths) == 870 + 440 and max(lengths) <= 16 * 24
    assert max(lengths[:3]) - min(lengths[:3]) <= 1, "a long shot is divided evenly"
    assert curate.split_shots([], times[:48], 2, 16) == ([(0, 48)], []), "two seconds are long enough, to the frame"
    assert curate.split_shots([], times[:47], 2, 16) == ([], [(0, 47)])
    assert curate.split_shots([], times[:1], 2, 16) == ([], [(0, 1)])


# ---- one curated folder ----

# A dash, a number for printf, a comma, quotes, a line break and a character beyond 16 bits.
ODD = '-a: 100%d, "b"\n\N{GRINNING FACE}.MP4'
DAMAGED = ("empty.mp4", "cut off.mp4", "no picture.jpg")


def footage_of_sources():
    """Returns the frames [T H W 3] of each video, before bars, rotation and the like."""
    flash = shot(3, 40, soft=10)
    flash[15:17] = 255 - (255 - flash[15:17]) // 4
    dim = (0.85 * flash).astype(np.uint8)
    shown = np.interp(np.arange(120), [0, 40, 54, 60, 74, 120], [1, 1, 0, 0, 1, 1])[:, None, None, None]
    bars = shot(12, 60)
    bars[:, :16] = 0
    bars[:, -16:] = 0
    pillars = shot(13, 30)
    pillars[:, :, :20] = 16
    pillars[:, :, -20:] = 16
    return {
        "cuts.mp4": np.concatenate([shot(1, 30), shot(2, 10), dim, shot(4, 26, pan=2)[::-1]]),
        "dissolve.mp4": mixture(shot(5, 100, 0, soft=20), shot(6, 100, 0, soft=20),
                                np.clip((np.arange(100) - 39) / 21, 0, 1)),
        "fade.mp4": (np.concatenate([shot(7, 57), shot(8, 63)]) * shown).astype(np.uint8),
        "still.mp4": np.repeat(shot(9, 1), 30, axis=0),
        "bars.mp4": bars,
        "pillars.mp4": pillars,
        "turned.mp4": shot(10, 30),
        "anamorphic.mkv": shot(14, 30),
        "variable.mp4": shot(11, 30),
        "large.mp4": shot(16, 3, pan=9).repeat(9, 1).repeat(9, 2),
        ODD: shot(15, 30),
    }


BT709 = 1       # FFmpeg's number of the colour matrix
VARIABLE_TIMES = np.cumsum(np.random.default_rng(1).choice([3000, 3750, 9000], 30))


@pytest.fixture(scope="module")
def frames_of():
    """Source name -> frames."""
    return footage_of_sources()


@pytest.fixture(scope="module")
def videos(tmp_path_factory, frames_of):
    """A folder with everything that a folder of videos may hold."""
    folder = tmp_path_factory.mktemp("raw") / "my, \"videos\" \N{SNOWMAN}"
    (folder / "sub").mkdir(parents=True)
    options = {"cuts.mp4": {"sound": True}, "bars.mp4": {"gop": 20}, "turned.mp4": {"rotation": 90},
               "large.mp4": {"rate": 2}, "anamorphic.mkv": {"aspect": Fraction(3, 4)},
               "variable.mp4": {"times": VARIABLE_TIMES.tolist()}, "pillars.mp4": {"colorspace": BT709}}
    for name, frames in frames_of.items():
        new = write(folder / f"new{Path(name).suffix.lower()}", frames, **options.get(name, {}))
        new.rename(folder / name)
    write(folder / "a copy.mp4", frames_of[ODD], scale=0.5, crf=23)
    Image.fromarray(shot(17, 1)[0]).save(folder / "sub" / "picture.png")
    (folder / "empty.mp4").touch()
    (folder / "cut off.mp4").write_bytes((folder / "cuts.mp4").read_bytes()[:20000])
    (folder / "no picture.jpg").write_bytes(b"no picture")
    (folder / "notes.pdf").touch()
    (folder / ".hidden.mp4").touch()
    (folder / "bars.txt").write_text("clouds,\n as in a \"film\"\n")
    (folder.parent / "captions.csv").write_text("path,text\nsub/picture.png,a still cloud\ncuts.mp4,three clouds\n"
                                                "nowhere.mp4,a cloud that is gone\n")
    return folder


class Curated:
    """The folder that a run wrote, what it printed, and its tables."""
    def __init__(self, folder, status, out):
        self.folder = folder
        self.status = status
        self.out = out
        self.rows = read_rows(folder / "clips.csv")
        self.kept = read_rows(folder / "meta.csv")

    def clips_of(self, name, rows=None):
        """Returns the rows of a source that have a clip, in order."""
        rows = self.rows if rows is None else rows
        return [row for row in rows if Path(row["source"]).name == name and row["path"]]

    def frames(self, row):
        return read_all(self.folder / row["path"])


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def clip_times(folder):
    """Clip file -> when it was written, of all clips in a folder that are whole.

    A clip that is being written has a name that begins with a dot, and may have lost it a moment later.
    """
    clips = [path for path in (folder / "clips").rglob("*") if not path.name.startswith(".") and path.is_file()]
    return {path: path.stat().st_mtime_ns for path in clips}


def written(folder):
    """Relative path -> bytes of everything that users read."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "parts" not in path.parts and path.suffix != ".index"}


CURATE = ("--min-seconds=1", "--max-seconds=2", "--workers=1")


@pytest.fixture(scope="module")
def curated(videos):
    """The made-up videos, curated once; tests only look at the result or work on a copy."""
    out, folder = io.StringIO(), videos.parent / "out"
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            curate.main(["run", str(videos), "--out", str(folder), f"--captions={videos.parent / 'captions.csv'}",
                         *CURATE])
        except SystemExit as ended:
            status = ended.code
    return Curated(folder, status, out.getvalue())


def test_every_source_is_in_the_table_and_every_kept_clip_in_meta_csv(curated, videos):
    assert curated.status == 0
    sources = {Path(row["source"]).name for row in curated.rows}
    unwanted = {"notes.pdf", ".hidden.mp4", "bars.txt"}
    assert sources == {path.name for path in videos.rglob("*.*") if path.is_file()} - unwanted
    assert [row["path"] for row in curated.kept] == [row["path"] for row in curated.rows if not row["dropped"]]
    assert "notes.pdf" in curated.out and "bars.txt" not in curated.out


def test_meta_csv_is_read_by_data_py_and_its_numbers_are_those_of_the_clips(curated):
    meta = read_meta(str(curated.folder / "meta.csv"))
    assert len(meta) == len(curated.kept) > 10
    for i, row in enumerate(curated.kept):
        frames = read_all(meta.path(i))
        assert frames.shape[:3] == (int(row["num_frames"]), int(row["height"]), int(row["width"])), row["path"]
        assert not frames.shape[1] % 2 and not frames.shape[2] % 2
        if row["num_frames"] != "1":
            fps = (len(frames) - 1) / frame_times(meta.path(i))[-1]
            assert float(row["fps"]) == pytest.approx(fps, rel=1e-3)


def test_files_that_cannot_be_read_are_listed_with_the_reason(curated):
    errors = {Path(row["source"]).name: row for row in curated.rows if not row["path"] and not row["num_frames"]}
    assert errors.keys() == set(DAMAGED)
    for name, row in errors.items():
        assert name in row["error"] and name in row["dropped"]


def test_shots_are_cut_to_the_frame_and_a_short_one_is_listed(curated, frames_of):
    rows = curated.clips_of("cuts.mp4")
    spans = [(0, 30), (40, 80), (80, 106)]
    assert [int(row["num_frames"]) for row in rows] == [end - start for start, end in spans]
    for row, (start, end) in zip(rows, spans):
        frames = curated.frames(row)
        numbers = [number_of(frame, frames_of["cuts.mp4"]) for frame in frames]
        assert numbers == list(range(start, end))
        assert float(row["start_seconds"]) == pytest.approx(start / 24, abs=1e-3)
        assert float(row["fps"]) == 24
    short, = [row for row in curated.rows if Path(row["source"]).name == "cuts.mp4" and not row["path"]]
    assert short["num_frames"] == "10" and short["dropped"]


def test_a_long_shot_is_divided_into_clips_that_follow_each_other(curated, frames_of):
    numbers = []
    for row in curated.clips_of("bars.mp4"):
        inner = frames_of["bars.mp4"]
        top = (inner.shape[1] - int(row["height"])) // 2
        inner = inner[:, top:top + int(row["height"])]
        numbers.append([number_of(frame, inner) for frame in curated.frames(row)])
    assert numbers == [list(range(30)), list(range(30, 60))]


def test_a_dissolve_is_left_out(curated, frames_of):
    before, after = curated.clips_of("dissolve.mp4")
    start = round(24 * float(after["start_seconds"]))
    assert abs(int(before["num_frames"]) - 40) <= 2 and float(before["start_seconds"]) == 0
    assert abs(start - 60) <= 2 and start + int(after["num_frames"]) == 100


def test_a_fade_is_left_out(curated, frames_of):
    before, after = curated.clips_of("fade.mp4")
    assert 38 <= int(before["num_frames"]) <= 43
    start = round(24 * float(after["start_seconds"]))
    assert 71 <= start <= 76 and start + int(after["num_frames"]) == 120
    assert number_of(curated.frames(after)[0], frames_of["fade.mp4"]) == start


def test_black_bars_are_cut_off_and_nothing_else(curated, frames_of):
    for row in curated.clips_of("bars.mp4"):
        assert 60 <= int(row["height"]) <= 64 and row["width"] == "128"
        assert curated.frames(row).mean(axis=(0, 2, 3)).min() > 80, "no row of a bar is left"
    row, = curated.clips_of("pillars.mp4")
    assert row["height"] == "96" and 84 <= int(row["width"]) <= 88
    assert curated.frames(row).mean(axis=(0, 1, 3)).min() > 80, "no column of a bar is left"
    assert {row["height"] for row in curated.clips_of("fade.mp4")} == {"96"}


def test_a_turned_video_is_written_upright(curated, frames_of):
    row, = curated.clips_of("turned.mp4")
    assert (row["height"], row["width"]) == ("128", "96")
    upright = np.rot90(frames_of["turned.mp4"], 1, (1, 2))
    assert np.abs(luma(curated.frames(row)) - luma(upright)).mean() < 3


def test_a_mirrored_video_is_written_as_it_is_shown(tmp_path, run_script):
    """Its display matrix has a negative determinant; the camera, which pans to the right, then pans to the left."""
    videos = tmp_path / "videos"
    videos.mkdir()
    frames = shot(10, 30)
    write(videos / "mirrored.mp4", frames)
    content = bytearray((videos / "mirrored.mp4").read_bytes())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(upright, content.index(b"tkhd"))
    content[place:place + 36] = struct.pack(">9i", -1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    (videos / "mirrored.mp4").write_bytes(content)
    ended = run_script("curate", "run", videos, "--out", tmp_path / "out", "--workers=1", *CURATE)
    assert ended.status == 0, ended.err
    row, = read_rows(tmp_path / "out" / "meta.csv")
    assert row["cmotion"] == "pan left"
    clip = read_all(tmp_path / "out" / row["path"])
    assert np.abs(luma(clip) - luma(frames[:, :, ::-1])).mean() < 3


def test_pixels_that_are_not_square_become_square(curated, frames_of):
    row, = curated.clips_of("anamorphic.mkv")
    assert (row["height"], row["width"]) == ("96", "96")
    wide = torch.from_numpy(luma(frames_of["anamorphic.mkv"]))
    narrow = F.interpolate(wide[:, None], (96, 96), mode="area")[:, 0]
    assert np.abs(luma(curated.frames(row)) - narrow.numpy()).mean() < 3


def test_a_large_video_is_scaled_to_720_pixels_of_its_short_side(curated):
    row, = curated.clips_of("large.mp4")
    assert (row["height"], row["width"], row["num_frames"]) == ("720", "960", "3")
    assert float(row["fps"]) == 2


def frame_times(path):
    """Returns the seconds of all frames, from the first on."""
    with av.open(str(path)) as container:
        times = np.array([float(frame.time) for frame in container.decode(video=0)])
    return times - times[0]


def test_a_variable_frame_rate_keeps_its_times(curated):
    row, = curated.clips_of("variable.mp4")
    expected = (VARIABLE_TIMES - VARIABLE_TIMES[0]) / 90000
    np.testing.assert_allclose(frame_times(curated.folder / row["path"]), expected, atol=1e-3)
    assert float(row["fps"]) == pytest.approx(29 / expected[-1], abs=0.01)


def test_a_clip_names_the_colour_matrix_of_its_source(curated):
    row, = curated.clips_of("pillars.mp4")
    with av.open(str(curated.folder / row["path"])) as container:
        assert container.streams.video[0].codec_context.colorspace == BT709


def test_an_image_is_one_frame_and_copied_as_it_is(curated, videos):
    row, = curated.clips_of("picture.png")
    assert (row["num_frames"], row["height"], row["width"]) == ("1", "96", "128")
    assert (curated.folder / row["path"]).read_bytes() == (videos / "sub" / "picture.png").read_bytes()
    assert not row["flow"] and not row["cmotion"] and not row["dropped"]


def test_captions_come_from_the_table_or_the_text_file_of_their_own_video(curated):
    texts = {(Path(row["source"]).name, row["text"]) for row in curated.kept}
    assert {text for _, text in texts} == {"", "a still cloud", "three clouds", 'clouds, as in a "film"'}
    assert {name for name, text in texts if text} == {"picture.png", "cuts.mp4", "bars.mp4"}
    assert ("picture.png", "a still cloud") in texts and ("cuts.mp4", "three clouds") in texts
    assert "nowhere.mp4" in curated.out, "a caption of no file is reported"


def test_a_smaller_copy_is_the_duplicate_although_it_comes_first(curated):
    copy, = curated.clips_of("a copy.mp4")
    original, = curated.clips_of(ODD)
    assert copy["duplicate_of"] == original["path"] and original["path"] in copy["dropped"]
    assert [row["path"] for row in curated.rows if row["duplicate_of"]] == [copy["path"]]
    assert not original["dropped"]


def test_a_still_shot_is_dropped_and_the_moving_ones_are_kept(curated):
    row, = curated.clips_of("still.mp4")
    assert float(row["flow"]) < 0.5 and row["cmotion"] == "static"
    assert "flow" in row["dropped"] and "min_flow 0.5" in row["dropped"]
    unmoved = ("still.mp4", "a copy.mp4", "dissolve.mp4", "large.mp4")
    assert not [row for row in curated.rows if row["path"] and row["dropped"]
                and Path(row["source"]).name not in unmoved]


def test_motion_is_measured_in_pixels_per_second_and_named_from_the_cameras_view(curated):
    """A frame is 128 pixels long, so that one pixel a frame is 60 pixels a second at a longer side of 320."""
    first, second, third = curated.clips_of("cuts.mp4")
    assert [row["cmotion"] for row in (first, second, third)] == ["pan right", "pan right", "pan left"]
    assert float(first["flow"]) == pytest.approx(60, rel=0.08)
    assert float(third["flow"]) == pytest.approx(120, rel=0.08)
    turned, = curated.clips_of("turned.mp4")
    assert turned["cmotion"] == "tilt up"
    slow, = curated.clips_of("large.mp4")
    assert float(slow["flow"]) == pytest.approx(45, rel=0.05), "9 pixels of 128 in half a second"


def test_brightness_is_the_mean_luma_of_the_clips_own_frames(curated, frames_of):
    spans = {"cuts.mp4": [(0, 30), (40, 80), (80, 106)], "turned.mp4": [(0, 30)], ODD: [(0, 30)]}
    for name, shots in spans.items():
        for row, (start, end) in zip(curated.clips_of(name), shots):
            expected = luma(frames_of[name][start:end]).mean() / 255
            assert float(row["brightness"]) == pytest.approx(expected, abs=0.005)


def key_frames(path):
    """Returns (numbers of the key frames, number of frames)."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return [i for i, packet in enumerate(packets) if packet.is_keyframe], len(packets)


def test_key_frames_are_at_most_16_frames_apart(curated):
    for row in curated.kept:
        if row["num_frames"] == "1":
            continue
        keys, num_frames = key_frames(curated.folder / row["path"])
        assert keys[0] == 0 and max(np.diff([*keys, num_frames])) <= 16, row["path"]
    first, _ = curated.clips_of("bars.mp4")
    assert key_frames(curated.folder / first["path"]) == ([0, 16], 30), "none is added where the source has one"


def test_a_second_run_does_nothing_and_prints_the_same(curated, videos, run_script):
    before = written(curated.folder)
    times = clip_times(curated.folder)
    again = run_script("curate", "run", videos, "--out", curated.folder,
                       f"--captions={videos.parent / 'captions.csv'}", *CURATE)
    assert again.status == 0 and again.out == curated.out
    assert written(curated.folder) == before
    assert clip_times(curated.folder) == times


@pytest.fixture
def copied(curated, tmp_path):
    """A copy of the curated folder's tables, and of its clips as links."""
    shutil.copytree(curated.folder, tmp_path / "set", copy_function=os.link)
    for name in ("clips.csv", "meta.csv"):
        (tmp_path / "set" / name).unlink()
        shutil.copy(curated.folder / name, tmp_path / "set" / name)
    return tmp_path / "set"


def test_filter_applies_other_rules_and_back_again(curated, copied, run_script):
    ended = run_script("curate", "filter", copied, "--min-flow=none", "--max-repeats=none", "--max-held=none",
                       "--config=configs/tiny.py")
    assert ended.status == 0 and "64 x 16" in ended.out, "the buckets of the config are shown"
    kept = {row["path"] for row in read_rows(copied / "meta.csv")}
    still, = curated.clips_of("still.mp4")
    assert kept == {row["path"] for row in curated.kept} | {still["path"]}
    assert run_script("curate", "filter", copied).status == 0
    for name in ("clips.csv", "meta.csv"):
        assert (copied / name).read_bytes() == (curated.folder / name).read_bytes()


def test_without_dedup_copies_stay_and_the_dedup_step_finds_them_again(curated, copied, run_script):
    rows = read_rows(copied / "clips.csv")
    for row in rows:
        row["duplicate_of"] = ""
    write_rows(copied / "clips.csv", rows)
    assert run_script("curate", "filter", copied).status == 0
    assert len(read_rows(copied / "meta.csv")) == len(curated.kept) + 1
    assert run_script("curate", "dedup", copied).status == 0
    assert read_rows(copied / "clips.csv") == curated.rows


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_steps_measure_a_table_of_ones_own_as_a_run_does(curated, tmp_path, run_script):
    clips = curated.clips_of("cuts.mp4") + curated.clips_of("turned.mp4")
    rows = [{"path": str(curated.folder / row["path"]), "text": "kept, as it is"} for row in clips]
    write_rows(tmp_path / "own.csv", [*rows, {"path": "gone.mp4", "text": ""}])
    for step in ("motion", "appearance"):
        assert run_script("curate", step, tmp_path / "own.csv", "--workers=1").status == 0
    *rows, gone = read_rows(tmp_path / "own.csv")
    assert "gone.mp4" in gone["error"]
    for row, expected in zip(rows, clips, strict=True):
        assert row["text"] == "kept, as it is" and not row["error"]
        for column in (*curate.MOTION_COLUMNS, *curate.APPEARANCE_COLUMNS):
            assert row[column] == expected[column], column


@pytest.mark.parametrize("content", ["path,text\na.png,a dog, that runs\n", "path,text\na.png\n",
                                     'path,text\na.png,"a dog\n'], ids=["stray comma", "missing field", "open quote"])
@pytest.mark.parametrize("command", ["motion", "appearance", "filter", "dedup"])
def test_a_table_with_a_broken_row_is_refused_and_stays_as_it_is(command, content, tmp_path, run_script):
    table = tmp_path / "own.csv"
    table.write_text(content)
    save_image(tmp_path / "a.png", 1)
    ended = run_script("curate", command, table, "--workers=1")
    assert ended.status == 2 and "own.csv row 2" in ended.err and "Traceback" not in ended.err
    assert table.read_text() == content


# ---- the report ----

class Page(HTMLParser):
    """Collects the text, the tags and the images of a page and checks that every tag is closed."""
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.images = []
        self.text = ""
        self.tags = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_clips_with_their_verdict_and_needs_no_other_file(curated, copied, run_script):
    nasty = '-->]]></style><script>alert("1")</script>.mp4'
    rows = read_rows(copied / "clips.csv")
    broken = rows[0] | {"path": nasty, "num_frames": "9", "flow": "0.01", "error": "", "duplicate_of": ""}
    write_rows(copied / "clips.csv", [*rows, broken])
    assert run_script("curate", "report", copied).status == 0
    text = (copied / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|<link", text)
    assert all(attrs.get("src", "data:").startswith("data:") for _, attrs in page.tags)
    assert f"{len(curated.kept)} of {len(rows) + 1} clips kept" in page.text
    still, = curated.clips_of("still.mp4")
    assert still["path"] in page.text and "min_flow 0.5" in page.text and f"{nasty}: no such file" in page.text
    names = {image["alt"].removeprefix("frames of "): image for image in page.images}
    assert still["path"] in names
    strip = Image.open(io.BytesIO(base64.b64decode(names[still["path"]]["src"].split(",")[1])))
    assert strip.format == "JPEG" and strip.height == 64
    frame = np.asarray(strip.crop((0, 0, 85, 64)).resize((128, 96)), np.float32)
    assert np.abs(frame - curated.frames(still)[0]).mean() < 12
    for row in rows:
        assert not row["dropped"] or html.escape(row["dropped"]) in text, "each reason is in it"


def test_no_clip_leads_two_sections_of_the_report():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    rule = curate.Rule("min_flow", "flow", 4.5)
    first = curate.pick(values, rule, set())
    shown = {row for rows in first.values() for row in rows}
    assert first["worst"] == [0] and first["just dropped"] == [3, 2, 1]
    assert first["just kept"] == [4, 5, 6] and first["best"] == [9, 8, 7]
    assert not curate.pick(values, rule, shown)
    assert "best" not in curate.pick(np.zeros(10), curate.Rule("max_text_area", "text_area", 1.0), set())


# ---- runs of a few images ----

@pytest.fixture
def images(tmp_path):
    """A folder with two images."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    save_image(tmp_path / "images" / "a.png", 1)
    save_image(tmp_path / "images" / "sub" / "b.png", 2)
    return tmp_path / "images"


def save_image(path, seed):
    Image.fromarray(shot(seed, 1)[0]).save(path)


def curate_images(run_script, folder, out, *more):
    return run_script("curate", "run", folder, "--out", out, "--workers=1", *more)


def test_the_output_may_lie_within_the_videos_and_no_two_files_get_one_place(images, run_script):
    save_image(images / "sub" / "a.png", 3)
    out = images / "sub" / "out"
    for _ in range(2):
        assert curate_images(run_script, images, out, "--no-dedup").status == 0
        rows = read_rows(out / "meta.csv")
        assert [row["path"] for row in rows] == ["clips/a.png", "clips/sub/a.png", "clips/sub/b.png"]
        assert all((out / row["path"]).read_bytes() == (out / row["source"]).read_bytes() for row in rows)


def test_linked_images_are_read_and_linked_folders_left_alone(images, tmp_path, run_script):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "folder").symlink_to(images)
    (tmp_path / "videos" / "one.png").symlink_to(images / "a.png")
    ended = curate_images(run_script, tmp_path / "videos", tmp_path / "out")
    assert [Path(row["source"]).name for row in read_rows(tmp_path / "out" / "meta.csv")] == ["one.png"]
    assert ended.status == 0 and "folder" in ended.out


def test_a_changed_file_is_done_again(images, tmp_path, run_script):
    curate_images(run_script, images, tmp_path / "out")
    before = read_rows(tmp_path / "out" / "meta.csv")
    save_image(images / "a.png", 4)
    curate_images(run_script, images, tmp_path / "out")
    after = read_rows(tmp_path / "out" / "meta.csv")
    assert (tmp_path / "out" / after[0]["path"]).read_bytes() == (images / "a.png").read_bytes()
    assert before[0]["brightness"] != after[0]["brightness"] and before[1] == after[1]


def test_results_that_were_cut_off_by_a_power_cut_are_made_again(images, tmp_path, run_script):
    curate_images(run_script, images, tmp_path / "out")
    before = written(tmp_path / "out")
    for path in [path for path in (tmp_path / "out" / "parts").rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[:-3])
    assert curate_images(run_script, images, tmp_path / "out").status == 0
    assert written(tmp_path / "out") == before


@pytest.fixture
def two_shots(tmp_path):
    """A folder with a video of two shots."""
    (tmp_path / "videos").mkdir()
    frames = np.concatenate([shot(1, 26, size=(48, 64), soft=5), shot(2, 26, size=(48, 64), soft=5)])
    write(tmp_path / "videos" / "a.mp4", frames)
    return tmp_path / "videos"


def test_a_full_disk_ends_the_run_and_the_next_one_completes_it(two_shots, tmp_path, run_script, monkeypatch):
    """The disk is full when the second clip is to get its name."""
    rename = os.replace

    def rename_until_full(source, target, **options):
        if str(target).endswith("000026-000052.mp4"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target, **options)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename_until_full)
        ended = run_script("curate", "run", two_shots, "--out", tmp_path / "out", *CURATE)
    assert ended.status == 2 and "No space left" in ended.err and "Traceback" not in ended.err
    clip, = clip_times(tmp_path / "out")
    assert clip.name == "000000-000026.mp4" and not (tmp_path / "out" / "meta.csv").exists()
    assert run_script("curate", "run", two_shots, "--out", tmp_path / "out", *CURATE).status == 0
    rows = read_rows(tmp_path / "out" / "meta.csv")
    assert [len(read_all(tmp_path / "out" / row["path"])) for row in rows] == [26, 26]


def test_other_limits_of_length_cut_the_videos_again(two_shots, tmp_path, run_script):
    ended = run_script("curate", "run", two_shots, "--out", tmp_path / "out", "--min-seconds=1.2", "--workers=1")
    assert ended.status == 2 and "no clip is kept" in ended.err
    assert run_script("curate", "run", two_shots, "--out", tmp_path / "out", *CURATE).status == 0
    assert len(read_rows(tmp_path / "out" / "meta.csv")) == 2


def test_a_file_that_failed_is_tried_again_by_the_next_run(two_shots, tmp_path, run_script, monkeypatch):
    """A disk of another machine does not answer for a moment."""
    save_image(two_shots / "b.png", 3)
    open_video = av.open

    def fail(path, *args, **options):
        if str(path).endswith("a.mp4"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_video(path, *args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", fail)
        assert run_script("curate", "run", two_shots, "--out", tmp_path / "out", *CURATE).status == 0
    failed, = [row for row in read_rows(tmp_path / "out" / "clips.csv") if row["error"]]
    assert "a.mp4" in failed["error"] and "Input/output error" in failed["error"]
    assert run_script("curate", "run", two_shots, "--out", tmp_path / "out", *CURATE).status == 0
    assert len(read_rows(tmp_path / "out" / "meta.csv")) == 3


def test_a_file_that_crashes_the_decoder_is_listed_and_the_others_are_done(images, tmp_path, run_script, monkeypatch):
    """A process that dies does not say which file it was at: two work on five files."""
    for name in ("c crashes.mp4", "d.mp4"):
        write(images / name, shot(5, 26, size=(48, 64)))
    open_video = av.open

    def crash(path, *args, **options):
        if str(path).endswith("crashes.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return open_video(path, *args, **options)
    monkeypatch.setattr(av, "open", crash)
    ended = run_script("curate", "run", images, "--out", tmp_path / "out", "--min-seconds=1", "--workers=2")
    assert ended.status == 0
    rows = {Path(row["source"]).name: row for row in read_rows(tmp_path / "out" / "clips.csv")}
    assert rows.keys() == {"a.png", "b.png", "c crashes.mp4", "d.mp4"}
    assert [name for name, row in rows.items() if row["error"]] == ["c crashes.mp4"]
    assert "c crashes.mp4" in rows["c crashes.mp4"]["error"] and "died" in rows["c crashes.mp4"]["error"]


def test_a_file_whose_process_died_once_is_tried_again(images, tmp_path, run_script, monkeypatch):
    """As where the system, short of memory, ends a process that has done nothing wrong."""
    write(images / "c.mp4", shot(5, 26))
    open_video = av.open
    marker = tmp_path / "died"

    def crash_once(path, *args, **options):
        if str(path).endswith("c.mp4") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return open_video(path, *args, **options)
    monkeypatch.setattr(av, "open", crash_once)
    assert run_script("curate", "run", images, "--out", tmp_path / "out", *CURATE).status == 0
    assert marker.exists() and not [row for row in read_rows(tmp_path / "out" / "clips.csv") if row["error"]]


def test_workers_outlive_the_signals_of_a_terminal_and_a_scheduler():
    connection, process = curate.start_worker(str)
    connection.send(7)
    assert connection.recv() == "7"
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        connection.send(8)
        assert connection.recv() == "8"
    connection.send(None)
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize("args, named", [
    (["run", "nowhere", "--out", "out"], "nowhere"),
    (["run", "empty", "--out", "out"], "empty"),
    (["run", "images"], "--out"),
    (["run", "images", "--out", "images"], "--out"),
    (["run", "images", "--out", "out", "--with", "aesthetics"], "aesthetics"),
    (["run", "images", "--out", "out", "--captions", "table.csv"], "text"),
    (["run", "images", "--out", "out", "--captions", "no.csv"], "no.csv"),
    (["run", "images", "--out", "out", "--max-seconds", "0"], "--max-seconds 0"),
    (["run", "images", "--out", "out", "--min-seconds", "9", "--max-seconds", "8"], "--min-seconds 9"),
    (["run", "images", "--out", "out", "--min-height=200"], "no clip is kept"),
    (["run", "images", "--out", "out", "--config", "configs/no.py"], "configs/no.py"),
    (["cut", "images"], "--out"),
    (["filter", "empty"], "clips.csv"),
    (["report", "empty"], "clips.csv"),
    (["dedup", "empty"], "clips.csv"),
    (["filter", "header.csv"], "header.csv"),
    (["filter", "pathless.csv"], "path"),
    (["filter", "table.csv", "--min-flow=fast"], "fast"),
    (["filter", "table.csv", "--min-flow=nan"], "nan"),
    (["caption", "table.csv"], "num_frames"),
])
def test_a_mistake_is_one_line_that_names_what_was_wrong(args, named, images, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("path,aes\none.png,5\n")
    (tmp_path / "header.csv").write_text("path,aes\n")
    (tmp_path / "pathless.csv").write_text("aes,flow\n5,1\n")
    ended = run_script("curate", *args)
    assert ended.status == 2 and named in ended.err.splitlines()[-1], ended.err
    assert "Traceback" not in ended.err


# ---- rules ----

ROW = {"path": "a.mp4", "num_frames": "48", "aes": "6", "flow": "10", "match": "25", "text_area": "0", "height": "96",
       "brightness": "0.5", "sharpness": "500", "error": "", "duplicate_of": ""}


def filter_rows(run_script, tmp_path, rows, *flags):
    """Filters rows; returns their column `dropped` and what was printed."""
    write_rows(tmp_path / "own.csv", rows)
    ended = run_script("curate", "filter", tmp_path / "own.csv", *flags)
    assert ended.status in (0, 2), ended.err
    return [row["dropped"] for row in read_rows(tmp_path / "own.csv")], ended


@pytest.mark.parametrize("flag, column, good, bad", [
    ("min-aesthetic=5", "aes", "5", "4.99999"),
    ("min-match=20", "match", "20", "19"),
    ("max-text-area=0.005", "text_area", "0.005", "0.006"),
    ("min-flow=0.5", "flow", "0.5", "0.4"),
    ("max-flow=400", "flow", "400", "401"),
    ("min-brightness=0.03", "brightness", "0.03", "0.02"),
    ("min-sharpness=20", "sharpness", "20", "19"),
    ("min-height=96", "height", "96", "95"),
    ("max-repeats=0.7", "repeats", "0.7", "0.71"),
    ("max-held=2", "held", "2", "2.1"),
    ("max-shake=60", "shake", "60", "61"),
])
def test_a_rule_keeps_its_limit_and_drops_what_is_beyond(flag, column, good, bad, tmp_path, run_script):
    rows = [ROW | {column: good}, ROW | {column: bad}, ROW | {column: ""}, ROW | {column: "nan"}]
    dropped, _ = filter_rows(run_script, tmp_path, rows, f"--{flag}")
    name, limit = flag.replace("-", "_").split("=")
    assert dropped[0] == ""
    assert all(part in dropped[1] for part in (f"{column} {bad}", f"{name} {limit}"))
    assert column in dropped[2] and column in dropped[3], "what was not measured is not kept"
    if flag != "min-height=96":
        assert filter_rows(run_script, tmp_path, rows)[0] == dropped, "the flag repeats the default"
    off, _ = filter_rows(run_script, tmp_path, rows[:2], f"--{flag.split('=')[0]}=none")
    assert off == ["", ""]


def test_rows_are_dropped_for_their_first_fault_and_filtering_twice_changes_nothing(tmp_path, run_script):
    rows = [ROW,
            ROW | {"aes": "4.2", "flow": "0.1"},
            ROW | {"num_frames": "1", "flow": ""},
            ROW | {"num_frames": "1", "flow": "", "aes": "3"},
            ROW | {"path": "", "error": "b.mp4: frame 5 is damaged", "aes": "1"},
            ROW | {"duplicate_of": "b, c.mp4", "aes": "1"},
            ROW | {"aes": "", "flow": "0.1"}]
    dropped, ended = filter_rows(run_script, tmp_path, rows)
    assert ended.status == 0
    for words, why in zip(["", "aes", "", "aes", "frame 5 is damaged", "b, c.mp4", "aes"], dropped, strict=True):
        assert words in why and bool(words) == bool(why), why
    assert [row["path"] for row in read_rows(tmp_path / "own-kept.csv")] == ["a.mp4", "a.mp4"]
    again, _ = filter_rows(run_script, tmp_path, read_rows(tmp_path / "own.csv"))
    assert again == dropped


def test_the_printed_table_counts_every_clip_once(tmp_path, run_script):
    rows = [ROW, ROW | {"flow": "0.1", "path": 'b, "c".mp4'}, ROW | {"flow": "0.2", "aes": "1"}, ROW | {"aes": "2"},
            ROW | {"error": "a.mp4: broken"}]
    _, ended = filter_rows(run_script, tmp_path, rows)
    lines = [re.split(r" {2,}", line) for line in ended.out.splitlines()]
    numbers = {line[0]: line[1:] for line in lines}
    assert numbers["unreadable"][:2] == ["4", "1"]
    assert numbers["min_aesthetic 5"][:2] == ["2", "2"]
    assert numbers["min_flow 0.5"][:3] == ["1", "1", "2"], "1 kept, 1 dropped, 2 without the other rules"
    assert 'b, "c".mp4' in numbers["min_flow 0.5"][3]
    assert numbers["max_held 2"] == ["not measured"]
    assert "5 clips, 1 kept" in ended.out


# ---- motion ----

H, W = 180, 320
Y, X = torch.meshgrid(torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2, indexing="ij")
Z = torch.complex(X, Y)             # each pixel's place, from the middle of the frame
CORNER = math.hypot(H, W) / 2
RMS = math.hypot(H, W) / math.sqrt(12)


def texture(seed, height=720, width=1280):
    """Returns [h w] in 0..255: noise at all scales, as photographs have it."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 1, height, width)
    for size in (4, 8, 16, 32, 64, 128):
        noise = torch.randn(1, 1, height // size + 1, width // size + 1, generator=generator)
        image += size ** 0.7 * F.interpolate(noise, (height, width), mode="bicubic")
    return (128 + 45 * (image - image.mean()) / image.std())[0, 0].clamp(0, 255)


@pytest.fixture(scope="module")
def textures():
    return [texture(seed) for seed in range(3)]


def moved(image, shift=0, turn=0):
    """Returns the frame [H W] of a large image whose content moved by f(z) = shift + turn z."""
    height, width = image.shape
    z = (Z - shift) / (1 + turn) * (0.72 * width / W)
    place = torch.stack((z.real / (width / 2), z.imag / (height / 2)), -1)[None].float()
    shrunk = F.avg_pool2d(image[None, None], 3, 1, 1)
    return F.grid_sample(shrunk, place, mode="bicubic", padding_mode="reflection", align_corners=False)[0, 0]


def direction(rng):
    return complex(np.exp(2j * math.pi * rng.random()))


def random_move(rng, kind):
    """Returns (shift, turn) whose largest displacement, at the corners for turn, is 2 to 20 pixels."""
    pixels = rng.uniform(2, 20)
    if kind == "translate":
        return pixels * direction(rng), 0
    turn = rng.choice([-1, 1]) * pixels / CORNER
    return 0, complex(turn * 1j if kind == "rotate" else turn)


def end_point_errors(images, noise, count):
    """Returns the mean error of the flow of `count` made pairs, in pixels, over what stays within the frame."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for k in range(count):
        shift, turn = random_move(rng, ("translate", "rotate", "zoom")[k % 3])
        pair = torch.stack((moved(images[k % len(images)]), moved(images[k % len(images)], shift, turn)))
        pair = (pair + noise * torch.randn(pair.shape, generator=generator)).round().clamp(0, 255)
        field = curate.flow(pair[:1], pair[1:])[0]
        truth = shift + turn * Z
        end = Z + truth
        inside = (end.real.abs() < W / 2 - 0.5) & (end.imag.abs() < H / 2 - 0.5)
        errors.append((torch.complex(field[0], field[1]) - truth).abs()[inside].mean())
    return torch.stack(errors)


def test_flow_is_known_to_a_third_of_a_pixel(textures):
    errors = end_point_errors(textures, noise=2, count=6)
    assert errors.mean() < 0.3 and errors.max() < 0.8, errors


def test_flow_ignores_light_and_is_zero_where_nothing_moves(textures):
    a = moved(textures[1])[None]
    b = moved(textures[1], 5 - 3j)[None]
    field = curate.flow(a, b * 0.8 + 30)
    assert (field.mean((2, 3)) - torch.tensor([[5.0, -3.0]])).abs().max() < 0.4
    assert curate.flow(a, a).abs().max() < 1e-3 and curate.flow(a * 0, a * 0).abs().max() == 0


@pytest.mark.parametrize("height, width", [(32, 35), (179, 317), (176, 144)])
def test_flow_works_at_any_size_and_each_pair_for_itself(height, width, textures):
    frame = F.avg_pool2d(textures[0][None], 2)[0]
    a = frame[:height, :width]
    b = frame[1:height + 1, 2:width + 2]                # the content moved by (-2, -1)
    field = curate.flow(torch.stack((a, b)), torch.stack((b, a)))
    assert field.shape == (2, 2, height, width)
    for k, sign in enumerate((-1, 1)):
        middle = field[k, :, 8:-8, 8:-8].mean((1, 2))
        assert (middle - sign * torch.tensor([2.0, 1.0])).abs().max() < 0.2, (k, middle)
    torch.testing.assert_close(field[:1], curate.flow(a[None], b[None]), atol=1e-3, rtol=0)


def name_of(a, b, seconds=1 / 12):
    """Returns the name of the camera's motion from frames a [N h w] to frames b."""
    return curate.name_motion(curate.camera_motion(curate.flow(a, b), np.full(len(a), seconds)))


def picture_moves(name, pixels):
    """Returns (shift, turn) of the picture when the camera moves: the opposite."""
    return {"pan right": (-pixels, 0), "pan left": (pixels, 0), "tilt down": (-1j * pixels, 0),
            "tilt up": (1j * pixels, 0), "zoom in": (0, pixels / RMS), "zoom out": (0, -pixels / RMS),
            "roll": (0, 1j * pixels / RMS), "static": (0, 0)}[name]


MOVES = "pan right", "pan left", "tilt down", "tilt up", "zoom in", "zoom out", "roll", "static", "shake"


def name_of_a_made_move(rng, images, case, name):
    """Returns what the code calls the motion of three or four pairs, with noise and a tenth of another motion."""
    image = images[rng.integers(len(images))]
    pixels = rng.uniform(0.5, 15)
    pairs = []
    for _ in range(4 if name == "shake" else 3):
        if name == "shake":
            shift, turn = pixels * direction(rng), 0
        else:
            shift, turn = picture_moves(name, pixels)
        if name != "static":
            shift = shift + 0.1 * pixels * direction(rng)
        pairs.append(torch.stack((moved(image), moved(image, complex(shift), complex(turn)))))
    a, b = torch.stack(pairs, 1)
    b = b + 1.5 * torch.randn(b.shape, generator=torch.Generator().manual_seed(case))
    return name_of(a, b)


def check_made_moves(images, count, wrong_allowed):
    rng = np.random.default_rng(0)
    wrong = []
    for case in range(count):
        name = MOVES[case % len(MOVES)]
        found = name_of_a_made_move(rng, images, case, name)
        if found != name:
            wrong.append((name, found))
    assert len(wrong) <= wrong_allowed, wrong


def test_the_camera_of_12_made_moves_is_named(textures):
    check_made_moves(textures, 12, 1)


@pytest.mark.slow
def test_the_camera_of_100_made_moves_is_named(textures):
    check_made_moves(textures, 100, 15)
    errors = end_point_errors(textures, noise=2, count=48)
    assert errors.mean() < 0.3 and errors.max() < 1, errors


def a_person_walks(background, step, camera_step, frames=4):
    """Returns [frames H W]: a head and a body in front of the background, `step` pixels a frame to the right."""
    cloth = F.avg_pool2d(texture(9)[None], 2)[0, :H, :W] * 0.7 + 60
    shown = []
    for k in range(frames):
        x = X - (-60 + k * step)
        body = 1 - (x / 32) ** 2 - ((Y - 40) / 70) ** 2
        head = 1 - (x / 16) ** 2 - ((Y + 45) / 20) ** 2
        mask = torch.sigmoid(12 * torch.maximum(body, head))
        shown.append(moved(background, -camera_step * k) * (1 - mask) + mask * cloth.roll(round(k * step), 1))
    shown = torch.stack(shown)
    return shown + 1.5 * torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))


def test_a_walking_person_is_no_pan_and_a_camera_that_follows_is(textures):
    for background in (textures[1], 0.1 * textures[2] + 100):      # the second is a plain wall
        stands = a_person_walks(background, 6, 0)
        assert name_of(stands[:-1], stands[1:]) == "static"
    follows = a_person_walks(textures[1], 6, 6)
    assert name_of(follows[:-1], follows[1:]) == "pan right"


def test_directions_that_take_turns_get_no_name_or_shake():
    """These pairs have the same flow everywhere: only the order of the pairs matters."""
    def name(*rights):
        field = torch.zeros(len(rights), 2, 45, 80)
        field[:, 0] = -torch.tensor(rights)[:, None, None]
        return curate.name_motion(curate.camera_motion(field, np.full(len(rights), 0.1)))
    assert name(3.0, 3, 3, 3, -30) == "pan right", "one pair across a flash does not count"
    assert name(3.0, 3, 3, 3, -3, -3, -3, -3) == ""
    assert name(3.0, -3, 3, -3, 3, -3, 3, -3) == "shake"
    assert name(0.01, 0.01, 0.01) == "static"


def test_sharpness_falls_with_blur(textures):
    frame = moved(textures[1])[None, None]
    blurred = [F.avg_pool2d(frame, size, 1)[0, 0].byte().numpy() for size in (1, 3, 5, 9)]
    values = [curate.sharpness(picture) for picture in blurred]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[3], values


def test_a_picture_that_is_held_is_told_from_one_in_which_a_mouth_opens(textures):
    film = torch.stack([moved(textures[1], 2 * k) for k in (0, 0, 1, 1, 1, 2)])
    film[3, 60:70, 60:70] += 10
    film = film + torch.randn(film.shape, generator=torch.Generator().manual_seed(0))
    film = film.clamp(0, 255).byte().numpy()
    assert curate.repeats(film).tolist() == [True, False, False, False, False]


# ---- files that are odd or damaged ----

def curate_folder(run_script, folder, *more):
    """Curates a folder into `out` beside it; returns (how it ended, {source name: its rows})."""
    out = folder.parent / "out"
    ended = run_script("curate", "run", folder, "--out", out, *CURATE, "--no-dedup", *more)
    rows = {}
    for row in read_rows(out / "clips.csv"):
        rows.setdefault(Path(row["source"]).name, []).append(row)
    return ended, rows


@pytest.fixture
def odd(tmp_path):
    """A folder with one good video."""
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd" / "good.mp4", shot(1, 30))
    return tmp_path / "odd"


def write_with(path, codec, frames, rate=24, **options):
    """Writes frames uint8 [T H W 3] with any codec in any container."""
    with av.open(str(path), "w", **options) as out:
        stream = out.add_stream(codec, rate=rate)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        out.mux(stream.encode())


def test_files_of_odd_sizes_do_not_end_the_run(odd, run_script):
    write_with(odd / "one pixel.mkv", "ffv1", np.full((30, 1, 1, 3), 99, np.uint8))
    write_with(odd / "one row.mkv", "ffv1", shot(2, 30)[:, :1])
    write_with(odd / "very wide.mkv", "ffv1", np.full((30, 16, 17000, 3), 99, np.uint8))
    ended, rows = curate_folder(run_script, odd)
    assert ended.status == 0, ended.err
    assert [row["dropped"] for row in rows["good.mp4"]] == [""]
    for name in ("one pixel.mkv", "one row.mkv", "very wide.mkv"):
        assert all(row["dropped"] for row in rows[name]), name


def test_the_part_before_a_damage_is_used_and_the_rest_is_reported(odd, run_script):
    """A packet in the middle is overwritten, and two recordings are joined, so times start again."""
    frames = np.concatenate([shot(2, 40), shot(3, 40)])
    write_with(odd / "joined.ts", "mpeg2video", frames)
    whole = (odd / "joined.ts").read_bytes()
    (odd / "damaged.ts").write_bytes(whole[:len(whole) * 3 // 4] + b"\x00" * 1000 + whole[len(whole) * 3 // 4 + 1000:])
    (odd / "joined.ts").write_bytes(whole + whole)
    ended, rows = curate_folder(run_script, odd)
    assert ended.status == 0
    for name in ("joined.ts", "damaged.ts"):
        first, *_, last = rows[name]
        assert first["num_frames"] == "40" and not first["error"], "the first shot is whole"
        assert name in last["error"] and "are used" in last["error"] and not last["path"]
        assert name in ended.out
    assert sum(int(row["num_frames"] or 0) for row in rows["joined.ts"]) in range(75, 81)


def test_a_video_without_times_has_the_rate_of_its_stream(odd, run_script):
    write_with(odd / "raw.mp4", "libx264", shot(2, 48), format="h264")
    _, rows = curate_folder(run_script, odd)
    row, = rows["raw.mp4"]
    assert (row["fps"], row["num_frames"], row["seconds"]) == ("24.0", "48", "2.0")


def test_times_that_step_back_a_little_do_not_lose_a_file(tmp_path):
    times = [0, 1, 2, 4, 3, 5]
    np.testing.assert_allclose(curate.frame_times(np.array(times) / 24, 24), np.arange(6) / 24)
    np.testing.assert_allclose(curate.frame_times([0.0, math.nan, 0.1], 10), np.arange(3) / 10)
    np.testing.assert_allclose(curate.frame_times([5.0, 5.1, 5.5], 10), [0, 0.1, 0.5])


def test_music_with_a_cover_picture_is_no_video(odd, run_script):
    with av.open(str(odd / "music.mp4"), "w") as out:
        picture = out.add_stream("png")
        picture.height = picture.width = 32
        picture.pix_fmt = "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        write_sound(out)
        out.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
    ended, rows = curate_folder(run_script, odd)
    row, = rows["music.mp4"]
    assert ended.status == 0 and "cover picture" in row["error"]


def test_a_letterboxed_copy_is_measured_without_its_bars_and_found(odd, run_script):
    frames = shot(1, 30)
    write(odd / "boxed.mp4", np.pad(frames, ((0, 0), (24, 24), (0, 0), (0, 0))))
    out = odd.parent / "out"
    assert run_script("curate", "run", odd, "--out", out, *CURATE).status == 0
    boxed, good = read_rows(out / "clips.csv")
    assert (boxed["duplicate_of"], good["duplicate_of"]) == (good["path"], "")
    assert float(boxed["brightness"]) == pytest.approx(float(good["brightness"]), abs=0.01)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa dog", b"\xff\xfea\0 \0d\0o\0g\0", b"a  dog\r\n"],
                         ids=["UTF-8 with mark", "UTF-16", "line end"])
def test_captions_of_windows_are_read(content, odd, run_script):
    (odd / "good.txt").write_bytes(content)
    _, rows = curate_folder(run_script, odd)
    assert rows["good.mp4"][0]["text"] == "a dog"


@pytest.mark.parametrize("content", ["un café".encode("cp1252"), "a dog".encode("utf-16-le"), b"a\0dog"])
def test_a_caption_in_an_unknown_encoding_is_an_error_that_names_its_file(content, odd, run_script):
    (odd / "good.txt").write_bytes(content)
    ended = run_script("curate", "run", odd, "--out", odd.parent / "out", *CURATE)
    assert ended.status == 2 and "good.txt" in ended.err and "UTF-8" in ended.err and "Traceback" not in ended.err


def test_a_caption_of_150_kilobytes_is_kept(odd, run_script):
    (odd / "good.txt").write_text("word " * 30000)
    ended, rows = curate_folder(run_script, odd)
    assert ended.status == 0 and len(rows["good.mp4"][0]["text"]) == 149_999
    assert run_script("curate", "filter", odd.parent / "out").status == 0


def test_a_table_of_captions_with_a_stray_comma_is_refused_before_anything_is_done(odd, run_script):
    table = odd.parent / "captions.csv"
    table.write_text("path,text\ngood.mp4,a dog, that runs\n")
    ended = run_script("curate", "run", odd, "--out", odd.parent / "out", f"--captions={table}", *CURATE)
    assert ended.status == 2 and "captions.csv row 2" in ended.err
    assert not (odd.parent / "out" / "clips").exists()


def test_where_no_file_can_be_read_the_error_says_why(tmp_path, run_script):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.mp4").write_bytes(b"no video")
    ended = run_script("curate", "run", tmp_path / "odd", "--out", tmp_path / "out", *CURATE)
    last = ended.err.splitlines()[-1]
    assert ended.status == 2 and "a.mp4" in last and "none" not in last, "to switch rules off would not help"


def damage(content, rng):
    """Returns a file's bytes with one of several kinds of damage."""
    kind = rng.integers(4)
    size = len(content)
    if kind == 0:
        return content[:rng.integers(1, size)]
    broken = bytearray(content)
    start = rng.integers(0, size) if kind == 1 else rng.integers(0, 1200)
    length = min(size - start, int(rng.integers(1, 400)))
    if kind == 3:
        broken[start:start + length] = b"\xff" * length
    else:
        broken[start:start + length] = rng.integers(0, 256, length, np.uint8).tobytes()
    return bytes(broken)


@pytest.mark.slow
def test_60_damaged_files_and_a_good_one_are_curated(odd, run_script):
    rng = np.random.default_rng(0)
    frames = np.concatenate([shot(2, 30), shot(3, 30)])
    write(odd / "a.mp4", frames, gop=10)
    write_with(odd / "b.ts", "mpeg2video", frames)
    write_with(odd / "c.avi", "mpeg4", frames)
    write_with(odd / "d.mkv", "ffv1", frames[::3])
    whole = {path.suffix: path.read_bytes() for path in odd.glob("?.*")}
    for number in range(60):
        suffix = list(whole)[number % 4]
        (odd / f"damaged {number:02d}{suffix}").write_bytes(damage(whole[suffix], rng))
    ended, rows = curate_folder(run_script, odd, "--workers=2")
    assert ended.status == 0, ended.err
    assert len(rows) == 65
    assert [row["dropped"] for row in rows["good.mp4"]] == [""]
    assert sum(bool(row["error"]) for name in rows if "damaged" in name for row in rows[name]) > 20


# ---- shake ----

def camera_path(kind, rng):
    """Returns where the camera looks in each of 60 frames, [60 2], in shares of the frame's width."""
    t = np.arange(60) / 24
    if kind.startswith("jitter"):
        return rng.uniform(-1, 1, (60, 2)) * float(kind.split()[1]) / 100
    if kind == "walk":                              # two steps a second: up and down, and half as fast to the sides
        return np.stack([0.01 * np.sin(2 * np.pi * t) + 0.02 * t, 0.015 * np.abs(np.sin(2 * np.pi * t))], 1)
    speed = {"pan": 0.2, "fast pan": 0.9, "still": 0.0}[kind]
    return np.stack([speed * t, np.zeros(60)], 1)


@pytest.mark.parametrize("kind", ["still", "pan", "fast pan", "walk", "jitter 2", "jitter 3", "jitter 4"])
def test_a_shaking_picture_is_told_from_a_moving_camera(kind, textures):
    """In pixels at 320 wide; a jitter of 2 means up to 2% of the width to each side."""
    path = camera_path(kind, np.random.default_rng(1))
    wide = torch.cat([textures[0], textures[0].flip(1), textures[0]], 1)[::2, ::2]
    pictures = []
    for right, down in path:
        left = round(100 + right * W)
        top = round(60 + down * W)
        pictures.append(wide[top:top + H, left:left + W].byte().numpy())
    columns = curate.describe_motion(np.arange(60) / 24, np.stack(pictures))
    rules = {rule.name: rule for rule in curate.RULES}
    is_dropped = rules["max_shake"].breaks(columns["shake"]) or rules["max_flow"].breaks(columns["flow"])
    assert is_dropped == kind.startswith("jitter"), columns


def test_zooms_are_not_shaky(textures):
    pictures = np.stack([moved(textures[0], 0, 0.01 * k).byte().numpy() for k in range(24)])
    columns = curate.describe_motion(np.arange(24) / 24, pictures)
    assert columns["shake"] < 10 and columns["cmotion"] == "zoom in"


def test_a_pan_drawn_on_twos_or_threes_is_not_shaky_and_has_its_speed(textures):
    for held in (2, 3):
        pictures = np.stack([moved(textures[0], -4 * (k // held)).byte().numpy() for k in range(96)])
        columns = curate.describe_motion(np.arange(96) / 24, pictures)
        assert columns["shake"] < 10 and columns["cmotion"] == "pan right"
        assert columns["flow"] == pytest.approx(4 * 24 / held, rel=0.25)


# ---- duplicates ----

def scene(seed, num_frames=3, height=90, width=160):
    """Returns uint8 [T H W 3] of coloured patches that drift down."""
    grid = np.random.default_rng(seed).integers(0, 256, (num_frames + 12, 20, 3), np.uint8)
    frames = [Image.fromarray(grid[t:t + 12]).resize((width, height), Image.Resampling.BICUBIC)
              for t in range(num_frames)]
    return np.stack([np.array(frame) for frame in frames])


def h264(frames, crf, scale=1.0):
    """Returns frames as they are after encoding and decoding."""
    height, width = (int(side * scale) // 2 * 2 for side in frames.shape[1:3])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": str(crf)})
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            out.mux(stream.encode(picture.reformat(width, height)))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def hash_of(frames):
    """Returns the perceptual hash of a clip."""
    grey = luma(frames[[0, len(frames) // 2, -1]]).astype(np.uint8)
    return "".join(curate.perceptual_hash(frame) for frame in grey)


def brighter(frames):
    return np.clip(frames * 1.1, 0, 255).astype(np.uint8)


def cropped(frames, share):
    height, width = frames.shape[1:3]
    top = round(height * share / 2)
    left = round(width * share / 2)
    return frames[:, top:height - top, left:width - left]


def find_hash_duplicates(clips):
    """Returns the index of the earlier clip that each clip repeats, or -1."""
    vectors = curate.hash_vectors([hash_of(frames) for frames in clips])
    return curate.duplicates(vectors, curate.HASH_ALIKE, range(len(clips))).tolist()


def test_copies_are_found_by_their_hash_and_other_pictures_are_not():
    for seed in (0, 1):
        one = scene(seed)
        copies = [h264(one, 28), h264(one, 23, 0.5), brighter(one), cropped(one, 0.02)]
        others = [scene(seed + 100), one[:, :, ::-1]]
        assert find_hash_duplicates([one, *copies, *others]) == [-1, 0, 0, 0, 0, -1, -1]


def test_flat_clips_are_like_nothing_not_even_each_other():
    rng = np.random.default_rng(0)

    def noisy(level):
        return np.clip(rng.normal(level, 5, (3, 90, 160, 3)), 0, 255).astype(np.uint8)
    black = np.zeros((3, 90, 160, 3), np.uint8)
    flat = [black, black, noisy(0), noisy(0), noisy(255)]
    from_black = [np.concatenate([flat[0][:1], scene(seed)[1:]]) for seed in range(3)]
    clips = [*from_black, *flat, h264(from_black[0], 28)]
    assert find_hash_duplicates(clips) == [-1] * 8 + [0]


@pytest.mark.parametrize("block", [1024, 7])
def test_duplicates_are_those_of_a_plain_loop(block):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((40, 12))[rng.integers(0, 40, 200)] + 0.25 * rng.standard_normal((200, 12))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(200)
    kept = []
    expected = [-1] * 200
    for i in order:
        expected[i] = next((j for j in kept if x[i] @ x[j] >= 0.9), -1)
        if expected[i] < 0:
            kept.append(i)
    assert curate.duplicates(x, 0.9, order, block=block).tolist() == expected
    assert 20 < len(kept) < 180


def test_a_chain_of_small_changes_does_not_become_one_clip():
    angles = np.radians(np.arange(0, 90, 10))
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    limit = np.cos(np.radians(12))
    assert curate.duplicates(x, limit, range(9)).tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1]
    assert curate.duplicates(x, limit, [1, 0, 2, *range(3, 9)]).tolist()[:3] == [1, -1, 1], "the best stays"


@pytest.mark.parametrize("better", [{"text": "a dog"}, {"height": "96"}, {"num_frames": "60"}, {"flow": "10"}],
                         ids=lambda change: next(iter(change)))
def test_of_two_copies_the_captioned_larger_longer_or_allowed_one_is_kept(better, tmp_path, run_script):
    row = {"path": "a.mp4", "text": "", "num_frames": "48", "height": "48", "flow": "0.1", "phash": hash_of(scene(0))}
    rows = [row, row | {"path": "b.mp4"} | better, row | {"path": "c.mp4", "phash": hash_of(scene(1))},
            row | {"path": "d.mp4", "phash": ""}]
    write_rows(tmp_path / "own.csv", rows)
    flags = [] if "flow" in better else ["--min-flow=none"]
    assert run_script("curate", "dedup", tmp_path / "own.csv", *flags).status == 0
    assert [row["duplicate_of"] for row in read_rows(tmp_path / "own.csv")] == ["b.mp4", "", "", ""]


def test_copies_are_also_found_by_the_features_of_clip(tmp_path, run_script):
    x = np.random.default_rng(0).standard_normal((3, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    texts = [base64.b64encode(vector.tobytes()).decode() for vector in x]
    rows = [{"path": f"{i}.mp4", "features": text} for i, text in enumerate([texts[0], "", texts[1], "", texts[0]])]
    write_rows(tmp_path / "own.csv", rows)
    assert run_script("curate", "dedup", tmp_path / "own.csv").status == 0
    assert [row["duplicate_of"] for row in read_rows(tmp_path / "own.csv")] == ["", "", "", "", "0.mp4"]


# ---- slow: processes that are killed, training on the result ----

def start(*args, rank=0, world=1):
    """Starts curate.py as one of `world` ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen([sys.executable, "curate.py", *map(str, args)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_ranks_that_are_killed_make_what_one_undisturbed_rank_makes(curated, videos):
    """Both are killed three times, with their workers left behind, and then end by themselves."""
    out = videos.parent / "sh2"             # as long as the other folder's name: paths count from it
    command = ["run", videos, "--out", out, f"--captions={videos.parent / 'captions.csv'}", *CURATE]
    for num_clips in (1, 6, 11):
        processes = [start(*command, rank=rank, world=2) for rank in (0, 1)]
        while len(clip_times(out)) < num_clips:
            assert processes[0].poll() is None      # the other rank may be through with its files
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.communicate()
        known = clip_times(out)
    processes = [start(*command, rank=rank, world=2) for rank in (0, 1)]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert written(out) == written(curated.folder)
    finished = clip_times(out)
    assert any(finished.get(path) == modified for path, modified in known.items()), "what was done is not done again"


@pytest.mark.slow
def test_a_second_ctrl_c_shows_no_traceback(tmp_path):
    write(tmp_path / "a.mp4", shot(1, 600, pan=2))
    process = start("run", tmp_path, "--out", tmp_path / "out")
    while "0/1" not in process.stderr.readline():       # the progress bar
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    lines = iter(process.stderr.readline, "")
    assert any("stopped" in line for line in lines)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait(60) in (130, -signal.SIGINT)


@pytest.mark.slow
def test_a_training_run_reads_what_was_curated(curated, tmp_path, run_script):
    ended = run_script("train", "configs/tiny.py", f"--data={curated.folder / 'meta.csv'}", "--steps=2",
                       "--buckets={'64': {1: (1.0, 1), 8: (1.0, 2)}}", "--prompts=()", f"--cache={tmp_path}/cache",
                       f"--out={tmp_path}/run")
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "log.jsonl").read_text()


# ---- slow: real clips ----

def hits(name, found, times):
    """Returns (transitions found, others found).

    found: first frames of transitions.  A cut counts within one frame, a dissolve anywhere within it."""
    seconds = times - times[0]
    spans = [(cut, cut) for cut in CUTS[name]] + DISSOLVES.get(name, [])
    hit = 0
    for start, end in spans:
        first = int(np.abs(seconds - start).argmin()) - 1
        last = int(np.abs(seconds - end).argmin()) + 1
        hit += any(first <= frame <= last for frame in found)
    return hit, len(found) - hit


def cuts_of_file(path):
    """Returns (transitions, seconds [T]) of a file."""
    video = curate.scan(path)
    return video.transitions, video.times


@footage
def test_the_labelled_cuts_of_real_clips_are_found():
    true = hit = extra = 0
    for name in CUTS:
        transitions, times = cuts_of_file(Path(CLIPS, name))
        if "titles" in name:
            fade, *transitions = transitions
            assert fade[0] < 12 and 45 <= fade[1] <= 56, "it opens from black"
        right, wrong = hits(name, [first for first, _ in transitions], times)
        assert wrong == 0 or CUTS[name], f"{name} is one shot, got {transitions}"
        true += len(CUTS[name]) + len(DISSOLVES.get(name, []))
        hit += right
        extra += wrong
    assert 2 * hit / (true + hit + extra) >= 0.95, f"{hit} of {true} found, {extra} extra"


@footage
def test_dark_copies_have_the_cuts_of_the_bright_clips(tmp_path):
    """A copy of each clip with cuts, a fifth as bright, in H.264."""
    true = hit = extra = 0
    for name, cuts in CUTS.items():
        if not cuts:
            continue
        frames = []
        for _, frame, _ in curate.decode(Path(CLIPS, name)):
            scale = min(1, 480 / frame.width)
            small_frame = frame.reformat(round(frame.width * scale), round(frame.height * scale), "rgb24")
            frames.append((small_frame.to_ndarray() * 0.2).astype(np.uint8)[:, : 2 * small_frame.width // 2])
        dark = np.stack(frames)[:, :len(frames[0]) // 2 * 2, :len(frames[0][0]) // 2 * 2]
        transitions, _ = cuts_of_file(write(tmp_path / "dark.mp4", dark, crf=18))
        _, times = cuts_of_file(Path(CLIPS, name))
        if "titles" in name:
            transitions = [pair for pair in transitions if pair[0] > 60]    # it opens from black
        right, wrong = hits(name, [first for first, _ in transitions], times)
        true += len(cuts)
        hit += right
        extra += wrong
    assert hit >= true and extra == 0, "the dissolve may be lost in the noise"


@footage
def test_real_files_that_are_damaged_are_used_up_to_the_damage():
    for name in ("corrupt_empty.mp4", "corrupt_truncated_no_moov.mp4"):
        with pytest.raises(ValueError, match=name):
            curate.scan(Path(CLIPS, name))
    video = curate.scan(Path(CLIPS, "corrupt_truncated_midgop.mpg"))
    assert len(video.times) == 55 and "frame 55 is damaged" in video.damage
    whole = curate.scan(Path(CLIPS, "city_cc0_720x405_mpeg2.mpg"))
    assert (len(whole.times), whole.height, whole.width, whole.damage) == (190, 405, 720, "")


def quarter_luma(path):
    """Returns float32 [T h w] of all frames, at a quarter of the points."""
    return [frame.reformat(format="gray").to_ndarray()[::2, ::2].astype(np.float32)
            for _, frame, _ in curate.decode(path)]


@footage
@pytest.mark.parametrize("name", ["city_cc0_720x405_mpeg2.mpg", "derived_bbb_vfr_640x360.mp4",
                                  "derived_city_portrait_228x405_yuv444.mp4"])
def test_clips_of_real_files_are_their_frames(name, tmp_path):
    path = Path(CLIPS, name)
    video = curate.scan(path)
    spans, _ = curate.split_shots(video.transitions, video.times)
    box = (0, 0, video.height, video.width)
    clips = [curate.Clip(start, end, tmp_path / f"{start:06d}.mp4", box) for start, end in spans]
    assert len(list(curate.write_clips(path, clips, video.times))) == len(clips)
    source = quarter_luma(path)
    for start, end, out, _ in clips:
        clip = quarter_luma(out)
        assert end - start == len(clip)
        for i in range(0, end - start, 10):
            difference = {}
            for k in range(max(0, start + i - 1), min(len(source), start + i + 2)):
                difference[k] = np.abs(clip[i] - source[k][:clip[i].shape[0], :clip[i].shape[1]]).mean()
            assert difference[start + i] < 5 and difference[start + i] <= min(difference.values()) + 0.1, (start, i)


def real_images():
    """Returns grey frames [h w] of real clips."""
    images = []
    for name, first, count, every in (("bbb_multishot_720p24_audio.mp4", 30, 3, 400),
                                      ("bbb_action_720p24.mp4", 100, 3, 400),
                                      ("city_cc0_720x405_mpeg2.mpg", 20, 2, 130)):
        with av.open(str(Path(CLIPS, name))) as container:
            chosen = itertools.islice(container.decode(video=0), first, first + (count - 1) * every + 1, every)
            images += [torch.from_numpy(frame.reformat(format="gray").to_ndarray()).float() for frame in chosen]
    return images


@footage
def test_flow_and_camera_of_moved_real_pictures():
    images = real_images()
    for noise in (0, 2):
        errors = end_point_errors(images, noise, count=48)
        assert errors.mean() < 0.3 and errors.max() < 1, errors
    check_made_moves(images, 100, 15)


# Each is a single shot: (file, first frame, last frame).
SHOTS = [("bbb_multishot_720p24_audio.mp4", 0, 47), ("bbb_multishot_720p24_audio.mp4", 48, 122),
         ("bbb_multishot_720p24_audio.mp4", 303, 354), ("bbb_multishot_720p24_audio.mp4", 511, 745),
         ("bbb_multishot_720p24_audio.mp4", 786, 985), ("bbb_action_720p24.mp4", 200, 260),
         ("city_cc0_720x405_mpeg2.mpg", 0, 115), ("city_cc0_720x405_mpeg2.mpg", 116, 189),
         ("concert_multicam_176x144_vp9_60s.webm", 1024, 1118), ("concert_multicam_176x144_vp9_60s.webm", 1300, 1368)]


@footage
def test_copies_of_real_shots_are_found_and_no_others():
    shots = []
    for name, first, last in SHOTS:
        frames = [read_window(str(Path(CLIPS, name)), 1, start=t)[0][0].numpy()
                  for t in (first, (first + last) // 2, last)]
        shots.append(np.stack(frames))
    copies = {"crf 35": [h264(x, 35) for x in shots], "half": [h264(x, 28, 0.5) for x in shots],
              "brighter": [brighter(x) for x in shots], "cropped by 2%": [cropped(x, 0.02) for x in shots]}
    for name, changed in copies.items():
        found = find_hash_duplicates(shots + changed)
        assert found[:len(shots)] == [-1] * len(shots), "shots of one film are different"
        right = sum(index == i for i, index in enumerate(found[len(shots):]))
        assert right >= len(shots) - 1, name
        assert all(index in (i, -1) for i, index in enumerate(found[len(shots):])), "no shot is a copy of another"
