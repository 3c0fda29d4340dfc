"""What each Triton kernel takes of a GPU at the published shapes, compiled without having one.

Run: `python -m benchmarks.compiled_kernels`.
"""

from shared.kernels.triton.compilation import CHIPS, footprint, published_shapes


def main() -> None:
    """Compile every kernel for every chip and print a table."""
    print("| kernel | chip | warps | stages | shared memory | of | registers | spilled bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in published_shapes():
        for chip in CHIPS:
            taken = footprint(shape, chip)
            print(
                f"| {shape.name} | {chip.name} | {shape.warps} | {shape.stages} "
                f"| {taken.shared_memory:,} | {chip.shared_memory:,} "
                f"| {taken.registers} | {taken.spilled} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
