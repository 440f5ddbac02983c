"""The frozen networks: pixels <-> latents (AutoencoderKL, frame by frame) and captions -> embeddings (T5 encoder).

in    video [B 3 T H W] in -1..1, captions
out   z [B C T h w], h = H // 8, scaled to about unit variance; y [B L C], y_mask [B L]

    python vae.py clip.mp4 --vae assets/tiny/vae            encode, decode, print the PSNR (--out pair.png shows both)
    python vae.py train data/shapes/meta.csv --out DIR      fit a small AutoencoderKL on the frames of these clips
    python vae.py text data/shapes/meta.csv --out DIR       make a small random T5 that knows these captions' words

Papers: latent diffusion (arXiv 2112.10752) for the autoencoder, T5 (arXiv 1910.10683) for the text encoder.
"""
import argparse
import hashlib
import math
import sys
from pathlib import Path

import transformers.utils.import_utils
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *_: False      # else it takes our kernels.py for the package of that name

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from data import (UnreadableClip, fail, read_meta, read_window, resize_crop, slot_generator, to_uint8, to_video,
                  write_video)

disable_progress_bar()      # transformers' own, of loading weights
FRAMES_AT_ONCE = 16         # the decoder of sd-vae-ft-ema peaks near 1 GiB per 512 x 512 frame; small ones lose nothing


# ---------------------------------------------------------------- pixels <-> latents
class VAE:
    """diffusers' AutoencoderKL over video: each frame by itself, FRAMES_AT_ONCE at a time, frozen."""

    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)
        self.scale = net.config.scaling_factor
        self.channels = net.config.latent_channels
        self.device = net.device
        self.down = 2 ** (len(net.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, video):
        """Mean and standard deviation of the posterior, scaled: two [B C T h w] for video [B 3 T H W] in -1..1."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [B 3 T H W], got {list(video.shape)}")
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(self.net.dtype)
        posteriors = [self.net.encode(part).latent_dist for part in frames.split(FRAMES_AT_ONCE)]
        join = lambda parts: rearrange(torch.cat(parts).float() * self.scale, "(b t) c h w -> b c t h w", b=len(video))
        return join([p.mean for p in posteriors]), join([p.std for p in posteriors])

    def encode(self, video, generator=None):
        """z [B C T h w] of video [B 3 T H W]: the posterior's mean, or a draw from it when a generator is given."""
        mean, std = self.moments(video)
        return mean if generator is None else mean + std * torch.randn(std.shape, generator=generator).to(std)

    @torch.no_grad()
    def decode(self, z):
        """video [B 3 T 8h 8w] in -1..1, fp32, of z [B C T h w]."""
        frames = rearrange(z / self.scale, "b c t h w -> (b t) c h w").to(self.net.dtype)
        video = torch.cat([self.net.decode(part).sample.float() for part in frames.split(FRAMES_AT_ONCE)])
        return rearrange(video, "(b t) c h w -> b c t h w", b=len(z)).clamp(-1, 1)


def load_vae(name, dtype=torch.float32, device="cpu"):
    """An AutoencoderKL by hub name ("stabilityai/sd-vae-ft-ema") or folder."""
    return VAE(from_pretrained(AutoencoderKL, name, torch_dtype=dtype, low_cpu_mem_usage=False).to(device))


def from_pretrained(cls, name, **options):
    try:
        return cls.from_pretrained(name, **options)
    except OSError as error:  # of diffusers and transformers, for a missing folder, file or connection
        raise FileNotFoundError(f"{cls.__name__} {name!r} is neither a folder with config.json and weights nor a model "
                                f"that the hub gave: {str(error).splitlines()[0]}") from error


def psnr(a, b):
    """Peak signal to noise ratio in dB of two tensors of one shape in -1..1."""
    return 10 * math.log10(4 / max(F.mse_loss(a.float(), b.float()).item(), 1e-12))


# ---------------------------------------------------------------- captions -> embeddings
class TextEncoder:
    """transformers' T5EncoderModel with its tokenizer, frozen."""

    def __init__(self, net, tokenizer, max_length):
        self.net, self.tokenizer, self.max_length = net.eval().requires_grad_(False), tokenizer, max_length

    @torch.no_grad()
    def __call__(self, captions):
        """y [B L C], fp32, and y_mask [B L] (True = a token, not padding) of a list of captions; L = max_length."""
        tokens = self.tokenizer(captions, max_length=self.max_length, padding="max_length", truncation=True,
                                return_tensors="pt").to(self.net.device)
        y = self.net(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return y.float(), tokens.attention_mask.bool()

    def unknown(self, caption):
        """The words of a caption that the tokenizer does not know."""
        return [w for w in caption.split() if self.tokenizer.unk_token_id in self.tokenizer(w).input_ids]


def load_text_encoder(name, max_length, dtype=torch.float32, device="cpu"):
    """A T5 encoder and tokenizer by hub name ("DeepFloyd/t5-v1_1-xxl") or folder."""
    net = from_pretrained(T5EncoderModel, name, dtype=dtype).to(device)
    return TextEncoder(net, from_pretrained(AutoTokenizer, name), max_length)


def make_text_encoder(captions, folder, width=64, seed=0):
    """Writes a random T5 encoder of one layer and a tokenizer of whole words to folder, in transformers' layout.

    One layer leaves a word's embedding nearly the same whatever stands beside it, so what the model learns of "red" in
    seen captions holds in unseen ones; its relative position bias still tells word order apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = {word for caption in captions for word in caption.split()} | {"and"}  # "and": for two things in a clip
    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=16, num_heads=4, d_ff=2 * width,
                            num_layers=1, dropout_rate=0.0)).save_pretrained(folder)


# ---------------------------------------------------------------- the cache
def fingerprint(net):
    """A name for these weights: the first 64 values of every tensor, hashed."""
    sha = hashlib.sha1()
    for value in net.state_dict().values():
        sha.update(value.flatten()[:64].float().cpu().numpy().tobytes())
    return sha.hexdigest()


def write_cache(config, sampler, vae, text_encoder):
    """Latents and embeddings of every clip of the sampler, in files under config.cache, encoded where one is not there.

    Returns {"text": path, bucket: path, ...}, for data.CachedClips.  The names hold a hash of the captions, the clips'
    paths, sizes and times, and the networks: after a change other files are written.  Inside: encode_captions and
    encode_clips."""
    if any(keep not in (0, 1) for lengths in config.buckets.values() for keep, _ in lengths.values()):
        raise ValueError("the cache holds each clip in one bucket: it needs keep probabilities of 0 or 1, or --cache=")
    meta, (_, pools) = sampler.meta, sampler.epoch(0)
    folder = Path(config.cache)
    folder.mkdir(parents=True, exist_ok=True)
    name = short_hash(meta.texts, text_encoder.max_length, fingerprint(text_encoder.net))
    files = {"text": folder / f"text-{name}.safetensors"}
    if not files["text"].is_file():
        write_whole(files["text"], encode_captions(meta.texts, text_encoder))
    for number, clips in sorted(pools.items()):
        bucket, clips = sampler.numbered[number], np.sort(clips)
        name = short_hash([stamp(meta.paths[clip]) for clip in clips], config.frame_interval, vae.scale,
                          fingerprint(vae.net))
        files[bucket] = folder / f"latents-{'-'.join(map(str, bucket))}-{name}.safetensors"
        if not files[bucket].is_file():
            write_whole(files[bucket], encode_clips(sampler, bucket, clips, vae))
    return files


def stamp(path):
    """A file's path, size and time of change; the path alone if it is not there."""
    file = Path(path)
    return (path, file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else (path,)


def short_hash(*what):
    return hashlib.sha1(repr(what).encode()).hexdigest()[:12]


def write_whole(path, tensors):
    """Written beside its place and renamed, so that a file that is there is whole."""
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)


def encode_captions(texts, text_encoder):
    """{"y" [tokens C] in bf16, the distinct captions end to end; "ends" [captions] of each in y; "caption" [clips],
    which of them is a clip's; "max_length", the L to pad to}."""
    captions = sorted(set(texts))
    y, y_mask = map(torch.cat, zip(*[text_encoder(captions[i:i + 64]) for i in range(0, len(captions), 64)]))
    number = {caption: i for i, caption in enumerate(captions)}
    return {"y": y[y_mask].bfloat16(), "ends": y_mask.sum(1).cumsum(0), "max_length": torch.tensor(y.shape[1]),
            "caption": torch.tensor([number[text] for text in texts])}


def encode_clips(sampler, bucket, clips, vae):
    """{"clip" [N], "mean", "std" [N C T h w] in bf16} of the N clips that can be read, one window of each, drawn by its
    number."""
    kept, means, stds = [], [], []
    for clip in tqdm(clips.tolist(), desc=f"caching bucket {'-'.join(map(str, bucket))}", unit="clip", mininterval=1):
        try:
            frames = read_window(sampler.meta.paths[clip], bucket.num_frames, sampler.frame_interval, None,
                                 slot_generator(0, 0, clip, "cached window"))
        except UnreadableClip as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        mean, std = vae.moments(resize_crop(frames, bucket.height, bucket.width)[None].to(vae.device))
        kept.append(clip)
        means.append(mean.bfloat16().cpu())
        stds.append(std.bfloat16().cpu())
    if not kept:
        raise ValueError(f"none of the {len(clips)} clips of bucket {tuple(bucket)} could be read, see above")
    return {"clip": torch.tensor(kept), "mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}


# ---------------------------------------------------------------- fitting a small VAE
def fit_vae(frames, steps=6000, batch=32, lr=2e-3, channels=16, kl_weight=1e-4, widths=(16, 32, 64, 96), seed=0):
    """An AutoencoderKL (8x down) fitted to frames, a list of uint8 [N H W 3], one per size.

    The loss is the mean squared error plus kl_weight times the mean KL divergence per latent value.  The KL is a
    hundred times what is usual for photographs: the decoder then sees latents noised by about a tenth of their
    spread, and forgives the transformer's errors."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * len(widths),
                        up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths,
                        layers_per_block=1, latent_channels=channels, norm_num_groups=8,
                        sample_size=min(frames[0].shape[1:3]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    share = np.array([len(f) for f in frames]) / sum(len(f) for f in frames)
    images = lambda frames: rearrange(to_video(frames), "c n h w -> n c h w")
    bar = tqdm(range(steps), desc="fitting the VAE")
    for step in bar:
        of_one_size = frames[rng.choice(len(frames), p=share)]
        x = images(of_one_size[rng.integers(len(of_one_size), size=batch)])
        posterior = net.encode(x).latent_dist
        again = net.decode(posterior.sample()).sample
        error = F.mse_loss(again, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        (error + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            bar.set_postfix_str(f"psnr {psnr(again, x):.2f} dB, kl {kl.item():.3f}")
    with torch.no_grad():
        std = net.encode(images(frames[0][:512])).latent_dist.mean.std()
    net.register_to_config(scaling_factor=1 / float(std))
    return net


def train(args):
    meta = read_meta(args.path)
    by_size, skipped = {}, 0
    for path in tqdm(meta.paths[:args.num_clips], desc="reading clips"):
        try:
            frames = read_window(path)
        except UnreadableClip as error:
            skipped += 1
            print(f"skipped, {skipped} so far: {error}", file=sys.stderr)
            continue
        by_size.setdefault(tuple(frames.shape[1:3]), []).append(frames)
    if not by_size:
        raise ValueError(f"{args.path}: none of its {len(meta)} clips could be read")
    net = fit_vae([torch.cat(parts) for _, parts in sorted(by_size.items())], args.steps, args.batch, seed=args.seed)
    net.save_pretrained(args.out)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.out}: {parameters:,} parameters, scaling factor {net.config.scaling_factor:.3f}")


def reconstruct(args):
    vae = load_vae(args.vae)
    frames = read_window(args.path, start=0)[:args.num_frames]
    T, H, W, _ = frames.shape
    video = to_video(frames[:, :H // vae.down * vae.down, :W // vae.down * vae.down])[None]
    again = vae.decode(vae.encode(video))
    print(f"{args.path}: {T} frames of {video.shape[3]}x{video.shape[4]}, PSNR {psnr(again, video):.2f} dB")
    if args.out:
        write_video(args.out, np.concatenate([to_uint8(video[0]), to_uint8(again[0])], axis=1))
        print(f"{args.out}: the clip above, its reconstruction below")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", help='"train", "text", or a video or image to reconstruct')
    parser.add_argument("path", nargs="?", help="meta.csv of the clips")
    parser.add_argument("--vae", default="assets/tiny/vae", help="folder or hub name")
    parser.add_argument("--out", help="folder or, for a reconstruction, a .mp4, .gif or .png")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--num-clips", type=int, default=4000, help="of meta.csv, held in memory")
    parser.add_argument("--num-frames", type=int, default=16, help="of a clip to reconstruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    args = parser.parse_args()
    try:
        if args.command in ("train", "text"):
            if not (args.path and args.out):
                raise ValueError(f"python vae.py {args.command} needs a meta.csv and --out DIR")
            if args.command == "train":
                train(args)
            else:
                make_text_encoder(read_meta(args.path).texts, args.out, seed=args.seed)
        else:
            args.path = args.command
            reconstruct(args)
    except (ValueError, FileNotFoundError) as error:
        if args.debug:
            raise
        sys.exit(fail(error))


if __name__ == "__main__":
    from vae import main; main()
