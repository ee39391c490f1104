"""Metrics equal scikit-learn's, losses equal optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhpo.tasks import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def case(seed, num_labels, num_predicted, num_classes=6, size=60):
    """Scores and labels; classes beyond ``num_labels`` never occur as labels, beyond ``num_predicted`` never as predictions."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(size, num_classes)).astype(np.float32)
    scores[:, num_predicted:] = -9
    return scores, rng.integers(0, num_labels, size)


@pytest.mark.filterwarnings("ignore:y_pred contains classes", "ignore:A single label was found")
@pytest.mark.parametrize(("num_labels", "num_predicted"), [(6, 6), (4, 6), (6, 4), (3, 4), (1, 1), (1, 6), (6, 1)])
def test_classification_metrics_with_absent_classes(num_labels, num_predicted):
    scores, labels = case(num_labels + 10 * num_predicted, num_labels, num_predicted)
    predicted = scores.argmax(1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "error": 1 - sklearn_metrics.accuracy_score(labels, predicted),
        "macro_f1": sklearn_metrics.f1_score(labels, predicted, average="macro"),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name)(scores, labels), value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_cross_entropy_with_traced_smoothing():
    scores, labels = case(0, 6, 6)
    np.testing.assert_allclose(
        metrics.cross_entropy(scores, labels),
        sklearn_metrics.log_loss(labels, jax.nn.softmax(scores), labels=range(6)),
        rtol=1e-5,
    )
    amounts = jnp.array([0.0, 0.1, 1.0])
    smoothed = jax.vmap(metrics.cross_entropy, (None, None, 0))(scores, labels, amounts)
    targets = [optax.smooth_labels(jax.nn.one_hot(labels, 6), float(amount)) for amount in amounts]
    np.testing.assert_allclose(smoothed, [optax.softmax_cross_entropy(scores, t).mean() for t in targets], rtol=1e-5)


def test_regression_metrics():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(30, 2)).astype(np.float32)
    predictions = targets + 0.3 * rng.normal(size=(30, 2)).astype(np.float32)
    for p, t in ((predictions, targets), (predictions[:, 0], targets[:, 0])):
        np.testing.assert_allclose(metrics.mse(p, t), sklearn_metrics.mean_squared_error(t, p), rtol=1e-5)
        np.testing.assert_allclose(metrics.r2(p, t), sklearn_metrics.r2_score(t, p), rtol=1e-5)
    constant = np.ones((30, 2), np.float32)
    for p in (constant, np.stack([constant[:, 0], targets[:, 0]], 1)):
        np.testing.assert_allclose(metrics.r2(p, constant), sklearn_metrics.r2_score(constant, p), atol=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.mse(targets[:, :1], targets[:, 0])
