"""Fine-tuning: the published model on a few hundred clips of your own, on one GPU of 24 GB.

data      data/mine/meta.csv: about 300 captioned clips of 1 to 10 s, a tenth of them held out.  Each bucket needs a
          whole batch of one aspect ratio; `python data.py data/mine/meta.csv configs/finetune.py` shows which do
hardware  one RTX 4090: by configs/plan.py 18.4 of 23.6 GiB, of which fp32 weights, gradients, Adam and EMA of 767 M
          parameters take 14.3.  T5-XXL, 8.9 GiB, does not fit next to them: latents and captions are cached first
disk      12.3 GB per checkpoint and 3.1 GB of averaged weights; twice that while a checkpoint is written, which takes
          as much main memory too
steps     2,000, 20 to 50 times each clip; by configs/plan.py 2.6 s each, 1.5 hours, at an assumed 30% MFU.  Not run
start     the published weights, with the faults that they were trained with (as_released, see model.py).  To start
          from a run of ours, --init=runs/stage3, turn as_released off
expect    the look and the motion of your clips.  The loss on the clips held out, in validation.jsonl, falls at first;
          once it rises, the clips are being memorised: use the checkpoint before, keep_last=9 keeps all
From Open-Sora 1.1: sizes, interval, masks, no weight decay, gradient clip 1.0.  Its users report noise after
fine-tuning on a few clips.  Ours: half of its lr, with a warm-up, because Adam starts without memory; an EMA over
about 1,000 steps instead of 10,000; batches that take about equal time by the plan; steps; everything else.
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
