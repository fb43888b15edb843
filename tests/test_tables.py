from __future__ import annotations

import msgspec

from edgeq import tables
from edgeq.profiles import Speculation
from edgeq.profiling import statistics


def test_speculation_is_a_row_of_its_own_with_plain_decoding_beside_it() -> None:
    row = Speculation(
        method="prompt lookup", text="repeating", prompt=128, tokens=64, tokens_per_s=statistics.spread([90.0]),
        plain_tokens_per_s=statistics.spread([30.0]), tokens_per_step=3.2, same=1.0, valid=True, reason=None,
    )  # fmt: skip
    assert tables._speculation(row) == "90.0 [90.0, 90.0] tokens/s, plain 30.0 [30.0, 30.0]; 3.20 tokens a step"
    differing = msgspec.structs.replace(row, same=0.75, valid=False, reason="1 of 4 continuations were undisturbed")
    assert tables._speculation(differing).endswith(
        "a step; 25% of the continuations differ; 1 of 4 continuations were undisturbed"
    )
