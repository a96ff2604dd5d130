"""Every family of transformers, as docs/transformers.json has it: equal to eager, or refused when a model of it is made."""

import json

import pytest

T = pytest.importorskip("transformers")
families = pytest.importorskip("support.families")

pytestmark = pytest.mark.filterwarnings("default:::transformers")

RECORD = json.loads(families.RECORD.read_text(encoding="utf-8"))
NAMES = dict(families.families())
SAMPLE = ("gemma4_text", "gpt_oss", "nllb-moe", "pegasus_x", "splinter", "granite_swa", "switch_transformers")


@pytest.fixture(autouse=True)
def registered():
    families.fused.register()


def test_nothing_that_was_compared_differs():
    assert RECORD["wrong"] == {}
    assert len(RECORD["compared"]) > 250
    assert RECORD["within"] == families.WITHIN


@pytest.mark.parametrize("kind", [kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in RECORD["compared"]])
def test_equal_to_eager(kind):
    if kind not in NAMES:
        pytest.skip(f"transformers {T.__version__} has no {kind}")
    found = families.compare(kind, NAMES[kind])
    if T.__version__ == RECORD["transformers"]:
        assert set(found) == set(RECORD["compared"].get(kind, found))
    assert all(isinstance(found.get(case, 0.0), float) for case in ("whole", "left", "right")), found
    assert not families.differs(found), found


@pytest.mark.parametrize("kind", RECORD["refused"])
def test_refused_when_it_is_made(kind):
    if kind not in NAMES:
        pytest.skip(f"transformers {T.__version__} has no {kind}")
    model = getattr(T, NAMES[kind])
    if T.__version__ != RECORD["transformers"] and families.fused._against(model) is None:  # it has come to the interface
        return test_equal_to_eager(kind)
    try:
        config = families.shrink(families.CONFIG_MAPPING[kind])
    except Exception:  # 5.4 refuses the defaults of two of its configs
        if T.__version__ == RECORD["transformers"]:
            raise
        pytest.skip(f"transformers {T.__version__} makes no config of {kind}")
    with pytest.raises(ValueError, match=r"attn_implementation: expected one that .* can use, such as 'eager'"):
        model._from_config(config, attn_implementation="fused_attn")
