"""What the report says of the importance of hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxhpo.analysis import plots
from jaxhpo.analysis.document import Block, Figures, Heading, Paragraph, Table
from jaxhpo.analysis.format import NOTHING, percent
from jaxhpo.analysis.importance import Importance, importance

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord

MOST_SHARES = 40
OVERALL, NEAR = (0.25, 1.0), (0.1, 0.5)  # the best share, of the best share of all trials


def overall_shares(record: StudyRecord) -> list[Importance]:
    """Shares among all trials, the greatest first; empty where too few tell."""
    return importance(record, *OVERALL)


def mattered(record: StudyRecord, overall: Sequence[Importance], figures: bool) -> list[Block]:
    """How much of being among the best each hyperparameter decides; nothing where too few trials tell."""
    if not overall:
        return []
    near = {one.name: one for one in importance(record, *NEAR)}
    header = ["hyperparameter", "among all", *(["near the best"] if near else [])]
    rows = [
        [one.title, _share(one), *([_share(near[one.name]) if one.name in near else NOTHING] if near else [])]
        for one in overall[:MOST_SHARES]
    ]
    parts: list[Block] = [Heading("What mattered")]
    drawn = plots.importances(overall, list(near.values())) if figures else None
    if drawn:
        parts.append(Figures([drawn]))
    parts.append(Table(header, rows))
    if len(overall) > MOST_SHARES:
        parts.append(Paragraph(f"The {MOST_SHARES} greatest of {len(overall)}.", small=True))
    said = (
        f"How much of whether a trial is among the best {percent(OVERALL[0])} of all is decided by one hyperparameter alone"
        + (f", or among the best {percent(NEAR[0])} where only the best {percent(NEAR[1])} are looked at" if near else "")
        + ": 0 nothing, 1 everything (PED-ANOVA, 95 % bootstrap intervals over the trials; one that holds 0 shows nothing). "
        "Diverged trials count as the worst, stopped ones after all that were trained to the end."
    )
    doubt = (
        "The trials are those that the search chose: where it gathered, a hyperparameter that it had settled hardly varies and "
        "shows little, and those that moved together share their effects. Only random or Sobol points speak of the whole space."
    )
    if record.has_lineage:
        doubt += " A trial that took over a training state owes its loss to that, too."
    return [*parts, Paragraph(said, small=True), Paragraph(doubt, small=True)]


def _share(one: Importance) -> str:
    share = one.share
    return f"{share.estimate:.2f} [{share.low:.2f}, {share.high:.2f}]"
