"""Test the tables of the docs."""

import json
from pathlib import Path

import pytest

from benchmarks.record import RESULTS
from benchmarks.tables import BLOCK, PAGES, render, update


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_are_of_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert len(BLOCK.findall(text)) >= 6
    assert update(text, RESULTS) == text, "python -m benchmarks.tables"


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    name = "sac-bfloat16-cpu-avx512_amx"
    record = json.loads((RESULTS / f"{name}.json").read_text())
    record["rows"][0]["rate"] = 123456.0
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    page = update(f"before\n<!-- table: {name} -->\nold\n<!-- /table -->\nafter", tmp_path)
    assert "| **mopo_fast, bfloat16** | 123,456 |" in page
    assert "| --- | ---: | ---: | ---: | ---: |" in page
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter")


def test_a_table_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        update("<!-- table: gone -->\n<!-- /table -->", tmp_path)


def test_ratios_are_over_rows_at_least_as_precise() -> None:
    record = json.loads((RESULTS / "rollout-bfloat16-cpu-avx512_amx.json").read_text())
    lines = {line.split(" | ")[0]: line for line in render([record]).splitlines()}
    rates = {row["backend"]: row["rate"] for row in record["rows"]}
    ours = [rates[name] for name in ("cpu bfloat16", "cpu bfloat16x3", "cpu")]
    jax = lines["| JAX, one jitted scan, 2000 rows at a time"]
    assert jax.endswith(" | ".join(f"{rate / rates['JAX']:.2f}" for rate in ours) + " |")
    half = lines["| PyTorch, linear layers in bfloat16"]
    assert half.endswith(f"| {ours[0] / rates['PyTorch, bfloat16']:.2f} |  |  |")


def test_a_column_of_names_that_begin_with_numbers_is_not_right_aligned() -> None:
    record = json.loads((RESULTS / "penalty-cpu-avx512_amx.json").read_text())
    assert "| --- | ---: | ---: | ---: | ---: |" in render([record])
