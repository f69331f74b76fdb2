"""scripts/bench/scaling.py: the counted work of one process grows with their number only where the table says why."""

import json
import runpy
import sys

import pytest

from tests.support.runs import ROOT


@pytest.mark.slow
def test_what_one_process_does_grows_only_where_the_table_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "scripts" / "bench"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--sizes", "1", "4", "16", "--sequences", "64", "--json"])
    runpy.run_path(str(folder / "scaling.py"), run_name="__main__")
    rows = json.loads(capsys.readouterr().out)
    assert {row["per"] for row in rows} == {"step", "second", "checkpoint", "evaluation", "start"}
    for row in rows:
        amounts = [row["processes"][size]["amount"] for size in ("1", "4", "16")]
        if not row["grows"]:
            assert amounts == sorted(amounts, reverse=True), row["what"]
    amounts = {row["what"].split(",")[0]: [each["amount"] for each in row["processes"].values()] for row in rows}
    assert amounts["loader (what this process reads)"] == [each * 513 * 2 for each in (64, 16, 4)]
    assert amounts["its share of the validation data"] == [1 << 14, 1 << 12, 1 << 10]
    assert amounts["memory of the opened store (0.1 MB)"] == [0, 0, 0]
