"""What bench_peers compares edgeq with, a module or folder each.

To add one: a module that satisfies base.Peer, beside it a program.py that is a serving.main, and a name in everyone.py.
"""
