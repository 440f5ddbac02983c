"""Cuts of footage that was looked at, motion of known size, networks against transformers, runs that are killed."""
import base64
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import curate
from curate import (HASH_ALIKE, HASH_BITS, RULES, TOO_SHORT, UNIFORM, Cuts, Rule, Tally, bars,
                    camera, combs, crop, duplicates, feature_vectors, find_files, flow, grey, hash_vectors, joint_hash,
                    lit_share, longest, looks, motion, perceptual_hash, picks, probe, repeats, rules_of, similarity,
                    small_frames, split, verdict, write_clips, write_report)
from data import UnreadableClip, read_meta, read_window

ROOT = Path(__file__).parents[1]

CLIPS = os.environ.get("NANOSORA_CLIPS")
footage = pytest.mark.skipif(not CLIPS, reason="NANOSORA_CLIPS names no folder of clips")

# Seconds at which the first frame of a new shot is shown, from the first frame's time 0 on: each was seen on a contact
# sheet of the frames around it, and all shots on sheets of every 2nd to 8th frame.
CUTS = {
    "bbb_multishot_720p24_audio.mp4": [2.0, 5.125, 10.75, 12.625, 14.792, 16.875, 21.292, 31.083, 32.75, 41.083, 45.25,
                                       54.0, 59.292],
    # a log that swings through the picture fills it at 11 s, in derived_bbb_vfr at 6 s: one shot before and after
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
DISSOLVES = {"concert_multicam_176x144_vp9_60s.webm": [(4.542, 5.417)]}  # from the first mixed frame to the last


def hits(name, found, times):
    """(cuts and dissolves found, others found): `found` in frames, a cut within one frame, a dissolve within it."""
    frame = lambda seconds: int(np.abs(times - times[0] - seconds).argmin())
    spans = [(frame(t), frame(t)) for t in CUTS[name]] + [(frame(a), frame(b)) for a, b in DISSOLVES.get(name, ())]
    hit = sum(any(a - 1 <= t <= b + 1 for t in found) for a, b in spans)
    return hit, len(found) - hit


def cut(path):
    """(transitions, seconds [T]) of a file."""
    cuts, times = Cuts(), []
    for seconds, frames, _ in small_frames(path):
        cuts.add(frames)
        times.append(seconds)
    return cuts.end(), np.concatenate(times)


@footage
def test_cuts_of_the_footage():
    total = np.zeros(3)
    for name in CUTS:
        transitions, times = cut(Path(CLIPS, name))
        if "titles" in name:
            fade, *transitions = transitions
            assert fade[0] < 12 and 45 <= fade[1] <= 56, "from black"
        hit, extra = hits(name, [a for a, _ in transitions], times)
        print(name, hit, extra, transitions)
        assert extra == 0 or CUTS[name], f"{name} is one shot, got {transitions}"
        total += len(CUTS[name]) + len(DISSOLVES.get(name, ())), hit, extra
    true, hit, extra = total
    assert 2 * hit / (true + hit + extra) >= 0.95, f"{hit} of {true} found, {extra} extra"


@footage
def test_probe_of_the_footage():
    paths = {path.name: path for path in find_files(CLIPS)[0]}
    for name in ("corrupt_empty.mp4", "corrupt_truncated_no_moov.mp4"):
        with pytest.raises(UnreadableClip, match=name):
            probe(paths.pop(name))
    rows = {name: probe(path) for name, path in paths.items()}
    counts = {name: (row["num_frames"], row["height"], row["width"]) for name, row in rows.items()}
    assert counts["city_cc0_720x405_mpeg2.mpg"] == (190, 405, 720)
    assert counts["caminandes_title_text_960x540.mp4"] == (95, 540, 960)  # 98 packets, 3 before its edit list's begin
    assert counts["concert_multicam_176x144_vp9_60s.webm"][0] == 1441
    assert rows["concert_multicam_176x144_vp9_60s.webm"]["fps"] == 24
    assert abs(rows["derived_bbb_vfr_640x360.mp4"]["fps"] - 214 / 14.917) < 0.01
    for name, row in rows.items():
        if name == "corrupt_truncated_midgop.mpg":  # its last frame is cut off, which decoding tells
            with pytest.raises(UnreadableClip, match="frame 55 is damaged"):
                cut(Path(CLIPS, name))
        else:
            assert row["num_frames"] == sum(1 for _ in curate.decoded(Path(CLIPS, name))), name


def luma(path):
    """float32 [h w] of each frame, at a quarter of the points."""
    for _, frame, _ in curate.decoded(path):
        yield frame.reformat(format="gray").to_ndarray()[::2, ::2].astype(np.float32)


@footage
@pytest.mark.parametrize("name", ["bbb_multishot_720p24_audio.mp4", "city_cc0_720x405_mpeg2.mpg",
                                  "derived_bbb_vfr_640x360.mp4", "derived_city_portrait_228x405_yuv444.mp4"])
def test_clips_of_the_footage_are_its_frames(name, tmp_path):
    path = Path(CLIPS, name)
    transitions, times = cut(path)
    clips, short = split(transitions, times)
    assert sum(b - a for a, b in clips + short) == len(times) - sum(b - a for a, b in transitions)
    wanted = [(a, b, tmp_path / f"{a:06d}.mp4", None) for a, b in clips]
    rows = list(write_clips(path, wanted, times))
    source = dict(enumerate(luma(path)))
    for (a, b, out, _), row in zip(wanted, rows):
        got, (_, got_times) = list(luma(out)), cut(out)
        assert row["num_frames"] == b - a == len(got)
        late = np.abs((got_times - got_times[0]) - (times[a:b] - times[a]))
        assert np.sort(late)[:-1].max() < 0.005  # a stream copy may have a gap before its last frame, which is closed
        for i in range(0, b - a, 10):
            near = {k: np.abs(got[i] - source[a + i + k][:len(got[i]), :got[i].shape[1]]).mean() for k in (-1, 0, 1)
                    if a + i + k in source}
            assert near[0] < 5 and near[0] <= min(near.values()) + 0.1, (a, i, near)  # no frame early or late
        with av.open(str(out)) as container:
            keys = [i for i, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe]
        assert max(np.diff([*keys, b - a])) <= curate.GOP


# ---- clips made here ----

def shot(seed, num_frames, pan=1, size=(96, 128), soft=12):
    """A cloud of colours, `soft` pixels fine, that pans: uint8 [T H W 3]."""
    h, w = size
    big = np.random.default_rng(seed).normal(size=(h + 2 * soft, w + num_frames * pan + 2 * soft, 3))
    for axis in (0, 1, 0, 1):
        total = np.cumsum(big, axis)
        n = total.shape[axis]
        big = np.take(total, range(soft, n), axis) - np.take(total, range(n - soft), axis)
    big = np.clip(128 + 50 * big / big.std(), 0, 255)
    return np.stack([big[:h, t * pan:t * pan + w] for t in range(num_frames)]).astype(np.uint8)


def write(path, frames, times=None, rotation=0, aspect=None):
    """H.264, or by suffix; times in 1/90000 s for an uneven rate."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90000)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 90000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def found(frames, chunk=32):
    cuts = Cuts()
    for i in range(0, len(frames), chunk):
        cuts.add(frames[i:i + chunk])
    return cuts.end()


@pytest.mark.parametrize("at", [1, 2, 37, 63, 64, 65])
def test_a_hard_cut_is_found_to_the_frame(at, tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate([shot(1, at), shot(2, 70)]))
    assert cut(path)[0] == [(at, at)]


def test_cuts_do_not_depend_on_the_runs():
    frames = np.concatenate([shot(seed, 30 + 11 * seed) for seed in range(12)])
    assert found(frames) == found(frames, 7) == found(frames, 1) == [
        (t, t) for t in np.cumsum([30 + 11 * seed for seed in range(11)])]


def dissolve(length, pan):
    """60 frames of a shot, `length` of a mixture, 60 of another shot."""
    one, two = (shot(seed, 60 + length, pan, (180, 320), 40) for seed in (3, 4))
    alpha = np.clip((np.arange(120 + length) - 59) / (length + 1), 0, 1)[:, None, None, None]
    pad = lambda x, before: np.pad(x, ((before, 60 - before), (0, 0), (0, 0), (0, 0)), "edge")
    return ((1 - alpha) * pad(one, 0) + alpha * pad(two, 60)).astype(np.uint8)


@pytest.mark.parametrize("length, pan", [(12, 0), (20, 0), (40, 0), (60, 0), (12, 1), (20, 1), (40, 1)])
def test_a_dissolve_is_found(length, pan, monkeypatch):
    frames = dissolve(length, pan)
    for at_once in (256, 3):
        monkeypatch.setattr(curate, "AT_ONCE", at_once)
        (first, end), = found(frames)
        assert abs(first - 60) <= 1 + 2 * pan and abs(end - 60 - length) <= 1 + 2 * pan, (first, end)


def test_transitions_are_where_they_are_alone():
    """Far into a long video, too."""
    one = np.concatenate([dissolve(20, 1), dissolve(12, 0)[::-1]])[:, ::4, ::4]  # with a hard cut between
    alone = found(one)
    assert len(alone) == 3
    assert found(np.concatenate([shot(9, 3000, size=(45, 80)), one])) == [(3000, 3000)] + [
        (3000 + a, 3000 + b) for a, b in alone]


@pytest.mark.parametrize("length", [12, 20, 40])
def test_a_dissolve_of_frames_that_are_shown_twice_is_found(length):
    assert found(np.repeat(dissolve(length, 0), 2, axis=0)) == [(120, 120 + 2 * length)]


def test_a_title_that_fades_in_over_a_plain_sky_is_no_dissolve():
    sky = np.full((100, 96, 128, 3), 200.0)
    alpha = np.clip((np.arange(100) - 40) / 25, 0, 1)
    sky[:, 80:88, 20:108:2] -= 180 * alpha[:, None, None, None]
    assert found(sky.astype(np.uint8)) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1), (3, 2)])
def test_pictures_of_a_pixel_or_a_row(size, tmp_path):
    for frames in (1, 60):
        assert found(np.full((frames, *size, 3), 99, np.uint8)) == []
    Image.new("RGB", size).save(tmp_path / "a.png")
    m = curate.measure(tmp_path / "a.png")
    assert curate.describe(m, 0, 1)["uniform"] == 1 and m.transitions == []


@pytest.mark.parametrize("level", [0, 255])
def test_a_fade_out_and_in_is_left_out_of_the_clips(level):
    gain = np.interp(np.arange(200), [0, 70, 90, 100, 120, 200], [1, 1, 0, 0, 1, 1])[:, None, None, None]
    frames = (gain * np.concatenate([shot(5, 95), shot(6, 105)]) + (1 - gain) * level).astype(np.uint8)
    transitions = found(frames)
    assert abs(transitions[0][0] - 71) <= 2 and abs(transitions[-1][1] - 120) <= 2
    clips, _ = split(transitions, np.arange(200) / 24)
    assert all(b <= 73 or a >= 118 for a, b in clips) and len(clips) == 2


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_flash_is_no_cut(length):
    frames = shot(7, 120)
    frames[60:60 + length] = 255 - (255 - frames[60:60 + length]) // 4
    assert found(frames) == []


def test_motion_and_light_are_no_cuts():
    frames = shot(8, 150, pan=6)
    assert found(frames) == []
    light = np.interp(np.arange(150), [0, 50, 80, 150], [0.5, 0.5, 1, 1])[:, None, None, None]
    assert found((shot(8, 150) * light).astype(np.uint8)) == []
    assert found(np.repeat(shot(9, 40, pan=5), 3, axis=0)) == []  # 8 drawings a second


def test_split():
    times = np.arange(24 * 60) / 24
    clips, short = split([(24, 24), (100, 130), (1000, 1000)], times)
    assert short == [(0, 24)]
    assert clips[0] == (24, 100) and clips[1][0] == 130 and clips[-1][1] == 1440
    lengths = [b - a for a, b in clips[1:]]
    assert sum(lengths) == 870 + 440 and max(lengths) <= 384 and len(lengths) == 3 + 2
    assert max(lengths[:3]) - min(lengths[:3]) <= 1
    assert split([], times[:48])[0] == [(0, 48)]  # 2 s to the frame
    assert split([], times[:47]) == ([], [(0, 47)])
    assert split([], times[:1]) == ([], [(0, 1)])
    for a, b in split([], np.cumsum(np.random.default_rng(0).choice([0.042, 0.3], 500)))[0]:
        assert b > a


def test_short_empty_and_oddly_named_files(tmp_path):
    folder = tmp_path / "a, 'b' \"c\" \N{SNOWMAN}"
    folder.mkdir()
    write(folder / "x, y.MP4", shot(1, 3))
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.mp4").touch()
    (folder / "no.webm").write_bytes(bytes(1000))
    files, other = find_files(tmp_path)
    assert [path.name for path in files] == ["empty.mp4", "no.webm", "x, y.MP4"]
    assert [path.name for path in other] == ["notes.txt"]
    for path in files[:2]:
        with pytest.raises(UnreadableClip, match=path.name):
            probe(path)
    three = probe(files[2])
    assert three["num_frames"] == 3 and three["fps"] == 24
    transitions, times = cut(files[2])
    assert transitions == [] and split(transitions, times) == ([], [(0, 3)])
    with pytest.raises(UnreadableClip, match="empty.mp4"):
        next(small_frames(files[0]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(OSError, match="gone.mp4"):
        probe(tmp_path / "gone.mp4")


def test_an_image_is_probed(tmp_path):
    from PIL import Image
    Image.fromarray(shot(1, 1)[0]).save(tmp_path / "a.PNG")
    row = probe(tmp_path / "a.PNG")
    assert (row["kind"], row["num_frames"], row["height"], row["width"]) == ("image", 1, 96, 128)


@pytest.mark.parametrize("size, aspect, wanted", [((96, 128), None, (96, 128)), ((900, 1200), None, (720, 960)),
                                                  ((240, 360), Fraction(8, 9), (240, 320))])
def test_a_clip_is_written_as_displayed(size, aspect, wanted, tmp_path):
    source = write(tmp_path / "a.mkv", shot(1, 20, size=size), aspect=aspect)
    row, = write_clips(source, [(5, 15, tmp_path / "b.mp4", None)], np.arange(20) / 24)
    assert (row["height"], row["width"], row["num_frames"], row["fps"]) == (*wanted, 10, 24)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.mkv", "b.mp4"]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_turned_clip_is_written_upright(rotation, tmp_path):
    source = write(tmp_path / "a.mp4", shot(1, 20), rotation=rotation)
    row, = write_clips(source, [(0, 20, tmp_path / "b.mp4", None)], np.arange(20) / 24)
    assert (row["height"], row["width"], row["rotation"]) == ((96, 128, 0) if rotation == 180 else (128, 96, 0))
    assert probe(source)["rotation"] == rotation % 360 and probe(source)["height"] == row["height"]
    upright = np.rot90(shot(1, 20).astype(float), rotation // 90, (1, 2))
    for path in (source, tmp_path / "b.mp4"):
        assert np.abs(np.concatenate([frames for _, frames, _ in small_frames(path)]) - upright).mean() < 6


def test_a_variable_rate_keeps_its_times(tmp_path):
    ticks = np.cumsum(np.random.default_rng(1).choice([3000, 3750, 9000], 60))
    source = write(tmp_path / "a.mp4", shot(1, 60), times=ticks.tolist())
    _, times = cut(source)
    row, = write_clips(source, [(10, 50, tmp_path / "b.mp4", None)], times)
    _, written = cut(tmp_path / "b.mp4")
    assert np.allclose(written - written[0], times[10:50] - times[10], atol=1e-3) and row["num_frames"] == 40


def test_a_clip_that_lacks_frames_is_not_there(tmp_path):
    source = write(tmp_path / "a.mp4", shot(1, 20))
    for start, end in ((5, 35), (30, 60)):
        with pytest.raises(UnreadableClip, match="expected 30"):
            list(write_clips(source, [(start, end, tmp_path / "b.mp4", None)], np.arange(60) / 24))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


# ---- motion ----

H, W = 180, 320
Y, X = torch.meshgrid(torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2, indexing="ij")
Z = torch.complex(X, Y)
RMS = math.hypot(H, W) / math.sqrt(12)  # distance from the middle


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real_frames(name, first=0, count=1, every=1, side=None):
    """Grey frames [T h w] of a real clip."""
    folder = os.environ.get("NANOSORA_CLIPS")
    if not folder or not Path(folder, name).exists():
        pytest.skip(f"set NANOSORA_CLIPS to a folder with {name}")
    found = []
    with av.open(str(Path(folder, name))) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i >= first and (i - first) % every == 0:
                k = min(1, side / max(frame.width, frame.height)) if side else 1
                size = round(frame.width * k), round(frame.height * k)
                found.append(frame.reformat(*size, "gray", interpolation="AREA").to_ndarray())
            if len(found) == count:
                break
    return torch.from_numpy(np.stack(found)).float()


def texture(seed, h=720, w=1280):
    """[h w] in 0..255: noise at all scales, as photographs have it."""
    g, x = torch.Generator().manual_seed(seed), torch.zeros(1, 1, h, w)
    for k in (4, 8, 16, 32, 64, 128):
        x += k ** 0.7 * F.interpolate(torch.randn(1, 1, h // k + 1, w // k + 1, generator=g), (h, w), mode="bicubic")
    return (128 + 45 * (x - x.mean()) / x.std())[0, 0].clamp(0, 255)


def moved(image, shift=0, turn=0):
    """[h w] frame of a large image whose content moved by f(z) = shift + turn z from where `moved(image)` has it."""
    h, w = image.shape
    z = (Z - shift) / (1 + turn) * (0.72 * w / W)
    place = torch.stack((z.real / (w / 2), z.imag / (h / 2)), -1)[None]
    shrunk = F.avg_pool2d(image[None, None], 3, 1, 1)
    return F.grid_sample(shrunk, place.float(), mode="bicubic", padding_mode="reflection", align_corners=False)[0, 0]


def random_move(rng, kind, lowest=2, highest=20):
    """(shift, turn) whose largest displacement, at the corners for turn, is lowest..highest pixels."""
    pixels, corner = rng.uniform(lowest, highest), math.hypot(H, W) / 2
    if kind == "translate":
        return complex(pixels * np.exp(2j * math.pi * rng.random())), 0
    return 0, complex(rng.choice([-1, 1]) * pixels / corner * (1j if kind == "rotate" else 1))


def end_point_errors(images, noise, seed=0, count=24):
    """[count] means over the pixels that stay in the frame, in pixels."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    moves = [random_move(rng, ("translate", "rotate", "zoom")[k % 3]) for k in range(count)]
    grain = lambda x: (x + noise * torch.randn(x.shape, generator=g)).round().clamp(0, 255)
    a = grain(torch.stack([moved(images[k % len(images)]) for k in range(count)]))
    b = grain(torch.stack([moved(images[k % len(images)], *moves[k]) for k in range(count)]))
    truth = torch.stack([shift + turn * Z for shift, turn in moves])
    field = torch.cat([flow(*pair) for pair in zip(a.split(8), b.split(8))])
    end = Z + truth
    inside = (end.real.abs() < W / 2 - 0.5) & (end.imag.abs() < H / 2 - 0.5)
    error = (torch.complex(field[:, 0], field[:, 1]) - truth).abs()
    return (error * inside).sum((1, 2)) / inside.sum((1, 2))


def real_images():
    return [*real_frames("bbb_multishot_720p24_audio.mp4", 30, 3, 400),
            *real_frames("bbb_action_720p24.mp4", 100, 3, 400),
            *real_frames("city_cc0_720x405_mpeg2.mpg", 20, 2, 130)]


def test_flow_synthetic():
    errors = end_point_errors([texture(k) for k in range(4)], noise=2)
    assert errors.mean() < 0.3 and errors.max() < 0.8, errors


@pytest.mark.parametrize("noise", [0, 2])
def test_flow_on_real_frames(noise):
    errors = end_point_errors(real_images(), noise, count=48)
    assert errors.mean() < 0.3 and errors.max() < 1, errors


def test_flow_ignores_light_and_stands_still():
    a, b = moved(texture(1))[None], moved(texture(1), 5 - 3j)[None]
    field = flow(a, b * 0.8 + 30)
    assert (field.mean((2, 3)) - torch.tensor([[5.0, -3.0]])).abs().max() < 0.4
    assert flow(a, a).abs().max() < 1e-3 and flow(a * 0, a * 0).abs().max() == 0
    assert flow(a.byte(), b.byte()).shape == (1, 2, H, W)


@pytest.mark.parametrize("h, w", [(32, 35), (179, 317), (320, 181), (144, 176)])
def test_flow_any_size_and_each_pair_alone(h, w):
    frame = F.avg_pool2d(texture(3)[None], 2)[0]
    a, b = frame[:h, :w], frame[1:h + 1, 2:w + 2]  # content moves left and up
    field = flow(torch.stack((a, b)), torch.stack((b, a)))
    assert field.shape == (2, 2, h, w)
    for k, sign in enumerate((-1, 1)):
        middle = field[k, :, 8:-8, 8:-8].mean((1, 2))
        assert (middle - sign * torch.tensor([2.0, 1.0])).abs().max() < 0.2, (k, middle)
    torch.testing.assert_close(field[:1], flow(a[None], b[None]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("a, b", [((2, 64, 64), (3, 64, 64)), ((64, 64), (64, 64)), ((1, 31, 64), (1, 31, 64))])
def test_flow_refuses(a, b):
    with pytest.raises(ValueError, match="got"):
        flow(torch.zeros(a), torch.zeros(b))


def test_similarity_is_exact_under_a_third_of_outliers():
    shift, turn = 6 - 2j, 0.02 + 0.03j
    f = shift + turn * Z
    f[40:, 100:250] = -9 + 4j  # 36% of the frame
    got_shift, got_turn, against = similarity(torch.stack((f.real, f.imag))[None])
    assert abs(got_shift[0] - shift) < 0.1 and abs(got_turn[0] - turn) * RMS < 0.1
    assert abs(against[0] - 140 * 150 / (H * W)) < 0.03


def move_for(name, pixels):
    """(shift, turn) of the picture per pair when the camera moves so: opposite."""
    return {"pan right": (-pixels, 0), "pan left": (pixels, 0), "tilt down": (-1j * pixels, 0),
            "tilt up": (1j * pixels, 0), "zoom in": (0, pixels / RMS), "zoom out": (0, -pixels / RMS),
            "roll": (0, 1j * pixels / RMS), "static": (0, 0)}[name]


NAMES = "pan right", "pan left", "tilt down", "tilt up", "zoom in", "zoom out", "roll", "static", "shake"


def random_camera_case(rng, images, case):
    """(name, what the code says) of three pairs 1/12 s apart, with noise and a tenth of another motion."""
    name, image, gap = NAMES[case % len(NAMES)], images[rng.integers(len(images))], 1 / 12
    pixels, g = rng.uniform(0.5, 15), torch.Generator().manual_seed(case)
    pairs = []
    for _ in range(4 if name == "shake" else 3):
        shift, turn = (pixels * np.exp(2j * math.pi * rng.random()), 0) if name == "shake" else move_for(name, pixels)
        extra = 0 if name == "static" else 0.1 * pixels * np.exp(2j * math.pi * rng.random())
        pairs.append((moved(image), moved(image, complex(shift + extra), complex(turn))))
    a, b = (torch.stack(x) + 1.5 * torch.randn(len(x), H, W, generator=g) for x in zip(*pairs))
    return name, camera(motion(flow(a, b), np.full(len(a), gap)))["cmotion"]


def classes(images, count, least):
    rng = np.random.default_rng(0)
    cases = [random_camera_case(rng, images, k) for k in range(count)]
    wrong = [case for case in cases if case[0] != case[1]]
    assert len(wrong) <= (1 - least) * count, wrong


def test_camera_classes():
    classes([texture(k) for k in range(4)], 36, 0.97)


def test_camera_classes_on_real_frames():
    classes(real_images(), 100, 0.95)


def person_walks(background, step, camera_step=0.0, frames=4):
    """[frames h w]: a head and body before the background, step pixels a frame to the right."""
    found, cloth = [], F.avg_pool2d(texture(9)[None], 2)[0, :H, :W] * 0.7 + 60
    for k in range(frames):
        x = X - (-60 + k * step)
        body = torch.maximum(1 - (x / 32) ** 2 - ((Y - 40) / 70) ** 2, 1 - (x / 16) ** 2 - ((Y + 45) / 20) ** 2)
        mask = torch.sigmoid(12 * body)
        found.append(moved(background, -camera_step * k) * (1 - mask) + mask * cloth.roll(round(k * step), 1))
    return torch.stack(found)


@pytest.mark.parametrize("step", [2, 6, 12])
def test_a_walking_person_is_no_pan(step):
    backgrounds = [texture(1), texture(2), 0.1 * texture(3) + 100]  # the last: a plain wall
    if os.environ.get("NANOSORA_CLIPS"):
        backgrounds += real_images()
    found = []
    for background in backgrounds:
        for camera_step in (0, step):
            g = person_walks(background, step, camera_step)
            g = g + 1.5 * torch.randn(g.shape, generator=torch.Generator().manual_seed(0))
            found.append(camera(motion(flow(g[:-1], g[1:]), np.full(3, 1 / 12)))["cmotion"])
    stands, follows = found[::2], found[1::2]  # before a plain wall it may say nothing, but nothing wrong
    assert set(stands) <= {"static", ""} and stands.count("static") >= 0.8 * len(stands) - 1, stands
    assert set(follows) <= {"pan right", ""} and follows.count("pan right") >= 0.8 * len(follows) - 1, follows


def test_units():
    """1% of the longer side in 1/10 s is 32 pixels per second, at any size; the picture goes left: a pan right."""
    for side in (1, 2):
        frame = F.avg_pool2d(texture(5)[None], 2 * side)[0]
        h, w, n = 160 // side, 320 // side, 4 // side
        a, b = frame[:h, :w][None], frame[:h, n:w + n][None]
        rows = motion(flow(a, b), [0.125])
        assert np.allclose(rows[0, :3], [32, 32, 0], atol=1.5), rows
    assert camera(rows) | {"flow": 0, "against": 0} == {"flow": 0, "against": 0, "cmotion": "pan right"}


def test_camera_of_pairs():
    row = lambda x, y=0, against=0.1: [math.hypot(x, y), x, y, 0, 0, against]
    say = lambda *rows: camera(np.array(rows, dtype=float))["cmotion"]
    assert camera(np.zeros((0, 6)))["cmotion"] == "" and math.isnan(camera(np.zeros((0, 6)))["flow"])
    assert say(*[row(30)] * 5, row(-300, 200)) == "pan right"  # one pair over a cut
    assert say(*[row(30)] * 4, *[row(-30)] * 4) == ""  # there and back
    assert say(*[row(30), row(-30)] * 4) == "shake"
    assert say(*[row(30, against=0.7)] * 3, row(30)) == ""
    assert say(*[row(1)] * 4) == "static"


def test_checks_of_plain_frames():
    black, half = torch.zeros(2, H, W), torch.zeros(2, H, W)
    half[:, :, W // 2:] = 255
    assert (looks(black)[:, 1] * 255 < UNIFORM).all() and not (looks(half)[:, 1] * 255 < UNIFORM).any()
    assert looks(half)[:, :2].tolist() == [[0.5, 0.5]] * 2 and looks(black)[:, 2].tolist() == [0] * 2
    rgb = np.zeros((1, 4, 4, 3), np.uint8)
    rgb[..., 1] = 100
    assert torch.allclose(grey(rgb), torch.full((1, 4, 4), 58.7)) and torch.allclose(grey(rgb[..., ::-1]), grey(rgb))


def test_sharpness_falls_with_blur():
    frame = moved(texture(1))[None, None]
    values = [looks(F.avg_pool2d(frame, k, 1)[:, 0])[0, 2].item() for k in (1, 3, 5, 9)]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[3], values


def test_repeats_under_coding_noise():
    g = torch.Generator().manual_seed(0)
    film = torch.stack([moved(texture(1), 2 * k) for k in (0, 0, 1, 1, 1, 2)])
    film[3, 60:70, 60:70] += 10  # a mouth opens
    film = film + torch.randn(film.shape, generator=g)
    assert repeats(film).tolist() == [True, False, False, False, False]
    assert longest(repeats(film)) == 1 and longest([]) == 0 and longest([True] * 3 + [False, True]) == 3
    assert repeats(film[:1]).tolist() == []


def bars_of(g):
    return tuple(bars([lit_share(frame) for frame in g]))


@pytest.mark.parametrize("black", [0, 16])
def test_bars(black):
    g = torch.stack([moved(texture(k)) for k in range(3)])
    assert bars_of(g) == (0, 0, 0, 0)
    g[:, :22], g[:, -20:] = black, black
    assert bars_of(g) == (22, 20, 0, 0) and bars_of(g.mT) == (0, 0, 22, 20)
    top, left, height, width = crop(bars_of(g), (H, W), 720, 1280)
    assert (top, left, height, width) == (90, 0, 548, 1280)
    assert crop((0, 0, 0, 0), (H, W), 405, 721) == (0, 0, 404, 720)
    assert bars_of(g[:1] * 0 + black) == (0, 0, 0, 0)  # a black frame
    title = g * 0 + black
    title[:, 80:100, 60:250:3] = 230
    assert bars_of(title) == (0, 0, 0, 0)  # text on black


def test_combs():
    big = [F.avg_pool2d(texture(k)[None], 2)[0] for k in range(4)]
    frames = torch.stack([x[:, :-8] for x in big])
    woven = frames.clone()
    woven[:, 1::2] = torch.stack([x[:, 8:] for x in big])[:, 1::2]  # 8 pixels later
    stripes = torch.zeros(1, 360, 632)
    stripes[:, ::2] = 255
    assert combs(frames).max() < 0.001 < 0.01 < combs(woven).min(), (combs(frames), combs(woven))


# ---- dedup ----

def scene(seed, T=3, h=90, w=160):
    """uint8 [T h w 3] of coloured patches that drift down."""
    grid = np.random.default_rng(seed).integers(0, 256, (T + 12, 20, 3), np.uint8)
    return np.stack([np.array(Image.fromarray(grid[t:t + 12]).resize((w, h), Image.Resampling.BICUBIC))
                     for t in range(T)])


def h264(frames, crf, scale=1.0):
    h, w = (int(n * scale) // 2 * 2 for n in frames.shape[1:3])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = h, w, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").reformat(w, h)))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def hash_of(frames):
    g = grey(frames)
    return joint_hash([perceptual_hash(frame) for frame in g])


def brighter(frames, factor=1.1):
    return np.clip(frames * factor, 0, 255).astype(np.uint8)


def cropped(frames, share):
    h, w = frames.shape[1:3]
    top, left = round(h * share / 2), round(w * share / 2)
    return frames[:, top:h - top, left:w - left]


def alike(one, two):
    a, b = hash_vectors([hash_of(one), hash_of(two)]).astype(np.float32)
    return float(a @ b)


def test_hash_survives_what_changes_no_content():
    for seed in range(8):
        one = scene(seed)
        for two in (h264(one, 28), h264(one, 23, 0.5), brighter(one), cropped(one, 0.02)):
            assert alike(one, two) >= HASH_ALIKE
        assert alike(one, scene(seed + 100)) < 0.6
        assert alike(one, one[:, :, ::-1]) < 0.6
    assert hash_of(scene(0)[:1]) == 3 * hash_of(scene(0)[:1])[:16], "an image stands for three"
    assert hash_of(scene(0, 5)) == hash_of(scene(0, 5)[[0, 2, 4]])


def test_flat_frames_are_like_nothing():
    rng = np.random.default_rng(0)
    def noisy(grey):
        return np.clip(rng.normal(grey, 5, (3, 90, 160, 3)), 0, 255).astype(np.uint8)
    flat = [np.zeros((3, 90, 160, 3), np.uint8), noisy(0), noisy(0), noisy(128), noisy(255)]
    assert [hash_of(frames) for frames in flat] == [""] * 5
    assert hash_of(np.concatenate([noisy(0)[:1], scene(0)[1:]]))[:16] == 16 * "0"
    from_black = [np.concatenate([flat[0][:1], scene(seed)[1:]]) for seed in range(6)]
    vectors = hash_vectors([hash_of(frames) for frames in from_black + flat + [h264(from_black[0], 28)]])
    assert duplicates(vectors, HASH_ALIKE, range(12)).tolist() == [-1] * 11 + [0]


def test_hash_vectors_count_bits():
    hashes = [hash_of(scene(seed)) for seed in range(5)]
    vectors = hash_vectors([*hashes, ""]).astype(np.float64)
    for a, b in itertools.combinations(range(5), 2):
        bits = (int(hashes[a], 16) ^ int(hashes[b], 16)).bit_count()
        assert vectors[a] @ vectors[b] == pytest.approx(1 - 2 * bits / HASH_BITS, abs=1e-3)
    assert not vectors[5].any() and hash_vectors(["", ""]).shape == (2, HASH_BITS)


def test_feature_vectors():
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float16)
    texts = [base64.b64encode(row.tobytes()).decode() for row in x]
    assert (feature_vectors([texts[0], "", *texts[1:]]) == np.insert(x, 1, 0, axis=0)).all()
    assert duplicates(feature_vectors([texts[0], "", "", texts[0]]), 0.9 * x[0] @ x[0], range(4)).tolist() == [
        -1, -1, -1, 0], "without features like nothing"
    assert curate.find_duplicates([{"path": "a"}, {"path": "b"}], DEFAULT, "cpu") == ["", ""]


def plain_duplicates(vectors, threshold, order):
    kept, repeats = [], [-1] * len(vectors)
    for i in order:
        repeats[i] = next((j for j in kept if vectors[i] @ vectors[j] >= threshold), -1)
        kept += [i] * int(repeats[i] < 0)
    return repeats


@pytest.mark.parametrize("block, wide", [(4096, 65536), (7, 5), (1, 1), (64, 3)])
def test_duplicates_are_those_of_a_plain_loop(block, wide):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((40, 12))[rng.integers(0, 40, 200)] + 0.25 * rng.standard_normal((200, 12))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(200)
    found = duplicates(x, 0.9, order, block=block, wide=wide)
    assert found.tolist() == plain_duplicates(x, 0.9, order)
    assert 20 < (found >= 0).sum() < 180 and (found[found[found >= 0]] == -1).all(), "repeats what is kept"


def test_a_chain_does_not_become_one_clip():
    angles = np.radians(np.arange(0, 90, 10))
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert duplicates(x, np.cos(np.radians(12)), range(9)).tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1]
    assert duplicates(x, np.cos(np.radians(12)), [1, 0, 2, *range(3, 9)]).tolist()[:3] == [1, -1, 1], "the best stays"


# Each a single shot: (file, first frame, last frame)
SHOTS = [("bbb_multishot_720p24_audio.mp4", 0, 47), ("bbb_multishot_720p24_audio.mp4", 48, 122),
         ("bbb_multishot_720p24_audio.mp4", 303, 354), ("bbb_multishot_720p24_audio.mp4", 511, 745),
         ("bbb_multishot_720p24_audio.mp4", 786, 985), ("bbb_action_720p24.mp4", 200, 260),
         ("city_cc0_720x405_mpeg2.mpg", 0, 115), ("city_cc0_720x405_mpeg2.mpg", 116, 189),
         ("concert_multicam_176x144_vp9_60s.webm", 1024, 1118), ("concert_multicam_176x144_vp9_60s.webm", 1300, 1368)]


@pytest.fixture(scope="session")
def shots():
    """The first, middle and last frame of each."""
    return [np.stack([read_window(str(Path(CLIPS, name)), 1, start=t)[0][0].numpy() for t in (a, (a + b) // 2, b)])
            for name, a, b in SHOTS]


@footage
def test_duplicates_of_the_footage(shots):
    """Found: encoded again, half as large, brighter, cropped a little; half of those cropped by 5%; no other shot."""
    changes = {"crf 35": lambda x: h264(x, 35), "half": lambda x: h264(x, 28, 0.5), "brighter": brighter,
               "crop 2%": lambda x: cropped(x, 0.02), "crop 5%": lambda x: cropped(x, 0.05)}
    N, found = len(shots), {}
    for name, change in changes.items():
        vectors = hash_vectors([hash_of(x) for x in shots + [change(x) for x in shots]])
        repeats = duplicates(vectors, HASH_ALIKE, range(2 * N))
        assert (repeats[:N] == -1).all(), "shots of one film are different"
        assert set(repeats[N:] - np.arange(N)) <= {0, *(-1 - np.arange(N))}, "nor is one a copy of another"
        found[name] = int((repeats[N:] >= 0).sum())
    print(found)
    assert min(found[name] for name in ("half", "brighter", "crop 2%", "crf 35")) >= N - 1
    assert found["crop 5%"] >= N // 3


# ---- rules ----

DEFAULT = [rule for rule in RULES if rule.limit is not None]
ROW = {"path": "a.mp4", "num_frames": "48", "aes": "6", "flow": "10", "error": "", "duplicate_of": "", "dropped": ""}


@pytest.mark.parametrize("change, expected", [
    ({}, ""),
    ({"flow": "0.4"}, "flow 0.4 < min_flow 0.5"),
    ({"aes": 4.2, "flow": "0.1"}, "aes 4.2 < min_aesthetic 5"),  # the first rule
    ({"aes": "5"}, ""),
    ({"aes": "4.99999"}, "aes 4.99999 < min_aesthetic 5"),  # not "5 < 5"
    ({"repeats": 0.0, "combs": 0.0}, ""),  # a number of a step, not of a csv
    ({"combs": "0.02"}, "combs 0.02 > max_combs 0.01"),
    ({"aes": ""}, "no aes"),
    ({"aes": None}, "no aes"),
    ({"aes": "nan"}, "no aes"),
    ({"num_frames": "1", "flow": "", "repeats": ""}, ""),  # an image
    ({"num_frames": 1, "flow": "", "aes": "3"}, "aes 3 < min_aesthetic 5"),
    ({"error": TOO_SHORT, "path": "", "source": "b.mp4"}, TOO_SHORT),
    ({"dropped": "flow 0.4 < min_flow 0.5"}, ""),  # of another day's rules
    ({"dropped": "no aes"}, ""),
    ({"dropped": "duplicate of b.mp4"}, ""),
    ({"duplicate_of": "b, c.mp4"}, "duplicate of b, c.mp4"),
    ({"error": "a.mp4: is empty", "aes": ""}, "a.mp4: is empty"),
])
def test_verdict(change, expected):
    assert verdict(ROW | change, DEFAULT) == expected
    again = ROW | change | {"dropped": verdict(ROW | change, DEFAULT)}
    assert verdict(again, DEFAULT) == expected, "filtering twice changes nothing"
    tally = Tally(DEFAULT)
    assert tally.add(ROW | change) == expected and sum(tally.dropped.values()) == bool(expected)


def test_flags(capsys):
    rules = lambda *flags: rules_of(curate.parse_args(["filter", "a.csv", *flags]))
    assert rules() == DEFAULT
    mine = rules("--min-aesthetic=4.5", "--min-flow=none", "--max-text-area", "0.03")
    assert list(map(str, mine[:4])) == ["min_aesthetic 4.5", "min_match 20", "max_text_area 0.03", "max_repeats 0.7"]
    assert verdict(ROW | {"flow": "0", "aes": "4.6"}, mine) == ""
    for wrong in ("five", "nan", "", "1+1", "__import__('os')"):
        with pytest.raises(SystemExit):
            rules(f"--min-flow={wrong}")
        assert "--min-flow: expected a number, or none to switch the rule off, got " + repr(wrong) in \
            capsys.readouterr().err


def test_tally():
    rows = [ROW, ROW | {"flow": "0.1", "path": 'b, "c".mp4'}, ROW | {"flow": "0.2", "aes": "1"}, ROW | {"aes": "2"},
            ROW | {"error": "a.mp4: broken"}, ROW | {"error": TOO_SHORT, "path": "", "source": "b.mp4"}]
    tally = Tally([rule for rule in DEFAULT if rule.name != "max_combs"])
    assert [bool(tally.add(row)) for row in rows] == [False, True, True, True, True, True]
    lines = [re.split(r" {2,}", line) for line in str(tally).splitlines()]
    assert lines[0] == ["rule", "kept", "dropped", "alone", "example"]
    lines = {line[0]: line[1:] for line in lines}
    assert lines["unreadable"][:3] == ["5", "1", "1"] and lines["too short"] == ["4", "1", "1", f"b.mp4: {TOO_SHORT}"]
    assert lines["min_aesthetic 5"] == ["2", "2", "2", "a.mp4: aes 1 < min_aesthetic 5"]
    assert lines["min_flow 0.5"] == ["1", "1", "2", 'b, "c".mp4: flow 0.1 < min_flow 0.5'], "2 alone"
    assert lines["max_held 2"] == ["not measured"] and "max_combs 0.01" not in lines
    assert list(lines)[1:7] == ["unreadable", "too short", "duplicate", "min_aesthetic 5", "min_match 20",
                                "max_text_area 0.02"]
    assert str(tally).endswith("6 clips, 1 kept")


# ---- report ----

class Page(HTMLParser):
    """Balanced? And what it names."""
    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open[-1] in ("td", "th") and tag not in ("td", "th"):  # which need not be closed
            self.open.pop()
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


NASTY = ['a "b" <i>&amp; c\'d, é漢.mp4', '-->]]></style><script>alert("1")</script>.mp4', os.fsdecode(b"\xff\xfe.mp4")]


def table(n=60):
    """Rows of all kinds with numbers that spread."""
    rng = np.random.default_rng(0)
    for i in range(n):
        still, flow = i and i % 9 == 0, 10 ** rng.uniform(-2, 2) if i > 2 else (0, 999, 0.001)[i]
        yield {"path": NASTY[i] if i < len(NASTY) else f"clips/{i:03d}.mp4", "source": f"{i // 4}.mp4",
               "num_frames": "1" if still else "96", "height": "720", "width": "1280", "fps": "24", "text": "a b " * i,
               "seconds": f"{rng.uniform(2, 16):.3f}", "flow": "" if still else f"{flow:.4f}",
               "aes": f"{rng.normal(5.2, 0.5):.3f}", "cmotion": "pan left" if i % 2 else "",
               "error": f"{i}.mp4: <frame {i} is damaged>" if i > n - 4 else "", "duplicate_of": "", "dropped": ""}


def frames_of(row):
    if row["path"] in NASTY[:1]:
        raise UnreadableClip(f"{row['path']}: is <gone>")
    return scene(len(row["path"]))


def test_report(tmp_path):
    write_report(table, DEFAULT, tmp_path / "report.html", frames_of)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "script" not in {tag for tag, _ in page.tags} and not re.search(r"https?:|url\(|@import|<link|<i>&", text)
    assert not [a for _, a in page.tags if a.get("href") or not a.get("src", "data:").startswith("data:")]
    assert "color-scheme:light dark" in text
    assert page.images and all(image["alt"] for image in page.images)
    for image in page.images:
        sheet = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert sheet.format == "JPEG" and sheet.size == (int(image["width"]), 64) == (3 * 114, 64)
    words = "".join(page.text)
    assert "min_flow 0.5" in words and "min_match 20" in words and "<frame 57 is damaged>" in words
    assert NASTY[1] in words and f"frames of {NASTY[1]}" in [image["alt"] for image in page.images]
    assert "\\udcff" in words and "<h2>min_match" not in text
    assert f"{NASTY[0]}: is <gone>" in words, "a clip that cannot be opened says why"
    assert text.count("<h2>") == 2, "the columns that are there, and no others"
    kept = [row for row in table() if not verdict(row, DEFAULT)]
    hours = sum(float(row["seconds"]) for row in kept) / 3600
    assert f"{len(kept)} of 60 clips kept, {hours:.2f} hours" in words


def test_a_report_is_whole(tmp_path, monkeypatch):
    write_report(lambda: iter(()), DEFAULT, tmp_path / "r.html", frames_of)
    Page(whole := (tmp_path / "r.html").read_text())
    monkeypatch.setattr(curate, "figure", None)
    with pytest.raises(TypeError):
        write_report(table, DEFAULT, tmp_path / "r.html", frames_of)
    assert (tmp_path / "r.html").read_text() == whole


def test_picks():
    values = np.array([5, np.nan, 1, 9, 3, 7, 4, 2, 8, 6, 10, 0, 11], np.float32)
    for rule, sign in ((Rule("min_flow", "flow", 5), 1), (Rule("max_flow", "flow", 5), -1)):
        chosen = picks(values, rule)
        rows = [i for found in chosen.values() for i in found]
        assert len(rows) == len(set(rows)) and 1 not in rows
        assert [values[i] for i in chosen["just kept"]] == [5, 5 + sign, 5 + 2 * sign]
        assert [values[i] for i in chosen["just dropped"]] == [5 - sign, 5 - 2 * sign, 5 - 3 * sign]
        assert values[chosen["worst"][0]] == (0 if sign > 0 else 11) and values[chosen["best"][0]] == (11, 0)[sign < 0]
    assert picks(np.array([7], np.float32), Rule("min_flow", "flow", 5))["just kept"] == [0]
    edge = picks(np.array([0.7], np.float32), Rule("min_flow", "flow", 0.7))
    assert edge["just kept"] == [0], "0.7 in float32 is within 0.7"


@footage
def test_report_of_the_footage(tmp_path, shots):
    rows = [ROW | {"path": f"{i}-{name}", "flow": f"{i / 5}", "source": name} for i, (name, *_) in enumerate(SHOTS)]
    broken = ROW | {"path": "corrupt_truncated_no_moov.mp4", "flow": "3"}
    def open_frames(row):
        if row["path"][0] == "c":
            return read_window(str(Path(CLIPS, row["path"])), 3)[0].numpy()
        return shots[int(row["path"][0])]
    write_report(lambda: iter([*rows, broken]), DEFAULT, tmp_path / "report.html", open_frames)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) >= 6 and "Invalid data found" in "".join(page.text)
    assert os.path.getsize(tmp_path / "report.html") < 1e6


# ---- runs, as a user starts them ----

def run(*args, rank=0, world=1, wait=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    process = subprocess.Popen([sys.executable, "curate.py", *map(str, args)], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not wait:
        return process
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def rows_of(path):
    return list(curate.read_table(path))


def results(out):
    """When each item was done, and what is known of it."""
    return {path: (path.stat().st_mtime_ns, json.loads(path.read_bytes())) for path in out.glob("parts/*/*/*.json")}


def done(out):
    return {path: found for path, found in results(out).items() if "error" not in found[1]}


def written(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*")
            if path.is_file() and "parts" not in path.parts and path.suffix != ".index"}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder with all that a folder may have."""
    folder = tmp_path_factory.mktemp("raw") / "my, \"videos\" \N{SNOWMAN}"
    (folder / "sub").mkdir(parents=True)
    write(folder / "two 'shots'.mp4", np.concatenate([shot(1, 60, soft=8), shot(2, 50, pan=2, soft=8)]))
    write(folder / "sub" / "one.mkv", shot(3, 70, pan=2, soft=6))
    write(folder / "sub" / "again.mp4", shot(3, 70, pan=2, soft=6))
    bars_around = shot(4, 60, pan=2, soft=6)
    bars_around[:, :16], bars_around[:, -16:] = 0, 0
    write(folder / "letterbox.mp4", bars_around)
    write(folder / "held.mp4", np.repeat(shot(5, 1, soft=6), 60, axis=0))
    write(folder / "three.mp4", shot(6, 3, soft=6))
    Image.fromarray(shot(7, 1, soft=6)[0]).save(folder / "still.png")
    (folder / "empty.mp4").touch()
    (folder / "cut off.mp4").write_bytes((folder / "two 'shots'.mp4").read_bytes()[:20000])
    (folder / "letterbox.txt").write_text("clouds,\n as in a \"film\"\n")
    (folder / "notes.pdf").touch()
    return folder


@pytest.fixture(scope="session")
def curated(videos):
    out = videos.parent / "out"
    status, said, error = run("run", videos, "--out", out)
    assert status == 0, error
    return out, said


def test_a_run_from_videos_to_a_training_set(curated, videos):
    out, said = curated
    files = {Path(row["path"]).name: row for row in rows_of(out / "files.csv")}
    assert files.keys() == {path.name for path in videos.rglob("*.*")} - {"letterbox.txt", "notes.pdf"}
    assert {name for name, row in files.items() if row["error"]} == {"empty.mp4", "cut off.mp4"}
    assert files["two 'shots'.mp4"]["num_frames"] == "110"
    clips = rows_of(out / "clips.csv")
    dropped = {Path(row["source"]).name: row["dropped"] for row in clips}
    assert dropped["three.mp4"] == TOO_SHORT and "< min_flow 0.5" in dropped["held.mp4"], dropped
    assert len([row for row in clips if row["dropped"].startswith("duplicate of clips/")]) == 1
    meta = read_meta(str(out / "meta.csv"))
    assert len(meta) == 5 and "5 clips, 4 of them without a caption" in said
    for i in range(len(meta)):
        frames, _ = read_window(meta.path(i))
        row = meta.rows[i]
        assert frames.shape[:3] == (row["num_frames"], row["height"], row["width"])
        if "letterbox" in meta.path(i):
            assert meta.text(i) == 'clouds, as in a "film"' and row["height"] == 60
    found = {(Path(row["source"]).name, row["num_frames"], row["start_seconds"]) for row in clips if not row["dropped"]}
    assert {("two 'shots'.mp4", "60", "0.0"), ("two 'shots'.mp4", "50", "2.5"), ("still.png", "1", "0.0")} < found
    assert all(part in said for part in ("2 cannot be read", "notes.pdf", "min_flow 0.5", "not measured")), said


def test_a_second_run_does_nothing_and_says_the_same(curated, videos):
    out, said = curated
    before, first = written(out), results(out)
    status, again, _ = run("run", videos, "--out", out)
    assert status == 0 and again == said and written(out) == before
    tried = {path for path, found in results(out).items() if found != first[path]}
    assert len(tried) == 2 and tried == first.keys() - done(out).keys(), "what failed, and no other, is tried again"


def test_filter_and_steps_on_the_table(curated, videos, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(curated[0], out)
    before = (out / "clips.csv").read_text()
    status, said, error = run("filter", out, "--min-flow=none", "--max-repeats=none", "--max-held=none",
                              "--config=configs/tiny.py")
    assert status == 0 and len(rows_of(out / "meta.csv")) == 6 and "32 x 16" in said, error
    assert run("filter", out)[0] == 0 and (out / "clips.csv").read_text() == before
    rows = [{name: "" if name in (*curate.CHECKS, *curate.FLOW) else value for name, value in row.items()}
            for row in rows_of(out / "clips.csv")]
    curate.write_table(out / "clips.csv", rows, rows[0])
    assert run("checks", out)[0] == run("flow", out)[0] == 0
    for old, new in zip(csv.DictReader(io.StringIO(before)), rows_of(out / "clips.csv")):
        assert old["source"] == new["source"] and old["cmotion"] == new["cmotion"]
        if old["brightness"] and "letterbox" not in old["source"]:  # measured on the source, with its bars
            assert abs(float(old["brightness"]) - float(new["brightness"])) < 0.01
    assert run("dedup", out)[0] == run("report", out)[0] == 0 and (out / "report.html").is_file()


@pytest.mark.parametrize("args, says", [
    (["run", "nowhere", "--out", "OUT"], "nowhere: no such file or folder"),
    (["run", "EMPTY", "--out", "OUT"], "has no video or image among 0 files"),
    (["run", "EMPTY"], "expected --out DIR"),
    (["filter", "EMPTY"], "no such table - `python curate.py run"),
    (["run", "EMPTY", "--out", "OUT", "--with", "aesthetics"], "--with aesthetics: expected some of"),
    (["filter", "EMPTY", "--min-flow=fast"], "expected a number, or none to switch the rule off, got 'fast'"),
    (["filter", "EMPTY", "--config=configs/no.py"], "configs/no.py"),
    (["report", "EMPTY"], "no such table - `python curate.py run"),
    (["run", "IMAGES", "--out", "IMAGES"], "is where the videos are, and the next run would cut its clips - give"),
    (["run", "IMAGES", "--out", "IMAGES/out", "--captions", "ROWS"], "has columns path,aes, expected also text"),
    (["run", "IMAGES", "--out", "IMAGES/out", "--max-seconds", "0"], "--min-seconds 2 --max-seconds 0: expected"),
    (["run", "IMAGES", "--out", "IMAGES/out", "--min-seconds", "9", "--max-seconds", "8"], "expected the shortest"),
    (["caption", "ROWS"], "has columns path,aes, expected also num_frames"),
])
def test_mistakes_are_one_line(args, says, tmp_path):
    for name in ("empty", "images"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "one.png")
    (tmp_path / "rows").write_text("path,aes\none.png,5\n")
    (tmp_path / "rows").rename(tmp_path / "rows.csv")
    names = {"OUT": "out", "EMPTY": "empty", "IMAGES": "images", "IMAGES/out": "images/out", "ROWS": "rows.csv"}
    status, _, error = run(*[tmp_path / names[arg] if arg in names else arg for arg in args])
    assert status == 2 and says in error and "Traceback" not in error, error


def test_no_two_videos_have_one_place(tmp_path):
    """Where the folder to write to lies deep in that of the videos."""
    (tmp_path / "sub").mkdir()
    for seed, place in enumerate(("", "sub")):
        Image.fromarray(shot(seed, 1, soft=6)[0]).save(tmp_path / place / "a.png")
    out = tmp_path / "sub" / "out"
    for _ in range(2):  # again: its own clips are no videos
        assert run("run", tmp_path, "--out", out)[0] == 0
        rows = rows_of(out / "meta.csv")
        assert [row["path"] for row in rows] == ["clips/a.png", "clips/sub/a.png"]
        assert all((out / row["path"]).read_bytes() == (out / row["source"]).read_bytes() for row in rows)


def test_a_linked_folder_is_left_alone(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "one.png").symlink_to(tmp_path / "one.png")
    found, other = find_files(tmp_path / "videos")
    assert [path.name for path in found] == ["one.png"] and [path.name for path in other] == ["link"]


@pytest.mark.parametrize("name", ["a, b", "line\nbreak", "\N{GRINNING FACE}", "-dash", "100%d", "a:b"])
def test_odd_names_go_from_video_to_clip_and_back(name, tmp_path):
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / f"{name}.mp4", shot(1, 60, pan=2, soft=6))
    row = {"path": f"videos/{name}.mp4", "source": f"videos/{name}.mp4", "text": ""}
    options = SimpleNamespace(folder=tmp_path, what=tmp_path / "videos", min_seconds=2, max_seconds=16, dry_run=False)
    data, error = curate.attempt(curate.cut_file, row, options)
    assert not error and data["clips"][0]["path"] == f"clips/videos/{name}.mp4/000000-000060.mp4"
    curate.write_table(tmp_path / "clips.csv", data["clips"], curate.TABLE)
    row, = rows_of(tmp_path / "clips.csv")
    assert len(curate.ends_and_middle(row | {"path": str(tmp_path / row["path"])})) == 3


def test_a_table_of_ones_own(tmp_path):
    """With the columns it has, upstream's floats, a row without a path, a clip that is not there."""
    write(tmp_path / "a.mp4", shot(1, 60, pan=2, soft=6))
    (tmp_path / "t.csv").write_text("path,aes,num_frames,error\na.mp4,6,60.0,\nb.mp4,6,,\n,,,broken\ngone.mp4,7,9,\n")
    status, said, error = run("filter", tmp_path / "t.csv")
    assert status == 0 and "?: broken" in said and "there is no" not in error, error
    assert run("report", tmp_path / "t.csv")[0] == 0
    words = "".join(Page((tmp_path / "report.html").read_text("utf-8")).text)
    assert "3 of 4 clips kept" in words and "hours" not in words and "b.mp4: its num_frames is ''" in words
    status, said, error = run("checks", tmp_path / "t.csv")
    assert status == 0 and "checks: 2 clips could not be read, such as" in said, said + error
    assert [bool(row["error"]) for row in rows_of(tmp_path / "t.csv")] == [False, True, True, True]


def test_clips_that_a_dry_run_has_not_written_are_told(tmp_path):
    Image.fromarray(shot(1, 1, soft=6)[0]).save(tmp_path / "a.png")
    assert run("run", tmp_path, "--out", tmp_path / "out", "--dry-run")[0] == 0
    assert "a.png - after --dry-run, run without it" in run("filter", tmp_path / "out")[2]


def test_a_second_ctrl_c_shows_no_traceback(tmp_path):
    write(tmp_path / "a.mp4", shot(1, 600, pan=2, soft=6))
    process = run("run", tmp_path, "--out", tmp_path / "out", wait=False)
    while "0/1" not in process.stderr.readline():  # the bar
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    lines = iter(process.stderr.readline, "")
    assert any("stopped; the same command goes on" in line for line in lines)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait(60) in (130, -signal.SIGINT)


def test_a_network_that_cannot_be_had_leaves_the_rest(videos, curated, tmp_path):
    status, said, error = run("run", videos / "sub", "--out", tmp_path, "--with", "ocr", "--ocr-model", "nowhere")
    assert status == 0 and "ocr is not done: AutoModelForObjectDetection 'nowhere' is neither a folder" in error
    assert "1 clips" in said and "Traceback" not in error


def test_ranks_that_are_killed_make_what_one_makes(curated, videos):
    """Two ranks, killed three times each with all their workers left behind, then let to their end."""
    out, rng = videos.parent / "sh2", np.random.default_rng(0)  # a name as long as the other's: paths count from it
    known = {}
    for seconds in rng.uniform(4, 9, 3):
        processes = [run("run", videos, "--out", out, rank=rank, world=2, wait=False) for rank in (0, 1)]
        time.sleep(seconds)
        for process in processes:
            process.kill()
            process.communicate()
        assert done(out).items() >= known.items(), "nothing is done twice"
        known = done(out)
    processes = [run("run", videos, "--out", out, rank=rank, world=2, wait=False) for rank in (0, 1)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert written(out) == written(curated[0])
    assert done(out).items() >= known.items() and len(done(out)) == 7, "nothing is done twice"


def fragile(row, options):
    if row["path"].endswith("kills"):
        os.kill(os.getpid(), 9)
    if row["path"].endswith("fails"):
        raise UnreadableClip("fails")
    return row["path"]


def test_an_item_that_kills_its_process_is_told():
    rows = [{"path": name} for name in ("a", "b", "kills", "c", "fails", "d", "e kills", "f")]
    options = SimpleNamespace(workers=2, folder=Path("/x"))
    found = {row["path"]: (data, error) for row, data, error in curate.in_parallel(fragile, rows, options, 4)}
    assert found.keys() == {row["path"] for row in rows}
    assert found.pop("fails") == (None, "fails")
    assert all("ended its process" in found.pop(name)[1] for name in ("kills", "e kills"))
    assert all(data == f"/x/{name}" and not error for name, (data, error) in found.items())


def test_a_spawned_process_that_is_killed_is_told(monkeypatch):
    """As on Windows and macOS: what the process runs is pickled."""
    pool = partial(curate.ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    monkeypatch.setattr(curate, "ProcessPoolExecutor", pool)
    options = SimpleNamespace(workers=1, folder=Path("/x"))
    (_, a, error), (_, _, killed) = curate.in_parallel(fragile, [{"path": "a"}, {"path": "kills"}], options, 1)
    assert (a, error) == ("/x/a", "") and "ended its process" in killed


def test_half_a_result_is_none(tmp_path):
    options = SimpleNamespace(folder=tmp_path, min_seconds=2, max_seconds=16, dry_run=False)
    first, row = curate.Results("cut", options), {"source": "a", "bytes": 1, "modified": 2}
    first.add(row, {"columns": {"clips": []}})
    first.add(row | {"source": "b"}, {"error": "b: broken"})
    second, file = curate.Results("cut", options), first.file(row | {"source": "b"})
    assert second.get(row | {"source": "b"}) == {"error": "b: broken"}
    file.write_bytes(file.read_bytes()[:-3])
    assert second.get(row)["columns"] == {"clips": []} and second.get(row | {"source": "b"}) == {}
    second.add(row | {"source": "b"}, {"columns": {}})
    assert first.get(row | {"source": "b"}) == {"columns": {}}
    options.min_seconds = 3
    assert curate.Results("cut", options).get(row) == {} == second.get(row | {"bytes": 7}), "another setting, file"


def test_a_training_run_on_what_was_curated(curated, tmp_path):
    command = [sys.executable, "train.py", "configs/tiny.py", f"--data={curated[0] / 'meta.csv'}", "--steps=2",
               "--buckets={'32': {1: (1.0, 1), 8: (1.0, 2)}}", "--prompts=()", f"--cache={tmp_path}/cache",
               f"--out={tmp_path}/run"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) >= 1
