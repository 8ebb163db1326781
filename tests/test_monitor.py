import csv
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, kstest

from cflow_plugin import CflowError
from cflow_plugin.commands.monitor import ExchangeabilityTest, monitor
from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.decisions.score_tables import read_history, read_scores

from .conftest import run_command


def write_scores(path, scores):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "score", "anomalous"])
        table.writerows([f"{index}.png", f"{score:.6f}", 0] for index, score in enumerate(scores))
    return path


def capital_of(reference, stream, seed=0):
    test = ExchangeabilityTest(reference, seed)
    highest = 0.0
    for score in stream:
        test.update(score)
        highest = max(highest, test.log_capital)
    return highest


def brute_force(p_values):
    """The same bets as a plain sum over the times at which their money is put in."""
    capital = []
    for now in range(1, len(p_values) + 1):
        total = 1 / (now + 1)
        for start in range(1, now + 1):
            for strength in (-1, -0.5, 0.5, 1):
                for bet in (lambda p: 2 * p - 1, lambda p: 6 * p * p - 6 * p + 1):
                    stake = 1 / (start * (start + 1) * 8)
                    total += stake * math.prod(1 + strength * bet(p) for p in p_values[start - 1 : now])
        capital.append(total)
    return capital


def test_the_capital_equals_brute_force():
    generator = np.random.default_rng(0)
    test = ExchangeabilityTest(generator.random(10))
    p_values, capital = [], []
    for score in generator.random(25) + 0.3:
        p_values.append(test.update(score))
        capital.append(math.exp(test.log_capital))
    assert capital == pytest.approx(brute_force(p_values), rel=1e-9)


def test_p_values_are_ranks():
    generator = np.random.default_rng(1)
    reference = list(generator.random(20))
    test = ExchangeabilityTest(reference)
    for score in generator.random(30):
        p = test.update(score)
        higher = sum(other > score for other in reference)
        assert higher / (len(reference) + 1) <= p <= (higher + 1) / (len(reference) + 1)
        reference.append(score)


@pytest.mark.parametrize("decimals", [6, 1], ids=["distinct", "with ties"])
def test_p_values_are_uniform_and_independent(decimals):
    generator = np.random.default_rng(2)
    found = []
    for seed in range(1000):
        scores = np.round(generator.gamma(3, 0.1, 24), decimals)
        test = ExchangeabilityTest(scores[:20], seed)
        found.append([test.update(score) for score in scores[20:]])
    found = np.array(found)
    for column in found.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    correlations = np.corrcoef(found.T)[np.triu_indices(4, 1)]
    assert abs(correlations).max() < 4 / 1000**0.5


@pytest.mark.long
@pytest.mark.parametrize("error_rate", [0.2, 0.05])
def test_false_alarms_are_as_rare_as_stated(error_rate):
    generator = np.random.default_rng(3)
    streams = 400
    alarms = sum(
        capital_of(scores[:30], scores[30:], seed) >= -math.log(error_rate)
        for seed, scores in enumerate(generator.gamma(2, 0.1, (streams, 230)))
    )
    assert binomtest(alarms, streams, error_rate, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0.15, lambda x: x - 0.15, lambda x: 0.5 + 3 * (x - 0.5), lambda x: 0.5 + 0.2 * (x - 0.5)],
    ids=["higher", "lower", "wider", "narrower"],
)
@pytest.mark.parametrize("before", [0, 300])
def test_a_change_is_found(change, before):
    found = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        scores = generator.normal(0.5, 0.1, before + 240)
        scores[40 + before :] = change(scores[40 + before :])
        found += capital_of(scores[:40], scores[40:], seed) >= math.log(100)
    assert found >= 19


@pytest.mark.long
def test_the_command(tmp_path):
    generator = np.random.default_rng(4)
    good = write_scores(tmp_path / "good.csv", generator.normal(0.3, 0.05, 100))
    same = write_scores(tmp_path / "same.csv", generator.normal(0.3, 0.05, 80))
    moved = write_scores(tmp_path / "moved.csv", [*generator.normal(0.3, 0.05, 40), *generator.normal(0.4, 0.05, 60)])
    out = run_command("cflow-plugin", "monitor", "--recent", same, "--reference", good, cwd=tmp_path, fresh=True)
    assert "No change: 80 images" in out
    verdict = json.loads((tmp_path / "results/monitor/monitor.json").read_text())
    assert not verdict["changed"]
    assert verdict["alarm_at_image"] is None

    monitor_it = ["--recent", moved, "--reference", good, "--output", "there", "--error_rate", "0.001"]
    out = run_command("cflow-plugin", "monitor", *monitor_it, cwd=tmp_path, expect=3)
    assert "CHANGED" in out
    assert "Traceback" not in out
    verdict = json.loads((tmp_path / "there/monitor.json").read_text())
    assert 40 < verdict["alarm_after_images"] < 80
    assert verdict["alarm_at_image"] == f"{verdict['alarm_after_images'] - 1}.png"
    with (tmp_path / "there/monitor.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    first = next(index for index, row in enumerate(rows) if float(row["evidence_log10"]) >= 3)
    assert first + 1 == verdict["alarm_after_images"]
    assert (tmp_path / "there/monitor.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"monitor.json", "monitor.csv", "monitor.png"}


@pytest.mark.long
def test_it_explains_itself(tmp_path):
    out = run_command("cflow-plugin", "monitor", "--help", cwd=tmp_path)
    out = " ".join(out.split())
    for word in ("--recent", "--reference", "--error_rate", "exit code", "false alarm"):
        assert word in out
    assert "No help" not in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no score in"),
        ("image,score\n", "no score in"),
        ("image,value\na,1\n", "Line 2 .* column 'score'"),
        ("image,score\na,0.5\nb,nan\n", "Line 3 .* column 'score'"),
        ("image,score\na,0.5\nb\n", "Line 3 .* column 'score'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    good = write_scores(tmp_path / "good.csv", [0.1, 0.2])
    (tmp_path / "bad.csv").write_text(text)
    for recent, reference in (("bad.csv", good), (good, "bad.csv")):
        with pytest.raises(CflowError, match=words):
            monitor(tmp_path / recent, tmp_path / reference, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared(tmp_path, export):
    good = write_scores(tmp_path / "good.csv", [0.1, 0.2])
    (tmp_path / "damaged.ckpt").write_bytes(b"nothing")
    (tmp_path / "damaged.xml").write_bytes(b"nothing")
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    (tmp_path / "picture.png").write_bytes(b"nothing")
    (tmp_path / "images").mkdir()
    for recent, reference, words in (
        ("good.csv", "absent.csv", "no file"),
        ("absent.csv", "good.csv", "could not be read"),
        ("good.csv", "damaged.ckpt", "damaged"),
        ("good.csv", "damaged.xml", "damaged"),
        ("good.csv", "damaged.onnx", "damaged"),
        ("good.csv", "picture.png", "no exported model"),
        ("images", "good.csv", "exported model is needed"),
    ):
        with pytest.raises(CflowError, match=words):
            monitor(tmp_path / recent, tmp_path / reference, output=tmp_path / "out")
    with pytest.raises(CflowError, match="error_rate"):
        monitor(good, good, error_rate=1.0)
    without = export(None)
    with pytest.raises(CflowError, match="target_false_alarm_rate"):
        monitor(good, without, output=tmp_path / "out")


# Tables of a line's life


def watched(path, scores, reference=None, start=0):
    """A table as watch writes it."""
    table = pd.DataFrame({"image": [f"{start + index}.png" for index in range(len(scores))], "score": scores})
    if reference is not None:
        table["p_value"] = p_values(scores, np.sort(reference))
    table.to_csv(path, index=False, float_format="%.6f", lineterminator="\r\n")
    return path


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_live_table_wherever_it_is_cut(tmp_path, cut):
    """What is read of a table that is being written is always the beginning of what it becomes."""
    whole = watched(tmp_path / "scores.csv", [0.123456, 0.654321], [0.1, 0.3])
    full = read_scores(whole)
    whole.write_bytes(whole.read_bytes()[:-cut])
    found = read_scores(whole, may_be_empty=True)
    assert len(found.scores) in {0, 1}
    np.testing.assert_array_equal(found.scores, full.scores[: len(found.scores)])


def test_a_name_is_cut_within_a_letter(tmp_path):
    (tmp_path / "scores.csv").write_bytes("image,score\na.png,0.5\nö".encode()[:-1])
    assert read_scores(tmp_path / "scores.csv").names == ["a.png"]


def test_the_tables_of_score(tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    names = [f"/line/{number}.png" for number in range(12)]
    for part, rows in (("b", slice(0, 6)), ("a", slice(6, 12))):  # files are named by a hash, and in no order
        scores = [None if name == "/line/3.png" else float(name[6:-4]) / 20 for name in names[rows]]
        pd.DataFrame({"path": names[rows], "score": scores, "error": None}).to_parquet(folder / f"part-{part}.parquet")
    found = read_scores(folder)
    assert found.names == [name for name in names if name != "/line/3.png"]
    np.testing.assert_allclose(found.scores, [n / 20 for n in range(12) if n != 3])
    assert read_history([folder]).names == read_scores(folder).names
    (folder / "part-a.parquet").write_bytes(b"nothing")
    with pytest.raises(CflowError, match="could not be read as Parquet"):
        read_scores(folder)


def test_the_folder_of_watch_is_one_history(tmp_path):
    generator = np.random.default_rng(5)
    reference = np.round(generator.normal(0.3, 0.05, 60), 6)
    stream = np.round([*generator.normal(0.3, 0.05, 50), *generator.normal(0.36, 0.05, 50)], 6)
    good = watched(tmp_path / "good.csv", reference)
    line = tmp_path / "line"
    line.mkdir()
    parts = ("scores_2026-05-01_10-00-00-0.csv", "scores_2026-05-02_10-00-00-0.csv", "scores.csv")
    for name, rows in zip(parts, np.split(np.arange(100), [30, 70]), strict=True):
        watched(line / name, stream[rows], reference, start=rows[0])
    whole = watched(tmp_path / "whole.csv", stream, reference)
    verdicts = []
    for recent in (line, whole, [line / name for name in parts]):
        with pytest.raises(SystemExit) as ended:
            monitor(recent, good, output=tmp_path / "out")
        assert ended.value.code == 3
        verdicts.append(json.loads((tmp_path / "out/monitor.json").read_text()))
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert 50 < verdicts[0]["alarm_after_images"] < 100


def test_a_table_of_another_model(tmp_path, caplog):
    generator = np.random.default_rng(6)
    reference, other = generator.normal(0.3, 0.05, 60), generator.normal(0.5, 0.1, 60)
    good = watched(tmp_path / "good.csv", reference)
    line = tmp_path / "line"
    line.mkdir()
    before = watched(line / "scores_2025.csv", generator.normal(0.5, 0.1, 40), other)
    watched(line / "scores.csv", generator.normal(0.3, 0.05, 40), reference)
    monitor(line, good, output=tmp_path / "out")
    assert "scores_2025.csv holds scores of another model" in caplog.text
    assert json.loads((tmp_path / "out/monitor.json").read_text())["images"] == 40
    with pytest.raises(CflowError, match=r"scores_2025\.csv holds scores of another model"):
        monitor([before], good, output=tmp_path / "out")


@pytest.mark.long
def test_the_rate_holds_for_the_whole_history_and_not_for_each_table(tmp_path):
    """Twenty tables each tested by itself raise far more false alarms than their history tested as one."""
    generator = np.random.default_rng(7)
    lives, tables, error_rate = 120, 20, 0.2
    whole = alone = 0
    for life in range(lives):
        scores = generator.gamma(2, 0.1, 30 + 20 * tables)
        parts = np.split(scores[30:], tables)
        limit = -math.log(error_rate)
        whole += capital_of(scores[:30], scores[30:], life) >= limit
        alone += any(capital_of(scores[:30], part, life) >= limit for part in parts)
    assert binomtest(whole, lives, error_rate, alternative="greater").pvalue > 1e-3
    assert binomtest(alone, lives, error_rate, alternative="greater").pvalue < 1e-3


def test_going_on_changes_nothing_that_was_said():
    """The command may be repeated while the history grows: its evidence so far stays what it was."""
    generator = np.random.default_rng(8)
    reference, stream = np.round(generator.random(20), 1), np.round(generator.random(40), 1)  # with ties
    evidence = []
    for length in (10, 25, 40):
        test = ExchangeabilityTest(reference, seed=0)
        evidence.append([(test.update(score), test.log_capital) for score in stream[:length]])
    assert evidence[0] == evidence[2][:10]
    assert evidence[1] == evidence[2][:25]
