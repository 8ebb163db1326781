"""From scores to decisions: thresholds that keep a false-alarm rate, p-values, and a test of what they rest on."""
