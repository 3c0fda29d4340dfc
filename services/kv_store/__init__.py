"""Control plane of a region's states: leases, orphans, the prefix cache, accounting."""
