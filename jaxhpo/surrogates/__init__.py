"""A Gaussian process for Bayesian optimization: pure functions over masked tables of fixed capacity.

kernels -> linalg -> regression -> outputs, fit -> acquisition -> search; the table of observations and the trust region beside.
"""

from __future__ import annotations

from jaxhpo.surrogates.acquisition import (
    ACQUISITIONS,
    incumbent_mean,
    latent_samples,
    log_ei,
    log_feasibility,
    log_noisy_ei,
    upper_confidence,
)
from jaxhpo.surrogates.fit import Model, Priors, fit
from jaxhpo.surrogates.kernels import KERNELS, KernelParams, covariance, inputs_of
from jaxhpo.surrogates.outputs import excess
from jaxhpo.surrogates.regression import GPParams, Posterior, add_pending, condition, joint_samples, log_likelihood, predict
from jaxhpo.surrogates.search import maximise, pool_of
from jaxhpo.surrogates.table import Table, empty_table, observe

__all__ = [
    "ACQUISITIONS",
    "KERNELS",
    "GPParams",
    "KernelParams",
    "Model",
    "Posterior",
    "Priors",
    "Table",
    "add_pending",
    "condition",
    "covariance",
    "empty_table",
    "excess",
    "fit",
    "incumbent_mean",
    "inputs_of",
    "joint_samples",
    "latent_samples",
    "log_ei",
    "log_feasibility",
    "log_likelihood",
    "log_noisy_ei",
    "maximise",
    "observe",
    "pool_of",
    "predict",
    "upper_confidence",
]
