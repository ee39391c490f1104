"""Which studies are repeats of one another: one name, one config, another seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxhpo.analysis import summary
from jaxhpo.analysis.format import clean, dotted, value
from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord

_UNLIKE = ("study.seed", "study.name", "study.devices", "seed", "name")  # what may differ between repeats of one study


def grouped(records: Sequence[StudyRecord]) -> dict[str, list[StudyRecord]]:
    """Records by name, and by what differs in their config where one name stands for several."""
    settings = [
        {k: v for k, v in dotted(record.config).items() if k not in _UNLIKE and not k.startswith("report.")}
        for record in records
    ]
    keys = [
        json.dumps([config, record.space], sort_keys=True, default=str)
        for config, record in zip(settings, records, strict=True)
    ]
    groups: dict[str, list[StudyRecord]] = {}
    for name in dict.fromkeys(record.name for record in records):
        own = [i for i, record in enumerate(records) if record.name == name]
        kinds = list(dict.fromkeys(keys[i] for i in own))
        names = sorted({k for i in own for k in settings[i]})
        differing = [k for k in names if len({json.dumps(settings[i].get(k), default=str) for i in own}) > 1]
        for kind in kinds:
            members = [i for i in own if keys[i] == kind]
            told = ", ".join(f"{k.removeprefix('study.')}={value(settings[members[0]].get(k))}" for k in differing[:4])
            label = clean(name) if len(kinds) == 1 else f"{clean(name)} ({told or f'variant {kinds.index(kind) + 1}'})"
            label = label if label not in groups else f"{label} #{kinds.index(kind) + 1}"
            groups[label] = [records[i] for i in members]
            _refuse_doubles(label, groups[label])
    return groups


def _refuse_doubles(name: str, group: Sequence[StudyRecord]) -> None:
    seen: dict[str, StudyRecord] = {}
    for record in group:
        seed = json.dumps(summary.seed_of(record))  # a list where the key was one of JAX
        if seed != "null" and seed in seen:
            raise JaxhpoError(
                f"{seen[seed].folder} and {record.folder} are the same study {name!r} with the same seed {seed}: "
                "they are one result, not two; leave one out"
            )
        seen[seed] = record
