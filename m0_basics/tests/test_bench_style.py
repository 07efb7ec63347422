"""Figures have one style: a hero, greys, names where lines end, apart from each other."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.tools.bench import Series, line_plot, style
from m0_basics.tools.bench.figures import grouped_bars, headline
from m0_basics.tools.bench.harness import Comparison, ContenderResult
from m0_basics.tools.bench.report import BenchReport

ROOT = Path(__file__).parents[2]
PICTURES = {".png", ".svg", ".gif", ".jpg"}


@pytest.mark.parametrize(("names", "chosen"), [
    (["m0", "m1", "transformers"], {"m1"}), (["m1", "m1-static"], {"m1"}), (["m5, by cost", "m4", "m5, fixed"],
                                                                        {"m5, by cost", "m5, fixed"}),
    (["m0: again", "m1: with a cache"], {"m1: with a cache"}), (["recompute", "swap"], set()), (["m12", "m1"], {"m1"}),
])
def test_who_is_the_hero(names: list[str], chosen: set[str]) -> None:
    assert style.heroes(names) == chosen
    colours = style.colours(names)
    assert sorted(colours) == sorted(names) and len(set(colours.values())) == len(names)
    assert all((colours[name] in style.GREYS) is (name not in chosen) for name in names if chosen)


@given(st.lists(st.floats(-0.5, 1.5), max_size=12), st.floats(0.01, 0.08))
def test_names_do_not_touch(places: list[float], gap: float) -> None:
    moved = style.spread_out(places, gap)
    assert all(b - a >= gap - 1e-9 for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False))
    assert all(x <= 1 + 1e-9 for x in moved)
    for i, x in enumerate(places):
        for j, y in enumerate(places):
            assert not (x < y and moved[i] > moved[j])
    inside = [p for p in places if 0 <= p <= 1]
    if len(inside) == len(places) and all(abs(a - b) >= gap for a, b in zip(sorted(places), sorted(places)[1:],
                                                                            strict=False)):
        assert moved == pytest.approx(places)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (99.94, "99.9"), (3.14159, "3.14"), (0.5, "0.50"),
                                             (0, "0.00"), (0.0479, "0.048"), (0.0000196, "0.000020"),
                                             (-0.07, "-0.070")])
def test_values_are_short(value: float, text: str) -> None:
    assert style.short(value) == text


def test_names_stand_where_lines_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(style, "write", lambda figure, path: drawn.append(figure) or path)
    line_plot({"m0": Series([1, 8], [1, 100]), "m1": Series([1, 8], [1, 99]), "short": Series([1, 2], [1, 50])},
              tmp_path / "x.png", title="T", xlabel="x", ylabel="y", log_x=True, log_y=True)
    [axes] = drawn[0].axes
    assert axes.get_legend() is None and axes.get_title(loc="left") == "T"
    texts = {text.get_text(): text for text in axes.texts}
    assert [texts[name].get_color() for name in ("m0  100", "m1  99.0")] == [style.MUTED, style.HERO]
    assert texts["m0  100"].xy[0] == texts["m1  99.0"].xy[0] == 1.0 and texts["m0  100"].xy[1] > texts["m1  99.0"].xy[1]
    assert texts["short  50.0 at 2"].xy[0] == pytest.approx(1 / 3, abs=0.06)
    grouped_bars({"a": {"m0": 1.0, "m1": 2.0}, "b": {"m1": 3.0}}, tmp_path / "y.png", title="T", ylabel="y", line=1.05,
                 line_name="even")
    [axes] = drawn[1].axes
    assert sorted(t.get_text() for t in axes.texts if t.get_text()) == ["1.00", "2.00", "3.00", "even"]
    assert [t.get_text() for t in axes.texts if t.get_bbox_patch()] == ["1.00"], "what the line would cross out"
    drawn[1].canvas.draw()
    box = axes.get_legend().get_window_extent()
    assert box.y0 >= axes.bbox.y1                                   # above the data, not over it


def test_a_line_without_points_is_left_out(tmp_path: Path) -> None:
    """What a variant has only from some length on may be nothing in a quick run."""
    for series in ({"none": Series([], []), "m1": Series([1, 2], [3, 4])}, {"none": Series([], [])}):
        assert line_plot(series, tmp_path / "a.png", title="t", xlabel="x", ylabel="y", log_y=True).is_file()


def test_a_line_has_another_hero_labels_and_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(style, "write", lambda figure, path: drawn.append(figure) or path)
    line_plot({"ours": Series([1, 2, 3], [9, 4, 5], labels=["a", "b", "c"], level=True), "m3": Series([1, 3], [1, 1])},
              tmp_path / "x.png", title="T", xlabel="x", ylabel="y", hero="ours", unit=None)
    [axes] = drawn[0].axes
    assert [line.get_color() for line in axes.lines] == [style.HERO, style.GREYS[0]]
    assert axes.lines[0].get_drawstyle() == "steps-pre"
    sides = {text.get_text(): text.get_ha() for text in axes.texts}
    assert sides == {"a": "right", "b": "left", "ours: c": "left", "m3": "left"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"], "few points: a tick each"


def test_headlines_say_the_result() -> None:
    def a_comparison(baseline: str, **ratios: float) -> Comparison:
        return Comparison({}, baseline, tuple(
            ContenderResult(name.replace("_", "-"), "", (), (ratio,), 0) for name, ratio in ratios.items()))

    assert headline(a_comparison("m1", m1=1, m2=5.972, m2_async=7, vllm=9), "64 requests") == (
        "64 requests: m2 has 5.97 times m1's throughput")
    assert headline(a_comparison("m0", m0=1, a=2, b=3), "One") == "One: b has 3.00 times m0's throughput"
    assert headline(a_comparison("transformers", transformers=1, m1=0.5), "One") == (
        "One: m1 has 0.50 times transformers' throughput")
    assert headline(a_comparison("m0", m0=1), "One") == "One"


def test_every_picture_is_used_by_a_text() -> None:
    """Each figure of the results is shown or linked, by a document in English and by one in Chinese."""
    figures = {p for folder in ROOT.glob("[mi]*/results") for p in folder.rglob("*") if p.suffix in PICTURES}
    assert len(figures) > 40 and all(any(p.is_relative_to(m) for p in figures) for m in ROOT.glob("m[0-9]_*"))
    for chinese in (False, True):
        used = set().union(*(pictures(page) for page in pages() if page.name.endswith(".zh-CN.md") == chinese))
        assert sorted(str(p.relative_to(ROOT)) for p in figures - used) == []


def test_every_picture_that_is_shown_exists() -> None:
    """In every document, and in the texts of the notebooks."""
    wanted = {(page.name, str(p)) for page in [*pages(), *ROOT.glob("notebooks/*.py")] for p in pictures(page)}
    assert len(wanted) > 80 and [x for x in sorted(wanted) if not Path(x[1]).is_file()] == []


def test_pictures_are_found_in_texts(tmp_path: Path) -> None:
    page = tmp_path / "x.md"
    page.write_text('![a](results/a.png) [b](b.svg) <img src="../c.gif"> [d](https://x.y/d.png) `e.png` '
                    '[f](f.md#g.png)', encoding="utf-8")
    assert pictures(page) == {tmp_path / "results/a.png", tmp_path / "b.svg", (tmp_path / "../c.gif").resolve()}


def pages() -> list[Path]:
    return sorted(p for folder in (ROOT, *ROOT.glob("m[0-9]_*"), ROOT / "interview") for p in folder.glob("*.md"))


def pictures(page: Path) -> set[Path]:
    """The pictures that a page shows or links, but for those of other sites."""
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in map("".join, links)
            if Path(link).suffix in PICTURES and "://" not in link and "#" not in link}


def test_saved_results_can_be_drawn_again(tmp_path: Path) -> None:
    """`bench --redraw`: the first milestone's, from its JSON."""
    from m0_basics.benchmark import draw
    report = BenchReport.load(ROOT / "m0_basics/results/bench.json")
    draw(report, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(
        p.name for p in (ROOT / "m0_basics/results").glob("*.png"))


def test_names_and_values_of_labelled_lines() -> None:
    figure, axes = style.new_figure()
    axes.plot([0, 4], [1, 20], color=style.HERO, label="up")
    axes.plot([0, 1], [5, 2], color=style.GREY, label="short")
    axes.plot([0, 4], [3, 3], color=style.GREY)
    axes.axhline(10, color=style.INK, label="level")
    style.name_lines(axes, "{:.1f}")
    texts = {text.get_text(): text for text in axes.texts}
    assert {name: text.get_color() for name, text in texts.items()} == {
        "up 20.0": style.HERO, "short 2.0": style.MUTED, "level 10.0": style.INK}
    assert texts["up 20.0"].xy[0] == texts["level 10.0"].xy[0] == 1.0, "to the right of the axes"
    assert texts["up 20.0"].xy[1] > texts["level 10.0"].xy[1]
    assert texts["short 2.0"].xy[0] < 0.5
    style.names_above(axes, {"pale": style.FAINT, "dark": style.HERO})
    figure.canvas.draw()
    assert [text.get_color() for text in axes.get_legend().get_texts()] == [style.INK, style.HERO]
    assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


def test_notebooks_draw_in_the_same_style() -> None:
    import matplotlib
    with matplotlib.rc_context():
        style.for_notebooks()
        assert matplotlib.rcParams["axes.titlelocation"] == "left"
        assert matplotlib.rcParams["text.color"] == style.INK and not matplotlib.rcParams["axes.spines.top"]
