"""From a trained model to a file (graph, quantization), and from a file to scores (runtime)."""
