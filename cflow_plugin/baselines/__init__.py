"""Methods the paper compares with that anomalib lacks, on CflowPlugin's encoder, pre-processing and metrics."""
