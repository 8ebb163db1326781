"""From scores to decisions: thresholds that keep a false-alarm rate, p-values, and a watch over what they rest on."""
