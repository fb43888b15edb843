"""The CUDA graph on the CPU provider, and the refusal of a package without kernels for the GPU; no GPU is used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from checkpoints import Build, quiet
from edgeq import backends, bundle, target
from edgeq.accelerators import Accelerator
from edgeq.backends import onnx
from edgeq.backends.base import Job
from edgeq.backends.onnx import cuda
from edgeq.backends.onnx.cuda import CUBIN, PTX
from edgeq.backends.onnx.session import OnnxSession
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, MissingTool
from edgeq.recipe import parse
from edgeq.target import Onnx

RECIPE = "w4g32-e8-rtn"
IDS = [(7 * n + 3) % 256 for n in range(60)]
PUBLISHED_AARCH64 = [(CUBIN, 89), (CUBIN, 90), (CUBIN, 120), (CUBIN, 121)]  # onnxruntime-gpu 1.31.1


def container(*kernels: tuple[int, int]) -> bytes:
    """A container of kernel images, each of 24 bytes that mean nothing."""
    entries = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 24, 0, 0, 0, 0, arch).ljust(64, b"\0") + b"\x50\xed\x55\xba" * 6
        for kind, arch in kernels
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A file with the kernels of the published package, and the magic number where it means nothing."""
    path = tmp_path / "provider.so"
    parts = (container(*PUBLISHED_AARCH64[:2]), container(*PUBLISHED_AARCH64[2:]))
    path.write_bytes(b"\x7fELF" + b"\x50\xed\x55\xba" * 9 + parts[0] + b"\0" * 13 + parts[1] + b"\x50\xed\x55\xba")
    return path


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the GPU of a Jetson Orin."""
    gpu = Accelerator(name="Orin", api="cuda", arch="sm_87")
    monkeypatch.setattr(cuda, "this_machine", lambda: SimpleNamespace(accelerators=(gpu,)))


@pytest.fixture
def published(orin: None, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the published package installed."""
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(cuda, "_LIBRARY", str(library))


def test_every_kernel_of_a_library_is_read(library: Path) -> None:
    assert list(cuda.read(library)) == PUBLISHED_AARCH64


@pytest.mark.parametrize("kept", [1, 20, 50, 100, 150, 200])
def test_a_library_that_is_cut_off_is_read_as_far_as_it_goes(library: Path, kept: int) -> None:
    library.write_bytes(library.read_bytes()[:kept])
    assert set(cuda.read(library)) <= set(PUBLISHED_AARCH64)


@pytest.mark.parametrize(
    ("kernel", "device", "runs"),
    [
        ((CUBIN, 87), "sm_87", True),
        ((CUBIN, 80), "sm_86", True),
        ((CUBIN, 86), "sm_80", False),
        ((CUBIN, 89), "sm_90", False),
        ((CUBIN, 120), "sm_121", True),
        ((CUBIN, 80), "sm_87", False),
        ((CUBIN, 87), "sm_89", False),
        ((PTX, 80), "sm_87", True),
        ((PTX, 90), "sm_87", False),
    ],
)
def test_which_kernels_a_gpu_can_run(tmp_path: Path, kernel: tuple[int, int], device: str, runs: bool) -> None:
    path = tmp_path / "provider.so"
    path.write_bytes(container(kernel))
    if runs:
        cuda.check(device, path)
    else:
        with pytest.raises(BackendFault, match=device):
            cuda.check(device, path)


def test_an_orin_is_refused_with_what_is_there_and_what_to_do(library: Path) -> None:
    with pytest.raises(BackendFault) as raised:
        cuda.check("sm_87", library)
    assert "no kernels for this GPU (sm_87)" in raised.value.what
    assert "sm_89, sm_90, sm_120, sm_121" in raised.value.why
    assert "--backend llamacpp" in raised.value.run


def test_nothing_is_refused_where_nothing_is_known(library: Path, tmp_path: Path) -> None:
    cuda.check(None, library)
    cuda.check("sm_87", tmp_path / "absent.so")
    for content in (b"", b"no kernels at all"):
        library.write_bytes(content)
        cuda.check("sm_87", library)


@pytest.mark.usefixtures("published")
def test_a_build_on_an_orin_with_the_published_package_is_refused_at_once(tiny: Build, tmp_path: Path) -> None:
    device = msgspec.structs.replace(target.load("jetson"), onnx=Onnx(provider="cuda"))
    job = Job(Checkpoint.open(tiny("3")), parse(RECIPE), device, 256, quiet)
    with pytest.raises(BackendFault, match="sm_87"):
        onnx.build(job, tmp_path)
    assert not list(tmp_path.glob("*.onnx*"))


def test_a_bundle_is_refused_on_an_orin_with_the_published_package(
    built_for: Build, request: pytest.FixtureRequest
) -> None:
    folder = built_for("cuda", "3", RECIPE)
    request.getfixturevalue("published")
    with pytest.raises(BackendFault, match="sm_87"):
        backends.get("onnx").load(folder, bundle.read(folder))


@pytest.mark.usefixtures("orin")
def test_an_onnxruntime_without_cuda_is_a_missing_tool() -> None:
    with pytest.raises(MissingTool, match="no CUDA provider"):
        cuda.find()


def test_a_build_host_without_a_gpu_runs_the_graph_on_its_cpu(
    built_for: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "this_machine", lambda: SimpleNamespace(accelerators=()))
    folder = built_for("cuda", "3", RECIPE)
    found = OnnxSession(folder, bundle.read(folder))
    assert [place.provider for place in found.placement] == ["cpu"]
    assert found.fallback.startswith("this machine has no CUDA GPU")


@pytest.mark.parametrize("recipe", [RECIPE, "w16"])
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_the_float16_graph_computes_with_the_quantized_weights(
    built_for: Build,
    quantized: Callable[[str, str, list[int]], np.ndarray],
    generation: str,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "this_machine", lambda: SimpleNamespace(accelerators=()))
    folder = built_for("cuda", generation, recipe)
    found = OnnxSession(folder, bundle.read(folder))
    states = {entry.type for name, entry in found._inputs.items() if name.startswith("past")}
    assert states == {"tensor(float16)"}
    np.testing.assert_allclose(found.logits(IDS), quantized(generation, recipe, IDS), atol=3e-2)
