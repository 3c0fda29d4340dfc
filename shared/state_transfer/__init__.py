"""States on their way between an engine and a region's store: where tensors and Redis meet."""
