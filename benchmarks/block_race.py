"""One D2 block in one mode and precision, timed in all its forms, and the table such races fill.

A race is written to the table as soon as it has ended, so that a run can be interrupted.
"""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.block_forms import BlockShape, Call, forms_of, precision
from benchmarks.forms import LAYOUTS, OURS
from benchmarks.timing import Sgemm, time_in_turns
from d3net_kernels import d2_block, reference

PER_LAYER_FORMS = {OURS: d2_block, "gather": reference.d2_block}
Key = tuple[str, str]  # form, layout


@dataclass(frozen=True)
class Entrant:
    """One form in one layout.

    median_ms, p20_ms, p80_ms: of so many `samples`. ratio: the median of the race's best torch form
    over this one's; low and high are the quartiles of the ratios within the rounds, for those that
    raced to the end. kept_bytes: for the backward pass of a training step; kept_per_layer: the same
    with norm="per_layer", where that form exists.
    """

    form: str
    layout: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio: float
    low: float | None
    high: float | None
    kept_bytes: int | None
    kept_per_layer: int | None

    def __str__(self) -> str:
        return f"{self.form}, {self.layout}"


@dataclass(frozen=True)
class Race:
    """sgemm_gflops: of the yardstick after the race, which tells how free the machine was."""

    shape: BlockShape
    mode: str
    precision: str
    sgemm_gflops: float
    entrants: tuple[Entrant, ...]

    @property
    def name(self) -> tuple[str, str, str]:
        return str(self.shape), self.mode, self.precision

    def ours(self) -> Entrant:
        """Ours in its faster layout."""
        return self._best(ours=True)

    def torch(self) -> Entrant:
        """The fastest torch form."""
        return self._best(ours=False)

    def _best(self, *, ours: bool) -> Entrant:
        """Of those that raced to the end: one that dropped out has a sample that may be a fluke."""
        team = [e for e in self.entrants if (e.form == OURS) == ours]
        most = max(e.samples for e in team)
        return min((e for e in team if e.samples == most), key=lambda e: e.median_ms)

    def ratio(self) -> float:
        return self.ours().ratio

    def gigaflops(self) -> float:
        passes = 3 if self.mode == "train" else 1
        return 1e-6 * passes * self.shape.flops / self.ours().median_ms

    def kept_ratio(self, norm: str = "per_source") -> float | None:
        """Bytes of the torch form that keeps least over those of ours that keeps least."""
        least: dict[bool, int] = {}
        for e in self.entrants:
            size = e.kept_bytes if norm == "per_source" else e.kept_per_layer
            if size is not None:
                ours = e.form == OURS
                least[ours] = min(size, least.get(ours, size))
        return least[False] / least[True] if least else None

    def line(self) -> str:
        ours, torch, kept = self.ours(), self.torch(), self.kept_ratio()
        return (
            f"{self.shape!s:22} {self.mode:5} {self.precision:7}"
            f" {ours.median_ms:9.3f} {ours.layout:13} {torch.median_ms:10.3f} {torch!s:35}"
            f" {ours.ratio:5.2f}x [{ours.low or 0:5.2f} {ours.high or 0:5.2f}] {ours.samples:3}"
            f" {self.gigaflops():6.0f} {self.sgemm_gflops:6.0f}"
            f" {'' if kept is None else f'{kept:5.2f}x'}"
        )


HEADER = (
    f"{'block':22} {'mode':5} {'prec.':7} {'ours ms':>9} {'layout':13} {'torch ms':>10}"
    f" {'best form':35} {'ratio':>6} {'[quartiles]':13} {'n':>3} {'GF/s':>6} {'sgemm':>6} kept"
)


def race(
    shape: BlockShape,
    mode: str,
    name: str,
    sgemm: Sgemm,
    *,
    fewest_rounds: int,
    seconds: float,
    compiled: bool = False,
) -> Race:
    """Times one block in one mode and precision."""
    forms = forms_of(mode, compiled=compiled)
    calls = {layout: Call.random(shape, mode, layout) for layout in LAYOUTS}
    with precision(name):
        prepared = {
            (form, layout): calls[layout].prepared(forms[form])
            for layout in LAYOUTS
            for form in forms
        }
        samples = time_in_turns(
            {key: p.call for key, p in prepared.items()},
            team,
            fewest_rounds=fewest_rounds,
            seconds=seconds,
        )
    kept = {key: p.kept_bytes for key, p in prepared.items()}
    per_layer = _kept_per_layer(shape) if mode == "train" else {}
    return Race(shape, mode, name, sgemm.sample(), entrants(samples, kept, per_layer))


def team(key: Key) -> Hashable:
    return key[0] == OURS


def entrants(
    samples: Mapping[Key, Sequence[float]],
    kept: Mapping[Key, int | None],
    per_layer: Mapping[Key, int],
) -> tuple[Entrant, ...]:
    """What there is to say about these samples, in seconds."""
    most = max(len(s) for key, s in samples.items() if key[0] != OURS)
    raced = [key for key, s in samples.items() if key[0] != OURS and len(s) == most]
    best = min(raced, key=lambda key: statistics.median(samples[key]))
    result = []
    for key, own in samples.items():
        low = high = None
        if len(own) == most:
            pairs = zip(samples[best], own, strict=True)
            low, high = map(float, np.quantile([t / o for t, o in pairs], (0.25, 0.75)))
        result.append(
            Entrant(
                *key,
                median_ms=1e3 * statistics.median(own),
                p20_ms=1e3 * float(np.quantile(own, 0.2)),
                p80_ms=1e3 * float(np.quantile(own, 0.8)),
                samples=len(own),
                ratio=statistics.median(samples[best]) / statistics.median(own),
                low=low,
                high=high,
                kept_bytes=kept.get(key),
                kept_per_layer=per_layer.get(key),
            )
        )
    return tuple(result)


def _kept_per_layer(shape: BlockShape) -> dict[Key, int]:
    """What norm="per_layer" keeps for backward; it has no source-wise form."""
    kept = {}
    for layout in LAYOUTS:
        call = Call.random(shape, "train", layout, "per_layer")
        for name, form in PER_LAYER_FORMS.items():
            kept[name, layout] = call.kept(form)[1]
    return kept


_SHAPE = tuple(field.name for field in fields(BlockShape))
_ENTRANT = tuple(field.name for field in fields(Entrant))
COLUMNS = ("mode", "precision", *_SHAPE, "sgemm_gflops", *_ENTRANT)


def append_csv(path: Path, race: Race) -> None:
    """One row for each form and layout, below a header; written at once."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(COLUMNS)
    for entrant in race.entrants:
        shape = (*astuple(race.shape)[:-1], " ".join(race.shape.networks))
        values = (race.mode, race.precision, *shape, race.sgemm_gflops, *astuple(entrant))
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in values])
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def read_csv(path: Path) -> list[Race]:
    """The races of a table. One that was being written as the run was killed is left out.

    Raises:
        ValueError: it has other columns.
    """
    whole_lines = path.read_text().rpartition("\n")[0].split("\n")
    reader = csv.DictReader(whole_lines)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes; use another name")
    races = []
    of_race = COLUMNS[: -len(_ENTRANT)]
    for _, rows in itertools.groupby(reader, key=lambda row: [row[name] for name in of_race]):
        races.append(_race_of(list(rows)))
    return [race for race in races if _is_complete(race)]


def _race_of(rows: Sequence[Mapping[str, str]]) -> Race:
    def shape_field(name: str) -> object:
        text = rows[0][name]
        return tuple(text.split()) if name == "networks" else int(text)

    def entrant_field(name: str, text: str) -> object:
        if name in ("form", "layout"):
            return text
        if text == "":
            return None
        return int(text) if name in ("samples", "kept_bytes", "kept_per_layer") else float(text)

    shape: Any = [shape_field(name) for name in _SHAPE]
    found: Any = [[entrant_field(name, row[name]) for name in _ENTRANT] for row in rows]
    return Race(
        BlockShape(*shape),
        rows[0]["mode"],
        rows[0]["precision"],
        float(rows[0]["sgemm_gflops"]),
        tuple(Entrant(*values) for values in found),
    )


def _is_complete(race: Race) -> bool:
    wanted = set(itertools.product(forms_of(race.mode), LAYOUTS))
    return wanted <= {(e.form, e.layout) for e in race.entrants}
