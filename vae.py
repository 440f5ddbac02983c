"""The frozen networks: pixels <-> latents (AutoencoderKL, frame by frame) and captions -> embeddings (T5 encoder).

    python vae.py clip.mp4 --vae assets/tiny/vae            encode, decode, print the PSNR (--out pair.png shows both)
    python vae.py cache configs/tiny.py                     write what training reads; also under torchrun

in    video [B 3 T H W] in -1..1, captions
out   z [B C T h w], h = H // 8, scaled to about unit variance; y [B L C], y_mask [B L]

Papers: latent diffusion (arXiv 2112.10752) for the autoencoder, T5 (arXiv 1910.10683) for the text encoder.
"""
import os
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main(): Ctrl-C shows no traceback of a half-done import
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")    # see kernels.py
import argparse
import csv
import hashlib
import io
import json
import math
import re
import shutil
import struct
import sys
import tempfile
import unicodedata
from collections import defaultdict
from datetime import timedelta
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote_plus

import transformers.utils.import_utils
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *_: False      # else it takes our kernels.py for the package of that name

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from data import (IMAGE_FPS, Bucket, Plan, Table, UnreadableClip, atomic_write, batches, bucket_list, length_and_rate,
                  one_line_errors, positive_int, reachable, read_meta, read_window, resize_crop, to_uint8, to_video,
                  window_generator, window_number, write_video)

disable_progress_bar()      # transformers' own, of loading weights
PIXELS_AT_ONCE = 2**20      # of frames that pass through the autoencoder together: its decoder's peak is then 3 GiB
DECODER_BYTES = 768 * 4     # that sd-vae-ft-ema's decoder holds for a pixel at its peak, in fp32; its encoder less


# ---------------------------------------------------------------- pixels <-> latents
class VAE:
    """diffusers' AutoencoderKL over video: each frame by itself, PIXELS_AT_ONCE, frozen."""

    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)
        self.scale = net.config.scaling_factor      # 1 / the latents' spread (2112.10752, appendix G): 0.18 in Stable's
        self.channels = net.config.latent_channels
        self.device = net.device
        self.down = 2 ** (len(net.config.block_out_channels) - 1)           # each block but the last halves the sides

    @torch.no_grad()
    def moments(self, video):
        """Mean and standard deviation of the posterior, scaled: two [B C T h w] for video [B 3 T H W] in -1..1."""
        if video.ndim != 5 or video.shape[1] != 3 or min(video.shape[3:]) < self.down:
            raise ValueError(f"video must be [B 3 T H W] with H and W {self.down} or more, got {list(video.shape)}")
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(self.net.dtype)
        posteriors = [self.net.encode(part).latent_dist for part in frames.split(frames_at_once(*video.shape[3:]))]
        join = lambda parts: rearrange(torch.cat(parts).float() * self.scale, "(b t) c h w -> b c t h w", b=len(video))
        return join([p.mean for p in posteriors]), join([p.std for p in posteriors])

    def encode(self, video):
        """z [B C T h w] of video [B 3 T H W]: the posterior's mean."""
        return self.moments(video)[0]

    @torch.no_grad()
    def decode(self, z):
        """video [B 3 T 8h 8w] in -1..1, fp32, of z [B C T h w]."""
        frames = rearrange(z / self.scale, "b c t h w -> (b t) c h w").to(self.net.dtype)
        parts = frames.split(frames_at_once(*(self.down * side for side in z.shape[3:])))
        video = torch.cat([self.net.decode(part).sample.float() for part in parts])
        return rearrange(video, "(b t) c h w -> b c t h w", b=len(z)).clamp(-1, 1)


def frames_at_once(H, W):
    return max(1, PIXELS_AT_ONCE // (H * W))


def load_vae(name, dtype=torch.float32, device="cpu"):
    """An AutoencoderKL by hub name ("stabilityai/sd-vae-ft-ema") or folder."""
    return VAE(load_net(AutoencoderKL, name, torch_dtype=dtype, low_cpu_mem_usage=False).to(device))


def load_net(cls, name, **options):
    """Returns a network of diffusers or transformers by hub name or folder, with all of its weights.

    Both libraries fill what is missing with random numbers and carry on; here that is a ValueError that names it."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{cls.__name__} {name!r} has no config.json")
    net, report = from_pretrained(cls, name, output_loading_info=True, **options)
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{cls.__name__} {name!r}: its weights lack {wrong[0]}{more}, expected all of them - download "
                         "it again")
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


def psnr(a, b):
    """Peak signal to noise ratio in dB of two tensors of one shape in -1..1."""
    return 10 * math.log10(4 / max(F.mse_loss(a.float(), b.float()).item(), 1e-12))


# ---------------------------------------------------------------- captions -> embeddings
class TextEncoder:
    """transformers' T5EncoderModel with its tokenizer, frozen.  cut: how many captions were longer than max_length.

    clean: captions pass through clean_caption first."""

    def __init__(self, net, tokenizer, max_length, clean=False):
        self.net, self.tokenizer, self.max_length = net.eval().requires_grad_(False), tokenizer, max_length
        self.clean, self.cut = clean_caption if clean else str, 0

    @torch.no_grad()
    def __call__(self, captions):
        """y [B L C], fp32, and y_mask [B L] (True = a token, not padding) of a list of captions; L = max_length."""
        tokens = self.tokenizer([self.clean(caption) for caption in captions], max_length=self.max_length,
                                padding="max_length", truncation=True, return_tensors="pt").to(self.net.device)
        self.cut += sum(length > self.max_length for length in self.lengths(captions))
        y = self.net(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return y.float(), tokens.attention_mask.bool()

    def lengths(self, captions):
        """How many tokens each caption has, before it is cut at max_length."""
        captions = [self.clean(caption) for caption in captions]
        return [len(tokens) for tokens in self.tokenizer(captions, verbose=False).input_ids]

    def unknown(self, caption):
        """The words of a caption that the tokenizer does not know."""
        return [w for w in self.clean(caption).split() if self.tokenizer.unk_token_id in self.tokenizer(w).input_ids]


def load_text_encoder(name, max_length, dtype=torch.float32, device="cpu", clean=False):
    """A T5 encoder and tokenizer by hub name ("DeepFloyd/t5-v1_1-xxl") or folder."""
    net = load_net(T5EncoderModel, name, dtype=dtype).to(device)
    tokenizer = load_tokenizer(name)
    if len(tokenizer) > net.config.vocab_size:
        raise ValueError(f"text encoder {name!r}: its tokenizer has {len(tokenizer)} entries, its network has rows for "
                         f"{net.config.vocab_size}: they do not belong together")
    return TextEncoder(net, tokenizer, max_length, clean)


def load_tokenizer(name):
    """T5's, of a folder or hub name.  DeepFloyd's has only SentencePiece's spiece.model, for which transformers would
    need two more packages: that file is read here.  Without either transformers would make up a tokenizer to which
    every word is unknown."""
    if file_of(name, "tokenizer.json"):
        return from_pretrained(AutoTokenizer, name)
    spiece = file_of(name, "spiece.model")
    if not spiece:
        raise FileNotFoundError(f"text encoder {name!r} has neither tokenizer.json nor spiece.model: expected one of "
                                "them beside its config.json")
    return from_sentencepiece(spiece.read_bytes())


def file_of(name, file):
    """The path of a file of a folder, or of a model on the hub; None where there is none."""
    try:
        path = Path(name) / file if Path(name).is_dir() else Path(hf_hub_download(str(name), file))
    except OSError:         # the hub has no such file, or is out of reach
        return None
    return path if path.is_file() else None


def from_sentencepiece(data):
    """T5's tokenizer from the bytes of its spiece.model, with the 100 <extra_id_N> that transformers adds.

    Fields read, by sentencepiece_model.proto: ModelProto 1 pieces, 3 normalizer_spec; SentencePiece 1 piece, 2 score;
    NormalizerSpec 2 precompiled_charsmap."""
    try:
        message = list(protobuf(data))
        pieces = [dict(protobuf(value)) for number, value in message if number == 1]
        vocabulary = [(piece[1].decode(), struct.unpack("<f", piece[2])[0]) for piece in pieces]
        charsmap = dict(protobuf(dict(message).get(3, b""))).get(2)     # without one, text stays as it is
        unknown, end, _ = map([piece for piece, _ in vocabulary].index, ("<unk>", "</s>", "<pad>"))
    except (LookupError, ValueError, TypeError, struct.error) as error:
        raise ValueError(f"spiece.model: expected T5's pieces as SentencePiece writes them ({error!r})") from error
    extra = [f"<extra_id_{i}>" for i in reversed(range(100))]
    tokenizer = Tokenizer(models.Unigram(vocabulary + [(piece, 0.0) for piece in extra], unk_id=unknown))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)        # mostly Unicode's NFKC
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens=extra)


def protobuf(message):
    """The fields of a message (protobuf.dev, "Encoding") as (number, value): an int, or the bytes of all else.

    A field is a varint, 8 * number + kind, and its value.  Kind 0: a varint; 1 and 5: 8 and 4 bytes, a double or float;
    2: a varint that tells how many bytes follow, text or a message within this one."""
    stream = io.BytesIO(message)

    def varint():           # 7 bits a byte, the lowest first; the last byte is below 128
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        number, kind = divmod(varint(), 8)
        size = {1: 8, 5: 4}[kind] if kind in (1, 5) else varint()
        value = stream.read(size) if kind else size
        if kind and len(value) < size:
            raise ValueError(f"ends at byte {len(message)}, {size - len(value)} too early")
        yield number, value


# What the captions of the published weights went through, written anew from recorded pairs, which are in
# tests/golden/e_clean_caption.json: in this order, a pattern -> what takes its place.
CLEANING = [(re.compile(pattern), new) for pattern, new in (
    (r"https?:\S*|www\.\S+|\b[\w.-]+\.(?:com|net|org|edu|gov)\b(?:/[\w/-]*)?", ""),         # addresses
    (r"<(person)>", r"\1"), (r"</?[a-z!][^<>]*>", ""),                                        # HTML
    (r"@\w+", ""),                                                                            # users
    (r"[`´«»“”¨]", '"'), (r"[‘’]", "'"), (r'""+', '"'),
    (r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),                                               # numbers of articles
    (r"\S+\.(?:png|jpe?g|bmp|webp|pdf|mp4)\b|\bmp4\b", ""),                                  # files
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+|\.\.+|\s\.\s", " "),
    (r"[\ufb00-\ufb06\uff01-\uffef]", lambda wide: unicodedata.normalize("NFKC", wide[0])),  # ligatures, full width
    (r"\b(?:[a-z]{1,3}\d{3,15}|[a-z]+\d+[a-z]+(?:\d+[a-z\d]*)?|\d+[a-z]+\d+)\b", ""),        # jc6640, 6640vc231
    (r"\bclick\s(?:for|on)\s\w+|\bpage\s+\d+\b", ""),
    (r"\b\s+:\s+", ": "), (r"(\D[,.])\b", r"\1 "), (r"\s+", " "),
    (r"^\s+|\s+$", ""), (r"""^["'](.+)["']$""", r"\1"), (r"^['_,:;-]|['_,:+-]$|^\.\S+$", ""), (r"^\s+|\s+$", ""),
)]


def clean_caption(text):
    """A caption in lower case without addresses, numbers of articles and odd signs: what Open-Sora gives to its T5.

    Upstream also mends wrongly decoded text (with ftfy) and parses HTML (with bs4).  Here text like "â€œ" stays, and of
    HTML goes what looks like a tag.  T5's tokenizer makes wide letters and ligatures plain anyway."""
    for _ in range(2):      # the second time it finds what the first laid bare: ":;,start" -> ";, start" -> ", start"
        text = unescape(unescape(unquote_plus(str(text)).strip().lower()))
        if len(re.findall("[-_]", text)) > 3:                   # this_is_the_name_of_a_file
            text = re.sub("[-_]", " ", text)
        for pattern, new in CLEANING:
            text = pattern.sub(new, text)
    return text


def remember(load, captions, folder=None, key=()):
    """The text encoder of these captions alone, without a network: T5-XXL takes 9 GiB in bf16.

    load() gives the TextEncoder that encodes them, one by one, so that none depends on the others, and is then let go.
    folder: where embeddings stay for the next time, a file per caption under a hash of it and of key, which names all
    else that they depend on; load() is called only for a caption that is not there."""
    known, encoder = {}, None
    for caption in dict.fromkeys(captions):
        path = folder and Path(folder) / f"text-{short_hash(key, caption)}.safetensors"
        if path and path.is_file():
            known[caption] = load_file(path)
            continue
        encoder = encoder or load()
        y, y_mask = (part.cpu() for part in encoder([caption]))
        known[caption] = {"y": y[y_mask], "y_mask": y_mask[0]}          # [tokens C], [L]
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:   # two processes may write the same caption
                save_file(known[caption], f"{scratch}/text")
                os.replace(f"{scratch}/text", path)

    def encode(captions):
        """y [B L C], 0 where y_mask [B L] is False."""
        rows = [known[caption] for caption in captions]
        tokens, y_mask = torch.cat([row["y"] for row in rows]), torch.stack([row["y_mask"] for row in rows])
        y = tokens.new_zeros(*y_mask.shape, tokens.shape[-1])
        y[y_mask] = tokens
        return y, y_mask

    return encode


# ---------------------------------------------------------------- the cache
SHARD_BYTES = 256e6         # what a rank of a killed run makes again, at most: 1,000 clips of 16 frames of 256 x 256
NO_CLIP = -1                # the second choice of a plan whose clip cannot be read


def write_cache(meta, config, vae, text_encoder, rank=0, world=1, group=None, recheck=False):
    """Encodes all clips for all buckets that they can reach, and their captions; the Path of an index for CachedClips.

    Frozen networks say the same in every epoch: with a cache the tiny world trains on 1.27 times as many clips a second
    (README.md), and the 9 GiB of T5-XXL need not stay beside the model.

    The folder config.cache then holds, floats in config.dtype:
      32-8-1.00-<hash>.safetensors  "moments" [N K 2 C T h w]: scaled mean and std of N clips of a bucket, at each of
                                    their K = config.windows fixed windows (images: 1)
      text-<hash>.safetensors       "y" [tokens width]: distinct captions end to end, unpadded; "ends" [captions + 1]
      index-<hash>.safetensors      of each bucket and of "text": "ids" [all N], the clips or the captions' hashes,
                                    ascending; "first" [shards + 1], where in ids each shard begins; the shards' names
      bad_clips.csv                 path and reason of the clips that could not be read: they are in no shard
    A shard has up to 256 MB and is there whole or not at all.  Its hash is of all that it depends on, files' sizes and
    times among it: it is never stale, and configs that share a bucket share its shards.  The index's hash is of what
    that comes to without a look at each clip: the csv files' sizes and times.  It is taken as it is but for `recheck`.

    Rank r of world makes shards r, r + world, ...: collective on `group`, whose timeout has to outlast the slowest.
    Raises ValueError where the disk has no room, too many clips cannot be read (config.max_bad), or none of a bucket.
    """
    writer = CacheWriter(meta, config, vae, text_encoder, rank, world, group)
    if recheck or not all(writer.exchange(is_whole(writer.index))):
        writer.plan()
        writer.make()
        writer.finish()
    return writer.index


class Shard(NamedTuple):
    bucket: Bucket | None   # None: captions
    ids: np.ndarray         # clips, or captions' hashes; ascending
    clips: np.ndarray       # the same clips, or for each caption one that has it


class CacheWriter:
    """The steps of write_cache, as one rank takes them."""

    def __init__(self, meta, config, vae, text_encoder, rank, world, group):
        self.meta, self.config, self.vae, self.text_encoder = meta, config, vae, text_encoder
        self.rank, self.world, self.group = rank, world, group
        self.folder, self.dtype, self.width = Path(config.cache), config.torch_dtype, text_encoder.net.config.d_model
        assert vae.net.dtype == text_encoder.net.dtype == self.dtype, "a cache is kept in the dtype it is computed in"
        vocabulary = sorted(text_encoder.tokenizer.get_vocab().items())
        self.vae_key = short_hash(fingerprint(vae.net.state_dict()), vae.scale, config.dtype)
        self.text_key = short_hash(fingerprint(text_encoder.net.state_dict()), vocabulary, text_encoder.max_length,
                                   config.dtype, text_encoder.clean.__name__)
        key = short_hash(meta.key, config.buckets, config.frame_interval, config.holdout,
                         config.windows, self.vae_key, self.text_key)
        self.index = self.folder / f"index-{key}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)

    def exchange(self, mine):
        """[world]: what each rank gives."""
        given = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(given, mine, self.group)
        return given

    def plan(self):
        """shards: all, the captions' last; names {number: name} of this rank's; missing: the numbers not yet there."""
        reached, buckets = reachable(self.meta, self.config), bucket_list(self.config.buckets)
        if not reached:
            raise ValueError(f"{self.config.data}: no clip fits any bucket - `python data.py META CONFIG` says why")
        clips = np.unique(np.concatenate(list(reached.values())))
        hashes = np.fromiter((caption_hash(self.meta.text(clip)) for clip in clips), np.int64, len(clips))
        hashes, first = np.unique(hashes, return_index=True)
        parts = [Shard(buckets[number], of, of) for number, of in reached.items()] + [Shard(None, hashes, clips[first])]
        self.shards = []
        for bucket, ids, of in parts:
            size = max(1, int(SHARD_BYTES / self.row_bytes(bucket)))
            self.shards += [Shard(bucket, ids[i:i + size], of[i:i + size]) for i in range(0, len(ids), size)]
        self.names = {n: self.name(self.shards[n]) for n in range(self.rank, len(self.shards), self.world)}
        self.missing = [n for n, name in self.names.items() if not (self.folder / name).is_file()]
        windows = sum(len(part.ids) * num_windows(self.config, part.bucket) for part in parts[:-1])
        self.announce(f"{len(clips):,} clips, {windows:,} windows in {len(reached)} buckets, {len(hashes):,} captions")

    def shape(self, bucket):
        """[K 2 C T h w] of a clip's moments."""
        h, w = bucket.height // self.vae.down, bucket.width // self.vae.down
        return num_windows(self.config, bucket), 2, self.vae.channels, bucket.num_frames, h, w

    def row_bytes(self, bucket):
        """Of a clip, or of a caption at most."""
        return self.dtype.itemsize * (math.prod(self.shape(bucket)) if bucket else
                                      self.text_encoder.max_length * self.width)

    def texts(self, shard):
        return [self.meta.text(clip) for clip in shard.clips]

    def name(self, shard):
        if shard.bucket is None:
            return f"text-{short_hash(self.texts(shard), self.text_key)}.safetensors"
        files, keys = [stamp(self.meta.path(clip)) for clip in shard.clips], self.meta["key"][shard.clips].tolist()
        interval = self.config.frame_interval
        size = self.shape(shard.bucket), shard.bucket.height, shard.bucket.width
        return f"{kind(shard.bucket)}-{short_hash(files, keys, interval, size, self.vae_key)}.safetensors"

    def num_bytes(self, shard):
        if shard.bucket:
            return len(shard.ids) * self.row_bytes(shard.bucket)
        lengths = np.minimum(self.text_encoder.lengths(self.texts(shard)), self.text_encoder.max_length)
        return int(lengths.sum()) * self.width * self.dtype.itemsize

    def announce(self, what):
        """Prints what will be written; raises ValueError if there is no room for it."""
        needed, free = sum(self.num_bytes(self.shards[n]) for n in self.missing), shutil.disk_usage(self.folder).free
        needed, missing, free = zip(*self.exchange((needed / 1e6, len(self.missing), free / 1e6)))
        if self.rank == 0:
            print(f"{self.folder}: {what}; {sum(missing):,} of {len(self.shards):,} files to write, "
                  f"{sum(needed):,.1f} MB of {free[0]:,.1f} MB free")
        if sum(needed) > free[0]:
            raise ValueError(f"{self.folder} has {free[0]:,.1f} MB free, expected {sum(needed):,.1f} MB for the cache: "
                             "make room or pass another --cache=DIR")

    def make(self):
        """Writes the missing shards.

        Clips come through data.batches as in training: processes read ahead, and a clip that hangs or kills one of them
        costs that clip alone.  Each "batch" is one clip; where training would take another in its place, is NO_CLIP."""
        shards = [self.shards[n] for n in self.missing]
        clips = ((shard.bucket, clip) for shard in shards if shard.bucket for clip in shard.ids)
        plans = [Plan(i, bucket, [0], np.array([[clip, NO_CLIP]])) for i, (bucket, clip) in enumerate(clips)]
        sampler = SimpleNamespace(plan=lambda step, *_: plans[step])
        self.read = batches(sampler, Windows(self.meta, self.config), 0, len(plans))
        self.tried, self.bad = 0, set()
        self.bar = tqdm(desc=f"writing {self.folder}", total=sum(len(shard.ids) for shard in shards), unit="clip",
                        disable=self.rank > 0)                      # of the first rank's; a caption counts as a clip
        for n, shard in zip(self.missing, shards):
            path = self.folder / self.names[n]
            tensors, note = self.encode_clips(shard) if shard.bucket else self.encode_captions(shard)
            # 200: as data.BadClips
            if self.tried >= 200 and len(self.bad) > self.config.max_bad * self.tried:
                raise ValueError(f"{len(self.bad)} of {self.tried} clips could not be read, more than max_bad="
                                 f"{self.config.max_bad:g} of them, see above: mend or drop them, or raise max_bad")
            if self.name(shard) != path.name:
                raise ValueError(f"{path}: its clips' files changed while they were read - start again")
            write_whole(path, tensors, note)

    def encode_clips(self, shard):
        """A shard's tensors and note.  The batches that are read next are its clips."""
        moments, unreadable = torch.empty(len(shard.ids), *self.shape(shard.bucket), dtype=self.dtype), {}
        self.tried += len(shard.ids)
        for place, batch in zip(range(len(shard.ids)), self.read):
            self.bar.update()
            for fault in batch["faults"]:
                unreadable[place] = fault.reason
                if fault.path not in self.bad:
                    print(f"skipped, {len(self.bad)} before it: {fault.reason}", file=sys.stderr)
                self.bad.add(fault.path)
            if not batch["faults"]:
                video = to_video(batch["video"][0].to(self.vae.device))                         # [K 3 T H W]
                moments[place - len(unreadable)] = torch.stack(self.vae.moments(video), dim=1)  # [K 2 C T h w]
        return {"moments": moments[:len(shard.ids) - len(unreadable)]}, {"unreadable": unreadable, "cut": 0}

    def encode_captions(self, shard):
        parts, lengths, cut, texts = [], [0], self.text_encoder.cut, self.texts(shard)
        for i in range(0, len(texts), 64):          # at once, by hand
            y, y_mask = self.text_encoder(texts[i:i + 64])
            parts.append(y[y_mask].to("cpu", self.dtype))
            lengths += y_mask.sum(1).tolist()
            self.bar.update(len(y))
        note = {"unreadable": {}, "cut": self.text_encoder.cut - cut}
        return {"y": torch.cat(parts), "ends": torch.tensor(lengths).cumsum(0)}, note

    def finish(self):
        """Rank 0 writes bad_clips.csv and the index from what all shards say."""
        names, ids, bad, cut = defaultdict(list), defaultdict(list), {}, 0
        told = self.exchange({n: (name, read_note(self.folder / name)) for n, name in self.names.items()})
        for n, shard in enumerate(self.shards):
            name, note = told[n % self.world][n]
            places = [int(place) for place in note["unreadable"]]
            names[kind(shard.bucket)].append(name)
            ids[kind(shard.bucket)].append(np.delete(shard.ids, places))
            bad |= zip(map(self.meta.path, shard.ids[places]), note["unreadable"].values())
            cut += note["cut"]
        arrays = {f"{part}.ids": torch.from_numpy(np.concatenate(of)) for part, of in ids.items()}
        arrays |= {f"{part}.first": torch.tensor([0, *map(len, of)]).cumsum(0) for part, of in ids.items()}
        empty = [part for part in ids if not len(arrays[f"{part}.ids"])]
        if self.rank == 0:
            with open(self.folder / "bad_clips.csv", "w", newline="", encoding="utf-8") as f:
                csv.writer(f, lineterminator="\n").writerows([("path", "reason"), *bad.items()])
            if not empty:
                write_whole(self.index, arrays, names)
                print(f"{self.index}: {cut:,} captions were cut at {self.text_encoder.max_length} tokens, {len(bad):,} "
                      "clips could not be read" + f", see {self.folder}/bad_clips.csv" * bool(bad))
        self.exchange(None)     # both are there
        if empty:
            raise ValueError(f"none of the clips of bucket {empty[0]} could be read: mend or drop those in "
                             f"{self.folder}/bad_clips.csv")


class Windows(NamedTuple):
    """Clips with their fixed windows, for data.batches."""
    meta: Table
    config: object                                          # configs.Config

    def read(self, clip, bucket, step, slot):
        """{"video": uint8 [K T H W 3], "decoded"}; raises UnreadableClip."""
        if clip == NO_CLIP:
            return {"video": torch.zeros(0), "fps": IMAGE_FPS, "decoded": 0}
        key = self.meta["key"][clip]
        interval = self.config.frame_interval
        frames, decoded = zip(*[
            read_window(self.meta.path(clip), bucket.num_frames, interval, None, window_generator(key, window))
            for window in range(num_windows(self.config, bucket))])
        return {"video": torch.stack([resize_crop(f, bucket.height, bucket.width) for f in frames]),
                "fps": float(self.meta["fps"][clip]), "decoded": sum(decoded)}


class CachedClips:
    """Reads what write_cache wrote, as data.ClipDataset does clips: of a shard no more than the rows asked for.

    The index is memory-mapped.  A shard is opened for each read, in 0.03 ms, and none stays open."""

    def __init__(self, meta, config, index):
        self.meta, self.config, self.index, self.names = meta, config, Path(index), read_note(index)
        with safe_open(index, "pt") as f:
            self.arrays = {name: f.get_tensor(name).numpy() for name in f.keys()}

    def __reduce__(self):
        return CachedClips, (self.meta, self.config, self.index)

    def read(self, clip, bucket, step, slot):
        """{"mean", "std" [C T h w], "y" [L width] in fp32, "y_mask" [L], "decoded"}; raises UnreadableClip."""
        path, row = self.locate(kind(bucket), clip)
        if path is None:
            raise UnreadableClip(f"{self.meta.path(clip)}: is not in the cache (could not be read when it was written)")
        with safe_open(path, "pt") as f:
            mean, std = f.get_slice("moments")[row, window_number(self.config, bucket, step, slot)].float()
        path, row = self.locate("text", caption_hash(self.meta.text(clip)))
        with safe_open(path, "pt") as f:
            start, end = f.get_slice("ends")[row:row + 2].tolist()
            y = f.get_slice("y")[start:end].float()
        L = self.config.model.model_max_length
        return {"mean": mean, "std": std, "y": F.pad(y, (0, 0, 0, L - len(y))), "y_mask": torch.arange(L) < len(y),
                "fps": float(self.meta["fps"][clip]), "decoded": 0}

    def locate(self, part, number):
        """(path of its shard, row there) of a clip or a caption's hash; (None, None) where there is none."""
        ids, first = self.arrays[f"{part}.ids"], self.arrays[f"{part}.first"]
        at = np.searchsorted(ids, ids.dtype.type(number))
        if at == len(ids) or ids[at] != number:
            return None, None
        shard = np.searchsorted(first, at, "right") - 1
        return self.index.parent / self.names[part][shard], int(at - first[shard])


def kind(bucket):
    return "-".join(map(str, bucket)) if bucket else "text"


def num_windows(config, bucket):
    return 1 if bucket.num_frames == 1 else config.windows


def caption_hash(text):
    """64 bits: that any two of 12 million captions share one has a probability of 4e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def fingerprint(weights):
    """A name for these weights, a dict of tensors: the first 64 values of each, in the order of their names, hashed.

    Training and rounding change every tensor, so that these tell, and 9 GiB of T5-XXL need not be gone through."""
    sha = hashlib.sha1()
    for _, value in sorted(weights.items()):
        sha.update(value.flatten()[:64].float().cpu().numpy().tobytes())
    return sha.hexdigest()


def stamp(path):
    """A file's path, size and time of change; the path alone if it is not there."""
    status = os.stat(path) if os.path.isfile(path) else None
    return path, status and (status.st_size, status.st_mtime_ns)


def short_hash(*what):
    return hashlib.sha1(repr(what).encode()).hexdigest()[:12]


def write_whole(path, tensors, note):
    with atomic_write(path) as part:
        try:    # one piece of metadata: the order of several is random
            save_file(tensors, part, {"note": json.dumps(note)})
        except SafetensorError as error:    # a full disk, say
            raise OSError(f"{path}: {error}") from error


def read_note(path):
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["note"])


def is_whole(index):
    """True where an index is there, and all shards that it names."""
    return index.is_file() and set().union(*read_note(index).values()) <= set(os.listdir(index.parent))


def cache(config, vae, text_encoder):
    """Writes the cache of a config, alone or as one of torchrun's processes."""
    if not config.cache:
        raise ValueError("cache='': expected a folder to write it to - pass --cache=DIR")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(weeks=4))     # ranks end hours apart
    vae = load_vae(vae, config.torch_dtype, device)
    text_encoder = load_text_encoder(text_encoder, config.model.model_max_length, config.torch_dtype, device,
                                     config.model.as_released)
    write_cache(read_meta(config.data), config, vae, text_encoder, rank, world, recheck=True)


# ---------------------------------------------------------------- the command line
def reconstruct(path, args):
    vae = load_vae(args.vae)
    T = min(args.num_frames, length_and_rate(path)[0])
    frames, _ = read_window(path, T, start=0)
    H, W = (side // vae.down * vae.down for side in frames.shape[1:3])          # what makes whole latent cells
    video = to_video(frames[:, :H, :W])[None]
    again = vae.decode(vae.encode(video))
    print(f"{path}: {T} frames of {H}x{W}, PSNR {psnr(again, video):.2f} dB")
    if args.out:
        write_video(args.out, np.concatenate([to_uint8(video[0]), to_uint8(again[0])], axis=1))
        print(f"{args.out}: the clip above, its reconstruction below")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    usage = "python vae.py CLIP | cache CONFIG [--field=value ...]"
    parser = argparse.ArgumentParser(description=__doc__.split("\nPapers")[0], usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="a video or image; or cache and a config")
    parser.add_argument("--out", help="of a reconstruction: a .mp4, .gif or .png")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    add = parser.add_argument_group("a reconstruction").add_argument
    add("--vae", default="assets/tiny/vae", help="folder or hub name; default: %(default)s")
    add("--num-frames", type=positive_int, default=16, help="of the clip; default: %(default)s")
    args = parser.parse_known_args(words)[0] if "cache" in words else parser.parse_args(words)
    goes_on = "; the same command goes on from what is whole" * (args.what[0] == "cache")
    with one_line_errors(args.debug, goes_on):
        match args.what:
            case ["cache", path]:
                import configs
                from sample import find
                overrides = words[words.index(path) + 1:]           # --vae is the config's here
                config = configs.load(path, [text for text in overrides if text != "--debug"])
                cache(config, find(config.vae), find(config.text_encoder))
            case [path] if path != "cache" and args.out and not Path(args.out).suffix:
                raise ValueError(f"--out {args.out}: expected a name that ends in .mp4, .gif or .png")
            case [path] if path != "cache":
                reconstruct(path, args)
            case what:
                raise ValueError(f"{' '.join(what)}: expected {usage}")


if __name__ == "__main__":
    from vae import main; main()
