"""Configuration: keys, their schema, strict YAML."""
