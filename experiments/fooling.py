"""Deep networks are easily fooled: images of nothing, classified with 99.6 % confidence and more.

Lecture: limit 2 (L19); Nguyen, Yosinski and Clune 2015.
Claims, each with the control that could refute it:
  L19.cppn       patterns evolved from position reach the confidence in every class, random images more rarely
  L19.direct     images evolved pixel by pixel do
  L19.gradient   images made by following the gradient do
  L19.transfer   they are taken for the same class by another network, more often than by chance
  L19.retrained  a class of its own for them does not help: the retrained network knows the old ones and is fooled anew
  L19.caught     a score of being unlike the training data finds them better than confidence does

    launch/local fooling                                                       digits: 1.5 min on 2 CPU cores
    launch/local fooling --dataset=fashion_mnist --init_from=RUN               of the same model, without training it
    launch/local fooling --flagfile=experiments/presets/fooling_fashion_mnist.flags
                                                                               3 min, three trainings among them

Measured 2026-11-26, seed 0, every class reached 99.6 % by evolution and by the gradient on both; the three searches
took 15 s on Fashion-MNIST, compilation included. All figures: experiments/results/fooling*.json.
"""

from __future__ import annotations

import dataclasses
import time

from dlcourse.contracts import InputError
from dlcourse.training import durations
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Fooling:
    generations: int = settings.setting(5000, "generations of MAP-Elites, at most")
    population: int = settings.setting(50, "images tried in a generation")
    ascent_steps: int = settings.setting(500, "steps of gradient ascent, at most")
    searches: int = settings.setting(3, "searches of each kind, by other draws, for retraining and scores")
    rounds: int = settings.setting(2, "times that a network is retrained with a class of fooling images; 0 does not")
    controls: int = settings.setting(1000, "random images of each kind, at most as many as there are test images")

    def __post_init__(self):
        for name in ("generations", "population", "ascent_steps", "searches", "controls"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)}: give at least 1")
        if self.rounds < 0:
            raise InputError(f"--rounds={self.rounds}: give 0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    data: settings.Data = settings.Data()
    model: settings.Model = settings.Model(model="convnet,width=16")
    optimizer: settings.Optimizer = settings.Optimizer()
    run: settings.Run = settings.Run(train_for="20epochs", checkpoint_every="20epochs")
    devices: settings.Devices = settings.Devices()
    fooling: Fooling = Fooling()

    def __post_init__(self):
        if self.model.mirror:
            raise InputError("--mirror: images are made for the network itself; leave it out")
        length = durations.parse(self.run.train_for, "train_for")
        if length.value == 0:
            raise InputError(f"--train_for={self.run.train_for}: other networks are trained as long; --init_from alone "
                             "takes the first as it is")
        if length.unit == "minutes":
            raise InputError(f"--train_for={self.run.train_for}: other networks are trained as long; give epochs or "
                             "steps")


def main(config: Config, run) -> None:
    # Imported here, since JAX takes a second that `--help` and a mistyped flag should not wait for.
    from dlcourse.reporting import environment
    from dlcourse.training import evaluation
    from experiments import fooling_evidence as evidence
    from experiments import train

    began = time.monotonic()
    train.same_data(config)
    dataset = train.load_data(config.data, config.run.seed)
    model = train.build_model(config.model, dataset)
    train.banner(config, dataset, model, run)
    variables, seconds, speed = evidence.network(config, run, dataset, model)
    predict = evaluation.predictor(model, variables)
    found = evaluation.predictions(predict, dataset.splits["test"])
    metrics = {f"test/{name}": value for name, value in evaluation.summarise(found)}
    metrics |= {f"speed/{name}": value for name, value in speed.items()}
    study = evidence.search(config, dataset, model, variables, metrics)
    claims = []
    for measure in (evidence.fooled, evidence.transfers, evidence.retrained, evidence.caught):
        started = time.monotonic()
        claims += (measured := measure(config, run, dataset, study, metrics))
        if measured:
            metrics[f"seconds/{measure.__name__}"] = time.monotonic() - started
    evidence.draw(run, dataset, study)
    seconds = {"total": time.monotonic() - began + seconds["earlier"], **seconds}
    tables = [evidence.method_table(study, metrics), evidence.score_table(study, metrics)]
    run.finish(metrics, claims, seconds, environment.describe(), tables=tables)


if __name__ == "__main__":
    command.run(main, Config, name="fooling")
