"""The record: complete, bit-exact, and safe against kills, damage, full disks and second writers."""

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.study import confirm, keeper, read_record
from jaxhpo.study.record import FILE, Record, canonical, create_record, holds_study, reopen_record
from jaxhpo.study.snapshot import pack, unpack

SPACE = jh.Space({"lr": jh.Float(0.01, 0.9), "kind": jh.Choice(["a", "b"])})
COLUMNS = "number, round, lane, loss, steps, metrics, hparams, cube, loss_bits, error"


def training(num_steps=12, size=1):
    """Noisy steps on a vector, so that a wrong key or a lost state shows in the bits; diverges at large rates."""

    def step(key, hparams, x):
        x = x - hparams["lr"] * x + 0.1 * jax.random.normal(key, (size,))
        return jnp.where((hparams["lr"] > 0.8) & (x[0] > 0), jnp.nan, x)

    task = jh.Task(
        init=lambda key, h: jax.random.normal(key, (size,)),
        step=step,
        evaluate=lambda h, x: {"loss": (x**2).sum(), "first": x[0]},
    )
    return jh.Training(task, num_steps, 3)


def study(**change):
    settings = {"objective": training(), "space": SPACE, "optimizer": jh.PSO(num_lanes=6), "num_trials": 40, "seed": 4}
    return jh.Study(**(settings | change))


def rows_of(folder):
    with sqlite3.connect(Path(folder) / FILE) as db:
        return db.execute(f"SELECT {COLUMNS} FROM trial ORDER BY number").fetchall()


def last_state(folder):
    with sqlite3.connect(Path(folder) / FILE) as db:
        return db.execute("SELECT round, sha FROM snapshot ORDER BY round DESC LIMIT 1").fetchone()


class Killed(BaseException):
    pass


def test_record_holds_what_the_result_says(tmp_path):
    result = jh.run_study(study(), tmp_path / "s")
    record = read_record(tmp_path / "s")
    assert [t.number for t in record.trials] == result.trials["number"].tolist() == list(range(40))
    assert [t.loss is None for t in record.trials] == result.trials["diverged"].tolist()
    assert 0 < result.trials["diverged"].sum() < 40
    assert [t.hparams["kind"] for t in record.trials] == result.trials["hparams.kind"].tolist()
    assert record.best.number == result.best.number
    assert record.best.hparams == result.best.hparams
    assert record.status == "finished"
    assert record.metric == "loss"
    assert record.env["jax"] == jax.__version__
    bits = [np.frombuffer(row[8], np.float32)[0] for row in rows_of(tmp_path / "s")]
    np.testing.assert_array_equal(np.array(bits, np.float64), result.trials["loss"])


@pytest.mark.parametrize("large", [False, True])
def test_killed_between_any_two_commits_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, large):
    """Every commit of a study in turn is where one run dies, before or after the transaction."""
    if large:
        monkeypatch.setattr(keeper, "LARGE", 0)  # every training state goes through Orbax
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)  # chunks of one round: many commits
    made = study()
    jh.run_study(made, tmp_path / "whole")
    commit = Record.commit
    count = 0

    def dying(self, *arguments, **named):
        nonlocal count
        count += 1
        if count % 3 == 0:
            if count % 2:
                commit(self, *arguments, **named)
            raise Killed
        commit(self, *arguments, **named)

    monkeypatch.setattr(Record, "commit", dying)
    deaths = 0
    for attempt in range(60):
        try:
            jh.run_study(made, tmp_path / "killed", resume=attempt > 0)
            break
        except Killed:
            deaths += 1
    assert deaths >= 5
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert last_state(tmp_path / "killed") == last_state(tmp_path / "whole")


@pytest.mark.parametrize("devices", [2, 4])
def test_bits_do_not_depend_on_the_number_of_devices(tmp_path, devices):
    made = study(optimizer=jh.PSO(num_lanes=8), shard_width=2)
    jh.run_study(dataclasses.replace(made, devices=1), tmp_path / "one")
    jh.run_study(dataclasses.replace(made, devices=devices), tmp_path / "many")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "many")
    assert last_state(tmp_path / "one") == last_state(tmp_path / "many")


def test_resume_on_other_devices_keeps_the_recorded_width(tmp_path, monkeypatch):
    made = study(optimizer=jh.PSO(num_lanes=8), devices=4)
    jh.run_study(made, tmp_path / "whole")
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        jh.run_study(made, tmp_path / "moved")
    monkeypatch.undo()
    jh.run_study(dataclasses.replace(made, devices=1), tmp_path / "moved", resume=True)
    assert rows_of(tmp_path / "moved") == rows_of(tmp_path / "whole")


def stop_after(monkeypatch, commits):
    commit, left = Record.commit, [commits]

    def dying(self, *arguments, **named):
        if not left[0]:
            raise Killed
        left[0] -= 1
        commit(self, *arguments, **named)

    monkeypatch.setattr(Record, "commit", dying)


def test_resume_of_a_finished_study_changes_nothing(tmp_path):
    first = jh.run_study(study(), tmp_path / "s")
    before = rows_of(tmp_path / "s"), last_state(tmp_path / "s")
    again = jh.run_study(study(), tmp_path / "s", resume=True)
    assert (rows_of(tmp_path / "s"), last_state(tmp_path / "s")) == before
    assert again.best.number == first.best.number
    np.testing.assert_array_equal(again.trials["loss"], first.trials["loss"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 5}, "key"),
        ({"num_trials": 41}, "num_trials"),
        ({"optimizer": jh.RandomSearch(num_lanes=6)}, "optimizer[.a-z]*"),
        ({"objective": training(num_steps=15)}, "num_steps"),
        ({"space": jh.Space({"lr": jh.Float(0.01, 0.8), "kind": jh.Choice(["a", "b"])})}, "space"),
    ],
)
def test_resume_refuses_another_study_and_names_the_difference(tmp_path, change, part):
    jh.run_study(study(num_trials=8), tmp_path / "s")
    before = (tmp_path / "s" / FILE).read_bytes()
    with pytest.raises(jh.JaxhpoError, match=f"another study \\(.*{part}: "):
        jh.run_study(study(**({"num_trials": 8} | change)), tmp_path / "s", resume=True)
    assert (tmp_path / "s" / FILE).read_bytes() == before


def test_other_data_is_another_study(tmp_path):
    def objective(data):
        return jax.tree_util.Partial(lambda data, key, hparams: hparams["lr"] * data.sum(), data)

    jh.run_study(study(objective=objective(jnp.ones(3)), num_trials=6), tmp_path / "s")
    with pytest.raises(jh.JaxhpoError, match="data: "):
        jh.run_study(study(objective=objective(jnp.zeros(3)), num_trials=6), tmp_path / "s", resume=True)


def test_a_folder_with_a_study_is_not_written_over(tmp_path):
    jh.run_study(study(num_trials=6), tmp_path / "s")
    before = (tmp_path / "s" / FILE).read_bytes()
    with pytest.raises(jh.JaxhpoError, match="already holds a study"):
        jh.run_study(study(num_trials=6), tmp_path / "s")
    assert (tmp_path / "s" / FILE).read_bytes() == before


def test_labels_that_json_does_not_know_survive_a_resume(tmp_path, monkeypatch):
    options = [jnp.tanh, jax.nn.relu, ("a", 1)]
    space = jh.Space({"x": jh.Float(0, 1), "act": jh.Choice(options), "pair": jh.Choice([(1, 2), (3, 4)], shape=(2,))})
    made = study(objective=_sum_of_leaves, space=space, num_trials=24)
    whole = jh.run_study(made)
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    stop_after(monkeypatch, 2)
    with pytest.raises(Killed):
        jh.run_study(made, tmp_path / "s")
    monkeypatch.undo()
    resumed = jh.run_study(made, tmp_path / "s", resume=True)
    assert resumed.trials["hparams.act"].tolist() == whole.trials["hparams.act"].tolist()
    assert resumed.trials["hparams.pair"].tolist() == whole.trials["hparams.pair"].tolist()
    assert resumed.best.hparams == whole.best.hparams
    assert resumed.best.hparams["act"] in options
    written = str([trial.hparams["act"] for trial in read_record(tmp_path / "s").trials])
    assert "0x" not in written
    assert "relu" in written


def _sum_of_leaves(key, hparams):
    return hparams["x"] + hparams["act"] + hparams["pair"].sum()


@pytest.mark.parametrize(
    "change",
    [
        {"objective": jh.HostFunction(lambda hparams: 0.0, timeout=3.0)},
        {"optimizer": jh.SobolSearch(num_lanes=2), "space": jh.Space({"x": jh.Float(0, 1, shape=(30_000,))})},
    ],
    ids=["host", "sobol"],
)
def test_a_mistake_that_shows_late_leaves_no_record_in_the_way(tmp_path, change):
    change = {"objective": lambda key, h: h["x"].sum(), **change}
    with pytest.raises(jh.JaxhpoError):
        jh.run_study(study(**change), tmp_path / "s")
    jh.run_study(study(num_trials=6), tmp_path / "s")
    assert len(read_record(tmp_path / "s").trials) == 6


def test_what_cannot_be_written_beside_the_record_frees_the_lock(tmp_path):
    (tmp_path / "s" / "config.json").mkdir(parents=True)
    with pytest.raises(jh.JaxhpoError, match=r"config\.json"):
        jh.run_study(study(num_trials=6), tmp_path / "s")
    jh.run_study(study(num_trials=6), tmp_path / "s", resume=True)
    assert read_record(tmp_path / "s").status == "finished"


def test_numbers_within_a_partial_are_data_of_the_study(tmp_path):
    objective = lambda scale: jax.tree_util.Partial(_scaled, scale)
    jh.run_study(study(objective=objective(0.5), num_trials=6), tmp_path / "s")
    with pytest.raises(jh.JaxhpoError, match="data: "):
        jh.run_study(study(objective=objective(0.25), num_trials=6), tmp_path / "s", resume=True)


def _scaled(scale, key, hparams):
    return scale * hparams["lr"]


def test_weights_that_cannot_be_written_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "LARGE", 0)
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "lanes").write_text("in the way")
    with pytest.raises(jh.JaxhpoError, match="lanes: training states cannot be kept there") as caught:
        jh.run_study(study(), tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not holds_study(tmp_path / "s")  # no trial was answered: nothing stays in the way


def test_another_environment_is_warned_of(tmp_path, monkeypatch):
    jh.run_study(study(num_trials=6), tmp_path / "s")
    monkeypatch.setattr("jaxhpo.study.driver.environment", lambda: {"jax": "0.0.1"})
    with pytest.warns(UserWarning, match=f"jax {jax.__version__} then, 0.0.1 now"):
        jh.run_study(study(num_trials=6), tmp_path / "s", resume=True)


def test_a_study_that_was_killed_is_shown_as_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    seen = []
    jh.run_study(study(), tmp_path / "s", progress=lambda p: p.trials and seen.append(read_record(tmp_path / "s").status))
    assert "running" in seen
    with sqlite3.connect(tmp_path / "s" / FILE) as db:
        db.execute("UPDATE study SET value = '\"running\"' WHERE key = 'status'")
    db.close()
    assert read_record(tmp_path / "s").status == "interrupted"


def test_a_time_limit_counts_earlier_runs(tmp_path):
    made = study(objective=lambda key, h: h["lr"], num_trials=10**6, max_seconds=0.3)
    first = jh.run_study(made, tmp_path / "s")
    again = jh.run_study(made, tmp_path / "s", resume=True)
    assert first.status == again.status == "stopped"
    assert 0 < len(first.trials["number"]) == len(again.trials["number"])


FACTS = {
    "name": "n", "config": {}, "space": [], "env": {}, "metric": "loss", "direction": "minimize", "num_trials": 3,
    "identity": {"a": 1},
}  # fmt: skip
ROW = (0, -1, 0, 0, 0, 1.0, 1, True, 0.0, "{}", "{}", b"0", b"0", None)


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    with create_record(tmp_path / "s", FACTS) as record:
        record.commit([ROW], None)
        with pytest.raises(jh.JaxhpoError, match="another process is running this study"):
            reopen_record(tmp_path / "s", {"a": 1})
        with pytest.raises(jh.JaxhpoError, match="another process is running this study"):
            create_record(tmp_path / "s", FACTS)
        assert len(read_record(tmp_path / "s").trials) == 1
    with reopen_record(tmp_path / "s", {"a": 1}) as record:
        assert record.elapsed() == 0.0


def test_a_transaction_is_all_or_nothing(tmp_path):
    with create_record(tmp_path / "s", FACTS) as record:
        with pytest.raises(jh.JaxhpoError):
            record.commit([ROW, (1, 0)], (1, b"state", None))
        assert read_record(tmp_path / "s").trials == []
        assert record.snapshots() == []
        record.commit([ROW], (1, b"state", None))
        assert record.snapshots() == [(1, b"state", None)]


def test_a_full_disk_is_told_and_nothing_committed_is_lost(tmp_path):
    with create_record(tmp_path / "s", FACTS) as record:
        record.commit([ROW], (1, b"state", None))
        pages = record._connection.execute("PRAGMA page_count").fetchone()[0]
        record._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(jh.JaxhpoError, match="the disk is full; all trials up to the last commit are kept"):
            record.commit([(1, *ROW[1:])], (2, b"x" * 100_000, None))
    stored = read_record(tmp_path / "s")
    assert [t.number for t in stored.trials] == [0]
    with reopen_record(tmp_path / "s", {"a": 1}) as record:
        assert record.snapshots() == [(1, b"state", None)]


@pytest.mark.parametrize("damage", ["text", "head", "middle", "empty", "other"])
def test_a_damaged_record_is_refused_and_left_as_it_is(tmp_path, damage):
    folder = tmp_path / "s"
    jh.run_study(study(), folder)
    path = folder / FILE
    data = bytearray(path.read_bytes())
    if damage == "text":
        data = bytearray(b"not a database at all, but long enough to look like a file of some kind" * 20)
    elif damage == "head":
        data[:64] = bytes(64)
    elif damage == "middle":
        data[4096 : len(data) - 4096] = bytes(len(data) - 8192)
    elif damage == "empty":
        data = bytearray()
    else:
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE something (x)")
        db.close()
        data = bytearray(path.read_bytes())
    path.write_bytes(bytes(data))
    for attempt in (lambda: read_record(folder), lambda: jh.run_study(study(), folder, resume=True)):
        with pytest.raises(jh.JaxhpoError, match=r"damaged|not a record of a study") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == bytes(data)


def test_a_snapshot_that_fails_its_checksum_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    jh.run_study(study(), tmp_path / "whole")
    stop_after(monkeypatch, 6)
    with pytest.raises(Killed):
        jh.run_study(study(), tmp_path / "s")
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / "s" / FILE) as db:
        db.execute("UPDATE snapshot SET state = x'00' WHERE round = (SELECT max(round) FROM snapshot)")
    db.close()
    jh.run_study(study(), tmp_path / "s", resume=True)
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("below", ["a-file", "a-file/deeper"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, below):
    (tmp_path / "a-file").write_text("in the way")
    with pytest.raises(jh.JaxhpoError, match="a-file") as caught:
        jh.run_study(study(), tmp_path / below)
    assert "\n" not in str(caught.value)


def test_resume_in_python_begins_what_is_not_there_yet(tmp_path):
    run = lambda: jh.minimize(_scaled_rate, SPACE, jh.PSO(num_lanes=4), key=0, num_trials=8, record=tmp_path / "s", resume=True)
    assert run().best.loss == run().best.loss


def _scaled_rate(key, hparams):
    return 2 * hparams["lr"]


def test_no_study_here(tmp_path):
    with pytest.raises(jh.JaxhpoError, match="there is no study here"):
        read_record(tmp_path)
    with pytest.raises(jh.JaxhpoError, match="there is no study here"):
        jh.run_study(study(), tmp_path / "nowhere", resume=True)


def test_ctrl_c_ends_after_the_chunk_and_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)
    seen = []

    def interrupt(progress):
        seen.append(progress)
        if progress.trials >= 10 and progress.phase == "running":
            os.kill(os.getpid(), signal.SIGINT)

    result = jh.run_study(study(), tmp_path / "s", progress=interrupt)
    assert result.status == "interrupted"
    assert 10 <= len(result.trials["number"]) < 40
    assert read_record(tmp_path / "s").status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = jh.run_study(study(), tmp_path / "s", resume=True)
    whole = jh.run_study(study())
    np.testing.assert_array_equal(resumed.trials["loss"], whole.trials["loss"])
    assert seen[0].phase == "compiling"


def test_confirmation_is_on_fresh_keys_and_recorded(tmp_path):
    result = jh.run_study(study(), tmp_path / "s")
    from_result = confirm(study(), result, 5)
    assert read_record(tmp_path / "s").notes["confirmation"] == json.loads(canonical(from_result))
    assert from_result == confirm(study(), tmp_path / "s", 5)
    losses = from_result["validation"]["loss"]
    assert len(set(losses)) == 5
    assert result.best.loss not in losses
    # On the mean of many fresh keys: lr-SGD with noise 0.1 has E x^2 = 0.01 (1-a^2t)/(1-a^2) + a^2t, a = 1 - lr.
    many = np.array(confirm(study(), result, 4000)["validation"]["loss"])
    a = 1 - result.best.hparams["lr"]
    expected = 0.01 * (1 - a**24) / (1 - a**2) + a**24
    # False failures: 6 standard errors of a chi-square-like mean, below one in a million.
    assert abs(many.mean() - expected) < 6 * many.std() / np.sqrt(4000)


def test_pack_and_unpack_keep_every_bit():
    tree = {
        "f": jnp.array([1.5, jnp.nan, -0.0], jnp.float32),
        "h": jnp.arange(3, dtype=jnp.bfloat16),
        "i": jnp.int32(7),
        "b": jnp.array([True, False]),
        "k": jax.random.split(jax.random.key(3), 2),
        "none": (),
        "empty": jnp.zeros((0, 2)),
    }
    back = unpack(jax.eval_shape(lambda: tree), pack(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for name in ("f", "h", "i", "b", "empty"):
        assert np.asarray(back[name]).tobytes() == np.asarray(tree[name]).tobytes()
    assert (jax.random.key_data(back["k"]) == jax.random.key_data(tree["k"])).all()
    with pytest.raises(jh.JaxhpoError, match="another layout"):
        unpack(jax.eval_shape(lambda: {**tree, "f": jnp.zeros(4)}), pack(tree))


SCRIPT = """
import sys, jax, jax.numpy as jnp, jaxhpo as jh
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_record
from jaxhpo.study import driver, record
driver._CHUNK_SECONDS = 0.0
folder = Path(sys.argv[1])
jh.run_study(test_record.study(num_trials=300), folder, resume=record.holds_study(folder))
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    """Real kills of a real process, wherever they fall; the experiment ``experiments.crash`` does forty."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, str(script)]
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True)
    random, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        time.sleep(random.uniform(1.0, 5.0))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        assert kills < 60
    assert process.returncode == 0
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert last_state(tmp_path / "killed") == last_state(tmp_path / "whole")
