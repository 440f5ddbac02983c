"""The README's pictures: they can be shown, and drawn again they are the same.

`python tests/test_assets.py FOLDER` writes the raw videos of the picture about curation.
"""
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from einops import reduce
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                                           # as a script it finds data.py, too

from assets import draw                                                 # noqa: E402
from data import write_video                                            # noqa: E402

ASSETS = ROOT / "assets"
SVG = "{http://www.w3.org/2000/svg}"


# ---- raw videos ----

def pan(seed, num_frames, speed=2):
    """Returns a camera that moves along ranges of hills, uint8 [T 180 320 3]; grain, as blurred pictures have none."""
    rng = np.random.default_rng(seed)
    x = np.arange(640)
    y = np.arange(180)[:, None]
    sky = rng.uniform(120, 220) + rng.normal(0, 25, 3)
    grass = rng.uniform(30, 100) + rng.normal(0, 30, 3)
    picture = np.ones((180, 640, 3))
    for near in (0, 0.3, 0.5, 0.75, 1):
        waves = [rng.uniform(2, 12) * np.sin(k * x * np.pi / 320 + rng.uniform(0, 6)) for k in (2, 3, 5, 9)]
        color = sky + near * (grass - sky) + (near > 0) * rng.normal(0, 6, (180, 640, 1))
        is_hill = y >= 150 * near + (near > 0) * sum(waves)
        picture = np.where(is_hill[..., None], color, picture)
    picture = picture.clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, -speed * t, axis=1)[:, :320] for t in range(num_frames)])


def still(seed, num_frames):
    return pan(seed, 1).repeat(num_frames, axis=0)


def write_raw_videos(folder):
    """Writes shots to be cut, and one video of each kind that the rules of curate.py are made for."""
    half_size = reduce(pan(0, 72).astype(float), "t (h 2) (w 2) c -> t h w c", "mean")
    blurred = [Image.fromarray(frame).reduce(12).resize((320, 180)) for frame in pan(9, 72)]
    videos = {
        "pan": pan(0, 72),
        "three shots": np.concatenate([pan(1, 72), pan(2, 60, 4), pan(3, 96, 1)]),
        "fast": pan(4, 72, 6),
        "pan again": half_size.astype(np.uint8),
        "still": still(5, 72),
        "dark": pan(6, 72, 9) // 18,
        "jerks": pan(7, 18, 9).repeat(4, axis=0),
        "blurred": np.stack(blurred),
        "stops": np.concatenate([still(8, 54), pan(8, 66)]),
        "glimpse": pan(10, 24),
        "slow": pan(11, 60, 1),
    }
    for name, frames in videos.items():
        write_video(Path(folder, f"{name}.mp4"), frames)
    content = Path(folder, "fast.mp4").read_bytes()
    Path(folder, "damaged.mp4").write_bytes(content[: len(content) // 2])


# ---- the pictures ----

def check(file):
    """Asserts that an SVG is valid, titled, small, and that nothing lies outside of it; returns the texts in it."""
    assert file.stat().st_size < 80_000
    root = ElementTree.parse(file).getroot()
    assert root.tag == f"{SVG}svg"
    for name in ("title", "desc"):
        assert root.find(f"{SVG}{name}").text, f"a reader without pictures needs a {name}"
    for element in root.iter():
        right = float(element.get("x", 0)) + float(element.get("width", 0))
        bottom = float(element.get("y", 0)) + float(element.get("height", 0))
        assert right <= float(root.get("width")) + 1, element.attrib
        assert bottom <= float(root.get("height")), element.attrib
    return [element.text for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.svg")), ids=lambda file: file.name)
def test_a_drawing_can_be_shown(file):
    assert check(file)


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.png")), ids=lambda file: file.name)
def test_a_photo_can_be_shown(file):
    assert file.stat().st_size < 80_000
    assert Image.open(file).width <= 1100


def test_the_samples_move_and_are_small():
    """The README opens with them."""
    file = ASSETS / "samples.gif"
    assert file.stat().st_size < 1_000_000
    assert Image.open(file).n_frames == 8


@pytest.mark.parametrize("name", draw.CHEAP)
def test_a_picture_is_what_the_code_draws_now(name, tmp_path):
    file = draw.write(name, tmp_path)
    drawn = file.read_text(encoding="utf-8")
    assert drawn == (ASSETS / file.name).read_text(encoding="utf-8"), f"run python assets/draw.py {name}"


@pytest.mark.slow
def test_curation_is_drawn_from_its_table(tmp_path, run_script):
    """All kinds of raw videos that should be dropped are, for their reasons."""
    (tmp_path / "raw").mkdir()
    write_raw_videos(tmp_path / "raw")
    ended = run_script("curate", "run", tmp_path / "raw", "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    words = check(draw.write("curation", tmp_path, tmp_path / "out"))
    assert {"kept", "dropped", "duplicate", "too short", "unreadable"} <= set(words)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_raw_videos(sys.argv[1])
