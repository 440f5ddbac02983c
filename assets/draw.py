"""Draws the README's pictures from the project's own code, as SVG by hand: no package for plots is needed.

    python assets/draw.py                    lists the pictures: name, what it shows, SOURCE
    python assets/draw.py NAME [SOURCE]      writes assets/NAME.svg (or .png, .gif); --out FOLDER: elsewhere
    python assets/draw.py all                those that take seconds and need no SOURCE
Nothing is drawn from memory: masks.py, data.py, sample.py and model.py are asked, or a log, a table, profiles, previews
are read.
"""
import argparse
import base64
import csv
import io
import json
import re
import sys
import tempfile
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 840                                                             # GitHub shows a README about so wide
MARGIN = 8

# ---------------------------------------------------------------- SVG
# Middle tones on a transparent ground: they can be read on white and on black, where media queries are not heeded too.
BLUE, ORANGE, GREEN, PURPLE, RED = "#3d84c6", "#d9822b", "#3f9e6b", "#9a6fc4", "#d1495b"
TEAL, PINK, GREY = "#2aa5a0", "#c77daa", "#8b949e"
STYLE = """text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#7d8590}
.head{font-weight:600}.small{font-size:11px}.faint{fill:#888;fill-opacity:.22}.axis{stroke:#888;opacity:.5}
.ring{stroke:#7d8590;stroke-width:2;fill:none}
@media(prefers-color-scheme:light){text{fill:#4b535d}.head{fill:#1f2328}.ring{stroke:#1f2328}}
@media(prefers-color-scheme:dark){text{fill:#a5adb7}.head{fill:#e6edf3}.ring{stroke:#e6edf3}}"""


def tag(name, **attributes):
    """<name .../>: numbers with one digit, "_" for a hyphen, kind for class."""
    digit = lambda value: value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
    said = {key.replace("_", "-").replace("kind", "class"): digit(value) for key, value in attributes.items()}
    return f"<{name} " + " ".join(f'{key}="{escape(value)}"' for key, value in said.items() if value) + "/>"


def rect(x, y, width, height, colour="", opacity="", kind="faint"):
    """In a colour, else of a kind in STYLE."""
    return tag("rect", x=x, y=y, width=width, height=height, rx=2, fill=colour, fill_opacity=opacity,
               kind="" if colour else kind)


def text(x, y, words, kind="", anchor="", colour=""):
    style = f"fill:{colour}" if colour else ""
    return tag("text", x=x, y=y, kind=kind, text_anchor=anchor, style=style)[:-2] + f">{escape(str(words))}</text>"


def line(points, colour="", width=1, opacity=""):
    """Through points [(x, y)]; without a colour an axis."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none", stroke=colour,
               kind="" if colour else "axis", stroke_width=width, stroke_opacity=opacity)


def legend(x, y, step, entries):
    """A swatch and words for each (colour, words), from left to right."""
    return [part for i, (colour, words) in enumerate(entries)
            for part in (rect(x + i * step, y - 10, 12, 12, colour), text(x + i * step + 18, y, words))]


# ---------------------------------------------------------------- masks
def draw_masks():
    """The nine mask strategies of training: which of 16 frames are given, in three draws each, and their shares."""
    from masks import RECIPE, STRATEGIES, strategy_mask
    generator = torch.Generator().manual_seed(6)
    parts = [*legend(0, 14, 230, [(BLUE, "given: conditioned on t = 0"), ("", "noised: to be generated")]),
             text(WIDTH, 14, "16 latent frames, three draws", anchor="end")]
    for y, name in zip(range(34, 999, 26), STRATEGIES):
        parts += [text(0, y + 15, name, "head"), text(222, y + 15, f"{RECIPE[name]:.1%}", anchor="end")]
        for x in (242, 445, 648):
            for t, noised in enumerate(strategy_mask(name, 16, generator).tolist()):
                parts.append(rect(x + 12 * t, y, 10, 20, "" if noised else BLUE))
    return 272, parts


# ---------------------------------------------------------------- buckets
REASON_COLOURS = {"too small": GREY, "too short": RED, "keep draw": ORANGE}
SIDES = (144, 256), (240, 426), (360, 640), (480, 854), (512, 512), (720, 1280), (1024, 1024), (1080, 1920)


def made_up_clips(config, count=420):
    """Rows of a meta.csv, a quarter of them images, and the Bucket of each, or why it has none, both by data.py."""
    from data import LeftOut, assign, bucket_list, read_meta
    rng, lines = np.random.default_rng(1), ["path,text,num_frames,height,width,fps"]
    for i in range(count):
        height, width = (rng.lognormal(0, 0.2) * np.array(SIDES[rng.integers(len(SIDES))])).astype(int)
        frames = 1 if rng.random() < 0.25 else int(np.clip(rng.lognormal(4.8, 0.9), 12, 900))
        lines.append(f"{i}.mp4,,{frames},{height},{width},24")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "meta.csv").write_text("\n".join(lines))
        meta = read_meta(str(Path(folder, "meta.csv")))
        assigned, buckets, rows = assign(meta, config, epoch=0), bucket_list(config.buckets), np.array(meta.rows)
        return rows, [buckets[number] if number >= 0 else LeftOut(reason).words
                      for number, reason in zip(assigned.buckets, assigned.reasons)]


def draw_buckets():
    """Which bucket of stage 1 takes which clip: made-up clips by length and size; crosses are left out; a table."""
    from configs import load
    from data import PIXELS
    rows, chosen = made_up_clips(config := load("configs/stage1.py"))
    colours = dict(zip(sorted(config.buckets, key=PIXELS.get, reverse=True), (PURPLE, BLUE, TEAL, GREEN, PINK)))
    lengths = sorted({t for row in config.buckets.values() for t in row})
    across = lambda frames: 250 + 580 * np.log10(frames / 10) / 2       # from 10 frames to 1,000
    down = lambda pixels: 330 - 300 * np.log(pixels / 15e3) / np.log(400)               # from 15,000 to 6 million
    parts = [text(0, 14, "pixels of a frame", "head"), text(166, 348, "images"), line([(150, 330), (WIDTH, 330)]),
             text(WIDTH, 366, f"frames of the clip, every {config.frame_interval}rd of which is taken", anchor="end")]
    for level, colour in colours.items():
        y = down(0.8 * PIXELS[level])                                   # the rule of data.offers
        parts += [line([(150, y), (WIDTH, y)]),
                  text(142, y + 4, f"{level} from {0.8e-3 * PIXELS[level]:,.0f} k", "", "end", colour)]
    for t in lengths[1:]:
        x = across(config.frame_interval * t)
        parts += [line([(x, 26), (x, 330)]), text(x, 348, config.frame_interval * t, anchor="middle")]
    for row, bucket, place in zip(rows, chosen, np.random.default_rng(2).uniform(155, 225, len(rows))):
        x = place if row["num_frames"] == 1 else across(row["num_frames"])
        y = down(float(row["height"]) * row["width"])
        if isinstance(bucket, str):
            parts += [line([(x - 3, y - d), (x + 3, y + d)], REASON_COLOURS[bucket], 1.6) for d in (-3, 3)]
        else:
            radius = 2.6 + 0.7 * lengths.index(bucket.num_frames)
            parts.append(tag("circle", cx=x, cy=y, r=radius, fill=colours[bucket.resolution], fill_opacity="0.75"))
    return 606, parts + bucket_rows(config.buckets, lengths, colours, chosen)


def bucket_rows(buckets, lengths, colours, chosen):
    """Below: how many of the clips each bucket got, its probability and batch; then how many got none."""
    column = lambda t: 130 + 118 * lengths.index(t)
    parts = [text(column(t), 394, f"{t} frame" + "s" * (t > 1), "head") for t in lengths]
    for y, (level, colour) in zip(range(420, 600, 34), colours.items()):
        parts += legend(0, y, 0, [(colour, level)])
        for t, (keep, batch) in buckets[level].items():
            clips = sum(bucket[:2] == (level, t) for bucket in chosen)
            parts += [text(column(t), y, f"{clips} clips" if keep else "-"),
                      text(column(t), y + 14, f"keep {keep:.0%}, {batch}/GPU" if keep else "passes them on", "small")]
    out = [(colour, f"{chosen.count(reason)} left out: {reason}") for reason, colour in REASON_COLOURS.items()]
    return parts + legend(0, 598, 210, out)


# ---------------------------------------------------------------- noise
STRATEGY = "0,0,0,0,4;0,0,4,4,4,0.3;0,0,8,8,4,0.7"                      # no reference for the last 4 of 16 frames


def conditioned_times(steps=20):
    """Returns strengths [T] and the t [steps T] on which sample.py's loop conditions a stand-in model; -1: clean."""
    from masks import frame_plan, parse_strategy
    from sample import sample_latents
    _, strengths = frame_plan(parse_strategy(STRATEGY), 0, 16, [16])
    times = []

    def model(x, t, y, y_mask, x_mask):
        times.append(torch.where(x_mask[0], t[0], -1))
        return torch.cat([x, x], dim=1)

    z = torch.zeros(1, 1, 16, 1, 1)
    sample_latents(model, z, torch.zeros(1, 1, 1), torch.ones(1, 1), {}, generators=None, steps=steps, sampler="ddim",
                   cfg_scale=1, known=z, strength=strengths[None])
    return strengths.tolist(), torch.stack(times).tolist()


def draw_noise():
    """The noise of frames during sampling: given ones stay clean, edited ones join late, new ones go all the way."""
    from sample import noise_schedule
    strengths, times = conditioned_times()
    abar, wide, shade = noise_schedule().alphas_cumprod, 630 / len(times), lambda t: f"{0.2 + 0.8 * t / 999:.2f}"
    parts = [text(0, 14, f'--mask-strategy "{STRATEGY}"', "head"), *legend(0, 36, 0, [(BLUE, "clean: conditioned on t = 0")]),
             text(WIDTH, 14, "the t of the condition (standard deviation of its noise)", anchor="end")]
    for x, t in zip(range(300, WIDTH, 110), (999, 750, 500, 250, 0)):
        parts += [rect(x, 26, 12, 12, ORANGE, shade(t)), text(x + 18, 36, f"{t} ({(1 - abar[t]).sqrt():.2f})")]
    for i, step in enumerate(times):
        parts += [rect(212 + wide * i, 54 + 18 * f, wide - 2, 16, *(BLUE,) if t < 0 else (ORANGE, shade(t)))
                  for f, t in enumerate(step)]
    for strength, group in groupby(range(16), key=lambda f: round(strengths[f], 3)):
        first, *_, last = group
        what = {0: "given", 1: "made from noise"}.get(strength, f"edited, strength {strength:g}")
        y = 54 + 9 * (first + last + 1)
        parts += [text(0, y - 3, what, "head"), text(0, y + 13, f"frames {first} to {last}")]
    return 366, [*parts, text(212, 358, "step 1"), text(WIDTH, 358, f"step {len(times)}, the last", anchor="end")]


# ---------------------------------------------------------------- attention
FRAMES, ROWS, COLUMNS, WORDS, COUNTED, ASKED = 6, 4, 6, 6, 4, (3, 8)    # 2 words are padding; asked: frame and place


def reaches():
    """{layer: (bool [T S], bool [WORDS])}: the inputs where the gradient of one output token is not 0."""
    from model import Block, STDiTConfig, pack_text, rotary_table
    config, C, generator = STDiTConfig(hidden_size=24, num_heads=2), 24, torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    block = Block(config).double()
    for weight in block.parameters():       # fresh, time and text answer 0; of variance 1, softmax underflows to 0
        weight.data = noise(*weight.shape) / C ** 0.5
    rotary = [table.double() for table in rotary_table(FRAMES, config.head_dim)]
    mod, mod_temp = noise(1, FRAMES, 6 * C), noise(1, FRAMES, 3 * C)
    layers = {"attention in space": lambda x, *caption: block.attn(x, "space"),
              "attention in time": lambda x, *caption: block.attn_temp(x, "time", rotary),
              "cross attention": block.cross_attn,
              "the whole block": lambda x, *caption: block(x, mod, mod_temp, *caption, rotary)}
    found = {}
    for name, layer in layers.items():
        x, y = noise(1, FRAMES, ROWS * COLUMNS, C).requires_grad_(), noise(1, WORDS, C).requires_grad_()
        out = layer(x, *pack_text(y, torch.arange(WORDS)[None] < COUNTED))[0, *ASKED].sum()
        grads = torch.autograd.grad(out, (x, y), materialize_grads=True)
        found[name] = [grad[0].abs().sum(-1) > 0 for grad in grads]
    return found


def draw_attention():
    """On which inputs a token (ringed) depends: by each attention, by a block; where its gradient is not 0."""
    place = lambda top, t, s: (150 + 98 * t + 14 * (s % COLUMNS), top + 14 * (s // COLUMNS))
    parts = [text(150 + 98 * t, 12, f"frame {t}" if t < FRAMES else "caption") for t in range(FRAMES + 1)]
    for top, (name, (tokens, words)) in zip(range(22, 400, 76), reaches().items()):
        parts += [text(0, top + 15, name, "head"), text(0, top + 34, f"{tokens.sum()} of {tokens.numel()} tokens"),
                  text(0, top + 51, f"{words.sum()} of {COUNTED} words")]
        for t, (reached, colour) in enumerate([(row, BLUE) for row in tokens.tolist()] + [(words.tolist(), ORANGE)]):
            parts += [rect(*place(top, t, s), 12, 12, colour if yes else "") for s, yes in enumerate(reached)]
        parts.append(rect(*place(top, *ASKED), 12, 12, kind="ring"))
    return 346, [*parts, text(0, 338, "Ringed: the output token. Filled: the inputs at which its gradient is not 0.")]


# ---------------------------------------------------------------- a run: its losses, its previews
def draw_loss_by_t(source="runs/tiny"):
    """The loss of a run, and its parts by t: over the steps, for each quarter of t and for all; SOURCE: its folder."""
    rows = [json.loads(row) for row in Path(source, "log.jsonl").read_text().splitlines()]
    steps, losses = [row["step"] for row in rows], np.array([[row["loss"], *row["loss_by_t"]] for row in rows], float).T
    top = np.ceil(4 * np.nanquantile(losses, 0.99)) / 4                 # nan where a line of the log has no such t
    across, down = (lambda step: 34 + 640 * step / steps[-1]), (lambda loss: 320 - 290 * min(loss, top) / top)
    parts, ends, y = [text(0, 14, "loss", "head"), text(674, 342, f"{steps[-1]:,} steps", anchor="end")], [], 0
    for loss in np.arange(0, top + 0.01, 0.25):
        parts += [line([(34, down(loss)), (674, down(loss))]), text(28, down(loss) + 4, f"{loss:g}", "small", "end")]
    names = "all t", "little noise, t < 250", "t < 500", "t < 750", "little else, t < 1000"
    for colour, words, values in zip((RED, GREEN, BLUE, PURPLE, ORANGE), names, losses):
        mean = [np.nanmean(values[max(0, i - 3): i + 4]) for i in range(len(values))]
        for kept, width, opacity in ((values, 1, "0.35"), (mean, 2, "1")):
            parts.append(line([(across(s), down(v)) for s, v in zip(steps, kept) if v == v], colour, width, opacity))
        ends.append((down(mean[-1]), f"{mean[-1]:.2f} {words}", colour))
    for end, words, colour in sorted(ends):
        y = max(end, y + 16)                                            # names do not touch
        parts.append(text(682, y + 4, words, colour=colour))
    return 350, parts


def draw_training(source="runs/tiny"):
    """Previews of a run while it trains: a row for some steps, 3 frames of 4 prompts (PNG); SOURCE: its folder."""
    from configs import load
    files = {int(file.stem.split("-")[1]): file for file in Path(source, "samples").glob("step-*.png")}
    if not files:
        raise FileNotFoundError(f"no {source}/samples/step-*.png: train with --sample_every=50")
    steps = sorted({min(files, key=lambda step: abs(step - wanted)) for wanted in (50, 100, 200, 400, 700, max(files))})
    sheet, font = Image.new("RGBA", (WIDTH, 20 + 66 * len(steps))), ImageFont.load_default(14)
    pen = partial(ImageDraw.Draw(sheet).text, fill=GREY, font=font)
    for x, prompt in zip(range(70, WIDTH, 195), load(str(Path(source, "config.py"))).prompts):
        pen((x, 0), prompt)
    for top, step in zip(range(20, 999, 66), steps):
        pen((0, top + 22), f"step {step}")
        picture = Image.open(files[step]).convert("RGB")                # a row a prompt: 8 frames of 128 pixels + 2
        for i in range(12):
            x, y = 130 * (0, 3, 7)[i % 3], 130 * (i // 3)
            frame = picture.crop((x, y, x + 128, y + 128)).resize((60, 60), Image.Resampling.BOX)
            sheet.paste(frame, (70 + 61 * i + 12 * (i // 3), top))
    return sheet.quantize(96, Image.Quantize.FASTOCTREE)


# ---------------------------------------------------------------- samples of the shipped weights
def draw_samples(source=ROOT / "assets" / "tiny"):
    """Twelve prompts of the shapes world, every seventh of 72, looping (GIF): 20 steps of dpm; SOURCE: a checkpoint."""
    from assets.shapes import COLORS, DIRECTIONS, SHAPES, SHAPES_FPS
    from sample import generate, load
    from vae import load_text_encoder, load_vae
    every = [f"a {color} {shape} moves {way}" for color in COLORS for shape in SHAPES for way in DIRECTIONS]
    prompts = [every[7 * i % len(every)] for i in range(12)]
    model, config = load(str(source))
    text_encoder = load_text_encoder(config.text_encoder, config.model.model_max_length)
    videos = generate(model, load_vae(config.vae), text_encoder, prompts, num_frames=8, height=64, width=64,
                      fps=SHAPES_FPS, steps=20, sampler="dpm", cfg_scale=config.cfg_scale,
                      prediction=config.prediction)
    font = ImageFont.load_default(12)
    sheets = []
    for frames in videos.swapaxes(0, 1):                                # the 12 frames of a moment
        sheet = Image.new("RGB", (4 * 164, 3 * 184), "white")
        for i, (prompt, frame) in enumerate(zip(prompts, frames)):
            x = 164 * (i % 4)
            y = 184 * (i // 4)
            sheet.paste(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC), (x, y))
            ImageDraw.Draw(sheet).text((x + 80, y + 162), prompt, fill="#4b535d", font=font, anchor="ma")
        sheets.append(sheet)
    return sheets


# ---------------------------------------------------------------- curation
def draw_curation(source="data/mine"):
    """What curate.py keeps and drops: clips left by each rule; frames kept (blue), dropped; SOURCE: its folder."""
    from data import read_window
    rows = list(csv.DictReader(Path(source, "clips.csv").read_text(encoding="utf-8").splitlines()))
    for row in rows:
        found = re.search(r"^(duplicate|too short)|m(in|ax)_\w+ \S+$", row["dropped"])
        row["why"] = found[0] if found else "unreadable" if row["error"] else row["dropped"]
    parts = [text(0, 14, "clips after each rule", "head"), *legend(200, 14, 90, [(BLUE, "kept"), (ORANGE, "dropped")])]
    reasons = sorted({row["why"]: 1 for row in rows if row["why"]}, key=lambda why: why[0] == "m")      # the rules last
    left, unit = len(rows), 540 / len(rows)
    for y, reason in zip(range(30, 999, 22), reasons):
        dropped = sum(row["why"] == reason for row in rows)
        left, right = left - dropped, 200 + unit * left
        parts += [text(0, y + 13, reason), text(right + 8, y + 13, left), rect(200, y, unit * left - 1, 16, BLUE),
                  rect(200 + unit * left, y, unit * dropped, 16, ORANGE)]
    shown, foot = [row for row in rows if row["path"]][:18], 54 + 22 * len(reasons)
    for i, row in enumerate(sorted(shown, key=lambda row: row["why"] != "")):
        x, y = 2 + 141 * (i % 6), foot + 100 * (i // 6)
        frame = read_window(str(Path(source, row["path"])), 1)[0][0].numpy()                    # the middle one
        Image.fromarray(frame).resize((128, 72)).save(buffer := io.BytesIO(), "JPEG", quality=60)
        data = base64.b64encode(buffer.getvalue()).decode()
        parts += [rect(x - 2, y - 2, 132, 76, ORANGE if row["why"] else BLUE),
                  tag("image", x=x, y=y, width=128, height=72, href=f"data:image/jpeg;base64,{data}"),
                  text(x, y + 88, row["why"] or f"flow {float(row['flow'] or 0):.0f}, {row['cmotion']}", "small")]
    return foot + 100 * -(-len(shown) // 6), parts


# ---------------------------------------------------------------- the time of a step
def draw_step_time(source=ROOT / "assets" / "results"):
    """What the GPU time of a block goes to: each kind of kernel, plain and fast; SOURCE: folder of two profiles."""
    from assets.results import gpu_time
    plain, fast = (Path(source, f"h100-profile-{form}.txt") for form in ("plain", "fast"))
    of, on, plain = gpu_time(plain.read_text(encoding="utf-8"))
    *where, fast = gpu_time(fast.read_text(encoding="utf-8"))
    assert where == [of, on], f"{source}: the profiles are of {of}, {on}, and of {', '.join(where)}"
    both = [(GREY, f"plain: {sum(plain.values()):,.1f} ms"), (BLUE, f"fast: {sum(fast.values()):,.1f} ms")]
    parts, unit = [text(0, 14, of, "head"), text(0, 32, on)], 570 / max(plain.values())
    parts += legend(520, 32, 160, both)
    for y, name in zip(range(50, 9999, 38), sorted(plain, key=plain.get, reverse=True)):
        parts.append(text(0, y + 19, name))
        for at, colour, ms in ((y, GREY, plain[name]), (y + 14, BLUE, fast[name])):
            parts += [rect(140, at, unit * ms + 1, 13, colour), text(147 + unit * ms, at + 11, f"{ms:,.1f} ms")]
    return y + 40, parts


# ---------------------------------------------------------------- the command line
PICTURES = {name[5:].replace("_", "-"): draw for name, draw in globals().items() if name.startswith("draw_")}
CHEAP = "masks", "buckets", "noise", "attention", "step-time"


def write_gif(file, frames):
    """Writes frames, PIL images of one size, at 8 a second; the last one stays for a second.  They share a palette."""
    width, height = frames[0].size
    wall = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        wall.paste(frame, (0, height * i))
    palette = wall.quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(file, save_all=True, append_images=rest, duration=[125] * len(rest) + [1000], loop=0)
    return file


def write(name, folder, *source):
    """Draws one picture into the folder and returns its file; its docstring becomes title and description."""
    drawn, file = PICTURES[name](*source), Path(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(drawn, list):
        return write_gif(file.with_suffix(".gif"), drawn)
    if isinstance(drawn, Image.Image):
        drawn.save(file := file.with_suffix(".png"), optimize=True)
        return file
    (height, parts), (title, seen) = drawn, PICTURES[name].__doc__.split(": ", 1)
    file.with_suffix(".svg").write_text("\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="{-MARGIN} {-MARGIN} {WIDTH + 2 * MARGIN} {height + 2 * MARGIN}" '
        f'role="img" aria-labelledby="title seen"><title id="title">{title}</title><desc id="seen">{seen}</desc>',
        f"<style>{STYLE}</style>", *parts, "</svg>\n"]), encoding="utf-8", newline="\n")
    return file.with_suffix(".svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=(*PICTURES, "all"))
    parser.add_argument("source", nargs="*", help="a run's folder, a table: see the list")
    parser.add_argument("--out", default=ROOT / "assets", help="folder (default: assets)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not args.name:
        print("\n".join(f"{name:<12}{draw.__doc__}" for name, draw in PICTURES.items()))
    try:
        for name in CHEAP if args.name == "all" else filter(None, [args.name]):
            print(write(name, args.out, *args.source))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
