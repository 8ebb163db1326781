"""A model repository, from which OpenVINO Model Server and Triton serve exported models."""

__all__ = ["make_repository"]

import json
import logging
import shutil
from pathlib import Path

import openvino as ov

from cflow_plugin.commands.serve.serve import find_models
from cflow_plugin.deploy.runtime import read_file
from cflow_plugin.errors import CflowError

logger = logging.getLogger(__name__)

_TYPES = {"f32": "TYPE_FP32", "boolean": "TYPE_BOOL", "u8": "TYPE_UINT8", "u16": "TYPE_UINT16"}  # Triton's names


def make_repository(models: Path, output: Path = Path("results/repository"), mounted: str = "/models") -> None:
    """Lay exported models out for servers that exist, with a configuration for each.

    The folder holds NAME/1/model.xml (and .bin) and NAME/config.pbtxt for each model, as Triton's OpenVINO backend
    wants it, and config.json, which OpenVINO Model Server is pointed to with --config_path.

    Args:
        models: Folder of exported models, .xml; each is called what its file is, or where it lies in a folder of its
            own what that folder is called. Or one exported file.
        output: The repository; it must not exist.
        mounted: Where the server will find the repository.
    """
    found = find_models(models, ("xml",))
    if output.exists():
        message = f"{output} is there already; name another --output, or remove it."
        raise CflowError(message)
    loaded = {name: read_file(path)[0] for name, path in found.items()}
    partial = output.with_name(f".{output.name}.partial")  # what a killed run left is overwritten
    shutil.rmtree(partial, ignore_errors=True)
    for name, path in found.items():
        folder = partial / name / "1"
        folder.mkdir(parents=True)
        for suffix in (".xml", ".bin"):
            shutil.copyfile(path.with_suffix(suffix), folder / f"model{suffix}")
        (partial / name / "config.pbtxt").write_text(_triton(name, loaded[name]))
    servers = [{"config": {"name": name, "base_path": f"{mounted.rstrip('/')}/{name}"}} for name in found]
    (partial / "config.json").write_text(json.dumps({"model_config_list": servers}, indent=2) + "\n")
    partial.rename(output)
    logger.info("%d models for OpenVINO Model Server and Triton are in %s.", len(found), output.absolute())


def _triton(name: str, model: ov.Model) -> str:
    """A model's configuration, in protobuf's text format."""

    def tensors(kind: str, ports: list[ov.Output]) -> str:
        entries = [
            f'  {{ name: "{port.get_any_name()}", data_type: {_TYPES[port.get_element_type().get_type_name()]}, '
            f"dims: [{', '.join(str(_length(side)) for side in port.get_partial_shape())}] }}"
            for port in ports
        ]
        return f"{kind} [\n" + ",\n".join(entries) + "\n]\n"

    head = f'name: "{name}"\nbackend: "openvino"\nmax_batch_size: 0\n'  # the batch is among the dimensions
    return head + tensors("input", model.inputs) + tensors("output", model.outputs)


def _length(side: ov.Dimension) -> int:
    return side.get_length() if side.is_static else -1
