"""One program per raw dataset: raw release in, record folders out."""
