"""The record: one SQLite file a study, trials and the optimizer's state in one transaction a chunk.

Standard library and numpy only, so that a record can be read without JAX.

    study     key, value           name, config, space, environment, status ... as JSON
    trial     one row a trial      the exact bits of its point and its loss beside the readable values; whose state it took over
    answer    its losses on the way where it was asked for them before the end of its training
    snapshot  the last two         all that is needed to go on, with its SHA-256
    note      key, value           what was learned after the search: the winner on fresh seeds, timings

WAL with ``synchronous=FULL``: a commit survives a kill and a power cut. There is one writer: it holds a lock that
the operating system drops when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxhpo.errors import JaxhpoError

FILE, LOCK, FORMAT = "study.sqlite", "study.lock", 2

_SCHEMA = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trial (
  number INTEGER PRIMARY KEY, parent INTEGER NOT NULL, start INTEGER NOT NULL, round INTEGER NOT NULL, lane INTEGER NOT NULL,
  loss REAL, steps INTEGER NOT NULL, whole INTEGER NOT NULL, seconds REAL NOT NULL, metrics TEXT NOT NULL,
  hparams TEXT NOT NULL, cube BLOB NOT NULL, loss_bits BLOB NOT NULL, error TEXT);
CREATE TABLE answer (
  number INTEGER NOT NULL, steps INTEGER NOT NULL, round INTEGER NOT NULL, loss REAL,
  PRIMARY KEY (number, steps)) WITHOUT ROWID;
CREATE TABLE snapshot (round INTEGER PRIMARY KEY, state BLOB NOT NULL, sha TEXT NOT NULL, weights TEXT);
CREATE TABLE note (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """One answered trial.

    ``loss`` is minimised and None where the trial diverged or failed; ``value`` is the metric as the user stated
    it. ``hparams`` are plain values by dotted name. ``seconds`` count from the beginning of the study. A trial that
    took over another's training state has that trial as its ``parent``, else -1, and trained from ``start`` steps on;
    ``whole`` says that it was trained to the end.
    """

    number: int
    round: int
    lane: int
    loss: float | None
    value: float | None
    diverged: bool
    steps: int
    metrics: dict[str, float]
    hparams: dict[str, Any]
    seconds: float
    error: str | None = None
    parent: int = -1
    start: int = 0
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A study as it stands on disk."""

    folder: Path
    name: str
    config: dict[str, Any]
    space: list[dict[str, Any]]
    env: dict[str, Any]
    metric: str
    direction: str
    num_trials: int | None
    status: str
    created: float
    trials: list[TrialRow]
    notes: dict[str, Any]

    @property
    def best(self) -> TrialRow | None:
        """The trial of the lowest loss, the first of equals; None while every trial diverged.

        A trial that was trained to the end goes before all others.
        """
        return min((trial for trial in self.trials if trial.loss is not None), key=order, default=None)

    @property
    def has_lineage(self) -> bool:
        """Whether some trial took over another's training state."""
        return any(trial.parent >= 0 for trial in self.trials)


def order(trial: TrialRow) -> tuple[bool, float, int, int]:
    """Trials from best to worst."""
    return (not trial.whole, math.inf if trial.loss is None else trial.loss, trial.round, trial.lane)


def canonical(value: Any) -> str:
    """JSON with sorted keys; what JSON does not know becomes text."""
    return json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))


def _explained(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "full" in text or "No space" in text:
        return f"{path}: the disk is full; all trials up to the last commit are kept, resume once there is room"
    if "malformed" in text or "not a database" in text:
        return f"{path}: the record is damaged ({text}); it was left untouched: restore it from a copy"
    if "locked" in text or "busy" in text:
        return f"{path}: another process holds the record"
    return f"{path}: {text}"


@contextlib.contextmanager
def _clearly(path: Path) -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise JaxhpoError(_explained(path, error)) from error


def _read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing; without a write-ahead log the file is taken as immutable."""
    wal = path.with_name(path.name + "-wal")
    flags = "mode=ro" if wal.exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{flags}", uri=True)


def _checked(folder: Path) -> tuple[dict[str, Any], sqlite3.Connection]:
    """The study's facts and an open read-only connection.

    Raises:
        JaxhpoError: if there is no record, or it is damaged, or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise JaxhpoError(f"{folder}: there is no study here ({FILE} is missing)")
    with _clearly(path):
        connection = _read_only(path)
        try:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"malformed: {verdict}")
            facts = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM study")}
        except (sqlite3.OperationalError, json.JSONDecodeError) as error:
            connection.close()
            if "unable to open" in str(error):
                wanted = "its log lies in a folder without write access; copy the folder"
                raise JaxhpoError(f"{path}: cannot be read: {wanted}") from error
            raise JaxhpoError(f"{path}: this is not a record of a study ({error}); it was left untouched") from error
        except BaseException:
            connection.close()
            raise
    if facts.get("format") != FORMAT:
        connection.close()
        raise JaxhpoError(f"{path}: record format {facts.get('format')} where this version reads {FORMAT}")
    return facts, connection


def read_record(folder: str | Path) -> StudyRecord:
    """Everything about a study, finished, running or interrupted.

    Raises:
        JaxhpoError: if there is no record in the folder, or it is damaged.
    """
    folder = Path(folder)
    facts, connection = _checked(folder)
    sign = -1.0 if facts["direction"] == "maximize" else 1.0
    columns = "number, parent, start, round, lane, loss, steps, whole, seconds, metrics, hparams, error"
    with _clearly(folder / FILE), contextlib.closing(connection):
        trials = [
            TrialRow(
                number=number,
                parent=parent,
                start=start,
                round=round_,
                lane=lane,
                loss=loss,
                value=None if loss is None else sign * loss,
                diverged=loss is None,
                steps=steps,
                whole=bool(whole),
                metrics=json.loads(metrics),
                hparams=json.loads(hparams),
                seconds=seconds,
                error=error,
            )
            for number, parent, start, round_, lane, loss, steps, whole, seconds, metrics, hparams, error in connection.execute(
                f"SELECT {columns} FROM trial ORDER BY number"
            )
        ]
        notes = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM note")}
    if facts["status"] == "running" and not _is_locked(folder):
        facts["status"] = "interrupted"  # killed: it could not say so itself
    named = {
        key: facts[key] for key in ("name", "config", "space", "env", "metric", "direction", "num_trials", "status", "created")
    }
    return StudyRecord(folder=folder, trials=trials, notes=notes, **named)


def recorded_facts(folder: str | Path) -> dict[str, Any]:
    """What a record says of its study, without the trials."""
    facts, connection = _checked(Path(folder))
    connection.close()
    return facts


def trial_facts(folder: str | Path) -> list[dict[str, Any]]:
    """``number parent start round lane loss steps whole metrics hparams cube`` of every trial; the point is ``f32[D]``."""
    _, connection = _checked(Path(folder))
    names = ("number", "parent", "start", "round", "lane", "loss", "steps", "whole", "metrics", "hparams", "cube")
    with _clearly(Path(folder) / FILE), contextlib.closing(connection):
        rows = connection.execute(f"SELECT {', '.join(names)} FROM trial").fetchall()
    exact = lambda row: {
        "metrics": json.loads(row[-3]),
        "hparams": json.loads(row[-2]),
        "cube": np.frombuffer(row[-1], np.float32),
    }
    return [dict(zip(names, row, strict=True)) | exact(row) for row in rows]


def read_answers(folder: str | Path) -> dict[int, list[tuple[int, float | None]]]:
    """The losses of each trial on its way, ``(steps, loss)`` in order; none where an optimizer asks for whole trainings."""
    _, connection = _checked(Path(folder))
    curves: dict[int, list[tuple[int, float | None]]] = {}
    with _clearly(Path(folder) / FILE), contextlib.closing(connection):
        for number, steps, loss in connection.execute("SELECT number, steps, loss FROM answer ORDER BY number, steps"):
            curves.setdefault(number, []).append((steps, loss))
    return curves


class Record:
    """The writer's side. Use :func:`create_record` or :func:`reopen_record`; a context manager that frees the lock."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: sqlite3.Connection, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self._connection, self._lock = connection, lock

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._lock.close()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with _clearly(self.folder / FILE):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a failed COMMIT may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise

    def commit(
        self,
        trials: Iterable[tuple[Any, ...]],
        snapshot: tuple[int, bytes, str | None] | None,
        notes: dict[str, Any] | None = None,
        keep: int = 2,
        answers: Iterable[tuple[Any, ...]] = (),
    ) -> None:
        """Trials and the state after them, all or nothing.

        Args:
            trials: rows in the order of the table's columns. A trial that is already there is kept, unless the
                new row has trained for longer, or diverged.
            snapshot: the round, its bytes, and the folder of large weights if they are kept apart.
            notes: values to store or replace.
            keep: how many snapshots to keep, the newest.
            answers: ``(number, steps, round, loss)``, losses on the way.
        """
        with self._transaction() as db:
            columns = ["parent", "start", "round", "lane", "loss", "steps", "whole", "seconds", "metrics", "hparams", "cube"]
            columns += ["loss_bits", "error"]
            newer = ", ".join(f"{name} = excluded.{name}" for name in columns)
            db.executemany(
                f"INSERT INTO trial (number, {', '.join(columns)}) VALUES ({','.join('?' * (len(columns) + 1))}) "
                f"ON CONFLICT (number) DO UPDATE SET {newer} WHERE excluded.steps > trial.steps OR excluded.loss IS NULL",
                trials,
            )
            db.executemany("INSERT OR IGNORE INTO answer VALUES (?,?,?,?)", answers)
            if snapshot is not None:
                round_, state, weights = snapshot
                sha = hashlib.sha256(state).hexdigest()
                db.execute("INSERT OR REPLACE INTO snapshot VALUES (?,?,?,?)", (round_, state, sha, weights))
                newest = "SELECT round FROM snapshot ORDER BY round DESC LIMIT ?"
                db.execute(f"DELETE FROM snapshot WHERE round NOT IN ({newest})", (keep,))
            for key, value in (notes or {}).items():
                db.execute("INSERT OR REPLACE INTO note VALUES (?,?)", (key, canonical(value)))

    def set_status(self, status: str) -> None:
        """One of ``running``, ``finished``, ``stopped``, ``interrupted``, ``failed``."""
        with self._transaction() as db:
            db.execute("UPDATE study SET value = ? WHERE key = 'status'", (canonical(status),))

    def discard(self) -> None:
        """Remove the record, for a study that failed before its first trial was answered."""
        with _clearly(self.folder):
            self._connection.close()
            for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", "config.json", "environment.json"):
                (self.folder / name).unlink(missing_ok=True)

    def snapshots(self) -> list[tuple[int, bytes, str | None]]:
        """Sound snapshots, newest first.

        Raises:
            JaxhpoError: if there are some but none is sound.
        """
        with _clearly(self.folder / FILE):
            rows = self._connection.execute("SELECT round, state, sha, weights FROM snapshot ORDER BY round DESC").fetchall()
        sound = [(r, state, weights) for r, state, sha, weights in rows if hashlib.sha256(state).hexdigest() == sha]
        if rows and not sound:
            raise JaxhpoError(f"{self.folder / FILE}: the record is damaged (no snapshot matches its checksum)")
        return sound

    def elapsed(self) -> float:
        """Seconds of search so far."""
        with _clearly(self.folder / FILE):
            return self._connection.execute("SELECT max(seconds) FROM trial").fetchone()[0] or 0.0

    def cubes(self) -> np.ndarray:
        """The points of all trials by number, ``f32[N, D]``, bit for bit."""
        with _clearly(self.folder / FILE):
            rows = self._connection.execute("SELECT cube FROM trial ORDER BY number").fetchall()
        return np.stack([np.frombuffer(row[0], np.float32) for row in rows])

    def write_beside(self, name: str, value: Any) -> None:
        """A JSON file in the folder of the record, for people to read."""
        with _clearly(self.folder / name):
            (self.folder / name).write_text(json.dumps(value, indent=2, default=str) + "\n")

    def notes(self) -> dict[str, Any]:
        with _clearly(self.folder / FILE):
            return {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM note")}


def _take_lock(folder: Path) -> sqlite3.Connection:
    """An exclusive lock in a file of its own, so that readers of the record are never in its way."""
    path = folder / LOCK
    with _clearly(path):
        lock = sqlite3.connect(path, timeout=1.0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if "locked" in str(error):
            raise JaxhpoError(f"{folder}: another process is running this study; wait for it or stop it first") from error
        raise JaxhpoError(_explained(path, error)) from error
    except sqlite3.DatabaseError as error:
        lock.close()
        raise JaxhpoError(f"{path}: the lock file is damaged ({error}); delete that file alone and try again") from error
    return lock


def _is_locked(folder: Path) -> bool:
    """Whether some process is writing the record; changes nothing."""
    path = folder / LOCK
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=0)) as probe:
            probe.execute("SELECT * FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        return "locked" in str(error)
    except sqlite3.DatabaseError:
        return False
    return False


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def holds_study(folder: str | Path) -> bool:
    """Whether there is a record in the folder."""
    return (Path(folder) / FILE).exists()


def create_record(folder: str | Path, facts: dict[str, Any]) -> Record:
    """Begin a record.

    Args:
        folder: made if missing.
        facts: ``name config space env metric direction num_trials identity``, JSON-able.

    Raises:
        JaxhpoError: if the folder cannot be written, already holds a study, or another process is in it.
    """
    folder = Path(folder)
    with _clearly(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(folder)
    try:
        if holds_study(folder):
            raise JaxhpoError(f"{folder}: already holds a study; resume it, or choose another folder")
        facts = {**facts, "format": FORMAT, "status": "running", "created": time.time()}
        with _clearly(folder / FILE):
            # Made aside and renamed, so that a kill in between leaves no half-made record.
            draft = folder / (FILE + ".new")
            draft.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as made:
                made.execute("PRAGMA synchronous=FULL")
                made.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
                made.execute("BEGIN")
                made.executemany("INSERT INTO study VALUES (?,?)", [(key, canonical(value)) for key, value in facts.items()])
                made.execute("COMMIT")
            draft.replace(folder / FILE)
            return Record(folder, _connect(folder / FILE), lock, facts)
    except BaseException:
        lock.close()
        raise


def reopen_record(folder: str | Path, identity: dict[str, Any]) -> Record:
    """Open a record to go on with it.

    Args:
        identity: what makes the study this one; it must equal what the record was made with.

    Raises:
        JaxhpoError: if there is no sound record, it belongs to another study, or another process is in it.
    """
    folder = Path(folder)
    facts, connection = _checked(folder)
    connection.close()
    told, wanted = json.loads(canonical(identity)), facts["identity"]
    if told != wanted:
        raise JaxhpoError(f"{folder}: the record belongs to another study ({'; '.join(_differences('', wanted, told))})")
    lock = _take_lock(folder)
    try:
        with _clearly(folder / FILE):
            return Record(folder, _connect(folder / FILE), lock, facts)
    except BaseException:
        lock.close()
        raise


def _differences(path: str, recorded: Any, now: Any) -> Iterator[str]:
    """Which values differ, each under its own name."""
    if not (isinstance(recorded, dict) and isinstance(now, dict)):
        yield f"{path}: {canonical(recorded)[:80]} recorded, {canonical(now)[:80]} now"
        return
    for key in sorted(recorded.keys() | now.keys()):
        if recorded.get(key) != now.get(key):
            yield from _differences(f"{path}.{key}" if path else key, recorded.get(key), now.get(key))


def number_or_none(value: float) -> float | None:
    """JSON and SQL know no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None
