"""An ONNX file after its export: settled, with notes, and held against what runtimes take."""

__all__ = ["describe_onnx", "note_in_onnx", "settle_onnx"]

import logging
from collections.abc import Mapping
from pathlib import Path

from cflow_plugin.files import atomic_file

logger = logging.getLogger(__name__)

_SMALL = 64  # numbers in what may be computed beforehand: settings, and no weights
_TENSORRT_TOP = 3840


def settle_onnx(path: Path) -> None:
    """Take choices out of an ONNX file that are made already, such as whether there is a range to normalise by.

    A runtime that takes them out itself may leave an output with two names, and then OpenVINO's users, anomalib's
    inferencer among them, find it by either.

    Args:
        path: The file.
    """
    from onnxscript import ir, optimizer  # they take their time, and only ONNX needs them

    def is_settled(node: ir.Node) -> bool | None:
        return True if all(value is None or value.const_value is not None for value in node.inputs) else None

    model = ir.load(path)
    graph = model.graph
    optimizer.fold_constants(model, input_size_limit=_SMALL, output_size_limit=_SMALL, should_fold=is_settled)
    for node in [node for node in graph if node.op_type == "Where"]:
        inputs, result = node.inputs, node.outputs[0]
        condition = None if inputs[0] is None else ir.convenience.get_const_tensor(inputs[0])
        if condition is None or condition.size != 1:
            continue
        chosen = inputs[1 if condition.numpy().item() else 2]
        if chosen is None or chosen.producer() is None or chosen.is_graph_output():
            continue
        for place, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[place] = chosen
                result.name, chosen.name = f"{result.name}_before", result.name
        ir.convenience.replace_all_uses_with(result, chosen)
    optimizer.remove_unused_nodes(model)
    with atomic_file(path) as partial:
        ir.save(model, partial)


def note_in_onnx(path: Path, notes: Mapping[str, str]) -> None:
    """Add notes to an ONNX file's metadata.

    Args:
        path: The file.
        notes: Texts by their keys; without any the file is left alone.
    """
    if not notes:
        return
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {**{entry.key: entry.value for entry in model.metadata_props}, **notes})
    with atomic_file(path) as partial:
        onnx.save(model, partial)


def describe_onnx(path: Path) -> None:
    """Log a file's opset and operators, and where TensorRT's limits are passed.

    Args:
        path: The file.

    References:
        TensorRT 10 takes opsets 9 to 20 (onnx/onnx-tensorrt, docs/operators.md), and of TopK k up to 3840
        (https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html).
    """
    import onnx

    graph = onnx.load(path, load_external_data=False)
    opset = max(entry.version for entry in graph.opset_import if entry.domain in {"", "ai.onnx"})
    operators = sorted({node.op_type for node in graph.graph.node})
    logger.info("ONNX opset %d, operators %s.", opset, ", ".join(operators))
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.graph.node if node.op_type == "Constant"}
    for node in graph.graph.node:
        if node.op_type == "TopK" and node.input[1] in constants:
            highest = int(onnx.numpy_helper.to_array(constants[node.input[1]], str(path.parent)).item())
            if highest > _TENSORRT_TOP:
                logger.warning(
                    "TensorRT will refuse this file: the score is the mean of the map's %d highest pixels, and "
                    "it takes %d at most. For it, train with a smaller --model.top_fraction or --model.image_size.",
                    highest,
                    _TENSORRT_TOP,
                )
