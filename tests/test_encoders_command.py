import csv

import pytest
import timm

from cflow_plugin.commands.encoders import encoders
from cflow_plugin.errors import CflowError


def test_a_table_of_what_timm_has(tmp_path, capsys):
    encoders(search="test_res*", output=tmp_path / "encoders.csv")
    out = capsys.readouterr().out
    with (tmp_path / "encoders.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["encoder"] for row in rows] == timm.list_pretrained("test_res*")
    for row in rows:
        theirs = timm.create_model(row["encoder"].split(".")[0], features_only=True, out_indices=(2, 3, 4)).feature_info
        assert row["layers"].split() == theirs.module_name()
        assert list(map(int, row["channels"].split())) == theirs.channels()
        assert list(map(int, row["strides"].split())) == [8, 16, 32] == theirs.reduction()
        assert row["licence"] == timm.get_pretrained_cfg(row["encoder"]).license
        assert row["encoder"] in out


def test_how_long_one_takes_here(tmp_path):
    encoders(search="test_vit.*", measure=True, image_size=(100, 100), output=tmp_path / "encoders.csv")
    with (tmp_path / "encoders.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["milliseconds"].endswith(" at 96×96")
    assert float(row["milliseconds"].split()[0]) > 0


def test_a_name_that_there_is_not_is_refused():
    with pytest.raises(CflowError, match="no encoder of a name like 'nosuch'"):
        encoders(search="nosuch")
