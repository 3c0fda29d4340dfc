"""KDA and MLA kernels: one meaning, in `reference`, and one fast form a device."""
