"""How much of the calibration prompts is used unless the user says otherwise."""

DEFAULT_TOKENS = 32768
DEFAULT_LENGTH = 512
