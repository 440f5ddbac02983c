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

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon; before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from configs import flops  # noqa: E402
from kernels import attention, use  # noqa: E402
from model import XL_2, STDiT, rotary_table  # noqa: E402


def bare(config, B, T, S, L, dtype, device):
    """run(backward): the matrix products and attentions of a block, and nothing else."""
    C, wide, N = config.hidden_size, int(config.hidden_size * config.mlp_ratio), B * T * S
    new = lambda *shape: torch.randn(*shape, dtype=dtype, device=device).requires_grad_()
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
    block, C, each = STDiT(replace(config, depth=1)).blocks[0].to(device, dtype), config.hidden_size, T if masked else 1
    new = lambda *shape: torch.randn(*shape, dtype=dtype, device=device).requires_grad_()
    x, mod, mod_temp, text = args = new(B, T, S, C), new(B, each, 6 * C), new(B, each, 3 * C), new(B * L, C)
    grad, rotary = torch.randn_like(x), rotary_table(T, config.head_dim, device)
    forward = lambda: block(*args, [L] * B, rotary)
    own = {z.untyped_storage()._cdata for z in (*block.parameters(), mod, mod_temp, text)}
    held = held_bytes(forward, own) / x.nbytes
    if compiled:
        block.compile()         # of the plain forms

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


KINDS = {"plain": {}, "fast": {}, "fast, x_mask": {"masked": True}, "compiled plain": {"compiled": True}}
SHAPES = {   # of clips x tokens in time, rows, columns: of a CPU 144p; main buckets of stages 1, 2 (twice) and 3
    "cpu": [(1, 16, 9, 16)], "cuda": [(6, 16, 9, 16), (17, 16, 9, 16), (17, 16, 15, 27), (1, 16, 45, 80)]}


def bench(device, rounds=15):
    """Blocks of XL/2 over their products and attention alone, in turns: median [least, most] of the ratios."""
    kinds, dtypes = dict(KINDS), [torch.float32, torch.bfloat16]
    if device == "cpu":
        kinds.pop("compiled plain")
    else:
        dtypes = [torch.bfloat16]
    print(f"{use(device)}; {torch.get_num_threads()} threads; a block of XL/2, 100 text tokens a clip; time / that of "
          f"its products and attention, median of {rounds} [least, most]; masked / fast: both of one round, median "
          "[middle half]; held: elements per token and unit of width")
    print(f"{'clips x latents':<16}{'dtype':<10}{'':<9}{'bare ms':>8}" + "".join(f"{name:>24}" for name in kinds)
          + f"{'masked / fast':>24}   TFLOP/s, fast   held")
    for (B, T, rows, columns), dtype in product(SHAPES[device], dtypes):
        size = XL_2, B, T, rows * columns, 100, dtype, device
        alone = blocks = None           # those of the last shape go before the next ones come
        alone, blocks = bare(*size), {}
        for name, how in kinds.items():
            use(device, plain=name == "plain")
            blocks[name] = one_block(*size, **how)
        one, two = (B * flops(replace(XL_2, depth=n), T, 2 * rows, 2 * columns, 100) for n in (1, 2))
        for backward in (False, True):
            print(f"{f'{B} x {T}x{2 * rows}x{2 * columns}':<16}{str(dtype)[6:]:<10}"
                  f"{'fwd + bwd' if backward else 'forward':<10}"
                  + alternate(alone, blocks, backward, device, rounds, (two - one) * (3 if backward else 1)))


def alternate(alone, blocks, backward, device, rounds, flop):
    """A row of the table: every kind once a round, beside the bare products."""
    ratios, base = {name: [] for name in blocks}, []
    for _ in range(rounds + 1):                 # the first pays for start-up
        took = seconds(lambda: alone(backward), device)
        base.append(took)
        for name, (run, _) in blocks.items():
            use(device, plain=name == "plain")
            ratios[name].append(seconds(lambda run=run: run(backward), device) / took)
    at = lambda values, part: sorted(values[1:])[int(part * (rounds - 1))]
    shown = lambda r, low, high: f"{f'{at(r, 0.5):.3f} [{at(r, low):.3f} {at(r, high):.3f}]':>24}"
    masks = [masked / fast for masked, fast in zip(ratios["fast, x_mask"], ratios["fast"])]
    rate = flop / at(base, 0.5) / at(ratios["fast"], 0.5) / 1e12
    return (f"{1e3 * at(base, 0.5):7.1f}" + "".join(shown(r, 0, 1) for r in ratios.values()) + shown(masks, 0.25, 0.75)
            + f"{rate:16.2f}   " + ", ".join(f"{held:.1f}" for _, held in blocks.values()))


if __name__ == "__main__":
    bench("cuda" if torch.cuda.is_available() else "cpu")
