"""The README's pictures: drawn again they are the same, and they are what they say.

`python tests/test_assets.py FOLDER` writes the raw videos of the picture about curation.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                                           # as a script it finds data.py, too

from assets import draw                                                 # noqa: E402
from assets.results import gpu_time                                     # noqa: E402
from data import write_video                                            # noqa: E402

ASSETS = ROOT / "assets"


# ---- raw videos ----

def pan(seed, num_frames, speed=2):
    """A camera that moves along ranges of hills, uint8 [T 180 320 3]; grain, as blurred pictures have none."""
    rng, x, y = np.random.default_rng(seed), np.arange(640), np.arange(180)[:, None]
    sky, grass = rng.uniform(120, 220) + rng.normal(0, 25, 3), rng.uniform(30, 100) + rng.normal(0, 30, 3)
    picture = np.ones((180, 640, 3))
    for near in (0, 0.3, 0.5, 0.75, 1):
        waves = (rng.uniform(2, 12) * np.sin(k * x * np.pi / 320 + rng.uniform(0, 6)) for k in (2, 3, 5, 9))
        range_of_hills = sky + near * (grass - sky) + (near > 0) * rng.normal(0, 6, (180, 640, 1))
        picture = np.where((y >= 150 * near + (near > 0) * sum(waves))[..., None], range_of_hills, picture)
    picture = picture.clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, -speed * t, axis=1)[:, :320] for t in range(num_frames)])


def write_raw_videos(folder):
    """Shots to be cut, and one of each kind that the rules of curate.py are there for."""
    still = lambda seed, n: pan(seed, 1).repeat(n, axis=0)
    small = reduce(pan(0, 72).astype(float), "t (h 2) (w 2) c -> t h w c", "mean")
    blurred = [Image.fromarray(frame).reduce(12).resize((320, 180)) for frame in pan(9, 72)]
    videos = {"pan": pan(0, 72), "three shots": np.concatenate([pan(1, 72), pan(2, 60, 4), pan(3, 96, 1)]),
              "fast": pan(4, 72, 6), "pan again": small.astype(np.uint8), "still": still(5, 72),
              "dark": pan(6, 72, 9) // 18, "jerks": pan(7, 18, 9).repeat(4, axis=0), "blurred": np.stack(blurred),
              "stops": np.concatenate([still(8, 54), pan(8, 66)]), "glimpse": pan(10, 24), "slow": pan(11, 60, 1)}
    for name, frames in videos.items():
        write_video(Path(folder, f"{name}.mp4"), frames)
    whole = Path(folder, "fast.mp4").read_bytes()
    Path(folder, "damaged.mp4").write_bytes(whole[: len(whole) // 2])


# ---- the pictures ----

def check(file):
    """Valid, titled, small; the text of all that is written in it."""
    assert file.stat().st_size < 80_000, f"{file}: {file.stat().st_size} bytes"
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    title, seen, *_ = root
    assert title.tag.endswith("title") and title.text and seen.tag.endswith("desc") and seen.text
    assert float(root.get("width")) == draw.WIDTH and "prefers-color-scheme" in file.read_text(encoding="utf-8")
    for element in root.iter():
        assert float(element.get("x", 0)) + float(element.get("width", 0)) <= draw.WIDTH + 1, element.attrib
        assert float(element.get("y", 0)) + float(element.get("height", 0)) <= float(root.get("height")), element.attrib
    return [element.text for element in root.iter() if element.tag.endswith("text")]


@pytest.mark.parametrize("name", draw.CHEAP)
def test_a_picture_is_what_the_code_draws_now(name, tmp_path):
    file = draw.write(name, tmp_path)
    assert check(file)
    assert file.read_text(encoding="utf-8") == (ASSETS / file.name).read_text(encoding="utf-8"), (
        f"python assets/draw.py {name} draws another picture than assets/{file.name}")


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.svg")), ids=lambda file: file.name)
def test_a_picture_can_be_shown(file):
    check(file)


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.png")), ids=lambda file: file.name)
def test_a_photo_is_small(file):
    assert file.stat().st_size < 80_000 and Image.open(file).width <= 1100


def test_the_masks_are_all_there():
    from masks import STRATEGIES
    assert {*STRATEGIES} <= {*check(ASSETS / "masks.svg")}


def test_each_clip_has_a_bucket_or_a_reason():
    import configs
    config = configs.load("configs/stage1.py")
    rows, chosen = draw.made_up_clips(config)
    assert len(rows) == len(chosen) and {b for b in chosen if isinstance(b, str)} == {*draw.REASON_COLOURS}
    for row, bucket in zip(rows, chosen):
        if not isinstance(bucket, str):
            assert bucket.num_frames == 1 or row["num_frames"] >= 3 * bucket.num_frames
    drawn = (ASSETS / "buckets.svg").read_text()
    assert drawn.count("<circle") == sum(not isinstance(bucket, str) for bucket in chosen)


def test_the_noise_is_told_as_the_frames_have_it():
    strengths, told = draw.told_times(steps=20)
    times = np.array(told)                                              # [steps T]
    assert (times[:, :4] == -1).all() and (times[0, 12:] == 999).all(), "given; made from noise"
    assert ((times >= 0).sum(0) == [0] * 4 + [6] * 4 + [14] * 4 + [20] * 4).all(), "0.3 and 0.7 of 20 steps"
    assert (np.diff(times[:, 12]) < 0).all() and strengths[12] == 1


def test_a_token_reaches_what_its_attention_says():
    found, (frame, place) = draw.reaches(), draw.ASKED
    space, time, cross, block = (tokens for tokens, _ in found.values())
    assert space[frame].all() and space.sum() == space.shape[1]
    assert time[:, place].all() and time.sum() == time.shape[0]
    assert cross.sum() == 1 and cross[frame, place] and block.all()
    counted = (torch.arange(draw.WORDS) < draw.COUNTED).tolist()
    assert [words.tolist() for _, words in found.values()] == [[False] * draw.WORDS] * 2 + [counted] * 2


def test_a_run_is_drawn_from_its_log_and_previews(tmp_path):
    quarters = lambda i: [0.5, 1 / i, None if i == 3 else 0.7, 1.1]
    rows = [{"step": 10 * i, "loss": 1 / i, "loss_by_t": quarters(i)} for i in range(1, 30)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = check(draw.write("loss-by-t", tmp_path, tmp_path))
    assert {"290 steps", "0.50 little noise, t < 250", "1.10 little else, t < 1000"} <= {*words}
    with pytest.raises(FileNotFoundError, match="--sample_every"):
        draw.write("training", tmp_path, tmp_path)
    (tmp_path / "config.py").write_text((ROOT / "configs" / "tiny.py").read_text())
    for step in (50, 250):
        frames = np.full((32, 32, 32, 3), step, np.uint8)
        write_video(tmp_path / "samples" / f"step-{step:07d}.png", frames)
    sheet = Image.open(draw.write("training", tmp_path, tmp_path)).convert("RGBA")
    assert sheet.size == (draw.WIDTH, 152) and sheet.getpixel((100, 40)) == (50, 50, 50, 255)
    assert sheet.getpixel((100, 120)) == (250, 250, 250, 255) and sheet.getpixel((0, 0))[3] == 0


def test_step_time_is_drawn_from_the_profiles(tmp_path):
    words = check(ASSETS / "step-time.svg")
    for form in ("plain", "fast"):
        stored = (ASSETS / "results" / f"h100-profile-{form}.txt").read_text(encoding="utf-8")
        total = float(stored.split("total GPU ")[1].split()[0])
        of, on, took = gpu_time(stored)
        assert {of, on, f"{form}: {total:.1f} ms", *took, *(f"{ms:.1f} ms" for ms in took.values())} <= {*words}
        short, _, _ = stored.replace(" x NVIDIA H100", " x NVIDIA H200").partition("   2x ")  # loses rows
        (tmp_path / f"h100-profile-{form}.txt").write_text(short)
    others = check(draw.write("step-time", tmp_path, tmp_path))
    assert {*others} & {of, on} == {of} and any("H200" in word for word in others)
    totals = lambda words: [word for word in words if re.match("(plain|fast): ", word)]
    assert {*words} != {*others} and totals(words) == totals(others), "what no row tells is what lies between"


def test_the_readmes_tell_the_step_times_that_are_drawn():
    words = check(ASSETS / "step-time.svg")
    for readme in (ROOT / "README.md", ASSETS / "README.zh-CN.md"):
        alt = re.search(r"!\[(.*?)\]\((?:assets/)?step-time\.svg", readme.read_text(encoding="utf-8"))[1]
        fine, whole = re.findall(r"\d+\.\d", alt), re.findall(r"(?<![\d.])\d+(?![\d.])", alt)
        assert len(fine) == 2 and all(f"{ms} ms" in words for ms in fine), alt
        assert whole and all(sum(w.startswith(f"{ms}.") for w in words) == 2 for ms in whole), alt


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curation")
    (folder / "raw").mkdir()
    write_raw_videos(folder / "raw")
    subprocess.run([sys.executable, "curate.py", "run", folder / "raw", "--out", folder / "out"], cwd=ROOT, check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return folder / "out"


def test_curation_is_drawn_from_its_table(curated, tmp_path):
    words = check(draw.write("curation", tmp_path, curated))
    assert {"kept", "dropped", "duplicate", "too short", "unreadable", "min_flow 0.5"} <= {*words}
    drawn = (tmp_path / "curation.svg").read_text()
    clips = [row for row in (curated / "clips.csv").read_text().splitlines()[1:] if row.startswith("clips/")]
    assert drawn.count("<image") == len(clips) <= 18


def test_the_command_line(tmp_path):
    script = [sys.executable, "assets/draw.py"]
    run = lambda *args: subprocess.run([*script, *args], cwd=ROOT, capture_output=True, text=True)
    listed = run()
    assert [row.split()[0] for row in listed.stdout.splitlines()] == [*draw.PICTURES]
    assert run("masks", "--out", tmp_path / "new").returncode == 0 and (tmp_path / "new" / "masks.svg").is_file()
    missing = run("loss-by-t", str(tmp_path / "nowhere"), "--out", tmp_path)
    assert missing.returncode and "nowhere" in missing.stderr and "Traceback" not in missing.stderr


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_raw_videos(sys.argv[1])
