"""Training an adapter: the loop, what a run needs to continue after it was killed, and its results."""

from .config import TrainingConfig as TrainingConfig
from .loop import train as train
