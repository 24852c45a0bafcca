"""The dual-path network, its pathways, and the folders it is kept in."""
