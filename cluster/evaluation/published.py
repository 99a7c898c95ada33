"""Numbers that papers printed for class-conditional ImageNet, each with its source.

They are other people's measurements: Inception's FID and IS of 50 000 samples, against reference statistics that the papers do not
all name. So they may stand beside a row only where the row is a plain FID of as many images on the same data set, against as many
real ones or more; the paper's own only where it was sampled as the paper samples. The reader is told why where it was not.
"""

from dataclasses import dataclass

from freeguide.cluster.evaluation.rows import Row

IMAGES = 50_000  # samples behind every number here
CFG = "Ho & Salimans 2022 (arXiv 2207.12598)"
SAMPLER, V = "ancestral", {"imagenet64": 0.3, "imagenet128": 0.2}  # what the paper samples with: Algorithm 2 and its v


@dataclass(frozen=True)
class Published:
    model: str
    dataset: str  # "imagenet64" or "imagenet128": name a reference so, and its rows stand beside these
    fid: float
    inception_score: float | None  # None where it was not printed
    source: str
    w: float | None = None  # guidance weight of the paper; None for models without one
    p_uncond: float | None = None  # None where the paper does not state it
    steps: int | None = None  # T, None where the paper does not state it


def rows_of(dataset: str) -> list[Published]:
    """All published numbers on a data set, other models first, then the paper's by column and w."""
    return [number for number in PUBLISHED if number.dataset == dataset]


def why_not_beside(row: Row) -> str | None:
    """Why published numbers may not be read beside `row`, as part of a sentence; None where they may."""
    if row.dataset not in {number.dataset for number in PUBLISHED}:
        return f"the data set is {row.dataset!r}" if row.dataset else "the reference names no data set"
    if row.fid_name != "FID":
        return f"they are plain FIDs and ours is {row.fid_name}"
    if row.n != IMAGES:
        return f"they are of {IMAGES} images and ours of {row.n}"
    if 0 < row.reference_n < IMAGES:
        return f"our reference is of {row.reference_n} images only, and its own bias adds to FID"
    return None


def sampled_otherwise(row: Row) -> str | None:
    """Why the paper's own numbers may not stand in the line of `row`, whatever its setting; None where they may.

    What a row does not say (the sampler of other people's images) is not taken for the paper's.
    """
    if row.sampler != SAMPLER:
        return f"they are of Algorithm 2 and ours of the sampler {row.sampler}"
    if row.v != V[row.dataset]:
        return f"they have v = {V[row.dataset]:g} and ours v = {'not known' if row.v is None else f'{row.v:g}'}"
    return f"ours have {row.options}" if row.options else None


def same_setting(row: Row, number: Published) -> bool:
    """Whether `number` is the paper's own for the data set, w, p_uncond and T of `row`, as far as the paper states them."""
    stated = ((number.w, row.w), (number.p_uncond, row.p_uncond), (number.steps, row.steps))
    return (
        number.w is not None and row.dataset == number.dataset and all(theirs is None or theirs == ours for theirs, ours in stated)
    )


def beside(row: Row, number: Published) -> bool:
    """Whether `number` may stand in the line of `row`: the same setting, and measured and sampled alike."""
    return same_setting(row, number) and why_not_beside(row) is None and sampled_otherwise(row) is None


_TABLE_1 = """
0.0  1.80 1.80 2.21  53.71 52.90 47.61
0.1  1.55 1.62 1.91  66.11 64.58 56.10
0.2  2.04 2.10 2.08  78.91 76.99 65.60
0.3  3.03 2.93 2.65  92.80 88.64 74.92
0.4  4.30 4.00 3.44  106.2 101.11 84.27
0.5  5.74 5.19 4.34  119.3 112.15 92.95
0.6  7.19 6.48 5.27  131.1 122.13 102.0
0.7  8.62 7.73 6.23  141.8 131.60 109.8
0.8  10.08 8.90 7.25  151.6 140.82 116.9
0.9  11.41 10.09 8.21  161.0 150.26 124.6
1.0  12.60 11.21 9.13  170.1 158.29 131.1
2.0  21.03 18.79 16.16  225.5 212.98 183.0
3.0  24.83 22.36 19.75  250.4 237.65 208.9
4.0  26.22 23.84 21.48  260.2 248.97 225.1
"""  # w, then FID and IS, each of p_uncond 0.1, 0.2, 0.5
_TABLE_2 = """
0.0  8.11 7.27 7.22  81.46 82.45 81.54
0.1  5.31 4.53 4.50  105.01 106.12 104.67
0.2  3.70 3.03 3.00  130.79 132.54 130.09
0.3  3.04 2.43 2.43  156.09 158.47 156.00
0.4  3.02 2.49 2.48  183.01 183.41 180.88
0.5  3.43 2.98 2.96  206.94 207.98 204.31
0.6  4.09 3.76 3.73  227.72 228.83 226.76
0.7  4.96 4.67 4.69  247.92 249.25 247.89
0.8  5.93 5.74 5.71  265.54 267.99 265.52
0.9  6.89 6.80 6.81  280.19 283.41 281.14
1.0  7.88 7.86 7.80  295.29 297.98 294.56
2.0  15.90 15.93 15.75  378.56 377.37 373.18
3.0  19.77 19.77 19.56  409.16 407.44 405.68
4.0  21.55 21.53 21.45  422.29 421.03 419.06
"""  # w, then FID and IS, each of T 128, 256, 1024


def _paper(table: str, dataset: str, name: str, columns: tuple[dict[str, float | int], ...]) -> list[Published]:
    lines = [[float(cell) for cell in line.split()] for line in table.strip().splitlines()]
    return [
        Published(
            "classifier-free guidance",
            dataset,
            line[1 + i],
            line[4 + i],
            f"{CFG}, {name}",
            w=line[0],
            **column,  # type: ignore[arg-type]
        )
        for i, column in enumerate(columns)
        for line in lines
    ]


PUBLISHED: tuple[Published, ...] = (
    Published("ADM", "imagenet64", 2.07, None, f"Dhariwal & Nichol 2021, as printed in {CFG}, Table 1"),
    Published("CDM", "imagenet64", 1.48, 67.95, f"Ho et al. 2021, as printed in {CFG}, Table 1"),
    *_paper(_TABLE_1, "imagenet64", "Table 1", ({"p_uncond": 0.1}, {"p_uncond": 0.2}, {"p_uncond": 0.5})),
    Published("BigGAN-deep, maximal IS", "imagenet128", 25.0, 253.0, f"Brock et al. 2019, as printed in {CFG}, Table 2"),
    Published("BigGAN-deep", "imagenet128", 5.7, 124.5, f"Brock et al. 2019, as printed in {CFG}, Table 2"),
    Published("CDM", "imagenet128", 3.52, 128.8, f"Ho et al. 2021, as printed in {CFG}, Table 2"),
    Published("LOGAN", "imagenet128", 3.36, 148.2, f"Wu et al. 2019, as printed in {CFG}, Table 2"),
    Published("ADM-G", "imagenet128", 2.97, None, f"Dhariwal & Nichol 2021, as printed in {CFG}, Table 2"),
    *_paper(_TABLE_2, "imagenet128", "Table 2", ({"steps": 128}, {"steps": 256}, {"steps": 1024})),
)
