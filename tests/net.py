"""Records what the code computes with fixed seeds and the plain ops, and compares it after a rewrite.

    python tests/net.py record FILE.npz             two minutes on two idle cores
    python tests/net.py compare FILE.npz            names each difference with its size; exit status 1 if there is one
    python tests/net.py compare FILE.npz masks      only some parts; there are training, sampling, masks, buckets,
                                                    windows and curation

Record before the first change, compare after the last, both on the same machine: sums of floats depend on it.
All that this file knows of the code stands in its first section, the adapter.  When names or files change, change the
adapter, never what it returns, so that a recording stays valid.
"""
import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"             # the order of sums depends on the number of threads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SVT_LOG"] = "0"

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


# ---------------------------------------------------------------- the adapter
import configs  # noqa: E402
import data  # noqa: E402
import kernels  # noqa: E402
import masks  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from assets.shapes import write_shapes  # noqa: E402
from model import STDiT  # noqa: E402
from vae import load_text_encoder, load_vae  # noqa: E402

STARTING_WEIGHTS = "init.safetensors"


def load_config(path, *overrides):
    return configs.load(str(ROOT / path), list(overrides))


def make_shapes(folder, num_clips):
    """Writes clips of the shapes world and their meta.csv into folder."""
    write_shapes(folder, num_clips)


def write_starting_weights(config, path):
    """Writes weights for config.model with no parameter that is all zero, so that every gradient is at work."""
    from safetensors.torch import save_file
    model = STDiT(config.model)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    save_file(model.state_dict(), path)


def train_here(config):
    """Trains in this process, or as one of torchrun's, with a line in the log for each step."""
    train.LOG_EVERY = 1
    try:
        train.train(config, plain=True)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def read_log(config):
    """Returns the loss and the gradient norm of each step of a run, [steps] each."""
    lines = (Path(config.out) / "log.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]


class Sampler:
    """The shipped weights, ready to sample."""

    def __init__(self):
        kernels.use("cpu", plain=True)
        checkpoint = sample.load("assets/tiny")
        self.model, self.config = checkpoint.model, checkpoint.config
        self.vae = load_vae(str(ROOT / self.config.vae))
        length = self.config.model.model_max_length
        self.text_encoder = load_text_encoder(str(ROOT / self.config.text_encoder), length)

    def frames(self, prompts, sampler, steps, *, num_frames=8, segments=None, overlap=None, references=None,
               strategy=None):
        """Returns uint8 [B T 64 64 3].  references: clips uint8 [K H W 3] that each prompt is given, taken as
        `strategy` says in the released mask language."""
        strategies = None if strategy is None else [masks.parse_strategy(strategy)] * len(prompts)
        references = None if references is None else [references] * len(prompts)
        return sample.generate(
            self.model, self.vae, self.text_encoder, prompts, num_frames=num_frames, height=64, width=64, fps=8.0,
            seed=5, sampler=sampler, steps=steps, cfg_scale=2.0, prediction=self.config.prediction,
            references=references, strategies=strategies, segments=segments, overlap=overlap)


def training_mask(num_frames, ratios, generator):
    return masks.draw_mask(num_frames, ratios, generator)


def buckets_of_clips(csv_path, config, epoch):
    """Returns for each clip "240p 16 0.56", or the reason why it has no bucket."""
    meta = data.read_meta(str(csv_path))
    names = [" ".join(map(str, bucket)) for bucket in data.bucket_list(config.buckets)]
    assigned = data.assign(meta, config, epoch)
    return [names[number] if number != data.NO_BUCKET else data.LeftOut(reason).words
            for number, reason in zip(assigned.buckets, assigned.reasons)]


def plans(csv_path, config, epochs):
    """Returns for each step of the first epochs its bucket as a text and the clips of its global batch, ids from 0."""
    sampler = data.BucketSampler(data.read_meta(str(csv_path)), config)
    steps = []
    while len(sampler.starts) <= epochs:
        sampler.plan(sampler.starts[-1])
    for step in range(sampler.starts[epochs]):
        plan = sampler.plan(step)
        steps.append((" ".join(map(str, plan.bucket)), plan.clips[:, 0].tolist()))
    return steps


def read_batches(csv_path, config, steps):
    """Yields the first batches: video uint8 [B T H W 3], the texts, and {name: conditioning values [B]}."""
    meta = data.read_meta(str(csv_path))
    for batch in data.batches(data.BucketSampler(meta, config), data.ClipDataset(meta, config), 0, steps):
        values = {name: batch[name].numpy() for name in ("height", "width", "num_frames", "ar", "fps")}
        yield batch["video"].numpy(), batch["text"], values


def read_window(path, num_frames, stride, start):
    """Returns uint8 [T H W 3], or None if the clip cannot be read."""
    try:
        window = data.read_window(str(path), num_frames, stride, start)
    except data.UnreadableClip:
        return None
    return window[0].numpy()


def curate(videos, out):
    """Curates a folder of videos into `out`, where clips.csv lists all clips and meta.csv those that are kept."""
    command = [sys.executable, "curate.py", "run", str(videos), "--out", str(out), "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


# ---------------------------------------------------------------- made inputs
def moving_frames(num_frames, height, width, seed=0):
    """Returns uint8 [T H W 3], all different: a bar that falls over a ground that brightens, and a noisy corner."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = 3 * i % 256
        frame[2 * i % height:][:6, :width // 2] = (255, 0, 0)
        frame[:8, -8:] = rng.integers(0, 256, (8, 8, 3))
    return frames


def landscape(num_frames, speed=2, seed=0):
    """Returns uint8 [T 180 320 3]: a camera that moves over a picture with structure at all sizes and some grain."""
    rng = np.random.default_rng(seed)
    picture = rng.normal(0, 5, (180, 640, 3))
    for cells in (4, 10, 20, 60):
        coarse = rng.normal(0, 26, (180 // (180 // cells) + 1, 2 * cells, 3))
        rows = np.linspace(0, len(coarse) - 1.001, 180)
        columns = np.arange(640) * 2 * cells / 640
        above, left = rows.astype(int), columns.astype(int)
        down, right = (rows - above)[:, None, None], (columns - left)[None, :, None]
        top = coarse[above][:, left] * (1 - right) + coarse[above][:, (left + 1) % (2 * cells)] * right
        bottom = coarse[above + 1][:, left] * (1 - right) + coarse[above + 1][:, (left + 1) % (2 * cells)] * right
        picture += top * (1 - down) + bottom * down
    picture = (picture + rng.uniform(60, 200, 3)).clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, -speed * i, axis=1)[:, :320] for i in range(num_frames)])


def dissolve(a, b, length):
    """Returns clip a, whose last `length` frames turn into the first ones of clip b."""
    share = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
    mixed = a[-length:] * (1 - share) + b[:length] * share
    return np.concatenate([a[:-length], mixed.astype(np.uint8), b[length:]])


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", rotation=0, pixel_aspect=1, times=None, container=None,
           **options):
    """Writes frames uint8 [T H W 3] at 24 fps, with the same bytes each time.  times: of the frames, in 1/24 s."""
    if codec == "libx264":
        options = {"preset": "veryfast", "sc_threshold": "0", "x264-params": "mbtree=0"} | options
    container = {"fflags": "+bitexact"} | (container or {})      # otherwise Matroska draws random numbers as names
    with av.open(str(path), "w", options=container) as out:
        stream = out.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if times is None else times[i]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def made_clips(folder):
    """Writes clips of 48 frames of 48 x 64 pixels of every kind that is known, and images; yields their paths."""
    frames = moving_frames(48, 48, 64)
    b_frames = {"g": "12", "bf": "3"}
    quiet_mpeg = {"sc_threshold": "1000000000", "g": "12", "bf": "2"}
    uneven = np.cumsum([1, 1, 2, 1, 4, 1, 1, 9, 1, 2, 1, 1] * 4).tolist()
    recipes = {
        "b_frames.mp4": dict(b_frames),
        "long_gop.mp4": {"g": "48", "bf": "8", "x264-params": "mbtree=0:b-pyramid=normal:ref=4"},
        "open_gop.mp4": b_frames | {"x264-params": "mbtree=0:open-gop=1"},
        "open_gop.ts": {"g": "12", "bf": "5", "x264-params": "mbtree=0:open-gop=1"},
        "no_key_frames.mp4": {"g": "15", "bf": "2", "x264-params": "mbtree=0:intra-refresh=1"},
        "fields.mp4": b_frames | {"x264-params": "mbtree=0:tff=1"},
        "stream.ts": dict(b_frames),
        "milliseconds.mkv": dict(b_frames),
        "full_colour.mov": b_frames | {"pix_fmt": "yuv444p"},
        "ten_bits.mp4": b_frames | {"pix_fmt": "yuv420p10le"},
        "hevc.mp4": {"codec": "libx265", "x265-params": "keyint=12:log-level=0:pools=none:frame-threads=1"},
        "mpeg2.mpg": quiet_mpeg | {"codec": "mpeg2video"},
        "mpeg4.avi": quiet_mpeg | {"codec": "mpeg4"},
        "h264_without_times.avi": dict(b_frames),
        "vp9.webm": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
        "vp8.webm": {"codec": "libvpx", "g": "12", "deadline": "realtime"},
        "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
        "palette.gif": {"codec": "gif", "pix_fmt": "rgb8"},
        "turned_90.mp4": b_frames | {"rotation": 90},
        "turned_180.mp4": b_frames | {"rotation": 180},
        "turned_270.mp4": b_frames | {"rotation": -90},
        "wide_pixels.mp4": b_frames | {"pixel_aspect": "4/3"},
        "wide_pixels.ts": b_frames | {"pixel_aspect": "4/3"},
        "variable_rate.mp4": b_frames | {"times": uneven},
        "variable_rate.mkv": b_frames | {"times": uneven},
        "faststart.mp4": b_frames | {"container": {"movflags": "faststart"}},
    }
    for name, recipe in recipes.items():
        if recipe.get("codec", "libx264") in av.codecs_available:
            encode(folder / name, frames, **recipe)
            yield folder / name
    yield from damaged_clips(folder, (folder / "faststart.mp4").read_bytes(), (folder / "vp8.webm").read_bytes())
    yield from made_images(folder)


def damaged_clips(folder, mp4, webm):
    """Writes files that are cut off, or have some bytes changed in the picture data or in the header."""
    rng = np.random.default_rng(0)
    damaged = {"cut.mp4": mp4[:len(mp4) * 2 // 3], "cut.webm": webm[:len(webm) * 2 // 3], "empty.mp4": b""}
    for i in range(8):
        content = bytearray(mp4)
        place = int(rng.integers(len(content) // 2, len(content) - 8))
        content[place:place + 4] = b"\xd5\x3a\xd5\x3a"
        damaged[f"picture_{i}.mp4"] = bytes(content)
    for i in range(8):
        content = bytearray(mp4)
        content[int(rng.integers(0, 1500))] ^= 1 << int(rng.integers(8))
        damaged[f"header_{i}.mp4"] = bytes(content)
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
        yield folder / name


def made_images(folder):
    """Writes images of the modes and orientations that people have."""
    rgb = np.random.default_rng(1).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(folder / "plain.png")
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bits.png")
    Image.fromarray(rgb).convert("P").save(folder / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(folder / "print.jpg", quality=95)
    for name in ("plain.png", "turned.jpg", "grey.png", "sixteen_bits.png", "palette.png", "print.jpg"):
        yield folder / name


def made_videos(folder):
    """Writes videos to curate: shots to be cut in several ways, and one of each kind that a rule is there for."""
    shot = landscape(72, 2, 0)
    black = np.zeros_like(shot)
    fade = (shot * np.abs(np.linspace(-1, 1, 72))[:, None, None, None]).astype(np.uint8)
    bars = np.pad(shot[:, 24:-24], ((0, 0), (24, 24), (0, 0), (0, 0)))
    flash = landscape(72, 2, 4)
    flash[30] = 255
    videos = {
        "single": shot,
        "again": shot[:, ::2, ::2],
        "three_shots": np.concatenate([landscape(72, 2, 1), landscape(60, 4, 2), landscape(96, 1, 3)]),
        "dissolve": dissolve(landscape(84, 2, 5), landscape(84, 3, 6), 12),
        "fade": np.concatenate([shot, fade, landscape(60, 2, 7)]),
        "flash": flash,
        "letterbox": bars,
        "still": landscape(1, 0, 8).repeat(72, axis=0),
        "dark": landscape(72, 6, 9) // 18,
        "short": landscape(20, 2, 10),
        "black": black,
    }
    for name, frames in videos.items():
        encode(folder / f"{name}.mp4", frames, crf="12")
    encode(folder / "turned.mp4", landscape(60, 3, 11), rotation=90, crf="12")
    encode(folder / "uneven.mp4", landscape(60, 3, 12), times=np.cumsum([1, 1, 2] * 20).tolist(), crf="12")
    whole = (folder / "single.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[:len(whole) // 2])
    Image.fromarray(shot[0]).save(folder / "image.png")
    (folder / "single.txt").write_text("hills that pass by, seen from a train")


def made_table(path, num_clips=5000):
    """Writes a meta.csv of clips and images of many sizes, lengths and rates; the files themselves do not exist."""
    rng = np.random.default_rng(2)
    sides = ((144, 256), (240, 426), (360, 640), (480, 854), (512, 512), (720, 1280), (1080, 1920), (1280, 720))
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["path", "text", "num_frames", "height", "width", "fps"])
        for i in range(num_clips):
            side = np.array(sides[rng.integers(len(sides))])
            height, width = (rng.lognormal(0, 0.2) * side).astype(int).tolist()
            num_frames = 1 if rng.random() < 0.25 else int(np.clip(rng.lognormal(4.8, 0.9), 4, 900))
            fps = "" if num_frames == 1 else rng.choice([8, 24, 25, 29.97, 60])
            number = i if rng.random() > 0.01 else max(0, i - 7)            # one in a hundred stands twice
            writer.writerow([f"clips/{number}.mp4", f"clip {i}", num_frames, height, width, fps])


# ---------------------------------------------------------------- what is recorded: {name: array} of each part
def record_training(folder):
    """Losses and gradient norms of 20 steps, from pixels, from the cache, and in the ways that a step can differ."""
    make_shapes(folder / "clips", 60)
    small = ["--model.depth=2", "--model.hidden_size=48", "--model.num_heads=2", "--prompts=()", "--steps=20",
             "--save_every=20", "--warmup_steps=4", "--buckets={'64': {1: (1.0, 8), 8: (1.0, 4)}}",
             f"--vae={ROOT}/assets/tiny/vae", f"--text_encoder={ROOT}/assets/tiny/text_encoder",
             f"--data={folder}/clips/meta.csv", f"--init={folder}/{STARTING_WEIGHTS}"]
    equal_shares = {name: 1 / len(masks.STRATEGIES) for name in masks.STRATEGIES}
    runs = {
        "pixels": ["--cache=", "--windows=0", "--num_workers=2"],
        "cache": ["--windows=2"],
        "masks": [f"--mask_ratios={equal_shares}", "--prediction=eps"],
        "speed": ["--speed=True"],
        "accumulated": ["--accumulation=3"],
        "two_processes": [],
    }
    write_starting_weights(load_config("configs/tiny.py", *small[:-1]), folder / STARTING_WEIGHTS)
    for name, overrides in runs.items():
        config = load_config("configs/tiny.py", *small, f"--cache={folder}/cache", f"--out={folder}/{name}", *overrides)
        if name == "two_processes":
            path = folder / "two_processes.py"
            path.write_text(configs.dump(config), "utf-8")
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            done = subprocess.run([sys.executable, *launcher, __file__, "train", str(path)], capture_output=True,
                                  text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        else:
            train_here(config)
        loss, gradient_norm = read_log(config)
        yield f"{name}.loss", np.array(loss)
        yield f"{name}.gradient_norm", np.array(gradient_norm)


def record_sampling(folder):
    """Frames of each sampler: from noise, with frames that are given, with frames that are edited, in segments."""
    shipped = Sampler()
    given = moving_frames(6, 40, 40)
    prompts = ["a red circle moves right", "a blue square moves up"]
    for name, steps in (("iddpm", 10), ("ddim", 6), ("dpm", 6)):
        yield f"{name}.noise", shipped.frames(prompts, name, steps)
        yield f"{name}.given", shipped.frames(prompts, name, steps, references=[given], strategy="0,0,-2,0,2;0,0,0,-1")
        yield f"{name}.edited", shipped.frames(prompts, name, steps, references=[given], strategy="0,0,0,0,6,0.5")
        yield f"{name}.segments", shipped.frames(prompts[:1], name, steps, segments=3, overlap=2)
    yield "image", shipped.frames(["a green triangle"], "ddim", 6, num_frames=1)
    per_segment = ["|0|a red circle moves right|1|a red circle moves left"]
    yield "prompt_per_segment", shipped.frames(per_segment, "dpm", 6, overlap=2)


def record_masks(folder):
    """1,000 training masks, with the published shares and with equal ones, for several lengths."""
    equal = {name: 1 / len(masks.STRATEGIES) for name in masks.STRATEGIES}
    for shares_name, shares in (("published", masks.RECIPE), ("equal", equal)):
        for num_frames in (1, 2, 3, 16, 17):
            drawn = []
            for seed in range(100):
                drawn.append(training_mask(num_frames, shares, torch.Generator().manual_seed(seed)).numpy())
            yield f"{shares_name}.{num_frames}_frames", np.stack(drawn)


def record_buckets(folder):
    """The bucket of 5,000 made-up clips in two epochs, the global batches of two epochs, and some batches as read."""
    made_table(folder / "table.csv")
    for stage in ("stage1", "stage2"):
        config = load_config(f"configs/{stage}.py", "--world=1")
        for epoch in (0, 1):
            yield f"{stage}.epoch_{epoch}", np.array(buckets_of_clips(folder / "table.csv", config, epoch))
        steps = plans(folder / "table.csv", config, epochs=2)
        yield f"{stage}.bucket_of_step", np.array([bucket for bucket, _ in steps])
        yield f"{stage}.clips_of_steps", np.concatenate([clips for _, clips in steps])
    make_shapes(folder / "clips", 40)
    buckets = "--buckets={'64': {1: (1.0, 4), 8: (0.5, 2), 16: (1.0, 1)}}"
    config = load_config("configs/tiny.py", "--cache=", "--windows=0", "--num_workers=0", buckets)
    for step, (video, texts, values) in enumerate(read_batches(folder / "clips/meta.csv", config, 12)):
        yield f"batch_{step}.video", video
        yield f"batch_{step}.text", np.array(texts)
        for name, value in values.items():
            yield f"batch_{step}.{name}", value


def record_windows(folder):
    """Some windows of each made clip, as shown; an empty array where the clip cannot be read."""
    for path in made_clips(folder):
        yield f"{path.name}.made", np.array(zlib.crc32(path.read_bytes()))  # if this differs, so does the input
        is_image = path.suffix in (".png", ".jpg")
        windows = [(1, 1, 0)] if is_image else [(4, 1, 0), (4, 3, 13), (3, 7, None), (2, 5, 42), (6, 1, 44)]
        for num_frames, stride, start in windows:
            frames = read_window(path, num_frames, stride, start)
            name = f"{path.name}.{num_frames}_frames_every_{stride}_from_{start}"
            yield name, np.zeros(0, np.uint8) if frames is None else frames


TABLE_TEXTS = ("path", "text", "source", "cmotion", "duplicate_of", "dropped")
TABLE_NUMBERS = ("num_frames", "height", "width", "fps", "start_seconds", "flow", "brightness")


def record_curation(folder):
    """The tables of made videos, and small copies of the first and last frame of each clip that was written."""
    videos, out = folder / "videos", folder / "curated"
    videos.mkdir()
    made_videos(videos)
    curate(videos, out)
    for table in ("clips", "meta"):
        with open(out / f"{table}.csv", newline="", encoding="utf-8") as f:
            rows = sorted(csv.DictReader(f), key=lambda row: (row["source"], float(row["start_seconds"] or 0)))
        for column in TABLE_TEXTS:
            if column in rows[0]:
                yield f"{table}.{column}", np.array([row[column].replace(str(folder), "") for row in rows])
        for column in TABLE_NUMBERS:
            yield f"{table}.{column}", np.array([float(row[column] or "nan") for row in rows])
        yield f"{table}.has_error", np.array([bool(row.get("error")) for row in rows])
    for row in rows:
        frames = read_window(out / row["path"], int(row["num_frames"]), 1, 0)
        yield f"frames.{row['path']}", frames[[0, -1], ::6, ::6]


PARTS = {"training": record_training, "sampling": record_sampling, "masks": record_masks, "buckets": record_buckets,
         "windows": record_windows, "curation": record_curation}


# ---------------------------------------------------------------- recording and comparing
def record(parts):
    """Returns {"part.name": array} of the parts, and prints how long each takes."""
    torch.set_num_threads(1)
    recorded = {}
    for part in parts:
        start = time.perf_counter()
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            try:
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                    for name, value in PARTS[part](Path(folder).resolve()):
                        recorded[f"{part}.{name}"] = value
            except BaseException:
                print(printed.getvalue(), file=sys.stderr)
                raise
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    return recorded


def difference(before, now):
    """Returns in words how two arrays differ, or None if they are the same to the last bit."""
    if before.shape != now.shape:
        return f"has shape {list(now.shape)}, was {list(before.shape)}"
    if before.dtype.kind != now.dtype.kind:
        return f"has dtype {now.dtype}, was {before.dtype}"
    if before.dtype.kind in "Ub":
        places = np.argwhere(before != now)
        if not len(places):
            return None
        first = tuple(places[0])
        return f"{len(places)} of {before.size} differ, first at {first}: {before[first]!s} is now {now[first]!s}"
    before = np.atleast_1d(before).astype(np.float64)
    now = np.atleast_1d(now).astype(np.float64)
    off = np.abs(now - before)
    off[(before == now) | (np.isnan(before) & np.isnan(now))] = 0
    off[np.isnan(before) != np.isnan(now)] = np.inf
    if not off.any():
        return None
    worst = np.unravel_index(off.argmax(), off.shape)
    return (f"{np.count_nonzero(off)} of {off.size} differ, by {off.max():.3g} at most: "
            f"{before[worst]:.9g} is now {now[worst]:.9g} at {tuple(map(int, worst))}")


def compare(before, now):
    """Prints each difference between two recordings; returns how many there are."""
    differences = 0
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            words = "is missing now"
        elif name not in before:
            words = "is new"
        else:
            words = difference(before[name], now[name])
        if words:
            print(f"{name}: {words}")
            differences += 1
    print(f"{len(before.keys() | now.keys()) - differences} of {len(before.keys() | now.keys())} entries are the same "
          "to the last bit")
    return differences


def main(argv):
    if argv[:1] == ["train"]:                   # one of the two processes that record_training starts
        torch.set_num_threads(1)
        train_here(configs.load(argv[1]))
        return 0
    command, *rest = argv or [""]
    parts = rest[1:] or list(PARTS)
    if command not in ("record", "compare") or not rest or not set(parts) <= PARTS.keys():
        print(__doc__)
        return 2
    path = Path(rest[0])
    if command == "record":
        np.savez_compressed(path, **record(parts))
        return 0
    with np.load(path, allow_pickle=False) as file:
        before = {name: file[name] for name in file.files if name.split(".")[0] in parts}
    return 1 if compare(before, record(parts)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
