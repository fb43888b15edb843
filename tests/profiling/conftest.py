"""A bundle of the null backend, made by hand, and what a profile needs beside it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeq import accuracy, bundle
from edgeq.backends import null
from edgeq.machine import Machine
from edgeq.target import Cpu, Match, Memory, Target

VOCAB = 300


def make_bundle(folder: Path, context: int = 256) -> bundle.Bundle:
    """Write a complete null bundle whose reference is what the null session itself says."""
    (folder / "null.json").write_bytes(msgspec.json.encode({"vocab": VOCAB}))
    windows = np.random.default_rng(0).integers(0, VOCAB, (4, 24), dtype=np.int32)
    session = null.NullSession(VOCAB)
    kept = [accuracy.likeliest(session.logits([int(one) for one in ids])[:-1], VOCAB) for ids in windows]
    following = windows[:, 1:, None].astype(np.int64)
    every = np.stack([log_probs for _, _, log_probs in kept])
    reference = accuracy.Reference(
        windows=windows,
        ids=np.stack([ids for ids, _, _ in kept]),
        log_probs=np.stack([top for _, top, _ in kept]),
        next_log_probs=np.take_along_axis(every, following, axis=2)[:, :, 0],
        continuation=np.arange(4, dtype=np.int32),
        text_sha256="0" * 64,
        vocab=VOCAB,
    )
    accuracy.save(reference, folder / bundle.REFERENCE)
    gate = bundle.Gate(
        passed=True, kl_mean=0.0, kl_weights_only=0.0, top1_agreement=1.0, perplexity_reference=2.0, perplexity=2.0,
        reason=None, max_loss=0.05, tokens=92, text_sha256="0" * 64, ran_on="null",
    )  # fmt: skip
    manifest = bundle.seal(
        bundle.Bundle(
            schema=bundle.SCHEMA,
            digest="",
            model="demo-qwen3",
            generation="3",
            config={"vocab_size": VOCAB},
            source=bundle.Source("demo", "demo-qwen3", None, ()),
            recipe="w4g32-e8-rtn",
            bits_per_weight=4.5,
            target="host",
            backend="null",
            provider="null",
            context=context,
            tools=("null 1",),
            notes=(),
            files=bundle.files_in(folder),
            gate=gate,
        )
    )
    (folder / bundle.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return manifest


@pytest.fixture
def null_bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    make_bundle(folder)
    return folder


@pytest.fixture
def machine() -> Machine:
    return Machine(
        cpu_model="a processor", arch="x86_64", isa=("avx2",), cores=2, threads=2, memory_bytes=2 << 30,
        ram_bytes=2 << 30, swap_bytes=0, os="Linux", kernel="6", device_tree=None, governor=None, accelerators=(),
        python="3.11",
    )  # fmt: skip


@pytest.fixture
def target() -> Target:
    return Target(
        name="a-board", title="A board", api="cpu", host="x86_64-linux-gnu",
        cpu=Cpu(arch="x86_64", model="a processor", isa=("avx2",)), memory=Memory(), match=Match(),
        backends=("null",), recipes=("w4g32-e8-rtn",), sources=("none",),
    )  # fmt: skip
