from __future__ import annotations

import pytest

from maisi.anatomy import REGIONS
from maisi.errors import MaisiError
from maisi.generation.fov import RELEASED_VIEWS, Adviser
from maisi.weights.registry import FieldOfView

RELEASED = Adviser(RELEASED_VIEWS, released=True)
OWN = Adviser(
    (
        FieldOfView(regions=("chest",), size=(100, 80, 60), spacing_mm=(3, 3, 4), share=0.5),
        FieldOfView(regions=("chest",), size=(100, 80, 60), spacing_mm=(4, 4, 5), share=0.2),
        FieldOfView(regions=("head-neck",), size=(80, 80, 80), spacing_mm=(3, 3, 3), share=0.3),
    )
)
RANGES = [REGIONS[i : j + 1] for i in range(4) for j in range(i, 4)]


@pytest.mark.parametrize("regions", RANGES, ids="+".join)
def test_what_the_released_table_picks_is_what_the_released_models_know(regions: tuple[str, ...]) -> None:
    size, spacing = RELEASED.complete(regions, None, None)
    assert RELEASED.warnings(regions, size, spacing) == ()


def test_shares_add_up_and_the_commonest_view_is_first() -> None:
    assert sum(view.share for view in RELEASED_VIEWS) == pytest.approx(1, abs=1e-3)
    assert RELEASED_VIEWS[0].regions == ("chest", "abdomen")


@pytest.mark.parametrize(
    ("size", "spacing", "word"),
    [
        ((512, 512, 128), (0.684, 0.684, 2.4), "Field of view 350 mm along X"),
        ((300, 300, 128), (2, 2, 2.4), "Size 300 along X"),
        ((512, 512, 896), (1, 1, 1), "Size 896 along Z"),
        ((512, 512, 128), (1, 1, 6), "Spacing 6 mm along Z"),
        ((512, 256, 128), (1, 2, 2), "X and Y differ"),
    ],
)
def test_the_released_limits(size, spacing, word) -> None:
    assert any(word in warning for warning in RELEASED.warnings(("chest",), size, spacing))


def test_a_head_may_be_narrower_than_a_body() -> None:
    view = (512, 512, 128), (0.6, 0.6, 2.0)
    assert RELEASED.warnings(("head-neck",), *view) == ()
    assert RELEASED.warnings(("chest",), *view)


def test_given_values_stay_and_the_other_keeps_the_extent() -> None:
    assert OWN.complete(("chest",), (50, 40, 48), (1, 2, 3)) == ((50, 40, 48), (1, 2, 3))
    assert OWN.complete(("chest",), (50, 40, 48), None) == ((50, 40, 48), (6, 6, 5))
    assert OWN.complete(("chest",), None, (6, 6, 5)) == ((50, 40, 48), (6, 6, 5))
    assert OWN.complete(("chest",), None, None) == ((100, 80, 60), (3, 3, 4))


def test_everything_between_two_views_of_a_region_is_known() -> None:
    assert OWN.warnings(("chest",), (100, 80, 60), (3.5, 3.5, 4.5)) == ()
    far = OWN.warnings(("chest",), (100, 80, 60), (1, 3, 4))
    assert [text.split(":")[0] for text in far] == ["Spacing 1 mm along X", "Field of view 100 mm along X"]


def test_a_region_without_a_view_is_named() -> None:
    warnings = OWN.warnings(("chest", "abdomen"), (100, 80, 60), (3, 3, 4))
    assert warnings == ("The model has never seen abdomen; it knows head-neck, chest.",)


def test_a_model_without_a_table_gives_no_advice() -> None:
    silent = Adviser(())
    assert silent.warnings(("chest",), (1, 1, 1), (9, 9, 9)) == ()
    with pytest.raises(MaisiError, match="give both size and spacing"):
        silent.complete(("chest",), (10, 10, 10), None)
