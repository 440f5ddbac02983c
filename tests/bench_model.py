"""How fast a block of the model is, beside its matrix products and attention alone, and what it holds for backward.

    python tests/bench_model.py                         minutes
    OMP_NUM_THREADS=1 python tests/bench_model.py       on one thread: steadier on a busy machine
"""
import os
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon; before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from configs import flops  # noqa: E402
from kernels import attention, use  # noqa: E402
from model import XL_2, STDiT, rotary_table  # noqa: E402


def bare(config, B, T, S, L, dtype, device):
    """run(backward): the matrix products and attentions of a block, and nothing else."""
    C = config.hidden_size
    wide = int(C * config.mlp_ratio)
    N = B * T * S

    def new(*shape):
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()

    sizes = [(N, C, 3 * C), (N, C, C), (N, C, 3 * C), (N, C, C), (N, C, C), (B * L, C, 2 * C), (N, C, C),
             (N, C, wide), (N, wide, C)]
    tasks = [(F.linear, (new(n, a), new(b, a), new(b)), new(n, b)) for n, a, b in sizes]
    for n, one, other in ((B * T, S, S), (B * S, T, T), (B, T * S, L)):
        q, k, v = (new(n, length, config.num_heads, config.head_dim).transpose(1, 2) for length in (one, other, other))
        tasks.append((attention, (q, k, v), torch.randn_like(q)))

    def run(backward):
        with torch.set_grad_enabled(backward):
            for task, args, grad in tasks:
                out = task(*args)
                if backward:
                    torch.autograd.grad(out, args, grad)
    return run


def one_block(config, B, T, S, L, dtype, device, masked=False, compiled=False):
    """run(backward) of a block as it is in a model, and its elements held for backward, per token and unit of width."""
    block = STDiT(replace(config, depth=1)).blocks[0].to(device, dtype)
    C = config.hidden_size
    each = T if masked else 1

    def new(*shape):
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()

    x, mod, mod_temp, text = args = new(B, T, S, C), new(B, each, 6 * C), new(B, each, 3 * C), new(B * L, C)
    grad, rotary = torch.randn_like(x), rotary_table(T, config.head_dim, device)

    def forward():
        return block(*args, [L] * B, rotary)

    own = {z.untyped_storage()._cdata for z in (*block.parameters(), mod, mod_temp, text)}
    if compiled:
        block.compile()         # of the plain forms
    held = held_bytes(forward, own) / x.nbytes

    def run(backward):
        with torch.set_grad_enabled(backward):
            out = forward()
            if backward:
                torch.autograd.grad(out, (*args, *block.parameters()), grad)
    return run, held


def held_bytes(forward, own):
    """Returns what autograd keeps of forward() for backward, each storage once, but for those in own (their _cdata)."""
    kept = []                   # holds the tensors: the address of a freed storage could come again

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for key, size in storages.items() if key not in own)


def seconds(run, device):
    """Own CPU time of all threads, or the wall time of a GPU's work."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


# By device: what is compared.  A form without "plain" in its name uses the kernels.
FORMS = {
    "cpu": {"plain": {}, "plain, x_mask": {"masked": True}},
    "cuda": {"plain": {}, "CUDA": {}, "CUDA, x_mask": {"masked": True}, "plain, compiled": {"compiled": True}},
}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
SHAPES = {   # of clips x tokens in time, rows, columns: of a CPU 144p; main buckets of stages 1, 2 (twice) and 3
    "cpu": [(1, 16, 9, 16)], "cuda": [(6, 16, 9, 16), (17, 16, 9, 16), (17, 16, 15, 27), (1, 16, 45, 80)]}


def bench(device, rounds=15):
    """Prints the time of blocks of XL/2 over that of their products and attention alone, which take turns."""
    print(f"{use(device)}; {torch.get_num_threads()} threads; a block of XL/2, 100 text tokens a clip; time / that of "
          f"its products and attention, median of {rounds} [least, most]; held: elements per token and unit of width; "
          "TFLOP/s: of the second form")
    print(f"{'clips x latents':<16}{'dtype':<10}{'':<9}{'bare ms':>8}"
          + "".join(f"{name:>24}" for name in FORMS[device]) + "   TFLOP/s   held")
    for (B, T, rows, columns), dtype in product(SHAPES[device], DTYPES[device]):
        size = XL_2, B, T, rows * columns, 100, dtype, device
        alone = blocks = None           # those of the last shape go before the next ones come
        alone = bare(*size)
        blocks = {}
        for name, how in FORMS[device].items():
            use(device, plain="plain" in name)
            blocks[name] = one_block(*size, **how)
        one, two = (B * flops(replace(XL_2, depth=n), T, 2 * rows, 2 * columns, 100) for n in (1, 2))
        for backward in (False, True):
            flop = (two - one) * (3 if backward else 1)
            print(f"{f'{B} x {T}x{2 * rows}x{2 * columns}':<16}{str(dtype)[6:]:<10}"
                  f"{'fwd + bwd' if backward else 'forward':<10}"
                  + alternate(alone, blocks, backward, device, rounds, flop))


def alternate(alone, blocks, backward, device, rounds, flop):
    """Returns a row of the table: every form once a round, next to the bare products."""
    ratios = {name: [] for name in blocks}
    base = []
    for number in range(rounds + 1):
        took = seconds(lambda: alone(backward), device)
        in_round = {}
        for name, (run, _) in blocks.items():
            use(device, plain="plain" in name)
            in_round[name] = seconds(lambda run=run: run(backward), device) / took
        if number:                              # the first round pays for start-up
            base.append(took)
            for name, ratio in in_round.items():
                ratios[name].append(ratio)
    row = f"{1e3 * median(base):7.1f}"
    for found in ratios.values():
        row += f"{f'{median(found):.3f} [{min(found):.3f} {max(found):.3f}]':>24}"
    second = list(ratios.values())[1]
    held = ", ".join(f"{held:.1f}" for _, held in blocks.values())
    return row + f"{flop / median(base) / median(second) / 1e12:10.2f}   {held}"


if __name__ == "__main__":
    bench("cuda" if torch.cuda.is_available() else "cpu")
