"""OpenRIL: unified reinforcement and imitation learning for vision-language models (arXiv 2510.19307)."""

__version__ = "0.1.0"
