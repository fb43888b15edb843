"""What bench_peers compares edgeq with: one folder for each peer, and what they share beside it."""
