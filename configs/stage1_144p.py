"""Stage 1, second of three phases: clips mostly at 144p, in smaller batches that need no gradient checkpointing.

data      9.7 M videos and 2.6 M images with captions, those of the first phase
hardware  64 GPUs of 80 GB, as Open-Sora's 64 H800
steps     40,000, which took it two days (its report): 4.3 s each.  By configs/plan.py 0.4 s, at an assumed 30% MFU,
          and at most 41 GiB per GPU
start     the first phase's weights
From Open-Sora 1.1's report: data, steps, time, no checkpointing, "mostly 144p"; and SpeeD, as it says that only the
third phase is plain iddpm.  From its stage-1 config: sizes and lengths, interval, lr, clip, seed.
Ours, since only the third phase's buckets were released: clips per GPU, up to a third more than there (its step took
1.4 times as long); 240p and 256 kept at 0.1; 10% masked, as in the first phase; QK-norm; previews.
"""
from configs import RECIPE, replace
from configs.stage1 import config as last

config = replace(
    last,
    buckets={  # (keep probability, clips per GPU); a clip that is not kept moves on to the next smaller resolution
        "144p": {1: (0.5, 64), 16: (1.0, 8), 32: (1.0, 4), 96: (1.0, 1)},
        "256": {1: (0.5, 32), 16: (0.1, 4), 48: (0.1, 1), 64: (0.0, None)},
        "240p": {16: (0.1, 2), 32: (0.1, 1), 64: (0.0, None)},
        "512": {1: (0.4, 16)},
        "1024": {1: (0.3, 4)},
    },
    mask_ratios={name: 0.9 if name == "mask_no" else share / 2.5 for name, share in RECIPE.items()},  # 10% for its 25%
    speed=True,
    steps=40_000,
    out="runs/stage1_144p",
    init="runs/stage1_240p",
)
