"""The benchmark of switching mechanisms runs on a CPU at tiny sizes, and switches what it says."""

import json
import sys
from pathlib import Path

from lit_eemllm.model import EEMLLM

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_switching


def test_a_tiny_schedule_is_measured_and_reported(tmp_path, monkeypatch, capsys):
    switched, switch = [], EEMLLM.set_mechanism

    def counted(model, mechanism):
        switched.append(str(mechanism.rows))
        switch(model, mechanism)

    monkeypatch.setattr(EEMLLM, "set_mechanism", counted)
    bench_switching.main(
        [
            "--shape",
            "tiny",
            "--layers",
            "2",
            "--documents",
            "1",
            "--steps",
            "10",
            "--rounds",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    row = json.loads((tmp_path / "result.json").read_text())["row"]
    assert (row["layers"], row["tokens"]) == (2, 32) and 0.7 <= row["drawn_reduced"] < 1
    alone = 2 * 10 + 2 * 2 + 2 * 2  # switches by themselves, to warm up, and between kinds of steps
    assert len(switched) == alone + 2 * round(20 * row["drawn_reduced"])
    assert sum("every 4" in rows for rows in switched) == len(switched) / 2
    assert row["switch_ms"] > 0 and 0 < row["switching_share"] < 0.5
    report = (tmp_path / "report.md").read_text()
    assert f"| {row['schedule_ms']:.2f} |" in report and "`every 4`" in report
    assert f"| {row['schedule_ms']:.2f} |" in capsys.readouterr().out
