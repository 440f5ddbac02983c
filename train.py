"""Trains the ST-DiT, on clips or on their cached latents.

    python train.py configs/tiny.py                                     the shapes world, 9 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 train.py configs/stage1.py --data=clips/meta.csv
    python train.py configs/stage2.py --plan --world=64 --gpu=h800      what a run would take, before a GPU is rented

writes <run>/config.py, clips.txt, log.jsonl, validation.jsonl, bad_clips.csv, samples/step-0000500.png, step-0000500/
(weights, optimizer and EMA, sharded), model.safetensors (the EMA).  The same command goes on from the last checkpoint;
another --out starts over.  A single process is a process group of one.  The clips of a step, their noise, t, masks and
caption drops are functions of (seed, step, slot of the global batch): resumed, or on other GPUs, a run sees the same.

Papers: DDPM (arXiv 2006.11239), improved DDPM (2102.09672), v-prediction (2202.00512), SpeeD (2405.17403),
ZeRO (1910.02054), activation checkpointing (1604.06174), sequence parallelism in the manner of DSP (2403.10266).
"""
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main(): Ctrl-C shows no traceback of a half-done import
import gc
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange, reduce
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import configs
from kernels import Place, all_frames, own_frames, start_processes, use
from data import (BadClips, Bucket, BucketSampler, ClipDataset, Parser, batches, fail, read_meta, slot_generator,
                  stride, to_video, uniform, whole, write_video)
from masks import draw_mask
from model import QUIRKS, STDiT, check_weights, example_inputs, from_pixart
from sample import SampleQuirks, default_bucket, fetch, find, generate, noise_schedule, usual_aspect
from vae import CachedClips, fingerprint as weights_name, load_text_encoder, load_vae, remember, write_cache

LOG_EVERY = 10


# ---------------------------------------------------------------- the loss
def diffusion_vectors(alphas_cumprod):
    """What the loss reads at t: vectors [1000] in fp64 from abar, eqs. 4-7 of DDPM and 10 of improved DDPM."""
    abar = alphas_cumprod.double()
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / abar_prev
    posterior_variance = beta * (1 - abar_prev) / (1 - abar)                # 0 at t = 0: its logarithm is that of t = 1
    log_low = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
    return {
        "sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(), "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_mean_coef1": beta * abar_prev.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar),
        "log_variance_low": log_low, "log_variance_span": beta.log() - log_low,     # 8e-7 at t = 999, not found in fp32
    }


def q_sample(vectors, x_0, t, noise):
    """Eq. 4 of DDPM: x_t of x_0 [B C T h w] at t [B T], each frame at its own time."""
    at = lambda name: rearrange(vectors[name][t].to(x_0), "b t -> b 1 t 1 1")
    return at("sqrt_alphas_cumprod") * x_0 + at("sqrt_one_minus_alphas_cumprod") * noise


def diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, prediction="eps"):
    """Eq. 16 of improved DDPM, L_simple + L_vlb, per clip: {"loss", "mse", "vb"} of [B]; vb in bits per value.

    out [B 2C T h w]: eps or v, and the variance channels.  x_mask [B T]: only noised frames count; a clip without
    one has loss 0.  The gradient of the bound reaches the variance channels only."""
    answer, variance = out.float().chunk(2, dim=1)
    at = lambda name: rearrange(vectors[name][t].to(x_0), "b -> b 1 1 1 1")
    a, s = at("sqrt_alphas_cumprod"), at("sqrt_one_minus_alphas_cumprod")
    target = noise if prediction == "eps" else a * noise - s * x_0
    eps = answer if prediction == "eps" else a * answer + s * x_t
    bits = variational_bits(at, x_0, x_t, eps.detach(), variance, t)
    mse, vb = (mean_of_noised(error, x_mask) for error in ((answer - target) ** 2, bits))
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def mean_of_noised(error, x_mask):
    """[B C T h w] -> [B]: the mean over frames with x_mask [B T] True, 0 if there are none."""
    per_frame = reduce(error, "b c t h w -> b t", "mean") * x_mask
    return per_frame.sum(1) / x_mask.sum(1).clamp(min=1)


def variational_bits(at, x_0, x_t, eps, variance, t):
    """KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) in bits per value; at t = 0 the decoder's -log p(x_0) (DDPM 3.3)."""
    x_0_hat = at("sqrt_recip_alphas_cumprod") * x_t - at("sqrt_recipm1_alphas_cumprod") * eps
    posterior_mean = lambda x: at("posterior_mean_coef1") * x + at("posterior_mean_coef2") * x_t
    more = (variance + 1) / 2 * at("log_variance_span")                 # -1..1 spans the two bounds, eq. 15 of iDDPM
    log_var = at("log_variance_low") + more
    mean, true_mean = posterior_mean(x_0_hat), posterior_mean(x_0)
    kl = 0.5 * (more - 1 + (-more).exp() + (true_mean - mean) ** 2 * (-log_var).exp())
    nll = -discretised_log_likelihood(x_0, mean, 0.5 * log_var)
    return torch.where(rearrange(t, "b -> b 1 1 1 1") == 0, nll, kl) / math.log(2)


def discretised_log_likelihood(x, mean, log_scale):
    """log of the Gaussian's mass in a bin of width 2/255 around x; eq. 13 of DDPM, the normal distribution by tanh."""
    cdf = lambda u: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u ** 3)))
    inverse = torch.exp(-log_scale)
    above, below = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def speed_probabilities(vectors):
    """SpeeD's distribution of t [1000] (arXiv 2405.17403, as Open-Sora 1.1 has it): 5 times more often where the noise
    still grows by more than 1e-4 a step, t < 641."""
    growth = torch.gradient(vectors["sqrt_one_minus_alphas_cumprod"].double())[0]
    p = torch.tanh(1e6 * (growth - 1e-4)) + 1.5
    return p / p.sum()


def draw_t(config, vectors, step, slots):
    """t [B], uniform over 0..999; with SpeeD an odd slot takes the dual of the even one before: 700 - t, or t - 700."""
    if not config.speed:
        return torch.from_numpy(uniform(config.seed, step, slots, "t") * 1000).long()
    u = torch.from_numpy(uniform(config.seed, step, slots // 2, "t"))
    t = torch.searchsorted(speed_probabilities(vectors).cumsum(0).cpu(), u).clamp(max=999)          # sync
    return torch.where(torch.as_tensor(slots) % 2 == 1, torch.where(t < 700, 700 - t, t - 700), t)


# ---------------------------------------------------------------- one batch
def to_latents(batch, vae, text_encoder, group=None):
    """Adds mean, std [B C T h w], y and y_mask to a batch of videos, as batches from the cache have them already.

    The ranks of a group, which share the clips, encode some frames each."""
    if "video" in batch:
        cut, video = text_encoder.cut, batch.pop("video")                   # [B T H W 3]
        own = to_video(own_frames(video, video.shape[1], group).to(vae.device))
        batch["mean"], batch["std"] = (all_frames(z, video.shape[1], group, dim=2) for z in vae.moments(own))
        batch["y"], batch["y_mask"] = text_encoder(batch.pop("text"))
        batch["cut"] = text_encoder.cut - cut
    return batch


def loss_of(model, batch, config, vectors, step, device):
    """Per-clip losses {"loss", "mse", "vb"} and t, all [B]; every random number is the slot's own."""
    slots, shape = batch["slots"].numpy(), batch["mean"].shape
    generators = [slot_generator(config.seed, step, int(slot), "noise") for slot in slots]
    x_mask = torch.stack([draw_mask(shape[2], config.mask_ratios, g) for g in generators])
    posterior, noise = torch.stack([torch.randn(2, *shape[1:], generator=g) for g in generators]).to(device).unbind(1)
    t = draw_t(config, vectors, step, slots)
    drop = torch.from_numpy(uniform(config.seed, step, slots, "drop") < config.model.class_dropout_prob)
    told_mask = None if x_mask.all() else x_mask.to(device)                 # known on the CPU, as is y_mask: no sync
    y, y_mask = batch["y"].to(device), batch["y_mask"].cpu() | drop[:, None]
    x_mask, t, drop = x_mask.to(device), t.to(device), drop.to(device)
    y = torch.where(drop[:, None, None], model.null_y.to(y.dtype), y)       # the null caption: all its tokens count
    x_0 = batch["mean"].to(device) + batch["std"].to(device) * posterior
    x_t = q_sample(vectors, x_0, torch.where(x_mask, t[:, None], 0), noise)  # given frames are at t = 0, as upstream
    told = {name: batch[name].to(device) for name in ("height", "width", "num_frames", "ar", "fps")}
    out = model(x_t, t, y, y_mask, x_mask=told_mask, **told)
    terms = diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, config.prediction)
    if config.speed:                                                        # 1 / (1 + SNR), on the squared error only
        terms["loss"] = terms["mse"] * (vectors["sqrt_one_minus_alphas_cumprod"][t] ** 2).to(x_0) + terms["vb"]
    return terms, t


# ---------------------------------------------------------------- model, optimizer, EMA on a mesh
class Run(NamedTuple):
    """What the steps work on."""
    config: configs.Config
    place: Place
    model: STDiT
    optimizer: torch.optim.Optimizer
    ema: "Average"

    @property
    def folder(self):
        return Path(self.config.out)


def make_run(config, place):
    """A Run with fresh weights."""
    model = build_model(config, place.mesh)
    model.group = place.group
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    return Run(config, place, model, optimizer, Average(model, config.ema_decay))


def build_model(config, mesh):
    """The STDiT with fp32 weights, sharded over a mesh block by block (FSDP2), that computes in config.dtype."""
    with torch.device("meta"):
        model = STDiT(config.model)
    checkpoint_blocks(model, config.checkpointing)
    shard = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(
        config.torch_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))     # t, sizes and angles stay fp32
    for block in model.blocks:
        if config.compile:
            block.compile()
        shard(block, reshard_after_forward=block is not model.blocks[-1])
    shard(model)
    model.to_empty(device=mesh.device_type)
    model.init_weights(config.seed)
    return model


def checkpoint_blocks(model, every):
    """Each every-th block keeps its input only, and is computed again in backward (arXiv 1604.06174); 0 = none."""
    for block in model.blocks[::every] if every else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def find_weights(name):
    """Where the weights that a run starts from are: a file or folder, else from the hub; FileNotFoundError."""
    path = Path(find(name))
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        return path
    return fetch(name, ["transformer/*", "config.json", "model.safetensors"],
                 f"init={str(name)!r} is not there, expected a run's folder, a model.safetensors, or PixArt's or "
                 "Open-Sora's weights: a .pth (PixArt's), a folder, or its name on the hub")


def start_from(run, path):
    """Weights and EMA, with config.init_optimizer also Adam's state, of another run; or weights alone of a file."""
    checkpoint, config = latest(path), run.config
    run.place.say(f"starts from {checkpoint or path}")
    if checkpoint:
        old = replace(configs.load(path / "config.py").model, class_dropout_prob=config.model.class_dropout_prob)
        if old != config.model:
            raise ValueError(f"init={str(path)!r} holds {old}, expected {config.model}")
        load_state(run, checkpoint, config.init_optimizer)
    elif config.init_optimizer:
        raise ValueError(f"init_optimizer=True: {path} holds weights only, expected a run's folder with checkpoints")
    else:
        off = [f"--model.{name}=True" for name in QUIRKS if not getattr(config.model, name)]
        if off and all((path / name).is_file() for name in ("config.json", "model.safetensors")):
            run.place.say(f"note: Open-Sora's weights were trained with what this config has off: {' '.join(off)}")
        load_weights(run.model, path, config.seed)
        run.ema.restart()


def load_weights(model, path, seed=0):
    """Into a sharded model: a model.safetensors, or a folder with one (a run's, Open-Sora's), or PixArt-alpha's, a .pth
    as it was published or a folder in diffusers' layout; what that lacks is drawn from the seed."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path            # PixArt's folders have none
    pixarts = path.suffix == ".pth" or (path.is_dir() and not file.is_file())
    weights = from_pixart(path, model.config, seed) if pixarts else load_file(file)
    check_weights(model, weights, path)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))               # collective


class Average:
    """Exponential moving average of the trained weights, sharded as they are."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, model
        self.restart()

    def restart(self):
        """From the model's weights as they are."""
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def update(self, step):
        """The decay grows as (1 + step) / (10 + step) up to its value: the first weights do not linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = [p.to_local() for p in self.model.parameters()]
        torch._foreach_lerp_([w.to_local() for w in self.weights.values()], own, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchanges the model's weights and the average; twice is no change."""
        for module in (self.model, self.model.blocks[-1]):                  # these keep what they last gathered
            module.reshard()
        for p, w in zip(self.model.parameters(), self.weights.values()):
            kept = p.to_local().clone()
            p.to_local().copy_(w.to_local())
            w.to_local().copy_(kept)


# ---------------------------------------------------------------- checkpoints
class Checkpoints:
    """<run>/step-0000500/ with weights, optimizer and EMA; `latest` names the last; see config.keep_last.

    A save copies the state and returns; threads write it under another name, fsync, rename.  Their collectives go
    through a group of their own, past those of the training."""

    def __init__(self, run):
        self.run, self.folder, self.part = run, run.folder, run.folder / ".saving"
        self.group, self.thread, self.pending = dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None

    def save(self, step):
        """Returns the seconds that the steps stood still for it."""
        start, run = time.perf_counter(), self.run
        self.wait()
        if run.place.rank == 0:
            shutil.rmtree(self.part, ignore_errors=True)
        dist.barrier()                                                      # collective
        state = {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
                 "ema": run.ema.weights | dict(run.model.named_buffers())}
        written = dcp.async_save(state, checkpoint_id=self.part, process_group=self.group)
        self.pending = self.thread.submit(self.finish, written, step)
        return time.perf_counter() - start

    def wait(self):
        """Until what is being saved is whole, or for good is not: then why."""
        return self.pending and self.pending.result()

    def finish(self, written, step):
        config, leads = self.run.config, self.run.place.rank == 0
        try:
            written.result()
            if leads:
                self.name(f"step-{step:07d}")
        except (CheckpointException, OSError) as error:                     # a full disk, say
            free = shutil.disk_usage(self.folder).free / 2**30
            failed = f"step {step} could not be saved: {cause(error)}, {free:.1f} GiB of the disk are free"
            if leads:
                shutil.rmtree(self.part, ignore_errors=True)                # makes room
                again = min((step // config.save_every + 1) * config.save_every, config.steps)
                print(f"\n{failed} - {latest(self.folder) or 'none before it'} is whole"
                      + f"; the next save is tried at step {again}" * (step < config.steps), file=sys.stderr)
            return failed

    def name(self, name):
        folder, config = self.folder / name, self.run.config
        shutil.rmtree(folder, ignore_errors=True)                           # a checkpoint that `latest` never named
        self.part.replace(folder)
        write_text(self.folder / "latest", name)
        for old in sorted(p for p in self.folder.glob("step-*") if p <= folder)[:-config.keep_last]:
            if not config.keep_every or int(old.name.split("-")[1]) % config.keep_every:
                shutil.rmtree(old)
        export(folder, self.folder / "model.safetensors")


def cause(error):
    """What a CheckpointException, which is no Exception, wraps; of other errors, themselves."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def latest(folder):
    """The path of a run's last whole checkpoint, or None."""
    file = Path(folder) / "latest"
    return file.with_name(file.read_text("utf-8").strip()) if file.is_file() else None


def load_state(run, checkpoint, optimizer=True):
    """Weights, EMA and, where told, the optimizer's state; its lr, betas and decay stay the config's."""
    state = {"model": run.model.state_dict(), "ema": run.ema.weights}       # the tensors themselves: filled in place
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(run.model, run.optimizer)
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} cannot be read: {cause(error)} - write the name of an older checkpoint into "
                         f"{checkpoint.parent / 'latest'}, or start over with another --out") from error
    if optimizer:
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        for group in run.optimizer.param_groups:
            group.update(betas=run.config.betas, weight_decay=run.config.weight_decay)


FREE_TO_CHANGE = {  # when a run goes on: what the next losses do not hang on
    "steps", "data", "num_workers", "read_timeout", "max_bad", "cache", "checkpointing", "compile", "shard", "sp",
    "accumulation", "out", "init", "init_optimizer", "skip_nonfinite", "save_every", "keep_last", "keep_every",
    "sample_every", "prompts", "validate_every", "validate_batches"}


def check_changes(config, read, allowed, say):
    """Raises ValueError where a run's config, or what it read (fingerprint), was another before, unless allowed."""
    folder = Path(config.out)
    old, clips = configs.load(folder / "config.py"), folder / "clips.txt"
    pairs = {f.name: (getattr(old, f.name), getattr(config, f.name)) for f in fields(config)}
    changes = {name: f"{name} {before!r} -> {now!r}" for name, (before, now) in pairs.items() if before != now}
    if clips.is_file() and (before := clips.read_text("utf-8").splitlines()[0]) != read:
        changes["clips"] = f"the clips or networks: {before} -> {read}"
    if changes:
        say("changed since the last start: " + ", ".join(changes.values()))
    refused = ", ".join(text for name, text in changes.items() if name not in FREE_TO_CHANGE)
    if refused and not (allowed and old.model == config.model):
        raise ValueError(f"{latest(folder)} would go on otherwise than it began: {refused} - undo that, or start over "
                         "with another --out" + ", or add --allow-changes" * (old.model == config.model))


def fingerprint(meta, vae, text_encoder):
    """One line that tells clips (paths, sizes and order, not the folder that they are in) and networks from others."""
    digest = 0
    for name in ("key", "num_frames", "height", "width", "fps", "size"):
        digest = zlib.crc32(np.ascontiguousarray(meta[name]), digest)
    nets = "".join(weights_name(net.state_dict()) for net in (vae.net, text_encoder.net))
    return f"{len(meta)} clips, checksum {digest:08x}, networks {zlib.crc32(nets.encode()):08x}"


def export(checkpoint, path):
    """The EMA of a checkpoint as one file, whole, in fp32, as sample.py and --init read it.  No collective."""
    held = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    ema = {name: torch.empty(of.size) for name, of in held.items() if name.startswith("ema.")}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # as no_dist asks for
    dcp.load(ema, checkpoint_id=checkpoint, no_dist=True)
    with whole(path) as part:
        save_file({name.removeprefix("ema."): value for name, value in ema.items()}, part)


def write_text(path, text):
    with whole(path) as part:
        part.write_text(text, "utf-8")


# ---------------------------------------------------------------- seeing
class Log:
    """Averages since the last line over all ranks: loss, mse, vb, loss by quarter of t; clips, tokens, decoded frames a
    second, TFLOP/s of a GPU, the shares of the time spent waiting for data and for saves; and bad_clips.csv."""

    def __init__(self, run, first):
        config, self.place, self.cost = run.config, run.place, run.config.cost
        leads = run.place.rank == 0 and run.folder.is_dir()                 # --bench has no folder
        self.file, old = open_log(run.folder / "log.jsonl", first) if leads else (None, [])
        self.recent = deque((row["loss"] for row in old), SPIKE_WINDOW)
        self.bad = BadClips(run.folder / "bad_clips.csv", config.max_bad, writes=leads)
        self.bar = tqdm(total=config.steps, initial=first, desc=str(run.folder), unit="step", disable=not leads)
        self.board, self.sums = None, torch.zeros(18, dtype=torch.float64)
        self.faults, self.skipped, self.saving, self.start = [], 0, 0.0, time.perf_counter()
        with suppress(ImportError):                                         # TensorBoard, where it is installed
            if leads:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(run.folder, purge_step=first + 1)

    def add(self, batch, answers):
        """A step: its batch, and of each part the terms and t, [B] each, and the number of captions that were cut."""
        if not self.place.reads:
            return
        for terms, t, cut in answers:
            loss, mse, vb = (terms[name].detach().double() for name in ("loss", "mse", "vb"))
            quarter = torch.nn.functional.one_hot(t // 250, 4).double()     # [B 4]
            totals = torch.stack([torch.ones_like(loss), loss, mse, vb]).sum(1)
            self.sums[:12] += torch.cat([totals, loss @ quarter, quarter.sum(0)]).cpu()     # sync
            self.sums[12] += cut
        tokens, flop = (cost * len(batch["slots"]) for cost in self.cost(batch["bucket"]))
        self.sums[13:] += torch.tensor([batch["decoded"], batch["waited"], len(batch["faults"]), tokens, flop])
        self.faults += batch["faults"]

    def line(self, step, **more):
        dist.all_reduce(self.sums)                                          # collective
        count, loss, mse, vb, *by_quarter, cut, decoded, waited, num_faults, tokens, flop = self.sums.tolist()
        mean = lambda total, n: total / n if n else None                    # all steps of a line may have been skipped
        now = time.perf_counter()
        seconds, tflop = now - self.start, flop / self.place.world / 1e12
        row = dict(step=step, loss=mean(loss, count), mse=mean(mse, count), vb=mean(vb, count),
                   loss_by_t=[*map(mean, by_quarter[:4], by_quarter[4:])], **more, clips_per_s=count / seconds,
                   tokens_per_s=tokens / seconds, decoded_per_s=decoded / seconds, tflop_per_s=tflop / seconds,
                   data_wait=waited / seconds / self.place.share[1], save_wait=self.saving / seconds,
                   captions_cut=int(cut), skipped=self.skipped, gib=peak_gib())
        self.bad.add(gather(self.faults) if num_faults else [], int(count))   # the same on all ranks, as is its error
        self.sums.zero_()
        self.faults, self.saving, self.start = [], 0.0, now
        if self.file:
            row |= {"spike": is_spike(row["loss"], self.recent), "faults": self.bad.faults}
            self.recent.append(row["loss"])
            print(json.dumps(row), file=self.file, flush=True)
            self.show(row)

    def show(self, row):
        if row["spike"]:
            self.bar.write(f"step {row['step']}: loss {row['loss']:.4f} is a spike, its median was "
                           f"{median(self.recent):.4f}; bucket {row['bucket']}")
        self.bar.update(row["step"] - self.bar.n)
        number = lambda x: "-" if x is None else f"{x:.3f}"
        rate, peak = row["tflop_per_s"], peak_flops()
        self.bar.set_postfix_str(" | ".join([
            f"loss {number(row['loss'])}", "by t " + " ".join(map(number, row["loss_by_t"])),
            f"grad {row['grad_norm']:.2f}", f"lr {row['lr']:.1e}", "{} x {}".format(*row["bucket"]),
            f"{row['clips_per_s']:.1f} clips/s", f"{row['tokens_per_s']:,.0f} tokens/s",
            f"MFU {rate * 1e12 / peak:.0%}" if peak else f"{rate:.2f} TFLOP/s",
            f"data {row['data_wait']:.0%}", f"save {row['save_wait']:.0%}",
            *([f"{row['gib']:.1f} GiB"] if row["gib"] else [])]))
        for name, value in row.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["step"])


SPIKE_WINDOW, SPIKE = 50, 10                # lines of the log; of their median distance from the median


def is_spike(loss, recent):
    """Whether a loss is far above those before it; not told from fewer than ten."""
    recent = [x for x in recent if x is not None]
    if loss is None or len(recent) < 10:
        return False
    middle = median(recent)
    return loss > middle + SPIKE * median(abs(x - middle) for x in recent)


def peak_gib():
    """The most of this GPU's memory so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def peak_flops():
    """Of this GPU, if it is one of configs.GPUS."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((card.flops for gpu, card in configs.GPUS.items() if gpu in name), None)


def gather(items):
    """The items of all ranks, in one list: a collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def open_log(path, first):
    """The log, to be appended to, and its rows.  Lines of steps that will be taken again are cut off."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
    write_text(path, "".join(lines))
    return open(path, "a", encoding="utf-8"), list(map(json.loads, lines))


class Validation:
    """The loss on held-out clips: the same clips, windows, noises and t each time and in each run; captions are not
    dropped, frames not given.  A line of validation.jsonl: loss, loss_by_t (quarters), loss_by_bucket."""

    def __init__(self, config, meta, place, first, encode):
        model = replace(config.model, class_dropout_prob=0.0)
        self.config = replace(config, model=model, seed=0, speed=False, mask_ratios={"mask_no": 1.0}, cache="",
                              windows=0)
        sampler = BucketSampler(meta, self.config, validation=True)
        clips = partial(batches, sampler, ClipDataset(meta, self.config, validation=True), 0, config.validate_batches)
        self.kinds = sorted({bucket[:2] for bucket in sampler.numbered})
        keep = lambda value: value.cpu() if torch.is_tensor(value) else value
        self.batches = [{name: keep(v) for name, v in encode(batch).items()} for batch in shared(clips, place)]
        self.file = open_log(Path(config.out) / "validation.jsonl", first)[0] if place.rank == 0 else None

    @torch.no_grad()
    def line(self, run, vectors, step):
        sums = torch.zeros(2, 4 + len(self.kinds), dtype=torch.float64)     # losses and their number, by t and by kind
        for i, batch in enumerate(self.batches):
            kind = 4 + self.kinds.index(batch["bucket"][:2])
            terms, t = loss_of(run.model, batch, self.config, vectors, i, run.place.device)
            for loss, quarter in zip(terms["loss"].tolist(), (t // 250).tolist()):                      # sync
                sums[:, [quarter, kind]] += torch.tensor([[loss], [1.0]], dtype=torch.float64)
        dist.all_reduce(sums)                                               # collective
        means = [loss / count if count else None for loss, count in sums.T.tolist()]
        if self.file:
            by_bucket = {f"{level} x {t}": loss for (level, t), loss in zip(self.kinds, means[4:]) if loss is not None}
            row = {"step": step, "loss": (sums[0, :4].sum() / sums[1, :4].sum()).item(), "loss_by_t": means[:4]}
            print(json.dumps(row | {"loss_by_bucket": by_bucket}), file=self.file, flush=True)


def preview(run, vae, text_encoder, step):
    """samples/step-0000500.png: one row of frames per prompt, sampled with the EMA."""
    config, (num_frames, height, width) = run.config, default_bucket(run.config.trained)
    run.ema.swap()
    videos = generate(run.model, vae, text_encoder, list(config.prompts), num_frames=num_frames, height=height,
                      width=width, fps=config.fps, frame_interval=int(stride(config.fps, config)), steps=50,
                      prediction=config.prediction, cfg_scale=config.cfg_scale, seed=config.seed,
                      quirks=SampleQuirks(raw_fps=config.raw_fps))
    run.ema.swap()
    if run.place.rank == 0:
        write_video(run.folder / "samples" / f"step-{step:07d}.png", rearrange(videos, "b t h w c -> (b t) h w c"))


# ---------------------------------------------------------------- the loop
def parse_args():
    parser = Parser(
        usage="python train.py CONFIG [options] [--field=value ...]", description=__doc__,
        epilog="any field of the config is --field=value, as in --lr=1e-5:\n\n" + configs.fields_text())
    parser.add_argument("config", metavar="CONFIG", help="configs/tiny.py, or the config.py of a run")
    add = parser.add_argument_group("instead of training").add_argument
    add("--print", action="store_true", help="the config, as a file that can be run")
    add("--plan", action="store_true", help="memory, traffic and time that the run would take; no GPU is needed")
    add("--search", action="store_true", help="batch sizes that fit, measured on a GPU, without one by the plan")
    add("--gpu", default="h800", help=f"of --plan and --search: {', '.join(configs.GPUS)} (default: %(default)s)")
    add("--gpus", type=int, help="how many of them (default: the config's world)")
    add("--bench", action="store_true", help="time and memory of a step of each bucket, on random latents")
    add("--profile", metavar="FILE", help="--bench, and a trace for chrome://tracing or Perfetto")
    add = parser.add_argument_group("training").add_argument
    add("--plain", action="store_true", help="each op as PyTorch has it: slower, takes more memory")
    add("--allow-changes", action="store_true", help="go on with another config or other clips")
    add("--debug", action="store_true", help="errors with their traceback")
    return parser.parse_known_args()


def main():
    args, overrides = parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config, rank = None, int(os.environ.get("RANK", 0))
    try:
        config = configs.load(args.config, overrides)
        gpus = args.gpus or config.world
        if args.print:
            print(configs.dump(config), end="")
        elif args.plan:
            print(configs.plan(config, gpus, args.gpu, shares_of_steps(config)))
        elif args.search:
            search(config, gpus, args.gpu, args.plain)
        elif args.bench or args.profile:
            bench(config, args.profile, args.plain)
        elif number := train(config, args.allow_changes, args.plain):
            sys.exit(128 + number)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt:
        if rank == 0:
            where = config and latest(config.out)
            print(f"\nstopped{f'; the same command goes on from {where}' if where else ''}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config, allow_changes=False, plain=False):
    """Trains to config.steps; returns 0, or the number of the signal that stopped it after a checkpoint."""
    place, folder = start_processes(config.shard, config.sp), Path(config.out)
    place.say(use(place.device, plain))
    meta = rank0_first(lambda: read_meta(config.data))                      # which builds the index
    sampler, checkpoint = BucketSampler(meta, config), latest(folder)
    place.say(sampler.table())
    init = rank0_first(lambda: find_weights(config.init)) if config.init and not checkpoint else None
    first = int(checkpoint.name.split("-")[1]) if checkpoint else 0

    vae = load_vae(find(config.vae), config.torch_dtype, place.device)
    text_encoder = load_text_encoder(find(config.text_encoder), config.model.model_max_length, config.torch_dtype,
                                     place.device, config.captions_cleaned)
    read = fingerprint(meta, vae, text_encoder)
    if checkpoint:
        check_changes(config, read, allow_changes, place.say)
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.py", configs.dump(config))
        write_text(folder / "clips.txt", f"{read}\n{sampler.table()}\n")
    encode = partial(to_latents, vae=vae, text_encoder=text_encoder, group=place.group)
    validation = Validation(config, meta, place, first, encode) if config.validate_every else None
    prompts = remember(lambda encoder=text_encoder: encoder, config.prompts)
    dataset = ClipDataset(meta, config)
    if config.cache:
        patient = dist.new_group(backend="gloo", timeout=timedelta(weeks=4))   # ranks end writing hours apart
        index = write_cache(meta, config, vae, text_encoder, place.rank, place.world, patient)
        dataset, encode = CachedClips(meta, config, index), dict
    del text_encoder                                                        # with a cache, it is gone here

    run = make_run(config, place)
    if checkpoint:
        load_state(run, checkpoint)
    elif init:
        start_from(run, init)
    place.say(f"{sum(w.numel() for w in run.ema.weights.values()):,} parameters, {place.world} x {place.device.type}, "
              f"{config.dtype}, steps {first} to {config.steps}")
    log, checkpoints = Log(run, first), Checkpoints(run)
    show = partial(preview, run, vae, prompts) if config.prompts and config.sample_every else None
    clips = shared(partial(batches, sampler, dataset, first, config.steps, known=log.bad.known), place)
    try:
        return take_steps(run, first, clips, log, encode, checkpoints, show, validation)
    finally:
        checkpoints.wait()


def take_steps(run, first, clips, log, encode=dict, checkpoints=None, show=None, validation=None):
    """The loop: a step per batch of clips; returns 0, or the number of the signal that stopped it."""
    config, place, model, optimizer = run.config, run.place, run.model, run.optimizer
    trained = optimizer.param_groups[0]["params"]
    vectors = {n: v.to(place.device) for n, v in diffusion_vectors(noise_schedule().alphas_cumprod).items()}
    signals, stop = note_signals(place.say), 0
    for step, batch in enumerate(clips, start=first):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup_steps))
        level, num_frames, _ = bucket = batch["bucket"]
        whole_batch = config.buckets[level][num_frames][1] * config.world
        parts = cut(batch, min(config.accumulation, whole_batch // place.share[1]))     # as many on every rank
        answers = []
        for i, part in enumerate(parts):
            model.set_requires_gradient_sync(i == len(parts) - 1)
            part = encode(part)
            terms, t = loss_of(model, part, config, vectors, step, place.device)
            (terms["loss"].sum() * place.world / whole_batch).backward()    # FSDP averages over all ranks
            answers.append((terms, t, part.get("cut", 0)))
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).full_tensor().item()      # collective, sync
        if math.isfinite(norm):
            optimizer.step()
            run.ema.update(step)
        else:
            refuse(step, bucket, answers, config, log)                      # collective
            answers = []
        log.add(batch, answers)                                             # sync
        optimizer.zero_grad(set_to_none=True)

        done, stop = step + 1, highest(signals[0] if signals else 0)        # collective
        saves = checkpoints and (done % config.save_every == 0 or done == config.steps or stop)
        if done % LOG_EVERY == 0 or saves:                                  # resumed, its lines average the same steps
            log.line(done, grad_norm=norm, lr=group["lr"], bucket=bucket)
        if saves:
            log.saving += checkpoints.save(done)
        if show and done % config.sample_every == 0:
            show(done)
        if validation and done % config.validate_every == 0:
            validation.line(run, vectors, done)
        if stop:
            break
    if checkpoints and (failed := checkpoints.wait()):
        raise ValueError(f"{failed} - the same command goes on from {latest(run.folder) or 'the start'}")
    if checkpoints and stop:
        place.say(f"\nsaved step {done} and stopped; the same command goes on from there")
    return stop


def refuse(step, bucket, answers, config, log):
    """A step whose gradient is not finite is skipped, config.skip_nonfinite times; then it is an error of all ranks."""
    log.skipped += 1
    odd = gather([f"rank {dist.get_rank()} loss {loss} at t = {t}" for terms, ts, _ in answers
                  for loss, t in zip(terms["loss"].tolist(), ts.tolist()) if not math.isfinite(loss)])
    said = f"step {step}: the gradient of bucket {tuple(bucket)} is not finite, " + (
        f"{len(odd)} losses are not: {', '.join(odd[:4])}" if odd else "all losses are")
    if log.skipped > config.skip_nonfinite:
        raise ValueError(f"{said}; nothing of it is saved - an lr below {config.lr} or dtype fp32 may help, "
                         f"--skip_nonfinite={config.skip_nonfinite + 10} goes past it")
    log.place.say(f"\n{said}; skipped, {config.skip_nonfinite - log.skipped} more may be")


def shared(read, place):
    """What read(rank=, world=) yields on the first of a group, on all of it: they would not all give up a slow clip."""
    clips = read(rank=place.share[0], world=place.share[1]) if place.reads else iter(())
    while True:
        parcel = [next(clips, None)]
        if place.group:
            dist.broadcast_object_list(parcel, group=place.group, group_src=0)          # collective
        if parcel[0] is None:
            return
        yield parcel[0]


# ---------------------------------------------------------------- what a step takes
def stopwatch(config, plain=False):
    """(place, measure): measure(kind, clips, steps=10) -> (seconds, GiB) of a step of the loop on random latents of one
    (resolution, frames), `clips` for each rank or group; (inf, None) where memory does not do."""
    place = start_processes(config.shard, config.sp)
    place.say(use(place.device, plain))
    runs = [make_run(replace(config, out=os.devnull, world=place.share[1]), place)]     # no folder, so no log

    def measure(kind, clips, steps=10):
        told = replace(runs[0].config, buckets={kind[0]: {kind[1]: (1.0, clips)}})
        run, bucket = runs[0]._replace(config=told), Bucket(*kind, usual_aspect(kind[0]))
        try:
            batch = synthetic(run, bucket)
            for count in (2, steps):                                        # the first two are for warming up
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                if take_steps(run, 0, (dict(batch) for _ in range(count)), Log(run, 0)):
                    raise KeyboardInterrupt
            return (time.perf_counter() - start) / steps, peak_gib()
        except torch.OutOfMemoryError:
            base = runs.pop().config                                        # what FSDP holds half way is not to be used
        del run                                                             # here, as the error held it, too
        gc.collect()
        runs.append(make_run(base, place))
        return math.inf, None

    return place, measure


def synthetic(run, bucket):
    """A rank's batch of random latents and captions of half the tokens; the same for a group."""
    model, (share, shares) = run.config.model, run.place.share
    B, L = run.config.buckets[bucket.resolution][bucket.num_frames][1], model.model_max_length
    torch.manual_seed(share)
    told = example_inputs(model, B, bucket.num_frames, bucket.height // 8, bucket.width // 8, L)
    return told | {"mean": told["x"], "std": torch.ones_like(told["x"]),
                   "y_mask": (torch.arange(L) < L // 2).expand(B, -1), "slots": torch.arange(share, B * shares, shares),
                   "bucket": bucket, "faults": [], "decoded": 0, "waited": 0}


def bench(config, trace=None, plain=False):
    """Times a step of each bucket.  trace: a file for three steps of the last bucket, as torch's profiler sees them."""
    place, measure = stopwatch(config, plain)
    name, peak = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU", peak_flops()
    place.say(f"{place.world} x {name}, {config.dtype}, checkpointing {config.checkpointing}, compile {config.compile},"
              f" accumulation {config.accumulation}, sp {config.sp}\n"
              "      bucket      clips  s/step  tokens/s/GPU  TFLOP/s/GPU    MFU  peak GiB")
    for (level, t), clips in config.trained.items():
        seconds, gib = measure((level, t), clips)
        if seconds == math.inf:
            place.say(f"{level:>6} x {t:<3} {clips:10}  out of memory")
            continue
        tokens, flop = (n * clips / config.sp / seconds for n in config.cost(Bucket(level, t, usual_aspect(level))))
        place.say(f"{level:>6} x {t:<3} {clips:10} {seconds:7.3f} {tokens:13,.0f} {flop / 1e12:12.2f} "
                  f"{f'{flop / peak:.1%}' if peak else '-':>6} {f'{gib:.1f}' if gib else '-':>9}")
    if trace:
        with torch.profiler.profile() as profile:
            measure((level, t), clips, steps=3)
        if place.rank == 0:
            profile.export_chrome_trace(trace)
        place.say(profile.key_averages().table(sort_by=f"self_{place.device.type}_time_total", row_limit=12,
                                               max_name_column_width=40))


def search(config, gpus, gpu, plain=False):
    """Prints the batch sizes that fit: measured on the GPUs at hand, or without one by the plan's model of `gpu`."""
    if not torch.cuda.is_available():
        print(configs.search(config, gpus, gpu))
        return
    place, measure = stopwatch(config, plain)
    seconds = lambda kind, clips: highest(measure(kind, clips, 3)[0])       # what one cannot hold, none may
    place.say(configs.search(config, place.world, gpu, seconds))


def shares_of_steps(config):
    """{(resolution, frames): steps of an epoch}, where the clips are at hand; else None."""
    try:
        sampler = BucketSampler(read_meta(config.data), config)
    except FileNotFoundError as error:
        print(f"{error} - so each resolution and length is planned an equal share of the steps")
        return None
    return Counter(sampler.numbered[number][:2] for number in sampler.epoch(0).buckets)


def cut(batch, n):
    """A batch's clips in n parts, as dicts of what loss_of needs."""
    by_clip = {name: value for name, value in batch.items() if name not in ("bucket", "faults", "decoded", "waited")}
    return [{name: value[i::n] for name, value in by_clip.items()} for i in range(n)]


def note_signals(say):
    """A list that gets the number of a SIGTERM or SIGINT (Ctrl-C) when one comes; a second one acts as ever."""
    numbers, usual = [], {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

    def note(number, _):
        numbers.append(number)
        signal.signal(number, usual[number])
        say("\nstopping after this step; once more to stop at once")

    for number in usual:
        signal.signal(number, note)
    return numbers


def highest(number):
    """Of all ranks; a collective."""
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def rank0_first(make):
    """make() on rank 0, then on the others, which find what it wrote."""
    if dist.get_rank() == 0:
        made = make()
    dist.barrier()
    return made if dist.get_rank() == 0 else make()


if __name__ == "__main__":
    from train import main; main()
