"""Training an adapter: the loop, what a killed run needs to continue, and its results."""

from .config import TrainingConfig as TrainingConfig
from .loop import train as train
