"""One run = one frozen `Config`, built by a Python file: what is trained, on which data, for how long.

    from configs import load, dump
    config = load("configs/stage1.py", ["--lr=1e-5", "--model.depth=4", "--mask_ratios={'mask_no': 1.0}"])
    dump(config)   # Python source that loads back to an equal Config; every run writes it to <out>/config.py
Unknown keys, wrong types and tables that cannot work are errors here, before a GPU is touched.
"""
import ast
import difflib
import inspect
import math
import re
import runpy
import types
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from pprint import pformat
from typing import NamedTuple, get_args, get_origin, get_type_hints

import torch

from data import ASPECT, Bucket
from masks import RECIPE, check_ratios  # noqa: F401  config files take their names from here
from model import TINY, STDiTConfig, flops, layers, saved_bytes, state_bytes  # noqa: F401

Buckets = dict[str, dict[int, tuple[float, int | None]]]  # resolution -> frames -> (keep probability, clips per GPU)


@dataclass(frozen=True, kw_only=True)
class Config:
    # what is trained, on which clips
    model: STDiTConfig = STDiTConfig()              # the network; the default is XL/2
    vae: str                                        # folder or hub name of the AutoencoderKL
    text_encoder: str                               # folder or hub name of the T5 encoder and its tokenizer
    captions_cleaned: bool = False                  # rewrite captions as Open-Sora's T5 was given them (vae.py)
    data: str | tuple[str, ...]                     # meta.csv: a path, or a glob over several, or several of either
    buckets: Buckets                                # which clips are trained at which size (data.assign)
    # reading them; times in frames of the source, or as told
    frame_interval: int = 1                         # every n-th source frame is taken
    raw_fps: bool = False                           # tell the network the source's fps, whatever is taken of it (Q7)
    fps: float = 24.0                               # of the source that samples imitate; theirs is fps / frame_interval
    holdout: float = 0.0                            # share of the clips, by a hash of the path, kept for validation
    windows: int = 0                                # fixed windows of a clip, as a cache needs; 0 = a new one each time
    cache: str = ""                                 # folder of cached latents and text embeddings; "" = none
    num_workers: int = 2                            # reading processes per GPU; 0 = read in the training process
    read_timeout: float = 300.0                     # seconds without a batch, after which a reading process has hung
    max_bad: float = 0.05                           # share of clips that cannot be read at which training stops
    # the loss and the optimizer
    world: int = 1                                  # GPUs of the batch sizes: a global batch is clips per GPU * world
    mask_ratios: dict[str, float]                   # masking strategy (masks.py) -> share of the samples
    prediction: str = "eps"                         # the network's target: "eps" (the noise) or "v" (velocity)
    cfg_scale: float = 7.0                          # guidance of samples (upstream's), unless sample.py is told another
    speed: bool = False                             # draw t as SpeeD does (arXiv 2405.17403) instead of uniformly
    lr: float                                       # AdamW's step size, constant after the warm-up
    weight_decay: float = 0.0                       # AdamW, decoupled
    betas: tuple[float, float] = (0.9, 0.999)       # AdamW; Adam's own (arXiv 1412.6980)
    warmup_steps: int = 0                           # optimizer steps of linear warm-up from 0 to lr
    grad_clip: float = 1.0                          # largest global gradient norm (upstream's)
    skip_nonfinite: int = 0                         # steps with a non-finite gradient, skipped before it is an error
    ema_decay: float = 0.9999                       # of the averaged weights, per step; DiT's (arXiv 2212.09748)
    steps: int                                      # optimizer steps of the run
    # memory and GPUs
    dtype: str = "bf16"                             # "fp32" or "bf16": of the activations; weights are kept in fp32
    checkpointing: int = 0                          # every n-th block keeps its input only, 1 = all, 0 = none
    compile: bool = False                           # torch.compile each block
    shard: int = 0                                  # GPUs that share the weights and have replicas; 0 = all
    sp: int = 1                                     # GPUs that share one clip: sequence parallelism
    accumulation: int = 1                           # parts into which a GPU's clips of a step are cut
    # the run, its files and what it shows
    seed: int = 0                                   # decides clips, windows, noise, t, masks and the first weights
    out: str                                        # folder of the run: checkpoints, log.jsonl, config.py
    init: str = ""                                  # weights to start from; "" = fresh ones
    init_optimizer: bool = False                    # take the optimizer's state too from the run that init names
    save_every: int = 500                           # steps between checkpoints
    keep_last: int = 2                              # checkpoints that stay
    keep_every: int = 0                             # and those of every n-th step; 0 = no more
    sample_every: int = 500                         # steps between previews; 0 = none
    validate_every: int = 0                         # steps between losses on held-out clips (holdout); 0 = none
    validate_batches: int = 8                       # global batches of these
    prompts: tuple[str, ...] = ()                   # captions of the previews

    def __post_init__(self):
        check_type("", self, Config)
        for names, ok, expected in (
            ("frame_interval fps world lr grad_clip steps save_every sp read_timeout accumulation keep_last "
             "validate_batches", lambda x: 0 < x < math.inf, "more than 0, and finite"),
            ("num_workers warmup_steps sample_every windows checkpointing shard keep_every validate_every "
             "skip_nonfinite weight_decay cfg_scale", lambda x: 0 <= x < math.inf, "0 or more, and finite"),
            ("holdout max_bad", lambda x: 0 <= x <= 1, "a share from 0 to 1"),
            ("validate_every", lambda x: not x or self.holdout, "0, or a holdout of some clips beside it"),
            ("init_optimizer", lambda x: not x or self.init, "False, or an init to take it from beside it"),
            ("windows", lambda x: x or not self.cache, "1 or more with a cache: it holds fixed windows of a clip"),
            ("prediction", lambda x: x in ("eps", "v"), "'eps' or 'v'"),
            ("dtype", lambda x: x in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            ("ema_decay", lambda x: 0 <= x < 1, "0 or more and less than 1"),
            ("betas", lambda x: all(0 <= beta < 1 for beta in x), "each 0 or more and less than 1"),
            ("seed", lambda x: -2**63 <= x < 2**63, "an integer of 64 bits"),
            ("data vae text_encoder out", bool, "a path or a name"),
        ):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")
        check_ratios(self.mask_ratios)
        check_buckets(self.buckets)

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def trained(self) -> dict[tuple[str, int], int]:
        """(resolution, frames) of the buckets that keep clips -> clips per GPU of the reference world."""
        return {(level, t): n for level, row in self.buckets.items() for t, (keep, n) in row.items() if keep > 0}

    def cost(self, bucket: Bucket) -> tuple[int, int]:
        """(tokens, FLOP of forward and backward) of one clip; the VAE makes a latent cell of 8 x 8 pixels."""
        latents = bucket.num_frames, bucket.height // 8, bucket.width // 8
        return math.prod(self.model.grid(*latents)), 3 * flops(self.model, *latents, self.model.model_max_length)


def check_buckets(buckets: Buckets):
    for resolution, lengths in buckets.items():
        if resolution not in ASPECT:
            raise ValueError(f"buckets: there is no resolution {resolution!r}{suggest(resolution, ASPECT)}")
        if not lengths:
            raise ValueError(f"buckets[{resolution!r}] = {{}}: expected numbers of frames, as in {{16: (1.0, 4)}}")
        for num_frames, (keep, batch_size) in lengths.items():
            where = f"buckets[{resolution!r}][{num_frames}] = ({keep}, {batch_size})"
            if num_frames < 1 or not 0 <= keep <= 1:
                raise ValueError(f"{where}: expected 1 frame or more and a keep probability from 0 to 1")
            if keep > 0 and not (batch_size and batch_size > 0):
                raise ValueError(f"{where}: a bucket that keeps clips needs a batch size, as in ({keep}, 4)")
    if not any(keep > 0 for lengths in buckets.values() for keep, _ in lengths.values()):
        raise ValueError(f"{buckets=}: keeps no clip at all, expected a keep probability above 0 in one of them")


def suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(map(repr, known))}"


def matches(value, kind) -> bool:
    """Whether `value` is what the annotation `kind` says.  An int passes for a float, a bool for neither."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return any(matches(value, option) for option in args)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if origin is tuple:
        kinds = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(matches, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_type(name: str, value, kind):
    """Raises where `value` is not what the annotation `kind` says; of a dataclass its fields, as model.depth."""
    if not matches(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}, expected {wanted}")
    if is_dataclass(value):
        for field, its_kind in get_type_hints(type(value)).items():
            check_type(f"{name}.{field}".lstrip("."), getattr(value, field), its_kind)


def override(config, key: str, text: str, prefix: str = ""):
    """`config` with one field replaced.  key: "lr" or "model.depth"; text: a literal, or plain where a str belongs."""
    name, _, rest = key.partition(".")
    kinds = get_type_hints(type(config))
    if name not in kinds or (rest and not is_dataclass(kinds[name])):
        raise ValueError(f"--{prefix}{key}: there is no {prefix}{key}{suggest(name, kinds)}")
    if rest:
        return replace(config, **{name: override(getattr(config, name), rest, text, f"{prefix}{name}.")})
    try:
        value = text if kinds[name] is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word where a number or a dict belongs: check_type names field, given and expected
    check_type(f"{prefix}{name}", value, kinds[name])  # before the dataclass computes with it
    return replace(config, **{name: value})


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Runs the Python file `path` (from here, the repository or its configs), which defines `config`, and applies
    `--key=value` overrides."""
    folder = Path(__file__).parent
    places = (Path(path), folder.parent / path, folder / path, folder / f"{path}.py")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = ", ".join(f"configs/{p.name}" for p in sorted(folder.glob("*.py")) if p.name != "__init__.py")
        raise FileNotFoundError(f"no config file {path}, there are: {known}")
    try:
        config = runpy.run_path(str(file)).get("config")
    except (SyntaxError, NameError, ImportError) as error:
        kind = type(error).__name__
        raise ValueError(f"{file}: {kind}: {error} - expected Python that ends in `config = Config(...)`") from error
    except (TypeError, ValueError) as error:  # TypeError: Config(...) got an unknown or lacks an argument
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        known = get_type_hints(STDiTConfig if unknown and unknown[1] == "STDiTConfig" else Config)
        message = f"{unknown[1]} has no {unknown[2]!r}{suggest(unknown[2], known)}" if unknown else error
        raise ValueError(f"{file}: {message}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{file}: expected a line `config = Config(...)`, its `config` is {config!r}")
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals:
            raise ValueError(f"override {text!r}: expected --key=value, as in --lr=1e-5")
        config = override(config, key, value)
    return config


def fields_text() -> str:
    """The fields of Config and of its model with types, defaults and units: the lines of their classes."""
    run, model = (inspect.getsource(kind).partition(":\n")[2].partition("\n\n")[0] for kind in (Config, STDiTConfig))
    return f"{run}\n    # the network: --model.depth=4 and so on\n{model.split(chr(10), 1)[1]}"     # less its docstring


def dump(config: Config) -> str:
    """Python source of a config file that loads back to an equal Config, dictionaries in the same order."""
    lines = ["from configs import Config, STDiTConfig", "", "config = Config("]
    return "\n".join([*lines, *(source(f.name, getattr(config, f.name)) for f in fields(config))]) + "\n)\n"


def source(name, value):
    """A line of a config file, or several."""
    text = pformat(value, width=110, sort_dicts=False)
    return f"    {name}={text},".replace("\n", "\n" + " " * (len(name) + 5))


# ---- what a run would cost, before a GPU is rented ----

class Gpu(NamedTuple):
    flops: float            # per second, dense bf16 with fp32 sums
    memory: float           # GiB, as torch.cuda.get_device_properties tells
    node: float             # GB/s from one GPU to the others of its machine, one way
    network: float          # GB/s from one GPU to other machines


# NVIDIA's data sheets; H800 = H100 with 400 instead of 900 GB/s of NVLink (both ways). Network: one 400 Gb/s card per
# GPU in DGX H100, 200 Gb/s in DGX A100; for 4090s we assume 100 Gb/s for a machine, and half of PCIe 4.0 x16 inside.
GPUS = {"h100": Gpu(989e12, 79.1, 450, 50), "h800": Gpu(989e12, 79.1, 200, 50),
        "h200": Gpu(989e12, 139.8, 450, 50), "a100": Gpu(312e12, 79.1, 300, 25), "4090": Gpu(165e12, 23.6, 16, 1.5)}
PER_NODE = 8                # GPUs of a machine, as in NVIDIA's DGX
MFU = 0.3                   # share of a card's FLOP/s, assumed, of the matrix products of transformer, T5 and VAE alike
LINK_USE = 0.7              # assumed share of the links' rates that collectives reach
USABLE = 0.92               # assumed share of memory; CUDA, NCCL and what lies between allocations take the rest
FROZEN = {"DeepFloyd/t5-v1_1-xxl": 4.76e9, "stabilityai/sd-vae-ft-ema": 84e6}   # parameters: those of their configs
VAE_FLOP = 4.3e6            # per pixel, of sd-vae-ft-ema's encoder: 4.16e6 at 256 x 256, 4.65e6 at 1024 x 1024, counted


def wire(config, world, parts=1, exchanged=0):
    """Bytes that each GPU receives in a step, by collective: of n GPUs (n - 1) / n of all comes from others.

    As ZeRO-3 (arXiv 1910.02054) weights are gathered for forward and again for backward, but for those outside the
    blocks and in the last one, which stay; gradients, in fp32, are summed over the shard, then over its replicas.
    exchanged: bytes of tokens that go from GPUs with some frames each to GPUs with some places each, or back."""
    (P, root, block), shard = layers(config.model), config.shard or world
    others = lambda n: (n - 1) / n
    gathered = parts * (2 * P - root - block) * config.torch_dtype.itemsize
    moved = {"all-gather": gathered * others(shard), "reduce-scatter": 4 * P * others(shard),
             "all-reduce": 2 * 4 * P / shard * others(world // shard)}       # a reduce-scatter, then an all-gather
    return moved | ({"all-to-all": exchanged * others(config.sp)} if config.sp > 1 else {})


def plan_row(config, world, gpu, level, num_frames):
    """What a step of this resolution and length costs at its dearest aspect, as a dict; bytes and FLOP of one GPU."""
    bucket = max((Bucket(level, num_frames, ar) for ar in ASPECT[level]), key=lambda b: config.cost(b)[1])
    m, dtype, L = config.model, config.torch_dtype, config.model.model_max_length
    H, W, every, shard = bucket.height, bucket.width, config.checkpointing, config.shard or world
    groups = world // config.sp                                     # each of sp GPUs that share their clips
    clips = math.ceil(config.buckets[level][num_frames][1] * config.world / groups)    # of a group
    parts = min(config.accumulation, clips)
    at_once, frames = math.ceil(clips / parts), math.ceil(num_frames / config.sp)      # clips of a part; a GPU's frames
    # memory: what each clip at once holds for backward, beside the weights of all networks
    per_clip = lambda every: (saved_bytes(m, 1, frames, H // 8, W // 8, L, dtype, every)
                              + 2 * 4 * L * m.caption_channels)     # captions in fp32, before and after drop
    nets = {name: FROZEN[name] for name in (config.vae, config.text_encoder) if name in FROZEN and not config.cache}
    fixed = sum(state_bytes(m, shard, dtype, parts).values()) + sum(nets.values()) * dtype.itemsize
    room = USABLE * gpu.memory * 2**30 - fixed
    # computing: the network forward, backward (twice that) and where checkpointed forward again; T5 and VAE forward
    tokens, flop = config.cost(bucket)                              # of a clip, whole
    twice = len(range(m.depth)[::every]) if every else 0            # blocks computed again; a forward is flop / 3
    encode = 2 * nets.get(config.text_encoder, 0) * L + VAE_FLOP * (config.vae in nets) * frames * H * W
    flop = (flop * frames / num_frames * (1 + twice / m.depth / 3) + encode) * clips
    compute = flop / (MFU * gpu.flops)
    # traffic: each kind over the slowest link that it has to take, one kind after the other
    held = clips * tokens * frames // num_frames * m.hidden_size * dtype.itemsize      # bytes of a GPU's tokens
    moved = wire(config, world, parts, held * (4 * m.depth + 2 * twice))     # there and back, and so backward
    link = gpu.node if shard <= PER_NODE else min(gpu.node, PER_NODE * gpu.network)  # a ring per card: their rates add
    links = {"all-gather": link, "reduce-scatter": link, "all-reduce": gpu.network if world > PER_NODE else gpu.node,
             "all-to-all": gpu.node if config.sp <= PER_NODE else gpu.network}
    seconds = {name: n / links[name] / (LINK_USE * 1e9) for name, n in moved.items()}
    talk, wait = sum(seconds.values()), seconds.get("all-to-all", 0)         # all but all-to-all goes on beside compute
    return {"bucket": bucket, "clips": clips, "activations": per_clip(every) * at_once, "fixed": fixed, "flop": flop,
            "compute": compute, "talk": talk, "step": max(compute, talk - wait) + wait, "room": room, "moved": moved,
            "tokens": tokens * clips * groups, "at_once": at_once, "nets": nets,
            "most": {n: int(room // per_clip(n)) for n in (every, 1)}}


def find_gpu(config, world, gpu):
    shard = config.shard or world
    if gpu not in GPUS or world < 1 or world % shard or world % config.sp:
        raise ValueError(f"gpu={gpu!r}, world={world}, shard={shard}, sp={config.sp}: expected one of "
                         f"{', '.join(GPUS)}, and a shard and an sp that divide a world of 1 or more")
    return GPUS[gpu]


def plan(config, world, gpu="h800", shares=None):
    """What config's run would take on `world` GPUs, as text, without one: memory, traffic, time. Pure; a CPU's seconds.

    shares: (resolution, frames) -> share of the steps; None = equal."""
    card, shard, gib = find_gpu(config, world, gpu), config.shard or world, lambda n: f"{n / 2**30:.2f}"
    rows = {kind: plan_row(config, world, card, *kind) for kind in config.trained}
    shares = {kind: shares.get(kind, 0) if shares else 1 for kind in rows}
    total, first = sum(shares.values()), next(iter(rows.values()))  # networks and kinds of traffic are those of all
    mean = lambda name: sum(share * rows[kind][name] for kind, share in shares.items()) / total
    state = state_bytes(config.model, shard, config.torch_dtype, config.accumulation)
    nets, moved = first["nets"], {name: max(row["moved"][name] for row in rows.values()) for name in first["moved"]}
    lines = [f"{world} x {gpu}, weights over {shard}, {config.dtype}, checkpointing {config.checkpointing}, "
             f"accumulation {config.accumulation}, {layers(config.model)[0]:,} parameters",
             f"GiB per GPU: {', '.join(f'{name} {gib(n)}' for name, n in state.items())}, "
             f"{' + '.join(nets) or 'VAE and T5 not counted'} {gib(sum(nets.values()) * config.torch_dtype.itemsize)}; "
             f"with the activations below at most {USABLE:.0%} of {card.memory}",
             f"GB received per GPU and step, at most: {', '.join(f'{k} {n / 1e9:.2f}' for k, n in moved.items())}",
             f"assumed: MFU {MFU:.0%} of {card.flops / 1e12:.0f} TFLOP/s; {LINK_USE:.0%} of {card.node} GB/s in a "
             f"machine of {PER_NODE}, of {card.network} between; traffic but all-to-all hidden behind compute; data "
             "never late",
             f"{'bucket':>15}{'clips/GPU' if config.sp == 1 else f'clips/{config.sp}GPU':>11}{'activations':>13}"
             f"{'all GiB':>9}{'TFLOP':>8}{'compute s':>11}{'traffic s':>11}{'share':>7}"]
    for kind, row in rows.items():
        bucket, tight = row["bucket"], row["activations"] > row["room"]
        lines.append(f"{bucket.num_frames:>4} x {bucket.height:>4}x{bucket.width:<4}"
                     f"{row['clips']:>10}{gib(row['activations']):>13}{gib(row['activations'] + row['fixed']):>9}"
                     f"{row['flop'] / 1e12:>8.0f}{row['compute']:>11.2f}{row['talk']:>11.2f}"
                     f"{shares[kind] / total:>7.1%}" + (f"  TOO BIG: {remedy(config, row)}" if tight else ""))
    days = mean("step") * config.steps / 86400
    return "\n".join([*lines, f"{config.steps:,} steps of {mean('step'):.2f} s on average: {days:.1f} days, "
                              f"{days * 24 * world:,.0f} GPU-hours, {mean('tokens') / mean('step'):,.0f} tokens/s"])


def remedy(config, row):
    """The setting that makes a bucket fit, the one that costs least first."""
    now, thin = row["most"][config.checkpointing], row["most"][1]
    if row["room"] < 0:
        return "the weights alone do not fit, share them among more GPUs (--shard)"
    if thin < 1:
        return ("one clip does not fit even with --checkpointing=1, expected a smaller size, fewer frames, or more "
                "GPUs for them (--sp)")
    if thin >= row["at_once"]:
        return "--checkpointing=1" + f", or {now} clips at once" * (now > 0)
    more = "" if config.checkpointing == 1 else " with --checkpointing=1"
    return f"at most {thin} at once{more}: --accumulation={math.ceil(row['clips'] / thin)} or a batch of {thin}"


# ---- batch sizes ----

MOST = 1024                 # clips of a GPU that are tried


def search(config, world, gpu="h800", measure=None):
    """The most clips of each bucket that fit, and the batches with which all buckets take about the same time, as text.

    measure(kind, clips): seconds of a step of so many clips per GPU (with config.sp > 1, per sp GPUs) of kind
    (resolution, frames), inf where they do not fit; alike on all ranks.  Without one the plan's model of gpu says.
    The time to reach is the longest that all buckets can fill; where a single clip takes more, that of the dearest."""
    card, groups = find_gpu(config, world, gpu), world // config.sp

    def planned(kind, n):
        alone = replace(config, world=groups, buckets={kind[0]: {kind[1]: (1.0, n)}})
        row = plan_row(alone, world, card, *kind)
        return row["step"] if row["activations"] <= row["room"] else math.inf

    seconds = cache(measure or planned)
    most = {kind: largest(lambda n, kind=kind: seconds(kind, n) < math.inf) for kind in config.trained}
    fit = [kind for kind, n in most.items() if n]
    all_can_fill = min((seconds(kind, most[kind]) for kind in fit), default=0)
    target = max(all_can_fill, max((seconds(kind, 1) for kind in fit), default=0))
    equal = {kind: largest(lambda n, kind=kind: seconds(kind, n) <= target) for kind in fit}
    lines = [f"{len(fit)} of {len(most)} buckets fit; steps of up to {target:.2f} s; clips per rank of {groups}",
             f"{'bucket':>12}{'most':>7}{'s':>8}{'equal':>7}{'s':>8}{'now':>6}"]
    for kind, n in config.trained.items():
        found = "".join(f"{m:7}{seconds(kind, m):8.2f}" for m in (most[kind], equal[kind])) if kind in fit else (
            f"{'not one clip fits':>30}")
        lines.append(f"{kind[0]:>6} x {kind[1]:<3}{found}{math.ceil(n * config.world / groups):6}")
    buckets = {level: {t: (keep, equal.get((level, t), n)) for t, (keep, n) in row.items()}
               for level, row in config.buckets.items()}
    return "\n".join([*lines, source("world", groups), source("buckets", buckets)])


def largest(ok):
    """The largest n with ok(n), 0 to MOST, by doubling and bisection: exact up to 32, else at most 1/16 too small."""
    low, high = 0, 1
    while high <= MOST and ok(high):
        low, high = high, 2 * high
    while high <= MOST and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if ok(middle) else (low, middle)
    return low
