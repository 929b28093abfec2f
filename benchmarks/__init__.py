"""Benchmarks: ours and the peer in one process, in turn, the same work, medians; each prints ratio, versions, machine."""
