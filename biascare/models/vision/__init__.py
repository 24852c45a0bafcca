"""The SAM-style segmentation pathway."""
