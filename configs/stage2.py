"""Stage 2: the same clips at larger sizes and longer, mostly 240p and 480p.

data      9.7 M videos and 2.6 M images with captions, those of stage 1
hardware  64 GPUs of 80 GB with gradient checkpointing, as Open-Sora's 64 H800
steps     22,000, which took it one day (its report): 3.9 s each, although the comment in its config has about 7 s.
          By configs/plan.py 1.9 s, at an assumed 30% MFU, and at most 27 GiB per GPU
start     stage 1's weights
From Open-Sora 1.1's report: data, steps, time, masks.  From its stage-2 config: buckets, interval, lr, clip, seed.
"""
from configs import RECIPE, Config, STDiTConfig

config = Config(
    model=STDiTConfig(),  # XL/2 with QK-norm
    vae="stabilityai/sd-vae-ft-ema",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    data="data/stage2/meta.csv",
    buckets={  # (keep probability, clips per GPU); (0.0, None) hands clips that long on to a smaller resolution
        "144p": {1: (1.0, 48), 16: (1.0, 17), 32: (1.0, 9), 64: (1.0, 4), 128: (1.0, 1)},
        "256": {1: (0.8, 254), 16: (0.5, 17), 32: (0.5, 9), 64: (0.5, 4), 128: (0.5, 1)},
        "240p": {1: (0.1, 20), 16: (0.9, 17), 32: (0.8, 9), 64: (0.8, 4), 128: (0.8, 2)},
        "512": {1: (0.5, 86), 16: (0.2, 4), 32: (0.2, 2), 64: (0.2, 1), 128: (0.0, None)},
        "480p": {1: (0.4, 54), 16: (0.4, 4), 32: (0.0, None)},
        "720p": {1: (0.1, 20), 16: (0.1, 2), 32: (0.0, None)},
        "1024": {1: (0.3, 20)},
        "1080p": {1: (0.4, 8)},
    },
    frame_interval=3,
    num_workers=8,
    world=64,
    mask_ratios=RECIPE,
    lr=2e-5,  # constant, no warm-up
    ema_decay=0.9999,
    steps=22_000,
    dtype="bf16",
    checkpointing=1,  # plan.py estimates 202 GiB a GPU without
    seed=42,
    out="runs/stage2",
    init="runs/stage1",
    save_every=500,
    sample_every=2000,  # ours, as are the captions below
    prompts=("waves roll onto a beach at sunset", "a city street at night in the rain, seen from above"),
)
