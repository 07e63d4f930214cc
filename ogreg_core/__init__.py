"""OG-ReG and its peers: video, data, models, training. Imports nothing; see the subpackages."""

__version__ = "0.1.0"
