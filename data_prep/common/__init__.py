"""What the converters share: the shard protocol, careful readers, words."""
