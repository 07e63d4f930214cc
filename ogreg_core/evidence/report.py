"""From a plan and what has ended of it to the report's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ogreg_core.evidence.comparison import is_chance
from ogreg_core.evidence.picture import draw_evidence
from ogreg_core.evidence.results import Identity, Result
from ogreg_core.evidence.runner import Choice, DataSet, Plan
from ogreg_core.evidence.summary import DataFacts, Failure, Summary, Tests, Tuned, summarise
from ogreg_core.evidence.tables import markdown
from ogreg_core.files import write_text_atomic

__all__ = ["summary_of", "write_report"]


def summary_of(name: str, plan: Plan) -> Summary:
    """What the trainings of a plan show so far."""
    results = plan.results()
    study = plan.study.model_copy(update={"rows": plan.rows, "seeds": list(plan.seeds)})
    tests = [_tests(plan, data, results) for data in plan.data]
    # Also those that lend their rate and are not asked for themselves.
    told = {row.name: row for row in (*plan.rows, *map(plan.chooser, plan.rows))}
    choices = [plan.tuned(row, data, results) for data in plan.data for row in told.values()]
    return summarise(
        name,
        study,
        plan.shared,
        tests,
        list({(tuned.row, tuned.dataset): tuned for tuned in map(_tuned, choices)}.values()),
        list(dict.fromkeys(failure for choice in choices for failure in _failures(choice))),
    )


def _tests(plan: Plan, data: DataSet, results: Mapping[Identity, Result]) -> Tests:
    found: dict[str, list[Result]] = {}
    for row in plan.rows:
        jobs = [plan.test_job(row, data, seed, results) for seed in plan.seeds]
        ended = [results.get(job.identity) for job in jobs if job is not None]
        found[row.name] = [result for result in ended if result is not None]
    facts = DataFacts(
        name=data.name,
        classes=len(data.train.labels),
        train_videos=len(data.train.rows),
        val_videos=len(data.val.rows),
        train_sha256=data.train.sha256,
        val_sha256=data.val.sha256,
        epochs=plan.epochs(data),
    )
    return Tests(facts, found)


def _tuned(choice: Choice) -> Tuned:
    chosen = choice.tried.get(choice.lr) if choice.lr else None
    blind = chosen is not None and is_chance(chosen, len(choice.data.train.labels))
    accuracies = {lr: r.top1() if r.is_done else None for lr, r in choice.tried.items()}
    return Tuned(
        choice.row.name,
        choice.data.name,
        choice.lr,
        {} if choice.row.lr_of else accuracies,
        blind,
        is_given=choice.is_given,
    )


def _failures(choice: Choice) -> Iterator[Failure]:
    for lr, result in choice.tried.items():
        if not result.is_done and not choice.row.lr_of:
            seed = result.identity.seed
            yield Failure(choice.row.name, result.dataset, seed, lr, result.reason)


def write_report(summary: Summary, folder: Path, name: str, command: str) -> list[Path]:
    """Write ``NAME.md``, ``NAME.json`` and, as soon as there is a score, ``NAME.png``.

    Args:
        summary: what to write.
        folder: for the files.
        name: of the study.
        command: repeats every figure; stands in the report.

    Returns:
        the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, document = folder / f"{name}.md", folder / f"{name}.json"
    picture = folder / f"{name}.png"
    files = [text, document]
    if any(cell.top1s for cell in summary.cells):
        draw_evidence(summary, picture)
        files.append(picture)
    shown = picture.name if picture in files else ""
    write_text_atomic(text, markdown(summary, command, shown))
    content = json.dumps(summary.document(command), indent=2, ensure_ascii=False)
    write_text_atomic(document, content + "\n")
    return files
