"""The time of each op, forward and backward, in its plain form and on a GPU as CUDA.

    python tests/bench_kernels.py                           on a GPU if there is one
    CUDA_VISIBLE_DEVICES= python tests/bench_kernels.py     on the CPU all the same
    OMP_NUM_THREADS=1 python tests/bench_kernels.py         on one thread: steadier on a busy machine
"""
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon; before torch is imported
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
    forms = ["plain", "CUDA"] if device == "cuda" else ["plain"]
    size = (4, 16, 390) if device == "cuda" else (2, 8, 144)        # clips, frames, positions
    print(f"{use(device)}; milliseconds, GB/s and the share of the rate of copying, of each form: {', '.join(forms)}")
    for name, (op, in_fp64) in cases(*size).items():
        for dtype in CUDA_NAMES:
            args = cast(in_fp64, dtype, device)
            x = args[0]
            copy_rate = 2 * x.nbytes / milliseconds(x.clone, device)
            row = f"{name:<26}{str(dtype).removeprefix('torch.'):<10}{'x'.join(map(str, x.shape)):<18}"
            for form in forms:
                use(device, plain=form == "plain")
                run = forward_backward(op, args)
                # Arguments are read twice, their gradients written; outputs are written, their gradients read.
                moved = sum(z.nbytes for z in args if torch.is_tensor(z)) + 2 * sum(z.nbytes for z in run())
                took = milliseconds(run, device)
                row += f"{took:10.2f}{moved / took / 1e6:8.1f}{moved / took / copy_rate:6.0%}"
            print(row)


if __name__ == "__main__":
    main()
