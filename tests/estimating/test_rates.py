from __future__ import annotations

import pytest

from edgeq import target
from edgeq.errors import UsageFault
from edgeq.estimating import published, rates


@pytest.mark.parametrize("name", target.names())
def test_every_target_has_a_rate_for_each_of_its_backends(name: str) -> None:
    device = target.load(name)
    for backend in device.backends:
        found = rates.find(device, backend)
        assert 0.05 < found.eta < 0.99
        assert 1e-6 < found.layer_s < 1e-2
        assert found.eta_sd > 0
        assert found.source.startswith("scripts/refit: ")


def test_every_published_runtime_is_known() -> None:
    assert {row.runtime for row in published.read().rows} <= set(rates.runtimes())
    assert {"onnx", "llamacpp", "mlc", "mlx", "vllm", "ollama"} <= set(rates.runtimes())


def test_spellings_of_runtimes() -> None:
    assert rates.canonical("llama.cpp") == rates.canonical("LlamaCPP") == "llamacpp"
    with pytest.raises(UsageFault, match="neither a backend nor a runtime") as caught:
        rates.canonical("olama")
    assert "ollama" in str(caught.value)


def test_figures_of_the_device_itself_say_most() -> None:
    device = target.load("apple-m4-max")
    assert rates.find(device, "mlx").eta_sd < rates.find(device, "vllm").eta_sd
    assert "7 of it" in rates.find(device, "mlx").source


def test_engines_use_their_own_api() -> None:
    assert rates.api_of(target.load("jetson"), "onnx") == "cpu"
    assert rates.api_of(target.load("jetson"), "mlc") == "cuda"
    assert rates.api_of(target.load("steam-deck-oled"), "mlc") == "opencl"
    assert rates.api_of(target.load("raspberry-pi-5-8gb"), "mlc") == "cpu"
