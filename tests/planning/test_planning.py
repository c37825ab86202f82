"""What is read from a compiled program, what chips there are, and what is said where something is missing."""

import pytest

from dlcourse.contracts import InputError
from dlcourse.planning import hardware, libtpu, program

TEXT = """HloModule step
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"10"}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %lt = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %param = bf16[2,64]{1,0} parameter(0)
  %fusion.1 = f32[64]{0:T(128)} fusion(%param), kind=kOutput, calls=%c, backend_config={"estimated_cycles":"100"}
  %all-reduce.1 = (f32[64]{0}, f32[64]{0}) all-reduce(%fusion.1, %fusion.1), replica_groups={}, to_apply=%add
  %select-and-scatter = bf16[4,64]{1,0} select-and-scatter(%param, %param), window={size=2}
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %bitcast = f32[64]{0} bitcast(%fusion.1)
}
"""


def test_cycles_collectives_and_what_has_no_cycles_are_read():
    found = program.read(TEXT)
    assert found.cycles == 100 + 5 * 10
    assert found.kinds == {"fusion": 150}
    assert found.collectives == {"all-reduce": (1, 512)}
    assert found.unpriced["select-and-scatter"] == (1, 512 + 2 * 256)


def test_a_text_that_is_no_program_has_no_cycles():
    assert program.read("").cycles == 0


@pytest.mark.parametrize("name, chips, gib", [("v5e:4x4", 16, 16), ("v4:4x8x8", 256, 32), ("v6e:16x16", 256, 32),
                                               ("v5p:2x2x1", 4, 95)])
def test_topologies_have_the_chips_and_memory_of_their_data_sheets(name, chips, gib):
    topology = hardware.parse(name)
    assert (topology.chips, topology.chip.memory / 2**30) == (chips, gib)


@pytest.mark.parametrize("name, said", [("v5f:4x4", "v5e"), ("v5e:3x3", "2x2, 2x4"), ("h100:many", "h100:8"),
                                        ("", "no such chip")])
def test_an_unknown_topology_names_those_there_are(name, said):
    with pytest.raises(InputError, match=said):
        hardware.parse(name)


def test_the_smallest_topology_that_is_enough():
    chip = hardware.CHIPS["v5e"]
    assert [hardware.smallest(chip, needed) for needed in (0.1, 4, 4.1, 256, 257)] == [4, 4, 8, 256, None]


def test_a_missing_compiler_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCOURSE_LIBTPU", str(tmp_path))
    with pytest.raises(InputError, match="pip .*libtpu==.*DLCOURSE_LIBTPU=FOLDER"):
        libtpu.find(install=False)
