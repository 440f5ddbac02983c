"""Trains the ST-DiT: `python train.py configs/tiny.py`, or `torchrun --nproc-per-node 8 train.py configs/stage1.py`.

in    a config (configs/__init__.py), any field replaced by --field=value; its clips, or their cached latents
out   <run>/config.py, clips.txt, log.jsonl, validation.jsonl, bad_clips.csv, step-0000500/ (sharded),
      samples/step-0000500.png, model.safetensors (the EMA)

The same command goes on from the last checkpoint; another --out starts over.  --print shows the config, --plan what the
run will take, --bench the time of a step.
One code path: a single process is a process group of one.  The clips of a step, their noise, t, masks and caption drops
are functions of (seed, step, slot of the global batch), so a resumed run, or one on other GPUs, sees the same.

Papers: DDPM (arXiv 2006.11239), improved DDPM (2102.09672), v-prediction (2202.00512), SpeeD (2405.17403),
ZeRO (1910.02054), activation checkpointing (1604.06174).
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange, reduce
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import configs
from data import (BadClips, Bucket, BucketSampler, ClipDataset, batches, fail, name_key, read_meta, slot_generator,
                  stride, to_video, uniform, write_video)
from masks import draw_mask
from model import STDiT, from_pixart
from sample import SampleQuirks, default_bucket, find, generate, noise_schedule, usual_aspect
from vae import CachedClips, load_text_encoder, load_vae, write_cache

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
        return torch.from_numpy(uniform(config.seed, step, slots, name_key("t")) * 1000).long()
    u = torch.from_numpy(uniform(config.seed, step, slots // 2, name_key("t")))
    t = torch.searchsorted(speed_probabilities(vectors).cumsum(0).cpu(), u).clamp(max=999)          # sync
    return torch.where(torch.as_tensor(slots) % 2 == 1, torch.where(t < 700, 700 - t, t - 700), t)


# ---------------------------------------------------------------- one batch
def to_latents(batch, vae, text_encoder):
    """Adds mean, std [B C T h w], y and y_mask to a batch of videos, as batches from the cache have them already."""
    if "video" in batch:
        cut = text_encoder.cut
        batch["mean"], batch["std"] = vae.moments(to_video(batch.pop("video").to(vae.device)))
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
    drop = torch.from_numpy(uniform(config.seed, step, slots, name_key("drop")) < config.model.class_dropout_prob)
    told_mask = None if x_mask.all() else x_mask.to(device)                 # known on the CPU: no sync
    x_mask, t, drop = x_mask.to(device), t.to(device), drop.to(device)

    y, y_mask = batch["y"].to(device), batch["y_mask"].to(device)
    y = torch.where(drop[:, None, None], model.null_y.to(y.dtype), y)       # the null caption: all its tokens count
    y_mask = y_mask | drop[:, None]
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
    folder: Path
    rank: int
    world: int
    device: torch.device
    model: STDiT
    optimizer: torch.optim.Optimizer
    ema: "Average"

    def say(self, text):
        if self.rank == 0:
            print(text)


def make_run(config, rank, world, device, mesh):
    """A Run with fresh weights."""
    model = build_model(config, mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    return Run(config, Path(config.out), rank, world, device, model, optimizer, Average(model, config.ema_decay))


def start_processes(shard):
    """(rank, world, device, mesh).  Without torchrun the world is one process; its collectives run all the same.

    The mesh is 1-D, or with shard (HSDP) replicas x shard: weights are cut among `shard` GPUs that are neighbours."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    if world % (shard or world):
        raise ValueError(f"shard={shard} on {world} GPUs: expected a divisor of {world}, or 0 for all")
    replicated = shard and shard < world
    mesh = init_device_mesh(device.type, (world // shard, shard) if replicated else (world,),
                            mesh_dim_names=("replicas", "shard") if replicated else ("shard",))
    return dist.get_rank(), world, device, mesh


def build_model(config, mesh):
    """The STDiT on a mesh: fp32 weights, sharded block by block, computing in config.dtype."""
    with torch.device("meta"):
        model = STDiT(config.model)
    checkpoint_blocks(model, config.checkpointing)
    for block in model.blocks if config.compile else ():
        block.compile()
    shard_blocks(model, mesh, config.torch_dtype)
    model.to_empty(device=mesh.device_type)
    model.init_weights(config.seed)
    return model


def checkpoint_blocks(model, every):
    """Each every-th block keeps its input only, and is computed again in backward (arXiv 1604.06174); 0 = none."""
    for block in model.blocks[::every] if every else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard_blocks(model, mesh, dtype):
    """FSDP2, a group of parameters per block.  The inputs are not cast: t, sizes and rotary angles stay fp32."""
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=block is not model.blocks[-1])
    fully_shard(model, mesh=mesh, mp_policy=policy)


def load_weights(model, path, seed=0):
    """The weights of model.safetensors, of a run's folder, or of PixArt-alpha, into a sharded model.

    PixArt's: a .pth as it was published, or a folder in diffusers' layout; what it lacks is drawn from the seed."""
    path = Path(path)
    if path.suffix == ".pth" or (path / "transformer").is_dir() or (path / "config.json").is_file():
        weights = from_pixart(path, model.config, seed)
    else:
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"init={str(path)!r} is not there, expected a model.safetensors, a run's folder, "
                                    "or PixArt's weights: a .pth or a folder in diffusers' layout")
        weights = load_file(path)
    own = model.state_dict()
    if set(weights) != set(own) or any(weights[k].shape != own[k].shape for k in own):
        odd = sorted(set(weights) ^ set(own)) or [k for k in own if weights[k].shape != own[k].shape]
        raise ValueError(f"{path} does not fit this config's model: {odd[0]} and {len(odd) - 1} more differ")
    with torch.no_grad():
        for name, value in own.items():
            full = weights[name].to(value.device, value.dtype)
            if isinstance(value, DTensor):                                  # src_data_rank=None: all have read the file
                full = distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(full)


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
def save(run, step):
    """<run>/step-0000500/: written under another name, then renamed; `latest` names it; see config.keep_last."""
    folder, name = run.folder, f"step-{step:07d}"
    part = folder / ".saving"
    if run.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state, "ema": run.ema.weights}, checkpoint_id=part)
    except CheckpointException as error:                                    # wraps what happened: a full disk, Ctrl-C
        raise next(iter(error.failures.values()))[0] from error
    export(run)
    if run.rank == 0:
        shutil.rmtree(folder / name, ignore_errors=True)                    # a checkpoint that `latest` never named
        part.replace(folder / name)
        write_text(folder / "latest", name)
        for old in sorted(p for p in folder.glob("step-*") if p.name <= name)[:-run.config.keep_last]:
            if not run.config.keep_every or int(old.name.split("-")[1]) % run.config.keep_every:
                shutil.rmtree(old)
    dist.barrier()


FREE_TO_CHANGE = {  # when a run goes on: what the next losses do not hang on
    "steps", "data", "num_workers", "read_timeout", "max_bad", "cache", "checkpointing", "compile", "shard",
    "accumulation", "out", "init", "save_every", "keep_last", "keep_every", "sample_every", "prompts",
    "validate_every", "validate_batches"}


def resume(run, meta, allow_changes):
    """The step to go on from: 0, or that of <run>/latest, whose state is loaded.

    Raises ValueError where the config or the clips are others than before, unless that is allowed."""
    folder, config = run.folder, run.config
    if not (folder / "latest").is_file():
        return 0
    name = (folder / "latest").read_text().strip()
    old = configs.load(folder / "config.py")
    if old.model != config.model:
        raise ValueError(f"{folder / name} holds {old.model}, expected {config.model} - start over with another --out")
    pairs = {f.name: (getattr(old, f.name), getattr(config, f.name)) for f in fields(config)}
    changes = {name: f"{name} {before!r} -> {now!r}" for name, (before, now) in pairs.items() if before != now}
    clips = folder / "clips.txt"
    if clips.is_file() and clips.read_text().splitlines()[0] != fingerprint(meta):
        changes["clips"] = f"the clips: {clips.read_text().splitlines()[0]} -> {fingerprint(meta)}"
    if changes:
        run.say("changed since the last start: " + ", ".join(changes.values()))
    if set(changes) - FREE_TO_CHANGE and not allow_changes:
        refused = ", ".join(text for name, text in changes.items() if name not in FREE_TO_CHANGE)
        raise ValueError(f"{folder / name} would go on otherwise than it began: {refused} - undo that, start over with "
                         "another --out, or add --allow-changes")
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "ema": run.ema.weights}
    dcp.load(state, checkpoint_id=folder / name)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(name.split("-")[1])


def fingerprint(meta):
    """One line that tells these clips from others: paths, sizes and order, not the folder that they are in."""
    digest = 0
    for name in ("key", "num_frames", "height", "width", "fps", "size"):
        digest = zlib.crc32(np.ascontiguousarray(meta[name]), digest)
    return f"{len(meta)} clips, checksum {digest:08x}"


def export(run):
    """<run>/model.safetensors: the EMA, whole, in fp32, as sample.py and --init read it."""
    whole = {}
    for name, value in (*run.ema.weights.items(), *run.model.named_buffers()):
        value = value.full_tensor() if isinstance(value, DTensor) else value    # collective
        if run.rank == 0:
            whole[name] = value.cpu()
    if run.rank == 0:
        save_file(whole, run.folder / ".model.part")
        (run.folder / ".model.part").replace(run.folder / "model.safetensors")


def write_text(path, text):
    """On the disk before it has its name: what `latest` names has to be whole after a power cut, too."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


# ---------------------------------------------------------------- seeing
class Log:
    """Averages since the last line over all ranks: loss, mse, vb, loss by quarter of t; clips, tokens, decoded frames a
    second, TFLOP/s of a GPU, the share of the time that was spent waiting for data; and bad_clips.csv."""

    def __init__(self, run, first):
        folder, config, leads = run.folder, run.config, run.rank == 0
        self.file = open_log(folder / "log.jsonl", first) if leads else None
        self.bad = BadClips(folder / "bad_clips.csv", config.max_bad, writes=leads)
        self.bar = tqdm(total=config.steps, initial=first, desc=str(folder), unit="step", disable=not leads)
        self.cost, self.faults, self.start = config.cost, [], time.perf_counter()
        self.losses, self.data = torch.zeros(12, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)

    def read(self, batch):
        """What a batch cost to read, and how much it is to compute."""
        self.faults += batch["faults"]
        tokens, flop = (cost * len(batch["slots"]) for cost in self.cost(batch["bucket"]))
        self.data += torch.tensor([batch["decoded"], batch["waited"], len(batch["faults"]), 0, tokens, flop])

    def add(self, terms, t, cut):
        """terms: [B] each; cut: captions that were longer than the text encoder takes.  A sync."""
        loss, mse, vb = (terms[name].detach().double() for name in ("loss", "mse", "vb"))
        quarter = torch.nn.functional.one_hot(t // 250, 4).double()         # [B 4]
        totals = torch.stack([torch.ones_like(loss), loss, mse, vb]).sum(1)
        self.losses += torch.cat([totals, loss @ quarter, quarter.sum(0)]).cpu()
        self.data[3] += cut

    def line(self, step, **more):
        sums, world = torch.cat([self.losses, self.data]), dist.get_world_size()
        dist.all_reduce(sums)
        count, loss, mse, vb, *by_quarter, decoded, waited, num_faults, cut, tokens, flop = sums.tolist()
        quarters = [s / n if n else None for s, n in zip(by_quarter[:4], by_quarter[4:])]
        now = time.perf_counter()
        seconds = now - self.start
        row = dict(step=step, loss=loss / count, mse=mse / count, vb=vb / count, loss_by_t=quarters,
                   clips_per_s=count / seconds, tokens_per_s=tokens / seconds, decoded_per_s=decoded / seconds,
                   tflop_per_s=flop / seconds / world / 1e12, data_wait=waited / seconds / world,
                   captions_cut=int(cut), gib=peak_gib(), **more)
        self.bad.add(gather(self.faults) if num_faults else [], int(count))   # the same on all ranks, as is its error
        self.losses.zero_(), self.data.zero_()
        self.faults, self.start = [], now
        self.bar.update(step - self.bar.n)
        by_t = " ".join("-" if q is None else f"{q:.3f}" for q in quarters)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f} | by t {by_t} | {row['clips_per_s']:.0f} clips/s | "
                                 f"waiting for data {row['data_wait']:.0%}")
        if self.file:
            self.file.write(json.dumps(row | {"faults": self.bad.faults}) + "\n")
            self.file.flush()


def peak_gib():
    """Of this GPU's memory since the last call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def gather(items):
    """The items of all ranks, in one list: a collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def open_log(path, first):
    """The log, to be appended to.  Lines of steps that will be taken again are cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first))
    return open(path, "a")


class Validation:
    """The loss on held-out clips: the same clips, windows, noises and t each time and in each run; captions are not
    dropped, frames not given.  A line of validation.jsonl: loss, loss_by_t (quarters), loss_by_bucket."""

    def __init__(self, run, meta, first):
        model = replace(run.config.model, class_dropout_prob=0.0)
        self.config = replace(run.config, model=model, seed=0, speed=False, mask_ratios={"mask_no": 1.0}, cache="",
                              windows=0)
        self.sampler = BucketSampler(meta, self.config, validation=True)
        self.dataset = ClipDataset(meta, self.config, validation=True)
        self.file = open_log(run.folder / "validation.jsonl", first) if run.rank == 0 else None

    @torch.no_grad()
    def line(self, run, step, vae, text_encoder, vectors):
        kinds = sorted({bucket[:2] for bucket in self.sampler.numbered})
        sums = torch.zeros(2, 4 + len(kinds), dtype=torch.float64)          # losses and their number, by t and by kind
        clips = batches(self.sampler, self.dataset, 0, self.config.validate_batches, run.rank, run.world)
        for i, batch in enumerate(clips):
            kind = 4 + kinds.index(batch["bucket"][:2])
            terms, t = loss_of(run.model, to_latents(batch, vae, text_encoder), self.config, vectors, i, run.device)
            for loss, quarter in zip(terms["loss"].tolist(), (t // 250).tolist()):                      # sync
                for column in (quarter, kind):
                    sums[:, column] += torch.tensor([loss, 1.0], dtype=torch.float64)
        dist.all_reduce(sums)
        means = [loss / count if count else None for loss, count in sums.T.tolist()]
        if self.file:
            by_bucket = {f"{level} x {t}": loss for (level, t), loss in zip(kinds, means[4:]) if loss is not None}
            row = {"step": step, "loss": (sums[0, :4].sum() / sums[1, :4].sum()).item(), "loss_by_t": means[:4]}
            self.file.write(json.dumps(row | {"loss_by_bucket": by_bucket}) + "\n")
            self.file.flush()


def preview(run, step, vae, text_encoder):
    """samples/step-0000500.png: one row of frames per prompt, sampled with the EMA."""
    config, (num_frames, height, width) = run.config, default_bucket(run.config.buckets)
    run.ema.swap()
    videos = generate(run.model, vae, text_encoder, list(config.prompts), num_frames=num_frames, height=height,
                      width=width, fps=config.fps, frame_interval=int(stride(config.fps, config)), steps=50,
                      prediction=config.prediction, cfg_scale=config.cfg_scale, seed=config.seed,
                      quirks=SampleQuirks(raw_fps=config.raw_fps))
    run.ema.swap()
    if run.rank == 0:
        write_video(run.folder / "samples" / f"step-{step:07d}.png", rearrange(videos, "b t h w c -> (b t) h w c"))


# ---------------------------------------------------------------- the loop
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configs/tiny.py, or the config.py of a run")
    parser.add_argument("--print", action="store_true", help="print the config and stop")
    parser.add_argument("--plan", action="store_true", help="what the run takes on --world GPUs, and stop")
    parser.add_argument("--gpu", default="h800", help=f"of the plan: {', '.join(configs.GPUS)}")
    parser.add_argument("--bench", action="store_true", help="time a step of each bucket on random latents, and stop")
    parser.add_argument("--allow-changes", action="store_true", help="go on with another config or other clips")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args, overrides = parser.parse_known_args()
    config, rank = None, int(os.environ.get("RANK", 0))
    try:
        config = configs.load(args.config, overrides)
        if args.print:
            print(configs.dump(config), end="")
        elif args.plan:
            print(configs.plan(config, config.world, config.shard, args.gpu, shares_of_steps(config)))
        else:
            if number := bench(config) if args.bench else train(config, args.allow_changes):
                sys.exit(128 + number)
    except (ValueError, FileNotFoundError) as error:
        if args.debug:
            raise
        time.sleep(10 if rank else 0)       # mostly all ranks fail alike: rank 0 says so, and torchrun ends the others
        sys.exit(fail(f"rank {rank}: {error}" if rank else error))
    except KeyboardInterrupt:
        if config and rank == 0:
            latest = Path(config.out) / "latest"
            where = latest.read_text() if latest.is_file() else "the start"
            print(f"\nstopped; the same command goes on from {where}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config, allow_changes=False):
    """Trains to config.steps; returns 0, or the number of the signal that stopped it after a checkpoint."""
    rank, world, device, mesh = start_processes(config.shard)
    meta = rank0_first(lambda: read_meta(config.data))                      # which builds the index
    sampler, fresh = BucketSampler(meta, config), not (Path(config.out) / "latest").is_file()
    run = make_run(config, rank, world, device, mesh)
    run.say(sampler.table())
    if config.init and fresh:
        load_weights(run.model, config.init, config.seed)
        run.ema.restart()
    vae = load_vae(find(config.vae), config.torch_dtype, device)
    text_encoder = load_text_encoder(find(config.text_encoder), config.model.model_max_length, config.torch_dtype,
                                     device)
    first = resume(run, meta, allow_changes)
    if config.cache:
        patient = dist.new_group(backend="gloo", timeout=timedelta(weeks=4))   # ranks end writing hours apart
        dataset = CachedClips(meta, config, write_cache(meta, config, vae, text_encoder, rank, world, patient))
    else:
        dataset = ClipDataset(meta, config)
    run.say(f"{sum(w.numel() for w in run.ema.weights.values()):,} parameters, {world} x {device.type}, "
            f"{config.dtype}, steps {first} to {config.steps}")
    if rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / "config.py", configs.dump(config))
        write_text(run.folder / "clips.txt", f"{fingerprint(meta)}\n{sampler.table()}\n")
    log, validation = Log(run, first), Validation(run, meta, first) if config.validate_every else None
    clips = batches(sampler, dataset, first, config.steps, rank, world, log.bad.known)
    return take_steps(run, first, clips, log, vae, text_encoder, validation)


def take_steps(run, first, clips, log, vae=None, text_encoder=None, validation=None):
    """The loop: a step per batch of clips; returns 0, or the number of the signal that stopped it."""
    config, model, optimizer, world = run.config, run.model, run.optimizer, run.world
    trained = optimizer.param_groups[0]["params"]
    vectors = {n: v.to(run.device) for n, v in diffusion_vectors(noise_schedule().alphas_cumprod).items()}
    signals = note_signals(run.say)
    for step, batch in enumerate(clips, start=first):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup_steps))
        log.read(batch)
        level, num_frames, _ = batch["bucket"]
        whole = config.buckets[level][num_frames][1] * config.world         # clips of all ranks
        parts = cut(batch, min(config.accumulation, whole // world))        # as many on every rank
        for i, part in enumerate(parts):
            model.set_requires_gradient_sync(i == len(parts) - 1)
            part = to_latents(part, vae, text_encoder)
            terms, t = loss_of(model, part, config, vectors, step, run.device)
            (terms["loss"].sum() * world / whole).backward()                # FSDP averages over the ranks
            log.add(terms, t, part.get("cut", 0))                           # sync
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).full_tensor().item()      # collective, sync
        if not math.isfinite(norm):
            raise ValueError(f"step {step}: the gradient of bucket {tuple(batch['bucket'])} is not finite, losses on "
                             f"rank {run.rank} {terms['loss'].tolist()} at t = {t.tolist()}; not saved - an lr below "
                             f"{config.lr} or dtype fp32 may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.ema.update(step)

        done, stop = step + 1, first_signal(signals)                        # collective
        saves = done % config.save_every == 0 or done == config.steps or stop
        if done % LOG_EVERY == 0 or saves:                                  # resumed, its lines average the same steps
            log.line(done, grad_norm=norm, lr=group["lr"], bucket=batch["bucket"])
        if saves:
            save(run, done)
        if config.prompts and config.sample_every and done % config.sample_every == 0:
            preview(run, done, vae, text_encoder)
        if validation and done % config.validate_every == 0:
            validation.line(run, done, vae, text_encoder, vectors)
        if stop:
            run.say(f"\nsaved step {done} and stopped; the same command goes on from there")
            return stop
    return 0


def bench(config):
    """Times the loop on synthetic latents, bucket by bucket: 2 * LOG_EVERY steps, of which the second half counts."""
    rank, world, device, mesh = start_processes(config.shard)
    buckets = [Bucket(level, t, usual_aspect(level)) for level, lengths in config.buckets.items()
               for t, (keep, _) in lengths.items() if keep > 0]
    with tempfile.TemporaryDirectory() as folder:
        never = 2 * LOG_EVERY * len(buckets) + 1                            # no checkpoint, no preview
        config = replace(config, world=world, steps=never, save_every=never, sample_every=0, out=f"{folder}/bench")
        run = make_run(config, rank, world, device, mesh)
        run.folder.mkdir()
        log = Log(run, 0)
        take_steps(run, 0, (synthetic(run, bucket) for bucket in buckets for _ in range(2 * LOG_EVERY)), log)
        log.bar.close()
        lines = (run.folder / "log.jsonl").read_text().splitlines()[1::2] if rank == 0 else []
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((card.flops for gpu, card in configs.GPUS.items() if gpu in name.lower()), None)
    run.say(f"{world} x {name}, {config.dtype}, checkpointing {config.checkpointing}, compile {config.compile}, "
            f"accumulation {config.accumulation}\n"
            "      bucket  clips/GPU  s/step  tokens/s/GPU  TFLOP/s/GPU    MFU  peak GiB")
    for row in map(json.loads, lines):
        level, t, _ = row["bucket"]
        size, tflop = config.buckets[level][t][1], row["tflop_per_s"]
        mfu, gib = f"{tflop * 1e12 / peak:.1%}" if peak else "-", f"{row['gib']:.1f}" if row["gib"] else "-"
        run.say(f"{level:>6} x {t:<3} {size:10} {size * world / row['clips_per_s']:7.3f} "
                f"{row['tokens_per_s'] / world:13,.0f} {tflop:12.2f} {mfu:>6} {gib:>9}")


def synthetic(run, bucket):
    """A rank's batch of random latents and captions of half the tokens."""
    config, B = run.config.model, run.config.buckets[bucket.resolution][bucket.num_frames][1]
    shape = B, config.in_channels, bucket.num_frames, bucket.height // 8, bucket.width // 8
    told = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames, "fps": 8,
            "ar": bucket.width / bucket.height}
    return {name: torch.full((B,), float(value)) for name, value in told.items()} | {
        "mean": torch.randn(shape), "std": torch.ones(shape), "slots": torch.arange(run.rank, B * run.world, run.world),
        "y": torch.randn(B, config.model_max_length, config.caption_channels), "bucket": bucket, "faults": [],
        "y_mask": (torch.arange(config.model_max_length) < config.model_max_length // 2).expand(B, -1), "decoded": 0,
        "waited": 0}


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


def first_signal(numbers):
    """The same on all ranks: the number of a signal that any of them has got, or 0."""
    number = torch.tensor(numbers[0] if numbers else 0)
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
