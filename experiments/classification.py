"""Image classification, end to end from pixels: are features learned, and does depth help?

Lecture: representation learning (L01), deep learning as a cascade (L07), hierarchical ConvNets (L11).
Claims, each with the control that could refute it:
  L01.learned   features learned end to end beat a linear classifier on pixels: same data, same number of updates
  L01.numbers   a few learned numbers classify better than as many random, principal or raw ones (--splits)
  L07.depth     the deeper the layer, the easier the class is to read; less so in the same network untrained
  L11.fields    receptive fields grow layer by layer; arithmetic equal to differentiation at every layer

    launch/local classification                     digits: 1 min on 2 CPU cores, 99.2 % test accuracy (seed 0)
    launch/local classification --flagfile=experiments/presets/fashion_mnist.flags        16 min, 94.1 % (seed 0)

Measured 2026-11-23; all recipes with intervals: README.md.
"""

from __future__ import annotations

import dataclasses
import time

from dlcourse.contracts import InputError
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Analysis:
    claims: bool = settings.setting(True, "measure the claims and their controls after training")
    splits: int = settings.setting(
        0,
        "compare the network's last features with as many random and principal ones on this "
        "many fresh splits of the data, training anew on each (small data sets); 0 does not",
    )
    probe_examples: int = settings.setting(
        4000, "training images that the linear probes of each layer are fitted on, at most"
    )


    def __post_init__(self):
        if self.splits == 1 or self.splits < 0:
            raise InputError(f"--splits={self.splits}: an interval needs at least 2; 0 leaves the comparison out")
        if self.splits and not self.claims:
            raise InputError(f"--splits={self.splits} contradicts --noclaims; leave one of them out")
        if self.probe_examples < 100:
            raise InputError(f"--probe_examples={self.probe_examples}: give at least 100")


@dataclasses.dataclass(frozen=True)
class Config:
    data: settings.Data = settings.Data(augment="crop=1")
    model: settings.Model = settings.Model()
    optimizer: settings.Optimizer = settings.Optimizer()
    run: settings.Run = settings.Run(checkpoint_every="10epochs")
    devices: settings.Devices = settings.Devices()
    analysis: Analysis = Analysis()

    def __post_init__(self):
        if self.analysis.splits and self.model.init_from:
            raise InputError("--splits trains anew on each split, which --init_from contradicts; leave one of them out")


def main(config: Config, run) -> None:
    # Imported here, since JAX takes a second that `--help` and a mistyped flag should not wait for.
    from dlcourse.reporting import environment
    from dlcourse.training import evaluation
    from experiments import classification_evidence as evidence
    from experiments import train
    from experiments.classification_numbers import hundred_numbers

    began = time.monotonic()
    dataset = train.load_data(config.data, config.run.seed)
    model = train.build_model(config.model, dataset)
    train.banner(config, dataset, model, run)
    trained = train.train(config, run, dataset, model, train.classifier_loss(model, config, dataset))
    predict = train.judge(config.model, model, trained.placed.variables)
    found = {split: evaluation.predictions(predict, dataset.splits[split], plan=trained.plan)
             for split in ("validation", "test")}
    metrics = {f"{split}/{name}": value for split in found for name, value in evaluation.summarise(found[split])}
    metrics |= {f"speed/{name}": value for name, value in trained.speed.items()}
    evidence.draw_predictions(run, dataset, found["test"])
    evidence.draw_filters(run, trained)
    claims = []
    if config.analysis.claims:
        for measure in (evidence.learned_beats_pixels, hundred_numbers, evidence.depth_helps, evidence.fields_grow):
            claims += measure(config, run, dataset, model, trained, found["test"], metrics)
    seconds = {"total": time.monotonic() - began + trained.seconds["earlier"], **trained.seconds}
    tables = [evidence.class_table(dataset, found["test"]), evidence.data_table(dataset)]
    run.finish(metrics, claims, seconds, environment.describe(), tables=tables)


if __name__ == "__main__":
    command.run(main, Config, name="classification")
