"""A script stands in for somebody's segmenter."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest

from maisi.data.label_maps import custom_vocabulary, vocabulary
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.evaluation.segmenters import Program, Rules

START = (
    "import sys\nfrom pathlib import Path\nfrom maisi.io.nifti import read_volume, write_volume\nimport numpy as np\n"
)
FOUND = """
import sys
from pathlib import Path
import numpy as np
from maisi.io.nifti import read_volume, write_volume
ct = read_volume(Path(sys.argv[1])).to_ras()
labels = ct.with_array(np.where(ct.array > 0, 5, 0).astype(np.uint8))
"""


@pytest.fixture(scope="module")
def ct():
    return phantom((24, 20, 12), (14, 14, 14), ("abdomen",), seed=0)[0]


@pytest.fixture
def program(tmp_path):
    def make(code: str, name: str = "totalsegmentator") -> Program:
        script = tmp_path / "their segmenter.py"
        script.write_text(textwrap.dedent(code))
        return Program.parse(f"{sys.executable} '{script}' {{image}} {{labels}}", vocabulary(name))

    return make


def test_their_ids_become_ours_on_the_same_grid(program, ct) -> None:
    segmenter = program(FOUND + "write_volume(Path(sys.argv[2]), labels)")
    found = segmenter(ct)
    assert found.same_grid(ct)
    ours = vocabulary("totalsegmentator").to[5]  # the liver
    assert ours == 1
    np.testing.assert_array_equal(found.array, np.where(ct.array > 0, ours, 0))
    assert segmenter.structures["liver"] == {1}


def test_another_grid_and_a_folder_of_one_file_are_taken(program, ct) -> None:
    code = """
        from maisi.volume import Volume
        flipped = labels.array[::-1]
        affine = labels.affine @ [[-1, 0, 0, labels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        Path(sys.argv[2]).mkdir()
        write_volume(Path(sys.argv[2]) / "all.nii.gz", Volume(np.ascontiguousarray(flipped), affine))
        """
    found = program(FOUND + textwrap.dedent(code))(ct)
    np.testing.assert_array_equal(found.array, np.where(ct.array > 0, 1, 0))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit('no licence found')", "failed with code 1: no licence found"),
        ("", "wrote no label map"),
        (FOUND + "write_volume(Path(sys.argv[2]), labels.with_array(labels.array * 50))", r"ids \[250\]"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(program, ct, code, said) -> None:
    with pytest.raises(MaisiError, match=said):
        program(code)(ct)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no-such-segmenter -i {image} -o {labels}", "not installed"),
        ("cat {image}", "no {labels}"),
        ("cat '{image} {labels}", "quotes"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_it_runs(text, said) -> None:
    with pytest.raises(MaisiError, match=said):
        Program.parse(text, vocabulary("maisi"))


def test_structures_of_a_table_of_ones_own() -> None:
    table = custom_vocabulary({"1": "liver", "2": {"id": 150, "name": "stent"}}, "table")
    assert Program(("x",), table).structures == {"liver": {1}, "stent": {150}}


def test_what_a_table_holds_is_part_of_the_name() -> None:
    tables = [{"1": "liver", "2": "spleen"}, {"1": "spleen", "2": "liver"}, {"1": "liver"}]
    assert len({Program(("x",), custom_vocabulary(table, "table")).name for table in tables}) == 3


def test_rules_find_a_body(ct) -> None:
    assert (Rules()(ct).array > 0).any()
    assert set(Rules().structures) == {"lungs", "skeleton", "body"}
