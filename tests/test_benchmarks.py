"""The benchmarks' own arithmetic, and a short form of each command: what is compared must compute
the same, and a run that was interrupted must lose nothing."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import block_grid
import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install 'd3net-kernels[bench]'")

import d3net
import d3net_kernels as dk
from benchmarks import blocks, curves, layers, nets, records, threads, timing
from benchmarks.block_forms import BlockShape, computed_by, forms_of, load_blocks
from benchmarks.block_race import Race, append_csv, entrants, read_csv
from benchmarks.block_report import SELECTED, targets
from benchmarks.forms import OURS
from benchmarks.records import Verdict

SHAPE = BlockShape(5, 3, 3, 2, 9, 11, ("d3net_s", "d3net_l"))
KEYS = [("ours", "NCHW"), ("ours", "channels_last")] + [
    (form, layout)
    for form in ("gather", "source-wise", "source-wise in place")
    for layout in ("NCHW", "channels_last")
]
BRIEF = ["--rounds", "1", "--seconds", "0"]
SMALLEST = ["--only", "2+1x2 64x336", "--eval", "--precision", "high", *BRIEF]


def a_race(mode: str = "eval", precision: str = "high", shape: BlockShape = SHAPE) -> Race:
    """Ours 3 times as fast as torch in its best form, one form with a single, lucky sample."""
    samples = {key: [12.0, 12.0] for key in KEYS if key[0] in forms_of(mode)}
    samples["ours", "channels_last"] = [2.0, 1.0, 2.0]
    samples["gather", "NCHW"] = [6.0, 4.0, 6.0]
    samples["source-wise", "NCHW"] = [5.0]
    kept = {key: 100 if key[0] == OURS else 300 for key in samples}
    per_layer = {key: 10 if key[0] == OURS else 90 for key in samples if key[0] in (OURS, "gather")}
    trains = mode == "train"
    found = entrants(samples, kept if trains else {}, per_layer if trains else {})
    return Race(shape, mode, precision, 123.0, found)


# What is compared


@pytest.mark.parametrize(
    ("mode", "form"), [(mode, form) for mode in ("eval", "train") for form in forms_of(mode)]
)
def test_forms_of_a_block_are_right(mode: str, form: str, generator: torch.Generator) -> None:
    needs = block_grid.ALL if mode == "train" else ()
    case = block_grid.Case(
        "form", layers=4, size=(2, 9, 17), out_layers=2, mode=mode, dtype=torch.float64, needs=needs
    )
    block = case.block(generator)
    results_of_form = block_grid.results_of(forms_of(mode)[form], block)
    block_grid.assert_right(block, results_of_form)


def test_a_network_is_computed_by_the_form_that_is_named() -> None:
    model = d3net.create_model("d3net_s", growth_rate=8).double().eval()
    x = torch.rand(1, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    for name, form in forms_of("eval").items():
        calls = []

        def noted(*args: Any, form: Any = form, calls: list[int] = calls, **kw: Any) -> Any:
            calls.append(1)
            return form(*args, **kw)

        with torch.no_grad(), computed_by(noted):
            outs = model(x)
        assert len(calls) == sum(isinstance(m, dk.D2Block) for m in model.modules()), name
        for out, want in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_selected_blocks_exist() -> None:
    names = {str(shape) for shape in load_blocks()}
    assert len(names) == len(load_blocks()) == 53
    assert set(SELECTED) | set(threads.BLOCKS) <= names


# Timing


def test_calls_far_behind_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"best": 1.0, "close": 1.2, "behind": 1.4, "hopeless": 1.6, "other team": 50.0}
    calls = {name: lambda name=name: name for name in seconds}
    monkeypatch.setattr(timing, "seconds_of", lambda call, times: seconds[call()])

    def team(name: str) -> Hashable:
        return name == "other team"

    samples = timing.time_in_turns(calls, team, fewest_rounds=4, seconds=0)
    assert {name: len(taken) for name, taken in samples.items()} == {
        "best": 4,
        "close": 4,
        "behind": 1,
        "hopeless": 1,
        "other team": 4,
    }


def test_first_sample_is_discarded_unless_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = {"a": iter([5.0, 1.0, 1.0]), "b": iter([50.0])}
    calls = {name: lambda name=name: name for name in taken}
    monkeypatch.setattr(timing, "seconds_of", lambda call, times: next(taken[call()]))
    samples = timing.time_in_turns(calls, lambda name: 0, fewest_rounds=2, seconds=0)
    assert samples == {"a": [1.0, 1.0], "b": [50.0]}


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


# Races and their table


def test_ratio_is_of_medians_of_those_that_raced_to_the_end() -> None:
    race = a_race()
    assert str(race.ours()) == "ours, channels_last"
    assert str(race.torch()) == "gather, NCHW"
    assert race.ratio() == 3
    assert (race.ours().low, race.ours().high) == (3, 3.5)  # of 3, 4, 3
    assert race.kept_ratio() is None
    assert a_race("train").kept_ratio() == 3
    assert a_race("train").kept_ratio("per_layer") == 9


def test_table_holds_races(tmp_path: Path) -> None:
    races = [a_race(), a_race("train")]
    for race in races:
        append_csv(tmp_path / "table.csv", race)
    assert read_csv(tmp_path / "table.csv") == races


@pytest.mark.parametrize("lost", [1, 40, 400])
def test_race_that_was_being_written_is_left_out(tmp_path: Path, lost: int) -> None:
    table = tmp_path / "table.csv"
    for race in (a_race(), a_race("train")):
        append_csv(table, race)
    table.write_text(table.read_text()[:-lost])
    assert read_csv(table) == [a_race()]


def test_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        read_csv(tmp_path / "table.csv")


def test_targets() -> None:
    selected = BlockShape(144, 36, 4, 4, 128, 256)
    races = [
        *(a_race(precision=name) for name in ("highest", "high", "bf16")),
        a_race(shape=selected),
        a_race("train"),
    ]
    verdicts = {verdict.what: (verdict.measured, verdict.met) for verdict in targets(races)}
    assert verdicts == {
        'eval, "high", geometric mean': (pytest.approx(3), True),
        'eval, "high", worst block': (3, True),
        'eval, "highest", geometric mean': (pytest.approx(3), True),
        'eval, "highest", worst block': (3, True),
        'eval, "high", S stage 1': (3, False),
        'train, "high", geometric mean': (pytest.approx(3), True),
        'train, "high", worst block': (3, True),
        "eval, bf16 autocast, best torch in float32 / ours, geometric mean": (
            pytest.approx(3),
            False,
        ),
        "eval, bf16 autocast, torch's bf16 / ours, worst block": (3, True),
        "kept for backward, per_source, least of torch / ours, geometric mean": (
            pytest.approx(3),
            False,
        ),
        "kept for backward, per_source, least of torch / ours, worst block": (3, False),
        "kept for backward, per_layer, least of torch / ours, geometric mean": (
            pytest.approx(9),
            True,
        ),
        "kept for backward, per_layer, least of torch / ours, worst block": (9, True),
    }


def test_verdicts_in_both_directions() -> None:
    assert Verdict("ratio", 2, 2.0).met
    assert not Verdict("ratio", 2, 1.99).met
    assert Verdict("time", 30, 30, "us", at_most=True).met
    assert not Verdict("time", 30, 30.1, "us", at_most=True).met
    assert not Verdict("nothing measured", 2, math.nan).met


# The commands


def test_blocks_resume_where_they_were_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> Race:
        raise KeyboardInterrupt

    out = ["--out", str(tmp_path)]
    two = ["--only", "64x336", *SMALLEST[2:]]
    original = blocks.race
    ran: list[str] = []

    def race_once(shape: BlockShape, *args: Any, **options: Any) -> Race:
        if ran:
            raise KeyboardInterrupt
        ran.append(str(shape))
        return original(shape, *args, **options)

    both = [*two, "--precision", "high", "--train"]  # eval and train of one block
    monkeypatch.setattr(blocks, "race", race_once)
    with pytest.raises(KeyboardInterrupt):
        blocks.main([*both, *out])
    (table,) = tmp_path.glob("*.csv")
    first = table.read_text()
    assert [race.mode for race in read_csv(table)] == ["eval"]

    monkeypatch.setattr(blocks, "race", original)
    blocks.main([*both, "--resume", str(table)])
    assert table.read_text().startswith(first)
    assert [race.mode for race in read_csv(table)] == ["eval", "train"]

    complete = table.read_text()
    monkeypatch.setattr(blocks, "race", interrupt)  # nothing is left to run
    blocks.main([*both, "--resume", str(table)])
    assert table.read_text() == complete
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".md", ".png"}


def test_blocks_resume_under_the_same_conditions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks.main([*SMALLEST, "--out", str(tmp_path)])
    (table,) = tmp_path.glob("*.csv")
    notes = json.loads(table.with_suffix(".json").read_text())
    other = {**records.conditions(), "machine": "another one"}
    for module in (blocks, records):
        monkeypatch.setattr(module, "conditions", lambda: other)
    with pytest.raises(SystemExit, match="cannot resume"):
        blocks.main(["--resume", str(table)])
    blocks.main(["--resume", str(table), "--report"])  # reads only
    assert json.loads(table.with_suffix(".json").read_text())["machine"] == notes["machine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no block has 'nothing'"),
        (["--report"], "--report needs the table"),
        (["--resume", "missing.csv"], "there is no missing.csv"),
        (["--resume", "missing.csv", "--save", "name"], "leave out --save"),
    ],
)
def test_bad_arguments_of_blocks(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        blocks.main(arguments)
    assert message in capsys.readouterr().err


def test_benchmarks_need_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records._binary, "missing", "there is no compiled binary")
    for main in (blocks.main, curves.main, layers.main, nets.main, threads.main):
        with pytest.raises(SystemExit):
            main([])
        assert "error: there is no compiled binary" in capsys.readouterr().err


def test_benchmarks_saved_under_one_name_keep_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    parser = argparse.ArgumentParser()
    records.add_output_options(parser)
    stems = [records.stem_of(k, parser.parse_args(["--save", "name"])) for k in ("blocks", "nets")]
    assert stems == [tmp_path / "results/name-blocks", tmp_path / "results/name-nets"]
    assert stems[0].parent.is_dir()


def test_curves(tmp_path: Path) -> None:
    curves.main(["--steps", "2", "--out", str(tmp_path)])
    (picture,) = tmp_path.glob("*.png")
    losses = json.loads(picture.with_suffix(".json").read_text())["losses"]
    assert [len(values) for values in losses.values()] == [2, 2, 2, 2]
    first = [values[0] for values in losses.values()]
    assert max(first) - min(first) <= 1e-5 * min(first)
    assert all(values[1] < values[0] for values in losses.values())


def test_networks_in_eval(tmp_path: Path) -> None:
    nets.main(["--quick", "--only", "s_fcn", "--eval", "--rounds", "2", "--out", str(tmp_path)])
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["form"] for row in rows} == set(forms_of("eval"))
    assert {row["precision"] for row in rows if row["form"] == OURS} == {"highest", "high"}
    assert "d3net_s_fcn" in json.loads(table.with_suffix(".json").read_text())["summary"][0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_memory_is_that_of_the_process_alone() -> None:
    big = torch.ones(1 << 28)  # one GiB in this process
    task = nets.Task("d3net_s_fcn", nets.SMALL["d3net_s_fcn"], "train", OURS, "NCHW", "high")
    figures = nets.memory_apart(task)
    assert nets.peak_mib() > 1024
    assert figures.before_mib is not None
    assert figures.peak_mib is not None
    assert figures.before_mib < nets.peak_mib() - big.nbytes / 2**20 / 2
    assert figures.peak_mib > figures.before_mib


def test_seconds_by_threads() -> None:
    seen = set()
    with timing.threads(2):
        seconds = threads.seconds_by_threads(lambda: seen.add(torch.get_num_threads()), rounds=1)
    assert set(seconds) == seen == {1, 2}


def test_host_microseconds() -> None:
    for times in threads.host_microseconds("eval").values():
        assert set(times) == set(forms_of("eval"))
        assert min(times.values()) > 0


@pytest.mark.slow
def test_threads(tmp_path: Path) -> None:
    with timing.threads(2):
        threads.main(["--only", "16x32", "--rounds", "1", "--out", str(tmp_path)])
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(row["mode"], row["threads"]) for row in rows] == [
        (mode, number) for mode in ("eval", "train") for number in ("1", "2")
    ]
