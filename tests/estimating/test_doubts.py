from __future__ import annotations

import pytest

from edgeq.estimating import asked


@pytest.mark.parametrize(
    ("device", "backend", "doubt"),
    [
        ("snapdragon-8-gen-3-phone", "llamacpp", "the figures are of opencl, edgeq's llamacpp runs on vulkan there"),
        ("orange-pi-5", "llamacpp", "no published figure is of orange-pi-5 or of a device like it"),
        ("rtx-4060-laptop", "llamacpp", "a lower bound"),
        ("thor", "llamacpp", "the peak arithmetic is computed: half of the dense INT8 rate"),
    ],
)
def test_the_basis_says_what_makes_an_estimate_doubtful(device: str, backend: str, doubt: str) -> None:
    assert doubt in asked.ask("qwen3-4b", target=device, backend=backend).basis


@pytest.mark.parametrize(
    ("device", "backend"), [("raspberry-pi-5-8gb", "llamacpp"), ("jetson", "mlc"), ("opi5", "ollama")]
)
def test_figures_of_the_device_and_its_api_are_not_doubted(device: str, backend: str) -> None:
    basis = asked.ask("qwen3-4b", target=device, backend=backend).basis
    assert "the figures are of" not in basis
    assert "no published figure is" not in basis
