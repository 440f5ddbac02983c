"""Stage 1, last of three phases: clips mostly at 144p and 240p, a quarter of them with given frames.

data      9.7 M videos and 2.6 M images with captions; most clips have 36 to 256 frames
hardware  64 GPUs of 80 GB, as Open-Sora's 64 H800
steps     17,000, which took it 14 hours (its report): 3.0 s each, although the comment in its config has about 1 s.
          By configs/plan.py 0.3 s, at an assumed 30% MFU, and at most 33 GiB per GPU.  The phases before are
          stage1_240p.py (24,000 steps, 4 days there) and stage1_144p.py (40,000 steps, 2 days)
start     the second phase's weights
From Open-Sora 1.1's report: data, steps, time, masks.  From its stage-1 config: buckets, interval, lr, clip, seed.
Ours: QK-norm from stage 0 on (Open-Sora added it in this phase), previews.
"""
from configs import RECIPE, Config, STDiTConfig

config = Config(
    model=STDiTConfig(),  # XL/2 with QK-norm
    vae="stabilityai/sd-vae-ft-ema",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    data="data/stage1/meta.csv",
    buckets={  # (keep probability, clips per GPU); (0.0, None) hands clips that long on to a smaller resolution
        "144p": {1: (0.5, 48), 16: (1.0, 6), 32: (1.0, 3), 96: (1.0, 1)},
        "256": {1: (0.5, 24), 16: (0.5, 3), 48: (0.5, 1), 64: (0.0, None)},
        "240p": {16: (0.3, 2), 32: (0.3, 1), 64: (0.0, None)},
        "512": {1: (0.4, 12)},
        "1024": {1: (0.3, 3)},
    },
    frame_interval=3,
    num_workers=8,
    world=64,
    mask_ratios=RECIPE,
    lr=2e-5,  # 1e-4 was too large (upstream's report); constant, no warm-up
    ema_decay=0.9999,
    steps=17_000,
    dtype="bf16",
    seed=42,
    out="runs/stage1",
    init="runs/stage1_144p",
    save_every=500,
    sample_every=2000,  # ours, as are the captions below
    prompts=("waves roll onto a beach at sunset", "a city street at night in the rain, seen from above"),
)
