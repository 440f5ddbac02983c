"""Samples a video from a caption: start from noise, ask the model 100 times what to take away, decode.

in    captions, frames that are given (optional), a checkpoint: a folder with config.py and model.safetensors
out   samples/00-a-red-circle.mp4 and a contact sheet of its frames, .png; from `generate`: uint8 [B T H W 3]

    python sample.py --prompt "a red circle moves right" --ckpt assets/tiny
    python sample.py --prompt "a red circle moves right" --reference circle.png      its first frame is given
    torchrun --nproc-per-node 8 sample.py --prompt "..." "..." --sp 4                four GPUs a clip, two clips at once

Papers: DDPM (arXiv 2006.11239), learned variances (2102.09672), DDIM (2010.02502), DPM-Solver++ (2211.01095),
classifier-free guidance (2207.12598), v-prediction (2202.00512).

Quirks of the released sampler, numbered on from model.py's; the fields of SampleQuirks, all off unless asked for:
Q4  guide_3_channels   of the 4 latent channels the first 3 are guided
Q5  cut_null           the null caption is cut to the length of the prompt that it stands beside
Q6  ar_h_over_w        ar is told as height / width, while training told width / height
Q7  raw_fps            fps is told as the source file's, whatever the frame interval
"""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from einops import rearrange, repeat
from safetensors.torch import load_file
from tqdm import tqdm

import configs
from data import (ASPECT, IMAGE_FPS, Bucket, fail, read_window, resize_crop, slot_generator, stride, to_uint8, to_video,
                  write_video)
from kernels import start_processes
from model import STDiT
from vae import load_text_encoder, load_vae

ROOT = Path(__file__).parent
SAMPLERS = ("iddpm", "ddim", "dpm")
NUM_TIMESTEPS = 1000
DEFAULT_STEPS = {"iddpm": 100, "ddim": 50, "dpm": 20}


@dataclass(frozen=True)
class SampleQuirks:
    guide_3_channels: bool = False                                      # Q4
    cut_null: bool = False                                              # Q5
    ar_h_over_w: bool = False                                           # Q6
    raw_fps: bool = False                                               # Q7


RELEASED = SampleQuirks(guide_3_channels=True, cut_null=True, ar_h_over_w=True, raw_fps=True)


# ---------------------------------------------------------------- the noise schedule
def noise_schedule(sampler: str = "iddpm", prediction: str = "eps"):
    """A diffusers scheduler with linear betas 1e-4..0.02 over 1000 steps (DDPM, section 4): its `alphas_cumprod` is
    what training needs, its `step` what sampling needs."""
    if sampler not in SAMPLERS or prediction not in ("eps", "v"):
        raise ValueError(f"sampler={sampler!r}, prediction={prediction!r}: expected one of {SAMPLERS}; 'eps' or 'v'")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    if sampler == "iddpm":                                              # by default it clips x_0 to -1..1
        scheduler = DDPMScheduler(prediction_type=kind, variance_type="learned_range", clip_sample=False)
    else:
        # DPM-Solver++ of order 1 is DDIM. diffusers' DDIMScheduler always steps from t to t - 1000 // n, which is right
        # for evenly spaced t only; this class takes any list. No variance_type: with one it would keep 3 channels.
        scheduler = DPMSolverMultistepScheduler(prediction_type=kind, solver_order=1 if sampler == "ddim" else 2)
    # fp64, as diffusers' fp32 betas are 1e-4 off where 1 - abar is small; x stays fp32 when multiplied by such scalars
    scheduler.betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def timesteps(steps: int, sampler: str = "iddpm") -> list[int]:
    """`steps` of 999..0, evenly spaced with both ends, as in 999, 989, 979, .., 10, 0; a single one is 999.

    dpm leaves out 0: log(SNR) rises so steeply there that its second-order step to 0 overshoots.  50 steps are 5% off
    the exact solution with 0 and 1% without, for latents that are N(0.5, 0.3^2)."""
    spaces = steps if sampler == "dpm" else max(1, steps - 1)
    if not 1 <= spaces < NUM_TIMESTEPS or steps < 1:
        raise ValueError(f"steps={steps}: expected 1 to {NUM_TIMESTEPS - 1}; usual are {DEFAULT_STEPS}")
    return [round(i * (NUM_TIMESTEPS - 1) / spaces) for i in range(spaces, spaces - steps, -1)]


# ---------------------------------------------------------------- sampling in latent space
def guide(out_cond, out_null, cfg_scale: float, channels: int | None = None):
    """Classifier-free guidance (arXiv 2207.12598) of the model's answers with and without caption, [B C_out T h w].

    The first `channels` are guided (None: the first half, all of eps or v); the others, the variances among them, stay
    as the caption has them.  v is linear in eps at a given x_t, so guiding either is the same."""
    channels = channels or out_cond.shape[1] // 2
    cond, null = out_cond[:, :channels], out_null[:, :channels]
    return torch.cat([null + cfg_scale * (cond - null), out_cond[:, channels:]], dim=1)


def step_back(scheduler, out, t, x, generators):
    """x at the next smaller t, from x at t and the model's answer there, [B C or 2C T h w]."""
    C = x.shape[1]
    if not isinstance(scheduler, DDPMScheduler):
        return scheduler.step(out[:, :C], t, x, return_dict=False)[0]
    if out.shape[1] == C:                                               # no learned variance: its lower bound
        out = torch.cat([out, torch.full_like(out, -1)], dim=1)
    return scheduler.step(out, t, x, generator=generators, return_dict=False)[0]


@torch.no_grad()
def sample_latents(model, z, y, y_mask, cond, *, generators, steps=100, sampler="iddpm", prediction="eps",
                   cfg_scale=7.0, known=None, x_mask=None, quirks=SampleQuirks()):
    """Clean latents [B C T h w] from noise z [B C T h w], captions y [B L C] with y_mask [B L], and cond, a dict of
    height, width, num_frames, ar, fps, each [B].  generators: one per clip.

    Frames with x_mask [B T] False are given: they are `known` [B C T h w], bit for bit, at every step and at the end.
    They enter the model clean.  In upstream's training they carry the noise of t = 0, a hundredth of a standard
    deviation: too little to miss, and the user's frames stay the user's.  x_mask None: everything is generated."""
    B, C = z.shape[:2]
    scheduler = noise_schedule(sampler, prediction)
    scheduler.set_timesteps(timesteps=timesteps(steps, sampler))
    guided = cfg_scale != 1
    if guided:                                                          # rows 0..B-1 with caption, B..2B-1 without
        null_mask = y_mask if quirks.cut_null else torch.ones_like(y_mask)
        y, y_mask = torch.cat([y, model.null_y.to(y).expand_as(y)]), torch.cat([y_mask, null_mask])
        cond = {name: torch.cat([value, value]) for name, value in cond.items()}
    rows = 2 if guided else 1
    told_mask = None if x_mask is None else repeat(x_mask, "b t -> (rows b) t", rows=rows)
    noised = None if x_mask is None else rearrange(x_mask, "b t -> b 1 t 1 1")
    x = z
    for t in tqdm(scheduler.timesteps, desc=sampler, leave=False, disable=not sys.stderr.isatty()):
        x = x if x_mask is None else torch.where(noised, x, known)
        told_t = torch.full((rows * B,), int(t), device=x.device)
        x_rows = repeat(x, "b c t h w -> (rows b) c t h w", rows=rows)
        out = model(x_rows, told_t, y, y_mask, x_mask=told_mask, **cond)
        if guided:
            out = guide(*out.chunk(2), cfg_scale, 3 if quirks.guide_3_channels else C)
        x = step_back(scheduler, out, t, x, generators)
    return x if x_mask is None else torch.where(noised, x, known)


# ---------------------------------------------------------------- from captions to frames
def generate(model, vae, text_encoder, prompts, *, num_frames, height, width, fps, frame_interval=1, steps=100,
             sampler="iddpm", prediction="eps", cfg_scale=7.0, seed=0, references=None, numbers=None, batch_size=4,
             quirks=SampleQuirks()):
    """Videos, uint8 [B T H W 3], one per prompt.  Clip i depends on prompts[i], references[i], seed, numbers[i] (or i).

    height, width: pixels; what does not fill a latent cell is dropped.  fps: of a source of which every
    frame_interval-th frame is taken.  references: per prompt None or uint8 [K H W 3] of any size: its first frames."""
    references, numbers = references or [None] * len(prompts), numbers or range(len(prompts))
    check_request(prompts, references, num_frames, height, width, fps, vae.down, model.config.patch_size)
    device = model.null_y.device
    shape = (vae.channels, num_frames, height // vae.down, width // vae.down)
    ar = height / width if quirks.ar_h_over_w else width / height
    told_fps = IMAGE_FPS if num_frames == 1 else fps if quirks.raw_fps else fps / frame_interval
    told = dict(height=height, width=width, num_frames=num_frames, ar=ar, fps=told_fps)
    clips = []
    for i in range(0, len(prompts), batch_size):
        texts = list(prompts[i : i + batch_size])
        generators = [slot_generator(seed, 0, number, "sample") for number in numbers[i : i + batch_size]]  # of the CPU
        z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)                 # [B C T h w]
        y, y_mask = text_encoder(texts)
        cond = {name: torch.full((len(texts),), float(value), device=device) for name, value in told.items()}
        known, x_mask = encode_references(vae, references[i : i + batch_size], z)
        z = sample_latents(model, z, y.to(device), y_mask.to(device), cond, generators=generators, steps=steps,
                           sampler=sampler, prediction=prediction, cfg_scale=cfg_scale, known=known, x_mask=x_mask,
                           quirks=quirks)
        clips += [to_uint8(vae.decode(clip)[0]) for clip in z.split(1)]
    return np.stack(clips)


def check_request(prompts, references, num_frames, height, width, fps, down, patch_size):
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts {list(prompts)}: each must say something, as in \"a red circle moves right\"")
    if len(references) != len(prompts):
        raise ValueError(f"{len(references)} references for {len(prompts)} prompts: expected one (or None) per prompt")
    least = (down * patch_size[1], down * patch_size[2])
    if not fps > 0:
        raise ValueError(f"fps={fps}: expected more than 0")
    if num_frames < 1 or height < least[0] or width < least[1]:
        raise ValueError(f"{num_frames} frames of {height}x{width} (height x width): expected 1 frame or more of "
                         f"{least[0]}x{least[1]} pixels, one patch, or more")
    longest = max((len(frames) for frames in references if frames is not None), default=0)
    if longest >= num_frames:
        raise ValueError(f"{longest} reference frames leave nothing of {num_frames} frames to generate: give fewer")
    if height % down or width % down:
        made = f"{height // down * down}x{width // down * down}"
        print(f"{height}x{width} asked, {made} made: a latent cell is {down} pixels wide")


def encode_references(vae, references, z):
    """known [B C T h w], the given frames' latents and 0 elsewhere, and x_mask [B T]; (None, None) without any."""
    if all(frames is None for frames in references):
        return None, None
    B, _, T, h, w = z.shape
    known, x_mask = torch.zeros_like(z), torch.ones(B, T, dtype=torch.bool, device=z.device)
    for b, frames in enumerate(references):
        if frames is not None:
            video = to_video(resize_crop(torch.as_tensor(frames), h * vae.down, w * vae.down))         # [3 K H W]
            known[b, :, : len(frames)] = vae.encode(video[None].to(z.device))[0].to(z)
            x_mask[b, : len(frames)] = False
    return known, x_mask


# ---------------------------------------------------------------- checkpoints and the command line
def find(name):
    """A path of a checkpoint or config: from here, else from this repository, else as it is (a name on the hub)."""
    return next((str(path) for path in (Path(name), ROOT / name) if path.exists()), name)


def load_checkpoint(folder, device="cpu"):
    """(model, config) of a folder with config.py and model.safetensors: a run, or weights shipped as assets/tiny."""
    files = [Path(find(folder)) / name for name in ("config.py", "model.safetensors")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no checkpoint {folder}: there is no {file}. `python train.py configs/tiny.py` "
                                    "writes one to runs/tiny; assets/tiny comes with this repository")
    config = configs.load(str(files[0]))
    model = STDiT(config.model)
    model.load_state_dict(load_file(files[1]))
    return model.to(device, weight_dtype(config, device)).eval(), config


def weight_dtype(config, device):
    return torch.bfloat16 if config.dtype == "bf16" and torch.device(device).type == "cuda" else torch.float32


def read_references(paths, num_prompts, num_frames, frame_interval):
    """Per prompt None or uint8 [K H W 3]; one path serves all prompts."""
    if len(paths) not in (0, 1, num_prompts):
        raise ValueError(f"{len(paths)} --reference files for {num_prompts} prompts: expected one, or one per prompt")
    clips = [read_window(path, num_frames, frame_interval, start=0)[0] for path in paths] or [None]
    return clips if len(clips) == num_prompts else clips * num_prompts


def default_bucket(buckets):
    """(num_frames, height, width) to sample at: the shortest trained video, at the largest resolution that has it."""
    trained = [(T, name) for name, lengths in buckets.items() for T, (keep, _) in lengths.items() if keep > 0]
    T = min((T for T, _ in trained if T > 1), default=1)
    sizes = [Bucket(name, T, usual_aspect(name)) for frames, name in trained if frames == T]
    best = max(sizes, key=lambda bucket: bucket.height * bucket.width)
    return T, best.height, best.width


def usual_aspect(resolution):
    return "0.56" if "0.56" in ASPECT[resolution] else min(ASPECT[resolution], key=lambda ar: abs(float(ar) - 1))


def parse_size(text):
    if not re.fullmatch(r"\d+x\d+", text):
        raise ValueError(f"--size {text}: expected HEIGHTxWIDTH in pixels, as in 240x426")
    return tuple(map(int, text.split("x")))


def slug(prompt):
    """The caption's first letters and digits, as a part of a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Samples one video per prompt.")
    add = parser.add_argument
    add("--prompt", nargs="+", required=True, help="captions, each in quotes")
    add("--ckpt", default="assets/tiny", help="folder with config.py and model.safetensors (default: %(default)s)")
    add("--out", default="samples", help="folder for videos and contact sheets (default: %(default)s)")
    add("--num-frames", type=int, help="default: of the shortest videos that the checkpoint was trained on")
    add("--size", help="HxW in pixels, as in 240x426; default: the largest trained at that length")
    add("--fps", type=float, help="of the source; the video plays at fps / frame interval; default: the config's")
    add("--seed", type=int, default=0)
    add("--sampler", choices=SAMPLERS, default="iddpm")
    add("--steps", type=int, help=f"default: {DEFAULT_STEPS}")
    add("--cfg-scale", type=float, help="guidance; 1 = none, at half the time; default: the config's")
    add("--reference", nargs="+", default=[], help="image or video that gives the first frames: one, or one per prompt")
    add("--reference-frames", type=int, default=1, help="how many of them (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="prompts sampled at once (default: %(default)s)")
    add("--sp", type=int, default=1, help="under torchrun: GPUs that share each clip; the groups share the prompts")
    add("--quirks", action="store_true", help="sample as the release does, Q4 to Q7: for the published weights")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    add("--debug", action="store_true", help="errors with their traceback")
    return parser.parse_args(argv)


def run(args):
    start, place = time.perf_counter(), start_processes(sp=args.sp, device=args.device)
    model, config = load_checkpoint(args.ckpt, place.device)
    model.group = place.group
    num_frames, height, width = default_bucket(config.buckets)
    num_frames = num_frames if args.num_frames is None else args.num_frames
    height, width = parse_size(args.size) if args.size else (height, width)
    fps = config.fps if args.fps is None else args.fps
    interval = int(stride(fps, config))
    references = read_references(args.reference, len(args.prompt), args.reference_frames, interval)
    steps = DEFAULT_STEPS[args.sampler] if args.steps is None else args.steps
    cfg_scale = config.cfg_scale if args.cfg_scale is None else args.cfg_scale
    vae = load_vae(find(config.vae), device=place.device)
    text_encoder = load_text_encoder(find(config.text_encoder), config.model.model_max_length,
                                     dtype=weight_dtype(config, place.device), device=place.device)
    for prompt in args.prompt if place.rank == 0 else ():
        if unknown := text_encoder.unknown(prompt):
            print(f"warning: the text encoder of {args.ckpt} does not know: {', '.join(unknown)}", file=sys.stderr)
    share, shares = place.share
    mine = lambda items: items[share::shares]
    if not mine(args.prompt):
        return
    videos = generate(model, vae, text_encoder, mine(args.prompt), num_frames=num_frames, height=height, width=width,
                      fps=fps, frame_interval=interval, steps=steps, sampler=args.sampler,
                      prediction=config.prediction, cfg_scale=cfg_scale, seed=args.seed, references=mine(references),
                      numbers=mine(range(len(args.prompt))), batch_size=args.batch_size,
                      quirks=RELEASED if args.quirks else SampleQuirks(raw_fps=config.raw_fps))
    for i, prompt, frames in zip(mine(range(len(args.prompt))), mine(args.prompt), videos, strict=True):
        if place.reads:                                                     # one of those who share the clip
            save(Path(args.out) / f"{i:02d}-{slug(prompt)}", frames, fps / interval)
    seconds = time.perf_counter() - start
    place.say(f"{len(args.prompt)} x {num_frames} frames, {steps} {args.sampler} steps: {seconds:.1f} s, with loading")


def save(stem, frames, fps):
    """An .mp4 (unless it is a still image) and a .png that shows all frames side by side, row by row."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    T, H, W, _ = frames.shape
    if T > 1:
        write_video(f"{stem}.mp4", frames, fps)
        print(f"{stem}.mp4  {T} frames of {H}x{W}, {fps:g} per second")
    write_video(f"{stem}.png", frames, fps)
    print(f"{stem}.png  " + ("the image" if T == 1 else "the same frames in reading order"))


def main():
    args = parse_args()
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        if args.debug:
            raise
        sys.exit(fail(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    from sample import main; main()
