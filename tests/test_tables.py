"""Tables of a run go straight into pandas, Polars and DuckDB."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

import tensorstore_fmt as tsf


@pytest.fixture
def run(tmp_path: Path) -> tsf.Run:
    with tsf.create_run(tmp_path / "run") as writer:
        for step in range(20):
            writer.log(
                {"loss": 1 / (step + 1), "w": np.full((30, 30), float(step)), "note": f"at {step}"},
                step=step,
                mode="TRAIN",
            )
    return tsf.open_run(tmp_path / "run")


@pytest.mark.parametrize("table", ["scalars", "statistics", "table"])
def test_columns_are_the_same_everywhere(run: tsf.Run, table: str) -> None:
    arrow = getattr(run, table)()
    assert hasattr(arrow, "__arrow_c_stream__")
    names = arrow.column_names
    assert arrow.num_rows > 0
    assert list(arrow.to_pandas().columns) == names
    frame = pl.DataFrame(arrow)
    assert frame.columns == names
    assert frame.height == arrow.num_rows
    with duckdb.connect() as connection:
        found = connection.sql("select count(*) from arrow").fetchall()
    assert found == [(arrow.num_rows,)]


def test_a_loss_curve_in_each(run: tsf.Run) -> None:
    expected = [1 / (step + 1) for step in range(20)]
    scalars = run.scalars(["loss"])
    assert scalars.to_pandas()["value"].tolist() == expected
    assert pl.DataFrame(scalars)["value"].to_list() == expected
    with duckdb.connect() as connection:
        query = "select value from scalars order by step"
        assert [row[0] for row in connection.sql(query).fetchall()] == expected
    assert isinstance(pd.DataFrame(scalars.to_pandas()), pd.DataFrame)


def test_statistics_need_no_tensor(run: tsf.Run) -> None:
    table = run.statistics(["w"]).to_pandas()
    assert table["mean"].tolist() == [float(step) for step in range(20)]
    assert (table["count"] == 900).all()
