"""Tests the plan of what a run costs (configs.plan) against live tensors, and that what it advises fits."""
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from configs import RECIPE, Config, load
from configs.plan import GPUS, forward_bytes, plan, plan_sampling, plan_step, state_bytes, traffic_bytes
from inputs import example_inputs
from model import STDiT, STDiTConfig
from vae import DECODER_BYTES

ROOT = Path(__file__).parents[1]
SMALL = STDiTConfig(depth=6, hidden_size=144, num_heads=2, caption_channels=64, model_max_length=20)
PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config():
    """Returns a config of the small model whose VAE and text encoder cost nothing, a clip of 2 frames per GPU."""
    return Config(model=SMALL, vae="v", text_encoder="t", data="meta.csv", buckets={"144p": {2: (1.0, 1)}},
                  mask_ratios=RECIPE, lr=1e-4, steps=10, out="runs/x")


def step_of(config, world=1, gpu="h800"):
    """Returns the planned step of a config's only bucket."""
    (kind,) = config.trained
    return plan_step(config, world, GPUS[gpu], *kind)


# ---------------------------------------------------------------- against live tensors

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living storages but the known ones: now, and the most so far (peak)."""

    def __init__(self, known):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, op, types, args, kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def live_activations(config, shape):
    """Returns the peak of bytes in a real forward and backward, without parameters, their gradients and the inputs."""
    model = STDiT(config.model).to(config.torch_dtype)
    inputs = example_inputs(config.model, *shape)
    if config.checkpointing:
        for block in model.blocks[::config.checkpointing]:
            block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)

    def drop_gradient(p):               # FSDP moves it away likewise
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(drop_gradient)
    x_mask = torch.ones(shape[:2], dtype=torch.bool)
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as memory:
        model(**inputs, x_mask=x_mask).square().mean().backward()
    return memory.peak


@pytest.mark.parametrize("dtype, checkpointing", [("fp32", 0), ("bf16", 1), ("bf16", 2), ("fp32", 5)])
def test_activations_are_those_of_live_tensors(as_on_a_gpu, config, dtype, checkpointing):
    config = replace(config, dtype=dtype, checkpointing=checkpointing)
    step = step_of(config)
    bucket = step.bucket
    shape = (1, 2, bucket.height // 8, bucket.width // 8, SMALL.model_max_length)
    assert step.activations == pytest.approx(live_activations(config, shape), rel=0.1)


def test_what_sharding_divides_is_that_of_a_live_optimizer(config):
    """Weights, gradients, AdamW's state and the averaged weights are divided by the shard; nothing else is."""
    config = replace(config, world=8)
    model = STDiT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**example_inputs(SMALL, T=2)).square().mean().backward()
    optimizer.step()
    tensors = [*model.parameters(), *model.parameters()]                # the weights and their average
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for name, value in state.items() if name != "step"]
    states = sum(tensor.nbytes for tensor in tensors)
    one, half, quarter = (step_of(replace(config, shard=shard), 8).fixed for shard in (1, 2, 4))
    assert one - half == pytest.approx(states / 2, rel=0.02)
    assert one - quarter == pytest.approx(states * 3 / 4, rel=0.02)
    assert step_of(config, 8).fixed == step_of(replace(config, shard=8), 8).fixed
    assert step_of(replace(config, shard=1), 1).fixed == one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change, shape", [
    ({}, (2, 2, 16, 16)),
    ({}, (2, 16, 8, 8)),
    ({"patch_size": (1, 1, 1), "caption_channels": 32}, (2, 8, 10, 6)),
    ({"hidden_size": 288, "num_heads": 4, "model_max_length": 60}, (3, 4, 10, 18)),
])
def test_a_forward_holds_what_live_tensors_do(dtype, change, shape):
    model_config = replace(SMALL, **change)
    model = STDiT(model_config).to(dtype)
    inputs = example_inputs(model_config, *shape, L=model_config.model_max_length)
    x_mask = torch.ones(shape[:2], dtype=torch.bool)
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as memory:
        model(**inputs, x_mask=x_mask)
    assert forward_bytes(model_config, dtype, *shape) == pytest.approx(memory.peak, rel=0.1)


def test_a_decoder_holds_what_that_of_stable_diffusion_does():
    """Builds sd-vae-ft-ema's shape on the meta device: tensors have sizes there, but neither memory nor values."""
    with torch.device("meta"):
        net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        z = torch.zeros(1, 4, 16, 16)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(84e6, rel=0.01)
    with torch.no_grad(), LiveBytes([*net.parameters(), *net.buffers(), z]) as memory:
        net.decode(z)
    assert memory.peak / 128**2 == pytest.approx(DECODER_BYTES, rel=0.1)


def count_states(rank, folder):
    """Takes one step on 4 ranks; writes the bytes that each holds of its states and receives by collectives.

    The ranks share weights in four ways at once: not at all, in pairs, in pairs with a replica, and all four."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shard"))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicas", "shard"))
    meshes = {(1, 1): alone["shard"], (2, 2): pairs["shard"], (4, 4): init_device_mesh("cpu", (4,)), (4, 2): pairs}
    found = {}
    for key, mesh in meshes.items():
        model = STDiT(SMALL)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=block is not model.blocks[-1])
        fully_shard(model, mesh=mesh, mp_policy=policy)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        ema = [p.detach().clone() for p in model.parameters()]
        traffic = Traffic(mesh)
        with traffic:
            model(**example_inputs(SMALL, 1, 2, 4, 4, 4)).square().mean().backward()
        optimizer.step()
        adam = []
        for state in optimizer.state.values():
            adam += [value for name, value in state.items() if name != "step"]
        states = {"weights": local_bytes(model.parameters()), "gradients": local_bytes(p.grad for p in trained),
                  "Adam": local_bytes(adam), "EMA": local_bytes(ema)}
        found[key] = (states, traffic.received)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def local_bytes(tensors):
    return sum(tensor.to_local().nbytes for tensor in tensors)


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank receives, by collective."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh
        self.received = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}

    def __torch_dispatch__(self, op, types, args, kwargs=None):
        if "c10d" in str(op):
            flat = str(op).replace("_", "")
            name = next((name for name in self.received if name.replace("-", "") in flat), None)
            if name is not None:
                whole = max(x.nbytes for x in tree_leaves(args[:2]) if torch.is_tensor(x))
                num_ranks = self.mesh.size(0 if name == "all-reduce" else -1)
                times = 2 if name == "all-reduce" else 1                # a reduce-scatter, then an all-gather
                self.received[name] += times * whole * (num_ranks - 1) / num_ranks
        return op(*args, **(kwargs or {}))


@pytest.mark.slow
def test_states_and_traffic_are_those_of_fsdp(config, tmp_path):
    code = ("import sys, torch._dynamo, test_plan, torch.multiprocessing as mp; "       # imported once, then forked
            "mp.start_processes(test_plan.count_states, (sys.argv[1],), 4, start_method='fork')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=PATHS, check=True, timeout=300)
    for rank in range(4):
        for (world, shard), (states, received) in torch.load(tmp_path / f"{rank}.pt").items():
            planned = state_bytes(config, shard)
            for name, real in states.items():
                assert planned[name] == pytest.approx(real, rel=0.02), (world, shard, rank, name)
            for name, expected in traffic_bytes(replace(config, shard=shard), world).items():
                assert expected == pytest.approx(received[name], rel=0.02), (world, shard, rank, name)


# ---------------------------------------------------------------- how the numbers scale

def test_numbers_scale_with_the_world_and_with_checkpointing(config):
    config = replace(config, buckets={"144p": {2: (1.0, 8)}}, world=4)
    step = step_of(config, 4)
    fewer = step_of(config, 2)           # half the GPUs: each has twice the clips of the same global batch
    assert (step.clips, fewer.clips) == (8, 16)
    assert fewer.tokens == step.tokens
    assert fewer.flop == 2 * step.flop
    assert fewer.activations == 2 * step.activations
    in_parts = step_of(replace(config, accumulation=4), 4)
    assert in_parts.activations == step.activations / 4
    assert in_parts.flop == step.flop
    thin = step_of(replace(config, checkpointing=1), 4)
    every_second = step_of(replace(config, checkpointing=2), 4)
    assert thin.activations < every_second.activations < step.activations
    assert thin.flop == pytest.approx(step.flop * 4 / 3)           # one more forward of every block
    assert every_second.flop == pytest.approx(step.flop * (1 + 1 / 6))
    assert thin.fixed == step.fixed


def test_gpus_that_share_a_clip_hold_half_its_frames(config):
    config = replace(config, world=8)
    shared = step_of(replace(config, sp=2), 8)
    alone = step_of(config, 8)
    assert shared.clips == 2 * alone.clips
    assert shared.tokens == alone.tokens
    assert shared.flop == alone.flop
    assert shared.activations == pytest.approx(alone.activations, rel=0.1)
    bytes_per_gpu = shared.tokens / 8 * SMALL.hidden_size * 2        # in bf16
    exchanges = 4 * SMALL.depth         # there and back, forward and backward; half of a tensor stays where it is
    assert shared.moved["all-to-all"] == pytest.approx(bytes_per_gpu * exchanges / 2)


# ---------------------------------------------------------------- what fits

def bucket_lines(config, world, gpu="h800"):
    """Returns the plan's lines about buckets, in the order of the config."""
    return re.findall(r"^ +\d+ x +\d+x\d.*", plan(config, world, gpu), re.M)


def test_the_plan_names_what_does_not_fit_and_what_would():
    config = load("stage2", ["--checkpointing=0",
                             "--buckets={'144p': {1: (1.0, 48), 16: (1.0, 17)}, '720p': {16: (0.1, 9)}}"])
    image, short, large = bucket_lines(config, 64)
    assert "TOO BIG" not in image and "TOO BIG" in short and "TOO BIG" in large
    assert "--checkpointing=1" in short and "--accumulation=" in large
    thin = bucket_lines(replace(config, checkpointing=1), 64)
    assert ["TOO BIG" in line for line in thin] == [False, False, True]
    num_parts = int(thin[2].split("--accumulation=")[1].split()[0])
    in_parts = replace(config, checkpointing=1, accumulation=num_parts)
    assert "TOO BIG" not in plan(in_parts, 64)
    num_clips = int(re.search(r"(\d+) clips at once", short)[1])        # these fit, one more does not
    for n, expected in ((num_clips, False), (num_clips + 1, True)):
        tried = replace(config, buckets={"144p": {16: (1.0, n)}})
        assert ("TOO BIG" in plan(tried, 64)) == expected
    assert "--shard" in bucket_lines(replace(config, buckets={"144p": {1: (1.0, 1)}}), 1, "4090")[0]


def test_a_world_that_cannot_be_divided_is_an_error(config):
    for change, world, message in (({"shard": 3}, 64, "gpus=64.*shard=3"), ({"sp": 3}, 64, "gpus=64.*sp=3"),
                                   ({}, -1, "gpus=-1")):
        with pytest.raises(ValueError, match=message):
            plan(replace(config, **change), world)
    with pytest.raises(ValueError, match="'h900'.*h800"):
        plan(config, 1, "h900")


def test_fine_tuning_fits_on_one_gpu_of_24_gb():
    config = load("finetune")
    assert (config.world, config.sp) == (1, 1)
    largest = replace(config, buckets={"240p": {32: config.buckets["240p"][32]}})
    assert "TOO BIG" not in plan(largest, 1, "4090")
    assert "TOO BIG" in plan(replace(largest, cache=""), 1, "4090")     # T5 next to the model is what does not fit


@pytest.mark.slow
@pytest.mark.parametrize("name, world, gpu", [
    ("image", 64, "h800"), ("stage1_240p", 64, "h800"), ("stage1_144p", 64, "h800"), ("stage1", 64, "h800"),
    ("stage2", 64, "h800"), ("stage3", 64, "h800"), ("finetune", 1, "4090"),
])
def test_a_shipped_config_fits_where_it_says(name, world, gpu):
    assert "TOO BIG" not in plan(load(name), world, gpu)


def test_the_memory_of_sampling_is_planned(config):
    """At its peak a GPU holds the VAE and the larger of T5 and of the model with what it computes."""
    published = plan_sampling(load("stage3"))
    size = {name: float(re.search(rf"{name} ([\d.]+)", published)[1]) for name in ("T5", "VAE", "model")}
    assert size["T5"] == pytest.approx(4.76e9 * 2 / 2 ** 30, abs=0.01)
    rows = re.findall(r"(\d+) x +\d+x\d+ +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)", published)
    assert len(rows) == 3
    for _, activations, decoding, peak, offloaded in rows:
        expected = size["VAE"] + max(size["T5"], size["model"] + float(activations), size["model"] + float(decoding))
        assert float(peak) == pytest.approx(expected, abs=0.02)
        assert float(offloaded) < float(peak)
    assert "not counted" in plan_sampling(config)


@pytest.mark.slow
def test_the_script_starts():
    command = [sys.executable, "-m", "configs.plan", "configs/tiny.py", "--gpus=1", "--gpu=4090", "--data=nowhere.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nowhere.csv" in done.stdout and "GPU-hours" in done.stdout


def test_the_script_plans_on_the_gpus_that_it_is_given(run_script):
    ended = run_script("configs.plan", "configs/stage2.py", "--gpus=8", "--gpu=h200", "--data=nowhere.csv")
    assert ended.status == 0
    assert "8 x h200" in ended.out
    ended = run_script("configs.plan", "configs/stage2.py", "--gpus=7", "--shard=2", "--data=nowhere.csv")
    assert ended.status == 2 and "shard=2" in ended.err
