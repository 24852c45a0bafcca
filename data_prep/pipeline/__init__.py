"""What the converters share: shards, workers, ledger, options."""
