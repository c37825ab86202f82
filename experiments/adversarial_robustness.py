"""Does a change that nobody sees give another class, and can a network be trained, or proved, not to fall for it?

Lecture, limit 2: an image and one that no person can tell from it are classified differently, "57.7 % panda" becomes
"99.3 % gibbon" (L20). Claims, each with the control that could refute it:
  L20.fooled      within eps most images change their class; random changes of the same norm do not do it
  L20.surer       the network is surer of the wrong class than it was of the right one
  L20.unseen      the smallest change that does it is less than 8 grey levels of 255

    launch/local adversarial_robustness                                   digits, L-infinity 0.1: 2 min on 2 CPU cores
    launch/local adversarial_robustness --defence=pgd                     the same, trained against it
    launch/local adversarial_robustness --init_from=RUN --train_for=0steps     attacks a network that was trained before
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Literal

from dlcourse.contracts import InputError
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Robustness:
    norm: Literal["linf", "l2", "l1"] = settings.setting("linf", "what bounds a change: its largest pixel (linf), its "
                                                         "Euclidean length (l2), or the sum of its pixels (l1)")
    eps: float = settings.setting(0.1, "the bound, pixels being in [0, 1]")
    defence: Literal["none", "pgd", "fast", "trades", "mart", "ibp", "crown_ibp", "gaussian"] = (
        settings.setting("none", "train on images attacked at eps (pgd; fast: one noisy step), by TRADES, by MART, on "
                         "bounds (ibp, crown_ibp), or under noise of deviation eps (gaussian; the network is then "
                         "judged under such noise, too)"))
    defence_steps: int = settings.setting(10, "gradients that attack a batch in training, for pgd, trades and mart")
    awp: float = settings.setting(0.0, "train at weights moved against the loss by this share of a kernel's length, "
                                  "for pgd, trades and mart; published 0.01, for trades 0.005; 0: not moved")
    growth: float = settings.setting(0.25, "share of training in which eps of ibp and crown_ibp grows from 0, after "
                                     "0.05 without bounds; 0: it is whole from the start")
    clean_weight: float = settings.setting(0.0, "weight of the clean loss beside that of the bounds, once eps is whole")
    beside: str = settings.setting("", "folders of finished runs, comma separated, to draw in the trade-off of robust "
                                   "and clean accuracy beside this one; of gaussian, in the certificates' figure")
    noisy_copies: int = settings.setting(10_000, "of each image, in the certificates of randomised smoothing")
    attacked: int = settings.setting(200, "test images that are attacked, drawn by the seed; 0: all")
    steps: int = settings.setting(40, "gradients of PGD, FAB and each of APGD's runs; AutoAttack has its own")
    attacks: Literal["few", "autoattack", "all"] = settings.setting(
        "few", "run AutoAttack, too, the strongest one (autoattack), or all attacks there are, and corruptions (all)")

    def __post_init__(self):
        if not self.eps > 0:
            raise InputError(f"--eps={self.eps:g}: must be greater than 0")
        if self.norm == "linf" and self.eps > 1:
            raise InputError(f"--eps={self.eps:g}: beyond the box, which is 1 wide; 8 grey levels are 0.0314")
        if self.attacked and self.attacked < 20:
            raise InputError(f"--attacked={self.attacked}: give at least 20, or 0 for all")
        for name in ("steps", "noisy_copies", "defence_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)}: give at least 1")
        if not 0 <= self.growth <= 0.95:
            raise InputError(f"--growth={self.growth:g}: a share of training from 0 to 0.95")
        if not 0 <= self.awp < 1:
            raise InputError(f"--awp={self.awp:g}: a share from 0 to below 1")
        if not 0 <= self.clean_weight <= 1:
            raise InputError(f"--clean_weight={self.clean_weight:g}: a weight from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Config:
    data: settings.Data = settings.Data()
    model: settings.Model = settings.Model(model="convnet,width=16")
    optimizer: settings.Optimizer = settings.Optimizer()
    run: settings.Run = settings.Run(checkpoint_every="10epochs")
    devices: settings.Devices = settings.Devices()
    robustness: Robustness = Robustness()

    def __post_init__(self):
        if self.model.mirror:
            raise InputError("--mirror: it is the network itself that is attacked; leave it out")


def training_loss(model, config, dataset):
    """The loss that the defence asks for, on augmented batches."""
    from dlcourse.adversarial import certified_training, defences
    from dlcourse.adversarial.threat import Threat
    from dlcourse.data import augment
    from dlcourse.training import losses
    from experiments import train

    wanted = config.robustness
    threat, steps = Threat(eps=wanted.eps, norm=wanted.norm), wanted.defence_steps
    make = {"none": lambda: train.classifier_loss(model, config, dataset),
            "pgd": lambda: defences.pgd_training(model, threat, steps=steps),
            "fast": lambda: defences.fast_training(model, threat),
            "trades": lambda: defences.trades(model, threat, steps=steps),
            "mart": lambda: defences.mart(model, threat, steps=steps),
            "ibp": lambda: certified_training.ibp_loss(model, threat, **growing(config, dataset, "eps", "kappa")),
            "crown_ibp": lambda: certified_training.crown_ibp_loss(
                model, threat, **growing(config, dataset, "eps", "kappa", "beta")),
            "gaussian": lambda: defences.gaussian_augmentation(losses.cross_entropy(model), wanted.eps)}
    loss = make[wanted.defence]()
    if wanted.awp:
        loss = defences.awp(loss, gamma=wanted.awp)
    if wanted.defence == "none" or not config.data.augment:
        return loss
    return losses.augmented(loss, augment.create(config.data.augment, dataset.num_classes))


def growing(config, dataset, *names) -> dict:
    """The named schedules of training on bounds: eps grows, the weights of the clean loss and of CROWN fall."""
    from dlcourse.adversarial.certified_training import growth
    from dlcourse.training import durations

    steps = durations.parse(config.run.train_for).steps(config.data.batch_size, len(dataset.splits["train"]))
    if steps is None:
        raise InputError(f"--train_for={config.run.train_for}: training on bounds must know its steps; give epochs")
    ends = {"eps": (0.0, config.robustness.eps), "kappa": (1.0, config.robustness.clean_weight), "beta": (1.0, 0.0)}
    return {name: growth(*ends[name], steps, config.robustness.growth) for name in names}


def main(config: Config, run) -> None:
    import jax

    from dlcourse.reporting import environment
    from dlcourse.training import evaluation
    from experiments import adversarial_evidence as evidence
    from experiments import adversarial_suite as suite
    from experiments import train

    began = time.monotonic()
    others = evidence.finished(config)
    train.same_data(config)
    dataset = train.load_data(config.data, config.run.seed)
    images, labels = evidence.chosen(dataset.splits["test"], config.run.seed, config.robustness.attacked)
    suite.check(config, dataset, images, labels)
    model = train.build_model(config.model, dataset)
    train.banner(config, dataset, model, run)

    def overfitting(variables):
        return evidence.overfitting(config, evaluation.predictor(model, variables), dataset.splits["train"])

    trained = train.train(config, run, dataset, model, training_loss(model, config, dataset),
                          overfitting if config.robustness.defence in ("fast", "pgd") else None)
    predict = evaluation.predictor(model, trained.state.variables)
    # An accelerator's products may by default be less exact than the float32 that certificates hold for.
    with jax.default_matmul_precision("highest"):
        metrics, claims, tables = judged(config, run, others, dataset, predict, images, labels)
    seconds = {"total": time.monotonic() - began + trained.seconds["earlier"], **trained.seconds}
    run.finish(metrics, claims, seconds, environment.describe(), tables=tables)


def judged(config, run, others, dataset, predict, images, labels):
    """Metrics, claims and tables of a network, attacked on these test images; figures and the audit go to the run."""
    import numpy as np

    from dlcourse.adversarial import masking
    from dlcourse.reporting import files
    from dlcourse.training import evaluation
    from experiments import adversarial_certificates as certificates
    from experiments import adversarial_evidence as evidence
    from experiments import adversarial_suite as suite

    suite.finite(predict, images)
    clean = evaluation.predictions(predict, dataset.splits["test"])
    metrics = {f"test/{name}": value for name, value in evaluation.summarise(clean)}
    attacks = suite.run(config, predict, images, labels, metrics)
    certified, unknown = certificates.certify(config, predict, dataset.splits["test"], images, labels, metrics)
    certificates.smoothed(config, run, others, predict, images, labels, metrics)
    claims = evidence.claims(config, predict, images, labels, attacks, metrics)
    evidence.draw(config, run, predict, images, labels, dataset.class_names, attacks, metrics)
    evidence.trade_off(config, run, others, metrics, len(labels))
    audited = evidence.audited(config, predict, images, labels, attacks, certified, metrics)
    right = masking.right(np.asarray(predict(images)), labels)
    tables = [evidence.table(config, labels, right, attacks, metrics, unknown), evidence.signs(audited)]
    if config.robustness.attacks == "all":
        fitting = evidence.chosen(dataset.splits["train"], config.run.seed, evidence.FITTED)
        table, rest = suite.all_of_them(config, predict, images, labels, fitting, metrics)
        tables[1:1] = [table, suite.corrupted(config, predict, images, labels, others, metrics)]
        audited |= {"all": evidence.audited_all(config, predict, images, labels, attacks, rest, certified)}
        tables.append(evidence.signs(audited["all"], "those of all attacks"))
    files.write_atomically(run.path / "audit.json", json.dumps(audited, indent=1))
    return metrics, claims, tables


if __name__ == "__main__":
    command.run(main, Config, name="adversarial_robustness")
