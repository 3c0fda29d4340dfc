"""What a segment can hold."""

from typing import Final, Literal, TypeAlias

from shared.errors import SegmentVersionError

SegmentKind: TypeAlias = Literal["mla", "kda"]
"""`mla`: latents of all MLA layers for some tokens; `kda`: states of KDA layers at one length."""

KIND_IDS: Final[dict[SegmentKind, int]] = {"mla": 1, "kda": 2}
"""How a segment's header calls them."""


def kind_with_id(kind_id: int) -> SegmentKind:
    """Return the kind that a segment's header calls `kind_id`.

    Raises:
        SegmentVersionError: this reader knows none.
    """
    for kind, known_id in KIND_IDS.items():
        if kind_id == known_id:
            return kind
    raise SegmentVersionError(f"segment has kind {kind_id}, which this reader does not know")
