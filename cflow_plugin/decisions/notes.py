"""What exported files say of themselves, read without any runtime."""

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
        import onnx

        model = onnx.load(path, load_external_data=False)
        return next((entry.value for entry in model.metadata_props if entry.key == key), None)
    except Exception as error:  # what damaged files raise differs from format to format
        message = f"{path} could not be read: it is damaged, or not what its name says."
        raise CflowError(message) from error
