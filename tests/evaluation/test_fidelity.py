from __future__ import annotations

import json

import numpy as np
import pytest

from maisi.anatomy import BODY, LUNGS
from maisi.cli import run
from maisi.data.manifest import Case, CaseList, write_cases
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.evaluation.fidelity import agreement, mean_dice, summed_up
from maisi.io.nifti import write_volume
from maisi.volume import Volume


class Fixed:
    """A segmenter that always finds the same."""

    name = "fixed"
    structures = {"lungs": frozenset(LUNGS), "body": frozenset(range(1, 256)), "spleen": frozenset({3})}  # noqa: RUF012

    def __init__(self, array) -> None:
        self.array = array

    def __call__(self, ct: Volume) -> Volume:
        return ct.with_array(self.array)


def test_dice_of_a_planted_error() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:, :, 2:8] = BODY
    labels[:5, :, 2:8] = LUNGS[0]  # 300 voxels
    found = labels.copy()
    found[:3, :, 2:8] = BODY  # 180 of them are missed
    found[9, 9, 9] = 3
    ct = Volume.from_spacing(np.zeros((10, 10, 10), np.int16), (1, 1, 1))
    dice = agreement(ct, ct.with_array(labels), Fixed(found))
    assert dice["lungs"] == pytest.approx(2 * 120 / (300 + 120))
    assert dice["body"] == pytest.approx(2 * 600 / (600 + 601))
    assert dice["spleen"] is None  # found, but nobody asked
    with pytest.raises(MaisiError, match="different grids"):
        agreement(ct, Volume(labels, ct.affine @ np.diag([2, 1, 1, 1])), Fixed(found))


def test_generated_beside_real() -> None:
    generated = [{"case": "a", "lungs": 0.8, "body": None}, {"case": "b", "lungs": 0.6, "body": None}]
    real = [{"case": "r", "lungs": 0.9996, "body": 0.9}]
    assert mean_dice(generated, "lungs") == pytest.approx(0.7)
    result = summed_up(generated, real, ("lungs", "body"), {})
    ratio = pytest.approx(0.7 / 0.9996)
    assert result.summary == {"lungs, generated": pytest.approx(0.7), "lungs, real": 0.9996, "lungs, ratio": ratio}
    assert "trivial" in result.notes[1]
    assert "No real cases" in summed_up(generated, [], ("lungs",), {}).notes[1]
    with pytest.raises(MaisiError, match=r"holds what the segmenter finds \(body\)"):
        summed_up(generated, real, ("body",), {})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Two items that show their labels, and one whose image is another's; a real case list."""
    root = tmp_path_factory.mktemp("fidelity")
    made = [phantom((44, 36, 28), (9, 9, 9), (region,), seed=1) for region in ("chest", "abdomen")]
    for number, (image, labels) in enumerate((made[0], made[1], (made[1][0], made[0][1]))):
        folder = root / "out" / f"{number:04d}"
        folder.mkdir(parents=True)
        write_volume(folder / "image.nii.gz", Volume(image.array, made[0][0].affine))
        write_volume(folder / "labels.nii.gz", Volume(labels.array, made[0][0].affine))
    write_volume(root / "ct.nii.gz", made[0][0], synthetic=False)
    write_volume(root / "mask.nii.gz", made[0][1], synthetic=False)
    write_cases(
        root / "cases.json",
        CaseList(
            cases=(
                Case(
                    id="r", patient="r", image=root / "ct.nii.gz", labels=root / "mask.nii.gz", split="validation"
                ),
            )
        ),
    )  # fmt: skip
    return root


def test_the_command_finds_the_image_that_does_not_show_its_labels(items, tmp_path) -> None:
    words = ["evaluate", "fidelity", str(items / "out"), "--real", str(items / "cases.json")]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    lungs = {row["case"]: row["lungs"] for row in values["items"]}
    assert lungs["0000"] > 0.9
    assert lungs["0002"] < 0.5
    # the real case is the first item again
    assert values["summary"]["lungs, real"] == lungs["r"] == pytest.approx(lungs["0000"], abs=0.02)
    assert values["settings"]["segmenter"] == "rules"
    assert not (tmp_path / "out.cache").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--segmenter", "no-such-program {image} {labels}"], "not installed"),
        (["--from", "totalsegmentator"], "leave it out"),
        (["--segmenter", "cat {image} {labels}", "--from", "nonsense"], "Unknown label vocabulary"),
        (["--segmenter", "cat {image} {labels}", "--from", "absent.json"], "Cannot read absent.json"),
    ],
)
def test_refusals(items, tmp_path, capsys, words, said) -> None:
    assert run(["evaluate", "fidelity", str(items / "out"), *words, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_command_may_hold_any_sign(items, tmp_path) -> None:
    copied = f"cp {items / 'out' / '0000' / 'labels.nii.gz'} {{labels}} #"
    words = ["evaluate", "fidelity", str(items / "out"), "--segmenter", f"sh -c '{copied} $1 \\frac_$' {{image}}"]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figure.png").is_file()


def test_images_without_labels_are_refused(items, tmp_path, capsys) -> None:
    assert run(["evaluate", "fidelity", str(items / "ct.nii.gz"), "-o", str(tmp_path / "out")]) == 2
    assert "None of the 1 generated images has labels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
