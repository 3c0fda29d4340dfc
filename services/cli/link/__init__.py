"""A link between two regions in user space: TCP connections that share a bandwidth and a delay."""
