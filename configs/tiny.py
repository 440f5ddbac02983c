"""The shapes world, small enough for a laptop: the same classes and the same loop as stage 1, other numbers.

data      python -m assets.shapes data/shapes: 2,000 clips of 1, 8 and 16 frames, 64x64 and 64x96 pixels, 8 MB
hardware  2 CPU cores
steps     1,000, 10 to 15 minutes (not timed on an idle machine): the loss falls from 1.7 to 1.25, each object has the
          colour asked for, its shape still changes from frame to frame, and directions are not followed yet
"""
from configs import RECIPE, TINY, Config

config = Config(
    model=TINY,
    vae="assets/tiny/vae",
    text_encoder="assets/tiny/text_encoder",
    data="data/shapes/meta.csv",
    buckets={"64": {1: (1.0, 64), 8: (1.0, 32), 16: (1.0, 16)}},
    fps=8.0,
    windows=1,
    cache="data/shapes/cache",
    num_workers=0,
    mask_ratios=RECIPE,
    prediction="v",
    sampler="dpm",
    cfg_scale=2.0,
    lr=1e-3,
    warmup_steps=100,
    ema_decay=0.999,
    steps=1000,
    dtype="fp32",
    out="runs/tiny",
    save_every=250,
    sample_every=250,
    prompts=("a red circle moves right", "a blue square moves up",
             "a yellow triangle moves left", "a green circle moves down"),
)
