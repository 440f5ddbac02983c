"""The frozen networks: pixels to latents (AutoencoderKL, frame by frame) and captions to embeddings (a T5 encoder).

    python vae.py clip.mp4 --vae assets/tiny/vae        encodes and decodes a clip and prints the PSNR
    python vae.py cache configs/tiny.py                 writes what training reads; torchrun shares the work

In    video [B 3 T H W] in -1..1; captions.
Out   latents z [B C T h w], h = H // 8, of about unit variance; embeddings y [B L C] with y_mask [B L].

Papers: latent diffusion (arXiv 2112.10752) for the autoencoder, T5 (arXiv 1910.10683) for the text encoder.
"""
import argparse
import csv
import hashlib
import math
import os
import re
import secrets
import shutil
import sys
import unicodedata
from datetime import timedelta
from functools import lru_cache, partial
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import (IMAGE_FPS, Plan, UnreadableClip, batches, bucket_list, check_row, length_and_rate, one_line_errors,
                  positive_int, reachable, read_clip, read_meta, read_window, report, resize_crop, short_hash,
                  to_uint8, to_video, window_generator, window_number, write_video)

ROOT = Path(__file__).parent


# ---------------------------------------------------------------- pixels <-> latents
PIXELS_AT_ONCE = 2 ** 20    # in one call of the autoencoder, so that its decoder holds at most 3 GiB
DECODER_BYTES = 768 * 4     # that sd-vae-ft-ema's decoder holds per pixel at its peak, in fp32; its encoder holds less


class VAE:
    """diffusers' AutoencoderKL for video: frozen, and each frame by itself."""

    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)
        self.scale = net.config.scaling_factor      # 1 / the latents' standard deviation (2112.10752, appendix G)
        self.channels = net.config.latent_channels
        self.device = net.device
        self.dtype = net.dtype
        # Stable Diffusion's network takes pixels; that of assets/tiny takes patches of 4 x 4 pixels as 48 channels.
        self.patch = math.isqrt(net.config.in_channels // 3)
        self.down = self.patch * 2 ** (len(net.config.block_out_channels) - 1)      # all blocks but the last halve

    @torch.no_grad()
    def moments(self, video):
        """Returns the scaled mean and standard deviation of the posterior, two [B C T h w], of video [B 3 T H W]."""
        if video.ndim != 5 or video.shape[1] != 3 or min(video.shape[3:]) < self.down:
            raise ValueError(f"video must be [B 3 T H W] with H and W {self.down} or more, got {list(video.shape)}")
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(self.dtype)
        rows = frames.shape[2] // self.patch * self.patch           # of whole patches
        columns = frames.shape[3] // self.patch * self.patch
        frames = F.pixel_unshuffle(frames[:, :, :rows, :columns], self.patch)
        means = []
        stds = []
        for part in frames.split(frames_at_once(*video.shape[3:])):
            posterior = self.net.encode(part).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
        mean = torch.cat(means).float() * self.scale
        std = torch.cat(stds).float() * self.scale
        B = len(video)
        return (rearrange(mean, "(b t) c h w -> b c t h w", b=B),
                rearrange(std, "(b t) c h w -> b c t h w", b=B))

    def encode(self, video):
        """Returns the mean of the posterior, z [B C T h w], of video [B 3 T H W]."""
        mean, _ = self.moments(video)
        return mean

    @torch.no_grad()
    def decode(self, z):
        """Returns video [B 3 T 8h 8w] in -1..1, fp32, of z [B C T h w]."""
        frames = rearrange(z / self.scale, "b c t h w -> (b t) c h w").to(self.dtype)
        _, _, h, w = frames.shape
        decoded = []
        for part in frames.split(frames_at_once(self.down * h, self.down * w)):
            decoded.append(F.pixel_shuffle(self.net.decode(part).sample.float(), self.patch))
        return rearrange(torch.cat(decoded), "(b t) c h w -> b c t h w", b=len(z)).clamp(-1, 1)


def frames_at_once(H, W):
    """Returns how many frames pass through the autoencoder together."""
    return max(1, PIXELS_AT_ONCE // (H * W))


def psnr(a, b):
    """Returns the peak signal-to-noise ratio in dB of two tensors of one shape in -1..1."""
    mean_squared_error = F.mse_loss(a.float(), b.float()).item()
    return 10 * math.log10(4 / max(mean_squared_error, 1e-12))


# ---------------------------------------------------------------- captions -> embeddings
MAX_WARNINGS = 20       # lines about captions that the text encoder cannot take as they are


class TextEncoder:
    """transformers' T5EncoderModel with its tokenizer, frozen.

    clean: whether captions pass through clean_caption first.  num_cut: how many captions so far were longer than
    max_length.  Those, and words that the tokenizer does not know, are warned of."""

    def __init__(self, net, tokenizer, max_length, clean=False):
        self.net = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.clean = clean
        self.num_cut = 0
        self.num_warnings = 0

    @torch.no_grad()
    def __call__(self, captions):
        """Returns y [B L C], fp32, and y_mask [B L], False where y is padding, of captions; L = max_length."""
        texts = [self.prepare(caption) for caption in captions]
        tokens = self.tokenizer(texts, max_length=self.max_length, padding="max_length", truncation=True,
                                return_tensors="pt")
        self.check(captions, tokens.input_ids)
        tokens = tokens.to(self.net.device)
        y = self.net(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return y.float(), tokens.attention_mask.bool()

    def prepare(self, caption):
        return clean_caption(caption) if self.clean else caption

    def lengths(self, captions):
        """Returns how many tokens each caption has before it is cut at max_length."""
        texts = [self.prepare(caption) for caption in captions]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]

    def unknown(self, caption):
        """Returns the words of a caption that the tokenizer does not know: the network reads each of them as <unk>."""
        return [word for word in self.prepare(caption).split()
                if self.tokenizer.unk_token_id in self.tokenizer(word).input_ids]

    def check(self, captions, input_ids):
        """Warns of captions that are cut or have unknown words; input_ids [B L] are their tokens."""
        has_unknown = (input_ids == self.tokenizer.unk_token_id).any(dim=1).tolist()
        for caption, length, unknown in zip(captions, self.lengths(captions), has_unknown):
            if length > self.max_length:
                self.num_cut += 1
                self.warn(f"cut at {self.max_length} of its {length} tokens: {caption}")
            if unknown:
                self.warn(f"{self.net.name_or_path} does not know: {', '.join(self.unknown(caption))}")

    def warn(self, message):
        if self.num_warnings < MAX_WARNINGS:
            report(f"warning: {message}")
        if self.num_warnings == MAX_WARNINGS:
            report(f"warning: more than {MAX_WARNINGS} captions are cut or have unknown words; no more are shown")
        self.num_warnings += 1


class PlainText(HTMLParser):
    """Stands in for bs4's BeautifulSoup in diffusers' cleaner: `text` is the markup without its tags and comments."""

    def __init__(self, markup, features):
        super().__init__()
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_data(self, data):
        self.text += data


def fix_text(text):
    """Stands in for ftfy.fix_text in diffusers' cleaner: ligatures, full-width characters, curly quotes, then NFC.

    ftfy also mends text that was decoded wrongly, such as "â€œ", which stays here, and removes control characters."""
    text = re.sub("[ĲĳŉǄ-ǌǱ-ǳ\ufb00-\ufb06\u3000\uff01-\uffef]",
                  lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    return unicodedata.normalize("NFC", text)


@lru_cache
def caption_cleaner():
    """Returns diffusers' cleaner of Open-Sora's captions, which is DeepFloyd's.

    It asks for two packages.  The stand-ins are used whether they are installed or not, so that a caption gives the
    same everywhere."""
    hugging_face()
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha
    stand_ins = {"BeautifulSoup": PlainText, "ftfy": SimpleNamespace(fix_text=fix_text)}
    pixart = pipeline_pixart_alpha.PixArtAlphaPipeline
    return partial(FunctionType(pixart._clean_caption.__code__, vars(pipeline_pixart_alpha) | stand_ins), pixart)


def clean_caption(text):
    """Returns a caption as the T5 of Open-Sora's weights saw it: lower case, without addresses, tags and odd signs."""
    clean_once = caption_cleaner()
    return clean_once(clean_once(text))     # as Open-Sora does: the second time finds what the first one laid bare


# ---------------------------------------------------------------- loading networks
# transformers and diffusers fill what is missing with random numbers or an empty tokenizer, and report success.  Here
# each of these is an error that names what is missing.
@lru_cache
def hugging_face():
    """Returns the packages diffusers and transformers.

    They take seconds to import, so mistakes in a command are reported before.  Where Hugging Face's package `kernels`
    is installed, transformers would look for its functions in our kernels.py."""
    import transformers.utils.import_utils
    for module in (transformers.utils, transformers.utils.import_utils):
        module.is_kernels_available = lambda *_: False
    import diffusers
    transformers.utils.logging.disable_progress_bar()       # which it shows while weights load
    return diffusers, transformers


T5_VOCABULARY = 32128                   # rows of the published T5 networks: 32,100 pieces, rounded up
T5_TOKENIZER = "google-t5/t5-base"      # all of them have its pieces


def load_vae(name, dtype=torch.float32, device="cpu"):
    """Returns the VAE of a folder or hub name, such as "stabilityai/sd-vae-ft-ema"."""
    diffusers, _ = hugging_face()
    net = load_net(diffusers.AutoencoderKL, find(name), torch_dtype=dtype, low_cpu_mem_usage=False)
    return VAE(net.to(device))


def load_text_encoder(name, max_length, dtype=torch.float32, device="cpu", clean=False):
    """Returns the TextEncoder of a folder or hub name, such as "DeepFloyd/t5-v1_1-xxl"."""
    name = find(name)
    _, transformers = hugging_face()
    net = load_net(transformers.T5EncoderModel, name, dtype=dtype)
    tokenizer = load_tokenizer(name, net.config.vocab_size)
    return TextEncoder(net.to(device), tokenizer, max_length, clean)


def load_tokenizer(name, vocab_size):
    """Returns the tokenizer of a T5 encoder: its tokenizer.json, or T5's for a network with T5's vocabulary.

    DeepFloyd's T5-XXL, which Open-Sora uses, has no tokenizer.json.  vocab_size: the rows that the network has."""
    file = file_of(name, "tokenizer.json")
    if file is None and vocab_size == T5_VOCABULARY:
        file = file_of(T5_TOKENIZER, "tokenizer.json")
        if file:
            report(f"note: {name} has no tokenizer.json; that of {T5_TOKENIZER} is used, which has the same pieces")
    if file is None:
        whose = f"that of {T5_TOKENIZER}" if vocab_size == T5_VOCABULARY else "the one that it was trained with"
        folder = name if Path(name).is_dir() else "a folder with its config.json and weights, and name that folder"
        raise FileNotFoundError(f"text encoder {name!r} has no tokenizer.json: put {whose} into {folder}")
    _, transformers = hugging_face()
    try:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:          # of the tokenizers library, which has no class of errors of its own
        raise ValueError(f"{file} cannot be read as a tokenizer: {str(error).splitlines()[0]}") from error
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    missing = sorted(set(special.values()) - set(tokenizer.get_vocab()))
    if missing:
        raise ValueError(f"{file} has no entry {missing[0]}, expected the tokenizer of a T5")
    tokenizer.add_special_tokens(special)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{file} has {len(tokenizer)} entries and the network of {name!r} has rows for {vocab_size}: "
                         "they do not belong together")
    return tokenizer


def load_net(cls, name, **options):
    """Returns a network of diffusers or transformers by hub name or folder, with all of its weights or not at all."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{cls.__name__} {name!r} has no config.json")
    net, info = from_pretrained(cls, name, output_loading_info=True, **options)
    wrong = [str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{cls.__name__} {name!r}: its weights lack {min(wrong)}{others}, expected all of them - "
                         "download it again")
    return net


def from_pretrained(cls, name, **options):
    """Returns what cls.from_pretrained does; an error of a library becomes one sentence that names the model."""
    try:
        return cls.from_pretrained(name, **options)
    except OSError as error:            # a folder, a file or a connection is missing
        raise FileNotFoundError(f"{cls.__name__} {name!r} is neither a folder with config.json and weights nor a model "
                                f"that the hub gave: {str(error).splitlines()[0]}") from error
    except (SafetensorError, RuntimeError) as error:        # the second: tensors of other sizes than config.json has
        reason = str(error).splitlines()[0]
        raise ValueError(f"{cls.__name__} {name!r}: its weights cannot be read, is the file whole? {reason}") from error


def find(name):
    """Returns the path of a file or folder, from here or else from this repository; else the name, one on the hub."""
    for path in (Path(name), ROOT / name):
        if path.exists():
            return str(path)
    return name


def fetch(name, files, missing):
    """Downloads those files (glob patterns) of a model on the hub that are not there yet, and returns their folder.

    missing: the message if they cannot be downloaded; the hub's reason follows it."""
    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"{missing}, which gave: {str(error).splitlines()[0]}") from error


def file_of(name, file):
    """Returns the path of a file of a folder or of a model on the hub, or None if there is none."""
    try:
        path = Path(name, file) if Path(name).is_dir() else Path(hf_hub_download(str(name), file))
    except OSError:         # the hub has no such file, or is out of reach
        return None
    return path if path.is_file() else None


# ---------------------------------------------------------------- the cache
# Frozen networks give the same in every epoch, so that training can read their outputs from files, in two folders:
#   latents/3f/3f09c1....safetensors    one for each clip, bucket and window: "moments" [2 C T h w], mean and std,
#                                       and "source" [3], the height, width and frame rate of the clip's file
#   captions/a4/a4e21b....safetensors   one for each distinct caption: "y" [tokens C], "y_mask" [L]
# A file's name is a hash of all that it depends on, so that none is ever stale.  It appears whole or not at all, so
# that a run which was stopped continues with those that are missing, and ranks share nothing.  This is for up to about
# a million clips: of more, train from pixels.

def cache_file(folder, kind, *what):
    """Returns the path in a cache of what depends on these values, in one of 256 subfolders."""
    name = short_hash(*what)
    return Path(folder, kind, name[:2], f"{name}.safetensors")


def save_whole(path, tensors):
    """Writes {name: tensor} to a file that is whole or absent, even if a process is killed or two write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except SafetensorError as error:        # the disk is full, say
        raise OSError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def fingerprint(weights):
    """Returns a name for weights {name: tensor}: a hash of the first 64 values of each, in the order of their names.

    Training and rounding change every tensor, so that these suffice, and 9 GiB of T5-XXL need not be gone through."""
    sha = hashlib.sha1()
    for _, value in sorted(weights.items()):
        sha.update(value.flatten()[:64].float().cpu().numpy().tobytes())
    return sha.hexdigest()


def stamp(path):
    """Returns a file's path, size and time of change; None for the last two if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return path, None, None
    return path, status.st_size, status.st_mtime_ns


def encode_caption(text_encoder, caption):
    """Returns {"y" [tokens C], "y_mask" [L]} of a caption, by itself, so that it does not depend on others."""
    y, y_mask = text_encoder([caption])
    return {"y": y[y_mask].to(text_encoder.net.dtype).cpu(), "y_mask": y_mask[0].cpu()}


def pad_caption(caption):
    """Returns y [L C], fp32 and 0 where it is padding, and y_mask [L] of what encode_caption returned."""
    y = torch.zeros(len(caption["y_mask"]), caption["y"].shape[1])
    y[caption["y_mask"]] = caption["y"].float()
    return y, caption["y_mask"]


def remember(load, captions, folder=None, key=()):
    """Returns a text encoder of these captions alone, which needs no network: T5-XXL takes 9 GiB in bf16.

    load() returns the TextEncoder; it is called only if a caption is not in `folder` yet, where embeddings stay for the
    next time.  key: all that they depend on besides the caption."""
    known = {}
    encoder = None
    for caption in dict.fromkeys(captions):
        path = cache_file(folder, "captions", key, caption) if folder else None
        try:
            if path and path.is_file():
                known[caption] = load_file(path)
                continue
        except SafetensorError:     # damaged: written again
            pass
        encoder = encoder or load()
        known[caption] = encode_caption(encoder, caption)
        if path:
            save_whole(path, known[caption])

    def encode(captions):
        """Returns y [B L C] and y_mask [B L]."""
        y, y_mask = zip(*(pad_caption(known[caption]) for caption in captions))
        return torch.stack(y), torch.stack(y_mask)

    return encode


class CachedClips:
    """Reads from a cache what training needs of a clip, as data.ClipDataset reads its pixels."""

    def __init__(self, meta, config, vae, text_encoder):
        self.meta = meta
        self.config = config
        vocabulary = sorted(text_encoder.tokenizer.get_vocab().items())
        self.vae_key = short_hash(fingerprint(vae.net.state_dict()), vae.scale, vae.dtype)
        self.text_key = short_hash(fingerprint(text_encoder.net.state_dict()), vocabulary, text_encoder.max_length,
                                   text_encoder.clean, text_encoder.net.dtype)

    def latents_file(self, clip, bucket, window):
        """Returns the path of a clip's latents.

        It depends on the path, size and time of change of the clip's file, so that the clips must stay in place."""
        source = stamp(os.path.abspath(self.meta.path(clip)))
        key = int(self.meta["key"][clip])       # which places the window
        return cache_file(self.config.cache, "latents", source, key, window, self.config.frame_interval, tuple(bucket),
                          bucket.height, bucket.width, self.vae_key)

    def caption_file(self, caption):
        return cache_file(self.config.cache, "captions", self.text_key, caption)

    def read(self, clip, bucket, step, slot):
        """Returns {"mean", "std" [C T h w], "y" [L C], "y_mask" [L], "fps", "decoded"}; raises UnreadableClip."""
        path = self.meta.path(clip)
        latents = self.load(path, self.latents_file(clip, bucket, window_number(self.config, bucket, step, slot)))
        y, y_mask = pad_caption(self.load(path, self.caption_file(self.meta.text(clip))))
        height, width, fps = latents["source"].tolist()
        fps = check_row(path, self.meta.rows[clip], int(height), int(width), fps, bucket)
        mean, std = latents["moments"].float()
        return {"mean": mean, "std": std, "y": y, "y_mask": y_mask, "fps": fps, "decoded": 0}

    def load(self, path, file):
        try:
            return load_file(file)
        except FileNotFoundError:
            raise UnreadableClip(f"{path}: is not in the cache {self.config.cache}: it could not be read when that was "
                                 "written, or has changed since") from None
        except SafetensorError as error:
            raise UnreadableClip(f"{path}: its {file} in the cache is damaged ({error}): delete that file, and the "
                                 "next start writes it again") from None


class WindowsToCache:
    """Reads the pixels of a clip's window number `slot`, for data.batches; a clip that cannot be read has an error."""

    def __init__(self, cached):
        self.cached = cached
        self.meta = cached.meta
        self.config = cached.config

    def read(self, clip, bucket, step, slot):
        """Returns {"video": uint8 [T H W 3], "source" [3], "file": where its latents go, "error", "fps", "decoded"}."""
        file = self.cached.latents_file(clip, bucket, slot)     # named before it is read: it may change meanwhile
        path = self.meta.path(clip)
        generator = window_generator(self.meta["key"][clip], slot)
        item = {"file": str(file), "error": "", "fps": IMAGE_FPS, "decoded": 0}
        try:
            window = read_clip(path, bucket.num_frames, self.config.frame_interval, None, generator)
        except UnreadableClip as error:
            return item | {"video": torch.zeros(0), "source": torch.zeros(3), "error": str(error)}
        _, height, width, _ = window.frames.shape
        source = torch.tensor([height, width, window.fps or 0], dtype=torch.float64)
        return item | {"video": resize_crop(window.frames, bucket.height, bucket.width), "source": source}


def write_cache(meta, config, vae, text_encoder, rank=0, world=1, group=None):
    """Writes what config.cache lacks of all clips in all buckets that they can get, and returns a CachedClips.

    Each clip has config.windows windows, an image one.  Rank r of world writes its share; all wait for the slowest at
    the end, collective on `group`, whose timeout has to be longer than that takes.  Raises ValueError if the disk has
    no room or too many clips cannot be read (config.max_bad); bad_clips.csv in the folder lists those."""
    cached = CachedClips(meta, config, vae, text_encoder)
    windows, captions = clips_to_cache(meta, config)
    Path(config.cache).mkdir(parents=True, exist_ok=True)
    missing_windows = [window for window in windows[rank::world] if not cached.latents_file(*window).is_file()]
    missing_captions = [text for text in captions[rank::world] if not cached.caption_file(text).is_file()]
    check_room(config, vae, text_encoder, missing_windows, missing_captions, world)
    if rank == 0:
        share = "" if world == 1 else f" by rank 0 of {world}"
        print(f"{config.cache}: {len(windows):,} windows and {len(captions):,} captions, of which "
              f"{len(missing_windows) + len(missing_captions):,} have to be written{share}")
    faults = write_latents(cached, vae, missing_windows, rank)
    for caption in tqdm(missing_captions, "caching captions", disable=rank > 0 or not missing_captions):
        save_whole(cached.caption_file(caption), encode_caption(text_encoder, caption))
    everyones = [faults]
    if world > 1:
        everyones = [None] * world
        dist.all_gather_object(everyones, faults, group)        # collective
    if rank == 0:
        list_faults(Path(config.cache, "bad_clips.csv"), everyones)
    return cached


def clips_to_cache(meta, config):
    """Returns all (clip, bucket, window) that training can ask for, and all distinct captions."""
    buckets = bucket_list(config.buckets)
    windows = []
    clips = set()
    for number, some in reachable(meta, config).items():
        bucket = buckets[number]
        num_windows = 1 if bucket.num_frames == 1 else config.windows
        windows += [(clip, bucket, window) for clip in some.tolist() for window in range(num_windows)]
        clips.update(some.tolist())
    if not clips:
        raise ValueError(f"{config.data}: no clip fits any bucket; `python data.py META CONFIG` prints why")
    captions = dict.fromkeys(meta.text(clip) for clip in sorted(clips))
    return windows, list(captions)


def check_room(config, vae, text_encoder, windows, captions, world):
    """Raises ValueError if the disk has no room for these windows and captions of a rank and as much of the others."""
    num_values = 0
    for _, bucket, _ in windows:
        num_values += 2 * vae.channels * bucket.num_frames * (bucket.height // vae.down) * (bucket.width // vae.down)
    if captions:
        num_tokens = sum(min(length, text_encoder.max_length) for length in text_encoder.lengths(captions))
        num_values += num_tokens * text_encoder.net.config.d_model
    needed = world * num_values * config.torch_dtype.itemsize / 1e6
    free = shutil.disk_usage(config.cache).free / 1e6
    if needed > free:
        raise ValueError(f"{config.cache} has {free:,.1f} MB free, expected {needed:,.1f} MB for the cache: make room, "
                         "or name another folder with --cache=DIR")


def write_latents(cached, vae, windows, rank):
    """Encodes windows [(clip, bucket, window)], read ahead by other processes; returns {path: why it is unreadable}."""
    faults = {}
    num_bad = 0

    def plan(step, *_):
        clip, bucket, window = windows[step]
        return Plan(step, bucket, [window], np.array([[clip]]))

    read = batches(SimpleNamespace(plan=plan), WindowsToCache(cached), 0, len(windows))
    bar = tqdm(read, "caching windows", len(windows), disable=rank > 0 or not windows)
    for num_tried, (batch, (clip, _, _)) in enumerate(zip(bar, windows), start=1):
        (error,) = batch["error"]
        if not error:
            mean, std = vae.moments(to_video(batch["video"].to(vae.device)))        # video [1 T H W 3]
            moments = torch.cat([mean, std]).to(vae.dtype)
            save_whole(Path(batch["file"][0]), {"moments": moments, "source": batch["source"][0]})
            continue
        report(f"not cached: {error}")
        faults[cached.meta.path(clip)] = error
        num_bad += 1
        max_bad = cached.config.max_bad
        if num_tried >= 200 and num_bad > max_bad * num_tried:      # 200: as data.BadClips
            raise ValueError(f"{num_bad} of {num_tried} windows could not be read, more than {max_bad=:g} of them, see "
                             "above: fix or remove their clips, or raise max_bad")
    return faults


def list_faults(path, everyones):
    """Writes the clips that no rank could read to a csv file, or removes it if there are none."""
    path.unlink(missing_ok=True)
    faults = {}
    for one in everyones:
        faults |= one
    if faults:
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows([("path", "reason"), *sorted(faults.items())])
        print(f"{len(faults):,} clips could not be read and are not in the cache, see {path}", file=sys.stderr)


# ---------------------------------------------------------------- the command line
def reconstruct(args):
    """Encodes and decodes the first frames of a clip, prints the PSNR, and writes both to args.out."""
    if args.out and not Path(args.out).suffix:
        raise ValueError(f"--out {args.out}: expected a name that ends in .mp4, .gif or .png")
    vae = load_vae(args.vae)
    num_frames = min(args.num_frames, length_and_rate(args.clip)[0])
    frames, _ = read_window(args.clip, num_frames, start=0)
    height = frames.shape[1] // vae.down * vae.down         # what makes whole latent cells
    width = frames.shape[2] // vae.down * vae.down
    video = to_video(frames[:, :height, :width])[None]
    decoded = vae.decode(vae.encode(video))
    print(f"{args.clip}: {num_frames} frames of {height}x{width}, PSNR {psnr(decoded, video):.2f} dB")
    if args.out:
        write_video(args.out, np.concatenate([to_uint8(video[0]), to_uint8(decoded[0])], axis=1))
        print(f"{args.out}: the clip above, its reconstruction below")


def cache(config):
    """Writes the cache of a config, alone or as one of torchrun's processes."""
    if not config.cache:
        raise ValueError("cache='': expected a folder to write to, as in --cache=data/latents")
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(weeks=4))     # ranks end hours apart
    vae = load_vae(config.vae, config.torch_dtype, device)
    text_encoder = load_text_encoder(config.text_encoder, config.model.model_max_length, config.torch_dtype, device,
                                     config.model.as_released)
    write_cache(read_meta(config.data), config, vae, text_encoder, rank, world)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    caching = words[:1] == ["cache"]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\nPapers")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python vae.py CLIP [options] | python vae.py cache CONFIG [--field=value ...]", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    if caching:
        parser.add_argument("config", metavar="CONFIG", help="such as configs/tiny.py; --field=value overrides a field")
        args, overrides = parser.parse_known_args(words[1:])
        with one_line_errors(args.debug, "; run the same command again to continue"):
            import configs
            cache(configs.load(args.config, overrides))
        return
    parser.add_argument("clip", metavar="CLIP", help="a video or an image")
    parser.add_argument("--vae", default="assets/tiny/vae", help="folder or hub name; default: %(default)s")
    parser.add_argument("--num-frames", type=positive_int, default=16, help="of the clip; default: %(default)s")
    parser.add_argument("--out", help="where both are written: a .mp4, .gif or .png")
    args = parser.parse_args(words)
    with one_line_errors(args.debug):
        reconstruct(args)


if __name__ == "__main__":
    main()
