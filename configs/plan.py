"""What a run costs, before a GPU is rented: memory per GPU for each bucket, what does not fit, time, days, GPU-hours.

    python -m configs.plan configs/stage2.py --gpus 64 --gpu h800 [--field=value ...]

Formulas in closed form, which tests/test_plan.py holds to live tensors of small models.  The rates below that are
marked as assumed were not measured on 64 GPUs.
"""
import argparse
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

import configs
from data import ASPECT, Bucket, BucketSampler, one_line_errors, read_meta
from model import STDiT
from vae import DECODER_BYTES, frames_at_once


class Gpu(NamedTuple):
    flops: float        # per second, dense bf16 with fp32 sums
    memory: float       # GiB, as torch.cuda.get_device_properties reports it
    node: float         # GB/s from one GPU to the others of its machine, one way
    network: float      # GB/s from one GPU to other machines


# NVIDIA's data sheets; an H800 is an H100 with 400 instead of 900 GB/s of NVLink (both ways).  Network: one 400 Gb/s
# card per GPU in DGX H100, 200 Gb/s in DGX A100; for 4090s we assume 100 Gb/s a machine, half of PCIe 4.0 x16 inside.
GPUS = {
    "h100": Gpu(989e12, 79.1, 450, 50),
    "h800": Gpu(989e12, 79.1, 200, 50),
    "h200": Gpu(989e12, 139.8, 450, 50),
    "a100": Gpu(312e12, 79.1, 300, 25),
    "4090": Gpu(165e12, 23.6, 16, 1.5),
}
GIB = 2 ** 30
PER_NODE = 8            # GPUs of a machine, as in NVIDIA's DGX
MFU = 0.3               # assumed: the share of a GPU's FLOP/s that transformer, T5 and VAE reach
LINK_USE = 0.7          # assumed: the share of the links' rates that collectives reach
USABLE = 0.92           # assumed: the share of memory that is ours; CUDA, NCCL and fragmentation take the rest
T5_BLOCKS = 24          # of T5-XXL, about equal parts of it
FROZEN = {"DeepFloyd/t5-v1_1-xxl": 4.76e9, "stabilityai/sd-vae-ft-ema": 84e6}   # parameters
VAE_FLOP = 4.3e6        # per pixel, of sd-vae-ft-ema's encoder: 4.16e6 at 256 x 256, 4.65e6 at 1024 x 1024, counted


# ---------------------------------------------------------------- memory
HELD = 26               # elements per token and unit of width that a block keeps for backward on a GPU


def activation_bytes(config, B, T, h, w):
    """Returns the bytes of activations at the peak of forward and backward for B clips [C_in T h w] with all frames
    masked one by one, which costs most."""
    model = config.model
    size = config.torch_dtype.itemsize
    frames, rows, columns = model.grid(T, h, w)
    num_tokens = B * frames * rows * columns
    C, L = model.hidden_size, model.model_max_length
    tokens = num_tokens * C * size
    block = HELD * tokens
    block += B * (2 * L + 9 * frames) * C * size                        # keys and values of the text; modulation
    block += 3 * model.num_heads * num_tokens * 4                       # log-sums of three softmaxes, fp32
    outside = 2 * tokens + B * L * (model.caption_channels + 2 * C) * size + 10 * B * frames * C * size
    captions = B * 2 * 4 * L * model.caption_channels                   # fp32, before and after some are dropped

    num_thin = num_checkpointed(config)
    total = outside + captions + (model.depth - num_thin) * block + num_thin * tokens
    if num_thin and (model.depth - 1) % config.checkpointing == 0:
        total += block - tokens         # the last block is computed again while all others keep theirs
    return total + 8 * tokens           # what backward writes in passing: gradients of the tokens and of GELU


# Elements per token and unit of width at the peak of a forward: that of temporal attention in its plain form, where
# rotary positions and QK-norm take fp32.
FORWARD = {torch.float32: 13, torch.bfloat16: 17}


def forward_bytes(model, dtype, B, T, h, w):
    """Returns the bytes of activations at the peak of a forward without gradients, with the plain form of each op, for
    B clips [C_in T h w] with all frames masked one by one.  Single clips and images take less.  model: STDiTConfig."""
    frames, rows, columns = model.grid(T, h, w)
    elements = FORWARD[dtype] * B * frames * rows * columns
    elements += B * (20 * frames + model.model_max_length)              # modulation of the frames; the text
    return elements * model.hidden_size * dtype.itemsize


def num_checkpointed(config):
    """Returns how many blocks keep their input only and are computed again for backward."""
    every = config.checkpointing
    return len(range(config.model.depth)[::every]) if every else 0


def state_bytes(config, shard):
    """Returns {what: bytes per GPU} of FSDP over `shard` GPUs: the sharded fp32 state, and what is whole meanwhile.

    Whole: two blocks (one computes, the next arrives), the last one and the root in the compute dtype, the gradients of
    a block and of the root, and a block's in fp32 on their way; with accumulation all of them until the last part."""
    total, root, block = parameters(config.model)
    in_fp32 = block if config.accumulation == 1 else total
    whole = config.torch_dtype.itemsize * (4 * block + 2 * root) + 4 * in_fp32
    return {"weights": 4 * total / shard, "gradients": 4 * total / shard, "Adam": 8 * total / shard,
            "EMA": 4 * total / shard, "whole": whole}


@cache
def parameters(model_config):
    """Returns the parameters of the model, of what is outside of the blocks, and of one block."""
    counts = []
    for depth in (1, 2):
        with torch.device("meta"):
            model = STDiT(replace(model_config, depth=depth))
        counts.append(sum(p.numel() for p in model.parameters()))
    block = counts[1] - counts[0]
    root = counts[0] - block
    return root + model_config.depth * block, root, block


# ---------------------------------------------------------------- traffic
def traffic_bytes(config, world, parts=1, exchanged=0):
    """Returns {collective: bytes that each GPU receives in a step}; of n GPUs (n - 1) / n of all comes from others.

    As in ZeRO-3 (arXiv 1910.02054) weights are gathered for forward and again for backward, except those outside of the
    blocks and of the last block, which stay; gradients, in fp32, are summed over the shard, then over its replicas.
    exchanged: bytes of tokens that sequence parallelism sends from frames to positions or back."""
    total, root, block = parameters(config.model)
    shard = config.shard or world
    from_others = (shard - 1) / shard
    replicas = world // shard
    moved = {
        "all-gather": parts * (2 * total - root - block) * config.torch_dtype.itemsize * from_others,
        "reduce-scatter": 4 * total * from_others,
        "all-reduce": 2 * 4 * total / shard * (replicas - 1) / replicas,
    }
    if config.sp > 1:
        moved["all-to-all"] = exchanged * (config.sp - 1) / config.sp
    return moved


def traffic_seconds(config, world, gpu, moved):
    """Returns {collective: seconds}, each over the slowest link that it has to take."""
    shard = config.shard or world
    sharding = gpu.node if shard <= PER_NODE else min(gpu.node, PER_NODE * gpu.network)     # a ring for each card
    links = {
        "all-gather": sharding, "reduce-scatter": sharding,
        "all-reduce": gpu.network if world > PER_NODE else gpu.node,
        "all-to-all": gpu.node if config.sp <= PER_NODE else gpu.network,
    }
    return {name: num_bytes / links[name] / (LINK_USE * 1e9) for name, num_bytes in moved.items()}


# ---------------------------------------------------------------- a step
class Step(NamedTuple):
    """What a step of one resolution and length costs at its dearest aspect ratio; bytes and FLOP of one GPU."""
    bucket: Bucket
    clips: int          # of each group of config.sp GPUs
    at_once: int        # of them in a micro-batch
    activations: float  # bytes
    fixed: float        # bytes, whatever the bucket: weights, optimizer, frozen networks
    room: float         # bytes that are left for activations
    most: int           # clips at once that there is room for
    most_thin: int      # the same with every block checkpointed
    flop: float
    compute: float      # seconds
    traffic: float      # seconds
    seconds: float      # of the step: all traffic but all-to-all is hidden behind compute
    moved: dict         # bytes received by collective
    tokens: float       # of all GPUs together


def plan_step(config, world, gpu, resolution, num_frames):
    """Returns the Step of a resolution and length on `world` GPUs."""
    bucket = max((Bucket(resolution, num_frames, ar) for ar in ASPECT[resolution]), key=lambda b: config.cost(b)[1])
    model = config.model
    size = config.torch_dtype.itemsize
    groups = world // config.sp
    global_batch = config.buckets[resolution][num_frames][1] * config.world
    if global_batch < groups:
        raise ValueError(f"{resolution} x {num_frames}: a global batch of {global_batch} clips cannot feed {groups} "
                         "GPUs, or groups of them: make it larger")
    clips = math.ceil(global_batch / groups)
    parts = min(config.accumulation, clips)
    at_once = math.ceil(clips / parts)
    frames = math.ceil(num_frames / config.sp)              # of a clip on one GPU
    frozen = {}
    if not config.cache:
        frozen = {name: FROZEN[name] for name in (config.vae, config.text_encoder) if name in FROZEN}

    latents = frames, bucket.height // 8, bucket.width // 8
    fixed = sum(state_bytes(config, config.shard or world).values()) + sum(frozen.values()) * size
    room = USABLE * gpu.memory * GIB - fixed
    per_clip = activation_bytes(config, 1, *latents)
    thin = activation_bytes(replace(config, checkpointing=1), 1, *latents)

    tokens, flop = config.cost(bucket)                      # of a whole clip, forward and backward
    num_again = num_checkpointed(config)
    flop = flop * frames / num_frames * (1 + num_again / model.depth / 3)       # forward, flop / 3, is repeated there
    flop += 2 * frozen.get(config.text_encoder, 0) * model.model_max_length
    if config.vae in frozen:
        flop += VAE_FLOP * frames * bucket.height * bucket.width
    compute = flop * clips / (MFU * gpu.flops)

    own_tokens = clips * tokens * frames // num_frames * model.hidden_size * size
    moved = traffic_bytes(config, world, parts, own_tokens * (4 * model.depth + 2 * num_again))  # there, back, backward
    seconds = traffic_seconds(config, world, gpu, moved)
    traffic = sum(seconds.values())
    waiting = seconds.get("all-to-all", 0)
    return Step(bucket, clips, at_once, per_clip * at_once, fixed, room, int(room // per_clip), int(room // thin),
                flop * clips, compute, traffic, max(compute, traffic - waiting) + waiting, moved,
                tokens * clips * groups)


def remedy(config, step):
    """Returns the setting that makes a bucket fit, the one that costs least first."""
    if step.room < 0:
        return "the weights alone do not fit, share them among more GPUs (--shard)"
    if step.most_thin < 1:
        return ("one clip does not fit even with --checkpointing=1, expected a smaller size, fewer frames, or more "
                "GPUs for them (--sp)")
    if step.most_thin >= step.at_once and config.checkpointing != 1:
        alternative = f", or {step.most} clips at once" if step.most > 0 else ""
        return f"--checkpointing=1{alternative}"
    also = "" if config.checkpointing == 1 else " with --checkpointing=1"
    parts = math.ceil(step.clips / step.most_thin)
    return f"at most {step.most_thin} at once{also}: --accumulation={parts} or a batch of {step.most_thin}"


# ---------------------------------------------------------------- a run
def plan(config, world, gpu="h800", shares=None):
    """Returns as text what config's run would take on `world` GPUs.

    shares: {(resolution, frames): share of the steps}; None means equal ones.  Raises ValueError."""
    shard = config.shard or world
    if gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r}: expected one of {', '.join(GPUS)}")
    if world < 1 or world % shard or world % config.sp:
        raise ValueError(f"gpus={world}, shard={shard}, sp={config.sp}: expected a number of GPUs of 1 or more that "
                         "shard and sp divide")
    card = GPUS[gpu]
    steps = {kind: plan_step(config, world, card, *kind) for kind in config.trained}
    weights = {kind: shares.get(kind, 0) if shares else 1 for kind in steps}
    total = sum(weights.values())
    states = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in state_bytes(config, shard).items())
    lines = [
        f"{world} x {gpu}, weights over {shard}, {config.dtype}, checkpointing {config.checkpointing}, accumulation "
        f"{config.accumulation}, {parameters(config.model)[0]:,} parameters",
        f"GiB per GPU: {states}; with frozen networks and the activations below at most {USABLE:.0%} of {card.memory}",
        f"assumed: {MFU:.0%} of {card.flops / 1e12:.0f} TFLOP/s; {LINK_USE:.0%} of {card.node} GB/s in a machine of "
        f"{PER_NODE}, of {card.network} between; traffic but all-to-all hidden behind compute; data never late",
        f"{'bucket':>15}{'clips':>7}{'activations':>13}{'all GiB':>9}{'TFLOP':>8}{'compute s':>11}{'traffic s':>11}"
        f"{'share':>7}",
    ]
    for kind, step in steps.items():
        bucket = step.bucket
        line = (f"{bucket.num_frames:>4} x {bucket.height:>4}x{bucket.width:<4}{step.clips:>7}"
                f"{step.activations / GIB:>13.2f}{(step.activations + step.fixed) / GIB:>9.2f}{step.flop / 1e12:>8.0f}"
                f"{step.compute:>11.2f}{step.traffic:>11.2f}{weights[kind] / total:>7.1%}")
        if step.activations > step.room:
            line += f"  TOO BIG: {remedy(config, step)}"
        lines.append(line)
    seconds = sum(weights[kind] * step.seconds for kind, step in steps.items()) / total
    tokens = sum(weights[kind] * step.tokens for kind, step in steps.items()) / total
    days = seconds * config.steps / 86400
    lines.append(f"{config.steps:,} steps of {seconds:.2f} s on average: {days:.1f} days, {days * 24 * world:,.0f} "
                 f"GPU-hours, {tokens / seconds:,.0f} tokens/s")
    return "\n".join(lines)


def plan_sampling(config):
    """Returns as text the GiB that sampling one video with guidance holds on a GPU: T5, which is freed before the model
    is loaded, then the model and the VAE.  What `sample.py --offload` leaves of them is one block at a time."""
    m = config.model
    dtype = config.torch_dtype
    t5 = FROZEN.get(config.text_encoder, 0) * dtype.itemsize
    vae = FROZEN.get(config.vae, 0) * 4                                             # in fp32
    model = parameters(m)[0] * dtype.itemsize
    counted = "" if t5 and vae else "; T5 and VAE are not those of Open-Sora: not counted"
    lines = [f"sampling, {config.dtype}, GiB: T5 {t5 / GIB:.2f}, VAE {vae / GIB:.2f}, model {model / GIB:.2f}{counted}",
             f"{'video':>15}{'activations':>13}{'decoding':>10}{'peak':>8}{'with --offload':>16}"]
    for T, height, width in ((16, 240, 426), (64, 240, 426), (16, 720, 1280)):      # of stage 3's buckets
        activations = forward_bytes(m, dtype, 2, T, height // 8, width // 8)
        per_pixel = DECODER_BYTES * min(T, frames_at_once(height, width)) + 3 * 4 * T       # and all frames, in fp32
        decoding = per_pixel * height * width if vae else 0
        peak = vae + max(t5, model + activations, model + decoding)
        offloaded = vae + max(t5 / T5_BLOCKS, model / m.depth + activations, decoding)
        lines.append(f"{T:>4} x {height:>3}x{width:<4}{activations / GIB:>13.2f}{decoding / GIB:>10.2f}"
                     f"{peak / GIB:>8.2f}{offloaded / GIB:>16.2f}")
    return "\n".join(lines)


def shares_of_steps(config):
    """Returns {(resolution, frames): steps of an epoch} if the csv files exist, else None."""
    try:
        sampler = BucketSampler(read_meta(config.data), config)
    except FileNotFoundError:
        print(f"{config.data} was not found: each resolution and length is planned an equal share of the steps")
        return None
    return Counter(sampler.numbered[number][:2] for number in sampler.epoch(0).buckets)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python -m configs.plan CONFIG [options] [--field=value ...]",
                                     allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="configs/stage2.py, say")
    parser.add_argument("--gpus", type=int, help="how many (default: the config's world)")
    parser.add_argument("--gpu", choices=GPUS, default="h800", help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    args, overrides = parser.parse_known_args(argv)
    with one_line_errors(args.debug):
        config = configs.load(args.config, overrides)
        world = config.world if args.gpus is None else args.gpus
        plan(config, world, args.gpu)                           # raises before millions of rows are read
        print(plan(config, world, args.gpu, shares_of_steps(config)))
        print(plan_sampling(config))


if __name__ == "__main__":
    main()
