"""What it costs to save and restore with far more ranks than there are machines here. The code is what runs; no byte
of a tensor is there."""
