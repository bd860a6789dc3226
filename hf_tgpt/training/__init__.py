"""Training an adapter: the loop, what a run needs to go on after a kill, and what it leaves behind."""

from .config import TrainingConfig as TrainingConfig
from .loop import train as train
