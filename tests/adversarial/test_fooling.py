"""Fooling images: encodings against NumPy, the laws of MAP-Elites, and a trained network that is fooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import data, models
from dlcourse.adversarial import cppn, fooling, map_elites
from dlcourse.contracts import InputError
from dlcourse.training import evaluation, losses, optimizers
from experiments import train

pytestmark = pytest.mark.slow

SHAPE, CLASSES = (5, 4, 3), 6
PLAIN_NUMPY = (np.sin, lambda v: 2 / (1 + np.exp(-4.9 * v)) - 1, lambda v: 2 * np.exp(-(v**2)) - 1, lambda v: v)


def _line(weights, images):
    return images.reshape(len(images), -1) @ weights


def linear(seed=0, classes=CLASSES, scale=1.0):
    weights = scale * np.random.default_rng(seed).normal(size=(int(np.prod(SHAPE)), classes))
    return jax.tree_util.Partial(_line, jnp.asarray(weights, jnp.float32))


def by_hand(genome, height, width, channels):
    """A pattern-producing network, pixel by pixel and node by node."""
    weights, opened, kinds = (np.asarray(leaf, np.float64) for leaf in (genome.weights, genome.open, genome.kinds))
    image = np.zeros((height, width, channels))
    for row, column in np.ndindex(height, width):
        x, y = -1 + 2 * column / (width - 1), -1 + 2 * row / (height - 1)
        values = [x, y, np.sqrt(2) * np.hypot(x, y), 1.0]
        for n in range(len(kinds)):
            total = sum(weights[n, i] * opened[n, i] * value for i, value in enumerate(values))
            values.append(PLAIN_NUMPY[int(kinds[n])](total))
        image[row, column] = np.clip((np.array(values[-channels:]) + 1) / 2, 0, 1)
    return image


def test_a_network_draws_what_numpy_draws():
    encoding = cppn.CPPN(SHAPE, nodes=7)
    genomes = jax.vmap(encoding.draw)(jax.random.split(jax.random.key(0), 20))
    drawn = jax.vmap(encoding.render)(genomes)
    for i in range(20):
        np.testing.assert_allclose(drawn[i], by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], genomes), *SHAPE),
                                   atol=2e-5)
    assert np.ptp(np.asarray(drawn), axis=(1, 2)).max(-1).mean() > 0.2


def test_its_derivative_by_the_weights_is_that_of_differences():
    encoding, step = cppn.CPPN(SHAPE, nodes=6), 1e-5
    genome = encoding.draw(jax.random.key(3))
    direction = np.random.default_rng(0).normal(size=genome.weights.shape)

    def moved(by):
        return by_hand(genome.replace(weights=np.asarray(genome.weights, np.float64) + by * direction), *SHAPE)

    _, got = jax.jvp(lambda w: encoding.render(genome.replace(weights=w)), (genome.weights,),
                     (jnp.asarray(direction, jnp.float32),))
    wanted = (moved(step) - moved(-step)) / (2 * step)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())


def test_polynomial_mutation_has_debs_distribution():
    values = jnp.full(200_000, 0.5)
    change = np.asarray(cppn.polynomial_mutation(jax.random.key(0), values, 15.0, 0.0, 1.0)) - 0.5
    # |d| < t with probability 1 - (1 - t)^16.
    for t in (0.01, 0.05, 0.1, 0.2):
        np.testing.assert_allclose((np.abs(change) < t).mean(), 1 - (1 - t) ** 16, atol=0.005)
    assert abs(change.mean()) < 1e-3
    edge = np.asarray(cppn.polynomial_mutation(jax.random.key(0), jnp.zeros(1000), 15.0, 0.0, 1.0))
    assert edge.min() == 0 and 0.3 < (edge > 0).mean() < 0.7


def test_the_direct_encodings_rate_is_halved():
    encoding, genome = fooling.Direct((100, 100, 1)), jnp.full((100, 100, 1), 0.5)
    for generation, rate in ((0, 0.1), (999, 0.1), (1000, 0.05), (3500, 0.0125)):
        child = encoding.mutate(jax.random.key(generation), genome, jnp.int32(generation))
        np.testing.assert_allclose((np.asarray(child) != 0.5).mean(), rate, rtol=0.25)


@pytest.mark.parametrize("encoding", [cppn.CPPN(SHAPE, nodes=6), fooling.Direct(SHAPE)])
def test_map_elites(encoding):
    """No elite gets worse; each is what its genome draws and the network says; the key decides; nothing recompiles."""
    predict, key, wanted = linear(), jax.random.key(0), np.ones(CLASSES - 1, bool)
    archive = map_elites.begin(key, predict, encoding, CLASSES - 1, 40)
    compiled = map_elites.generation._cache_size()
    improved = 0
    for _ in range(15):
        after = map_elites.generation(key, predict, archive, encoding, wanted, 40)
        assert (after.log_p >= archive.log_p).all()
        improved, archive = improved + int((after.log_p > archive.log_p).sum()), after
    assert improved > 5 and int(archive.generation) == 15 and int(archive.queries) == 16 * 40
    images = map_elites.as_bytes(jax.vmap(encoding.render)(archive.genomes))
    np.testing.assert_allclose(images, archive.images, atol=1e-6)
    log_p = np.asarray(jax.nn.log_softmax(predict(archive.images)))[np.arange(CLASSES - 1), np.arange(CLASSES - 1)]
    np.testing.assert_allclose(archive.log_p, log_p, atol=1e-5)
    np.testing.assert_allclose(255 * archive.images, np.round(255 * archive.images), atol=1e-4)
    again, _ = map_elites.evolve(key, predict, encoding, CLASSES - 1, population=40, founders=40,
                                 generations=15, confidence=1.0)
    for one, other in zip(jax.tree.leaves(archive), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    other, _ = map_elites.evolve(jax.random.key(1), linear(1), encoding, CLASSES - 1, population=40, founders=40,
                                 generations=3)
    assert not np.array_equal(other.images, again.images)
    assert map_elites.generation._cache_size() == compiled + 1


def test_children_reach_the_cells_of_other_classes():
    """All parents the same black image: whichever class its children resemble, that cell is filled."""
    encoding = fooling.Direct(SHAPE)
    start = map_elites.begin(jax.random.key(0), linear(), encoding, CLASSES, 1)
    assert all(np.array_equal(start.images[0], image) for image in start.images)
    after = map_elites.generation(jax.random.key(0), linear(), start, encoding, np.ones(CLASSES, bool), 300)
    assert len(np.unique(np.asarray(after.images), axis=0)) >= 3


def test_another_line_begins_where_one_ended_and_no_elite_gets_worse():
    """Lines of 10 generations: after the first, each starts from founders, and the archive keeps the best of all."""
    encoding, alone = cppn.CPPN(SHAPE, nodes=6, patience=10), cppn.CPPN(SHAPE, nodes=6, patience=0)
    settings = {"population": 10, "founders": 20, "confidence": 1.0, "every": 5}
    key, predict = jax.random.key(0), linear(scale=0.3)
    kept, history = map_elites.evolve(key, predict, encoding, CLASSES, generations=40, **settings)
    first, _ = map_elites.evolve(key, predict, alone, CLASSES, generations=10, **settings)
    single, _ = map_elites.evolve(key, predict, alone, CLASSES, generations=40, **settings)
    assert (np.diff(history, axis=0) >= 0).all() and history.shape == (9, CLASSES)
    assert (kept.log_p >= first.log_p).all() and (kept.log_p > first.log_p).any()
    assert not np.array_equal(kept.images, single.images)
    assert (int(kept.generation), int(kept.queries)) == (40, 40 * 10 + 4 * 20)
    np.testing.assert_allclose(kept.log_p, jnp.diagonal(jax.nn.log_softmax(predict(kept.images))), atol=1e-5)


def test_half_of_the_parents_are_of_the_classes_wanted():
    wanted = jnp.arange(10) == 3
    parents = np.asarray(map_elites._parents(jax.random.key(0), wanted, 20_000))
    np.testing.assert_allclose((parents == 3).mean(), 0.5 + 0.5 / 10, atol=0.01)
    everywhere = np.asarray(map_elites._parents(jax.random.key(0), wanted & False, 20_000))
    np.testing.assert_allclose(np.bincount(everywhere, minlength=10) / 20_000, 0.1, atol=0.01)


def test_genes_that_the_image_does_not_show_drift():
    """A network that is equally sure of everything: children replace their equals, and no elite gets worse."""
    flat, encoding = jax.tree_util.Partial(lambda images: jnp.zeros((len(images), 3))), cppn.CPPN(SHAPE, nodes=6)
    start = map_elites.begin(jax.random.key(0), flat, encoding, 3, 4)
    after = map_elites.generation(jax.random.key(0), flat, start, encoding, np.ones(3, bool), 4)
    assert not np.array_equal(after.genomes.weights, start.genomes.weights)
    np.testing.assert_array_equal(after.log_p, start.log_p)


def test_logits_that_are_no_numbers_never_win():
    nan = jax.tree_util.Partial(lambda images: jnp.full((len(images), 3), jnp.nan))
    found = fooling.evolved(jax.random.key(0), nan, SHAPE, 3, "direct", population=4, generations=2)
    assert not found.confidence.any() and not found.history.any()
    found = fooling.ascended(jax.random.key(0), nan, SHAPE, 3, steps=2)
    assert not found.confidence.any()


def test_ascent_of_a_linear_network_ends_in_the_corner_of_its_weights():
    """Without regularisers and with few classes, log p grows until each pixel is black or white as its weights say."""
    predict = linear(classes=2, scale=0.02)
    found = fooling.ascended(jax.random.key(0), predict, SHAPE, 2, steps=150, step_size=0.05, target=1.0)
    weights = np.asarray(predict.args[0])
    corner = (weights[:, 0] > weights[:, 1]).reshape(SHAPE)
    np.testing.assert_array_equal(found.images[0] > 0.5, corner)
    np.testing.assert_array_equal(found.images[1] > 0.5, ~corner)
    assert (np.diff(found.history, axis=0) >= 0).all()
    smooth = fooling.ascended(jax.random.key(0), predict, SHAPE, 2, steps=150, step_size=0.05, target=1.0,
                              regularisers=fooling.Regularisers(l2=1.0, tv=10.0, blur=0.5, jitter=1))
    def rough(found):
        return np.square(np.diff(found.images, axis=1)).mean()

    assert rough(smooth) < 0.5 * rough(found)


def test_random_images():
    real = jnp.asarray(np.random.default_rng(0).beta(0.5, 2.0, (50, *SHAPE)), jnp.float32)
    uniform, gaussian, shuffled = (np.asarray(fooling.random_images(jax.random.key(0), real, kind))
                                   for kind in fooling.RANDOM)
    np.testing.assert_allclose([uniform.mean(), uniform.std()], [0.5, 1 / np.sqrt(12)], atol=0.02)
    assert gaussian.min() >= 0 and gaussian.max() <= 1
    whole = np.asarray(map_elites.as_bytes(real)).reshape(50, -1, 3)
    np.testing.assert_array_equal(np.sort(shuffled.reshape(50, -1, 3), 1), np.sort(whole, 1))
    assert not np.array_equal(shuffled, whole.reshape(shuffled.shape))


def test_an_unknown_encoding():
    with pytest.raises(InputError, match="cppn, direct"):
        fooling.evolved(jax.random.key(0), linear(), SHAPE, 3, "fractal")


@pytest.mark.slow
def test_a_network_trained_on_digits_is_fooled_by_each_method():
    digits = data.load("digits")
    model = models.create("mlp,width=64", 10, digits.image_shape)
    tx = optimizers.create("adamw", optimizers.schedule("one_cycle", 3e-3, 600), weight_decay=1e-2)
    fitted = train.fitter(model, digits.image_shape, losses.cross_entropy(model), tx)
    state = fitted(digits.splits["train"], 600, 64, 0)
    predict = evaluation.predictor(model, state.variables)
    assert evaluation.predictions(predict, digits.splits["test"]).correct.mean() > 0.9
    key, found = jax.random.key(0), {}
    for encoding in ("cppn", "direct"):
        found[encoding] = fooling.evolved(key, predict, digits.image_shape, 10, encoding)
    found["gradient"] = fooling.ascended(key, predict, digits.image_shape, 10)
    for name, fooled in found.items():
        assert (fooled.confidence >= fooling.CONFIDENCE).all(), (name, fooled.confidence)
        np.testing.assert_allclose(fooled.confidence, fooling.confidences(predict, fooled.images))
    images = jnp.asarray(digits.splits["test"][np.arange(300)]["image"])
    for kind in fooling.RANDOM:
        noise = fooling.random_images(key, images, kind)
        assert (np.asarray(jax.nn.softmax(predict(noise)).max(-1)) >= fooling.CONFIDENCE).mean() < 0.5
