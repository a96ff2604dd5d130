"""A tile file comes from others: nothing in it runs but what the search itself would try."""

import dataclasses
import json
import os
import threading

import pytest
import torch
from support.launches import recorded

import fused_attn
from fused_attn import settings
from fused_attn.call.spec import TileConfig
from fused_attn.plan import tuned
from fused_attn.plan.tiles import served
from fused_attn.targets import KNOWN, triton_name
from fused_attn.tools import tune

pytestmark = pytest.mark.kernels

HERE = {"format": 1, "arch": "interpreter", "gpu": "interpreter", "triton": triton_name()}
SHIPPED = dataclasses.asdict(tuned.shipped("forward", 16, torch.bfloat16, "interpreter"))


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Has calls look for tiles in a file of this text."""

    def chosen(text):
        file = tmp_path / "tiles.json"
        file.write_text(text if isinstance(text, str) else json.dumps({**HERE, "tiles": [text]}))
        monkeypatch.setattr(settings, "TILES", str(file))
        tuned.forget()
        return file

    yield chosen
    tuned.forget()


def launched():
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    with recorded() as launches:
        fused_attn.attention(q, k, v, backend="triton")
    return {launch.name: launch.config for launch in launches}


FIXED = ("wide", "separate", "descriptors", "specialize")
BAD = [
    *({name: value} for name in ("block_m", "block_n")
      for value in (-16, 0, 3, 24, 512, 2**40, "32", 32.0, None, True, [32], {"32": 32}, float("nan"))),
    *({"num_warps": value} for value in (0, -4, 2, 3, 16, 64, "4", 4.0, None)),
    *({"num_stages": value} for value in (0, -1, 6, 99, "1", True)),
    *({"edge_stages": value} for value in (0, 2, -1, "1", False)),
    *({name: value} for name in ("disable_licm", *FIXED) for value in (1, 0, "true", None)),
    *({name: True} for name in FIXED),
    *({"options": value} for value in (
        [["ir_override", "/tmp/evil.ttgir"]], [["maxnreg", 32]], [["matrix_instr_nonkdim", 16]], [["num_ctas", 2]],
        {"ir_override": "x"}, [["a"]], "ir_override", 1, None, [[]], [[[]]])),
    {"ir_override": "/tmp/evil.ttgir"}, {"block_q": 16}, {"": 1},
    {"block_m": 256, "block_n": 256, "num_warps": 4},  # each of them is tried, and together they do not fit
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_configuration_that_the_search_would_not_try_runs_nowhere(use, change):
    use({"kernel": "forward", "head_dim": 16, "config": {**SHIPPED, **change}})
    with pytest.raises(ValueError, match=r"tiles\.json: expected tiles as `fused-attn tune` writes them; entry 0: \w+: "):
        launched()


@pytest.mark.parametrize("row", [
    {"kernel": "delta"}, {"kernel": "Forward"}, {"kernel": None}, {"kernel": ["forward"]}, {"head_dim": 0}, {"head_dim": -16},
    {"head_dim": 257}, {"head_dim": "16"}, {"head_dim": 16.0}, {"head_dim": True}, {"head_dim": [16]}, {"config": []},
    {"config": None}, {"config": "{}"}, {"config": [["block_m", 16]]}], ids=str)
def test_an_entry_of_nothing_known_is_an_error(use, row):
    use({"kernel": "forward", "head_dim": 16, "config": SHIPPED, **row})
    with pytest.raises(ValueError, match=r"tiles\.json: expected tiles .*entry 0: (kernel|head_dim|config): expected "):
        launched()


def nested(depth):
    return '{"format": 1, "tiles": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize("text", [
    "", "null", "3", '"tiles"', "[]", "{}", '{"format": 1}', '{"format": 1, "tiles": 3}', '{"format": 1, "tiles": {}}',
    '{"format": 1, "tiles": ["dq"]}', '{"format": 1, "tiles": [[]]}', '{"format": 1, "tiles": [{}]}',
    '{"format": [], "tiles": []}', *(json.dumps({**HERE, "format": form, "tiles": []}) for form in (True, 1.0, "1", 2)),
    json.dumps({"format": 1, "tiles": []}), *(json.dumps({**HERE, "arch": arch, "tiles": []}) for arch in (None, [], {}, 90)),
    nested(200_000), nested(900), "9" * 5000, "\x00", '{"format": 1, "tiles": [{"kernel": "dq", "head_dim": 16, "config": '
    + "[" * 900 + "]" * 900 + "}]}"], ids=lambda text: f"{text:.30}")
def test_what_holds_no_tiles_is_one_error(use, text):
    if '"config"' in text:
        text = text.replace("{", json.dumps(HERE)[:-1] + ", ", 1)
    use(text)
    with pytest.raises(ValueError, match=r"tiles\.json: expected tiles"):
        launched()


def test_bytes_that_are_no_text_and_what_may_not_be_read(use, monkeypatch):
    file = use("")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"tiles\.json: expected tiles"):
        launched()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_text", refused)
    with pytest.raises(ValueError, match="Permission denied"):
        launched()


def test_a_bad_file_that_was_found_by_itself_breaks_no_call(use, monkeypatch):
    file = use({"kernel": "forward", "head_dim": 16, "config": {**SHIPPED, "block_n": -16}})
    monkeypatch.setattr(settings, "TILES", None)
    monkeypatch.setattr(tuned, "path", lambda device: file)
    with pytest.warns(RuntimeWarning, match="entry 0: block_n: expected one of"):
        assert launched()["forward_kernel"] == TileConfig(**{**SHIPPED, "options": ()})


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("kernel", tuned.KERNELS)
def test_whatever_the_search_finds_is_taken(arch, kernel):
    """Every neighbour of the shipped tiles that fits, through JSON and back; compiler options are the card's own."""
    for head_dim in {served(kernel, d, d, arch) for d in (32, 64, 128, 256)}:
        start = tuned.shipped(kernel, head_dim, torch.bfloat16, arch)
        if start is None:
            continue
        near = [config for config in tune.neighbours(start) if tuned.fits(config, kernel, head_dim, arch)]
        for config in (start, *near):
            row = json.loads(json.dumps(tuned.row(kernel, head_dim, config)))
            assert tuned.checked(row, arch) == config
            assert tuned.checked(row, arch).options is start.options
        row["config"]["options"].insert(0, ["ir_override", "x"])
        with pytest.raises(ValueError, match="options: expected"):
            tuned.checked(row, arch)


def test_a_planted_link_is_not_followed(tmp_path):
    """Neither at the file's name, nor at any name that an earlier version wrote by."""
    victim, file = tmp_path / "victim", tmp_path / "tiles.json"
    victim.write_text("precious")
    for name in ("tiles.new", "tiles.json.new", ".tiles.json.new", "tiles.tmp", "tiles.json"):
        (tmp_path / name).symlink_to(victim)
    tuned.write(file, {**HERE, "tiles": []})
    assert victim.read_text() == "precious"
    assert not file.is_symlink()
    assert tuned.read(file)["tiles"] == []


def test_a_file_of_the_user_beside_it_stays(tmp_path):
    (tmp_path / "tiles.new").write_text("mine")
    tuned.write(tmp_path / "tiles.json", {**HERE, "tiles": []})
    assert (tmp_path / "tiles.new").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles.json", "tiles.new"]


def test_writers_at_once_leave_one_of_their_files_whole(tmp_path):
    file, errors = tmp_path / "tiles.json", []

    def write(i):
        try:
            for _ in range(40):
                tuned.write(file, {**HERE, "tiles": [], "by": str(i) * 5000})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            assert len(set(tuned.read(file)["by"])) == 1
    assert not errors
    assert os.listdir(tmp_path) == ["tiles.json"]
