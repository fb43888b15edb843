"""Published speeds of models on devices, each with its source: what rates are fitted to."""

from __future__ import annotations

import functools

import msgspec

from edgeq import data, target
from edgeq.errors import CorruptInput


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure; `published.toml` says what its fields mean."""

    host: str
    api: str
    runtime: str
    model: str
    quantization: str
    layers: int
    decode_tokens_per_s: float
    depth: int
    generated: int = 0
    weights_bytes: int
    weights: int
    weights_basis: str
    state_bytes: int
    kv_bytes: int
    prefill_tokens_per_s: float | None = None
    prefill_flop_per_s: float | None = None
    trust: str
    source: str
    note: str | None = None
    outside: bool = False
    computed_on: str | None = None

    def __post_init__(self) -> None:
        if self.trust not in ("A", "B", "C") or not self.source.strip():
            raise ValueError(f"{self.host}, {self.model}: trust is not A, B or C, or the source is empty")

    @property
    def mean_kv_bytes(self) -> float:
        """Bytes of keys and values at the middle of what was written."""
        return self.kv_bytes * (1 + self.generated / 2 / self.depth) if self.depth else 0.0


class Traits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runtimes and hosts of many families have in common."""

    makers: tuple[str, ...]
    without_dot_product: tuple[str, ...]


class Relative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speed of a runtime without figures on an API, as a share of another's on the same processor."""

    api: str
    runtime: str
    like: str
    decode: float
    prefill: float
    source: str


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rows and relations, the bandwidth of hosts that are no targets, traits, and families of devices.

    The latter are by processor, "cpu" or "gpu".
    """

    bandwidth_bytes_per_s: dict[str, int]
    traits: Traits
    families: dict[str, dict[str, tuple[str, ...]]]
    relative: tuple[Relative, ...]
    rows: tuple[Row, ...]

    def bandwidth(self, host: str) -> float:
        """Theoretical bytes per second of a host's memory; raises CorruptInput when neither file has it."""
        if host in self.bandwidth_bytes_per_s:
            return self.bandwidth_bytes_per_s[host]
        found = target.load(host).memory.bandwidth_bytes_per_s
        if found is None:
            raise CorruptInput(f"published.toml: the bandwidth of {host} is not known")
        return found.value

    def family(self, host: str, processor: str) -> str | None:
        """Family of a host's processor, None for one of its own."""
        return next((name for name, hosts in self.families.get(processor, {}).items() if host in hosts), None)

    def relation(self, api: str, runtime: str) -> Relative | None:
        """What is known of a runtime on an API beside another runtime."""
        return next((each for each in self.relative if (each.api, each.runtime) == (api, runtime)), None)


@functools.cache
def read() -> Published:
    """The shipped figures."""
    return data.read_toml(data.folder("estimating") / "published.toml", Published)


def processor(api: str) -> str:
    """What an API runs on: "cpu", "npu" or "gpu"."""
    return {"cpu": "cpu", "ane": "npu", "hexagon": "npu", "rknpu": "npu"}.get(api, "gpu")


def is_k_quant(quantization: str) -> bool:
    """Whether most of a published file is in GGML's K layouts, whose scales of scales take longer to unpack."""
    return "_K" in quantization.upper() and not quantization.upper().removeprefix("UD-").startswith("Q8")
