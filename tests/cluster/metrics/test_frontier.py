"""Models are compared at equal Inception score: the paper's own tables are the examples with known answers."""

from dataclasses import replace

import pytest

from freeguide.cluster.evaluation.frontier import Spread, common_scores, fid_at, near_frontier, over_seeds
from freeguide.cluster.evaluation.published import PUBLISHED
from freeguide.cluster.evaluation.rows import Row
from freeguide.configs.errors import DataError

ROW = Row(
    w=0.0,
    fid=1.0,
    fid_std=0.0,
    inception_score=1.0,
    inception_score_std=0.0,
    n=50_000,
    reference="a1" * 32,
    reference_n=1_281_167,
    extractor="inception-2015-12-05",
    extractor_hash="6726825d",
    resize="tf1-bilinear-299",
    rounding="round-half-up",
    labels="random",
    run="paper",
    seed=0,
    code_version="x",
)


def _table_1(p_uncond: float) -> list[Row]:
    return [
        replace(ROW, w=n.w, fid=n.fid, inception_score=n.inception_score, p_uncond=p_uncond)
        for n in PUBLISHED
        if n.dataset == "imagenet64" and n.p_uncond == p_uncond
    ]


@pytest.mark.parametrize(
    ("score", "expected"),
    [  # worked out by hand from the printed table
        (66.11, (1.55, 1.68, 2.11)),
        (80.0, (2.12, 2.31, 3.08)),
        (100.0, (3.71, 3.90, 5.06)),
        (130.0, (7.05, 7.52, 8.97)),
        (180.0, (14.11, 14.22, 15.75)),
        (220.0, (20.19, 19.81, 20.94)),
    ],
)
def test_the_papers_table_at_equal_inception_score(score, expected):
    found = tuple(fid_at(_table_1(p), score) for p in (0.1, 0.2, 0.5))
    assert found == pytest.approx(expected, abs=0.0051)  # printed to two decimals


def test_the_order_at_equal_w_is_the_reverse_of_that_on_the_frontier():
    at_w_1 = [next(row.fid for row in _table_1(p) if row.w == 1.0) for p in (0.1, 0.2, 0.5)]
    at_is_130 = [fid_at(_table_1(p), 130.0) for p in (0.1, 0.2, 0.5)]
    assert at_w_1 == sorted(at_w_1, reverse=True)
    assert at_is_130 == sorted(at_is_130)


def test_scores_that_are_not_reached_have_no_fid_and_of_two_passes_the_lower_counts():
    rows = [replace(ROW, w=w, inception_score=s, fid=f) for w, s, f in [(0, 5.0, 9.0), (1, 9.0, 3.0), (2, 7.0, 8.0)]]
    assert fid_at(rows, 4.9) is None
    assert fid_at(rows, 9.1) is None
    assert fid_at(rows, 5.0) == 9.0
    assert fid_at(rows, 8.0) == pytest.approx(4.5)  # 4.5 on the way up, 5.5 on the way back
    assert fid_at(rows[::-1], 8.0) == pytest.approx(4.5)


def test_common_scores_are_round_and_reached_by_all():
    members = [_table_1(p) for p in (0.1, 0.2, 0.5)]
    scores = common_scores(members)
    assert scores == [60.0, 80.0, 100.0, 120.0, 140.0, 160.0, 180.0, 200.0, 220.0]
    assert all(fid_at(rows, score) is not None for rows in members for score in scores)
    far = [replace(row, inception_score=row.inception_score + 500) for row in members[0]]
    assert common_scores([far, members[1]]) == []
    close = [replace(ROW, w=w, inception_score=9.861 + 0.007 * w) for w in (0.0, 1.0)]
    assert common_scores([close]) == pytest.approx([9.861, 9.862, 9.863, 9.864, 9.865, 9.866, 9.867, 9.868])


def test_seeds_are_averaged_never_chosen_from():
    rows = [replace(ROW, w=w, seed=s, fid=2.0 + s + w, inception_score=10.0 * (1 + s)) for w in (0.0, 1.0) for s in (0, 1, 2)]
    first, second = over_seeds(rows)
    assert (first.w, first.values["fid"]) == (0.0, Spread(mean=3.0, std=1.0, k=3))
    assert (second.values["fid"].mean, second.values["inception_score"]) == (4.0, Spread(mean=20.0, std=10.0, k=3))
    assert over_seeds(rows[:1])[0].values["fid"].std is None
    assert "recall" not in first.values
    recalls = [replace(row, recall=0.1 * row.seed) for row in rows]
    assert over_seeds(recalls)[0].values["recall"] == Spread(mean=pytest.approx(0.1), std=pytest.approx(0.1), k=3)
    assert "recall" not in over_seeds([*recalls[1:], rows[0]])[0].values  # not of some of them only
    with pytest.raises(DataError, match="because n is"):
        over_seeds([rows[0], replace(rows[1], n=1000)])


def test_a_w_that_a_screen_left_to_some_is_averaged_over_none():
    rows = [replace(ROW, w=w, seed=s) for w in (0.0, 1.0) for s in (0, 1, 2)]
    assert [found.w for found in over_seeds(rows[:-1])] == [0.0]
    assert over_seeds([rows[0], rows[-1]]) == []
    alone = [replace(ROW, w=w, seed=s, run=f"r{s}") for w, s in ((0.0, 0), (1.0, 0), (1.0, 1))]
    assert [found.w for found in over_seeds(alone, ("run", "seed"))] == [1.0]


def test_near_the_frontier_of_the_papers_table_are_the_best_fid_and_all_above_it_with_one_neighbour():
    first = _table_1(0.1)
    assert near_frontier([first]) == [[row.w for row in first]]  # FID is best at w = 0.1, whose neighbour is 0
    fine = [replace(ROW, w=w, fid=abs(w - 1) + 1, inception_score=w) for w in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)]
    assert near_frontier([fine[::-1]]) == [[0.75, 1.0, 2.0]]


def test_the_frontier_is_common_to_all_series_and_a_spread_leaves_the_benefit_of_the_doubt():
    good = [replace(ROW, w=w, fid=1 + w, inception_score=10 + w) for w in (0.0, 1.0, 2.0)]
    bad = [replace(row, fid=row.fid + 5, inception_score=row.inception_score - 1) for row in good]
    assert near_frontier([good, bad]) == [[0.0, 1.0, 2.0], []]
    doubtful = [replace(row, fid_std=5.5) for row in bad]  # 6 - 5.5 is below the best FID, 7 - 5.5 is not
    assert near_frontier([good, doubtful]) == [[0.0, 1.0, 2.0], [0.0, 1.0]]
    assert near_frontier([good, [replace(row, fid_std=0.1) for row in bad]]) == [[0.0, 1.0, 2.0], []]


def test_where_a_spread_is_not_known_nothing_is_left_out():
    good = [replace(ROW, w=w, fid=1 + w, inception_score=10 + w) for w in (0.0, 1.0, 2.0)]
    bad = [replace(row, fid=row.fid + 5, inception_score=row.inception_score - 1) for row in good]
    unknown = [replace(row, fid_std=None) for row in bad]
    assert near_frontier([good, unknown]) == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    assert near_frontier([[replace(row, fid_std=None) for row in good], bad]) == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]


def test_without_an_inception_score_nothing_is_compared_at_one_and_a_screen_keeps_the_lowest_fid():
    rows = [
        replace(ROW, w=w, fid=fid, fid_std=0.1, inception_score=None, inception_score_std=None)
        for w, fid in ((0.0, 2.0), (0.5, 1.9), (1.0, 5.0), (2.0, 9.0))
    ]
    scored = [replace(row, inception_score=3.0 + row.w) for row in rows]
    assert (fid_at(rows, 3.5), fid_at([*rows, *scored], 3.5)) == (None, 1.9)
    assert common_scores([rows]) == common_scores([rows, scored]) == []
    assert near_frontier([rows]) == [[0.0, 0.5, 1.0]]  # 1.0 is a neighbour
    assert near_frontier([scored]) == [[0.0, 0.5, 1.0, 2.0]]  # there a larger w has the higher score
    assert near_frontier([rows, [replace(row, fid=row.fid - 1.5) for row in rows]]) == [[], [0.0, 0.5, 1.0]]
    seeds = over_seeds([*rows, *(replace(row, seed=1, fid=row.fid + 2) for row in rows)])
    assert (seeds[0].values["fid"].mean, "inception_score" in seeds[0].values) == (3.0, False)
