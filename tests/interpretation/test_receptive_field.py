import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dlcourse import models
from dlcourse.interpretation import receptive_field
from dlcourse.models.taps import Taps


def boxes(model, image_shape):
    return {name: field.box for name, field in receptive_field.theoretical(model, image_shape).items()}


# Images are larger than most fields, or their borders would make any two of them equal.
@pytest.mark.parametrize(("spec", "shrunk", "image_shape", "last_inside"), [
    ("convnet,width=2", {}, (36, 44, 1), "relu6"),
    ("convnet,width=2,first_kernel=11,stages=2", {}, (28, 28, 3), "relu4"),
    ("wide_resnet,depth=10,widen=1", {}, (40, 32, 1), "relu"),
    pytest.param("resnet18,stem=small", {"blocks": (1, 1, 1)}, (34, 30, 1), "stage3_block1", marks=pytest.mark.slow),
    pytest.param("resnet34,stem=imagenet", {"blocks": (1, 1)}, (71, 80, 3), "stage2_block1", marks=pytest.mark.slow),
    pytest.param("resnet50", {"blocks": (1, 1)}, (71, 80, 1), "stage2_block1", marks=pytest.mark.slow),
    ("vit_ti,patch=4", {"width": 12, "depth": 1}, (12, 8, 1), "stem"),
    ("mlp,width=4", {}, (4, 6, 1), None),
    ("linear", {}, (4, 6, 1), None),
])
def test_theory_equals_autodiff_at_every_tap(spec, shrunk, image_shape, last_inside):
    model = models.create(spec, 2, image_shape).clone(**shrunk)
    theory, derivative = boxes(model, image_shape), receptive_field.measured(model, image_shape)
    assert list(derivative) == list(theory)
    assert derivative == theory
    whole = (0, image_shape[0], 0, image_shape[1])
    inside = [name for name, box in theory.items() if box != whole]
    assert (inside[-1] if inside else None) == last_inside


class Unusual(nn.Module):
    """What the registry's networks do without: dilation, averages, no padding, branches side by side, a gate."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False, edit=None):
        tap = Taps(edit)

        def conv(name, kernel, **options):
            return nn.Conv(2, (kernel, kernel), dtype=self.dtype, name=name, **options)

        x = tap("dilated", conv("dilated", 3, kernel_dilation=2, padding="VALID")(images.astype(self.dtype) - 0.5))
        x = tap("average", nn.avg_pool(x, (3, 2), (2, 2), "VALID"))
        x = tap("branches", jnp.concatenate([conv("narrow", 3)(x), conv("wide", 5)(x)], axis=-1))
        x = tap("grouped", x.reshape(*x.shape[:3], 2, 2).sum(-1).transpose(0, 3, 1, 2).transpose(0, 2, 3, 1))
        x = tap("shifted", x[:, 1:, :-2])
        gate = nn.sigmoid(nn.Dense(2, dtype=self.dtype, name="gate")(x.mean((1, 2))))
        x = tap("gated", x * gate[:, None, None])
        logits = tap("logits", x.mean((1, 2)))
        return logits, tap.finish()


def test_theory_holds_for_programs_it_has_not_met():
    # With 40 rows the averages would leave the last one out, which theory does not look for in a gate.
    image_shape = (39, 40, 1)
    fields = receptive_field.theoretical(Unusual(), image_shape)
    assert receptive_field.measured(Unusual(), image_shape) == {name: field.box for name, field in fields.items()}
    *local, gated, logits = fields.values()
    assert [field.size for field in local] == [5, 7, 15, 15, 15]
    assert fields["shifted"].rows.start - fields["grouped"].rows.start == 2
    assert gated.is_global and logits.is_global and not local[-1].is_global


# Known for these networks: r = 1 + sum_i (k_i - 1) prod_{j<i} s_j (Araujo et al. 2019, eq. 2). Their ResNet-50
# sees 483 pixels, with the stride in the last block of a stage; v1.5 has it in the first.
@pytest.mark.parametrize(("name", "last", "size"), [
    ("resnet18", "stage4_block2", 435), ("resnet34", "stage4_block3", 899), ("resnet50", "stage4_block3", 427),
])
def test_known_sizes(name, last, size):
    fields = receptive_field.theoretical(models.create(name, 10, (224, 224, 3)), (224, 224, 3))
    assert fields[last].size == size and fields[last].rows.stride == 32
    assert not fields[last].is_global and fields["features"].is_global


def test_fields_grow():
    fields = receptive_field.theoretical(models.create("convnet", 10, (64, 64, 1)), (64, 64, 1))
    sizes = [field.size for field in fields.values()]
    assert sizes == sorted(sizes) and sizes[0] == 3 and fields["relu6"].size == 32


def test_precision_is_as_before():
    receptive_field.measured(models.create("linear", 2, (2, 2, 1)), (2, 2, 1))
    assert not jax.config.jax_enable_x64
