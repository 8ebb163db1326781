"""What a file says of itself, in the words of openvino-model-api, whose wrappers then use it as it is meant."""

__all__ = ["model_info"]

_ROOT = "model_info"


def model_info(bits: int, size: tuple[int, int] | None, takes_bytes: bool) -> dict[str, str]:
    """The metadata of a file.

    Args:
        bits: Bits of a value in the images.
        size: Height and width of the images, where they are fixed.
        takes_bytes: Whether the file takes images as cameras give them, and prepares them itself.

    Returns:
        Texts by name.
    """
    highest = 255 if bits == 8 else 65535
    found = {
        "model_type": "AnomalyDetection",
        "task": "segmentation",
        "labels": "Normal Anomalous",
        # Scores come normalised and decided, with the threshold at a half.
        "image_threshold": "0.5",
        "pixel_threshold": "0.5",
        "normalization_scale": "1.0",
        "input_dtype": "u8" if bits == 8 else "u16",
        "resize_type": "standard",
    }
    if takes_bytes:
        height, width = size or (0, 0)
        return {**found, "embedded_processing": "True", "orig_height": str(height), "orig_width": str(width)}
    # Red first: the wrapper of anomaly models swaps channels for images of fixed size alone.
    return {**found, "reverse_input_channels": "False", "scale_values": " ".join([str(highest)] * 3)}
