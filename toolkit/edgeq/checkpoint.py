"""A checkpoint folder, read safely: nothing in it is imported, run or trusted before it is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import bundle
from edgeq.errors import CorruptInput, UnsafeInput, UsageFault
from edgeq.model import IGNORED_TENSORS, Model, read_config
from edgeq.size import TABLES
from edgeq.tensorfile import JSON_CAP, Entry, pieces, read_capped, read_float32, read_header, reading, strict_object

INDEX = "model.safetensors.index.json"
ZERO_RUN = 4096
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TEXT_CAP = 32 << 20
_SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}
_ERASED = "Trained weights are not zero: the file was damaged, or never fully written."
_AGAIN = "copy or download the checkpoint again"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder whose files agree with each other; `entries` finds a tensor by its text-only name.

    `head` does so for the multi-token-prediction head; it is empty when the weights hold no head, or a part of one.
    """

    folder: Path
    model: Model
    weights: tuple[Path, ...]
    entries: Mapping[str, Entry] = field(repr=False)
    head: Mapping[str, Entry] = field(repr=False, default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Checkpoint in a folder; reads the configuration and the headers of the weights only.

        Raises UsageFault when there is no such folder, UnsafeInput when it would need code or pickle files or points
        outside itself, UnsupportedModel for another architecture, and CorruptInput when a file is missing or damaged
        or the tensors are not exactly those that `config.json` describes.
        """
        with reading(folder):
            if not folder.is_dir():
                raise UsageFault(f"{folder} is not a folder", run="edgeq models list")
            _refuse_code(folder)
            model = read_config(_json_file(folder / "config.json"))
            if not (folder / "tokenizer.json").is_file():
                raise CorruptInput(
                    f"{folder / 'tokenizer.json'}: missing", why="A model needs its tokenizer.", run=_AGAIN
                )
            weights, stored = _read_headers(folder)
        return cls(folder, model, weights, _match(folder, model, stored), _head(model, stored))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Float32 copy of a tensor, in its shape."""
        entry = self._entry(name)
        return read_float32(entry, 0, entry.values).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Float32 copy of rows `start` to `stop` of a matrix; reads no others."""
        entry = self._entry(name)
        count, columns = entry.shape
        assert 0 <= start <= stop <= count
        return read_float32(entry, start * columns, stop * columns).reshape(stop - start, columns)

    def dtype(self, name: str) -> str:
        """How a tensor is stored: "BF16", "F16" or "F32"."""
        return self._entry(name).dtype

    def _entry(self, name: str) -> Entry:
        return self.head[name] if name in self.head else self.entries[name]

    def scan(self, progress: Callable[[int, int], None]) -> None:
        """Read every weight of the text model once, in pieces; `progress` gets bytes done and bytes in all.

        Raises CorruptInput at the first NaN or infinity, and where weights look erased:
        a tensor of zeros alone (except biases, and the vectors of Qwen3.5, whose norms are stored around zero), or,
        outside the embedding and output tables, 4096 zeros in a row that begin at a multiple of 4096. The tables are
        left out because unused and padded vocabulary rows are zero in sound checkpoints. A zeroed span of 16 KiB
        always holds such a run when the weights are 16 bits wide.
        """
        total = sum(entry.stop - entry.offset for entry in self.entries.values())
        done = 0
        for name, entry in self.entries.items():
            blank = True
            for at, bits in pieces(entry, 0, entry.values):
                peaks = _peaks(bits)
                if peaks.max() >= _INFINITY[entry.dtype]:
                    _refuse_infinite(entry, at, bits)
                if len(entry.shape) > 1 and name not in TABLES:
                    _refuse_zero_run(entry, at, peaks, len(bits))
                blank = blank and not peaks.any()
                done += bits.nbytes
                progress(done, total)
            if blank and not self._may_be_zero(name):
                raise CorruptInput(f"{entry.file}: {entry.name} is zero throughout", why=_ERASED, run=_AGAIN)

    def _may_be_zero(self, name: str) -> bool:
        vector = len(self.entries[name].shape) == 1
        return vector and (name.endswith("bias") or self.model.generation == "3.5")

    def files(self) -> tuple[bundle.File, ...]:
        """Configuration, tokenizer, template and weight files with size and SHA-256, sorted by path."""
        beside = (self.folder / name for name in (*_SIDE_FILES, INDEX))
        return tuple(_file(path) for path in sorted({*self.weights, *filter(_present, beside)}))

    def text_file(self, name: str) -> str | None:
        """Content of a file beside the weights, at most 32 MiB, or None; raises CorruptInput when it is not UTF-8."""
        path = self.folder / name
        if not _present(path):
            return None
        try:
            return read_capped(path, _TEXT_CAP).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptInput(f"{path}: not UTF-8 text", why=str(error), run=_AGAIN) from error

    def chat_template(self) -> str | None:
        """Jinja text of `chat_template.jinja`, else the default template in `tokenizer_config.json`, else None."""
        own = self.text_file("chat_template.jinja")
        if own is not None:
            return own
        found = _side_file(self.folder / "tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            named = [item for item in found if isinstance(item, dict) and item.get("name") == "default"]
            found = named[0].get("template") if named else None
        if found is not None and not isinstance(found, str):
            raise CorruptInput(f"{self.folder / 'tokenizer_config.json'}: chat_template is not text", run=_AGAIN)
        return found


def _refuse_code(folder: Path) -> None:
    if scripts := sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        raise UnsafeInput(
            f"{scripts[0]}: the checkpoint comes with code",
            why="edgeq never runs code from a checkpoint, so it would build something else than its author meant.",
            run="remove the file if the model is a plain Qwen, or take the checkpoint from its original publisher",
        )
    for name in ("tokenizer_config.json", "generation_config.json"):
        for key in _side_file(folder / name):
            if key == "auto_map" or key.startswith("_attn_implementation"):
                raise UnsafeInput(
                    f"{folder / name}: key {key!r} would run code that came with the checkpoint",
                    why="edgeq never runs code from a checkpoint.",
                    run="remove the key, or take the checkpoint from its original publisher",
                )


def _json_file(path: Path) -> dict[str, Any]:
    return strict_object(read_capped(path, JSON_CAP), str(path))


def _side_file(path: Path) -> dict[str, Any]:
    return _json_file(path) if _present(path) else {}


def _present(path: Path) -> bool:
    """Whether the folder has such an entry, a link that leads nowhere included: that one is damage, not absence."""
    return path.is_symlink() or path.exists()


def _file(path: Path) -> bundle.File:
    with reading(path):
        return bundle.File(path.name, path.stat().st_size, bundle.sha256(path))


def _read_headers(folder: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    index = folder / INDEX
    if not _present(index):
        only = _single_file(folder)
        return (only,), read_header(only)
    weight_map = _json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptInput(f"{index}: holds no weight_map", run=_AGAIN)
    shards = tuple(sorted(folder / _safe_name(index, name) for name in {str(file) for file in weight_map.values()}))
    if strays := sorted(set(folder.glob("*.safetensors")) - set(shards)):
        raise CorruptInput(f"{strays[0]}: not named in {INDEX}", why="It is unclear which weights count.", run=_AGAIN)
    if lost := [shard for shard in shards if not shard.is_file()]:
        raise CorruptInput(f"{lost[0]}: missing", why=f"{INDEX} names it.", run=_AGAIN)
    stored: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in stored:
                raise CorruptInput(f"{shard}: tensor {name!r} is in {stored[name].file.name} too", run=_AGAIN)
            if weight_map.get(name) != shard.name:
                raise CorruptInput(f"{shard}: holds tensor {name!r}, but {INDEX} does not say so", run=_AGAIN)
            stored[name] = entry
    if absent := sorted(set(weight_map) - set(stored)):
        raise CorruptInput(f"{folder / weight_map[absent[0]]}: tensor {absent[0]!r} is missing", run=_AGAIN)
    return shards, stored


def _single_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if not found and pickles:
        raise UnsafeInput(
            f"{pickles[0]}: pickle weights are refused",
            why="Reading a pickle file can run code.",
            run="take the safetensors version of the checkpoint",
        )
    if not found:
        raise CorruptInput(f"{folder / 'model.safetensors'}: missing", run=_AGAIN)
    parts = re.search(r"-of-(\d+)", found[0].name)
    if len(found) > 1 or (parts and int(parts[1]) > 1):
        raise CorruptInput(
            f"{folder / INDEX}: missing", why=f"{found[0].name} is one of several weight files.", run=_AGAIN
        )
    return folder / _safe_name(folder, found[0].name)


def _safe_name(where: Path, name: str) -> str:
    if {"/", "\\", ":"} & set(name) or name in ("", ".", ".."):
        raise UnsafeInput(
            f"{where}: weight file {name[:100]!r} is outside the folder",
            why="A checkpoint may only name files that lie beside its index.",
        )
    if name.lower().endswith(PICKLES):
        raise UnsafeInput(f"{where}: weight file {name[:100]!r} is a pickle", why="Reading a pickle file can run code.")
    if not name.endswith(".safetensors") or not name.isprintable() or len(name.encode()) > 255:
        raise CorruptInput(f"{where}: {name[:100]!r} is not the name of a safetensors file", run=_AGAIN)
    return name


def _match(folder: Path, model: Model, stored: Mapping[str, Entry]) -> dict[str, Entry]:
    expected = model.tensors()
    spelled = {name: model.prefix + name.removeprefix("model.") for name in expected if name != "lm_head.weight"}
    spelled |= {"lm_head.weight": "lm_head.weight"} if "lm_head.weight" in expected else {}
    why = f"config.json describes {model.layers} layers of {model.model_type}; the weights hold something else."
    if lost := [given for given in spelled.values() if given not in stored]:
        raise CorruptInput(f"{folder}: tensor {lost[0]} is missing", why=f"{why} Missing: {len(lost)}.", run=_AGAIN)
    for given in sorted(set(stored) - set(spelled.values())):
        if not _may_be_ignored(model, stored[given]):
            raise CorruptInput(f"{stored[given].file}: tensor {given!r} is not part of the model", why=why, run=_AGAIN)
    entries = {name: stored[given] for name, given in spelled.items()}
    for name, entry in entries.items():
        if entry.shape != expected[name]:
            raise CorruptInput(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}",
                why=f"config.json asks for {list(expected[name])}.",
                run=_AGAIN,
            )
        if entry.dtype not in _INFINITY:
            raise CorruptInput(
                f"{entry.file}: tensor {entry.name} is {entry.dtype}",
                why=f"edgeq reads {', '.join(_INFINITY)}.",
                run="take the bf16 checkpoint of the same model",
            )
    return entries


def _head(model: Model, stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of the multi-token-prediction head; none unless all are there as the model's shape wants them."""
    found = {name: stored[name] for name, shape in model.head_tensors().items() if name in stored}
    fits = all(found[name].shape == model.head_tensors()[name] and found[name].dtype in _INFINITY for name in found)
    return found if fits and len(found) == len(model.head_tensors()) else {}


def _may_be_ignored(model: Model, entry: Entry) -> bool:
    repeated = model.tied and entry.name == "lm_head.weight" and entry.shape == (model.vocab, model.hidden)
    beside = model.generation == "3.5" and entry.name.startswith(IGNORED_TENSORS)
    return repeated or beside or entry.name.endswith("rotary_emb.inv_freq")


def _magnitudes(bits: NDArray[Any]) -> NDArray[Any]:
    """Bit patterns without their sign: ordered as the numbers are, zero only for zeros, NaN above infinity."""
    unsigned: NDArray[Any] = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return unsigned


def _peaks(bits: NDArray[Any]) -> NDArray[Any]:
    """Largest magnitude of each 4096 values."""
    return np.maximum.reduceat(_magnitudes(bits), np.arange(0, len(bits), ZERO_RUN))


def _refuse_infinite(entry: Entry, at: int, bits: NDArray[Any]) -> None:
    magnitudes = _magnitudes(bits)
    first = int(np.argmax(magnitudes >= _INFINITY[entry.dtype]))
    kind = "infinite" if magnitudes[first] == _INFINITY[entry.dtype] else "NaN"
    raise CorruptInput(
        f"{entry.file}: {entry.name}{_index(entry, at + first)} is {kind}",
        why="Quantizing would hide it: the built model would answer, but wrongly.",
        run=_AGAIN,
    )


def _refuse_zero_run(entry: Entry, at: int, peaks: NDArray[Any], count: int) -> None:
    whole = peaks[: count // ZERO_RUN]
    if len(whole) and not whole.all():
        index = _index(entry, at + int(np.argmin(whole)) * ZERO_RUN)
        raise CorruptInput(f"{entry.file}: {entry.name}{index} begins {ZERO_RUN} zeros", why=_ERASED, run=_AGAIN)


def _index(entry: Entry, position: int) -> list[int]:
    return [int(n) for n in np.unravel_index(position, entry.shape)]
