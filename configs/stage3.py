"""Stage 3: a smaller set of high quality, mostly at 480p and 720p.

data      560 k videos and 1.6 M images, chosen for quality
hardware  64 GPUs of 80 GB with gradient checkpointing, as Open-Sora's 64 H800
steps     4,000, which took it one day (its report): 22 s each, although the comment in its config has about 13 s.
          By configs/plan.py 3.1 s, at an assumed 30% MFU, and at most 34 GiB per GPU
start     stage 2's weights and its optimizer's state, as Open-Sora does
From Open-Sora 1.1's report: data, steps, time, masks.  From its stage-3 config: buckets, interval, lr, clip, seed.
"""
from configs import RECIPE, Config, STDiTConfig

config = Config(
    model=STDiTConfig(),  # XL/2 with QK-norm
    vae="stabilityai/sd-vae-ft-ema",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    data="data/stage3/meta.csv",
    buckets={  # (keep probability, clips per GPU); (0.0, None) hands clips that long on to a smaller resolution
        "144p": {1: (1.0, 200), 16: (1.0, 36), 32: (1.0, 18), 64: (1.0, 9), 128: (1.0, 4)},
        "256": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 11), 64: (0.5, 6), 128: (0.8, 4)},
        "240p": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 10), 64: (0.5, 6), 128: (0.5, 3)},
        "360p": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.5, 1)},
        "512": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.8, 1)},
        "480p": {1: (0.4, 80), 16: (0.6, 6), 32: (0.6, 3), 64: (0.6, 1), 128: (0.0, None)},
        "720p": {1: (0.4, 40), 16: (0.6, 3), 32: (0.6, 1), 96: (0.0, None)},
        "1024": {1: (0.3, 40)},
    },
    frame_interval=3,
    num_workers=8,
    world=64,
    mask_ratios=RECIPE,
    lr=2e-5,  # constant, no warm-up
    ema_decay=0.9999,
    steps=4_000,
    dtype="bf16",
    checkpointing=1,  # as stage 2
    seed=42,
    out="runs/stage3",
    init="runs/stage2",
    init_optimizer=True,
    save_every=500,
    sample_every=500,  # ours, as are the captions below
    prompts=("waves roll onto a beach at sunset", "a city street at night in the rain, seen from above"),
)
