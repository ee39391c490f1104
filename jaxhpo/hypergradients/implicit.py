"""Hypergradients by the implicit function theorem, at the point where training ends.

Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, algorithm 1; Rajeswaran et al., "Meta-learning with
implicit gradients", 2019 (conjugate gradients); Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by
implicit differentiation", 2020, algorithms 2 and 3 (Neumann series); Hataya and Yamada, "Nystrom method for accurate and
scalable implicit differentiation", 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients.estimate import (
    Assemble,
    Estimate,
    Floats,
    score,
    start,
    trained,
    value_and_grad,
    without_derivative,
)
from jaxhpo.tasks.supervised import training_loss
from jaxhpo.tasks.task import Task, Training, callable_pytree

SOLVERS = ("cg", "neumann", "nystrom")

Product = Callable[[Array], Array]
"""A symmetric matrix ``A`` ``[P, P]`` as the function ``u -> A u`` of vectors ``[P]``."""


@pytree_dataclass
class Implicit:
    """The derivative of a metric by hyperparameters of the training loss, at the weights that training ends with.

    With ``L`` the training loss, ``M`` the metric, ``w`` the trained weights and ``h`` the hyperparameters::

        dM/dh = dM/dh (direct) - (d/dh) <dL/dw, q>    where (H + damping I) q = dM/dw and H = d2L/dw2

    The training is run without derivatives, so that time and memory of the derivative do not depend on its length. It is
    right where ``w`` is a minimum of ``L``, isolated or such that the metric does not tell its neighbours apart: weight decay
    and other penalties inside the loss, label smoothing, weights of examples. A hyperparameter of the optimizer moves the
    weights on their way, not the point where they end: ``check`` refuses it.

    The products with ``H`` are forward over reverse mode on all the training data at once, whose activations must fit
    into memory; a ``custom_vjp`` inside the training loss forbids them.

    Three gauges are reported beside the metrics, which tell how far the derivative can be trusted:

    - ``gauge/residual``: ``|(H + damping I) q - dM/dw| / |dM/dw|``: 0 if the linear system is solved, 1 if nothing is.
    - ``gauge/gradient_norm``: ``|dL/dw|`` at the end; 0 if the training has converged.
    - ``gauge/unconverged``: ``<dL/dw, q>``: by how much the metric would still fall, to first order, if the training went
      on to the minimum. It should be small against the differences in the metric that matter.

    Solvers, with ``A = H + damping I``. The errors are relative ones of the hypergradient, for softmax regression on 600
    digits with a penalty of ``1e-3 / 2 * |w|^2``, 640 weights, converged:

    - ``cg``: conjugate gradients, ``num_iterations`` products. The one to take: errors of 1e-1, 4e-3 and 1e-7 after 10, 20
      and 40 products. A lane stops at a direction of negative curvature, with the smallest residual that it has seen.
    - ``neumann``: ``num_iterations`` terms of the Neumann series, as many products. ``q`` is too small by the factor
      ``1 - (1 - step_size * a)^num_iterations`` along an eigenvector with eigenvalue ``a``: errors of 0.8 and 0.2 after 100
      and 1000 terms. A lane stops where the terms begin to grow, as they do if ``step_size`` exceeds 2 over the largest
      eigenvalue, or an eigenvalue is negative.
    - ``nystrom``: ``rank`` random columns of ``H``, as many products, then dense algebra without iterations. What the columns
      do not span is divided by ``damping`` alone, so that the size of the hypergradient is wrong unless ``damping`` is well
      chosen; with ``damping = 0`` that part is left out (the pseudo-inverse), and directions of negative curvature always
      are. 20 columns: no use; 200: errors of 2e-2 without damping, 0.9 with 1e-3; all columns: exact.

    Attributes:
        task: what is trained.
        num_steps: ``T``, steps of the training.
        metric: which metric is differentiated.
        train_loss: ``(hparams, params, train_state) -> scalar``, what the training minimises, on all its data and without
            random numbers; None takes that of a task of ``from_nnx`` or ``from_linen``, as ``jaxhpo.tasks.training_loss``
            does. Bind arrays by ``functools.partial``. The weights are ``train_state.params``, or ``train_state["params"]``.
        solver: ``cg``, ``neumann`` or ``nystrom``.
        num_iterations: of ``cg`` and ``neumann``.
        rank: columns of ``nystrom``; all of them if there are fewer weights.
        damping: added to the diagonal of the Hessian. Below the weight decay, or none: it biases the hypergradient.
        step_size: of ``neumann``, below 2 over the largest eigenvalue of ``A``, best at half of that.
    """

    task: Task
    num_steps: int = setting(static=True, low=1)
    metric: str = setting("loss", static=True)
    train_loss: Callable[[Any, Any, Any], Array] | None = None
    solver: str = setting("cg", static=True, choices=SOLVERS)
    num_iterations: int = setting(20, static=True, low=1)
    rank: int = setting(20, static=True, low=1)
    damping: Array | float = setting(0.0, low=0.0)
    step_size: Array | float = setting(0.1, low=0.0)

    def __post_init__(self) -> None:
        if callable(self.train_loss):
            object.__setattr__(self, "train_loss", callable_pytree("train_loss", self.train_loss))

    @property
    def training(self) -> Training:
        return Training(self.task, self.num_steps)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses floats that neither the gradient of the training loss nor the metric itself depends on, by structure.

        Raises:
            JaxhpoError: with their names; or if the training loss or the weights are not found.
        """
        key = jax.random.key(0)
        train_loss = self._train_loss()

        def begin(floats: Floats) -> tuple[Any, Any, Callable[[Any], Any]]:
            state = lax.stop_gradient(start(self.task, key, assemble(floats)))
            return state, *params_of(state)

        def scaled(scale: Floats) -> Array:
            _, params, put = begin(floats)
            params = jax.tree.map(lambda p: p * scale["scale"].astype(p.dtype), params)
            return score(self.task, self.metric, assemble(floats), put(params))[0]

        def pairing(floats: Floats) -> Array:
            state, params, _ = begin(floats)
            return jax.jvp(lambda params: train_loss(assemble(floats), params, state), (params,), (params,))[1]

        zero = without_derivative(lambda floats: score(self.task, self.metric, assemble(floats), begin(floats)[0])[0], floats)
        if zero and without_derivative(scaled, {"scale": jnp.ones(())}):
            raise JaxhpoError(
                f"metric = {self.metric!r}: its derivative by the weights is zero everywhere, as that of an accuracy is: "
                "take a loss"
            )
        zero = [name for name in without_derivative(pairing, floats) if name in zero]
        if zero:
            raise JaxhpoError(
                f"hypergradients: Implicit finds no derivative of {self.metric} by {', '.join(zero)}: the training loss does "
                "not depend on them. Hyperparameters of the optimizer (learning rate, momentum, the weight decay of adamw) "
                "move the weights on their way, not the point where they end: use Unrolled or Forward; a weight decay may "
                "also be put into the loss"
            )

    def _train_loss(self) -> Callable[[Any, Any, Any], Array]:
        train_loss = training_loss(self.task) if self.train_loss is None else self.train_loss
        if train_loss is None:
            raise JaxhpoError(
                "train_loss: what this task minimises cannot be found in it, as from_nnx and from_linen did not make it: give "
                "Implicit train_loss = (hparams, params, train_state) -> scalar, on all the training data"
            )
        return train_loss

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        hparams, train_loss = assemble(floats), self._train_loss()
        state = trained(self.task, key, hparams, self.num_steps)
        params, put = params_of(state)
        weights, unravel = ravel_pytree(params)

        def loss(floats: Floats, weights: jax.Array) -> Array:
            return train_loss(assemble(floats), unravel(weights), state)

        def final(floats: Floats, weights: jax.Array) -> tuple[Array, dict[str, Array]]:
            return score(self.task, self.metric, assemble(floats), put(unravel(weights)))

        (_, metrics), (direct, v) = jax.value_and_grad(final, argnums=(0, 1), has_aux=True)(floats, weights)
        gradient, hessian = jax.linearize(lambda weights: jax.grad(loss, argnums=1)(floats, weights), weights)
        damping = jnp.asarray(self.damping, weights.dtype)
        size = jnp.linalg.norm(v)
        unit = v / jnp.where(size > 0, size, 1.0)  # squares of small gradients would underflow

        # (H + damping I) q = dM/dw: Pedregosa, algorithm 1, (ii); Lorraine et al., algorithm 2, v2
        solution = self._solve(jax.random.fold_in(key, 2), hessian, damping, unit)
        residual = jnp.linalg.norm(unit - hessian(solution) - damping * solution)
        q = size * solution

        # dM/dh - (d/dh) <dL/dw, q>: Pedregosa, algorithm 1, (iii); Lorraine et al., algorithm 2, v3
        along_q = lambda floats: jax.jvp(lambda weights: loss(floats, weights), (weights,), (q,))[1]
        grad = jax.tree.map(jnp.subtract, direct, jax.grad(along_q)(floats))
        gauges = {"residual": residual, "gradient_norm": jnp.linalg.norm(gradient), "unconverged": gradient @ q}
        return Estimate(metrics | {f"gauge/{name}": value for name, value in gauges.items()}, grad)

    def _solve(self, key: Array, hessian: Product, damping: Array, b: Array) -> Array:
        damped = lambda u: hessian(u) + damping * u
        if self.solver == "cg":
            return conjugate_gradient(damped, b, self.num_iterations)
        if self.solver == "neumann":
            return neumann(damped, b, self.num_iterations, jnp.asarray(self.step_size, b.dtype))
        columns = jax.random.choice(key, b.size, (min(self.rank, b.size),), replace=False)
        return nystrom(hessian, b, columns, damping)

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)


def params_of(state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The weights within a training state, and a function that puts others in their place.

    Raises:
        JaxhpoError: if the state has none by the name of ``params``.
    """
    if isinstance(state, dict) and "params" in state:
        return state["params"], lambda params: {**state, "params": params}
    if dataclasses.is_dataclass(state) and hasattr(state, "params"):
        return state.params, lambda params: dataclasses.replace(state, params=params)
    if isinstance(state, tuple) and hasattr(state, "_replace") and hasattr(state, "params"):
        return state.params, lambda params: state._replace(params=params)
    found = f"a dict of {', '.join(map(repr, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
    raise JaxhpoError(
        f"hypergradients: the training state is {found}, and Implicit does not see which part of it are the weights: make it a "
        "dict with the key 'params', or a dataclass or named tuple with the field params"
    )


_Descent = tuple[Array, Array, Array, Array, Array, Array]


def conjugate_gradient(product: Product, b: Array, num_iterations: int) -> Array:
    """``A^-1 b`` for positive definite ``A``, by Hestenes and Stiefel; ``b`` of about unit norm, ``[P]``.

    Stops at the first direction of no positive curvature: nothing is left of the residual, or ``A`` is not positive definite.
    Then the steps before may have been too long already, and what left the least residual is returned.
    """
    eps = jnp.finfo(b.dtype).eps

    def one(carry: _Descent, _: None) -> tuple[_Descent, None]:
        x, r, p, best, least, going = carry
        image = product(p)
        curvature, rr = p @ image, r @ r
        going = going & (curvature > eps * jnp.linalg.norm(p) * jnp.linalg.norm(image))
        alpha = jnp.where(going, rr / jnp.where(going, curvature, 1.0), 0.0)
        x = x + alpha * p
        r = jnp.where(going, r - alpha * image, r)
        following = r @ r
        p = jnp.where(going, r + following / jnp.where(rr > 0, rr, 1.0) * p, p)
        best, least = jnp.where(following < least, x, best), jnp.minimum(following, least)
        return (x, r, p, best, least, going), None

    zeros, going = jnp.zeros_like(b), jnp.asarray(True)
    (x, _, _, best, _, going), _ = lax.scan(one, (zeros, b, b, zeros, b @ b, going), length=num_iterations)
    return jnp.where(going, x, best)


def neumann(product: Product, b: Array, num_terms: int, step_size: Array) -> Array:
    """``step_size * sum_j (I - step_size A)^j b``, ``num_terms`` terms from ``j = 0``: Lorraine et al., algorithm 3, scaled.

    Each term is what the sum before it left of the residual: from where it grows on, the sum is kept as it is.
    """

    def one(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        total, term, going = carry
        following = term - step_size * product(term)
        going = going & (following @ following <= term @ term)
        return (jnp.where(going, total + step_size * term, total), jnp.where(going, following, term), going), None

    return lax.scan(one, (jnp.zeros_like(b), b, jnp.asarray(True)), length=num_terms)[0][0]


def nystrom(product: Product, b: Array, columns: Array, damping: Array) -> Array:
    """``(H_K + damping I)^-1 b`` for the approximation ``H_K = H[:, K] H[K, K]^+ H[:, K]^T`` by the columns ``K``, ``i32[K]``.

    Hataya and Yamada's result by another way than the Woodbury identity: from the eigenvectors of ``H_K``, which
    can do without damping and lose no digits to it. The part of ``H[K, K]`` that is not positive is left out.
    """
    rows = lax.map(lambda i: product(jnp.zeros_like(b).at[i].set(1.0)), columns)  # H[K, :], H is symmetric
    values, vectors = jnp.linalg.eigh(rows[:, columns])
    threshold = jnp.finfo(b.dtype).eps * columns.size * jnp.max(jnp.abs(values))
    # H_K = F F^T, with columns of zeros in F for what is left out
    inverse_root = jnp.where(values > threshold, 1.0 / jnp.sqrt(jnp.where(values > threshold, values, 1.0)), 0.0)
    basis, roots, _ = jnp.linalg.svd(rows.T @ vectors * inverse_root, full_matrices=False)
    spanned = roots > jnp.finfo(b.dtype).eps * columns.size * jnp.max(roots)
    basis = jnp.where(spanned, basis, 0.0)
    along = basis.T @ b
    inside = basis @ (along / jnp.where(spanned, roots**2 + damping, 1.0))
    outside = (b - basis @ along) / jnp.where(damping > 0, damping, 1.0)
    return inside + jnp.where(damping > 0, outside, 0.0)
