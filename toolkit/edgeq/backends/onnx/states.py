"""States that each step overwrites, which keys and values do not: overwritten in place, or kept until the next step."""

from __future__ import annotations

from typing import Any


class Recurrent:
    """The recurrent states of a text, as OrtValues by the name of their input; none where all layers are attention."""

    def __init__(self, binding: Any, memory: str) -> None:
        self._binding, self._memory = binding, memory
        self._now: dict[str, Any] = {}
        self._before: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._now)

    def add(self, name: str, value: Any) -> None:
        """Another state, bound by the caller to be overwritten in place."""
        self._now[name] = value

    def overwrite(self) -> None:
        """Let the next steps overwrite the states."""
        self._bind(self._now)

    def keep(self) -> None:
        """Let the next step leave the states as they are and write new ones, which count from then on."""
        import onnxruntime as ort

        if not self._before:
            for name, value in self._now.items():
                self._before[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    value.shape(), value.numpy().dtype, self._memory
                )
        self._bind(self._before)
        self.back()

    def back(self) -> None:
        """Return to the states that the last step left."""
        self._now, self._before = self._before, self._now

    def _bind(self, outputs: dict[str, Any]) -> None:
        for name, value in self._now.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past", "present"), outputs[name])
