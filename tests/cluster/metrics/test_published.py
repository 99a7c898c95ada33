"""Published numbers: as printed, each with a source, and beside ours only where the conditions match."""

from dataclasses import replace

import pytest

from freeguide.cluster.evaluation.extractors.features import INCEPTION
from freeguide.cluster.evaluation.published import PUBLISHED, beside, rows_of, same_setting, sampled_otherwise, why_not_beside
from freeguide.cluster.evaluation.rows import Row

OURS = Row(
    w=0.1,
    fid=1.6,
    inception_score=66.0,
    inception_score_std=1.0,
    n=50_000,
    dataset="imagenet64",
    reference="a1" * 32,
    reference_n=1_281_167,
    extractor=INCEPTION,
    extractor_hash="6726825d",
    resize="tf1-bilinear-299",
    rounding="round-half-up",
    labels="random",
    run="ours",
    p_uncond=0.1,
    sampler="ancestral",
    steps=256,
    v=0.3,
    code_version="x",
)


def test_the_headlines_of_the_paper_are_the_extremes_of_its_tables():
    ours = {size: [n for n in rows_of(f"imagenet{size}") if n.w is not None] for size in (64, 128)}
    assert [len(numbers) for numbers in ours.values()] == [42, 42]
    best = min(ours[64], key=lambda n: n.fid)
    assert (best.fid, best.p_uncond, best.w) == (1.55, 0.1, 0.1)
    assert max((n.inception_score, n.p_uncond, n.w) for n in ours[64]) == (260.2, 0.1, 4.0)
    low = min(n.fid for n in ours[128])
    assert [(n.steps, n.w) for n in ours[128] if n.fid == low] == [(256, 0.3), (1024, 0.3)]
    assert max((n.inception_score, n.steps, n.w) for n in ours[128]) == (422.29, 128, 4.0)
    # Along each column IS rises with w, and FID falls and then rises: a slip in the transcription would show.
    for numbers in ours.values():
        for column in {(n.p_uncond, n.steps) for n in numbers}:
            line = [n for n in numbers if (n.p_uncond, n.steps) == column]
            scores, fids = [n.inception_score for n in line], [n.fid for n in line]
            assert scores == sorted(scores)
            turn = fids.index(min(fids))
            assert fids[: turn + 1] == sorted(fids[: turn + 1], reverse=True)
            assert fids[turn:] == sorted(fids[turn:])


def test_every_number_has_a_source_and_the_other_models_are_those_of_the_tables():
    assert all("2207.12598" in number.source for number in PUBLISHED)
    others = {(n.model, n.dataset): (n.fid, n.inception_score) for n in PUBLISHED if n.w is None}
    assert others == {
        ("ADM", "imagenet64"): (2.07, None),
        ("CDM", "imagenet64"): (1.48, 67.95),
        ("BigGAN-deep, maximal IS", "imagenet128"): (25.0, 253.0),
        ("BigGAN-deep", "imagenet128"): (5.7, 124.5),
        ("CDM", "imagenet128"): (3.52, 128.8),
        ("LOGAN", "imagenet128"): (3.36, 148.2),
        ("ADM-G", "imagenet128"): (2.97, None),
    }


def test_the_same_setting_is_found_where_the_paper_states_it():
    assert [(n.fid, n.inception_score) for n in PUBLISHED if beside(OURS, n)] == [(1.55, 66.11)]
    large = replace(OURS, dataset="imagenet128", w=0.3, steps=128, v=0.2)
    assert [n.fid for n in PUBLISHED if beside(large, n)] == [3.04]
    assert not [n for n in PUBLISHED if beside(replace(large, steps=64), n)]
    assert not [n for n in PUBLISHED if beside(replace(OURS, w=0.15), n)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset": "digits"}, "the data set is 'digits'"),
        ({"dataset": ""}, "the reference names no data set"),
        ({"extractor": "digits"}, "they are plain FIDs and ours is FID-digits"),
        ({"n": 10_000}, "they are of 50000 images and ours of 10000"),
        ({"reference_n": 10_000}, "our reference is of 10000 images only, and its own bias adds to FID"),
    ],
)
def test_nothing_stands_beside_a_row_measured_otherwise_and_the_reason_is_said(change, reason):
    row = replace(OURS, **change)
    assert why_not_beside(row) == reason
    assert not [n for n in PUBLISHED if beside(row, n)]
    assert why_not_beside(OURS) is None
    if "dataset" not in change:
        assert [n.fid for n in PUBLISHED if same_setting(row, n)] == [1.55]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "dpmpp_2m"}, "they are of Algorithm 2 and ours of the sampler dpmpp_2m"),
        ({"sampler": "not known"}, "they are of Algorithm 2 and ours of the sampler not known"),
        ({"v": 0.2}, "they have v = 0.3 and ours v = 0.2"),
        ({"v": None}, "they have v = 0.3 and ours v = not known"),
        ({"options": "interval=[-2.13, 2.55]"}, "ours have interval=[-2.13, 2.55]"),
        ({"options": "precision=bf16"}, "ours have precision=bf16"),
    ],
)
def test_the_papers_numbers_stand_in_no_line_that_was_sampled_otherwise(change, words):
    row = replace(OURS, **change)
    assert not [n for n in PUBLISHED if beside(row, n)]
    assert sampled_otherwise(row) == words
    assert why_not_beside(row) is None, "other models still compare"
    assert sampled_otherwise(replace(OURS, dataset="imagenet128")) == "they have v = 0.2 and ours v = 0.3"
    assert sampled_otherwise(OURS) is None


def test_a_reference_whose_file_does_not_say_its_number_is_taken_for_the_papers():
    assert [n.fid for n in PUBLISHED if beside(replace(OURS, reference_n=0), n)] == [1.55]
