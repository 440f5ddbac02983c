"""The CUDA C++ of kernels.py without a GPU: run on an emulated one, and compiled by nvcc where it is installed."""
import ctypes
import itertools
import re
import shutil
import subprocess

import pytest
import torch

import kernels
from test_kernels import assert_as_close, rand

# ---- CUDA on a CPU: each thread of a block is a fiber; at a barrier it waits until all others are there ----
# Blocks run one after another. Fibers are woken in an order that is shuffled anew each round, so that a result that
# lacks a barrier changes; a lane that skips a shuffle, or a barrier only some threads reach, is an error. Shared memory
# is NaN at the start of each block.
EMULATOR = r"""
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>
#include <ucontext.h>
#define __device__
#define __global__
#define __launch_bounds__(...)
static int min(int a, int b) { return a < b ? a : b; }
static long long min(long long a, long long b) { return a < b ? a : b; }
struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
static float rsqrtf(float x) { return 1 / sqrtf(x); }
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
static float wide(float x) { return x; }
static float wide(bf16 x) { unsigned u = (unsigned)x.bits << 16; float y; memcpy(&y, &u, 4); return y; }
static float wide(f16 x) { _Float16 y; memcpy(&y, &x, 2); return y; }
static void narrow(float x, float& y) { y = x; }
static void narrow(float x, bf16& y) {
    unsigned u; memcpy(&u, &x, 4); y.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff; }
static void narrow(float x, f16& y) { _Float16 z = x; memcpy(&y, &z, 2); }

struct Fiber { ucontext_t context; std::vector<char> stack; bool done; long block, warp; };
static std::vector<Fiber> fibers;
static ucontext_t home;
static unsigned self;
static float slots[1024];
static const char* failure;
static bool moved;
static void (*body)(void* f, void** args);
static void *kernel, **arguments;
static std::vector<std::pair<float*, size_t>> shared_arrays;
struct Shared { Shared(float* p, size_t n) {
    shared_arrays.push_back({p, n}); for (size_t i = 0; i < n; i++) p[i] = NAN; } };
static void wait(unsigned first, unsigned size, long Fiber::* count) {
    const long mine = ++(fibers[self].*count);
    moved = true;
    for (;;) {
        bool all = true;
        for (unsigned i = first; i < first + size; i++) {
            if (fibers[i].*count >= mine) continue;
            if (!fibers[i].done) all = false;
            else failure = "a thread left before a barrier or shuffle"; }
        if (all) return;
        swapcontext(&fibers[self].context, &home); } }
static void __syncwarp() { wait(self / 32 * 32, 32, &Fiber::warp); }
static void __syncthreads() { wait(0, blockDim.x, &Fiber::block); }
static float __shfl_xor_sync(unsigned, float x, int mask) {
    slots[self] = x; wait(self / 32 * 32, 32, &Fiber::warp);
    const float y = slots[self ^ mask]; wait(self / 32 * 32, 32, &Fiber::warp);
    return y; }
static void enter() {
    body(kernel, arguments); fibers[self].done = moved = true; swapcontext(&fibers[self].context, &home); }

template <class... A> int count(void (*)(A...)) { return sizeof...(A); }
template <class... A, size_t... i> void call(void (*f)(A...), void** args, std::index_sequence<i...>) {
    f(*(A*)args[i]...); }
template <class... A> void call(void (*f)(A...), void** args) { call(f, args, std::index_sequence_for<A...>()); }
template <class F> const char* run(F f, unsigned blocks, unsigned threads, unsigned seed, void** args) {
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    gridDim = {blocks, 1, 1}; blockDim = {threads, 1, 1}; failure = nullptr; fibers.resize(threads);
    body = [](void* f, void** args) { call((F)f, args); }; kernel = (void*)f; arguments = args;
    for (unsigned b = 0; b < blocks && !failure; b++) {
        blockIdx = {b, 0, 0};
        for (auto& s : shared_arrays) for (size_t i = 0; i < s.second; i++) s.first[i] = NAN;
        for (auto& fiber : fibers) {
            fiber.done = false; fiber.block = fiber.warp = 0; fiber.stack.resize(1 << 16);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(); fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, enter, 0); }
        for (bool left = true; left && !failure;) {
            for (unsigned i = threads - 1; i; i--) {
                seed = seed * 1664525u + 1013904223u; std::swap(order[i], order[(seed >> 8) % (i + 1)]); }
            left = moved = false;
            for (unsigned i : order) if (!fibers[i].done) {
                self = i; threadIdx = {i, 0, 0};
                swapcontext(&home, &fibers[i].context);
                left |= !fibers[i].done; }
            if (left && !moved) failure = "threads wait for each other"; }
    }
    return failure; }
"""
ENTRIES = r"""
extern "C" int parameters() { return count(&KERNEL_NAME); }
extern "C" const char* launch(unsigned blocks, unsigned threads, unsigned seed, void** args) {
    return run(&KERNEL_NAME, blocks, threads, seed, args); }
"""


def emulated(name, folder, source):
    """What kernels.kernel gives, on the CPU."""
    arrays = lambda found: "".join(f"static float {array}[{size}]; static Shared {array}_({array}, {size}); "
                                   for array, size in re.findall(r"(\w+)\[(.*?)\]", found[1]))
    source = re.sub(r"__shared__ (?:alignas\(16\) )?float (.*?);", arrays, source)
    stem = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}{abs(hash(source))}"
    if not stem.with_suffix(".so").exists():
        stem.with_suffix(".cpp").write_text(EMULATOR + source + ENTRIES.replace("KERNEL_NAME", name))
        subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-w",
                        stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so")], check=True)
    library, seeds = ctypes.CDLL(str(stem.with_suffix(".so"))), itertools.count()
    library.launch.restype = ctypes.c_char_p

    def call(blocks, threads, arguments):
        assert len(arguments) == library.parameters() <= 24, f"{name}: {len(arguments)}"
        values = [ctypes.c_longlong(value) for value in arguments]
        failed = library.launch(blocks, threads, next(seeds),
                                (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)))
        assert failed is None, f"{name}: {failed.decode()}"
    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def gpu(folder, monkeypatch, ops_as_imported):
    """CPU tensors go through the ops of a GPU; what these leave unwritten is NaN."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    monkeypatch.setattr(kernels, "kernel", lambda name, device: emulated(name, folder, kernels.CUDA))
    kernels.CHOICE["cpu"] = {"dtypes": tuple(kernels.CUDA_NAMES), **kernels.cuda_ops()}
    torch.use_deterministic_algorithms(True)        # fills torch.empty
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, shape, per_frame", [
    (torch.float32, (2, 3, 37, 24), True), (torch.float32, (1, 2, 67, 36), False),
    (torch.bfloat16, (2, 3, 7, 1152), True), (torch.float16, (1, 5, 19, 144), False)])
def test_modulate_and_gate(dtype, shape, per_frame, gpu):
    B, T, S, C = shape
    x, update = 3 * rand(B, T, S, C) + 1, rand(B, T, S, C, seed=3)
    shift, scale = rand(B, T if per_frame else 1, 2 * C, seed=1).chunk(2, dim=-1)
    assert_as_close("modulate", (x, shift, scale), dtype)
    assert_as_close("gated_residual", (x, shift, update), dtype)
    assert_as_close("gated_residual", (x, shift, update.transpose(1, 2).contiguous().transpose(1, 2)), dtype)


@pytest.mark.parametrize("dtype, axis, turned, rope_first, D", [
    (torch.float32, "space", False, False, 12), (torch.float32, "time", True, True, 12),
    (torch.bfloat16, "time", True, False, 72), (torch.float16, "space", False, False, 72)])
def test_qk_norm_rope(dtype, axis, turned, rope_first, D, gpu):
    B, T, S, heads = 2, 3, 5, 2
    angle = rand(T, D // 2, seed=2).float()
    qkv, norms = rand(B, T, S, 3 * heads * D), list(1 + rand(2, D, seed=1))
    how = (angle.cos(), angle.sin()) if turned else None, rope_first, heads, axis
    assert_as_close("qk_norm_rope", (qkv, *norms, *how), dtype)


@pytest.mark.parametrize("dtype, T, rope_first, D", [
    (torch.float32, 3, False, 8), (torch.float32, 5, True, 24), (torch.float32, 17, False, 24),
    (torch.bfloat16, 16, False, 72), (torch.bfloat16, 32, False, 72), (torch.float16, 9, True, 72)])
def test_time_attention(dtype, T, rope_first, D, gpu):
    B, S, heads = 2, 3, 2
    angle = rand(T, D // 2, seed=2).float()
    qkv, norms = rand(B, T, S, 3 * heads * D), list(1 + rand(2, D, seed=1))
    assert_as_close("time_attention", (qkv, *norms, (angle.cos(), angle.sin()), rope_first, heads), dtype)


def test_a_lone_frame_sees_itself(gpu):
    qkv, one = rand(1, 1, 3, 48).float(), torch.ones(1, 4)
    assert torch.equal(kernels.time_attention(qkv, torch.ones(8), torch.ones(8), (one, 0 * one), False, 2)[:, 0],
                       qkv[0, 0, :, 32:])


def check_barriers(folder, source):
    """modulate's backward with `source` for its kernels, which must be right."""
    run = emulated("modulate_backward<float, 8>", folder, source)
    grad, x = torch.ones(64, 8), rand(64, 8).float()
    dx, part = torch.zeros(64, 8), torch.full((2, 1, 8), torch.nan)
    tensors = grad, x, torch.zeros(64), torch.ones(64), torch.zeros(8), dx, part
    run(1, 128, [*(z.data_ptr() for z in tensors), 64, 1, 64])
    assert torch.allclose(part[:, 0], torch.stack([grad.sum(0), x.sum(0)]), rtol=1e-5)


def test_the_emulator_sees_missing_barriers_and_lanes(folder):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    check_barriers(folder, kernels.CUDA)
    with pytest.raises(AssertionError):
        check_barriers(folder, kernels.CUDA.replace("__syncthreads()", "(void)0"))
    with pytest.raises(AssertionError, match="left before"):
        check_barriers(folder, kernels.CUDA.replace("float sum = 0, dot", "if (lane == 3) return; float sum = 0, dot"))


def names(dtype):
    """Every kernel that a model of width 1152 with heads of 72 can ask for."""
    return [f"modulate_forward<{dtype}, 1152>", f"modulate_backward<{dtype}, 1152>",
            *(f"gated_residual<{dtype}, 1152, {back}>" for back in (0, 1)),
            *(f"qk_norm_rope<{dtype}, 72, {rope}, {back}>" for rope, back in itertools.product((0, 1, 2), (0, 1))),
            *(f"time_attention<{dtype}, 72, 1, {back}, {M}>" for back, M in itertools.product((0, 1), (8, 16, 32)))]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_compiles(arch, tmp_path):
    """Next to no register is spilled."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if arch not in known:
        pytest.skip(f"this nvcc knows {known[0]} to {known[-1]}, not {arch}")
    every = [name for dtype in kernels.CUDA_NAMES.values() for name in names(dtype)[:None if dtype == "bf16" else 4]]
    table = "".join(f"void* pointer_{i} = (void*){name};\n" for i, name in enumerate(every))
    (tmp_path / "all.cu").write_text(kernels.CUDA_TYPES + kernels.CUDA + table)
    done = subprocess.run(["nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
                           "-o", tmp_path / "all.cubin", tmp_path / "all.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert len(found) == len(every), done.stderr
    assert not (spilled := [row for row in found if int(row[2]) > 64]), spilled


def test_an_op_that_is_wrong_or_does_not_compile_is_told(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(kernels, "cases", lambda B, T, S, all=kernels.cases: all(B=1, T=2, S=3, heads=2, D=8, L=4))
    ops = kernels.cuda_ops()
    forward, backward = ops["gated_residual"]
    wrong = ops | {"gated_residual": (lambda x, gate, update: 1.02 * forward(x, gate, update), backward)}
    del wrong["qk_norm_rope"], wrong["time_attention"]
    monkeypatch.setattr(kernels, "cuda_ops", lambda: dict(wrong))
    kept, (said,) = kernels.check_cuda.__wrapped__(torch.device("cpu"))
    assert set(kept) == {"modulate"} and re.match("gated_residual runs as PyTorch's own on cpu: .*error", said)
    assert not list(tmp_path.rglob("cuda-*")), "asked again the next time"

    def none(name, device):
        raise OSError("Could not find any NVRTC library")
    monkeypatch.setattr(kernels, "kernel", none)
    kept, said = kernels.check_cuda.__wrapped__(torch.device("cpu"))
    assert kept == {} and all("NVRTC" in text for text in said) and len(said) == 2
