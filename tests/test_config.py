import pytest

from maisi.config import Config, parse_config, read_yaml
from maisi.errors import MaisiError


class Inner(Config):
    width: int = 4


class Outer(Config):
    name: str
    inner: Inner = Inner()


def test_yaml_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ninner:\n  width: 8\n")
    assert read_yaml(Outer, path) == Outer(name="a", inner=Inner(width=8))


def test_configurations_are_values():
    assert Outer(name="a") == Outer(name="a")
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="a").name = "b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "run: 'name' is missing"),
        ({"name": "a", "innr": {}}, r"unknown key 'innr' \(did you mean 'inner'\?\)"),
        ({"name": "a", "inner": {"widht": 3}}, r"unknown key 'inner.widht' \(did you mean 'width'\?\)"),
        ({"name": "a", "inner": {"width": "wide"}}, "'inner.width' is 'wide', but input should be a valid integer"),
        ([1], "'the value' is"),
    ],
)
def test_faults_are_named(values, message):
    with pytest.raises(MaisiError, match=message):
        parse_config(Outer, values, "run")


def test_unreadable_files(tmp_path):
    with pytest.raises(MaisiError, match="Cannot read"):
        read_yaml(Outer, tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("name: [a")
    with pytest.raises(MaisiError, match="is not YAML"):
        read_yaml(Outer, path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(MaisiError, match="is not YAML"):
        read_yaml(Outer, path)
    path.write_text("")
    with pytest.raises(MaisiError, match="'name' is missing"):
        read_yaml(Outer, path)
