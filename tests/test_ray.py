import contextlib
import shutil
import threading
import time

import pandas as pd
import psutil
import pytest

from cflow_plugin import CflowError
from cflow_plugin.commands.score import score

from .conftest import run_command
from .test_comparison import compared_once, config_file
from .test_score import draw_pictures, read

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "cflow-plugin[ray]"')
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

_NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def exported(export):
    return export((64, 64))


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two machines, as far as Ray can tell."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args=_NODE)
    cluster.second = cluster.add_node(**{name: value for name, value in _NODE.items() if name != "include_dashboard"})
    yield cluster
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


def test_a_machine_dies_half_way(cluster, exported, tmp_path):
    folder = draw_pictures(tmp_path / "pictures", 40)
    for number in range(1, 13):
        shutil.copytree(folder / "deeper", folder / f"copy {number}")
    (folder / "broken.png").write_bytes(b"not an image")
    expected = {str(path) for path in folder.rglob("*.*")}
    out = tmp_path / "out"
    killed_at = []

    def kill():
        while len(list(out.glob("*.parquet"))) < 12:
            time.sleep(0.002)
        cluster.remove_node(cluster.second, allow_graceful=False)
        killed_at.append(len(list(out.glob("*.parquet"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    score(exported, str(folder), out, engine="ray", address=cluster.address, batch=4)
    killer.join(timeout=30)
    assert killed_at
    assert killed_at[0] < len(expected) / 4
    table = read(out)
    assert len(table) == len(expected)
    assert set(table.index) == expected
    assert list(table.index[table["error"].notna()]) == [str(folder / "broken.png")]
    score(exported, str(folder), tmp_path / "here", batch=50, threads=1)
    pd.testing.assert_frame_equal(read(tmp_path / "here"), table, atol=1e-5)


def test_the_command_starts_a_cluster_of_its_own(exported, tmp_path):
    draw_pictures(tmp_path / "pictures", 6)
    command = ["cflow-plugin", "score", "--model", exported, "--source", "pictures", "--engine", "ray", "--batch", "2"]
    out = run_command(*command, "--workers", "1", cwd=tmp_path)
    assert "6 images in" in out
    first = read(tmp_path / "results/scores")
    assert first["score"].notna().all()
    assert "6 of 6 images are scored already" in run_command(*command, cwd=tmp_path)
    shutil.copy(tmp_path / "pictures/0.BMP", tmp_path / "pictures/1.BMP")
    assert "6 of 7 images are scored already" in run_command(*command, "--engine", "local", cwd=tmp_path)
    pd.testing.assert_frame_equal(read(tmp_path / "results/scores").loc[first.index], first)


def test_no_cluster_and_no_room(cluster, exported, tmp_path):
    draw_pictures(tmp_path / "pictures", 1)
    settings = {"source": str(tmp_path / "pictures"), "output": tmp_path / "out", "engine": "ray"}
    with pytest.raises(CflowError, match="has 2 CPUs"):
        score(exported, **settings, address=cluster.address, threads=2)
    with pytest.raises(CflowError, match=r"no Ray cluster at 127\.0\.0\.1:1 "):
        score(exported, **settings, address="127.0.0.1:1")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_worker_of_a_comparison_is_killed(cluster, common, tmp_path):
    """Its cell is trained again, once; the others are not, and nothing is left half-written. All is as without Ray."""
    seeds = [0]
    name = config_file(tmp_path, seeds=seeds)
    killed = []

    def kill():
        while not killed:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    # Ray names a worker's process by what it runs.
                    if process.name().startswith("ray::_run") and any((tmp_path / "out/cells").glob("*")):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    command = ("cflow-plugin", "compare", "--config", name, "--engine", "ray", "--address", cluster.address)
    out = run_command(*command, cwd=tmp_path)
    killer.join(timeout=30)
    assert killed
    assert "cells failed" not in out
    results = pd.read_csv(tmp_path / "out/results.csv")
    expected = {(model, seed) for model in ("small", "UFLOW") for seed in seeds}
    assert len(results) == len(expected)
    assert {(row.model, row.seed) for row in results.itertuples()} == expected
    assert {folder.name for folder in (tmp_path / "out/cells").iterdir()} == set(results["key"])
    assert not list((tmp_path / "out").rglob("*.partial"))
    report = (tmp_path / "out/report.md").read_text()
    assert report.index("| small ") < report.index("| UFLOW ")
    assert "2 of 2 cells are done already" in run_command(*command, cwd=tmp_path)
    here = pd.read_csv(compared_once(common) / "out/results.csv").set_index("key")
    assert len(here) == 2
    for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
        found = results.set_index("key")[metric][here.index]
        assert found.tolist() == pytest.approx(here[metric].tolist(), abs=1e-6)
