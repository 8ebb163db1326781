"""What exported files say of themselves, read without running them."""

__all__ = ["read_note"]

from pathlib import Path
from xml.etree import ElementTree

from cflow_plugin.errors import CflowError


def read_note(path: Path, key: str) -> str | None:
    """Read what an exported file has under a name.

    Args:
        path: The .xml or .onnx file.
        key: The name.

    Raises:
        CflowError: If it cannot be read.
    """
    try:
        if path.suffix.lower() == ".xml":
            found = ElementTree.parse(path).find(f"./rt_info/{key}")
            return None if found is None else found.get("value")
        import openvino as ov  # where there is an ONNX file to read, it is there, and the package onnx need not be

        model, place = ov.Core().read_model(path), ["framework", key]
        return model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
    except Exception as error:  # what damaged files raise differs from format to format
        message = f"{path} could not be read: it is damaged, or not what its name says."
        raise CflowError(message) from error
