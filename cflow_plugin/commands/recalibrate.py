"""New thresholds for an exported file, from good images of the line it runs at."""

__all__ = ["recalibrate"]

import logging
from pathlib import Path

from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.deploy.recalibration import recalibrate_file

logger = logging.getLogger(__name__)


def recalibrate(
    model: Path, images: str, output: Path | None = None, rate: float | None = None, device: str = "CPU"
) -> None:
    """Set an exported model's thresholds anew, without training: for another camera, another light, another place.

    The new file keeps the rate for good images like those it is given: let them be a random sample of what passes,
    every one of them looked at and good. Alarms alone, or only what looked easy, would give a threshold that holds for
    nothing else. `cflow-plugin watch --page` draws such a sample.

    Args:
        model: The .xml file that `anomalib export` wrote; it stays as it is.
        images: Folder of good images, a pattern, or a table with their paths.
        output: The new .xml file; by default beside the old one, as NAME-recalibrated.xml.
        rate: False-alarm rate; by default the one that the old file keeps.
        device: OpenVINO device.
    """
    target = model.with_name(f"{model.stem}-recalibrated.xml") if output is None else output
    done = recalibrate_file(model, [Path(path) for path in list_images(images)], target, rate, device)
    logger.info(
        "%s keeps a false-alarm rate of %g by %d good images, of which %s had called %d anomalous; the threshold lies "
        "where %.3f was in its scores.",
        done.model,
        done.rate,
        done.images,
        model.name,
        done.alarms,
        done.threshold,
    )
    if done.odd is not None:
        logger.warning(
            "The threshold rests on one image that is far more unusual than the others, %s. Look at it: if it is no "
            "good part, take it out and do this again.",
            done.odd,
        )
