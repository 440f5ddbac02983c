"""Stage 1, first of three phases: clips mostly at 240p, from which the new temporal layers learn motion.

data      9.7 M videos and 2.6 M images with captions; most clips have 36 to 256 frames
hardware  64 GPUs of 80 GB with gradient checkpointing, as Open-Sora's 64 H800
steps     24,000, which took it four days (its report): 14 s each.  By configs/plan.py 2.8 s, at an assumed 30% MFU,
          and at most 33 GiB per GPU
start     stage 0's weights
From Open-Sora 1.1's report: data, steps, time, checkpointing, "mostly 240p", 10% masked; and SpeeD, as it says that
only the third phase is plain iddpm.  From its stage-1 config: sizes and lengths, interval, lr, clip, seed.
Ours, since only the third phase's buckets were released: clips per GPU, those of its stage 3, whose step took as long
(96 and 48 frames lie between their neighbours there); 240p kept at 0.8 instead of 0.3, also with 64 frames; QK-norm;
previews.
"""
from configs import RECIPE, replace
from configs.stage1 import config as last

config = replace(
    last,
    buckets={  # (keep probability, clips per GPU); a clip that is not kept moves on to the next smaller resolution
        "144p": {1: (0.5, 200), 16: (1.0, 36), 32: (1.0, 18), 96: (1.0, 6)},
        "256": {1: (0.5, 200), 16: (0.5, 22), 48: (0.5, 7), 64: (0.0, None)},
        "240p": {16: (0.8, 22), 32: (0.8, 10), 64: (0.8, 6)},
        "512": {1: (0.4, 120)},
        "1024": {1: (0.3, 40)},
    },
    mask_ratios={name: 0.9 if name == "mask_no" else share / 2.5 for name, share in RECIPE.items()},  # 10% for its 25%
    speed=True,
    steps=24_000,
    checkpointing=1,
    out="runs/stage1_240p",
    init="runs/image",
)
