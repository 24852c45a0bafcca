"""biascare: bias-aware training of a multimodal medical foundation model (BiasCareVL).

Importing the package loads nothing heavy; import the module you need.
"""

__version__ = "0.1.0"
