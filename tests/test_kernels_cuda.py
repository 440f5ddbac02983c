"""Checks the CUDA C++ of kernels.py without a GPU: it runs on an emulated one, and nvcc compiles it if installed."""
import ctypes
import hashlib
import itertools
import re
import shutil
import subprocess

import pytest
import torch

import kernels
from conftest import may_take_kernels
from test_kernels import assert_as_close, modulate_args, qk_args, results, time_args, to_dtype

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

# ---- CUDA on a CPU: each thread of a block is a fiber; at a barrier it waits until all others have arrived ----
# Blocks run one after another. Fibers are woken in an order that is shuffled for each round, so that a result that
# lacks a barrier changes. A lane that skips a shuffle, or a barrier that only some threads reach, is an error. Shared
# memory is NaN at the start of each block.
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
static float wide(float x) { return x; }
static float wide(bf16 x) { unsigned u = (unsigned)x.bits << 16; float y; memcpy(&y, &u, 4); return y; }
static void narrow(float x, float& y) { y = x; }
static void narrow(float x, bf16& y) {
    unsigned u; memcpy(&u, &x, 4); y.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff; }

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
extern "C" int parameters_NUMBER() { return count(&KERNEL_NAME); }
extern "C" const char* launch_NUMBER(unsigned blocks, unsigned threads, unsigned seed, void** args) {
    return run(&KERNEL_NAME, blocks, threads, seed, args); }
"""


class EmulatedGPU:
    """Compiles kernels with g++ and runs them; stands for kernels.kernel."""
    def __init__(self, folder, source=kernels.CUDA):
        self.folder = folder
        self.source = re.sub(r"__shared__ (?:alignas\(16\) )?float (.*?);", shared_arrays, source)
        self.found = {}
        self.seeds = itertools.count()

    def compile(self, names):
        """Compiles the named kernels as one library, which takes much less time than one library each."""
        code = EMULATOR + self.source
        for number, name in enumerate(names):
            code += ENTRIES.replace("KERNEL_NAME", name).replace("NUMBER", str(number))
        stem = self.folder / hashlib.sha256(code.encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(code)
        library = stem.with_suffix(".so")
        subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-w",
                        stem.with_suffix(".cpp"), "-o", library], check=True)
        library = ctypes.CDLL(str(library))
        for number, name in enumerate(names):
            launch = library[f"launch_{number}"]
            launch.restype = ctypes.c_char_p
            self.found[name] = launch, library[f"parameters_{number}"]()

    def kernel(self, name, device):
        """Returns call(blocks, threads, arguments), as kernels.kernel does."""
        def call(blocks, threads, arguments):
            if name not in self.found:
                self.compile([name])
            launch, num_parameters = self.found[name]
            assert len(arguments) == num_parameters <= 24, name
            values = [ctypes.c_longlong(value) for value in arguments]
            places = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
            failure = launch(blocks, threads, next(self.seeds), places)
            assert failure is None, f"{name}: {failure.decode()}"
        return call


def shared_arrays(found):
    """Replaces a declaration of __shared__ arrays: they become static, and the emulator knows of them."""
    declared = re.findall(r"(\w+)\[(.*?)\]", found[1])
    lines = [f"static float {array}[{size}]; static Shared {array}_({array}, {size});" for array, size in declared]
    return " ".join(lines)


def run_on(kernel, monkeypatch):
    """Lets CPU tensors go through the ops of a GPU, whose kernels `kernel` runs."""
    monkeypatch.setattr(kernels, "kernel", kernel)
    monkeypatch.setattr(kernels, "on_gpu", may_take_kernels)
    kernels.compiles.cache_clear()


@pytest.fixture
def empty_is_nan():
    """Fills torch.empty with NaN, so that a value which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# op, args, dtype.  Widths: a multiple of what a lane reads at once or of its half; rows: one block or several, the last
# not full; frames: each size of the tables of time_attention, of which a few rows stay empty.
QUICK = {
    "modulate": ("modulate", modulate_args(2, 3, 37, 144, True), torch.float32),
    "modulate, bf16": ("modulate", modulate_args(1, 2, 19, 24, False), torch.bfloat16),
    "modulate, odd half-words": ("modulate", modulate_args(1, 2, 3, 18, False), torch.bfloat16),
    "qk_norm_rope, space": ("qk_norm_rope", qk_args(2, 3, 5, 2, 72, "space", False, False), torch.bfloat16),
    "qk_norm_rope, time": ("qk_norm_rope", qk_args(2, 3, 5, 2, 24, "time", True, False), torch.float32),
    "qk_norm_rope, time, Q1": ("qk_norm_rope", qk_args(1, 3, 5, 3, 12, "time", True, True), torch.float32),
    "time_attention, 1 frame": ("time_attention", time_args(2, 1, 3, 2, 8, False), torch.float32),
    "time_attention, 5 frames": ("time_attention", time_args(2, 5, 3, 2, 24, False), torch.float32),
    "time_attention, 9 frames, bf16": ("time_attention", time_args(1, 9, 2, 1, 72, False), torch.bfloat16),
    "time_attention, 17 frames, Q1": ("time_attention", time_args(1, 17, 2, 2, 8, True), torch.float32),
}
SLOW = {
    "modulate, XL/2": ("modulate", modulate_args(2, 3, 7, 1152, True), torch.bfloat16),
    "qk_norm_rope, XL/2, Q1": ("qk_norm_rope", qk_args(2, 5, 7, 16, 72, "time", True, True), torch.bfloat16),
    "qk_norm_rope, space, turned": ("qk_norm_rope", qk_args(2, 3, 5, 2, 72, "space", True, False), torch.bfloat16),
    "qk_norm_rope, several turns": ("qk_norm_rope", qk_args(1, 8, 4200, 1, 4, "space", True, False), torch.float32),
    "time_attention, 16 frames": ("time_attention", time_args(2, 16, 3, 2, 72, False), torch.bfloat16),
    "time_attention, 32 frames": ("time_attention", time_args(2, 32, 3, 2, 72, False), torch.bfloat16),
    "time_attention, 9 frames, Q1": ("time_attention", time_args(2, 9, 3, 2, 72, True), torch.bfloat16),
    "time_attention, several turns": ("time_attention", time_args(1, 2, 4200, 1, 8, False), torch.float32),
}


@pytest.fixture(scope="module")
def emulated_gpu(tmp_path_factory):
    """Returns an EmulatedGPU that has all kernels of the quick cases, compiled together."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    wanted = {}

    def note_name(name, device):
        wanted[name] = True
        return lambda blocks, threads, arguments: None

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "PLAIN", {"only": False})
        run_on(note_name, monkeypatch)
        for name, args, dtype in QUICK.values():
            results(getattr(kernels, name), to_dtype(args, dtype))
    gpu = EmulatedGPU(tmp_path_factory.mktemp("emulated"))
    gpu.compile(list(wanted))
    return gpu


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_cuda_kernel_is_as_close_as_the_plain_form(case, emulated_gpu, monkeypatch, empty_is_nan):
    name, args, dtype = (QUICK | SLOW)[case]
    run_on(emulated_gpu.kernel, monkeypatch)
    assert_as_close(name, args, dtype)


@needs_gxx
@pytest.mark.slow
def test_the_emulator_sees_that_a_barrier_is_missing(tmp_path, monkeypatch, empty_is_nan):
    for barrier, case in (("__syncthreads()", "modulate"), ("__syncwarp()", "time_attention, 5 frames")):
        assert barrier in kernels.CUDA
        broken = EmulatedGPU(tmp_path, kernels.CUDA.replace(barrier, "(void)0"))
        run_on(broken.kernel, monkeypatch)
        with pytest.raises(AssertionError):
            assert_as_close(*QUICK[case])


# ---- what becomes of a kernel that does not compile ----

def test_without_nvrtc_an_op_is_plain_and_that_is_said_once(monkeypatch):
    def no_kernel(name, device):
        raise OSError("Could not find any NVRTC library")
    run_on(no_kernel, monkeypatch)
    args = to_dtype(modulate_args(1, 2, 3, 24, False), torch.float32)
    with pytest.warns(UserWarning, match="modulate_forward.*plain.*NVRTC") as warned:
        out = kernels.modulate(*args)
        kernels.modulate(*args)
    assert len(warned) == 1
    kernels.use("cpu", plain=True)
    assert torch.equal(out, kernels.modulate(*args))
    kernels.compiles.cache_clear()


# ---- the compiler ----

def kernel_names(dtype):
    """Returns every kernel that a model of width 1152 with heads of 72 can ask for."""
    names = [f"modulate_forward<{dtype}, 1152>", f"modulate_backward<{dtype}, 1152>"]
    for back in (0, 1):
        for rope in (0, 1, 2):
            names.append(f"qk_norm_rope<{dtype}, 72, {rope}, {back}>")
        for frames in (8, 16, 32):
            names.append(f"time_attention<{dtype}, 72, 1, {back}, {frames}>")
    return names


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_compiles_without_warnings_and_spills_hardly_a_register(arch, tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if arch not in known:
        pytest.skip(f"this nvcc knows {known[0]} to {known[-1]}, not {arch}")
    names = kernel_names("bf16") + kernel_names("float")[:3]
    table = ""
    for number, name in enumerate(names):
        table += f"void* pointer_{number} = (void*){name};\n"
    (tmp_path / "all.cu").write_text(kernels.CUDA_TYPES + kernels.CUDA + table)
    done = subprocess.run(["nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
                           "-o", tmp_path / "all.cubin", tmp_path / "all.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert len(found) == len(names), done.stderr
    spilled = [row for row in found if int(row[2]) > 64]
    assert not spilled
