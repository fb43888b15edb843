"""All peers by their names on the command line."""

from __future__ import annotations

from peers import autoround, genai, llamacpp, mlc, openvino
from peers.base import Peer

PEERS: dict[str, Peer] = {
    "llamacpp": llamacpp,
    "openvino": openvino,
    "genai": genai,
    "autoround": autoround,
    "mlc": mlc,
}
