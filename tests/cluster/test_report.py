"""The report: equal rows give equal bytes, every number stands beside its conditions, and the pictures are the pixels."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from freeguide.cluster.evaluation.extractors.features import INCEPTION
from freeguide.cluster.evaluation.published import PUBLISHED
from freeguide.cluster.evaluation.report import figures
from freeguide.cluster.evaluation.report.figure_2 import draw_figure_2
from freeguide.cluster.evaluation.report.page import Cost, write_report
from freeguide.cluster.evaluation.rows import Row, from_json
from freeguide.configs.errors import DataError

WEIGHTS = [0.0, 0.1, 0.3, 0.75, 1.0, 2.0, 4.0]
FIDS = [13.68, 10.32, 6.26, 4.19, 5.2, 15.27, 40.16]
SCORES = [7.33, 7.58, 7.99, 8.57, 8.76, 9.13, 9.16]
BASE = ["report.json", "report.csv", "table.md", "fid_over_w.png", "frontier.png", "index.html"]


def _rows(**changes: object) -> list[Row]:
    return [
        Row(
            **{
                "w": w,
                "fid": fid,
                "inception_score": score,
                "inception_score_std": 0.08,
                "accuracy": 0.95,
                "precision": 0.9,
                "recall": 0.6,
                "nfe": 128 if w else 64,
                "n": 5000,
                "reference": "a1" * 32,
                "reference_n": 60000,
                "extractor": "fashion",
                "extractor_hash": "b2" * 32,
                "resize": "none",
                "rounding": "round-half-up",
                "labels": "balanced",
                "run": "s3://bucket/fashion",
                "checkpoint_step": 6000,
                "trained": "c3" * 6,
                "p_uncond": 0.1,
                "ema": 0.999,
                "sampler": "ancestral",
                "steps": 64,
                "v": 0.3,
                "clip": True,
                "seed": 17,
                "code_version": "0.1.0+abc",
            }
            | changes
        )
        for w, fid, score in zip(WEIGHTS, FIDS, SCORES, strict=True)
    ]


def _grids(channels: int = 1, rows: list[Row] | None = None) -> dict[Row, np.ndarray]:
    generator = np.random.default_rng(0)
    return {row: generator.integers(0, 256, size=(2, 3, 8, 8, channels), dtype=np.uint8) for row in rows or _rows()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_rows_in_any_order_give_equal_bytes(tmp_path):
    rows, grids = _rows(), _grids()
    one = write_report(rows, grids, tmp_path / "one", title="Fashion", classes=["a", "b", "c"])
    write_report(rows[::-1], dict(reversed(grids.items())), tmp_path / "two", title="Fashion", classes=["a", "b", "c"])
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert {path.name for path in one} == {*BASE, "samples.png", *(f"samples_w{w:g}.png" for w in WEIGHTS)}
    assert all(path.exists() for path in one)


def test_times_are_kept_apart_from_everything_else(tmp_path):
    write_report(_rows(), {}, tmp_path / "one", title="x")
    write_report(_rows(), {}, tmp_path / "two", title="x", times={"seconds": 1.5, "images_per_second": 300.0})
    one, two = _contents(tmp_path / "one"), _contents(tmp_path / "two")
    assert json.loads(two.pop("times.json")) == {"seconds": 1.5, "images_per_second": 300.0}
    assert one == two


@pytest.mark.usefixtures("words_only")
def test_report_json_reads_back_as_the_rows_and_names_the_best(tmp_path):
    rows = _rows()
    write_report(rows, {}, tmp_path, title="x")
    text = (tmp_path / "report.json").read_text()
    assert from_json(text) == rows
    assert json.loads(text)["best"] == [{"series": "", "w": 0.75, "fid": 4.19}]


@pytest.mark.usefixtures("words_only")
def test_the_table_has_one_line_per_w_and_only_the_best_fid_is_bold(tmp_path):
    write_report(_rows(), {}, tmp_path, title="Fashion")
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert lines[0] == "| w | FID-fashion ↓ | IS ↑ | accuracy | precision | recall | NFE |"
    assert len(lines) == 2 + len(WEIGHTS)
    assert lines[2] == "| 0 | 13.68 | 7.33 ± 0.08 | 0.950 | 0.900 | 0.600 | 64 |"
    assert [line for line in lines if "**" in line] == ["| 0.75 | **4.19** | 8.57 ± 0.08 | 0.950 | 0.900 | 0.600 | 128 |"]


@pytest.mark.usefixtures("words_only")
def test_every_condition_stands_in_the_caption_of_table_and_page(tmp_path):
    write_report(_rows(), {}, tmp_path, title="Fashion")
    said = "s3://bucket/fashion|6000|EMA 0.999|p_uncond 0.1|ancestral|T = 64|v = 0.3|clipped|seed 17|0.1.0+abc|n = 5000|balanced"
    said += f"|round-half-up|resize none|60000|{'a1' * 6}|of fashion|{'b2' * 6}|no other FID|training {'c3' * 6}"
    for name in ("table.md", "index.html"):
        text = (tmp_path / name).read_text()
        assert [words for words in said.split("|") if words not in text] == []


@pytest.mark.usefixtures("words_only")
def test_columns_that_nobody_measured_are_left_out_and_gaps_are_dashes(tmp_path):
    rows = _rows(precision=None, recall=None)
    rows[1] = replace(rows[1], kid=0.00125, fid_infinity=0.5)
    write_report(rows, {}, tmp_path, title="x")
    text = (tmp_path / "table.md").read_text()
    assert "| w | FID-fashion ↓ | IS ↑ | accuracy | KID × 1000 | FID-fashion ∞ | NFE |" in text
    assert "| 0.1 | 10.32 | 7.58 ± 0.08 | 0.950 | 1.25 | 0.5 | 128 |" in text
    assert "| 0 | 13.68 | 7.33 ± 0.08 | 0.950 | - | - | 64 |" in text


@pytest.mark.usefixtures("words_only")
def test_plain_fid_is_said_of_inception_only(tmp_path):
    write_report(_rows(extractor=INCEPTION), {}, tmp_path, title="x")
    text = (tmp_path / "table.md").read_text()
    assert "| w | FID ↓ |" in text
    assert "FID-" not in text.split("|\n\n")[0]


@pytest.mark.usefixtures("words_only")
def test_series_that_vary_by_name_are_told_apart_and_each_has_its_best(tmp_path):
    other = [replace(row, p_uncond=0.5, fid=row.fid + (20 if row.w < 2 else -12)) for row in _rows()]
    write_report([*other, *_rows()], {}, tmp_path, title="x", varying=("p_uncond",))
    text = (tmp_path / "table.md").read_text()
    assert "| p_uncond | w | FID-fashion ↓ |" in text
    assert "| 0.1 | 0.75 | **4.19** |" in text
    assert "| 0.5 | 2 | **3.27** |" in text
    assert text.split("##")[0].count("**") == 4
    assert "p_uncond" not in next(line for line in text.splitlines() if line.startswith("run "))
    assert [best["series"] for best in json.loads((tmp_path / "report.json").read_text())["best"]] == [
        "p_uncond 0.1",
        "p_uncond 0.5",
    ]


def test_rows_that_do_not_compare_write_nothing(tmp_path):
    rows = _rows()
    rows[2] = replace(rows[2], n=1000)
    with pytest.raises(DataError, match="because n is 5000 in one and 1000 in the other"):
        write_report(rows, {}, tmp_path / "out", title="x")
    with pytest.raises(DataError, match=r"two rows for w = 0\.1"):
        write_report([*_rows(), replace(_rows()[1], fid=9.0)], {}, tmp_path / "out", title="x")
    with pytest.raises(DataError, match="at least one metric row"):
        write_report([], {}, tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("words_only")
def test_sample_pictures_hold_the_very_pixels_enlarged(tmp_path, channels):
    grids = _grids(channels)
    write_report(_rows(), grids, tmp_path, title="x")
    picture = np.asarray(Image.open(tmp_path / "samples_w0.75.png"))
    scale, gap = 56 // 8, 3
    assert picture.shape == (2 * (56 + gap) + gap, 3 * (56 + gap) + gap, 3)
    for r in range(2):
        for c in range(3):
            tile = picture[gap + r * (56 + gap) :, gap + c * (56 + gap) :][:56, :56]
            expected = np.broadcast_to(grids[_rows()[3]][r, c], (8, 8, 3))
            assert np.array_equal(tile, expected.repeat(scale, axis=0).repeat(scale, axis=1))


@pytest.mark.usefixtures("words_only")
def test_the_overview_shows_four_grids_with_the_ends_and_the_best(tmp_path):
    grids = {row: np.full((1, 1, 8, 8, 3), (index * 10, 0, 255), np.uint8) for index, row in enumerate(_rows())}
    write_report(_rows(), grids, tmp_path, title="x")
    pixels = np.asarray(Image.open(tmp_path / "samples.png")).reshape(-1, 3)
    shown = {WEIGHTS[int(red) // 10] for red in np.unique(pixels[(pixels[:, 1] == 0) & (pixels[:, 2] == 255)][:, 0])}
    assert {0.0, 0.75, 4.0} < shown
    assert len(shown) == 4


@pytest.mark.parametrize(
    "grid",
    [np.zeros((2, 3, 8, 8, 1), np.float32), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 8, 8, 2), np.uint8)],
)
def test_grids_of_the_wrong_kind_are_refused(tmp_path, grid):
    with pytest.raises(DataError, match="must be uint8"):
        write_report(_rows(), {_rows()[0]: grid}, tmp_path, title="x")


def test_grids_that_differ_in_shape_or_lack_names_are_refused(tmp_path):
    grids = _grids()
    with pytest.raises(DataError, match="as many class names, not 2"):
        write_report(_rows(), grids, tmp_path, title="x", classes=["a", "b"])
    grids[_rows()[0]] = grids[_rows()[0]][:1]
    with pytest.raises(DataError, match="of one shape"):
        write_report(_rows(), grids, tmp_path, title="x")


def test_pictures_carry_no_text_chunks_and_the_page_needs_no_other_file(tmp_path):
    title = "<script>alert(1)</script> & co"
    write_report(_rows(), _grids(), tmp_path, title=title)
    for path in tmp_path.glob("*.png"):
        assert not {key for key in Image.open(path).info if key not in ("dpi",)}, path.name
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert re.findall(r'(?:href|src)="(?!data:)', page) == []
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    for name, data in zip(("fid_over_w.png", "frontier.png", "samples.png"), embedded, strict=True):
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()


def test_the_figures_draw_without_warnings_at_the_edges_of_the_data(tmp_path, recwarn):
    single = _rows()[:1]
    write_report(single, {}, tmp_path / "single", title="one w")
    perfect = [replace(row, fid=0.0, inception_score=10.0) for row in _rows()]  # equal points have no direction
    write_report(perfect, {}, tmp_path / "perfect", title="all equal")
    for folder in ("single", "perfect"):
        for name in ("fid_over_w.png", "frontier.png"):
            picture = np.asarray(Image.open(io.BytesIO((tmp_path / folder / name).read_bytes())).convert("L"))
            assert picture.std() > 0
    assert [str(warning.message) for warning in recwarn] == []


def test_error_bars_are_one_deviation_as_everywhere_else(monkeypatch):
    monkeypatch.setattr(figures, "_drawn", lambda figure: figure)
    rows = _rows(fid_std=0.5)
    left, middle, _ = figures.curves([("", rows)]).axes  # type: ignore[attr-defined]
    (bars,) = left.containers[0].lines[2]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [[row.fid - 0.5, row.fid + 0.5] for row in rows]
    assert middle.collections[0].get_paths()[0].vertices[:, 1].max() == max(row.inception_score for row in rows) + 0.08


def test_a_users_matplotlib_settings_change_nothing(tmp_path):
    import matplotlib

    write_report(_rows(), {}, tmp_path / "one", title="x")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 30, "figure.dpi": 30}):
        write_report(_rows(), {}, tmp_path / "two", title="x")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def _paper(**changes: object) -> list[Row]:
    """The paper's Table 1 as if it were ours."""
    conditions = {"n": 50_000, "dataset": "imagenet64", "extractor": INCEPTION, "steps": 256} | changes
    numbers = [n for n in PUBLISHED if n.dataset == "imagenet64" and n.p_uncond is not None]
    facts = [{"w": n.w, "fid": n.fid, "inception_score": n.inception_score, "p_uncond": n.p_uncond} for n in numbers]
    return [replace(_rows()[0], **conditions, **fact) for fact in facts]


@pytest.mark.usefixtures("words_only")
def test_series_are_compared_at_equal_inception_score(tmp_path):
    write_report(_paper(), {}, tmp_path, title="x", varying=("p_uncond",))
    text = (tmp_path / "table.md").read_text()
    section = text.split("## FID at equal Inception score")[1]
    assert "| IS | p_uncond 0.1 | p_uncond 0.2 | p_uncond 0.5 |" in section
    assert "| 80 | **2.12** | 2.31 | 3.08 |" in section
    assert "| 220 | 20.19 | **19.81** | 20.94 |" in section
    assert "equal Inception score" in (tmp_path / "index.html").read_text()
    write_report(_rows(), {}, tmp_path / "one", title="x")
    assert "equal Inception score" not in (tmp_path / "one" / "table.md").read_text()


@pytest.mark.usefixtures("words_only")
def test_published_numbers_stand_beside_rows_measured_alike(tmp_path):
    rows = [row for row in _paper() if row.p_uncond == 0.1]
    write_report(rows, {}, tmp_path, title="x")
    text, page = (tmp_path / "table.md").read_text(), (tmp_path / "index.html").read_text()
    assert "| NFE | paper's FID | paper's IS |" in text
    assert next(line for line in text.splitlines() if line.startswith("| 0.3 |")).endswith("| 3.03 | 92.8 |")
    section = text.split("## Published for imagenet64")[1]
    assert "| ADM | - | - | - | 2.07 | - | Dhariwal & Nichol 2021" in section
    assert "classifier-free guidance" not in section, "they stand in the table above"
    assert "class=grey" not in page


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 5000}, "they are of 50000 images and ours of 5000"),
        ({"extractor": "toys"}, "they are plain FIDs and ours is FID-toys"),
        ({"reference_n": 500}, "our reference is of 500 images only, and its own bias adds to FID"),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_published_numbers_are_grey_with_the_reason_where_conditions_differ(tmp_path, change, reason):
    rows = [row for row in _paper(**change) if row.p_uncond == 0.2]
    write_report(rows, {}, tmp_path, title="x")
    text, page = (tmp_path / "table.md").read_text(), (tmp_path / "index.html").read_text()
    assert "paper's FID" not in text
    section = text.split("## Published for imagenet64")[1]
    assert f"*Not comparable with the rows above because {reason}." in section
    assert section.count("classifier-free guidance") == len(rows)
    grey = re.findall(r"<section class=grey>(.*?)</section>", page, re.DOTALL)
    assert len(grey) == 1
    assert reason in grey[0]
    assert "2.93" in grey[0]


@pytest.mark.usefixtures("words_only")
def test_the_papers_own_numbers_are_left_out_with_the_reason_where_sampling_differs(tmp_path):
    alike = [row for row in _paper() if row.p_uncond == 0.1]
    fast = [replace(row, sampler="dpmpp_2m") for row in alike]
    for name, rows in (("fast", fast), ("both", alike + fast)):
        write_report(rows, {}, tmp_path / name, title="x", varying=("sampler",))
    text = (tmp_path / "fast" / "table.md").read_text()
    reason = "The paper's own stand beside rows sampled alike only: they are of Algorithm 2 and ours of the sampler dpmpp_2m."
    assert "paper's FID" not in text
    assert reason in text
    section = text.split("## Published for imagenet64")[1]
    assert "| ADM | - | - | - | 2.07 |" in section
    assert "classifier-free guidance" not in section
    text = (tmp_path / "both" / "table.md").read_text()
    assert reason in text
    lines = [line for line in text.split("##")[0].splitlines() if " | 0.3 | " in line]
    assert [line.rsplit(" | ", 2)[1:] for line in lines] == [["3.03", "92.8 |"], ["-", "- |"]]


@pytest.mark.usefixtures("words_only")
def test_data_that_no_paper_used_gets_one_sentence(tmp_path):
    write_report(_rows(dataset="fashion"), {}, tmp_path, title="x")
    text = (tmp_path / "table.md").read_text()
    assert text.endswith("*No published numbers stand here because the data set is 'fashion'.*\n")


def test_other_peoples_images_get_a_table_a_mark_and_the_same_instrument(tmp_path):
    gan = replace(_rows()[0], run="gan.npz", fid=9.5, rounding="not known", labels="not known", steps=None, nfe=None, seed=None)
    write_report(_rows(), {}, tmp_path / "with", title="x", others=[gan])
    write_report(_rows(), {}, tmp_path / "without", title="x")
    section = (tmp_path / "with" / "table.md").read_text().split("## Other models, measured here")[1]
    assert "| gan.npz | 9.50 | 7.33 ± 0.08 |" in section
    one, two = _contents(tmp_path / "with"), _contents(tmp_path / "without")
    assert one["frontier.png"] != two["frontier.png"]
    assert one["report.json"] == two["report.json"]
    with pytest.raises(DataError, match="because n is 5000 in one and 100 in the other"):
        write_report(_rows(), {}, tmp_path, title="x", others=[replace(gan, n=100)])


@pytest.mark.usefixtures("words_only")
def test_seeds_are_summarised_by_mean_and_deviation(tmp_path):
    rows = [replace(row, seed=seed, fid=row.fid + seed) for row in _rows() for seed in (0, 1, 2)]
    write_report(rows, {}, tmp_path, title="x", varying=("seed",))
    section = (tmp_path / "table.md").read_text().split("## Over sampling seeds")[1]
    assert "| w | FID-fashion | IS | accuracy | precision | recall | k |" in section
    assert "| 0.75 | 5.19 ± 1 | 8.57 ± 0 |" in section
    more = [replace(row, kid=0.001 * row.seed, fid_infinity=1.0 + row.seed, sfid=2.0, fd_dinov2=3.0 + row.seed) for row in rows]
    write_report(more, {}, tmp_path, title="x", varying=("seed",))
    section = (tmp_path / "table.md").read_text().split("## Over sampling seeds")[1]
    assert "| recall | KID × 1000 | FID-fashion ∞ | sFID | FD-DINOv2 | k |" in section
    assert "| 1.00 ± 1 | 2.00 ± 1 | 2.00 ± 0 | 4.00 ± 1 | 3 |" in section


@pytest.mark.usefixtures("words_only")
def test_the_spread_of_the_fid_stands_beside_it_and_is_explained(tmp_path):
    write_report(_rows(fid_std=0.123), {}, tmp_path, title="x")
    text = (tmp_path / "table.md").read_text()
    assert "| 0.75 | **4.19 ± 0.12** |" in text
    assert "by jackknife" in text
    write_report(_rows(), {}, tmp_path, title="x")
    assert "jackknife" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("words_only")
def test_every_distance_stands_with_its_spread_where_the_row_has_one(tmp_path):
    more = {"kid": 0.00125, "kid_std": 0.0001, "sfid": 7.5, "sfid_std": 0.25, "fd_dinov2": 120.0, "fd_dinov2_std": 1.5}
    rows = [replace(row, **more) for row in _rows()]
    rows[0] = replace(rows[0], sfid_std=None, fd_dinov2_std=None, kid=26.1, kid_std=2.975)
    write_report(rows, {}, tmp_path, title="x")
    text = (tmp_path / "table.md").read_text()
    assert "| KID × 1000 | sFID | FD-DINOv2 | NFE |" in text
    assert "| 1.25 ± 0.1 | 7.50 ± 0.25 | 120.00 ± 1.5 | 128 |" in text
    assert "| 26100 ± 3000 | 7.50 | 120.00 | 64 |" in text
    assert "± after sFID, FD-DINOv2, KID × 1000: standard deviation over sets of n images" in text
    write_report(_rows(), {}, tmp_path, title="x")
    assert "± after" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("words_only")
def test_costs_that_depend_on_the_machine_stay_out_of_the_report(tmp_path):
    counts = {"images": 1000, "evaluations": 60_000, "naive_images": 2000, "naive_evaluations": 100_000}
    cost = Cost(**counts, counted=62_000, device_seconds=50.0, device="CPU")
    write_report(_rows(), {}, tmp_path / "one", title="x", cost=cost)
    write_report(_rows(), {}, tmp_path / "two", title="x", cost=replace(cost, counted=60_000, device_seconds=25.0, device="GPU"))
    one, two = _contents(tmp_path / "one"), _contents(tmp_path / "two")
    times = json.loads(one.pop("times.json"))
    assert times == {"device_seconds": 50.0, "images_per_device_second": 20.0}
    seconds = one.pop("cost.md").decode()
    assert "| network evaluations, counted | 62,000 |" in seconds
    assert "| share of a naive sweep | 62.0% |" in seconds
    assert "| device-seconds of a naive sweep at this speed | 80.6 |" in seconds
    assert "| images per device-second | 20 |" in seconds
    assert {name: two[name] for name in one} == one
    text, page = one["table.md"].decode(), one["index.html"].decode()
    assert "Device-seconds, images per second and the evaluations that were counted are in [cost.md](cost.md)." in text
    assert 'the evaluations that were counted are in <a href="cost.md">cost.md</a>.</p>' in page
    assert "| this sweep | 1,000 | 60,000 | 60% |" in text
    assert "| every w by itself | 2,000 | 100,000 | 100% |" in text


def _three(**changes: object) -> list[Row]:
    """Runs of three p_uncond, with the curves of each apart."""
    return [
        replace(row, run=f"p{p}", p_uncond=p, fid=row.fid * (1 + p), inception_score=row.inception_score - p, **changes)
        for p in (0.1, 0.2, 0.5)
        for row in _rows()
    ]


@pytest.mark.usefixtures("words_only")
def test_runs_are_called_by_what_else_tells_them_apart_and_named_once(tmp_path):
    write_report(_three(), {}, tmp_path, title="x", varying=("run", "p_uncond"))
    text = (tmp_path / "table.md").read_text()
    assert text.splitlines()[2].startswith("| p_uncond | w | FID-fashion ↓ |")
    assert "| IS | p_uncond 0.1 | p_uncond 0.2 | p_uncond 0.5 |" in text
    assert "| p_uncond 0.5 | p0.5 | 0.5 |" in text.split("## Series")[1]
    assert "## Over runs" not in text


@pytest.mark.usefixtures("words_only")
def test_runs_of_several_training_seeds_are_summarised_for_each_p_uncond(tmp_path):
    rows = [replace(row, run=f"{row.run}-{k}", fid=row.fid + k) for row in _three() for k in (0, 1)]
    write_report(rows, {}, tmp_path, title="x", varying=("run", "p_uncond"))
    text = (tmp_path / "table.md").read_text()
    assert text.splitlines()[2].startswith("| run | p_uncond | w |")
    section = text.split("## Over runs")[1]
    assert "| p_uncond | w | FID-fashion | IS | accuracy |" in section
    assert "| 0.1 | 0.75 | 5.11 ± 0.71 | 8.47 ± 0 |" in section
    assert section.count("| 2 |\n") == 3 * len(WEIGHTS)


SWEPT = ("run", "checkpoint_step", "trained", "p_uncond", "ema")  # what a sweep over runs may vary


def _swept(*runs: dict[str, object]) -> tuple[list[Row], list[str]]:
    """The curves of some runs, number k with FIDs that are higher by k, and the conditions in which they differ."""
    rows = [replace(row, run=f"r{k}", **run, fid=row.fid + k) for k, run in enumerate(runs) for row in _rows()]
    return rows, [name for name in SWEPT if len({getattr(row, name) for row in rows}) > 1]


@pytest.mark.parametrize("change", [{"trained": "d4" * 6}, {"checkpoint_step": 300}, {"trained": "d4" * 6, "p_uncond": 0.5}])
@pytest.mark.usefixtures("words_only")
def test_runs_that_were_not_trained_alike_are_no_repetitions(tmp_path, change):
    rows, varying = _swept({}, change)
    write_report(rows, {}, tmp_path, title="x", varying=varying)
    text = (tmp_path / "table.md").read_text()
    assert "Over runs" not in text
    assert "over runs" not in text
    if "trained" in change:
        assert text.splitlines()[2].startswith("| run | "), "p_uncond would be a wrong name for a difference of networks"
        assert f"| r1 | {'d4' * 6} |" in text.split("## Series")[1]


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({"trained": "d4" * 6}, ["trained c3c3c3c3c3c3", "trained d4d4d4d4d4d4"]),
        ({"checkpoint_step": 300}, ["checkpoint_step 6000", "checkpoint_step 300"]),
        ({"checkpoint_step": 300, "p_uncond": 0.5}, ["p_uncond 0.1", "p_uncond 0.5"]),
        ({"trained": "d4" * 6, "p_uncond": 0.5}, ["trained c3c3c3c3c3c3, p_uncond 0.1", "trained d4d4d4d4d4d4, p_uncond 0.5"]),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_repetitions_are_told_apart_by_all_in_which_they_were_trained(tmp_path, change, labels):
    rows, varying = _swept({}, {}, change, change, change)
    write_report(rows, {}, tmp_path, title="x", varying=varying)
    text = (tmp_path / "table.md").read_text()
    over, means = text.split("## Over runs")[1].split("## FID-fashion at equal Inception score, over runs")
    assert f"| IS | {' | '.join(labels)} |" in means
    names = [words.split()[0] for words in labels[0].split(", ")]
    assert f"| {' | '.join(names)} | w | FID-fashion |" in over
    assert [over.count(f"| {k} |\n") for k in (2, 3, 5)] == [len(WEIGHTS), len(WEIGHTS), 0]
    assert "| 0.75 | 4.69 ± 0.71 |" in over  # of 4.19 and 5.19
    assert "| 0.75 | 7.19 ± 1 |" in over  # of 6.19, 7.19 and 8.19


@pytest.mark.usefixtures("words_only")
def test_seeds_are_repetitions_of_one_run_only(tmp_path):
    rows = [replace(row, run=f"r{seed}", seed=seed) for seed in (0, 1) for row in _rows()]
    write_report(rows, {}, tmp_path, title="x", varying=("run", "seed"))
    assert "## Over" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("words_only")
def test_no_mean_is_of_what_a_screen_left_of_the_repetitions(tmp_path):
    screened = [replace(row, n=500, seed=seed) for seed in (0, 1, 2) for row in _rows()]
    whole = [replace(row, n=5000) for row in screened]
    write_report([row for row in whole if row.w > 0.1 or row.seed], {}, tmp_path, title="x", varying=("seed",), screened=screened)
    over = (tmp_path / "table.md").read_text().split("## Over sampling seeds")[1].split("##")[0]
    assert re.findall(r"^\| ([\d.]+) \|.*\| (\d) \|$", over, re.MULTILINE) == [(f"{w:g}", "3") for w in WEIGHTS if w > 0.1]
    assert "What the screen left out of one of them is left out here" in over
    write_report([row for row in whole if row.seed], {}, tmp_path, title="x", varying=("seed",), screened=screened)
    assert "ver sampling seeds" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("words_only")
def test_repetitions_are_compared_at_equal_inception_score_by_their_means(tmp_path):
    rows = [replace(row, run=f"{row.p_uncond}-{k}", fid=row.fid + k, recall=0.5 + 0.1 * k) for row in _paper() for k in (0, 1)]
    write_report(rows, {}, tmp_path, title="x", varying=("run", "p_uncond"))
    text = (tmp_path / "table.md").read_text()
    single, means = text.split("## FID at equal Inception score")[1:]
    assert "| IS | run 0.1-0, p_uncond 0.1 |" in single
    assert means.startswith(", over runs")
    assert "| IS | p_uncond 0.1 | p_uncond 0.2 | p_uncond 0.5 |" in means
    assert "| 80 | **2.62 ± 0.71** | 2.81 ± 0.71 | 3.58 ± 0.71 |" in means  # of 2.12, 2.31, 3.08 and one more each
    over = text.split("## Over runs")[1]
    assert "| 0.1 | 0 | 2.30 ± 0.71 | 53.71 ± 0 |" in over
    assert "| 0.55 ± 0.071 | 2 |" in over


@pytest.mark.usefixtures("words_only")
def test_several_series_show_the_ends_and_the_best_of_each_and_leave_no_picture_of_another_report(tmp_path):
    write_report(_rows(), _grids(), tmp_path, title="x")
    rows = _three()
    grids = {row: np.full((1, 1, 8, 8, 3), (index, 0, 255), np.uint8) for index, row in enumerate(rows)}
    written = write_report(rows, grids, tmp_path, title="x", varying=("run", "p_uncond"))
    pictures = [path.name for path in written if path.name.startswith("samples")]
    assert pictures == ["samples_1.png", "samples_2.png", "samples_3.png"] == sorted(p.name for p in tmp_path.glob("samples*"))
    for number, name in enumerate(pictures):
        pixels = np.asarray(Image.open(tmp_path / name)).reshape(-1, 3)
        shown = {int(red) for red in np.unique(pixels[(pixels[:, 1] == 0) & (pixels[:, 2] == 255)][:, 0])}
        assert shown == {number * len(WEIGHTS) + w for w in (0, WEIGHTS.index(0.75), len(WEIGHTS) - 1)}
    assert (tmp_path / "index.html").read_text().count('alt="samples_') == 3


@pytest.mark.usefixtures("words_only")
def test_the_screen_has_a_table_of_its_own_and_no_table_mixes_n(tmp_path):
    screened = _rows(n=500, fid_std=0.1)
    write_report(_rows()[2:5], {}, tmp_path, title="x", screened=screened)
    text = (tmp_path / "table.md").read_text()
    full, screen = text.split("## The screen: n = 500")
    assert "n = 5000 images" in full
    assert "n = 500 images" in screen
    assert [line.split(" | ")[0] for line in full.splitlines() if re.match(r"\| \d", line)] == ["| 0.3", "| 0.75", "| 1"]
    assert len([line for line in screen.splitlines() if re.match(r"\| \d", line)]) == len(WEIGHTS)
    assert {row.n for row in from_json((tmp_path / "report.json").read_text())} == {5000}
    for name, n, weights in (("report.csv", "5000", WEIGHTS[2:5]), ("screen.csv", "500", WEIGHTS)):
        with open(tmp_path / name, newline="") as file:
            lines = list(csv.DictReader(file))
        assert [float(line["w"]) for line in lines] == weights
        assert {line["n"] for line in lines} == {n}, "no CSV file mixes n either"
    assert "screen.csv" not in [path.name for path in write_report(_rows(), {}, tmp_path, title="x")]
    assert not (tmp_path / "screen.csv").exists(), "of another report"
    with pytest.raises(DataError, match="because n is"):
        write_report([*_rows()[2:5], *screened[:2]], {}, tmp_path, title="x")


@pytest.mark.usefixtures("words_only")
def test_the_csv_holds_every_field_of_every_row(tmp_path):
    rows = _rows()
    write_report(rows, {}, tmp_path, title="x")
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [name for name in Row.__dataclass_fields__ if name != "further"]
    assert [float(line["fid"]) for line in lines] == FIDS
    assert lines[0]["kid"] == ""
    assert lines[0]["reference"] == "a1" * 32


def test_a_series_is_called_by_what_differs_and_defaults_say_nothing(tmp_path: Path) -> None:
    rows = [replace(_rows()[0], steps=steps, options=options) for steps in (8, 16) for options in ("", "spacing=logsnr")]
    write_report(rows, {}, tmp_path, title="t", varying=["steps", "options"])
    best = json.loads((tmp_path / "report.json").read_text())["best"]
    assert [each["series"] for each in best] == ["steps 8", "steps 8, spacing=logsnr", "steps 16", "steps 16, spacing=logsnr"]
    write_report(rows[:2], {}, tmp_path, title="t", varying=["options"])
    best = json.loads((tmp_path / "report.json").read_text())["best"]
    assert [each["series"] for each in best] == ["defaults", "spacing=logsnr"]


def test_networks_of_one_p_uncond_share_a_colour_and_no_two_curves_look_alike():
    repeated = figures._styles([(f"p{p}-s{s}", _rows(p_uncond=p)) for s in (0, 1, 2) for p in (0.1, 0.2, 0.5)])
    assert len(set(repeated)) == 9
    assert [colour for colour, _ in repeated] == list(figures.COLOURS[:3]) * 3
    others = figures._styles([(f"T = {steps}", _rows(steps=steps)) for steps in range(1, 9)])
    assert len(set(others)) == 8
    assert [colour for colour, _ in others[:6]] == list(figures.COLOURS)


NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\\<script>alert(1)</script>",
    "![x](http://example.com/x.png)",
    "[x](javascript:alert(1))",
    '=HYPERLINK("http://example.com")',
    "+1+cmd",
    "@SUM(A1)",
    "-2+3",
    "a|b `c` $d$ $e",
    "two\nlines\r| and | cells",
    "\x1b[31mred\x07",
    "\u202eturned",
    "half \ud800 character",
    "図 🎈 Ä",
    "long " * 100,
    "",
]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(f"{tag} {name}" for name, _ in attrs)]


def _tags(page: str) -> set[str]:
    parser = _Tags()
    parser.feed(page)
    return set(parser.seen)


def _report_of(folder: Path, name: str) -> list[Row]:
    """A report with `name` in each place that takes one: a run, the data set, the classes, the title, others' images, the code."""
    changes = {"dataset": name, "code_version": name}
    rows = [*_rows(run=name, **changes)[:2], *_rows(run="other", **changes)[:2]]
    theirs = [replace(rows[0], run=name or "x", w=0.0)]
    write_report(rows, _grids(rows=rows), folder, title=name, classes=[name, "b", name], varying=("run",), others=theirs)
    return rows


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_and_none_does_anything(tmp_path, name):
    rows = _report_of(tmp_path / "one", name)
    _report_of(tmp_path / "two", "honest")
    page, table = ((tmp_path / "one" / file).read_text() for file in ("index.html", "table.md"))
    assert _tags(page) == _tags((tmp_path / "two" / "index.html").read_text())
    # Markdown is rendered by whoever shows it; none of it may begin what is not text.
    assert re.search(r"(?<!\\)(\\\\)*(<|`|\]\()", table) is None
    assert len(table.splitlines()) == len((tmp_path / "two" / "table.md").read_text().splitlines())
    assert all(ord(c) >= 32 or c == "\n" for c in table + page)
    lines = [next(csv.reader([line])) for line in (tmp_path / "one" / "report.csv").read_text().splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert not any(cell[:1] in ("=", "+", "@") or cell == "-2+3" for line in lines[1:] for cell in line)
    assert from_json((tmp_path / "one" / "report.json").read_text()) == sorted(rows, key=lambda row: (row.run, row.w))


def test_pictures_show_any_name(tmp_path, recwarn):
    rows = [row for name in NAMES for row in _rows(run=name)[:2]]
    grids = _grids(rows=rows[:2])
    write_report(rows, grids, tmp_path, title="x", classes=NAMES[-3:], varying=("run",), others=[replace(rows[0], run=NAMES[9])])
    assert [str(warning.message) for warning in recwarn] == []
    assert Image.open(tmp_path / "frontier.png").size == (1152, 864)  # as large as with short names


# --- without classes ---


def _unscored(**changes: object) -> list[Row]:
    """Rows of an evaluator that knows no classes."""
    found = _rows(extractor="photos-rotations", accuracy=None, **changes)
    return [replace(row, inception_score=None, inception_score_std=None) for row in found]


def test_without_an_inception_score_a_report_has_no_frontier_and_says_why(tmp_path, monkeypatch, recwarn):
    write_report(_rows(), _grids(), tmp_path, title="x")
    rows = _unscored()
    written = write_report(rows, _grids(rows=rows), tmp_path, title="x", others=[replace(rows[0], run="theirs", w=0.0)])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert {path.name for path in written} == {
        *BASE, "samples.png", *(f"samples_w{w:g}.png" for w in WEIGHTS)
    } - {"frontier.png"}  # fmt: skip
    text, page = (tmp_path / "table.md").read_text(), (tmp_path / "index.html").read_text()
    assert text.splitlines()[2] == "| w | FID-photos-rotations ↓ | precision | recall | NFE |"
    said = "photos-rotations tells no classes apart: there is no Inception score, and no curve of FID-photos-rotations over it."
    assert text.count(said) == page.count(said) == 1
    assert from_json((tmp_path / "report.json").read_text()) == rows
    with (tmp_path / "report.csv").open() as file:
        assert [row["inception_score"] for row in csv.DictReader(file)] == [""] * (len(rows) + 1)
    monkeypatch.setattr(figures, "_drawn", lambda figure: figure)
    assert len(figures.curves([("", rows)]).axes) == 2  # type: ignore[attr-defined]
    assert len(figures.curves([("", _rows())]).axes) == 3  # type: ignore[attr-defined]
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.usefixtures("words_only")
def test_without_an_inception_score_series_and_screens_are_told_without_one(tmp_path):
    rows = [row for p in (0.1, 0.5) for row in _unscored(p_uncond=p, run=f"p{p}")]
    write_report(rows, {}, tmp_path, title="x", varying=("run", "p_uncond"), screened=[replace(row, n=500) for row in rows])
    text = (tmp_path / "table.md").read_text()
    assert "at equal Inception score" not in text
    assert "a w is left out where another has a FID-photos-rotations lower by more than both spreads." in text
    seeds = [row for seed in (0, 1) for row in _unscored(seed=seed)]
    write_report(seeds, {}, tmp_path, title="x", varying=("seed",))
    assert "| w | FID-photos-rotations | precision | recall | k |" in (tmp_path / "table.md").read_text()


def test_figure_2_of_the_paper_is_a_png_with_both_rows(tmp_path):
    path = tmp_path / "figure2.png"
    rows = draw_figure_2(path, (0.0, 4.0), images=50, steps=4)
    assert [row.w for row in rows] == [0.0, 4.0]
    pixels = imread(path, format="png")[..., :3]
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 300
    # Each quarter of the drawing holds a panel with dark blue in it.
    middle, centre = pixels.shape[0] // 2, pixels.shape[1] // 2
    for quarter in (pixels[:middle, :centre], pixels[:middle, centre:], pixels[middle:, :centre], pixels[middle:, centre:]):
        assert ((quarter[..., 2] - quarter[..., 0]) > 0.3).sum() > 50
