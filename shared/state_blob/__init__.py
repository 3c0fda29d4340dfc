"""State segments: tensors to bytes and back, refused when anything is not as expected."""
