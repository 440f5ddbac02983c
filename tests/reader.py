"""Reads what the frames of the shapes world show, without a network: colour, shape, place and direction.

`python tests/reader.py [CKPT] [--prompts 96]` samples prompts from a checkpoint and prints how many of them it obeys.
`python tests/reader.py --vae DIR` prints what an autoencoder makes of renders: look at it before you train on latents.
The palette and the outlines are those of assets/shapes.py; a clip is judged as a viewer would, frame by frame.
"""
import argparse
import math
import sys
import time
from colorsys import rgb_to_hsv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets.shapes import (BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, coverage, held_out, random_thing,  # noqa: E402
                           render, shapes_clip)
from data import to_uint8, to_video, write_video  # noqa: E402
from masks import Given  # noqa: E402

NOTHING = (None, None, (np.nan, np.nan))        # what a frame without an object shows


class Seen(NamedTuple):
    """What a clip shows; centers [T 2] are (x, y) in pixels, nan in frames without an object."""
    color: str | None
    shape: str | None
    direction: str | None
    centers: np.ndarray
    steady: float               # share of the frames that show this colour


def read_clip(frames):
    """Returns what frames, uint8 [T H W 3], show: colour and shape by vote, direction from first to last place."""
    seen = [read_frame(frame) for frame in frames]
    color, votes = most_common(color for color, _, _ in seen)
    shape, _ = most_common(shape for _, shape, _ in seen)
    centers = np.array([center for _, _, center in seen])
    moved = centers[-1] - centers[0]
    direction = None
    if np.isfinite(moved).all() and abs(moved).max() > 4:           # pixels; rendered 8-frame clips move 16 or more
        direction = max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], moved))
    return Seen(color, shape, direction, centers, votes / len(frames))


def most_common(names):
    """Returns the most common name and how often it occurs; (None, 0) where all are None."""
    counts = Counter(name for name in names if name)
    return counts.most_common(1)[0] if counts else (None, 0)


def read_frame(frame):
    """Returns (colour, shape, (x, y)) of one frame [H W 3]; NOTHING where nothing is more colourful than a background.
    """
    H, W, _ = frame.shape
    frame = frame.astype(float)
    alpha = colorful(frame)
    if alpha.sum() < 100:                                           # the smallest object has 446 pixels
        return NOTHING
    inside = frame[alpha > 0.9].mean(0)
    color = min(COLORS, key=lambda name: hue_between(inside, COLORS[name]))
    y, x = (np.mgrid[:H, :W] + 0.5)
    center = np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()
    return color, nearest_shape(alpha, center), tuple(center)


def colorful(frame):
    """Returns which pixels of [H W 3] belong to an object, 0..1 [H W]: backgrounds are nearly grey."""
    chroma = frame.max(-1) - frame.min(-1)                          # 32 or less in backgrounds, 99 or more in objects
    return np.clip((chroma - 40) / 50, 0, 1)


def hue_between(a, b):
    """Returns the angle between the hues of two colours (red, green, blue), in degrees."""
    hues = [360 * rgb_to_hsv(*color)[0] for color in (a, b)]
    apart = abs(hues[0] - hues[1])
    return min(apart, 360 - apart)


def nearest_shape(alpha, center):
    """Returns the shape whose outline, of the same area and about the same centre, overlaps alpha [H W] best."""
    side = alpha.sum() ** 0.5
    overlap = {}
    for shape in SHAPES:
        overlap[shape] = 0.0
        for scale in (0.9, 0.95, 1.0, 1.05):
            for shift in np.array([(0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)]):
                cover = coverage(shape, scale * side, *center + shift, *alpha.shape)
                share = np.minimum(alpha, cover).sum() / np.maximum(alpha, cover).sum()
                overlap[shape] = max(overlap[shape], share)
    return max(overlap, key=overlap.get)


def check_vae(vae, count=48):
    """Returns what an autoencoder (vae.VAE) makes of `count` random things, each rendered in all colours:

    psnr      of the reconstructions, in dB
    hue       mean error of the colour of the reconstructions, in degrees
    nearest   distance in latents between the two colours that are nearest, in moves of the thing by 2 pixels
    where a distance is a mean over the things.  Colours nearer than 2 slip while they are sampled."""
    rng = np.random.default_rng(0)
    squared_errors = []
    hue_errors = []
    moves = []
    pairs = np.zeros((len(COLORS), len(COLORS)))
    for _ in range(count):
        direction = rng.choice(list(DIRECTIONS))
        thing = random_thing(rng, "red", rng.choice(SHAPES), direction, 64, 64)
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        clips = []
        for color in COLORS:
            colored = thing._replace(color=color)
            moved = colored._replace(start=np.add(thing.start, DIRECTIONS[direction]) * 1.0,
                                     end=np.add(thing.end, np.multiply(DIRECTIONS[direction], 3)) * 1.0)
            clips.append(np.concatenate([render(colored, background, 1, 64, 64), render(moved, background, 1, 64, 64)]))
        clips = np.stack(clips)                                     # [colours 2 H W 3], the second moved by 2 pixels
        video = torch.stack([to_video(clip) for clip in clips])
        z = vae.encode(video)
        decoded = vae.decode(z)
        squared_errors.append((decoded - video).square().mean().item())
        for clip, again in zip(clips, decoded):
            frame = to_uint8(again)[0].astype(float)
            inside = colorful(clip[0].astype(float)) == 1
            hue_errors.append(hue_between(frame[inside].mean(0), clip[0][inside].mean(0)))
        flat = z.transpose(1, 2).flatten(2)                         # [colours 2 values]
        moves.append((flat[:, 0] - flat[:, 1]).norm(dim=-1).mean().item())
        pairs += torch.cdist(flat[:, 0], flat[:, 0]).numpy() / count
    nearest = (pairs + np.diag([np.inf] * len(COLORS))).min()
    return {"psnr": 10 * math.log10(4 / np.mean(squared_errors)), "hue": np.mean(hue_errors),
            "nearest": nearest / np.mean(moves)}


def prompts(count, seed=0):
    """Returns [(colour, shape, direction)] * count: a third of them combinations that training never sees."""
    rng = np.random.default_rng(seed)
    unseen = []
    seen = []
    for color in COLORS:
        for shape in SHAPES:
            for direction in DIRECTIONS:
                pool = unseen if held_out(color, shape, direction) else seen
                pool.append((color, shape, direction))
    return pick(unseen, count // 3, rng) + pick(seen, count - count // 3, rng)


def pick(pool, count, rng):
    """Returns `count` of the pool in random order: each once, then each once more, and so on."""
    picked = []
    while len(picked) < count:
        picked += [pool[i] for i in rng.permutation(len(pool))]
    return picked[:count]


def obey(names, videos):
    """Returns, per part of the prompt, the share of videos that show it, and more:

    all           the share that show all three parts
    all, unseen   the same, of the combinations that training never sees
    steady        the mean share of frames in the colour of their video"""
    seen = [read_clip(video) for video in videos]
    right = np.array([[clip.color == color, clip.shape == shape, clip.direction == direction]
                      for (color, shape, direction), clip in zip(names, seen)])
    unseen = np.array([held_out(*name) for name in names])
    scores = dict(zip(("color", "shape", "direction"), right.mean(0)))
    scores["all"] = right.all(1).mean()
    scores["all, unseen"] = right[unseen].all(1).mean() if unseen.any() else float("nan")
    scores["steady"] = np.mean([clip.steady for clip in seen])
    return scores


class Judge:
    """A checkpoint and the settings to sample it with; its methods sample and return shares or errors by name."""

    def __init__(self, ckpt, **settings):
        # Imported here, as reading frames needs none of it and diffusers takes seconds.
        from sample import generate, load
        from vae import load_text_encoder, load_vae
        self.generate = generate
        self.model, self.config = load(ckpt)
        self.vae = load_vae(self.config.vae)
        self.text_encoder = load_text_encoder(self.config.text_encoder, self.config.model.model_max_length)
        defaults = dict(height=64, width=64, fps=8, num_frames=8, batch_size=32, cfg_scale=self.config.cfg_scale,
                        prediction=self.config.prediction)
        self.settings = defaults | settings

    def sample(self, texts, **changes):
        return self.generate(self.model, self.vae, self.text_encoder, texts, **self.settings | changes)

    def prompts(self, count):
        """Returns how many of `count` prompts the samples obey, a third of them unseen; and the samples."""
        names = prompts(count)
        texts = []
        for color, shape, direction in names:
            moves = f" moves {direction}" if self.settings["num_frames"] > 1 else ""
            texts.append(f"a {color} {shape}{moves}")
        videos = self.sample(texts)
        return obey(names, videos), videos

    def going_on(self, count, given):
        """Continues `count` rendered clips from their first `given` frames; returns scores and the samples.

        centroid    mean distance in pixels between the object and where it truly is, over the generated frames
        still       the same for an object that stays where it was last seen
        lost        share of frames without an object
        direction   share of clips that move as the prompt says
        psnr        of the given frames against their own reconstruction by the autoencoder"""
        clips = []
        texts = []
        index = 0
        while len(clips) < count:
            frames, text, _ = shapes_clip(77, index)
            index += 1
            if frames.shape[:3] == (8, 64, 64):
                clips.append(frames)
                texts.append(text)
        videos = self.sample(texts, references=[[frames] for frames in clips],
                             strategies=[[Given(length=given)]] * count)
        seen = [read_clip(video) for video in videos]
        true = np.array([read_clip(frames).centers for frames in clips])[:, given - 1:]
        found = np.array([clip.centers for clip in seen])[:, given - 1:]
        errors = []
        for frames, video in zip(clips, videos):
            reconstructed = self.vae.decode(self.vae.encode(to_video(frames[:given])[None]))[0]
            errors.append(((to_uint8(reconstructed).astype(float) - video[:given]) ** 2).mean())
        obeyed = [clip.direction == text.split()[-1] for clip, text in zip(seen, texts)]
        return {"centroid": float(np.nanmean(np.linalg.norm(found[:, 1:] - true[:, 1:], axis=-1))),
                "still": float(np.nanmean(np.linalg.norm(true[:, :1] - true[:, 1:], axis=-1))),
                "lost": float(np.isnan(found).any(2).mean()), "direction": float(np.mean(obeyed)),
                "psnr": float(10 * np.log10(255 ** 2 / max(max(errors), 1e-9)))}, videos


def show(what, scores):
    print(f"{what:22s}", *(f"{name} {value:.3f} " for name, value in scores.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Prints how well a checkpoint of the shapes world obeys.")
    parser.add_argument("ckpt", nargs="?", default="assets/tiny")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", default="iddpm")
    parser.add_argument("--cfg-scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--vae", help="an autoencoder to check, instead of a checkpoint")
    parser.add_argument("--sheet", help="write the first 12 clips as a .png")
    args = parser.parse_args()
    if args.vae:
        from vae import load_vae
        show(args.vae, check_vae(load_vae(args.vae)))
        return
    settings = dict(steps=args.steps, sampler=args.sampler, num_frames=args.num_frames)
    if args.cfg_scale is not None:
        settings["cfg_scale"] = args.cfg_scale
    judge = Judge(args.ckpt, **settings)
    start = time.perf_counter()
    scores, videos = judge.prompts(args.prompts)
    seconds = (time.perf_counter() - start) / args.prompts
    show(f"{args.prompts} prompts", scores | {"seconds a clip": seconds})
    if args.num_frames == 8:
        for given in (1, 2):
            show(f"given {given} of 8 frames", judge.going_on(min(48, args.prompts), given)[0])
    if args.sheet:
        write_video(args.sheet, np.concatenate(list(videos[::max(1, len(videos) // 12)][:12])))


if __name__ == "__main__":
    main()
