"""The shapes world: made-up clips of one coloured shape that moves straight, lit from above, over a soft background.

    python -m assets.shapes data/shapes                     renders 2,000 clips: *.mp4, *.png and meta.csv
    python -m assets.shapes data/many --num-clips 20000     more of them

It is small enough to train on two CPU cores (configs/tiny.py), and what a clip shows can be read without a network
(tests/reader.py).
"""
import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import COLUMNS, IMAGE_FPS, atomic_write, one_line_errors, write_mp4

# Colours, sizes, distances and shares are our choice (hand-tuned); assets/tiny/README.md says what they led to.
# A background is the grey of its top row and of its bottom row: far less colourful than any shape.
COLORS = {"red": (232, 44, 40), "green": (36, 178, 62), "blue": (28, 52, 236), "yellow": (250, 206, 24),
          "purple": (178, 40, 222), "cyan": (40, 214, 226)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # (dx, dy): y grows downwards
BACKGROUNDS = (((22, 24, 42), (78, 74, 104)), ((44, 58, 66), (112, 126, 128)), ((104, 102, 110), (176, 168, 160)))
SHADOW = 0.4            # share of the background's light that the darkest part of a shadow takes away
LIGHT = 0.3             # share by which a shape is lighter at its upper left, and darker at its lower right
SHAPES_FPS = 8


class Thing(NamedTuple):
    """What moves in a clip: side is the root of its area in pixels, start and end are centres (x, y) in pixels."""
    color: str
    shape: str
    direction: str
    side: float
    start: tuple
    end: tuple


def held_out(color, shape, direction):
    """Returns whether no clip shows a combination, as for 12 of the 72, a colour per shape and direction: for tests."""
    return (list(COLORS).index(color) + 2 * SHAPES.index(shape) + list(DIRECTIONS).index(direction)) % 6 == 0


def extent(shape, side):
    """Returns (left, right, up, down): how far the shape reaches from its centre of mass, in pixels."""
    edge = 2 * side / 3 ** 0.25  # of the triangle, equilateral: its area side^2 is sqrt(3)/4 edge^2, its height
    return {"circle": (side / math.pi ** 0.5,) * 4, "square": (side / 2,) * 4,  # sqrt(3)/2 edge: 2/3 up, 1/3 down
            "triangle": (edge / 2, edge / 2, edge / 3 ** 0.5, edge / 12 ** 0.5)}[shape]


def coverage(shape, side, x, y, height, width, edge=1.0):
    """Returns how much of each pixel the shape centred at (x, y) covers, 0..1 [H W], by its distance to the edge.

    edge: how many pixels the way from 1 to 0 takes; 1 is anti-aliased, more is blurred."""
    dy, dx = np.mgrid[:height, :width] + 0.5 - np.array([y, x])[:, None, None]
    *_, down = extent(shape, side)  # each edge is as far from the centre as the lowest
    if shape == "circle":
        outside = np.hypot(dx, dy) - down  # pixels past the edge, below 0 within
    elif shape == "square":
        outside = np.maximum(abs(dx), abs(dy)) - down
    else:  # a triangle, its point upwards: the base, and the sides, whose normals are (+-sqrt(3), -1) / 2
        outside = np.maximum(dy, (3 ** 0.5 * abs(dx) - dy) / 2) - down
    return np.clip(0.5 - outside / edge, 0, 1)


def random_thing(rng, color, shape, direction, height, width):
    """Returns a thing that stays inside the frame and travels 0.55 to 1.0 of the distance it has there.

    So 8 frames show its direction."""
    side = rng.uniform(0.33, 0.42) * min(height, width)
    left, right, up, down = extent(shape, side)
    low = np.array([left, up])                              # of its centre, (x, y)
    high = np.array([width - right, height - down])
    start = rng.uniform(low, high)
    end = start.copy()
    axis = 0 if direction in ("right", "left") else 1
    travel = rng.uniform(0.55, 1.0) * (high - low)[axis]
    first = rng.uniform(low[axis], high[axis] - travel)
    start[axis] = first
    end[axis] = first + travel
    if sum(DIRECTIONS[direction]) < 0:  # to the left, or up
        start, end = end, start
    return Thing(color, shape, direction, side, tuple(start), tuple(end))


def render(thing, background, num_frames, height, width):
    """Returns a clip, uint8 [T H W 3].  A still (one frame) shows the middle of the way."""
    shares = np.arange(num_frames) / (num_frames - 1) if num_frames > 1 else np.array([0.5])  # of the way
    centers = np.outer(1 - shares, thing.start) + np.outer(shares, thing.end)
    frames = [render_frame(thing, background, x, y, height, width) for x, y in centers]
    return np.stack(frames)


def render_frame(thing, background, x, y, height, width):
    """Returns one frame, uint8 [H W 3], of a thing with its centre at (x, y): background, shadow, shape."""
    top, bottom = np.float64(background)
    down = np.linspace(0, 1, height)[:, None, None]
    ground = (1 - down) * top + down * bottom                                       # [H 1 3]
    offset = 0.12 * thing.side
    blur = 0.4 * thing.side
    shadow = coverage(thing.shape, thing.side, x + offset, y + offset, height, width, blur)
    ground = ground * (1 - SHADOW * shadow[..., None])                              # [H W 3]
    rows, columns = np.mgrid[:height, :width] + 0.5
    light = LIGHT * np.clip((x - columns + y - rows) / thing.side, -1, 1)[..., None]
    color = np.float64(COLORS[thing.color])
    color = color + np.maximum(light, 0) * (255 - color) + np.minimum(light, 0) * color     # the hue stays
    alpha = coverage(thing.shape, thing.side, x, y, height, width)[..., None]
    return (ground + alpha * (color - ground) + 0.5).astype(np.uint8)


def shapes_clip(seed, index):
    """Returns clip `index` of the world `seed`, a pure function: (uint8 [T H W 3], caption, Thing).

    4 of 10 are stills, 4 have 8 frames, 2 have 16; a quarter is wide (64 x 96).  Held-out combinations do not occur.
    """
    rng = np.random.default_rng((seed, index))
    num_frames = int(rng.choice((1, 8, 16), p=(0.4, 0.4, 0.2)))
    height, width = (64, 96) if rng.random() < 0.25 else (64, 64)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    looks = ()
    while not looks or held_out(*looks):
        looks = tuple(str(rng.choice(list(names))) for names in (COLORS, SHAPES, DIRECTIONS))
    thing = random_thing(rng, *looks, height, width)
    caption = f"a {thing.color} {thing.shape}" + f" moves {thing.direction}" * (num_frames > 1)
    return render(thing, background, num_frames, height, width), caption, thing


def write_shapes(folder, num_clips=2000, seed=0):
    """Renders the world into folder/*.mp4 and *.png (stills), and writes folder/meta.csv about them."""
    if num_clips < 1 or seed < 0:
        raise ValueError(f"--num-clips {num_clips} --seed {seed}: expected 1 or more, and 0 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.csv").unlink(missing_ok=True)  # of another world: what is stopped half way has none
    rows = []
    for index in tqdm(range(num_clips), desc=f"rendering {folder}", unit="clip"):
        frames, caption, _ = shapes_clip(seed, index)
        T, H, W, _ = frames.shape
        name = f"{index:06d}" + (".mp4" if T > 1 else ".png")
        if T > 1:
            write_mp4(folder / name, frames, SHAPES_FPS, "yuv444p")     # sharp edges of colour
        else:
            Image.fromarray(frames[0]).save(folder / name)
        rows.append((name, caption, T, H, W, SHAPES_FPS if T > 1 else IMAGE_FPS))
    with atomic_write(folder / "meta.csv") as part, open(part, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([COLUMNS, *rows])
    print(f"{folder / 'meta.csv'}: {num_clips} clips")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="python -m assets.shapes FOLDER [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--num-clips", type=int, default=2000, help="to render (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other clips (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args = parser.parse_args(argv)
    with one_line_errors(args.debug):
        write_shapes(args.folder, args.num_clips, args.seed)


if __name__ == "__main__":
    main()
