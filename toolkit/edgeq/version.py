"""edgeq's version, which bundles and profiles record."""

VERSION = "0.1.0"
