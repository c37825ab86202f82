"""Defences reduce to what they must where their weights vanish, and do what they are for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlcourse import models, streams
from dlcourse.adversarial import bounds, certified_training, defences, gradient, threat
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError
from dlcourse.training import losses, state
from dlcourse.training.evaluation import predictor
from dlcourse.training.step import train_step

pytestmark = pytest.mark.slow

SHAPE, CLASSES, KEY = (4, 4, 1), 4, jax.random.key(9)
WITHIN = Threat(eps=0.1)


@functools.cache
def setting(spec="mlp,width=8,depth=1"):
    model = models.create(spec, CLASSES, SHAPE)
    variables = dict(model.init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
    params = variables.pop("params")
    batch = {"image": jax.random.uniform(jax.random.key(1), (6, *SHAPE)), "label": jnp.array([0, 1, 2, 3, 0, 1]),
             "mask": jnp.array([True] * 5 + [False])}
    return model, params, variables, batch


def value_and_slope(loss, params, model_state, batch):
    (value, (new_state, metrics)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, model_state, batch, KEY)
    return value, slope, new_state, metrics


def same(first, second, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), first, second)


@pytest.mark.parametrize("make", [
    lambda model: defences.pgd_training(model, Threat(eps=1e-7), steps=2),
    lambda model: defences.fast_training(model, Threat(eps=1e-7)),
    lambda model: defences.trades(model, WITHIN, beta=0.0, steps=2),
    lambda model: defences.awp(defences.trades(model, WITHIN, beta=0.0, steps=2), gamma=0.0),
    lambda model: defences.gaussian_augmentation(losses.cross_entropy(model), 0.0),
    lambda model: certified_training.ibp_loss(model, WITHIN, kappa=1.0),
    lambda model: certified_training.ibp_loss(model, WITHIN, eps=lambda batches: 0.0, kappa=0.0),
    lambda model: certified_training.crown_ibp_loss(model, WITHIN, eps=lambda batches: 0.0),
], ids="pgd fast trades awp gaussian kappa=1 ibp,eps=0 crown,eps=0".split())
def test_without_an_enemy_it_is_cross_entropy(make):
    model, params, variables, batch = setting()
    value, slope, *_ = value_and_slope(make(model), params, variables, {**batch, "step": jnp.int32(3)})
    same((value, slope), value_and_slope(losses.cross_entropy(model), params, variables, batch)[:2])


def test_the_attacked_images_are_within_and_worse_and_no_slope_passes_through_them():
    model, params, variables, batch = setting()
    plain = losses.cross_entropy(model)
    for make in (defences.pgd_training, defences.fast_training, defences.trades, defences.mart):
        loss = make(model, WITHIN)
        attacked = jax.jit(loss.craft)(params, variables, batch, streams.stream(KEY, "attack"))
        assert (attacked >= 0).all() and (attacked <= 1).all()
        change = threat.size(attacked - batch["image"], "linf")
        assert (change <= (0.3 if make is defences.fast_training else 0.1) + 1e-6).all() and (change > 0.05).all()
        assert plain(params, variables, {**batch, "image": attacked}, KEY)[0] > plain(params, variables, batch, KEY)[0]
        crafted = jax.jit(jax.grad(lambda p, loss=loss: loss.craft(p, variables, batch, KEY).sum()))(params)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(crafted))
        fixed = functools.partial(loss.judge, attacked=attacked)
        expected = jax.grad(lambda p, fixed=fixed: fixed(p, variables, batch, key=KEY)[0])(params)
        same(value_and_slope(loss, params, variables, batch)[1], expected)


def test_trades_and_mart_are_their_formulas():
    model, params, variables, batch = setting()
    attacked = jnp.clip(batch["image"] + 0.1, 0, 1)
    p, q = (np.asarray(jax.nn.softmax(model.apply({"params": params}, x)[0]), np.float64)[:5]
            for x in (batch["image"], attacked))
    labels, rows = np.asarray(batch["label"])[:5], np.arange(5)
    kl = (p * np.log(p / q)).sum(-1)
    found = defences.trades(model, WITHIN).judge(params, variables, batch, attacked, KEY)
    np.testing.assert_allclose(found[0], -np.log(p[rows, labels]).mean() + 6 * kl.mean(), rtol=1e-5)
    rivals = np.where(np.eye(CLASSES, dtype=bool)[labels], 0, q).max(-1)
    boosted = -np.log(q[rows, labels]) - np.log(1 - rivals)
    found = defences.mart(model, WITHIN).judge(params, variables, batch, attacked, KEY)
    np.testing.assert_allclose(found[0], (boosted + 5 * kl * (1 - p[rows, labels])).mean(), rtol=1e-5)


def test_awp_moves_each_kernel_against_the_loss_by_its_share():
    model, params, variables, batch = setting()
    loss = defences.pgd_training(model, WITHIN, steps=1)
    attacked = batch["image"]
    seen = []

    def recording(params, *rest):
        seen.append(params)
        return loss.judge(params, *rest)

    value, _ = defences.awp(dataclasses.replace(loss, judge=recording)).judge(params, variables, batch, attacked, KEY)
    assert value > loss.judge(params, variables, batch, attacked, KEY)[0]
    moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-9)),
                         seen[-1], params)
    for layer in moved.values():
        np.testing.assert_allclose(layer["kernel"], 0.01, rtol=1e-3)
        assert layer["bias"] == 0


@pytest.mark.parametrize(("steps", "of_eps"), [(10, 0.25), (4, 0.625)])
def test_steps_cross_the_ball_however_many_they_are(steps, of_eps):
    model, params, variables, batch = setting()
    crafted = [defences.pgd_training(model, WITHIN, steps=steps, step_size=size).craft(params, variables, batch, KEY)
               for size in (None, of_eps * WITHIN.eps)]
    np.testing.assert_allclose(*crafted, atol=1e-6)


def test_attacks_see_the_network_as_evaluated_and_training_updates_its_averages():
    model, params, variables, batch = setting("convnet,width=2,stages=1,depth=1")
    shifted = jax.tree.map(lambda leaf: leaf + 0.5, variables)
    loss = defences.pgd_training(model, WITHIN, steps=1, step_size=0.05)
    first, other = (loss.craft(params, v, batch, KEY) for v in (variables, shifted))
    assert (first != other).any()  # running averages matter; in training they would not
    alone = loss.craft(params, variables, jax.tree.map(lambda x: x[:1], batch), KEY)
    np.testing.assert_allclose(alone[0], first[0], atol=1e-6)  # nor do neighbours
    _, (new_state, _) = loss.judge(params, variables, batch, first, KEY)
    _, (expected, _) = losses.cross_entropy(model)(params, variables, {**batch, "image": first}, KEY)
    same(new_state, expected)


def test_certified_losses_follow_their_schedules():
    model, params, variables, batch = setting()
    eps, kappa = optax.linear_schedule(0.0, 0.1, 2), optax.linear_schedule(1.0, 0.5, 2)
    tx = optax.sgd(0.0)
    start = state.TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params), None, KEY)
    loss = certified_training.ibp_loss(model, WITHIN, eps=eps, kappa=kappa)
    step = jax.jit(functools.partial(train_step, loss=loss, tx=tx))
    plain = losses.cross_entropy(model)(params, variables, batch, KEY)[0]
    for expected, share in ((0.0, 1.0), (0.05, 0.75), (0.1, 0.5), (0.1, 0.5)):
        start, metrics = step(start, batch)
        np.testing.assert_allclose(metrics["eps"], expected, atol=1e-7)
        low = bounds.ibp(predictor(model, {"params": params}), batch["image"], batch["label"],
                         Threat(eps=expected), sound=False)
        worst = losses.weighted_mean(-jax.nn.log_softmax(-low)[jnp.arange(6), batch["label"]], batch)
        np.testing.assert_allclose(metrics["loss"], share * plain + (1 - share) * worst, rtol=1e-5)
    assert step._cache_size() == 1
    with pytest.raises(InputError, match="step"):
        certified_training.ibp_loss(model, WITHIN, eps=eps)(params, variables, batch, KEY)


def test_crown_ibp_mixes_bounds():
    model, params, variables, batch = setting()
    args = (predictor(model, {"params": params}), batch["image"], batch["label"], WITHIN)
    low = 0.25 * bounds.crown(*args, intermediate="ibp", sound=False) + 0.75 * bounds.ibp(*args, sound=False)
    worst = losses.weighted_mean(-jax.nn.log_softmax(-low)[jnp.arange(6), batch["label"]], batch)
    found = value_and_slope(certified_training.crown_ibp_loss(model, WITHIN, beta=0.25), params, variables, batch)
    np.testing.assert_allclose(found[0], worst, rtol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found[1]))


def test_crown_ibp_ends_as_ibp():
    model, params, variables, batch = setting()
    batch = {**batch, "step": jnp.int32(9)}
    ends = certified_training.crown_ibp_loss(model, WITHIN, kappa=0.5, beta=lambda step: 0.0 * step)
    same(value_and_slope(ends, params, variables, batch)[:2],
         value_and_slope(certified_training.ibp_loss(model, WITHIN), params, variables, batch)[:2])


def test_the_alarm_fires_for_a_network_that_only_withstands_single_steps():
    """Half an FGSM step away the label's logit is below the other, a whole step away it is above it again."""
    def masked(weights, images):
        score = images.reshape(len(images), -1) @ weights - 0.5
        good = 1.0 - 60 * score + 600 * jnp.square(score)
        return jnp.stack([good, jnp.zeros_like(good)], -1)

    def linear(weights, images):
        score = images.reshape(len(images), -1) @ weights - 0.5
        return jnp.stack([1.0 - 30 * score, jnp.zeros_like(score)], -1)

    images, labels = jnp.full((8, *SHAPE), 0.5), jnp.zeros(8, jnp.int32)
    found = {}
    for function in (masked, linear):
        predict = jax.tree_util.Partial(function, jnp.full(16, 1 / 16))
        found[function] = defences.single_step_gap(KEY, predict, images, labels, Threat(eps=0.1))
    assert found[masked]["fgsm_accuracy"] == 1 and found[masked]["pgd_accuracy"] < 0.5
    assert defences.overfitted(found[masked]["gap"]) and not defences.overfitted(found[linear]["gap"])
    assert found[linear]["fgsm_accuracy"] == found[linear]["pgd_accuracy"] == 0


def test_gaussian_noise_has_its_size():
    model, params, variables, batch = setting()
    seen = []
    spy = lambda p, s, batch, key: seen.append(batch["image"])  # noqa: E731
    many = {**batch, "image": jnp.full((2000, *SHAPE), 0.5)}
    defences.gaussian_augmentation(spy, 0.5)(params, variables, many, KEY)
    np.testing.assert_allclose([seen[0].mean(), seen[0].std()], [0.5, 0.5], atol=0.02)


@pytest.mark.slow
def test_pgd_training_makes_digits_more_robust():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    model, within, tx = models.create("mlp,width=64,depth=1", 10, (8, 8, 1)), Threat(eps=0.1), optax.adam(3e-3)
    robust = {}
    for name, loss in (("normal", losses.cross_entropy(model)), ("pgd", defences.pgd_training(model, within, steps=5))):
        trained = state.create(model, (8, 8, 1), tx, streams.root(0))
        step = jax.jit(functools.partial(train_step, loss=loss, tx=tx))
        rng = np.random.default_rng(0)
        for _ in range(300):
            chosen = rng.integers(0, 1400, 128)
            trained, _ = step(trained, {"image": images[chosen], "label": labels[chosen]})
        predict = predictor(model, trained.variables)
        found = gradient.pgd(KEY, predict, images[1400:], labels[1400:], within, steps=20)
        robust[name] = 1 - float(found.success.mean())
    assert robust["pgd"] > robust["normal"] + 0.1, robust
