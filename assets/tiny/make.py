"""Makes the tiny networks that ship in this folder in the place of Stable Diffusion's VAE and T5.

    python -m assets.tiny.make vae data/shapes/meta.csv --out DIR       fits a small AutoencoderKL on the clips' frames
    python -m assets.tiny.make text data/shapes/meta.csv --out DIR      a small random T5 that knows the captions' words

assets/tiny/README.md has the commands that made what is here.
"""
import argparse
import sys
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm

from data import UnreadableClip, one_line_errors, positive_int, read_meta, read_window, to_video
from vae import psnr  # before the next two: vae.py tells transformers that our kernels.py is not that package

from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def make_text_encoder(captions, folder, width=64, seed=0):
    """Writes a random T5 encoder of one layer and a tokenizer of whole words to folder, in transformers' layout.

    It stands in for T5 in the tiny world, whose few words need no 4.8 billion weights; its sizes are hand-tuned.
    One layer leaves a word's embedding nearly the same whatever stands beside it, so what the model learns of "red" in
    seen captions holds in unseen ones; its relative position bias still tells word order apart."""
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


def fit_vae(frames, steps=4000, batch=16, lr=2e-3, channels=8, kl_weight=1e-4, widths=(64, 96), patch=4, seed=0):
    """Returns an AutoencoderKL (8x down) fitted to frames, a list of uint8 [N H W 3], one per size.

    The loss is the mean squared error plus kl_weight times the mean KL divergence per latent value (2112.10752, section
    3.1, without its perceptual and adversarial terms: shapes have no texture).  The KL is a hundred times what is usual
    for photographs: the decoder then sees latents with much noise (some channels are nothing else), and forgives the
    transformer's errors.  The network sees patches of 4 x 4 pixels as 48 channels (vae.VAE): at full resolution a step
    took twice as long and brought less.  Norms have one group: eight divide the colour out of a mostly flat frame.  All
    else is hand-tuned, for ten minutes on two CPU cores (assets/tiny/README.md)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = AutoencoderKL(in_channels=3 * patch ** 2, out_channels=3 * patch ** 2,
                        down_block_types=("DownEncoderBlock2D",) * len(widths),
                        up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths,
                        layers_per_block=1, latent_channels=channels, norm_num_groups=1,
                        sample_size=min(frames[0].shape[1:3]) // patch)
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    share = np.array([len(of_one_size) for of_one_size in frames]) / sum(map(len, frames))
    bar = tqdm(range(steps), desc="fitting the VAE")
    for step in bar:
        of_one_size = frames[rng.choice(len(frames), p=share)]
        x = to_patches(of_one_size[rng.integers(len(of_one_size), size=batch)], patch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = net.encode(x).latent_dist
            again = net.decode(posterior.sample()).sample.float()
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
        std = net.encode(to_patches(frames[0][:512], patch)).latent_dist.mean.std()
    net.register_to_config(scaling_factor=1 / float(std))
    return net


def to_patches(frames, patch):
    """Returns uint8 [N H W 3] as float [N 3*patch^2 H/patch W/patch] in -1..1, as the network of vae.VAE takes it."""
    return F.pixel_unshuffle(rearrange(to_video(frames), "c n h w -> n c h w"), patch)


def make_vae(meta, args):
    """Fits an autoencoder to the frames of the first clips of meta and writes it to args.out."""
    by_size = defaultdict(list)
    skipped = 0
    for clip in tqdm(range(min(args.num_clips, len(meta))), desc="reading clips"):
        try:
            frames, _ = read_window(meta.path(clip))
        except UnreadableClip as error:
            skipped += 1
            print(f"skipped, {skipped} so far: {error}", file=sys.stderr)
        else:
            by_size[frames.shape[1:3]].append(frames)
    if not by_size:
        raise ValueError(f"{', '.join(meta.files)}: none of the first {args.num_clips} clips could be read")
    net = fit_vae([torch.cat(parts) for _, parts in sorted(by_size.items())], args.steps, args.batch, seed=args.seed)
    net.save_pretrained(args.out)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.out}: {parameters:,} parameters, scaling factor {net.config.scaling_factor:.3f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python -m assets.tiny.make vae|text META --out DIR [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vae", "text"))
    parser.add_argument("meta", metavar="META", help="a meta.csv, as `python -m assets.shapes data/shapes` writes")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the network")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    add = parser.add_argument_group("vae").add_argument
    add("--steps", type=positive_int, default=4000, help="default: %(default)s")
    add("--batch", type=positive_int, default=16, help="frames of a step; default: %(default)s")
    add("--num-clips", type=positive_int, default=4000, help="of meta.csv, held in memory; default: %(default)s")
    args = parser.parse_args(argv)
    with one_line_errors(args.debug):
        meta = read_meta(args.meta)
        if args.what == "vae":
            make_vae(meta, args)
        else:
            make_text_encoder([meta.text(clip) for clip in range(len(meta))], args.out, seed=args.seed)


if __name__ == "__main__":
    main()
