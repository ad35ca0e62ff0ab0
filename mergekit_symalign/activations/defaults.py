"""What is used of the calibration prompts unless the user says otherwise, and the set that ships with the package."""

from pathlib import Path

DEFAULT_TOKENS = 32768
DEFAULT_LENGTH = 512
DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")  # calibration: default
