"""The page: nothing from outside, nothing unescaped, every figure explained, small."""

import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from dlcourse.contracts import Claim, Evidence
from dlcourse.reporting import figures, pictures, report, svg
from dlcourse.reporting.run import open_run

EVIL = "<script>alert(1)</script> & $x_\\frac 한"
ENVIRONMENT = {"python": "3.11", "jax": "0", "flax": "0", "devices": "1 cpu", "commit": None}


class Page(HTMLParser):
    """All tags with their attributes, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def drawings():
    """One of each, with a class name that would break a page, a font and a formula."""
    rng = np.random.default_rng(0)
    names = ["zero", "one", EVIL]
    probabilities = rng.dirichlet(np.ones(3), 60)
    labels = rng.integers(0, 3, 60)
    counts = np.bincount(labels * 3 + probabilities.argmax(-1), minlength=9).reshape(3, 3)
    records = [{"step": s, "split": split, "seconds": s,
                "values": {"loss": None if s == 3 else 1 / (1 + s), "accuracy": 0.5, "accuracy_low": 0.4,
                           "accuracy_high": 0.6}}
               for s in range(5) for split in ("train", "validation")]
    taps = ["pixels", EVIL, "logits"]
    ci = [(0.4, 0.6)] * 3
    return {
        "curves": figures.learning_curves(records),
        "confusion": pictures.confusion_matrix(counts, names),
        "predictions": pictures.sample_predictions(
            lambda chosen: rng.random((len(chosen), 200, 150, 3)), labels, probabilities.argmax(-1),
            probabilities.max(-1), names),
        "filters": pictures.filters(rng.normal(size=(3, 3, 1, 5)), rng.normal(size=(3, 3, 1, 5))),
        "colour_filters": pictures.filters(rng.normal(size=(7, 7, 3, 64)), rng.normal(size=(7, 7, 3, 64))),
        "probes": figures.probe_curve(taps, [0.5] * 3, [0.45] * 3, ci, ci),
        "receptive_fields": figures.receptive_fields(taps, [1, 3, 8], [1, 3, 8]),
        "comparison": figures.comparison([EVIL, "pixels"], [0.5, 0.4], ci[:2], ["pixels"], "accuracy", "Ten splits."),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose every text is hostile: its folder and what was drawn."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    config = {"data": {"dataset": f"folder:{EVIL}"}, "run": {"seed": 0}}
    drawn = drawings()
    claims = [Claim("L07a", EVIL, EVIL, False, Evidence(0.5, 0.25, 0.0, (0.1, 0.4), 9), EVIL),
              Claim("L11a", "s", "Nothing could be measured.", False, Evidence(float("nan"), 0, 0, (0, 0), 0), "")]
    with open_run(folder, "classification", config, [f"--dataset=folder:{EVIL}"], tensorboard=False) as run:
        for name, drawing in drawn.items():
            run.figure(name, **drawing)
        run.finish({"test/accuracy": 0.5, f"test/{EVIL}": 0.25}, claims, {"total": 75.0}, ENVIRONMENT,
                   [{"title": EVIL, "header": ["class", EVIL], "rows": [[EVIL, None]], "note": EVIL}])
    return folder, drawn


def test_every_text_is_escaped(finished):
    folder, _ = finished
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and "<script" not in html.lower()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) >= 10, "it must be shown, too"


def test_the_page_loads_nothing(finished):
    folder, _ = finished
    html = (folder / "report.html").read_text()
    links = [value for _, attributes in Page(html).tags for name, value in attributes.items()
             if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_every_figure_is_explained_and_small(finished):
    folder, drawn = finished
    page = Page((folder / "report.html").read_text())
    labels = [attributes.get("aria-label") for _, attributes in page.tags]
    for name, drawing in drawn.items():
        assert drawing["alt"] in labels and drawing["caption"] in page.text
        assert f"How we know: {drawing['how']}" in page.text
        assert (folder / f"figures/{name}.svg").stat().st_size < 600_000
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_figures_are_whole_files_in_the_page_s_ink(finished):
    folder, drawn = finished
    for name in drawn:
        text = (folder / f"figures/{name}.svg").read_text()
        xml.etree.ElementTree.fromstring(text)
        assert "currentColor" in text and svg.INK not in text and svg.ALONE in text
        assert svg.ALONE not in svg.inline(text)


def test_ids_are_unique_to_a_figure(finished):
    """Two figures on one page that share an id would borrow each other's clip paths."""
    folder, drawn = finished
    ids = [set(re.findall(r'\sid="([^"]+)"', (folder / f"figures/{name}.svg").read_text())) for name in drawn]
    assert len(set().union(*ids)) == sum(map(len, ids))
    for name, own in zip(drawn, ids, strict=True):
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', (folder / f"figures/{name}.svg").read_text())
        assert used and set(used) <= own


def test_repeat_command_and_environment_are_on_the_page(finished):
    folder, _ = finished
    text = Page((folder / "report.html").read_text()).text
    assert json.loads((folder / "result.json").read_text())["command"] in text
    assert all(str(value) in text for value in ENVIRONMENT.values())
    assert "0 of 2" in text and "does not hold" in text and "1 min 15 s" in text


def test_figures_beyond_the_room_are_linked(finished, tmp_path, monkeypatch):
    folder, drawn = finished
    sizes = {name: (folder / f"figures/{name}.svg").stat().st_size for name in drawn}
    monkeypatch.setattr(report, "ROOM_FOR_FIGURES", sum(sizes.values()) - 1)
    html = report.render(json.loads((folder / "result.json").read_text()), folder)
    links = [attributes["href"] for tag, attributes in Page(html).tags if tag == "a"]
    assert links == [f"figures/{max(sizes, key=sizes.get)}.svg"]


def test_scale_shows_an_interval_where_it_belongs():
    difference = report.scale({"value": 0.8, "control": 0.6, "ci95": [0.1, 0.3]})
    own = report.scale({"value": 0.8, "control": 0.6, "ci95": [0.7, 0.9]})
    assert difference == own  # 0.6 + [0.1, 0.3] = [0.7, 0.9]
    assert (own["control"], own["value"], own["low"]) == pytest.approx((4, 4 + 92 * 2 / 3, 4 + 92 / 3), abs=0.01)
    assert report.scale({"value": 0.8, "control": 0.6, "ci95": [5, 6]})["width"] is None
    assert report.scale({"value": None, "control": 0.6, "ci95": [5, 6]}) is None


def test_sample_predictions_chooses_by_confidence():
    """Six images whose order is known: rows best, least sure right, most wrong."""
    confidence, predicted = np.array([0.9, 0.6, 0.8, 0.95, 0.7, 0.55]), np.zeros(6, int)
    images = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1) / 8
    labels = np.array([0, 0, 0, 1, 1, 0])  # 3 and 4 are wrong
    drawing = pictures.sample_predictions(images.__getitem__, labels, predicted, confidence, ["a", "b"], columns=2)
    best, worst, wrong = (part.split(": ")[-1] for part in drawing["alt"].rstrip(".").split(". "))
    assert best == "a called a with 90.0 %; a called a with 80.0 %"
    assert worst == "a called a with 55.0 %; a called a with 60.0 %"
    shown = [ax.images[0].get_array().item() * 8 for ax in drawing["fig"].axes]
    assert shown == [0, 2, 5, 1, 3, 4], "each caption stands below its own image"
    assert wrong == "b called a with 95.0 %; b called a with 70.0 %"
    none = pictures.sample_predictions(images.__getitem__, labels[:1], predicted[:1], confidence[:1], ["a", "b"])
    assert "None was wrong" in none["caption"]


def test_filters_share_one_scale_centred_on_zero():
    trained, untrained = np.full((2, 2, 1, 1), 4.0), np.full((2, 2, 1, 1), -1.0)
    drawing = pictures.filters(trained, untrained)
    shown = [ax.images[0] for ax in drawing["fig"].axes if ax.images]
    assert {image.get_clim() for image in shown} == {(0, 1)}
    assert [float(image.get_array().max()) for image in shown] == [1.0, 0.375]  # 4 of 4, and -1 of 4


def test_a_curve_of_a_long_run_stays_small_and_true():
    records = [{"step": s, "split": "train", "values": {"loss": float(s)}} for s in range(50_001)]
    x, y = figures.learning_curves(records)["fig"].axes[0].lines[0].get_data()
    assert len(x) == figures.POINTS and np.allclose(x, y) and np.isclose(np.diff(x).mean(), 125, rtol=0.01)


def test_a_thumbnail_averages():
    image = np.arange(192 * 192, dtype=np.float32).reshape(192, 192, 1) / 192**2
    small = pictures.thumbnail(image)
    assert small.shape == (96, 96, 1) and np.isclose(small[0, 0, 0], image[:2, :2].mean())
    assert pictures.thumbnail(image[:96, :8]).shape == (96, 8, 1)


def test_a_name_is_never_taken_for_a_formula():
    names = ["$\\frac$", "$a_b$"]
    for drawing in (pictures.confusion_matrix(np.eye(2, dtype=int), names),
                    figures.receptive_fields(names, [1, 2], [1, 2])):
        text = svg.from_figure(drawing["fig"], "a")
        assert all(f">{name}</text>" in text for name in names)


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg.from_figure(figures.receptive_fields(["a"], [1], [1])["fig"], "a")
    assert dict(matplotlib.rcParams) == before


def test_black_ink_of_any_figure_becomes_the_page_s():
    fig = Figure()
    fig.subplots().plot([0, 1], [0, 1], color="black")
    text = svg.from_figure(fig, "mine")
    assert svg.INK not in text and "stroke: currentColor" in text and 'fill="currentColor"' in text
