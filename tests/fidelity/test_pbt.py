"""Population based training: who copies whom against plain Python, what a copy's point is, lineage, and a problem that no
constant hyperparameters solve."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playing import Notes

import jaxhpo as jh
from jaxhpo.core import FRESH, FULL, CubeSpec, Feedback, Kind, Run
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.explore import explored
from jaxhpo.fidelity.pbt import PBT
from jaxhpo.fidelity.population import tournament, truncation
from jaxhpo.study.loop import first_carry, propose, run_round
from jaxhpo.study.problem import Limits, Plan, make_problem

SPEC = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 7), Run(Kind.CHOICE, 3)))
STEP = 0.08

init = jax.jit(lambda optimizer, key, spec: optimizer.init(key, spec), static_argnums=2)
ask = jax.jit(lambda optimizer, state: optimizer.ask(jax.random.key(0), state))
update = jax.jit(lambda optimizer, key, state, query, feedback: optimizer.update(key, state, query, feedback))


def population(lanes, **settings):
    """Intervals of 3 steps in trainings of 11: losses come after 3, 6, 9 and 11 steps."""
    settings = {"interval": 3, "max_steps": 11, "perturbation": STEP, "fraction": 0.3} | settings
    return PBT(Notes(lanes), **settings)


def play(optimizer, seed, rounds, bad=0.08, slow=0.3):
    """What happened in each round, played as a study does: one step a round, which lanes now and then miss.

    Losses are random numbers of few digits; ``bad`` of them, and as many before they are due, are NaN.
    """
    rng, lanes = np.random.default_rng(seed), optimizer.num_lanes
    state = init(optimizer, jax.random.key(seed), SPEC)
    number, steps, done = np.full(lanes, -1), np.zeros(lanes, int), np.ones(lanes, bool)
    history, next_number = [], 0
    for round in range(rounds):
        query = ask(optimizer, state)
        cube, parent, budget = (np.asarray(x) for x in (query.cube, query.parent, query.budget))
        before = steps.copy()
        for lane in np.flatnonzero(done):
            steps[lane] = 0 if parent[lane] == FRESH else before[parent[lane]]
            if parent[lane] != lane:
                number[lane], next_number = next_number, next_number + 1
        due = np.minimum(budget, 11)
        assert (steps < due)[done].all(), "a trial was asked to go on that has nothing left to train"
        steps = steps + (rng.random(lanes) >= slow)
        breaks = rng.random(lanes) < bad
        done = (steps >= due) | breaks
        loss = np.where(breaks, np.nan, np.round(rng.random(lanes), 1)).astype(np.float32)
        told = Feedback(*map(jnp.asarray, (np.where(done, loss, -1e9), done, np.where(done, steps, -5).astype(np.int32))))
        state = update(optimizer, jax.random.key(1000 * seed + round), state, query, told)
        history.append((number.copy(), cube, parent, budget, steps.copy(), done, loss, state))
    return history


class Reference:
    """Who may be the next parent of each lane, in plain Python, from what the lanes answered."""

    def __init__(self, lanes, exploit, fraction):
        self.exploit, self.fraction = exploit, Fraction(str(fraction))
        self.loss, self.steps, self.generation = [None] * lanes, [0] * lanes, [0] * lanes

    def allowed(self, done, loss, steps):
        """For each lane that is done the set of parents that it may have."""
        lanes = range(len(done))
        for b in lanes:
            if done[b]:
                self.loss[b], self.steps[b] = None if np.isnan(loss[b]) else float(loss[b]), int(steps[b])
        self.ended = {b for b in lanes if done[b] and self.loss[b] is not None and self.steps[b] >= 11}
        sets = {}
        for b in lanes:
            if not done[b]:
                continue
            group = [c for c in lanes if self.generation[c] == self.generation[b] and self.loss[c] is not None]
            group = sorted((c for c in group if c not in self.ended), key=lambda c: (self.loss[c], c))
            few = max(1, int(self.fraction * len(group)))
            if b in self.ended:
                sets[b] = {FRESH}
            elif self.loss[b] is None:
                good = group if self.exploit == "binary_tournament" else group[:few]
                sets[b] = set(good) or {FRESH}
            elif self.exploit == "binary_tournament":
                others = [c for c in group if c != b]
                better = {c for c in others if self.loss[c] < self.loss[b]}
                sets[b] = better | ({b} if len(better) < len(others) or not others else set())
            else:
                sets[b] = set(group[:few]) if len(group) > 1 and b in group[-few:] else {b}
        return sets

    def follow(self, parent):
        """The lanes after they have taken these parents."""
        newest = max(self.generation)
        newest += any(self.generation[b] == newest for b in self.ended)
        loss, steps = list(self.loss), list(self.steps)
        for b, c in parent.items():
            if c == FRESH:
                self.generation[b], self.loss[b], self.steps[b] = newest, None, 0
            elif c != b:
                self.loss[b], self.steps[b] = None, steps[c]
                assert loss[c] is not None, "copied from a lane without an answer"


@pytest.mark.parametrize(
    ("exploit", "lanes", "fraction"),
    [("truncation", 1, 0.2), ("truncation", 2, 0.2), ("truncation", 13, 0.3), ("binary_tournament", 6, 0.2)],
)
def test_decisions_are_those_of_plain_python(exploit, lanes, fraction):
    optimizer = population(lanes, exploit=exploit, fraction=fraction)
    seen = {"copy": 0, "own": 0, "fresh": 0}
    for seed in range(6):
        reference = Reference(lanes, exploit, fraction)
        history = play(optimizer, seed, 80)
        for now, then in itertools.pairwise(history):
            _, _, _, _, steps, done, loss, _ = now
            _, _, parent, budget, _, _, _, _ = then
            sets = reference.allowed(done, loss, steps)
            for b, allowed in sets.items():
                assert parent[b] in allowed
                seen["fresh" if parent[b] == FRESH else "own" if parent[b] == b else "copy"] += 1
            reference.follow({b: int(parent[b]) for b in sets})
            for b in sets:
                due = next(due for due in (3, 6, 9, FULL) if due > reference.steps[b])
                assert budget[b] == due
    assert seen["own"] > 50
    assert seen["fresh"] > 20
    assert (seen["copy"] > 20) == (lanes > 1)


def test_a_trial_keeps_its_point_and_a_copy_has_one_beside_its_parents():
    history = play(population(13), 3, 80)
    points, copies = {}, 0
    for before, (number, cube, parent, *_) in itertools.pairwise(history):
        for b in range(13):
            if number[b] == before[0][b]:
                np.testing.assert_array_equal(cube[b], before[1][b])
            elif parent[b] != FRESH:
                old, new = before[1][parent[b]], cube[b]
                reflected = lambda x: np.where(x < 0, -x, np.where(x > 1, 2 - x, x))
                ways = np.stack([reflected(old[:2] + STEP), reflected(old[:2] - STEP)])
                assert (np.abs(ways - new[:2]).min(0) < 1e-6).all()
                was, is_now = (np.asarray(SPEC.level_of(jnp.asarray(x)))[2] for x in (old, new))
                assert abs(int(was) - int(is_now)) == 1
                copies += 1
            assert points.setdefault(number[b], cube[b].tobytes()) == cube[b].tobytes()
    assert copies > 50


def test_explore_moves_and_redraws_with_the_stated_chances():
    """Counts of 20000 draws; each of the bounds, 5 standard deviations, is passed by chance in 1 of 1.7 million runs."""
    spec = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 2), Run(Kind.INT, 40, log_low=2), Run(Kind.CHOICE, 4)))
    lanes = 20000
    start = np.asarray(spec.snap(jnp.asarray([0.03, 0.5, 0.9, 0.5, 0.1], jnp.float32)))
    cube = jnp.broadcast_to(start, (lanes, 5))

    def near(hits, share):
        assert abs(np.mean(hits) - share) < 5 * np.sqrt(share * (1 - share) / lanes)

    moved = np.asarray(explored(jax.random.key(0), spec, cube, "perturb", 0.05, 0.4))
    level = np.asarray(spec.level_of(jnp.asarray(moved)))
    first = np.asarray(spec.level_of(jnp.asarray(start)))
    np.testing.assert_allclose(np.unique(moved[:, 0].round(4)), [0.02, 0.08], atol=1e-4)  # 0.03 - 0.05 reflected
    np.testing.assert_allclose(np.unique(moved[:, 1].round(4)), [0.45, 0.55], atol=1e-4)
    near(moved[:, 1] > 0.5, 0.5)
    near((moved[:, 0] > 0.05) & (moved[:, 1] > 0.5), 0.25)  # dimensions apart
    assert (level[:, 2] == 0).all()  # the other of two levels, from the top one too
    assert (level[:, 3] != first[3]).all()
    assert np.abs(np.asarray(spec.cube_of(jnp.asarray(level)))[:, 3] - start[3]).max() < 0.1
    near(level[:, 4] != first[4], 0.4 * 3 / 4)

    mixed = np.asarray(explored(jax.random.key(1), spec, cube, "resample", 0.05, 0.4))
    near(np.abs(np.abs(mixed[:, 1] - 0.5) - 0.05) > 1e-5, 0.4)
    near(mixed[:, 1] < 0.25, 0.4 * 0.25)
    near(np.asarray(spec.level_of(jnp.asarray(mixed)))[:, 2] == 1, 0.4 * 0.5)
    wide = np.asarray(explored(jax.random.key(2), spec, cube, "resample", 0.05, 1.0))
    near(wide[:, 0] < 0.3, 0.3)


def test_sources_are_drawn_evenly():
    """Each count of 4000 draws lies within 5 standard deviations: 1 of 1.7 million runs fails by chance, for each bound."""
    loss = jnp.asarray([0.3, 0.1, 0.2, 0.9, jnp.inf, 0.1, 0.8, 0.5, 0.6, 0.4], jnp.float32)  # in order: 1 5 2 0 9 7 8 6 3
    known = jnp.isfinite(loss)
    peers = jnp.broadcast_to(known, (10, 10))
    keys = jax.random.split(jax.random.key(0), 4000)
    worst = np.asarray(jax.jit(jax.vmap(lambda key: truncation(key, loss, peers, 0.34)))(keys))  # three of nine
    duel = np.asarray(jax.jit(jax.vmap(lambda key: tournament(key, loss, peers)))(keys))
    for b in range(10):
        counts = np.bincount(worst[:, b], minlength=10)
        if b in (3, 4, 6, 8):
            assert set(np.flatnonzero(counts)) == {1, 2, 5}
            assert np.abs(counts[[1, 2, 5]] - 4000 / 3).max() < 5 * np.sqrt(4000 * 2 / 9)
        else:
            assert counts[b] == 4000
        others = 9 if b == 4 else 8
        better = [c for c in range(10) if c != b and loss[c] < loss[b]]
        counts = np.bincount(duel[:, b], minlength=10)
        assert counts[[c for c in range(10) if c not in (*better, b)]].sum() == 0
        assert np.abs(counts[better] - 4000 / others).max(initial=0) < 5 * np.sqrt(4000 / others)


def feed(optimizer, state, loss, steps, done=None, seed=0):
    loss = jnp.asarray(loss, jnp.float32)
    done = jnp.ones(loss.shape, bool) if done is None else jnp.asarray(done)
    told = Feedback(loss, done, jnp.broadcast_to(jnp.asarray(steps, jnp.int32), loss.shape))
    return update(optimizer, jax.random.key(seed), state, ask(optimizer, state), told)


def test_where_all_diverge_all_begin_afresh_and_the_inner_optimizer_is_told_so():
    optimizer = population(4)
    state = init(optimizer, jax.random.key(0), SPEC)
    for round in range(3):
        before = ask(optimizer, state)
        state = feed(optimizer, state, jnp.full(4, jnp.nan), 3, seed=round)
        after = ask(optimizer, state)
        assert (np.asarray(after.parent) == FRESH).all()
        assert (np.asarray(after.budget) == 3).all()
        assert (np.asarray(after.cube) != np.asarray(before.cube)).any(1).all()
        np.testing.assert_array_equal(after.cube, state.inner.cube)
        assert np.isinf(state.inner.told).all()  # as Notes keeps a NaN
        np.testing.assert_array_equal(state.inner.count, round + 1)


def test_what_the_inner_optimizer_is_told():
    """Two generations of four members: each first point is told once, at the end, lifted where it was given up."""
    optimizer = population(4, fraction=0.25)
    state = init(optimizer, jax.random.key(0), SPEC)
    start = np.asarray(ask(optimizer, state).cube)
    state = feed(optimizer, state, [0.3, 0.6, 0.4, np.nan], 3)
    query = ask(optimizer, state)
    np.testing.assert_array_equal(query.parent, [0, 0, 2, 0])  # the best of three: lane 0; the worst of them: lane 1
    state = feed(optimizer, state, [0.2, 0.1, 0.4, 0.3], 6)
    np.testing.assert_array_equal(ask(optimizer, state).parent, [0, 1, 1, 3])
    state = feed(optimizer, state, [0.3, 0.1, 0.2, 0.1], 9)
    assert (np.asarray(state.inner.count) == 0).all()
    np.testing.assert_array_equal(state.population.start, start)
    state = feed(optimizer, state, [0.5, 0.1, 0.2, 0.1], 11)
    # Lane 0 copied at 9 steps as the worst: no first point lived to the end, by which the others would be lifted.
    np.testing.assert_allclose(state.inner.told, [0.3, 0.6, 0.4, np.inf])
    assert (np.asarray(ask(optimizer, state).parent) == FRESH).all()
    state = feed(optimizer, state, [0.1, 0.2, 0.3, 0.4], 3)
    state = feed(optimizer, state, [0.3, 0.2, 0.1, 0.5], 6)
    state = feed(optimizer, state, [0.3, 0.2, 0.1, 0.5], 9)
    state = feed(optimizer, state, [0.5, 0.8, 0.1, 0.3], 11)
    # The first points of lanes 0 to 2 were trained to the end, that of lane 3 was given up at 0.4.
    np.testing.assert_allclose(state.inner.told, [0.5, 0.8, 0.1, 0.8])
    np.testing.assert_array_equal(state.inner.count, 2)


def test_a_finished_member_is_never_copied_by_one_of_the_next_generation():
    optimizer = population(3, fraction=0.5)
    state = init(optimizer, jax.random.key(0), SPEC)
    for steps in (3, 6, 9):
        state = feed(optimizer, state, [0.1, 0.1, 0.1], steps, done=[True, steps == 3, steps == 3])
    assert ask(optimizer, state).budget[0] == FULL
    state = feed(optimizer, state, [0.0, 0.5, 0.6], [11, 6, 6])  # the best ends; the worst of the two left copies the other
    np.testing.assert_array_equal(ask(optimizer, state).parent, [FRESH, 1, 1])
    np.testing.assert_array_equal(state.population.generation, [1, 0, 0])
    state = feed(optimizer, state, [9.0, np.nan, 0.6], [3, 7, 9])  # 0 is alone in its generation
    np.testing.assert_array_equal(ask(optimizer, state).parent, [0, 2, 2])
    state = feed(optimizer, state, [9.0, 0.3, np.nan], [6, 11, 10])  # nobody is left whom 2 might copy: it joins the next one
    np.testing.assert_array_equal(ask(optimizer, state).parent, [0, FRESH, FRESH])
    np.testing.assert_array_equal(state.population.generation, [1, 1, 1])


# Through a study.


def toy():
    """The toy of Jaderberg et al. 2017, section 4.4, where only one of two coordinates learns at a time.

    Both begin at 0.9, and the loss is the sum of their squares: with the same choice for the whole of a training it never
    falls below 0.81. The state knows who began it and what it was trained with.
    """

    def begin(key, hparams):
        return {
            "theta": jnp.full(2, 0.9),
            "born": jax.random.uniform(key, (3,)),
            "path": jnp.zeros(40),
            "t": jnp.int32(0),
        }

    def step(key, hparams, state):
        learns = jnp.arange(2) == hparams["which"]
        theta = state["theta"] * (1 - 2 * hparams["lr"] * learns)
        path = state["path"].at[state["t"]].set(hparams["lr"] + hparams["which"])
        return state | {"theta": theta, "path": path, "t": state["t"] + 1}

    def evaluate(hparams, state):
        return {"loss": (state["theta"] ** 2).sum(), "born": state["born"][0], "t": state["t"].astype(jnp.float32)}

    return jh.Training(jh.Task(begin, step, evaluate), 40, 2)


TOY = jh.Space({"lr": jh.Float(0.01, 0.3, log=True), "which": jh.Choice([0, 1])})


def test_it_solves_what_no_constant_hyperparameters_solve():
    settings = {"fraction": 0.25, "resample_probability": 0.5}
    found = []
    for seed in range(3):
        result = jh.minimize(toy(), TOY, PBT(jh.RandomSearch(8), **settings), key=seed, num_trials=120)
        found.append(result.best.loss)
        trials = result.trials
        row = {number: place for place, number in enumerate(trials["number"])}
        copies = 0
        for place, parent in enumerate(trials["parent"]):
            if parent < 0:
                assert trials["start"][place] == 0
            elif parent in row:
                assert trials["metrics.born"][place] == trials["metrics.born"][row[parent]]
                assert 0 < trials["start"][place] < trials["steps"][place]
                copies += 1
        assert copies > 20
        assert (trials["metrics.t"] == trials["steps"])[~np.isnan(trials["loss"])].all()
    assert max(found) < 0.2
    constant = jh.minimize(toy(), TOY, jh.RandomSearch(8), key=0, num_trials=120)
    assert constant.best.loss >= 0.81 - 1e-5


def test_training_states_are_copied_bit_for_bit_and_hold_no_hyperparameters():
    optimizer = PBT(jh.RandomSearch(6), fraction=0.4)
    settings = {"key": jax.random.key(0), "metric": "loss", "maximize": False}
    problem = make_problem(toy(), TOY, optimizer, limits=Limits(10**6), **settings)
    plan = Plan(6, 6, None)
    carry = first_carry(problem, plan)
    one = jax.jit(lambda problem, carry: (propose(problem, carry)[0], *run_round(problem, plan, carry)))
    copies = 0
    for _ in range(45):
        turn, after, rows = one(problem, carry)
        source, steps = np.asarray(turn.source), np.asarray(turn.steps)
        values = np.asarray(rows.values[0]) + np.asarray(rows.values[1], np.float32)  # lr + which
        old, new = (jax.tree.map(np.asarray, x.train_state) for x in (carry, after))
        for b in range(6):
            if bool(turn.fresh[b]):
                continue
            c, s = source[b], steps[b]
            np.testing.assert_array_equal(new["born"][b], old["born"][c])
            np.testing.assert_array_equal(new["path"][b][:s], old["path"][c][:s])
            np.testing.assert_array_equal(new["path"][b][s : s + 2], values[b])
            copies += c != b
        carry = after
    assert copies > 10


def test_settings_of_a_training():
    fitted = PBT(jh.RandomSearch(4)).for_training(100, 5)
    assert (fitted.interval, fitted.max_steps) == (10, 100)
    assert PBT(jh.RandomSearch(4)).for_training(4, 2).interval == 2
    assert fitted.for_training(100, 5) == fitted
    assert PBT(jh.RandomSearch(4), interval=7).for_training(100, 5).interval == 7
    for settings, steps, line in (
        ({}, (100, 100), "PBT: the training is one round"),
        ({"interval": 96}, (100, 5), "PBT: interval = 96: must be a whole number between 1 and 95"),
        ({"interval": 2.5}, (100, 5), "PBT: interval = 2.5: must be a whole number"),
        ({"max_steps": 50}, (100, 5), "PBT: max_steps = 50: must be the 100 steps"),
    ):
        with pytest.raises(JaxhpoError, match=line):
            PBT(jh.RandomSearch(4), **settings).for_training(*steps)
    for optimizer, line in (
        (PBT(jh.RandomSearch(4)), "PBT: interval and max_steps are not set"),
        (PBT(population(4), 3, 11), "PBT: inner = PBT"),
        (PBT(jh.RandomSearch, 3, 11), "PBT: inner = <class"),
    ):
        with pytest.raises(JaxhpoError, match=line):
            optimizer.init(jax.random.key(0), SPEC)


def test_the_table_of_the_inner_optimizer_grows():
    optimizer = PBT(jh.TPE(3, capacity=4, max_capacity=16), 3, 11)
    state = optimizer.init(jax.random.key(0), SPEC)
    assert optimizer.holds(state) == optimizer.inner.holds(state.inner) == 8
    larger = optimizer.enlarged(state)
    assert optimizer.holds(larger) > 8
    assert optimizer.enlarged(larger) is larger
    without = population(3)
    begun = without.init(jax.random.key(0), SPEC)
    assert without.holds(begun) > 10**9
    assert without.enlarged(begun) is begun
