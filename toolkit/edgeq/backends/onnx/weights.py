"""Weights of the graph: solutions packed for MatMulNBits and GatherBlockQuantized, streamed into one data file.

Formats: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized.
The nodes are changed in place, so that every name of the builder's graph stays what genai_config.json says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.backends.onnx.graph import all_positions, floats
from edgeq.model import Model
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import PIECE, as_float
from edgeq.size import TABLES, is_quantized, layout_of

MODEL = "model.onnx"
SCORER = "scorer.onnx"
DATA = "model.onnx.data"
_ACCURACY_LEVELS = {"cpu": 4}  # 4: activations are rounded to 8 bits too, which doubles the speed of a processor
_ALIGNMENT = 64
_INLINE_BYTES = 1024
_CONTRIB = "com.microsoft"
_MATRIX = re.compile(r"model\.layers\.(\d+)\.(attn|linear_attn|mlp)\.(\w+)\.MatMul\.weight")
_DELTA_NET = {"qkv_proj": "in_proj_qkv", "z_proj": "in_proj_z", "a_proj": "in_proj_a", "b_proj": "in_proj_b"}


def sources(initializer: str, model: Model) -> tuple[str, ...]:
    """Checkpoint tensors, top to bottom, that one initializer of the graph is made of; empty for all small ones."""
    if initializer == TABLES[0]:
        return (initializer,)
    if initializer == "lm_head.MatMul.weight":
        return (TABLES[0] if model.tied else TABLES[1],)
    match = _MATRIX.fullmatch(initializer)
    if match is None:
        return ()
    layer, block, name = match.groups()
    names: tuple[str, ...] = (name,)
    if block == "attn":
        block, names = "self_attn", ("q_proj", "k_proj", "v_proj") if name == "qkv_proj" else names
    elif block == "linear_attn":
        names = (_DELTA_NET.get(name, name),)
    found = tuple(f"model.layers.{layer}.{block}.{part}.weight" for part in names)
    return found if all(map(is_quantized, found)) else ()


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [outputs, inputs] of 2, 4 or 8 bits as bytes [outputs, inputs * bits / 8], earlier inputs in lower bits.

    The last byte of a row is filled with zeros.
    """
    each = 8 // bits
    if each == 1:
        return codes
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    packed = codes[:, ::each].copy()
    for place in range(1, each):
        packed |= codes[:, place::each] << np.uint8(place * bits)
    return packed


def write(model: Any, job: Job, out: Path) -> None:
    """Fill the graph's large weights by the job's recipe, and save it into `out`.

    model.onnx gives logits of the last token and scorer.onnx of all; both read the weights in model.onnx.data.
    """
    import onnx_ir as ir

    large = {name: found for name in model.graph.initializers if (found := sources(name, job.checkpoint.model))}
    with (out / DATA).open("wb") as stream:
        data = _DataFile(model.graph, stream, out)
        for done, (name, tensors) in enumerate(large.items()):
            job.progress("quantize", done, len(large))
            users = [usage.node for usage in model.graph.initializers.pop(name).uses()]
            if layout_of(job.checkpoint.model, job.recipe, tensors[0]).is_float:
                _cast(data, job, tensors, users)
            else:
                _quantize(data, job, tensors, users)
        data.move_out()
        job.progress("quantize", len(large), len(large))
    model.graph.sort()
    ir.save(model, out / MODEL)
    ir.save(all_positions(model), out / SCORER)


def _quantize(data: _DataFile, job: Job, tensors: Sequence[str], users: Iterable[Any]) -> None:
    """Turn MatMul into MatMulNBits and Gather into GatherBlockQuantized, both over the same bytes."""
    layout = layout_of(job.checkpoint.model, job.recipe, tensors[0])
    bits, group = layout.bits, layout.run
    solutions = (cast(Solution, job.solution(name)) for name in tensors)
    parts = [solution.in_groups(group) for solution in solutions]
    level = _ACCURACY_LEVELS.get(job.target.onnx.provider, 0)
    name = tensors[0] if len(parts) == 1 else tensors[0].replace("q_proj", "qkv_proj")
    codes = data.append([pack(part.codes, bits) for part in parts])
    scales = data.append([part.scales.astype(floats(job).numpy()) for part in parts])
    zeros = None if layout.symmetric else data.append([pack(part.zero_points, bits) for part in parts])
    rows, groups = scales.shape
    for node in users:
        if node.op_type == "MatMul":
            blocks = (rows, groups, group * bits // 8)
            inputs = [
                data.initializer(f"{name}.codes", codes, shape=blocks),
                data.initializer(f"{name}.scales", scales),
                zeros and data.initializer(f"{name}.zeros", zeros),
            ]
            attributes = {"K": groups * group, "N": rows, "bits": bits, "block_size": group}
            _become(node, "MatMulNBits", [node.inputs[0], *inputs], attributes | {"accuracy_level": level})
        else:
            gather = _gather_behind(node)
            inputs = [
                data.initializer(f"{name}.table", codes),
                gather.inputs[1],
                data.initializer(f"{name}.table_scales", scales),
                zeros and data.initializer(f"{name}.table_zeros", zeros),
            ]
            attributes = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
            _become(gather, "GatherBlockQuantized", inputs, attributes)


def _cast(data: _DataFile, job: Job, tensors: Sequence[str], users: Iterable[Any]) -> None:
    """Store 16 bits a weight, as the checkpoint does; float32 rows are made after the lookup, matrices when loading."""
    import onnx_ir as ir

    stored = data.append(
        as_float(job.checkpoint, job.recipe, tensors[0], rows) for name in tensors for rows in _pieces(job, name)
    )
    weight = data.initializer(tensors[0] if len(tensors) == 1 else tensors[0].replace("q_proj", "qkv_proj"), stored)
    for node in users:
        if node.op_type == "MatMul":
            wide = ir.node("Cast", [weight], {"to": floats(job)})
            turned = ir.node("Transpose", wide.outputs, {"perm": [1, 0]})
            data.graph.insert_before(node, [wide, turned])
            node.replace_input_with(1, turned.outputs[0])
        else:
            gather = _gather_behind(node)
            rows = ir.node("Gather", [weight, gather.inputs[1]])
            data.graph.insert_before(gather, rows)
            _become(gather, "Cast", rows.outputs, {"to": floats(job)}, domain="")


def _pieces(job: Job, name: str) -> Iterator[NDArray[np.float32]]:
    """A matrix of the checkpoint in runs of rows, some `PIECE` weights each."""
    outputs, inputs = job.checkpoint.model.tensors()[name]
    step = max(1, PIECE // inputs)
    for start in range(0, outputs, step):
        yield job.checkpoint.rows(name, start, min(start + step, outputs))


def _gather_behind(node: Any) -> Any:
    """The table's Gather; a tied table reaches it through a Transpose, which is taken out."""
    if node.op_type == "Gather":
        return node
    (usage,) = node.outputs[0].uses()
    usage.node.replace_input_with(0, None)
    node.graph.remove(node, safe=True)
    return usage.node


def _become(node: Any, op: str, inputs: Sequence[Any], attributes: dict[str, int], domain: str = _CONTRIB) -> None:
    """Change a node in place into another operator with the same outputs."""
    import onnx_ir as ir

    kept = [value for value in inputs if value is not None]
    node.op_type, node.domain = op, domain
    node.resize_inputs(len(kept))
    for index, value in enumerate(kept):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, value in attributes.items():
        node.attributes.add(ir.AttrInt64(name, int(value)))


@dataclass
class _DataFile:
    """The external data file of a graph, written front to back."""

    graph: Any
    stream: BinaryIO
    out: Path

    def append(self, arrays: Iterable[NDArray[Any]]) -> Any:
        """Tensor in the file that holds the arrays one below the other."""
        import onnx_ir as ir

        self.stream.write(b"\0" * (-self.stream.tell() % _ALIGNMENT))
        offset, rows = self.stream.tell(), 0
        for array in arrays:
            self.stream.write(np.ascontiguousarray(array).view(np.uint8).data)
            rows += len(array)
        shape = ir.Shape((rows, *array.shape[1:]))
        kind = ir.DataType.from_numpy(array.dtype)
        length = self.stream.tell() - offset
        return ir.ExternalTensor(DATA, offset, length, kind, shape=shape, name="", base_dir=str(self.out))

    def initializer(self, name: str, tensor: Any, shape: Sequence[int] | None = None) -> Any:
        """Initializer over a tensor of the file, in another shape of equal size where one is given."""
        import onnx_ir as ir

        wanted = ir.Shape(shape) if shape else tensor.shape
        assert math.prod(wanted) == math.prod(tensor.shape)
        view = ir.ExternalTensor(
            DATA, tensor.offset, tensor.length, tensor.dtype, shape=wanted, name=name, base_dir=str(self.out)
        )
        value = ir.Value(name=name, type=ir.TensorType(view.dtype), shape=wanted, const_value=view)
        self.graph.register_initializer(value)
        return value

    def move_out(self) -> None:
        """Move the builder's own initializers of some size (norms, rotary caches) into the file."""
        for name, value in list(self.graph.initializers.items()):
            held = value.const_value
            if getattr(held, "location", None) != DATA and held.nbytes > _INLINE_BYTES:
                tensor = self.append([held.numpy()])
                tensor.name = name
                value.const_value = tensor
