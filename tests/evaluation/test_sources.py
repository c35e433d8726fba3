from __future__ import annotations

import json

import pytest

from maisi.errors import MaisiError
from maisi.evaluation.sources import origins, read_sources
from maisi.evaluation.volumes import Entry


def _real(tmp_path):
    return [Entry(f"{p}_ct", p, tmp_path / f"{p}.npy", tmp_path / f"{p}-labels.npy") for p in ("pt_1", "pt_10", "pt_2")]


def _item(tmp_path, name, **request):
    folder = tmp_path / "out" / name
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"synthetic": True, "request": request}))
    return Entry(name, name, folder / "image.nii.gz", folder / "labels.nii.gz")


def test_records_tell_the_patient(tmp_path) -> None:
    pairs = [
        _item(tmp_path, "0000", mask="elsewhere/pt_10_labels.nii.gz"),
        _item(tmp_path, "0001", mask=str(tmp_path / "pt_1-labels.npy")),
        _item(tmp_path, "0002", mask="masks/pt_2/labels.nii.gz", image="a/pt_1_ct.nii.gz"),
        _item(tmp_path, "0003", mask="elsewhere/pt_103.nii.gz"),
        _item(tmp_path, "0004", mask=None, library=None),
        _item(tmp_path, "0005", mask=None, library="library"),
        Entry("0006", "0006", tmp_path / "pt_2_gen.nii.gz", tmp_path / "x.nii.gz"),
        Entry("0007", "0007", tmp_path / "other.nii.gz", tmp_path / "x.nii.gz"),
        Entry("p", "pt_1", tmp_path / "p.npy", tmp_path / "p-labels.npy", affine=((1.0,) * 4,) * 4),
    ]
    found = origins(pairs, _real(tmp_path))
    assert [set(o.patients) for o in found] == [
        *({"pt_10"}, {"pt_1"}, {"pt_1", "pt_2"}, set(), set(), set(), {"pt_2"}, set(), {"pt_1"}),
    ]
    assert [o.recorded for o in found] == [True, True, True, False, True, False, True, False, True]


def test_a_file_that_names_nobody_may_be_anybodys(tmp_path) -> None:
    pairs = [
        _item(tmp_path, "0000", mask="masks/deformed.nii.gz"),
        _item(tmp_path, "0001", mask="masks/imported/07.nii.gz", image="pt_1_ct.nii.gz"),
        _item(tmp_path, "0002", mask="pt_2_labels.nii.gz", image="pt_2_ct.nii.gz"),
    ]
    found = origins(pairs, _real(tmp_path))
    assert [(set(o.patients), o.recorded) for o in found] == [(set(), False), ({"pt_1"}, False), ({"pt_2"}, True)]


def test_what_was_in_memory_may_be_anybodys(tmp_path) -> None:
    pairs = [_item(tmp_path, f"{n:04d}", mask=None, image=None) for n in range(4)]
    for pair, more in zip(
        pairs, ({"mask_source": ""}, {"mask_source": "a phantom"}, {"painted_by": "rules"}, {}), strict=True
    ):
        path = pair.image.parent / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert [o.recorded for o in origins(pairs, _real(tmp_path))] == [False, True, False, True]


def test_an_item_number_is_no_patient(tmp_path) -> None:
    real = [Entry("0001", "0001", tmp_path / "0001.npy", tmp_path / "l.npy")]
    assert origins([_item(tmp_path, "0001", mask="m/x.nii.gz")], real)[0].patients == frozenset()


def test_the_user_knows_better(tmp_path) -> None:
    pair = _item(tmp_path, "0000", library="library")
    table = tmp_path / "sources.json"
    table.write_text('{"0000": "pt_2"}')
    found = origins([pair], _real(tmp_path), read_sources(table))[0]
    assert (found.patients, found.recorded) == (frozenset({"pt_2"}), True)
    for told, said in (({"0009": "pt_2"}, "names the pair '0009'"), ({"0000": "pt_7"}, "names the patient 'pt_7'")):
        with pytest.raises(MaisiError, match=said):
            origins([pair], _real(tmp_path), told)
    table.write_text("[1]")
    with pytest.raises(MaisiError, match="no table of names"):
        read_sources(table)
