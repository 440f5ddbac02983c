"""Fine-tuning: the finished model on a few hundred clips of your own, on one GPU of 24 GB.

data      data/mine/meta.csv, some 300 clips of 1 to 10 s with captions, a tenth of them held out (each bucket needs a
          whole batch of one aspect ratio; `python data.py data/mine/meta.csv configs/finetune.py` tells)
hardware  one RTX 4090: plan.py says 18.4 of 23.6 GiB, 14.3 of them fp32 weights, gradients, Adam and EMA of 767 M
          parameters.  T5-XXL, 8.9 GiB, has no room beside those: latents and captions are cached before
disk      12.3 GB a checkpoint and 3.1 GB of averaged weights; twice that while a new one is written, which takes as
          much main memory meanwhile
steps     2,000, 20 to 50 times each clip; by plan.py 2.6 s each, 1.5 hours, at the 30% MFU that it assumes. Not run
start     the weights that Open-Sora 1.1 published, with the quirks that they were trained with, in captions and fps
          too: as_released (model.py).
          For --init=runs/stage3, a run of ours, turn it off
expect    the look and the motion of your clips; the loss on those held out, in validation.jsonl, falls, and once it
          rises they are being learnt by heart: take the checkpoint before, keep_last=9 keeps all
From Open-Sora 1.1: sizes, interval, masks, no weight decay, gradient clip 1.0; its users met noise after fine-tuning
on a few clips.  Ours: lr, half of its 2e-5, with a warm-up, as Adam starts with no memory; EMA over some 1,000 steps
instead of 10,000; batches of about equal time by plan.py, which leave 3 of what plan.py counts on; steps; all others.
"""
from configs import RECIPE, Config, STDiTConfig

config = Config(
    model=STDiTConfig(as_released=True),  # XL/2 as published
    vae="stabilityai/sd-vae-ft-ema",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    data="data/mine/meta.csv",
    buckets={  # (keep probability, clips); large clips are trained at both sizes in turn
        "144p": {8: (1.0, 16), 16: (1.0, 8), 32: (1.0, 4)},
        "240p": {8: (0.7, 8), 16: (0.7, 4), 32: (0.7, 2)},
    },
    frame_interval=3,
    holdout=0.1,
    windows=2,
    cache="data/mine/cache",
    world=1,
    mask_ratios=RECIPE,
    lr=1e-5,
    warmup_steps=100,
    ema_decay=0.999,
    steps=2_000,
    dtype="bf16",
    checkpointing=1,
    sp=1,
    seed=42,
    out="runs/finetune",
    init="hpcai-tech/OpenSora-STDiT-v2-stage3",
    save_every=250,
    keep_last=1,
    sample_every=250,
    validate_every=250,
    prompts=("waves roll onto a beach at sunset", "a city street at night in the rain, seen from above"),
)
