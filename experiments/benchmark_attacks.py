"""Speed of attacks, side by side: PGD here and in Foolbox, AutoAttack here and by its authors in PyTorch. (L17)

    python -m experiments.benchmark_attacks --autoattack_folder=PATH

Both sides attack the same network (`plain`, trained for a moment against single steps) on the same test images, in one
process, in turns; ratios of medians are reported (ours / theirs: below 1 is faster here). Foolbox (`pip install
foolbox`) runs on JAX, once with the network as a function, of which the claims speak, and once with the very compiled
network that ours takes. The authors' AutoAttack (github.com/fra31/auto-attack) needs PyTorch and a folder it was
checked out to. What is not there is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import time

from dlcourse.contracts import Claim, Evidence, InputError
from experiments import benchmark_peers as peers
from experiments import command, settings
from experiments.benchmark import interleave, median, ratio_interval

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
FASTER = {"pgd_16": 50.0, "pgd_500": 3.0, "autoattack": 2.0}
"""How many times as fast claims expect attacks to be here."""

FOOLBOX = {"foolbox": "Foolbox on JAX, given the network as a function,",
           "foolbox_compiled": "Foolbox on JAX, given the same compiled network,"}


@dataclasses.dataclass(frozen=True)
class Config:
    autoattack_folder: str = settings.setting("", "checkout of the authors' AutoAttack; without it only ours is timed")
    dataset: str = settings.setting("fashion_mnist", "whose test images are attacked")
    eps: float = settings.setting(0.1, "bound of a pixel's change, pixels being in [0, 1]")
    model: str = settings.setting("plain", "network attacked: plain, as Wong et al. 2018 have it, or a convnet")
    training_steps: int = settings.setting(1500, "steps of 128 images that networks are trained for, against N-FGSM")
    repeats: int = settings.setting(15, "timings of PGD; medians are reported (at least 10; 0 leaves it out)")
    attacked: int = settings.setting(1000, "test images under AutoAttack; 0 leaves it out")
    rounds: int = settings.setting(1, "timings of AutoAttack, after one of ours that compiles")
    batch_size: int = settings.setting(125, "images that our AutoAttack takes at a time")
    peer_batch_size: int = settings.setting(250, "images that the authors' AutoAttack takes at a time; 250 is theirs")
    workdir: str = settings.setting("", "folder of the run; default runs/benchmark_attacks/HASH")
    overwrite: bool = settings.setting(False, "measure again")

    def __post_init__(self):
        if self.repeats and self.repeats < 10:
            raise InputError(f"--repeats={self.repeats}: a median of fewer than 10 says little; give at least 10")
        for name, least in (("attacked", 0), ("rounds", 1), ("batch_size", 1), ("peer_batch_size", 1),
                            ("training_steps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}={getattr(self, name)}: give at least {least}")
        if not 0 < self.eps <= 1:
            raise InputError(f"--eps={self.eps:g}: give more than 0 and at most 1")


def main(config: Config, run) -> None:
    import jax

    from dlcourse import data
    from dlcourse.reporting import environment

    peers.authors(config.autoattack_folder)  # a mistake is said before anything is trained
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    began = time.monotonic()
    dataset = data.load(config.dataset)
    network = trained(config.model, dataset, config.training_steps, config.eps)
    times, metrics = pgd_times(config, dataset, *network) if config.repeats else ({}, {})
    claims = [faster(name, times[f"{side}/{name}"], times["ours/" + name], side)
              for name in FASTER for side in FOOLBOX if f"{side}/{name}" in times]
    if config.attacked:
        found, times = autoattack_times(config, dataset, *network)
        metrics |= found
        if "authors/autoattack" in times:
            claims.append(faster("autoattack", times["authors/autoattack"], times["ours/autoattack"], "authors"))
    run.finish(metrics, claims, {"total": time.monotonic() - began}, environment.describe())


def trained(spec: str, dataset, steps: int, eps: float):
    """A network and its variables after `steps` of training against N-FGSM, always the same."""
    import jax

    from dlcourse import models, streams
    from dlcourse.adversarial import defences
    from dlcourse.adversarial.threat import Threat
    from dlcourse.data import batches
    from dlcourse.training import optimizers
    from dlcourse.training import state as states
    from dlcourse.training.step import train_step

    model, tx = models.create(spec, dataset.num_classes, dataset.image_shape), optimizers.create("adamw", 2e-3)
    state = states.create(model, dataset.image_shape, tx, streams.root(0))
    loss = defences.fast_training(model, Threat(eps))
    step = jax.jit(functools.partial(train_step, loss=loss, tx=tx), donate_argnums=0)
    for batch in itertools.islice(batches.train_batches(dataset.splits["train"], 128, seed=0), steps):
        state, _ = step(state, batch)
    return model, state.variables


def pgd_times(config: Config, dataset, model, variables):
    """Seconds of PGD by `side/pgd_B`, and metrics: ratios, milliseconds, and accuracies that should be alike."""
    from dlcourse.training.evaluation import predictor

    predict, tasks, metrics = predictor(model, variables), {}, {}
    for count in (16, 500):
        batch = dataset.splits["test"][range(count)]
        sides = {"ours": our_pgd(predict, batch, config.eps)}
        if importlib.util.find_spec("foolbox"):
            sides["foolbox"] = peers.foolbox_pgd(lambda x: model.apply(variables, x)[0], batch, config.eps)
            sides["foolbox_compiled"] = peers.foolbox_pgd(predict, batch, config.eps)
        for side, attack in sides.items():
            metrics[f"{side}/pgd_{count}_accuracy"] = 1 - float(attack().mean())
            tasks[f"{side}/pgd_{count}"] = timed(f"{side}/pgd_{count}", attack)
    times = interleave(config.repeats, tasks)
    for name, seconds in times.items():
        side, what = name.split("/")
        if side == "ours":
            metrics[f"{name}_ms"] = 1e3 * median(seconds)
        else:
            metrics[f"{name}_ratio"] = median(times[f"ours/{what}"]) / median(seconds)
    return times, metrics


def timed(name: str, attack):
    """A task for `interleave`."""
    def task():
        began = time.perf_counter()
        attack()
        return {name: time.perf_counter() - began}

    return task


def our_pgd(predict, batch, eps: float, steps: int = 40):
    """A function that attacks and returns who was fooled, (B,) bool; every step is made."""
    import jax
    import jax.numpy as jnp

    from dlcourse.adversarial.gradient import pgd
    from dlcourse.adversarial.threat import Threat

    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    key, threat = jax.random.key(0), Threat(jnp.float32(eps))
    return lambda: jax.block_until_ready(
        pgd(key, predict, images, labels, threat, steps=steps, early_stop=False)).success


def autoattack_times(config: Config, dataset, model, variables):
    """Metrics, and seconds of AutoAttack by side."""
    from dlcourse.training.evaluation import predictor

    predict = predictor(model, variables)
    batch = dataset.splits["test"][range(min(config.attacked, len(dataset.splits["test"])))]
    ours = functools.partial(our_autoattack, predict, batch, config)
    theirs = peers.authors(config.autoattack_folder)
    runs = {"compiling": [ours()], "ours": [], "authors": []}
    if theirs:
        network = peers.torch_copy(model, variables)
    for _ in range(config.rounds):
        runs["ours"].append(ours())
        if theirs:
            runs["authors"].append(peers.their_autoattack(theirs, network, batch, config))
    times = {f"{side}/autoattack": [sum(seconds.values()) for seconds, _ in found]
             for side, found in runs.items() if found}
    metrics = {"ours/autoattack_seconds": median(times["ours/autoattack"]),
               "ours/autoattack_compiling_seconds": times["compiling/autoattack"][0] - median(times["ours/autoattack"]),
               "autoattack/n": float(len(batch["label"]))}
    for side in ("ours", "authors"):
        for stage, accuracy in (runs[side][0][1] if runs[side] else {}).items():
            metrics[f"{side}/{stage}_accuracy"] = accuracy
    if theirs:
        metrics |= against_authors(runs, times)
    return metrics, times


def against_authors(runs, times) -> dict[str, float]:
    """Ratios, compiled before and not, as a whole and by stage; and on how many images the two disagree in the end."""
    theirs = median(times["authors/autoattack"])
    metrics = {"authors/autoattack_ratio": median(times["ours/autoattack"]) / theirs,
               "authors/autoattack_with_compiling_ratio": times["compiling/autoattack"][0] / theirs,
               "authors/autoattack_seconds": theirs}
    for stage in STAGES:
        ours, other = (median([seconds.get(stage, 0.0) for seconds, _ in runs[side]]) for side in ("ours", "authors"))
        if other:
            metrics[f"authors/{stage}_ratio"] = ours / other
    return metrics


def our_autoattack(predict, batch, config: Config):
    """Seconds of every stage, and the accuracy after it."""
    import jax

    from dlcourse.adversarial.autoattack import autoattack_stages
    from dlcourse.adversarial.threat import Threat

    seconds, accuracies, began = {}, {}, time.perf_counter()
    for stage, found in autoattack_stages(jax.random.key(0), predict, batch["image"], batch["label"],
                                          Threat(config.eps), batch_size=config.batch_size):
        seconds[stage], began = time.perf_counter() - began, time.perf_counter()
        accuracies[stage] = 1 - float(found.success.mean())
    return seconds, accuracies


def faster(name: str, theirs, ours, side: str) -> Claim:
    """L17: how many times as fast the attack is here as on that side."""
    import numpy as np

    ratios = np.array(theirs) / np.array(ours)
    low, high = ratio_interval(ratios) if len(ratios) >= 10 else (ratios.min(), ratios.max())
    what = "AutoAttack" if side == "authors" else f"PGD with 40 steps on {name.split('_')[1]} images"
    than = "its authors' code" if side == "authors" else FOOLBOX[side]
    identity = f"{name}_compiled" if side == "foolbox_compiled" else name
    return Claim(f"L17.{identity}", "Tools",
                 f"{what} is at least {FASTER[name]:g} times as fast as {than} on this CPU.", bool(low >= FASTER[name]),
                 Evidence(float(np.median(ratios)), 1.0, FASTER[name], (float(low), float(high)), len(ratios)),
                 "Ratio of times in turns within one process, compiled before; the interval is that of the median "
                 "ratio (order statistics), or all there is of fewer than 10.")


if __name__ == "__main__":
    command.run(main, Config, name="benchmark_attacks")
