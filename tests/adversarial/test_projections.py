"""Nearest points against general-purpose solvers, which know nothing of how ours are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dlcourse.adversarial.projections import inside_l1, onto_hyperplane
from dlcourse.adversarial.threat import Threat, size

COUNT, D = 40, 12


def instances(seed=0, low=-0.25, high=1.25):
    """Points, some coordinates at the walls; normals, some zero; offsets that points of the box can reach."""
    random = np.random.default_rng(seed)
    x = random.uniform(low, high, (COUNT, D))
    x[random.random((COUNT, D)) < 0.2] = low
    x[random.random((COUNT, D)) < 0.2] = high
    w = random.normal(size=(COUNT, D)) * 10.0 ** random.uniform(-4, 4, (COUNT, 1))
    w[random.random((COUNT, D)) < 0.15] = 0.0
    b = (w * random.uniform(low, high, (COUNT, D))).sum(1)
    return x, w, b


def moved(x, w, b, norm, low, high):
    shaped = [jnp.asarray(a, jnp.float32).reshape(COUNT, 2, 2, 3) for a in (x, w)]
    excess = jnp.asarray((w * x).sum(1) - b, jnp.float32)
    return np.asarray(onto_hyperplane(*shaped, excess, norm, low, high), np.float64).reshape(COUNT, D)


def linear_program(x, w, b, norm, low, high):
    """min t with |d_i| <= t, or min sum t_i with |d_i| <= t_i."""
    bounds = np.eye(D)
    over = np.ones((D, 1)) if norm == "linf" else bounds
    above = np.block([[bounds, -over], [-bounds, -over]])
    cost = np.concatenate([np.zeros(D), np.ones(over.shape[1])])
    scale = np.abs(w).max()
    found = optimize.linprog(cost, above, np.zeros(2 * D), np.append(w / scale, np.zeros(over.shape[1]))[None],
                             [(b - w @ x) / scale], [*zip(low - x, high - x, strict=True),
                                                     *[(0, None)] * over.shape[1]])
    assert found.status == 0
    return found.fun


def quadratic_program(x, w, b, low, high):
    scale = np.abs(w).max()
    found = optimize.minimize(lambda d: d @ d / 2, np.zeros(D), jac=lambda d: d, method="SLSQP",
                              bounds=list(zip(low - x, high - x, strict=True)),
                              constraints={"type": "eq", "fun": lambda d: (w @ (x + d) - b) / scale,
                                           "jac": lambda d: w / scale},
                              options={"ftol": 1e-14, "maxiter": 500})
    assert found.success
    return np.linalg.norm(found.x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_hyperplane_is_reached_within_the_box_by_the_smallest_change(norm):
    low, high = -0.25, 1.25
    x, w, b = instances()
    d = moved(x, w, b, norm, low, high)
    assert (x + d >= low - 1e-6).all() and (x + d <= high + 1e-6).all()
    np.testing.assert_allclose((w * (x + d)).sum(1) / np.abs(w).max(1), b / np.abs(w).max(1), atol=2e-6)
    solved = [quadratic_program(*row, low, high) if norm == "l2" else linear_program(*row, norm, low, high)
              for row in zip(x, w, b, strict=True)]
    np.testing.assert_allclose(size(jnp.asarray(d, jnp.float32)[:, None, None], norm), solved, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_hyperplane_beyond_the_box_is_approached_as_far_as_the_box_goes(norm):
    x, w, _ = instances(1)
    farthest = np.where(w > 0, -0.25, 1.25)
    d = moved(x, w, (w * farthest).sum(1) - np.abs(w).max(1), norm, -0.25, 1.25)
    np.testing.assert_allclose(x + d, np.where(w == 0, x, farthest), atol=1e-6)


def test_a_point_of_the_hyperplane_stays_and_a_plane_without_normal_moves_nothing():
    x, w, _ = instances(2)
    for norm in ("linf", "l2", "l1"):
        assert np.abs(moved(x, w, (w * x).sum(1), norm, -0.25, 1.25)).max() == 0
        assert np.abs(moved(x, 0 * w, np.ones(COUNT), norm, -0.25, 1.25)).max() == 0


def test_l1_ball_in_box_is_projected_onto_exactly():
    random = np.random.default_rng(3)
    x = random.uniform(0, 1, (COUNT, D))
    x[random.random((COUNT, D)) < 0.2] = 0.0
    y = random.normal(size=(COUNT, D)) * random.choice([0.05, 0.3, 2.0], (COUNT, 1))
    eps = random.uniform(0.2, 2.0, COUNT)
    moved_to, origin = (jnp.asarray(a, jnp.float32).reshape(COUNT, 2, 2, 3) for a in (x + y, x))
    ours = np.asarray(inside_l1(moved_to, origin, Threat(eps=jnp.asarray(eps, jnp.float32), norm="l1")), np.float64)
    ours = ours.reshape(COUNT, D) - x
    assert (np.abs(ours).sum(1) <= eps + 1e-5).all() and (x + ours >= -1e-6).all() and (x + ours <= 1 + 1e-6).all()
    for own, x_, y_, eps_ in zip(ours, x, y, eps, strict=True):
        # d = up - down with both >= 0 makes the ball linear.
        found = optimize.minimize(lambda z, y=y_: ((z[:D] - z[D:] - y) ** 2).sum() / 2, np.zeros(2 * D), method="SLSQP",
                                  jac=lambda z, y=y_: np.concatenate([z[:D] - z[D:] - y, y - z[:D] + z[D:]]),
                                  bounds=[*((0, 1 - v) for v in x_), *((0, v) for v in x_)],
                                  constraints={"type": "ineq", "fun": lambda z, e=eps_: e - z.sum(),
                                               "jac": lambda z: -np.ones(2 * D)}, options={"ftol": 1e-15})
        np.testing.assert_allclose(own, found.x[:D] - found.x[D:], atol=3e-4)


def test_l1_ball_in_box_leaves_what_is_inside_alone():
    x = jnp.full((2, 2, 2, 3), 0.5)
    y = 0.01 * jax.random.normal(jax.random.key(0), x.shape)
    np.testing.assert_allclose(inside_l1(x + y, x, Threat(eps=1.0, norm="l1")), x + y, atol=1e-7)
