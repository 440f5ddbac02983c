"""The form of the ops that a test runs with: PyTorch's own with recomputation; with the fixture `ops` each."""
import pytest

import kernels


@pytest.fixture(autouse=True)
def as_imported(monkeypatch):
    """What a test chooses, by training say, does not last."""
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})


@pytest.fixture(params=["plain", "recomputed", "C++"])
def ops(request, as_imported):
    if request.param != "recomputed":
        said = kernels.use("cpu", plain=request.param == "plain")
        if request.param == "C++" and "C++ on" not in said:
            pytest.skip(said)
    return request.param
