"""The time of each op, forward and backward, in its plain and in its fast form.

    python tests/bench_kernels.py                           on a GPU if there is one
    CUDA_VISIBLE_DEVICES= python tests/bench_kernels.py     on the CPU all the same
    OMP_NUM_THREADS=1 python tests/bench_kernels.py         on one thread: steadier on a busy machine
"""
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # see kernels.py; before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402

from kernels import CUDA_NAMES, cases, cast, forward_backward, use  # noqa: E402


def milliseconds(run, device, repeat=9):
    """On a CPU the median of its own time, all threads together; on a GPU the mean of what its kernels take.

    So neither waiting for other programs counts nor, on a GPU, the launches, which a whole block hides."""
    run()                                       # pays for start-up
    if device == "cuda":
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(repeat):
                run()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in seen.key_averages()) / repeat / 1e3
    took = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        took.append(1e3 * (time.process_time() - start))
    return sorted(took)[repeat // 2]


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(use(device))
    print(f"{'op, forward and backward':<25}{'dtype':<10}{'shape':<18}{'plain ms':>10}{'fast ms':>9}{'ratio':>7}"
          f"{'GB/s':>7}{'of copying':>11}")
    for name, (op, fp64_args) in cases(*((4, 16, 390) if device == "cuda" else ())).items():
        for dtype in CUDA_NAMES:
            args = cast(fp64_args, dtype, device)
            runs, x = [forward_backward(form, args) for form in (getattr(op, "plain", op), op)], args[0]
            both, copied = [milliseconds(run, device) for run in runs], milliseconds(lambda x=x: x.clone(), device)
            # Arguments are read twice, their gradients written; outputs are written, their gradients read.
            moved = sum(z.nbytes for z in args if torch.is_tensor(z)) + 2 * sum(z.nbytes for z in runs[1]())
            rate, most = moved / both[1] / 1e6, 2 * x.nbytes / copied / 1e6
            print(f"{name:<25}{str(dtype)[6:]:<10}{'x'.join(map(str, x.shape)):<18}"
                  f"{both[0]:10.2f}{both[1]:9.2f}{both[0] / both[1]:7.2f}{rate:7.1f}{rate / most:11.0%}")


if __name__ == "__main__":
    main()
