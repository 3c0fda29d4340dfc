"""Control plane of a region's states: leases, orphans, accounting."""
