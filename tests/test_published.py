import numpy as np
import pytest

from cflow_plugin.commands.compare.published import published_table


@pytest.mark.parametrize("number", [2, 3])
def test_averages_are_those_of_the_classes(number):
    # The paper prints both, so a figure copied wrongly shows. It contradicts itself in two places: PaDiM's AUPRO of
    # leather and SPADE's of wood are 9 and 10 below and above what the averages it prints imply.
    misprints = {("PaDiM", "leather"): 97.8, ("SPADE", "wood"): 87.4}
    table = published_table(number)
    keys = [column for column in table.columns if column not in {"category", "value", "sigma"}]
    for key, rows in table.groupby(keys):
        classes = rows[rows["category"] != "average"]
        assert len(classes) == 15
        [average] = rows[rows["category"] == "average"]["value"]
        values = [
            misprints.get((row.model, row.category), row.value) if row.metric == "pixel_AUPRO" else row.value
            for row in classes.itertuples()
        ]
        assert np.mean(values) == pytest.approx(average, abs=0.06), key


def test_tables_agree_where_they_overlap():
    ablation, classes, means = (published_table(number) for number in (2, 3, 4))
    best = ablation[(ablation["encoder"] == "wide_resnet50_2") & (ablation["category"] == "leather")]["value"].max()
    ours = classes[(classes["model"] == "CFLOW-AD") & (classes["encoder"] == "wide_resnet50_2")]
    assert best == ours[(ours["category"] == "leather") & (ours["metric"] == "pixel_AUROC")]["value"].item()
    for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
        mean = means[(means["model"] == "CFLOW-AD") & (means["metric"] == metric)]["value"].item()
        assert mean == ours[(ours["category"] == "average") & (ours["metric"] == metric)]["value"].item()


def test_every_method_is_there():
    methods = {model for number in range(2, 7) for model in published_table(number)["model"]}
    others = {"CutPaste", "SPADE", "PaDiM", "DifferNet", "DFR", "Patch SVDD", "CAVGA"}
    assert methods == others | {"CFLOW-AD", "UFLOW", "encoder"}
