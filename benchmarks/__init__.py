"""Benchmarks: ours and the peer in one process, in turn, same work, medians; each prints ratio, versions, machine."""
