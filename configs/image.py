"""Stage 0: images of many sizes, so that an image model learns free sizes before it sees a video.

data      images with captions, 256 pixels square and larger (Open-Sora: 2.6 M)
hardware  64 GPUs of 80 GB, as Open-Sora's 64 H800
steps     6,000 (its report); about 6 s each (the comment in its config), 10 hours.  By configs/plan.py 2.6 s each, at
          an assumed 30% MFU, and at most 22 GiB per GPU
start     the weights of PixArt-alpha at 1024, whose spatial, cross-attention and MLP layers have the same shapes
From Open-Sora 1.1's report: start, steps, SpeeD.  From its image config: buckets, lr, gradient clip, seed, workers.
Ours: QK-norm from the start (Open-Sora added it late in stage 1), gradient checkpointing, previews.
"""
from configs import Config, STDiTConfig

config = Config(
    model=STDiTConfig(),  # XL/2 with QK-norm
    vae="stabilityai/sd-vae-ft-ema",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    data="data/image/meta.csv",
    buckets={  # (keep probability, clips per GPU)
        "256": {1: (1.0, 256)},
        "512": {1: (1.0, 80)},
        "480p": {1: (1.0, 52)},
        "1024": {1: (1.0, 20)},
        "1080p": {1: (1.0, 8)},
    },
    frame_interval=1,
    num_workers=4,
    world=64,
    mask_ratios={"mask_no": 1.0},  # an image has one frame: nothing to mask
    speed=True,  # SpeeD's draw of t, as upstream's image stage
    lr=2e-5,  # constant, no warm-up
    ema_decay=0.9999,
    steps=6_000,
    dtype="bf16",
    checkpointing=1,  # plan.py estimates 147 GiB a GPU without
    seed=42,
    out="runs/image",
    init="PixArt-alpha/PixArt-alpha/PixArt-XL-2-1024-MS.pth",
    save_every=500,
    sample_every=1000,  # ours, as are the captions below
    prompts=("waves roll onto a beach at sunset", "a city street at night in the rain, seen from above"),
)
