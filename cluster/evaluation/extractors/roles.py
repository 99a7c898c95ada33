"""What extractors do beside the first, which measures FID: each has a role, with its own options, conditions of rows, and metrics.

Nothing here needs torch, as the command line reads it.
"""

from dataclasses import dataclass

DINOV2 = "dinov2-vitl14"  # what rows call it


@dataclass(frozen=True)
class Role:
    """Its options are evaluate.<role> (where the weights stand), evaluate.<role>_hash (the sha256 that they have to have) and
    evaluate.<role>_reference (the real images); `freeguide score` has them as --<role>, --<role>-hash and --<role>-reference.

    Rows carry the hashes of weights and reference as <role> and <role>_reference. Rows that differ in them do not compare.
    """

    extractor: str  # the name of the extractor that it takes
    title: str  # what people call that
    gives: str  # the metric for which it is asked


ROLES: dict[str, Role] = {"dinov2": Role(DINOV2, "DINOv2", "FD-DINOv2")}


def options_of(role: str) -> tuple[str, str, str]:
    """Its options: weights, their hash, and the reference."""
    return role, f"{role}_hash", f"{role}_reference"


def role_conditions() -> list[str]:
    """The conditions of rows that roles have."""
    return [name for role in ROLES for name in (role, f"{role}_reference")]
