"""Every place that leans on a private part of anomalib, Lightning or torch, or changes what they do: one file each.

Each file says what it does, why, since which version, what upstream has to change, and when the file can go.
Tests run with and without each change, so that one that is no longer needed is noticed.
"""
