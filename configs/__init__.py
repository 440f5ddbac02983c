"""One run = one frozen `Config`, built by a Python file: what is trained, on which data, for how long.

    from configs import load, dump
    config = load("configs/stage1.py", ["--lr=1e-5", "--model.depth=4", "--mask_ratios={'mask_no': 1.0}"])
    dump(config)    # Python source that loads back to an equal Config; every run writes it to <out>/config.py

What cannot work is an error here, before a GPU is used.  configs/plan.py estimates what a run costs.
"""
import ast
import difflib
import inspect
import math
import re
import runpy
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from pprint import pformat

import torch

from data import ASPECT
from masks import RECIPE, check_ratios  # noqa: F401    config files take their names from here
from model import TINY, STDiTConfig  # noqa: F401

# iddpm's is the release's; ddim: 2010.02502 has 20 to 100; dpm: 2211.01095 has 15 to 20 with guidance
SAMPLING_STEPS = {"iddpm": 100, "ddim": 50, "dpm": 20}


@dataclass(frozen=True, kw_only=True)
class Config:
    # what is trained, on which clips
    model: STDiTConfig = STDiTConfig()              # the network; the default is XL/2
    vae: str                                        # folder or hub name of the AutoencoderKL
    text_encoder: str                               # folder or hub name of the T5 encoder and its tokenizer
    data: str | tuple                               # meta.csv: a path, a glob, or a tuple of either
    buckets: dict                                   # resolution -> frames -> (keep probability, clips per GPU)
    # reading them
    frame_interval: int = 1                         # every n-th source frame is taken
    fps: float = 24.0                               # of the source that samples imitate; theirs is fps / frame_interval
    holdout: float = 0.0                            # share of the clips, by a hash of the path, kept for validation
    windows: int = 0                                # fixed windows of a clip, as a cache needs; 0 = a new one each time
    cache: str = ""                                 # folder of cached latents and text embeddings; "" = none
    num_workers: int = 2                            # reading processes per GPU; 0 = read in the training process
    read_timeout: float = 300.0                     # seconds without a batch, after which a reading process has hung
    max_bad: float = 0.05                           # share of clips that cannot be read at which training stops
    # the loss and the optimizer
    world: int = 1                                  # GPUs of the batch sizes: a global batch is clips per GPU * world
    mask_ratios: dict                               # masking strategy (masks.py) -> share of the samples
    prediction: str = "eps"                         # the network's target: "eps" (the noise) or "v" (velocity)
    sampler: str = "iddpm"                          # of samples, one of SAMPLING_STEPS; sample.py has a flag
    cfg_scale: float = 7.0                          # their guidance (Open-Sora's); sample.py has a flag
    speed: bool = False                             # draw t as SpeeD does (arXiv 2405.17403) instead of uniformly
    lr: float                                       # AdamW's step size, constant after the warm-up
    weight_decay: float = 0.0                       # AdamW, decoupled
    warmup_steps: int = 0                           # optimizer steps of linear warm-up from 0 to lr
    grad_clip: float = 1.0                          # largest global gradient norm (Open-Sora's)
    ema_decay: float = 0.9999                       # of the averaged weights, per step; DiT's (arXiv 2212.09748)
    steps: int                                      # optimizer steps of the run
    # memory and GPUs
    dtype: str = "bf16"                             # "fp32" or "bf16": of the activations; weights are kept in fp32
    checkpointing: int = 0                          # every n-th block keeps its input only, 1 = all, 0 = none
    compile: bool = False                           # torch.compile each block
    shard: int = 0                                  # GPUs that share the weights and have replicas; 0 = all
    sp: int = 1                                     # GPUs that share one clip: sequence parallelism
    accumulation: int = 1                           # micro-batches into which a GPU's clips of a step are split
    # the run, its files and what it shows
    seed: int = 0                                   # decides clips, windows, noise, t, masks and the first weights
    out: str                                        # folder of the run: checkpoints, log.jsonl, config.py
    init: str = ""                                  # weights to start from; "" = fresh ones
    init_optimizer: bool = False                    # take the optimizer's state too from the run that init names
    save_every: int = 500                           # steps between checkpoints
    keep_last: int = 2                              # checkpoints that stay
    sample_every: int = 500                         # steps between previews; 0 = none
    validate_every: int = 0                         # steps between losses on held-out clips (holdout); 0 = none
    prompts: tuple = ()                             # captions of the previews

    def __post_init__(self):
        for field in fields(self):
            if not has_type(getattr(self, field.name), field.type):
                raise wrong(self, field.name, f"a {getattr(field.type, '__name__', field.type)}")
        for name in ("frame_interval", "fps", "read_timeout", "world", "lr", "grad_clip", "steps", "sp",
                     "accumulation", "save_every", "keep_last"):
            if not 0 < getattr(self, name) < math.inf:
                raise wrong(self, name, "more than 0, and finite")
        for name in ("windows", "num_workers", "cfg_scale", "weight_decay", "warmup_steps", "checkpointing", "shard",
                     "sample_every", "validate_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise wrong(self, name, "0 or more, and finite")
        for name in ("holdout", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise wrong(self, name, "a share from 0 to 1")
        for name in ("data", "vae", "text_encoder", "out"):
            if not getattr(self, name):
                raise wrong(self, name, "a path or a name")
        if isinstance(self.data, tuple) and not all(isinstance(path, str) for path in self.data):
            raise wrong(self, "data", "paths")
        if not 0 <= self.ema_decay < 1:
            raise wrong(self, "ema_decay", "0 or more and less than 1")
        if self.validate_every and not self.holdout:
            raise wrong(self, "validate_every", "0 unless holdout is above 0")
        if self.init_optimizer and not self.init:
            raise wrong(self, "init_optimizer", "False unless init is set")
        if self.cache and not self.windows:
            raise wrong(self, "windows", "1 or more with a cache: it holds fixed windows of a clip")
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise wrong(self, "prompts", "captions")
        if self.prediction not in ("eps", "v"):
            raise wrong(self, "prediction", "'eps' or 'v'")
        if self.sampler not in SAMPLING_STEPS:
            raise wrong(self, "sampler", f"one of {', '.join(SAMPLING_STEPS)}")
        if self.dtype not in ("fp32", "bf16"):
            raise wrong(self, "dtype", "'fp32' or 'bf16'")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise wrong(self, "seed", "an integer of 64 bits")
        check_ratios(self.mask_ratios)
        check_buckets(self.buckets)

    @property
    def torch_dtype(self):
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def trained(self):
        """Returns {(resolution, frames): clips per GPU} of the buckets that keep clips."""
        found = {}
        for resolution, lengths in self.buckets.items():
            for num_frames, (keep, clips) in lengths.items():
                if keep > 0:
                    found[resolution, num_frames] = clips
        return found

    def cost(self, bucket):
        """Returns (tokens, FLOP of forward and backward) of one clip; the VAE makes a latent cell of 8 x 8 pixels."""
        latents = bucket.num_frames, bucket.height // 8, bucket.width // 8
        return math.prod(self.model.grid(*latents)), 3 * flops(self.model, *latents, self.model.model_max_length)


def flops(model, T, h, w, L):
    """Returns the FLOPs of a forward of one clip: matrix products and attention, 2 for a multiply-add."""
    frames, rows, columns = model.grid(T, h, w)
    S = rows * columns
    N = frames * S
    C = model.hidden_size
    block = 2 * N * C * C * (4 + 4 + 2 + 2 * model.mlp_ratio)           # space, time, queries of the text, MLP
    block += 4 * L * C * C                                              # keys and values of the text
    block += 4 * N * C * (S + frames + L)                               # three attentions
    patches = 2 * N * C * math.prod(model.patch_size) * (model.in_channels + model.out_channels)
    text = 2 * L * C * (model.caption_channels + C)
    return int(model.depth * block + patches + text)


def wrong(config, name, expected):
    return ValueError(f"{name}={getattr(config, name)!r}: expected {expected}")


def has_type(value, kind):
    """Returns whether a value is of a declared type; an int passes for a float, a bool for a bool alone."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_buckets(buckets):
    """Raises ValueError for a table that cannot work; it names the entry."""
    for resolution, lengths in buckets.items():
        if resolution not in ASPECT:
            raise ValueError(f"buckets: there is no resolution {resolution!r}{suggest(resolution, ASPECT)}")
        if not isinstance(lengths, dict) or not lengths:
            raise ValueError(f"buckets[{resolution!r}] = {lengths!r}: expected numbers of frames, as in "
                             "{16: (1.0, 4)}")
        for num_frames, entry in lengths.items():
            where = f"buckets[{resolution!r}][{num_frames!r}] = {entry!r}"
            if not isinstance(num_frames, int) or num_frames < 1 or not isinstance(entry, tuple) or len(entry) != 2:
                raise ValueError(f"{where}: expected frames: (keep probability, clips per GPU), as in 16: (1.0, 4)")
            keep, clips = entry
            if not isinstance(keep, (int, float)) or not 0 <= keep <= 1:
                raise ValueError(f"{where}: expected a keep probability from 0 to 1")
            if keep > 0 and not (isinstance(clips, int) and clips > 0):
                raise ValueError(f"{where}: a bucket that keeps clips needs a batch size, as in ({keep}, 4)")
    if not any(entry[0] > 0 for lengths in buckets.values() for entry in lengths.values()):
        raise ValueError(f"buckets={buckets}: keeps no clip at all, expected a keep probability above 0 in one of them")


def suggest(name, known):
    """Returns the end of an error about an unknown name: the nearest known one, or all."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(map(repr, known))}"


def load(path, overrides=()):
    """Runs the Python file `path` (from here, the repository or its configs), which defines `config`, and returns it
    with `--key=value` overrides applied.  Raises ValueError and FileNotFoundError."""
    folder = Path(__file__).parent
    places = [Path(path), folder.parent / path, folder / path, folder / f"{path}.py"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = ", ".join(f"configs/{p.name}" for p in sorted(folder.glob("*.py")) if not is_module(p))
        raise FileNotFoundError(f"no config file {path}, there are: {known}")
    try:
        config = runpy.run_path(str(file)).get("config")
    except (SyntaxError, NameError, ImportError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error} - expected Python that ends in "
                         "`config = Config(...)`") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: {unknown_field(error) or error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{file}: expected a line `config = Config(...)`, its `config` is {config!r}")
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals:
            raise ValueError(f"override {text!r}: expected --key=value, as in --lr=1e-5")
        config = override(config, key, value)
    return config


def is_module(path):
    return path.name in ("__init__.py", "plan.py")


def unknown_field(error):
    """Returns a message with the nearest field if Python says that a dataclass has none of that name, else None."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return None
    kind = STDiTConfig if found[1] == "STDiTConfig" else Config
    return f"{found[1]} has no {found[2]!r}{suggest(found[2], kind.__annotations__)}"


def override(config, key, text, prefix=""):
    """Returns `config` with one field replaced.  key: "lr" or "model.depth"; text: a literal, or text for a str."""
    name, _, rest = key.partition(".")
    names = [field.name for field in fields(config)]
    old = getattr(config, name, None)
    if name not in names or (rest and not is_dataclass(old)):
        raise ValueError(f"--{prefix}{key}: there is no {prefix}{key}{suggest(name, names)}")
    if rest:
        return replace(config, **{name: override(old, rest, text, f"{prefix}{name}.")})
    value = text
    if not isinstance(old, str) or text.startswith("("):        # data may be a tuple of paths
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError):
            value = text
    kind = type(config).__annotations__[name]
    kind = tuple if name == "patch_size" else kind              # which is declared as three numbers
    if not has_type(value, kind):
        expected = getattr(kind, "__name__", kind)
        raise ValueError(f"{prefix}{name}={value!r} is of type {type(value).__name__}, expected {expected}")
    return replace(config, **{name: value})


def fields_text():
    """Returns the fields of Config and of its model with types, defaults and units: the lines of their classes."""
    texts = []
    for kind in (Config, STDiTConfig):
        source = inspect.getsource(kind).partition(":\n")[2].partition("\n\n")[0]
        texts.append("\n".join(line for line in source.splitlines() if '"""' not in line))
    return f"{texts[0]}\n    # the network: --model.depth=4 and so on\n{texts[1]}"


def dump(config):
    """Returns the Python source of a config file that loads back to an equal Config."""
    lines = ["from configs import Config, STDiTConfig", "", "config = Config("]
    for field in fields(config):
        text = pformat(getattr(config, field.name), width=110, sort_dicts=False)
        indent = " " * (len(field.name) + 5)
        lines.append(f"    {field.name}={text},".replace("\n", "\n" + indent))
    return "\n".join([*lines, ")", ""])
