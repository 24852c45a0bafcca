"""The multimodal language model and its adapter."""
