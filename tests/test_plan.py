"""configs.plan against live tensors: activations, states, traffic; its warnings and its own time."""
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from configs import GPUS, largest, load, plan, plan_row, search, wire
from model import LiveBytes, STDiT, STDiTConfig, example_inputs, forward_bytes, saved_bytes, state_bytes

SMALL = STDiTConfig(depth=6, hidden_size=144, num_heads=2, caption_channels=64)
PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def live(config, B, T, h, w, L, dtype, every):
    """Peak of a real forward and backward, parameters, their gradients and inputs apart."""
    model, inputs = STDiT(config).to(dtype), example_inputs(config, B, T, h, w, L)
    for block in model.blocks[::every] if every else ():
        block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))    # as FSDP takes them away
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as memory:
        model(**inputs, x_mask=torch.ones(B, T, dtype=torch.bool)).square().mean().backward()
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(2, 4, 16, 16, 20), (3, 1, 45, 27, 7)])
def test_activations_are_those_of_live_tensors(shape, every, dtype):
    planned, real = saved_bytes(SMALL, *shape, dtype, every), live(SMALL, *shape, dtype, every)
    assert planned == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 16, 16, 20), (3, 1, 45, 27, 7)])
def test_sampling_holds_what_live_tensors_do(shape, dtype):
    model, inputs = STDiT(SMALL).to(dtype), example_inputs(SMALL, *shape)
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as memory:
        model(**inputs, x_mask=torch.ones(*shape[:2], dtype=torch.bool))
    assert forward_bytes(SMALL, *shape, dtype) == pytest.approx(memory.peak, rel=0.02)


def count_states(rank, folder):
    """One step on worlds of 1, 2 and 4 and on 2 x 2, side by side; each writes what its GPU would hold and receive."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shard"))
    meshes = {(1, 1): init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicas", "shard"))["shard"],
              (2, 2): pairs["shard"], (4, 4): init_device_mesh("cpu", (4,)), (4, 2): pairs}
    found = {}
    for key, mesh in meshes.items():
        model, policy = STDiT(SMALL), MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=block is not model.blocks[-1])
        fully_shard(model, mesh=mesh, mp_policy=policy)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, ema = torch.optim.AdamW(trained), [p.detach().clone() for p in model.parameters()]
        moved = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}

        class Traffic(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args, kwargs=None, moved=moved, mesh=mesh):
                if "c10d" in str(op):
                    name = next((n for n in moved if n.replace("-", "") in str(op).replace("_", "")), None)
                    whole = max((x.nbytes for x in tree_leaves(args[:2]) if torch.is_tensor(x)), default=0)
                    n = mesh.size(0 if name == "all-reduce" else -1)
                    moved[name] += whole * (n - 1) / n * (2 if name == "all-reduce" else 1)
                return op(*args, **(kwargs or {}))

        with Traffic():
            model(**example_inputs(SMALL, 1, 2, 4, 4, 4)).square().mean().backward()
        optimizer.step()
        size = lambda tensors: sum(x.to_local().nbytes for x in tensors)
        adam = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
        found[key] = {"weights": size(model.parameters()), "gradients": size(p.grad for p in trained),
                      "Adam": size(adam), "EMA": size(ema)}, moved
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_states_and_traffic_are_those_of_live_tensors(tmp_path):
    code = ("import sys, torch._dynamo, test_plan as t, torch.multiprocessing as mp; "    # once, then forked
            "mp.start_processes(t.count_states, (sys.argv[1],), 4, start_method='fork')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=PATHS, check=True, timeout=120)
    config = replace(load("configs/stage2.py"), model=SMALL)
    for rank in range(4):
        for (world, shard), (states, moved) in torch.load(tmp_path / f"{rank}.pt").items():
            planned = state_bytes(SMALL, shard, torch.bfloat16)
            for name, real in states.items():
                assert planned[name] == pytest.approx(real, rel=0.02), (world, shard, rank, name)
            for name, planned in wire(replace(config, shard=shard), world).items():
                assert planned == pytest.approx(moved[name], rel=0.02), (world, shard, rank, name)


def test_the_plan_names_what_does_not_fit_and_what_would():
    config = load("configs/stage2.py", [
        "--checkpointing=0", "--buckets={'144p': {1: (1.0, 48), 16: (1.0, 17)}, '720p': {16: (0.1, 9)}}"])
    lines = lambda config, *args: re.findall(r"^ +\d+ x +\d+x\d.*", plan(config, *args), re.M)
    image, short, large = lines(config, 64)
    assert "TOO BIG" not in image and "--checkpointing=1, or 15 clips" in short and "--accumulation=" in large
    fit, over = ({"144p": {16: (1.0, n)}} for n in (15, 16))                # what it names fits, one more does not
    assert "TOO BIG" not in lines(replace(config, buckets=fit), 64)[0]
    assert "TOO BIG" in lines(replace(config, buckets=over), 64)[0]
    thin = replace(config, checkpointing=1)
    assert ["TOO BIG" in line for line in lines(thin, 64)] == [False, False, True]
    parts = int(lines(thin, 64)[2].split("--accumulation=")[1].split()[0])
    assert "TOO BIG" not in lines(replace(thin, accumulation=parts), 64)[2]
    assert "share them" in lines(config, 1, "4090")[0]
    for shard, sp in ((3, 1), (0, 3)):
        with pytest.raises(ValueError, match=f"shard={shard or 64}, sp={sp}: .* divide a world"):
            plan(replace(config, shard=shard, sp=sp), 64)
    with pytest.raises(ValueError, match="world=-1, .* a world of 1 or more"):
        plan(config, -1)


def test_a_clip_shared_by_gpus_costs_each_its_part():
    """Half the frames, the captions whole; by hand what they pass on, and how long that takes."""
    config = load("configs/stage3.py")
    alone, shared = (plan_row(replace(config, sp=sp), 64, GPUS["h800"], "480p", 32) for sp in (1, 2))
    assert shared["clips"] == 2 * alone["clips"] and shared["tokens"] == alone["tokens"]
    assert shared["fixed"] == alone["fixed"] and shared["activations"] == pytest.approx(alone["activations"], rel=0.02)
    text = 2 * 4.76e9 * 200 * alone["clips"]                         # T5 runs on either GPU, for twice the clips
    assert shared["flop"] == pytest.approx(alone["flop"] + text, rel=1e-6)
    clips, frames, places, width, blocks = 6, 16, 32 * 51, 1152, 28  # 506 x 810 pixels: 63 x 101 cells, in twos
    exchanges = 4 + 2                                                # forward, backward, forward again; there and back
    assert shared["bucket"][:2] == ("480p", 32) and (shared["bucket"].height, shared["bucket"].width) == (506, 810)
    assert shared["moved"]["all-to-all"] == clips * frames * places * width * 2 * blocks * exchanges / 2
    assert {k: n for k, n in shared["moved"].items() if k != "all-to-all"} == alone["moved"]
    assert shared["step"] == shared["compute"] + shared["moved"]["all-to-all"] / (0.7 * 200e9)


def test_frames_are_padded_to_a_multiple_of_the_gpus_that_share_them():
    config = replace(load("configs/stage3.py"), cache="c", windows=1, world=60)
    flop = lambda t, sp: plan_row(replace(config, sp=sp, buckets={"144p": {t: (1.0, 1)}}), 60, GPUS["h800"],
                                  "144p", t)["flop"]
    assert flop(16, 5) == pytest.approx(flop(16, 1) * 5 * 4 / 16)    # 4 frames each, of 5 times the clips
    assert flop(1, 4) == flop(1, 1) * 4                              # an image cannot be shared: every GPU has one


@pytest.mark.parametrize("name", ["image", "stage1_240p", "stage1_144p", "stage1", "stage2", "stage3"])
def test_the_stages_fit_on_64_gpus_of_80_gb(name):
    assert "TOO BIG" not in plan(load(name), 64)


def test_fine_tuning_fits_on_one_gpu_of_24_gb():
    config = load("finetune")
    assert (config.world, config.sp) == (1, 1) and "TOO BIG" not in plan(config, 1, "4090")
    assert "TOO BIG" in plan(replace(config, cache=""), 1, "4090")  # T5 beside it is what does not fit


# ---- batch sizes ----

@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 100, 500, 1023, 1024, 5000])
def test_the_largest_is_found_in_few_tries(most):
    tried = []
    found = largest(lambda n: tried.append(n) or n <= most)
    assert found == min(most, 1024) if most <= 32 or most >= 1024 else most * 15 / 16 < found <= most
    assert len(tried) <= 16 and len(set(tried)) == len(tried)


def table_of(text):
    """{(resolution, frames): [most, its seconds, equal, its seconds, now]}, and what may be pasted into a config."""
    rows = re.findall(r"^ +(\w+) x (\d+) +([\d. ]+)$", text, re.M)
    namespace = {}
    exec("pasted = dict(\n" + text[text.index("    world="):] + ")", namespace)
    return {(level, int(t)): [float(x) for x in numbers.split()] for level, t, numbers in rows}, namespace["pasted"]


def test_the_search_makes_all_buckets_take_the_same_time():
    config = load("finetune", ["--buckets={'144p': {1: (0.5, 64), 16: (1.0, 8), 64: (0.0, None)}, "
                               "'240p': {16: (0.3, 2), 32: (0.4, 3)}, '720p': {16: (0.2, 1)}}"])
    cost = {("144p", 1): 1, ("144p", 16): 10, ("240p", 16): 40, ("240p", 32): 90, ("720p", 16): 500}
    measured = []

    def measure(kind, clips):                                        # 1 s and 0.01 s a unit; 420 units fit
        measured.append((kind, clips))
        return 1 + 0.01 * cost[kind] * clips if cost[kind] * clips <= 420 else math.inf

    text = search(config, 1, "4090", measure)
    rows, pasted = table_of(text)
    assert rows == {("144p", 1): [416, 5.16, 352, 4.52, 64], ("144p", 16): [42, 5.2, 36, 4.6, 8],
                    ("240p", 16): [10, 5, 9, 4.6, 2], ("240p", 32): [4, 4.6, 4, 4.6, 3]}
    assert "4 of 5 buckets fit; steps of up to 4.60 s" in text
    assert re.search("720p x 16 +not one clip fits +1\n", text)
    assert pasted == {"world": 1, "buckets": {
        "144p": {1: (0.5, 352), 16: (1.0, 36), 64: (0.0, None)}, "240p": {16: (0.3, 9), 32: (0.4, 4)},
        "720p": {16: (0.2, 1)}}}
    assert len(measured) == len(set(measured)) <= 50, "each costs a minute"
    assert replace(config, **pasted).buckets == pasted["buckets"]


def test_the_search_waits_for_the_dearest_single_clip():
    config = load("finetune", ["--buckets={'144p': {16: (1.0, 1)}, '240p': {16: (1.0, 1), 32: (1.0, 1)}}"])
    most = {("144p", 16): 2, ("240p", 16): 64, ("240p", 32): 1}
    cost = {("144p", 16): 1.0, ("240p", 16): 0.5, ("240p", 32): 9.0}
    rows, _ = table_of(search(config, 1, "4090", lambda kind, n: cost[kind] * n if n <= most[kind] else math.inf))
    assert [row[2] for row in rows.values()] == [2, 18, 1]           # not 2, 4, 1: every step of the last takes 9 s


@pytest.mark.parametrize("name, world, gpu, sp", [("finetune", 1, "4090", 1), ("stage1", 64, "h800", 1),
                                                  ("stage1", 64, "h800", 4)])
def test_what_the_search_finds_by_the_plan_is_what_the_plan_says(name, world, gpu, sp):
    config = load(name, [f"--sp={sp}"])
    rows, pasted = table_of(search(config, world, gpu))
    found = replace(config, **pasted)
    assert pasted["world"] == world // sp and "TOO BIG" not in plan(found, world, gpu)
    for kind, (most, _, equal, seconds, now) in rows.items():
        row = plan_row(found, world, GPUS[gpu], *kind)
        assert row["clips"] == equal and row["step"] == pytest.approx(seconds, abs=0.006)
        assert row["most"][found.checkpointing] * 15 / 16 < most <= row["most"][found.checkpointing]
        assert now == config.buckets[kind[0]][kind[1]][1] * sp


def test_the_plan_of_stage_2_takes_seconds(capsys):
    code = "import configs; print(configs.plan(configs.load('configs/stage2.py'), 64))"
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PATHS)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nthe plan of stage 2, imports included: {seconds:.1f} s")
    assert run.returncode == 0 and "GPU-hours" in run.stdout, run.stderr[-2000:]
    assert seconds < 90
