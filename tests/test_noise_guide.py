"""docs/NOISE.md says what the code does, and its figures can be drawn."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_json
from matplotlib import pyplot as plt

from experiments import noise_figures
from experiments.checks.noise_laws import expected_cosine, expected_norm_change, expected_ratio, recommended_settings
from experiments.noise.settings import SweepConfig
from noise import DECAY, MOMENTUM, NOISES, OVERWHELMING_SNR, SCHEDULES, noise_types

FIGURES = {"noise_ratio.png", "noise_vectors.png", "noise_schedules.png"}
GUIDE = (ROOT / "docs/NOISE.md").read_text(encoding="utf-8")


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    section = GUIDE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = re.search(r"(?:^\|.*\|\n)+", section, re.M)
    assert lines
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_recommended_scales_are_those_of_the_code():
    found = {}
    for cells in table_rows("Recommended scales"):
        noise_type, _, direction = cells[0].partition(" ")
        found[noise_type, direction or None] = tuple(float(scale) for scale in cells[-1].split(","))
    assert found == {(row.noise_type, row.direction): row.scales for row in NOISES.values()}


def test_every_type_is_explained():
    assert {cells[0].split()[0].strip("`") for cells in table_rows("The types")} == set(noise_types())
    assert [cells[0] for cells in table_rows("Schedules")] == list(SCHEDULES)
    assert f"λ = {DECAY}" in GUIDE
    assert f"{MOMENTUM} m" in GUIDE
    assert f"{1 / OVERWHELMING_SNR:g} times" in GUIDE


def test_keys_in_the_guide_exist():
    keys = re.findall(r"\b([a-z_]+)=", " ".join(re.findall(r"^    python.*$", GUIDE, re.M)))
    assert len(keys) > 10
    assert set(keys) <= SweepConfig.model_fields.keys()


def test_links_in_the_guide_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", GUIDE)
    assert "RESULTS.md" in links
    for link in links:
        assert link.startswith("https://") or (ROOT / "docs" / link).is_file(), link
    for name in FIGURES:
        assert f"../assets/{name}" in links
        assert (ROOT / "assets" / name).stat().st_size < 150_000


# --- figures ---


def made_up_result() -> dict[str, Any]:
    """Of thoughts of norm 4 in 16 dimensions, with exactly what the formulas give."""
    rows = []
    for setting in recommended_settings():
        ratio = float(expected_ratio(setting, 1 / 16, 16))
        cosine = float(expected_cosine(setting, ratio))
        row = {**setting._asdict(), "name": setting.name, "ratio": ratio, "cosine": cosine}
        rows.append(row | {"norm_change": float(expected_norm_change(setting, ratio))})
    spread = {"count": 100, "mean": 4.0, "deviation": 0.0}
    return {"norms": {"mean_inverse_square": 1 / 16, "width": 16, "all": spread}, "float32": {"settings": rows}}


def test_the_command_draws_all_figures(tmp_path: Path, monkeypatch: Any):
    result = write_json(tmp_path / "noise_check.json", made_up_result())
    monkeypatch.setattr(sys, "argv", ["noise_figures", str(result), str(tmp_path / "out")])
    noise_figures.main()
    drawn = {path.name: plt.imread(path) for path in (tmp_path / "out").iterdir()}
    assert drawn.keys() == FIGURES
    assert all(image.std() > 0.02 for image in drawn.values())


def test_points_lie_on_the_lines(tmp_path: Path):
    figure = noise_figures.ratio_figure(made_up_result(), tmp_path / "ratio.png")
    for axes in figure.axes:
        lines, points = axes.lines[::2], axes.lines[1::2]
        assert len(lines) == len(points) == 8
        for line, marks in zip(lines, points, strict=True):
            order = np.argsort(line.get_xdata())
            expected = np.interp(marks.get_xdata(), line.get_xdata()[order], line.get_ydata()[order])
            drawn = ~np.isnan(expected)  # where nothing is left of a thought there is no cosine
            assert drawn.sum() >= 4
            np.testing.assert_allclose(np.array(marks.get_ydata())[drawn], expected[drawn], rtol=0.02, atol=0.01)


def test_the_schedules_that_are_drawn(tmp_path: Path):
    left, right = noise_figures.schedule_figure(tmp_path / "schedules.png").axes
    drawn = {line.get_label(): line.get_ydata() for line in left.lines}
    assert drawn["linear"] == pytest.approx([1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert list(drawn["none"]) == [1, 0, 0, 0, 0, 0, 0, 0]
    adaptive = right.lines[-1].get_ydata()
    assert adaptive[:3] == pytest.approx([1, 1, np.exp(-0.5) * 14 / (0.9 * 10 + 0.1 * 14)])


def test_vectors_go_where_they_should(tmp_path: Path):
    figure = noise_figures.vector_figure(tmp_path / "vectors.png")
    points = {axes.get_title().split(",")[0]: np.array(axes.lines[0].get_xydata()) for axes in figure.axes}
    h = np.array(noise_figures.VECTOR)
    np.testing.assert_allclose(points["targeted opposite"], np.tile(h / 2, (noise_figures.DRAWS, 1)), rtol=1e-6)
    np.testing.assert_allclose((points["orthogonal"] - h) @ h, 0, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(points["snr"] - h, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("content", ["[]", "{}", "not json", json.dumps({"norms": {}, "float32": {"settings": []}})])
def test_refuses_another_file(content, tmp_path: Path, monkeypatch: Any, capsys: Any):
    path = tmp_path / "other.json"
    path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["noise_figures", str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        noise_figures.main()
    assert stop.value.code == 2
    assert re.search(r"other.json: (not what|damaged or of another version)", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
