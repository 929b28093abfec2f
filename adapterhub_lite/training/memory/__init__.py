"""Where a step keeps what it needs later: buffers used again, scratch space, and the host beside a GPU."""
