"""The form of the ops that a test runs with: PyTorch's with recomputation; with the fixture `ops` each on a CPU, with
`all_ops` also that of a GPU, which is then the device where tensors are made."""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # as the scripts: see kernels.py; before torch is imported

import pytest  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402


@pytest.fixture(autouse=True)
def as_imported(monkeypatch):
    """What a test chooses, by training say, does not last."""
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})


@pytest.fixture(params=["plain", "recomputed", "C++"])
def ops(request, as_imported):
    choose(request.param)
    return request.param


def choose(form):
    if form != "recomputed":
        said = kernels.use("cpu", plain=form == "plain")
        if form == "C++" and "C++ on" not in said:
            pytest.skip(said)


@pytest.fixture(params=["plain", "recomputed", "C++", pytest.param("CUDA", marks=pytest.mark.gpu)])
def all_ops(request, as_imported):
    if request.param != "CUDA":
        choose(request.param)
        yield request.param
        return
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    kernels.use("cuda")
    assert set(kernels.cuda_ops()) <= set(kernels.CHOICE["cuda"]), "an op fell back"
    with torch.device("cuda"):
        yield request.param
