"""An exported model at work on images as they come."""
