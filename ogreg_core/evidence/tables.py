"""A study's report as Markdown, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ogreg_core.evidence.comparison import (
    LEAST_SEEDS,
    MARGIN_POINTS,
    SIGNIFICANT,
    Cell,
    Difference,
    Verdict,
)
from ogreg_core.evidence.study import Row, clips_per_epoch
from ogreg_core.evidence.summary import DataFacts, Summary, Tuned
from ogreg_core.profile_picture_parts import digits, short
from ogreg_core.run_records import thousands

__all__ = ["TerminalTable", "markdown", "terminal_tables"]

_MISSING = "-"
_MARKS = "abcdefghijklmnopqrstuvwxyz"
_HASH_DIGITS = 12
_BLIND = "chosen by held-out videos of which it was right no more often than chance"
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "nesterov": "SGD with Nesterov's momentum"}
_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\|*`<$_~["})
# What a terminal of 100 columns has room for.
_TERMINAL = ("model", "GMACs", "top-1 [95 %]", "difference [95 %]", "p")
_CONTROLS = {
    "shuffled": "frames in random order",
    "reversed": "frames in reverse order",
    "middle": "the middle frame alone",
    "half": "half as many frames of the same span",
    "double": "twice as many frames of the same span",
    "irregular": "frames at irregular distances",
}
_NAME_COLUMNS = 21
_WORDS_COLUMNS = 70


@dataclass(frozen=True)
class TerminalTable:
    """A table of at most 100 columns, as :func:`ogreg_cli.console.print_table` takes it.

    Args:
        title: above.
        header: names of the columns.
        rows: cells as text.
        right: columns aligned right.
        notes: lines below, which say why cells are empty.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A text of a table, and why there is none or less than asked for."""

    text: str
    note: str = ""


def markdown(summary: Summary, command: str, picture: str = "") -> str:
    """The whole report.

    Args:
        summary: what was found.
        command: that makes the report again, as printed.
        picture: link to it, as seen from the report; empty: none.
    """
    parts = [f"## {_escape(summary.study.title)}"]
    if picture:
        parts.append(f"![top-1 against multiply-adds, a dot for each model]({picture})")
    for facts in summary.data:
        parts += [f"### {_escape(facts.name)}", _caption(summary, facts), *_results(summary, facts)]
    parts += [_legend(summary), *_verdicts(summary), *_failures(summary), *_tuning(summary)]
    parts += ["### The command that makes this again", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def terminal_tables(summary: Summary) -> list[TerminalTable]:
    """The figures that matter most: a table for each data set, and one of the verdicts."""
    tables = []
    # One control fits beside the rest.
    columns = (*_TERMINAL, *summary.study.controls[:1])
    for facts in summary.data:
        rows = []
        concerned: dict[str, list[str]] = {}
        for row in summary.study.rows:
            cells = _entries(summary, row, facts)
            cells["model"] = _Entry(short(row.name, _NAME_COLUMNS))
            rows.append(tuple(cells[name].text for name in columns))
            for reason in dict.fromkeys(cells[name].note for name in columns if cells[name].note):
                concerned.setdefault(reason, []).append(row.name)
        notes = [f"{_list(names)}: {reason}" for reason, names in concerned.items()]
        title = f"{facts.name}: top-1 in %, difference to {short(summary.study.reference)}"
        right = tuple(range(1, len(columns)))
        # Titles do not reach a pipe, nor may two tables look the same there.
        header = (short(facts.name, _NAME_COLUMNS), *columns[1:])
        tables.append(TerminalTable(title, header, tuple(rows), right, tuple(notes)))
    return [
        *tables,
        *(_terminal_verdicts(summary, *group) for group in _comparisons(summary).items()),
    ]


def _terminal_verdicts(
    summary: Summary, about: tuple[str, str], verdicts: Sequence[Verdict]
) -> TerminalTable:
    against, control = about
    header = ("model", f"against {short(against)}{_shown(control)}")
    rows = [
        (short(verdict.row, _NAME_COLUMNS), short(_verdict_words(verdict), _WORDS_COLUMNS))
        for verdict in verdicts
    ]
    title = f"verdicts over {_counted(summary.data, 'data set')}"
    return TerminalTable(title, header, tuple(rows), ())


def _comparisons(summary: Summary) -> dict[tuple[str, str], list[Verdict]]:
    """The verdicts that belong into one table: by the row they are against and the control."""
    found: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in summary.verdicts:
        found.setdefault((verdict.against, verdict.control), []).append(verdict)
    return found


def _caption(summary: Summary, facts: DataFacts) -> str:
    """On what, and on which terms."""
    study, recipe = summary.study, summary.recipe
    weights = f"from {_escape(recipe.init.weights)}" if recipe.init.weights else "from scratch"
    if recipe.init.linear == "fan-in":
        weights += " with linear layers spread by 1 / sqrt(inputs)"
    optimizer = _OPTIMIZERS[recipe.train.optimizer]
    views = recipe.eval.clips * recipe.eval.crops
    grid = ", ".join(f"{lr:g}" for lr in study.tuning.lrs)
    given = bool(summary.tuned) and all(item.is_given for item in summary.tuned)
    rates = "given by the study" if given else f"from {grid}"
    if study.tuning.first and not given:
        first = ", ".join(f"{lr:g}" for lr in study.tuning.first)
        rates += (
            f" (first {first}, then outwards as long as the best lies at an end of what was tried, or all "
            "of them where none is better than chance)"
        )
    sentences = [
        f"{facts.classes} classes, {thousands(facts.train_videos)} training and "
        f"{thousands(facts.val_videos)} test videos; chance is {facts.chance:.1f} %.",
        f"Data: train `{facts.train_sha256[:_HASH_DIGITS]}`, "
        f"test `{facts.val_sha256[:_HASH_DIGITS]}`.",
        f"{_frames(summary)}, {recipe.data.size} px, {weights}; tested "
        f"on {views} view{'s' * (views != 1)} after the last epoch.",
        f"{_seen(summary, facts)} clips seen in {_counted(range(facts.epochs), 'epoch')}, "
        f"batches of {recipe.train.batch_size}, {optimizer} with {100 * study.warmup:g} % of linear "
        f"warm-up and a cosine; seeds {_list(study.seeds)}; learning "
        f"rates {rates}.",
        *_exceptions(summary),
    ]
    return " ".join(sentences)


def _seen(summary: Summary, facts: DataFacts) -> str:
    """How many clips each training sees."""
    batch = summary.recipe.train.batch_size
    return thousands(facts.epochs * clips_per_epoch(facts.train_videos, batch))


def _frames(summary: Summary) -> str:
    data = summary.recipe.data
    words = f"{data.frames} {data.sampling} frames"
    return f"{words} with stride {data.stride}" if data.sampling == "dense" else words


def _exceptions(summary: Summary) -> Iterator[str]:
    """What rows change in the terms of training, as opposed to the model."""
    for row in summary.study.rows:
        terms = ("model.drop_path", "model.dropout")
        own = [c for c in row.changes if not c.startswith("model.") or c.startswith(terms)]
        if own:
            yield f"{_escape(row.name)}: {_escape(', '.join(own))}."


def _results(summary: Summary, facts: DataFacts) -> list[str]:
    """The table of a data set, and its notes."""
    marks = _Marks()
    header: list[str] = []
    lines: list[list[str]] = []
    for row in summary.study.rows:
        cells = _entries(summary, row, facts)
        # Figures have no meaning in Markdown, but for the sign of a small p.
        for name in ("model", "note", "p"):
            cells[name] = _Entry(_escape(cells[name].text), cells[name].note)
        if row.name == summary.study.reference:
            cells["model"] = _Entry(f"**{cells['model'].text}**")
        header = [*cells]
        lines.append([marks.add(entry.text, entry.note) for entry in cells.values()])
    return [_table(header, lines, ("model", "note")), *marks.lines()]


def _entries(summary: Summary, row: Row, facts: DataFacts) -> dict[str, _Entry]:
    """A row's texts by the names of their columns."""
    cell = summary.cell(row.name, facts.name)
    reference = None
    if any(other.name == summary.study.reference for other in summary.study.rows):
        reference = summary.cell(summary.study.reference, facts.name)
    # Why there is none of all the figures that come from results.
    why = "" if cell.top1s else _lacking(cell.missing)
    lr = _Entry(_MISSING, "its learning rate is not chosen yet")
    blind = _BLIND if summary.is_blind(row.name, facts.name) else ""
    difference, p = _compared(summary, cell, why)
    control = why or "not tested under this control"
    return {
        "model": _Entry(row.name),
        "note": _Entry(row.note),
        "params (M)": _number(cell.params, lambda value: digits(value / 1e6), why),
        "GMACs": _number(cell.gmacs, digits, why),
        "lr": lr if cell.lr is None else _Entry(f"{cell.lr:g}", blind),
        "top-1 [95 %]": _top1(cell, why),
        f"seeds {_list(summary.study.seeds)}": _by_seed(summary, cell),
        "difference [95 %]": difference,
        "p": p,
        **{
            name: _number(cell.controls.get(name), _percent, control)
            for name in summary.study.controls
        },
        "training, s": _Entry(_time(cell, reference), why),
    }


def _number(value: float | None, write: Callable[[float], str], why: str) -> _Entry:
    return _Entry(_MISSING, why) if value is None else _Entry(write(value))


def _top1(cell: Cell, why: str) -> _Entry:
    if cell.mean is None:
        return _Entry(_MISSING, why)
    alone = "one seed has no interval" if cell.low is None else ""
    stuck = f"no better than chance: {_seeds(cell.at_chance)}" if cell.at_chance else ""
    note = "; ".join(filter(None, [alone, stuck, _lacking(cell.missing)]))
    if cell.low is None or cell.high is None:
        return _Entry(_percent(cell.mean), note)
    return _Entry(f"{_percent(cell.mean)} [{_percent(cell.low)}, {_percent(cell.high)}]", note)


def _by_seed(summary: Summary, cell: Cell) -> _Entry:
    seeds = summary.study.seeds
    texts = [_percent(cell.top1s[seed]) if seed in cell.top1s else _MISSING for seed in seeds]
    return _Entry(" / ".join(texts), _lacking(cell.missing))


def _compared(summary: Summary, cell: Cell, why: str) -> tuple[_Entry, _Entry]:
    """The difference to the reference with its interval, and p."""
    if cell.row == summary.study.reference:
        return _Entry("reference"), _Entry("")
    if cell.difference is None:
        empty = _Entry(_MISSING, why or "no seed that the reference has, too")
        return empty, empty
    few = [seed for seed in summary.study.seeds if seed not in cell.difference.seeds]
    note = f"difference over {_seeds(cell.difference.seeds)} only" if few else ""
    if len(cell.difference.seeds) == 1:
        note = "; ".join(filter(None, [note, "one seed: the interval and p are over videos alone"]))
    return _Entry(_interval(cell.difference), note), _Entry(_chance(cell.difference))


def _chance(difference: Difference) -> str:
    return "<0.0001" if difference.p < 1e-4 else f"{difference.p:.4f}"


def _interval(difference: Difference) -> str:
    low, high = _signed(difference.low), _signed(difference.high)
    return f"{_signed(difference.points)} [{low}, {high}]"


def _time(cell: Cell, reference: Cell | None) -> str:
    """Seconds, and how many times those of the reference."""
    if cell.seconds is None:
        return _MISSING
    if reference is None or not reference.seconds:
        return digits(cell.seconds)
    return f"{digits(cell.seconds)} ({cell.seconds / reference.seconds:.2f}×)"


def _lacking(missing: Mapping[int, str]) -> str:
    """Which seeds have no result, and why; seeds of one reason together."""
    reasons = dict.fromkeys(missing.values())
    return "; ".join(
        f"{_seeds([seed for seed in missing if missing[seed] == reason])} {reason}"
        for reason in reasons
    )


def _legend(summary: Summary) -> str:
    """What the columns of the tables mean."""
    machines = "; ".join(summary.machines)
    return (
        "Top-1 in % of the test videos: mean over seeds, with Student's 95 % interval for other seeds. "
        "GMACs: billions of multiply-adds of one view, a multiply-add counted once. "
        f"Difference to {_escape(summary.study.reference)} in percent points, with a 95 % interval from "
        "a bootstrap over seeds, the same ones of both rows, and videos and the p of an exact sign-flip "
        "test over videos. "
        f"{_controls(summary)}Training: median over seeds, seconds and times "
        f"the reference{f' ({_escape(machines)})' if machines else ''}, not side by side: what else the "
        "machine did and later versions of the code are in them."
    )


def _controls(summary: Summary) -> str:
    """What the same networks were shown instead."""
    shown = [f"{name}, {_CONTROLS[name]}" for name in summary.study.controls]
    return f"The same networks on other frames: {'; '.join(shown)}. " if shown else ""


def _verdicts(summary: Summary) -> Iterator[str]:
    if not summary.verdicts:
        return
    for (against, control), verdicts in _comparisons(summary).items():
        other = "" if against == summary.study.reference else f", against {_escape(against)}"
        yield f"### Over all data sets{other}{_shown(control)}"
        yield _verdict_table(summary, verdicts)
    others = _counted(summary.verdicts, "comparison")
    borrowed = any(row.lr_of for row in summary.study.rows)
    yield (
        f"Better or worse: on every data set p < {SIGNIFICANT:g}, an interval that lies on one side of 0 "
        f"and each of at least {LEAST_SEEDS} seeds on that side, the same on all of them. No clear "
        f"difference: every interval within ±{MARGIN_POINTS:g} points, for which a few hundred test "
        "videos hardly suffice. Else not settled. At chance: no seed is right more often than chance "
        "(binomial test), so that only the beginning of training is compared. The p are not corrected for "
        f"the {others}, and see no seeds; the interval sees less of them than other seeds would show."
        + (" A rate that is another row's may favour that row." if borrowed else "")
    )


def _shown(control: str) -> str:
    """On which frames, to follow a title; nothing of the plain ones."""
    return "" if control == "none" else f", {_CONTROLS[control]}"


def _verdict_table(summary: Summary, verdicts: Sequence[Verdict]) -> str:
    """Differences on each data set, and what they say together."""
    lines = []
    for verdict in verdicts:
        found = [verdict.differences[facts.name] for facts in summary.data]
        texts = [
            f"{_interval(difference)}, p {_escape(_chance(difference))}" if difference else _MISSING
            for difference in found
        ]
        lines.append([_escape(verdict.row), *texts, _escape(_verdict_words(verdict))])
    names = [_escape(facts.name) for facts in summary.data]
    return _table(["model", *names, "verdict"], lines, ("model", "verdict"))


def _verdict_words(verdict: Verdict) -> str:
    return f"{verdict.word}: {verdict.why}" if verdict.why else verdict.word


def _failures(summary: Summary) -> Iterator[str]:
    yield "### Failed trainings"
    lines = [
        f"- {_escape(item.row)} on {_escape(item.dataset)}, seed {item.seed}, lr {item.lr:g}: "
        f"{_escape(item.reason)}"
        for item in summary.failures
    ]
    yield "\n".join(lines) if lines else "None."


def _tuning(summary: Summary) -> Iterator[str]:
    """For each data set that rates were tuned on, the held-out accuracies."""
    grid, tuning = sorted(summary.study.tuning.lrs), summary.study.tuning
    # Rows whose rate is given are in the tables of the others.
    for dataset in dict.fromkeys(item.dataset for item in summary.tuned if item.accuracies):
        yield f"### Learning rates on {_escape(dataset)}"
        yield (
            f"Top-1 in % on {100 * tuning.held_out:g} % of each class's training videos, which were held "
            f"out, after about {thousands(tuning.clips)} clips with seed {tuning.seed}."
        )
        marks = _Marks()
        lines = [
            _tuning_line(summary, item, grid, marks)
            for item in summary.tuned
            if item.dataset == dataset
        ]
        yield _table(["model", *(f"{lr:g}" for lr in grid), "chosen"], lines, ("model",))
        yield from marks.lines()


def _tuning_line(summary: Summary, item: Tuned, grid: Sequence[float], marks: _Marks) -> list[str]:
    row = next((row for row in summary.study.rows if row.name == item.row), Row(name=item.row))
    note = "not run yet" if item.lr is None else "not asked for: its neighbour was not the best"
    if item.is_given:
        note = "the study gives the rate"
    if row.lr_of:
        note = "takes the rate of another"
    texts = []
    for lr in grid:
        top1 = item.accuracies.get(lr)
        if lr not in item.accuracies:
            texts.append(marks.add(_MISSING, note))
        elif top1 is None:
            texts.append("failed")
        else:
            texts.append(f"**{_percent(top1)}**" if lr == item.lr else _percent(top1))
    chosen = _MISSING if item.lr is None else f"{item.lr:g}"
    at_end = len(grid) > 1 and item.accuracies and item.lr in (grid[0], grid[-1])
    ends = "an end of the grid: a rate beyond it may be better" if at_end else ""
    whose = f"the rate of {row.lr_of}" if row.lr_of else ""
    blind = _BLIND if item.is_blind else ""
    notes = "; ".join(filter(None, [whose, blind, ends]))
    return [_escape(item.row), *texts, marks.add(chosen, notes)]


class _Marks:
    """Letters that lead from cells to notes; cells with the same note share one."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def add(self, text: str, note: str) -> str:
        """The text with the letter of its note, if it has one."""
        if not note:
            return text
        number = len(self._marks)
        times, place = divmod(number, len(_MARKS))
        mark = self._marks.setdefault(note, _MARKS[place] * (times + 1))
        return f"{text} <sup>{mark}</sup>"

    def lines(self) -> list[str]:
        """The notes in the order of their letters."""
        return [f"<sup>{mark}</sup> {_escape(note)}" for note, mark in self._marks.items()]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], words: Container[str]) -> str:
    """A Markdown table; columns of ``words`` are aligned left, figures right."""
    rule = ["---" if name in words else "--:" for name in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _escape(text: str) -> str:
    """Text of somebody else, without a meaning in Markdown, on one line."""
    return " ".join(text.split()).translate(_ESCAPES)


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _signed(value: float) -> str:
    # Nothing is neither more nor less.
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _list(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {_list(seeds)}"


def _counted(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"
