"""Reads what the frames of the shapes world show, without a network: background, colour, shape, place, way.

`python tests/reader.py [CKPT] [--prompts 96]` samples prompts from a checkpoint and prints how many of them obey.
The palette and the outlines are those of assets/shapes.py; a sheet is judged as a viewer would, frame by frame.
"""
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets.shapes import COLORS, DIRECTIONS, SHAPES, coverage, held_out  # noqa: E402
from masks import Given  # noqa: E402


class Seen(NamedTuple):
    """What a clip shows; centers [T 2] are (x, y) in pixels, nan in frames without an object."""
    color: str | None
    shape: str | None
    direction: str | None
    centers: np.ndarray
    steady: float               # share of the frames that show this colour


def read_clip(frames):
    """frames uint8 [T H W 3] -> Seen.  Colour and shape by vote of the frames, direction from first to last place."""
    looks = [read_frame(frame) for frame in frames]
    centers = np.array([center for _, _, center in looks])
    color, shape = (Counter(x for x in column if x).most_common(1) for column in list(zip(*looks))[:2])
    moved = centers[-1] - centers[0]
    direction = None
    if np.isfinite(moved).all() and abs(moved).max() > 2:           # pixels; rendered 8-frame clips move 6 or more
        direction = max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], moved))
    steady = color[0][1] / len(frames) if color else 0.0
    return Seen(color[0][0] if color else None, shape[0][0] if shape else None, direction, centers, steady)


def read_frame(frame):
    """(colour, shape, (x, y)) of one frame [H W 3]; (None, None, nan) where nothing stands out of the background."""
    H, W, _ = frame.shape
    frame = frame.astype(float)
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.abs(frame - background).max(-1)
    alpha = np.clip(contrast / max(contrast.max() * 0.8, 60), 0, 1) * (contrast > 25)
    if alpha.sum() < 25:                                            # the smallest thing has 110 pixels
        return None, None, (np.nan, np.nan)
    inside = frame[contrast > 0.7 * contrast.max()].mean(0)
    color = min(COLORS, key=lambda name: np.linalg.norm(inside - COLORS[name]))
    y, x = (np.mgrid[:H, :W] + 0.5)
    center = np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()
    return color, nearest_shape(alpha, center), tuple(center)


def nearest_shape(alpha, center):
    """The shape whose outline, of the same area and about the same centre, overlaps alpha [H W] best."""
    best, side = {}, alpha.sum() ** 0.5
    for shape in SHAPES:
        covers = [coverage(shape, k * side, *center + shift, *alpha.shape)
                  for k in (0.94, 1.0, 1.06) for shift in np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)])]
        best[shape] = max(np.minimum(alpha, c).sum() / np.maximum(alpha, c).sum() for c in covers)
    return max(best, key=best.get)


def prompts(count, seed=0):
    """[(colour, shape, direction)] * count: a third of the combinations that training never sees, then the others."""
    rng = np.random.default_rng(seed)
    names = [(c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS]
    unseen, seen = [n for n in names if held_out(*n)], [n for n in names if not held_out(*n)]
    def pick(pool, n):          # each once, then each once more ...
        rounds = -(-n // len(pool))
        return [pool[i] for _ in range(rounds) for i in rng.permutation(len(pool))][:n]
    return pick(unseen, count // 3) + pick(seen, count - count // 3)


def obey(names, videos):
    """Per part of the prompt, the share of videos that show it; "all" at once, and that on unseen combinations;
    "steady", the share of frames in the colour of their video."""
    looks = [read_clip(video) for video in videos]
    right = np.array([[getattr(seen, part) == name for part, name in zip(("color", "shape", "direction"), wanted)]
                      for wanted, seen in zip(names, looks)])
    unseen = np.array([held_out(*wanted) for wanted in names])
    return dict(zip(("color", "shape", "direction"), right.mean(0))) | {
        "all": right.all(1).mean(),
        "all, unseen": right[unseen].all(1).mean() if unseen.any() else float("nan"),
        "steady": np.mean([seen.steady for seen in looks])}


class Judge:
    """A checkpoint and what it is asked to do; each method samples and returns shares or errors by name."""

    def __init__(self, ckpt, **settings):
        from sample import find, generate, load
        from vae import load_text_encoder, load_vae
        self.model, self.config, _ = load(ckpt)
        self.vae = load_vae(find(self.config.vae))
        self.text_encoder = load_text_encoder(find(self.config.text_encoder), self.config.model.model_max_length)
        self.settings = dict(height=32, width=32, fps=8, num_frames=8, batch_size=32, cfg_scale=self.config.cfg_scale,
                             prediction=self.config.prediction) | settings
        self.generate = generate

    def sample(self, texts, **asked):
        return self.generate(self.model, self.vae, self.text_encoder, texts, **self.settings | asked)

    def prompts(self, count):
        """How many of `count` prompts the samples obey, a third of them unseen combinations; and the samples."""
        names, moving = prompts(count), self.settings["num_frames"] > 1
        videos = self.sample([f"a {c} {s}" + f" moves {d}" * moving for c, s, d in names])
        return obey(names, videos), videos

    def going_on(self, count, given):
        """Continues `count` rendered clips from their first `given` frames.

        centroid: mean distance in pixels between the object and where it is in truth, over the frames to come; still:
        the same for one that stays where it was last seen; lost: share of frames without an object; direction: share
        of clips that move as told; psnr: of the given frames against their own VAE reconstruction."""
        from assets.shapes import shapes_clip
        from data import to_uint8, to_video
        clips = (shapes_clip(77, i) for i in range(10 ** 6))
        square = ((frames, text) for frames, text, _ in clips if frames.shape[:3] == (8, 32, 32))
        truth, texts = zip(*(next(square) for _ in range(count)))
        videos = self.sample(list(texts), references=[[frames] for frames in truth],
                             strategies=[[Given(length=given)]] * count)
        true, seen = (np.array([read_clip(v).centers for v in clips])[:, given - 1:] for clips in (truth, videos))
        away = lambda x: np.linalg.norm(x[:, 1:] - true[:, 1:], axis=-1)
        again = (self.vae.decode(self.vae.encode(to_video(frames[:given])[None]))[0] for frames in truth)
        error = [((to_uint8(a).astype(float) - v[:given]) ** 2).mean() for a, v in zip(again, videos)]
        on_way = [read_clip(v).direction == text.split()[-1] for v, text in zip(videos, texts)]
        still = np.repeat(true[:, :1], 9 - given, axis=1)
        return {"centroid": float(np.nanmean(away(seen))), "still": float(np.nanmean(away(still))),
                "lost": float(np.isnan(seen).any(2).mean()), "direction": float(np.mean(on_way)),
                "psnr": float(10 * np.log10(255 ** 2 / max(max(error), 1e-9)))}, videos


def main():
    import argparse
    import time
    from data import write_video
    parser = argparse.ArgumentParser(description="Prints how well a checkpoint of the shapes world obeys.")
    parser.add_argument("ckpt", nargs="?", default="assets/tiny")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", default="iddpm")
    parser.add_argument("--cfg-scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--sheet", help="write the first 12 clips as a .png")
    args = parser.parse_args()
    more = {} if args.cfg_scale is None else {"cfg_scale": args.cfg_scale}
    judge = Judge(args.ckpt, steps=args.steps, sampler=args.sampler, num_frames=args.num_frames, **more)

    def show(what, scores):
        print(f"{what:22s}", *(f"{name} {value:.3f} " for name, value in scores.items()), flush=True)
    start = time.perf_counter()
    scores, videos = judge.prompts(args.prompts)
    show(f"{args.prompts} prompts", scores | {"seconds a clip": (time.perf_counter() - start) / args.prompts})
    if args.num_frames == 8:
        for given in (1, 2):
            show(f"given {given} of 8 frames", judge.going_on(min(48, args.prompts), given)[0])
    if args.sheet:
        write_video(args.sheet, np.concatenate(list(videos[::max(1, len(videos) // 12)][:12])))


if __name__ == "__main__":
    main()
